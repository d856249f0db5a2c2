"""What a call could have got instead of the kernel that was chosen for it, and what could not run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random

from lmkan_gen.families import Family, Parameters, families
from lmkan_gen.problem import TableDtype
from lmkan_gen.selection import Choice
from lmkan_gen.tuning_sources import evidence

#: points of a family's space that are asked why they cannot run
_ASKED = 300


@dataclass(frozen=True)
class RunnerUp:
    """The best known kernel of a family for a problem.

    Attributes:
        family: its name.
        parameters: the family's.
        time_us: what it takes; None when nothing was measured that says so.
        measured: whether that is a measurement of this call on this device; otherwise it is scaled by the
            number of function evaluations from ``origin``.
        origin: where parameters and time come from, in words.
    """

    family: str
    parameters: Parameters
    time_us: float | None
    measured: bool
    origin: str


@dataclass(frozen=True)
class Excluded:
    """A family that cannot run a problem, and what stands in the way of the point that is nearest to it."""

    family: str
    reason: str


def runners_up(choice: Choice) -> list[RunnerUp]:
    """The best of every other family that can run the problem: measured ones, then those with scaled times.

    A family is represented by what tuning files say of it for the nearest shape, or else by its default.
    """
    problem = choice.problem
    found = []
    for f in _families(choice):
        if f.name != choice.family and (best := _from_files(choice, f) or _default(choice, f)) is not None:
            found.append((best, f.preference(problem)))
    found.sort(key=lambda item: (not item[0].measured, item[0].time_us or math.inf, -item[1]))
    return [best for best, _ in found]


def excluded(choice: Choice) -> list[Excluded]:
    """Families that have kernels for the operation, but none that can run this problem."""
    problem = choice.problem
    able = {choice.family, *(r.family for r in runners_up(choice))}
    found = [Excluded(f.name, _why_not(choice, f)) for f in _families(choice) if f.name not in able]
    wider = families(problem.device.kind, problem.operation, TableDtype.FLOAT32)
    reads = {f.name for f in _families(choice)}
    found += [
        Excluded(f.name, f"has no kernel for {problem.table} tables") for f in wider if f.name not in reads
    ]
    return found


def _families(choice: Choice) -> tuple[Family, ...]:
    problem = choice.problem
    return families(problem.device.kind, problem.operation, problem.table)


def _from_files(choice: Choice, f: Family) -> RunnerUp | None:
    problem = choice.problem
    for distance, found in evidence(problem):
        entry = found.entry
        if entry.family != f.name or f.violations(problem, found.parameters):
            continue
        exact = found.same_device and not distance and entry.measured_on is None
        time_us = entry.time_us.median if exact else found.cost * problem.shape.evaluations / 1e6
        where = "" if found.same_device else " on another device"
        origin = str(found.source.path) if exact else f"{entry.shape.layer}{where}, {found.source.path}"
        return RunnerUp(f.name, found.parameters, time_us, exact, origin)
    return None


def _default(choice: Choice, f: Family) -> RunnerUp | None:
    parameters = f.default(choice.problem)
    if parameters is None or f.violations(choice.problem, parameters):
        parameters = next(f.drawn(choice.problem, Random(0), _ASKED), None)
        origin = "no default fits, but some parameters do"
    else:
        origin = "analytic default"
    return None if parameters is None else RunnerUp(f.name, parameters, None, False, origin)


def _why_not(choice: Choice, f: Family) -> str:
    """What the point says that is wrong in the fewest ways."""
    found = (f.violations(choice.problem, point) for point in islice(_points(choice, f), _ASKED))
    least = min(found, key=len, default=[])
    return "; ".join(dict.fromkeys(v.message for v in least)) or "none of the parameters that were tried fits"


def _points(choice: Choice, f: Family) -> Iterator[Parameters]:
    space, random = f.space(choice.problem.operation), Random(0)
    if (default := f.default(choice.problem)) is not None:
        yield default
    while True:
        yield {name: random.choice(values) for name, values in space.items()}
