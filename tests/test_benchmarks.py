"""The benchmark scripts: that they run, and that CSVs have every number. What they measure is not judged."""

from __future__ import annotations

import csv
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lmkan_gen import dispatch, knots
from lmkan_gen.families import Demand
from lmkan_gen.problem import LayerShape, Operation
from tests import truth

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"inputs": "8", "outputs": "6", "grids": "5", "batch": "64"}
MEASURED = ("forward", "grad_input", "backward", "linear_float32", "linear_bfloat16")
#: measured, or known, on GPUs only
EMPTY = (
    "linear_tf32_us",
    "linear_tf32_iqr_us",
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
    unknown = ("mlp_tf32_us", "mlp_tf32_iqr_us", "published_forward_backward_us", "published_speedup")
    assert row == dict.fromkeys(unknown, "")


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
        dispatch.execute(Operation.BACKWARD, LayerShape(8, 6, 5, 64), torch.device("cpu"), Demand(), b)
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
        rf"grad_input: .* \(row_vector: .*\) after 1 in \d+ s, "
        rf"the other .* \(row_vector: .*\) after {found[1]} of {found[1]} in \d+ s: \d+\.\d+",
        compared,
    )
    assert "forward" not in done.stdout
    assert journal.exists()


@pytest.mark.parametrize("script", ["layers", "training", "skew"])
def test_what_is_no_layer_is_refused(script: str) -> None:
    done = run(script, "--device", "cpu", "--shape", "0,6,5,64")
    assert done.returncode == 2
    assert "inputs must be at least 1" in done.stderr
