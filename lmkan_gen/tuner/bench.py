"""What the measuring process does: run one candidate, check it, time it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module

import torch
from torch import Tensor

from lmkan_gen import packing, reference
from lmkan_gen.families import Family, Parameters
from lmkan_gen.plan import LaunchPlan
from lmkan_gen.problem import LayerShape, Operation, Problem, TableDtype
from lmkan_gen.tuner.measure import Timing, copies_past_cache, measure
from lmkan_gen.tuner.verify import Case, Run, make_cases, make_inputs, output_shapes

_REFERENCE_LIMIT_S = 1.0
_REFERENCE_SAMPLES = 1024


class Bench:
    """One problem's inputs and right answers on one device, for many candidates."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self._problem = problem
        self._device = device
        self._cases = make_cases(problem.operation, problem.shape, device, problem.table)
        self._buffers = rotated_buffers(problem.operation, problem.shape, device, problem.table)

    def check(self, family: Family, parameters: Parameters) -> None:
        """Compare a candidate with the reference.

        Raises:
            Mismatch: it computes something else.
        """
        for case in self._cases:
            self._check(case, family, parameters)

    def time(self, family: Family, parameters: Parameters, best_us: float | None) -> Timing:
        """Time a candidate on the problem's own shape."""
        run, plan = self._launcher(family, parameters, self._problem)
        calls = [_bound(run, plan, buffers, self._problem) for buffers in self._buffers]
        return measure(calls, self._device, best_us)

    def time_reference(self) -> float | None:
        """Microseconds of the plain torch fallback; None when it takes too long or too much memory."""
        shape = self._problem.shape
        sample = LayerShape(shape.inputs, shape.outputs, shape.grids, min(shape.batch, _REFERENCE_SAMPLES))
        try:
            estimate = self._time_reference_once(sample) * shape.batch / sample.batch
            if estimate > _REFERENCE_LIMIT_S:
                return None
            return 1e6 * min(self._time_reference_once(shape) for _ in range(3 if estimate < 0.1 else 1))
        except (torch.OutOfMemoryError, MemoryError):
            return None

    def _time_reference_once(self, shape: LayerShape) -> float:
        b = _with_outputs(self._problem.operation, shape, self._device, TableDtype.FLOAT32)
        self._synchronize()
        start = time.perf_counter()
        if self._problem.operation is Operation.FORWARD:
            reference.forward(b["x"], b["table"], b["borders"], b["y"])
        if "grad_x" in b:
            reference.grad_input(b["grad"], b["x"], b["table"], b["borders"], b["grad_x"])
        if "grad_table" in b:
            reference.grad_table(b["grad"], b["x"], b["borders"], b["grad_table"])
        self._synchronize()
        return time.perf_counter() - start

    def _check(self, case: Case, family: Family, parameters: Parameters) -> None:
        problem = replace(self._problem, shape=case.shape)
        if case.shape != self._problem.shape and family.violations(problem, parameters):
            return  # parameters for large batches need not run on small ones
        case.check(self._prepare(family, parameters, problem), f"batch {case.shape.batch}")
        self._synchronize()

    def _prepare(self, family: Family, parameters: Parameters, problem: Problem) -> Run:
        run, plan = self._launcher(family, parameters, problem)
        return lambda buffers: run(packing.arranged(buffers, plan.buffers, problem.table))

    def _launcher(self, family: Family, parameters: Parameters, problem: Problem) -> tuple[Run, LaunchPlan]:
        launcher = import_module(f"lmkan_gen.launch.{problem.device.kind}")
        plan = family.plan(problem, parameters)
        run: Run = launcher.prepare(family.spec(problem, parameters), plan, self._device)
        return run, plan

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def rotated_buffers(
    operation: Operation,
    shape: LayerShape,
    device: torch.device,
    table: TableDtype = TableDtype.FLOAT32,
) -> list[dict[str, Tensor]]:
    """An operation's inputs and outputs by name, in as many equal sets as keep the L2 cache cold."""
    first = _with_outputs(operation, shape, device, table)
    size = sum(t.numel() * t.element_size() for t in first.values())
    copies = copies_past_cache(size, device)
    return [first, *({n: t.clone() for n, t in first.items()} for _ in range(copies - 1))]


def _with_outputs(
    operation: Operation, shape: LayerShape, device: torch.device, table: TableDtype
) -> dict[str, Tensor]:
    buffers = make_inputs(operation, shape, device, seed=0, table=table)
    for name, size in output_shapes(operation, shape).items():
        buffers[name] = torch.zeros(size, device=device, dtype=torch.float32)
    return buffers


def _bound(run: Run, plan: LaunchPlan, buffers: Mapping[str, Tensor], problem: Problem) -> Callable[[], None]:
    if problem.constant:  # a frozen layer arranges its table once
        once = packing.arranged(buffers, plan.buffers, problem.table)
        return lambda: run(once)
    return lambda: run(packing.arranged(buffers, plan.buffers, problem.table))
