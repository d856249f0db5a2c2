"""Inputs and gradients as they may lie in memory, and kernels held to the definition on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lmkan_gen import packing, reference
from lmkan_gen.plan import LaunchPlan
from lmkan_gen.problem import Operation, Problem
from lmkan_gen.tuner.verify import TOLERANCES, make_inputs

Run = Callable[[Mapping[str, Tensor]], None]

#: of ``[rows, batch]``: as kernels like it, samples one after the other, and both with gaps
LAYOUTS = ("batch_last", "batch_first", "batch_last_gaps", "batch_first_gaps")
_GAP = -1e30  # what is read from a gap shows
_GUARD, _CANARY = 2048, 12345.0


def laid_out(t: Tensor, layout: str) -> Tensor:
    """``t`` ``[rows, batch]`` with its elements in memory as ``layout`` says."""
    first = "first" in layout
    values = t.T if first else t
    step = 3 if "gaps" in layout else 1
    memory = torch.full((len(values), step * values.shape[1] + step), _GAP, dtype=t.dtype, device=t.device)
    view = memory[:, ::step][:, : values.shape[1]] if step > 1 else memory[:, : values.shape[1]].contiguous()
    view.copy_(values)
    return view.T if first else view


class _Guarded:
    """A NaN-filled tensor of the layout of another, which has no gaps, with canaries on both sides of it."""

    def __init__(self, like: Tensor) -> None:
        self._memory = torch.full((like.numel() + 2 * _GUARD,), _CANARY, device=like.device)
        self.tensor = self._memory.as_strided(like.shape, like.stride(), _GUARD).fill_(torch.nan)

    def intact(self) -> bool:
        edges = torch.cat((self._memory[:_GUARD], self._memory[-_GUARD:]))
        return bool((edges == _CANARY).all())


def check(problem: Problem, layout: str, run: Run, plan: LaunchPlan, device: torch.device) -> None:
    """Run a plan on inputs of a layout, with gradients of another and poisoned outputs, and compare."""
    operation, shape, table = problem.operation, problem.shape, problem.table
    buffers = make_inputs(operation, shape, device, seed=shape.batch, spread=3.0, table=table)
    wanted = right(operation, buffers)
    x = laid_out(buffers["x"], layout)
    inputs = {**buffers, "x": x}
    if "grad" in buffers:
        inputs["grad"] = laid_out(buffers["grad"], LAYOUTS[LAYOUTS.index(layout) - 1])
    # what a plan asks no strides of it is given contiguous
    asked = {stride.buffer for stride in plan.strides}
    given = {n: t if n in asked else t.contiguous() for n, t in inputs.items()}
    outputs = {n: _Guarded(torch.empty_like(x) if n in asked else t) for n, t in wanted.items()}
    run(packing.arranged(given | {n: g.tensor for n, g in outputs.items()}, plan.buffers, table))
    for name, expected in wanted.items():
        assert outputs[name].intact(), f"{operation} {shape} {layout}: wrote outside of {name}"
        difference = (outputs[name].tensor.double() - expected).abs().max() / expected.abs().max()
        assert difference <= 4 * TOLERANCES[table], f"{operation} {shape} {layout}: {name} {difference:.1e}"


def right(operation: Operation, b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The outputs of an operation by the definition in float64."""
    b = {name: t.double() for name, t in b.items() if t.is_floating_point()}
    outputs: dict[str, Tensor] = {}
    if operation is Operation.FORWARD:
        outputs["y"] = b["x"].new_empty(b["table"].shape[2], b["x"].shape[1])
        reference.forward(b["x"], b["table"], b["borders"], outputs["y"])
    if operation in (Operation.GRAD_INPUT, Operation.BACKWARD):
        outputs["grad_x"] = torch.empty_like(b["x"])
        reference.grad_input(b["grad"], b["x"], b["table"], b["borders"], outputs["grad_x"])
    if operation in (Operation.GRAD_TABLE, Operation.BACKWARD):
        outputs["grad_table"] = torch.empty_like(b["table"])
        reference.grad_table(b["grad"], b["x"], b["borders"], outputs["grad_table"])
    return outputs
