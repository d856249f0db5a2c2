"""Forward and gradients against the formulas in float64, on everything that can run here.

Results are written over NaN by `lmkan_gen.dispatch`, the way every layer call goes.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from lmkan_gen import LMKAN2DLayer, dispatch, knots, lmkan
from lmkan_gen.call import Call
from lmkan_gen.families import Demand
from lmkan_gen.problem import LayerShape, Operation
from tests import published_values as published
from tests import truth

LIMIT = 5e-6
HAS_CUDA = torch.cuda.is_available()
HAS_CXX = any(shutil.which(name) for name in ("c++", "g++", "clang++"))


@dataclass(frozen=True)
class Backend:
    """Runs operations on one kind of device, with demands where kernels know them."""

    device: torch.device
    demand: Demand = field(default_factory=Demand)

    def _run(self, operation: Operation, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        table, x = inputs["table"], inputs["x"]
        shape = LayerShape(x.shape[0], table.shape[2], table.shape[0] - 1, x.shape[1])
        dispatch.execute(Call(operation, shape, self.device, self.demand), inputs | outputs)

    def _poisoned(self, *shape: int) -> Tensor:
        return torch.full(shape, torch.nan, device=self.device)

    def forward(self, x: Tensor, table: Tensor, borders: Tensor) -> Tensor:
        inputs = self._move(x=x, table=table, borders=borders)
        y = self._poisoned(table.shape[2], x.shape[1])
        self._run(Operation.FORWARD, inputs, {"y": y})
        return y.cpu()

    def gradients(
        self, x: Tensor, table: Tensor, borders: Tensor, grad: Tensor, operation: Operation
    ) -> tuple[Tensor | None, Tensor | None]:
        inputs = self._move(x=x, table=table, borders=borders, grad=grad)
        outputs = {}
        if operation is not Operation.GRAD_TABLE:
            outputs["grad_x"] = self._poisoned(*x.shape)
        if operation is not Operation.GRAD_INPUT:
            outputs["grad_table"] = self._poisoned(*table.shape)
        self._run(operation, inputs, outputs)
        found = {name: tensor.cpu() for name, tensor in outputs.items()}
        return found.get("grad_x"), found.get("grad_table")

    def _move(self, **tensors: Tensor) -> dict[str, Tensor]:
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}


@pytest.fixture(
    params=[
        "reference",
        pytest.param("cpu", marks=pytest.mark.skipif(not HAS_CXX, reason="no C++ compiler")),
        pytest.param(
            "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="torch sees no GPU")]
        ),
    ]
)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    wants_kernels = request.param != "reference"
    monkeypatch.setenv(dispatch.DISABLE_VARIABLE, "0" if wants_kernels else "1")
    dispatch.clear_caches()
    yield Backend(torch.device("cuda", 0) if request.param == "cuda" else torch.device("cpu"))
    # what is tested must be what its name says
    silent = [use.describe() for use in dispatch.used() if (use.kernel is not None) != wants_kernels]
    assert not silent


def case(inputs: int, outputs: int, grids: int, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, table, borders, grad; samples away from knots."""
    borders = knots(grids)
    x = truth.away_from_knots(np.random.standard_normal((inputs, batch)), borders.double().numpy())
    table = torch.randn(grids + 1, grids + 1, outputs, inputs // 2)
    return torch.from_numpy(x), table, borders, torch.randn(outputs, batch)


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    # the same numbers for every backend, others for every test
    seed = sum(request.node.originalname.encode())
    torch.manual_seed(seed)
    np.random.seed(seed)


def check(backend: Backend, inputs: int, outputs: int, grids: int, batch: int) -> None:
    x, table, borders, grad = case(inputs, outputs, grids, batch)
    expected = truth.compute(x, table, borders, grad)
    assert truth.relative_error(backend.forward(x, table, borders), expected.y) <= LIMIT
    for operation in (Operation.GRAD_INPUT, Operation.GRAD_TABLE, Operation.BACKWARD):
        grad_x, grad_table = backend.gradients(x, table, borders, grad, operation)
        if grad_x is not None:
            assert truth.relative_error(grad_x, expected.grad_x) <= LIMIT, operation
        if grad_table is not None:
            if batch == 0:
                assert (grad_table == 0).all(), operation
            else:
                assert truth.relative_error(grad_table, expected.grad_table) <= LIMIT, operation


@pytest.mark.parametrize("batch", [0, 1, 2, 31, 32, 33, 1000, 4097])
def test_batches(backend: Backend, batch: int) -> None:
    check(backend, 6, 5, 7, batch)


@pytest.mark.parametrize("grids", [3, 4, 5, 8, 12, 18, 26, 28, 40, 41, 64])
def test_grids(backend: Backend, grids: int) -> None:
    check(backend, 6, 5, grids, 257)


@pytest.mark.parametrize(
    ("inputs", "outputs"), [(2, 1), (2, 130), (62, 3), (16, 16), (34, 33), (64, 64), (18, 257)]
)
def test_widths(backend: Backend, inputs: int, outputs: int) -> None:
    check(backend, inputs, outputs, 9, 65)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="torch sees no GPU")
@pytest.mark.parametrize("grids", range(3, 45))
@pytest.mark.parametrize("batch", [33, 4097])
def test_all_grids_on_a_gpu(grids: int, batch: int) -> None:
    check(Backend(torch.device("cuda", 0)), 6, 5, grids, batch)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="torch sees no GPU")
@pytest.mark.parametrize(("tile", "grids"), [(4, 12), (8, 12), (16, 12), (4, 26), (8, 17)])
@pytest.mark.parametrize("block", [None, 128, 512])
@pytest.mark.parametrize("fast", [False, True])
def test_demanded_tiles_on_a_gpu(tile: int, grids: int, block: int | None, fast: bool) -> None:
    backend = Backend(torch.device("cuda", 0), Demand(tile, block, fast))
    try:
        check(backend, 22, 19, grids, 333)
    except ValueError as error:  # a demand may be refused, in words that help
        assert "fit" in str(error) or "leave the argument out" in str(error)  # noqa: PT017


EDGES = (0.0, -0.0, 1e-45, -1e-45, 1e-30, 20.0, -20.0, 88.8, -104.0, 1e4, -1e4, 1e6, -1e6)


@pytest.mark.parametrize("grids", [3, 8, 40])
def test_on_knots_and_far_outside(backend: Backend, grids: int) -> None:
    _, table, borders, grad = case(6, 5, grids, 600)
    g = borders.numpy()
    values = np.concatenate(
        (g, np.nextafter(g, np.float32(9)), np.nextafter(g, np.float32(-9)), EDGES)
    ).astype(np.float32)
    x = torch.from_numpy(np.random.choice(values, (6, 600)))
    expected = truth.compute(x, table, borders, grad)
    y = backend.forward(x, table, borders)
    # a float32 sigma tells cells apart to G * 2^-24; a sample that close to a knot is extrapolated from
    # its neighbour cell by as much
    limit = LIMIT + 2 * grids * 2**-23
    assert truth.scaled_error(y, expected.y, expected.y_magnitude) <= limit


@pytest.mark.parametrize("grids", [3, 8, 40])
def test_table_gradient_on_knots(backend: Backend, grids: int) -> None:
    # weights are continuous at knots, so the table's gradient is the same from both sides
    _, table, borders, grad = case(6, 5, grids, 600)
    g = borders.numpy()
    values = np.concatenate((g, np.nextafter(g, np.float32(9)), np.nextafter(g, np.float32(-9))))
    x = torch.from_numpy(np.random.choice(values, (6, 600)))
    expected = truth.compute(x, table, borders, grad)
    for operation in (Operation.GRAD_TABLE, Operation.BACKWARD):
        _, grad_table = backend.gradients(x, table, borders, grad, operation)
        assert truth.scaled_error(grad_table, expected.grad_table, expected.grad_table_magnitude) <= LIMIT


def test_gradients_far_outside(backend: Backend) -> None:
    x, table, borders, grad = case(6, 5, 8, 64)
    x[:, ::2] *= 1000
    expected = truth.compute(x, table, borders, grad)
    for operation in (Operation.GRAD_INPUT, Operation.GRAD_TABLE, Operation.BACKWARD):
        grad_x, grad_table = backend.gradients(x, table, borders, grad, operation)
        if grad_x is not None:
            assert truth.scaled_error(grad_x, expected.grad_x, expected.grad_x_magnitude) <= LIMIT
        if grad_table is not None:
            scale = expected.grad_table_magnitude
            assert truth.scaled_error(grad_table, expected.grad_table, scale) <= LIMIT


def test_input_gradient_on_a_knot_is_that_of_either_side(backend: Backend) -> None:
    _, table, borders, _ = case(2, 3, 8, 7)
    grad = torch.randn(3, 7)
    x = torch.stack((borders[1:-1], torch.full((7,), 0.1)))
    found, _ = backend.gradients(x, table, borders, grad, Operation.GRAD_INPUT)
    assert found is not None
    nudge = torch.tensor([[1e-5], [0.0]])
    sides = [truth.compute(x + s * nudge, table, borders, grad).grad_x for s in (-1, 1)]
    scale = np.abs(sides).max()
    deviation = np.min([np.abs(found.numpy() - side) for side in sides], axis=0) / scale
    assert deviation.max() <= 1e-4
    assert np.abs(sides[0] - sides[1])[0].min() / scale > 1e-3, "the sides must differ to tell anything"


def test_any_bits(backend: Backend) -> None:
    _, table, borders, grad = case(6, 5, 9, 3000)
    bits = np.random.randint(0, 2**32, (6, 3000), dtype=np.uint32)
    x = torch.from_numpy(bits.view(np.float32))
    y = backend.forward(x, table, borders)
    for operation in (Operation.GRAD_INPUT, Operation.GRAD_TABLE, Operation.BACKWARD):
        backend.gradients(x, table, borders, grad, operation)
    tame = (x.abs() < 1e12).all(dim=0)
    assert 100 < tame.sum() < 2900
    expected = truth.compute(x[:, tame], table, borders, grad[:, tame])
    assert truth.scaled_error(y[:, tame], expected.y, expected.y_magnitude) <= LIMIT
    assert y[:, x.isnan().any(dim=0)].isnan().all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("batch", [1, 70])
def test_not_finite_stays_where_it_belongs(backend: Backend, value: float, batch: int) -> None:
    x, table, borders, grad = case(6, 5, 7, batch)
    column = batch // 2
    others = [b for b in range(batch) if b != column]
    expected = truth.compute(x, table, borders, grad)
    x[3, column] = value
    y = backend.forward(x, table, borders)
    if math.isnan(value):
        assert y[:, column].isnan().all()
    else:
        assert not y[:, column].isfinite().any()
    assert truth.relative_error(y[:, others], expected.y[:, others]) <= LIMIT
    for operation in (Operation.GRAD_INPUT, Operation.GRAD_TABLE, Operation.BACKWARD):
        grad_x, grad_table = backend.gradients(x, table, borders, grad, operation)
        if grad_x is not None:
            assert truth.relative_error(grad_x[:, others], expected.grad_x[:, others]) <= LIMIT
            unaffected = [0, 1, 4, 5]
            scale = expected.grad_x_magnitude[unaffected, column]
            wanted = expected.grad_x[unaffected, column]
            assert truth.scaled_error(grad_x[unaffected, column], wanted, scale) <= LIMIT
            assert not grad_x[2, column].isfinite()
        if grad_table is not None:
            assert truth.relative_error(grad_table[..., [0, 2]], expected.grad_table[..., [0, 2]]) <= LIMIT
            assert not grad_table[..., 1].isfinite().all()
            if math.isnan(value):
                assert grad_table[..., 1].isnan().any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradient_not_finite_stays_in_its_column(backend: Backend, value: float) -> None:
    x, table, borders, grad = case(6, 5, 7, 40)
    expected = truth.compute(x, table, borders, grad)
    grad[2, 7] = value
    others = [b for b in range(40) if b != 7]
    outs = [0, 1, 3, 4]
    for operation in (Operation.GRAD_INPUT, Operation.GRAD_TABLE, Operation.BACKWARD):
        grad_x, grad_table = backend.gradients(x, table, borders, grad, operation)
        if grad_x is not None:
            assert not grad_x[:, 7].isfinite().any()
            assert truth.relative_error(grad_x[:, others], expected.grad_x[:, others]) <= LIMIT
        if grad_table is not None:
            assert truth.relative_error(grad_table[:, :, outs], expected.grad_table[:, :, outs]) <= LIMIT
            assert not grad_table[:, :, 2].isfinite().all()


@pytest.mark.parametrize("grids", [3, 8, 41])
def test_affine_functions_are_exact(backend: Backend, grids: int) -> None:
    borders = knots(grids)
    g = borders.double()
    a, b, c = torch.randn(3, 4, 3, dtype=torch.float64)
    table = a * g[:, None, None, None] + b * g[None, :, None, None] + c
    # one input of each pair far outside: far in both, rounding of the table is amplified quadratically
    x = torch.randn(6, 200)
    x[0::2, ::3] *= 1000
    x[1::2, 1::3] *= 1000
    expected = a @ x[0::2].double() + b @ x[1::2].double() + c.sum(1, keepdim=True)
    magnitude = a.abs() @ x[0::2].abs().double() + b.abs() @ x[1::2].abs().double() + c.abs().sum(1)[:, None]
    y = backend.forward(x, table.float(), borders)
    assert ((y - expected).abs() <= 1e-5 * magnitude).all()
    grad = torch.randn(4, 200)
    grad_x, _ = backend.gradients(x, table.float(), borders, grad, Operation.GRAD_INPUT)
    slopes = torch.stack((a.T @ grad.double(), b.T @ grad.double()), dim=1).flatten(0, 1)
    inside = torch.arange(200) % 3 == 2
    assert grad_x is not None
    assert (grad_x - slopes)[:, inside].abs().max() <= 2e-5 * slopes.abs().max()


@pytest.mark.parametrize("grids", [4, 10, 40])
def test_relu_is_exact_for_an_even_number_of_cells(backend: Backend, grids: int) -> None:
    borders = knots(grids)
    table = (borders.clamp(min=0)[:, None] - 2 * borders.clamp(min=0)[None, :])[:, :, None, None]
    x = torch.randn(2, 500) * 3
    expected = x[0].relu() - 2 * x[1].relu()
    y = backend.forward(x, table.contiguous(), borders)
    assert torch.allclose(y[0], expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["even", "odd"])
def test_published_values(backend: Backend, kind: str) -> None:
    even = kind == "even"
    grids = 4 if even else 5
    layer = LMKAN2DLayer(grids, 4, 3).to(backend.device)
    coefficients = [
        [
            [[published.coefficient(i1, i2, o, p) for p in range(2)] for o in range(3)]
            for i2 in range(grids + 1)
        ]
        for i1 in range(grids + 1)
    ]
    with torch.no_grad():
        layer.func_parameter.copy_(torch.tensor(coefficients))
    inputs = published.EVEN_INPUTS_IN_LN2 if even else published.ODD_INPUTS
    outputs = published.EVEN_OUTPUTS if even else published.ODD_OUTPUTS
    x = (torch.tensor(inputs, dtype=torch.float64) * (published.LN2 if even else 1)).float().T
    assert not x.is_contiguous()
    y = layer(x.to(backend.device)).detach().cpu()
    assert y.numpy() == pytest.approx(np.array(outputs).T, rel=5e-6, abs=1e-5)
    if not even:
        assert layer.borders.cpu().numpy() == pytest.approx(np.array(published.ODD_KNOTS), rel=1e-6)


def test_not_contiguous_through_autograd(backend: Backend) -> None:
    x, table, borders, _ = case(6, 5, 7, 50)
    wide = torch.full((50, 12), torch.nan, device=backend.device)
    wide[:, ::2] = x.T.to(backend.device)
    view = wide[:, ::2].T.requires_grad_()
    strided = table.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0).to(backend.device).requires_grad_()
    assert not view.is_contiguous()
    assert not strided.is_contiguous()
    y = lmkan(view, strided, borders.to(backend.device))
    y.sum().backward()  # hands a gradient of stride zero to the layer
    expected = truth.compute(x, table, borders, torch.ones(5, 50))
    assert truth.relative_error(y.detach().cpu(), expected.y) <= LIMIT
    assert view.grad is not None
    assert strided.grad is not None
    assert truth.relative_error(view.grad.cpu(), expected.grad_x) <= LIMIT
    assert truth.relative_error(strided.grad.cpu(), expected.grad_table) <= LIMIT


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="torch sees no GPU")
def test_runs_on_the_current_stream() -> None:
    x, table, borders, grad = case(64, 64, 12, 1000)
    device = torch.device("cuda", 0)
    pinned = [t.pin_memory() for t in (x, table, grad)]
    layer = LMKAN2DLayer(12, 64, 64).to(device)
    layer(x.to(device)).sum().backward()  # compile first: nothing below may synchronise
    expected = truth.compute(x, table, borders, grad)
    stream = torch.cuda.Stream(device)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        x_d, table_d, grad_d = (torch.full_like(t, torch.nan, device=device) for t in pinned)
        torch.cuda._sleep(200_000_000)  # about a tenth of a second: other streams would overtake
        for target, source in zip((x_d, table_d, grad_d), pinned, strict=True):
            target.copy_(source, non_blocking=True)
        x_d.requires_grad_()
        table_d.requires_grad_()
        y = lmkan(x_d, table_d, layer.borders)
        found = torch.autograd.grad(y, (x_d, table_d), grad_d)
    stream.synchronize()
    assert truth.relative_error(y.detach().cpu(), expected.y) <= LIMIT
    assert truth.relative_error(found[0].cpu(), expected.grad_x) <= LIMIT
    assert truth.relative_error(found[1].cpu(), expected.grad_table) <= LIMIT
