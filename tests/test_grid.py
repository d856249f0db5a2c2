from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmkan_gen.grid import coordinates, knots, sigma
from tests import truth


@pytest.mark.parametrize("grids", [3, 4, 5, 12, 40, 257])
def test_knots_follow_the_formula(grids: int) -> None:
    expected = truth.knots(grids)
    assert knots(grids, torch.float64).numpy() == pytest.approx(expected, rel=1e-13, abs=1e-15)
    assert torch.equal(knots(grids), knots(grids, torch.float64).float())
    assert knots(grids).dtype == torch.float32


def test_knots_of_four_cells_are_multiples_of_ln_2() -> None:
    assert knots(4, torch.float64).tolist() == pytest.approx([k * math.log(2) for k in (-2, -1, 0, 1, 2)])


@given(grids=st.integers(3, 2000))
def test_knots_increase_and_are_symmetric(grids: int) -> None:
    g = knots(grids)
    assert (g.diff() > 0).all()
    assert torch.equal(g, -g.flip(0))
    assert grids % 2 or g[grids // 2] == 0


@pytest.mark.parametrize("grids", [-1, 0, 2])
def test_too_few_cells_are_refused(grids: int) -> None:
    with pytest.raises(ValueError, match=f"num_grids must be at least 3, got {grids}"):
        knots(grids)


def test_sigma_is_the_laplace_distribution_function() -> None:
    x = torch.linspace(-30, 30, 601, dtype=torch.float64)
    expected = [0.5 * math.exp(v) if v <= 0 else 1 - 0.5 * math.exp(-v) for v in x.tolist()]
    assert sigma(x).tolist() == pytest.approx(expected, rel=1e-14)
    assert sigma(torch.tensor([-math.inf, 0.0, math.inf])).tolist() == [0.0, 0.5, 1.0]


@given(bits=st.integers(0, 2**32 - 1), grids=st.integers(3, 300))
def test_index_stays_inside_for_any_bits(bits: int, grids: int) -> None:
    value = struct.unpack("<f", struct.pack("<I", bits))[0]
    index, d = coordinates(torch.tensor([value], dtype=torch.float32), knots(grids))
    assert index.dtype == torch.int64
    assert 0 <= index.item() <= grids - 1
    if math.isnan(value):
        assert index.item() == 0
        assert math.isnan(d.item())
    elif abs(value) < 1e30:
        expected, fraction, _ = truth.locate(value, knots(grids).double().numpy())
        # rounding may move a sample that lies on a knot to the neighbour cell, no other
        position = index.item() + d.item()
        assert abs(index.item() - expected) <= 1
        assert position == pytest.approx(expected + fraction, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_extremes_in_every_dtype(dtype: torch.dtype) -> None:
    x = torch.tensor([-math.inf, math.inf, math.nan, -0.0, 0.0, 6e4, -6e4], dtype=dtype)
    index, d = coordinates(x, knots(6, dtype))
    assert index.tolist() == [0, 5, 0, 3, 3, 5, 0]
    assert d.dtype == dtype
    assert d[:3].isinf().tolist() == [True, True, False]
    assert d[2].isnan()
    assert d[3:5].tolist() == [0.0, 0.0]


def test_every_knot_is_found() -> None:
    g = knots(41)
    index, d = coordinates(g, g)
    assert (index + d).numpy() == pytest.approx(np.arange(42.0), abs=1e-5)


def test_fraction_is_differentiable() -> None:
    g = knots(8, torch.float64)
    x = torch.tensor([-5.0, -0.3, 0.1, 4.0], dtype=torch.float64, requires_grad=True)
    index, d = coordinates(x, g)
    (slope,) = torch.autograd.grad(d.sum(), x)
    assert torch.equal(slope, 1 / (g[index + 1] - g[index]))
