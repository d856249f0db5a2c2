"""Frozen layers: narrow tables instead of the parameter."""

from __future__ import annotations

import copy
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck

from lmkan_gen import LMKAN2DLayer, dispatch, knots, packing, reference
from lmkan_gen.frozen import frozen_lmkan
from lmkan_gen.nn import LMKANMLP, lmkan_layers
from lmkan_gen.packing import RoundedTable
from lmkan_gen.problem import TableDtype
from tests import truth

DTYPES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.int8: 5e-3}
FORWARD = torch.ops.lmkan_gen.frozen_forward.default
GRAD_INPUT = torch.ops.lmkan_gen.frozen_grad_input.default
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def layer(
    device: torch.device | str = "cpu", grids: int = 6, inputs: int = 12, outputs: int = 7
) -> LMKAN2DLayer:
    made = LMKAN2DLayer(grids, inputs, outputs, init_scale=1.0)
    return made.to(device).eval()


def expected(of: LMKAN2DLayer, x: Tensor) -> Tensor:
    """What a frozen layer is to compute: the definition in float64 with the rounded table."""
    assert of.frozen is not None
    table = of.frozen.table.to(torch.double).cpu()
    y = torch.empty(of.output_dim, x.shape[1], dtype=torch.double)
    reference.forward(x.double().cpu(), table, of.borders.double().cpu(), y)
    return y


def error(y: Tensor, right: Tensor) -> float:
    return float((y.double().cpu() - right).norm() / right.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [0, 1, 31, 33, 1000])
def test_computes_with_the_rounded_table(device: torch.device, dtype: torch.dtype, batch: int) -> None:
    of = layer(device).freeze(dtype)
    x = torch.randn(12, batch, device=device)
    y = of(x)
    assert y.shape == (7, batch)
    assert y.dtype == torch.float32
    if batch:
        assert error(y, expected(of, x)) <= DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(2, 1), (34, 33), (130, 67), (12, 256)])
def test_any_width(device: torch.device, dtype: torch.dtype, inputs: int, outputs: int) -> None:
    of = layer(device, 5, inputs, outputs).freeze(dtype)
    x = torch.randn(inputs, 77, device=device)
    assert error(of(x), expected(of, x)) <= DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grids", [3, 26, 41, 64, 120])
def test_any_grid(device: torch.device, dtype: torch.dtype, grids: int) -> None:
    of = layer(device, grids).freeze(dtype)
    x = torch.randn(12, 300, device=device)
    assert error(of(x), expected(of, x)) <= DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_far_outside(device: torch.device, dtype: torch.dtype) -> None:
    of = layer(device).freeze(dtype)
    x = torch.randn(12, 500, device=device) * torch.logspace(-1, 1.5, 500, device=device)
    y, right = of(x).double().cpu(), expected(of, x)
    of_sample = (y - right).norm(dim=0) / right.norm(dim=0)
    assert of_sample.max() <= 4 * DTYPES[dtype]
    if dtype is torch.int8:  # beyond +-6 in float32
        far = (x.abs() > 6).any(dim=0).cpu()
        assert 0 < far.sum() < 500
        assert of_sample[far].max() <= 5e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_stays_in_its_sample(device: torch.device, dtype: torch.dtype, value: float) -> None:
    of = layer(device).freeze(dtype)
    x = torch.randn(12, 70, device=device)
    before = of(x)
    x[3, 40] = value
    y = of(x)
    assert not y[:, 40].isfinite().any()
    others = torch.arange(70, device=device) != 40
    assert torch.equal(y[:, others], before[:, others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_input_gradient(device: torch.device, dtype: torch.dtype) -> None:
    of = layer(device).freeze(dtype)
    assert of.frozen is not None
    borders = knots(6)
    x0 = truth.away_from_knots(torch.randn(12, 65).numpy(), borders.double().numpy())
    x = torch.from_numpy(x0).to(device).requires_grad_()
    grad = torch.randn(7, 65)
    of(x).backward(grad.to(device))
    assert x.grad is not None
    right = torch.empty(12, 65, dtype=torch.double)
    table = of.frozen.table.to(torch.double).cpu()
    reference.grad_input(grad.double(), x.detach().double().cpu(), table, borders.double(), right)
    assert error(x.grad, right) <= DTYPES[dtype]


def test_int8_has_no_gradient() -> None:
    of, x = layer().freeze(torch.int8), torch.randn(12, 4, requires_grad=True)
    y = of(x)  # evaluation without torch.no_grad() works
    assert torch.equal(y, of(x.detach()))
    with pytest.raises(RuntimeError, match="int8 tables are for inference"):
        y.sum().backward()


def test_int8_behind_trainable_parameters_is_exported() -> None:
    # exporters trace with gradients enabled
    model = LMKANMLP((4, 8, 2), precondition="relu_first").eval()
    for of in lmkan_layers(model).values():
        of.freeze(torch.int8)
    x = torch.randn(20, 4)
    program = torch.export.export(model, (x,))
    assert torch.equal(program.module()(x), model(x))


@pytest.mark.parametrize("master", ["keep", "cpu", "drop"])
def test_layers_without_memory_keep_no_parameter(master: Literal["keep", "cpu", "drop"]) -> None:
    skeleton, source = layer("meta").freeze(torch.float16, master), layer().freeze(torch.float16)
    assert not list(skeleton.parameters())
    skeleton.load_state_dict(source.state_dict(), assign=True)
    assert source.frozen is not None
    assert torch.equal(skeleton.unfreeze().func_parameter, source.frozen.values.float())


def test_frozen_tables_are_in_evaluation_mode() -> None:
    of = layer().freeze(torch.float16)
    other = layer().train()
    other.load_state_dict(of.state_dict())
    assert [m.training for m in of.modules()] == [False, False]
    assert [m.training for m in other.modules()] == [True, True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(device: torch.device, dtype: torch.dtype) -> None:
    of = layer(device).freeze(dtype)
    assert of.frozen is not None
    t = of.frozen.table
    x = torch.randn(12, 20, device=device)
    opcheck(FORWARD, (x, t.values, t.scales, of.borders))
    if dtype is not torch.int8:
        opcheck(FORWARD, (x.clone().requires_grad_(), t.values, None, of.borders))
        opcheck(GRAD_INPUT, (torch.randn(7, 20, device=device), x, t.values, of.borders))
    wide, borders = x.double(), of.borders.double()
    opcheck(FORWARD, (wide, t.values, t.scales, borders))
    if dtype is not torch.int8:
        opcheck(FORWARD, (wide.clone().requires_grad_(), t.values, None, borders))
        opcheck(GRAD_INPUT, (torch.randn_like(wide[:7]), wide, t.values, borders))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("master", ["keep", "cpu", "drop"])
def test_unfreeze(dtype: torch.dtype, master: Literal["keep", "cpu", "drop"]) -> None:
    of = layer()
    x, before, table = torch.randn(12, 9), of.func_parameter, of.func_parameter.detach().clone()
    frozen_y = of.freeze(dtype, master)(x)
    assert (of.func_parameter is None) == (master != "keep")
    of.unfreeze()
    assert of.frozen is None
    assert (of.func_parameter is before) == (master == "keep")
    assert of.func_parameter.requires_grad
    if master == "drop":
        assert error(of(x).detach(), frozen_y.double()) <= 1e-6
    else:
        assert torch.equal(of.func_parameter, table)


@pytest.mark.parametrize("dtype", DTYPES)
def test_state_of_a_frozen_layer(dtype: torch.dtype) -> None:
    of = layer(grids=20).freeze(dtype)
    state = of.state_dict()
    sizes = sum(t.nbytes for t in state.values())
    coefficients = 21 * 21 * 7 * 6
    assert sizes <= coefficients * dtype.itemsize + 4 * 21 + 4 * 7
    other = layer(grids=20)
    assert not other.load_state_dict(copy.deepcopy(state), strict=True).missing_keys
    assert other.frozen is not None
    x = torch.randn(12, 9)
    assert torch.equal(other(x), of(x))
    # and back: the state of a layer that is not frozen
    plain = layer(grids=20)
    other.load_state_dict(plain.state_dict(), strict=True)
    assert other.frozen is None
    assert torch.equal(other(x), plain(x))


def test_state_within_a_network() -> None:
    def network() -> nn.Sequential:
        return nn.Sequential(LMKAN2DLayer(4, 6, 8), nn.ReLU(), LMKAN2DLayer(5, 8, 2)).eval()

    a, b = network(), network()
    assert isinstance(a[2], LMKAN2DLayer)
    a[2].freeze(torch.int8, "drop")
    b.load_state_dict(a.state_dict(), strict=True)
    with torch.no_grad():
        x = torch.randn(6, 5)
        assert torch.equal(a(x), b(x))


def test_wrong_state_is_refused() -> None:
    state = layer(grids=5).freeze(torch.float16).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer(grids=6).load_state_dict(state)
    state = layer().freeze(torch.int8).state_dict()
    del state["frozen.scales"]
    with pytest.raises(RuntimeError, match="int8 with scales"):
        layer().load_state_dict(state)


def test_copies_and_moves() -> None:
    of = layer().freeze(torch.int8, "drop")
    x = torch.randn(12, 3)
    assert torch.equal(copy.deepcopy(of)(x), of(x))
    assert of.to("meta").frozen.values.is_meta  # type: ignore[union-attr]


def test_refusals() -> None:
    of = layer()
    with pytest.raises(RuntimeError, match=r"call eval\(\) first"):
        of.train().freeze(torch.float16)
    of.eval()
    with pytest.raises(ValueError, match=r"table_dtype must be one of .* got torch.float64"):
        of.freeze(torch.float64)
    with pytest.raises(ValueError, match="master must be keep, cpu or drop, got 'gone'"):
        of.freeze(torch.float16, "gone")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="not frozen"):
        of.unfreeze()
    of.freeze(torch.float16)
    with pytest.raises(RuntimeError, match="frozen to float16 already"):
        of.freeze(torch.int8)


def test_tensors_that_do_not_belong_together_are_refused() -> None:
    t = packing.round_table(torch.randn(5, 5, 3, 4), TableDtype.INT8)
    borders, x = knots(4), torch.randn(8, 6)
    frozen_lmkan(x, t.values, t.scales, borders)
    wrong = {
        "scales of shape": RoundedTable(t.values, torch.ones(2, 3)),
        r"scales of shape \[1, 3\]": RoundedTable(t.values),
        r"float32 scales": RoundedTable(t.values, torch.ones(1, 3).half()),
        "scales belong to int8": RoundedTable(t.values.float(), t.scales),
        "values must be": RoundedTable(t.values[:4], t.scales),
    }
    for message, table in wrong.items():
        with pytest.raises(ValueError, match=message):
            frozen_lmkan(x, table.values, table.scales, borders)
    with pytest.raises(TypeError, match="frozen tables are one of"):
        frozen_lmkan(x, t.values.double(), None, borders)
    with pytest.raises(ValueError, match="x must be"):
        frozen_lmkan(x[:6], t.values, t.scales, borders)
    with pytest.raises(ValueError, match="values must be"):
        frozen_lmkan(x, t.values, t.scales, knots(5))
    with pytest.raises(TypeError, match="they must agree"):
        frozen_lmkan(x.double(), t.values, t.scales, borders)
    with pytest.raises(TypeError, match="float inputs"):
        frozen_lmkan(x.long(), t.values, t.scales, borders)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("of_input", [torch.float32, torch.float16])
def test_autocast(dtype: torch.dtype, of_input: torch.dtype) -> None:
    of = layer("cuda", 8, 32, 24).train()
    x = torch.randn(32, 500, device="cuda").to(of_input).requires_grad_()
    with torch.autocast("cuda", dtype):
        y = of(x)
    assert y.dtype == torch.float32
    y.square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == of_input
    grad_x, grad_table = x.grad.clone(), of.func_parameter.grad
    x64 = x.detach().double().cpu()
    rounded = of.func_parameter.detach().to(dtype).double().cpu()
    assert error(y.detach(), reference.evaluate(x64, rounded, of.borders.double().cpu())) <= DTYPES[dtype]
    assert grad_table is not None
    assert grad_table.dtype == torch.float32
    x64.requires_grad_()
    t64 = of.func_parameter.detach().double().cpu().requires_grad_()
    reference.evaluate(x64, t64, of.borders.double().cpu()).square().sum().backward()
    assert x64.grad is not None
    assert t64.grad is not None
    assert error(grad_table, t64.grad) <= 3 * DTYPES[dtype]
    assert error(grad_x, x64.grad) <= 3 * DTYPES[dtype]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_run_on_a_gpu_and_in_a_graph(dtype: torch.dtype) -> None:
    dispatch.clear_caches()
    of = layer("cuda", 8, 32, 24).freeze(dtype, "cpu")
    x = torch.randn(32, 500, device="cuda")
    with torch.no_grad():
        right = of(x)
        assert [(u.kernel is not None, u.table) for u in dispatch.used()] == [
            (True, TableDtype(str(dtype)[6:]))
        ]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = of(x)
    y.zero_()
    graph.replay()
    assert error(y, right.double().cpu()) <= 1e-6  # parts of sums are added in any order


@pytest.mark.parametrize("dtype", DTYPES)
def test_tables_that_hooks_bring_for_each_call_are_used(dtype: torch.dtype) -> None:
    # as accelerate offloads: every module's own tensors are there while its forward runs, else on meta
    of, x = layer().freeze(dtype, master="drop"), torch.randn(12, 30)
    kept = {name: dict(m.named_buffers(recurse=False)) for name, m in of.named_modules()}

    def fill(module: nn.Module, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            module._buffers[name] = tensor

    with torch.no_grad():
        right = of(x)
        for name, module in of.named_modules():
            empty = {n: b.to("meta") for n, b in kept[name].items()}
            module.register_forward_pre_hook(lambda m, _, there=kept[name]: fill(m, there))
            module.register_forward_hook(lambda m, *_, gone=empty: fill(m, gone))
            fill(module, empty)
        for _ in range(2):
            assert torch.equal(of(x), right)
    assert all(b.is_meta for b in of.buffers())
