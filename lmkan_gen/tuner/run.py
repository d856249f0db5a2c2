"""A tuning run: shapes and operations in, a tuning file out."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from lmkan_gen import __version__, dispatch, selection, toolchain
from lmkan_gen import device as devices
from lmkan_gen.families import families, family
from lmkan_gen.problem import CALL_OPERATIONS, LayerShape, Operation, Problem, TableDtype
from lmkan_gen.toolchain import store
from lmkan_gen.tuner.progress import Observer, Phase, Progress
from lmkan_gen.tuner.search import ProblemSearch
from lmkan_gen.tuner.space import Candidate, explore
from lmkan_gen.tuner.study import Study
from lmkan_gen.tuner.worker import Rejected, Worker, WorkerFailed
from lmkan_gen.tuning_file import Entry, Provenance, TuningFile, load, merge, save

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
            one candidate (the default, where there is one) is always measured.
        output: tuning file to update, by default `default_output`. It is saved after every entry.
        resume: go on with what an earlier, interrupted run of the same search measured.
        observer: hears of the progress.

    Returns:
        The entries of this run (``output`` may hold more).

    Raises:
        CompilerMissing: nothing can be compiled for the device here.
        TuningFailed: no entry came about.
        TuningFileError: ``output`` exists and is not a tuning file of this device.
        ValueError: a batch or ``trials`` is below 1.
        OSError: ``output`` cannot be written.
    """
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    chip = devices.of(device)
    problems = _problems(shapes, operations, chip, table)
    output = output or default_output(chip)
    before = load(output) if output.exists() else None
    if before is not None:
        _require_same_device(before, chip, output)
    observer = observer or Observer()
    deadline = None if time_budget is None else time.monotonic() + time_budget
    entries: list[Entry] = []
    failures: list[str] = []
    result: TuningFile | None = None
    with Worker(device) as worker:
        for i, problem in enumerate(problems):
            share = _share(deadline, len(problems) - i)
            entry = _tune_one(problem, i, len(problems), worker, trials, share, resume, observer, failures)
            if entry is None:
                continue
            entries.append(entry)
            result = TuningFile.make(chip, _provenance(problem, entry, device), tuple(entries))
            save(output, merge(before, result) if before else result)
            selection.clear_caches()  # this entry seeds the next searches
            observer.finished(problem, entry)
    dispatch.clear_caches()
    if result is None:
        raise TuningFailed(f"no kernel could be tuned on {chip.name}: {'; '.join(failures)}")
    return result


def default_output(chip: devices.Device) -> Path:
    """The file in the user's tuning directory named after the device, where layers find it."""
    slug = re.sub(r"[^a-z0-9]+", "_", chip.name.lower()).strip("_")
    return selection.user_tuning_directory() / f"{slug}.yaml"


def journal_directory() -> Path:
    """Where searches keep what they measured, for ``resume``."""
    return store.root() / "tuner"


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
        Problem(operation, shape, chip, table) for shape in dict.fromkeys(shapes) for operation in possible
    ]
    for problem in problems:
        if problem.shape.batch < 1:
            raise ValueError(f"batch must be at least 1 to be timed, got shape {problem.shape}")
    return problems


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


def _tune_one(
    problem: Problem,
    index: int,
    count: int,
    worker: Worker,
    trials: int,
    deadline: float | None,
    resume: bool,
    observer: Observer,
    failures: list[str],
) -> Entry | None:
    def report(phase: Phase, done: int, total: int, best_us: float | None) -> None:
        observer.progress(Progress(problem, index, count, phase, done, total, best_us))

    def on_rejected(candidate: Candidate, rejected: Rejected) -> None:
        failures.append(f"{candidate}: {rejected.reason}: {rejected}")
        observer.rejected(problem, candidate, rejected)

    space = explore(problem)
    entry, why = None, "no candidate ran"
    if space.feasible:
        study = Study(space, trials, journal_directory(), resume)
        try:
            entry = ProblemSearch(space, study, worker, trials, deadline, report, on_rejected).run()
        except WorkerFailed as error:
            why = str(error)
    else:
        why = "no candidate fits; limits broken: " + ", ".join(sorted(space.rejected))
    if entry is None:
        failures.append(f"{problem.operation} {problem.shape}: {why}")
        observer.skipped(problem, why)
    return entry


def _provenance(problem: Problem, entry: Entry, device: torch.device) -> Provenance:
    spec = family(entry.family).spec(problem, entry.parameters)
    return Provenance(
        lmkan_gen=__version__,
        compiler=toolchain.compiler(spec).identity,
        driver=_driver(device),
        torch=str(torch.__version__),
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
    return said.stdout.split("\n")[0].strip() or None
