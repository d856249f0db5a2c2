"""A CPU family made for tests: candidates that work, and candidates that fail in every way there is.

It compiles the row-vector template. Faults strike in the measuring process only.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from lmkan_gen.families.base import Parameters, Violation
from lmkan_gen.families.row_vector import RowVector
from lmkan_gen.plan import Constant, Fill, KernelSpec, LaunchPlan
from lmkan_gen.problem import Operation, Problem

GOOD = {"outputs_tile": 16, "batch_tile": 64, "pairs_tile": 2}


class Faulty(RowVector):
    """``fault`` says how a candidate fails; ``variant`` only multiplies candidates."""

    name = "faulty"
    operations = frozenset({Operation.FORWARD})

    def __init__(self, faults: tuple[str, ...], variants: int = 1) -> None:
        self._space: dict[str, tuple[Constant, ...]] = {
            "fault": faults,
            "variant": tuple(range(variants)),
        }

    def space(self, operation: Operation) -> Mapping[str, tuple[Constant, ...]]:
        return self._space

    def default(self, problem: Problem) -> Parameters | None:
        return {"fault": "none", "variant": 0} if "none" in self._space["fault"] else None

    def wasted(self, problem: Problem, parameters: Parameters) -> bool:
        return parameters["fault"] == "wasted"

    def violations(self, problem: Problem, parameters: Parameters) -> list[Violation]:
        if parameters["fault"] == "too_large":
            return [Violation("shared_memory", "made not to fit")]
        return []

    def spec(self, problem: Problem, parameters: Parameters) -> KernelSpec:
        spec = super().spec(problem, GOOD)
        if parameters["fault"] == "compile":
            return KernelSpec.make(spec.template, spec.arch, {**spec.context, "lanes": 7})
        return spec

    def plan(self, problem: Problem, parameters: Parameters) -> LaunchPlan:
        plan = super().plan(problem, GOOD)
        if multiprocessing.parent_process() is None:
            return plan
        match parameters["fault"]:
            case "unwritten":
                return replace(plan, steps=plan.steps[:-1])
            case "wrong":
                *steps, last = plan.steps
                return replace(plan, steps=(*steps, Fill("packed_table"), last))
            case "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "exit":
                os._exit(3)
            case "hang":
                time.sleep(600)
            case "raise":
                raise RuntimeError("made to fail")
            case "memory":
                raise MemoryError("made to need too much")
            case "eats":
                _ = [np.empty(1 << 28, np.uint8) for _ in range(4096)]  # a TiB
            case "eats tensors":
                torch.empty(1 << 42, dtype=torch.uint8)
            case "slow":
                time.sleep(0.01)
        return plan
