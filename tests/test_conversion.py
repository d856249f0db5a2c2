"""Conversions change what a network is made of, and nothing about what it computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lmkan_gen import LMKAN2DLayer, convert, dispatch, fold, knots, reference, refine
from lmkan_gen.fitting import FittingSchedule
from lmkan_gen.nn import LMKANMLP, BatchLastNorm, LMKANBlock, LMKANConv2d, LMKANLinear, ReLUFirst, ReLULast
from lmkan_gen.tables import affine_table, refined_table


@pytest.fixture(autouse=True)
def _plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.DISABLE_VARIABLE, "1")


def wide_inputs(samples: int, width: int) -> Tensor:
    """``[samples, width]``, float64: inside the grid, far outside, and on zero."""
    x = torch.randn(samples, width).double() * torch.logspace(-1, 2, samples).double().unsqueeze(1)
    x[0] = 0
    x[1, ::2] = 0
    return x


def assert_same(found: nn.Module, expected: nn.Module, x: Tensor, tolerance: float = 1e-10) -> None:
    """Outputs agree relative to the size of inputs and outputs.

    In float64: tables round to float32 what extrapolation multiplies by the square of the distance. What
    float32 adds is seen with inputs as layers are made for, in `test_in_single_precision`.
    """
    a, b = found(x), expected(x)
    assert a.shape == b.shape
    assert a.dtype == b.dtype == torch.float64
    a, b = a.detach().reshape(len(x), -1), b.detach().reshape(len(x), -1)
    size = 1 + b.abs().amax(dim=1, keepdim=True) + x.reshape(len(x), -1).abs().amax(1, True)
    assert ((a - b).abs() / size).max() < tolerance


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(7, 16), nn.ReLU(), nn.Linear(16, 9), nn.LeakyReLU(0.1), nn.Linear(9, 3, bias=False)
    ).double()


@settings(max_examples=30, deadline=None)
@given(grids=st.integers(3, 24), width=st.integers(1, 9), outputs=st.integers(1, 5), bias=st.booleans())
def test_affine_functions_are_held_exactly(grids: int, width: int, outputs: int, bias: bool) -> None:
    weight = torch.randn(outputs, width, dtype=torch.float64)
    b = torch.randn(outputs, dtype=torch.float64) if bias else None
    x = wide_inputs(60, width)
    table = affine_table(weight, b, grids)
    padded = torch.cat((x, torch.zeros(60, width % 2, dtype=torch.float64)), dim=1)
    size = 1 + x.abs().amax(1, keepdim=True).square()  # the rounding of corners, extrapolated along both axes
    y = reference.evaluate(padded.T, table, knots(grids).double()).T
    assert ((y - nn.functional.linear(x, weight, b)).abs() / size).max() < 1e-13
    even = grids + grids % 2
    y = reference.evaluate(padded.T, affine_table(weight, b, even, torch.relu), knots(even).double()).T
    assert ((y - nn.functional.linear(x.relu(), weight, b)).abs() / size).max() < 1e-13


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("inputs", [5, 6])
def test_from_linear(dtype: torch.dtype, tolerance: float, inputs: int) -> None:
    linear = nn.Linear(inputs, 4, dtype=dtype)
    layer = LMKAN2DLayer.from_linear(linear, 9)
    x = torch.randn(50, inputs, dtype=dtype)
    torch.testing.assert_close(layer(x.T).T, linear(x), rtol=tolerance, atol=tolerance)
    assert layer.get_hessian_regularization() < 1e-5


@pytest.mark.parametrize("grids", [4, 8, 26])
def test_mlp_becomes_an_equal_network(grids: int) -> None:
    model = mlp()
    before = copy.deepcopy(model)
    converted = convert(model, grids)
    assert [type(m) for m in converted] == [  # type: ignore[attr-defined]
        LMKANLinear,
        nn.Identity,
        LMKANLinear,
        nn.Identity,
        LMKANLinear,
    ]
    x = wide_inputs(100, 7)
    assert_same(converted, before, x)
    assert_same(converted, before, x.view(10, 10, 7)[:, :, None].expand(10, 10, 2, 7))
    assert_same(model, before, x)  # untouched


class Residual(nn.Module):
    """A forward of its own, with a ReLU that no module shows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 5), nn.ReLU())
        self.outer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.outer(self.inner(x).sin()).relu()
        return y


def nested() -> nn.Module:
    block = nn.Sequential(nn.Linear(5, 6), nn.ReLU())
    tail = nn.Sequential(nn.Sequential(nn.Linear(6, 5)), nn.ReLU())
    return nn.Sequential(
        Residual(), block, nn.BatchNorm1d(6), nn.Dropout(0.5), tail, nn.Linear(5, 2), nn.ReLU()
    )


def test_nested_modules_become_equal_networks() -> None:
    model = nested().double()
    model(torch.randn(50, 5).double())
    model.eval()
    converted = convert(model, 8)
    assert not any(type(m) is nn.Linear for m in converted.modules())
    kept = [name for name, m in converted.named_modules() if isinstance(m, nn.ReLU)]
    assert kept == ["0.inner.1", "1.1", "6"]  # before sin, before batch norm, at the end
    assert_same(converted, model, wide_inputs(100, 5))
    assert not any(m.training for m in converted.modules())


def shared_block() -> nn.Module:
    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    return nn.Sequential(block, nn.Linear(4, 4), block, block)


def shared_linear() -> nn.Module:
    linear, relu = nn.Linear(4, 4), nn.ReLU()
    return nn.Sequential(linear, relu, linear, nn.Tanh(), nn.Linear(4, 4), relu, linear)


def leading_relu_before_a_repeated_block() -> nn.Module:
    block = nn.Sequential(nn.Linear(4, 4))
    return nn.Sequential(nn.ReLU(), block, block)


@pytest.mark.parametrize("make", [shared_block, shared_linear, leading_relu_before_a_repeated_block])
def test_modules_that_are_used_twice(make: Any) -> None:
    model = make().double()
    assert_same(convert(model, 8), model, wide_inputs(60, 4))


def test_shared_layers_stay_shared() -> None:
    linear = nn.Linear(4, 4)
    converted = convert(nn.Sequential(linear, nn.Tanh(), linear))
    assert converted[0] is converted[2]  # type: ignore[index]


def test_converted_networks_can_be_fine_tuned() -> None:
    model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
    x = torch.randn(400, 2)
    y = (x[:, :1] * x[:, 1:]).tanh()
    losses = []
    for network in (model, convert(model, 8)):
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
        for _ in range(200):
            loss = (network(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[1] < 0.2 * losses[0]


def test_frozen_layers_stay_frozen() -> None:
    model = mlp()
    model[2].requires_grad_(False)
    converted = convert(model)
    assert [p.requires_grad for p in converted.parameters()] == [True, False, True]


def test_skip() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Sequential(nn.ReLU(), nn.Linear(2, 2))})
    converted = convert(model, skip=["b.1"])
    assert isinstance(converted["a"], LMKANLinear)  # type: ignore[index]
    assert [type(m) for m in converted["b"]] == [nn.ReLU, nn.Linear]  # type: ignore[index]
    with pytest.raises(ValueError, match=r"skip names 'c', .* there are \['a', 'b.1'\]"):
        convert(model, skip=["c"])


def test_a_lone_layer() -> None:
    linear = nn.Linear(3, 2).double()
    assert_same(convert(linear, 5), linear, wide_inputs(40, 3))


@pytest.mark.parametrize(
    ("model", "arguments", "error", "message"),
    [
        (nn.ReLU(), {}, ValueError, "ReLU has no linear layer to convert"),
        (mlp(), {"num_grids": 7}, ValueError, "num_grids must be even for ReLU.*got 7, take 8"),
        (nn.Linear(2, 2), {"num_grids": 2}, ValueError, "num_grids must be at least 3"),
        (nn.Linear(2, 2).half(), {}, TypeError, r"linear.* has dtype torch.float16; .*model.float\(\)"),
    ],
)
def test_what_cannot_be_converted_is_refused(
    model: nn.Module, arguments: dict[str, int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        convert(model, **arguments)  # type: ignore[arg-type]


@settings(max_examples=30, deadline=None)
@given(grids=st.integers(3, 12), factor=st.integers(1, 5))
def test_refined_functions_are_the_same(grids: int, factor: int) -> None:
    table = torch.randn(grids + 1, grids + 1, 2, 2, dtype=torch.float64)
    x = wide_inputs(300, 4).T
    expected = reference.evaluate(x, table, knots(grids).double())
    found = reference.evaluate(x, refined_table(table, factor), knots(grids * factor).double())
    assert ((found - expected).abs() / (1 + expected.abs())).max() < 1e-6  # knots are float32
    # and bend where they did, exactly: inner coefficients are kept to the bit
    kept = refined_table(table, factor)[factor:-factor:factor, factor:-factor:factor]
    assert torch.equal(kept, table[1:-1, 1:-1])


def test_refined_networks_are_the_same() -> None:
    model = trained(LMKANMLP((5, 6, 2), 7, precondition="relu_first"), 5).eval()
    finer = refine(model, 3)
    assert [m.num_grids for m in finer.modules() if isinstance(m, LMKAN2DLayer)] == [21, 21]
    assert_same(finer, model, wide_inputs(100, 5), 1e-5)
    convolution = LMKANConv2d(2, 3, 3, 5).double()
    assert_same(refine(convolution), convolution, torch.randn(4, 2, 6, 6).double(), 1e-6)
    layer = LMKAN2DLayer(5, 4, 3, tile_size_forward=8, backward_fast_mode=True)
    finer_layer = refine(layer)
    assert "num_grids=10" in repr(finer_layer)
    assert repr(finer_layer).replace("num_grids=10", "num_grids=5") == repr(layer)


def test_what_cannot_be_refined_is_refused() -> None:
    with pytest.raises(ValueError, match="factor must be at least 1, got 0"):
        refine(LMKAN2DLayer(5, 4, 3), 0)
    with pytest.raises(ValueError, match="Linear holds no LMKAN2DLayer to refine"):
        refine(nn.Linear(2, 2))


@pytest.mark.parametrize("change", [fold, refine])
def test_frozen_layers_are_refused(change: Any) -> None:
    model = LMKANMLP((4, 3, 2), 8).eval()
    model.get_submodule("blocks.1.lmkan.layer").freeze(torch.float16)  # type: ignore[operator]
    with pytest.raises(
        ValueError, match=r"layer 'blocks.1.lmkan.layer' is frozen .* call unfreeze\(\) first"
    ):
        change(model)


def trained(model: nn.Module, width: int) -> nn.Module:
    """In float64, with statistics and tables that are far from their initial values."""
    model.double()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm1d):
            norm.momentum = None
            if norm.affine:
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.bias)
    for _ in range(3):
        model(torch.randn(64, width).double() * 2 + 1)
    return model


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("precondition", [None, "relu_first", "relu_last"])
def test_folded_networks_are_the_same(precondition: Any, gamma: float) -> None:
    model = trained(LMKANMLP((5, 6, 4, 3), 8, precondition=precondition), 5)
    for module in model.modules():
        if isinstance(module, (ReLUFirst, ReLULast)):
            module.gamma.fill_(gamma)
    assert model.training
    folded = fold(model)
    assert model.training  # untouched
    assert_same(folded, model.eval(), wide_inputs(100, 5))
    kinds = [type(m) for m in folded.modules()]
    assert nn.BatchNorm1d not in kinds
    assert ReLUFirst not in kinds
    assert kinds.count(ReLULast) == (3 if precondition == "relu_last" else 0)


def test_normalised_inputs_keep_their_batch_norm() -> None:
    model = trained(LMKANMLP((5, 6, 3), 8, normalize_input=True), 5)
    folded = fold(model)
    assert [n.num_features for n in folded.modules() if isinstance(n, nn.BatchNorm1d)] == [5]
    assert_same(folded, model.eval(), wide_inputs(100, 5))


def test_blocks_in_a_sequential_fold_across_their_borders() -> None:
    blocks = nn.Sequential(LMKANBlock(5, 6), nn.Dropout(0.5), LMKANBlock(6, 4, precondition="relu_first"))
    model = trained(nn.Sequential(blocks, LMKANBlock(4, 2)), 5)
    folded = fold(model)
    assert [n.num_features for n in folded.modules() if isinstance(n, nn.BatchNorm1d)] == [5]
    assert_same(folded, model.eval(), wide_inputs(100, 5))


def test_converted_batch_norm_folds_with_its_scale_and_shift() -> None:
    mlp = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3), nn.BatchNorm1d(3))
    model = trained(mlp, 5).eval()
    folded = fold(convert(model))
    assert not any(isinstance(m, nn.BatchNorm1d) for m in folded.modules())
    assert_same(folded, model, wide_inputs(100, 5))


def negative_scale() -> nn.Module:
    """relu(z) times a negative number is no relu."""
    return nn.Sequential(ReLULast(4, 4), nn.BatchNorm1d(4))


def repeated_layer() -> nn.Module:
    layer = LMKANLinear(4, 4)
    return nn.Sequential(layer, nn.BatchNorm1d(4), layer)


def repeated_norm() -> nn.Module:
    norm = nn.BatchNorm1d(4)
    return nn.Sequential(norm, LMKANLinear(4, 4), norm)


def batch_statistics() -> nn.Module:
    return nn.Sequential(LMKANLinear(4, 4), nn.BatchNorm1d(4, track_running_stats=False))


def between_others() -> nn.Module:
    return nn.Sequential(LMKANLinear(4, 4), nn.Tanh(), nn.BatchNorm1d(4), LMKANLinear(4, 4))


@pytest.mark.parametrize(
    "make", [negative_scale, repeated_layer, repeated_norm, batch_statistics, between_others]
)
def test_what_cannot_be_folded_stays_right(make: Any) -> None:
    model = trained(make(), 4)
    assert_same(fold(model), model.eval(), wide_inputs(60, 4))


def test_batch_last_layers_fold_with_batch_last_norm() -> None:
    model = nn.Sequential(LMKAN2DLayer(8, 4, 6), BatchLastNorm(6), LMKAN2DLayer(8, 6, 2))
    model(torch.randn(4, 50) * 3)
    folded = fold(model)
    assert isinstance(folded[1], nn.Identity)  # type: ignore[index]
    x = torch.randn(4, 50)
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-5, atol=1e-6)


def test_odd_grids_fold_after_refinement() -> None:
    model = trained(LMKANMLP((4, 5, 2), 7, precondition="relu_first"), 4).eval()
    with pytest.raises(ValueError, match=r"7 cells per axis cannot .*fold\(refine\(model, 2\)\) works"):
        fold(model)
    assert_same(fold(refine(model, 2)), model, wide_inputs(100, 4), 1e-5)


def test_the_whole_way() -> None:
    """MLP, converted, tuned on, refined, folded: each step keeps what the last one reached."""
    mlp = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    model = convert(trained(mlp, 3), 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = FittingSchedule.two_phase(model, optimizer, 20, hessian=1e-3)
    for _ in range(20):
        x = torch.randn(64, 3).double()
        (model(x).square().mean() + schedule.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert_same(fold(refine(model, 2)), model.eval(), wide_inputs(100, 3), 1e-5)


def test_in_single_precision() -> None:
    mlp = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))
    mlp(torch.randn(100, 6))
    mlp.eval()
    x = torch.randn(1000, 6)
    expected = mlp.double()(x.double())
    mlp.float()
    for model in (mlp, converted := convert(mlp, 12), refine(converted, 2), fold(converted)):
        y = model(x)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=3e-6)
