"""Energies and forces of methane: data on the device, and how models are fitted to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from examples.comparison import best_device, call, paper_schedule, standard_scale
from examples.methane.generate import RADIUS, load
from examples.plan import Task
from examples.training import train
from lmkan_gen.fitting import Curve, FittingSchedule, Phase

INPUTS = 12
SEED = 0
#: Å to inputs of unit variance: coordinates of points uniform in a sphere have that of radius^2 / 5. The
#: largest input is then sqrt(5) = 2.2, inside the outermost inner knots of all grids of 19 cells and more,
#: and nearly all cells are used.
SCALE = 5**0.5 / RADIUS
#: batches that are drawn at a time
_DRAWN = 32
_TEST_BATCH = 4096


@dataclass(frozen=True)
class Preset:
    """Sizes: of the data, of the models, of training and of timing; then of training with forces."""

    configurations: int
    test_samples: int
    grids: int
    lmkan_widths: tuple[int, ...]
    mlp_widths: tuple[int, ...]
    steps: int
    batch: int
    timed_batch: int
    force_lmkan_widths: tuple[int, ...]
    force_mlp_widths: tuple[int, ...]
    force_steps: int
    force_batch: int


PRESETS = {
    "quick": Preset(4000, 400, 8, (8, 16), (16, 32, 64), 1500, 256, 4096, (8,), (32,), 150, 128),
    "full": Preset(
        600_000,
        30_000,
        28,
        (8, 16, 32, 64, 128, 256),
        (128, 512, 1024, 2048),
        12_000,
        4096,
        2**18,
        (32, 64),
        (128, 512),
        1500,
        2048,
    ),
}


class Samples:
    """Configurations on the device.

    Positions in Å, energies standardised, gradients in units of the energies' standard deviation per Å.

    Attributes:
        train: positions ``[n, 4, 3]``, energies ``[n, 1]``, gradients ``[n, 4, 3]``.
        test: the same of configurations that training never sees.
        unit: the standard deviation of energies, eV.
    """

    def __init__(self, path: Path, test_samples: int) -> None:
        device = best_device()
        self._generator = torch.Generator(device).manual_seed(SEED)
        positions, energies, gradients = (torch.from_numpy(array).to(device) for array in load(path))
        if len(energies) <= test_samples:
            raise ValueError(f"{path} holds {len(energies)} configurations, {test_samples} are for testing")
        mean, self.unit = standard_scale(energies[:-test_samples])
        energies = ((energies - mean) / self.unit).unsqueeze(1)
        gradients = gradients / self.unit
        self.train = tuple(t[:-test_samples] for t in (positions, energies, gradients))
        self.test = tuple(t[-test_samples:] for t in (positions, energies, gradients))

    def batches(self, batch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Random training configurations, each turned, mirrored and with its hydrogens permuted at random.

        None of these changes the energy, so that every batch is new.
        """
        positions, energies, gradients = self.train
        draw: dict[str, Any] = {"device": positions.device, "generator": self._generator}
        while True:
            count = _DRAWN * batch
            index = torch.randint(len(energies), (count,), **draw)
            order = torch.rand(count, 4, **draw).argsort(dim=1).unsqueeze(2).expand(-1, -1, 3)
            turn = rotations(torch.randn(count, 4, **draw))
            turn = turn * (2 * torch.randint(2, (count, 1, 1), **draw) - 1)
            turned = [(t[index].gather(1, order) @ turn).split(batch) for t in (positions, gradients)]
            yield from zip(turned[0], energies[index].split(batch), turned[1], strict=True)


def rotations(quaternions: Tensor) -> Tensor:
    """Rotation matrices ``[n, 3, 3]`` of quaternions ``[n, 4]``; uniform for normal ones."""
    w, x, y, z = nn.functional.normalize(quaternions, dim=1).unbind(1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)


def energies_of(model: nn.Module, positions: Tensor) -> Tensor:
    """Standardised energies ``[n, 1]`` of ``positions`` ``[n, 4, 3]`` in Å."""
    return call(model, SCALE * positions.flatten(1))


def gradients_of(model: nn.Module, positions: Tensor, create_graph: bool) -> tuple[Tensor, Tensor]:
    """Energies ``[n, 1]`` and their gradients ``[n, 4, 3]``, per Å; forces are minus these.

    The model must treat samples one by one: in evaluation mode, with batch norm.
    """
    positions = positions.detach().requires_grad_()
    energies = energies_of(model, positions)
    (gradients,) = torch.autograd.grad(energies.sum(), positions, create_graph=create_graph)
    return energies, gradients


@dataclass(frozen=True)
class Methane(Task):
    """See `Task`."""

    preset: Preset
    data: Path
    steps: int
    learning_rate: float
    hessian: float
    graph: bool

    inputs = INPUTS
    error_name = "RMSE / STD"
    title = "CH4, energies of GFN2-xTB"

    @property
    def timed_batch(self) -> int:
        """Samples."""
        return self.preset.timed_batch

    @property
    def batches(self) -> tuple[int, ...]:
        """See `Task`."""
        return self.preset.batch, self.preset.force_batch, _TEST_BATCH

    @cached_property
    def samples(self) -> Samples:
        """Loaded when first asked for."""
        return Samples(self.data, self.preset.test_samples)

    @property
    def grids(self) -> int:
        """Of the lmKANs."""
        return self.preset.grids

    def fit(self, model: nn.Module, progress: Callable[[int], Iterable[int]]) -> None:
        """See `Task`."""
        model.train()
        train(
            model,
            lambda positions, energies: mse_loss(energies_of(model, positions), energies),
            (batch[:2] for batch in self.samples.batches(self.preset.batch)),
            progress(self.steps),
            paper_schedule(self.hessian, self.steps),
            self.learning_rate,
            self.graph,
        )

    def fit_forces(self, model: nn.Module, progress: Callable[[int], Iterable[int]]) -> None:
        """Go on training with energies and forces, in equal parts of their variances.

        In evaluation mode: with statistics of the batch every energy would depend on all positions of the
        batch, and its gradient would not be a force.
        """
        variance = self.samples.train[2].square().mean()

        def loss(positions: Tensor, energies: Tensor, gradients: Tensor) -> Tensor:
            found, slopes = gradients_of(model, positions, create_graph=True)
            return mse_loss(found, energies) + mse_loss(slopes, gradients) / variance

        steps = self.preset.force_steps
        model.eval()
        train(
            model,
            loss,
            self.samples.batches(self.preset.force_batch),
            progress(steps),
            lambda m, optimizer: FittingSchedule(
                [Phase("forces", steps, Curve(1, 0, "cosine"), Curve(self.hessian / 100))], m, optimizer
            ),
            self.learning_rate / 5,
            self.graph,
        )

    def error(self, predict: Callable[[Tensor], Tensor]) -> float:
        """See `Task`."""
        positions, energies, _ = self.samples.test
        found = torch.cat([predict(part) for part in (SCALE * positions.flatten(1)).split(_TEST_BATCH)])
        return (mse_loss(found, energies).sqrt() / energies.std()).item()

    def force_errors(self, model: nn.Module) -> tuple[float, float]:
        """RMSE / STD of energies and of the components of forces, on test data."""
        positions, energies, gradients = self.samples.test
        found = [gradients_of(model, part, create_graph=False) for part in positions.split(_TEST_BATCH)]
        return tuple(  # type: ignore[return-value]
            (mse_loss(torch.cat(parts).detach(), truth).sqrt() / truth.std()).item()
            for parts, truth in zip(zip(*found, strict=True), (energies, gradients), strict=True)
        )
