"""Tables as dense factors on tensor cores: right for any width, far samples included, in a fixed order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmkan_gen import device as devices
from lmkan_gen import packing, selection
from lmkan_gen.device import models, target
from lmkan_gen.families import family
from lmkan_gen.plan import Constant, Launch
from lmkan_gen.problem import LayerShape, Operation, Problem, TableDtype
from lmkan_gen.tuner.verify import make_case, make_inputs
from tests import emulation, layouts

FAMILY = family("matrix_product")
GPU = target("sm_90")
CPU = torch.device("cpu")
FORWARD, GRAD_INPUT, GRAD_TABLE = Operation.FORWARD, Operation.GRAD_INPUT, Operation.GRAD_TABLE
FLOAT32, FLOAT16 = TableDtype.FLOAT32, TableDtype.FLOAT16
BFLOAT16, INT8 = TableDtype.BFLOAT16, TableDtype.INT8
WIDE = LayerShape(4096, 4096, 4, 64)
#: what GPUs are tried with
VARIANTS: dict[Operation, list[tuple[int, ...]]] = {
    FORWARD: [
        (64, 8, 2, 32, 128, 6),
        (32, 4, 1, 16, 64, 3),
        (128, 4, 1, 16, 32, 4),
        (64, 16, 1, 16, 64, 8),
        (64, 8, 4, 32, 128, 4),
        (128, 4, 2, 16, 64, 8),
    ],
    GRAD_INPUT: [(352, 64, 12, 3), (64, 32, 4, 6), (128, 64, 8, 4)],
    GRAD_TABLE: [(256, 64, 16, 2), (64, 32, 4, 1), (128, 128, 4, 1)],
}

#: operation, table, parameters in the order of the space, shape
EMULATED: list[tuple[Operation, TableDtype, tuple[int, ...], tuple[int, int, int, int]]] = [
    (GRAD_INPUT, FLOAT32, (64, 32, 4, 3), (40, 36, 3, 33)),
    (GRAD_INPUT, FLOAT32, (64, 64, 4, 4), (35, 90, 4, 40)),
    (GRAD_INPUT, FLOAT32, (64, 32, 4, 12), (133, 7, 3, 5)),
    (GRAD_TABLE, FLOAT32, (64, 32, 4, 4), (40, 36, 3, 33)),
    (GRAD_TABLE, FLOAT32, (64, 32, 4, 1), (35, 70, 4, 40)),
    (GRAD_TABLE, FLOAT32, (64, 64, 4, 2), (131, 20, 3, 70)),
    (GRAD_TABLE, FLOAT32, (128, 128, 4, 1), (7, 18, 5, 100)),
    (FORWARD, FLOAT32, (32, 4, 1, 16, 32, 3), (80, 70, 3, 33)),
    (FORWARD, FLOAT32, (64, 4, 2, 32, 64, 4), (71, 30, 4, 65)),
    (FORWARD, FLOAT16, (32, 4, 1, 16, 32, 3), (80, 71, 3, 33)),
    (FORWARD, FLOAT16, (64, 4, 2, 32, 64, 4), (71, 29, 4, 65)),
    (FORWARD, BFLOAT16, (128, 4, 1, 16, 64, 4), (73, 30, 3, 40)),
    (FORWARD, INT8, (32, 4, 2, 16, 32, 3), (80, 71, 3, 33)),
    (FORWARD, INT8, (64, 4, 2, 32, 64, 8), (71, 29, 4, 65)),
    (FORWARD, INT8, (32, 4, 4, 32, 64, 4), (135, 133, 4, 20)),  # the last warp has a block of 32 too many
]


def problem(operation: Operation, table: TableDtype, shape: LayerShape, **more: bool | int) -> Problem:
    return Problem(operation, shape, GPU, table, constant=True, **more)  # type: ignore[arg-type]


def named(operation: Operation, values: tuple[int, ...]) -> dict[str, Constant]:
    return dict(zip(FAMILY.space(operation), values, strict=True))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulation")


def emulate(asked: Problem, parameters: dict[str, Constant], directory: Path, seed: int = 0) -> layouts.Run:
    run = emulation.prepare(FAMILY, asked, parameters, directory, seed)
    names = FAMILY.plan(asked, parameters).buffers
    return lambda buffers: run(packing.arranged(buffers, names, asked.table))


@pytest.mark.parametrize(
    ("operation", "table", "values", "sizes"), EMULATED, ids=[f"{e[0]}-{e[1]}-{e[2]}" for e in EMULATED]
)
def test_right_in_emulation(
    directory: Path,
    operation: Operation,
    table: TableDtype,
    values: tuple[int, ...],
    sizes: tuple[int, int, int, int],
) -> None:
    """Tails of all kinds, outputs poisoned, and workspaces as the run before left them."""
    asked, parameters = problem(operation, table, LayerShape(*sizes)), named(operation, values)
    assert FAMILY.violations(asked, parameters) == []
    case = make_case(operation, asked.shape, CPU, spread=3.0, most=256, table=table)
    case.check(emulate(asked, parameters, directory), str(parameters))


@settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(EMULATED), st.integers(1, 70), st.integers(1, 40), st.integers(1, 40))
def test_any_width(
    directory: Path,
    example: tuple[Operation, TableDtype, tuple[int, ...], tuple[int, int, int, int]],
    inputs: int,
    outputs: int,
    batch: int,
) -> None:
    operation, table, values, sizes = example
    asked = problem(operation, table, LayerShape(inputs, outputs, sizes[2], batch))
    case = make_case(operation, asked.shape, CPU, spread=1.0, most=256, table=table)
    case.check(emulate(asked, named(operation, values), directory), str(asked.shape))


@pytest.mark.parametrize(
    ("operation", "table"),
    [(FORWARD, FLOAT32), (FORWARD, INT8), (GRAD_INPUT, FLOAT32), (GRAD_TABLE, FLOAT32)],
)
def test_order_of_blocks_does_not_matter(directory: Path, operation: Operation, table: TableDtype) -> None:
    """The same bits, whichever block comes first: every sum has one order."""
    _, _, values, sizes = next(e for e in EMULATED if e[:2] == (operation, table))
    asked, parameters = (
        problem(operation, table, LayerShape(*sizes), deterministic=True),
        named(operation, values),
    )
    assert FAMILY.violations(asked, parameters) == []
    inputs = make_inputs(operation, asked.shape, CPU, seed=3, spread=2.0, table=table)
    results: list[dict[str, Tensor]] = []
    for seed in (0, 1):
        outputs = {n: torch.full(t.shape, torch.nan) for n, t in layouts.right(operation, inputs).items()}
        emulate(asked, parameters, directory, seed)({**inputs, **outputs})
        results.append(outputs)
    for name, first in results[0].items():
        assert torch.equal(first, results[1][name])


@pytest.mark.parametrize("table", TableDtype)
def test_far_samples_keep_their_weights(directory: Path, table: TableDtype) -> None:
    """Their products exceed float16 by far; and a NaN stays in its sample."""
    values = (32, 4, 2, 16, 32, 3)
    asked = problem(FORWARD, table, LayerShape(80, 9, 3, 6))
    inputs = make_inputs(FORWARD, asked.shape, CPU, seed=5, table=table)
    inputs["x"][0:2, 1] = torch.tensor([4000.0, -3000.0])
    inputs["x"][70:72, 2] = torch.tensor([-1e15, 1e15])
    inputs["x"][4, 4] = torch.nan
    y = torch.full((9, 6), 5.0)
    expected = layouts.right(FORWARD, inputs)["y"]
    emulate(asked, named(FORWARD, values), directory)({**inputs, "y": y})
    assert y[:, 4].isnan().all()
    limit = {FLOAT32: 5e-6, FLOAT16: 1e-3, BFLOAT16: 8e-3, INT8: 1e-3}[table]
    for sample in (0, 1, 2, 3, 5):
        difference = (y[:, sample] - expected[:, sample]).norm() / expected[:, sample].norm()
        assert difference <= limit, sample


@pytest.mark.parametrize(("operation", "table"), [(FORWARD, FLOAT32), (FORWARD, INT8), (GRAD_INPUT, FLOAT32)])
def test_magnitudes_do_not_matter(directory: Path, operation: Operation, table: TableDtype) -> None:
    """Factors are of float16, which has 5 bits of exponent: powers of two change no other bit."""
    _, _, values, sizes = next(e for e in EMULATED if e[:2] == (operation, table))
    asked = problem(operation, table, LayerShape(*sizes))
    inputs = make_inputs(operation, asked.shape, CPU, seed=7, spread=2.0)
    name, shape = ("y", (sizes[1], sizes[3])) if operation is FORWARD else ("grad_x", (sizes[0], sizes[3]))
    results = []
    for power in (0, 60, -60):
        factors = {"table": 2.0**power, "grad": 2.0 ** (-power // 2)}
        scaled = {n: t * factors.get(n, 1.0) for n, t in inputs.items()}
        found = torch.full(shape, torch.nan)
        emulate(asked, named(operation, values), directory)({**scaled, name: found})
        both = factors["table"] * (factors["grad"] if operation is GRAD_INPUT else 1.0)
        results.append(found / both)
    assert results[0].equal(results[1])
    assert results[0].equal(results[2])


@pytest.mark.parametrize("operation", [FORWARD, GRAD_INPUT])
def test_magnitudes_may_vary(directory: Path, operation: Operation) -> None:
    """From pair to pair, from knot to knot, from output to output and from sample to sample."""
    _, _, values, sizes = next(e for e in EMULATED if e[0] is operation)
    asked = problem(operation, FLOAT32, LayerShape(*sizes))
    inputs = make_inputs(operation, asked.shape, CPU, seed=8, spread=1.0)
    torch.manual_seed(8)
    table = inputs["table"]
    table *= 10.0 ** torch.empty(table.shape[0], 1, 1, 1).uniform_(-3, 3)
    table *= 10.0 ** torch.empty(table.shape[3]).uniform_(-3, 3)
    if "grad" in inputs:
        inputs["grad"] *= 10.0 ** torch.empty(sizes[3]).uniform_(-15, 15)
    else:
        table *= 10.0 ** torch.empty(sizes[1], 1).uniform_(-1, 1)
    ((name, expected),) = layouts.right(operation, inputs).items()
    found = torch.full(expected.shape, torch.nan)
    emulate(asked, named(operation, values), directory)({**inputs, name: found})
    error = (found.double() - expected).abs().amax(0) / expected.abs().amax(0)
    assert error.max() <= 5e-6  # of each sample by itself


def test_scales_of_bytes_may_vary(directory: Path) -> None:
    """From 8 pairs to the next, and from output to output, of which each counts by itself."""
    _, _, values, sizes = next(e for e in EMULATED if e[:2] == (FORWARD, INT8))
    asked = problem(FORWARD, INT8, LayerShape(*sizes))
    inputs = make_inputs(FORWARD, asked.shape, CPU, seed=9, spread=1.0)
    torch.manual_seed(9)
    table = inputs.pop("table")
    table *= 10.0 ** torch.empty(table.shape[3]).uniform_(-3, 3)
    table *= 10.0 ** torch.empty(sizes[1], 1).uniform_(-20, 20)
    packed = packing.pack(table, INT8)
    expected = layouts.right(FORWARD, {**inputs, "table": packing.unpack(packed)})["y"]
    y = torch.full(expected.shape, torch.nan)
    emulate(asked, named(FORWARD, values), directory)({**inputs, **packed.buffers(), "y": y})
    error = (y.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() <= 1e-3


def test_edges_of_cells(directory: Path) -> None:
    """On the knots, next to them, and beyond the outermost ones."""
    asked = problem(FORWARD, FLOAT32, LayerShape(2, 5, 4, 33))
    inputs = make_inputs(FORWARD, asked.shape, CPU, seed=5)
    knots = inputs["borders"]
    edges = torch.cat((knots, knots.nextafter(torch.tensor(9.0)), knots.nextafter(torch.tensor(-9.0))))
    inputs["x"][0, :15], inputs["x"][1, :15] = edges, edges.flip(0)
    y = torch.full((5, 33), torch.nan)
    emulate(asked, named(FORWARD, (32, 4, 1, 16, 32, 3)), directory)({**inputs, "y": y})
    expected = layouts.right(FORWARD, inputs)["y"]
    assert (y - expected).abs().max() <= 5e-6 * expected.abs().max()


def test_chosen_for_wide_layers_on_tiny_grids() -> None:
    for operation, table in (
        (FORWARD, FLOAT32),
        (FORWARD, FLOAT16),
        (FORWARD, INT8),
        (GRAD_INPUT, FLOAT32),
        (GRAD_TABLE, FLOAT32),
    ):
        usual = problem(operation, table, WIDE)
        assert FAMILY.preference(usual) > 1
        for shape in (replace(WIDE, batch=4096), replace(WIDE, grids=18), replace(WIDE, outputs=64)):
            assert FAMILY.preference(replace(usual, shape=shape)) < 0
        parameters = FAMILY.default(usual)
        assert parameters is not None
        assert not FAMILY.wasted(usual, parameters)
        steps = [s for s in FAMILY.plan(usual, parameters).steps if isinstance(s, Launch)]
        ((x, y, z),) = (s.grid for s in steps if s.kernel == f"lmkan_{operation}")
        assert 120 <= x * y * z <= 264
    # what was tuned for this very shape goes ahead, for another one it does not
    other = problem(GRAD_INPUT, FLOAT32, replace(WIDE, inputs=3000))
    assert selection.select(other).family == "matrix_product"
    for chip in (GPU, *models("sm_90")):
        for shape in (WIDE, replace(WIDE, inputs=3000)):
            choices = selection.select_backward(Problem(Operation.BACKWARD, shape, chip))
            assert [c.family for c in choices] == ["matrix_product", "matrix_product"]


def test_bytes_are_for_forward_alone_and_for_tables_that_stay() -> None:
    """A byte a knot: that is half of what the float16 form moves, and a quarter of cells with all corners."""
    assert {o for o in FAMILY.operations if FAMILY.computes(o, INT8)} == {FORWARD}
    asked = problem(FORWARD, INT8, WIDE)
    parameters = FAMILY.default(asked)
    assert parameters is not None
    (name,) = FAMILY.plan(asked, parameters).buffers - {"x", "borders", "y", packing.FRAGMENT_SCALES}
    assert name == packing.Fragments(int(parameters["pairs"]))
    changing = replace(asked, constant=False)
    assert [v.limit for v in FAMILY.violations(changing, parameters)] == ["constant"]
    assert FAMILY.default(changing) is None
    odd = FAMILY.violations(asked, {**parameters, "tiles": 1})
    assert [v.limit for v in odd] == ["tile"]
    assert "tiles=1 is odd" in odd[0].message


@pytest.mark.parametrize(
    ("operation", "values", "change", "limit"),
    [
        (GRAD_TABLE, (352, 128, 8, 1), {}, "shared_memory"),
        (GRAD_INPUT, (64, 64, 16, 3), {}, "registers"),
        (GRAD_TABLE, (64, 128, 4, 4), {}, "registers"),
        (FORWARD, (64, 4, 2, 32, 32, 3), {}, "wasted"),
        (FORWARD, (64, 4, 2, 16, 32, 3), {"grids": 16}, "grid"),
        (FORWARD, (64, 4, 2, 16, 32, 3), {"batch": 1 << 20}, "workspace"),
    ],
)
def test_what_does_not_fit_is_said(
    operation: Operation, values: tuple[int, ...], change: dict[str, int], limit: str
) -> None:
    asked = problem(operation, FLOAT32, replace(WIDE, **change))
    assert limit in {v.limit for v in FAMILY.violations(asked, named(operation, values))}


def test_older_gpus_have_no_such_tensor_cores() -> None:
    old = Problem(FORWARD, WIDE, target("sm_75"))
    assert {v.limit for v in FAMILY.violations(old, named(FORWARD, (64, 4, 2, 16, 32, 3)))} == {
        "architecture"
    }
    assert FAMILY.default(old) is None


def test_wasted_candidates_are_not_tried() -> None:
    assert FAMILY.wasted(
        problem(GRAD_INPUT, FLOAT32, replace(WIDE, batch=1024)), named(GRAD_INPUT, (64, 64, 8, 4))
    )
    assert FAMILY.wasted(
        problem(GRAD_TABLE, FLOAT32, replace(WIDE, outputs=64)), named(GRAD_TABLE, (256, 64, 8, 4))
    )
    assert FAMILY.wasted(
        problem(FORWARD, FLOAT32, replace(WIDE, inputs=64)), named(FORWARD, (64, 8, 2, 16, 512, 4))
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize(
    ("operation", "table"),
    [
        (FORWARD, FLOAT32),
        (FORWARD, FLOAT16),
        (FORWARD, BFLOAT16),
        (FORWARD, INT8),
        (GRAD_INPUT, FLOAT32),
        (GRAD_TABLE, FLOAT32),
    ],
)
@pytest.mark.parametrize(
    "shape",
    [
        LayerShape(333, 130, 3, 70),
        LayerShape(640, 700, 4, 64),
        LayerShape(64, 64, 9, 200),
        LayerShape(1024, 512, 6, 33),
    ],
)
def test_right(operation: Operation, table: TableDtype, shape: LayerShape) -> None:
    from lmkan_gen.launch import cuda

    device = torch.device("cuda", 0)
    asked = Problem(operation, shape, devices.cuda(0), table, constant=True)
    case = make_case(operation, shape, device, 1.5, 256, table)
    for values in VARIANTS[operation]:
        parameters = named(operation, values)
        if FAMILY.violations(asked, parameters):
            continue
        plan = FAMILY.plan(asked, parameters)
        run = cuda.prepare(FAMILY.spec(asked, parameters), plan, device)
        forms = packing.arranged(case.inputs, plan.buffers, table)
        replace(case, inputs=forms).check(run, f"{parameters}")
