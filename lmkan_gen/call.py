"""A call: everything that the choice of its kernels depends on, but the settings of the process."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lmkan_gen.families import Demand
from lmkan_gen.problem import LayerShape, Operation, TableDtype


@dataclass(frozen=True)
class Call:
    """One operation on tensors of some sizes, somewhere.

    Attributes:
        operation: what to compute. ``BACKWARD`` computes both gradients, in whichever way is faster.
        shape: sizes.
        device: where the tensors are.
        demand: tile and block sizes to be honoured.
        table: element type of the tables to compute with.
        constant: whether the table stays as it is for many calls, so that arranging it for them pays.
        deterministic: whether the same call must give the same bits every time.
        strided: whether ``x`` lies otherwise than as contiguous ``[I, B]``.
    """

    operation: Operation
    shape: LayerShape
    device: torch.device
    demand: Demand = field(default_factory=Demand)
    table: TableDtype = TableDtype.FLOAT32
    constant: bool = False
    deterministic: bool = False
    strided: bool = False
