"""The target, its samples, and how models are fitted to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count, pairwise
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from examples.comparison import (
    best_device,
    call,
    paper_schedule,
    standard_scale,
    tf32,
)
from examples.plan import DRAW, Task
from examples.training import train

INPUTS = 32
#: test batches have numbers that no training batch has
_FIRST_TEST_BATCH = 2**30
_TEST_BATCH = 8192


@dataclass(frozen=True)
class Preset:
    """Sizes: of the target, of the models, of training and of timing.

    ``label_batches`` of training samples are labelled; after so many steps the same come again.
    """

    depth: int
    units: int
    grids: int
    lmkan_widths: tuple[int, ...]
    mlp_widths: tuple[int, ...]
    steps: int
    batch: int
    label_batches: int
    test_batches: int
    timed_batch: int


PRESETS = {
    "quick": Preset(2, 64, 8, (8, 16), (16, 32, 64), 2000, 512, 2000, 8, 4096),
    "full": Preset(
        10, 1024, 12, (32, 64, 128, 256), (32, 64, 128, 256, 512, 1024), 16384, 8192, 2**14, 16, 2**18
    ),
}


class Samples:
    """Labelled samples in numbered batches. Inputs are drawn from a batch's number, labels are kept.

    ``seed`` draws another target and other inputs.

    Attributes:
        labels: ``[batches, batch, 1]``.
        test: inputs ``[samples, 32]`` and labels ``[samples, 1]``.
    """

    def __init__(
        self, preset: Preset, steps: int, path: Path, console: Console | None = None, seed: int = 0
    ) -> None:
        """Read labels for so many steps from ``path``, or make them and write them there."""
        self._preset = preset
        self._seed = seed
        self._device = best_device()
        self._generator = torch.Generator(self._device)
        numbers = range(_FIRST_TEST_BATCH, _FIRST_TEST_BATCH + preset.test_batches)
        test_x = torch.cat([self.inputs(number) for number in numbers])
        kept = torch.load(path, map_location=self._device, weights_only=True) if path.exists() else None
        batches = min(steps, preset.label_batches)
        # another device or release of torch may draw other numbers from the same seed
        if (
            kept is None
            or not torch.equal(kept["test_inputs"], test_x)
            or kept["labels"].shape[:2] != (batches, preset.batch)
        ):
            kept = {"test_inputs": test_x, **self._label(batches, test_x, console)}
            path.parent.mkdir(parents=True, exist_ok=True)
            staged = path.with_suffix(".tmp")
            torch.save(kept, staged)
            staged.replace(path)
        self.labels: Tensor = kept["labels"]
        self.test: tuple[Tensor, Tensor] = test_x, kept["test_labels"]

    def inputs(self, number: int) -> Tensor:
        """Of a batch: ``[batch, 32]``."""
        self._generator.manual_seed(number + self._seed * DRAW)
        return torch.randn(self._preset.batch, INPUTS, device=self._device, generator=self._generator)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and labels, batch after batch, over and over."""
        for step in count():
            number = step % len(self.labels)
            yield self.inputs(number), self.labels[number]

    @torch.no_grad()
    def _label(self, batches: int, test_x: Tensor, console: Console | None) -> dict[str, Tensor]:
        target = network(self._preset, self._seed).to(self._device)
        labels = torch.empty(batches, self._preset.batch, 1, device=self._device)
        numbers: Iterable[int] = range(batches)
        # off by 4e-6 of the variance (emulated), and the same function for training and test
        with tf32(True):
            for number in numbers if console is None else track(numbers, "labels", console=console):
                labels[number] = target(self.inputs(number))
            test_y = torch.cat([target(x) for x in test_x.split(self._preset.batch)])
        mean, scale = standard_scale(labels)
        return {"labels": (labels - mean) / scale, "test_labels": (test_y - mean) / scale}


def network(preset: Preset, seed: int = 0) -> nn.Sequential:
    """The target: a random tanh network."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((INPUTS, *(preset.units,) * preset.depth)):
        layers += [_scaled(nn.Linear(inputs, outputs)), nn.Tanh()]
    return nn.Sequential(*layers, _scaled(nn.Linear(preset.units, 1)))


def _scaled(layer: nn.Linear) -> nn.Linear:
    with torch.no_grad():
        layer.weight.mul_(3)
    return layer


@dataclass(frozen=True)
class FunctionApproximation(Task):
    """See `Task`."""

    preset: Preset
    directory: Path
    steps: int
    learning_rate: float
    hessian: float
    graph: bool
    seed: int = 0

    inputs = INPUTS
    error_name = "mean squared error"
    title = "a random deep network, R³² → R"

    @property
    def timed_batch(self) -> int:
        """Samples."""
        return self.preset.timed_batch

    @property
    def batches(self) -> tuple[int, ...]:
        """See `Task`."""
        return self.preset.batch, _TEST_BATCH

    def prepare(self, console: Console) -> None:
        """Make the labels, so that no two processes do."""
        Samples(self.preset, self.steps, self._labels, console, self.seed)

    @property
    def _labels(self) -> Path:
        return self.directory / "labels.pt"

    @cached_property
    def _samples(self) -> Samples:
        return Samples(self.preset, self.steps, self._labels, seed=self.seed)

    @property
    def grids(self) -> int:
        """Of the lmKANs."""
        return self.preset.grids

    def fit(self, model: nn.Module, progress: Callable[[int], Iterable[int]]) -> None:
        """See `Task`."""
        model.train()
        train(
            model,
            lambda x, y: mse_loss(call(model, x), y),
            self._samples.batches(),
            progress(self.steps),
            paper_schedule(self.hessian, self.steps),
            self.learning_rate,
            self.graph,
        )

    def error(self, predict: Callable[[Tensor], Tensor]) -> float:
        """See `Task`."""
        x, y = self._samples.test
        return mse_loss(torch.cat([predict(part) for part in x.split(_TEST_BATCH)]), y).item()
