"""Tables of known functions: what the coefficients must be for a layer to compute something given.

All of it is exact up to the rounding of the result: sums are done in float64, on the float32 knots that
layers hold.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from lmkan_gen.grid import knots


def affine_table(
    weight: Tensor,
    bias: Tensor | None,
    num_grids: int,
    activation: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The table of ``y = weight @ a(x) + bias``, with ``a`` the identity by default.

    Affine functions of a pair are bilinear, extrapolation included, so that the table is exact. It is for
    an ``activation`` too that is applied to each input, if that is linear between the inner knots and
    beyond them: ReLU, for example, whose kink at 0 is a knot if ``num_grids`` is even.

    Args:
        weight: ``[O, I]``; an odd ``I`` is completed by an input that has no effect.
        bias: ``[O]``, spread evenly over the pairs, or None for zero.
        num_grids: cells per axis, ``G``.
        activation: ``a``, elementwise.

    Returns:
        ``[G+1, G+1, O, ceil(I / 2)]``, of the dtype and on the device of ``weight``.

    Raises:
        ValueError: ``num_grids`` is below 3.
    """
    g = knots(num_grids).to(weight.device, torch.float64)
    if activation is not None:
        g = activation(g)
    even = pad(weight.detach().double(), (0, weight.shape[1] % 2))
    first, second = even[:, 0::2], even[:, 1::2]
    table = g.view(-1, 1, 1, 1) * first + g.view(-1, 1, 1) * second
    if bias is not None:
        table += bias.detach().double().unsqueeze(1) / first.shape[1]
    return table.to(weight.dtype)


def scaled_table(table: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The table of ``scale * y + shift``, where ``table`` is that of ``y``.

    Args:
        table: ``[G+1, G+1, O, P]``.
        scale: ``[O]``, or a scalar.
        shift: ``[O]``, or a scalar; spread evenly over the pairs.
    """
    scale, shift = (t.detach().double().view(-1, 1) for t in (scale, shift))
    return (table.detach().double() * scale + shift / table.shape[3]).to(table.dtype)


def refined_table(table: Tensor, factor: int) -> Tensor:
    """The table of the same functions on a grid of ``factor`` times as many cells.

    The inner knots of the old grid are among those of the new one, so that the functions bend nowhere
    else. The ghost knots move; their coefficients follow the linear tails.

    Args:
        table: ``[G+1, G+1, O, P]``.
        factor: 1 or more.

    Returns:
        ``[factor*G+1, factor*G+1, O, P]``.

    Raises:
        ValueError: ``factor`` is below 1.
    """
    if factor < 1:
        raise ValueError(f"factor must be at least 1, got {factor}")
    grids = table.shape[0] - 1
    old, new = (knots(g).to(table.device, torch.float64) for g in (grids, factor * grids))
    # where new knots lie on the old grid; the outermost cells reach to infinity
    cell = (torch.arange(new.numel(), device=table.device) // factor).clamp(max=grids - 1)
    fraction = (new - old[cell]) / (old[cell + 1] - old[cell])
    values = table.detach().double()
    values = _blend(values[cell], values[cell + 1], fraction.view(-1, 1, 1, 1))
    values = _blend(values[:, cell], values[:, cell + 1], fraction.view(-1, 1, 1))
    return values.to(table.dtype)


def _blend(left: Tensor, right: Tensor, fraction: Tensor) -> Tensor:
    return (1 - fraction) * left + fraction * right
