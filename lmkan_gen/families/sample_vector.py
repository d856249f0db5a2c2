"""CPU kernels for few outputs: neighbouring samples in SIMD lanes, the table read as it lies.

See the head of ``templates/sample_vector.cpp.j2`` for the idea and what bounds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from lmkan_gen.families.base import Family, Parameters, Violation
from lmkan_gen.families.registers import gather_violations, is_half_empty, lanes
from lmkan_gen.plan import Constant, KernelSpec, Launch, LaunchPlan, strides
from lmkan_gen.problem import Operation, Problem

_TILES = (1, 2, 4, 8)
#: Outputs up to which gathers cost less than registers of outputs that are mostly empty, and up to which they
#: do for a few samples of a table that would have to be arranged. Measured with 64 inputs, 8 and 28 grids.
_FEW = {Operation.FORWARD: 1, Operation.GRAD_INPUT: 2}
_FEW_OF_FEW_SAMPLES, _FEW_SAMPLES = 4, 64


class SampleVector(Family):
    """Forward and input gradient, a register of samples at a time.

    Parameters: forward keeps the sums of ``outputs_tile`` outputs in registers.
    """

    name: ClassVar[str] = "sample_vector"
    device_kind: ClassVar[Literal["cpu", "cuda"]] = "cpu"
    operations: ClassVar[frozenset[Operation]] = frozenset(_FEW)
    idea: ClassVar[str] = (
        "for few outputs: gather corners from the table as it lies, a sample in each SIMD lane"
    )

    def space(self, operation: Operation) -> Mapping[str, tuple[Constant, ...]]:
        """See base class."""
        return {"outputs_tile": _TILES} if operation is Operation.FORWARD else {}

    def preference(self, problem: Problem) -> float:
        """Where a register of outputs would be mostly empty, and samples fill half of one."""
        shape = problem.shape
        few_samples = shape.batch <= _FEW_SAMPLES and not problem.constant
        few = _FEW_OF_FEW_SAMPLES if few_samples else _FEW[problem.operation]
        return 3.0 if shape.outputs <= few and 2 * shape.batch >= lanes(problem.device) else -3.0

    def default(self, problem: Problem) -> Parameters | None:
        """A tile that holds all outputs."""
        if self.violations(problem, {}):
            return None
        if problem.operation is not Operation.FORWARD:
            return {}
        return {"outputs_tile": next((t for t in _TILES if t >= problem.shape.outputs), _TILES[-1])}

    def violations(self, problem: Problem, parameters: Parameters) -> list[Violation]:
        """See base class."""
        return gather_violations(problem.shape)

    def wasted(self, problem: Problem, parameters: Parameters) -> bool:
        """Whether a smaller tile would hold all outputs as well."""
        return is_half_empty(problem.shape, parameters, _TILES[0])

    def spec(self, problem: Problem, parameters: Parameters) -> KernelSpec:
        """See base class."""
        constants: dict[str, Constant] = {
            "operation": str(problem.operation),
            "grids": problem.shape.grids,
            "lanes": lanes(problem.device),
            **parameters,
        }
        return KernelSpec.make("sample_vector.cpp.j2", problem.device.arch, constants)

    def plan(self, problem: Problem, parameters: Parameters) -> LaunchPlan:
        """See base class."""
        s = problem.shape
        sizes = (s.inputs, s.outputs, s.batch, *strides("x"))
        if problem.operation is Operation.FORWARD:
            return LaunchPlan((), (Launch("forward", ("x", "table", "borders", "y", *sizes)),))
        buffers = ("x", "table", "borders", "grad", "grad_x")
        layout = (*strides("grad"), *strides("grad_x"))
        return LaunchPlan((), (Launch("grad_input", (*buffers, *sizes, *layout)),))


FAMILY = SampleVector()
