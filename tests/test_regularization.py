from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lmkan_gen import hessian_regularization, knots
from tests.truth import Array


def loops(table: Array, g: Array) -> float:
    """The definition, one knot at a time."""
    total = 0.0
    for o in range(table.shape[2]):
        for p in range(table.shape[3]):
            c = table[:, :, o, p]
            squares = []
            for i in range(1, len(g) - 1):
                for j in range(1, len(g) - 1):
                    left, right, below, above = (
                        g[i] - g[i - 1],
                        g[i + 1] - g[i],
                        g[j] - g[j - 1],
                        g[j + 1] - g[j],
                    )
                    xx = (
                        2
                        / (left + right)
                        * ((c[i + 1, j] - c[i, j]) / right - (c[i, j] - c[i - 1, j]) / left)
                    )
                    yy = (
                        2
                        / (below + above)
                        * ((c[i, j + 1] - c[i, j]) / above - (c[i, j] - c[i, j - 1]) / below)
                    )
                    corners = c[i + 1, j + 1] - c[i + 1, j - 1] - c[i - 1, j + 1] + c[i - 1, j - 1]
                    xy = corners / ((left + right) * (below + above))
                    squares.append(xx**2 + 2 * xy**2 + yy**2)
            total += float(np.mean(squares))
    return total


def on_knots(function: Any, grids: int) -> torch.Tensor:
    g = knots(grids, torch.float64)
    values: torch.Tensor = function(g[:, None], g[None, :])
    return values.expand(grids + 1, grids + 1)[:, :, None, None].contiguous()


@pytest.mark.parametrize("grids", [3, 4, 9, 20])
def test_agrees_with_plain_loops(grids: int) -> None:
    g = knots(grids, torch.float64)
    table = torch.randn(grids + 1, grids + 1, 3, 2, dtype=torch.float64)
    expected = loops(table.numpy(), g.numpy())
    assert hessian_regularization(table, g).item() == pytest.approx(expected, rel=1e-12)
    single = hessian_regularization(table.float(), g.float())
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("grids", [3, 8, 15])
def test_closed_forms(grids: int) -> None:
    g = knots(grids, torch.float64)
    affine = on_knots(lambda a, b: 0.7 * a - 1.3 * b + 0.2, grids)
    assert hessian_regularization(affine, g).item() == pytest.approx(0, abs=1e-24)
    # f_xy = 1 everywhere, so R = 2; finite differences are exact for quadratics
    assert hessian_regularization(on_knots(lambda a, b: a * b, grids), g).item() == pytest.approx(2)
    assert hessian_regularization(on_knots(lambda a, b: a * a + 0 * b, grids), g).item() == pytest.approx(4)
    assert hessian_regularization(on_knots(lambda a, b: 3 * b * b + 0 * a, grids), g).item() == pytest.approx(
        36
    )


def test_functions_add_up() -> None:
    g = knots(6, torch.float64)
    table = torch.randn(7, 7, 4, 3, dtype=torch.float64)
    parts = [hessian_regularization(table[:, :, o : o + 1, p : p + 1], g) for o in range(4) for p in range(3)]
    assert hessian_regularization(table, g).item() == pytest.approx(sum(part.item() for part in parts))


def test_is_differentiable_in_the_table() -> None:
    g = knots(4, torch.float64)
    table = torch.randn(5, 5, 2, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: hessian_regularization(t, g), (table,))


def test_wrong_shape_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"table must be \[G\+1, G\+1, outputs, pairs\] with G\+1 = 5 .* got"
    ):
        hessian_regularization(torch.zeros(4, 5, 1, 1), knots(4))
