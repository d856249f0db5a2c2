"""Frozen tables as torch operators and as a module: what a frozen layer computes with.

``torch.ops.lmkan_gen.frozen_forward`` and ``frozen_grad_input`` read a table that stays as it is, in one of
the types of `FREEZABLE`. A frozen table has no gradient, the inputs do (once), but not with int8, which is
for inference. Float64 inputs are computed in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from lmkan_gen import dispatch, packing, reference
from lmkan_gen.call import Call
from lmkan_gen.dtensor import beside
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
from lmkan_gen.ops import HALVES, autocasts, check_inputs
from lmkan_gen.packing import RoundedTable
from lmkan_gen.problem import LayerShape, Operation

#: element types that tables can be frozen to
FREEZABLE = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
FREEZABLE_NAMES = ", ".join(map(str, FREEZABLE))

_LIBRARY = torch.library.Library("lmkan_gen", "FRAGMENT")
_LIBRARY.define("frozen_forward(Tensor x, Tensor values, Tensor? scales, Tensor borders) -> Tensor")
_LIBRARY.define("frozen_grad_input(Tensor grad, Tensor x, Tensor values, Tensor borders) -> Tensor")
_forward_op = torch.ops.lmkan_gen.frozen_forward.default
_forward_kernel = _forward_op._op  # without what operators do in Python before they are called
_grad_input_op = torch.ops.lmkan_gen.frozen_grad_input.default


def frozen_lmkan(x: Tensor, values: Tensor, scales: Tensor | None, borders: Tensor) -> Tensor:
    """`lmkan_gen.lmkan` with a table that stays as it is.

    Args:
        x: ``[I, B]``, batch last, of any strides and any float dtype.
        values: the table, of one of the types in `FREEZABLE`, on the device of ``x``.
        scales: those of an int8 table, as `lmkan_gen.packing.quantise` gives them; None for others.
        borders: ``[G+1]``, the knots; float64 if ``x`` is, else float32.

    Returns:
        ``[O, B]``, of the dtype of ``x``; float32 under ``torch.autocast`` for its device.

    Raises:
        ValueError: shapes or devices do not belong together.
        TypeError: ``x`` is no float, or ``borders`` has another dtype than described.
    """
    if x.dtype is torch.float32 and runs_eagerly(x, values, borders):
        if torch.is_grad_enabled() and (x.requires_grad or values.requires_grad):
            y: Tensor = _Forward.apply(x, values, scales, borders)  # type: ignore[attr-defined]
            return y
        computed: Tensor = directly(_forward_kernel, x, values, scales, borders)
        return computed
    wanted = torch.float32 if autocasts(x) else x.dtype
    if x.dtype in HALVES:
        x = x.float()
    y = _forward_op(x, values, scales, beside(values, borders))
    return y if y.dtype == wanted else y.to(wanted)


def _check(x: Tensor, values: Tensor, scales: Tensor | None, borders: Tensor) -> None:
    """Refuse tensors that do not belong together: kernels trust these sizes."""
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x has dtype {x.dtype}; frozen tables work on float inputs")
    if borders.dtype != x.dtype:
        raise TypeError(f"borders has dtype {borders.dtype}, x has {x.dtype}: they must agree")
    for name, tensor in {"values": values, "borders": borders}.items():
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x is on {x.device}: move both to one device")
    side = borders.shape[0]
    if values.dim() != 4 or tuple(values.shape[:2]) != (side, side):
        raise ValueError(f"values must be {[side, side]} x outputs x pairs, got {list(values.shape)}")
    if values.dtype not in (*FREEZABLE, torch.float64) or (
        values.dtype == torch.float64 and x.dtype != torch.float64
    ):
        raise TypeError(f"values has dtype {values.dtype}; frozen tables are one of {FREEZABLE_NAMES}")
    groups, outputs = -(-values.shape[3] // packing.SCALE_PAIRS), values.shape[2]
    of_int8 = values.dtype == torch.int8
    if of_int8 and (
        scales is None
        or scales.dtype != torch.float32
        or tuple(scales.shape) != (groups, outputs)
        or scales.device != x.device
    ):
        raise ValueError(f"int8 tables need float32 scales of shape {[groups, outputs]} on {x.device}")
    if scales is not None and not of_int8:
        raise ValueError(f"scales belong to int8 tables, values has dtype {values.dtype}")
    check_inputs(x, values.shape[3])


def _check_grad(grad: Tensor, x: Tensor, values: Tensor, borders: Tensor) -> None:
    if values.dtype == torch.int8:
        raise ValueError("int8 tables have no gradient; values must be float16, bfloat16 or float32")
    if grad.dim() != 2 or grad.dtype != x.dtype or grad.device != x.device or grad.shape[1] != x.shape[1]:
        raise ValueError(
            f"grad must be [outputs, batch] = [outputs, {x.shape[1]}] {x.dtype} on {x.device}, "
            f"got {list(grad.shape)} {grad.dtype} on {grad.device}"
        )
    _check(x, values, None, borders)


def _execute(operation: Operation, buffers: dict[str, Tensor], values: Tensor, scales: Tensor | None) -> None:
    x, outputs, grids = buffers["x"], values.shape[2], values.shape[0] - 1
    table = RoundedTable(values.contiguous(), None if scales is None else scales.contiguous())
    shape = LayerShape(x.shape[0], outputs, grids, x.shape[1])
    call = Call(operation, shape, x.device, table=table.dtype, constant=True)
    dispatch.execute(call, buffers, table, forms_of(values))


def _forward(x: Tensor, values: Tensor, scales: Tensor | None, borders: Tensor) -> Tensor:
    _check(x, values, scales, borders)
    y = x.new_empty((values.shape[2], x.shape[1]))
    if x.dtype == torch.float64:
        reference.forward(x, RoundedTable(values, scales).to(x.dtype), borders, y)
    else:
        _execute(Operation.FORWARD, {"x": x, "borders": borders.contiguous(), "y": y}, values, scales)
    return y


def _forward_fake(x: Tensor, values: Tensor, scales: Tensor | None, borders: Tensor) -> Tensor:
    _check(x, values, scales, borders)
    return x.new_empty((values.shape[2], x.shape[1]))


def _grad_input(grad: Tensor, x: Tensor, values: Tensor, borders: Tensor) -> Tensor:
    _check_grad(grad, x, values, borders)
    grad_x = torch.empty_like(x)
    if x.dtype == torch.float64:
        reference.grad_input(grad, x, values.to(x.dtype), borders, grad_x)
    else:
        buffers = {"grad": grad, "x": x, "borders": borders.contiguous(), "grad_x": grad_x}
        _execute(Operation.GRAD_INPUT, buffers, values, None)
    return grad_x


def _grad_input_fake(grad: Tensor, x: Tensor, values: Tensor, borders: Tensor) -> Tensor:
    _check_grad(grad, x, values, borders)
    return torch.empty_like(x)


class _Forward(Differentiable):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, scales: Tensor | None, borders: Tensor) -> Tensor:
        refuse_gradient(ctx.needs_input_grad[1])
        ctx.save_for_backward(x, values, borders)
        ctx.save_for_forward(x, values, borders)
        y: Tensor = below_autograd(_forward_op, x, values, scales, borders)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values, borders = ctx.saved_tensors
        refuse_int8(values)
        return _grad_input_op(grad, x, values, borders), None, None, None

    @staticmethod
    def jvp(ctx: Any, v_x: Tensor, *_: Any) -> Tensor:
        with primals(ctx.saved_tensors) as (x, values, borders):
            assert x is not None
            assert values is not None
            refuse_int8(values)
            along: Tensor = torch.ops.lmkan_gen.tangent.default(v_x, x, values.to(x.dtype), borders)
        return along


class _GradInput(Differentiable):
    @staticmethod
    def forward(ctx: Any, *arguments: Tensor) -> Tensor:
        grad_x: Tensor = below_autograd(_grad_input_op, *arguments)
        return grad_x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(ONCE)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(ONCE)


ONCE = "a frozen lmKAN layer is differentiable once; call unfreeze() for second derivatives"


def refuse_int8(values: Tensor) -> None:
    """Raise RuntimeError where a derivative is computed, not before, if the table is int8."""
    if values.dtype == torch.int8:
        raise RuntimeError(
            "int8 tables are for inference and have no derivatives: freeze with float16 or bfloat16, or "
            "unfreeze the layer"
        )


def refuse_gradient(of_values: bool) -> None:
    """Raise RuntimeError if a call wants a gradient of a frozen table's values."""
    if of_values:
        raise RuntimeError("a frozen table has no gradient; call unfreeze() to train the layer")


register(
    _LIBRARY,
    "frozen_forward",
    _forward,
    _forward_fake,
    _Forward,
    longer_batch(_forward_op, (0,), lambda *_: True),
)
register(
    _LIBRARY,
    "frozen_grad_input",
    _grad_input,
    _grad_input_fake,
    _GradInput,
    longer_batch(_grad_input_op, (0, 1), lambda *_: True),
)


class FrozenTable(nn.Module):
    """A layer's table, declared constant.

    Its buffers are all that a state dict holds: each coefficient once, in its type. Other orders of it that
    kernels read are kept beside it. They are made anew when a buffer is replaced or written to; only writes
    through ``.data`` or by a kernel of one's own, which torch does not count, need `forget`.

    Attributes:
        values: buffer ``[G+1, G+1, O, P]`` of a type in `FREEZABLE` (float64 after ``double()``).
        scales: buffer ``[ceil(P/8), O]``, float32, for int8, else None.
    """

    values: Tensor
    scales: Tensor | None

    def __init__(self, table: RoundedTable) -> None:
        super().__init__()
        self.register_buffer("values", table.values)
        self.register_buffer("scales", table.scales)
        self._remember()

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None]:
        """``values`` and ``scales``, for `frozen_lmkan`; their forms are kept from then on."""
        buffers = self._buffers
        values, scales = buffers["values"], buffers["scales"]
        assert values is not None
        if not torch.compiler.is_compiling():
            keep_forms(values, scales)
        return values, scales

    @property
    def table(self) -> RoundedTable:
        """The same in one."""
        return RoundedTable(*self.tensors)

    def forward(self, x: Tensor, borders: Tensor) -> Tensor:
        """`frozen_lmkan` with this table; called as a module, so that hooks can bring its buffers."""
        return frozen_lmkan(x, *self.tensors, borders)

    def forget(self) -> None:
        """Make what kernels read anew at the next call, after a write that torch did not count."""
        self.values = self.values.detach().clone()

    def is_as_made(self) -> bool:
        """Whether the values are those that the module was made with, as far as torch tells."""
        return self._made == _identities(self.table)

    def extra_repr(self) -> str:
        """Type and size."""
        nbytes = self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)
        return f"{str(self.values.dtype).removeprefix('torch.')}, {nbytes} bytes"

    def _remember(self) -> None:
        self._made = _identities(self.table)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        as_made, scales = self.is_as_made(), self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if scales is not None and self.scales is not None and self.scales.dtype != torch.float32:
            self.scales = scales.to(self.scales.device)  # they belong to the integers: never rounded
        if as_made:
            self._remember()
        return self


def _identities(table: RoundedTable) -> list[tuple[int, int]]:
    tensors = [t for t in (table.values, table.scales) if t is not None]
    return [(id(t), 0 if t.is_inference() else t._version) for t in tensors]
