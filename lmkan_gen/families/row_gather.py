"""Row-gather CUDA kernels for few samples: read the rows of a table that they need, not all of it.

See the head of ``templates/row_gather.cu.j2`` for the idea and what bounds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lmkan_gen.device import registers_per_thread
from lmkan_gen.families.base import Family, Parameters, Violation
from lmkan_gen.packing import row_pitch
from lmkan_gen.plan import Constant, Fill, KernelSpec, Launch, LaunchPlan, strides
from lmkan_gen.problem import Layer, Operation, Problem, TableDtype

_WARP = 32
_MAX_GRID = 65535  # blocks along the second and third axis
_SHARED_MEMORY = 48 * 1024
_BYTES = {TableDtype.FLOAT32: 4, TableDtype.FLOAT16: 2, TableDtype.BFLOAT16: 2}


class RowGather(Family):
    """Forward and input gradient, a sample at a time."""

    name = "row_gather"
    device_kind = "cuda"
    operations = frozenset({Operation.FORWARD, Operation.GRAD_INPUT})
    idea = "for few samples: gather the four rows of outputs that a sample needs per pair"

    def computes(self, operation: Operation, table: TableDtype) -> bool:
        """See base class."""
        return operation in self.operations and table in _BYTES

    def space(self, operation: Operation) -> Mapping[str, tuple[Constant, ...]]:
        """See base class.

        A block has ``warps``, a lane ``vector`` outputs; rows of ``unroll`` pairs (forward) or chunks of
        outputs are asked for together. In forward a block sums over a ``slice`` of the pairs.
        """
        space: dict[str, tuple[Constant, ...]] = {
            "warps": (1, 2, 4, 8),
            "vector": (1, 2, 4),
            "unroll": (1, 2, 4),
        }
        return space | {"slice": (16, 32, 64, 128, 256, 512)} if operation is Operation.FORWARD else space

    def preference(self, problem: Problem) -> float:
        """Where samples touch fewer knots than there are, or where tiles of tables have no room."""
        few = 4 * problem.shape.batch < problem.shape.knots
        return 2.0 if few else -2.0

    def broken(self, layer: Layer, parameters: Parameters) -> Iterator[Violation]:
        """See base class."""
        shape = layer.shape
        warps, vector, unroll = (int(parameters[k]) for k in ("warps", "vector", "unroll"))
        tile = 8 * _BYTES[layer.table] * shape.knots
        if not layer.constant and tile <= layer.device.shared_memory_per_block:
            yield Violation(
                "constant",
                "where the table changes from call to call its tiles are better read into shared memory, "
                "which has room for them",
            )
        if vector > 1 and _WARP * (vector // 2) >= shape.outputs:
            yield Violation("wasted", f"vector={vector} covers {_WARP * vector} outputs of {shape.outputs}")
        if (kept := 5 * vector * unroll + vector + 40) > registers_per_thread(_WARP):
            yield Violation("registers", f"vector={vector} and unroll={unroll} need about {kept}")
        if layer.operation is Operation.FORWARD:
            pairs = int(parameters["slice"])
            if pairs > 16 and pairs // 2 >= shape.pairs:
                yield Violation("wasted", f"slice={pairs} of {shape.pairs} pairs")
            if warps * unroll > pairs:
                yield Violation("wasted", f"slice={pairs} is less than {warps} warps x {unroll} pairs")
            if (need := 20 * pairs + 4 * warps * _WARP * vector) > _SHARED_MEMORY:
                yield Violation("shared_memory", f"slice={pairs} needs {need} of {_SHARED_MEMORY} bytes")
            slices = -(-shape.pairs // pairs)
            if layer.deterministic and slices > 1:
                yield Violation("deterministic", f"{slices} slices are added in an order that varies")
            if slices > _MAX_GRID:
                yield Violation("grid", f"{slices} slices of pairs, at most {_MAX_GRID} fit a launch")
        rows = -(-shape.pairs // warps) if layer.operation is Operation.GRAD_INPUT else 1
        if max(rows, -(-shape.outputs // (_WARP * vector))) > _MAX_GRID:
            yield Violation("grid", f"more than {_MAX_GRID} blocks along pairs or outputs")

    def default(self, problem: Problem) -> Parameters | None:
        """Wide lanes, and slices short enough to fill the device."""
        shape, forward = problem.shape, problem.operation is Operation.FORWARD
        wanted = 4 * problem.device.multiprocessors
        for vector in (4, 2, 1):
            chunks = shape.batch * -(-shape.outputs // (_WARP * vector))
            enough = [s for s in (512, 256, 128, 64, 32) if chunks * -(-shape.pairs // s) >= wanted]
            slices = reversed(self.space(problem.operation).get("slice", (0,)))
            for pairs in (*enough, 16, *slices):
                for warps in (4, 2, 1):
                    parameters: dict[str, Constant] = {"warps": warps, "vector": vector, "unroll": 2}
                    if forward:
                        parameters["slice"] = pairs
                    if not self.violations(problem, parameters):
                        return parameters
        return None

    def layer_spec(self, layer: Layer, parameters: Parameters) -> KernelSpec:
        """See base class."""
        constants: dict[str, Constant] = {
            "operation": str(layer.operation),
            "grids": layer.shape.grids,
            "table": str(layer.table),
            **{name: parameters[name] for name in self.space(layer.operation)},
        }
        return KernelSpec.make("row_gather.cu.j2", layer.device.arch, constants)

    def plan(self, problem: Problem, parameters: Parameters) -> LaunchPlan:
        """See base class."""
        shape = problem.shape
        warps, vector = int(parameters["warps"]), int(parameters["vector"])
        sizes = (shape.inputs, shape.outputs, row_pitch(shape.outputs))
        if problem.operation is Operation.GRAD_INPUT:
            grid = (shape.batch, -(-shape.pairs // warps), 1)
            layout = (*strides("x"), *strides("grad"), *strides("grad_x"))
            buffers = ("x", "borders", "rows", "grad", "grad_x")
            launch = Launch("lmkan_grad_input", (*buffers, *sizes, *layout), grid, _WARP * warps)
            return LaunchPlan((), (launch,))
        slices = -(-shape.pairs // int(parameters["slice"]))
        grid = (shape.batch, -(-shape.outputs // (_WARP * vector)), slices)
        arguments = ("x", "borders", "rows", "y", *sizes, shape.batch, *strides("x"))
        launch = Launch("lmkan_forward", arguments, grid, _WARP * warps)
        return LaunchPlan((), (Fill("y"), launch) if slices > 1 else (launch,))


FAMILY = RowGather()
