"""Narrow tables: what rounding may lose, and that layouts lose nothing more."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmkan_gen import packing, reference
from lmkan_gen.grid import knots
from lmkan_gen.problem import TableDtype

NARROW = [TableDtype.FLOAT16, TableDtype.BFLOAT16, TableDtype.INT8]
HALF = {TableDtype.FLOAT16: torch.float16, TableDtype.BFLOAT16: torch.bfloat16}
SIZES = st.tuples(st.integers(3, 6), st.integers(1, 9), st.integers(1, 19))


def table(grids: int = 5, outputs: int = 7, pairs: int = 11) -> Tensor:
    return torch.randn(grids + 1, grids + 1, outputs, pairs)


@given(SIZES)
@settings(max_examples=30, deadline=None)
def test_half_tables_are_rounded_and_nothing_else(sizes: tuple[int, int, int]) -> None:
    t = table(*sizes)
    for dtype, half in HALF.items():
        packed = packing.pack(t, dtype)
        assert torch.equal(packing.unpack(packed), t.to(half).float())
        lower, upper = packed.words & 0xFFFF, packed.words >> 16 & 0xFFFF
        bits = t.to(half).view(torch.int16).int() & 0xFFFF
        assert torch.equal(lower, bits[:, :, ::2])
        assert torch.equal(upper[:, :, : sizes[1] // 2], bits[:, :, 1::2])


@given(SIZES)
@settings(max_examples=30, deadline=None)
def test_int8_tables_are_within_half_a_step(sizes: tuple[int, int, int]) -> None:
    t = table(*sizes)
    packed = packing.pack(t, TableDtype.INT8)
    assert packed.scales is not None
    for p in range(sizes[2]):
        scale = packed.scales[p // packing.SCALE_PAIRS]
        group = t[..., p // packing.SCALE_PAIRS * packing.SCALE_PAIRS :][..., : packing.SCALE_PAIRS]
        assert torch.allclose(scale, group.abs().amax((0, 1, 3)) / 127)
        error = (packing.unpack(packed) - t)[..., p].abs()
        assert (error <= 0.501 * scale).all()


def test_int8_words_hold_the_corners_of_cells() -> None:
    values = torch.randint(-128, 128, (5, 5, 3, 2), dtype=torch.int8)
    words = packing.cells(values)
    assert words.shape == (4, 4, 3, 2)
    for byte, (i, j) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        corner = words << (24 - 8 * byte) >> 24
        assert torch.equal(corner, values[i : i + 4, j : j + 4].int())
    assert torch.equal(packing.corners(words), values)


def test_zero_tables() -> None:
    for dtype in NARROW:
        assert (packing.unpack(packing.pack(torch.zeros(4, 4, 2, 3), dtype)) == 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_int8_refuses_what_has_no_scale(value: float) -> None:
    t = table()
    t[0, 1, 2, 3] = value
    with pytest.raises(ValueError, match="infinities or NaN"):
        packing.pack(t, TableDtype.INT8)


def test_float32_is_not_packed() -> None:
    with pytest.raises(ValueError, match="float32 is not packed"):
        packing.pack(table(), TableDtype.FLOAT32)


@pytest.mark.parametrize("grids", [3, 4, 10, 18, 26, 40, 64, 256])
def test_weights_of_int8_fit_16_bits_within_reach(grids: int) -> None:
    """What the kernel relies on: below 64 where no input is beyond +-6."""
    borders = knots(grids).double()
    x = torch.linspace(-6, 6, 1001, dtype=torch.double)
    cell = (torch.bucketize(x, borders) - 1).clamp(0, grids - 1)
    d = (x - borders[cell]) / (borders[cell + 1] - borders[cell])
    largest = torch.maximum(d.abs(), (1 - d).abs()).max()
    assert largest**2 < 64


def smooth_table(grids: int, outputs: int, pairs: int) -> Tensor:
    """Sums of soft steps in random directions: what trained functions look like."""
    g = knots(grids)
    u, v = (t[..., None, None] for t in torch.meshgrid(g, g, indexing="ij"))
    out = torch.zeros(grids + 1, grids + 1, outputs, pairs)
    for _ in range(3):
        a, b, w1, w2 = torch.randn(4, outputs, pairs)
        out += a * torch.tanh(w1 * u + w2 * v + b)
    return out


@pytest.mark.parametrize("grids", [10, 18, 26])
def test_int8_error_of_smooth_functions(grids: int) -> None:
    torch.manual_seed(grids)
    t, borders = smooth_table(grids, 16, 32), knots(grids)
    x = 1.5 * torch.randn(64, 2000)
    y, rounded = torch.empty(16, 2000), torch.empty(16, 2000)
    reference.forward(x, t, borders, y)
    reference.forward(x, packing.unpack(packing.pack(t, TableDtype.INT8)), borders, rounded)
    assert (rounded - y).norm() <= 0.01 * y.norm()


@given(SIZES, st.sampled_from([16, 32]))
@settings(max_examples=30, deadline=None)
def test_fragments_hold_each_coefficient_once(sizes: tuple[int, int, int], pairs: int) -> None:
    """Where its lane looks for it, with the ratio of its scale; zeros beyond the edges."""
    grids, outputs, all_pairs = sizes[0], 9 * sizes[1], 3 * sizes[2]
    t = table(grids, outputs, all_pairs) * 10 ** torch.empty(all_pairs).uniform_(-1, 1)
    t *= 10 ** torch.empty(outputs, 1).uniform_(-20, 20)
    packed = packing.pack(t, TableDtype.INT8)
    assert packed.scales is not None
    made, largest = packing.fragments(packing.corners(packed.words), packed.scales, pairs)
    knots = (grids + 1) ** 2
    assert made.shape == (-(-outputs // 32), -(-all_pairs // pairs), 1 + knots, pairs // 16, 32, 16)
    assert torch.equal(largest, packed.scales.amax(0))

    o, p = torch.meshgrid(torch.arange(outputs), torch.arange(all_pairs), indexing="ij")
    lane, word = o % 8 * 4 + p % 16 // 4, o % 32 // 8
    of_lanes = made[o // 32, p // pairs, :, p % pairs // 16, lane]  # [O, P, 1 + knots, 16]
    numbers = of_lanes[:, :, 0].view(torch.float16)
    ratio, addend = (numbers.gather(2, (2 * word + k).unsqueeze(2)) for k in (0, 1))
    at = (4 * word + p % 4)[:, :, None, None].expand(-1, -1, knots, 1)
    bytes_ = of_lanes[:, :, 1:].gather(3, at).squeeze(3)
    values = packing.corners(packed.words).flatten(0, 1).permute(1, 2, 0)
    assert torch.equal(bytes_.short() - 128, values.short())
    assert int((made[:, :, 1:] != 128).sum()) == int((values != 0).sum())

    # as tensor cores get them: of float16 numbers with the bits of these bytes
    products = bytes_.short().view(torch.float16).double() * ratio.double() + addend.double()
    found = (products * 2**9 * largest[:, None, None]).permute(2, 0, 1).view(t.shape)
    expected = packing.unpack(packed)
    assert ((found - expected).abs() <= 2**-11 * expected.abs() + 1e-6 * largest[:, None]).all()


@pytest.mark.parametrize("dtype", NARROW)
def test_forms_of_a_rounded_table_are_those_of_its_words(dtype: TableDtype) -> None:
    rounded = packing.round_table(table(outputs=8, pairs=8), dtype)
    names = ["rows", "words", packing.Stages(4, 8, 1)]
    names += [packing.Fragments(16), packing.FRAGMENT_SCALES] if dtype is TableDtype.INT8 else []
    names = names[1:] if dtype is TableDtype.INT8 else names
    found = packing.arranged({}, names, dtype, rounded)
    assert set(names) <= found.keys()
    of_words = packing.arranged(rounded.packed().buffers(), names[1:], dtype)
    for name in names[1:]:
        assert torch.equal(found[name], of_words[name])
    if "rows" in found:
        assert torch.equal(found["rows"], rounded.values.permute(3, 0, 1, 2))
    # and where a kernel computes in float32 after all
    plain = packing.arranged({}, ["table"], TableDtype.FLOAT32, rounded)["table"]
    assert torch.equal(plain, packing.unpack(rounded.packed()))
