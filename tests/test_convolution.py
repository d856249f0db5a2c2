"""Convolutions under compilers, exporters and transforms, held to the formula on patches in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.nn.functional import unfold
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from lmkan_gen import knots, reference
from lmkan_gen.nn import LMKANConv2d
from tests import truth

GRIDS = 5
#: kernel, stride, padding, dilation and a workspace that makes slabs of rows of one image
SIZES = ((2, 3), (2, 1), (1, 0), (1, 2), 200)


def formula(x: Tensor, table: Tensor, borders: Tensor) -> Tensor:
    kernel, stride, padding, dilation, _ = SIZES
    columns = unfold(x, kernel, dilation, padding, stride)  # [N, I, rows * columns]
    rows = (x.shape[2] + 2 * padding[0] - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    flat: Tensor = reference.evaluate(columns.transpose(0, 1).flatten(1), table, borders)
    by_image: Tensor = flat.unflatten(1, (len(x), rows, -1)).transpose(0, 1)
    return by_image


def convolve(x: Tensor, table: Tensor, borders: Tensor) -> Tensor:
    y: Tensor = torch.ops.lmkan_gen.convolve(x, table, borders, *SIZES)
    return y


def case(images: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    borders = knots(GRIDS, torch.float64)
    flat = truth.away_from_knots(torch.randn(images, 20).numpy(), borders.numpy(), margin=1e-3)
    x = torch.from_numpy(flat).double().view(images, 1, 4, 5)
    return x, torch.randn(GRIDS + 1, GRIDS + 1, 2, 3, dtype=torch.float64), borders


TRANSFORMS: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Any]] = {
    "value": lambda f, x, t, b: f(x, t, b),
    "grad": lambda f, x, t, b: grad(lambda x, t: f(x, t, b).square().sum(), argnums=(0, 1))(x, t),
    "vjp": lambda f, x, t, b: vjp(lambda x, t: f(x, t, b), x, t)[1](f(x, t, b).cos()),
    "jvp": lambda f, x, t, b: jvp(lambda x, t: f(x, t, b), (x, t), (x.cos(), t.sin())),
    "jvp of x": lambda f, x, t, b: jvp(lambda x: f(x, t, b), (x,), (x.cos(),)),
    "jacrev": lambda f, x, t, b: jacrev(lambda x, t: f(x, t, b), argnums=(0, 1))(x, t),
    "jacfwd": lambda f, x, t, b: jacfwd(lambda x: f(x, t, b))(x),
    "hessian": lambda f, x, t, b: hessian(lambda x: f(x, t, b).square().sum())(x),
    "hessian of both": lambda f, x, t, b: jacrev(
        lambda x, t: grad(lambda x: f(x, t, b).square().sum())(x).sin().sum(), argnums=(0, 1)
    )(x, t),
    "gradients of images": lambda f, x, t, b: vmap(
        lambda image: grad(lambda t: f(image.unsqueeze(0), t, b).square().sum())(t)
    )(x),
    "slopes of images": lambda f, x, t, b: vmap(
        grad(lambda image: f(image.unsqueeze(0), t, b).square().sum())
    )(x),
    "mapped images": lambda f, x, t, b: vmap(lambda x: f(x, t, b), in_dims=2, out_dims=1)(
        torch.stack([x, x + 0.1], dim=2)
    ),
    "mapped table": lambda f, x, t, b: vmap(lambda t: f(x, t, b))(torch.stack([t, t.sin()])),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_transform(name: str, dtype: torch.dtype) -> None:
    x, table, borders = case()
    expected = TRANSFORMS[name](formula, x, table, borders)
    found = TRANSFORMS[name](convolve, *(t.to(dtype) for t in (x, table, borders)))
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4
    found = torch.utils._pytree.tree_map(lambda t: t.double(), found)
    assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_checks_of_derivatives() -> None:
    x, table, borders = case(1)
    x, table = x[..., :3, :].clone().requires_grad_(), table[:, :, :1].clone().requires_grad_()
    both = {"check_forward_ad": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(convolve, (x, table, borders), **both)
    assert torch.autograd.gradgradcheck(convolve, (x, table, borders), check_fwd_over_rev=True)


def test_what_is_not_implemented_says_so() -> None:
    x, table, borders = case()

    def loss(x: Tensor) -> Tensor:
        return convolve(x, table, borders).square().sum()

    with pytest.raises(NotImplementedError, match="third derivatives"):
        jacrev(hessian(loss))(x)
    with pytest.raises(ValueError, match="the grid is fixed"):
        grad(lambda b: convolve(x, table, b).sum())(borders)
    layer = LMKANConv2d(1, 2, 3).eval()
    layer.layer.freeze(torch.float16)
    with pytest.raises(NotImplementedError, match=r"differentiable once; call unfreeze\(\)"):
        hessian(lambda x: layer(x).square().sum())(x.float())
    layer.layer.unfreeze().freeze(torch.int8)
    with pytest.raises(RuntimeError, match="int8 tables are for inference"):
        jvp(layer, (x.float(),), (x.float(),))
    y = layer(x.float().requires_grad_())  # evaluation without torch.no_grad() works
    assert torch.equal(y, layer(x.float()))
    with pytest.raises(RuntimeError, match="int8 tables are for inference"):
        y.sum().backward()


@pytest.mark.parametrize("frozen", [torch.float32, torch.float16])
def test_derivatives_of_frozen_convolutions(frozen: torch.dtype) -> None:
    layer = LMKANConv2d(1, 2, (2, 3), GRIDS, padding=(1, 0), init_scale=1.0, workspace_bytes=300)
    layer.eval().layer.freeze(frozen).double()
    x, v = case()[0].requires_grad_(), torch.randn(2, 1, 4, 5, dtype=torch.float64)
    along = jvp(layer, (x,), (v,))[1]
    y = layer(x)
    w = torch.randn_like(y)
    (grad_x,) = torch.autograd.grad(y, x, w)
    step = 1e-6
    with torch.no_grad():
        expected = (layer(x + step * v) - layer(x - step * v)) / (2 * step)
    assert_close(along, expected, rtol=1e-5, atol=1e-6)
    assert_close((grad_x * v).sum(), (expected * w).sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_operators_follow_the_rules_of_torch(dtype: torch.dtype) -> None:
    x, table, borders = (t.float() for t in case())
    of_x = torch.float64 if dtype == torch.float64 else torch.float32
    x, borders, table = x.to(of_x).requires_grad_(), borders.to(of_x), table.to(dtype).requires_grad_()
    ops = torch.ops.lmkan_gen
    torch.library.opcheck(ops.convolve, (x, table, borders, *SIZES))
    values, upper = table.detach(), torch.randn(2, 2, 3, 1, dtype=of_x)
    grad_arguments = (upper, x.detach(), values, borders)
    torch.library.opcheck(ops.convolve_backward, (*grad_arguments, True, True, *SIZES))
    torch.library.opcheck(ops.convolve_backward, (*grad_arguments, False, True, *SIZES))
    torch.library.opcheck(ops.frozen_convolve, (x, values, None, borders, *SIZES))
    torch.library.opcheck(ops.frozen_convolve_grad_input, (*grad_arguments, *SIZES))


@pytest.mark.parametrize("frozen", [None, torch.float16])
def test_compiled_for_any_batch(frozen: torch.dtype | None) -> None:
    layer = LMKANConv2d(3, 4, 3, GRIDS, padding=1, workspace_bytes=2000)
    if frozen is not None:
        layer.eval().layer.freeze(frozen)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, dynamic=True, fullgraph=True, backend=backend)
    for batch in (2, 5, 9):
        x = torch.randn(batch, 3, 8, 8)
        assert_close(compiled(x), layer(x))
    assert len(graphs) == 1


@pytest.mark.slow
def test_compiled_training() -> None:
    layer = LMKANConv2d(3, 4, 3, GRIDS, padding=1, init_scale=1.0)
    compiled = torch.compile(layer, dynamic=True, fullgraph=True)
    for batch in (2, 5):
        x = torch.randn(batch, 3, 8, 8, requires_grad=True)
        tensors = (x, layer.layer.func_parameter)
        found, expected = (torch.autograd.grad(f(x).square().sum(), tensors) for f in (compiled, layer))
        assert_close(found, expected)


@pytest.mark.parametrize("frozen", [False, True])
def test_exported_for_any_batch(frozen: bool) -> None:
    layer = LMKANConv2d(3, 4, 3, GRIDS, padding=1, workspace_bytes=2000).eval()
    if frozen:
        layer.eval().layer.freeze(torch.int8)
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(layer, (torch.randn(4, 3, 8, 8),), dynamic_shapes=shapes)
    for batch in (2, 9):
        x = torch.randn(batch, 3, 8, 8)
        assert_close(program.module()(x), layer(x))


def test_stacked_convolutions() -> None:
    layers = [LMKANConv2d(1, 2, 2, GRIDS) for _ in range(3)]
    parameters, buffers = stack_module_state(layers)
    x = torch.randn(2, 1, 4, 4)
    found = vmap(lambda p, b: functional_call(layers[0], (p, b), (x,)))(parameters, buffers)
    assert_close(found, torch.stack([layer(x) for layer in layers]))


def test_no_images() -> None:
    layer = LMKANConv2d(1, 2, 2, GRIDS)
    x = torch.zeros(0, 1, 4, 4, requires_grad=True)
    y = layer(x)
    assert y.shape == (0, 2, 3, 3)
    y.sum().backward()
    assert layer.layer.func_parameter.grad is not None
    assert_close(layer.layer.func_parameter.grad, torch.zeros_like(layer.layer.func_parameter))


def test_flops_are_twice_those_of_a_convolution() -> None:
    layer = LMKANConv2d(2, 5, 3, GRIDS, padding=1, stride=2)
    plain = torch.nn.Conv2d(2, 5, 3, padding=1, stride=2, bias=False)
    x = torch.randn(3, 2, 8, 8, requires_grad=True)
    for backward in (False, True):
        counts = []
        for module in (layer, plain):
            with FlopCounterMode(display=False) as counter:
                y = module(x)
                if backward:
                    y.sum().backward()
            counts.append(counter.get_total_flops())
        assert counts[0] == 2 * counts[1] > 0
    layer.eval().layer.freeze(torch.float16)
    with FlopCounterMode(display=False) as counter:
        layer(x.detach())
    assert counter.get_total_flops() == 4 * 18 * 5 * 3 * 4 * 4
