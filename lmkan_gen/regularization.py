"""The Hessian regulariser: how far a layer's functions are from being affine."""

from __future__ import annotations

from torch import Tensor


def hessian_regularization(table: Tensor, borders: Tensor) -> Tensor:
    """Mean squared second derivative over the inner knots, summed over all functions.

    Second derivatives are finite differences on the non-uniform grid; the value is
    ``sum_functions mean_knots (f_xx^2 + 2 f_xy^2 + f_yy^2)``. It is zero for affine functions and
    differentiable with respect to ``table``.

    Args:
        table: ``[G+1, G+1, O, P]``, values of the functions at the knots.
        borders: ``[G+1]``, the knots, in increasing order.

    Returns:
        A scalar tensor of the dtype of ``table``.

    Raises:
        ValueError: the shapes do not belong together.
    """
    knots = borders.numel()
    if table.dim() != 4 or table.shape[0] != knots or table.shape[1] != knots:
        raise ValueError(
            f"table must be [G+1, G+1, outputs, pairs] with G+1 = {knots} as borders has it, "
            f"got {list(table.shape)}"
        )
    width = borders.diff()
    before, after = width[:-1], width[1:]
    span = before + after

    f_xx = _second_difference(table[:, 1:-1], before.view(-1, 1, 1, 1), after.view(-1, 1, 1, 1), 0)
    f_yy = _second_difference(table[1:-1], before.view(-1, 1, 1), after.view(-1, 1, 1), 1)
    # grouped so that each bracket is exact for values that vary slowly along the second axis
    f_xy = (table[2:, 2:] - table[2:, :-2]) - (table[:-2, 2:] - table[:-2, :-2])
    f_xy = f_xy / (span.view(-1, 1, 1, 1) * span.view(-1, 1, 1))
    return (f_xx.square() + 2 * f_xy.square() + f_yy.square()).mean(dim=(0, 1)).sum()


def _second_difference(values: Tensor, before: Tensor, after: Tensor, axis: int) -> Tensor:
    slope = values.diff(dim=axis)
    inner = slope.shape[axis] - 1
    left, right = slope.narrow(axis, 0, inner), slope.narrow(axis, 1, inner)
    return (right / after - left / before) * (2 / (before + after))
