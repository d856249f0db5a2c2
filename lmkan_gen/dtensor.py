"""What layers and functions do where a tensor may be a `DTensor`.

`torch.distributed.tensor` takes a second to import and is not part of every build of torch, so nothing here
imports it before somebody has a DTensor.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn


def is_dtensor(tensor: object) -> bool:
    """Whether it is a `DTensor`."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def beside(table: Tensor, borders: Tensor) -> Tensor:
    """``borders`` for a call with ``table``: replicated over the mesh of a `DTensor`."""
    if not is_dtensor(table):
        return borders
    import lmkan_gen.sharding  # noqa: F401 - registers how operators are sharded

    return like(table, borders)


def like(other: Tensor, value: Tensor) -> Tensor:
    """``value``, which every process has, replicated over the mesh of ``other`` if that is a `DTensor`."""
    if not is_dtensor(other) or is_dtensor(value):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    mesh = other.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)


def graded_alike(tensor: Tensor) -> Tensor:
    """The same, with a gradient that is placed as it is: FSDP2 adds its own to that, part by part."""
    if not is_dtensor(tensor):
        return tensor
    dtensor: Any = tensor
    same: Tensor = dtensor.redistribute(placements=dtensor.placements)
    return same


def whole(tensor: Tensor) -> Tensor:
    """An ordinary tensor of all elements."""
    if not is_dtensor(tensor):
        return tensor
    dtensor: Any = tensor
    full: Tensor = dtensor.full_tensor()
    return full


def draw_uniform(tensor: Tensor, bound: float) -> None:
    """Fill with values uniform within ``+-bound``, every element of a `DTensor` from a number of its own.

    On accelerators torch draws such numbers for DTensors. On CPUs every process would draw for its shard as
    if it was alone, and shards would be equal after equal seeds: there the first process draws for all.
    """
    if not is_dtensor(tensor) or tensor.is_meta or tensor.device.type != "cpu":
        nn.init.uniform_(tensor, -bound, bound)
        return
    from torch.distributed.tensor import DTensor, Replicate

    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    drawn = torch.empty(tensor.shape, dtype=tensor.dtype).uniform_(-bound, bound)
    same = DTensor.from_local(drawn, mesh, [Replicate()] * mesh.ndim, run_check=True)
    with torch.no_grad():
        tensor.copy_(same)
