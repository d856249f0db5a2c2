"""Tune kernels for this machine, then train an lmKAN on handwritten digits beside an MLP.

The lmKAN has two layers, 64 -> 64 -> 10. What to look at: `LmKan` (where batch norm goes),
`train` (how the Hessian regularisation fades while the learning rate rests, then the learning rate
falls) and the tables it prints. Exit code 1 when the lmKAN misses 96 % test accuracy.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.benchmark import Timer

from lmkan_gen import LMKAN2DLayer, dispatch
from lmkan_gen import device as devices
from lmkan_gen.nn import BatchLastNorm, hessian_penalty, lmkan_layers
from lmkan_gen.problem import LayerShape
from lmkan_gen.selection import TUNING_VARIABLE
from lmkan_gen.toolchain import ToolchainError
from lmkan_gen.tuner.report import ConsoleObserver, duration
from lmkan_gen.tuner.run import TuningFailed, default_output, tune

PIXELS, WIDTH, DIGITS = 64, 64, 10
GRIDS = 8
BATCH = 128
EPOCHS = 40
LEARNING_RATE = 1e-2
HESSIAN_START, HESSIAN_END = 1e-1, 1e-2
REQUIRED_ACCURACY = 0.96
SEED = 0

console = Console()


class LmKan(nn.Sequential):
    """Two lmKAN layers; batch norm before every one but the first, whose inputs are standardised."""

    def __init__(self) -> None:
        super().__init__(
            LMKAN2DLayer(GRIDS, PIXELS, WIDTH), BatchLastNorm(WIDTH), LMKAN2DLayer(GRIDS, WIDTH, DIGITS)
        )


class Mlp(nn.Module):
    """An MLP of the same width, with the same batch-last interface."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(PIXELS, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, DIGITS)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[PIXELS, batch]`` -> ``[DIGITS, batch]``."""
        y: Tensor = self.layers(x.T)
        return y.T


@dataclass(frozen=True)
class Data:
    """Images ``[PIXELS, samples]``, float32, about zero mean and unit variance; labels ``[samples]``."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_data(device: torch.device) -> Data:
    """scikit-learn's digits, a quarter of them held out."""
    images, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=0.25, random_state=SEED, stratify=labels
    )
    mean, scale = train_x.mean(axis=0), train_x.std()

    def batch_last(x: object) -> Tensor:
        return torch.tensor((x - mean) / scale, dtype=torch.float32, device=device).T.contiguous()

    return Data(
        batch_last(train_x),
        torch.tensor(train_y, device=device),
        batch_last(test_x),
        torch.tensor(test_y, device=device),
    )


def schedule(progress: float) -> tuple[float, float]:
    """Learning rate and weight of the Hessian regularisation at ``progress`` in [0, 1].

    First half: constant learning rate while the regularisation decays exponentially, so that smooth
    functions are learned before detailed ones. Second half: the learning rate falls along a cosine.
    """
    decay = min(1.0, 2 * progress)
    hessian = HESSIAN_START * (HESSIAN_END / HESSIAN_START) ** decay
    cosine = 0.5 * (1 + math.cos(math.pi * max(0.0, 2 * progress - 1)))
    return LEARNING_RATE * cosine, hessian


def train(model: LmKan | Mlp, data: Data, name: str) -> float:
    """Train ``model`` in place; returns seconds."""
    optimizer = torch.optim.Adam(model.parameters())
    samples = data.train_y.numel()
    steps_per_epoch = samples // BATCH
    start = time.perf_counter()
    for epoch in track(range(EPOCHS), f"training {name}", console=console):
        order = torch.randperm(samples).to(data.train_y.device)
        for step, batch in enumerate(order.split(BATCH)[:steps_per_epoch]):
            learning_rate, hessian = schedule((epoch + step / steps_per_epoch) / EPOCHS)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            loss = cross_entropy(model(data.train_x[:, batch]).T, data.train_y[batch])
            if isinstance(model, LmKan):
                loss = loss + hessian * hessian_penalty(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    if data.train_y.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Fraction of ``x`` ``[PIXELS, samples]`` that ``model`` labels as in ``y``."""
    model.eval()
    return float((model(x).argmax(0) == y).float().mean())


@contextmanager
def frozen(model: LmKan, dtype: torch.dtype) -> Iterator[None]:
    """The model with narrow tables, for a while."""
    layers = lmkan_layers(model).values()
    for layer in layers:
        layer.eval().freeze(dtype)
    yield
    for layer in layers:
        layer.unfreeze()


def best_device() -> torch.device:
    """The GPU with most multiprocessors, else the CPU."""
    count = torch.cuda.device_count()
    if count == 0:
        return torch.device("cpu")
    return torch.device("cuda", max(range(count), key=lambda i: devices.cuda(i).multiprocessors))


def tune_layers(device: torch.device, output: Path | None, seconds: float) -> None:
    """Tune the shapes of `LmKan` and write them where layers look; without a compiler say so and go on."""
    path = output or _writable(default_output(devices.of(device)))
    if path != default_output(devices.of(device)):
        os.environ[TUNING_VARIABLE] = str(path)
    shapes = [LayerShape(PIXELS, WIDTH, GRIDS, BATCH), LayerShape(WIDTH, DIGITS, GRIDS, BATCH)]
    try:
        with ConsoleObserver(console) as observer:
            tune(shapes, device, time_budget=seconds, output=path, observer=observer)
    except (ToolchainError, TuningFailed) as error:
        console.print(f"[yellow]not tuned:[/] {error}", highlight=False)


def _writable(path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError:  # a home directory that is read-only, or none at all
        return Path(tempfile.mkdtemp(prefix="lmkan_gen-")) / path.name


def print_kernels() -> None:
    """What has run for batches of the training size, and why."""
    table = Table(title="kernels used in training")
    for heading in ("operation", "shape", "kernel", "chosen by", "tuning file"):
        table.add_column(heading, overflow="fold")
    for used in dispatch.used():
        if used.shape.batch == BATCH:
            choice = used.choice
            settings = ", ".join(f"{k}={v}" for k, v in sorted(choice.parameters.items()))
            kernel = f"{used.kernel}\n{settings}" if used.kernel else "plain torch"
            tier = choice.tier.replace("_", " ")
            table.add_row(str(used.operation), str(used.shape), kernel, tier, choice.source)
    console.print(table)


def print_times(model: LmKan, device: torch.device) -> None:
    """Each layer beside plain torch and a linear layer of its shape."""
    table = Table(title=f"median time per call, batch {BATCH}")
    for heading in ("layer", "pass"):
        table.add_column(heading)
    for heading in ("lmKAN", "plain torch", "speedup", "Linear", "lmKAN / Linear"):
        table.add_column(heading, justify="right")
    for i, layer in enumerate(m for m in model if isinstance(m, LMKAN2DLayer)):
        # the first layer's inputs are data: nobody wants their gradient
        x = torch.randn(layer.input_dim, BATCH, device=device, requires_grad=i > 0)
        linear = nn.Linear(layer.input_dim, layer.output_dim, device=device)
        rows = x.detach().T.contiguous().requires_grad_(i > 0)
        for name, run in (("forward", _forward), ("with gradients", _step)):
            tuned, dense = _microseconds(run(layer, x)), _microseconds(run(linear, rows))
            with _plain_torch():
                plain = _microseconds(run(layer, x))
            table.add_row(
                f"{layer.input_dim} -> {layer.output_dim}",
                name,
                duration(tuned),
                duration(plain),
                f"{plain / tuned:.1f}x",
                duration(dense),
                f"{tuned / dense:.1f}",
            )
    console.print(table)


def _forward(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            layer(x)

    return run


def _step(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    wanted = [t for t in (x, *layer.parameters()) if t.requires_grad]
    grad = torch.randn_like(layer(x))

    def run() -> None:
        torch.autograd.grad(layer(x), wanted, grad)

    return run


def _microseconds(run: Callable[[], None]) -> float:
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return float(1e6 * timer.blocked_autorange(min_run_time=0.3).median)


@contextmanager
def _plain_torch() -> Iterator[None]:
    before = os.environ.get(dispatch.DISABLE_VARIABLE)
    os.environ[dispatch.DISABLE_VARIABLE] = "1"
    try:
        yield
    finally:
        del os.environ[dispatch.DISABLE_VARIABLE]
        if before is not None:
            os.environ[dispatch.DISABLE_VARIABLE] = before


def main(
    tuning: Annotated[
        Path | None, typer.Option(help="Tuning file to write, instead of one in the user's configuration.")
    ] = None,
    tuning_seconds: Annotated[float, typer.Option(min=0, help="Time budget of the tuning.")] = 90,
) -> None:
    """Tune lmKAN kernels for this machine and train on handwritten digits."""
    device = best_device()
    console.print(f"[bold]1. tuning[/] on {devices.of(device).name}", highlight=False)
    tune_layers(device, tuning, tuning_seconds)

    console.print("[bold]2. training[/]")
    data = load_data(device)
    results = Table(title=f"handwritten digits, {PIXELS} -> {WIDTH} -> {DIGITS}")
    results.add_column("model")
    for heading in ("parameters", "trained in", "training accuracy", "test accuracy"):
        results.add_column(heading, justify="right")
    models: dict[str, LmKan | Mlp] = {}
    tested: dict[str, float] = {}
    for name, kind in (("lmKAN", LmKan), ("MLP", Mlp)):
        torch.manual_seed(SEED)
        model = models[name] = kind().to(device)
        seconds = train(model, data, name)
        if isinstance(model, LmKan):
            print_kernels()
        tested[name] = accuracy(model, data.test_x, data.test_y)
        results.add_row(
            name,
            str(sum(p.numel() for p in model.parameters())),
            f"{seconds:.1f} s",
            f"{accuracy(model, data.train_x, data.train_y):.4f}",
            f"{tested[name]:.4f}",
        )
        if isinstance(model, LmKan):
            for dtype in (torch.float16, torch.int8):
                with frozen(model, dtype):
                    results.add_row(
                        f"  {str(dtype).removeprefix('torch.')} tables",
                        "",
                        "",
                        f"{accuracy(model, data.train_x, data.train_y):.4f}",
                        f"{accuracy(model, data.test_x, data.test_y):.4f}",
                    )

    console.print("[bold]3. results[/]")
    lmkan = models["lmKAN"]
    assert isinstance(lmkan, LmKan)
    print_times(lmkan, device)
    console.print(results)
    if tested["lmKAN"] < REQUIRED_ACCURACY:
        console.print(f"[red]test accuracy {tested['lmKAN']:.4f} is below {REQUIRED_ACCURACY}[/]")
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
