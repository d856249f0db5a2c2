"""Sums in a fixed order, above all cell-sorted gradients: CUDA sources run on the CPU, and plans.

`test_deterministic.py` has the tests on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lmkan_gen.device import Device, target
from lmkan_gen.families import Family, Parameters, family
from lmkan_gen.plan import Fill, Launch, LaunchPlan
from lmkan_gen.problem import LayerShape, Operation, Problem, TableDtype
from lmkan_gen.tuner.verify import make_case, output_shapes
from tests import emulation

CELLS = family("cell_sorted")
SORTING = 1024
PARAMETERS = {"items": 1, "segment": 256, "vector": 1, "unroll": 2, "blocks": 2}
GRADIENTS = (Operation.GRAD_TABLE, Operation.BACKWARD)


#: so small that launches of a few chunks fill it
GPU = Device("cuda", "A GPU", "sm_80", 1, 163 * 1024, 164 * 1024)


def gradients(
    problem: Problem,
    parameters: Parameters,
    inputs: Mapping[str, Tensor],
    directory: Path,
    seed: int = 0,
    kind: Family = CELLS,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All that the emulated kernels write, and their workspaces."""
    assert kind.violations(problem, parameters) == []
    shapes = output_shapes(problem.operation, problem.shape)
    outputs = {name: torch.full(size, torch.nan) for name, size in shapes.items()}
    spec, plan = kind.spec(problem, parameters), kind.plan(problem, parameters)
    scratch = emulation.run(spec, plan, directory, {**inputs, **outputs}, seed)
    return outputs, scratch


def copied(found: Mapping[str, Tensor]) -> Callable[[Mapping[str, Tensor]], None]:
    """What puts results at hand where a case looks for them."""

    def run(buffers: Mapping[str, Tensor]) -> None:
        for name, value in found.items():
            buffers[name].copy_(value)

    return run


def launches(plan: LaunchPlan, kernel: str) -> list[Launch]:
    return [s for s in plan.steps if isinstance(s, Launch) and kernel in s.kernel]


def size_of(plan: LaunchPlan, name: str) -> int:
    return next(w.bytes for w in plan.workspaces if w.name == name)


def sums_bytes(shape: LayerShape, vector: int = 1) -> int:
    return 4 * shape.pairs * shape.knots * -(-shape.outputs // (32 * vector)) * 32 * vector


#: operation, shape, changed parameters, workspace, copies of the sums, walks. One chunk and the fewest cells;
#: two chunks; a copy for each of three; room for one at a time; chunks two at a time, with planes of their
#: own for upper corners; one at a time; several rounds in the sort, two outputs a lane
CASES = [
    (Operation.BACKWARD, LayerShape(2, 3, 3, 900), {}, 1 << 28, 1, 1),
    (Operation.GRAD_TABLE, LayerShape(4, 37, 5, 2011), {"unroll": 4}, 1 << 28, 2, 1),
    (Operation.GRAD_TABLE, LayerShape(2, 7, 17, 2200), {"segment": 32}, 1 << 28, 3, 1),
    (Operation.GRAD_TABLE, LayerShape(2, 33, 4, 2100), {"segment": 512}, 300_000, 3, 3),
    (Operation.GRAD_TABLE, LayerShape(4, 40, 4, 4100), {"segment": 128}, 1 << 28, 4, 3),
    (Operation.BACKWARD, LayerShape(2, 4, 8, 2300), {}, 150_000, 2, 3),
    (
        Operation.BACKWARD,
        LayerShape(2, 34, 6, 4100),
        {"items": 2, "vector": 2},
        1 << 28,
        3,
        1,
    ),
]


@pytest.mark.parametrize(("operation", "shape", "changes", "workspace", "copies", "walks"), CASES)
def test_right_in_emulation(
    emulated: Path,
    operation: Operation,
    shape: LayerShape,
    changes: dict[str, int],
    workspace: int,
    copies: int,
    walks: int,
) -> None:
    problem = Problem(operation, shape, GPU, deterministic=True, workspace=workspace)
    parameters = {**PARAMETERS, **changes}
    plan = CELLS.plan(problem, parameters)
    assert size_of(plan, "sums") == copies * sums_bytes(shape, parameters["vector"])
    assert len(launches(plan, "_walk")) == walks
    case = make_case(operation, shape, torch.device("cpu"), 2.0, 64)
    found, _ = gradients(problem, parameters, case.inputs, emulated)
    case.check(copied(found), str(shape))
    again, _ = gradients(problem, parameters, case.inputs, emulated, seed=1)
    for name, value in found.items():
        assert torch.equal(again[name], value), name


@pytest.mark.parametrize(("outputs", "vector"), [(10, 4), (32, 8), (100, 8)])
def test_right_with_several_runs_in_a_warp(emulated: Path, outputs: int, vector: int) -> None:
    """Some of which have no samples, and leave nothing at the edges."""
    shape = LayerShape(4, outputs, 4, 3300)
    problem = Problem(Operation.BACKWARD, shape, target("sm_90"), deterministic=True)
    parameters = {**PARAMETERS, "vector": vector, "segment": 64}
    assert int(CELLS.spec(problem, parameters).context["lanes"]) < 32
    case = make_case(Operation.BACKWARD, shape, torch.device("cpu"), 2.0, 64)
    found, _ = gradients(problem, parameters, case.inputs, emulated)
    case.check(copied(found), str(shape))
    again, _ = gradients(problem, parameters, case.inputs, emulated, seed=1)
    for name, value in found.items():
        assert torch.equal(again[name], value), name


@pytest.mark.parametrize("coordinates", ["inline", "prepass"])
@pytest.mark.parametrize(
    ("operation", "inputs", "outputs"),
    [(Operation.FORWARD, 35, 9), (Operation.GRAD_INPUT, 11, 38), (Operation.GRAD_INPUT, 8, 38)],
)
def test_parts_of_tile_stationary_sums_are_added_in_order(
    emulated: Path, operation: Operation, inputs: int, outputs: int, coordinates: str
) -> None:
    tiles, shape = family("tile_stationary"), LayerShape(inputs, outputs, 4, 75)
    parameters: Parameters = {
        "pairs": 4, "outs": 8, "threads": 128, "ahead": 2, "access": "rotated", "ranges": "even",
        "coordinates": coordinates,
    }  # fmt: skip
    problem = Problem(operation, shape, target("sm_80"), deterministic=True)
    width = outputs if operation is Operation.FORWARD else inputs
    # as many as there are tiles to sum over
    assert size_of(tiles.plan(problem, parameters), "parts") == 5 * 4 * width * shape.batch
    case = make_case(operation, shape, torch.device("cpu"), 2.0, 64)
    found, _ = gradients(problem, parameters, case.inputs, emulated, kind=tiles)
    case.check(copied(found), str(shape))
    again, _ = gradients(problem, parameters, case.inputs, emulated, seed=1, kind=tiles)
    for name, value in found.items():
        assert torch.equal(again[name], value), name
    usual = replace(problem, deterministic=False)
    name = "y" if operation is Operation.FORWARD else "grad_x"
    first, *others = (
        gradients(usual, parameters, case.inputs, emulated, k, tiles)[0][name] for k in range(4)
    )
    assert any(not torch.equal(first, other) for other in others)


def test_the_usual_order_varies(emulated: Path) -> None:
    """Else the tests above would show nothing."""
    shape = LayerShape(2, 7, 17, 2200)
    problem = Problem(Operation.GRAD_TABLE, shape, GPU)
    inputs = make_case(Operation.GRAD_TABLE, shape, torch.device("cpu"), 2.0, 64).inputs
    results = [gradients(problem, PARAMETERS, inputs, emulated, seed)[0]["grad_table"] for seed in (0, 1)]
    assert not torch.equal(*results)


@pytest.mark.parametrize("skew", ["normal", "one cell", "edges of the grid"])
def test_samples_of_a_cell_stay_in_their_order(emulated: Path, skew: str) -> None:
    shape = LayerShape(2, 3, 6, 2200)
    parameters = {**PARAMETERS, "items": 2}
    problem = Problem(Operation.GRAD_TABLE, shape, GPU, deterministic=True)
    inputs = dict(make_case(Operation.GRAD_TABLE, shape, torch.device("cpu"), 1.0, 64).inputs)
    if skew == "one cell":
        inputs["x"] = torch.rand_like(inputs["x"]) * 0.1 + 0.05
    if skew == "edges of the grid":
        inputs["x"] = 1e9 * torch.randn_like(inputs["x"]).sign()
        inputs["x"][:, ::97] = torch.nan
    found, scratch = gradients(problem, parameters, inputs, emulated)
    chunk = SORTING * parameters["items"]
    # d1, d2, sample, knot
    records = scratch["records"].view(torch.int32).view(-1, shape.pairs, chunk, 4)
    for first, of_chunk in zip(range(0, shape.batch, chunk), records, strict=True):
        count = min(chunk, shape.batch - first)
        for run in of_chunk[:, :count]:
            samples, knots = run[:, 2].long(), run[:, 3].long()
            assert torch.equal(samples.sort()[0], torch.arange(first, first + count))
            key = knots * shape.batch + samples
            assert bool((key[1:] > key[:-1]).all())
    if skew == "one cell":
        total = found["grad_table"].double().sum((0, 1))
        expected = inputs["grad"].double().sum(1)[:, None].expand_as(total)
        torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-3)


def test_what_is_not_a_number_stays_in_its_cell(emulated: Path) -> None:
    """As in the usual order."""
    shape = LayerShape(2, 5, 8, 300)
    inputs = dict(make_case(Operation.BACKWARD, shape, torch.device("cpu"), 1.0, 64).inputs)
    inputs["x"][0, 70] = torch.nan
    inputs["x"][1, 71] = torch.inf
    problems = [Problem(Operation.BACKWARD, shape, GPU, deterministic=d) for d in (False, True)]
    usual, ordered = (gradients(p, PARAMETERS, inputs, emulated)[0] for p in problems)
    for name, value in ordered.items():
        assert not bool(value.isfinite().all()), name
        assert torch.equal(value.isfinite(), usual[name].isfinite()), name
        torch.testing.assert_close(value, usual[name], equal_nan=True, rtol=1e-5, atol=1e-4)


# --- plans ----------------------------------------------------------------------------------------

SHAPES = (
    LayerShape(512, 512, 18, 1 << 18),
    LayerShape(512, 512, 18, 1 << 20),
    LayerShape(512, 512, 100, 1 << 16),
    LayerShape(12, 256, 28, 1 << 16),
    LayerShape(12, 256, 28, 1 << 22),
    LayerShape(128, 128, 10, 16384),
    LayerShape(4096, 4096, 4, 64),
    LayerShape(34, 33, 9, 65),
)


@pytest.mark.parametrize("arch", ["sm_75", "sm_86", "sm_90"])
@pytest.mark.parametrize("table", [TableDtype.FLOAT32, TableDtype.FLOAT16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mebibytes", [64, 256])
def test_scratch_memory_is_bounded(arch: str, table: TableDtype, shape: LayerShape, mebibytes: int) -> None:
    """Besides two copies of the sums, the workspace holds everything."""
    problem = Problem(
        Operation.GRAD_TABLE, shape, target(arch), table, deterministic=True, workspace=mebibytes << 20
    )
    parameters = CELLS.default(problem)
    assert parameters is not None
    plan = CELLS.plan(problem, parameters)
    of_warp = int(CELLS.spec(problem, parameters).context["lanes"]) * int(parameters["vector"])
    padded = -(-shape.outputs // of_warp) * of_warp
    copy = 4 * shape.pairs * shape.knots * padded
    sizes = {w.name: w.bytes for w in plan.workspaces}
    assert sizes["sums"] % copy == 0
    row = 4 * padded  # of zeros
    most = problem.workspace + row + min(2, -(-shape.batch // SORTING)) * copy
    assert sizes["records"] + sizes["gradients"] + sizes["edges"] + sizes["sums"] <= most


def test_a_launch_covers_all_chunks_once() -> None:
    shape = LayerShape(512, 512, 18, (1 << 18) + 5)
    problem = Problem(Operation.GRAD_TABLE, shape, target("sm_90"), deterministic=True)
    parameters = {"items": 8, "segment": 512, "vector": 8, "unroll": 2, "blocks": 2}
    plan = CELLS.plan(problem, parameters)
    walks, edges = launches(plan, "_walk"), launches(plan, "add_edges")
    assert sum(w.grid[2] for w in walks) == 33 * shape.pairs
    assert [e.grid[2] * shape.pairs for e in edges] == [w.grid[2] for w in walks]
    assert all(w.grid[2] <= 65535 for w in walks)
    assert [s for s in plan.steps if isinstance(s, Fill)] == [Fill("sums")]


@pytest.mark.parametrize(("chunks", "copies"), [(1, 1), (2, 2), (12, 8)])
def test_copies_of_sums_are_added_where_there_are_several(chunks: int, copies: int) -> None:
    """Also where chunks share copies, of which there are two for each then: lower and upper corners."""
    problem = Problem(
        Operation.BACKWARD, LayerShape(4, 40, 6, chunks * SORTING), GPU, deterministic=True, workspace=1 << 30
    )
    plan = CELLS.plan(problem, PARAMETERS)
    added = launches(plan, "lmkan_add_copies")
    (sums,) = (w for w in plan.workspaces if w.name == "sums")
    one = 4 * 64 * problem.shape.knots * problem.shape.pairs
    assert sums.bytes == copies * one
    assert [launch.arguments[1:] for launch in added] == ([(one // 4, copies)] if copies > 1 else [])


def test_more_blocks_than_two_along_outputs_are_refused() -> None:
    shape = LayerShape(8, 1024, 6, 4096)
    parameters = {"items": 4, "segment": 512, "vector": 1, "unroll": 2, "blocks": 2}
    for operation in (Operation.BACKWARD, Operation.GRAD_INPUT):
        problem = Problem(operation, shape, target("sm_90"), deterministic=True)
        (violation,) = CELLS.violations(problem, parameters)
        assert violation.limit == "deterministic"
        assert "vector=1 divides outputs among 4 blocks" in violation.message
        assert CELLS.violations(problem, {**parameters, "vector": 2}) == []
        assert CELLS.violations(replace(problem, deterministic=False), parameters) == []
    # the table's gradient has no such sums
    problem = Problem(Operation.GRAD_TABLE, shape, target("sm_90"), deterministic=True)
    assert CELLS.violations(problem, parameters) == []


def test_a_sort_that_does_not_fit_is_refused() -> None:
    problem = Problem(
        Operation.GRAD_TABLE, LayerShape(64, 64, 40, 1 << 16), target("sm_86"), deterministic=True
    )
    parameters = {"items": 32, "segment": 128, "vector": 2, "unroll": 2, "blocks": 2}
    (violation,) = CELLS.violations(problem, parameters)
    assert violation.limit == "shared_memory"
    assert "items=32 needs" in violation.message
    assert CELLS.violations(problem, {**parameters, "items": 16}) == []


@pytest.mark.parametrize("operation", [*GRADIENTS, Operation.GRAD_INPUT])
def test_only_sums_over_samples_have_another_source(operation: Operation) -> None:
    problem = Problem(operation, LayerShape(64, 64, 8, 4096), target("sm_90"))
    specs = {CELLS.spec(replace(problem, deterministic=d), PARAMETERS) for d in (False, True)}
    assert len(specs) == (1 if operation is Operation.GRAD_INPUT else 2)
