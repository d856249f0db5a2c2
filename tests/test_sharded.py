"""Training under FSDP2 gives the losses of one process: tables that it shards change without a trace."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]


def losses(world: int, device: str, settings: dict[str, str], rendezvous: Path | None = None) -> list[float]:
    workers = []
    for rank in range(world):
        arguments: list[Any] = [
            rank,
            world,
            None if rendezvous is None else str(rendezvous),
            device,
            settings,
        ]
        command = [sys.executable, "-m", "tests.sharded_training", json.dumps(arguments)]
        workers.append(
            subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    outputs = [worker.communicate(timeout=300) for worker in workers]
    for worker, (_, complaints) in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, complaints[-3000:]
    found: list[float] = json.loads(outputs[0][0].splitlines()[-1])
    return found


@pytest.mark.parametrize(
    "settings",
    [{}, {"autocast": "bfloat16"}, {"autocast": "bfloat16", "reshard": "no", "accumulate": "2"}],
    ids=lambda s: " ".join(s.values()) or "float32",
)
@pytest.mark.parametrize(("world", "device"), [(2, "cpu"), pytest.param(1, "cuda", marks=GPU)])
def test_fully_shard(world: int, device: str, settings: dict[str, str], tmp_path: Path) -> None:
    alone = losses(1, device, settings)
    sharded = losses(world, device, settings, tmp_path / "rendezvous")
    assert alone[-1] < 0.7 * alone[0]
    # sums of gradients are added in another order, and Adam divides by their size
    assert sharded == pytest.approx(alone, rel=2e-4)


def test_half_precision_of_sharded_parameters(tmp_path: Path) -> None:
    settings = {"param_dtype": "bfloat16"}
    sharded = losses(2, "cpu", settings, tmp_path / "rendezvous")
    # inputs and outputs are rounded too there, which autocast leaves
    assert sharded == pytest.approx(losses(1, "cpu", settings), rel=5e-2)
    assert sharded[-1] < 0.7 * sharded[0]
