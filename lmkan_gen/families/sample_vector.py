"""CPU kernels for few outputs: neighbouring samples in SIMD lanes, the table read as it lies.

See the head of ``templates/sample_vector.cpp.j2`` for the idea and what bounds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from lmkan_gen.families.base import Family, Parameters, Violation
from lmkan_gen.families.registers import lanes
from lmkan_gen.plan import Constant, KernelSpec, Launch, LaunchPlan, strides
from lmkan_gen.problem import Operation, Problem

_TILES = (1, 2, 4, 8)
#: Outputs up to which gathers cost less than registers of outputs that are mostly empty, and up to which they
#: do for a few samples of a table that would have to be arranged. Measured with 64 inputs, 8 and 28 grids.
_FEW = {Operation.FORWARD: 1, Operation.GRAD_INPUT: 2}
_FEW_OF_FEW_SAMPLES, _FEW_SAMPLES = 4, 64
#: indices are 32-bit integers
_MOST_PARAMETERS = 2**31 - 1


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
        count = problem.shape.table_bytes // 4
        if count <= _MOST_PARAMETERS:
            return []
        return [Violation("indices", f"the table has {count} parameters, at most {_MOST_PARAMETERS} fit")]

    def wasted(self, problem: Problem, parameters: Parameters) -> bool:
        """Whether a smaller tile would hold all outputs as well."""
        tile = int(parameters.get("outputs_tile", _TILES[0]))
        return tile > _TILES[0] and tile // 2 >= problem.shape.outputs

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
