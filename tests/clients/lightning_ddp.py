"""Lightning: DDP on two processes, mixed precision, resuming, and the fitting callback."""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.model_summary import ModelSummary
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lmkan_gen.fitting import FittingSchedule
from lmkan_gen.fitting.lightning import FittingCallback
from lmkan_gen.nn import LMKANMLP, LMKANBlock, ReLUFirst, hessian_penalty, lmkan_layers
from tests.clients.checks import close, falls, require, run, samples

SAMPLES, BATCH, EPOCHS = 256, 64, 6


class Regressor(LightningModule):  # type: ignore[misc]  # Any, to mypy
    """A network with a squared error, and its losses."""

    def __init__(self, network: nn.Module, adaptive: bool) -> None:
        super().__init__()
        self.network = network
        self.adaptive = adaptive
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The loss."""
        x, y = batch
        loss = nn.functional.mse_loss(self.network(x), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Optimizer:
        """Adam, or where runs are compared steps in proportion to gradients: Adam's magnify rounding."""
        if self.adaptive:
            return torch.optim.Adam(self.parameters(), lr=1e-2)
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def without_statistics() -> nn.Module:
    """A network without batch norm, whose gradient does not depend on how a batch is split."""
    return nn.Sequential(ReLUFirst(4, 16), LMKANBlock(16, 1, normalize=False))


def with_statistics() -> nn.Module:
    """A network after a linear layer, whose outputs are bfloat16 under autocast."""
    return nn.Sequential(nn.Linear(4, 8), LMKANMLP((8, 16, 1), normalize_input=True))


class Data(LightningDataModule):  # type: ignore[misc]  # Any, to mypy
    """The same samples in the same order, split among processes so that they share each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.samples = TensorDataset(*samples(SAMPLES, generator=torch.Generator().manual_seed(3)))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Batches for this process."""
        assert self.trainer is not None
        count = self.trainer.world_size
        # Lightning's own sampler shuffles
        sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(
            self.samples, count, self.trainer.global_rank, shuffle=False
        )
        return DataLoader(self.samples, batch_size=BATCH // count, sampler=sampler)


def fit(
    network: nn.Module,
    epochs: int = EPOCHS,
    resume: str | None = None,
    *,
    steps: int = EPOCHS,
    adaptive: bool = False,
    **options: Any,
) -> Regressor:
    """Train ``network``, on a schedule of ``steps`` epochs, and return the module around it."""
    model = Regressor(network, adaptive)

    def schedule(fitted: nn.Module, optimizer: Optimizer) -> FittingSchedule:
        # strong enough a regularisation that counting it twice, or not at all, shows
        return FittingSchedule.two_phase(fitted, optimizer, steps=steps, hessian=1e-2)

    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "use_distributed_sampler": False,
        "max_epochs": epochs,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    settings |= options
    callbacks = [FittingCallback(schedule), *settings.pop("callbacks", [])]
    Trainer(**settings, callbacks=callbacks).fit(model, Data(), ckpt_path=resume)
    return model


def seeded(make: Any) -> nn.Module:
    """The network that ``make`` makes, with the same parameters every time."""
    seed_everything(5, verbose=False)
    network: nn.Module = make()
    return network


def ddp_worker(path: str) -> None:
    """What each process of a DDP run does: train, and let the first one save its parameters."""
    model = fit(seeded(without_statistics), strategy="ddp", devices=2)
    if model.global_rank == 0:
        torch.save(model.network.state_dict(), path)


def distributed() -> str:
    """DDP on two processes ends with the parameters of one process with batches twice as large"""
    start = seeded(without_statistics)
    expected = fit(seeded(without_statistics)).network
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "parameters.pt"
        command = [sys.executable, "-m", "tests.clients.lightning_ddp", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        require(done.returncode == 0, f"the run ended with {done.returncode}: {done.stderr[-300:]}")
        found = torch.load(path)
    for name, parameter in expected.state_dict().items():
        close(found[name], parameter, 1e-4)
    moved = (found["0.weight"] - start.state_dict()["0.weight"]).abs().max().item()
    require(moved > 1e-2, f"parameters moved by {moved} only")
    return f"{len(found)} tensors, parameters moved by {moved:.2g}"


def mixed() -> str:
    """bf16-mixed makes the loss fall as float32 does, on bfloat16 inputs, and parameters stay float32"""
    network, seen = seeded(with_statistics), set()
    lmkan_layers(network)["1.blocks.0.lmkan.layer"].register_forward_pre_hook(
        lambda _, arguments: seen.add(arguments[0].dtype)
    )
    options: dict[str, Any] = {"epochs": 40, "steps": 40, "adaptive": True}
    model = fit(network, **options, precision="bf16-mixed")
    require(seen == {torch.bfloat16}, f"the first layer saw {seen}")
    dtypes = {p.dtype for p in model.parameters()}
    require(dtypes == {torch.float32}, f"parameters have dtypes {dtypes}")
    single = fit(seeded(with_statistics), **options)
    return f"{falls(model.losses, 1e-2)}, in float32 {falls(single.losses, 1e-2)}"


def halved() -> str:
    """bf16-true makes the loss fall with parameters in bfloat16, regularised by the fitting callback"""
    options: dict[str, Any] = {"epochs": 40, "steps": 40, "adaptive": True}
    model = fit(seeded(with_statistics), **options, precision="bf16-true")
    dtypes = {p.dtype for p in model.parameters()}
    require(dtypes == {torch.bfloat16}, f"parameters have dtypes {dtypes}")
    return falls(model.losses, 2e-2)


def summarised() -> str:
    """The summary counts each table once, and twice the FLOPs of linear layers"""
    model = Regressor(LMKANMLP((4, 16, 1), num_grids=8), adaptive=True)
    model.example_input_array = torch.randn(8, 4)
    model.forward = model.network.forward
    summary = ModelSummary(model, max_depth=-1)
    parameters, flops = 9 * 9 * (2 * 16 + 8), 2 * 2 * 8 * (4 * 16 + 16)
    require(
        summary.total_parameters == parameters, f"{summary.total_parameters} parameters, not {parameters}"
    )
    require(summary.total_flops == flops, f"{summary.total_flops} FLOPs, not {flops}")
    return f"{parameters} parameters, {flops} FLOPs"


def resumed() -> str:
    """Resuming from a checkpoint ends where an uninterrupted run does, the schedule included"""
    whole = fit(seeded(with_statistics))
    with tempfile.TemporaryDirectory() as folder:
        saving: dict[str, Any] = {
            "callbacks": [ModelCheckpoint(folder, save_last=True)],
            "enable_checkpointing": True,
        }
        fit(seeded(with_statistics), epochs=EPOCHS // 2, **saving)
        rest = fit(seeded(with_statistics), resume=f"{folder}/last.ckpt")
    for name, tensor in whole.state_dict().items():
        close(rest.state_dict()[name], tensor, 0)
    penalty = hessian_penalty(whole).item()
    require(penalty > 0, f"the penalty is {penalty}")
    return f"{len(whole.state_dict())} tensors with equal bits"


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    if len(sys.argv) > 1:
        ddp_worker(sys.argv[1])
    else:
        run(distributed, mixed, halved, resumed, summarised)
