"""Cell-sorted gradients in their usual order: CUDA sources run on the CPU, and how plans divide work.

`test_fixed_order.py` has those whose sums have a fixed order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lmkan_gen import device as devices
from lmkan_gen.families import Parameters, family
from lmkan_gen.plan import Launch, LaunchPlan
from lmkan_gen.problem import LayerShape, Operation, Problem, TableDtype
from lmkan_gen.tuner.verify import make_case, make_inputs
from tests import emulation, layouts

CELLS = family("cell_sorted")
GPU = devices.target("sm_90")
CPU = torch.device("cpu")
PARAMETERS = {"items": 1, "segment": 64, "vector": 1, "unroll": 2, "blocks": 2}
BACKWARD, GRAD_INPUT, GRAD_TABLE = Operation.BACKWARD, Operation.GRAD_INPUT, Operation.GRAD_TABLE
MIB = 1 << 20


def launches(plan: LaunchPlan, kernel: str) -> list[Launch]:
    return [s for s in plan.steps if isinstance(s, Launch) and kernel in s.kernel]


#: operation, shape, changed parameters, workspace, layout, lanes of a run, sorts, walks.
#: Eight, four and sixteen lanes for a sample; runs that end within a warp, and chunks; pairs in slabs beside
#: whole chunks, and beside slices of the outputs; both on other layouts, with an odd width
CASES = [
    (BACKWARD, LayerShape(6, 10, 4, 1100), {"vector": 4, "segment": 16}, MIB, "batch_last", 8, 1, 1),
    (GRAD_INPUT, LayerShape(7, 32, 4, 1100), {"vector": 8, "segment": 32}, MIB, "batch_first", 4, 1, 1),
    (GRAD_TABLE, LayerShape(4, 100, 5, 1100), {"vector": 8}, MIB, "batch_last", 16, 2, 2),
    (BACKWARD, LayerShape(4, 50, 5, 700), {"vector": 4, "unroll": 4}, 1, "batch_last", 16, 2, 2),
    (BACKWARD, LayerShape(8, 130, 5, 1300), {"vector": 8}, 1_090_000, "batch_last", 32, 4, 4),
    (BACKWARD, LayerShape(40, 70, 4, 600), {"items": 128}, 52 * MIB, "batch_last", 32, 2, 6),
    (GRAD_TABLE, LayerShape(40, 70, 4, 600), {"items": 128}, 52 * MIB, "batch_last", 32, 2, 6),
    (BACKWARD, LayerShape(5, 70, 4, 1100), {"items": 128}, 36 * MIB, "batch_first_gaps", 32, 1, 3),
    # gradients of all outputs fit, whose blocks add to the same elements of the input's gradient
    (GRAD_INPUT, LayerShape(5, 300, 4, 600), {"items": 128, "vector": 4}, 1024 * MIB, "batch_last", 32, 1, 1),
]


@pytest.mark.parametrize(
    ("operation", "shape", "changes", "workspace", "layout", "lanes", "sorts", "walks"), CASES
)
def test_right_in_emulation(
    emulated: Path,
    operation: Operation,
    shape: LayerShape,
    changes: dict[str, int],
    workspace: int,
    layout: str,
    lanes: int,
    sorts: int,
    walks: int,
) -> None:
    problem = Problem(operation, shape, GPU, workspace=workspace, strided=layout != "batch_last")
    parameters = {**PARAMETERS, **changes}
    # chunks that are far too long for the batch are legal
    assert {v.limit for v in CELLS.violations(problem, parameters)} <= {"wasted"}
    spec, plan = CELLS.spec(problem, parameters), CELLS.plan(problem, parameters)
    assert spec.context["lanes"] == lanes
    assert len(launches(plan, "sort")) == sorts
    assert len(launches(plan, "_walk")) == walks

    def run(buffers: Mapping[str, Tensor]) -> None:
        emulation.run(spec, plan, emulated, buffers, seed=1)

    layouts.check(problem, layout, run, plan, CPU)
    if layout == "batch_last":
        inputs = make_inputs(operation, shape, CPU, seed=1, spread=3.0)
        outputs = {n: torch.full(t.shape, torch.nan) for n, t in layouts.right(operation, inputs).items()}
        emulation.check_early_starts(spec, plan, emulated, {**inputs, **outputs}, inputs)


@pytest.mark.parametrize("grids", [5, 100, 126])
def test_samples_of_a_cell_stand_together(emulated: Path, grids: int) -> None:
    """Also where the grid is fine: a walk enters a cell whenever the next sample is in another one."""
    problem = Problem(GRAD_TABLE, LayerShape(2, 4, grids, 1000), GPU)
    x = torch.randn(2, 1000)
    x[:, 500:] = 0.01 * x[:, :500]  # many in a few cells
    inputs = {**make_inputs(GRAD_TABLE, problem.shape, CPU, seed=0), "x": x}
    plan = CELLS.plan(problem, PARAMETERS)
    sort = replace(plan, steps=tuple(launches(plan, "sort")))
    records = emulation.run(CELLS.spec(problem, PARAMETERS), sort, emulated, inputs)["records"]
    records = records.view(torch.int32).view(-1, 4)[:1000]
    assert records[:, 2].sort().values.equal(torch.arange(1000, dtype=torch.int32))
    knots = records[:, 3]
    assert (knots.diff() != 0).sum() == len(knots.unique()) - 1


def volumes(plan: LaunchPlan, operation: Operation) -> dict[tuple[int, int, int], tuple[int, int, int]]:
    """What each walk covers: first sample, pair and output, and how many of each."""
    found = {}
    for sort, walk in zip(_sorts_of_walks(plan), launches(plan, f"lmkan_{operation}_walk"), strict=True):
        first_pair, _, width, first_out, _, count, pairs = walk.arguments[-7:]
        first = sort.arguments[-5]
        assert isinstance(first, int)
        assert isinstance(first_pair, int)
        assert isinstance(first_out, int)
        assert isinstance(count, int)
        assert isinstance(pairs, int)
        assert isinstance(width, int)
        assert (first, first_pair, first_out) not in found
        found[first, first_pair, first_out] = count, pairs, width
    return found


def _sorts_of_walks(plan: LaunchPlan) -> list[Launch]:
    """The sort that each walk's records come from."""
    found: list[Launch] = []
    sort = None
    for step in plan.steps:
        if isinstance(step, Launch) and "sort" in step.kernel:
            sort = step
        if isinstance(step, Launch) and step.kernel.endswith("_walk"):
            assert sort is not None
            found.append(sort)
    return found


@pytest.mark.parametrize("table", [TableDtype.FLOAT32, TableDtype.FLOAT16])
@pytest.mark.parametrize("mebibytes", [64, 256, 2048])
@pytest.mark.parametrize("items", [32, 64, 128, 256])
@pytest.mark.parametrize("vector", [4, 8])
def test_long_chunks_are_divided_until_scratch_memory_holds_them(
    items: int, vector: int, mebibytes: int, table: TableDtype
) -> None:
    """All samples of all pairs and outputs are walked once."""
    shape = LayerShape(512, 512, 100, 300_001)
    problem = Problem(BACKWARD, shape, GPU, table, workspace=mebibytes * MIB)
    parameters: Parameters = {**PARAMETERS, "items": items, "vector": vector, "segment": 256}
    found = CELLS.violations(problem, parameters)
    # the least that is worth a launch: sixteen pairs, and the outputs of a block
    outputs = 32 * vector if items >= 128 else 512
    least = items * 1024 * (16 * 16 + (4 if table is TableDtype.FLOAT32 else 2) * outputs)
    assert {v.limit for v in found} == ({"workspace"} if least > mebibytes * MIB else set())
    if found:
        return
    plan = CELLS.plan(problem, parameters)
    sizes = {w.name: w.bytes for w in plan.workspaces}
    # one row of zeros is more than the samples have
    assert sizes["records"] + sizes["gradients"] <= mebibytes * MIB + 4 * 512
    parts = volumes(plan, BACKWARD)
    assert sum(a * b * c for a, b, c in parts.values()) == shape.batch * 256 * 512
    for (first, pair, out), (count, pairs, width) in parts.items():
        assert first + count <= shape.batch
        assert pair + pairs <= 256
        assert out + width <= 512


@pytest.mark.parametrize(("grids", "least", "most"), [(10, 1, 8), (40, 8, 16), (100, 32, 64)])
def test_untuned_chunks_are_the_longer_the_finer_the_grid(grids: int, least: int, most: int) -> None:
    default = CELLS.default(Problem(BACKWARD, LayerShape(512, 512, grids, 262144), GPU))
    assert default is not None
    assert least <= int(default["items"]) <= most


@pytest.mark.parametrize("outputs", [10, 32, 64, 128, 256, 512])
def test_untuned_lanes_have_many_outputs(outputs: int) -> None:
    problem = Problem(BACKWARD, LayerShape(64, outputs, 12, 65536), GPU)
    default = CELLS.default(problem)
    assert default is not None
    assert int(default["vector"]) == min(8, max(4, outputs // 8))
    assert CELLS.violations(problem, default) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("operation", [BACKWARD, GRAD_INPUT, GRAD_TABLE])
@pytest.mark.parametrize("items", [64, 128, 256])
@pytest.mark.parametrize("mebibytes", [256, 1024])
def test_long_chunks(operation: Operation, items: int, mebibytes: int) -> None:
    from lmkan_gen.launch import cuda

    device, shape = torch.device("cuda", 0), LayerShape(84, 300, 30, 200_003)
    problem = Problem(operation, shape, devices.cuda(0), workspace=mebibytes * MIB)
    case = make_case(operation, shape, device, 1.5, 32)
    for vector, segment in ((4, 256), (1, 512)):
        parameters: Parameters = {**PARAMETERS, "items": items, "vector": vector, "segment": segment}
        assert CELLS.violations(problem, parameters) == []
        run = cuda.prepare(CELLS.spec(problem, parameters), CELLS.plan(problem, parameters), device)
        case.check(run, f"{parameters}")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("outputs", [10, 32, 60, 128])
@pytest.mark.parametrize("operation", [BACKWARD, GRAD_INPUT, GRAD_TABLE])
def test_several_runs_in_a_warp(operation: Operation, outputs: int, deterministic: bool) -> None:
    from lmkan_gen.launch import cuda

    device, shape = torch.device("cuda", 0), LayerShape(20, outputs, 12, 9_003)
    problem = Problem(operation, shape, devices.cuda(0), deterministic=deterministic)
    case = make_case(operation, shape, device, 1.5, 64)
    for vector, segment, unroll in ((2, 64, 4), (4, 16, 2), (4, 64, 4), (8, 32, 2)):
        parameters: Parameters = {**PARAMETERS, "vector": vector, "segment": segment, "unroll": unroll}
        if not CELLS.violations(problem, parameters):
            run = cuda.prepare(CELLS.spec(problem, parameters), CELLS.plan(problem, parameters), device)
            case.check(run, f"{parameters}")
