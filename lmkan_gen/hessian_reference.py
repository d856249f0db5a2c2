"""The Hessian regulariser in plain torch: the definition, and what runs without kernels.

With ``h`` the widths of the cells, at the ``(G-1)^2`` inner knots of each function (spec: finite
differences on a non-uniform grid):

    f_xx = 2/(hl+hr) * ((c_r - c)/hr - (c - c_l)/hl),   f_yy likewise
    f_xy = (c_{++} - c_{+-} - c_{-+} + c_{--}) / ((hl+hr)(hb+ht))
    R = sum over functions of mean over inner knots of (f_xx^2 + 2 f_xy^2 + f_yy^2)

``table`` is ``[G+1, G+1, O, P]`` and ``borders`` ``[G+1]``, of one floating-point dtype and device. Work
goes in slabs of functions, so that temporaries stay small whatever the table. Outputs are written whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

#: bytes of any single temporary, as far as one function allows; about eight are alive at a time
_TEMPORARY = 16 * 2**20


@torch.no_grad()
def value(table: Tensor, borders: Tensor, out: Tensor) -> None:
    """Write ``R`` into ``out`` ``[]``."""
    out.zero_()
    axis = _Axis(borders)
    for slab in _slabs(table):
        f_xx, f_yy, f_xy = axis.second_derivatives(table.flatten(2)[:, :, slab])
        out += (f_xx.square() + 2 * f_xy.square() + f_yy.square()).mean(dim=(0, 1)).sum()


@torch.no_grad()
def gradient(scale: Tensor, table: Tensor, borders: Tensor, out: Tensor) -> None:
    """Write ``scale * dR/dtable`` into ``out``, contiguous and of the shape of ``table``."""
    axis = _Axis(borders)
    factor = 2 * scale / (borders.numel() - 2) ** 2
    flat = out.view(*out.shape[:2], -1)
    for slab in _slabs(table):
        f_xx, f_yy, f_xy = axis.second_derivatives(table.flatten(2)[:, :, slab])
        total = torch.zeros_like(flat[:, :, slab])
        total[:, 1:-1] += axis.bend_adjoint(f_xx, 0)
        total[1:-1] += axis.bend_adjoint(f_yy, 1)
        f_xy = 2 * f_xy / axis.spans
        total[2:, 2:] += f_xy
        total[2:, :-2] -= f_xy
        total[:-2, 2:] -= f_xy
        total[:-2, :-2] += f_xy
        flat[:, :, slab] = total.mul_(factor)


class _Axis:
    """The grid's finite differences; tables are ``[G+1, G+1, functions]``."""

    def __init__(self, borders: Tensor) -> None:
        width = borders.diff()
        span = width[:-1] + width[1:]
        self._width = (width.view(-1, 1, 1), width.view(-1, 1))
        self._span = (span.view(-1, 1, 1), span.view(-1, 1))
        self.spans = self._span[0] * self._span[1]

    def second_derivatives(self, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``f_xx``, ``f_yy`` and ``f_xy`` at the inner knots, ``[G-1, G-1, functions]``."""
        # grouped so that each bracket is exact for values that vary slowly along the second axis
        f_xy = (table[2:, 2:] - table[2:, :-2]) - (table[:-2, 2:] - table[:-2, :-2])
        return self._bend(table[:, 1:-1], 0), self._bend(table[1:-1], 1), f_xy / self.spans

    def _bend(self, values: Tensor, axis: int) -> Tensor:
        """The second derivative along an axis, at its inner knots."""
        slope = values.diff(dim=axis) / self._width[axis]
        return slope.diff(dim=axis) * (2 / self._span[axis])

    def bend_adjoint(self, bend: Tensor, axis: int) -> Tensor:
        """The transpose of `_bend`: from the inner knots of an axis to all of them."""
        around = (0, 0, 1, 1) if axis == 1 else (0, 0, 0, 0, 1, 1)
        slope = pad(bend * (2 / self._span[axis]), around).diff(dim=axis) / self._width[axis]
        return pad(slope, around).diff(dim=axis)


def _slabs(table: Tensor) -> Iterator[slice]:
    side, _, outputs, pairs = table.shape
    step = max(1, _TEMPORARY // (side * side * table.element_size()))
    return (slice(f, f + step) for f in range(0, outputs * pairs, step))
