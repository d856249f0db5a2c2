"""Handwritten digits through four networks of equal widths: MLP and CNN, each of linear and of lmKAN layers.

    python -m examples.digits_networks --preset quick

The CNNs have two convolutions of stride 2. Prints and writes test accuracy, parameters and the time of one
inference call. `examples/digits.py` shows the layers underneath, and tuning.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from examples.comparison import best_device, device_name
from examples.training import train
from lmkan_gen.fitting import Curve, FittingSchedule, Phase
from lmkan_gen.nn import LMKANMLP, LMKANBlock, LMKANConv2d
from lmkan_gen.tuner.measure import measure

GRIDS, WIDTH, CHANNELS, BATCH = 8, 64, 16, 128
SEED = 0
EPOCHS = {"quick": 30, "full": 200}
LEARNING_RATE = 5e-3
HEADINGS = ("model", "parameters", "test_accuracy", "microseconds_per_batch", "batch", "device")


def mlp() -> nn.Module:
    """64 -> 64 -> 10."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)
    )


def lmkan_mlp() -> nn.Module:
    """The same of lmKAN layers."""
    return nn.Sequential(nn.Flatten(), LMKANMLP((64, WIDTH, 10), GRIDS))


def cnn() -> nn.Module:
    """8 x 8 -> 4 x 4 -> 2 x 2 -> 10."""
    return nn.Sequential(
        nn.Conv2d(1, CHANNELS, 3, stride=2, padding=1),
        nn.BatchNorm2d(CHANNELS),
        nn.ReLU(),
        nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=1),
        nn.BatchNorm2d(CHANNELS),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * CHANNELS, 10),
    )


def lmkan_cnn() -> nn.Module:
    """The same of lmKAN layers."""
    return nn.Sequential(
        LMKANConv2d(1, CHANNELS, 3, GRIDS, stride=2, padding=1),
        nn.BatchNorm2d(CHANNELS, affine=False),
        LMKANConv2d(CHANNELS, CHANNELS, 3, GRIDS, stride=2, padding=1),
        nn.Flatten(),
        LMKANBlock(4 * CHANNELS, 10, GRIDS),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "MLP": mlp,
    "lmKAN MLP": lmkan_mlp,
    "CNN": cnn,
    "lmKAN CNN": lmkan_cnn,
}


def load(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images ``[samples, 1, 8, 8]`` of about zero mean and unit variance, and labels: training, then test."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=0.25, random_state=SEED, stratify=labels)
    mean, scale = split[0].mean(axis=0), split[0].std()
    x, test_x = (torch.tensor((s - mean) / scale, dtype=torch.float32).view(-1, 1, 8, 8) for s in split[:2])
    y, test_y = (torch.tensor(s) for s in split[2:])
    return x.to(device), y.to(device), test_x.to(device), test_y.to(device)


def batches(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Epoch after epoch in random order, without the incomplete batch at the end of each."""
    while True:
        order = torch.randperm(len(y), device=y.device)
        for batch in order[: len(y) - len(y) % BATCH].split(BATCH):
            yield x[batch], y[batch]


def fit(
    model: nn.Module, x: Tensor, y: Tensor, epochs: int, graph: bool, name: str, console: Console
) -> None:
    """Train in place; networks without lmKAN layers get the learning rates alone."""
    steps = epochs * (len(y) // BATCH)
    # few samples: the regularisation stays on, at a tenth of where it starts
    phases = (
        Phase("decay", steps // 2, hessian=Curve(1e-1, 1e-2, "exponential")),
        Phase("cosine", steps - steps // 2, Curve(1, 0, "cosine"), hessian=Curve(1e-2)),
    )
    model.train()
    train(
        model,
        lambda images, labels: cross_entropy(model(images), labels),
        batches(x, y),
        track(range(steps), name, console=console),
        lambda model, optimizer: FittingSchedule(phases, model, optimizer),
        LEARNING_RATE,
        graph,
    )
    model.eval()


def main(
    preset: Annotated[Literal["quick", "full"], typer.Option(help="How long to train.")] = "quick",
    output: Annotated[Path | None, typer.Option(help="Directory for CSV and picture.")] = None,
    graph: Annotated[bool, typer.Option(help="Train by replaying CUDA graphs, on GPUs.")] = True,
) -> None:
    """Train four networks on handwritten digits."""
    device = best_device()
    console = Console()
    directory = output or Path("results") / f"digits-{preset}"
    x, y, test_x, test_y = load(device)
    rows: list[tuple[str, int, float, float, int, str]] = []
    for name, make in MODELS.items():
        torch.manual_seed(SEED)
        model = make().to(device)
        fit(model, x, y, EPOCHS[preset], graph, name, console)

        def infer(model: nn.Module = model) -> None:
            with torch.no_grad():
                model(x[:BATCH])

        with torch.no_grad():
            accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
        parameters = sum(p.numel() for p in model.parameters())
        rows.append((name, parameters, accuracy, measure([infer], device).median, BATCH, device_name(device)))
    table = Table(title=f"handwritten digits, {EPOCHS[preset]} epochs")
    for heading in HEADINGS:
        table.add_column(heading.replace("_", " "))
    for row in rows:
        table.add_row(row[0], str(row[1]), f"{row[2]:.4f}", f"{row[3]:.0f}", str(row[4]), row[5])
    console.print(table)
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "results.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(HEADINGS)
        writer.writerows(rows)
    figure = Figure(figsize=(5.5, 4), layout="constrained")
    ax = figure.subplots()
    for name, _, accuracy, time, _, _ in rows:
        ax.plot(time, 100 * (1 - accuracy), "o", color="tab:red" if "lmKAN" in name else "tab:blue")
        ax.annotate(name, (time, 100 * (1 - accuracy)), textcoords="offset points", xytext=(6, 4))
    ax.set(xscale="log", xlabel=f"µs per batch of {BATCH}", ylabel="test error, %")
    ax.margins(0.3)
    ax.grid(alpha=0.3, which="both")
    figure.savefig(directory / "error_vs_time.png", dpi=150)


if __name__ == "__main__":
    typer.run(main)
