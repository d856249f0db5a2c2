"""A tuning run: shapes and operations in, a tuning file out."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch
from optuna.storages import BaseStorage
from pydantic import ValidationError

from lmkan_gen import __version__, dispatch, selection, toolchain
from lmkan_gen import device as devices
from lmkan_gen.families import families, family
from lmkan_gen.freshness import is_stale
from lmkan_gen.outputs import require_writable
from lmkan_gen.problem import CALL_OPERATIONS, LayerShape, Operation, Problem, TableDtype
from lmkan_gen.text import cleaned, printable
from lmkan_gen.toolchain import store
from lmkan_gen.tuner import record, storage
from lmkan_gen.tuner.progress import Observer, Phase, Progress
from lmkan_gen.tuner.report import duration
from lmkan_gen.tuner.roofline import Peaks
from lmkan_gen.tuner.search import ProblemSearch
from lmkan_gen.tuner.space import Candidate, Space, explore
from lmkan_gen.tuner.study import Study, study_name
from lmkan_gen.tuner.worker import Rejected, Worker, WorkerFailed, refuse_in_measuring_process
from lmkan_gen.tuning_file import Entry, Provenance, ShapeRecord, TuningFile, load, update

#: times that differ by less, as a part of one, are no reason to keep the older one
_SAME = 0.05

QUICK_TRIALS = 16
FULL_TRIALS = 400


class TuningFailed(RuntimeError):
    """Not one kernel could be tuned; the message says why."""


def tune(
    shapes: Iterable[LayerShape],
    device: torch.device,
    operations: Sequence[Operation] = CALL_OPERATIONS,
    *,
    table: TableDtype = TableDtype.FLOAT32,
    trials: int = QUICK_TRIALS,
    time_budget: float | None = None,
    output: Path | None = None,
    resume: bool = False,
    storage_url: str | None = None,
    observer: Observer | None = None,
) -> TuningFile:
    """Find the fastest kernels for layer shapes on a device and save them.

    In scripts call it under ``if __name__ == "__main__":``, since it starts a measuring process.

    Args:
        shapes: what to tune; batches must be at least 1.
        device: where. Only this device is used.
        operations: which operations; those without kernels for the device are left out.
        table: element type of the tables.
        trials: candidates to try per shape and operation.
        time_budget: seconds for the whole run, shared evenly; None: as long as it takes. At least
            one candidate (what is in use, or else the default) is always measured.
        output: tuning file to update, by default `default_output`. Every entry is added when it is found;
            other runs may be adding to the file at the same time.
        resume: go on with what an earlier, interrupted run of the same search measured.
        storage_url: share the search with every process that names the same storage (see
            `lmkan_gen.tuner.storage.shared`), on devices of one model. What is there already counts, as with
            ``resume``; ``trials`` are those of all of them together.
        observer: hears of the progress.

    Returns:
        The entries of this run (``output`` may hold more).

    Raises:
        CompilerMissing: nothing can be compiled for the device here.
        TuningFailed: no entry came about.
        NotGuarded: called in a script on standard input, or not under the guard.
        StorageFailed: ``storage_url`` cannot be opened.
        TuningFileError: ``output`` exists and is not a tuning file of this device.
        ValueError: a batch or ``trials`` is below 1.
        OSError: ``output`` cannot be written.
    """
    refuse_in_measuring_process()
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    chip = devices.of(device)
    problems = _problems(shapes, operations, chip, table)
    output = output or default_output(chip)
    require_writable(output)
    if output.exists():
        _require_same_device(load(output), chip, output)
    shared = None if storage_url is None else storage.shared(storage_url)
    run = _Run(device, trials, resume, shared, observer or Observer())
    deadline = None if time_budget is None else time.monotonic() + time_budget
    result: TuningFile | None = None
    with Worker(device) as worker:
        for i, problem in enumerate(problems):
            share = _share(deadline, len(problems) - i)
            entry = run.tune(problem, i, len(problems), worker, share)
            if entry is None:
                continue
            provenance = _provenance(problem, entry, device)
            entry = run.put(output, problem, TuningFile.make(chip, provenance, (entry,)))
            run.entries.append(entry)
            run.found.append(problem)
            result = TuningFile.make(chip, provenance, tuple(run.entries))
            selection.clear_caches()  # this entry seeds the next searches
            run.keep_record(result, worker)
            run.observer.finished(problem, entry)
    dispatch.clear_caches()
    if (hidden := _hidden(run.found, output)) is not None:
        run.observer.noted(hidden)
    if result is None:
        raise TuningFailed(f"no kernel could be tuned on {chip.name}: {'; '.join(run.failures)}")
    return result


def _hidden(problems: Iterable[Problem], output: Path) -> str | None:
    """A sentence when layers find other files' entries before those of ``output`` for some of the problems.

    None where they do not, or do not look into ``output`` at all.
    """
    if not any(source.path.absolute() == output.absolute() for source in selection.sources()):
        return None
    hiding: dict[selection.Source, int] = {}
    for problem in problems:
        choice = next(selection.tuned_choices(problem), None)
        if choice is None or choice.evidence is None or choice.tier is not selection.Tier.EXACT:
            continue
        source = choice.evidence.source
        if source.path.absolute() != output.absolute():
            hiding[source] = hiding.get(source, 0) + 1
    if not hiding:
        return None
    source, count = max(hiding.items(), key=lambda item: item[1])
    why = f", because {selection.TUNING_VARIABLE} names it" if source.origin == "environment" else ""
    return (
        f"layers do not get {count} of the entries that were just tuned: for these calls "
        f"{printable(source.path)} is asked before {printable(output)}{why}"
    )


def is_worth_more(old: Entry, new: Entry) -> bool:
    """Whether a measurement should not give way to a later one: it is faster by more than noise, or steadier.

    What others do on a device only adds time. Not counted is what says nothing of its source, or was measured
    on another device.
    """
    if old.source is None or old.measured_on is not None:
        return False
    was, now = old.time_us, new.time_us
    if new.doubts and not old.doubts:
        return now.median + now.iqr > was.median
    noise = 0.0 if new.doubts else max(was.iqr, now.iqr, _SAME * was.median)
    return now.median - was.median > noise


def default_output(chip: devices.Device) -> Path:
    """The file in the user's tuning directory named after the device, where layers find it."""
    return selection.user_tuning_directory() / f"{devices.slug(chip.name)}.yaml"


def journal_directory() -> Path:
    """Where searches keep what they measured, for ``resume``."""
    return store.place("tuner")


def _problems(
    shapes: Iterable[LayerShape],
    operations: Sequence[Operation],
    chip: devices.Device,
    table: TableDtype,
) -> list[Problem]:
    possible = [o for o in dict.fromkeys(operations) if families(chip.kind, o, table)]
    if not possible:
        raise TuningFailed(
            f"there are no {chip.kind} kernels for {table} tables to tune for {', '.join(operations)}"
        )
    problems = [
        Problem.usual(operation, shape, chip, table)
        for shape in dict.fromkeys(shapes)
        for operation in possible
    ]
    for problem in problems:
        if problem.shape.batch < 1:
            raise ValueError(f"batch must be at least 1 to be timed, got shape {problem.shape}")
        _require_that_a_file_holds(problem.shape)
    return problems


def _require_that_a_file_holds(shape: LayerShape) -> None:
    """Better now than after the measurements."""
    try:
        ShapeRecord.of(shape)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(
            f"shape {shape} cannot be kept in a tuning file: {first['loc'][0]}: {first['msg']}"
        ) from None


def _require_same_device(file: TuningFile, chip: devices.Device, path: Path) -> None:
    """Better now than after the measurements."""
    if (file.device.name, file.device.arch) != (chip.name, chip.arch):
        raise TuningFailed(
            f"{path} is for {file.device.name} ({file.device.arch}), this device is {chip.name} "
            f"({chip.arch}); choose another output file"
        )


def _share(deadline: float | None, left: int) -> float | None:
    """When to stop with the next of ``left`` problems."""
    if deadline is None:
        return None
    now = time.monotonic()
    return now + max(0.0, deadline - now) / left


@dataclass
class _Run:
    """What the searches of one run have in common, and what came of them."""

    device: torch.device
    trials: int
    resume: bool
    shared: BaseStorage | None
    observer: Observer
    entries: list[Entry] = field(default_factory=list)
    found: list[Problem] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    records: list[record.ProblemRecord] = field(default_factory=list)
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    peaks: Peaks | None = None

    def tune(
        self, problem: Problem, index: int, count: int, worker: Worker, deadline: float | None
    ) -> Entry | None:
        """Search for one problem's fastest kernel; None when there is none, which the observer hears."""

        def report(phase: Phase, done: int, total: int, best_us: float | None) -> None:
            self.observer.progress(Progress(problem, index, count, phase, done, total, best_us))

        def on_rejected(candidate: Candidate, rejected: Rejected) -> None:
            self.failures.append(f"{candidate}: {rejected.reason}: {rejected}")
            self.observer.rejected(problem, candidate, rejected)

        space = explore(problem)
        entry, why = None, "no candidate ran"
        if space.size(1):
            began = time.monotonic()
            with self._storage(space) as kept:
                study = Study(space, self.trials, kept, shared=self.shared is not None)
                search = ProblemSearch(space, study, worker, self.trials, deadline, report, on_rejected)
                try:
                    entry = search.run()
                except WorkerFailed as error:
                    why = str(error)
            if entry is not None:
                seconds = time.monotonic() - began
                self.records.append(
                    record.ProblemRecord.of(
                        entry, space, study.results, search.ranking, seconds, search.cut_short
                    )
                )
            if search.cut_short:
                self.observer.cut_short(problem, len(study.results), search.total)
        else:
            why = "no candidate fits; limits broken: " + ", ".join(sorted(space.tally.rejected))
        if entry is None:
            self.failures.append(f"{problem.operation} {problem.shape}: {why}")
            self.observer.skipped(problem, why)
        return entry

    def put(self, output: Path, problem: Problem, found: TuningFile) -> Entry:
        """Add what was found for a problem to the file; returns the entry that is there then.

        What is worth less than what is there does not replace it. The observer hears of that, and of doubts.
        """
        (new,) = found.entries
        what = f"{problem.operation} {problem.shape}"
        if new.unsteady:
            self.observer.noted(
                f"{what}: the device was busy or its clocks varied ({', '.join(new.unsteady)}), so that time "
                "and choice may be wrong. The file says so, and `lmkan-gen configs export` refuses it; tune "
                "again without --resume when nothing else runs"
            )

        def keeps(old: Entry, new: Entry) -> bool:
            return is_worth_more(old, new) and not is_stale(old, problem)

        held = update(output, found, keeps)
        (there,) = (e for e in held.entries if e.key == new.key)
        if there != new:
            same = (there.family, there.parameters) == (new.family, new.parameters)
            was, now = duration(there.time_us.median), duration(new.time_us.median)
            self.observer.noted(
                f"{what}: {printable(output)} keeps what was measured before, {was} of "
                f"{'this' if same else 'another'} kernel; now the best took {now}. Remove the entry to have "
                "it replaced"
            )
        return there

    def _storage(self, space: Space) -> AbstractContextManager[BaseStorage]:
        if self.shared is not None:
            return nullcontext(self.shared)
        return storage.private(journal_directory(), study_name(space), self.resume)

    def keep_record(self, result: TuningFile, worker: Worker) -> None:
        """Save what a report can be made from."""
        if self.peaks is None:
            self.peaks = worker.measure_peaks()
        run = record.RunRecord(
            started=self.started,
            device=result.device,
            provenance=result.provenance,
            peaks=self.peaks,
            problems=tuple(self.records),
        )
        name = f"{self.started:%Y%m%d-%H%M%S-%f}-{devices.slug(result.device.name)}.json"
        record.save(record.directory() / name, run)


def _provenance(problem: Problem, entry: Entry, device: torch.device) -> Provenance:
    spec = family(entry.family).spec(problem, entry.parameters)
    return Provenance(
        lmkan_gen=__version__,
        compiler=cleaned(toolchain.compiler(spec).identity),
        driver=_driver(device),
        torch=cleaned(str(torch.__version__)),
        date=datetime.now(UTC).date(),
    )


def _driver(device: torch.device) -> str | None:
    """Version of the NVIDIA driver, as nvidia-smi says; None on CPUs and where it cannot tell."""
    if device.type != "cuda":
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return cleaned(said.stdout.split("\n")[0])
