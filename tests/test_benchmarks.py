"""The benchmark script: that it runs, and that its CSV has every number. What it measures is not judged."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "layers.py"
MEASURED = ("forward", "backward", "linear_float32", "linear_bfloat16")
#: measured, or known, on GPUs only
EMPTY = (
    "linear_tf32_us",
    "linear_tf32_iqr_us",
    "forward_published_us",
    "forward_speedup",
    "backward_published_us",
    "backward_speedup",
    "forward_of_ceiling",
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_layers_on_a_cpu(tmp_path: Path) -> None:
    output = tmp_path / "times.csv"
    done = run("--device", "cpu", "--shape", "8,6,5,64", "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert "8,6,5,64" in done.stdout
    with output.open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    sizes = {"inputs": "8", "outputs": "6", "grids": "5", "batch": "64"}
    assert {name: row.pop(name) for name in sizes} == sizes
    assert row.pop("device")
    for name in MEASURED:
        median, spread = float(row.pop(f"{name}_us")), float(row.pop(f"{name}_iqr_us"))
        assert math.isfinite(median), name
        assert median > 0, name
        assert 0 <= spread < math.inf, name
    assert row.pop("forward_family") == "row_vector"
    assert row.pop("backward_family") == "row_vector + row_vector"
    assert "batch_tile=" in row.pop("forward_parameters")
    assert row.pop("backward_parameters").count("batch_tile=") == 2
    assert row == dict.fromkeys(EMPTY, "")


def test_layers_refuses_what_is_no_layer() -> None:
    done = run("--device", "cpu", "--shape", "7,6,5,64")
    assert done.returncode == 2
    assert "inputs must be even" in done.stderr
