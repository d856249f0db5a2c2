"""Packed tables as torch operators and as a module: what a frozen layer computes with.

``torch.ops.lmkan_gen.packed_forward`` and ``packed_grad_input`` read a `lmkan_gen.packing.PackedTable`. They
have fake implementations like those of `lmkan_gen.ops`. A packed table has no gradient, the inputs do
(once), but not with int8, which is for inference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lmkan_gen import dispatch, packing
from lmkan_gen.families import Demand
from lmkan_gen.ops import check_inputs
from lmkan_gen.packing import PackedTable
from lmkan_gen.problem import LayerShape, Operation, TableDtype

#: element types that tables can be frozen to
NARROW = {
    torch.float16: TableDtype.FLOAT16,
    torch.bfloat16: TableDtype.BFLOAT16,
    torch.int8: TableDtype.INT8,
}

_LIBRARY = torch.library.Library("lmkan_gen", "FRAGMENT")
_LIBRARY.define(
    "packed_forward(Tensor x, Tensor words, Tensor? scales, Tensor borders, int outputs, str table_dtype) "
    "-> Tensor"
)
_LIBRARY.define(
    "packed_grad_input(Tensor grad, Tensor x, Tensor words, Tensor borders, str table_dtype) -> Tensor"
)
_forward_op = torch.ops.lmkan_gen.packed_forward.default
_grad_input_op = torch.ops.lmkan_gen.packed_grad_input.default


def packed_lmkan(x: Tensor, table: PackedTable, borders: Tensor) -> Tensor:
    """`lmkan_gen.lmkan` with a packed table.

    Args:
        x: float32 ``[I, B]``, batch last, of any strides; any float dtype under ``torch.autocast`` for CUDA.
        table: as `lmkan_gen.packing.pack` gives it, on the device of ``x``.
        borders: float32 ``[G+1]``, the knots.

    Returns:
        float32 ``[O, B]``.

    Raises:
        ValueError: shapes or devices do not belong together.
        TypeError: ``x`` or ``borders`` is not float32.
    """
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        x = x.float()
    y: Tensor = _forward_op(x, table.words, table.scales, borders, table.outputs, str(table.dtype))
    return y


def _check(
    x: Tensor, words: Tensor, scales: Tensor | None, borders: Tensor, outputs: int, dtype: str
) -> None:
    """Refuse tensors that do not belong together: kernels trust these sizes."""
    for name, tensor in {"x": x, "borders": borders}.items():
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name} has dtype {tensor.dtype}; packed tables work on float32 inputs")
    for name, tensor in {"words": words, "borders": borders}.items():
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x is on {x.device}: move both to one device")
    if words.dim() != 4 or words.dtype != torch.int32:
        raise ValueError(f"words must be int32 with 4 dimensions, got {words.dtype} {list(words.shape)}")
    narrow, side, pairs = TableDtype(dtype), borders.shape[0], words.shape[3]
    of_cells = narrow is TableDtype.INT8
    rows, width = (side - 1, outputs) if of_cells else (side, -(-outputs // 2))
    if tuple(words.shape) != (rows, rows, width, pairs):
        raise ValueError(
            f"words must be {[rows, rows, width, pairs]} for {outputs} outputs, {side} borders and {dtype}, "
            f"got {list(words.shape)}"
        )
    groups = -(-pairs // packing.SCALE_PAIRS)
    if of_cells and (
        scales is None
        or scales.dtype != torch.float32
        or tuple(scales.shape) != (groups, outputs)
        or scales.device != x.device
    ):
        raise ValueError(f"int8 tables need float32 scales of shape {[groups, outputs]} on {x.device}")
    check_inputs(x, words.shape[3])


def _check_grad(grad: Tensor, x: Tensor, words: Tensor, borders: Tensor, dtype: str) -> None:
    if dtype == TableDtype.INT8:
        raise ValueError("int8 tables have no gradient; table_dtype must be float16 or bfloat16")
    if grad.dim() != 2 or grad.dtype != x.dtype or grad.device != x.device or grad.shape[1] != x.shape[1]:
        raise ValueError(
            f"grad must be [outputs, batch] = [outputs, {x.shape[1]}] {x.dtype} on {x.device}, "
            f"got {list(grad.shape)} {grad.dtype} on {grad.device}"
        )
    _check(x, words, None, borders, grad.shape[0], dtype)


def _shape(x: Tensor, outputs: int, borders: Tensor) -> LayerShape:
    return LayerShape(x.shape[0], outputs, borders.shape[0] - 1, x.shape[1])


def _forward(
    x: Tensor, words: Tensor, scales: Tensor | None, borders: Tensor, outputs: int, table_dtype: str
) -> Tensor:
    _check(x, words, scales, borders, outputs, table_dtype)
    words, scales = words.contiguous(), None if scales is None else scales.contiguous()
    table = PackedTable(TableDtype(table_dtype), outputs, words, scales)
    shape = _shape(x, outputs, borders)
    y = x.new_empty((outputs, shape.batch))
    buffers = {"x": x, "borders": borders, "y": y}
    dispatch.execute(Operation.FORWARD, shape, x.device, Demand(), buffers, table.dtype, table)
    return y


def _forward_fake(
    x: Tensor, words: Tensor, scales: Tensor | None, borders: Tensor, outputs: int, table_dtype: str
) -> Tensor:
    _check(x, words, scales, borders, outputs, table_dtype)
    return x.new_empty((outputs, x.shape[1]))


def _grad_input(grad: Tensor, x: Tensor, words: Tensor, borders: Tensor, table_dtype: str) -> Tensor:
    _check_grad(grad, x, words, borders, table_dtype)
    table = PackedTable(TableDtype(table_dtype), grad.shape[0], words.contiguous())
    shape = _shape(x, table.outputs, borders)
    grad_x = torch.empty_like(x)
    buffers = {"grad": grad, "x": x, "borders": borders, "grad_x": grad_x}
    dispatch.execute(Operation.GRAD_INPUT, shape, x.device, Demand(), buffers, table.dtype, table)
    return grad_x


def _grad_input_fake(grad: Tensor, x: Tensor, words: Tensor, borders: Tensor, table_dtype: str) -> Tensor:
    _check_grad(grad, x, words, borders, table_dtype)
    return torch.empty_like(x)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        words: Tensor,
        scales: Tensor | None,
        borders: Tensor,
        outputs: int,
        table_dtype: str,
    ) -> Tensor:
        if table_dtype == TableDtype.INT8:
            raise RuntimeError(
                "x requires a gradient, but int8 tables are for inference: use torch.no_grad(), "
                "freeze with float16 or bfloat16, or unfreeze the layer"
            )
        ctx.save_for_backward(x, words, borders)
        ctx.table_dtype = table_dtype
        with torch._C._AutoDispatchBelowAutograd():
            y: Tensor = _forward_op(x, words, scales, borders, outputs, table_dtype)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, words, borders = ctx.saved_tensors
        return _grad_input_op(grad, x, words, borders, ctx.table_dtype), *(None,) * 5


def _differentiable(*arguments: Any) -> Any:
    if torch.is_grad_enabled() and arguments[0].requires_grad:
        return _Forward.apply(*arguments)  # type: ignore[no-untyped-call]
    with torch._C._AutoDispatchBelowAutograd():
        return _forward_op(*arguments)


_LIBRARY.impl("packed_forward", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("packed_forward", _differentiable, "Autograd")
_LIBRARY.impl("packed_grad_input", _grad_input, "CompositeExplicitAutograd")
torch.library.register_fake("lmkan_gen::packed_forward", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("lmkan_gen::packed_grad_input", _grad_input_fake, lib=_LIBRARY)


class FrozenTable(nn.Module):
    """A layer's table, packed.

    Its state dict holds each coefficient once, in its narrow type: ``values`` ``[G+1, G+1, O, P]``, and for
    int8 ``scales``.

    Attributes:
        dtype: element type of the coefficients.
        words: buffer, what kernels read.
        scales: buffer for int8, else None.
    """

    words: Tensor
    scales: Tensor | None

    def __init__(self, table: PackedTable) -> None:
        super().__init__()
        self.dtype = table.dtype
        self.outputs = table.outputs
        self.register_buffer("words", table.words, persistent=False)
        self.register_buffer("scales", table.scales, persistent=False)

    @classmethod
    def of_values(cls, values: Tensor, scales: Tensor | None) -> FrozenTable:
        """The module of which ``values`` and ``scales`` are the state.

        Raises:
            ValueError: they are not of a narrow type, or scales are missing or not wanted.
        """
        dtype = NARROW.get(values.dtype)
        if dtype is None or values.dim() != 4 or (scales is None) == (dtype is TableDtype.INT8):
            raise ValueError(
                f"a frozen table is float16 or bfloat16, or int8 with scales, of 4 dimensions; "
                f"got {values.dtype} {list(values.shape)} {'without' if scales is None else 'with'} scales"
            )
        words = packing.cells(values) if dtype is TableDtype.INT8 else packing.interleave(values)
        return cls(PackedTable(dtype, values.shape[2], words, scales))

    @property
    def packed(self) -> PackedTable:
        """The table for `packed_lmkan`."""
        return PackedTable(self.dtype, self.outputs, self.words, self.scales)

    def values(self) -> Tensor:
        """The coefficients ``[G+1, G+1, O, P]`` in their narrow type."""
        if self.dtype is TableDtype.INT8:
            return packing.corners(self.words)
        return packing.deinterleave(self.words, self.dtype, self.outputs)

    def extra_repr(self) -> str:
        """Type and size."""
        return f"{self.dtype}, {self.packed.nbytes} bytes"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}values"] = self.values()
        if self.scales is not None:
            destination[f"{prefix}scales"] = self.scales if keep_vars else self.scales.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Loading is the layer's business: the type may change."""
