"""The layer as operators ``torch.ops.lmkan_gen.forward``, ``backward``, ``tangent``, ``double_backward``.

Float32 goes to the kernels, float64 to the torch reference (for checking gradients numerically), whatever
``table_dtype`` says; an empty one stands for the type of the table.
All have fake implementations, so that ``torch.compile`` and ``torch.export`` see through them.

Inputs and tables in half precision are for `lmkan`, which computes in float32 with the narrow table.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lmkan_gen import dispatch, reference
from lmkan_gen.call import Call
from lmkan_gen.dtensor import beside, is_dtensor
from lmkan_gen.families import Demand
from lmkan_gen.forms import forms_of, keep_forms
from lmkan_gen.operators import (
    Differentiable,
    below_autograd,
    directly,
    longer_batch,
    primals,
    register,
    runs_eagerly,
)
from lmkan_gen.packing import round_table
from lmkan_gen.problem import LayerShape, Operation, TableDtype

_DTYPES = (torch.float32, torch.float64)
HALVES = (torch.float16, torch.bfloat16)

_LIBRARY = torch.library.Library("lmkan_gen", "DEF")
_LIBRARY.define(
    "forward(Tensor x, Tensor table, Tensor borders, int tile_forward=0, int block_forward=0, "
    "int tile_backward=0, int block_backward=0, bool fast=False, str table_dtype='') -> Tensor"
)
# What is needed is declared int, not bool: `register_sharding` tells calls apart by the first int argument
# and all that follow, and would take the shapes of one call's outputs for another's.
_LIBRARY.define(
    "backward(Tensor grad, Tensor x, Tensor table, Tensor borders, int need_x, int need_table, "
    "int tile=0, int block=0, bool fast=False, str table_dtype='', Tensor? rounded=None) -> (Tensor, Tensor)"
)
_LIBRARY.define("tangent(Tensor v_x, Tensor x, Tensor table, Tensor borders) -> Tensor")
_LIBRARY.define(
    "double_backward(Tensor? v_x, Tensor? v_table, Tensor grad, Tensor x, Tensor table, Tensor borders, "
    "int need_grad, int need_x, int need_table) -> (Tensor, Tensor, Tensor)"
)
_forward_op = torch.ops.lmkan_gen.forward.default
_backward_op = torch.ops.lmkan_gen.backward.default
#: the same without what operators do in Python before they are called
_forward_kernel, _backward_kernel = _forward_op._op, _backward_op._op
_tangent_op = torch.ops.lmkan_gen.tangent.default
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

    Twice differentiable in ``x`` and ``table``, in forward mode once. An odd ``I`` is
    completed by an input that is always zero.

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
            ``"bfloat16"``, or ``"int8"``, which is for inference. None: the type of ``table``, or under
            ``torch.autocast`` for the device its dtype (and then ``x`` may be of any float dtype). Sums stay
            float32, and so do gradients, but those of the output are rounded like the table first: scale
            the loss for float16.

    Where ``x`` and ``table`` are both float16 or both bfloat16, as in a module after ``half()``,
    coordinates and sums are float32 all the same; ``borders`` is float32 then.

    Returns:
        ``[O, B]``, contiguous, of the dtype of ``x``; float32 under autocast. The gradient of ``x`` comes in
        the order of ``x`` in memory.

    Raises:
        ValueError: shapes or devices do not belong together, the device is neither a CPU nor a CUDA
            device, or a tile or block size does not fit the device.
        TypeError: the dtypes differ or are neither float32 nor float64.
    """
    if table_dtype is None and x.dtype is torch.float32 and runs_eagerly(x, table, borders):
        if tile_forward or block_forward or tile_backward or block_backward or fast:
            return run_eagerly(
                x, table, borders, tile_forward, block_forward, tile_backward, block_backward, fast
            )
        return run_eagerly(x, table, borders)
    options = (tile_forward, block_forward, tile_backward, block_backward, fast)
    borders = beside(table, borders)
    wanted = x.dtype
    if table_dtype is None and autocasts(x):
        table_dtype, x = _name(torch.get_autocast_dtype(x.device.type)), x.float()
        wanted = torch.float32
    elif wanted in HALVES and table.dtype == wanted:
        x = x.float()
    y: Tensor = _forward_op(x, table, borders, *options, table_dtype or own_dtype(table))
    return y if y.dtype == wanted else y.to(wanted)


def run_eagerly(x: Tensor, table: Tensor, borders: Tensor, *options: Any) -> Tensor:
    """The operator without the dispatcher's way to it, where `runs_eagerly`; ``x`` is float32."""
    if torch.is_grad_enabled() and (x.requires_grad or table.requires_grad):
        y: Tensor = _Eager.apply(x, table, borders, *options)  # type: ignore[attr-defined]
        return y
    computed: Tensor = directly(_forward_kernel, x, table, borders, *options)
    return computed


def autocasts(x: Tensor) -> bool:
    """Whether ``torch.autocast`` is on for the device of ``x`` and for its dtype: not for float64."""
    kind = x.device.type
    return kind in ("cpu", "cuda") and x.dtype != torch.float64 and torch.is_autocast_enabled(kind)


def _check(x: Tensor, table: Tensor, borders: Tensor, grad: Tensor | None = None) -> None:
    """Refuse tensors that do not belong together."""
    if x.dtype not in _DTYPES and x.dtype != table.dtype:
        raise TypeError(
            f"x has dtype {_name(x.dtype)}; float32 (kernels) and float64 (plain torch) work with a table "
            f"of {_name(table.dtype)}, half precision with a table of the same type or under torch.autocast"
        )
    if x.dtype not in _DTYPES:
        raise TypeError(f"x has dtype {_name(x.dtype)}; float32, float64, float16 and bfloat16 work")
    others = {"table": table, "borders": borders}
    if grad is not None:
        others["grad"] = grad
    for name, tensor in others.items():
        narrow = name == "table" and x.dtype == torch.float32 and tensor.dtype in HALVES
        if tensor.dtype != x.dtype and not narrow:
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


def own_dtype(table: Tensor) -> str:
    """The ``table_dtype`` that leaves a table as it is."""
    return _name(table.dtype if table.dtype in HALVES else torch.float32)


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
    tile_forward: int = 0,
    block_forward: int = 0,
    tile_backward: int = 0,
    block_backward: int = 0,
    fast: bool = False,
    table_dtype: str = "",
) -> Tensor:
    _check(x, table, borders)
    shape, device = _shape(x, table), x.device
    source, borders = table.contiguous(), borders.contiguous()
    y = x.new_empty((shape.outputs, shape.batch))
    if x.dtype == torch.float32:
        demand = _demand(device.type, tile_forward, block_forward, False)
        buffers = {"x": x, "borders": borders, "y": y}
        _execute(Operation.FORWARD, shape, demand, buffers, table, source, table_dtype)
    else:
        reference.forward(x, source, borders, y)
    return y


def _execute(
    operation: Operation,
    shape: LayerShape,
    demand: Demand,
    buffers: dict[str, Tensor],
    table: Tensor,
    source: Tensor,
    table_dtype: str,
) -> None:
    """Run kernels on a float32 or narrow table; ``source`` is ``table`` without gaps."""
    dtype, device = TableDtype(table_dtype or own_dtype(table)), buffers["x"].device
    if dtype is TableDtype.FLOAT32 and source.dtype == torch.float32:
        dispatch.execute(Call(operation, shape, device, demand), {**buffers, "table": source})
        return
    rounded = round_table(source, dtype)
    dispatch.execute(Call(operation, shape, device, demand, dtype), buffers, rounded, forms_of(table))


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
    tile: int = 0,
    block: int = 0,
    fast: bool = False,
    table_dtype: str = "",
    rounded: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _check(x, table, borders, grad)
    shape, device = _shape(x, table), x.device
    read = table if rounded is None else rounded
    source, borders = read.contiguous(), borders.contiguous()
    buffers = {"grad": grad, "x": x, "borders": borders}
    grad_x = _new_grad_x(x, need_x)
    # kernels add in float32
    grad_table = x.new_empty(table.shape if need_table else (0,))
    if need_x:
        buffers["grad_x"] = grad_x
    if need_table:
        buffers["grad_table"] = grad_table
    if x.dtype == torch.float32:
        demand = _demand(device.type, tile, block, fast)
        operation = Operation.BACKWARD if need_x and need_table else Operation.GRAD_INPUT
        if not need_x:
            operation = Operation.GRAD_TABLE
        if need_x or need_table:
            _execute(operation, shape, demand, buffers, read, source, table_dtype)
    else:
        if need_x:
            reference.grad_input(grad, x, source, borders, grad_x)
        if need_table:
            reference.grad_table(grad, x, borders, grad_table)
    return grad_x, grad_table.to(table.dtype)


def _backward_fake(
    grad: Tensor, x: Tensor, table: Tensor, borders: Tensor, need_x: bool, need_table: bool, *_: object
) -> tuple[Tensor, Tensor]:
    _check(x, table, borders, grad)
    return _new_grad_x(x, need_x), _new(table, need_table)


def _tangent(v_x: Tensor, x: Tensor, table: Tensor, borders: Tensor) -> Tensor:
    y = x.new_empty((table.shape[2], x.shape[1]))
    reference.tangent(v_x, x, table.to(x.dtype), borders, y)
    return y


def _tangent_fake(v_x: Tensor, x: Tensor, table: Tensor, borders: Tensor) -> Tensor:
    return x.new_empty((table.shape[2], x.shape[1]))


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
    out[2] = out[2].to(x.dtype)
    targets = [tensor if needed else None for tensor, (_, needed) in zip(out, wanted, strict=True)]
    v_table = None if v_table is None else v_table.to(x.dtype)
    reference.double_backward(v_x, v_table, grad, x, table.to(x.dtype), borders, *targets)
    return out[0], out[1], out[2].to(table.dtype)


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


class _Forward(Differentiable):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, borders: Tensor, *options: Any) -> Tensor:
        _refuse_grid_gradient(ctx.needs_input_grad[2])
        options += (0, 0, 0, 0, False, "")[len(options) :]  # what is left out has its default
        dtype = TableDtype(options[5] or own_dtype(table))
        if dtype is TableDtype.INT8:
            raise RuntimeError(
                "int8 tables are for inference and have no derivatives: use torch.no_grad() or another "
                "table_dtype"
            )
        rounded = None
        if x.dtype == torch.float32 and _name(table.dtype) != dtype:
            # made once for forward and backward; nobody else has it
            rounded = round_table(table.detach(), dtype).values
            keep_forms(rounded)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, table, borders, rounded)
        ctx.save_for_forward(x, table, borders, rounded)
        ctx.options = options[2:]
        y: Tensor = below_autograd(_forward_op, x, table if rounded is None else rounded, borders, *options)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (len(ctx.needs_input_grad) - 2)
        if grad is None:
            return None, None, *nothing
        x, table, borders, rounded = ctx.saved_tensors
        need_x, need_table = ctx.needs_input_grad[:2]
        options = (*ctx.options, rounded)
        grad_x, grad_table = _backward_op(grad, x, table, borders, need_x, need_table, *options)
        return grad_x if need_x else None, grad_table if need_table else None, *nothing

    @staticmethod
    def jvp(ctx: Any, v_x: Tensor | None, v_table: Tensor | None, *_: Any) -> Tensor:
        with primals(ctx.saved_tensors) as (x, table, borders, rounded):
            read = table if rounded is None else rounded
            along: Tensor | None = None if v_x is None else _tangent_op(v_x, x, read, borders)
            if v_table is None:
                assert along is not None
                return along
            # the layer is linear in its table
            of_table: Tensor = _forward_op(x, v_table, borders, 0, 0, 0, 0, False, own_dtype(v_table))
            return of_table if along is None else along + of_table


class _Eager(Differentiable):
    """`_Forward` where the table has the type that is computed in, and no transform looks on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, borders: Tensor, *options: Any) -> Tensor:
        ctx.save_for_backward(x, table, borders)
        ctx.set_materialize_grads(False)
        ctx.options = options[2:]
        y: Tensor = directly(_forward_kernel, x, table, borders, *options)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        nothing = (None,) * (len(needs) - 2)
        if grad is None:
            return None, None, *nothing
        arguments = (grad, *ctx.saved_tensors, needs[0], needs[1], *ctx.options)
        if torch.is_grad_enabled():  # to be differentiated again
            grad_x, grad_table = _backward_op(*arguments)
        else:
            grad_x, grad_table = directly(_backward_kernel, *arguments)
        return grad_x if needs[0] else None, grad_table if needs[1] else None, *nothing


class _Backward(Differentiable):
    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, x: Tensor, table: Tensor, borders: Tensor, *options: Any
    ) -> tuple[Tensor, Tensor]:
        _refuse_grid_gradient(ctx.needs_input_grad[3])
        ctx.set_materialize_grads(False)
        options += (0, 0, False, "", None)[len(options) - 2 :]  # what is left out has its default
        rounded = options[6]
        ctx.save_for_backward(grad, x, table if rounded is None else rounded, borders)
        ctx.save_for_forward(grad, x, table if rounded is None else rounded, borders)
        ctx.needed = options[:2]
        ctx.options = options[2:6]
        grad_x, grad_table = below_autograd(_backward_op, grad, x, table, borders, *options)
        ctx.mark_non_differentiable(
            *(t for t, n in zip((grad_x, grad_table), ctx.needed, strict=True) if not n)
        )
        return grad_x, grad_table

    @staticmethod
    def backward(ctx: Any, v_x: Tensor | None, v_table: Tensor | None) -> tuple[Tensor | None, ...]:
        v_x, v_table = (v if needed else None for v, needed in zip((v_x, v_table), ctx.needed, strict=True))
        needs = ctx.needs_input_grad[:3]
        if v_x is None and is_dtensor(ctx.saved_tensors[1]):
            v_x = torch.zeros_like(ctx.saved_tensors[1])  # torch 2.11 wants a DTensor as first argument
        found = _double_backward_op(v_x, v_table, *ctx.saved_tensors, *needs)
        wanted = (t if needed else None for t, needed in zip(found, needs, strict=True))
        return (*wanted, *(None,) * (len(ctx.needs_input_grad) - 3))

    @staticmethod
    def jvp(
        ctx: Any, v_grad: Tensor | None, v_x: Tensor | None, v_table: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, Tensor | None]:
        with primals(ctx.saved_tensors) as (grad, x, table, borders):
            assert grad is not None
            assert x is not None
            assert table is not None
            # sum(grad * y) has a symmetric Hessian: its product with the tangents, by parts
            found = [torch.zeros_like(x), torch.zeros_like(table)]
            if v_x is not None or v_table is not None:
                of_rest = _double_backward_op(v_x, v_table, grad, x, table, borders, False, *ctx.needed)
                found = [t if n else f for t, n, f in zip(of_rest[1:], ctx.needed, found, strict=True)]
            if v_grad is not None:
                of_grad = _backward_op(v_grad, x, table, borders, *ctx.needed, *ctx.options)
                found = [f + t if n else f for f, t, n in zip(found, of_grad, ctx.needed, strict=True)]
        along_x, along_table = (f if n else None for f, n in zip(found, ctx.needed, strict=True))
        return along_x, along_table


class _Tangent(Differentiable):
    @staticmethod
    def forward(ctx: Any, v_x: Tensor, x: Tensor, table: Tensor, borders: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(v_x, x, table, borders)
        ctx.save_for_forward(v_x, x, table, borders)
        y: Tensor = below_autograd(_tangent_op, v_x, x, table, borders)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 4
        v_x, x, table, borders = ctx.saved_tensors
        need_v, need_x, need_table = ctx.needs_input_grad[:3]
        grad_v = None
        if need_v:
            options = (True, False, 0, 0, False, own_dtype(table))
            grad_v = _backward_op(grad, x, table, borders, *options)[0]
        grad_x = grad_table = None
        if need_x or need_table:
            _, grad_x, grad_table = _double_backward_op(
                v_x, None, grad, x, table, borders, False, need_x, need_table
            )
        return grad_v, grad_x if need_x else None, grad_table if need_table else None, None

    @staticmethod
    def jvp(ctx: Any, d_v: Tensor | None, d_x: Tensor | None, d_table: Tensor | None, _: Any) -> Tensor:
        if d_x is not None:
            raise NotImplementedError(
                "forward mode over forward mode is not implemented for an lmKAN layer; take reverse mode "
                "for one of the two, as torch.func.hessian does"
            )
        with primals(ctx.saved_tensors) as (v_x, x, table, borders):
            parts = [] if d_v is None else [_tangent_op(d_v, x, table, borders)]
            parts += [] if d_table is None else [_tangent_op(v_x, x, d_table, borders)]
        total: Tensor = sum(parts[1:], parts[0])
        return total


class _DoubleBackward(Differentiable):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = below_autograd(_double_backward_op, *arguments)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(_NO_THIRD)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(_NO_THIRD)


_NO_THIRD = (
    "third derivatives of an lmKAN layer are not implemented; "
    "lmkan_gen.reference.evaluate is differentiable any number of times"
)


def _refuse_grid_gradient(needed: bool) -> None:
    if needed:
        raise ValueError("borders requires a gradient, but the grid is fixed; pass borders.detach()")


_forward_rule = longer_batch(_forward_op, (0,), lambda *_: True)
_backward_rule = longer_batch(_backward_op, (0, 1), lambda *arguments: not arguments[5])
_tangent_rule = longer_batch(_tangent_op, (0, 1), lambda *_: True)
_double_backward_rule = longer_batch(_double_backward_op, (0, 2, 3), lambda *arguments: not arguments[8])

register(_LIBRARY, "forward", _forward, _forward_fake, _Forward, _forward_rule)
register(_LIBRARY, "backward", _backward, _backward_fake, _Backward, _backward_rule)
register(_LIBRARY, "tangent", _tangent, _tangent_fake, _Tangent, _tangent_rule)
register(
    _LIBRARY,
    "double_backward",
    _double_backward,
    _double_backward_fake,
    _DoubleBackward,
    _double_backward_rule,
)
