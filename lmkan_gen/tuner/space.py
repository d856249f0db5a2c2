"""What can be tried for a problem: all families' candidates, less those that cannot run."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

from lmkan_gen.codegen import render
from lmkan_gen.families import Parameters, families, family
from lmkan_gen.plan import Constant, KernelSpec
from lmkan_gen.problem import Problem
from lmkan_gen.selection import Tier, default_choice, tuned_choices
from lmkan_gen.toolchain import compiler

_NEIGHBOURS = 3


@dataclass(frozen=True, order=True)
class Candidate:
    """A kernel family with values for its parameters."""

    family: str
    settings: tuple[tuple[str, Constant], ...]

    @classmethod
    def make(cls, name: str, parameters: Parameters) -> Candidate:
        """A candidate with its settings in a canonical order."""
        return cls(name, tuple(sorted(parameters.items())))

    @property
    def parameters(self) -> dict[str, Constant]:
        """The settings as a mapping."""
        return dict(self.settings)

    def spec(self, problem: Problem) -> KernelSpec:
        """The source to render for ``problem``."""
        return family(self.family).spec(problem, self.parameters)

    def __str__(self) -> str:
        return f"{self.family}({', '.join(f'{k}={v}' for k, v in self.settings)})"


@dataclass(frozen=True)
class Space:
    """The candidates of a problem.

    Attributes:
        feasible: those that can run, in a fixed order; first the ones that pruning left, of which there
            are ``count``, then seeds that it had not left.
        rejected: how many points of the families' spaces each limit excludes.
        default: the analytic default; None when no family has one.
        seeds: what was tuned for this very problem, the default, the winners of similar problems, and the
            defaults of all families: where a search should begin.
    """

    problem: Problem
    feasible: tuple[Candidate, ...]
    count: int
    rejected: Mapping[str, int]
    default: Candidate | None
    seeds: tuple[Candidate, ...]

    def fingerprint(self) -> str:
        """Changes with the problem, the candidates, the families' templates and the compiler.

        Not with the seeds, which differ between machines that share a search.

        Raises:
            CompilerMissing: nothing can be compiled here.
        """
        searched = self.feasible[: self.count]
        digest = hashlib.sha256(repr((self.problem, searched)).encode())
        for name in sorted({c.family for c in searched}):
            example = next(c for c in searched if c.family == name)
            spec = example.spec(self.problem)
            digest.update(render(spec).encode())
            digest.update(compiler(spec).identity.encode())
        return digest.hexdigest()


def explore(problem: Problem) -> Space:
    """Enumerate and prune. A point is counted once, under the first limit it breaks."""
    feasible: list[Candidate] = []
    rejected: Counter[str] = Counter()
    defaults: list[Candidate] = []
    for f in families(problem.device.kind, problem.operation, problem.table):
        if (guess := f.default(problem)) is not None and not f.violations(problem, guess):
            defaults.append(Candidate.make(f.name, guess))
        for parameters in f.candidates(problem):
            if violations := f.violations(problem, parameters):
                rejected[violations[0].limit] += 1
            elif f.wasted(problem, parameters):
                rejected["wasted"] += 1
            else:
                feasible.append(Candidate.make(f.name, parameters))
    first = default_choice(problem)
    default = Candidate.make(first.family, first.parameters) if first and first.family else None
    tuned = [c for c in islice(tuned_choices(problem), _NEIGHBOURS) if c.family]
    # what runs now comes first: a search that is cut short must not end with something slower
    known = [Candidate.make(c.family, c.parameters) for c in tuned if c.family and c.tier is Tier.EXACT]
    known += [default] if default else []
    known += [Candidate.make(c.family, c.parameters) for c in tuned if c.family]
    # which family is the fastest is the first thing that a search should find out
    known += defaults
    seeds = tuple(dict.fromkeys(known))
    # what is known to work stays in, even where pruning by waste is too strict
    everything = tuple(dict.fromkeys((*feasible, *seeds)))
    return Space(problem, everything, len(feasible), dict(rejected), default, seeds)
