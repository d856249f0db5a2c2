"""The benchmark scripts: that they run, and that CSVs have every number. What they measure is not judged."""

from __future__ import annotations

import csv
import math
import random
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from benchmarks import layers, training
from lmkan_gen import dispatch, knots
from lmkan_gen.call import Call
from lmkan_gen.device import Device
from lmkan_gen.problem import LayerShape, Operation
from lmkan_gen.tuner.measure import Timing
from tests import truth

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"inputs": "8", "outputs": "6", "grids": "5", "batch": "64"}
MEASURED = ("forward", "grad_input", "backward", "linear_float32", "linear_bfloat16")
#: measured, or known, on GPUs only
EMPTY = (
    "linear_tf32_us",
    "linear_tf32_iqr_us",
    "published_launches_counted",
    "forward_published_us",
    "forward_speedup",
    "backward_published_us",
    "backward_speedup",
    "forward_of_ceiling",
    *(
        f"forward_{table}_{what}"
        for table in ("float16", "int8")
        for what in ("us", "iqr_us", "family", "parameters", "of_ceiling")
    ),
    *(
        f"backward_{variant}_{what}"
        for variant in ("float16", "deterministic")
        for what in ("us", "iqr_us", "family", "parameters")
    ),
)


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"benchmarks.{script}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def rows_of(script: str, directory: Path, *more: str) -> list[dict[str, str]]:
    """The CSV of a run for one shape on the CPU, without sizes."""
    output = directory / "times.csv"
    done = run(script, "--device", "cpu", "--shape", "8,6,5,64", "--output", str(output), *more)
    assert done.returncode == 0, done.stderr
    assert "8,6,5,64" in done.stdout
    with output.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        assert {name: row.pop(name) for name in SIZES} == SIZES
        assert row.pop("device")
    return rows


def pop_time(row: dict[str, str], name: str) -> None:
    median, spread = float(row.pop(f"{name}_us")), float(row.pop(f"{name}_iqr_us"))
    assert math.isfinite(median), name
    assert median > 0, name
    assert 0 <= spread < math.inf, name


@pytest.mark.parametrize("layout", ["batch_last", "batch_first"])
def test_layers_on_a_cpu(tmp_path: Path, layout: str) -> None:
    (row,) = rows_of("layers", tmp_path, *(["--batch-first"] if layout == "batch_first" else []))
    assert row.pop("layout") == layout
    for name in MEASURED:
        pop_time(row, name)
    for name in ("forward", "grad_input"):
        assert row.pop(f"{name}_family") == "row_vector"
        assert "batch_tile=" in row.pop(f"{name}_parameters")
    assert row.pop("backward_family") == "row_vector + row_vector"
    assert row.pop("backward_parameters").count("batch_tile=") == 2
    assert row == dict.fromkeys(EMPTY, "")


def test_training_on_a_cpu(tmp_path: Path) -> None:
    (row,) = rows_of("training", tmp_path)
    for name in ("forward", "backward", "hessian", "adam", "step", "mlp_float32", "copy"):
        pop_time(row, name)
    assert float(row.pop("step_per_mlp")) > 0
    assert float(row.pop("hessian_per_copy")) > 0
    published = ("forward_backward_us", "launches_counted", "speedup")
    unknown = ("mlp_tf32_us", "mlp_tf32_iqr_us", *(f"published_{what}" for what in published))
    assert row == dict.fromkeys(unknown, "")


def device_named(name: str) -> Device:
    return Device("cuda", name, "sm_90", 132)


def layer_row(shape: LayerShape, us: Mapping[str, float], device: str = layers.PUBLISHED_ON) -> layers.Row:
    """Operations take ``us[name]``, and a random time where that is not given."""
    names = (*layers.OPERATIONS, *layers.LINEARS)
    timings = {name: Timing((us.get(name, random.uniform(1, 1e5)),)) for name in names}
    return layers.Row(shape, device_named(device), timings, {}, batch_first=False)


def training_row(
    shape: LayerShape, us: Mapping[str, float], device: str = layers.PUBLISHED_ON
) -> training.Row:
    timings = {name: Timing((us.get(name, random.uniform(1, 1e5)),)) for name in training.PARTS}
    return training.Row(shape, device_named(device), timings)


#: published times, microseconds, of a call without launches, a long one with them, and a short one with them
WITHOUT_LAUNCHES = (LayerShape(64, 64, 8, 256), 5.56, 14.9)
LONG = (LayerShape(256, 256, 10, 65536), 1436.0, 6620.0)
SHORT = (LayerShape(128, 128, 26, 16384), 162.0, 769.0)


@pytest.mark.parametrize(("shape", "forward", "backward"), [WITHOUT_LAUNCHES, LONG])
def test_speedup_where_both_sides_are_without_launches(
    shape: LayerShape, forward: float, backward: float
) -> None:
    ours = {name: random.uniform(1, 1e4) for name in ("forward", "backward")}
    row = layer_row(shape, ours)
    assert row.published_us("forward") == forward
    assert row.published_us("backward") == backward
    assert row.speedup("forward") == pytest.approx(forward / ours["forward"])
    assert row.speedup("backward") == pytest.approx(backward / ours["backward"])
    step = training_row(shape, ours)
    assert step.published_us() == pytest.approx(forward + backward)
    assert step.speedup() == pytest.approx((forward + backward) / sum(ours.values()))


def test_no_speedup_where_only_published_times_count_launches() -> None:
    shape, forward, backward = SHORT
    row, step = layer_row(shape, {}), training_row(shape, {})
    assert row.published_us("forward") == forward
    assert row.published_us("backward") == backward
    assert step.published_us() == forward + backward
    assert row.speedup("forward") is None
    assert row.speedup("backward") is None
    assert step.speedup() is None
    for record in (row.record(), step.record()):
        assert record["published_launches_counted"] is True
        assert all(record[name] is None for name in record if name.endswith("speedup"))


def test_each_operation_is_compared_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward may be long enough for a speedup where the forward, and so their sum, is not."""
    shape = LayerShape(8, 6, 5, 64)
    monkeypatch.setitem(layers.PUBLISHED, shape, layers.Published(999.0, 1000.0, launches_counted=True))
    assert layer_row(shape, {}).speedup("forward") is None
    assert layer_row(shape, {"backward": 500.0}).speedup("backward") == pytest.approx(2)
    assert training_row(shape, {}).speedup() is None


@pytest.mark.parametrize(
    ("shape", "device"),
    [(WITHOUT_LAUNCHES[0], "NVIDIA H100"), (LayerShape(64, 64, 8, 257), layers.PUBLISHED_ON)],
)
def test_nothing_is_published_elsewhere(shape: LayerShape, device: str) -> None:
    row, step = layer_row(shape, {}, device), training_row(shape, {}, device)
    assert row.published_us("forward") is None
    assert row.speedup("forward") is None
    assert step.published_us() is None
    assert step.speedup() is None
    assert row.record()["published_launches_counted"] is None


def test_launches_are_negligible_where_a_speedup_is_printed() -> None:
    """By the most that they were seen to add: to a forward 34 us, to a backward 66 us."""
    most = {"forward": 34.0, "backward": 66.0}
    for shape, published in layers.PUBLISHED.items():
        for operation in layers.PUBLISHED_OPERATIONS:
            if published.launches_counted and published.comparable(operation):
                assert most[operation] / published.us(operation) < 0.025, shape


def test_printed_published_times_say_whether_launches_are_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    ours = {"forward": 4.0, "backward": 10.0}
    shapes = [shape for shape, *_ in (WITHOUT_LAUNCHES, LONG, SHORT)]
    layers.print_times([layer_row(shape, ours) for shape in shapes])
    printed = capsys.readouterr().out
    lines = [cells(line) for line in printed.partition("our speedup over it")[2].splitlines()]
    assert [line[:5] for line in lines if line[0] in map(str, shapes)] == [
        ["64,64,8,256", "5.56 us", "1.39x", "14.9 us", "1.49x"],
        ["256,256,10,65536", "1.44 ms*", "359.00x", "6.62 ms*", "662.00x"],
        ["128,128,26,16384", "162 us*", "-", "769 us*", "-"],
    ]
    assert layers.PUBLISHED_CAPTION in printed
    training.print_times([training_row(shape, ours) for shape in shapes])
    printed = capsys.readouterr().out
    lines = [cells(line) for line in printed.partition("beside an MLP")[2].splitlines()]
    assert [line[-2:] for line in lines if line[0] in map(str, shapes)] == [
        ["20.5 us", "1.46x"],
        ["8.06 ms*", "575.43x"],
        ["931 us*", "-"],
    ]
    assert layers.PUBLISHED_CAPTION in printed


def cells(line: str) -> list[str]:
    """A line of a printed table."""
    return [cell.strip() for cell in line.strip().strip("│").split("│")]


def test_what_is_timed_trains() -> None:
    """A step lowers the regulariser, and lets nothing that it is made of out."""
    from benchmarks.training import hessian_call, lmkan_step

    step = lmkan_step(LayerShape(8, 6, 5, 64), torch.device("cpu"))
    layer, x = step.args[0], step.args[1]
    before = layer.func_parameter.detach().clone()
    step()
    assert x.grad is not None
    # the first step of Adam is as long as its learning rate, wherever there is a gradient
    moved = (layer.func_parameter.detach() - before).abs()
    assert moved.max().item() == pytest.approx(1e-3, rel=1e-2)
    assert (moved > 0).all()
    hessian_call(layer)()
    expected = truth.hessian(layer.func_parameter.detach(), layer.borders)[1]
    assert truth.relative_error(layer.func_parameter.grad, expected) < 1e-5


def test_skew_on_a_cpu(tmp_path: Path) -> None:
    rows = rows_of("skew", tmp_path)
    assert [row.pop("x") for row in rows] == ["normal", "one cell", "constant", "uniform"]
    assert float(rows[0]["ratio"]) == 1
    for row in rows:
        pop_time(row, "backward")
        assert float(row.pop("ratio")) > 0
        assert 0 < float(row.pop("error")) < 1e-5
        assert row == {}


def test_skew_sees_wrong_gradients() -> None:
    from benchmarks.skew import DISTRIBUTIONS, error

    for distribution in DISTRIBUTIONS.values():
        borders = knots(5)
        x, table, grad = (
            distribution(torch.empty(8, 64), borders),
            torch.randn(6, 6, 6, 4),
            torch.randn(6, 64),
        )
        b = {"x": x, "table": table, "grad": grad, "borders": borders}
        b |= {"grad_x": torch.empty_like(x), "grad_table": torch.empty_like(table)}
        dispatch.execute(Call(Operation.BACKWARD, LayerShape(8, 6, 5, 64), torch.device("cpu")), b)
        assert error(b) < 1e-5
        for name in ("grad_x", "grad_table"):
            wrong = b[name].clone()
            wrong.view(-1)[wrong.abs().argmax()] *= 1.001
            assert error({**b, name: wrong}) > 5e-4
            wrong.view(-1)[0] = torch.nan
            assert error({**b, name: wrong}) == math.inf


def test_tuning_on_a_cpu(tmp_path: Path) -> None:
    journal = tmp_path / "all.journal"
    options = ["--device", "cpu", "--shape", "8,6,5,64", "--quick", "1", "--long", "100"]
    done = run("tuning", *options, "--operation", "grad_input", "--storage", str(journal))
    assert done.returncode == 0, done.stderr
    space, compared, *_ = done.stdout.splitlines()
    found = re.fullmatch(r"grad_input: (\d+) candidates", space)
    assert found
    assert re.fullmatch(
        rf"grad_input: .* \(\w+: .*\) after 1 in \d+ s, "
        rf"the other .* \(\w+: .*\) after {found[1]} of {found[1]} in \d+ s: \d+\.\d+",
        compared,
    )
    assert "forward" not in done.stdout
    assert journal.exists()


@pytest.mark.parametrize("script", ["layers", "training", "skew"])
def test_what_is_no_layer_is_refused(script: str) -> None:
    done = run(script, "--device", "cpu", "--shape", "0,6,5,64")
    assert done.returncode == 2
    assert "inputs must be at least 1" in done.stderr
