"""Time what a user's loop costs, in wall clock, beside linear layers and an MLP of the same widths.

Small layers are bound by the host: modules, operators, autograd and launches. Both sides of a row run in
this process, in turns; each time is that of many calls without waiting for the device between them, divided
by their number. On CPUs torch has one thread.

Run from the top of the repository: python -m benchmarks.host
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.common import DeviceOption, OutputOption, choose_device, write_csv
from lmkan_gen import LMKAN2DLayer, dispatch, fold, selection
from lmkan_gen import device as devices
from lmkan_gen.nn import LMKANMLP, lmkan_layers

ROUNDS = 15
ROUND_SECONDS = 0.05
Call = Callable[[], object]

#: inputs, outputs, grids, batch of single layers, by device
LAYERS = {"cuda": ((64, 64, 8, 256), (128, 128, 10, 1024)), "cpu": ((64, 64, 8, 1), (64, 64, 8, 128))}
WIDTHS, NETWORK_BATCH = (64,) * 6, 256
BATCHES = range(900, 1101)


@dataclass(frozen=True)
class Row:
    """One comparison, in microseconds; ``other`` names what stands beside it."""

    what: str
    ours: float
    ours_iqr: float
    other: str
    theirs: float
    theirs_iqr: float

    @property
    def ratio(self) -> float:
        """How many times the other's time ours is."""
        return self.ours / self.theirs

    def record(self) -> dict[str, str | int | float | None]:
        """All numbers."""
        return {
            "what": self.what,
            "us": self.ours,
            "iqr_us": self.ours_iqr,
            "other": self.other,
            "other_us": self.theirs,
            "other_iqr_us": self.theirs_iqr,
            "ratio": self.ratio,
        }


class Clock:
    """Times calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def wait(self) -> None:
        """Until the device has done its work."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def once(self, call: Call, times: int = 1) -> float:
        """Seconds that a number of calls take."""
        self.wait()
        begin = time.perf_counter()
        for _ in range(times):
            call()
        self.wait()
        return time.perf_counter() - begin

    def together(self, what: str, ours: Call, other: str, theirs: Call) -> Row:
        """Two calls in turns, each as often as fills a round."""
        calls = (ours, theirs)
        for call in calls:
            for _ in range(30):
                call()
        counts = [max(1, int(10 * ROUND_SECONDS / self.once(call, 10))) for call in calls]
        samples: tuple[list[float], list[float]] = ([], [])
        for _ in range(ROUNDS):
            for call, count, times in zip(calls, counts, samples, strict=True):
                times.append(1e6 * self.once(call, count) / count)
        return Row(what, *_summary(samples[0]), other, *_summary(samples[1]))


def _summary(samples: list[float]) -> tuple[float, float]:
    low, middle, high = statistics.quantiles(samples, n=4)
    return middle, high - low


def _inference(module: nn.Module, x: Tensor) -> Call:
    def call() -> Tensor:
        with torch.no_grad():
            y: Tensor = module(x)
        return y

    return call


def _gradients(module: nn.Module, x: Tensor) -> Call:
    x = x.clone().requires_grad_()
    grad = torch.randn_like(module(x))

    def call() -> None:
        module(x).backward(grad)
        x.grad = None
        module.zero_grad()

    return call


def _step(module: nn.Module, x: Tensor) -> Call:
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3, fused=True)

    def call() -> None:
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()

    return call


def _mlp(device: torch.device) -> nn.Sequential:
    parts: list[nn.Module] = []
    for inputs, outputs in pairwise(WIDTHS):
        parts += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs, affine=False), nn.ReLU()]
    return nn.Sequential(*parts[:-2]).to(device)


def _network(device: torch.device) -> LMKANMLP:
    return LMKANMLP(WIDTHS, 8, device=device)


def layer_rows(device: torch.device, clock: Clock) -> Iterator[Row]:
    """Single layers: inference, frozen inference, forward in grad mode, forward and backward."""
    for inputs, outputs, grids, batch in LAYERS[device.type]:
        size = f"{inputs}, {outputs}, {grids}, batch {batch}"
        layer = LMKAN2DLayer(grids, inputs, outputs, device=device)
        linear = nn.Linear(inputs, outputs, device=device)
        x, samples = torch.randn(inputs, batch, device=device), torch.randn(batch, inputs, device=device)
        other = _inference(linear, samples)
        yield clock.together(f"inference, {size}", _inference(layer, x), "nn.Linear", other)
        pairs = (partial(layer, x), partial(linear, samples))
        yield clock.together(f"forward in grad mode, {size}", pairs[0], "nn.Linear", pairs[1])
        steps = (_gradients(layer, x), _gradients(linear, samples))
        yield clock.together(f"forward + backward, {size}", steps[0], "nn.Linear", steps[1])
        for dtype in (torch.float16, torch.int8):
            frozen = LMKAN2DLayer(grids, inputs, outputs, device=device).eval().freeze(dtype)
            name = str(dtype).removeprefix("torch.")
            yield clock.together(f"frozen to {name}, {size}", _inference(frozen, x), "nn.Linear", other)


def network_rows(device: torch.device, clock: Clock) -> Iterator[Row]:
    """Five layers of width 64 with batch norm."""
    x = torch.randn(NETWORK_BATCH, WIDTHS[0], device=device)
    network, mlp = _network(device), _mlp(device)
    yield clock.together("network: training step", _step(network, x), "MLP", _step(mlp, x))
    network.eval(), mlp.eval()
    yield clock.together("network: inference", _inference(network, x), "MLP", _inference(mlp, x))
    folded = fold(network).eval()
    for layer in lmkan_layers(folded).values():
        layer.freeze(torch.float16)
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    compiled = [_inference(torch.compile(m, mode=mode), x) for m in (folded, mlp)]  # type: ignore[arg-type]
    yield clock.together(f"network: folded, frozen, compiled ({mode})", compiled[0], "MLP", compiled[1])


def batch_rows(device: torch.device, clock: Clock) -> Iterator[Row]:
    """Batches of sizes not seen before: whole runs of 60 steps, then single calls."""
    generator = torch.Generator().manual_seed(0)
    sizes = [BATCHES[int(i)] for i in torch.randint(len(BATCHES), (60,), generator=generator)]
    batches = [torch.randn(n, WIDTHS[0], device=device) for n in sizes]
    network, mlp = _network(device), _mlp(device)
    steps = {id(m): _all_steps(m, batches) for m in (network, mlp)}
    warm = [torch.randn(899, WIDTHS[0], device=device)]
    for module in (network, mlp):
        steps[id(module)]()  # builds the kernels of all batches
    dispatch.clear_caches()
    selection.clear_caches()
    for module in (network, mlp):
        _all_steps(module, warm)()
    first = [1e6 * clock.once(steps[id(m)]) for m in (network, mlp)]
    yield Row("60 steps of 900 to 1100 samples, first time", first[0], 0.0, "MLP", first[1], 0.0)
    yield clock.together("the same again", steps[id(network)], "MLP", steps[id(mlp)])
    layer = LMKAN2DLayer(8, 64, 64, device=device)
    for what, call in (("forward", _forward_of(layer)), ("forward + backward", _backward_of(layer))):
        xs = [torch.randn(64, n, device=device) for n in range(2000, 2040)]
        for x in xs:  # builds the kernels, and memory for all sizes
            call(x)
        dispatch.clear_caches()
        for x in xs[:3]:
            call(x)
        new = [1e6 * clock.once(partial(call, x)) for x in xs[3:]]
        seen = [1e6 * clock.once(partial(call, x)) for x in xs[3:]]
        yield Row(f"a batch not seen before, {what}", *_summary(new), "seen before", *_summary(seen))


def _all_steps(module: nn.Module, batches: Iterable[Tensor]) -> Call:
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3, fused=True)

    def call() -> None:
        for x in batches:
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()

    return call


def _forward_of(layer: nn.Module) -> Callable[[Tensor], Any]:
    def call(x: Tensor) -> None:
        with torch.no_grad():
            layer(x)

    return call


def _backward_of(layer: nn.Module) -> Callable[[Tensor], Any]:
    def call(x: Tensor) -> None:
        layer(x).sum().backward()
        layer.zero_grad()

    return call


def large_rows(device: torch.device, clock: Clock) -> Iterator[Row]:
    """A step of a layer whose kernels take longer than its launches."""
    layer = LMKAN2DLayer(8, 128, 128, batch_first=True, device=device)
    linear = nn.Linear(128, 128, device=device)
    x = torch.randn(4096, 128, device=device)
    steps = (_gradients(layer, x), _gradients(linear, x))
    yield clock.together("forward + backward, 128, 128, 8, batch 4096", steps[0], "nn.Linear", steps[1])


def main(device: DeviceOption = None, output: OutputOption = None) -> None:
    """Print every row as it comes, then all of them as a table."""
    chosen = choose_device(device)
    if chosen.type == "cpu":
        torch.set_num_threads(1)
    clock, console, rows = Clock(chosen), Console(), list[Row]()
    for part in (layer_rows, network_rows, batch_rows, large_rows):
        for row in part(chosen, clock):
            rows.append(row)
            console.print(f"{row.what}: {row.ours:.1f} us, {row.other} {row.theirs:.1f} us", highlight=False)
            if output is not None:
                write_csv([r.record() for r in rows], output)
    table = Table("", "us", "±", "beside", "us", "±", "ratio", title=devices.of(chosen).name)
    for r in rows:
        numbers = (f"{r.ours:.1f}", f"{r.ours_iqr:.1f}", r.other, f"{r.theirs:.1f}", f"{r.theirs_iqr:.1f}")
        table.add_row(r.what, *numbers, f"{r.ratio:.2f}")
    Console(width=max(console.width, 120)).print(table)


if __name__ == "__main__":
    typer.run(main)
