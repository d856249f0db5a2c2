"""What torch's tools do to modules: meta devices, dtypes, autocast, loaders that walk tensors."""

from __future__ import annotations

import copy
import io
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load as load_checkpoint
from torch.distributed.checkpoint.state_dict_saver import save as save_checkpoint
from torch.nn.utils import parametrize

from lmkan_gen import LMKAN2DLayer, knots, reference
from lmkan_gen.nn import LMKANMLP, LMKANBlock, LMKANConv2d, LMKANLinear, ReLUFirst, ReLULast
from tests import truth

HALVES = [torch.float16, torch.bfloat16]
FREEZABLE = [torch.float32, *HALVES, torch.int8]


def layer(grids: int = 6, inputs: int = 8, outputs: int = 5, **more: Any) -> LMKAN2DLayer:
    return LMKAN2DLayer(grids, inputs, outputs, init_scale=1.0, **more)


def right(table: Tensor, x: Tensor) -> Tensor:
    """The definition in float64, on knots that no layer has touched."""
    borders = torch.from_numpy(truth.knots(table.shape[0] - 1)).float()
    return reference.evaluate(x.double(), table.double(), borders.double())


MODULES: dict[str, Callable[..., nn.Module]] = {
    "layer": lambda **k: LMKAN2DLayer(6, 8, 5, **k),
    "linear": lambda **k: LMKANLinear(8, 5, 6, **k),
    "relu_first": lambda **k: ReLUFirst(8, 5, 6, gamma=0.25, **k),
    "relu_last": lambda **k: ReLULast(8, 5, 6, gamma=0.25, **k),
    "block": lambda **k: LMKANBlock(8, 5, 6, precondition="relu_last", **k),
    "mlp": lambda **k: LMKANMLP((8, 4, 5), 6, precondition="relu_first", **k),
    "conv": lambda **k: LMKANConv2d(2, 5, 2, 6, **k),
}


@pytest.mark.parametrize("name", MODULES)
def test_meta_then_to_empty_then_reset(name: str) -> None:
    built = MODULES[name](device="meta")
    assert all(t.is_meta for t in (*built.parameters(), *built.buffers()))
    built.to_empty(device="cpu")
    with torch.no_grad():  # what uninitialised memory may hold
        for tensor in (*built.parameters(), *built.buffers()):
            tensor.copy_(torch.full_like(tensor, 77))
    for module in built.modules():
        reset: Any = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
    usual = dict(MODULES[name]().named_buffers())
    for key, buffer in built.named_buffers():
        assert torch.equal(buffer, usual[key]), key
    assert all(p.isfinite().all() and p.abs().max() < 2 for p in built.parameters())


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.float64, *HALVES])
def test_dtype_of_the_constructor(name: str, dtype: torch.dtype) -> None:
    built = MODULES[name](dtype=dtype)
    assert {p.dtype for p in built.parameters()} == {dtype}
    shape = (3, 2, 4, 4) if name == "conv" else (8, 8)
    assert built(torch.randn(shape, dtype=dtype)).dtype == dtype


def test_skip_init() -> None:
    built = nn.utils.skip_init(LMKAN2DLayer, 6, 8, 5)
    assert torch.equal(built.borders, knots(6))


@pytest.mark.parametrize("dtype", HALVES)
def test_modules_in_half_precision(dtype: torch.dtype) -> None:
    half = layer().to(dtype)
    assert torch.equal(half.borders, knots(6))
    x = torch.randn(8, 60).to(dtype).requires_grad_()
    y = half(x)
    assert y.dtype == dtype
    exact = right(half.func_parameter.detach(), x.detach())
    eps = torch.finfo(dtype).eps
    assert (y.double() - exact).abs().max() <= eps * exact.abs().max()
    grad = torch.randn(5, 60).to(dtype)
    y.backward(grad)
    assert x.grad is not None
    assert half.func_parameter.grad is not None
    assert (x.grad.dtype, half.func_parameter.grad.dtype) == (dtype, dtype)
    table = half.func_parameter.detach().double().requires_grad_()
    x64 = x.detach().double().requires_grad_()
    right(table, x64).backward(grad.double())
    for found, wanted in ((x.grad, x64.grad), (half.func_parameter.grad, table.grad)):
        assert wanted is not None
        assert (found.double() - wanted).norm() <= eps * wanted.norm()
    # there and back: the knots are the grid's
    assert torch.equal(half.float().borders, knots(6))
    assert torch.equal(half.double().borders, knots(6).double())


@pytest.mark.parametrize("dtype", HALVES)
def test_a_state_that_went_through_half_precision(dtype: torch.dtype) -> None:
    state = {name: t.to(dtype) for name, t in layer().state_dict().items()}
    for assign in (False, True):
        loaded = layer()
        loaded.load_state_dict(state, assign=assign)
        assert torch.equal(loaded.borders, knots(6))
        x = torch.randn(8, 20, dtype=loaded.func_parameter.dtype)
        exact = right(state["func_parameter"], x)
        assert (loaded(x).double() - exact).abs().max() <= 1e-2 * exact.abs().max()


def test_another_grid_is_refused() -> None:
    state = layer().state_dict() | {"borders": torch.linspace(-2, 2, 7)}
    with pytest.raises(RuntimeError, match="not the static percentile grid of 6 cells"):
        layer().load_state_dict(state)
    changed, x = layer(), torch.randn(8, 3)
    changed(x)
    changed.borders = torch.linspace(-2, 2, 7)
    with pytest.raises(ValueError, match="not the static percentile grid of 6 cells"):
        changed(x)
    changed.reset_parameters()
    changed(x)
    with torch.no_grad():
        changed.borders[3] += 0.5
    with pytest.raises(ValueError, match="not the static percentile grid"):
        changed(x)
    # rounding that a loader left is no other grid
    rounded = layer()
    rounded._buffers["borders"] = knots(6).bfloat16()
    assert torch.equal(rounded(x), rounded(x))
    assert torch.equal(rounded.borders, knots(6))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("frozen", [None, *FREEZABLE])
def test_cpu_autocast_after_a_linear_layer(dtype: torch.dtype, frozen: torch.dtype | None) -> None:
    network = nn.Sequential(nn.Linear(4, 8), LMKANLinear(8, 5, 6, init_scale=1.0)).eval()
    kan = network[1]
    assert isinstance(kan, LMKANLinear)
    table = kan.layer.func_parameter.detach().to(dtype)
    if frozen is not None:
        kan.layer.freeze(frozen)
        assert kan.layer.frozen is not None
        table = kan.layer.frozen.table.to(torch.double)
    x = torch.randn(40, 4)
    with torch.autocast("cpu", dtype), torch.set_grad_enabled(frozen != torch.int8):
        hidden = network[0](x)
        y = network(x)
    assert (hidden.dtype, y.dtype) == (dtype, torch.float32)
    exact = right(table, hidden.detach().T).T
    assert (y.double() - exact).abs().max() <= 1e-5 * exact.abs().max()
    if frozen is None:
        y.square().sum().backward()
        assert kan.layer.func_parameter.grad is not None
        assert kan.layer.func_parameter.grad.dtype == torch.float32


@pytest.mark.parametrize("precondition", [None, "relu_first", "relu_last"])
@pytest.mark.parametrize("dtype", HALVES)
def test_networks_train_under_cpu_autocast_and_with_a_scaler(precondition: Any, dtype: torch.dtype) -> None:
    network = LMKANMLP((3, 16, 1), 6, precondition=precondition)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    losses = []
    for _ in range(100):
        x = torch.randn(256, 3)
        with torch.autocast("cpu", dtype):
            loss = (network(x).float() - x[:, :1] * x[:, 1:2]).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    # a batch may hold a sample far outside
    assert statistics.median(losses[-20:]) < 0.6 * statistics.median(losses[:10])


@pytest.mark.parametrize("dtype", FREEZABLE)
@pytest.mark.parametrize("master", ["keep", "cpu", "drop"])
def test_meta_layers_freeze_to_what_others_do(dtype: torch.dtype, master: Any) -> None:
    on_meta, usual = (layer(device=device).eval().freeze(dtype, master) for device in ("meta", "cpu"))
    found, expected = on_meta.state_dict(), usual.state_dict()
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {
        n: (t.shape, t.dtype) for n, t in expected.items()
    }
    assert all(t.is_meta for t in found.values())


@pytest.mark.parametrize("dtype", FREEZABLE)
def test_frozen_states_load_in_every_way(dtype: torch.dtype, tmp_path: Path) -> None:
    source, x = layer().eval().freeze(dtype), torch.randn(8, 9)
    state = source.state_dict()

    on_meta = layer(device="meta").eval()
    on_meta.load_state_dict(copy.deepcopy(state), assign=True)
    assert torch.equal(on_meta(x), source(x))

    skeleton = layer(device="meta").eval().freeze(dtype, "drop")
    assert {n for n, _ in (*skeleton.named_parameters(), *skeleton.named_buffers())} == state.keys()
    for name, tensor in state.items():  # as loaders do that walk parameters and buffers
        owner, _, attribute = name.rpartition(".")
        skeleton.get_submodule(owner)._buffers[attribute] = tensor.clone()
    assert torch.equal(skeleton(x), source(x))

    in_place = layer().eval().freeze(dtype)
    in_place(x)
    save_checkpoint(state, checkpoint_id=tmp_path)
    load_checkpoint(in_place.state_dict(), checkpoint_id=tmp_path)
    assert torch.equal(in_place(x), source(x))
    assert torch.equal(in_place.unfreeze().func_parameter, source.frozen.table.to(torch.float32))  # type: ignore[union-attr]

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    other = layer()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x), source(x))


def test_a_frozen_state_without_its_values_is_refused() -> None:
    dropped = layer().eval().freeze(torch.float16, "drop")
    state = dropped.state_dict()
    del state["frozen.values"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "frozen.values"'):
        dropped.load_state_dict(state)


class Halved(nn.Module):
    def forward(self, table: Tensor) -> Tensor:
        return table / 2


def test_parametrized_tables() -> None:
    parametrized, x = layer().eval(), torch.randn(8, 9)
    parametrize.register_parametrization(parametrized, "func_parameter", Halved())
    for master in ("cpu", "drop"):
        with pytest.raises(RuntimeError, match=r"parametrized.*master='keep'"):
            parametrized.freeze(torch.float32, master)
        assert parametrized.frozen is None
    before = parametrized(x)
    assert torch.equal(parametrized.freeze(torch.float32)(x), before)
    assert torch.equal(parametrized.unfreeze()(x), before)


@pytest.mark.parametrize("dtype", FREEZABLE)
def test_frozen_layers_change_dtype(dtype: torch.dtype) -> None:
    frozen, x = layer().eval().freeze(dtype, "drop"), torch.randn(8, 30)
    assert frozen.frozen is not None
    expected = right(frozen.frozen.table.to(torch.double), x)
    double = copy.deepcopy(frozen).double()(x.double())
    assert (double - expected).abs().max() <= 1e-6 * expected.abs().max()
    half = copy.deepcopy(frozen).half()
    y = half(x.half())
    assert y.dtype == torch.float16
    assert (y.double() - expected).abs().max() <= 2e-2 * expected.abs().max()
    if dtype == torch.int8:
        assert half.frozen is not None
        assert half.frozen.scales is not None
        assert half.frozen.scales.dtype == torch.float32
