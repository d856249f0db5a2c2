"""The layer as torch operators: ``torch.ops.lmkan_gen.forward``, ``backward``, ``double_backward``.

Float32 goes to the kernels, float64 to the torch reference (for checking gradients numerically), whatever
``table_dtype`` says.
All three have fake implementations, so that ``torch.compile`` and ``torch.export`` see through them.

They are registered by hand instead of with ``torch.library.custom_op``: a third of the overhead per
call, which is what a small layer's time consists of.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from lmkan_gen import dispatch, reference
from lmkan_gen.families import Demand
from lmkan_gen.problem import LayerShape, Operation, TableDtype

_DTYPES = (torch.float32, torch.float64)


class _Inference(threading.local):
    """Whether this thread is in a call that nobody differentiates, so that the table is likely to stay."""

    active = False


_inference = _Inference()

_LIBRARY = torch.library.Library("lmkan_gen", "DEF")
_LIBRARY.define(
    "forward(Tensor x, Tensor table, Tensor borders, int tile_forward, int block_forward, "
    "int tile_backward, int block_backward, bool fast, str table_dtype) -> Tensor"
)
_LIBRARY.define(
    "backward(Tensor grad, Tensor x, Tensor table, Tensor borders, bool need_x, bool need_table, "
    "int tile, int block, bool fast, str table_dtype) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "double_backward(Tensor? v_x, Tensor? v_table, Tensor grad, Tensor x, Tensor table, Tensor borders, "
    "bool need_grad, bool need_x, bool need_table) -> (Tensor, Tensor, Tensor)"
)
_forward_op = torch.ops.lmkan_gen.forward.default
_backward_op = torch.ops.lmkan_gen.backward.default
_double_backward_op = torch.ops.lmkan_gen.double_backward.default


def lmkan(
    x: Tensor,
    table: Tensor,
    borders: Tensor,
    tile_forward: int = 0,
    block_forward: int = 0,
    tile_backward: int = 0,
    block_backward: int = 0,
    fast: bool = False,
    table_dtype: str | None = None,
) -> Tensor:
    """What a layer computes, as a function: ``y[o, b] = sum_p f_{o,p}(x[2p, b], x[2p+1, b])``.

    Twice differentiable in ``x`` and ``table``. An odd ``I`` is completed by an input that is always zero.

    Args:
        x: ``[I, B]``, batch last, of any strides: the transposed view of samples ``[B, I]`` is read as it is.
        table: ``[G+1, G+1, O, ceil(I/2)]``, values of the functions at the knots.
        borders: ``[G+1]``, the knots, as `lmkan_gen.grid.knots` gives them.
        tile_forward: tile size of the forward CUDA kernel; 0: the tuned one. Ignored on CPUs, like
            all that follow.
        block_forward: its threads per block; 0: tuned.
        tile_backward: tile size of the backward CUDA kernel; 0: tuned.
        block_backward: its threads per block; 0: tuned.
        fast: prefer the backward kernel that trades shared memory for speed.
        table_dtype: what float32 tables are rounded to for the computation: ``"float32"``, ``"float16"``,
            ``"bfloat16"``, or ``"int8"``, which is for inference. None: float32, or under
            ``torch.autocast`` for CUDA its dtype (and then ``x`` may be of any float dtype). Sums stay
            float32, and so do gradients, but those of the output are rounded like the table first: scale
            the loss for float16.

    Returns:
        ``[O, B]``, contiguous, of the dtype of ``x``; float32 under autocast. The gradient of ``x`` comes in
        the order of ``x`` in memory.

    Raises:
        ValueError: shapes or devices do not belong together, the device is neither a CPU nor a CUDA
            device, or a tile or block size does not fit the device.
        TypeError: the dtypes differ or are neither float32 nor float64.
    """
    if table_dtype is None:
        table_dtype, x = _under_autocast(x)
    y: Tensor = _forward_op(
        x, table, borders, tile_forward, block_forward, tile_backward, block_backward, fast, table_dtype
    )
    return y


def _under_autocast(x: Tensor) -> tuple[str, Tensor]:
    """The table's dtype and ``x`` as autocast wants them."""
    if not (x.is_cuda and torch.is_autocast_enabled("cuda")):
        return str(TableDtype.FLOAT32), x
    return _name(torch.get_autocast_dtype("cuda")), x.float()


def _check(x: Tensor, table: Tensor, borders: Tensor, grad: Tensor | None = None) -> None:
    """Refuse tensors that do not belong together."""
    if x.dtype not in _DTYPES:
        raise TypeError(f"x has dtype {_name(x.dtype)}; float32 (kernels) and float64 (plain torch) work")
    others = {"table": table, "borders": borders}
    if grad is not None:
        others["grad"] = grad
    for name, tensor in others.items():
        if tensor.dtype != x.dtype:
            raise TypeError(
                f"{name} has dtype {_name(tensor.dtype)}, x has {_name(x.dtype)}: they must agree; "
                "layer.to(x.dtype) or x.to(layer.func_parameter.dtype) makes them"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x is on {x.device}: move both to one device")
    if table.dim() != 4 or table.shape[0] != table.shape[1]:
        raise ValueError(f"table must be [G+1, G+1, outputs, inputs/2], got {list(table.shape)}")
    if borders.dim() != 1 or borders.shape[0] != table.shape[0]:
        raise ValueError(
            f"borders must be [G+1] = [{table.shape[0]}] as table has it, got {list(borders.shape)}"
        )
    check_inputs(x, table.shape[3])
    if grad is not None and (
        grad.dim() != 2 or grad.shape[0] != table.shape[2] or grad.shape[1] != x.shape[1]
    ):
        raise ValueError(
            f"grad must be [outputs, batch] = [{table.shape[2]}, {x.shape[1]}], got {list(grad.shape)}"
        )


def check_inputs(x: Tensor, pairs: int) -> None:
    """Raise ValueError unless ``x`` has two axes, and the first so many inputs as ``pairs`` hold."""
    if x.dim() != 2 or -(-x.shape[0] // 2) != pairs:
        raise ValueError(
            f"x must be [inputs, batch] = [{2 * pairs}, batch] with the batch last, or one input less; "
            f"got {list(x.shape)}"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(x: Tensor, table: Tensor) -> LayerShape:
    return LayerShape(x.shape[0], table.shape[2], table.shape[0] - 1, x.shape[1])


@lru_cache(maxsize=1024)
def _demand(kind: str, tile: int, block: int, fast: bool) -> Demand:
    # tiles and blocks are notions of CUDA kernels
    return Demand(tile or None, block or None, fast) if kind == "cuda" else Demand()


def _forward(
    x: Tensor,
    table: Tensor,
    borders: Tensor,
    tile_forward: int,
    block_forward: int,
    tile_backward: int,
    block_backward: int,
    fast: bool,
    table_dtype: str,
) -> Tensor:
    _check(x, table, borders)
    narrow = TableDtype(table_dtype)
    shape, device = _shape(x, table), x.device
    table, borders = table.contiguous(), borders.contiguous()
    y = x.new_empty((shape.outputs, shape.batch))
    if x.dtype == torch.float32:
        demand = _demand(device.type, tile_forward, block_forward, False)
        buffers = {"x": x, "table": table, "borders": borders, "y": y}
        constant = _inference.active
        dispatch.execute(Operation.FORWARD, shape, device, demand, buffers, narrow, constant=constant)
    else:
        reference.forward(x, table, borders, y)
    return y


def _forward_fake(x: Tensor, table: Tensor, borders: Tensor, *_: object) -> Tensor:
    _check(x, table, borders)
    return x.new_empty((table.shape[2], x.shape[1]))


def _backward(
    grad: Tensor,
    x: Tensor,
    table: Tensor,
    borders: Tensor,
    need_x: bool,
    need_table: bool,
    tile: int,
    block: int,
    fast: bool,
    table_dtype: str,
) -> tuple[Tensor, Tensor]:
    _check(x, table, borders, grad)
    narrow = TableDtype(table_dtype)
    shape, device = _shape(x, table), x.device
    table, borders = table.contiguous(), borders.contiguous()
    buffers = {"grad": grad, "x": x, "table": table, "borders": borders}
    grad_x = _new_grad_x(x, need_x)
    grad_table = _new(table, need_table)
    if need_x:
        buffers["grad_x"] = grad_x
    if need_table:
        buffers["grad_table"] = grad_table
    if x.dtype == torch.float32:
        demand = _demand(device.type, tile, block, fast)
        if need_x and need_table:
            dispatch.execute(Operation.BACKWARD, shape, device, demand, buffers, narrow)
        elif need_x:
            dispatch.execute(Operation.GRAD_INPUT, shape, device, demand, buffers, narrow)
        elif need_table:
            dispatch.execute(Operation.GRAD_TABLE, shape, device, demand, buffers, narrow)
    else:
        if need_x:
            reference.grad_input(grad, x, table, borders, grad_x)
        if need_table:
            reference.grad_table(grad, x, borders, grad_table)
    return grad_x, grad_table


def _backward_fake(
    grad: Tensor, x: Tensor, table: Tensor, borders: Tensor, need_x: bool, need_table: bool, *_: object
) -> tuple[Tensor, Tensor]:
    _check(x, table, borders, grad)
    return _new_grad_x(x, need_x), _new(table, need_table)


def _double_backward(
    v_x: Tensor | None,
    v_table: Tensor | None,
    grad: Tensor,
    x: Tensor,
    table: Tensor,
    borders: Tensor,
    need_grad: bool,
    need_x: bool,
    need_table: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wanted = ((grad, need_grad), (x, need_x), (table, need_table))
    out = [_new(like, needed) for like, needed in wanted]
    targets = [tensor if needed else None for tensor, (_, needed) in zip(out, wanted, strict=True)]
    reference.double_backward(v_x, v_table, grad, x, table, borders, *targets)
    return out[0], out[1], out[2]


def _double_backward_fake(
    v_x: Tensor | None,
    v_table: Tensor | None,
    grad: Tensor,
    x: Tensor,
    table: Tensor,
    borders: Tensor,
    need_grad: bool,
    need_x: bool,
    need_table: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _new(grad, need_grad), _new(x, need_x), _new(table, need_table)


def _new(like: Tensor, needed: bool) -> Tensor:
    """An output of the shape of ``like``, contiguous; empty when nobody needs it."""
    return like.new_empty(like.shape if needed else (0,))


def _new_grad_x(x: Tensor, needed: bool) -> Tensor:
    """As `_new`, but in the order of ``x`` in memory, without gaps."""
    return torch.empty_like(x) if needed else x.new_empty((0,))


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, borders: Tensor, *options: Any) -> Tensor:
        _refuse_grid_gradient(ctx.needs_input_grad[2])
        ctx.save_for_backward(x, table, borders)
        ctx.options = options[2:]
        with torch._C._AutoDispatchBelowAutograd():
            y: Tensor = _forward_op(x, table, borders, *options)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, table, borders = ctx.saved_tensors
        need_x, need_table = ctx.needs_input_grad[:2]
        grad_x, grad_table = _backward_op(grad, x, table, borders, need_x, need_table, *ctx.options)
        return (grad_x if need_x else None, grad_table if need_table else None, *(None,) * 7)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, x: Tensor, table: Tensor, borders: Tensor, *options: Any
    ) -> tuple[Tensor, Tensor]:
        _refuse_grid_gradient(ctx.needs_input_grad[3])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, x, table, borders)
        ctx.needed = options[:2]
        with torch._C._AutoDispatchBelowAutograd():
            grad_x, grad_table = _backward_op(grad, x, table, borders, *options)
        ctx.mark_non_differentiable(
            *(t for t, n in zip((grad_x, grad_table), ctx.needed, strict=True) if not n)
        )
        return grad_x, grad_table

    @staticmethod
    def backward(ctx: Any, v_x: Tensor | None, v_table: Tensor | None) -> tuple[Tensor | None, ...]:
        v_x, v_table = (v if needed else None for v, needed in zip((v_x, v_table), ctx.needed, strict=True))
        needs = ctx.needs_input_grad[:3]
        found = _double_backward_op(v_x, v_table, *ctx.saved_tensors, *needs)
        return (*(t if needed else None for t, needed in zip(found, needs, strict=True)), *(None,) * 7)


class _DoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            found: tuple[Tensor, Tensor, Tensor] = _double_backward_op(*arguments)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            "third derivatives of an lmKAN layer are not implemented; "
            "lmkan_gen.reference.evaluate is differentiable any number of times"
        )


def _refuse_grid_gradient(needed: bool) -> None:
    if needed:
        raise ValueError("borders requires a gradient, but the grid is fixed; pass borders.detach()")


def _register(op: Any, name: str, real: Any, fake: Any, function: type[torch.autograd.Function]) -> None:
    def autograd(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
            return function.apply(*arguments)
        before, _inference.active = _inference.active, True
        try:
            with torch._C._AutoDispatchBelowAutograd():
                return op(*arguments)
        finally:
            _inference.active = before

    _LIBRARY.impl(name, real, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"lmkan_gen::{name}", fake, lib=_LIBRARY)


_register(_forward_op, "forward", _forward, _forward_fake, _Forward)
_register(_backward_op, "backward", _backward, _backward_fake, _Backward)
_register(_double_backward_op, "double_backward", _double_backward, _double_backward_fake, _DoubleBackward)
