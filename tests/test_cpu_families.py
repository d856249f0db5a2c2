"""CPU kernels for kept tables and for few samples, on every architecture that this CPU runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lmkan_gen import LMKAN2DLayer, device, dispatch, knots, packing, reference
from lmkan_gen.families import Family, family
from lmkan_gen.launch import cpu
from lmkan_gen.problem import LayerShape, Operation, Problem, TableDtype
from lmkan_gen.selection import select
from tests import layouts

HERE = device.cpu()
KNOWN = ("generic", "x86-64-v3", "x86-64-v4")
ARCHITECTURES = KNOWN[: KNOWN.index(HERE.arch) + 1]
SHAPES = [
    LayerShape(7, 5, 4, 33),
    LayerShape(64, 64, 8, 1),
    LayerShape(10, 137, 6, 9),
    LayerShape(2, 1, 3, 40),
]
KEPT, FEW = family("kept_rows"), family("few_samples")
GENERATION = [
    (FEW, TableDtype.FLOAT32),
    (KEPT, TableDtype.FLOAT32),
    (KEPT, TableDtype.FLOAT16),
    (KEPT, TableDtype.BFLOAT16),
    (KEPT, TableDtype.INT8),
]


def run(
    kind: Family,
    operation: Operation,
    table: packing.RoundedTable,
    x: Tensor,
    grad: Tensor,
    arch: str,
    threads: int,
) -> Tensor:
    """What the family's default kernel puts out, in poisoned memory."""
    inputs, batch = x.shape
    shape = LayerShape(inputs, grad.shape[0], table.values.shape[0] - 1, batch)
    problem = Problem(operation, shape, replace(HERE, arch=arch), table.dtype, constant=kind is KEPT)
    parameters = kind.default(problem)
    assert parameters is not None
    plan = kind.plan(problem, parameters)
    out = torch.full_like(grad if operation is Operation.FORWARD else x, torch.nan)
    name = "y" if operation is Operation.FORWARD else "grad_x"
    given: dict[str, Tensor] = {"x": x, "borders": knots(shape.grids), "grad": grad, name: out}
    buffers = packing.arranged(given, plan.buffers, table.dtype, table)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        cpu.prepare(kind.spec(problem, parameters), plan, torch.device("cpu"))(buffers)
    finally:
        torch.set_num_threads(before)
    return out


def exact(
    operation: Operation, table: packing.RoundedTable, x: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """The same from the formulas in float64, and the size of what was added."""
    coefficients, borders = table.to(torch.float64), knots(table.values.shape[0] - 1, torch.float64)
    a = x.double().requires_grad_()
    y = reference.evaluate(a, coefficients, borders)
    if operation is Operation.FORWARD:
        return y.detach(), y.detach().abs().mean()
    (of_x,) = torch.autograd.grad(y, a, grad.double())
    return of_x, of_x.abs().mean()


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("kind", "dtype"), GENERATION, ids=lambda v: getattr(v, "name", None))
@pytest.mark.parametrize("operation", [Operation.FORWARD, Operation.GRAD_INPUT])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_formulas(
    arch: str, kind: Family, dtype: TableDtype, operation: Operation, shape: LayerShape
) -> None:
    if not kind.computes(operation, dtype):
        pytest.skip("int8 tables have no derivatives")
    table = packing.round_table(
        torch.randn(shape.grids + 1, shape.grids + 1, shape.outputs, shape.pairs), dtype
    )
    x, grad = 2 * torch.randn(shape.inputs, shape.batch), torch.randn(shape.outputs, shape.batch)
    x[0, 0], x[-1, -1] = 300.0, -40.0  # far outside the grid
    expected, size = exact(operation, table, x, grad)
    found = [run(kind, operation, table, x, grad, arch, threads) for threads in (1, 2)]
    assert torch.equal(*found)
    assert ((found[0] - expected).abs() <= 1e-5 * (expected.abs() + size)).all()


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize(
    ("kind", "dtype"), [GENERATION[0], GENERATION[2]], ids=lambda v: getattr(v, "name", None)
)
def test_inputs_of_any_strides(layout: str, kind: Family, dtype: TableDtype) -> None:
    table = packing.round_table(torch.randn(6, 6, 11, 4), dtype)
    x, grad = torch.randn(7, 19), torch.randn(11, 19)
    for operation in (Operation.FORWARD, Operation.GRAD_INPUT):
        expected = run(kind, operation, table, x, grad, HERE.arch, 1)
        a, g = layouts.laid_out(x, layout).detach(), layouts.laid_out(grad, layout).detach()
        if operation is Operation.FORWARD:
            g = grad
        elif "gaps" in layout:
            continue  # gradients of inputs have none
        assert torch.equal(run(kind, operation, table, a, g, HERE.arch, 1), expected)


@pytest.mark.parametrize("dtype", [TableDtype.FLOAT16, TableDtype.BFLOAT16])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_is_not_finite_stays_where_it_is(dtype: TableDtype, arch: str) -> None:
    table = packing.round_table(torch.randn(5, 5, 6, 2), dtype)
    for output, value in ((1, torch.inf), (2, -torch.inf), (3, torch.nan), (5, torch.nan)):
        table.values[:, :, output] = value
    x, grad = torch.randn(4, 20), torch.zeros(6, 20)
    y = run(KEPT, Operation.FORWARD, table, x, grad, arch, 1)
    assert y[[0, 4]].isfinite().all()
    assert not y[[1, 2, 3, 5]].isfinite().any()
    x[0, 3] = torch.nan
    y = run(KEPT, Operation.FORWARD, table, x, grad, arch, 1)
    assert y[0, 3].isnan()
    assert y[0, [i for i in range(20) if i != 3]].isfinite().all()
    table.values[:, :, 1:] = torch.nan
    table.values[:, :, 0] = 1.0
    grad[0] = 1.0
    one = packing.RoundedTable(table.values[:, :, :1].contiguous())
    of_x = run(KEPT, Operation.GRAD_INPUT, one, torch.randn(4, 20), grad[:1], arch, 1)
    assert (of_x == 0).all()


def test_every_half_is_widened_exactly() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = every[every.isfinite()][:63360].reshape(-1, 16)
    for arch in ARCHITECTURES:
        for part in finite.split(100):
            outputs = part.numel()
            values = part.reshape(1, 1, outputs, 1).expand(4, 4, outputs, 1).contiguous()
            y = run(
                KEPT,
                Operation.FORWARD,
                packing.RoundedTable(values),
                torch.zeros(2, 1),
                torch.zeros(outputs, 1),
                arch,
                1,
            )
            torch.testing.assert_close(y[:, 0], part.flatten().float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
def test_frozen_layers_run_them(dtype: torch.dtype) -> None:
    layer = LMKAN2DLayer(5, 8, 6).eval().freeze(dtype)
    x = torch.randn(8, 47)
    with torch.no_grad():
        layer(x)
    assert dispatch.used()[-1].kernel == "kept_rows"


def test_few_samples_read_the_table_as_it_lies() -> None:
    def chosen(batch: int, **more: Any) -> str | None:
        return select(Problem(Operation.FORWARD, LayerShape(96, 32, 8, batch), HERE, **more)).family

    assert [chosen(batch) for batch in (1, 8, 9, 500)] == ["few_samples"] * 2 + ["row_vector"] * 2
    assert chosen(1, constant=True) == "kept_rows"


def test_limits() -> None:
    large = Problem(Operation.FORWARD, LayerShape(40000, 4000, 8, 1), HERE)
    (violation,) = FEW.violations(large, {"tile": 16})
    assert violation.message == "the table has 6480000000 values, indices reach to 2147483648"
    assert FEW.default(large) is None
    for kind, constant in ((KEPT, False), (FEW, True)):
        problem = Problem(Operation.FORWARD, SHAPES[0], HERE, constant=constant)
        assert kind.default(problem) is None
