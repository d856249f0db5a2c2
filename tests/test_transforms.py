"""Forward mode, `torch.func` and ``vmap``, held to the plain formula in float64 and to finite differences."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)
from torch.testing import assert_close

from lmkan_gen import LMKAN2DLayer, hessian_regularization, knots, lmkan, reference
from tests import truth

GRIDS = 5


def case(dtype: torch.dtype = torch.float64, batch: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    borders = knots(GRIDS, dtype)
    x = truth.away_from_knots(torch.randn(4, batch).numpy(), borders.double().numpy(), margin=1e-3)
    return torch.from_numpy(x).to(dtype), torch.randn(GRIDS + 1, GRIDS + 1, 3, 2, dtype=dtype), borders


TRANSFORMS: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Any]] = {
    "grad": lambda f, x, t, b: grad(lambda x, t: f(x, t, b).square().sum(), argnums=(0, 1))(x, t),
    "vjp": lambda f, x, t, b: vjp(lambda x, t: f(x, t, b), x, t)[1](f(x, t, b).cos()),
    "jvp": lambda f, x, t, b: jvp(lambda x, t: f(x, t, b), (x, t), (x.cos(), t.sin())),
    "jvp of x": lambda f, x, t, b: jvp(lambda x: f(x, t, b), (x,), (x.cos(),)),
    "jvp of the table": lambda f, x, t, b: jvp(lambda t: f(x, t, b), (t,), (t.cos(),)),
    "linearize": lambda f, x, t, b: linearize(lambda x: f(x, t, b), x)[1](x.cos()),
    "jacrev": lambda f, x, t, b: jacrev(lambda x, t: f(x, t, b), argnums=(0, 1))(x, t),
    "jacfwd": lambda f, x, t, b: jacfwd(lambda x: f(x, t, b))(x),
    "hessian": lambda f, x, t, b: hessian(lambda x: f(x, t, b).square().sum())(x),
    "hessian of both": lambda f, x, t, b: jacrev(
        lambda x, t: grad(lambda x: f(x, t, b).square().sum())(x).sin().sum(), argnums=(0, 1)
    )(x, t),
    "reverse over forward": lambda f, x, t, b: jacrev(jacfwd(lambda x: f(x, t, b).square().sum()))(x),
    "gradients of samples": lambda f, x, t, b: vmap(
        lambda column: grad(lambda t: f(column.unsqueeze(1), t, b).square().sum())(t), in_dims=1
    )(x),
    "slopes of samples": lambda f, x, t, b: vmap(
        grad(lambda column: f(column.unsqueeze(1), t, b).square().sum()), in_dims=1
    )(x),
    "mapped batch": lambda f, x, t, b: vmap(lambda x: f(x, t, b))(torch.stack([x, x + 0.1])),
    "mapped table": lambda f, x, t, b: vmap(lambda t: f(x, t, b))(torch.stack([t, t.sin()])),
    "mapped both": lambda f, x, t, b: vmap(lambda x, t: f(x, t, b), in_dims=(1, 0))(
        torch.stack([x, x + 0.1], dim=1), torch.stack([t, t.sin()])
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_transform(name: str, dtype: torch.dtype) -> None:
    x, table, borders = case()
    transform = TRANSFORMS[name]
    expected = transform(reference.evaluate, x, table, borders)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Attempted to insert a get_attr")  # torch's own, linearize
        found = transform(lmkan, *(t.to(dtype) for t in (x, table, borders)))
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4
    found = torch.utils._pytree.tree_map(lambda t: t.double(), found)
    assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("frozen", [None, torch.float32, torch.float16])
def test_dual_numbers(frozen: torch.dtype | None) -> None:
    layer = LMKAN2DLayer(GRIDS, 4, 3, init_scale=1.0).double().eval()
    x = case()[0]
    if frozen is not None:
        layer = layer.float()
        layer.freeze(frozen).double()
    v = torch.randn_like(x)
    with forward_ad.dual_level():
        along = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, v))).tangent
    step = 1e-6
    with torch.no_grad():
        expected = (layer(x + step * v) - layer(x - step * v)) / (2 * step)
    assert_close(along, expected, rtol=1e-5, atol=1e-6)


def test_dual_numbers_of_the_table_and_in_float32() -> None:
    layer = LMKAN2DLayer(GRIDS, 4, 3, init_scale=1.0)
    x, table, v = torch.randn(4, 9), layer.func_parameter.detach(), torch.randn(6, 6, 3, 2)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(table, v)
        along = forward_ad.unpack_dual(lmkan(x, dual, layer.borders)).tangent
    assert_close(along, lmkan(x, v, layer.borders))


def test_checks_of_derivatives() -> None:
    x, table, borders = case(batch=3)
    x.requires_grad_()
    table = table[:, :, :2].clone().requires_grad_()
    both = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(lmkan, (x, table, borders), **both)
    assert torch.autograd.gradgradcheck(lmkan, (x, table, borders), check_fwd_over_rev=True)


def test_regulariser() -> None:
    _, table, borders = case()
    table = table[:, :, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(hessian_regularization, (table, borders), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(hessian_regularization, (table, borders), check_fwd_over_rev=True)
    value, along, *_ = jvp(lambda t: hessian_regularization(t, borders), (table.detach(),), (table.detach(),))
    assert_close(along, 2 * value)  # it is a quadratic form
    tables = torch.stack([table.detach(), table.detach().sin()])
    found = vmap(lambda t: hessian_regularization(t, borders))(tables)
    assert_close(found, torch.stack([hessian_regularization(t, borders) for t in tables]))


@pytest.mark.parametrize("mapped_inputs", [False, True])
def test_stacked_models(mapped_inputs: bool) -> None:
    layers = [LMKAN2DLayer(GRIDS, 4, 3, init_scale=1.0) for _ in range(3)]
    parameters, buffers = stack_module_state(layers)
    x = torch.randn(3, 4, 7) if mapped_inputs else torch.randn(4, 7)

    def one(parameters: Any, buffers: Any, x: Tensor) -> Any:
        return functional_call(layers[0], (parameters, buffers), (x,))

    found = vmap(one, in_dims=(0, 0, 0 if mapped_inputs else None))(parameters, buffers, x)
    expected = [layer(x[i] if mapped_inputs else x) for i, layer in enumerate(layers)]
    assert_close(found, torch.stack(expected))


def test_what_is_not_implemented_says_so() -> None:
    x, table, borders = case()

    def loss(x: Tensor) -> Tensor:
        return lmkan(x, table, borders).square().sum()

    with pytest.raises(NotImplementedError, match="forward mode over forward mode"):
        jacfwd(jacfwd(loss))(x)
    with pytest.raises(NotImplementedError, match="third derivatives"):
        jacrev(hessian(loss))(x)
    layer = LMKAN2DLayer(GRIDS, 4, 3).eval().freeze(torch.float16)
    with pytest.raises(NotImplementedError, match=r"differentiable once; call unfreeze\(\)"):
        hessian(lambda x: layer(x).square().sum())(x.float())
    layer.unfreeze().freeze(torch.int8)
    with pytest.raises(RuntimeError, match="int8 tables are for inference"):
        jvp(layer, (x.float(),), (x.float(),))


def test_tangents_under_autocast_are_those_of_the_rounded_table() -> None:
    x, table, borders = (t.float() for t in case())
    v = torch.randn_like(x)
    with torch.autocast("cpu", torch.bfloat16):
        along = jvp(lambda x: lmkan(x, table, borders), (x,), (v,))[1]
    rounded = table.bfloat16().double()
    exact = jvp(lambda x: reference.evaluate(x, rounded, borders.double()), (x.double(),), (v.double(),))[1]
    assert_close(along.double(), exact, rtol=1e-4, atol=1e-4)
