"""The page about a tuning run, and what it is made of."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from lmkan_gen import cli, families, selection
from lmkan_gen.problem import LayerShape, Operation, TableDtype
from lmkan_gen.tuner import charts, page, record
from lmkan_gen.tuner.importance import importance
from lmkan_gen.tuner.roofline import Peaks, bound_us, compulsory_bytes
from lmkan_gen.tuner.run import tune
from tests.fault_family import Faulty

SHAPE = LayerShape(6, 5, 4, 40)
LOADING = {"script": "src", "img": "src", "iframe": "src", "link": "href"}


class Page(HTMLParser):
    """Text outside of scripts, and what a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.policy: dict[str, list[str]] = {}
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        named = dict(attrs)
        if named.get("http-equiv") == "Content-Security-Policy":
            assert not self.scripts, "it is not for scripts ahead of it"
            rules = (rule.split() for rule in (named["content"] or "").split(";"))
            self.policy = {name: values for name, *values in rules}
        if tag == "script":
            self.scripts.append("")
        self.fetched += [v for n, v in attrs if n == LOADING.get(tag) and v]

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture
def run_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[record.RunRecord]:
    family = Faulty(("none", "wrong", "raise", "too_large"), variants=3)
    monkeypatch.setattr(families, "_registry", lambda: {family.name: family})
    monkeypatch.setattr("lmkan_gen.tuning_sources.resource_directory", lambda name: tmp_path / name)
    monkeypatch.setattr("lmkan_gen.tuner.run.journal_directory", lambda: tmp_path / "journals")
    monkeypatch.setattr(record, "directory", lambda: tmp_path / "runs")
    selection.clear_caches()
    tune([SHAPE], torch.device("cpu"), [Operation.FORWARD], trials=9, output=tmp_path / "out.yaml")
    latest = record.latest()
    assert latest is not None
    yield record.load(latest)
    selection.clear_caches()


def test_a_run_is_recorded_and_reported(
    run_record: record.RunRecord, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (problem,) = run_record.problems
    assert (problem.feasible, len(problem.trials)) == (9, 9)
    assert problem.pruned == {"shared_memory": 3}
    assert {t.rejected for t in problem.trials} == {None, "verify", "error"}
    assert problem.default is not None
    assert len(problem.ranking) == 3
    assert problem.seconds > 0
    assert run_record.peaks is not None
    assert 1e9 < run_record.peaks.bandwidth < 1e13
    assert 1e9 < run_record.peaks.flops < 1e15

    output = tmp_path / "pages" / "run.html"
    monkeypatch.setattr(sys, "argv", ["lmkan-gen", "report", "--output", str(output)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    shown = Page(output.read_text())
    assert shown.fetched == [], "readable without network"
    for words in (
        run_record.device.name,
        "forward 6,5,4,40",
        "Finalists",
        "Time against each parameter",
        "Roofline",
        "Median of the measurements, everything a call needs included, and the interquartile range",
        "Never tried, for the first limit that they break: shared_memory 3.",
        "Tried and failed:",
        "RuntimeError: made to fail",
        "y differs from the reference",
        "faulty(fault=wrong, variant=2)",
    ):
        assert words in shown.text
    assert output.read_text().count("Plotly.newPlot(") >= 2
    assert shown.policy["default-src"] == ["'none'"]
    digests = (hashlib.sha256(script.encode()).digest() for script in shown.scripts)
    expected = {f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests}
    assert set(shown.policy["script-src"]) == expected, "its own scripts, and no others"
    assert len(expected) >= 3


def test_hostile_text_stays_text(run_record: record.RunRecord) -> None:
    evil = "</script><script src=http://evil></script><img src=http://evil>"
    (problem,) = run_record.problems
    trials = tuple(
        t.model_copy(
            update={"message": evil} if t.rejected else {"parameters": {"fault": evil, "variant": 0}}
        )
        for t in problem.trials
    )
    problem = problem.model_copy(update={"trials": trials})
    shown = Page(page.render(run_record.model_copy(update={"problems": (problem,)})))
    assert shown.fetched == []
    assert evil in shown.text


def test_without_plotly(run_record: record.RunRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(page.PlotlyMissing, match=r"lmkan-gen\[report\]"):
        page.render(run_record)


def test_nothing_to_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record, "directory", lambda: tmp_path)
    (tmp_path / "strange").write_text(json.dumps({"schema_version": 7}))
    for arguments, words in (
        ([], "no tuning run is recorded"),
        ([str(tmp_path / "strange")], "is no record of a tuning run"),
    ):
        monkeypatch.setattr(sys, "argv", ["lmkan-gen", "report", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 1
        assert words in capsys.readouterr().err


# --- charts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.0, 1000.0, [1, 10, 100, 1000]),
        (19.0, 120.0, [20, 50, 100]),
        (2.0, 40.0, [3, 10, 30]),
        (11.0, 21.0, [12, 14, 16, 18, 20]),
        (4.70, 4.95, [4.7, 4.75, 4.8, 4.85, 4.9, 4.95]),
        (0.0109, 0.0126, [0.011, 0.0115, 0.012, 0.0125]),
    ],
)
def test_ticks_are_round_and_few(low: float, high: float, expected: list[float]) -> None:
    assert charts.ticks(low, high) == pytest.approx(expected)


def test_ticks_of_any_range_can_be_read() -> None:
    source = random.Random(5)
    for _ in range(1000):
        low = 10 ** source.uniform(-3, 7)
        high = low * 10 ** source.choice([source.uniform(0.01, 0.3), source.uniform(0.3, 9)])
        found = charts.ticks(low, high)
        assert 2 <= len(found) <= 9
        assert found == sorted(set(found))
        assert low * 0.999999 <= found[0] < found[-1] <= high * 1.000001


def test_the_roofline_has_winners_below_its_roof(run_record: record.RunRecord) -> None:
    (problem,) = run_record.problems
    slow = problem.entry.model_copy(
        update={"time_us": problem.entry.time_us.model_copy(update={"median": 1e6})}
    )
    peaks = Peaks(bandwidth=1e9, flops=1e11)
    figure = charts.roofline([problem.model_copy(update={"entry": slow})], peaks)
    assert figure is not None
    roof, winners = figure.data
    assert roof.y[1] == roof.y[2] == peaks.flops
    assert roof.y[1] / roof.x[1] == pytest.approx(peaks.bandwidth)
    # 6 inputs, 5 outputs, 40 samples: 3 pairs a sample and output, 8 operations each, in a second
    assert list(winners.y) == [pytest.approx(8 * 3 * 5 * 40)]
    assert winners.x[0] == pytest.approx(8 * 3 * 5 * 40 / (4 * 6 * 40 + 4 * 5 * 40 + SHAPE.table_bytes))
    assert "forward 6,5,4,40" in winners.text[0]


def test_panels_are_of_parameters_that_vary(run_record: record.RunRecord) -> None:
    (problem,) = run_record.problems
    measured = [t for t in problem.trials if t.median is not None]
    assert [title for title, _ in charts.strips(problem, measured)] == ["variant"]
    assert charts.strips(problem, measured[:1]) == []


# --- importance -----------------------------------------------------------------------------------


def test_importance_finds_what_matters() -> None:
    source = random.Random(3)
    settings = [{"a": a, "b": b, "c": 5} for a in range(4) for b in range(4) for _ in range(3)]
    times = [math.exp(a + 0.2 * source.gauss(0, 1)) for a in (s["a"] for s in settings)]
    found = importance(settings, times)
    assert list(found) == ["a", "b"]
    assert found["a"] == pytest.approx(1.25 / (1.25 + 0.04), abs=0.03)  # variances of a and of the noise
    assert found["b"] == pytest.approx(0.0, abs=0.05)


def test_importance_knows_when_it_cannot_tell() -> None:
    assert importance([{"a": 1}, {"a": 2}], [1.0, 2.0]) == {"a": None}
    assert importance([{"a": 1}, {"a": 1}, {"a": 2}], [1.0, 1.0, 1.0]) == {"a": None}
    assert importance([{"a": 1}], [1.0]) == {}


# --- roofline -------------------------------------------------------------------------------------


def test_bound_by_memory_and_by_arithmetic() -> None:
    shape = LayerShape(4, 3, 5, 100)
    table = 4 * 36 * 3 * 2
    sizes = {
        Operation.FORWARD: 4 * 4 * 100 + table + 4 * 3 * 100,
        Operation.GRAD_INPUT: 2 * 4 * 4 * 100 + 4 * 3 * 100 + table,
        Operation.GRAD_TABLE: 4 * 4 * 100 + 4 * 3 * 100 + table,
        Operation.BACKWARD: 2 * 4 * 4 * 100 + 4 * 3 * 100 + 2 * table,
    }
    for operation, size in sizes.items():
        assert compulsory_bytes(operation, shape) == size
        assert bound_us(operation, shape, Peaks(bandwidth=1e6, flops=1e30)) == pytest.approx(size)
    assert bound_us(Operation.FORWARD, shape, Peaks(bandwidth=1e30, flops=1e6)) == pytest.approx(8 * 600)


def test_narrow_tables_are_fewer_bytes() -> None:
    shape = LayerShape(4, 3, 5, 100)
    wide, table = compulsory_bytes(Operation.FORWARD, shape), shape.table_bytes
    assert wide is not None
    assert compulsory_bytes(Operation.FORWARD, shape, TableDtype.INT8) == wide - 3 * table // 4
    # gradients are float32 whatever the table
    assert compulsory_bytes(Operation.GRAD_TABLE, shape, TableDtype.INT8) == compulsory_bytes(
        Operation.GRAD_TABLE, shape
    )


def test_a_small_batch_touches_little_of_a_table() -> None:
    shape = LayerShape(4, 3, 50, 1)
    assert compulsory_bytes(Operation.FORWARD, shape) == 4 * 4 + 16 * 6 + 4 * 3
