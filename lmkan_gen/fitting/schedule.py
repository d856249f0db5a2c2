"""`FittingSchedule`: learning rate, Hessian regularisation and preconditioning in step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lmkan_gen.nn.layers import hessian_penalty, preconditioned_layers


@dataclass(frozen=True)
class Curve:
    """A number that goes from ``start`` to ``end`` during a phase.

    Args:
        start: value at the beginning.
        end: value at the end; left out, the value is constant.
        shape: ``"linear"``, ``"exponential"`` (equal factors in equal times) or ``"cosine"`` (half a
            period: flat at both ends).

    Raises:
        ValueError: an end is negative or not finite, ``shape`` is unknown, or an exponential curve
            touches zero.
    """

    start: float
    end: float | None = None
    shape: Literal["linear", "exponential", "cosine"] = "linear"

    def __post_init__(self) -> None:
        if self.shape not in ("linear", "exponential", "cosine"):
            raise ValueError(f"shape must be 'linear', 'exponential' or 'cosine', got {self.shape!r}")
        for name, value in (("start", self.start), ("end", self._end)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and not negative, got {value}")
            if self.shape == "exponential" and value == 0:
                raise ValueError(
                    f"an exponential curve never reaches zero, but {name} is 0; give a small end"
                )

    @property
    def _end(self) -> float:
        return self.start if self.end is None else self.end

    def at(self, fraction: float) -> float:
        """The value at ``fraction`` of the phase, from 0 to 1."""
        start, end = self.start, self._end
        if self.shape == "exponential":
            return float(start * (end / start) ** fraction)
        if self.shape == "cosine":
            fraction = 0.5 * (1 - math.cos(math.pi * fraction))
        return start + (end - start) * fraction


@dataclass(frozen=True)
class Phase:
    """A stretch of training.

    Args:
        name: for reports.
        steps: its length.
        learning_rate: factor on the learning rate that the optimiser was made with.
        hessian: weight of the Hessian regularisation in the loss, ``lambda``.
        gamma: weight of the lmKAN in preconditioned layers; None leaves it alone.

    Raises:
        ValueError: ``steps`` is negative.
    """

    name: str
    steps: int
    learning_rate: Curve = Curve(1.0)
    hessian: Curve = Curve(0.0)
    gamma: Curve | None = None

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps of phase {self.name!r} must not be negative, got {self.steps}")


class Settings(NamedTuple):
    """What a schedule prescribes for one step: see `Phase`."""

    phase: str
    learning_rate: float
    hessian: float
    gamma: float | None


class FittingSchedule:
    """Moves learning rate, regularisation and preconditioning through phases, step by step.

    It is used like torch's schedulers: call `step` after ``optimizer.step()``, once per batch or once
    per epoch, whichever the phases' lengths count. Add `penalty` to the loss.

    The last step of a phase sees the ends of its curves, and after the last phase they stay.

    Args:
        phases: one after the other.
        model: its preconditioned layers (`lmkan_gen.nn.ReLUFirst`, `ReLULast`) get ``gamma``, its
            lmKAN layers are regularised.
        optimizer: any; None leaves learning rates alone, to any other scheduler.

    Raises:
        ValueError: no phase has a step.
    """

    def __init__(self, phases: Sequence[Phase], model: nn.Module, optimizer: Optimizer | None = None) -> None:
        self.phases = tuple(phase for phase in phases if phase.steps)
        if not self.phases:
            raise ValueError("phases must hold at least one with steps")
        self._ends = tuple(accumulate(phase.steps for phase in self.phases))
        self._model = model
        self._optimizer = optimizer
        for group in optimizer.param_groups if optimizer else ():
            group.setdefault("initial_lr", float(group["lr"]))  # where torch's schedulers keep it
        self._position = 0
        self._apply()

    @classmethod
    def two_phase(
        cls,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        steps: int = 500,
        *,
        decay_fraction: float = 0.5,
        hessian: float = 1.0,
        hessian_decades: float = 250 / 30,
    ) -> FittingSchedule:
        """Fading regularisation at a constant learning rate, then a cosine without regularisation.

        With its defaults and an optimiser of learning rate 1e-3, stepped once per epoch, this is the
        schedule that the authors of lmKAN give for methane.

        Args:
            model: see the class.
            optimizer: see the class.
            steps: of both phases together.
            decay_fraction: part of ``steps`` that the first phase takes.
            hessian: weight of the regularisation at the start.
            hessian_decades: powers of ten by which it falls during the first phase.
        """
        decay = round(decay_fraction * steps)
        phases = (
            Phase("decay", decay, Curve(1), Curve(hessian, hessian * 10**-hessian_decades, "exponential")),
            Phase("cosine", steps - decay, Curve(1, 0, "cosine")),
        )
        return cls(phases, model, optimizer)

    @classmethod
    def four_phase(
        cls,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        steps: int = 500,
        *,
        fractions: tuple[float, float, float] = (0.01, 0.05, 0.3),
        cooldown_fraction: float = 0.5,
        gamma: float = 0.3,
        hessian: float = 1.0,
        hessian_end: float | None = None,
    ) -> FittingSchedule:
        """The phases of the paper (appendix E), for models with preconditioned layers.

        I: ``gamma`` is 0, the linear paths learn. II: ``gamma`` grows linearly under strong
        regularisation. III: the regularisation decays exponentially. IV: main fit, at the end of which
        the learning rate decays along a cosine.

        In phase IV the paper has no regularisation. Here a little of it stays: without, coefficients follow
        the noise of the batches, unless there are far more samples than coefficients (measured in
        ``docs/results.md``).

        Args:
            model: see the class.
            optimizer: see the class.
            steps: of all phases together.
            fractions: parts of ``steps`` that phases I, II and III take; IV takes the rest.
            cooldown_fraction: part of ``steps`` in which the learning rate decays.
            gamma: final weight of the lmKAN.
            hessian: weight of the regularisation up to the end of phase II.
            hessian_end: weight from the end of phase III on; by default a hundredth of ``hessian``.

        Raises:
            ValueError: the fractions leave nothing for phase IV, or ``model`` has no preconditioned layer.
        """
        if sum(fractions) + cooldown_fraction > 1:
            raise ValueError(
                f"fractions {fractions} and cooldown_fraction {cooldown_fraction} add up to more than 1"
            )
        if not preconditioned_layers(model):
            raise ValueError(
                f"{type(model).__name__} has no preconditioned layer, which phases I and II are about; "
                "build it with precondition='relu_first' or 'relu_last', or use two_phase"
            )
        warmup, ramp, decay = (round(f * steps) for f in fractions)
        cooldown = round(cooldown_fraction * steps)
        weak = hessian / 100 if hessian_end is None else hessian_end
        strong, final, kept = Curve(hessian), Curve(gamma), Curve(weak)
        phases = (
            Phase("I", warmup, hessian=strong, gamma=Curve(0)),
            Phase("II", ramp, hessian=strong, gamma=Curve(0, gamma)),
            Phase("III", decay, hessian=Curve(hessian, weak, "exponential"), gamma=final),
            Phase("IV", steps - warmup - ramp - decay - cooldown, hessian=kept, gamma=final),
            Phase("IV, cooldown", cooldown, Curve(1, 0, "cosine"), kept, final),
        )
        return cls(phases, model, optimizer)

    @property
    def steps(self) -> int:
        """Length of all phases together."""
        return self._ends[-1]

    @property
    def finished(self) -> bool:
        """Whether all phases are over."""
        return self._position >= self.steps

    @property
    def settings(self) -> Settings:
        """What holds for the present step."""
        return self.at(self._position)

    def at(self, step: int) -> Settings:
        """What holds for ``step``, counted from 0."""
        step = min(step, self.steps)
        index = next(i for i, end in enumerate(self._ends) if step <= end)
        phase = self.phases[index]
        fraction = (step - (self._ends[index] - phase.steps)) / phase.steps
        return Settings(
            phase.name,
            phase.learning_rate.at(fraction),
            phase.hessian.at(fraction),
            None if phase.gamma is None else phase.gamma.at(fraction),
        )

    def step(self) -> None:
        """Go on to the next step: set learning rates and ``gamma``."""
        self._position += 1
        self._apply()

    def penalty(self) -> Tensor:
        """``lambda`` times the Hessian regularisation of the model, a scalar to add to the loss.

        Raises:
            ValueError: the model has no lmKAN layer.
        """
        weight = self.settings.hessian
        if weight:
            return weight * hessian_penalty(self._model)
        return next(self._model.parameters()).new_zeros(())

    def state_dict(self) -> dict[str, Any]:
        """The position; phases belong to the program, as with torch's schedulers."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        Load the optimiser's state too: it holds the learning rates that the factors refer to.
        """
        self._position = int(state["position"])
        self._apply()

    @torch.no_grad()
    def _apply(self) -> None:
        settings = self.settings
        for group in self._optimizer.param_groups if self._optimizer else ():
            rate = group["initial_lr"] * settings.learning_rate
            if isinstance(group["lr"], Tensor):  # capturable optimisers read it on the device
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        if settings.gamma is not None:
            for layer in preconditioned_layers(self._model).values():
                layer.gamma.fill_(settings.gamma)
