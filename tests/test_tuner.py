"""The tuner: what is wrong never wins, what fails costs only itself, and nothing measured is lost."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any, Literal

import optuna
import pytest
import torch
from optuna.storages import InMemoryStorage
from torch import Tensor

from lmkan_gen import device as devices
from lmkan_gen import families, reference, selection, toolchain
from lmkan_gen.freshness import source_digest
from lmkan_gen.problem import CALL_OPERATIONS, LayerShape, Operation, Problem, TableDtype
from lmkan_gen.selection import Tier, select
from lmkan_gen.tuner import measure as measure_module
from lmkan_gen.tuner import ranking, search, storage
from lmkan_gen.tuner import run as run_module
from lmkan_gen.tuner import worker as worker_module
from lmkan_gen.tuner.measure import Timing, measure
from lmkan_gen.tuner.progress import Observer, Progress
from lmkan_gen.tuner.run import TuningFailed, is_worth_more, tune
from lmkan_gen.tuner.space import Candidate, Space, Tally, explore
from lmkan_gen.tuner.study import Study
from lmkan_gen.tuner.verify import TOLERANCES, Mismatch, make_case
from lmkan_gen.tuner.worker import Rejected, Worker
from lmkan_gen.tuning_file import (
    Dtypes,
    Entry,
    Provenance,
    Search,
    ShapeRecord,
    Times,
    TuningFile,
    load,
    save,
)
from lmkan_gen.tuning_records import STEADY
from tests.fault_family import Faulty

CPU = torch.device("cpu")
SHAPE = LayerShape(6, 5, 4, 40)
LARGER = LayerShape(6, 5, 4, 41)
PROBLEM = Problem(Operation.FORWARD, SHAPE, devices.cpu())


@pytest.fixture(autouse=True)
def _own_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(ranking, "PAUSE_S", 0.0)
    # shipped files name families that these tests replace
    monkeypatch.setattr("lmkan_gen.tuning_sources.resource_directory", lambda name: tmp_path / name)
    selection.clear_caches()
    yield
    selection.clear_caches()


@pytest.fixture
def journals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Studies of this test only; compiled kernels stay shared."""
    directory = tmp_path / "cache"
    monkeypatch.setattr("lmkan_gen.tuner.run.journal_directory", lambda: directory)
    return directory


def use(monkeypatch: pytest.MonkeyPatch, family: Faulty) -> Faulty:
    monkeypatch.setattr(families, "_registry", lambda: {family.name: family})
    return family


def candidate(fault: str, variant: int = 0) -> Candidate:
    return Candidate.make("faulty", {"fault": fault, "variant": variant})


# --- verification ---------------------------------------------------------------------------------


def kernel(operation: Operation, spoil: Callable[[Mapping[str, Tensor]], None]) -> Callable[..., None]:
    """A correct float32 'kernel', after which ``spoil`` may damage what it wrote."""

    def run(b: Mapping[str, Tensor]) -> None:
        if operation is Operation.FORWARD:
            reference.forward(b["x"], b["table"], b["borders"], b["y"])
        if "grad_x" in b:
            reference.grad_input(b["grad"], b["x"], b["table"], b["borders"], b["grad_x"])
        if "grad_table" in b:
            reference.grad_table(b["grad"], b["x"], b["borders"], b["grad_table"])
        spoil(b)

    return run


OUTPUTS = {
    Operation.FORWARD: ["y"],
    Operation.GRAD_INPUT: ["grad_x"],
    Operation.GRAD_TABLE: ["grad_table"],
    Operation.BACKWARD: ["grad_x", "grad_table"],
}


@pytest.mark.parametrize("operation", CALL_OPERATIONS)
@pytest.mark.parametrize(
    ("shape", "spread"),
    [(LayerShape(6, 5, 3, 33), 1.0), (LayerShape(20, 40, 9, 257), 10.0), (LayerShape(90, 300, 5, 700), 1.0)],
)
def test_right_kernels_pass_and_any_wrong_output_fails(
    operation: Operation, shape: LayerShape, spread: float
) -> None:
    case = make_case(operation, shape, CPU, spread, most=16)
    case.check(kernel(operation, lambda b: None), "right")
    for name in OUTPUTS[operation]:
        # ends, where tails are, are among the compared elements however few these are
        for place in (0, -1):

            def off(b: Mapping[str, Tensor], name: str = name, place: int = place) -> None:
                flat = b[name].view(-1)
                flat[place] += 20 * TOLERANCES[TableDtype.FLOAT32] * float(flat.abs().max())

            with pytest.raises(Mismatch, match=rf"what: {name} differs"):
                case.check(kernel(operation, off), "what")

        def unwritten(b: Mapping[str, Tensor], name: str = name) -> None:
            b[name].view(-1)[b[name].numel() // 2] = float("nan")

        with pytest.raises(Mismatch, match=f"{name} has elements that were not written"):
            case.check(kernel(operation, unwritten), "what")

        for offset in (-1, 0):

            def outside(b: Mapping[str, Tensor], name: str = name, offset: int = offset) -> None:
                t = b[name]
                start = t.storage_offset() - 1 if offset else t.storage_offset() + t.numel()
                torch.as_strided(t, (1,), (1,), start).fill_(0.0)

            with pytest.raises(Mismatch, match=f"wrote outside of {name}"):
                case.check(kernel(operation, outside), "what")


@pytest.mark.parametrize("table", [t for t in TableDtype if t is not TableDtype.FLOAT32])
def test_narrow_tables_may_be_off_a_little_everywhere_but_not_much_anywhere(table: TableDtype) -> None:
    case = make_case(Operation.FORWARD, SHAPE, CPU, 1.0, 8, table)
    limit = TOLERANCES[table]

    def off(everywhere: float, somewhere: float) -> None:
        def change(b: Mapping[str, Tensor]) -> None:
            norm = float(b["y"].norm()) / b["y"].numel() ** 0.5
            b["y"] += everywhere * limit * norm * torch.randn_like(b["y"]).sign()
            b["y"][0, 0] += somewhere * limit * float(b["y"].abs().max())

        case.check(kernel(Operation.FORWARD, change), "what")

    off(0.5, 0.0)
    with pytest.raises(Mismatch):
        off(2.0, 0.0)
    with pytest.raises(Mismatch):
        off(0.0, 8.0)


def test_state_left_from_run_to_run_is_found() -> None:
    runs: list[None] = []

    def second_is_wrong(b: Mapping[str, Tensor]) -> None:
        runs.append(None)
        if len(runs) == 2:
            b["y"] *= 1.1

    case = make_case(Operation.FORWARD, SHAPE, CPU, 1.0, 8)
    with pytest.raises(Mismatch):
        case.check(kernel(Operation.FORWARD, second_is_wrong), "what")


# --- timing ---------------------------------------------------------------------------------------


def test_median_and_spread() -> None:
    timing = Timing((5.0, 1.0, 3.0, 2.0, 4.0))
    assert (timing.median, timing.iqr) == (3.0, 2.0)
    assert Timing((7.0,)).iqr == 0.0
    assert (Timing((1.0,)) + Timing((3.0,))).samples == (1.0, 3.0)


def test_time_is_per_call_and_calls_are_rotated(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    calls = [0, 0]

    def call(i: int) -> Callable[[], None]:
        def run() -> None:
            clock[0] += 1e-3
            calls[i] += 1

        return run

    monkeypatch.setattr("lmkan_gen.tuner.measure.time.perf_counter", lambda: clock[0])
    timing = measure([call(0), call(1)], CPU)
    assert timing.median == pytest.approx(1000.0)
    assert len(timing.samples) >= 5
    assert calls[0] == calls[1] > 0
    hopeless = measure([call(0)], CPU, best_us=10.0)
    assert hopeless.median == pytest.approx(1000.0)
    assert len(hopeless.samples) < len(timing.samples)


def test_default_is_kept_inside_noise() -> None:
    default, other = candidate("none", 0), candidate("none", 1)
    noisy = Timing((100.0, 110.0, 120.0, 130.0))
    slightly_better = Timing((99.0, 109.0, 119.0, 129.0))
    much_better = Timing((50.0, 55.0, 60.0, 65.0))
    assert ranking.winner({default: noisy, other: slightly_better}, default) == default
    assert ranking.winner({default: noisy, other: much_better}, default) == other
    assert ranking.winner({other: noisy}, default) == other
    assert ranking.winner({default: noisy, other: slightly_better}, None) == other


def test_samples_that_spread_are_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process takes every other millisecond, for a while."""
    clock = [0.0]
    busy_until = [0.0]

    def run() -> None:
        clock[0] += 5e-4 + (5e-3 if clock[0] < busy_until[0] and int(1e3 * clock[0]) % 2 else 0.0)

    monkeypatch.setattr("lmkan_gen.tuner.measure.time.perf_counter", lambda: clock[0])
    busy_until[0] = 0.1
    timing = measure([run], CPU)
    assert timing.median == pytest.approx(500.0)
    assert timing.spread == pytest.approx(0.0)
    clock[0], busy_until[0] = 0.0, 1e9
    timing = measure([run], CPU)
    assert timing.spread > STEADY, "it does not go on for ever"


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the system does not say who waits")
def test_threads_that_wait_for_a_core_are_noticed() -> None:
    """However steady the times are that a process gets beside others."""

    def run() -> None:
        end = time.thread_time() + 2e-3
        while time.thread_time() < end:
            pass

    def rival() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", "while True: pass"])

    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    rivals = [rival() for _ in range(2)]
    try:
        timing = measure([run], CPU)
    finally:
        for process in rivals:
            process.kill()
            process.wait()
        os.sched_setaffinity(0, before)
    assert timing.waited is not None
    assert timing.waited > 0.3
    assert not timing.is_quiet


# --- the ranking ----------------------------------------------------------------------------------


class Device:
    """Three candidates of 100, 120 and 130 us on a device whose rounds are slowed down by given factors."""

    def __init__(
        self,
        *slowed: float,
        spread: float = 0.01,
        clocks: tuple[float, ...] = (),
        waited: float | None = None,
    ) -> None:
        self.candidates = [candidate("none", variant) for variant in (1, 2, 0)]
        self.turns = 0
        self._slowed, self._spread, self._clocks, self._waited = slowed, spread, clocks, waited

    def measure(self, c: Candidate) -> Timing:
        at = self.turns // 3
        self.turns += 1
        median = (130.0, 100.0, 120.0)[int(c.parameters["variant"])]
        median *= self._slowed[at] if at < len(self._slowed) else 1.0
        samples = tuple(median * (1 + self._spread * k) for k in (-1, -1, 0, 1, 1))
        return Timing(samples, self._clocks[at % len(self._clocks)] if self._clocks else None, self._waited)

    def rank(self, searched: float = 100.0, late: bool = False) -> ranking.Ranking:
        known = {self.candidates[0]: Timing((searched,) * 5)}
        return ranking.rank(self.candidates, self.candidates[2], known, self.measure, lambda: late)


def test_a_quiet_device_is_believed_at_once() -> None:
    device = Device()
    found = device.rank()
    assert (found.doubts, device.turns) == ((), 9)
    assert [t.median for t in found.times.values()] == [100.0, 120.0, 130.0]
    assert len(found.times[device.candidates[0]].samples) == 15


@pytest.mark.parametrize(
    ("device", "searched", "doubt"),
    [
        (Device(*[1.0, 1.3, 1.0] * 9), 100.0, "repeats"),
        (Device(spread=0.2), 100.0, "spread"),
        (Device(clocks=(1980.0, 1980.0, 1700.0)), 100.0, "clocks"),
        (Device(waited=0.3), 100.0, "load"),
        (Device(), 60.0, "search"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_busy_device_is_noticed_measured_again_and_marked(
    device: Device, searched: float, doubt: str
) -> None:
    found = device.rank(searched)
    assert (found.doubts, device.turns) == ((doubt,), 18)
    assert found.times[device.candidates[0]].median == min(100.0, searched)


def test_a_moment_of_noise_costs_a_repetition() -> None:
    device = Device(1.0, 100.0, 1.0)
    found = device.rank()
    assert (found.doubts, device.turns) == ((), 18)
    assert found.times[device.candidates[0]].median == 100.0
    late = Device(1.0, 100.0, 1.0)
    assert late.rank(late=True).doubts == ("repeats",)
    assert late.turns == 9


def test_what_a_quiet_search_found_is_not_lost() -> None:
    """`--resume` on a device that is busy now."""
    device = Device(*[150.0] * 9)
    found = device.rank()
    assert found.doubts == ("search",)
    assert ranking.winner(found.times, device.candidates[2]) == device.candidates[0]
    assert found.times[device.candidates[0]].median == 100.0


def entry_of(median: float, iqr: float = 1.0, **changes: Any) -> Entry:
    fields: dict[str, Any] = {
        "operation": Operation.FORWARD,
        "shape": ShapeRecord.of(SHAPE),
        "dtypes": Dtypes(),
        "family": "faulty",
        "parameters": {"fault": "none", "variant": 0},
        "source": "0" * 16,
        "time_us": Times(median=median, iqr=iqr),
        "search": Search(tried=1, rejected={}),
    }
    return Entry(**{**fields, **changes})


@pytest.mark.parametrize(
    ("old", "new", "stays"),
    [
        ({}, {"median": 90.0}, False),
        ({}, {"median": 100.5}, False),
        ({}, {"median": 110.0}, True),
        ({}, {"median": 110.0, "iqr": 15.0}, False),
        ({}, {"median": 99.0, "iqr": 20.0, "unsteady": ["spread"]}, True),
        ({}, {"median": 70.0, "iqr": 20.0, "unsteady": ["spread"]}, False),
        ({"unsteady": ["clocks"]}, {"median": 110.0, "iqr": 15.0}, False),
        ({"unsteady": ["clocks"]}, {"median": 110.0}, True),
        ({"unsteady": ["clocks"]}, {"median": 101.0, "iqr": 50.0, "unsteady": ["spread"]}, True),
        ({"unsteady": ["clocks"]}, {"median": 99.0, "iqr": 50.0, "unsteady": ["spread"]}, False),
        ({"source": None}, {"median": 110.0}, False),
        ({"measured_on": "Another CPU"}, {"median": 110.0}, False),
    ],
)
def test_which_of_two_measurements_is_worth_more(
    monkeypatch: pytest.MonkeyPatch, old: dict[str, Any], new: dict[str, Any], stays: bool
) -> None:
    use(monkeypatch, Faulty(("none",)))
    assert is_worth_more(entry_of(**{"median": 100.0, **old}), entry_of(**new)) == stays


def put(output: Path, entry: Entry) -> Entry:
    provenance = Provenance(lmkan_gen="1", compiler="gcc 1", torch="1", date=date(2026, 1, 2))
    run = run_module._Run(CPU, 1, False, None, Observer())
    return run.put(output, PROBLEM, TuningFile.make(devices.cpu(), provenance, (entry,)))


def test_a_better_measurement_stays_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    use(monkeypatch, Faulty(("none",), variants=2))
    output = tmp_path / "out.yaml"
    fresh = source_digest(candidate("none").spec(PROBLEM))
    good, slow = entry_of(375.0, source=fresh), entry_of(55_800.0, source=fresh)
    assert put(output, good) == good
    assert caplog.messages == []
    assert put(output, slow) == good
    assert load(output).entries == (good,)
    (message,) = caplog.messages
    for words in (str(output), "375 us of this kernel", "now the best took 55.8 ms", "Remove the entry"):
        assert words in message
    assert put(output, entry_of(400.0, parameters={"fault": "none", "variant": 1}, source=fresh)) == good
    assert "375 us of another kernel" in caplog.messages[-1]
    # what is measured on a device that changed, or of a kernel that did, is no measurement of today's
    save(output, load(output).model_copy(update={"entries": (entry_of(375.0, source="1" * 16),)}))
    assert put(output, slow) == slow


def test_whatever_a_compiler_calls_itself_the_file_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Faulty(("none",)))
    real = toolchain.compiler(candidate("none").spec(PROBLEM))
    odd = dataclasses.replace(real, identity="gcc\x1b[31m" + 300 * "x")
    monkeypatch.setattr(toolchain, "compiler", lambda spec: odd)
    provenance = run_module._provenance(PROBLEM, entry_of(1.0), CPU)
    assert provenance.compiler == "gcc [31m" + 192 * "x"


def test_doubts_are_written_and_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    use(monkeypatch, Faulty(("none",), variants=2))
    monkeypatch.setattr(ranking, "_doubts", lambda *_: ("spread",))
    entry = search_with(FakeWorker(0, 0.0), 2)
    assert entry.unsteady == ("spread",)
    put(tmp_path / "out.yaml", entry)
    assert load(tmp_path / "out.yaml").entries[0].unsteady == ("spread",)
    assert "6,5,4,40: the device was busy or its clocks varied (spread)" in caplog.messages[0]
    monkeypatch.setenv(selection.TUNING_VARIABLE, str(tmp_path / "out.yaml"))
    assert "measured on a busy device" in select(PROBLEM).describe()


# --- the space ------------------------------------------------------------------------------------


def test_space_is_pruned_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Faulty(("none", "too_large", "wasted"), variants=4))
    space = explore(PROBLEM)
    assert space.tally == Tally(4, {"shared_memory": 4, "wasted": 4})
    assert set(space.candidates()) == {candidate("none", v) for v in range(4)}
    assert space.seeds == (space.default,) == (candidate("none", 0),)


def test_winners_of_similar_problems_are_seeds(monkeypatch: pytest.MonkeyPatch, journals: Path) -> None:
    use(monkeypatch, Faulty(("none",), variants=3))
    monkeypatch.setattr(Faulty, "default", lambda self, problem: {"fault": "none", "variant": 2})
    (entry,) = tune([SHAPE], CPU, [Operation.FORWARD], trials=1).entries
    assert entry.parameters["variant"] == 2
    monkeypatch.setattr(Faulty, "default", lambda self, problem: {"fault": "none", "variant": 1})
    other = LayerShape(6, 5, 4, 80)
    space = explore(Problem(Operation.FORWARD, other, devices.cpu()))
    assert space.seeds == (candidate("none", 1), candidate("none", 2))
    # a search that is cut short is not to end with something slower than what is in use
    assert explore(PROBLEM).seeds == (candidate("none", 2), candidate("none", 1))


def test_defaults_of_all_families_are_seeds() -> None:
    """A short search from nothing should not be spent on a family that is not the fastest."""
    problem = Problem(
        Operation.BACKWARD, LayerShape(64, 64, 12, 4096), devices.target("sm_90"), TableDtype.FLOAT16
    )
    all_of_them = families.families("cuda", problem.operation, problem.table)
    asked = [f for f in all_of_them if f.default(problem)]
    assert len(asked) > 1
    space = explore(problem)
    for f in asked:
        assert Candidate.make(f.name, f.default(problem) or {}) in space.seeds


def test_fingerprint_changes_with_what_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Faulty(("none",), variants=3))
    first = explore(PROBLEM).fingerprint()
    assert explore(PROBLEM).fingerprint() == first
    monkeypatch.setattr("lmkan_gen.tuner.space.render", lambda spec: "another template")
    assert explore(PROBLEM).fingerprint() != first
    monkeypatch.undo()
    use(monkeypatch, Faulty(("none",), variants=4))
    assert explore(PROBLEM).fingerprint() != first


# --- the study ------------------------------------------------------------------------------------


def study_of(space: Space, trials: int, directory: Path, *, resume: bool) -> Study:
    """A study in a journal; one made before is as if its process had been killed."""
    journal = directory / "study.journal"
    if not resume:
        journal.unlink(missing_ok=True)
    return Study(space, trials, storage.shared(str(journal)))


def drain(study: Study, most: int) -> list[Candidate]:
    """Ask up to ``most`` times; a candidate's time is its variant plus one, odd variants fail."""
    asked: list[Candidate] = []
    while len(asked) < most and (c := study.ask()) is not None:
        variant = c.parameters["variant"]
        assert isinstance(variant, int)
        study.tell(c, Rejected("verify", "odd") if variant % 2 else Timing((1.0 + variant,)))
        asked.append(c)
    return asked


def test_small_spaces_are_searched_completely(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, Faulty(("none",), variants=9))
    space = explore(PROBLEM)
    asked = drain(study_of(space, 9, tmp_path, resume=False), 100)
    assert asked[0] == space.default
    assert sorted(asked) == sorted(space.candidates())


def test_large_spaces_are_sampled_without_repeats(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, Faulty(("none", "too_large"), variants=40))
    space = explore(PROBLEM)
    asked = drain(study_of(space, 12, tmp_path, resume=False), 12)
    assert len(set(asked)) == 12
    assert asked[0] == space.default
    assert set(asked) <= set(space.candidates())
    # asked on, it does not stop before everything was seen
    rest = drain(study_of(space, 12, tmp_path, resume=True), 1000)
    assert sorted([*asked, *rest]) == sorted(space.candidates())


def test_resume_repeats_only_the_trial_in_flight(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, Faulty(("none",), variants=8))
    space = explore(PROBLEM)
    first = study_of(space, 8, tmp_path, resume=False)
    done = drain(first, 3)
    in_flight = first.ask()
    resumed = study_of(space, 8, tmp_path, resume=True)
    assert set(resumed.results) == set(done)
    for c, before in first.results.items():
        after = resumed.results[c]
        if isinstance(before, Timing):
            assert after == before
        else:
            assert isinstance(after, Rejected)
            assert (after.reason, str(after)) == (before.reason, str(before))
    rest = drain(resumed, 100)
    assert in_flight in rest
    assert sorted([*done, *rest]) == sorted(space.candidates())
    assert study_of(space, 8, tmp_path, resume=False).results == {}


def test_what_was_measured_before_a_kill_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, Faulty(("none",), variants=4))
    space = explore(PROBLEM)
    first = study_of(space, 4, tmp_path, resume=False)
    measured, rejected = first.ask(), first.ask()
    assert measured is not None
    assert rejected is not None
    # killed after the result was written and before the trial was closed
    monkeypatch.setattr(first._study, "tell", lambda *_, **__: None)
    first.tell(measured, Timing((3.0, 4.0)))
    first.tell(rejected, Rejected("verify", "odd"))
    resumed = study_of(space, 4, tmp_path, resume=True)
    assert resumed.results[measured] == Timing((3.0, 4.0))
    assert isinstance(resumed.results[rejected], Rejected)
    assert not {measured, rejected} & set(drain(resumed, 100))


def test_results_of_what_cannot_run_any_more_do_not_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(monkeypatch, Faulty(("none",), variants=4))
    space = explore(PROBLEM)
    drain(study_of(space, 4, tmp_path, resume=False), 4)
    narrower = dataclasses.replace(space, judge=lambda _, p: "limit" if p["variant"] == 2 else None)
    resumed = study_of(narrower, 4, tmp_path, resume=True)
    assert set(resumed.results) == {candidate("none", v) for v in (0, 1, 3)}


# --- the measuring process ------------------------------------------------------------------------


@pytest.fixture
def worker() -> Iterator[Worker]:
    with Worker(CPU, candidate_s=5.0) as worker:
        yield worker
    assert not multiprocessing.active_children()


def measured(worker: Worker, fault: str) -> Timing:
    family = Faulty((fault,))
    parameters = {"fault": fault, "variant": 0}
    return worker.measure(PROBLEM, family, parameters, check=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fault", "reason", "words"),
    [
        ("unwritten", "verify", "not written"),
        ("wrong", "verify", "y differs from the reference"),
        ("crash", "crash", "SIGSEGV"),
        ("exit", "crash", "exit code 3"),
        ("raise", "error", "RuntimeError: made to fail"),
        ("memory", "memory", "too much"),
        ("eats", "memory", "allocate"),
        ("eats tensors", "memory", "allocate"),
    ],
)
def test_a_failure_costs_one_candidate(worker: Worker, fault: str, reason: str, words: str) -> None:
    with pytest.raises(Rejected, match=words) as caught:
        measured(worker, fault)
    assert caught.value.reason == reason
    assert measured(worker, "none").median > 0


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "memory"),
        (RuntimeError("CUDA driver error 2 (out of memory) while launching lmkan_forward"), "memory"),
        (RuntimeError("CUDA driver error 700 (an illegal memory access was encountered)"), "error"),
        (RuntimeError("CUDA error: unspecified launch failure"), "error"),
    ],
)
def test_a_process_is_not_used_after_an_error_on_a_gpu(error: Exception, reason: str) -> None:
    """An illegal access makes all that follows in its process fail."""
    failure = worker_module._failure(error, torch.device("cuda"))
    assert (failure.reason, failure.fatal) == (reason, True)


def test_a_hang_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    with Worker(CPU, candidate_s=4.0) as worker:
        with pytest.raises(Rejected, match="no answer within 4 s") as caught:
            measured(worker, "hang")
        assert caught.value.reason == "timeout"
        assert not multiprocessing.active_children()
        assert measured(worker, "none").median > 0


# --- the search -----------------------------------------------------------------------------------


class FakeWorker:
    """Times candidates by a formula with noise, and notes what is asked of it."""

    def __init__(self, seed: int, noise: float) -> None:
        self._random, self._noise = random.Random(seed), noise
        self.asked: list[tuple[int, bool]] = []

    def measure(
        self,
        problem: Problem,
        family: Faulty,
        parameters: dict[str, int],
        *,
        check: bool,
        best_us: float | None,
    ) -> Timing:
        variant = parameters["variant"]
        self.asked.append((variant, check))
        median = true_us(variant) * self._random.gauss(1.0, self._noise)
        return Timing(tuple(median * self._random.gauss(1.0, self._noise) for _ in range(9)))

    def time_reference(self, problem: Problem) -> None:
        return None


def true_us(variant: int) -> float:
    """A rugged landscape, whose variant 0, the default, is 30 % off its best."""
    return 100.0 * (1.3 if variant == 0 else 1.0 + 0.01 * (variant * 37 % 50))


def search_with(worker: Any, trials: int) -> Entry:
    space = explore(PROBLEM)
    study = Study(space, trials, InMemoryStorage())
    nothing = toolchain.Binary(Path("kernel.so"), Path(), Path(), "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toolchain, "build", lambda specs: [nothing] * len(specs))
        found = search.ProblemSearch(
            space, study, worker, trials, None, lambda *_: None, lambda *_: None
        ).run()
    assert found is not None
    return found


def test_finalists_and_default_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Faulty(("none",), variants=8))
    worker = FakeWorker(0, 0.0)
    entry = search_with(worker, 8)
    ranking = [variant for variant, check in worker.asked if not check]
    best = sorted(range(1, 8), key=true_us)[:3]
    assert ranking == [*best, 0] * 3
    assert entry.parameters["variant"] == best[0]
    assert entry.time_us.default == pytest.approx(130.0)


@pytest.mark.parametrize("noise", [0.002, 0.01])
def test_tuning_twice_gives_equally_fast_kernels(monkeypatch: pytest.MonkeyPatch, noise: float) -> None:
    """Whatever the noise of a measurement: true times of the winners are within 3 %."""
    use(monkeypatch, Faulty(("none",), variants=50))
    winners = [search_with(FakeWorker(seed, noise), 50).parameters["variant"] for seed in range(20)]
    times = [true_us(int(v)) for v in winners]
    assert max(times) <= 1.03 * min(times)


@pytest.mark.parametrize(
    ("kind", "trials", "ahead"), [("cpu", 68, False), ("cuda", 68, True), ("cuda", 16, False)]
)
def test_next_candidates_compile_while_a_gpu_measures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: Literal["cpu", "cuda"], trials: int, ahead: bool
) -> None:
    """Not on a CPU, where compilers would take the cores that are timed, nor where learning first pays."""
    use(monkeypatch, Faulty(("none",), variants=trials))
    events: list[str] = []
    compiled = threading.Semaphore(0)

    def build(specs: list[object]) -> list[toolchain.Binary]:
        events.append("build")
        compiled.release()
        return [toolchain.Binary(Path("kernel.so"), Path(), Path(), "")] * len(specs)

    class Watching(FakeWorker):
        def measure(self, *args: Any, **named: Any) -> Timing:
            if ahead and len(self.asked) % 4 == 0 and len(self.asked) < trials - 4:
                assert compiled.acquire(timeout=30), "nothing is compiled meanwhile"
            if not ahead and not self.asked:
                time.sleep(0.2)  # in which a thread would begin to compile
                assert events == ["build"]
            events.append("measure")
            return super().measure(*args, **named)

    space = explore(PROBLEM)
    study = study_of(space, trials, tmp_path, resume=False)
    problem = dataclasses.replace(PROBLEM, device=dataclasses.replace(PROBLEM.device, kind=kind))
    space = dataclasses.replace(space, problem=problem)
    monkeypatch.setattr(toolchain, "build", build)
    monkeypatch.setattr(search, "usable_cores", lambda: 4)
    if ahead:
        compiled.acquire(blocking=False)
    worker: Any = Watching(0, 0.0)
    search.ProblemSearch(space, study, worker, trials, None, lambda *_: None, lambda *_: None).run()
    assert events.count("build") == trials // 4
    if not ahead:
        rounds = [e for e, before in zip(events, ["", *events], strict=False) if e != before]
        assert rounds == ["build", "measure"] * (trials // 4)


# --- whole runs -----------------------------------------------------------------------------------


class Recorder(Observer):
    def __init__(self) -> None:
        self.rejections: dict[str, str] = {}
        self.skips: list[str] = []
        self.entries: list[Entry] = []
        self.phases: set[str] = set()

    def progress(self, progress: Progress) -> None:
        assert 0 <= progress.done <= progress.total
        self.phases.add(progress.phase)

    def rejected(self, problem: Problem, candidate: Candidate, rejected: Rejected) -> None:
        self.rejections[str(candidate.parameters["fault"])] = rejected.reason

    def skipped(self, problem: Problem, why: str) -> None:
        self.skips.append(why)

    def finished(self, problem: Problem, entry: Entry) -> None:
        self.entries.append(entry)


def test_a_run_among_faults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, journals: Path) -> None:
    faults = ("none", "slow", "compile", "unwritten", "wrong", "crash", "raise", "too_large")
    use(monkeypatch, Faulty(faults))
    seen = Recorder()
    output = tmp_path / "out.yaml"
    result = tune([SHAPE], CPU, [Operation.FORWARD, Operation.GRAD_TABLE], output=output, observer=seen)
    (entry,) = result.entries
    assert entry.parameters["fault"] in ("none", "slow")
    assert entry.search.tried == 7
    rejected = {k: n for k, n in entry.search.rejected.items() if n}
    assert rejected == {"compile": 1, "verify": 2, "crash": 1, "error": 1, "shared_memory": 1}
    assert seen.rejections == {
        "compile": "compile", "unwritten": "verify", "wrong": "verify", "crash": "crash", "raise": "error",
    }  # fmt: skip
    assert seen.phases == {"compiling", "measuring", "ranking"}
    assert seen.entries == [entry]
    t = entry.time_us
    assert t.median > 0
    assert t.default is not None
    assert t.reference is not None
    assert load(output) == result


def test_two_runs_at_a_time_add_to_one_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, journals: Path
) -> None:
    """Whatever another run writes while this one measures stays in the file."""
    use(monkeypatch, Faulty(("none",)))
    output = tmp_path / "out.yaml"
    shapes = [SHAPE, LayerShape(6, 5, 4, 42)]

    notes: list[str] = []
    monkeypatch.setattr(run_module, "_hidden", lambda problems, path: f"{len(problems)} hidden, {path}")

    class Meanwhile(Observer):
        def noted(self, text: str) -> None:
            notes.append(text)

        def finished(self, problem: Problem, entry: Entry) -> None:
            if problem.shape == SHAPE:
                put(output, entry_of(10.0, shape=ShapeRecord.of(LARGER)))

    result = tune(shapes, CPU, output=output, observer=Meanwhile())
    assert [e.shape.layer for e in result.entries] == shapes
    assert {e.shape.layer for e in load(output).entries} == {*shapes, LARGER}
    assert notes[-1] == f"2 hidden, {output}"


@pytest.mark.parametrize("named", [True, False])
def test_what_layers_do_not_get_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, named: bool) -> None:
    use(monkeypatch, Faulty(("none",)))
    output = selection.user_tuning_directory() / "b.yaml"
    put(output, entry_of(10.0))
    assert run_module._hidden([PROBLEM], output) is None
    other = tmp_path / "other.yaml" if named else output.with_name("a.yaml")
    put(other, entry_of(10.0))
    if named:
        monkeypatch.setenv(selection.TUNING_VARIABLE, str(other))
    selection.clear_caches()
    told = run_module._hidden([PROBLEM], output)
    assert told is not None
    assert (
        f"do not get 1 of the entries that were just tuned: for these calls {other} is asked before" in told
    )
    assert ("because LMKAN_GEN_TUNING names it" in told) == named
    for problem, file in ((PROBLEM, other), (dataclasses.replace(PROBLEM, shape=LARGER), output)):
        assert run_module._hidden([problem], file) is None
    assert run_module._hidden([PROBLEM], tmp_path / "nowhere.yaml") is None, "layers do not look there at all"


def test_optuna_tells_as_much_as_the_caller_wants(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, Faulty(("none",), variants=2))
    before = optuna.logging.get_verbosity()
    try:
        for level in (optuna.logging.DEBUG, optuna.logging.INFO, optuna.logging.ERROR):
            optuna.logging.set_verbosity(level)
            drain(Study(explore(PROBLEM), 2, InMemoryStorage()), 2)
            assert optuna.logging.get_verbosity() == level
    finally:
        optuna.logging.set_verbosity(before)
    assert "study" not in capsys.readouterr().err


SCRIPT = """
import sys
import torch
import lmkan_gen
from lmkan_gen import LMKAN2DLayer
layer = LMKAN2DLayer(num_grids=4, input_dim=6, output_dim=5)
lmkan_gen.tune(layer, torch.randn(6, 40), forward_only=True, trials=1)
"""


@pytest.mark.parametrize("where", ["file", "stdin"])
def test_a_script_without_a_guard_is_told_so(tmp_path: Path, where: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = str(Path(__file__).parent.parent)
    ran = subprocess.run(
        [sys.executable, *([str(script)] if where == "file" else ["-"])],
        input=SCRIPT if where == "stdin" else "",
        env={**os.environ, "XDG_CONFIG_HOME": str(tmp_path), "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    assert 'under `if __name__ == "__main__":`' in ran.stderr
    assert ("<stdin> is no file" in ran.stderr) == (where == "stdin")
    assert ran.stderr.count("Traceback") == 1, "the measuring process says nothing"
    assert not list(tmp_path.glob("**/*.yaml"))


def test_nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, journals: Path) -> None:
    use(monkeypatch, Faulty(("wrong", "raise")))
    output = tmp_path / "out.yaml"
    with pytest.raises(TuningFailed, match="made to fail"):
        tune([SHAPE], CPU, output=output)
    assert not output.exists()
    use(monkeypatch, Faulty(("too_large",)))
    seen = Recorder()
    with pytest.raises(TuningFailed, match="shared_memory"):
        tune([SHAPE], CPU, output=output, observer=seen)
    assert len(seen.skips) == 1
    with pytest.raises(TuningFailed, match="no cpu kernels for float32 tables to tune for backward"):
        tune([SHAPE], CPU, [Operation.BACKWARD], output=output)


def test_time_budget_still_measures_the_default(monkeypatch: pytest.MonkeyPatch, journals: Path) -> None:
    use(monkeypatch, Faulty(("none",), variants=12))
    (entry,) = tune([SHAPE], CPU, time_budget=0.0).entries
    assert entry.search.tried == 1
    assert entry.parameters == {"fault": "none", "variant": 0}


def test_resumed_run_measures_no_candidate_again(monkeypatch: pytest.MonkeyPatch, journals: Path) -> None:
    use(monkeypatch, Faulty(("none",), variants=3))
    first = tune([SHAPE], CPU).entries[0]
    checked: list[bool] = []
    measure_it = Worker.measure

    def counting(self: Worker, *args: object, check: bool, best_us: float | None) -> Timing:
        checked.append(check)
        return measure_it(self, *args, check=check, best_us=best_us)  # type: ignore[arg-type]

    monkeypatch.setattr(Worker, "measure", counting)
    again = tune([SHAPE], CPU, resume=True).entries[0]
    assert again.search == first.search
    assert checked
    assert not any(checked), "only the final ranking measures again"


def test_bad_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, journals: Path) -> None:
    use(monkeypatch, Faulty(("none",)))
    with pytest.raises(ValueError, match="trials must be at least 1, got 0"):
        tune([SHAPE], CPU, trials=0)
    with pytest.raises(ValueError, match="batch must be at least 1"):
        tune([LayerShape(6, 5, 4, 0)], CPU)
    with pytest.raises(ValueError, match=r"6,5,1000000,8 cannot be kept in a tuning file: grids: .*16384"):
        tune([LayerShape(6, 5, 10**6, 8)], CPU)
    foreign = tmp_path / "foreign.yaml"
    result = tune([SHAPE], CPU, output=foreign)
    text = foreign.read_text().replace(result.device.name, "Some Other CPU")
    foreign.write_text(text)
    with pytest.raises(TuningFailed, match="Some Other CPU"):
        tune([SHAPE], CPU, output=foreign)
    assert foreign.read_text() == text


def test_real_kernels_end_to_end(journals: Path) -> None:
    shapes = [LayerShape(16, 24, 5, 300), LayerShape(16, 24, 5, 70)]
    result = tune(shapes, CPU, trials=3)
    assert isinstance(result, TuningFile)
    wanted = {(s, o) for s in shapes for o in CALL_OPERATIONS if families.families("cpu", o)}
    assert {(e.shape.layer, e.operation) for e in result.entries} == wanted
    # layers find it by themselves
    for e in result.entries:
        choice = select(Problem(e.operation, e.shape.layer, devices.cpu()))
        assert (choice.tier, dict(choice.parameters)) == (Tier.EXACT, e.parameters)
        assert choice.time_us == e.time_us.median
    # a second run adds to the file and keeps the rest
    more = tune([LayerShape(16, 24, 5, 9)], CPU, [Operation.FORWARD], trials=1)
    (path,) = selection.user_tuning_directory().glob("*.yaml")
    assert len(load(path).entries) == len(result.entries) + len(more.entries)


@pytest.mark.gpu
def test_gpu_end_to_end(journals: Path) -> None:
    shapes = [LayerShape(32, 48, 8, 1000), LayerShape(32, 48, 8, 33)]
    chip = devices.cuda(0)
    result = tune(shapes, torch.device("cuda:0"), trials=4)
    wanted = {(s, o) for s in shapes for o in CALL_OPERATIONS if families.families("cuda", o)}
    assert {(e.shape.layer, e.operation) for e in result.entries} == wanted
    for e in result.entries:
        # nanoseconds would mean that nothing ran, seconds that the host was timed
        assert 0.5 < e.time_us.median < 1e5
        assert e.search.rejected["verify"] == e.search.rejected["error"] == 0
        assert select(Problem(e.operation, e.shape.layer, chip)).tier is Tier.EXACT


@pytest.mark.gpu
def test_a_gpus_clock_is_told_by_what_it_does() -> None:
    device = torch.device("cuda:0")
    a = torch.randn(4096, 4096, device=device)
    clocks = []
    for _ in range(5):
        for _ in range(20):
            a @ a
        clock = measure_module._clock(device)
        assert clock is not None
        clocks.append(clock)
    assert all(300 < clock < 4000 for clock in clocks), "the first one too, which loads a module"
    assert max(clocks[1:]) < 1.05 * min(clocks[1:]), "launches by the host are not counted"


def test_killed_run_resumes(tmp_path: Path) -> None:
    """SIGKILL in the middle of a search, then --resume."""
    output = tmp_path / "out.yaml"
    command = [
        sys.executable, "-c", "from lmkan_gen.cli import main; main()", "tune",
        "--device", "cpu", "--operation", "forward", "--shape", "32,32,6,2000",
        "--trials", "40", "--output", str(output),
    ]  # fmt: skip
    environment = {**os.environ, "LMKAN_GEN_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)

    def finished_trials() -> int:
        journals = list((tmp_path / "cache" / "tuner").glob("*.journal"))
        return sum(j.read_text().count('"samples_us"') for j in journals)

    deadline = time.monotonic() + 100
    while finished_trials() < 2 and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    before = finished_trials()
    assert before >= 2
    subprocess.run([*command, "--resume"], env=environment, check=True, stdout=subprocess.DEVNULL)
    (entry,) = load(output).entries
    assert finished_trials() == entry.search.tried - sum(
        entry.search.rejected[r] for r in ("compile", "verify", "timeout", "crash", "error", "memory")
    )


def test_import_is_light() -> None:
    """A layer needs neither the tuner nor what it stands on; only the search needs Optuna."""
    code = (
        "import sys, lmkan_gen.selection;"
        "assert not {'optuna', 'rich', 'typer'} & set(sys.modules);"
        "import lmkan_gen.tuner.worker, lmkan_gen.tuner.space;"
        "assert 'optuna' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
