"""Kernels of every CUDA family, with parameters that no default has, against the float64 definition."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product
from random import Random

import pytest
import torch

from lmkan_gen import device as devices
from lmkan_gen import packing, toolchain
from lmkan_gen.families import Family, families, walk
from lmkan_gen.plan import Launch
from lmkan_gen.problem import CALL_OPERATIONS, LayerShape, Operation, Problem, TableDtype
from lmkan_gen.selection import default_choice
from lmkan_gen.tuner.verify import make_case

#: partial tiles in both directions and several slabs; whole tiles and odd tails; few samples
SHAPES = (LayerShape(22, 19, 9, 20011), LayerShape(64, 128, 12, 1000), LayerShape(130, 67, 5, 37))
CANDIDATES = 12
FAMILIES = [
    pytest.param(operation, family, table, id=f"{operation}-{table}-{family.name}")
    for operation in CALL_OPERATIONS
    for table in TableDtype
    for family in families("cuda", operation, table)
]


#: what callers have or make of a table, see `lmkan_gen.plan.LaunchPlan`
GIVEN = {"x", "borders", "table", "words", "scales", "rows", "grad", "y", "grad_x", "grad_table"}


@pytest.mark.parametrize(("operation", "family", "table"), FAMILIES)
def test_scratch_memory_is_not_asked_of_the_caller(
    operation: Operation, family: Family, table: TableDtype
) -> None:
    """Under the name of a form of the table it would have callers arrange that form, at every step."""
    plans = []
    for batch, deterministic in product((8, 5000), (False, True)):
        shape = LayerShape(64, 64, 8, batch)
        problem = Problem(operation, shape, devices.target("sm_90"), table, deterministic, constant=True)
        if (parameters := family.default(problem)) is not None:
            plans.append(family.plan(problem, parameters))
    assert plans
    for plan in plans:
        scratch = {workspace.name for workspace in plan.workspaces}
        assert not scratch & (GIVEN | plan.buffers)
        assert {name for name in plan.buffers if not name.startswith(("stages_", "fragment"))} <= GIVEN


@pytest.mark.parametrize("arch", devices.CUDA_ARCHITECTURES)
@pytest.mark.parametrize("outputs", [10, 128, 512])
@pytest.mark.parametrize("grids", [8, 40, 100])
def test_both_gradients_of_an_untuned_gpu_are_sorted(arch: str, outputs: int, grids: int) -> None:
    """The other kernels for both are many times slower, or have no room for the grid."""
    problem = Problem(Operation.BACKWARD, LayerShape(64, outputs, grids, 65536), devices.target(arch))
    choice = default_choice(problem)
    assert choice is not None
    assert choice.family == "cell_sorted"


@pytest.mark.parametrize("mebibytes", [64, 256])
@pytest.mark.parametrize("table", [TableDtype.FLOAT32, TableDtype.FLOAT16])
def test_scratch_memory_of_sorted_gradients_does_not_grow_with_the_batch(
    mebibytes: int, table: TableDtype
) -> None:
    limit, family = mebibytes << 20, families("cuda", Operation.BACKWARD)[0]
    assert family.name == "cell_sorted"
    for batch in (1 << 16, 1 << 18, 1 << 21):
        shape = LayerShape(512, 512, 18, batch)
        problem = Problem(Operation.BACKWARD, shape, devices.target("sm_90"), table, workspace=limit)
        parameters = family.default(problem)
        assert parameters is not None
        plan = family.plan(problem, parameters)
        sizes = {w.name: w.bytes for w in plan.workspaces}
        # one row of zeros is more than the samples have
        assert sizes["records"] + sizes["gradients"] <= limit + 4 * 512
        walks = [s for s in plan.steps if isinstance(s, Launch) and s.kernel.endswith("_walk")]
        assert len(walks) == len([s for s in plan.steps if isinstance(s, Launch) and "sort" in s.kernel])
        if batch == 1 << 21:
            assert len(walks) > 1


@pytest.mark.parametrize("outputs", [1, 32, 260, 384, 512, 1100, 2100])
def test_warps_of_sorted_gradients_cover_rows_exactly(outputs: int) -> None:
    """A warp beyond the end of a row would read and write the next one."""
    family = families("cuda", Operation.BACKWARD)[0]
    problem = Problem(Operation.BACKWARD, LayerShape(4, outputs, 5, 40), devices.target("sm_90"))
    for vector in (1, 2, 4, 8):
        parameters = {"items": 1, "segment": 32, "vector": vector, "unroll": 2, "blocks": 2}
        launches = (s for s in family.plan(problem, parameters).steps if isinstance(s, Launch))
        walk = next(launch for launch in launches if launch.kernel.endswith("_walk"))
        padded = walk.arguments[-3]
        constants = family.spec(problem, parameters).context
        out_warps, lanes = int(constants["out_warps"]), int(constants["lanes"])
        assert walk.grid[1] * out_warps * lanes * vector == padded
        assert isinstance(padded, int)
        assert padded >= outputs


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize(("operation", "family", "table"), FAMILIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
def test_random_parameters(
    operation: Operation, family: Family, table: TableDtype, shape: LayerShape, deterministic: bool
) -> None:
    from lmkan_gen.launch import cuda

    device = torch.device("cuda", 0)
    problem = Problem(operation, shape, devices.cuda(0), table, deterministic, constant=True)
    feasible = list(walk.fitting(family.space(operation), partial(family.first_limit, problem)))
    chosen = Random(f"{operation} {table} {shape}").sample(feasible, min(CANDIDATES, len(feasible)))
    if deterministic and not chosen:
        pytest.skip("no fixed order")
    assert chosen
    toolchain.build([family.spec(problem, c) for c in chosen])
    case = make_case(operation, shape, device, 2.0, 64, table)
    for c in chosen:
        plan = family.plan(problem, c)
        forms = packing.arranged(case.inputs, plan.buffers, table)
        run = cuda.prepare(family.spec(problem, c), plan, device)
        replace(case, inputs=forms).check(run, f"{family.name} {c}")
