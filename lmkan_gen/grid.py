"""The static percentile grid: knots, and where a sample lies between them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lmkan_gen.problem import MIN_GRIDS


def knots(num_grids: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The ``num_grids + 1`` knots of the grid: percentiles of the Laplace distribution.

    The outermost knots would lie at infinity; they are ghosts, extrapolated from their two inner
    neighbours. Computed in float64, then rounded to ``dtype``.

    Args:
        num_grids: number of cells per axis, ``G >= 3``.
        dtype: floating-point type of the result.

    Returns:
        Tensor ``[G+1]`` on the CPU, strictly increasing.

    Raises:
        ValueError: ``num_grids`` is below 3.
    """
    if num_grids < MIN_GRIDS:
        raise ValueError(
            f"num_grids must be at least {MIN_GRIDS}, got {num_grids}: "
            "the ghost knots are extrapolated from two inner ones"
        )
    inner = [_inverse_sigma(i, num_grids) for i in range(1, num_grids)]
    first = 2 * inner[0] - inner[1]
    last = 2 * inner[-1] - inner[-2]
    return torch.tensor([first, *inner, last], dtype=torch.float64).to(dtype)


def _inverse_sigma(i: int, num_grids: int) -> float:
    # The right half mirrors the left one, so that the grid is symmetric to the last bit.
    if 2 * i <= num_grids:
        return math.log(2 * i / num_grids)
    return -math.log(2 * (num_grids - i) / num_grids)


def sigma(x: Tensor) -> Tensor:
    """The Laplace distribution function of ``x``, in ``[0, 1]``; same shape and dtype as ``x``."""
    tail = 0.5 * torch.exp(-x.abs())
    return torch.where(x > 0, 1 - tail, tail)


def coordinates(x: Tensor, borders: Tensor) -> tuple[Tensor, Tensor]:
    """Cell of each value and its position in that cell.

    Args:
        x: any shape, floating point, any bits.
        borders: ``[G+1]``, the knots, of the same dtype and on the same device.

    Returns:
        ``(index, fraction)``, both of the shape of ``x``. ``index`` is int64 and in ``[0, G-1]``
        whatever ``x`` is (0 for NaN). ``fraction``, in the dtype of ``x``, is in ``[0, 1]`` up to
        rounding, except in the outermost cells, where it runs to infinity; it is NaN for NaN. It is
        differentiable with respect to ``x``.
    """
    grids = borders.numel() - 1
    cell = (sigma(x.detach()) * grids).floor()
    # NaN has to go before the cast, whose result for NaN is undefined.
    index = cell.nan_to_num(0.0).clamp(0, grids - 1).to(torch.int64)
    left = borders[index]
    return index, (x - left) / (borders[index + 1] - left)
