"""Second derivatives, as models trained on forces need them: right, and in bounded memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lmkan_gen import LMKAN2DLayer, knots, lmkan, reference
from tests import truth

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def inside_cells(x: Tensor, borders: Tensor) -> Tensor:
    return torch.from_numpy(truth.away_from_knots(x.numpy(), borders.numpy(), margin=1e-3)).double()


@pytest.mark.parametrize("grids", [3, 4, 9])
@pytest.mark.parametrize("spread", [1.0, 5.0])
def test_gradgradcheck_inside_cells(grids: int, spread: float) -> None:
    """All of it: from both gradients to output gradient, inputs and table; beyond the grid as well."""
    borders = knots(grids, torch.float64)
    x = inside_cells(spread * torch.randn(4, 3, dtype=torch.float64), borders).requires_grad_()
    table = torch.randn(grids + 1, grids + 1, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lmkan, (x, table, borders))


def force_gradients(
    function: Function, x: Tensor, tables: Sequence[Tensor], borders: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Forces of a network of two layers, and the gradients of a loss on energies and forces."""
    x = x.detach().requires_grad_()
    leaves = [t.detach().requires_grad_() for t in tables]
    energies = function(function(x, leaves[0], borders), leaves[1], borders)
    (forces,) = torch.autograd.grad(energies.sum(), x, create_graph=True)
    loss = energies.square().mean() + 3 * (forces - 0.1).square().mean()
    return forces.detach(), list(torch.autograd.grad(loss, leaves))


def force_case() -> tuple[Tensor, list[Tensor], Tensor]:
    grids = 6
    borders = knots(grids, torch.float64)
    tables = [0.5 * torch.randn(grids + 1, grids + 1, o, p, dtype=torch.float64) for o, p in ((8, 3), (1, 4))]
    return inside_cells(torch.randn(6, 40, dtype=torch.float64), borders), tables, borders


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_training_on_forces(dtype: torch.dtype, tolerance: float) -> None:
    x, tables, borders = force_case()
    expected_forces, expected = force_gradients(reference.evaluate, x, tables, borders)
    forces, gradients = force_gradients(lmkan, x.to(dtype), [t.to(dtype) for t in tables], borders.to(dtype))
    for found, wanted in zip((forces, *gradients), (expected_forces, *expected), strict=True):
        assert truth.relative_error(found, wanted.numpy()) < tolerance


def peak(function: Callable[[], object], directory: Path) -> int:
    """Most bytes that ``function`` held at a time on the CPU, of those that it allocated."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    path = directory / "trace.json"
    profiler.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: float(e["ts"])):
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most


def test_the_measure_of_memory(tmp_path: Path) -> None:
    def two_at_a_time() -> None:
        for _ in range(3):
            a = torch.zeros(1000)
            a = a + 1

    assert peak(two_at_a_time, tmp_path) in range(8000, 8500)


def test_memory_does_not_grow_with_batch_or_grid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All temporaries together are a small multiple of the one that the reference allows itself."""
    temporary = 2**18
    monkeypatch.setattr(reference, "_TEMPORARY", temporary)
    for sizes in ((16, 16, 8, 1000), (16, 16, 8, 8000), (16, 16, 40, 1000), (64, 48, 12, 1000)):
        inputs, outputs, grids, batch = sizes
        x, grad = torch.randn(inputs, batch), torch.randn(outputs, batch)
        table = torch.randn(grids + 1, grids + 1, outputs, inputs // 2)
        v_x, v_table = torch.randn_like(x), torch.randn_like(table)
        out = [torch.empty_like(t) for t in (grad, x, table)]
        given = (v_x, v_table, grad, x, table, knots(grids))
        run = partial(reference.double_backward, *given, *out)
        assert peak(run, tmp_path) < 14 * temporary, sizes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_training_on_forces_on_a_gpu() -> None:
    x, tables, borders = force_case()
    expected_forces, expected = force_gradients(reference.evaluate, x, tables, borders)
    single = [t.float().cuda() for t in tables]
    forces, gradients = force_gradients(lmkan, x.float().cuda(), single, borders.float().cuda())
    for found, wanted in zip((forces, *gradients), (expected_forces, *expected), strict=True):
        assert truth.relative_error(found.cpu(), wanted.numpy()) < 2e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_memory_of_training_on_forces_on_a_gpu() -> None:
    """The corners of all evaluations would be 12 GiB."""
    layer = LMKAN2DLayer(28, 12, 256).cuda()
    x = torch.randn(12, 2**19, device="cuda", requires_grad=True)

    def step() -> None:
        energies = layer(x).square().sum(0)
        (forces,) = torch.autograd.grad(energies.sum(), x, create_graph=True)
        forces.square().mean().backward()

    step()
    torch.cuda.synchronize()
    layer.func_parameter.grad = x.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    outputs, inputs = 4 * 256 * 2**19, 4 * 12 * 2**19
    # y, its square, and the gradients on the way back; workspaces of kernels and the reference's temporaries
    limit = 8 * outputs + 8 * inputs + 4 * layer.func_parameter.nbytes + 2 * 256 * 2**20
    assert torch.cuda.max_memory_allocated() - before < limit
