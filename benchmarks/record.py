"""Record measured spaces on this machine's device, for `benchmarks.replay`.

A space is measured whole or, where it is too large, made of fewer values of its parameters, so that the steps
that a search takes still lead somewhere. Values that searches begin with stay.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.common import DeviceOption, choose_device
from benchmarks.records import DIRECTORY, Measured, Record, save
from lmkan_gen import device as devices
from lmkan_gen import toolchain
from lmkan_gen.cli.options import parse_shape
from lmkan_gen.families import Family, families, family
from lmkan_gen.plan import Constant, KernelSpec
from lmkan_gen.problem import Operation, Problem, TableDtype
from lmkan_gen.selection import Tier, tuned_choices
from lmkan_gen.toolchain import Binary, ToolchainError
from lmkan_gen.tuner.measure import Timing
from lmkan_gen.tuner.search import spilling
from lmkan_gen.tuner.space import Candidate
from lmkan_gen.tuner.worker import Rejected, Worker, WorkerFailed

#: unlike those with shipped entries, so that a search does not begin with the best
PROBLEMS = (
    "forward float32 128,128,10,1024",
    "forward float16 128,128,10,1024",
    "forward float32 512,384,14,3000",
    "forward float32 12,200,28,50000",
    "forward int8 256,192,20,10000",
    "backward float32 128,128,24,1500",
    "backward float16 32,32,12,50000",
    "grad_input float32 256,128,20,8000",
    "grad_table float32 64,64,12,12000",
    "grad_input float32 65,10,12,40000",
)
#: raw points that are looked at one by one
_MOST_POINTS = 40_000
_BATCH = 32
_TUNED = 3

_DRAWN = 2000
_FEWEST, _GROWTH = 64, 1.25  # candidates of the smallest part of a space, and of each next one

Values = dict[str, list[Constant]]
Point = Mapping[str, Constant]


def main(
    problem: Annotated[
        list[str] | None, typer.Option(metavar="'OPERATION TABLE IN,OUT,GRIDS,BATCH'", help="Repeatable.")
    ] = None,
    most: Annotated[int, typer.Option(min=1, help="Candidates of a problem, about.")] = 400,
    budget: Annotated[float, typer.Option(help="Seconds for all problems.")] = 420.0,
    output: Annotated[Path, typer.Option(help="Directory for the records.")] = DIRECTORY,
    device: DeviceOption = None,
) -> None:
    """Measure spaces and save each as a record as soon as it is done."""
    where = choose_device(device)
    chip = devices.of(where)
    problems = [_problem(text, chip) for text in problem or PROBLEMS]
    deadline = time.monotonic() + budget
    with Worker(where) as worker:
        for i, p in enumerate(problems):
            now = time.monotonic()
            share = now + (deadline - now) / (len(problems) - i)
            try:
                record = measure_space(p, worker, most, share)
            except WorkerFailed as error:
                typer.echo(str(error), err=True)
                continue
            path = save(record, output)
            ran = record.timings()
            best = min((t.median for t in ran.values()), default=math.nan)
            typer.echo(
                f"{path}: {len(record.results)} candidates, {len(ran)} ran, best {best:.1f} us, "
                f"{time.monotonic() - now:.0f} s"
            )


def _problem(text: str, chip: devices.Device) -> Problem:
    try:
        operation, table, shape = text.split()
        return Problem.usual(Operation(operation), parse_shape(shape), chip, TableDtype(table))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: {error}", param_hint="--problem") from None


def measure_space(problem: Problem, worker: Worker, most: int, deadline: float) -> Record:
    """Measure about ``most`` candidates, fewer where ``deadline`` (on the monotonic clock) comes before."""
    seeds = _seeds(problem)
    spaces = [
        _Thinned(f, problem, seeds) for f in families(problem.device.kind, problem.operation, problem.table)
    ]
    levels = list(_levels([s for s in spaces if s.points], most))
    order = list(dict.fromkeys((*seeds, *(c for level in levels for c in level.candidates))))
    ready = _compiled(problem, order)
    began, results = time.monotonic(), dict[Candidate, Measured]()
    values: dict[str, Values] = {}
    best: float | None = None
    for level in levels:
        new = len({*seeds, *level.candidates} - results.keys())
        if results and time.monotonic() + new * (time.monotonic() - began) / len(results) > deadline:
            break
        for candidate, binary, compilation_s in islice(ready, new):
            started = time.monotonic()
            result = _one(problem, candidate, binary, worker, best)
            if isinstance(result, Timing):
                best = min(result.median, best or math.inf)
            results[candidate] = Measured(result, compilation_s, time.monotonic() - started)
        values = level.values
    return Record(
        device=problem.device.name,
        operation=problem.operation,
        shape=problem.shape,
        table=problem.table,
        values={f: {n: tuple(v) for n, v in of.items()} for f, of in values.items()},
        seeds=tuple(seeds),
        results=results,
    )


def _seeds(problem: Problem) -> list[Candidate]:
    """What a search of a shape that nobody has tuned begins with."""
    tuned = (c for c in tuned_choices(problem) if c.family and c.tier is not Tier.EXACT)
    known = [Candidate.make(c.family, c.parameters) for c in islice(tuned, _TUNED) if c.family]
    for f in families(problem.device.kind, problem.operation, problem.table):
        if (guess := f.default(problem)) is not None and not f.violations(problem, guess):
            known.append(Candidate.make(f.name, guess))
    return list(dict.fromkeys(known))


@dataclass(frozen=True)
class _Level:
    """Values of the families' parameters, and the points of them that can run."""

    values: dict[str, Values]
    candidates: list[Candidate]


def _levels(spaces: Sequence[_Thinned], most: int) -> Iterator[_Level]:
    """Ever larger parts of the whole, each with the one before in it, up to ``most`` candidates.

    Of large families it has more, though not as many more as they are larger.
    """
    sizes, size = {s: math.sqrt(s.size) for s in spaces}, _FEWEST
    while True:
        shares = {s: s.within(size * root / sum(sizes.values())) for s, root in sizes.items()}
        found = [Candidate.make(s.family.name, p) for s, part in shares.items() for p in part.points]
        random.Random(0).shuffle(found)
        yield _Level({s.family.name: part.values for s, part in shares.items()}, found)
        if size >= most or all(len(part.points) == len(s.points) for s, part in shares.items()):
            return
        size = min(most, int(_GROWTH * size))


@dataclass(frozen=True)
class _Part:
    values: Values
    points: list[Point]


class _Thinned:
    """A family's space, and parts of it with ever fewer values of its parameters.

    Values stay that seeds are made of: of the first seed, and the family's own default.
    """

    def __init__(self, family: Family, problem: Problem, seeds: Sequence[Candidate]) -> None:
        self.family = family
        own = [c for c in seeds if c.family == family.name]
        kept = {(n, v) for c in (*own[:1], *own[-1:]) for n, v in c.settings}
        draw = random.Random(0)
        values = {n: list(v) for n, v in family.space(problem.operation).items()}
        drawn = sum(1 for _ in family.drawn(problem, random.Random(0), _DRAWN))
        #: points that can run in the whole space, about
        self.size = max(1.0, math.prod(map(len, values.values())) * drawn / _DRAWN)
        while math.prod(map(len, values.values())) > _MOST_POINTS and (dropped := _drop(values, kept, draw)):
            values = _without(values, *dropped)
        raw = (dict(zip(values, v, strict=True)) for v in product(*values.values()))
        points: list[Point] = [p for p in raw if family.rejection(problem, p) is None]
        values = {n: [v for v in of if any(p[n] == v for p in points)] for n, of in values.items()}
        #: the largest first
        self._parts = [_Part(values, points)]
        while dropped := _drop(values, kept, draw):
            name, value = dropped
            values = _without(values, name, value)
            points = [p for p in points if p[name] != value]
            self._parts.append(_Part(values, points))

    @property
    def points(self) -> list[Point]:
        """All that can run, if they are not too many."""
        return self._parts[0].points

    def within(self, most: float) -> _Part:
        """The largest part of so many points, or else the smallest one."""
        return next((part for part in self._parts if len(part.points) <= most), self._parts[-1])


def _drop(
    values: Values, kept: set[tuple[str, Constant]], draw: random.Random
) -> tuple[str, Constant] | None:
    """A value, of the parameter that has the most, to leave out; None where all are to be kept."""
    free = {n: [v for v in of if (n, v) not in kept] for n, of in values.items() if len(of) > 1}
    free = {n: of for n, of in free.items() if of}
    if not free:
        return None
    name = max(free, key=lambda n: len(values[n]))
    return name, draw.choice(free[name])


def _without(values: Values, name: str, value: Constant) -> Values:
    return values | {name: [v for v in values[name] if v != value]}


def _compiled(
    problem: Problem, candidates: Sequence[Candidate]
) -> Iterator[tuple[Candidate, Binary | ToolchainError, float]]:
    """Candidates, their binaries, and seconds for each; on GPUs what comes next is compiled meanwhile."""
    batches = [candidates[i : i + _BATCH] for i in range(0, len(candidates), _BATCH)]
    ahead = 0 if problem.device.kind == "cpu" else 2
    with ThreadPoolExecutor(max_workers=1) as executor:
        compiling: list[Future[tuple[list[Binary | ToolchainError], float]]] = []
        try:
            for i, batch in enumerate(batches):
                for following in batches[len(compiling) : i + ahead + 1]:
                    compiling.append(executor.submit(_built, [c.spec(problem) for c in following]))
                binaries, seconds = compiling[i].result()
                yield from ((c, binary, seconds) for c, binary in zip(batch, binaries, strict=True))
        finally:
            for future in compiling:
                future.cancel()


def _built(specs: list[KernelSpec]) -> tuple[list[Binary | ToolchainError], float]:
    """Binaries, and seconds for each."""
    began = time.monotonic()
    binaries = toolchain.build(specs)
    return binaries, (time.monotonic() - began) / len(specs)


def _one(
    problem: Problem,
    candidate: Candidate,
    binary: Binary | ToolchainError,
    worker: Worker,
    best: float | None,
) -> Timing | Rejected:
    if isinstance(binary, ToolchainError):
        return Rejected("compile", str(binary))
    if spilled := spilling(binary):
        return Rejected("spills", ", ".join(spilled))
    try:
        return worker.measure(
            problem, family(candidate.family), candidate.parameters, check=True, best_us=best
        )
    except Rejected as rejected:
        return rejected


if __name__ == "__main__":
    typer.run(main)
