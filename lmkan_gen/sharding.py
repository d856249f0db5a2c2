"""How the operators of this package work on `DTensor`: which placements go together.

Importing this registers a sharding strategy for every operator; `lmkan_gen.lmkan` and the layers do it when
they first meet a DTensor (`torch.distributed.tensor` takes a second to import, which others need not wait
for). Code that passes DTensors to ``torch.ops.lmkan_gen`` by hand imports this module before.

Work divides over the processes of a mesh in three ways, for tables ``[G+1, G+1, O, P]``:

- over outputs: the table is sharded along ``O``, every process reads all inputs;
- over pairs of inputs: the table is sharded along ``P`` and inputs along ``I``, outputs are sums over
  processes. Only where every process gets equally many whole pairs, so that both shards belong together;
- over samples: every process has the whole table, whose gradient is a sum over processes.

Tensors of other placements are redistributed to the nearest of these by DTensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from lmkan_gen.packing import SCALE_PAIRS

#: one placement for each output, one for each argument, None for what is no tensor
Strategy = tuple[list[Placement], list[Placement | None]]

_WHOLE, _SUM = Replicate(), Partial()


class _Way:
    """One way to divide the work: placements of every kind of tensor.

    Attributes:
        x: of what is read and has the shape of inputs, ``[I, B]``.
        y: of what is read and has the shape of outputs, ``[O, B]``.
        table: of what is read and has the shape of a table, ``[G+1, G+1, O, P]``.
        scales: of those of int8 tables, ``[ceil(P/8), O]``.
        sum_y: of what is put out in the shape of outputs, a sum over pairs.
        sum_x: of what is put out in the shape of inputs, a sum over outputs.
        sum_table: of what is put out in the shape of a table, a sum over samples.
    """

    def __init__(
        self,
        x: Placement = _WHOLE,
        y: Placement = _WHOLE,
        table: Placement = _WHOLE,
        scales: Placement = _WHOLE,
        summed: str = "",
    ) -> None:
        self.x, self.y, self.table, self.scales = x, y, table, scales
        self.sum_y = _SUM if summed == "pairs" else y
        self.sum_x = _SUM if summed == "outputs" else x
        self.sum_table = _SUM if summed == "samples" else table


_REPLICATED = _Way()
_OUTPUTS = _Way(y=Shard(0), table=Shard(2), scales=Shard(1), summed="outputs")
_PAIRS = _Way(x=Shard(0), table=Shard(3), scales=Shard(0), summed="pairs")
_SAMPLES = _Way(x=Shard(1), y=Shard(1), summed="samples")


def leaves_none_empty(size: int, parts: int) -> bool:
    """Whether each of so many processes gets something of an axis, which `Shard` cuts as ``torch.chunk``."""
    return -(-size // -(-size // parts)) == parts


def divides_pairs(inputs: int, pairs: int, parts: int) -> bool:
    """Whether each of so many processes gets equally many whole pairs of inputs."""
    return inputs == 2 * pairs and pairs % parts == 0


def _ways(x: Any, table: Any, int8: bool = False) -> list[_Way]:
    """Those that fit a call. ``x`` and ``table`` are what DTensor knows of its arguments."""
    (inputs, _), (*_, outputs, pairs) = x.shape, table.shape
    parts = x.mesh.size()  # all of them, as several axes of a mesh may divide the same axis of a tensor
    ways = [_REPLICATED, _SAMPLES]
    if leaves_none_empty(outputs, parts):
        ways.append(_OUTPUTS)
    if divides_pairs(inputs, pairs, parts) and not (int8 and pairs // parts % SCALE_PAIRS):
        ways.append(_PAIRS)
    return ways


def _if_given(argument: object, placement: Placement) -> Placement | None:
    return None if argument is None else placement


def _if_needed(needed: bool, placement: Placement) -> Placement:
    """Of an output, which is empty where nobody needs it."""
    return placement if needed else _WHOLE


def _forward(x: Any, table: Any, borders: Any, *options: Any) -> list[Strategy]:
    int8 = options[5:6] == ("int8",)  # what is left out has its default
    none = [None] * len(options)
    return [([w.sum_y], [w.x, w.table, _WHOLE, *none]) for w in _ways(x, table, int8)]


def _backward(
    grad: Any, x: Any, table: Any, borders: Any, need_x: bool, need_table: bool, *options: Any
) -> list[Strategy]:
    rounded = options[4] if len(options) > 4 else None  # left out where it is None
    none: list[Placement | None] = [None] * min(2 + len(options), 6)
    return [
        (
            [_if_needed(need_x, w.sum_x), _if_needed(need_table, w.sum_table)],
            [w.y, w.x, w.table, _WHOLE, *none, *([_if_given(rounded, w.table)] if len(options) > 4 else [])],
        )
        for w in _ways(x, table)
    ]


def _tangent(v_x: Any, x: Any, table: Any, borders: Any) -> list[Strategy]:
    return [([w.sum_y], [w.x, w.x, w.table, _WHOLE]) for w in _ways(x, table)]


def _double_backward(
    v_x: Any,
    v_table: Any,
    grad: Any,
    x: Any,
    table: Any,
    borders: Any,
    need_grad: bool,
    need_x: bool,
    need_table: bool,
) -> list[Strategy]:
    return [
        (
            [
                _if_needed(need_grad, w.sum_y),
                _if_needed(need_x, w.sum_x),
                _if_needed(need_table, w.sum_table),
            ],
            [
                _if_given(v_x, w.x),
                _if_given(v_table, w.table),
                *(w.y, w.x, w.table, _WHOLE),
                *(None, None, None),
            ],
        )
        for w in _ways(x, table)
    ]


def _frozen_forward(x: Any, values: Any, scales: Any, borders: Any) -> list[Strategy]:
    return [
        ([w.sum_y], [w.x, w.table, _if_given(scales, w.scales), _WHOLE])
        for w in _ways(x, values, int8=scales is not None)
    ]


def _frozen_grad_input(grad: Any, x: Any, values: Any, borders: Any) -> list[Strategy]:
    return [([w.sum_x], [w.y, w.x, w.table, _WHOLE]) for w in _ways(x, values)]


def _cuts(table: Any) -> list[Placement]:
    """Ways to divide a table's functions, which the regulariser treats one by one."""
    parts = table.mesh.size()
    return [Shard(axis) for axis in (2, 3) if leaves_none_empty(table.shape[axis], parts)]


def _hessian(table: Any, borders: Any) -> list[Strategy]:
    strategies: list[Strategy] = [([_WHOLE], [_WHOLE, _WHOLE])]
    return strategies + [([_SUM], [cut, _WHOLE]) for cut in _cuts(table)]


def _grad_hessian(scale: Any, table: Any, borders: Any) -> list[Strategy]:
    return [([cut], [_WHOLE, cut, _WHOLE]) for cut in (_WHOLE, *_cuts(table))]


_STRATEGIES: dict[str, Callable[..., list[Strategy]]] = {
    "forward": _forward,
    "backward": _backward,
    "tangent": _tangent,
    "double_backward": _double_backward,
    "frozen_forward": _frozen_forward,
    "frozen_grad_input": _frozen_grad_input,
    "hessian": _hessian,
    "grad_hessian": _grad_hessian,
}

for _name, _strategy in _STRATEGIES.items():
    register_sharding(getattr(torch.ops.lmkan_gen, _name).default)(_strategy)
