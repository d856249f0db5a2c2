"""Narrow tables: what kernels read in place of the float32 parameter.

========  =======================================================================================
float16,  ``words`` int32 ``[G+1, G+1, ceil(O/2), P]``: outputs ``2k`` and ``2k+1`` in the lower and
bfloat16  upper half
int8      ``words`` int32 ``[G, G, O, P]``: the four corners of a cell, ``c00, c01, c10, c11`` from the
          lowest byte up, in units of ``scales`` float32 ``[ceil(P/8), O]``
========  =======================================================================================

A `RoundedTable` holds the same coefficients in the order of the parameter. Kernels read it in *forms*, other
orders of it, some of which are arranged for the tile of one kernel. `arranged` makes the forms that a launch
plan reads, and keeps them only where it is given `Forms` (see `lmkan_gen.forms`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Self

import torch
from torch import Tensor

from lmkan_gen.forms import Forms
from lmkan_gen.problem import TableDtype

#: neighbouring input pairs that share an int8 scale (per output)
SCALE_PAIRS = 8
_LARGEST = 127
#: of a weight of int8 tables, which are 16-bit integers
WEIGHT_ONE = 512
_BANKS = 32  # of shared memory
#: what launch plans call the scales that belong to `Rows`: float32 ``[ceil(P/8), pitch]``
ROW_SCALES = "row_scales"
#: what launch plans call the scales that belong to `fragments`
FRAGMENT_SCALES = "fragment_scales"
#: outputs and pairs that lie together in `fragments`
_FRAGMENT_OUTPUTS, _FRAGMENT_PAIRS = 32, 16
_HALF = {TableDtype.FLOAT16: torch.float16, TableDtype.BFLOAT16: torch.bfloat16}
#: what torch calls the element types of tables
TORCH_DTYPES = {TableDtype.FLOAT32: torch.float32, TableDtype.INT8: torch.int8, **_HALF}


def table_dtype(dtype: torch.dtype) -> TableDtype:
    """What kernels call an element type.

    Raises:
        ValueError: tables have no such elements.
    """
    return TableDtype(str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class PackedTable:
    """A narrow table in the layout that kernels for ``dtype`` read; ``scales`` only for int8."""

    dtype: TableDtype
    outputs: int
    words: Tensor
    scales: Tensor | None = None

    def buffers(self) -> dict[str, Tensor]:
        """The parts by the names that launch plans know them by."""
        return {"words": self.words} if self.scales is None else {"words": self.words, "scales": self.scales}


@dataclass(frozen=True)
class RoundedTable:
    """A table in the type that kernels are to compute with, in the order of the parameter.

    Attributes:
        values: ``[G+1, G+1, O, P]``, float32, float16, bfloat16 or int8.
        scales: float32 ``[ceil(P/8), O]`` for int8 (see `quantise`), else None.
    """

    values: Tensor
    scales: Tensor | None = None

    @property
    def dtype(self) -> TableDtype:
        """The element type."""
        return table_dtype(self.values.dtype)

    def to(self, dtype: torch.dtype) -> Tensor:
        """The coefficients ``[G+1, G+1, O, P]``, in a floating-point type."""
        if self.scales is None:
            return self.values.to(dtype)
        return dequantise(self.values, self.scales).to(dtype)

    def packed(self) -> PackedTable:
        """In the layout of narrow kernels.

        Raises:
            ValueError: the table is not narrow.
        """
        outputs = self.values.shape[2]
        if self.dtype is TableDtype.INT8:
            return PackedTable(self.dtype, outputs, cells(self.values), self.scales)
        _half(self.dtype)
        return PackedTable(self.dtype, outputs, interleave(self.values))


def round_table(table: Tensor, dtype: TableDtype) -> RoundedTable:
    """Round a table, or leave it as it is where it has that type.

    Args:
        table: float ``[G+1, G+1, O, P]``.
        dtype: of the result.

    Raises:
        ValueError: int8 is asked for and the table holds infinities or NaN, for which there is no scale.
    """
    if dtype is TableDtype.INT8:
        return RoundedTable(*quantise(table))
    return RoundedTable(table.to(TORCH_DTYPES[dtype]))


def pack(table: Tensor, dtype: TableDtype) -> PackedTable:
    """`round_table`, in the layout of narrow kernels.

    Raises:
        ValueError: ``dtype`` is not a narrow one, or as `round_table`.
    """
    return round_table(table, dtype).packed()


def unpack(packed: PackedTable) -> Tensor:
    """The float32 table ``[G+1, G+1, O, P]`` that kernels for ``packed`` compute with."""
    if packed.dtype is TableDtype.INT8:
        assert packed.scales is not None
        return dequantise(corners(packed.words), packed.scales)
    return deinterleave(packed.words, packed.dtype, packed.outputs).float()


def quantise(table: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients as int8 ``[G+1, G+1, O, P]`` with float32 scales ``[ceil(P/8), O]``.

    A scale makes the largest coefficient of 8 neighbouring pairs of an output 127. Extrapolation needs no
    larger range: it is in the weights.

    Raises:
        ValueError: the table holds infinities or NaN.
    """
    pairs = table.shape[3]
    largest = table.detach().abs().amax((0, 1)).float()
    # meta and fake tensors have no values to look at
    if type(table.data) is Tensor and not table.is_meta and not bool(largest.isfinite().all()):
        raise ValueError("table holds infinities or NaN: no scale makes int8 of them")
    groups = -(-pairs // SCALE_PAIRS)
    padded = torch.nn.functional.pad(largest, (0, groups * SCALE_PAIRS - pairs))
    scales = padded.view(-1, groups, SCALE_PAIRS).amax(2) / _LARGEST
    scales = torch.where(scales > 0, scales, 1.0).T.contiguous()
    return (table.detach() / _spread(scales, pairs)).round().to(torch.int8), scales


def dequantise(values: Tensor, scales: Tensor) -> Tensor:
    """The float32 table of `quantise`'s results."""
    return values.float() * _spread(scales, values.shape[3])


def _spread(scales: Tensor, pairs: int) -> Tensor:
    """Scales as ``[O, P]``."""
    return scales.T.repeat_interleave(SCALE_PAIRS, dim=1)[:, :pairs]


def cells(values: Tensor) -> Tensor:
    """Words of cells out of int8 coefficients ``[G+1, G+1, O, P]``."""
    parts = (values[:-1, :-1], values[:-1, 1:], values[1:, :-1], values[1:, 1:])
    return torch.stack(parts, dim=-1).view(torch.int32).squeeze(-1)


def corners(words: Tensor) -> Tensor:
    """The inverse of `cells`."""
    of_cells = words.unsqueeze(-1).view(torch.int8)
    grids = words.shape[0]
    values = of_cells.new_empty((grids + 1, grids + 1, *words.shape[2:]))
    for byte, (i, j) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        values[i : i + grids, j : j + grids] = of_cells[..., byte]
    return values


def interleave(table: Tensor) -> Tensor:
    """Words of two neighbouring outputs out of 16-bit coefficients ``[G+1, G+1, O, P]``."""
    if table.shape[2] % 2:
        table = torch.nn.functional.pad(table, (0, 0, 0, 1))
    return torch.stack((table[:, :, ::2], table[:, :, 1::2]), dim=-1).view(torch.int32).squeeze(-1)


def deinterleave(words: Tensor, dtype: TableDtype, outputs: int) -> Tensor:
    """The inverse of `interleave`: 16-bit coefficients ``[G+1, G+1, O, P]``."""
    halves = words.unsqueeze(-1).view(_half(dtype))
    table: Tensor = halves.transpose(3, 4).flatten(2, 3)[:, :, :outputs]
    return table.contiguous()


def _half(dtype: TableDtype) -> torch.dtype:
    if dtype not in _HALF:
        raise ValueError(f"table dtype {dtype} is not packed; narrow ones are float16, bfloat16 and int8")
    return _HALF[dtype]


def row_pitch(outputs: int) -> int:
    """Values from one row of `rows` to the next: whole 16-byte words of float32."""
    return -(-outputs // 4) * 4


class Rows(str):
    """What launch plans call a table in the layout of `rows`, in its type: a name that knows the pitch.

    Attributes:
        pitch: values from one row to the next.
    """

    pitch: int

    def __new__(cls, pitch: int) -> Self:
        """The name for a pitch."""
        name = super().__new__(cls, f"rows_{pitch}")
        name.pitch = pitch
        return name


def rows(table: Tensor, pitch: int) -> Tensor:
    """A table ``[G+1, G+1, O, P]`` with its outputs together: ``[P, G+1, G+1, pitch]``, zeros behind them."""
    by_pair = table.permute(3, 0, 1, 2)
    return torch.nn.functional.pad(by_pair, (0, pitch - table.shape[2])).contiguous()


class Stages(str):
    """What launch plans call a table in the layout of `stages`: a name that knows the tile.

    Attributes:
        pairs: input pairs in a tile.
        words: words in a tile.
        vector: neighbouring words among them that are read together.
    """

    pairs: int
    words: int
    vector: int

    def __new__(cls, pairs: int, words: int, vector: int) -> Self:
        """The name for a tile."""
        name = super().__new__(cls, f"stages_{pairs}_{words}_{vector}")
        name.pairs, name.words, name.vector = pairs, words, vector
        return name


def stages(words: Tensor, scales: Tensor | None, pairs: int, width: int, vector: int) -> Tensor:
    """A table in the order in which kernels stream it: tile by tile.

    Args:
        words: 32-bit words ``[rows, rows, W, P]``: a float32 table, or the words of a packed one.
        scales: those of an int8 table, ``[ceil(P/8), O]``.
        pairs: input pairs in a tile; at most 8 where there are scales.
        width: words in a tile.
        vector: neighbouring words among them that are read together.

    Returns:
        int32 ``[ceil(W/width), ceil(P/pairs), K + S]``, zeros beyond the edges; ``K`` is
        ``rows * rows * width * pairs`` up to the next multiple of 32, ``S`` 0, or the multiple of 32 that has
        room for the scales of the tile's outputs.
    """

    flat = words.detach().flatten(0, 1).view(torch.int32)
    pad = (0, -flat.shape[2] % pairs, 0, -flat.shape[1] % width)
    tiles = torch.nn.functional.pad(flat, pad).unflatten(2, (-1, pairs)).unflatten(1, (-1, width))
    tiles = tiles.permute(1, 3, 0, 2, 4).unflatten(3, (-1, vector)).transpose(4, 5).flatten(2)
    tiles = torch.nn.functional.pad(tiles, (0, -tiles.shape[2] % _BANKS))
    if scales is None:
        in_order: Tensor = tiles.contiguous()
        return in_order
    # int8 weights are in units of 1/512: see `narrow.cuh.j2`
    groups = torch.arange(tiles.shape[1], device=words.device) * pairs // SCALE_PAIRS
    padded = torch.nn.functional.pad(scales / WEIGHT_ONE, (0, pad[3]))[groups]
    of_tiles = padded.unflatten(1, (-1, width)).transpose(0, 1)
    of_tiles = torch.nn.functional.pad(of_tiles, (0, -width % _BANKS)).contiguous().view(torch.int32)
    return torch.cat((tiles, of_tiles), dim=2)


class Fragments(str):
    """What launch plans call a table in the layout of `fragments`: a name that knows its parts.

    Attributes:
        pairs: input pairs in a part.
    """

    pairs: int

    def __new__(cls, pairs: int) -> Self:
        """The name for parts of some size."""
        name = super().__new__(cls, f"fragments_{pairs}")
        name.pairs = pairs
        return name


def fragments(values: Tensor, scales: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """An int8 table in the order in which lanes of tensor cores need it, a byte a coefficient.

    Args:
        values: int8 ``[G+1, G+1, O, P]``.
        scales: float32 ``[ceil(P/8), O]``.
        pairs: input pairs in a part, ``16 H``.

    Returns:
        uint8 ``[ceil(O/32), ceil(P/pairs), 1 + (G+1)^2, H, 32, 16]``, and float32 ``[O]``: the largest scale
        of each output. Lane ``4 g + t`` has in byte ``4 w + p`` the coefficient of output ``g + 8 w`` and
        pair ``4 t + p`` plus 128, beyond the edges that of zero. Before the knots it has for each ``w`` two
        float16 numbers, ``r`` and ``-128 2^-24 r``, with ``r`` 2^15 times the scale in units of the largest:
        a byte read as a float16 number is 2^-24 of it, so that one multiplication and addition makes the
        coefficient, in units of the largest scale, times 2^-9.
    """
    halves = pairs // _FRAGMENT_PAIRS
    values = values.flatten(0, 1)
    knots, outputs, all_pairs = values.shape
    blocks, parts = -(-outputs // _FRAGMENT_OUTPUTS), -(-all_pairs // pairs)
    made = values.new_empty((blocks, parts, 1 + knots, halves, 8, 4, 4, 4), dtype=torch.uint8)
    edges = (0, parts * pairs - all_pairs, 0, blocks * _FRAGMENT_OUTPUTS - outputs)
    padded = torch.nn.functional.pad(values, edges).view(torch.uint8).bitwise_xor(128)
    of_lanes = padded.view(knots, blocks, 4, 8, parts, halves, 4, 4)
    made[:, :, 1:] = of_lanes.permute(1, 4, 0, 5, 3, 6, 2, 7)

    largest = scales.amax(0)
    factors = (scales / largest * 2.0**15).half()
    both = torch.stack((factors, (factors * -(2.0**-17))), dim=-1).view(torch.int32).squeeze(-1)
    groups = parts * pairs // SCALE_PAIRS
    both = torch.nn.functional.pad(both, (0, edges[3], 0, groups - len(scales)))
    of_groups = both.view(parts, halves, 2, blocks, 4, 8).permute(3, 0, 1, 5, 2, 4)
    made[:, :, 0] = of_groups.repeat_interleave(2, dim=4).unsqueeze(-1).view(torch.uint8)
    return made.flatten(4, 5).flatten(5, 6), largest


class _Source:
    """A table as it is given, and what is made of it on the way to the forms that are read; nothing twice."""

    def __init__(
        self, buffers: Mapping[str, Tensor], dtype: TableDtype, rounded: RoundedTable | None
    ) -> None:
        self._buffers = buffers
        self._dtype = dtype
        self._rounded = rounded

    @cached_property
    def table(self) -> Tensor:
        """In float32."""
        if self._rounded is None:
            return self._buffers["table"]
        return self._rounded.to(torch.float32).contiguous()

    @cached_property
    def rounded(self) -> RoundedTable:
        """In the type that kernels read."""
        if self._rounded is not None and self._rounded.dtype is self._dtype:
            return self._rounded
        return round_table(self.table, self._dtype)

    @cached_property
    def packed(self) -> Mapping[str, Tensor]:
        """``words``, and ``scales`` for int8."""
        return self._buffers if "words" in self._buffers else self.rounded.packed().buffers()

    def form(self, name: str) -> dict[str, Tensor]:
        """A form by its name, with what belongs to it."""
        if name == "table":
            return {name: self.table}
        if name == "rows":
            return {name: rows(self.rounded.values, row_pitch(self.rounded.values.shape[2]))}
        if name == "words":
            return dict(self.packed)
        if isinstance(name, Rows):
            scales = self.rounded.scales
            of_rows: dict[str, Tensor] = {name: rows(self.rounded.values, name.pitch)}
            if scales is not None:
                of_rows[ROW_SCALES] = torch.nn.functional.pad(scales, (0, name.pitch - scales.shape[1]))
            return of_rows
        if isinstance(name, Stages):
            tile = (name.pairs, name.words, name.vector)
            if self._dtype is TableDtype.FLOAT32:
                return {name: stages(self.table, None, *tile)}
            return {name: stages(self.packed["words"], self.packed.get("scales"), *tile)}
        assert isinstance(name, Fragments)
        packed = self.packed
        values = corners(packed["words"]) if "words" in self._buffers else self.rounded.values
        made, largest = fragments(values, packed["scales"], name.pairs)
        return {name: made, FRAGMENT_SCALES: largest}


def _is_form(name: str) -> bool:
    return name in ("table", "rows", "words") or isinstance(name, (Rows, Stages, Fragments))


def arranged(
    buffers: Mapping[str, Tensor],
    reads: Collection[str],
    dtype: TableDtype,
    rounded: RoundedTable | None = None,
    forms: Forms | None = None,
) -> Mapping[str, Tensor]:
    """``buffers`` with the table in those of its forms that will be read: see `lmkan_gen.plan.LaunchPlan`.

    Args:
        buffers: tensors by the names of `lmkan_gen.plan.LaunchPlan`. Without ``rounded`` they hold ``table``,
            and may hold forms of it.
        reads: names of buffers that will be read.
        dtype: element type of the forms other than ``table``.
        rounded: the table, in place of one among the buffers.
        forms: where forms of this very table are kept; None: they are made for this call.

    Raises:
        ValueError: as `round_table`.
    """
    missing = [name for name in reads if name not in buffers and _is_form(name)]
    if not missing:
        return buffers
    source = _Source(buffers, dtype, rounded)
    found = dict(buffers)
    for name in missing:
        make = partial(source.form, name)
        found |= make() if forms is None else forms.get(f"{name} {dtype}", make)
    return found
