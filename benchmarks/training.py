"""Time a whole training step of an lmKAN layer beside one of an MLP of equal width.

A step is forward, backward with both gradients, the Hessian regulariser's value and gradient, and Adam. The
parts are timed alone with cold caches, the step as torch runs it, all without the host's share on GPUs (CUDA
graphs). The MLP's step is forward and backward of a linear layer with ReLU, and Adam.

Run from the top of the repository: python -m benchmarks.training
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from benchmarks.common import DeviceOption, OutputOption, ShapeOption, choose_device, choose_shapes, write_csv
from benchmarks.layers import (
    PUBLISHED_CAPTION,
    PUBLISHED_OPERATIONS,
    Published,
    published_cell,
    published_on,
    published_times,
    time_lmkan,
)
from lmkan_gen import LMKAN2DLayer
from lmkan_gen import device as devices
from lmkan_gen.problem import LayerShape, Operation
from lmkan_gen.tuner.measure import Timing, copies_past_cache, measure
from lmkan_gen.tuner.report import duration

HESSIAN_WEIGHT = 1e-3
#: columns of the table: names and headings
PARTS = {
    "forward": "for-\nward",
    "backward": "back-\nward",
    "hessian": "regul-\nariser",
    "adam": "Adam",
    "step": "whole\nstep",
    "mlp_float32": "MLP\nfloat32",
    "mlp_tf32": "MLP\nTF32",
    "copy": "copy",
}


@dataclass(frozen=True)
class Row:
    """One layer's timings, by the names in `PARTS`."""

    shape: LayerShape
    device: devices.Device
    timings: Mapping[str, Timing]

    def ratio(self, of: str, to: str) -> float:
        """Of two medians."""
        return self.timings[of].median / self.timings[to].median

    @property
    def published(self) -> Published | None:
        """Times of the published implementation; None where they were not measured."""
        return published_times(self.shape, self.device)

    def published_us(self) -> float | None:
        """Forward and backward of the published implementation; None where they were not measured."""
        return None if self.published is None else sum(map(self.published.us, PUBLISHED_OPERATIONS))

    def speedup(self) -> float | None:
        """Over the published forward and backward; None where one is unknown, or launches matter in it."""
        if self.published is None or not all(map(self.published.comparable, PUBLISHED_OPERATIONS)):
            return None
        ours = sum(self.timings[operation].median for operation in PUBLISHED_OPERATIONS)
        return sum(map(self.published.us, PUBLISHED_OPERATIONS)) / ours

    def record(self) -> dict[str, str | int | float | None]:
        """All numbers, the same columns on every device."""
        s = self.shape
        values: dict[str, str | int | float | None] = {
            "device": self.device.name,
            "inputs": s.inputs,
            "outputs": s.outputs,
            "grids": s.grids,
            "batch": s.batch,
        }
        for name in PARTS:
            timing = self.timings.get(name)
            values[f"{name}_us"] = timing.median if timing else None
            values[f"{name}_iqr_us"] = timing.iqr if timing else None
        values["step_per_mlp"] = self.ratio("step", "mlp_float32")
        values["hessian_per_copy"] = self.ratio("hessian", "copy")
        values["published_forward_backward_us"] = self.published_us()
        values["published_launches_counted"] = self.published.launches_counted if self.published else None
        values["published_speedup"] = self.speedup()
        return values


def time_row(shape: LayerShape, device: torch.device) -> Row:
    """Time everything for one shape."""
    timings = {
        "forward": time_lmkan(Operation.FORWARD, shape, device),
        "backward": time_lmkan(Operation.BACKWARD, shape, device),
        "hessian": _time_of_tables(shape, device, hessian_call),
        "adam": _time_of_tables(shape, device, adam_call),
        "copy": _time_of_tables(shape, device, copy_call),
        "step": measure([lmkan_step(shape, device)], device),
    }
    precisions = {"mlp_float32": "highest"} | ({"mlp_tf32": "high"} if device.type == "cuda" else {})
    for name, precision in precisions.items():
        torch.set_float32_matmul_precision(precision)
        timings[name] = measure([mlp_step(shape, device)], device)
    return Row(shape, devices.of(device), timings)


def _time_of_tables(
    shape: LayerShape, device: torch.device, call: Callable[[LMKAN2DLayer], Callable[[], None]]
) -> Timing:
    """One call on the table, which is rotated past the cache together with its gradient."""
    copies = copies_past_cache(2 * shape.table_bytes, device)
    return measure([call(_layer(shape, device)) for _ in range(copies)], device)


def _layer(shape: LayerShape, device: torch.device) -> LMKAN2DLayer:
    return LMKAN2DLayer(shape.grids, shape.inputs, shape.outputs).to(device)


def hessian_call(layer: LMKAN2DLayer) -> Callable[[], None]:
    """Value and gradient of the regulariser, as a layer computes them."""

    def run() -> None:
        layer.func_parameter.grad = None
        layer.get_hessian_regularization().backward()

    return run


def adam_call(layer: LMKAN2DLayer) -> Callable[[], None]:
    """The optimizer's step on the table."""
    layer.func_parameter.grad = torch.randn_like(layer.func_parameter)
    optimizer = _adam(layer)

    def run() -> None:
        optimizer.step()

    return run


def copy_call(layer: LMKAN2DLayer) -> Callable[[], None]:
    """What the regulariser is compared with: the table read and written once."""
    table = layer.func_parameter.detach()
    target = torch.empty_like(table)

    def run() -> None:
        target.copy_(table)

    return run


def lmkan_step(shape: LayerShape, device: torch.device) -> partial[None]:
    """A training step of one layer, with the gradient of its input, as inside a network."""
    layer = _layer(shape, device)
    x = torch.randn(shape.inputs, shape.batch, device=device, requires_grad=True)
    return partial(
        _step,
        layer,
        x,
        torch.randn(shape.outputs, shape.batch, device=device),
        lambda: HESSIAN_WEIGHT * layer.get_hessian_regularization(),
        _adam(layer),
    )


def mlp_step(shape: LayerShape, device: torch.device) -> partial[None]:
    """The same of a linear layer and ReLU, on batch-first inputs, which they are fastest on."""
    layer = nn.Sequential(nn.Linear(shape.inputs, shape.outputs), nn.ReLU()).to(device)
    x = torch.randn(shape.batch, shape.inputs, device=device, requires_grad=True)
    grad = torch.randn(shape.batch, shape.outputs, device=device)
    return partial(_step, layer, x, grad, None, _adam(layer))


def _step(
    layer: nn.Module,
    x: Tensor,
    grad: Tensor,
    penalty: Callable[[], Tensor] | None,
    optimizer: torch.optim.Optimizer,
) -> None:
    optimizer.zero_grad(set_to_none=True)
    x.grad = None
    y = layer(x)
    if penalty is None:
        y.backward(grad)
    else:
        torch.autograd.backward([y, penalty()], [grad, None])
    optimizer.step()


def _adam(layer: nn.Module) -> torch.optim.Optimizer:
    # capturable: a CUDA graph may hold its step
    on_gpu = next(layer.parameters()).is_cuda
    return torch.optim.Adam(layer.parameters(), lr=1e-3, fused=True, capturable=on_gpu)


def print_times(rows: list[Row]) -> None:
    """Medians; then the step in units of the MLP's, the regulariser's of a copy, and published times."""
    times = _table(f"{rows[0].device.name}: a training step, median times")
    names = [n for n in PARTS if n in rows[0].timings]
    for name in names:
        times.add_column(PARTS[name], justify="right")
    ratios = _table("beside an MLP of equal width, a copy of the table, and published times")
    ratios.caption = PUBLISHED_CAPTION
    for heading in ("step /\nMLP step", "regulariser\n/ copy", "published\nfwd + bwd", "speedup"):
        ratios.add_column(heading, justify="right")
    for row in rows:
        times.add_row(str(row.shape), *(duration(row.timings[n].median) for n in names))
        speedup = row.speedup()
        ratios.add_row(
            str(row.shape),
            f"{row.ratio('step', 'mlp_float32'):.1f}",
            f"{row.ratio('hessian', 'copy'):.1f}",
            published_cell(row.published_us(), row.published),
            "-" if speedup is None else f"{speedup:.2f}x",
        )
    console = Console()
    console.print(times)
    console.print(ratios)


def _table(title: str) -> Table:
    table = Table(title=title)
    table.add_column("in,out,grids,batch", no_wrap=True)
    return table


def main(device: DeviceOption = None, output: OutputOption = None, shape: ShapeOption = None) -> None:
    """Time a whole training step of lmKAN layers beside an MLP of equal width."""
    where = choose_device(device)
    rows: list[Row] = []
    for s in track(choose_shapes(shape, published_on(where)), "timing", console=Console(stderr=True)):
        rows.append(time_row(s, where))
        if output is not None:
            write_csv((row.record() for row in rows), output)
    print_times(rows)


if __name__ == "__main__":
    typer.run(main)
