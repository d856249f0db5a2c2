"""The kernels of the Hessian regulariser against the definition in float64, with poisoned outputs.

The CUDA source is run on the CPU as well, thread by thread, so that it is checked where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lmkan_gen import device as devices
from lmkan_gen import knots, toolchain
from lmkan_gen.device import Device
from lmkan_gen.families import families, hessian_marching, hessian_strips, walk
from lmkan_gen.families.base import Parameters
from lmkan_gen.launch import cpu
from lmkan_gen.problem import LayerShape, Operation, Problem
from tests import emulation, truth

TOLERANCE = 5e-6
OPERATIONS = (Operation.HESSIAN, Operation.GRAD_HESSIAN)
OUTPUT = {Operation.HESSIAN: "value", Operation.GRAD_HESSIAN: "grad_table"}
SCALE = -1.75
GUARD = 64

Run = Callable[[Mapping[str, Tensor]], None]


def gpu(multiprocessors: int) -> Device:
    return Device("cuda", "A GPU", "sm_90", multiprocessors, 227 * 1024, 228 * 1024)


def shape_of(pairs: int, outputs: int, grids: int) -> LayerShape:
    return LayerShape(2 * pairs, outputs, grids, 1)


def table_of(shape: LayerShape) -> Tensor:
    return torch.randn(shape.grids + 1, shape.grids + 1, shape.outputs, shape.pairs)


def result(operation: Operation, run: Run, table: Tensor, device: str = "cpu") -> Tensor:
    """What ``run`` writes; nothing around its output may change."""
    size = 1 if operation is Operation.HESSIAN else table.numel()
    around = torch.full((size + 2 * GUARD,), torch.nan, device=device)
    output = around[GUARD : GUARD + size]
    buffers = {
        "table": table.to(device),
        "borders": knots(table.shape[0] - 1).to(device),
        "scale": torch.tensor(SCALE, device=device),
        OUTPUT[operation]: output,
    }
    run(buffers)
    assert around[:GUARD].isnan().all()
    assert around[GUARD + size :].isnan().all()
    return output.cpu()


def check(operation: Operation, run: Run, table: Tensor, device: str = "cpu") -> None:
    found = result(operation, run, table, device)
    value, gradient = truth.hessian(table, knots(table.shape[0] - 1))
    if operation is Operation.HESSIAN:
        assert found.item() == pytest.approx(value, rel=TOLERANCE)
    else:
        error = truth.relative_error(found.view(table.shape), SCALE * gradient)
        assert error <= TOLERANCE


# --- CPU ------------------------------------------------------------------------------------------


def prepared_on_cpu(operation: Operation, shape: LayerShape, arch: str | None = None) -> Run:
    own = devices.cpu()
    problem = Problem(operation, shape, Device("cpu", own.name, arch or own.arch, own.multiprocessors))
    family = hessian_strips.FAMILY
    parameters = family.default(problem)
    assert parameters is not None
    return cpu.prepare(
        family.spec(problem, parameters), family.plan(problem, parameters), torch.device("cpu")
    )


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("grids", [3, 4, 5, 18])
def test_cpu_kernel(operation: Operation, grids: int) -> None:
    # less than a strip, a strip, and strips with a rest
    for pairs, outputs in ((1, 1), (8, 16), (5, 67), (3, 128)):
        shape = shape_of(pairs, outputs, grids)
        check(operation, prepared_on_cpu(operation, shape), table_of(shape))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_cpu_kernel_without_wide_registers(operation: Operation) -> None:
    shape = shape_of(7, 37, 6)
    check(operation, prepared_on_cpu(operation, shape, "generic"), table_of(shape))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_cpu_kernel_does_not_depend_on_threads(operation: Operation) -> None:
    shape = shape_of(24, 61, 7)
    run, table = prepared_on_cpu(operation, shape), table_of(shape)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(result(operation, run, table))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


# --- CUDA, run on a CPU ---------------------------------------------------------------------------


def prepared_in_emulation(problem: Problem, parameters: Parameters, emulated: Path) -> Run:
    family = hessian_marching.FAMILY
    family.check(problem.operation, parameters)
    assert not family.violations(problem, parameters)
    spec, plan = family.spec(problem, parameters), family.plan(problem, parameters)

    def run(buffers: Mapping[str, Tensor]) -> None:
        emulation.run(spec, plan, emulated, buffers)

    return run


#: pairs, outputs, grids, and a device so small or large that columns are marched in one go or in stretches
EMULATED = [
    (1, 1, 3, {"vector": 1, "warps": 4, "ahead": 0}, 1),
    (5, 7, 4, {"vector": 1, "warps": 4, "ahead": 2}, 132),
    (3, 30, 9, {"vector": 2, "warps": 4, "ahead": 4}, 1),
    (4, 17, 17, {"vector": 4, "warps": 4, "ahead": 8}, 132),
    (4, 33, 5, {"vector": 4, "warps": 8, "ahead": 4}, 1),
]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("pairs", "outputs", "grids", "parameters", "multiprocessors"), EMULATED)
def test_cuda_kernel_in_emulation(
    emulated: Path,
    operation: Operation,
    pairs: int,
    outputs: int,
    grids: int,
    parameters: dict[str, int],
    multiprocessors: int,
) -> None:
    shape = shape_of(pairs, outputs, grids)
    problem = Problem(operation, shape, gpu(multiprocessors))
    run = prepared_in_emulation(problem, parameters, emulated)
    check(operation, run, table_of(shape))


def test_stretches_are_as_good_as_whole_marches(emulated: Path) -> None:
    """Where columns are cut has no influence, not even on rounding."""
    shape, parameters = shape_of(2, 9, 33), {"vector": 2, "warps": 4, "ahead": 4}
    problems = [Problem(Operation.GRAD_HESSIAN, shape, gpu(m)) for m in (1, 2, 132)]
    assert len({hessian_marching.FAMILY.plan(p, parameters) for p in problems}) > 1
    table = table_of(shape)
    runs = (prepared_in_emulation(p, parameters, emulated) for p in problems)
    whole, *cut = (result(Operation.GRAD_HESSIAN, run, table) for run in runs)
    for found in cut:
        assert torch.equal(found, whole)


@pytest.mark.parametrize("kind", ["cpu", "emulation"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_what_is_not_finite_stays_where_its_stencils_reach(emulated: Path, kind: str, bad: float) -> None:
    shape = shape_of(1, 3, 7)
    for place in product((0, 1, 2, 4, 6, 7), repeat=2):
        table = table_of(shape)
        table[(*place, 1, 0)] = bad
        expected = truth.hessian(table, knots(7))[1]
        if kind == "cpu":
            run = prepared_on_cpu(Operation.GRAD_HESSIAN, shape)
        else:
            problem = Problem(Operation.GRAD_HESSIAN, shape, devices.target("sm_90"))
            run = prepared_in_emulation(problem, {"vector": 1, "warps": 8, "ahead": 0}, emulated)
        found = result(Operation.GRAD_HESSIAN, run, table).view(table.shape)
        assert torch.equal(found.isfinite(), torch.from_numpy(expected).isfinite()), place


# --- families -------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", devices.CUDA_ARCHITECTURES)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("pairs", "outputs", "grids", "vector"),
    [(256, 512, 18, 4), (256, 512, 40, 4), (3, 7, 8, 1), (3, 6, 8, 2), (64, 128, 200, 4)],
)
def test_default_on_a_gpu(
    arch: str, operation: Operation, pairs: int, outputs: int, grids: int, vector: int
) -> None:
    problem = Problem(operation, shape_of(pairs, outputs, grids), devices.target(arch))
    (family,) = families("cuda", operation)
    parameters = family.default(problem)
    assert parameters is not None
    assert family.violations(problem, parameters) == []
    assert int(parameters["vector"]) <= vector
    assert pairs * outputs % int(parameters["vector"]) == 0


def test_what_does_not_fit_is_said() -> None:
    family = hessian_marching.FAMILY
    problem = Problem(Operation.HESSIAN, shape_of(3, 7, 8), devices.target("sm_90"))
    (violation,) = family.violations(problem, {"vector": 2, "warps": 8, "ahead": 0})
    assert violation.message == "vector=2 does not divide 21 functions per knot"
    large = Problem(Operation.HESSIAN, shape_of(1, 1, 6000), devices.target("sm_90"))
    assert family.default(large) is None


@pytest.mark.parametrize("arch", devices.CUDA_ARCHITECTURES)
def test_widest_kernels_do_not_spill(arch: str) -> None:
    """Most values per lane in the block that leaves the fewest registers."""
    problems = [Problem(o, shape_of(256, 512, 18), devices.target(arch)) for o in OPERATIONS]
    widest = {"vector": 4, "warps": 8, "ahead": 4}
    for binary in toolchain.build([hessian_marching.FAMILY.spec(p, widest) for p in problems]):
        assert isinstance(binary, toolchain.Binary), binary
        for r in toolchain.resources(binary):
            assert (r.spill_stores, r.spill_loads, r.stack) == (0, 0, 0), (arch, r.kernel)
            # so that a multiprocessor holds two blocks or more
            assert r.kernel == "lmkan_hessian_total" or r.registers <= 128


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("pairs", "outputs", "grids"), [(64, 96, 18), (5, 7, 4), (3, 30, 9), (1, 1, 3), (2, 2, 100)]
)
def test_all_parameters_on_a_gpu(operation: Operation, pairs: int, outputs: int, grids: int) -> None:
    from lmkan_gen.launch import cuda

    family, shape, device = hessian_marching.FAMILY, shape_of(pairs, outputs, grids), torch.device("cuda", 0)
    problem = Problem(operation, shape, devices.cuda(0))
    feasible: list[Any] = list(walk.fitting(family.space(operation), partial(family.first_limit, problem)))
    toolchain.build([family.spec(problem, c) for c in feasible])
    table = table_of(shape)
    for c in feasible:
        run = cuda.prepare(family.spec(problem, c), family.plan(problem, c), device)
        check(operation, run, table, "cuda")
        assert torch.equal(result(operation, run, table, "cuda"), result(operation, run, table, "cuda"))
