"""One process of training runs, among several or alone, that reports losses: run by `tests.test_sharded`.

A run alone does the sums of the processes in their order: gradients of each share of the batch, added over
shares, divided by their number. Divisors are powers of two, so that both runs can be equal to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from lmkan_gen.nn import LMKANMLP
from tests.processes import main

STEPS, BATCH = 30, 256


def target(x: Tensor) -> Tensor:
    return (x[:, :1] * x[:, 1:2]).tanh()


def train(rank: int, world: int, device: str, settings: dict[str, str]) -> list[float]:
    """Losses of each step over the whole batch, then one of inference in float32.

    Settings: ``by`` (``"fsdp"``, ``"ddp"``; alone if left out), ``shares`` of the batch (one for each
    process, or 1: all processes see all samples), ``accumulate`` so many gradients a step, ``autocast`` to a
    dtype, ``param_dtype`` and ``reshard`` of FSDP2, and the backend to ``compile`` with.
    """
    torch.use_deterministic_algorithms(True)  # sums of one order, also on GPUs
    torch.manual_seed(0)
    model: nn.Module = LMKANMLP((4, 16, 1), 6).to(device)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.eval()  # statistics of a part of the batch would be others
    by = settings.get("by")
    if by == "fsdp":
        shard(model, settings)
    elif "param_dtype" in settings:
        settings = settings | {"autocast": settings["param_dtype"]}
    if "compile" in settings:
        model.compile(backend=settings["compile"], fullgraph=True)
    if by == "ddp":
        model = DistributedDataParallel(model)
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    autocast = getattr(torch, settings.get("autocast", "float32"))
    shares, parts = int(settings["shares"]), int(settings.get("accumulate", "1"))
    generator = torch.Generator().manual_seed(1)
    losses: list[float] = []
    for step in range(STEPS + 1):
        x = torch.randn(BATCH, 4, generator=generator).to(device)
        last = step == STEPS
        total = torch.zeros((), device=device)
        for pieces in zip(*(share.chunk(parts) for share in x.chunk(shares)), strict=True):
            earlier = [p.grad for p in parameters]
            if not by:
                optimizer.zero_grad()
            mine = [pieces[rank % shares]] if by else pieces
            for piece in mine:
                enabled = not last and autocast != torch.float32
                with torch.set_grad_enabled(not last), torch.autocast(device, autocast, enabled=enabled):
                    loss = (model(piece).float() - target(piece)).square().mean() / parts
                if not last:
                    loss.backward()
                total += loss.detach() / len(mine)
            if not by and not last:
                add_over_shares(parameters, shares, earlier)
        if by:
            dist.all_reduce(total)
            total /= world
        losses.append(total.item())
        if not last:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def shard(model: nn.Module, settings: dict[str, str]) -> None:
    policy = MixedPrecisionPolicy()
    if "param_dtype" in settings:
        dtype = getattr(torch, settings["param_dtype"])
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    keep = settings.get("reshard") == "no"
    assert isinstance(model, LMKANMLP)
    for part in (*model.blocks, model):
        fully_shard(part, reshard_after_forward=not keep, mp_policy=policy)


def add_over_shares(parameters: list[nn.Parameter], shares: int, earlier: list[Tensor | None]) -> None:
    """What processes do after each backward: average, then add to the gradients that are there."""
    for parameter, before in zip(parameters, earlier, strict=True):
        assert parameter.grad is not None
        parameter.grad /= shares
        if before is not None:
            parameter.grad += before


def train_all(rank: int, world: int, device: str, runs: dict[str, dict[str, str]]) -> dict[str, list[float]]:
    """Losses of several runs by name."""
    return {name: train(rank, world, device, settings) for name, settings in runs.items()}


if __name__ == "__main__":
    main(train_all)
