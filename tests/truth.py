"""The layer from its formulas, in float64, one sample and pair at a time: what tests compare with.

Shares no code with the package. The cell comes from the Laplace distribution function, knots are
whatever the layer holds (float32 values, taken as exact).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def knots(grids: int) -> Array:
    inner = []
    for i in range(1, grids):
        q = i / grids
        inner.append(math.log(2 * q) if q <= 0.5 else -math.log(2 * (1 - q)))
    return np.array([2 * inner[0] - inner[1], *inner, 2 * inner[-1] - inner[-2]])


def locate(x: float, borders: Array) -> tuple[int, float, float]:
    """Cell, fraction in the cell, width of the cell."""
    grids = len(borders) - 1
    sigma = 0.5 * math.exp(x) if x <= 0 else 1 - 0.5 * math.exp(-x)
    i = min(max(math.floor(grids * sigma), 0), grids - 1)
    h = float(borders[i + 1]) - float(borders[i])
    return i, (x - float(borders[i])) / h, h


class Truth(NamedTuple):
    """Each result with its magnitude: the sum of the absolute values of all that was added up."""

    y: Array
    y_magnitude: Array
    grad_x: Array
    grad_x_magnitude: Array
    grad_table: Array
    grad_table_magnitude: Array


def compute(x: Any, table: Any, borders: Any, grad: Any) -> Truth:
    """Output and both gradients. ``x`` must be finite."""
    x, table, borders, grad = (np.asarray(a, dtype=np.float64) for a in (x, table, borders, grad))
    outputs, batch = table.shape[2], x.shape[1]
    y, y_m = np.zeros((2, outputs, batch))
    gx, gx_m = np.zeros((2, *x.shape))
    gt, gt_m = np.zeros((2, *table.shape))
    for p in range(x.shape[0] // 2):
        for b in range(batch):
            i, d1, h1 = locate(x[2 * p, b], borders)
            j, d2, h2 = locate(x[2 * p + 1, b], borders)
            g = grad[:, b]
            for a, c, w, w1, w2 in (
                (0, 0, (1 - d1) * (1 - d2), -(1 - d2) / h1, -(1 - d1) / h2),
                (0, 1, (1 - d1) * d2, -d2 / h1, (1 - d1) / h2),
                (1, 0, d1 * (1 - d2), (1 - d2) / h1, -d1 / h2),
                (1, 1, d1 * d2, d2 / h1, d1 / h2),
            ):
                corner = table[i + a, j + c, :, p]
                y[:, b] += w * corner
                y_m[:, b] += np.abs(w * corner)
                gx[2 * p, b] += w1 * (g @ corner)
                gx[2 * p + 1, b] += w2 * (g @ corner)
                gx_m[2 * p, b] += np.abs(w1 * g * corner).sum()
                gx_m[2 * p + 1, b] += np.abs(w2 * g * corner).sum()
                gt[i + a, j + c, :, p] += w * g
                gt_m[i + a, j + c, :, p] += np.abs(w * g)
    return Truth(y, y_m, gx, gx_m, gt, gt_m)


def relative_error(found: Any, expected: Array) -> float:
    """Largest deviation over the largest expected value; infinite for anything not finite."""
    found = np.asarray(found, dtype=np.float64)
    assert found.shape == expected.shape
    if found.size == 0:
        return 0.0
    if not np.isfinite(found).all():
        return math.inf
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def scaled_error(found: Any, expected: Array, magnitude: Array) -> float:
    """Largest deviation in units of ``1 + magnitude``: fair where some entries are far larger."""
    found = np.asarray(found, dtype=np.float64)
    assert found.shape == expected.shape
    if not np.isfinite(found).all():
        return math.inf
    return float((np.abs(found - expected) / (1 + magnitude)).max())


def away_from_knots(x: Array, borders: Array, margin: float = 1e-4) -> Array:
    """``x`` with every value that lies within ``margin`` of a knot, in cell widths, moved off it.

    Gradients jump at knots, so that there either side's is right.
    """
    moved = np.array(x, dtype=np.float32)
    for place in np.ndindex(*moved.shape):
        while True:
            _, d, h = locate(float(moved[place]), borders)
            if min(abs(d), abs(1 - d)) > margin:
                break
            moved[place] += np.float32(3 * margin * h)
    return moved


def hessian(table: Any, borders: Any) -> tuple[float, Array]:
    """The Hessian regulariser and its gradient, stencil by stencil."""
    c, g = np.asarray(table, dtype=np.float64), np.asarray(borders, dtype=np.float64)
    grids = len(g) - 1
    value, gradient = 0.0, np.zeros_like(c)
    for i in range(1, grids):
        for j in range(1, grids):
            left, right, below, above = g[i] - g[i - 1], g[i + 1] - g[i], g[j] - g[j - 1], g[j + 1] - g[j]
            kx, ky, corner = 2 / (left + right), 2 / (below + above), 1 / ((left + right) * (below + above))
            xx = {(1, 0): kx / right, (0, 0): -kx * (1 / right + 1 / left), (-1, 0): kx / left}
            yy = {(0, 1): ky / above, (0, 0): -ky * (1 / above + 1 / below), (0, -1): ky / below}
            xy = {(a, b): a * b * corner for a in (-1, 1) for b in (-1, 1)}
            for weight, stencil in ((1, xx), (2, xy), (1, yy)):
                derivative = sum(k * c[i + a, j + b] for (a, b), k in stencil.items())
                value += weight * float((derivative**2).sum())
                for (a, b), k in stencil.items():
                    gradient[i + a, j + b] += 2 * weight * k * derivative
    knots = (grids - 1) ** 2
    return value / knots, gradient / knots
