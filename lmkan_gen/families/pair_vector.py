"""CPU kernels for few samples: read the table as it lies, with neighbouring pairs in SIMD lanes.

Kernels that read rows of outputs arrange a table that may change at every call. For a few samples that costs
more than to gather their corners.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from lmkan_gen.families.base import Family, Parameters, Violation
from lmkan_gen.families.registers import gather_violations, is_half_empty, lanes
from lmkan_gen.plan import Constant, KernelSpec, Launch, LaunchPlan, Workspace, strides
from lmkan_gen.problem import Operation, Problem

_BLOCK = 16  # pairs that samples' coordinates are padded to
_TILES = (4, 8, 16, 32, 64)
#: Up to how many samples cost less than to arrange a table: so many, and one more for each so many knots, as
#: few samples touch few of many knots. Measured on widths of 64 to 512 and 8 to 28 grids.
_FEW = {Operation.FORWARD: (4, 40), Operation.GRAD_INPUT: (4, 100), Operation.GRAD_TABLE: (1, 100)}


class PairVector(Family):
    """Forward, input gradient and table gradient, a sample at a time.

    Parameters: ``outputs_tile`` outputs make one task, of one sample or (gradient of the table) of all.
    """

    name: ClassVar[str] = "pair_vector"
    device_kind: ClassVar[Literal["cpu", "cuda"]] = "cpu"
    operations: ClassVar[frozenset[Operation]] = frozenset(_FEW)
    idea: ClassVar[str] = (
        "for few samples: gather corners from the table as it lies, a pair in each SIMD lane"
    )

    def space(self, operation: Operation) -> Mapping[str, tuple[Constant, ...]]:
        """See base class."""
        return {} if operation is Operation.GRAD_INPUT else {"outputs_tile": _TILES}

    def preference(self, problem: Problem) -> float:
        """Where samples read less of the table than arranging it does."""
        samples, knots = _FEW[problem.operation]
        few = problem.shape.batch <= samples + problem.shape.knots // knots
        return 2.0 if few else -2.0

    def default(self, problem: Problem) -> Parameters | None:
        """Tiles that leave every core some."""
        if self.violations(problem, {}):
            return None
        space = self.space(problem.operation)
        if not space:
            return {}
        shape = problem.shape
        samples = 1 if problem.operation is Operation.GRAD_TABLE else shape.batch
        wanted = shape.outputs * samples // problem.device.multiprocessors
        return {"outputs_tile": max((tile for tile in _TILES if tile <= wanted), default=_TILES[0])}

    def violations(self, problem: Problem, parameters: Parameters) -> list[Violation]:
        """See base class."""
        found = []
        reads = problem.operation is not Operation.GRAD_TABLE
        if problem.constant and reads:
            found.append(
                Violation("constant", "a table that stays as it is is better read as rows of outputs")
            )
        return found + gather_violations(problem.shape)

    def wasted(self, problem: Problem, parameters: Parameters) -> bool:
        """Whether a smaller tile would hold all outputs as well."""
        return is_half_empty(problem.shape, parameters, _TILES[0])

    def spec(self, problem: Problem, parameters: Parameters) -> KernelSpec:
        """See base class."""
        constants: dict[str, Constant] = {
            "operation": str(problem.operation),
            "grids": problem.shape.grids,
            "lanes": lanes(problem.device),
        }
        return KernelSpec.make("pair_vector.cpp.j2", problem.device.arch, constants)

    def plan(self, problem: Problem, parameters: Parameters) -> LaunchPlan:
        """See base class."""
        s = problem.shape
        cells = Workspace("cells", 12 * -(-s.pairs // _BLOCK) * _BLOCK * s.batch)
        locate = Launch("coordinates", ("x", "borders", "cells", s.inputs, s.outputs, s.batch, *strides("x")))
        tile = int(parameters.get("outputs_tile", 0))
        match problem.operation:
            case Operation.FORWARD:
                main = Launch("forward", ("cells", "table", "y", s.pairs, s.outputs, s.batch, tile))
            case Operation.GRAD_INPUT:
                buffers = ("cells", "table", "grad", "borders", "grad_x")
                sizes = (s.inputs, s.outputs, s.batch)
                main = Launch("grad_input", (*buffers, *sizes, *strides("grad"), *strides("grad_x")))
            case Operation.GRAD_TABLE:
                sizes = (s.pairs, s.outputs, s.batch)
                main = Launch("grad_table", ("cells", "grad", "grad_table", *sizes, tile, *strides("grad")))
            case _:
                raise ValueError(f"family {self.name} does not compute {problem.operation}")
        return LaunchPlan((cells,), (locate, main))


FAMILY = PairVector()
