"""Recorded spaces: files that others read, and searches on them."""

from __future__ import annotations

import gzip
import json
import statistics
from numbers import Real
from pathlib import Path
from typing import Any

import pytest
from optuna.storages import InMemoryStorage

from benchmarks import kernel_tuner, record, records, replay
from lmkan_gen import toolchain
from lmkan_gen.device import target
from lmkan_gen.families import families
from lmkan_gen.problem import LayerShape, Operation, Problem, TableDtype
from lmkan_gen.toolchain import Binary
from lmkan_gen.tuner.measure import Timing
from lmkan_gen.tuner.space import Candidate
from lmkan_gen.tuner.study import Study
from lmkan_gen.tuner.worker import Rejected

FILES = sorted(records.DIRECTORY.glob("*.json.gz"))
INVALIDITIES = {"timeout", "compile", "runtime", "correctness", "constraints", "correct"}


def small() -> records.Record:
    """Two families, one failure."""
    results: dict[Candidate, Timing | Rejected] = {
        Candidate.make("a", {"n": 1, "way": "x"}): Timing((10.0, 11.0, 30.0)),
        Candidate.make("a", {"n": 2, "way": "x"}): Timing((5.0, 5.5, 6.0)),
        Candidate.make("a", {"n": 2, "way": "y"}): Rejected("spills", "spills"),
        Candidate.make("b", {}): Timing((7.0,)),
    }
    return records.Record(
        device="NVIDIA H200",
        operation=Operation.FORWARD,
        shape=LayerShape(6, 5, 4, 40),
        table=TableDtype.INT8,
        values={"a": {"n": (1, 2), "way": ("x", "y")}, "b": {}},
        seeds=(Candidate.make("b", {}),),
        results={c: records.Measured(r, 0.5, 0.25) for c, r in results.items()},
    )


def check_t4(content: dict[str, Any]) -> None:
    """What readers rely on, which the published schema does not ask for."""
    assert content["schema_version"] == "1.0.0"
    assert content["metadata"]["timeunit"] == "milliseconds"
    assert content["results"]
    seen = set()
    for result in content["results"]:
        times, runtimes = result["times"], result["times"]["runtimes"]
        assert result["invalidity"] in INVALIDITIES
        ran = result["invalidity"] == "correct"
        assert result["correctness"] == int(ran)
        assert bool(runtimes) == bool(result["measurements"]) == ran
        for value in (*result["configuration"].values(), *times.values(), *runtimes):
            assert isinstance(value, Real | str | list)
            assert not isinstance(value, bool)
        if ran:
            (measurement,) = result["measurements"]
            assert (measurement["name"], measurement["unit"]) == ("time", "ms")
            assert measurement["value"] == pytest.approx(statistics.median(runtimes), abs=1e-6)
        seen.add(json.dumps(result["configuration"], sort_keys=True))
    assert len(seen) == len(content["results"])


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    before = small()
    path = records.save(before, tmp_path)
    after = records.load(path)
    assert (after.values, after.seeds, after.name) == (before.values, before.seeds, before.name)
    for c, m in before.results.items():
        now = after.results[c].result
        if isinstance(m.result, Timing):
            assert isinstance(now, Timing)
            assert now.samples == pytest.approx(m.result.samples)
        else:
            assert isinstance(now, Rejected)
            assert now.reason == m.result.reason
    check_t4(json.loads(gzip.decompress(path.read_bytes())))


def test_shipped_records_are_small_t4_files() -> None:
    assert len(FILES) >= 10
    assert sum(path.stat().st_size for path in FILES) < 1_000_000
    for path in FILES:
        check_t4(json.loads(gzip.decompress(path.read_bytes())))


def test_caches_have_what_kernel_tuner_looks_up() -> None:
    for measured in (small(), records.load(FILES[0])):
        for family in {c.family for c in measured.results}:
            content = kernel_tuner.cache(measured, family)
            names, entries = content["tune_params_keys"], content["cache"]
            assert list(content)[-1] == "cache"
            assert entries
            assert list(content["tune_params"]) == names
            for key, entry in entries.items():
                assert key == ",".join(str(entry[name]) for name in names)
                assert all(entry[name] in content["tune_params"][name] for name in names)
                assert ("__error__" in entry) != isinstance(entry["time"], float)
            assert len(entries) == sum(c.family == family for c in measured.results)


def test_kernel_tuner_replays_a_cache(tmp_path: Path) -> None:
    tuner = pytest.importorskip("kernel_tuner")
    measured = records.load(FILES[0])
    family = next(iter(measured.results)).family
    path = tmp_path / "cache.json"
    path.write_text(json.dumps(kernel_tuner.cache(measured, family)))
    with pytest.warns(UserWarning, match="thread block"):
        tried, found = tuner.tune_cache(str(path), strategy="brute_force", quiet=True)
    ran = {c: t for c, t in measured.timings().items() if c.family == family}
    best = min(ran, key=lambda c: ran[c].median)
    assert len(tried) == len(ran)
    assert found["best_config"]["time"] == pytest.approx(1e-3 * ran[best].median)
    assert {n: found["best_config"][n] for n in best.parameters} == best.parameters


def test_autotuning_methodology_reads_a_record(tmp_path: Path) -> None:
    statistic = pytest.importorskip("autotuning_methodology.searchspace_statistics")
    measured = records.load(FILES[0])
    path = tmp_path / "record.json"
    path.write_bytes(gzip.decompress(FILES[0].read_bytes()))
    read = statistic.SearchspaceStatistics(
        "lmkan", measured.device, True, ["compilation", "runtimes"], ["time"], path
    )
    assert read.size == len(measured.results)
    best = min(t.median for t in measured.timings().values())
    assert read.objective_performances_total_sorted[0] == pytest.approx(1e-3 * best, abs=1e-6)
    seconds = sum(m.compilation_s for m in measured.results.values())
    assert read.objective_times["compilation"].sum() == pytest.approx(seconds, rel=0.01)


# --- recording ------------------------------------------------------------------------------------

PROBLEM = Problem.usual(
    Operation.BACKWARD, LayerShape(64, 256, 12, 4096), target("sm_90"), TableDtype.FLOAT16
)


def test_spaces_are_thinned_without_gaps() -> None:
    """Every part has the one before in it, and each point that can run and is made of its values."""
    seeds = record._seeds(PROBLEM)
    spaces = [record._Thinned(f, PROBLEM, seeds) for f in families("cuda", PROBLEM.operation, PROBLEM.table)]
    before: set[Candidate] = set()
    for level in record._levels([s for s in spaces if s.points], 120):
        now = set(level.candidates)
        assert before <= now
        for name, values in level.values.items():
            own = [s for s in spaces if s.family.name == name]
            whole = [p for p in own[0].points if all(p[n] in of for n, of in values.items())]
            assert sorted(Candidate.make(name, p) for p in whole) == sorted(
                c for c in now if c.family == name
            )
        before = now
    assert len(before) >= 50


class FakeWorker:
    def measure(self, problem: Problem, family: Any, parameters: Any, **named: Any) -> Timing:
        if parameters["vector"] == 4:
            raise Rejected("verify", "wrong")
        return Timing((100.0, 101.0))


def test_measuring_keeps_seeds_and_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = Binary(Path("kernel.so"), Path(), Path(), "")
    monkeypatch.setattr(toolchain, "build", lambda specs: [nothing] * len(specs))
    worker: Any = FakeWorker()
    measured = record.measure_space(PROBLEM, worker, 100, deadline=1e12)
    assert set(measured.seeds) <= set(measured.results)
    reasons = {getattr(m.result, "reason", None) for m in measured.results.values()}
    assert reasons == {None, "verify"}
    for c in measured.results:
        inside = all(c.parameters[n] in of for n, of in measured.values.get(c.family, {}).items())
        assert inside or c in measured.seeds


# --- replays --------------------------------------------------------------------------------------


def test_regret_is_that_of_the_best_that_was_tried() -> None:
    measured = small()

    class Given:
        def __init__(self, *names: Candidate) -> None:
            self.left = list(names)

        def ask(self) -> Candidate | None:
            return self.left.pop(0) if self.left else None

        def tell(self, candidate: Candidate, result: Timing | Rejected) -> None:
            pass

    slow, fast, failing, other = measured.results
    assert replay.regret(measured, Given(failing, other, fast), 2) == pytest.approx(7.0 / 5.5 - 1)
    assert replay.regret(measured, Given(failing, slow, fast), 16) == 0.0


def test_every_searcher_tries_what_is_there_once() -> None:
    measured = records.load(FILES[0])
    space = replay.space_of(measured)
    for make in replay.SEARCHERS.values():
        searcher = make(space, 12, 0)
        asked = []
        for _ in range(12):
            candidate = searcher.ask()
            assert candidate is not None
            searcher.tell(candidate, measured.results[candidate].result)
            asked.append(candidate)
        assert len(set(asked)) == 12
        assert set(measured.seeds) <= set(asked)


def test_quick_searches_come_close_to_the_best() -> None:
    """In nine of ten spaces; in the tenth a single candidate is within 5 % of the best."""
    regrets = []
    for path in FILES:
        measured = records.load(path)
        study = Study(replay.space_of(measured), 16, InMemoryStorage())
        regrets.append(replay.regret(measured, study, 16))
    assert sum(r <= 0.05 for r in regrets) >= 9
