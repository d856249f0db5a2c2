"""The CPU family against a float64 evaluation of the formulas, written here from the definition."""

from __future__ import annotations

import random
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkan_gen import codegen
from lmkan_gen.device import Device, cpu
from lmkan_gen.families.row_vector import FAMILY
from lmkan_gen.launch.cpu import prepare
from lmkan_gen.plan import Fill, Launch
from lmkan_gen.problem import LayerShape, Operation, Problem

TOLERANCE = 5e-6
OPERATIONS = (Operation.FORWARD, Operation.GRAD_INPUT, Operation.GRAD_TABLE)
OUTPUT = {Operation.FORWARD: "y", Operation.GRAD_INPUT: "grad_x", Operation.GRAD_TABLE: "grad_table"}
CPU = torch.device("cpu")

#: float32 arrays by buffer name
Arrays = dict[str, Any]


def knots(grids: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    quantile = np.arange(1, grids) / grids
    g = np.where(quantile <= 0.5, np.log(2 * quantile), -np.log(2 * (1 - quantile)))
    return np.concatenate([[2 * g[0] - g[1]], g, [2 * g[-1] - g[-2]]])


def inputs_of(shape: LayerShape, seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    # wide enough that both outermost cells and the extrapolation beyond them are visited
    x = rng.normal(scale=2.0, size=(shape.inputs, shape.batch))
    return {
        "x": x.astype(np.float32),
        "table": rng.normal(size=(shape.grids + 1, shape.grids + 1, shape.outputs, shape.pairs)).astype(
            np.float32
        ),
        "borders": knots(shape.grids).astype(np.float32),
        "grad": rng.normal(size=(shape.outputs, shape.batch)).astype(np.float32),
    }


def locate(x: Any, g: Any) -> tuple[Any, Any, Any]:
    """Cell, position in it and its width, float64."""
    grids = len(g) - 1
    with np.errstate(over="ignore", invalid="ignore"):
        sigma = np.where(x <= 0, 0.5 * np.exp(np.minimum(x, 0)), 1 - 0.5 * np.exp(-np.maximum(x, 0)))
        t = np.nan_to_num(np.floor(grids * sigma))
        i = np.clip(t, 0, grids - 1).astype(int)
        h = g[i + 1] - g[i]
        return i, (x - g[i]) / h, h


def truth(operation: Operation, a: Arrays) -> Any:
    x, table, g = (a[name].astype(np.float64) for name in ("x", "table", "borders"))
    grad = a["grad"].astype(np.float64)
    i, d, h = locate(x, g)
    i1, i2, d1, d2 = i[::2], i[1::2], d[::2], d[1::2]  # [P, B]
    corners = [(1 - d1) * (1 - d2), (1 - d1) * d2, d1 * (1 - d2), d1 * d2]
    steps = [(0, 0), (0, 1), (1, 0), (1, 1)]
    p = np.arange(x.shape[0] // 2)[:, None]
    c = [np.moveaxis(table[i1 + s, i2 + t, :, p], -1, 0) for s, t in steps]  # each [O, P, B]
    if operation is Operation.FORWARD:
        return sum(w * v for w, v in zip(corners, c, strict=True)).sum(axis=1)
    if operation is Operation.GRAD_INPUT:
        result = np.empty_like(x)
        result[::2] = np.einsum("ob,opb->pb", grad, (1 - d2) * (c[2] - c[0]) + d2 * (c[3] - c[1])) / h[::2]
        result[1::2] = np.einsum("ob,opb->pb", grad, (1 - d1) * (c[1] - c[0]) + d1 * (c[3] - c[2])) / h[1::2]
        return result
    result = np.zeros_like(table)
    for w, (s, t) in zip(corners, steps, strict=True):
        contribution = np.moveaxis(w[None] * grad[:, None], 0, -1)  # [P, B, O]
        where: Any = (i1 + s, i2 + t, slice(None), np.broadcast_to(p, i1.shape))
        np.add.at(result, where, contribution)
    return result


def run(problem: Problem, parameters: Mapping[str, Any], a: Arrays) -> torch.Tensor:
    """The family's result, its output buffer poisoned beforehand."""
    s = problem.shape
    FAMILY.check(problem.operation, parameters)
    shapes = {
        "y": (s.outputs, s.batch),
        "grad_x": (s.inputs, s.batch),
        "grad_table": (s.grids + 1, s.grids + 1, s.outputs, s.pairs),
    }
    name = OUTPUT[problem.operation]
    output = torch.full(shapes[name], torch.nan)
    buffers = {key: torch.from_numpy(value) for key, value in a.items()}
    prepare(FAMILY.spec(problem, parameters), FAMILY.plan(problem, parameters), CPU)(
        {**buffers, name: output}
    )
    return output


def away_from_knots(a: Arrays) -> Arrays:
    """Move samples that rounding may count to either cell (their input gradients differ)."""
    x, g = a["x"].astype(np.float64), a["borders"].astype(np.float64)
    _, d, h = locate(x, g)
    near = np.abs(d - np.round(d)) < 1e-4
    return {**a, "x": np.where(near, x + 1e-3 * h, x).astype(np.float32)}


def check(shape: LayerShape, operation: Operation, parameters: Mapping[str, Any], seed: int) -> None:
    a = inputs_of(shape, seed)
    if operation is Operation.GRAD_INPUT:
        a = away_from_knots(a)
    expected = truth(operation, a)
    got = run(Problem(operation, shape, cpu()), parameters, a).numpy()
    error = np.abs(got - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCE, f"{operation} {shape} {parameters} seed {seed}: error {error:.2e}"


@pytest.mark.parametrize("batch", [1, 31, 32, 33, 1000])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_default_is_right_for_odd_widths_and_batches(operation: Operation, batch: int) -> None:
    for inputs, outputs in ((6, 5), (2, 1), (38, 70)):
        shape = LayerShape(inputs, outputs, 7, batch)
        parameters = FAMILY.default(Problem(operation, shape, cpu()))
        assert parameters is not None
        check(shape, operation, parameters, seed=batch + inputs)


@pytest.mark.parametrize("grids", [3, 4, 5, 12, 40])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_default_is_right_for_grids(operation: Operation, grids: int) -> None:
    shape = LayerShape(6, 5, grids, 200)
    parameters = FAMILY.default(Problem(operation, shape, cpu()))
    assert parameters is not None
    check(shape, operation, parameters, seed=grids)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_point_of_the_space_is_right(operation: Operation) -> None:
    """Wasteful and register-hungry points too: they may be slow, never wrong."""
    shape = LayerShape(42, 37, 8, 300)
    for seed, parameters in enumerate(FAMILY.candidates(Problem(operation, shape, cpu()))):
        check(shape, operation, parameters, seed)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    operation = data.draw(st.sampled_from(OPERATIONS))
    # few grids and the smallest tile, so that few binaries are compiled
    shape = LayerShape(
        2 * data.draw(st.integers(1, 20)),
        data.draw(st.integers(1, 40)),
        data.draw(st.sampled_from([3, 8])),
        data.draw(st.integers(1, 80)),
    )
    parameters = {name: values[0] for name, values in FAMILY.space(operation).items()}
    check(shape, operation, parameters, data.draw(st.integers(0, 2**32)))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_generic_processor(operation: Operation) -> None:
    """The build for processors without a known instruction set, which any x86 or ARM machine runs."""
    problem = Problem(operation, LayerShape(10, 19, 6, 77), Device("cpu", "unknown", "generic", 3))
    parameters = FAMILY.default(problem)
    assert parameters is not None
    a = away_from_knots(inputs_of(problem.shape, 5))
    expected = truth(operation, a)
    error = np.abs(run(problem, parameters, a).numpy() - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCE


def test_not_a_number_spoils_its_sample_only() -> None:
    shape = LayerShape(6, 5, 8, 40)
    clean = inputs_of(shape, 1)
    spoiled = {**clean, "x": clean["x"].copy()}
    spoiled["x"][2, 7] = np.nan
    for operation in OPERATIONS:
        problem = Problem(operation, shape, cpu())
        parameters = FAMILY.default(problem)
        assert parameters is not None
        got, want = run(problem, parameters, spoiled), run(problem, parameters, clean)
        if operation is Operation.FORWARD:
            assert got[:, 7].isnan().all()
            unaffected = torch.ones_like(got, dtype=torch.bool)
            unaffected[:, 7] = False
        elif operation is Operation.GRAD_INPUT:
            assert got[3, 7].isnan()
            unaffected = torch.ones_like(got, dtype=torch.bool)
            unaffected[2:4, 7] = False
        else:
            # pair 1 is the spoiled one
            assert got[..., 1].isnan().any()
            unaffected = torch.ones_like(got, dtype=torch.bool)
            unaffected[..., 1] = False
        assert torch.equal(got[unaffected], want[unaffected])


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_bits_leave_the_table(operation: Operation) -> None:
    """Random bit patterns: all exponents, subnormals, infinities, NaNs with payloads."""
    shape = LayerShape(64, 3, 5, 1000)
    a = inputs_of(shape, 2)
    bits = np.random.default_rng(3).integers(0, 2**32, size=a["x"].shape, dtype=np.uint32)
    a["x"] = bits.view(np.float32)
    a["x"][0, :6] = [np.inf, -np.inf, 0.0, -0.0, np.finfo(np.float32).max, np.finfo(np.float32).tiny]
    problem = Problem(operation, shape, cpu())
    parameters = FAMILY.default(problem)
    assert parameters is not None
    run(problem, parameters, a)
    # everything finite but huge comes out as the formula says, up to overflow
    a["x"] = np.clip(np.nan_to_num(a["x"]), -1e4, 1e4).astype(np.float32)
    a = away_from_knots(a)
    expected = truth(operation, a)
    error = np.abs(run(problem, parameters, a).numpy() - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCE


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_infinity_is_not_finite(value: float) -> None:
    shape = LayerShape(4, 3, 4, 5)
    a = inputs_of(shape, 4)
    a["x"][1, 2] = value
    problem = Problem(Operation.FORWARD, shape, cpu())
    parameters = FAMILY.default(problem)
    assert parameters is not None
    y = run(problem, parameters, a)
    assert not y[:, 2].isfinite().any()
    assert y[:, [0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_thread_count_does_not_change_a_bit(operation: Operation) -> None:
    shape = LayerShape(34, 50, 6, 333)
    problem = Problem(operation, shape, cpu())
    a = inputs_of(shape, 6)
    parameters = FAMILY.default(problem)
    assert parameters is not None
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(problem, parameters, a))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_concurrent_calls_do_not_share_scratch_memory() -> None:
    """One prepared plan, called from several Python threads (a call releases the interpreter)."""
    shape = LayerShape(64, 64, 8, 500)
    problem = Problem(Operation.FORWARD, shape, cpu())
    parameters = FAMILY.default(problem)
    assert parameters is not None
    run_plan = prepare(FAMILY.spec(problem, parameters), FAMILY.plan(problem, parameters), CPU)

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
    parameters = FAMILY.default(problem)
    assert parameters is not None
    spec, plan = FAMILY.spec(problem, parameters), FAMILY.plan(problem, parameters)
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


@pytest.mark.parametrize("operation", OPERATIONS)
def test_default_is_in_the_space_and_has_no_violations(operation: Operation) -> None:
    rng = random.Random(7)
    for _ in range(200):
        shape = LayerShape(
            2 * rng.randint(1, 600), rng.randint(1, 1200), rng.randint(3, 40), rng.randint(1, 5000)
        )
        arch = rng.choice(["generic", "x86-64-v3", "x86-64-v4"])
        problem = Problem(operation, shape, Device("cpu", "some", arch, rng.randint(1, 128)))
        parameters = FAMILY.default(problem)
        assert parameters is not None
        FAMILY.check(operation, parameters)
        assert FAMILY.violations(problem, parameters) == []


def test_tiles_larger_than_the_problem_are_wasted_but_run() -> None:
    problem = Problem(Operation.FORWARD, LayerShape(8, 16, 4, 20), cpu())
    good = {"outputs_tile": 16, "batch_tile": 64, "pairs_tile": 4}
    assert not FAMILY.wasted(problem, good)
    for name, value in {"outputs_tile": 32, "batch_tile": 256, "pairs_tile": 16}.items():
        wasteful = {**good, name: value}
        assert FAMILY.wasted(problem, wasteful)
        assert FAMILY.violations(problem, wasteful) == []


def test_register_limit_is_named() -> None:
    problem = Problem(Operation.FORWARD, LayerShape(256, 512, 4, 2000), Device("cpu", "old", "generic", 1))
    (violation,) = FAMILY.violations(problem, {"outputs_tile": 64, "batch_tile": 64, "pairs_tile": 4})
    assert violation.limit == "registers"
    assert "at most 32" in violation.message


def test_source_does_not_depend_on_widths_or_batch() -> None:
    for operation in OPERATIONS:
        parameters = {name: values[0] for name, values in FAMILY.space(operation).items()}
        sources = {
            codegen.render(FAMILY.spec(Problem(operation, LayerShape(*widths, 9, batch), cpu()), parameters))
            for widths in ((6, 5), (64, 128))
            for batch in (1, 4097)
        }
        assert len(sources) == 1
