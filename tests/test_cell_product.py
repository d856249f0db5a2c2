"""Cells as matrix products: gradients of half operands, checked by running CUDA sources on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmkan_gen import device as devices
from lmkan_gen.device import models, target
from lmkan_gen.families import Parameters, cells, family
from lmkan_gen.plan import Launch
from lmkan_gen.problem import LayerShape, Operation, Problem, TableDtype
from lmkan_gen.selection import select
from lmkan_gen.tuner.verify import make_case, make_inputs
from tests import emulation, layouts

FAMILY = family("cell_product")
GPU = target("sm_90")
CPU = torch.device("cpu")
BACKWARD, GRAD_INPUT, GRAD_TABLE = Operation.BACKWARD, Operation.GRAD_INPUT, Operation.GRAD_TABLE
FLOAT16, BFLOAT16 = TableDtype.FLOAT16, TableDtype.BFLOAT16
PARAMETERS = {"items": 1, "segment": 64, "vector": 1, "stages": 3, "blocks": 1}
MIB = 1 << 20

#: operation, table, shape, changed parameters, workspace, layout. Rows of 64 bytes to 512, some of it
#: padding; grids that fit a window and such whose windows end with a row of cells; several chunks, slabs of
#: pairs, slices of outputs, blocks beside each other along them; odd widths, other layouts
CASES: list[tuple[Operation, TableDtype, LayerShape, dict[str, int], int, str]] = [
    (BACKWARD, FLOAT16, LayerShape(6, 10, 4, 1100), {}, MIB, "batch_last"),
    (BACKWARD, BFLOAT16, LayerShape(4, 70, 9, 700), {"vector": 2, "stages": 2}, MIB, "batch_first"),
    (GRAD_INPUT, FLOAT16, LayerShape(7, 130, 3, 1100), {"vector": 4}, MIB, "batch_first"),
    (GRAD_TABLE, FLOAT16, LayerShape(4, 100, 5, 1100), {"vector": 4, "segment": 128}, MIB, "batch_last"),
    (GRAD_TABLE, BFLOAT16, LayerShape(5, 20, 12, 333), {"stages": 4}, MIB, "batch_first_gaps"),
    (BACKWARD, FLOAT16, LayerShape(2, 300, 6, 500), {"vector": 8, "stages": 2}, MIB, "batch_last"),
    (BACKWARD, FLOAT16, LayerShape(6, 600, 4, 200), {"vector": 2, "stages": 2}, MIB, "batch_last"),
    (BACKWARD, FLOAT16, LayerShape(8, 130, 5, 1300), {"vector": 4}, 500_000, "batch_last"),
    (GRAD_INPUT, BFLOAT16, LayerShape(40, 70, 4, 600), {"items": 128}, 46 * MIB, "batch_last"),
]


@pytest.mark.parametrize(("operation", "table", "shape", "changes", "workspace", "layout"), CASES)
def test_right_in_emulation(
    emulated: Path,
    operation: Operation,
    table: TableDtype,
    shape: LayerShape,
    changes: dict[str, int],
    workspace: int,
    layout: str,
) -> None:
    problem = Problem(operation, shape, GPU, table, workspace=workspace, strided=layout != "batch_last")
    parameters = {**PARAMETERS, **changes}
    # chunks that are far too long for the batch are legal
    assert {v.limit for v in FAMILY.violations(problem, parameters)} <= {"wasted"}
    spec, plan = FAMILY.spec(problem, parameters), FAMILY.plan(problem, parameters)

    def run(buffers: Mapping[str, Tensor]) -> None:
        emulation.run(spec, plan, emulated, buffers, seed=1)

    layouts.check(problem, layout, run, plan, CPU)
    if layout == "batch_last":
        inputs = make_inputs(operation, shape, CPU, seed=1, spread=3.0)
        outputs = {n: torch.full(t.shape, torch.nan) for n, t in layouts.right(operation, inputs).items()}
        emulation.check_early_starts(spec, plan, emulated, {**inputs, **outputs}, inputs)


@settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([BACKWARD, GRAD_INPUT, GRAD_TABLE]),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(1, 200),
    st.sampled_from([0.1, 1.0, 5.0]),
)
def test_any_width(
    emulated: Path, operation: Operation, inputs: int, outputs: int, batch: int, spread: float
) -> None:
    problem = Problem(operation, LayerShape(inputs, outputs, 6, batch), GPU, FLOAT16)
    case = make_case(operation, problem.shape, CPU, spread=spread, most=256, table=FLOAT16)
    case.check(emulation.prepare(FAMILY, problem, PARAMETERS, emulated), str(problem.shape))


def errors(run: emulation.Run, inputs: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest of each gradient, in units of its largest value; outputs are poisoned before."""
    wanted = layouts.right(BACKWARD, inputs)
    found = {name: torch.full(t.shape, torch.nan) for name, t in wanted.items()}
    run({**inputs, **found})
    return {n: float((found[n].double() - t).abs().max() / t.abs().max()) for n, t in wanted.items()}


@pytest.mark.parametrize("table", [FLOAT16, BFLOAT16])
def test_weights_beyond_what_float16_holds(emulated: Path, table: TableDtype) -> None:
    """Of samples far out in both directions, next to others in the same step."""
    shape = LayerShape(2, 8, 5, 40)
    inputs = make_inputs(BACKWARD, shape, CPU, seed=0, spread=1.0, table=table)
    inputs["x"][:, ::7] *= 3000.0
    assert layouts.right(BACKWARD, inputs)["grad_table"].abs().max() > 1e6
    run = emulation.prepare(FAMILY, Problem(BACKWARD, shape, GPU, table), PARAMETERS, emulated)
    for name, error in errors(run, inputs).items():
        assert error < (1e-3 if table is FLOAT16 else 8e-3), name


def test_samples_of_a_bucket_may_come_in_any_order(emulated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets of the sort have several cells where a grid is fine; windows then go to and fro."""
    monkeypatch.setattr(cells, "_MAX_BUCKETS", 1024)
    problem = Problem(BACKWARD, LayerShape(2, 4, 40, 300), GPU, FLOAT16)
    assert FAMILY.spec(problem, PARAMETERS).context["shift"] == 1
    case = make_case(BACKWARD, problem.shape, CPU, spread=0.05, most=300, table=FLOAT16)
    case.check(emulation.prepare(FAMILY, problem, PARAMETERS, emulated), "fine grid")


def test_one_cell_and_equal_samples(emulated: Path) -> None:
    """Sums of a whole segment, and of several that meet in a cell."""
    shape = LayerShape(4, 8, 8, 300)
    for x in (torch.full((4, 300), 0.3), torch.rand(4, 300) * 0.01):
        inputs = {**make_inputs(BACKWARD, shape, CPU, seed=0, table=FLOAT16), "x": x}
        problem = Problem(BACKWARD, shape, GPU, FLOAT16)
        run = emulation.prepare(FAMILY, problem, PARAMETERS, emulated, seed=3)
        for name, error in errors(run, inputs).items():
            assert error < 1e-3, name


def test_only_what_can_be_repeated_bit_by_bit_is_taken_where_that_is_asked_for() -> None:
    shape = LayerShape(512, 512, 18, 65536)
    free = Problem(BACKWARD, shape, GPU, FLOAT16)
    ordered = Problem(BACKWARD, shape, GPU, FLOAT16, deterministic=True)
    default = FAMILY.default(free)
    assert default is not None
    assert FAMILY.violations(free, default) == []
    assert {v.limit for v in FAMILY.violations(ordered, default)} == {"deterministic"}
    assert FAMILY.default(ordered) is None
    assert select(ordered).family == "cell_sorted"


@pytest.mark.parametrize("outputs", [1, 10, 64, 100, 512, 1300])
@pytest.mark.parametrize("operation", [BACKWARD, GRAD_INPUT, GRAD_TABLE])
def test_untuned(outputs: int, operation: Operation) -> None:
    """A warp has as many outputs as there are, up to 128; from Ampere on, not before."""
    problem = Problem(operation, LayerShape(64, outputs, 12, 65536), GPU, BFLOAT16)
    default = FAMILY.default(problem)
    assert default is not None
    assert int(default["vector"]) == min(4, 2 ** max(0, -(-outputs // 32) - 1).bit_length())
    old = Problem(operation, problem.shape, models("sm_75")[0], FLOAT16)
    assert {v.limit for v in FAMILY.violations(old, default)} == {"architecture"}


def test_work_is_done_once() -> None:
    """Plans divide samples, pairs and outputs as those of `cell_sorted` do."""
    problem = Problem(BACKWARD, LayerShape(512, 512, 100, 300_001), GPU, FLOAT16, workspace=64 * MIB)
    plan = FAMILY.plan(problem, {**PARAMETERS, "items": 128, "vector": 4, "segment": 256})
    walks = [s for s in plan.steps if isinstance(s, Launch) and s.kernel == "lmkan_backward_walk"]
    # width, count and pairs of each
    sizes = [[a for a in w.arguments[-7:] if isinstance(a, int)] for w in walks]
    assert sum(s[2] * s[5] * s[6] for s in sizes) == 300_001 * 256 * 512


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("table", [FLOAT16, BFLOAT16])
@pytest.mark.parametrize("operation", [BACKWARD, GRAD_INPUT, GRAD_TABLE])
@pytest.mark.parametrize(
    "shape",
    [
        LayerShape(20, 10, 12, 9_003),
        LayerShape(21, 100, 5, 9_003),
        LayerShape(84, 300, 30, 50_003),
        LayerShape(6, 1300, 9, 5_001),
    ],
)
def test_right(operation: Operation, table: TableDtype, shape: LayerShape) -> None:
    from lmkan_gen.launch import cuda

    device = torch.device("cuda", 0)
    problem = Problem(operation, shape, devices.cuda(0), table)
    case = make_case(operation, shape, device, 1.5, 32, table)
    changes: list[dict[str, int]] = [
        {"vector": 1},
        {"vector": 2, "stages": 2, "segment": 128},
        {"vector": 4, "segment": 256, "items": 4},
        {"vector": 8, "stages": 2, "items": 16},
        {"vector": 4, "stages": 2, "items": 128},
    ]
    for change in changes:
        parameters: Parameters = {**PARAMETERS, **change}
        if {v.limit for v in FAMILY.violations(problem, parameters)} <= {"wasted"}:
            run = cuda.prepare(FAMILY.spec(problem, parameters), FAMILY.plan(problem, parameters), device)
            case.check(run, f"{parameters}")
