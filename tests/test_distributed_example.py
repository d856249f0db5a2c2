"""The example for several processes learns, and a run that was resumed ends as one that was not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.processes import ROOT

GPUS = torch.cuda.device_count()
STEPS = 120


def torchrun(processes: int, *arguments: str | Path) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "-m", "examples.distributed", *map(str, arguments)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def tensors(checkpoint: Path, into: Path) -> dict[str, torch.Tensor]:
    dcp_to_torch_save(checkpoint, into)
    found: dict[str, torch.Tensor] = {}
    walk = [("", torch.load(into, weights_only=True))]
    for prefix, values in walk:
        for name, value in values.items():
            if isinstance(value, dict):
                walk.append((f"{prefix}{name}.", value))
            elif isinstance(value, torch.Tensor):
                found[f"{prefix}{name}"] = value
    return found


@pytest.mark.slow
@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_run_learns_and_resumes_as_if_it_was_not_interrupted(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "cpu":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    processes = 2 if where == "cpu" else min(2, GPUS)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    steps = ("--steps", str(STEPS), "--checkpoints")
    said = torchrun(processes, *steps, whole)
    torchrun(processes, *steps, parts, "--stop-at", str(STEPS // 2))
    again = torchrun(processes, *steps, parts, "--resume")

    def losses(output: str) -> list[tuple[str, str]]:
        return re.findall(r"step (\d+): loss ([\d.]+)", output)

    assert losses(again) == losses(said)[3:]
    assert len(losses(again)) == 3
    (error,) = re.findall(rf"test error ([\d.]+) after {STEPS} steps", said)
    assert float(error) < 0.2  # the target's standard deviation is 1.04
    expected = tensors(whole / f"step-{STEPS}", tmp_path / "whole.pt")
    found = tensors(parts / f"step-{STEPS}", tmp_path / "parts.pt")
    assert found.keys() == expected.keys()
    # tables, moments of Adam, statistics of batch norm, gamma
    assert {"exp_avg", "exp_avg_sq", "func_parameter", "gamma", "running_var"} <= {
        name.rpartition(".")[2] for name in expected
    }
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    # and it was not over at half of it
    early = tensors(parts / f"step-{STEPS // 2}", tmp_path / "early.pt")
    tables = [name for name in expected if name.endswith("func_parameter")]
    assert not any(torch.equal(early[name], expected[name]) for name in tables)


def test_it_says_how_to_start_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.distributed", "--checkpoints", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "torchrun --nproc-per-node 2" in done.stderr
