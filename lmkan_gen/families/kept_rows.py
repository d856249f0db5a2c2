"""CPU kernels for tables that stay as they are: each knot's coefficients are a row over outputs already.

See the head of ``templates/kept_rows.cpp.j2``. `lmkan_gen.families.row_vector` lays tables out at each call
instead, since they may have changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from lmkan_gen.families.base import Family, Parameters, Violation
from lmkan_gen.families.row_vector import FAMILY as ROW_VECTOR
from lmkan_gen.families.row_vector import lanes
from lmkan_gen.packing import row_pitch
from lmkan_gen.plan import Constant, KernelSpec, Launch, LaunchPlan, Workspace, strides
from lmkan_gen.problem import Layer, Operation, Problem, TableDtype


class KeptRows(Family):
    """Forward with tables of any type, and the input gradient of those that have one.

    Parameters are those of `lmkan_gen.families.row_vector.RowVector`.
    """

    name: ClassVar[str] = "kept_rows"
    device_kind: ClassVar[Literal["cpu", "cuda"]] = "cpu"
    operations: ClassVar[frozenset[Operation]] = frozenset({Operation.FORWARD, Operation.GRAD_INPUT})
    idea: ClassVar[str] = "for tables that stay: rows of outputs per knot, in their type, laid out once"

    def computes(self, operation: Operation, table: TableDtype) -> bool:
        """See base class."""
        return operation is Operation.FORWARD or (
            operation is Operation.GRAD_INPUT and table is not TableDtype.INT8
        )

    def space(self, operation: Operation) -> Mapping[str, tuple[Constant, ...]]:
        """See base class."""
        return ROW_VECTOR.space(operation)

    def preference(self, problem: Problem) -> float:
        """Nothing that lays the table out at each call is as fast."""
        return 2.0 if problem.constant else -2.0

    def default(self, problem: Problem) -> Parameters | None:
        """See base class."""
        return ROW_VECTOR.default(problem) if problem.constant else None

    def layer_violations(self, layer: Layer, parameters: Parameters) -> list[Violation]:
        """See base class."""
        found = ROW_VECTOR.too_wide(layer, parameters)
        if not layer.constant:
            found.append(
                Violation("constant", "the table may change from call to call, and is laid out only once")
            )
        return found

    def wasted(self, problem: Problem, parameters: Parameters) -> bool:
        """See base class."""
        return ROW_VECTOR.wasted(problem, parameters)

    def layer_spec(self, layer: Layer, parameters: Parameters) -> KernelSpec:
        """See base class."""
        constants: dict[str, Constant] = {
            "operation": str(layer.operation),
            "grids": layer.shape.grids,
            "lanes": lanes(layer),
            "table": str(layer.table),
        }
        if "outputs_tile" in parameters:
            constants["outputs_tile"] = parameters["outputs_tile"]
        return KernelSpec.make("kept_rows.cpp.j2", layer.device.arch, constants)

    def plan(self, problem: Problem, parameters: Parameters) -> LaunchPlan:
        """See base class."""
        s, pitch = problem.shape, row_pitch(problem.shape.outputs)
        tiles = (int(parameters["batch_tile"]), int(parameters["pairs_tile"]))
        cells = Workspace("cells", 12 * s.pairs * s.batch)
        locate = Launch("coordinates", ("x", "borders", "cells", s.inputs, s.batch, *strides("x")))
        if problem.operation is Operation.FORWARD:
            scales = "scales" if problem.table is TableDtype.INT8 else 0
            arguments = ("cells", "rows", scales, "y", s.pairs, s.outputs, pitch, s.batch, *tiles)
            return LaunchPlan((cells,), (locate, Launch("forward", arguments)))
        width = -(-s.outputs // lanes(problem)) * lanes(problem)
        packed_grad = Workspace("packed_grad", 4 * width * s.batch)
        pack_grad = Launch("pack_grad", ("grad", "packed_grad", s.outputs, s.batch, width, *strides("grad")))
        sizes = (s.inputs, s.outputs, pitch, width, s.batch, *tiles)
        buffers = ("cells", "rows", "packed_grad", "borders", "grad_x")
        main = Launch("grad_input", (*buffers, *sizes, *strides("grad_x")))
        return LaunchPlan((cells, packed_grad), (locate, pack_grad, main))


FAMILY = KeptRows()
