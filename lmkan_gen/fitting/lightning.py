"""`FittingSchedule` as a callback of Lightning, which has to be installed for this module alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from lmkan_gen.fitting.schedule import FittingSchedule

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError as error:
        raise ImportError(
            "lmkan_gen.fitting.lightning needs Lightning: pip install lightning. "
            "FittingSchedule itself works in any training loop"
        ) from error


class FittingCallback(Callback):  # type: ignore[misc]  # Any, to mypy
    """Runs a `FittingSchedule` in a Lightning ``Trainer``.

    ``training_step`` need not know about it: the gradient of the Hessian regularisation is added before
    each optimiser step, once, whatever the gradient accumulation, precision or number of processes.
    The position is saved in checkpoints. Return no learning-rate scheduler from
    ``configure_optimizers``.

    Args:
        schedule: makes the schedule, given the module and its optimiser; for example
            ``lambda model, optimizer: FittingSchedule.two_phase(model, optimizer, steps=500)``.
        interval: what a step of the schedule is: an ``"epoch"``, or an optimiser ``"step"``.

    Raises:
        ImportError: on import of this module, if Lightning is missing.
        ValueError: ``interval`` is neither; at the start of training, if there is not exactly one
            optimiser.
    """

    def __init__(
        self,
        schedule: Callable[[nn.Module, Optimizer], FittingSchedule],
        interval: Literal["epoch", "step"] = "epoch",
    ) -> None:
        super().__init__()
        if interval not in ("epoch", "step"):
            raise ValueError(f"interval must be 'epoch' or 'step', got {interval!r}")
        self._make = schedule
        self._interval = interval
        self._resumed: dict[str, Any] | None = None
        self._stepped = False
        self.schedule: FittingSchedule | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the schedule; checkpoints are loaded by now."""
        if len(trainer.optimizers) != 1:
            raise ValueError(
                "FittingCallback needs exactly one optimizer, "
                f"configure_optimizers made {len(trainer.optimizers)}"
            )
        self.schedule = self._make(pl_module, trainer.optimizers[0])
        if self._resumed is not None:
            self.schedule.load_state_dict(self._resumed)
            self._resumed = None

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        """Add the gradient of the regularisation."""
        assert self.schedule is not None
        if self.schedule.settings.hessian:
            with torch.enable_grad():
                self.schedule.penalty().backward()
        self._stepped = True

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *arguments: Any) -> None:
        """Go on, if steps are those of the optimiser; with gradient accumulation not every batch is one."""
        assert self.schedule is not None
        if self._interval == "step" and self._stepped:
            self.schedule.step()
        self._stepped = False

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Go on, if steps are epochs."""
        assert self.schedule is not None
        if self._interval == "epoch":
            self.schedule.step()

    def state_dict(self) -> dict[str, Any]:
        """The schedule's position, for Lightning's checkpoints."""
        if self.schedule is None:  # loaded, but not trained since: saving again must not lose it
            return self._resumed or {}
        return self.schedule.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember a position until training starts."""
        self._resumed = state_dict or None
