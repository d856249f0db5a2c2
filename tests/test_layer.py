from __future__ import annotations

import copy
import io
import math
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch

from lmkan_gen import LMKAN2DLayer, dispatch, hessian_regularization, knots, lmkan


@pytest.fixture(autouse=True)
def _plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.DISABLE_VARIABLE, "1")


def test_the_documented_example() -> None:
    layer = LMKAN2DLayer(
        num_grids=26,
        input_dim=128,
        output_dim=128,
        tile_size_forward=8,
        tile_size_backward=4,
        block_size_forward=1024,
        block_size_backward=512,
    )
    x = torch.randn(128, 16)
    y = layer(x)
    assert y.shape == (128, 16)
    assert torch.equal(y, lmkan(x, layer.func_parameter, layer.borders))
    assert sum(p.numel() for p in layer.parameters()) == 27**2 * 128 * 64


def test_positional_order() -> None:
    layer = LMKAN2DLayer(9, 4, 3, 128, 256, 8, 16, 0.5, True)
    assert (layer.num_grids, layer.input_dim, layer.output_dim) == (9, 4, 3)
    assert (layer.block_size_forward, layer.block_size_backward) == (128, 256)
    assert (layer.tile_size_forward, layer.tile_size_backward) == (8, 16)
    assert (layer.init_scale, layer.backward_fast_mode) == (0.5, True)


def test_demands_reach_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr("lmkan_gen.layer.lmkan", lambda *a: seen.append(a[3:]))
    LMKAN2DLayer(9, 4, 3, 128, 256, 8, 16, 0.5, True)(torch.zeros(4, 1))
    LMKAN2DLayer(9, 4, 3)(torch.zeros(4, 1))
    assert seen == [(8, 128, 16, 256, True), ()]


@pytest.mark.parametrize(("inputs", "scale"), [(2, 0.1), (64, 0.1), (64, 3.0), (8, 0.0)])
def test_initial_values(inputs: int, scale: float) -> None:
    layer = LMKAN2DLayer(20, inputs, 4, init_scale=scale)
    bound = scale / math.sqrt(inputs)
    table = layer.func_parameter.detach()
    assert table.shape == (21, 21, 4, inputs // 2)
    assert table.abs().max() <= bound * (1 + 1e-6)
    if scale:
        assert table.max() > 0.9 * bound
        assert table.min() < -0.9 * bound
        assert table.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert torch.equal(layer.borders, knots(20))


def test_checkpoint_of_the_published_layer_loads_strictly() -> None:
    table = torch.randn(8, 8, 5, 3)
    # their knots may be rounded differently
    checkpoint = {"func_parameter": table, "borders": knots(7) * (1 + 2e-7)}
    layer = LMKAN2DLayer(7, 6, 5)
    layer.load_state_dict(checkpoint, strict=True)
    assert torch.equal(layer.func_parameter, table)
    assert list(layer.state_dict()) == ["func_parameter", "borders"]
    model = torch.nn.Sequential(LMKAN2DLayer(7, 6, 5))
    model.load_state_dict({f"0.{k}": v for k, v in checkpoint.items()}, strict=True)


def test_checkpoints_that_do_not_belong_are_refused() -> None:
    layer = LMKAN2DLayer(7, 6, 5)
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for func_parameter"):
        layer.load_state_dict(state | {"func_parameter": torch.zeros(9, 9, 5, 3)})
    with pytest.raises(RuntimeError, match="borders is not the static percentile grid of 7 cells"):
        layer.load_state_dict(state | {"borders": torch.linspace(-1, 1, 8)})
    with pytest.raises(RuntimeError, match="borders is not the static percentile grid"):
        layer.load_state_dict(state | {"borders": torch.full((8,), torch.nan)})


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_copies_compute_the_same(way: str) -> None:
    layer = LMKAN2DLayer(7, 6, 5, tile_size_forward=8, backward_fast_mode=True)
    x = torch.randn(6, 10)
    y = layer(x)
    if way == "deepcopy":
        twin = copy.deepcopy(layer)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert torch.equal(twin(x), y)
    assert repr(twin) == repr(layer)


def test_repr() -> None:
    assert repr(LMKAN2DLayer(7, 6, 5)) == "LMKAN2DLayer(num_grids=7, input_dim=6, output_dim=5)"
    words = repr(LMKAN2DLayer(7, 6, 5, block_size_forward=64, tile_size_backward=4, backward_fast_mode=True))
    for part in ("block_size_forward=64", "tile_size_backward=4", "backward_fast_mode=True"):
        assert part in words


def test_hessian_regularization() -> None:
    layer = LMKAN2DLayer(7, 6, 5)
    value = layer.get_hessian_regularization()
    assert value.item() == pytest.approx(hessian_regularization(layer.func_parameter, layer.borders).item())
    value.backward()
    assert layer.func_parameter.grad is not None
    assert layer.func_parameter.grad.abs().max() > 0


def test_frozen_layers_are_not_regularised() -> None:
    layer = LMKAN2DLayer(7, 6, 5).eval()
    layer.freeze(torch.float16)
    with pytest.raises(RuntimeError, match="call unfreeze\\(\\) first"):
        layer.get_hessian_regularization()
    layer.unfreeze()
    assert layer.get_hessian_regularization().item() > 0


def test_learns() -> None:
    # the product of two inputs: out of reach for a linear layer
    torch.manual_seed(0)
    layer = LMKAN2DLayer(8, 2, 1)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    losses = []
    for _ in range(150):
        x = torch.randn(2, 512)
        loss = (layer(x) - x[0] * x[1]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_double_precision() -> None:
    layer = LMKAN2DLayer(7, 6, 5).double()
    x = torch.randn(6, 10, dtype=torch.float64)
    y = layer(x)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y.float(), layer.float()(x.float()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_grids": 2}, ValueError, "num_grids must be at least 3, got 2"),
        ({"num_grids": 8.0}, TypeError, "num_grids must be an int, got 8.0 of type float"),
        ({"num_grids": True}, TypeError, "num_grids must be an int, got True"),
        ({"input_dim": 0}, ValueError, "input_dim must be at least 1, got 0"),
        ({"input_dim": "6"}, TypeError, "input_dim must be an int, got '6'"),
        ({"output_dim": 0}, ValueError, "output_dim must be at least 1, got 0"),
        ({"output_dim": -3}, ValueError, "output_dim must be at least 1, got -3"),
        ({"tile_size_forward": 6}, ValueError, "tile_size_forward must be a power of two .* got 6"),
        ({"tile_size_backward": 0}, ValueError, "tile_size_backward must be at least 1, got 0"),
        ({"tile_size_backward": -4}, ValueError, "tile_size_backward must be at least 1, got -4"),
        ({"tile_size_forward": 8.0}, TypeError, "tile_size_forward must be an int"),
        ({"block_size_forward": 100}, ValueError, "block_size_forward must be a multiple of 32 .* got 100"),
        ({"block_size_backward": 2048}, ValueError, "block_size_backward must be .* up to 1024, got 2048"),
        ({"block_size_backward": 0}, ValueError, "block_size_backward must be at least 32, got 0"),
        ({"init_scale": math.nan}, ValueError, "init_scale must be finite"),
        ({"init_scale": -1}, ValueError, "init_scale must be finite and not negative, got -1"),
        ({"init_scale": "big"}, TypeError, "init_scale must be a number"),
        ({"backward_fast_mode": 1}, TypeError, "backward_fast_mode must be True or False, got 1"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good: dict[str, Any] = {"num_grids": 8, "input_dim": 6, "output_dim": 5}
    with pytest.raises(error, match=message):
        LMKAN2DLayer(**(good | change))


def test_import_is_light() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import lmkan_gen; new = set(sys.modules) - before; "
        "assert not torch.cuda.is_initialized(); "
        "print(*sorted({m.split('.')[0] for m in new} & "
        "{'optuna', 'typer', 'rich', 'pydantic', 'yaml', 'cuda', 'jinja2', 'ninja', 'subprocess'}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
