"""The CPU families against a float64 evaluation of the formulas: each with every table type that it reads."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkan_gen import LMKAN2DLayer, codegen, packing
from lmkan_gen.device import Device, cpu
from lmkan_gen.families import Family, families, family, walk
from lmkan_gen.launch.cpu import prepare
from lmkan_gen.plan import Fill, Launch
from lmkan_gen.problem import LayerShape, Operation, Problem, TableDtype
from lmkan_gen.selection import default_choice
from tests.cpu_kernels import CPU, TOLERANCE, away_from_knots, check, inputs_of, run, truth

OPERATIONS = (Operation.FORWARD, Operation.GRAD_INPUT, Operation.GRAD_TABLE)
ROWS, PAIRS = family("row_vector"), family("pair_vector")
#: every family with every operation of a call that it computes
KINDS = [(f, o) for o in OPERATIONS for f in families("cpu", o)]
each_kind = pytest.mark.parametrize(
    ("kind", "operation"), [pytest.param(f, o, id=f"{f.name}-{o}") for f, o in KINDS]
)
#: what machines of this kind run: their own instructions and those of older ones
ARCHITECTURES = {
    "x86-64-v4": ("generic", "x86-64-v3", "x86-64-v4"),
    "x86-64-v3": ("generic", "x86-64-v3"),
    "generic": ("generic",),
}[cpu().arch]
NARROW = [t for t in TableDtype if t is not TableDtype.FLOAT32]


@pytest.mark.parametrize("batch", [1, 31, 32, 33, 1000])
@each_kind
def test_default_is_right_for_odd_widths_and_batches(kind: Family, operation: Operation, batch: int) -> None:
    for inputs, outputs in ((6, 5), (2, 1), (38, 70), (33, 17), (1, 150)):
        problem = Problem(operation, LayerShape(inputs, outputs, 7, batch), cpu())
        parameters = kind.default(problem)
        assert parameters is not None
        check(kind, problem, parameters, seed=batch + inputs)


@pytest.mark.parametrize("grids", [3, 4, 5, 12, 40])
@each_kind
def test_default_is_right_for_grids(kind: Family, operation: Operation, grids: int) -> None:
    problem = Problem(operation, LayerShape(6, 5, grids, 200), cpu())
    parameters = kind.default(problem)
    assert parameters is not None
    check(kind, problem, parameters, seed=grids)


@each_kind
def test_every_point_of_the_space_is_right(kind: Family, operation: Operation) -> None:
    """Wasteful and register-hungry points too: they may be slow, never wrong."""
    problem = Problem(operation, LayerShape(42, 37, 8, 300), cpu())
    for seed, parameters in enumerate(walk.fitting(kind.space(operation), lambda _: None)):
        check(kind, problem, parameters, seed)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    kind, operation = data.draw(st.sampled_from(KINDS))
    # few grids and the smallest tile, so that few binaries are compiled
    shape = LayerShape(
        data.draw(st.integers(1, 40)),
        data.draw(st.integers(1, 40)),
        data.draw(st.sampled_from([3, 8])),
        data.draw(st.integers(1, 80)),
    )
    parameters = {name: values[0] for name, values in kind.space(operation).items()}
    check(kind, Problem(operation, shape, cpu()), parameters, data.draw(st.integers(0, 2**32)))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@each_kind
def test_every_architecture(kind: Family, operation: Operation, arch: str) -> None:
    """``generic`` is the build for processors without a known instruction set, any x86 or ARM."""
    problem = Problem(operation, LayerShape(10, 19, 6, 77), Device("cpu", "unknown", arch, 3))
    parameters = kind.default(problem)
    assert parameters is not None
    check(kind, problem, parameters, seed=5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("table", TableDtype)
@pytest.mark.parametrize("operation", [Operation.FORWARD, Operation.GRAD_INPUT])
def test_tables_that_stay_as_they_are(operation: Operation, table: TableDtype, arch: str) -> None:
    """Fewer samples than make widening worth it, and more; rows of one register and of several tiles."""
    if not ROWS.computes(operation, table):
        assert (operation, table) == (Operation.GRAD_INPUT, TableDtype.INT8)
        return
    device = Device("cpu", "unknown", arch, 2)
    for outputs, inputs, batch in product((1, 37, 150), (9, 38), (1, 9, 130)):
        problem = Problem(operation, LayerShape(inputs, outputs, 7, batch), device, table, constant=True)
        parameters = ROWS.default(problem)
        assert parameters is not None
        check(ROWS, problem, parameters, seed=batch + outputs)


@pytest.mark.parametrize("table", NARROW)
def test_every_point_of_the_space_with_narrow_tables(table: TableDtype) -> None:
    for operation in (Operation.FORWARD, Operation.GRAD_INPUT):
        if ROWS.computes(operation, table):
            for batch in (3, 200):
                problem = Problem(operation, LayerShape(42, 37, 8, batch), cpu(), table, constant=True)
                for seed, parameters in enumerate(walk.fitting(ROWS.space(operation), lambda _: None)):
                    check(ROWS, problem, parameters, seed)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("table", [TableDtype.FLOAT16, TableDtype.BFLOAT16])
def test_all_numbers_of_two_bytes(table: TableDtype, arch: str) -> None:
    """Subnormal numbers, infinities and NaN are the same as in a float32 table."""
    grids, outputs = 7, 1024
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(packing.TORCH_DTYPES[table])
    values = every[torch.randperm(2**16)].view(grids + 1, grids + 1, outputs, 1)
    for batch in (5, 50):
        shape = LayerShape(2, outputs, grids, batch)
        found = []
        for of in (table, TableDtype.FLOAT32):
            problem = Problem(Operation.FORWARD, shape, Device("cpu", "unknown", arch, 1), of, constant=True)
            a = {**inputs_of(shape, 1), "table": values.float().numpy()}
            parameters = ROWS.default(problem)
            assert parameters is not None
            found.append(run(ROWS, problem, parameters, a))
        assert found[1].isnan().any()
        assert torch.equal(found[0].isnan(), found[1].isnan())
        assert torch.equal(found[0].nan_to_num(), found[1].nan_to_num())


@each_kind
def test_not_a_number_spoils_its_sample_only(kind: Family, operation: Operation) -> None:
    shape = LayerShape(6, 5, 8, 40)
    clean = inputs_of(shape, 1)
    spoiled = {**clean, "x": clean["x"].copy()}
    spoiled["x"][2, 7] = np.nan
    problem = Problem(operation, shape, cpu())
    parameters = kind.default(problem)
    assert parameters is not None
    got, want = run(kind, problem, parameters, spoiled), run(kind, problem, parameters, clean)
    unaffected = torch.ones_like(got, dtype=torch.bool)
    if operation is Operation.FORWARD:
        assert got[:, 7].isnan().all()
        unaffected[:, 7] = False
    elif operation is Operation.GRAD_INPUT:
        assert got[3, 7].isnan()
        unaffected[2:4, 7] = False
    else:
        # pair 1 is the spoiled one
        assert got[..., 1].isnan().any()
        unaffected[..., 1] = False
    assert torch.equal(got[unaffected], want[unaffected])


@each_kind
def test_no_bits_leave_the_table(kind: Family, operation: Operation) -> None:
    """Random bit patterns: all exponents, subnormals, infinities, NaNs with payloads."""
    shape = LayerShape(64, 3, 5, 1000)
    a = inputs_of(shape, 2)
    bits = np.random.default_rng(3).integers(0, 2**32, size=a["x"].shape, dtype=np.uint32)
    a["x"] = bits.view(np.float32)
    a["x"][0, :6] = [np.inf, -np.inf, 0.0, -0.0, np.finfo(np.float32).max, np.finfo(np.float32).tiny]
    problem = Problem(operation, shape, cpu())
    parameters = kind.default(problem)
    assert parameters is not None
    run(kind, problem, parameters, a)
    # everything finite but huge comes out as the formula says, up to overflow
    a["x"] = np.clip(np.nan_to_num(a["x"]), -1e4, 1e4).astype(np.float32)
    a = away_from_knots(a)
    expected = truth(operation, a)
    error = np.abs(run(kind, problem, parameters, a).numpy() - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCE


@pytest.mark.parametrize("value", [np.inf, -np.inf])
@pytest.mark.parametrize("kind", families("cpu", Operation.FORWARD), ids=lambda f: f.name)
def test_infinity_is_not_finite(kind: Family, value: float) -> None:
    shape = LayerShape(4, 3, 4, 5)
    a = inputs_of(shape, 4)
    a["x"][1, 2] = value
    problem = Problem(Operation.FORWARD, shape, cpu())
    parameters = kind.default(problem)
    assert parameters is not None
    y = run(kind, problem, parameters, a)
    assert not y[:, 2].isfinite().any()
    assert y[:, [0, 1, 3, 4]].isfinite().all()


@each_kind
def test_thread_count_does_not_change_a_bit(kind: Family, operation: Operation) -> None:
    shape = LayerShape(134, 150, 6, 333)
    problem = Problem(operation, shape, cpu())
    a = inputs_of(shape, 6)
    parameters = kind.default(problem)
    assert parameters is not None
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(kind, problem, parameters, a))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_concurrent_calls_do_not_share_scratch_memory() -> None:
    """One prepared plan, called from several Python threads (a call releases the interpreter)."""
    shape = LayerShape(64, 64, 8, 500)
    problem = Problem(Operation.FORWARD, shape, cpu())
    parameters = ROWS.default(problem)
    assert parameters is not None
    run_plan = prepare(ROWS.spec(problem, parameters), ROWS.plan(problem, parameters), CPU)

    def call(seed: int) -> torch.Tensor:
        buffers = {name: torch.from_numpy(value) for name, value in inputs_of(shape, seed).items()}
        y = torch.full((shape.outputs, shape.batch), torch.nan)
        run_plan({**buffers, "y": y})
        return y

    alone = [call(seed) for seed in range(16)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(call, range(16)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_fill_zeroes_buffers_and_workspaces() -> None:
    shape = LayerShape(6, 5, 4, 20)
    problem = Problem(Operation.FORWARD, shape, cpu())
    parameters = ROWS.default(problem)
    assert parameters is not None
    spec, plan = ROWS.spec(problem, parameters), ROWS.plan(problem, parameters)
    buffers = {name: torch.from_numpy(value) for name, value in inputs_of(shape, 8).items()}
    buffers["y"] = torch.full((shape.outputs, shape.batch), torch.nan)
    prepare(spec, replace(plan, steps=(Fill("y"),)), CPU)(buffers)
    assert torch.equal(buffers["y"], torch.zeros(shape.outputs, shape.batch))
    # an empty packed table instead of the layer's: every sum is zero
    buffers["y"].fill_(torch.nan)
    locate, pack, forward = plan.steps
    assert isinstance(pack, Launch)
    assert pack.kernel == "pack_table"
    prepare(spec, replace(plan, steps=(locate, pack, Fill("packed_table"), forward)), CPU)(buffers)
    assert torch.equal(buffers["y"], torch.zeros(shape.outputs, shape.batch))


@each_kind
def test_default_is_in_the_space_and_has_no_violations(kind: Family, operation: Operation) -> None:
    rng = random.Random(7)
    for _ in range(200):
        shape = LayerShape(
            2 * rng.randint(1, 600), rng.randint(1, 1200), rng.randint(3, 40), rng.randint(1, 5000)
        )
        arch = rng.choice(["generic", "x86-64-v3", "x86-64-v4"])
        problem = Problem(operation, shape, Device("cpu", "some", arch, rng.randint(1, 128)))
        parameters = kind.default(problem)
        assert parameters is not None
        kind.check(operation, parameters)
        assert kind.violations(problem, parameters) == []


def test_tiles_larger_than_the_problem_are_wasted_but_run() -> None:
    problem = Problem(Operation.FORWARD, LayerShape(8, 16, 4, 20), cpu())
    good = {"outputs_tile": 16, "batch_tile": 64, "pairs_tile": 4}
    assert not ROWS.wasted(problem, good)
    for name, value in {"outputs_tile": 32, "batch_tile": 256, "pairs_tile": 16}.items():
        wasteful = {**good, name: value}
        assert ROWS.wasted(problem, wasteful)
        assert ROWS.violations(problem, wasteful) == []


def test_register_limit_is_named() -> None:
    problem = Problem(Operation.FORWARD, LayerShape(256, 512, 4, 2000), Device("cpu", "old", "generic", 1))
    (violation,) = ROWS.violations(problem, {"outputs_tile": 64, "batch_tile": 64, "pairs_tile": 4})
    assert violation.limit == "registers"
    assert "at most 32" in violation.message


def test_source_does_not_depend_on_widths_or_batch() -> None:
    for kind, operation in KINDS:
        parameters = {name: values[0] for name, values in kind.space(operation).items()}
        sources = {
            codegen.render(kind.spec(Problem(operation, LayerShape(*widths, 9, batch), cpu()), parameters))
            for widths in ((6, 5), (64, 128))
            for batch in (1, 4097)
        }
        assert len(sources) == 1


def test_few_samples_read_the_table_as_it_lies() -> None:
    """Unless it stays as it is, where arranging it once pays."""
    for operation, sizes in product(OPERATIONS, ((64, 64, 8), (512, 512, 10), (12, 256, 28))):
        for batch, few in ((1, True), (128, False), (65536, False)):
            problem = Problem(operation, LayerShape(*sizes, batch), cpu())
            choice = default_choice(problem)
            assert choice is not None
            assert (choice.family == "pair_vector") is few
            if operation is not Operation.GRAD_TABLE:
                choice = default_choice(replace(problem, constant=True))
                assert choice is not None
                assert choice.family == "row_vector"


def test_tables_of_more_than_32_bits_are_refused() -> None:
    problem = Problem(Operation.FORWARD, LayerShape(8192, 8192, 8, 1), cpu())
    assert PAIRS.default(problem) is None
    (violation,) = PAIRS.violations(problem, {"outputs_tile": 4})
    assert violation.limit == "indices"
    assert "at most 2147483647" in violation.message


def test_narrow_tables_that_change_are_packed_in_float32() -> None:
    problem = Problem(Operation.FORWARD, LayerShape(64, 64, 8, 1), cpu(), TableDtype.FLOAT16)
    parameters = ROWS.default(problem)
    assert parameters is not None
    (violation,) = ROWS.violations(problem, parameters)
    assert violation.limit == "constant"
    assert default_choice(problem) is None


@pytest.mark.parametrize("dtype", packing.TORCH_DTYPES.values())
def test_a_frozen_table_is_arranged_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    made, rows = [], packing.rows

    def counted(table: torch.Tensor, pitch: int) -> torch.Tensor:
        made.append(pitch)
        return rows(table, pitch)

    monkeypatch.setattr(packing, "rows", counted)
    layer = LMKAN2DLayer(8, 36, 21).eval().freeze(dtype)
    with torch.no_grad():
        for batch in (1, 1, 2, 70, 300):
            layer(torch.randn(36, batch))
    assert len(made) == 1


@pytest.mark.parametrize("batch", [1, 2, 300])
def test_writes_that_torch_does_not_count_are_seen(batch: int) -> None:
    layer = LMKAN2DLayer(8, 36, 21).eval()
    x = torch.randn(36, batch)
    with torch.no_grad():
        before, version = layer(x), layer.func_parameter._version
        layer.func_parameter.data.mul_(2.0)
        assert layer.func_parameter._version == version
        assert torch.equal(layer(x), 2.0 * before)
