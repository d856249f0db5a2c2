"""What can be tried for a problem: all families' candidates, less those that cannot run."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from random import Random

from lmkan_gen.codegen import render
from lmkan_gen.families import Parameters, families, family, walk
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

    def replaced(self, name: str, value: Constant) -> Candidate:
        """The same with another value of one parameter."""
        return Candidate.make(self.family, {**self.parameters, name: value})

    def spec(self, problem: Problem) -> KernelSpec:
        """The source to render for ``problem``."""
        return family(self.family).spec(problem, self.parameters)

    def __str__(self) -> str:
        return f"{self.family}({', '.join(f'{k}={v}' for k, v in self.settings)})"


@dataclass(frozen=True)
class Space:
    """The candidates of a problem. They are not listed: of millions of points, many thousands may be some.

    Attributes:
        values: per family, all values of its parameters.
        judge: says which limit a family's parameters break, of which it reads no more than that takes; None
            where they are worth trying.
        default: the analytic default; None when no family has one.
        seeds: what was tuned for this very problem, the default, the winners of similar problems, and the
            defaults of all families: where a search should begin. They are candidates even where pruning by
            waste is too strict for them.
    """

    problem: Problem
    values: Mapping[str, walk.Space]
    judge: Callable[[str, Parameters], str | None] = field(repr=False, compare=False)
    default: Candidate | None
    seeds: tuple[Candidate, ...]

    def allows(self, candidate: Candidate) -> bool:
        """Whether it is one of the candidates."""
        limit = self.limit(candidate)
        return limit is None or (limit == "wasted" and candidate in self.seeds)

    def limit(self, candidate: Candidate) -> str | None:
        """Which limit it breaks, ``space`` where it has other parameters or values; None: none."""
        values, parameters = self.values.get(candidate.family), candidate.parameters
        if values is None or values.keys() != parameters.keys():
            return "space"
        if any(parameters[name] not in allowed for name, allowed in values.items()):
            return "space"
        return self.judge(candidate.family, parameters)

    def candidates(self) -> Iterator[Candidate]:
        """All of them, seeds first; their number may be large, and so the time until the next one."""
        seeds = dict.fromkeys(filter(self.allows, self.seeds))
        yield from seeds
        for name in self.values:
            points = (Candidate.make(name, p) for p in walk.fitting(self.values[name], self._judge(name)))
            yield from (c for c in points if c not in seeds)

    def size(self, most: int) -> int:
        """How many there are, or ``most``, if there are no fewer."""
        return sum(1 for _ in islice(self.candidates(), most))

    def draw(self, random: Random) -> Candidate | None:
        """One at random, of all families alike; None where only seeds are left."""
        if not self._examples:
            return None
        name = random.choice(list(self._examples))
        point = walk.draw(self.values[name], self._judge(name), random)
        return None if point is None else Candidate.make(name, point)

    def steps(self, candidate: Candidate) -> Iterator[Candidate]:
        """What differs in one parameter, by one step in either direction past those that cannot run."""
        for name, values in self.values.get(candidate.family, {}).items():
            if candidate.parameters[name] not in values:
                continue
            at = values.index(candidate.parameters[name])
            for side in (reversed(values[:at]), values[at + 1 :]):
                others = (candidate.replaced(name, value) for value in side)
                yield from islice(filter(self.allows, others), 1)

    @cached_property
    def tally(self) -> Tally:
        """Every point, counted. It takes up to a second."""
        candidates, rejected = 0, Counter[str]()
        for name, values in self.values.items():
            for branch in walk.branches(values, self._judge(name)):
                if branch.limit is None:
                    candidates += branch.size
                else:
                    rejected[branch.limit] += branch.size
        spared = sum(self.limit(seed) == "wasted" for seed in set(self.seeds))
        rejected["wasted"] -= spared
        return Tally(candidates + spared, dict(+rejected))

    def fingerprint(self) -> str:
        """Changes with the problem, the values of parameters, the families' templates and the compiler.

        Not with the seeds, which differ between machines that share a search.

        Raises:
            CompilerMissing: nothing can be compiled here.
        """
        digest = hashlib.sha256(repr((self.problem, self.values)).encode())
        for example in self._examples.values():
            spec = example.spec(self.problem)
            digest.update(render(spec).encode())
            digest.update(compiler(spec).identity.encode())
        return digest.hexdigest()

    @cached_property
    def _examples(self) -> dict[str, Candidate]:
        """The first candidate of each family that has one."""
        found = {n: next(walk.fitting(values, self._judge(n)), None) for n, values in self.values.items()}
        return {name: Candidate.make(name, point) for name, point in found.items() if point is not None}

    def _judge(self, name: str) -> walk.Judge:
        return partial(self.judge, name)


@dataclass(frozen=True)
class Tally:
    """How many points are candidates, and how many break which limit: the first that is found."""

    candidates: int
    rejected: Mapping[str, int]


def explore(problem: Problem) -> Space:
    """The candidates of a problem."""
    some = families(problem.device.kind, problem.operation, problem.table)
    defaults: list[Candidate] = []
    for f in some:
        if (guess := f.default(problem)) is not None and not f.violations(problem, guess):
            defaults.append(Candidate.make(f.name, guess))
    first = default_choice(problem)
    default = Candidate.make(first.family, first.parameters) if first and first.family else None
    tuned = [c for c in islice(tuned_choices(problem), _NEIGHBOURS) if c.family]
    # what runs now comes first: a search that is cut short must not end with something slower
    known = [Candidate.make(c.family, c.parameters) for c in tuned if c.family and c.tier is Tier.EXACT]
    known += [default] if default else []
    known += [Candidate.make(c.family, c.parameters) for c in tuned if c.family]
    # which family is the fastest is the first thing that a search should find out
    known += defaults
    return Space(
        problem,
        {f.name: dict(f.space(problem.operation)) for f in some},
        lambda name, parameters: family(name).rejection(problem, parameters),
        default,
        tuple(dict.fromkeys(known)),
    )
