"""Layers and operators over several processes equal those of one: `tests.parallel_checks`, run in each."""

from __future__ import annotations

import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

from tests import processes
from tests.parallel_checks import CHECKS

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees fewer than two GPUs"),
]
#: what the number of processes hardly matters to: four processes on few cores take their time
ONCE = [
    "autocast_equals_that_of_the_whole",
    "compiled_models",
    "derivatives_of_derivatives",
    "empty_outputs_are_empty_whatever_was_asked_before",
    "frozen_layers",
    "grids",
    "training_equals_that_of_the_whole",
]
NAMES = {2: list(CHECKS), 4: [name for name in CHECKS if name not in ONCE]}
RUNS = [(2, "cpu"), (4, "cpu"), pytest.param((2, "cuda"), marks=GPU)]

Run = tuple[int, dict[str, str]]


@pytest.fixture(scope="module", params=RUNS, ids=str)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All checks in one start of the processes: number of processes, and errors by the name of the check."""
    world, device = request.param
    rendezvous = tmp_path_factory.mktemp("parallel") / "rendezvous"
    settings = {"checks": NAMES[world], "seed": zlib.crc32(str(request.param).encode())}
    report: dict[str, str] = processes.run("tests.parallel_checks", world, rendezvous, device, settings)
    return world, report


@pytest.mark.parametrize("name", CHECKS)
def test_parallel(name: str, run: Run) -> None:
    world, report = run
    if name not in NAMES[world]:
        pytest.skip("checked with two processes")
    assert report.get(name, "not reached: an earlier check failed") == ""


def python(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=processes.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_nothing_imports_dtensor_for_those_who_have_none() -> None:
    """It takes a second to import, and is not part of every build of torch."""
    python(
        "import sys\n"
        "sys.modules['torch.distributed.tensor'] = None  # importing it fails\n"
        "import torch, lmkan_gen\n"
        "layer, x = lmkan_gen.LMKAN2DLayer(5, 8, 4), torch.randn(8, 3)\n"
        "layer(x).sum().backward(); layer.get_hessian_regularization().backward()\n"
        "layer.reset_parameters(); layer.eval().freeze(torch.float16)(x)\n"
    )


def test_operators_know_dtensors_when_they_first_meet_one(tmp_path: Path) -> None:
    python(
        "import torch, lmkan_gen\n"
        "from torch import distributed as dist\n"
        "from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh\n"
        f"dist.init_process_group('gloo', init_method='file://{tmp_path / 'rendezvous'}',"
        " rank=0, world_size=1)\n"
        "mesh = init_device_mesh('cpu', (1,))\n"
        "layer, x = lmkan_gen.LMKAN2DLayer(5, 8, 4), torch.randn(8, 3)\n"
        "y = layer(x)\n"
        "table = distribute_tensor(layer.func_parameter, mesh, [Shard(2)])\n"
        "with torch.inference_mode():\n"
        "    found = lmkan_gen.lmkan(distribute_tensor(x, mesh, [Shard(1)]), table, layer.borders)\n"
        "    torch.testing.assert_close(found.full_tensor(), y)\n"
    )
