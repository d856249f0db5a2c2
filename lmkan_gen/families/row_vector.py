"""CPU kernels that keep each knot's parameters as a row over outputs.

A pre-pass finds every sample's cells. Another repacks the table so that the outputs of one knot are
contiguous; a table that stays as it is comes arranged so, in its own type. Then a sample blends (or, for the
table's gradient, updates) four rows with SIMD. Tiles keep the rows in use in the caches of a core.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import ClassVar, Literal

from lmkan_gen.families.base import Family, Parameters, Violation
from lmkan_gen.families.registers import lanes
from lmkan_gen.packing import ROW_SCALES, SCALE_PAIRS, Rows
from lmkan_gen.plan import Constant, KernelSpec, Launch, LaunchPlan, Workspace, strides
from lmkan_gen.problem import Operation, Problem, TableDtype

_TEMPLATE = "row_vector.cpp.j2"

#: a tile's sums and the values in flight must fit the registers
_MOST_VECTORS = 8
_LONGEST_TILE = 128

_SPACES: Mapping[Operation, Mapping[str, tuple[Constant, ...]]] = {
    Operation.FORWARD: {
        "outputs_tile": (16, 32, 64, 128),
        "batch_tile": (64, 256, 1024),
        "pairs_tile": (1, 2, 4, 16),
    },
    Operation.GRAD_INPUT: {"batch_tile": (16, 64, 256), "pairs_tile": (1, 4, 16)},
    Operation.GRAD_TABLE: {
        "outputs_tile": (16, 32, 64, 128),
        "batch_tile": (64, 256, 1024),
        "pairs_tile": (4, 8, 16),
    },
}


#: good on an AVX-512 machine for widths of 64 to 512 and 8 to 26 grids
_GOOD: Mapping[Operation, Mapping[str, int]] = {
    Operation.FORWARD: {"outputs_tile": 128, "batch_tile": 1024, "pairs_tile": 2},
    Operation.GRAD_INPUT: {"batch_tile": 256, "pairs_tile": 4},
    # 16 pairs are a whole cache line of the table
    Operation.GRAD_TABLE: {"outputs_tile": 64, "batch_tile": 1024, "pairs_tile": 16},
}

#: parameters that decide how many tasks there are, the first to shrink first
_DIVIDES: Mapping[Operation, tuple[str, ...]] = {
    Operation.FORWARD: ("batch_tile", "outputs_tile"),
    Operation.GRAD_INPUT: ("batch_tile", "pairs_tile"),
    Operation.GRAD_TABLE: ("outputs_tile", "pairs_tile"),
}


class RowVector(Family):
    """Forward, input gradient and table gradient on any CPU with gcc or clang.

    Parameters: ``outputs_tile`` outputs and ``batch_tile`` samples make one task; ``pairs_tile``
    input pairs are worked on at a time.
    """

    name: ClassVar[str] = "row_vector"
    device_kind: ClassVar[Literal["cpu", "cuda"]] = "cpu"
    operations: ClassVar[frozenset[Operation]] = frozenset(_SPACES)
    #: gradients of tables are float32, and int8 tables have no derivatives
    tables: ClassVar[Mapping[Operation, frozenset[TableDtype]]] = {
        Operation.FORWARD: frozenset(TableDtype),
        Operation.GRAD_INPUT: frozenset(TableDtype) - {TableDtype.INT8},
        Operation.GRAD_TABLE: frozenset({TableDtype.FLOAT32}),
    }
    idea: ClassVar[str] = "rows of outputs per knot, four of them blended with SIMD per sample and pair"

    def computes(self, operation: Operation, table: TableDtype) -> bool:
        """See base class."""
        return operation in self.operations and table in self.tables[operation]

    def space(self, operation: Operation) -> Mapping[str, tuple[Constant, ...]]:
        return _SPACES[operation]

    def default(self, problem: Problem) -> Parameters | None:
        shape = problem.shape
        space = self.space(problem.operation)
        sizes = {"outputs_tile": shape.outputs, "batch_tile": shape.batch, "pairs_tile": shape.pairs}
        parameters: dict[str, int] = {}
        for name, wanted in _GOOD[problem.operation].items():
            if name == "outputs_tile":
                wanted = min(wanted, _MOST_VECTORS * lanes(problem.device))
            parameters[name] = min(wanted, _smallest_holding(space[name], sizes[name]))
        # a task for every core matters more than tiles of the best size
        for name in _DIVIDES[problem.operation]:
            smaller = [v for v in _integers(space[name]) if v < parameters[name]]
            while smaller and _tasks(problem, parameters) < problem.device.multiprocessors:
                parameters[name] = smaller.pop()
        return parameters

    def violations(self, problem: Problem, parameters: Parameters) -> list[Violation]:
        found = []
        width = lanes(problem.device)
        most = _MOST_VECTORS * width
        if int(parameters.get("outputs_tile", 0)) > most:
            message = (
                f"outputs_tile {parameters['outputs_tile']} needs more than {_MOST_VECTORS} registers "
                f"of {width} floats on {problem.device.arch}: at most {most} fits"
            )
            found.append(Violation("registers", message))
        if problem.table is not TableDtype.FLOAT32 and not problem.constant:
            message = f"a {problem.table} table that changes from call to call is better packed in float32"
            found.append(Violation("constant", message))
        return found

    def wasted(self, problem: Problem, parameters: Parameters) -> bool:
        """Whether a smaller tile would hold all outputs, samples or pairs as well."""
        shape, space = problem.shape, self.space(problem.operation)
        sizes = {"outputs_tile": shape.outputs, "batch_tile": shape.batch, "pairs_tile": shape.pairs}
        return any(
            int(parameters[tile]) > _smallest_holding(values, sizes[tile]) for tile, values in space.items()
        )

    def spec(self, problem: Problem, parameters: Parameters) -> KernelSpec:
        constants: dict[str, Constant] = {
            "operation": str(problem.operation),
            "grids": problem.shape.grids,
            "lanes": lanes(problem.device),
            "table": str(problem.table),
            "scale_pairs": SCALE_PAIRS,
        }
        if "outputs_tile" in parameters:
            constants["outputs_tile"] = parameters["outputs_tile"]
        return KernelSpec.make(_TEMPLATE, problem.device.arch, constants)

    def plan(self, problem: Problem, parameters: Parameters) -> LaunchPlan:
        s = problem.shape
        pitch = _pitch(problem)
        tiles = (int(parameters["batch_tile"]), int(parameters["pairs_tile"]))
        cells = Workspace("cells", 12 * s.pairs * s.batch)
        packed_table = Workspace("packed_table", 4 * pitch * s.pairs * s.knots)
        packed_grad = Workspace("packed_grad", 4 * pitch * s.batch)
        locate = Launch("coordinates", ("x", "borders", "cells", s.inputs, s.batch, *strides("x")))
        pack_table = Launch("pack_table", ("table", "packed_table", s.pairs, s.outputs, pitch))
        pack_grad = Launch("pack_grad", ("grad", "packed_grad", s.outputs, s.batch, pitch, *strides("grad")))
        # a table that stays as it is comes as rows
        rows = (Rows(pitch),) if problem.constant else ("packed_table",)
        scales = (ROW_SCALES,) if problem.table is TableDtype.INT8 else ()
        tables = (packed_table,) if not problem.constant else ()
        packing = (pack_table,) if not problem.constant else ()
        sizes = (s.pairs, s.outputs, pitch, s.batch, *tiles)
        match problem.operation:
            case Operation.FORWARD:
                main = Launch("forward", ("cells", *rows, *scales, "y", *sizes))
                return LaunchPlan((cells, *tables), (locate, *packing, main))
            case Operation.GRAD_INPUT:
                buffers = ("cells", *rows, "packed_grad", "borders", "grad_x")
                main = Launch("grad_input", (*buffers, s.inputs, *sizes[1:], *strides("grad_x")))
                return LaunchPlan((cells, *tables, packed_grad), (locate, *packing, pack_grad, main))
            case Operation.GRAD_TABLE:
                main = Launch("grad_table", ("cells", "packed_grad", "grad_table", *sizes))
                return LaunchPlan((cells, packed_grad), (locate, pack_grad, main))
            case _:
                raise ValueError(f"family {self.name} does not compute {problem.operation}")


FAMILY = RowVector()


def _pitch(problem: Problem) -> int:
    """Elements from one row to the next: whole registers.

    Rows longer than a tile are an odd number of them: from a power of two apart, pieces of rows would share
    few lines of a cache.
    """
    width = lanes(problem.device)
    vectors = -(-problem.shape.outputs // width)
    return width * (vectors | 1 if width * vectors > _LONGEST_TILE else vectors)


def _integers(values: tuple[Constant, ...]) -> list[int]:
    return [int(value) for value in values]


def _smallest_holding(values: tuple[Constant, ...], size: int) -> int:
    """The smallest allowed tile that holds ``size``, or else the largest."""
    allowed = _integers(values)
    return min((v for v in allowed if v >= size), default=max(allowed))


def _tasks(problem: Problem, parameters: Mapping[str, int]) -> int:
    """How many tasks the threads share."""
    shape = problem.shape
    sizes = {"outputs_tile": shape.outputs, "batch_tile": shape.batch, "pairs_tile": shape.pairs}
    return prod(-(-sizes[name] // parameters[name]) for name in _DIVIDES[problem.operation])
