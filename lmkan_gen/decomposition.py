"""Operators of this package in terms of torch's own, for formats that know no others: ONNX, for example.

The graphs are made for runtimes that compute node by node: a Gather of rows of the table for the corners, a
product with their weights, a sum. They gather ``4 * pairs * outputs`` values a sample, in up to 16 parts one
after the other, so that a runtime which reuses memory holds about two parts of them at a time.

No matrix product is in them: on several runtimes those have fewer bits than float32 unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, pad

from lmkan_gen.convolution import Geometry, by_images, patches
from lmkan_gen.grid import sigma
from lmkan_gen.operators import DECOMPOSITIONS
from lmkan_gen.ops import own_dtype
from lmkan_gen.packing import SCALE_PAIRS, RoundedTable, round_table
from lmkan_gen.problem import TableDtype

#: parts of the pairs at most, each with its own nodes; more parts would need less memory
_PARTS = 16
#: pairs that a part has at least
_LEAST_PAIRS = 16
_CORNERS = 4


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """What `torch.export.ExportedProgram.run_decompositions` replaces the operators of inference by.

    After ``program.run_decompositions(lmkan_gen.decompositions())`` a program has operators of torch only,
    and none of this package's kernels. `torch.onnx.export` does this by itself; other exporters may need it.

    Returns:
        A new dictionary from operators to functions.
    """
    return dict(DECOMPOSITIONS)


def forward(x: Tensor, table: Tensor, borders: Tensor, *options: Any) -> Tensor:
    """``torch.ops.lmkan_gen.forward``; of the options only ``table_dtype``, the sixth, matters."""
    if x.dtype == torch.float64:
        return _evaluate(x, RoundedTable(table), borders)
    dtype = options[5] if len(options) > 5 else ""
    return _evaluate(x, round_table(table, TableDtype(dtype or own_dtype(table))), borders)


def frozen_forward(x: Tensor, values: Tensor, scales: Tensor | None, borders: Tensor) -> Tensor:
    """``torch.ops.lmkan_gen.frozen_forward``."""
    return _evaluate(x, RoundedTable(values, scales), borders)


def convolve(x: Tensor, table: Tensor, borders: Tensor, *sizes: Any) -> Tensor:
    """``torch.ops.lmkan_gen.convolve``: the layer on all patches at once."""
    geometry = Geometry(*sizes)
    return by_images(forward(patches(x, geometry), table, borders), x, geometry)


def frozen_convolve(x: Tensor, values: Tensor, scales: Tensor | None, borders: Tensor, *sizes: Any) -> Tensor:
    """``torch.ops.lmkan_gen.frozen_convolve``."""
    geometry = Geometry(*sizes)
    return by_images(frozen_forward(patches(x, geometry), values, scales, borders), x, geometry)


DECOMPOSITIONS |= {
    torch.ops.lmkan_gen.forward.default: forward,
    torch.ops.lmkan_gen.frozen_forward.default: frozen_forward,
    torch.ops.lmkan_gen.convolve.default: convolve,
    torch.ops.lmkan_gen.frozen_convolve.default: frozen_convolve,
}


def _evaluate(x: Tensor, table: RoundedTable, borders: Tensor) -> Tensor:
    outputs, pairs = table.values.shape[2:]
    rows, weights = _corners(x, pairs, borders)
    of_knots = table.values.permute(3, 0, 1, 2).reshape(-1, outputs)
    step = _CORNERS * max(_LEAST_PAIRS, -(-pairs // _PARTS))
    scales = None if table.scales is None else _of_corners(table.scales, pairs).split(step)
    total: Tensor | None = None
    for i, (row, weight) in enumerate(zip(rows.split(step), weights.split(step), strict=True)):
        values = embedding(row, of_knots).to(x.dtype)  # narrow values are gathered as they are
        values = values if scales is None else values * scales[i]
        part = (values * weight).sum(0)
        total = part if total is None else total + part
    assert total is not None
    return total.T


def _corners(x: Tensor, pairs: int, borders: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``[4 P, B]`` of the flattened table, and their weights ``[4 P, B, 1]``."""
    side, grids = borders.shape[0], borders.shape[0] - 1
    if x.shape[0] % 2:
        x = pad(x, (0, 0, 0, 1))
    x = x.reshape(pairs, 2, -1)
    cell = (sigma(x) * grids).floor()
    # NaN compares false: it goes to cell 0 before the cast, whose result for NaN is undefined
    cell = torch.where(cell > 0, cell, 0.0).clamp(max=grids - 1).to(torch.int64)
    left = borders[:-1]
    ends = embedding(cell, torch.stack((left, borders[1:] - left), dim=1))
    i1, i2 = cell.unbind(1)
    d1, d2 = ((x - ends[..., 0]) / ends[..., 1]).unbind(1)
    first = torch.arange(pairs, device=x.device).unsqueeze(1) * (side * side)
    corner = first + i1 * side + i2
    rows = torch.stack((corner, corner + 1, corner + side, corner + side + 1), dim=1)
    e1, e2 = 1 - d1, 1 - d2
    weights = torch.stack((e1 * e2, e1 * d2, d1 * e2, d1 * d2), dim=1)
    return rows.flatten(0, 1), weights.flatten(0, 1).unsqueeze(-1)


def _of_corners(scales: Tensor, pairs: int) -> Tensor:
    """Scales ``[ceil(P/8), O]`` as those of corners, ``[4 P, 1, O]``."""
    repeated = scales.unsqueeze(1).expand(-1, SCALE_PAIRS * _CORNERS, -1).flatten(0, 1)
    return repeated[: _CORNERS * pairs].unsqueeze(1)
