"""Narrow tables: what kernels read in place of the float32 parameter.

========  =======================================================================================
float16,  ``words`` int32 ``[G+1, G+1, ceil(O/2), P]``: outputs ``2k`` and ``2k+1`` in the lower and
bfloat16  upper half
int8      ``words`` int32 ``[G, G, O, P]``: the four corners of a cell, ``c00, c01, c10, c11`` from the
          lowest byte up, in units of ``scales`` float32 ``[ceil(P/8), O]``
========  =======================================================================================

The layouts are the same for all kernels, so that a packed table outlives the choice of one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from lmkan_gen.problem import TableDtype

#: neighbouring input pairs that share an int8 scale (per output)
SCALE_PAIRS = 8
_LARGEST = 127
#: of a weight of int8 tables, which are 16-bit integers
WEIGHT_ONE = 512
_BANKS = 32  # of shared memory
T = TypeVar("T")
_STREAMED = "stages_"
_FRAGMENTS = "fragments_"
#: what launch plans call the scales that belong to `fragments`
FRAGMENT_SCALES = "fragment_scales"
#: outputs and pairs that lie together in `fragments`
_FRAGMENT_OUTPUTS, _FRAGMENT_PAIRS = 32, 16
_HALF = {TableDtype.FLOAT16: torch.float16, TableDtype.BFLOAT16: torch.bfloat16}


@dataclass(frozen=True)
class PackedTable:
    """A table in the layout that kernels for ``dtype`` read; ``scales`` only for int8."""

    dtype: TableDtype
    outputs: int
    words: Tensor
    scales: Tensor | None = None

    def buffers(self) -> dict[str, Tensor]:
        """The parts by the names that launch plans know them by."""
        return {"words": self.words} if self.scales is None else {"words": self.words, "scales": self.scales}

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return self.words.nbytes + (0 if self.scales is None else self.scales.nbytes)


def pack(table: Tensor, dtype: TableDtype) -> PackedTable:
    """Round a table.

    Args:
        table: float ``[G+1, G+1, O, P]``.
        dtype: float16, bfloat16 or int8.

    Raises:
        ValueError: ``dtype`` is not a narrow one, or int8 is asked for and the table holds infinities or NaN,
            for which there is no scale.
    """
    outputs = table.shape[2]
    if dtype is TableDtype.INT8:
        values, scales = quantise(table)
        return PackedTable(dtype, outputs, cells(values), scales)
    return PackedTable(dtype, outputs, interleave(table.to(_half(dtype))))


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
    if not bool(largest.isfinite().all()):
        raise ValueError("table holds infinities or NaN: no scale makes int8 of them")
    groups = -(-pairs // SCALE_PAIRS)
    padded = torch.nn.functional.pad(largest, (0, groups * SCALE_PAIRS - pairs))
    scales = padded.view(-1, groups, SCALE_PAIRS).amax(2) / _LARGEST
    scales = torch.where(scales > 0, scales, 1.0).T.contiguous()
    return (table.detach() / _spread(scales, pairs)).round_().to(torch.int8), scales


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


def rows(source: Tensor | PackedTable, dtype: TableDtype) -> Tensor:
    """A table with its outputs together: ``[P, G+1, G+1, row_pitch(O)]``, in float32, float16 or bfloat16.

    Done once for as long as ``source`` lives and is not written to, like `packed`.
    """
    if isinstance(source, PackedTable):
        outputs, key = source.outputs, source.words
    else:
        outputs, key = source.shape[2], source

    def arrange() -> Tensor:
        table = unpack(source) if isinstance(source, PackedTable) else source.detach()
        if dtype is not TableDtype.FLOAT32:
            table = table.to(_half(dtype))
        by_pair = table.permute(3, 0, 1, 2)
        return torch.nn.functional.pad(by_pair, (0, row_pitch(outputs) - outputs)).contiguous()

    return _once(key, f"rows {dtype}", arrange, fixed=isinstance(source, PackedTable))


def stages_name(pairs: int, words: int, vector: int) -> str:
    """What launch plans call a table in the layout of `stages`."""
    return f"{_STREAMED}{pairs}_{words}_{vector}"


def stages(
    words: Tensor, scales: Tensor | None, pairs: int, width: int, vector: int, fixed: bool = False
) -> Tensor:
    """A table in the order in which kernels stream it: tile by tile.

    Done once for as long as ``words`` lives and is not written to, like `packed`.

    Args:
        words: 32-bit words ``[rows, rows, W, P]``: a float32 table, or the words of a packed one.
        scales: those of an int8 table, ``[ceil(P/8), O]``.
        pairs: input pairs in a tile; at most 8 where there are scales.
        width: words in a tile.
        vector: neighbouring words among them that are read together.
        fixed: whether nobody will ever write to ``words``, so that a CUDA graph need not arrange them again.

    Returns:
        int32 ``[ceil(W/width), ceil(P/pairs), K + S]``, zeros beyond the edges; ``K`` is
        ``rows * rows * width * pairs`` up to the next multiple of 32, ``S`` 0, or the multiple of 32 that has
        room for the scales of the tile's outputs.
    """

    def arrange() -> Tensor:
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

    return _once(words, stages_name(pairs, width, vector), arrange, fixed)


def fragments_name(pairs: int) -> str:
    """What launch plans call a table in the layout of `fragments`."""
    return f"{_FRAGMENTS}{pairs}"


def fragments(words: Tensor, scales: Tensor, pairs: int, fixed: bool = False) -> tuple[Tensor, Tensor]:
    """An int8 table in the order in which lanes of tensor cores need it, a byte a coefficient.

    Done once for as long as ``words`` lives and is not written to, like `packed`.

    Args:
        words: int32 ``[G, G, O, P]``, cells of a packed table.
        scales: float32 ``[ceil(P/8), O]``.
        pairs: input pairs in a part, ``16 H``.
        fixed: as `stages` has it.

    Returns:
        uint8 ``[ceil(O/32), ceil(P/pairs), 1 + (G+1)^2, H, 32, 16]``, and float32 ``[O]``: the largest scale
        of each output. Lane ``4 g + t`` has in byte ``4 w + p`` the coefficient of output ``g + 8 w`` and
        pair ``4 t + p`` plus 128, beyond the edges that of zero. Before the knots it has for each ``w`` two
        float16 numbers, ``r`` and ``-128 2^-24 r``, with ``r`` 2^15 times the scale in units of the largest:
        a byte read as a float16 number is 2^-24 of it, so that one multiplication and addition makes the
        coefficient, in units of the largest scale, times 2^-9.
    """
    halves = pairs // _FRAGMENT_PAIRS

    def arrange() -> tuple[Tensor, Tensor]:
        values = corners(words).flatten(0, 1)
        knots, outputs, all_pairs = values.shape
        blocks, parts = -(-outputs // _FRAGMENT_OUTPUTS), -(-all_pairs // pairs)
        made = words.new_empty((blocks, parts, 1 + knots, halves, 8, 4, 4, 4), dtype=torch.uint8)
        edges = (0, parts * pairs - all_pairs, 0, blocks * _FRAGMENT_OUTPUTS - outputs)
        padded = torch.nn.functional.pad(values, edges).view(torch.uint8).bitwise_xor_(128)
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

    return _once(words, fragments_name(pairs), arrange, fixed)


def packed(table: Tensor, dtype: TableDtype) -> PackedTable:
    """`pack`, done once for as long as the table lives and is not written to.

    Writing is noticed by the tensor's version counter, as autograd does, and steps of optimisers by
    themselves, since fused ones do not count. What is written through ``.data`` escapes both, and so do
    replays of a CUDA graph. While a CUDA graph is captured packing is part of the graph, so that replays
    see new values.

    Raises:
        ValueError: as `pack`.
    """
    return _once(table, f"packed {dtype}", lambda: pack(table, dtype))


@dataclass(frozen=True)
class _Known:
    source: weakref.ref[Tensor]
    version: int
    made: Any


_known: dict[tuple[int, str], _Known] = {}


def _once(source: Tensor, what: str, make: Callable[[], T], fixed: bool = False) -> T:
    capturing = source.is_cuda and torch.cuda.is_current_stream_capturing()
    if source.is_inference() or (capturing and not fixed):
        return make()
    key = (id(source), what)
    known = _known.get(key)
    if known is None or known.source() is not source or known.version != source._version:
        if capturing:  # what is made now lives in the graph
            return make()
        known = _Known(weakref.ref(source, lambda _: _known.pop(key, None)), source._version, make())
        _known[key] = known
    made: T = known.made
    return made


def _forget_stepped(optimizer: Optimizer, *_: Any) -> None:
    """Fused optimisers write without moving the version counter."""
    if _known:
        written = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for key in [key for key in _known if key[0] in written]:
            _known.pop(key, None)


register_optimizer_step_post_hook(_forget_stepped)


def arranged(
    buffers: Mapping[str, Tensor], reads: Collection[str], dtype: TableDtype, table: PackedTable | None = None
) -> Mapping[str, Tensor]:
    """``buffers`` with the table in those of its forms that will be read: see `lmkan_gen.plan.LaunchPlan`.

    Args:
        buffers: tensors by the names of `lmkan_gen.plan.LaunchPlan`; ``table`` is among them unless packed.
        reads: names of buffers that will be read.
        dtype: element type of the forms other than ``table``.
        table: the table, packed, of that type.

    Raises:
        ValueError: as `pack`.
    """
    forms: dict[str, Tensor] = {}
    streamed = [name for name in reads if name.startswith(_STREAMED)]
    in_fragments = [name for name in reads if name.startswith(_FRAGMENTS)]
    narrow = dtype is not TableDtype.FLOAT32
    if "rows" in reads and "rows" not in buffers:
        forms["rows"] = rows(buffers["table"] if table is None else table, dtype)
    if ("words" in reads or in_fragments or (streamed and narrow)) and "words" not in buffers:
        forms |= (table or packed(buffers["table"], dtype)).buffers()
    if ("table" in reads or (streamed and not narrow)) and "table" not in buffers and table is not None:
        forms["table"] = unpack(table)
    fixed = table is not None or "words" in buffers
    known = {**buffers, **forms}
    for name in streamed:
        pairs, width, vector = (int(number) for number in name.removeprefix(_STREAMED).split("_"))
        source = known["words" if narrow else "table"]
        forms[name] = stages(source, known.get("scales"), pairs, width, vector, fixed)
    for name in in_fragments:
        pairs = int(name.removeprefix(_FRAGMENTS))
        forms[name], forms[FRAGMENT_SCALES] = fragments(known["words"], known["scales"], pairs, fixed)
    return {**buffers, **forms} if forms else buffers
