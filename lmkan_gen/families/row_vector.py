"""CPU kernels that keep each knot's parameters as a row over outputs.

A pre-pass finds every sample's cells, another repacks the table so that the outputs of one knot
are contiguous. Then a sample blends (or, for the table's gradient, updates) four rows with SIMD. Tiles
keep the rows in use in the caches of a core.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import ClassVar, Literal

from lmkan_gen.families.base import Family, Parameters, Violation
from lmkan_gen.plan import Constant, KernelSpec, Launch, LaunchPlan, Workspace, strides
from lmkan_gen.problem import Layer, Operation, Problem

_TEMPLATE = "row_vector.cpp.j2"

#: floats of one SIMD register
_LANES = {"generic": 4, "x86-64-v3": 8, "x86-64-v4": 16}

#: a tile's sums and the values in flight must fit the registers
_MOST_VECTORS = 8

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
    idea: ClassVar[str] = "rows of outputs per knot, four of them blended with SIMD per sample and pair"

    def space(self, operation: Operation) -> Mapping[str, tuple[Constant, ...]]:
        return _SPACES[operation]

    def default(self, problem: Problem) -> Parameters | None:
        shape = problem.shape
        space = self.space(problem.operation)
        sizes = {"outputs_tile": shape.outputs, "batch_tile": shape.batch, "pairs_tile": shape.pairs}
        parameters: dict[str, int] = {}
        for name, wanted in _GOOD[problem.operation].items():
            if name == "outputs_tile":
                wanted = min(wanted, _MOST_VECTORS * lanes(problem))
            parameters[name] = min(wanted, _smallest_holding(space[name], sizes[name]))
        # a task for every core matters more than tiles of the best size
        for name in _DIVIDES[problem.operation]:
            smaller = [v for v in _integers(space[name]) if v < parameters[name]]
            while smaller and _tasks(problem, parameters) < problem.device.multiprocessors:
                parameters[name] = smaller.pop()
        return parameters

    def layer_violations(self, layer: Layer, parameters: Parameters) -> list[Violation]:
        if layer.constant and layer.operation is not Operation.GRAD_TABLE:
            return [Violation("constant", "a table that stays as it is needs to be laid out once only")]
        return self.too_wide(layer, parameters)

    def too_wide(self, layer: Layer, parameters: Parameters) -> list[Violation]:
        """Whether the outputs of a tile have no room in the registers."""
        most = _MOST_VECTORS * lanes(layer)
        if int(parameters.get("outputs_tile", 0)) <= most:
            return []
        message = (
            f"outputs_tile {parameters['outputs_tile']} needs more than {_MOST_VECTORS} registers "
            f"of {lanes(layer)} floats on {layer.device.arch}: at most {most} fits"
        )
        return [Violation("registers", message)]

    def wasted(self, problem: Problem, parameters: Parameters) -> bool:
        """Whether a smaller tile would hold all outputs, samples or pairs as well."""
        shape, space = problem.shape, self.space(problem.operation)
        sizes = {"outputs_tile": shape.outputs, "batch_tile": shape.batch, "pairs_tile": shape.pairs}
        return any(
            int(parameters[tile]) > _smallest_holding(values, sizes[tile]) for tile, values in space.items()
        )

    def layer_spec(self, layer: Layer, parameters: Parameters) -> KernelSpec:
        constants: dict[str, Constant] = {
            "operation": str(layer.operation),
            "grids": layer.shape.grids,
            "lanes": lanes(layer),
        }
        if "outputs_tile" in parameters:
            constants["outputs_tile"] = parameters["outputs_tile"]
        return KernelSpec.make(_TEMPLATE, layer.device.arch, constants)

    def plan(self, problem: Problem, parameters: Parameters) -> LaunchPlan:
        s = problem.shape
        width = int(parameters.get("outputs_tile") or _round_up(s.outputs, lanes(problem)))
        padded = _round_up(s.outputs, width)
        tiles = (int(parameters["batch_tile"]), int(parameters["pairs_tile"]))
        cells = Workspace("cells", 12 * s.pairs * s.batch)
        packed_table = Workspace("packed_table", 4 * padded * s.pairs * s.knots)
        packed_grad = Workspace("packed_grad", 4 * padded * s.batch)
        locate = Launch("coordinates", ("x", "borders", "cells", s.inputs, s.batch, *strides("x")))
        pack_table = Launch("pack_table", ("table", "packed_table", s.pairs, s.outputs, width))
        pack_grad = Launch("pack_grad", ("grad", "packed_grad", s.outputs, s.batch, width, *strides("grad")))
        sizes = (s.pairs, s.outputs, s.batch, *tiles)
        match problem.operation:
            case Operation.FORWARD:
                main = Launch("forward", ("cells", "packed_table", "y", *sizes))
                return LaunchPlan((cells, packed_table), (locate, pack_table, main))
            case Operation.GRAD_INPUT:
                buffers = ("cells", "packed_table", "packed_grad", "borders", "grad_x")
                arguments = (*buffers, s.inputs, width, s.batch, *tiles, *strides("grad_x"))
                main = Launch("grad_input", arguments)
                return LaunchPlan((cells, packed_table, packed_grad), (locate, pack_table, pack_grad, main))
            case Operation.GRAD_TABLE:
                main = Launch("grad_table", ("cells", "packed_grad", "grad_table", *sizes))
                return LaunchPlan((cells, packed_grad), (locate, pack_grad, main))
            case _:
                raise ValueError(f"family {self.name} does not compute {problem.operation}")


FAMILY = RowVector()


def lanes(problem: Problem) -> int:
    """Floats of one SIMD register."""
    return _LANES[problem.device.arch]


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


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
