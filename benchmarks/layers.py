"""Time lmKAN layers on this machine beside linear layers of their shapes.

Kernels are those that layers get here. Times are per call, as deployed: zero-fills and pre-passes
included, caches cold, and on GPUs without the host's share (CUDA graphs). On the GPU that the published
implementation was measured on, its times stand beside ours, with a speedup where the host has no share that
matters in them either.
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
from torch import Tensor, nn

from benchmarks.common import DeviceOption, OutputOption, ShapeOption, choose_device, choose_shapes, write_csv
from lmkan_gen import device as devices
from lmkan_gen import dispatch
from lmkan_gen.call import Call
from lmkan_gen.forms import Forms
from lmkan_gen.problem import LayerShape, Operation, TableDtype, packs_once
from lmkan_gen.tuner.bench import rotated_buffers
from lmkan_gen.tuner.measure import Timing, copies_past_cache, measure
from lmkan_gen.tuner.report import duration

#: Eight shapes were timed with launches and without. Launches and the host took 16 to 34 us of a forward and
#: 25 to 66 us of a backward at seven of them, and less than the noise at 4096, 4096, 4, 64. That is at most
#: 2.4 % of the times below that are as long as this or longer, microseconds, and up to 21 % of shorter ones.
LAUNCHES_NEGLIGIBLE_US = 1000.0


@dataclass(frozen=True)
class Published:
    """What the published implementation takes in float32, in microseconds, at the best of its settings.

    ``launches_counted`` says how that was timed. False: the sum of the durations of its kernels, from a
    profiler. True: CUDA events around single calls, so that launches and the host have a share in the times.
    Our times are replays of CUDA graphs, where the host has none.
    """

    forward_us: float
    backward_us: float
    launches_counted: bool

    def us(self, operation: str) -> float:
        """One of `PUBLISHED_OPERATIONS`."""
        return {"forward": self.forward_us, "backward": self.backward_us}[operation]

    def comparable(self, operation: str) -> bool:
        """Whether the time has no launches in it, or is so long that they do not matter."""
        return not self.launches_counted or self.us(operation) >= LAUNCHES_NEGLIGIBLE_US


#: measured on `PUBLISHED_ON`; sums of kernels' durations wherever those are known
PUBLISHED = {
    LayerShape(512, 512, 10, 262144): Published(21170, 103400, launches_counted=True),
    LayerShape(512, 512, 18, 262144): Published(21620, 156700, launches_counted=True),
    LayerShape(512, 512, 26, 262144): Published(25530, 156700, launches_counted=True),
    LayerShape(512, 512, 40, 262144): Published(26450, 280100, launches_counted=True),
    LayerShape(128, 128, 20, 262144): Published(1530, 10630, launches_counted=True),
    LayerShape(256, 256, 10, 65536): Published(1436, 6620, launches_counted=True),
    LayerShape(256, 256, 26, 65536): Published(1701, 10050, launches_counted=True),
    LayerShape(12, 256, 28, 65536): Published(199.6, 894.7, launches_counted=False),
    LayerShape(32, 32, 12, 65536): Published(37.7, 130.5, launches_counted=False),
    LayerShape(512, 512, 18, 16384): Published(1565, 11320, launches_counted=True),
    LayerShape(128, 128, 10, 16384): Published(109.3, 431.6, launches_counted=False),
    LayerShape(128, 128, 26, 16384): Published(162, 769, launches_counted=True),
    LayerShape(512, 512, 12, 4096): Published(404.9, 1894, launches_counted=False),
    LayerShape(1024, 1024, 12, 1024): Published(595, 2680, launches_counted=False),
    LayerShape(128, 128, 26, 1024): Published(36.5, 144.9, launches_counted=False),
    LayerShape(64, 64, 8, 256): Published(5.56, 14.9, launches_counted=False),
    LayerShape(4096, 4096, 4, 64): Published(1062, 4777, launches_counted=False),
}
PUBLISHED_ON = "NVIDIA H200"


def published_on(device: torch.device) -> list[LayerShape]:
    """The published shapes that a device is quick with; a CPU would take long for most."""
    quick = (s for s in PUBLISHED if s.batch <= 16384 and max(s.inputs, s.outputs) <= 128)
    return list(PUBLISHED if device.type == "cuda" else quick)


def published_times(shape: LayerShape, device: devices.Device) -> Published | None:
    """What was measured of a shape on the model of GPU that a device is; None where nothing was."""
    return PUBLISHED.get(shape) if device.name == PUBLISHED_ON else None


#: what the mark of `published_cell` means
PUBLISHED_CAPTION = "*: counts launches; no speedup below 1 ms"


def published_cell(us: float | None, published: Published | None) -> str:
    """A published time, marked where it counts launches."""
    return f"{duration(us)}{'*' if published is not None and published.launches_counted else ''}"


#: its shared memory, conflict-free, as measured
SHARED_BYTES_PER_US = 32.6e6
#: what a function evaluation reads of it: four corners, in int8 a word that holds them
EVALUATION_BYTES = {
    TableDtype.FLOAT32: 16,
    TableDtype.FLOAT16: 8,
    TableDtype.BFLOAT16: 8,
    TableDtype.INT8: 4,
}


@dataclass(frozen=True)
class Work:
    """One measured operation of a layer; ``everywhere``: on CPUs too, where it would be nothing else."""

    heading: str
    operation: Operation
    table: TableDtype = TableDtype.FLOAT32
    everywhere: bool = True
    deterministic: bool = False


OPERATIONS = {
    "forward": Work("lmKAN\nforward", Operation.FORWARD),
    "forward_float16": Work("forward\nfloat16", Operation.FORWARD, TableDtype.FLOAT16, everywhere=False),
    "forward_int8": Work("forward\nint8", Operation.FORWARD, TableDtype.INT8, everywhere=False),
    "grad_input": Work("grad\ninput", Operation.GRAD_INPUT),
    "backward": Work("lmKAN\nbackward", Operation.BACKWARD),
    "backward_deterministic": Work(
        "backward\ndeterministic", Operation.BACKWARD, everywhere=False, deterministic=True
    ),
    "backward_float16": Work("backward\nfloat16", Operation.BACKWARD, TableDtype.FLOAT16, everywhere=False),
}
PUBLISHED_OPERATIONS = ("forward", "backward")
LINEARS = {"linear_float32": torch.float32, "linear_tf32": torch.float32, "linear_bfloat16": torch.bfloat16}
HEADINGS = {name: work.heading for name, work in OPERATIONS.items()} | {
    "linear_float32": "Linear\nfloat32",
    "linear_tf32": "Linear\nTF32",
    "linear_bfloat16": "Linear\nbfloat16",
}


@dataclass(frozen=True)
class Row:
    """One layer call: timings by the names in `OPERATIONS` and `LINEARS`, and what ran for each."""

    shape: LayerShape
    device: devices.Device
    timings: Mapping[str, Timing]
    used: Mapping[str, tuple[dispatch.Used, ...]]
    batch_first: bool

    @property
    def published(self) -> Published | None:
        """Times of the published implementation; None where they were not measured."""
        return published_times(self.shape, self.device)

    def published_us(self, operation: str) -> float | None:
        """What the published implementation takes; None where that was not measured."""
        return None if self.published is None else self.published.us(operation)

    def speedup(self, operation: str) -> float | None:
        """Over the published implementation; None where its time is unknown, or launches matter in it."""
        if self.published is None or not self.published.comparable(operation):
            return None
        return self.published.us(operation) / self.timings[operation].median

    def of_ceiling(self, name: str) -> float | None:
        """The part of shared memory's bandwidth that a forward needs for its table reads alone."""
        if self.device.name != PUBLISHED_ON or name not in self.timings:
            return None
        floor = EVALUATION_BYTES[OPERATIONS[name].table] * self.shape.evaluations / SHARED_BYTES_PER_US
        return floor / self.timings[name].median

    def record(self) -> dict[str, str | int | float | None]:
        """All numbers, the same columns on every device."""
        s = self.shape
        values: dict[str, str | int | float | None] = {
            "device": self.device.name,
            "inputs": s.inputs,
            "outputs": s.outputs,
            "grids": s.grids,
            "batch": s.batch,
            "layout": "batch_first" if self.batch_first else "batch_last",
        }
        for name in (*OPERATIONS, *LINEARS):
            timing = self.timings.get(name)
            values[f"{name}_us"] = timing.median if timing else None
            values[f"{name}_iqr_us"] = timing.iqr if timing else None
        values["published_launches_counted"] = self.published.launches_counted if self.published else None
        for name, work in OPERATIONS.items():
            used = self.used.get(name, ())
            values[f"{name}_family"] = " + ".join(u.kernel or "reference" for u in used)
            values[f"{name}_parameters"] = " + ".join(_settings(u) for u in used)
            if name in PUBLISHED_OPERATIONS:
                values[f"{name}_published_us"] = self.published_us(name)
                values[f"{name}_speedup"] = self.speedup(name)
            if work.operation is Operation.FORWARD:
                values[f"{name}_of_ceiling"] = self.of_ceiling(name)
        return values


def _settings(used: dispatch.Used) -> str:
    if used.kernel is None:
        return "-"
    return " ".join(f"{k}={v}" for k, v in sorted(used.choice.parameters.items()))


def time_row(shape: LayerShape, device: torch.device, batch_first: bool = False) -> Row:
    """Time everything for one shape."""
    timings, used = {}, {}
    for name, work in OPERATIONS.items():
        if work.everywhere or device.type == "cuda":
            before = len(dispatch.used())
            timings[name] = time_lmkan(
                work.operation, shape, device, work.table, work.deterministic, batch_first
            )
            used[name] = tuple(dispatch.used()[before:])
    for name in LINEARS:
        if name != "linear_tf32" or device.type == "cuda":
            timings[name] = time_linear(name, shape, device)
    return Row(shape, devices.of(device), timings, used, batch_first)


def time_lmkan(
    operation: Operation,
    shape: LayerShape,
    device: torch.device,
    table: TableDtype = TableDtype.FLOAT32,
    deterministic: bool = False,
    batch_first: bool = False,
) -> Timing:
    """One operation, by the kernel that a layer would get; narrow tables are packed beforehand.

    With ``batch_first`` inputs and gradients lie samples first; outputs lie batch-last in any case.
    """
    rotated = rotated_buffers(operation, shape, device, table)
    if batch_first:
        for buffers in rotated:
            buffers |= {n: buffers[n].T.contiguous().T for n in ("x", "grad", "grad_x") if n in buffers}
    constant = packs_once(operation, table)
    execute = partial(dispatch.execute, Call(operation, shape, device, table=table, constant=constant))
    if constant:  # a frozen layer keeps the forms of its table
        calls = [partial(execute, buffers, forms=Forms(buffers["words"])) for buffers in rotated]
    else:
        calls = [partial(execute, buffers) for buffers in rotated]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        return measure(calls, device)
    finally:
        torch.use_deterministic_algorithms(before)


def time_linear(name: str, shape: LayerShape, device: torch.device) -> Timing:
    """`nn.Linear`'s forward on batch-first inputs, which it is fastest on."""
    torch.set_float32_matmul_precision("high" if name == "linear_tf32" else "highest")
    dtype = LINEARS[name]
    values = shape.batch * (shape.inputs + shape.outputs) + shape.inputs * shape.outputs
    copies = copies_past_cache(values * dtype.itemsize, device)
    return measure([_linear(shape, device, dtype) for _ in range(copies)], device)


def _linear(shape: LayerShape, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    layer = nn.Linear(shape.inputs, shape.outputs, device=device, dtype=dtype)
    x = torch.randn(shape.batch, shape.inputs, device=device, dtype=dtype)
    y: list[Tensor] = []

    def run() -> None:
        # kept until the next call, so that the next set's output is other memory
        y[:] = [layer(x)]

    return run


def print_times(rows: list[Row]) -> None:
    """Medians and interquartile ranges; where there are any, published times as well."""
    name = rows[0].device.name
    table = _table(f"{name}: median time per call ±IQR", lines=True)
    for heading in (*OPERATIONS, *LINEARS):
        table.add_column(HEADINGS[heading], justify="right")
    for row in rows:
        timings = (row.timings[n] for n in (*OPERATIONS, *LINEARS))
        table.add_row(str(row.shape), *(f"{duration(t.median)}\n±{duration(t.iqr)}" for t in timings))
    Console().print(table)
    if name != PUBLISHED_ON:
        return
    table = _table("published implementation, our speedup over it, and what bounds forward", lines=False)
    table.caption = PUBLISHED_CAPTION
    forwards = [name for name, work in OPERATIONS.items() if work.operation is Operation.FORWARD]
    ceilings = [f"{name.replace('_', ' ')} of ceiling" for name in forwards]
    for heading in ("forward", "speedup", "backward", "speedup", *ceilings):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = []
        for operation in PUBLISHED_OPERATIONS:
            speedup = row.speedup(operation)
            cells += [
                published_cell(row.published_us(operation), row.published),
                "-" if speedup is None else f"{speedup:.2f}x",
            ]
        table.add_row(str(row.shape), *cells, *(f"{row.of_ceiling(name):.0%}" for name in forwards))
    Console().print(table)


def print_ratios(rows: list[Row]) -> None:
    """Times in units of a linear layer's forward, with both spreads: a CPU's own times tell little."""
    table = _table(f"{rows[0].device.name}: median time per call, lmKAN / Linear's forward", lines=False)
    linears = [name for name in LINEARS if name in rows[0].timings]
    operations = [name for name in OPERATIONS if name in rows[0].timings]
    for operation in operations:
        for linear in linears:
            table.add_column(f"{operation} /\n{HEADINGS[linear]}", justify="right")
    for row in rows:
        cells = [_ratio(row.timings[n], row.timings[linear]) for n in operations for linear in linears]
        table.add_row(str(row.shape), *cells)
    Console().print(table)


def _table(title: str, *, lines: bool) -> Table:
    table = Table(title=title, show_lines=lines)
    table.add_column("in,out,grids,batch", no_wrap=True)
    return table


def _ratio(a: Timing, b: Timing) -> str:
    return f"{a.median / b.median:.2f} ±{a.iqr / a.median + b.iqr / b.median:.0%}"


def main(
    device: DeviceOption = None,
    output: OutputOption = None,
    shape: ShapeOption = None,
    batch_first: Annotated[
        bool, typer.Option("--batch-first", help="Inputs and gradients lie in memory samples first.")
    ] = False,
) -> None:
    """Time lmKAN layers beside linear layers of their shapes."""
    where = choose_device(device)
    rows: list[Row] = []
    with torch.no_grad():
        for s in track(choose_shapes(shape, published_on(where)), "timing", console=Console(stderr=True)):
            rows.append(time_row(s, where, batch_first))
            if output is not None:
                write_csv((row.record() for row in rows), output)
    (print_times if where.type == "cuda" else print_ratios)(rows)


if __name__ == "__main__":
    typer.run(main)
