"""One problem from its space to its entry: compile ahead, measure, rank the best again."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from lmkan_gen import toolchain
from lmkan_gen.families import family
from lmkan_gen.freshness import source_digest
from lmkan_gen.machine import usable_cores
from lmkan_gen.toolchain import CompilerMissing, ToolchainError
from lmkan_gen.tuner.measure import Timing
from lmkan_gen.tuner.progress import Phase
from lmkan_gen.tuner.ranking import Ranking, rank, winner
from lmkan_gen.tuner.space import Candidate, Space
from lmkan_gen.tuner.study import Study
from lmkan_gen.tuner.worker import FAILURES, Rejected, Worker
from lmkan_gen.tuning_file import Dtypes, Entry, Search, ShapeRecord, Times

logger = logging.getLogger("lmkan_gen")

_FINALISTS = 3
#: candidates compiled together, at least and at most, and how often a search learns at least; more would
#: delay what it learns from them
_FEWEST_COMPILED, _MOST_COMPILED, _ROUNDS = 4, 16, 4
#: up to so many trials, what a batch has taught is worth more than the seconds in which the next one compiles
_SHORT = 64
_POLL_S = 0.5

_Started = tuple[list[Candidate], Future[list[toolchain.Binary | ToolchainError]]]
Report = Callable[[Phase, int, int, float | None], None]
OnRejected = Callable[[Candidate, Rejected], None]


class ProblemSearch:
    """The search for one problem's fastest candidate.

    Args:
        space: what to search.
        study: suggests candidates, remembers results.
        worker: measures.
        trials: candidates to try.
        deadline: on the monotonic clock; the default is measured even after it. None: no limit.
        report: hears phase, candidates done, candidates in all and the best median so far.
        on_rejected: hears of candidates that failed.
    """

    def __init__(
        self,
        space: Space,
        study: Study,
        worker: Worker,
        trials: int,
        deadline: float | None,
        report: Report,
        on_rejected: OnRejected,
    ) -> None:
        self._problem = space.problem
        self._space = space
        self._study = study
        self._worker = worker
        #: how many candidates will be tried, if time allows
        self.total = space.size(trials)
        self._deadline = deadline
        self._report = report
        self._on_rejected = on_rejected
        #: what the finalists and the default took when they were measured again, in turns
        self.ranking: dict[Candidate, Timing] = {}
        #: whether the deadline ended the search before all candidates were tried
        self.cut_short = False

    def run(self) -> Entry | None:
        """Search and rank.

        Returns:
            The winner's entry; None when no candidate ran.

        Raises:
            CompilerMissing: nothing can be compiled.
            WorkerFailed: nothing can be measured.
        """
        try:
            self._try_all()
        finally:
            self._study.release()
        self.cut_short = self._late() and len(self._study.results) < self.total
        return self._rank()

    def _try_all(self) -> None:
        ahead = compiles_ahead(self._problem.device.kind, self.total)
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="compile-ahead") as executor:
            started = self._start(executor)
            while started is not None:
                batch, compiling = started
                binaries = compiling.result()
                following = self._start(executor, wait=False) if ahead else None
                self._measure_batch(batch, binaries)
                started = following or self._start(executor)

    def _start(self, executor: ThreadPoolExecutor, *, wait: bool = True) -> _Started | None:
        """The next candidates, on their way to be compiled; None when there are none."""
        batch = self._next_batch(wait)
        if not batch:
            return None
        self._tell("compiling", len(self._study.results))
        return batch, executor.submit(toolchain.build, [c.spec(self._problem) for c in batch])

    def _late(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline

    def _tell(self, phase: Phase, done: int) -> None:
        self._report(phase, done, self.total, self._best_us())

    def _best_us(self) -> float | None:
        best = self._study.best()
        return None if best is None else best[1].median

    def _next_batch(self, wait: bool) -> list[Candidate]:
        most = batch_size(self.total, usable_cores())
        batch: list[Candidate] = []
        while not (self._study.results and self._late()):
            self._study.refresh()
            left = self.total - len(self._study.results) - self._study.taken
            while len(batch) < min(left, most) and (candidate := self._study.ask()) is not None:
                batch.append(candidate)
            if batch or not wait or not self._study.elsewhere:
                break
            # what others are at belongs to the result, and is ours to do if they die
            self._tell("waiting", len(self._study.results))
            time.sleep(_POLL_S)
        return batch

    def _measure_batch(
        self, batch: Sequence[Candidate], binaries: Sequence[toolchain.Binary | ToolchainError]
    ) -> None:
        for binary in binaries:
            if isinstance(binary, CompilerMissing):
                raise binary
        for candidate, binary in zip(batch, binaries, strict=True):
            if self._study.results and self._late():
                return
            result: Timing | Rejected
            if isinstance(binary, ToolchainError):
                result = Rejected("compile", str(binary))
            elif kernels := spilling(binary):
                result = Rejected("spills", f"registers spill to memory in {', '.join(kernels)}")
            else:
                result = self._measure(candidate, check=True, best_us=self._best_us())
            if isinstance(result, Rejected):
                logger.debug("tried %s: %s: %s", candidate, result.reason, result)
                self._on_rejected(candidate, result)
            else:
                logger.debug("tried %s: %.2f us", candidate, result.median)
            self._study.tell(candidate, result)
            self._tell("measuring", len(self._study.results))

    def _measure(self, candidate: Candidate, *, check: bool, best_us: float | None) -> Timing | Rejected:
        try:
            return self._worker.measure(
                self._problem, family(candidate.family), candidate.parameters, check=check, best_us=best_us
            )
        except Rejected as rejected:
            return rejected

    def _rank(self) -> Entry | None:
        """Measure the best few and the default again, in turns, and decide."""
        ranked = sorted(self._study.timings(), key=lambda item: item[1].median)
        finalists = [c for c, _ in ranked[:_FINALISTS]]
        default = self._space.default
        if default is not None and default not in finalists and default in dict(ranked):
            finalists.append(default)
        found = rank(finalists, default, dict(ranked), self._measure_again, self._late)
        if not found.times:
            return None
        self.ranking = found.times
        best = winner(found.times, default)
        logger.debug("winner of %d finalists: %s", len(found.times), best)
        return self._entry(best, found)

    def _measure_again(self, candidate: Candidate) -> Timing | None:
        self._tell("ranking", self.total)
        result = self._measure(candidate, check=False, best_us=None)
        if isinstance(result, Rejected):
            self._on_rejected(candidate, result)
            return None
        return result

    def _entry(self, best: Candidate, found: Ranking) -> Entry:
        default, times = self._space.default, found.times
        reference = self._worker.time_reference(self._problem)
        rejected = Counter(r.reason for r in self._study.results.values() if isinstance(r, Rejected))
        return Entry(
            operation=self._problem.operation,
            shape=ShapeRecord.of(self._problem.shape),
            dtypes=Dtypes(table=self._problem.table),
            family=best.family,
            parameters=best.parameters,
            source=source_digest(best.spec(self._problem)),
            time_us=Times(
                median=_rounded(times[best].median),
                iqr=_rounded(times[best].iqr),
                default=_rounded(times[default].median) if default in times else None,
                reference=None if reference is None else _rounded(reference),
            ),
            unsteady=found.doubts,
            search=Search(
                tried=len(self._study.results),
                rejected={**self._space.tally.rejected, **{reason: rejected[reason] for reason in FAILURES}},
            ),
        )


def batch_size(trials: int, cores: int) -> int:
    """How many candidates a search of so many trials compiles together."""
    return max(_FEWEST_COMPILED, min(_MOST_COMPILED, cores, trials // _ROUNDS))


def compiles_ahead(device_kind: str, trials: int) -> bool:
    """Whether the next candidates are compiled while others are measured, before it is known how these do."""
    # on a CPU, compilers would take the cores that candidates are timed on
    return device_kind != "cpu" and trials > _SHORT


def spilling(binary: toolchain.Binary) -> list[str]:
    """CUDA kernels of ``binary`` that keep part of their registers in memory: never worth a measurement."""
    if binary.path.suffix != ".cubin":
        return []
    return [r.kernel for r in toolchain.resources(binary) if r.spill_stores or r.spill_loads]


def _rounded(us: float) -> float:
    """Nanoseconds are noise, and make files hard to read."""
    return round(us, 2)
