"""Time both gradients on inputs that lie badly: how much slower than N(0, 1), and are they right?

Kernels are those that layers get here. Exit code 1: a gradient is wrong.

Run from the top of the repository: python -m benchmarks.skew
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.common import DeviceOption, OutputOption, ShapeOption, choose_device, choose_shapes, write_csv
from lmkan_gen import device as devices
from lmkan_gen import dispatch, reference
from lmkan_gen.call import Call
from lmkan_gen.grid import coordinates
from lmkan_gen.problem import LayerShape, Operation, TableDtype
from lmkan_gen.tuner.bench import rotated_buffers
from lmkan_gen.tuner.measure import Timing, measure
from lmkan_gen.tuner.report import duration

SHAPES = {
    "cuda": (
        LayerShape(512, 512, 10, 262144),
        LayerShape(512, 512, 18, 262144),
        LayerShape(512, 512, 40, 262144),
        LayerShape(128, 128, 20, 262144),
        LayerShape(12, 256, 28, 65536),
        LayerShape(512, 512, 18, 16384),
        LayerShape(128, 128, 26, 1024),
    ),
    "cpu": (LayerShape(64, 64, 8, 4096), LayerShape(128, 128, 26, 4096)),
}
#: all are timed in turn, so that what else the machine does hits all of them
ROUNDS = 3
#: largest difference from the float64 definition, as a part of the largest value; of half operands the single
#: element may be off by four times what the norm may
TOLERANCES = {TableDtype.FLOAT32: 1e-5, TableDtype.FLOAT16: 4e-3}
#: parts of the result that are compared with it
OUTPUTS, PAIRS, SAMPLES = 16, 4, 2048


def normal(x: Tensor, borders: Tensor) -> Tensor:
    """N(0, 1), what layers should be given."""
    return torch.randn_like(x)


def one_cell(x: Tensor, borders: Tensor) -> Tensor:
    """Different values, all in the middle half of one cell."""
    left, right = _middle_cell(borders)
    return left + (right - left) * (0.25 + 0.5 * torch.rand_like(x))


def constant(x: Tensor, borders: Tensor) -> Tensor:
    """One value."""
    left, right = _middle_cell(borders)
    return torch.full_like(x, left + 0.3 * (right - left))


def uniform(x: Tensor, borders: Tensor) -> Tensor:
    """Uniform in [-10, 10], mostly beyond the grid."""
    return 20 * torch.rand_like(x) - 10


DISTRIBUTIONS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "normal": normal,
    "one cell": one_cell,
    "constant": constant,
    "uniform": uniform,
}


def _middle_cell(borders: Tensor) -> tuple[float, float]:
    middle = (borders.numel() - 1) // 2
    return float(borders[middle]), float(borders[middle + 1])


@dataclass(frozen=True)
class Row:
    """One shape: time and error of both gradients by the names in `DISTRIBUTIONS`."""

    shape: LayerShape
    device: devices.Device
    timings: Mapping[str, Timing]
    errors: Mapping[str, float]

    def ratio(self, name: str) -> float:
        """To the time for N(0, 1)."""
        return self.timings[name].median / self.timings["normal"].median

    def records(self) -> list[dict[str, str | int | float]]:
        """A line per distribution."""
        s = self.shape
        sizes = {"inputs": s.inputs, "outputs": s.outputs, "grids": s.grids, "batch": s.batch}
        return [
            {
                "device": self.device.name,
                **sizes,
                "x": name,
                "backward_us": timing.median,
                "backward_iqr_us": timing.iqr,
                "ratio": self.ratio(name),
                "error": self.errors[name],
            }
            for name, timing in self.timings.items()
        ]


def measure_row(shape: LayerShape, device: torch.device, deterministic: bool, operands: TableDtype) -> Row:
    """Time and check all distributions on one shape."""
    torch.manual_seed(0)
    rotated = rotated_buffers(Operation.BACKWARD, shape, device)
    execute = partial(dispatch.execute, Call(Operation.BACKWARD, shape, device, table=operands))
    timings: dict[str, Timing] = {}
    errors = {}
    for _ in range(ROUNDS):
        for name, distribution in DISTRIBUTIONS.items():
            x = distribution(rotated[0]["x"], rotated[0]["borders"])
            for buffers in rotated:
                buffers["x"].copy_(x)
            torch.use_deterministic_algorithms(deterministic)
            timing = measure([partial(execute, buffers) for buffers in rotated], device)
            torch.use_deterministic_algorithms(False)
            timings[name] = timings[name] + timing if name in timings else timing
            errors[name] = error(rotated[0])
    return Row(shape, devices.of(device), timings, errors)


def error(b: Mapping[str, Tensor]) -> float:
    """Of the gradients in ``b``, part of which is compared: the largest difference over the largest value."""
    x, grad, table = (b[n].double() for n in ("x", "grad", "table"))
    borders = b["borders"].double()
    pairs, samples, outputs = slice(PAIRS), slice(SAMPLES), slice(OUTPUTS)
    inputs = slice(2 * PAIRS)

    part = x[inputs, samples].contiguous()
    expected_x = torch.empty_like(part)
    reference.grad_input(grad[:, samples], part, table[..., pairs], borders, expected_x)
    # at a knot, where the gradient jumps, rounding decides about the side
    fraction = coordinates(part, borders)[1]
    clear = ((fraction.abs() > 1e-4) & ((fraction - 1).abs() > 1e-4)).view(-1, 2, part.shape[1]).all(1)
    clear = clear.repeat_interleave(2, dim=0)
    expected_table = torch.empty_like(table[:, :, outputs, pairs])
    reference.grad_table(grad[outputs], x[inputs], borders, expected_table)

    of_x = _relative(torch.where(clear, b["grad_x"][inputs, samples].double(), expected_x), expected_x)
    return max(of_x, _relative(b["grad_table"][:, :, outputs, pairs].double(), expected_table))


def _relative(found: Tensor, expected: Tensor) -> float:
    if not found.isfinite().all():
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max())


def print_rows(rows: list[Row]) -> None:
    """Time for N(0, 1), the others in units of it, and all errors."""
    table = Table(title=f"{rows[0].device.name}: both gradients, by how inputs lie")
    table.add_column("in,out,grids,batch", no_wrap=True)
    table.add_column("normal", justify="right")
    for name in list(DISTRIBUTIONS)[1:]:
        table.add_column(f"{name}\n/ normal", justify="right")
    table.add_column("largest error", justify="right")
    for row in rows:
        ratios = (f"{row.ratio(name):.2f}" for name in list(DISTRIBUTIONS)[1:])
        worst = max(row.errors.values())
        table.add_row(str(row.shape), duration(row.timings["normal"].median), *ratios, f"{worst:.1e}")
    Console().print(table)


def main(
    device: DeviceOption = None,
    output: OutputOption = None,
    shape: ShapeOption = None,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="Sums in a fixed order.")] = False,
    autocast: Annotated[bool, typer.Option("--autocast", help="Half operands, on GPUs.")] = False,
) -> None:
    """Time both gradients on skewed inputs, and compare them with the definition."""
    where = choose_device(device)
    operands = TableDtype.FLOAT16 if autocast else TableDtype.FLOAT32
    limit = TOLERANCES[operands]
    rows: list[Row] = []
    with torch.no_grad():
        for s in track(choose_shapes(shape, SHAPES[where.type]), "timing", console=Console(stderr=True)):
            rows.append(measure_row(s, where, deterministic, operands))
            if output is not None:
                write_csv((record for row in rows for record in row.records()), output)
    print_rows(rows)
    wrong = [(r, n, e) for r in rows for n, e in r.errors.items() if not e <= limit]
    for row, name, e in wrong:
        typer.echo(f"{row.shape}, {name}: error {e:.1e}, limit {limit:.0e}", err=True)
    if wrong:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
