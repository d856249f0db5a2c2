"""The Hessian regulariser: how far a layer's functions are from being affine.

Two torch operators, ``torch.ops.lmkan_gen.hessian`` (the value) and ``grad_hessian`` (the gradient, times a
scalar), each one pass over the table. Both have fake implementations and are differentiable any number of
times: the value is a quadratic form, so that its gradient is linear in the table and its own transpose.

The backward pass computes the gradient from the table instead of keeping it from the forward pass: that
reads the table twice and writes the gradient once, where keeping it would add a pass that multiplies it by
what comes from the loss, and hold memory of the size of the table in between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmkan_gen import dispatch, hessian_reference
from lmkan_gen.call import Call
from lmkan_gen.dtensor import beside, graded_alike
from lmkan_gen.operators import Differentiable, below_autograd, one_by_one, primals, register
from lmkan_gen.ops import HALVES
from lmkan_gen.problem import LayerShape, Operation

#: bytes; kernels load this much at a time
_ALIGNMENT = 16


def hessian_regularization(table: Tensor, borders: Tensor) -> Tensor:
    """Mean squared second derivative over the inner knots, summed over all functions.

    Second derivatives are finite differences on the non-uniform grid; the value is
    ``sum_functions mean_knots (f_xx^2 + 2 f_xy^2 + f_yy^2)``. It is zero for affine functions and
    differentiable with respect to ``table``, any number of times.

    float32 goes to the kernels, with sums in a fixed order: results are reproducible to the bit. So do tables
    in half precision, whose sums would overflow. float64 is computed in plain torch.

    Args:
        table: ``[G+1, G+1, O, P]``, values of the functions at the knots.
        borders: ``[G+1]``, the knots, in increasing order; float64 if the table is, else float32.

    Returns:
        A scalar tensor of the dtype of ``borders``; a `DTensor` if the table is one, whose ``full_tensor()``
        adds to a loss that is none.

    Raises:
        ValueError: shapes or devices do not belong together, the device is neither a CPU nor a CUDA
            device, or ``borders`` requires a gradient.
        TypeError: ``borders`` has another dtype than described.
    """
    if table.dtype in HALVES:
        table = table.float()
    if borders.requires_grad:
        raise ValueError("borders requires a gradient, but the grid is fixed; pass borders.detach()")
    value: Tensor = _hessian_op(graded_alike(table), beside(table, borders))
    return value


def _check(table: Tensor, borders: Tensor) -> None:
    if borders.dtype != table.dtype:
        raise TypeError(f"borders has dtype {borders.dtype}, table has {table.dtype}: they must agree")
    if borders.device != table.device:
        raise ValueError(
            f"borders is on {borders.device}, table is on {table.device}: move both to one device"
        )
    knots = borders.numel()
    if borders.dim() != 1 or table.dim() != 4 or table.shape[0] != knots or table.shape[1] != knots:
        raise ValueError(
            f"table must be [G+1, G+1, outputs, pairs] with G+1 = {knots} as borders has it, "
            f"got {list(table.shape)}"
        )


def _execute(operation: Operation, table: Tensor, borders: Tensor, **others: Tensor) -> None:
    table = table.contiguous()
    if table.data_ptr() % _ALIGNMENT:
        table = table.clone()  # a view into something larger
    shape = LayerShape(2 * table.shape[3], table.shape[2], table.shape[0] - 1, batch=1)
    buffers = {"table": table, "borders": borders.contiguous(), **others}
    dispatch.execute(Call(operation, shape, table.device), buffers)


_LIBRARY = torch.library.Library("lmkan_gen", "FRAGMENT")
_LIBRARY.define("hessian(Tensor table, Tensor borders) -> Tensor")
_LIBRARY.define("grad_hessian(Tensor scale, Tensor table, Tensor borders) -> Tensor")
_hessian_op = torch.ops.lmkan_gen.hessian.default
_grad_hessian_op = torch.ops.lmkan_gen.grad_hessian.default


def _hessian(table: Tensor, borders: Tensor) -> Tensor:
    _check(table, borders)
    value = table.new_empty(())
    if table.dtype == torch.float32:
        _execute(Operation.HESSIAN, table, borders, value=value)
    else:
        hessian_reference.value(table, borders, value)
    return value


def _grad_hessian(scale: Tensor, table: Tensor, borders: Tensor) -> Tensor:
    _check(table, borders)
    grad_table = table.new_empty(table.shape)
    if table.dtype == torch.float32:
        _execute(Operation.GRAD_HESSIAN, table, borders, scale=scale, grad_table=grad_table)
    else:
        hessian_reference.gradient(scale, table, borders, grad_table)
    return grad_table


def _hessian_fake(table: Tensor, borders: Tensor) -> Tensor:
    _check(table, borders)
    return table.new_empty(())


def _grad_hessian_fake(scale: Tensor, table: Tensor, borders: Tensor) -> Tensor:
    _check(table, borders)
    return table.new_empty(table.shape)


class _Hessian(Differentiable):
    @staticmethod
    def forward(ctx: Any, table: Tensor, borders: Tensor) -> Tensor:
        ctx.save_for_backward(table, borders)
        ctx.save_for_forward(table, borders)
        value: Tensor = below_autograd(_hessian_op, table, borders)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        table, borders = ctx.saved_tensors
        return _grad_hessian_op(grad, table, borders), None

    @staticmethod
    def jvp(ctx: Any, v_table: Tensor, _: Any) -> Tensor:
        with primals(ctx.saved_tensors) as (table, borders):
            assert table is not None
            gradient = _grad_hessian_op(table.new_ones(()), table, borders)
            along: Tensor = (gradient * v_table).sum()
        return along


class _GradHessian(Differentiable):
    @staticmethod
    def forward(ctx: Any, scale: Tensor, table: Tensor, borders: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(scale, table, borders)
        ctx.save_for_forward(scale, table, borders)
        gradient: Tensor = below_autograd(_grad_hessian_op, scale, table, borders)
        return gradient

    @staticmethod
    def backward(ctx: Any, v: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        if v is None:
            return None, None, None
        scale, table, borders = ctx.saved_tensors
        need_scale, need_table, _ = ctx.needs_input_grad
        one = torch.ones_like(scale)
        grad_scale = (v * _grad_hessian_op(one, table, borders)).sum() if need_scale else None
        return grad_scale, _grad_hessian_op(scale, v, borders) if need_table else None, None

    @staticmethod
    def jvp(ctx: Any, v_scale: Tensor | None, v_table: Tensor | None, _: Any) -> Tensor:
        # linear in either
        with primals(ctx.saved_tensors) as (scale, table, borders):
            parts = [] if v_scale is None else [_grad_hessian_op(v_scale, table, borders)]
            parts += [] if v_table is None else [_grad_hessian_op(scale, v_table, borders)]
        total: Tensor = sum(parts[1:], parts[0])
        return total


register(_LIBRARY, "hessian", _hessian, _hessian_fake, _Hessian, one_by_one(_hessian_op))
register(
    _LIBRARY, "grad_hessian", _grad_hessian, _grad_hessian_fake, _GradHessian, one_by_one(_grad_hessian_op)
)
