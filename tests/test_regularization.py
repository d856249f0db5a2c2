from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch.library import opcheck

from lmkan_gen import LMKAN2DLayer, dispatch, hessian_regularization, knots, selection
from lmkan_gen.problem import Operation
from tests import truth


def on_knots(function: Any, grids: int) -> torch.Tensor:
    g = knots(grids, torch.float64)
    values: torch.Tensor = function(g[:, None], g[None, :])
    return values.expand(grids + 1, grids + 1)[:, :, None, None].contiguous()


@pytest.mark.parametrize("grids", [3, 4, 9, 20])
def test_agrees_with_the_definition(grids: int) -> None:
    g = knots(grids, torch.float64)
    table = torch.randn(grids + 1, grids + 1, 3, 2, dtype=torch.float64)
    expected, gradient = truth.hessian(table, g)
    assert hessian_regularization(table, g).item() == pytest.approx(expected, rel=1e-12)
    single = hessian_regularization(table.float(), g.float())
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(expected, rel=1e-6)
    (found,) = torch.autograd.grad(hessian_regularization(table.requires_grad_(), g), table)
    assert truth.relative_error(found, gradient) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layers_in_half_precision_are_regularised_in_float32(dtype: torch.dtype) -> None:
    layer = LMKAN2DLayer(8, 6, 5, init_scale=50.0, dtype=dtype)
    g = knots(8, torch.float64)
    expected, gradient = truth.hessian(layer.func_parameter.detach().double(), g)
    value = layer.get_hessian_regularization()
    assert value.dtype == torch.float32
    assert expected > torch.finfo(torch.float16).max  # as a sum of half precision it would be infinite
    assert value.item() == pytest.approx(expected, rel=1e-5)
    (value / expected).backward()
    assert layer.func_parameter.grad is not None
    assert layer.func_parameter.grad.dtype == dtype
    assert (
        truth.relative_error(layer.func_parameter.grad.double(), gradient / expected)
        < 2 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("grids", [3, 8, 15])
def test_closed_forms(grids: int) -> None:
    g = knots(grids, torch.float64)
    affine = on_knots(lambda a, b: 0.7 * a - 1.3 * b + 0.2, grids)
    assert hessian_regularization(affine, g).item() == pytest.approx(0, abs=1e-24)
    # f_xy = 1 everywhere, so R = 2; finite differences are exact for quadratics
    assert hessian_regularization(on_knots(lambda a, b: a * b, grids), g).item() == pytest.approx(2)
    assert hessian_regularization(on_knots(lambda a, b: a * a + 0 * b, grids), g).item() == pytest.approx(4)
    assert hessian_regularization(on_knots(lambda a, b: 3 * b * b + 0 * a, grids), g).item() == pytest.approx(
        36
    )


def test_functions_add_up() -> None:
    g = knots(6, torch.float64)
    table = torch.randn(7, 7, 4, 3, dtype=torch.float64)
    parts = [hessian_regularization(table[:, :, o : o + 1, p : p + 1], g) for o in range(4) for p in range(3)]
    assert hessian_regularization(table, g).item() == pytest.approx(sum(part.item() for part in parts))


def test_is_differentiable_any_number_of_times() -> None:
    g = knots(4, torch.float64)
    table = torch.randn(5, 5, 2, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: hessian_regularization(t, g), (table,))
    # not quadratic: a third derivative too
    assert torch.autograd.gradgradcheck(lambda t: hessian_regularization(t, g) ** 2, (table,))
    first = torch.autograd.grad(hessian_regularization(table, g) ** 2, table, create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), table, create_graph=True)[0]
    assert second.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize("disabled", ["0", "1"])
def test_opcheck(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, needs_grad: bool, disabled: str
) -> None:
    monkeypatch.setenv(dispatch.DISABLE_VARIABLE, disabled)
    table = torch.randn(6, 6, 4, 3, dtype=dtype, requires_grad=needs_grad)
    scale = torch.randn((), dtype=dtype, requires_grad=needs_grad)
    opcheck(torch.ops.lmkan_gen.hessian.default, (table, knots(5, dtype)))
    opcheck(torch.ops.lmkan_gen.grad_hessian.default, (scale, table, knots(5, dtype)))


def test_compiles_without_graph_breaks() -> None:
    layer = LMKAN2DLayer(6, 6, 5)

    def scaled() -> torch.Tensor:
        return 3 * layer.get_hessian_regularization()

    torch.compile(scaled, backend="aot_eager", fullgraph=True)().backward()
    found, layer.func_parameter.grad = layer.func_parameter.grad, None
    scaled().backward()
    torch.testing.assert_close(found, layer.func_parameter.grad)


@pytest.mark.parametrize("disabled", ["0", "1"])
def test_float32_runs_on_a_kernel_or_in_plain_torch(monkeypatch: pytest.MonkeyPatch, disabled: str) -> None:
    monkeypatch.setenv(dispatch.DISABLE_VARIABLE, disabled)
    dispatch.clear_caches()
    layer = LMKAN2DLayer(6, 10, 7, init_scale=3.0)
    value = layer.get_hessian_regularization()
    (0.5 * value).backward()
    expected, gradient = truth.hessian(layer.func_parameter.detach(), layer.borders)
    assert value.item() == pytest.approx(expected, rel=1e-6)
    assert truth.relative_error(layer.func_parameter.grad, 0.5 * gradient) < 2e-6
    used = {u.operation: u.kernel for u in dispatch.used()}
    kernel = None if disabled == "1" else "hessian_strips"
    assert used == {Operation.HESSIAN: kernel, Operation.GRAD_HESSIAN: kernel}


def test_nothing_to_tune_is_nothing_to_report(caplog: pytest.LogCaptureFixture) -> None:
    selection.clear_caches()
    dispatch.clear_caches()
    with caplog.at_level(logging.INFO, "lmkan_gen"):
        LMKAN2DLayer(5, 4, 3).get_hessian_regularization().backward()
    assert caplog.records == []


def test_smooth_functions_keep_their_digits() -> None:
    """Values far larger than what second derivatives see: differences first, then products."""
    grids = 20
    g = knots(grids)
    table = (10 * g[:, None] - 7 * g + 1e-2 * torch.randn(grids + 1, grids + 1))[:, :, None, None]
    expected, gradient = truth.hessian(table, g)
    table = table.contiguous().requires_grad_()
    value = hessian_regularization(table, g)
    value.backward()
    assert value.item() == pytest.approx(expected, rel=1e-4)
    assert truth.relative_error(table.grad, gradient) < 1e-4


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_any_strides_and_offsets(offset: int) -> None:
    g = knots(5)
    storage = torch.randn(6 * 6 * 4 * 3 + 4)
    table = storage[offset : offset + 6 * 6 * 4 * 3].view(6, 6, 4, 3)
    for view in (table, table.transpose(0, 1), table.transpose(2, 3)):
        leaf = view.detach().requires_grad_()
        value = hessian_regularization(leaf, g)
        value.backward()
        expected, gradient = truth.hessian(view, g)
        assert value.item() == pytest.approx(expected, rel=1e-6)
        assert truth.relative_error(leaf.grad, gradient) < 2e-6


def test_plain_torch_works_in_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    g = knots(4, torch.float64)
    table = torch.randn(5, 5, 7, 3, dtype=torch.float64, requires_grad=True)
    monkeypatch.setattr("lmkan_gen.hessian_reference._TEMPORARY", 5 * 5 * 8 * 4)  # four functions
    value = hessian_regularization(table, g)
    value.backward()
    expected, gradient = truth.hessian(table.detach(), g)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    assert truth.relative_error(table.grad, gradient) < 1e-12


def test_wrong_input_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"table must be \[G\+1, G\+1, outputs, pairs\] with G\+1 = 5 .* got"
    ):
        hessian_regularization(torch.zeros(4, 5, 1, 1), knots(4))
    with pytest.raises(TypeError, match=r"borders has dtype torch.float32, table has torch.float64"):
        hessian_regularization(torch.zeros(5, 5, 1, 1, dtype=torch.float64), knots(4))
    with pytest.raises(ValueError, match="borders is on cpu, table is on meta"):
        hessian_regularization(torch.zeros(5, 5, 1, 1, device="meta"), knots(4))
    with pytest.raises(ValueError, match="the grid is fixed"):
        hessian_regularization(torch.zeros(5, 5, 1, 1), knots(4).requires_grad_())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("disabled", ["0", "1"])
@pytest.mark.parametrize("offset", [0, 1])
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch, disabled: str, offset: int) -> None:
    monkeypatch.setenv(dispatch.DISABLE_VARIABLE, disabled)
    g = knots(9)
    storage = torch.randn(100 * 64 * 6 + 1)
    table = storage[offset : offset + 100 * 64 * 6].view(10, 10, 64, 6)
    leaf = storage.cuda()[offset : offset + 100 * 64 * 6].view(10, 10, 64, 6).detach().requires_grad_()
    value = hessian_regularization(leaf, g.cuda())
    (0.5 * value).backward()
    expected, gradient = truth.hessian(table, g)
    assert leaf.grad is not None
    assert value.item() == pytest.approx(expected, rel=5e-6)
    assert truth.relative_error(leaf.grad.cpu(), 0.5 * gradient) < 5e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_memory_of_a_training_step_on_a_gpu() -> None:
    """Nothing of the size of the table but its gradient."""
    layer = LMKAN2DLayer(18, 256, 256).cuda()
    layer.get_hessian_regularization().backward()
    layer.func_parameter.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    layer.get_hessian_regularization().backward()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < layer.func_parameter.nbytes + 2**20
