"""What the examples compare, and that they compare like with like."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from examples.comparison import Result, Results, call, deployed, flops, lmkan, mlp

ROOT = Path(__file__).resolve().parent.parent


def test_flops_are_those_of_the_formulas() -> None:
    assert flops(mlp(32, 64, 2)) == 2 * (32 * 64 + 64 * 64 + 64)
    # four multiply-adds per function of two inputs
    assert flops(lmkan(32, 64, 2, 12)) == 8 * (16 * 64 + 32 * 64 + 32)


@pytest.mark.parametrize("kind", ["mlp", "lmkan"])
def test_deployed_models_compute_what_was_trained(kind: str) -> None:
    model: nn.Module = mlp(6, 8, 2) if kind == "mlp" else lmkan(6, 8, 2, 8)
    for _ in range(3):
        call(model, torch.randn(64, 6))
    model.eval()
    ready = deployed(model)
    assert not any(isinstance(m, nn.BatchNorm1d) for m in ready.modules())
    x = torch.randn(100, 6)
    torch.testing.assert_close(call(ready, x), call(model, x), rtol=1e-4, atol=1e-5)


def test_results_survive_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    row = Result("MLP", 32, "float32", 0.5, 100, 10, 1.5, 0.1, "cpu")
    Results(path).add([row])
    again = Results(path)
    assert again.rows == [row]
    assert again.has("MLP", 32)
    assert not again.has("MLP", 64)


def test_function_approximation_runs_and_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.function_approximation", "--steps", "20"]
    command += ["--output", str(tmp_path)]
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        with (tmp_path / "results.csv").open(newline="") as stream:
            models = [(row["model"], row["width"], row["arithmetic"]) for row in csv.DictReader(stream)]
        assert len(models) == len(set(models)) >= 5
    assert "lmKAN 8" not in done.stdout  # finished before
    assert (tmp_path / "pareto.png").exists()
