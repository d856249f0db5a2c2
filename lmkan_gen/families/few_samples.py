"""CPU kernels for few samples: gather what they need of the table as it lies, and lay out nothing.

See the head of ``templates/few_samples.cpp.j2``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from lmkan_gen.families.base import Family, Parameters, Violation
from lmkan_gen.families.row_vector import lanes
from lmkan_gen.plan import Constant, KernelSpec, Launch, LaunchPlan, Workspace, strides
from lmkan_gen.problem import Layer, Operation, Problem

#: knots per sample from which on this is faster than to lay out all of them
_KNOTS_PER_SAMPLE = 10
_INDICES = 2**31


class FewSamples(Family):
    """Forward and input gradient.

    Parameters: ``tile`` outputs (forward) or input pairs (input gradient) make one task.
    """

    name: ClassVar[str] = "few_samples"
    device_kind: ClassVar[Literal["cpu", "cuda"]] = "cpu"
    operations: ClassVar[frozenset[Operation]] = frozenset({Operation.FORWARD, Operation.GRAD_INPUT})
    idea: ClassVar[str] = "for few samples: gather the corners of their cells from the table as it lies"

    def space(self, operation: Operation) -> Mapping[str, tuple[Constant, ...]]:
        """See base class."""
        return {"tile": (16, 32, 64)}

    def preference(self, problem: Problem) -> float:
        """Where laying out the table would take longer."""
        few = _KNOTS_PER_SAMPLE * problem.shape.batch <= problem.shape.knots
        return 2.0 if few and not problem.constant else -2.0

    def default(self, problem: Problem) -> Parameters | None:
        """See base class."""
        parameters = {"tile": 64}
        return None if self.violations(problem, parameters) else parameters

    def layer_violations(self, layer: Layer, parameters: Parameters) -> list[Violation]:
        """See base class."""
        if layer.constant:
            return [Violation("constant", "a table that stays as it is is better laid out, once")]
        if (values := layer.shape.table_bytes // 4) >= _INDICES:
            return [Violation("index", f"the table has {values} values, indices reach to {_INDICES}")]
        return []

    def wasted(self, problem: Problem, parameters: Parameters) -> bool:
        """Whether every knot is read many times."""
        return problem.shape.batch > problem.shape.knots

    def layer_spec(self, layer: Layer, parameters: Parameters) -> KernelSpec:
        """See base class."""
        constants: dict[str, Constant] = {
            "operation": str(layer.operation),
            "grids": layer.shape.grids,
            "lanes": lanes(layer),
            "outputs_tile": parameters["tile"],
        }
        return KernelSpec.make("few_samples.cpp.j2", layer.device.arch, constants)

    def plan(self, problem: Problem, parameters: Parameters) -> LaunchPlan:
        """See base class."""
        s = problem.shape
        cells = Workspace("cells", 12 * s.pairs * s.batch)
        locate = Launch("coordinates", ("x", "borders", "cells", s.inputs, s.batch, *strides("x")))
        if problem.operation is Operation.FORWARD:
            main = Launch("forward", ("cells", "table", "y", s.pairs, s.outputs, s.batch))
        else:
            buffers = ("cells", "table", "grad", "borders", "grad_x")
            layout = (*strides("grad"), *strides("grad_x"))
            main = Launch("grad_input", (*buffers, s.inputs, s.outputs, s.batch, *layout))
        return LaunchPlan((cells,), (locate, main))


FAMILY = FewSamples()
