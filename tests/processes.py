"""Processes that talk to each other: a module's `main`, once for each rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

ROOT = Path(__file__).resolve().parent.parent


def run(module: str, world: int, rendezvous: Path | None, device: str, settings: Any) -> Any:
    """Run ``python -m module`` in so many processes.

    Args:
        module: calls `main`.
        world: number of processes.
        rendezvous: a file that does not exist, by which they find each other; None: they do not look.
        device: ``"cpu"`` or ``"cuda"``.
        settings: for all of them, as JSON.

    Returns:
        What `main` was given to report by the first process.

    Raises:
        AssertionError: a process failed.
    """
    file = None if rendezvous is None else str(rendezvous)
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", module, json.dumps([rank, world, file, device, settings])],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = [worker.communicate(timeout=300) for worker in workers]
    for worker, (_, complaints) in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, complaints[-3000:]
    return json.loads(outputs[0][0].splitlines()[-1])


def main(work: Callable[[int, int, str, Any], Any]) -> None:
    """In such a process: call ``work`` with rank, world, device and settings, and report what it returns."""
    rank, world, rendezvous, device, settings = json.loads(sys.argv[1])
    if device == "cuda":
        torch.cuda.set_device(rank)
    if rendezvous is None:
        print(json.dumps(work(rank, world, device, settings)))
        return
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    report = work(rank, world, device, settings)
    dist.destroy_process_group()  # not after an error: the others could wait for it
    print(json.dumps(report))
