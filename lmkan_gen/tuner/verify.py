"""Is a kernel right? Compared with the float64 definition before it is ever timed."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lmkan_gen import grid, packing, reference
from lmkan_gen.problem import LayerShape, Operation, TableDtype

#: difference from the definition with the same (rounded) table: of float32 the largest, as a part of the
#: largest value; of narrow tables its norm, as a part of the result's
TOLERANCES = {
    TableDtype.FLOAT32: 5e-6,
    TableDtype.FLOAT16: 1e-3,
    TableDtype.BFLOAT16: 8e-3,
    TableDtype.INT8: 5e-3,  # weights in units of 1/512
}
#: by how much a single element may exceed a tolerance for norms, in units of the largest value: rounding
#: errors have tails, but a wrong element must not hide among many right ones
_TAIL = 4
#: batches with odd tails, and how far their inputs spread beyond N(0, 1)
_SMALL_CASES = ((33, 1.0), (257, 10.0))
_GUARD = 64
_CANARY = 12345.0
#: parts of the result that are compared where all of it would take too long
_SMALL, _FEW = 256, 32

Run = Callable[[Mapping[str, Tensor]], None]


class Mismatch(Exception):
    """A kernel computes something else than the definition; the message says where."""


def output_shapes(operation: Operation, shape: LayerShape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the buffers that an operation writes."""
    side = shape.grids + 1
    x: tuple[int, ...] = (shape.inputs, shape.batch)
    table: tuple[int, ...] = (side, side, shape.outputs, shape.pairs)
    shapes: dict[Operation, dict[str, tuple[int, ...]]] = {
        Operation.FORWARD: {"y": (shape.outputs, shape.batch)},
        Operation.GRAD_INPUT: {"grad_x": x},
        Operation.GRAD_TABLE: {"grad_table": table},
        Operation.BACKWARD: {"grad_x": x, "grad_table": table},
    }
    return shapes[operation]


def make_inputs(
    operation: Operation,
    shape: LayerShape,
    device: torch.device,
    seed: int,
    spread: float = 1.0,
    table: TableDtype = TableDtype.FLOAT32,
) -> dict[str, Tensor]:
    """Random float32 inputs of an operation, on ``device``, none of them within rounding of a knot.

    Narrow tables come in both forms, with the same values.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32)

    borders = grid.knots(shape.grids).to(device)
    buffers = {
        "x": _off_the_knots(spread * normal(shape.inputs, shape.batch), borders),
        "table": normal(shape.grids + 1, shape.grids + 1, shape.outputs, shape.pairs),
        "borders": borders,
    }
    if table is not TableDtype.FLOAT32:
        packed = packing.pack(buffers["table"], table)
        buffers |= {"table": packing.unpack(packed), **packed.buffers()}
    if operation is not Operation.FORWARD:
        buffers["grad"] = normal(shape.outputs, shape.batch)
    return buffers


def _off_the_knots(x: Tensor, borders: Tensor) -> Tensor:
    """Input gradients jump at knots, where either side is right: move such inputs to mid-cell."""
    cell = (torch.bucketize(x, borders) - 1).clamp_(0, borders.numel() - 2)
    left, width = borders[cell], (borders[1:] - borders[:-1])[cell]
    fraction = (x - left) / width
    near = (fraction.abs() < 1e-4) | ((fraction - 1).abs() < 1e-4)
    return torch.where(near, left + 0.5 * width, x)


@dataclass(frozen=True)
class Expected:
    """Part of an output: the elements at ``dims`` (dimension -> indices) must be ``values``."""

    name: str
    dims: Mapping[int, Tensor]
    values: Tensor


@dataclass(frozen=True)
class Case:
    """Inputs with (part of) the right answer, reused for every candidate of a problem."""

    operation: Operation
    shape: LayerShape
    inputs: Mapping[str, Tensor]
    expected: tuple[Expected, ...]
    table: TableDtype

    def check(self, run: Run, what: str) -> None:
        """Run twice, on poisoned outputs between guards, and compare.

        Raises:
            Mismatch: a value is wrong, an element was not written, or something outside was.
        """
        for _ in range(2):  # a second run sees what the first one left in workspaces
            guarded = {
                n: _Guarded(s, self._device) for n, s in output_shapes(self.operation, self.shape).items()
            }
            run({**self.inputs, **{n: g.tensor for n, g in guarded.items()}})
            for name, g in guarded.items():
                if not g.intact():
                    raise Mismatch(f"{what}: wrote outside of {name}")
                if not bool(g.tensor.isfinite().all()):
                    raise Mismatch(f"{what}: {name} has elements that were not written or are not finite")
            for part in self.expected:
                _compare(guarded[part.name].tensor, part, self.table, what)

    @property
    def _device(self) -> torch.device:
        return self.inputs["x"].device


class _Guarded:
    """A NaN-filled tensor with canaries on both sides of it."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        size = torch.Size(shape).numel()
        self._memory = torch.full((size + 2 * _GUARD,), _CANARY, device=device, dtype=torch.float32)
        self.tensor = self._memory[_GUARD : _GUARD + size].view(shape).fill_(float("nan"))

    def intact(self) -> bool:
        edges = torch.cat((self._memory[:_GUARD], self._memory[-_GUARD:]))
        return bool((edges == _CANARY).all())


def _compare(output: Tensor, part: Expected, table: TableDtype, what: str) -> None:
    difference = _take(output, part.dims).double() - part.values
    largest = float(difference.abs().max() / part.values.abs().max().clamp_min(1e-30))
    limit = TOLERANCES[table]
    if table is TableDtype.FLOAT32:
        error = largest
    else:
        error = max(float(difference.norm() / part.values.norm().clamp_min(1e-30)), largest / _TAIL)
    if not error <= limit:
        raise Mismatch(f"{what}: {part.name} differs from the reference by {error:.1e}, limit {limit:.0e}")


def make_cases(
    operation: Operation, shape: LayerShape, device: torch.device, table: TableDtype = TableDtype.FLOAT32
) -> list[Case]:
    """Small batches with odd tails and far inputs, then the real shape, of which a part is compared."""
    cases = []
    for batch, spread in _SMALL_CASES:
        small = LayerShape(shape.inputs, shape.outputs, shape.grids, batch)
        cases.append(make_case(operation, small, device, spread, _SMALL, table))
    return [*cases, make_case(operation, shape, device, 1.0, _FEW, table)]


def make_case(
    operation: Operation,
    shape: LayerShape,
    device: torch.device,
    spread: float,
    most: int,
    table: TableDtype = TableDtype.FLOAT32,
) -> Case:
    """Random inputs, and the right values for at most ``most`` indices of each dimension."""
    seed = zlib.crc32(f"{operation} {shape} {spread}".encode())
    inputs = make_inputs(operation, shape, device, seed, spread, table)
    picker = torch.Generator().manual_seed(seed)
    outs = _some(shape.outputs, most, picker, device)
    pairs = _some(shape.pairs, most, picker, device)
    samples = _some(shape.batch, 2 * most, picker, device)
    expected = []
    if operation is Operation.FORWARD:
        part = _reference(Operation.FORWARD, inputs, samples=samples, outs=outs)
        expected.append(Expected("y", {0: outs, 1: samples}, part))
    if operation in (Operation.GRAD_INPUT, Operation.BACKWARD):
        part = _reference(Operation.GRAD_INPUT, inputs, samples=samples, pairs=pairs)
        expected.append(Expected("grad_x", {0: _rows(pairs, shape.inputs), 1: samples}, part))
    if operation in (Operation.GRAD_TABLE, Operation.BACKWARD):
        # every sample counts here
        part = _reference(Operation.GRAD_TABLE, inputs, outs=outs, pairs=pairs)
        expected.append(Expected("grad_table", {2: outs, 3: pairs}, part))
    return Case(operation, shape, inputs, tuple(expected), table)


def _some(n: int, most: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """At most ``most`` of ``n`` indices, with both ends, where tails are."""
    if n <= most:
        return torch.arange(n, device=device)
    drawn = torch.randint(n, (most - 2,), generator=generator)
    return torch.tensor(sorted({0, n - 1, *drawn.tolist()}), device=device)


def _rows(pairs: Tensor, inputs: int) -> Tensor:
    """Input indices of pair indices."""
    rows = torch.stack((2 * pairs, 2 * pairs + 1), dim=1).flatten()
    return rows[rows < inputs]


def _take(tensor: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    for dim, indices in dims.items():
        tensor = tensor.index_select(dim, indices)
    return tensor


def _reference(
    operation: Operation,
    inputs: Mapping[str, Tensor],
    samples: Tensor | None = None,
    outs: Tensor | None = None,
    pairs: Tensor | None = None,
) -> Tensor:
    """The definition in float64 on parts of the inputs (None: all of a dimension)."""

    def part(name: str, **dims: Tensor | None) -> Tensor:
        chosen = {int(d[1:]): i for d, i in dims.items() if i is not None}
        return _take(inputs[name], chosen).double()

    rows = None if pairs is None else _rows(pairs, len(inputs["x"]))
    x, table = part("x", d0=rows, d1=samples), part("table", d2=outs, d3=pairs)
    borders = inputs["borders"].double()
    if operation is Operation.FORWARD:
        y = x.new_empty(table.shape[2], x.shape[1])
        reference.forward(x, table, borders, y)
        return y
    grad = part("grad", d0=outs, d1=samples)
    if operation is Operation.GRAD_INPUT:
        grad_x = torch.empty_like(x)
        reference.grad_input(grad, x, table, borders, grad_x)
        return grad_x
    grad_table = torch.empty_like(table)
    reference.grad_table(grad, x, borders, grad_table)
    return grad_table
