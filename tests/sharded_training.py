"""One process of a training run, sharded or alone, that prints its losses: run by `tests.test_sharded`."""

from __future__ import annotations

import json
import sys

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lmkan_gen.nn import LMKANMLP

STEPS, BATCH = 12, 256


def target(x: Tensor) -> Tensor:
    return (x[:, :1] * x[:, 1:2]).tanh()


def train(rank: int, world: int, device: str, sharded: bool, settings: dict[str, str]) -> list[float]:
    """Losses of each step over the whole batch, then one of inference in float32."""
    torch.manual_seed(0)
    model = LMKANMLP((4, 16, 1), 6).to(device)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.eval()  # statistics of a part of the batch would be others
    if sharded:
        policy = MixedPrecisionPolicy()
        if "param_dtype" in settings:
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        keep = settings.get("reshard") == "no"
        for block in model.blocks:
            fully_shard(block, reshard_after_forward=not keep, mp_policy=policy)
        fully_shard(model, reshard_after_forward=not keep, mp_policy=policy)
    elif "param_dtype" in settings:
        settings = settings | {"autocast": settings["param_dtype"]}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    autocast = getattr(torch, settings.get("autocast", "float32"))
    parts = int(settings.get("accumulate", "1"))
    generator = torch.Generator().manual_seed(1)
    losses: list[float] = []
    for _ in range(STEPS + 1):
        x = torch.randn(BATCH, 4, generator=generator).to(device)
        mine = x.chunk(world)[rank] if sharded else x
        last = len(losses) == STEPS
        total = torch.zeros((), device=device)
        for piece in mine.chunk(parts):
            enabled = not last and autocast != torch.float32
            with torch.set_grad_enabled(not last), torch.autocast(device, autocast, enabled=enabled):
                loss = (model(piece).float() - target(piece)).square().mean() / parts
            if not last:
                loss.backward()
            total += loss.detach()
        if sharded:
            dist.all_reduce(total)
            total /= world
        losses.append(total.item())
        if not last:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def main() -> None:
    rank, world, rendezvous, device, settings = json.loads(sys.argv[1])
    if rendezvous is None:
        print(json.dumps(train(0, 1, device, False, settings)))
        return
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    try:
        losses = train(rank, world, device, True, settings)
    finally:
        dist.destroy_process_group()
    if rank == 0:
        print(json.dumps(losses))


if __name__ == "__main__":
    main()
