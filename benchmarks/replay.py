"""Which way to search finds fast kernels soonest? Searches on measured spaces, without a device.

Regret: by how much the best candidate of a search is slower than the best of the record. All begin with the
same seeds and learn as late as the tuner does, which compiles candidates in batches.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from random import Random
from typing import Annotated, Protocol

import optuna
import typer
from optuna.distributions import CategoricalDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler
from optuna.storages import InMemoryStorage
from optuna.trial import Trial, TrialState
from rich.console import Console
from rich.table import Table

from benchmarks.records import DIRECTORY, Record, load
from lmkan_gen.device import Device
from lmkan_gen.families import Parameters
from lmkan_gen.machine import usable_cores
from lmkan_gen.problem import Problem
from lmkan_gen.tuner.measure import Timing
from lmkan_gen.tuner.search import batch_size, compiles_ahead
from lmkan_gen.tuner.space import Candidate, Space
from lmkan_gen.tuner.study import Study
from lmkan_gen.tuner.worker import Rejected

LENGTHS = (16, 64, 256)
#: cores beside a GPU
_CORES = 16
_PATIENCE = 20
_TARGET = 0.05

Result = Timing | Rejected


class Searcher(Protocol):
    """Suggests candidates and hears how they did."""

    def ask(self) -> Candidate | None:
        """One not suggested before; None when there are no more."""

    def tell(self, candidate: Candidate, result: Result) -> None:
        """How a suggested candidate did."""


def space_of(record: Record) -> Space:
    """What was recorded, as the space of a search."""

    def judge(name: str, parameters: Parameters) -> str | None:
        fixed = {n: parameters[n] for n in record.values[name]}
        return None if Candidate.make(name, fixed) in record.results else "not recorded"

    chip = Device("cuda", record.device, "recorded", multiprocessors=0)
    problem = Problem.usual(record.operation, record.shape, chip, record.table)
    return _Recorded(problem, record.values, judge, None, record.seeds)


class _Recorded(Space):
    """Candidates that nobody compiles."""

    def fingerprint(self) -> str:
        return "recorded"


class _Other:
    """What the samplers that are compared have in common: seeds first, nothing twice."""

    def __init__(self, space: Space, seed: int) -> None:
        self._space = space
        self._random = Random(seed)
        self._seen: set[Candidate] = set()
        self._left = list(space.candidates())
        self._random.shuffle(self._left)
        self._seeds = [c for c in space.seeds if space.allows(c)]

    def ask(self) -> Candidate | None:
        candidate = self._next_seed() or self._suggested() or self._drawn()
        if candidate is not None:
            self._seen.add(candidate)
        return candidate

    def tell(self, candidate: Candidate, result: Result) -> None:
        pass

    def _next_seed(self) -> Candidate | None:
        return self._seeds.pop(0) if self._seeds else None

    def _suggested(self) -> Candidate | None:
        return None

    def _drawn(self) -> Candidate | None:
        while self._left:
            if (candidate := self._left.pop()) not in self._seen:
                return candidate
        return None


class _OfOptuna(_Other):
    """A sampler of Optuna. What it suggests in vain it is told to be pruned; then a candidate is drawn."""

    def __init__(self, space: Space, seed: int, sampler: BaseSampler) -> None:
        super().__init__(space, seed)
        self._study = optuna.create_study(sampler=sampler)
        self._open: dict[Candidate, Trial] = {}

    def tell(self, candidate: Candidate, result: Result) -> None:
        trial = self._open.pop(candidate, None)
        if trial is None:
            self._study.add_trial(self._told(candidate, result))
        elif isinstance(result, Timing):
            self._study.tell(trial, math.log(result.median))
        else:
            self._study.tell(trial, state=TrialState.PRUNED)

    def _told(self, candidate: Candidate, result: Result) -> optuna.trial.FrozenTrial:
        values = self._space.values[candidate.family]
        settings = {n: v for n, v in candidate.settings if v in values[n]}
        names = CategoricalDistribution(list(self._space.values))
        ran = isinstance(result, Timing)
        return optuna.trial.create_trial(
            state=TrialState.COMPLETE if ran else TrialState.PRUNED,
            value=math.log(result.median) if isinstance(result, Timing) else None,
            params={
                "family": candidate.family,
                **{f"{candidate.family}.{n}": v for n, v in settings.items()},
            },
            distributions={
                "family": names,
                **{f"{candidate.family}.{n}": CategoricalDistribution(values[n]) for n in settings},
            },
        )

    def _suggested(self) -> Candidate | None:
        for _ in range(_PATIENCE):
            trial = self._study.ask()
            family = trial.suggest_categorical("family", list(self._space.values))
            parameters = {
                n: trial.suggest_categorical(f"{family}.{n}", values)
                for n, values in self._space.values[family].items()
            }
            candidate = Candidate.make(family, parameters)  # type: ignore[arg-type]
            if candidate not in self._seen and self._space.allows(candidate):
                self._open[candidate] = trial
                return candidate
            self._study.tell(trial, state=TrialState.PRUNED)
        return None


def _tuner(space: Space, trials: int, seed: int) -> Searcher:
    return Study(space, trials, InMemoryStorage(), seed=seed)


def _tpe(space: Space, trials: int, seed: int) -> Searcher:
    return _OfOptuna(space, seed, TPESampler(seed=seed))


def _tpe_grouped(space: Space, trials: int, seed: int) -> Searcher:
    return _OfOptuna(space, seed, TPESampler(seed=seed, multivariate=True, group=True))


def _evolution(space: Space, trials: int, seed: int) -> Searcher:
    return _OfOptuna(space, seed, NSGAIISampler(seed=seed, population_size=16))


def _random(space: Space, trials: int, seed: int) -> Searcher:
    return _Other(space, seed)


SEARCHERS: dict[str, Callable[[Space, int, int], Searcher]] = {
    "the tuner's": _tuner,
    "TPE": _tpe,
    "TPE, grouped": _tpe_grouped,
    "NSGA-II": _evolution,
    "random": _random,
}


def regret(record: Record, searcher: Searcher, trials: int) -> float:
    """Of the best candidate, after a search that is told results as late as the tuner's is."""
    results = {c: m.result for c, m in record.results.items()}
    total = min(trials, len(results))
    most, ahead = batch_size(total, _CORES), compiles_ahead("cuda", total)
    asked = 0

    def next_batch() -> list[Candidate]:
        nonlocal asked
        batch: list[Candidate] = []
        while len(batch) < min(most, total - asked) and (candidate := searcher.ask()) is not None:
            batch.append(candidate)
        asked += len(batch)
        return batch

    best, batch = math.inf, next_batch()
    while batch:
        following = next_batch() if ahead else []
        for candidate in batch:
            result = results[candidate]
            searcher.tell(candidate, result)
            if isinstance(result, Timing):
                best = min(best, result.median)
        batch = following or next_batch()
    return best / min(t.median for t in record.timings().values()) - 1


def _regrets(path: Path, name: str, trials: int, seeds: Sequence[int]) -> list[float]:
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    record = load(path)
    space = space_of(record)
    return [regret(record, SEARCHERS[name](space, trials, seed), trials) for seed in seeds]


_Found = Mapping[tuple[int, str, Path], Sequence[float]]


def main(
    record: Annotated[list[Path] | None, typer.Option(help="Repeatable; by default all that ship.")] = None,
    searcher: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(SEARCHERS)}.")] = None,
    length: Annotated[list[int] | None, typer.Option(min=1, help="Trials; repeatable.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Searches of each kind.")] = 20,
) -> None:
    """Compare ways to search on recorded spaces."""
    paths = record or sorted(DIRECTORY.glob("*.json.gz"))
    names, lengths = searcher or list(SEARCHERS), length or list(LENGTHS)
    jobs = list(product(lengths, names, paths))
    with ProcessPoolExecutor(usable_cores()) as pool:
        futures = [pool.submit(_regrets, path, name, trials, range(seeds)) for trials, name, path in jobs]
        found = {job: future.result() for job, future in zip(jobs, futures, strict=True)}
    Console().print(_summary(found, names, lengths, paths))
    for trials in lengths:
        Console().print(_by_space(found, names, trials, paths))


def _summary(found: _Found, names: Sequence[str], lengths: Sequence[int], paths: Sequence[Path]) -> Table:
    table = Table(title=f"regret in {len(paths)} spaces")
    for heading in ("trials", "searcher", "mean", "90 % below", f"spaces within {_TARGET:.0%}"):
        table.add_column(heading, justify="left" if heading == "searcher" else "right")
    for trials, name in product(lengths, names):
        of_spaces = [found[trials, name, path] for path in paths]
        every = sorted(r for of_space in of_spaces for r in of_space)
        high = every[math.ceil(0.9 * len(every)) - 1]
        within = sum(statistics.median(of_space) <= _TARGET for of_space in of_spaces)
        mean = statistics.mean(every)
        table.add_row(str(trials), name, f"{mean:.1%}", f"{high:.1%}", f"{within} of {len(paths)}")
    return table


def _by_space(found: _Found, names: Sequence[str], trials: int, paths: Sequence[Path]) -> Table:
    table = Table(title=f"mean regret after {trials} trials")
    for heading in ("space", "candidates", *names):
        table.add_column(heading, justify="left" if heading == "space" else "right")
    for path in paths:
        means = (statistics.mean(found[trials, name, path]) for name in names)
        record = load(path)
        table.add_row(record.name, str(len(record.results)), *(f"{mean:.1%}" for mean in means))
    return table


if __name__ == "__main__":
    typer.run(main)
