"""Few samples: rows of a table that does not change are gathered instead of staging all of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lmkan_gen import LMKAN2DLayer, dispatch, packing, reference, selection
from lmkan_gen.call import Call
from lmkan_gen.device import target
from lmkan_gen.problem import LayerShape, Operation, Problem, TableDtype

GPU = target("sm_90")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


def family(batch: int, grids: int = 18, **more: Any) -> str | None:
    shape = LayerShape(512, 512, grids, batch)
    return selection.select(Problem(Operation.FORWARD, shape, GPU, **more)).family


def test_few_samples_of_a_table_that_stays() -> None:
    assert family(1, constant=True) == "row_gather"
    assert family(64, constant=True, table=TableDtype.FLOAT16) == "row_gather"
    # more samples than a fourth of the knots touch all rows anyway
    assert family(4096, constant=True) == "output_stationary"
    # arranging the table costs more than reading it once
    assert family(1) == "tile_stationary"


def test_grids_beyond_shared_memory() -> None:
    assert family(4096, grids=200) == "row_gather"
    assert family(4096, grids=200, table=TableDtype.INT8) == "row_gather"


def test_deterministic_sums_are_not_split() -> None:
    for batch in (1, 16, 64):
        problem = Problem(Operation.FORWARD, LayerShape(512, 512, 18, batch), GPU, constant=True)
        choice = selection.select(replace(problem, deterministic=True))
        assert choice.family == "row_gather"
        assert int(choice.parameters["slice"]) >= 256


@pytest.mark.parametrize("dtype", [TableDtype.FLOAT32, TableDtype.FLOAT16, TableDtype.BFLOAT16])
@pytest.mark.parametrize("outputs", [1, 4, 7])
def test_rows_hold_outputs_together(dtype: TableDtype, outputs: int) -> None:
    table = torch.randn(5, 5, outputs, 3)
    rounded = packing.round_table(table, dtype)
    rows = packing.rows(rounded.values, packing.row_pitch(rounded.values.shape[2]))
    assert rows.is_contiguous()
    assert rows.shape == (3, 5, 5, packing.row_pitch(outputs))
    expected = table if dtype is TableDtype.FLOAT32 else packing.unpack(packing.pack(table, dtype))
    assert torch.equal(rows[..., :outputs].float(), expected.permute(3, 0, 1, 2))
    assert rows.dtype == rounded.values.dtype


def test_only_a_frozen_table_counts_as_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    execute = dispatch.execute

    def spy(call: Call, *arguments: Any) -> None:
        seen.append(call.constant)
        execute(call, *arguments)

    monkeypatch.setattr(dispatch, "execute", spy)
    monkeypatch.setenv(dispatch.DISABLE_VARIABLE, "1")
    layer, x = LMKAN2DLayer(4, 6, 5).eval(), torch.randn(6, 3)
    layer(x)
    with torch.no_grad():
        layer(x)
    layer.freeze(torch.float32)(x)
    assert seen == [False, False, True]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("batch", [1, 2, 33])
@pytest.mark.parametrize(("inputs", "outputs"), [(2, 1), (66, 131), (512, 512)])
def test_follows_a_frozen_table(batch: int, inputs: int, outputs: int) -> None:
    dispatch.clear_caches()
    layer = LMKAN2DLayer(18, inputs, outputs, init_scale=1.0).cuda().eval().freeze(torch.float32)
    assert layer.frozen is not None
    x = torch.randn(inputs, batch, device="cuda")
    x[0, 0] = 30.0
    for _ in range(2):
        with torch.no_grad():
            y = layer(x)
            right = reference.evaluate(x.double(), layer.frozen.values.double(), layer.borders.double())
            assert (y - right).norm() <= 5e-6 * right.norm()
            layer.frozen.values.mul_(-1.5)
    assert [u.kernel for u in dispatch.used()] == ["row_gather"]


@pytest.mark.gpu
@needs_gpu
def test_not_finite_stays_in_its_sample() -> None:
    layer = LMKAN2DLayer(18, 64, 40, init_scale=1.0).cuda().eval().freeze(torch.float32)
    x = torch.randn(64, 5, device="cuda")
    with torch.no_grad():
        before = layer(x)
        x[3, 2] = torch.nan
        y = layer(x)
    assert y[:, 2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(y[:, others], before[:, others])
