"""Building blocks, held to the formula in float64 and to torch's own layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lmkan_gen import LMKAN2DLayer, dispatch, reference
from lmkan_gen.nn import (
    LMKANMLP,
    BatchLastNorm,
    LMKANBlock,
    LMKANConv2d,
    LMKANLinear,
    ReLUFirst,
    ReLULast,
    hessian_penalty,
    lmkan_layers,
)


@pytest.fixture(autouse=True)
def _plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.DISABLE_VARIABLE, "1")


def formula(layer: LMKAN2DLayer, rows: Tensor) -> Tensor:
    """The layer on samples ``[B, I]`` in float64, an odd width completed with zeros: ``[B, O]``."""
    x = rows.double().T
    if x.shape[0] % 2:
        x = torch.cat((x, torch.zeros(1, x.shape[1], dtype=torch.float64)))
    return reference.evaluate(x, layer.func_parameter.double(), layer.borders.double()).T


def assert_rounded(found: Tensor, expected: Tensor) -> None:
    """Float32 results against float64 ones of order one."""
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("width", [1, 2, 5, 8])
@pytest.mark.parametrize("lead", [(), (7,), (2, 3, 4), (0, 3)])
def test_linear_takes_any_width_and_layout(width: int, lead: tuple[int, ...]) -> None:
    layer = LMKANLinear(width, 3, 6, init_scale=2.0)
    x = torch.randn(*lead, width)
    y = layer(x)
    assert y.shape == (*lead, 3)
    assert_rounded(y.reshape(-1, 3), formula(layer.layer, x.reshape(-1, width)))
    last = LMKANLinear(width, 3, 6, batch_first=False)
    last.load_state_dict(layer.state_dict())
    torch.testing.assert_close(last(x.reshape(-1, width).T), y.reshape(-1, 3).T)


@pytest.mark.parametrize(("batch_first", "shape"), [(True, (4, 6)), (False, (6, 4)), (False, (5, 2, 2))])
def test_wrong_layout_is_refused(batch_first: bool, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x must be .*5.* takes the other layout"):
        LMKANLinear(5, 3, batch_first=batch_first)(torch.zeros(shape))


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", [ReLUFirst, ReLULast])
def test_preconditioned_layers_follow_their_formula(kind: type[ReLUFirst | ReLULast], gamma: float) -> None:
    layer = kind(5, 3, 8, gamma=gamma, init_scale=2.0)
    x = torch.randn(40, 5)
    w, rows = layer.weight.double(), x.double()
    linear = rows.relu() @ w.T if kind is ReLUFirst else (rows @ w.T).relu()
    assert_rounded(layer(x), gamma * formula(layer.layer, x) + linear)


def test_gamma_is_a_buffer_that_is_saved() -> None:
    layer = ReLUFirst(4, 3, gamma=0.0)
    layer.gamma.fill_(0.25)
    twin = ReLUFirst(4, 3)
    twin.load_state_dict(layer.state_dict())
    assert twin.gamma.item() == 0.25
    assert "gamma" not in dict(layer.named_parameters())


def test_without_gamma_the_lmkan_gets_no_gradient_and_the_linear_path_does() -> None:
    layer = ReLULast(4, 3, gamma=0.0)
    layer(torch.randn(20, 4)).square().sum().backward()
    assert layer.layer.func_parameter.grad is not None
    assert layer.weight.grad is not None
    assert layer.layer.func_parameter.grad.abs().max() == 0
    assert layer.weight.grad.abs().max() > 0


@pytest.mark.parametrize("batch_first", [True, False])
def test_block_normalises_as_torch_does(batch_first: bool) -> None:
    block = LMKANBlock(5, 3, 8, batch_first=batch_first)
    norm = nn.BatchNorm1d(5, affine=False)
    for training in (True, True, False):
        block.train(training)
        norm.train(training)
        x = 3 * torch.randn(30, 5) + 2
        y = block(x) if batch_first else block(x.T).T
        assert_rounded(y, formula(block.lmkan.layer, norm(x)))


def test_block_takes_each_preconditioner() -> None:
    assert isinstance(LMKANBlock(4, 3, precondition="relu_first").lmkan, ReLUFirst)
    assert isinstance(LMKANBlock(4, 3, precondition="relu_last").lmkan, ReLULast)
    wrong: Any = "relu"
    with pytest.raises(ValueError, match="'relu_first' or 'relu_last', got 'relu'"):
        LMKANBlock(4, 3, precondition=wrong)


@pytest.mark.parametrize("precondition", [None, "relu_first", "relu_last"])
def test_mlp(precondition: Any) -> None:
    model = LMKANMLP((7, 5, 4, 2), 6, precondition=precondition)
    x = torch.randn(3, 10, 7)
    y = model(x)
    assert y.shape == (3, 10, 2)
    twin = LMKANMLP((7, 5, 4, 2), 6, precondition=precondition, batch_first=False)
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin.eval()(x.reshape(-1, 7).T), model.eval()(x).reshape(-1, 2).T)
    assert list(lmkan_layers(model)) == [f"blocks.{i}.lmkan.layer" for i in range(3)]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)]
    assert [n.num_features for n in norms] == [5, 4]
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_too_few_widths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"widths must hold at least inputs and outputs, got \[3\]"):
        LMKANMLP((3,))


def test_hessian_penalty_sums_over_layers() -> None:
    model = LMKANMLP((6, 4, 2), 6)
    parts = [m.get_hessian_regularization() for m in model.modules() if isinstance(m, LMKAN2DLayer)]
    assert len(parts) == 2
    torch.testing.assert_close(hessian_penalty(model), parts[0] + parts[1])
    with pytest.raises(ValueError, match="Linear holds no LMKAN2DLayer"):
        hessian_penalty(nn.Linear(2, 2))


_sizes = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=40, deadline=None)
@given(
    channels=st.integers(1, 3),
    batch=st.integers(1, 3),
    image=st.tuples(st.integers(5, 9), st.integers(5, 9)),
    kernel=_sizes,
    stride=_sizes,
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    workspace=st.sampled_from([1, 2000, 2**26]),
)
def test_convolution_is_the_layer_on_unfolded_patches(
    channels: int,
    batch: int,
    image: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    workspace: int,
) -> None:
    sizes: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
    layer = LMKANConv2d(channels, 2, kernel, 4, init_scale=2.0, workspace_bytes=workspace, **sizes).double()
    x = torch.randn(batch, channels, *image, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert y.shape == nn.Conv2d(channels, 2, kernel, **sizes).double()(x).shape
    unfolded = torch.nn.functional.unfold(x, kernel, **sizes)  # [N, I, L]
    rows = unfolded.transpose(1, 2).flatten(0, 1)
    expected = formula(layer.layer, rows).view(batch, -1, 2).transpose(1, 2).reshape(y.shape)
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    wanted = (x, layer.layer.func_parameter)
    found = torch.autograd.grad(y, wanted, upstream)
    for a, b in zip(found, torch.autograd.grad(expected, wanted, upstream), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(layer.patches(x)[: rows.shape[1]].T, rows)


def test_convolution_is_twice_differentiable() -> None:
    layer = LMKANConv2d(1, 2, 3, 4, padding=1, stride=2, init_scale=1.0, workspace_bytes=1).double()
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    table = layer.layer.func_parameter.detach().requires_grad_()

    def convolve(images: Tensor, values: Tensor) -> Any:
        return torch.func.functional_call(layer, {"layer.func_parameter": values}, (images,))

    assert torch.autograd.gradcheck(convolve, (x, table))
    assert torch.autograd.gradgradcheck(convolve, (x, table))


def test_frozen_convolution() -> None:
    layer = LMKANConv2d(3, 2, 3, 6, padding=1, init_scale=2.0, workspace_bytes=3000).eval()
    x = torch.randn(4, 3, 6, 6)
    y = layer(x)
    layer.layer.freeze(torch.float16)
    torch.testing.assert_close(layer(x), y, rtol=1e-3, atol=2e-3)


def test_convolution_under_autocast() -> None:
    layer = LMKANConv2d(3, 2, 3, 6)
    x = torch.randn(4, 3, 6, 6, requires_grad=True)
    y = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = layer(x.bfloat16())
    narrow.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(narrow, y, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backward", [False, True])
def test_convolution_copies_no_more_than_its_workspace(
    backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmkan_gen import convolution

    sizes: list[int] = []
    make: Callable[..., Tensor] = convolution.patches

    def spy(*arguments: Any) -> Tensor:
        found = make(*arguments)
        sizes.append(found.numel() * found.element_size())
        return found

    monkeypatch.setattr(convolution, "patches", spy)
    limit = 40_000
    layer = LMKANConv2d(2, 3, 3, 4, padding=1, workspace_bytes=limit)
    x = torch.randn(5, 2, 16, 16, requires_grad=True)
    y = layer(x)
    assert not any(t.numel() > x.numel() for t in y.grad_fn.saved_tensors if t.dim() == 4 and t.shape[0] == 5)
    if backward:
        sizes.clear()
        y.sum().backward()
    assert sum(sizes) == 5 * 16 * 16 * 18 * 4
    assert max(sizes) <= limit


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"in_channels": 0}, ValueError, "in_channels must be at least 1, got 0"),
        ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1, got 0"),
        ({"kernel_size": (3, 3, 3)}, TypeError, "kernel_size must be an int or a pair of ints"),
        ({"stride": 1.5}, TypeError, "stride must be"),
        ({"padding": -1}, ValueError, "padding must be at least 0, got -1"),
        ({"workspace_bytes": 0}, ValueError, "workspace_bytes must be at least 1"),
    ],
)
def test_bad_convolutions_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good: dict[str, Any] = {"in_channels": 2, "out_channels": 3, "kernel_size": 3}
    with pytest.raises(error, match=message):
        LMKANConv2d(**(good | change))


def test_images_that_do_not_fit_are_refused() -> None:
    layer = LMKANConv2d(2, 3, 3)
    with pytest.raises(ValueError, match="with 2 channels, got"):
        layer(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="smaller than one patch"):
        layer(torch.zeros(1, 2, 2, 8))


def test_batch_norm_in_eval_mode_is_what_its_module_computes() -> None:
    norm = BatchLastNorm(5)
    norm(3 * torch.randn(5, 100) + 1)
    norm.eval()
    x = torch.randn(5, 7, requires_grad=True)
    y, expected = norm(x), norm.norm(x.unsqueeze(0)).squeeze(0)
    assert torch.equal(y, expected)
    grad = torch.randn(5, 7)
    assert torch.equal(*(torch.autograd.grad(out, x, grad)[0] for out in (y, expected)))
    for wrong in (torch.randn(4, 7), torch.randn(5, 7, 2)):
        with pytest.raises((ValueError, RuntimeError)):
            norm(wrong)
    seen = []
    handle = norm.norm.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    assert torch.equal(norm(x), y)
    assert seen == [(1, 5, 7)]
    handle.remove()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(0))
    norm(x)
    handle.remove()
    assert len(seen) == 3
