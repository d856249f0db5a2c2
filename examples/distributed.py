"""Train an lmKAN in several processes, each with a part of every table and of the batch, and resume.

    torchrun --nproc-per-node 2 -m examples.distributed --stop-at 100
    torchrun --nproc-per-node 2 -m examples.distributed --resume

The second command goes on where the first one stopped, and ends with the numbers of a run that was not
interrupted. Processes use GPUs if there are any (NCCL), else CPUs (gloo). What to look at: `build`
(`fully_shard`), `train` (the regularisation of tables that are in parts) and `Checkpoints`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import mse_loss
from torch.optim import Optimizer

from lmkan_gen.fitting import FittingSchedule
from lmkan_gen.nn import LMKANMLP

INPUTS, HIDDEN, GRIDS = 8, 32, 8
BATCH = 512
LEARNING_RATE, HESSIAN = 5e-3, 1e-2
SEED = 0


def target(x: Tensor) -> Tensor:
    """``[INPUTS, batch]`` -> ``[1, batch]``."""
    return (x[:1] * x[1:2]).tanh() + (x[2:3] + x[3:4]).sin() + x[4:5].abs()


def samples(count: int, seed: int, device: str) -> Tensor:
    """Inputs that depend on nothing but the seed, so that no state of a loader has to be saved."""
    return torch.randn(INPUTS, count, generator=torch.Generator().manual_seed(seed)).to(device)


def build(device: str) -> nn.Module:
    """A network in parts: each process keeps its share of every table, and gathers a block when it runs."""
    torch.manual_seed(SEED)  # every process takes its share of equal tables
    # with the batch last, blocks put out no views, which FSDP2 warns of
    widths = (INPUTS, HIDDEN, HIDDEN, 1)
    model = LMKANMLP(widths, GRIDS, precondition="relu_first", batch_first=False).to(device)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return model


def average(tensor: Tensor) -> Tensor:
    """The mean over processes, in place."""
    dist.all_reduce(tensor)
    return tensor.div_(dist.get_world_size())


def average_statistics(model: nn.Module) -> None:
    """Make running statistics of batch norm the same in every process: each has seen its own samples."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            for statistic in (module.running_mean, module.running_var):
                assert statistic is not None
                average(statistic)


class Checkpoints:
    """Everything that a run needs to go on, one directory for each step that was saved.

    Processes write their parts side by side. Any number of processes can read them; as many as before go on
    with the same numbers.
    """

    def __init__(
        self, directory: Path, model: nn.Module, optimizer: Optimizer, schedule: FittingSchedule
    ) -> None:
        self._directory = directory
        self._model, self._optimizer, self._schedule = model, optimizer, schedule

    def save(self, step: int) -> None:
        """Write the state after ``step`` steps."""
        save(self._state(step), checkpoint_id=self._directory / f"step-{step}")

    def load(self) -> int:
        """Read the newest state; returns its step.

        Raises:
            FileNotFoundError: there is none.
        """
        # metadata are written last: a directory without them was not finished
        steps = [int(d.parent.name.removeprefix("step-")) for d in self._directory.glob("step-*/.metadata")]
        if not steps:
            raise FileNotFoundError(f"no checkpoint in {self._directory}: run without --resume first")
        step = max(steps)
        state = self._state(step)
        load(state, checkpoint_id=self._directory / f"step-{step}")
        set_state_dict(
            self._model,
            self._optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self._schedule.load_state_dict(state["schedule"])
        return step

    def _state(self, step: int) -> dict[str, Any]:
        model, optimizer = get_state_dict(self._model, self._optimizer)
        return {"model": model, "optimizer": optimizer, "schedule": self._schedule.state_dict()}


def train(
    model: nn.Module,
    optimizer: Optimizer,
    schedule: FittingSchedule,
    steps: range,
    device: str,
) -> None:
    """Adam on samples of which each process draws its own."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model.train()
    for step in steps:
        x = samples(BATCH // world, 1 + step * world + rank, device)
        loss = mse_loss(model(x), target(x))
        penalty = schedule.penalty()
        if isinstance(penalty, DTensor):  # as tables are, except while their block runs
            penalty = penalty.full_tensor()
        optimizer.zero_grad()
        (loss + penalty).backward()
        optimizer.step()
        schedule.step()
        average_statistics(model)
        if (step + 1) % 20 == 0:
            report(f"step {step + 1}: loss {average(loss.detach()).item():.6f}")


@torch.no_grad()
def test_error(model: nn.Module, device: str) -> float:
    """Root mean square over new samples."""
    model.eval()
    x = samples(4096, 0, device)
    return mse_loss(model(x), target(x)).sqrt().item()


def report(line: str) -> None:
    """Print, in one process."""
    if dist.get_rank() == 0:
        print(line, flush=True)


@contextmanager
def process_group() -> Iterator[str]:
    """The processes that torchrun has started, on the device that it yields."""
    if "RANK" not in os.environ:
        raise typer.BadParameter("start with torchrun: torchrun --nproc-per-node 2 -m examples.distributed")
    # sums of one order, so that a resumed run ends with the numbers of one that was not interrupted
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    yield device
    dist.destroy_process_group()  # not after an error: it would wait for processes that wait for this one


def main(
    steps: Annotated[int, typer.Option(min=1, help="Steps of the whole training.")] = 200,
    stop_at: Annotated[int | None, typer.Option(min=1, help="Step to stop at before, to be resumed.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint.")] = False,
    checkpoints: Annotated[Path, typer.Option(help="Directory for checkpoints.")] = Path("checkpoints"),
) -> None:
    """Train an lmKAN with FSDP2, save it with torch.distributed.checkpoint, and resume exactly."""
    with process_group() as device:
        model = build(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
        schedule = FittingSchedule.four_phase(model, optimizer, steps, hessian=HESSIAN)
        kept = Checkpoints(checkpoints, model, optimizer, schedule)
        first = kept.load() if resume else 0
        last = min(steps, stop_at or steps)
        train(model, optimizer, schedule, range(first, last), device)
        kept.save(last)
        report(f"test error {test_error(model, device):.6f} after {last} steps, in {checkpoints}/step-{last}")


if __name__ == "__main__":
    typer.run(main)
