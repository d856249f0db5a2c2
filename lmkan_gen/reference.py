"""The definition of a layer in plain torch: what every kernel is held to, and what runs without one.

`evaluate` is the formula, differentiable as often as one likes, with memory proportional to
``batch * pairs * outputs``. The other functions compute the same and its derivatives without
autograd, in chunks of bounded memory, on any device and in any dtype that torch's ``embedding_bag``
knows (float32 and float64); they write into tensors given by the caller, every element of them. They neither
copy from the host nor wait for the device, so that CUDA graphs can capture them.

Shapes throughout: ``x`` ``[I, B]``, ``table`` ``[G+1, G+1, O, P]``, ``borders`` ``[G+1]``,
``grad`` and ``y`` ``[O, B]``; one floating-point dtype, one device, any strides. ``P`` is ``ceil(I/2)``: an
odd ``I`` is completed by an input that is always zero. Shapes are checked by the operators in
`lmkan_gen.ops`, not here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from lmkan_gen.grid import coordinates

#: bytes of any single temporary, as far as one row of the table and one sample allow. About eight
#: are alive at a time, so that a call needs well below 256 MiB.
_TEMPORARY = 16 * 2**20

#: samples of a chunk at most: partial sums of at most so many terms keep float32 sums accurate
_SAMPLES = 8192

#: functions at a time where every corner of every function is gathered, so that chunks of the batch
#: stay long enough to be worth a torch call
_GATHERED_FUNCTIONS = 2048


def evaluate(x: Tensor, table: Tensor, borders: Tensor) -> Tensor:
    """``y[o, b] = sum_p f_{o,p}(x[2p, b], x[2p+1, b])``, differentiable in ``x`` and ``table``.

    Args:
        x: ``[I, B]``.
        table: ``[G+1, G+1, O, P]``.
        borders: ``[G+1]``.

    Returns:
        ``[O, B]``, of the dtype of ``x``.
    """
    cells = _cells(x, borders)
    corners = _rows(table)[cells.rows]  # [B, P, 4, O]
    return (corners * cells.weights.unsqueeze(-1)).sum(dim=(1, 2)).T


@torch.no_grad()
def forward(x: Tensor, table: Tensor, borders: Tensor, y: Tensor) -> None:
    """Write the layer's output into ``y`` ``[O, B]``."""
    y.zero_()
    _add_combinations(x, table, borders, y, direction=None)


@torch.no_grad()
def tangent(v_x: Tensor, x: Tensor, table: Tensor, borders: Tensor, y: Tensor) -> None:
    """Write the derivative of the layer's output along ``v_x`` ``[I, B]`` into ``y`` ``[O, B]``."""
    y.zero_()
    _add_combinations(x, table, borders, y, direction=v_x)


@torch.no_grad()
def grad_input(grad: Tensor, x: Tensor, table: Tensor, borders: Tensor, grad_x: Tensor) -> None:
    """Write the gradient with respect to ``x`` into ``grad_x`` ``[I, B]``, given ``grad`` ``[O, B]``."""
    grad_x.zero_()
    for pairs, outs in _tiles(table, _GATHERED_FUNCTIONS):
        rows = _rows(table[:, :, outs, pairs])
        inputs = slice(2 * pairs.start, 2 * pairs.stop)
        for batch in _batches(x, corners=4 * (pairs.stop - pairs.start) * (outs.stop - outs.start)):
            cells = _cells(x[inputs, batch], borders)
            along_1, along_2 = _slopes(cells, rows, grad[outs, batch])
            d1, d2 = cells.fraction.unbind(-1)
            h1, h2 = cells.width.unbind(-1)
            both = torch.stack((_blend(along_1, d2) / h1, _blend(along_2, d1) / h2), dim=-1)
            part = grad_x[inputs, batch]
            part += both.flatten(1).T[: len(part)]


@torch.no_grad()
def grad_table(grad: Tensor, x: Tensor, borders: Tensor, out: Tensor) -> None:
    """Write the gradient with respect to ``table`` into ``out`` (of its shape), given ``grad`` ``[O, B]``.

    Deterministic: no atomics.
    """
    _scatter(grad, x, borders, out, direction=None)


@torch.no_grad()
def double_backward(
    v_x: Tensor | None,
    v_table: Tensor | None,
    grad: Tensor,
    x: Tensor,
    table: Tensor,
    borders: Tensor,
    out_grad: Tensor | None,
    out_x: Tensor | None,
    out_table: Tensor | None,
) -> None:
    """Differentiate ``sum(v_x * grad_x) + sum(v_table * grad_table)``, both as functions of the rest.

    Args:
        v_x: ``[I, B]``, or None for zero.
        v_table: of the shape of ``table``, or None for zero.
        grad: ``[O, B]``.
        x: ``[I, B]``.
        table: ``[G+1, G+1, O, P]``.
        borders: ``[G+1]``.
        out_grad: receives the derivative with respect to ``grad``; None where nobody wants it.
        out_x: the same for ``x``.
        out_table: the same for ``table``.
    """
    if out_grad is not None:
        out_grad.zero_()
        if v_x is not None:
            _add_combinations(x, table, borders, out_grad, direction=v_x)
        if v_table is not None:  # grad_table is the adjoint of the layer, which is linear in its table
            _add_combinations(x, v_table, borders, out_grad, direction=None)
    if out_x is not None:
        if v_table is not None:
            grad_input(grad, x, v_table, borders, out_x)
        else:
            out_x.zero_()
        if v_x is not None:
            _add_mixed(v_x, grad, x, table, borders, out_x)
    if out_table is not None:
        if v_x is not None:
            _scatter(grad, x, borders, out_table, direction=v_x)
        else:
            out_table.zero_()


@dataclass(frozen=True)
class _Cells:
    """Where samples lie, for ``P`` input pairs; corners in the order 00, 01, 10, 11."""

    rows: Tensor
    """``[B, P, 4]``, int64: rows of `_rows` that hold the corners of the cell."""
    fraction: Tensor
    """``[B, P, 2]``."""
    width: Tensor
    """``[B, P, 2]``."""

    @property
    def weights(self) -> Tensor:
        """Bilinear weights of the corners, ``[B, P, 4]``."""
        d1, d2 = self.fraction.unbind(-1)
        e1, e2 = 1 - d1, 1 - d2
        return torch.stack((e1 * e2, e1 * d2, d1 * e2, d1 * d2), dim=-1)

    def derivative(self, direction: Tensor) -> Tensor:
        """Derivative of `weights` along ``direction`` ``[B, P, 2]``."""
        d1, d2 = self.fraction.unbind(-1)
        e1, e2 = 1 - d1, 1 - d2
        v1, v2 = (direction / self.width).unbind(-1)
        return torch.stack(
            (-v1 * e2 - e1 * v2, e1 * v2 - v1 * d2, v1 * e2 - d1 * v2, v1 * d2 + d1 * v2), dim=-1
        )


def _cells(x: Tensor, borders: Tensor) -> _Cells:
    pairs = _pairwise(x)
    index, fraction = coordinates(pairs, borders)
    side = borders.numel()
    first = torch.arange(pairs.shape[1], device=x.device) * (side * side)
    corner = first + index[..., 0] * side + index[..., 1]
    # made on the device: a constant copied from the host could not be captured in a CUDA graph
    step = torch.arange(2, device=x.device)
    offsets = (side * step.unsqueeze(1) + step).flatten()
    return _Cells(corner.unsqueeze(-1) + offsets, fraction, borders[index + 1] - borders[index])


def _pairwise(x: Tensor) -> Tensor:
    """``[I, B]`` -> ``[B, P, 2]``."""
    rows = pad(x.T, (0, 1)) if x.shape[0] % 2 else x.T
    return rows.reshape(x.shape[1], -(-x.shape[0] // 2), 2)


def _rows(table: Tensor) -> Tensor:
    """``[G+1, G+1, O, P]`` -> ``[P * (G+1)^2, O]``, contiguous: one knot's values for all outputs."""
    return table.permute(3, 0, 1, 2).reshape(-1, table.shape[2])


def _tiles(table: Tensor, functions: int = _TEMPORARY) -> Iterator[tuple[slice, slice]]:
    """Slices of pairs and of outputs: at most ``functions``, whose `_rows` stay within `_TEMPORARY`."""
    side, _, outputs, pairs = table.shape
    limit = min(functions, _TEMPORARY // (side * side * table.element_size()))
    outs_step = max(1, min(outputs, limit))
    pairs_step = max(1, min(pairs, limit // outs_step))
    for pair in range(0, pairs, pairs_step):
        for out in range(0, outputs, outs_step):
            yield slice(pair, min(pair + pairs_step, pairs)), slice(out, min(out + outs_step, outputs))


def _batches(x: Tensor, corners: int) -> Iterator[slice]:
    """Slices of the batch in which ``corners`` 64-bit values per sample stay within `_TEMPORARY`."""
    step = max(1, min(_SAMPLES, _TEMPORARY // (8 * corners)))
    return (slice(b, min(b + step, x.shape[1])) for b in range(0, x.shape[1], step))


def _add_combinations(x: Tensor, table: Tensor, borders: Tensor, y: Tensor, direction: Tensor | None) -> None:
    """Add the layer's output to ``y``, or its derivative along ``direction`` ``[I, B]``."""
    for pairs, outs in _tiles(table):
        rows = _rows(table[:, :, outs, pairs])
        inputs = slice(2 * pairs.start, 2 * pairs.stop)
        for batch in _batches(x, corners=4 * (pairs.stop - pairs.start)):
            cells = _cells(x[inputs, batch], borders)
            weights = _weights(cells, direction, inputs, batch).flatten(1)
            y[outs, batch] += embedding_bag(
                cells.rows.flatten(1), rows, per_sample_weights=weights, mode="sum"
            ).T


def _scatter(grad: Tensor, x: Tensor, borders: Tensor, out: Tensor, direction: Tensor | None) -> None:
    """Write the adjoint of `_add_combinations`, as a function of the table, into ``out``."""
    for pairs, outs in _tiles(out):
        inputs = slice(2 * pairs.start, 2 * pairs.stop)
        corners = 4 * (pairs.stop - pairs.start)
        knots = (pairs.stop - pairs.start) * borders.numel() ** 2
        total = out.new_zeros((knots, outs.stop - outs.start))
        for batch in _batches(x, corners):
            cells = _cells(x[inputs, batch], borders)
            weights = _weights(cells, direction, inputs, batch).flatten()
            # One bag per knot: the samples that touch it. Sorting takes the place of atomics.
            knot, order = cells.rows.flatten().sort(stable=True)
            offsets = torch.searchsorted(knot, torch.arange(knots, device=x.device))
            total += embedding_bag(
                order.div(corners, rounding_mode="floor"),
                grad[outs, batch].T.contiguous(),
                offsets,
                per_sample_weights=weights[order],
                mode="sum",
            )
        out[:, :, outs, pairs] = total.view(-1, *out.shape[:2], total.shape[1]).permute(1, 2, 3, 0)


def _weights(cells: _Cells, direction: Tensor | None, inputs: slice, batch: slice) -> Tensor:
    if direction is None:
        return cells.weights
    return cells.derivative(_pairwise(direction[inputs, batch]))


def _slopes(cells: _Cells, rows: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of the corners along either axis, weighted by ``grad`` and summed over outputs.

    Each is ``[B, P, 2]``: along the first axis at both ends of the second, and the reverse. The
    difference is taken before the sum, where it is exact for neighbours of similar size.
    """
    corners = rows[cells.rows]  # [B, P, 4, O]
    corners = corners.view(*corners.shape[:2], 2, 2, corners.shape[-1])
    grad = grad.T.contiguous()[:, None, None]
    along_1 = (corners[:, :, 1] - corners[:, :, 0]).mul_(grad).sum(-1)
    along_2 = (corners[:, :, :, 1] - corners[:, :, :, 0]).mul_(grad).sum(-1)
    return along_1, along_2


def _blend(ends: Tensor, d: Tensor) -> Tensor:
    return (1 - d) * ends[..., 0] + d * ends[..., 1]


def _add_mixed(v_x: Tensor, grad: Tensor, x: Tensor, table: Tensor, borders: Tensor, out: Tensor) -> None:
    """Add the Hessian in ``x`` of ``sum(grad * y)``, applied to ``v_x``, to ``out`` ``[I, B]``.

    Inside a cell the mixed derivative of each pair is its only entry that is not zero.
    """
    side = borders.numel()
    for pairs, outs in _tiles(table, _GATHERED_FUNCTIONS):
        rows = _rows(table[:, :, outs, pairs])
        # c11 - c01 - c10 + c00 of each cell at its first corner; at other knots something that nobody reads
        along_1 = rows[side:] - rows[:-side]
        mixed = along_1[1:] - along_1[:-1]
        inputs = slice(2 * pairs.start, 2 * pairs.stop)
        for batch in _batches(x, corners=(pairs.stop - pairs.start) * (outs.stop - outs.start)):
            cells = _cells(x[inputs, batch], borders)
            of_cells = mixed[cells.rows[..., 0]].mul_(grad[outs, batch].T.unsqueeze(1)).sum(-1)
            of_cells = of_cells / cells.width.prod(-1)
            other = _pairwise(v_x[inputs, batch]).flip(-1)
            part = out[inputs, batch]
            part += (of_cells.unsqueeze(-1) * other).flatten(1).T[: len(part)]
