"""Approximate a random deep network R^32 -> R^1 with lmKANs and MLPs, and draw error against cost.

    python -m examples.function_approximation --preset quick
    python -m examples.function_approximation --preset full     # needs a GPU

The setting is the paper's: the target is a random tanh network of 10 layers of 1024 units with weights 3
times as large as usual, inputs are normal, data is unlimited, and the error is the mean squared error in
units of the target's variance. Finished models are kept in the CSV; run again to go on.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from examples.comparison import (
    Results,
    best_device,
    call,
    draw_pareto,
    evaluate,
    lmkan,
    mlp,
    standard_scale,
    tf32,
    train,
)

INPUTS, GRIDS, HIDDEN_LAYERS = 32, 12, 2
SEED = 0


@dataclass(frozen=True)
class Preset:
    """Sizes: of the target, of the models, of training and of timing."""

    depth: int
    units: int
    lmkan_widths: tuple[int, ...]
    mlp_widths: tuple[int, ...]
    steps: int
    batch: int
    test_samples: int
    timed_batch: int


PRESETS = {
    "quick": Preset(2, 64, (8, 16), (16, 32, 64), 300, 512, 4096, 4096),
    "full": Preset(10, 1024, (32, 64, 128, 256), (32, 64, 128, 256, 512, 1024), 30000, 8192, 2**17, 2**18),
}


class Target:
    """A random tanh network, standardised; samples are drawn as needed."""

    def __init__(self, preset: Preset, device: torch.device) -> None:
        torch.manual_seed(SEED)
        widths = (INPUTS, *(preset.units,) * preset.depth)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [_scaled(nn.Linear(inputs, outputs)), nn.Tanh()]
        self._network = nn.Sequential(*layers, _scaled(nn.Linear(preset.units, 1))).to(device)
        self._device = device
        self._mean, self._scale = 0.0, 1.0
        self._mean, self._scale = standard_scale(self.sample(2**15)[1])

    @torch.no_grad()
    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """Inputs ``[count, 32]`` and values ``[count, 1]``."""
        x = torch.randn(count, INPUTS, device=self._device)
        return x, (self._network(x) - self._mean) / self._scale


def _scaled(layer: nn.Linear) -> nn.Linear:
    with torch.no_grad():
        layer.weight.mul_(3)
    return layer


def main(
    preset: Annotated[Literal["quick", "full"], typer.Option(help="quick: minutes on a CPU.")] = "quick",
    output: Annotated[Path | None, typer.Option(help="Directory for CSV and picture.")] = None,
    steps: Annotated[int | None, typer.Option(min=20, help="Training steps of every model.")] = None,
    learning_rate: Annotated[float, typer.Option(help="Adam's, before it decays.")] = 2e-3,
    hessian: Annotated[float, typer.Option(help="Initial weight of the regularisation.")] = 1e-3,
) -> None:
    """Fit a random deep network with lmKANs and MLPs of several widths."""
    chosen, device, console = PRESETS[preset], best_device(), Console()
    directory = output or Path("results") / f"function_approximation-{preset}"
    results = Results(directory / "results.csv")
    count = steps or chosen.steps
    target = Target(chosen, device)
    test_x, test_y = target.sample(chosen.test_samples)
    plan = [("lmKAN", w) for w in chosen.lmkan_widths] + [("MLP", w) for w in chosen.mlp_widths]
    for name, width in plan:
        if results.has(name, width):
            continue
        torch.manual_seed(SEED + width)
        model: nn.Module = (
            lmkan(INPUTS, width, HIDDEN_LAYERS, GRIDS)
            if name == "lmKAN"
            else mlp(INPUTS, width, HIDDEN_LAYERS)
        ).to(device)

        def loss(model: nn.Module = model) -> Tensor:
            x, y = target.sample(chosen.batch)
            return mse_loss(call(model, x), y)

        with tf32(False):
            progress = track(range(count), f"{name} {width}", console=console)
            train(model, loss, progress, count, learning_rate, hessian)
        rows = evaluate(
            name,
            width,
            model,
            lambda predict: mse_loss(torch.cat([predict(x) for x in test_x.split(8192)]), test_y).item(),
            INPUTS,
            chosen.timed_batch,
            device,
        )
        results.add(rows)
        for row in rows:
            console.print(f"  {row.arithmetic}: MSE {row.error:.4f}, {row.microseconds:.0f} µs")
        title = "a random deep network, R^32 -> R"
        draw_pareto(results.rows, directory / "pareto.png", "mean squared error", title)
    console.print(f"{results.path}\n{directory / 'pareto.png'}")


if __name__ == "__main__":
    typer.run(main)
