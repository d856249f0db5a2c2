"""Cell-sorted CUDA gradients: samples sorted by cell, what belongs to a cell kept in registers.

See the head of ``templates/cell_sorted.cu.j2`` for the idea and what bounds it.
"""

from __future__ import annotations

from collections.abc import Mapping

from lmkan_gen.families.base import Family, Parameters, Violation
from lmkan_gen.plan import Constant, Fill, KernelSpec, Launch, LaunchPlan, Stride, Workspace, strides
from lmkan_gen.problem import Operation, Problem, TableDtype

_WARP = 32
_SORT_THREADS = 1024
_BLOCK_WARPS = 8
_MAX_BUCKETS = 8192  # 32 KiB of counters: fits the default shared memory of every GPU
_RECORD_BYTES = 16
#: of an output gradient or a coefficient, which are rounded together
_VALUE_BYTES = {TableDtype.FLOAT32: 4, TableDtype.FLOAT16: 2, TableDtype.BFLOAT16: 2}
_REGISTERS = 65536
_MAX_GRID = 65535  # blocks along the second and third axis


class CellSorted(Family):
    """Gradients with samples sorted by cell; any grid, any width."""

    name = "cell_sorted"
    device_kind = "cuda"
    operations = frozenset({Operation.GRAD_INPUT, Operation.GRAD_TABLE, Operation.BACKWARD})
    idea = "samples sorted by cell, a warp walks a run with the cell's corners in registers"

    def computes(self, operation: Operation, table: TableDtype) -> bool:
        """See base class."""
        return operation in self.operations and table in _VALUE_BYTES

    def space(self, operation: Operation) -> Mapping[str, tuple[Constant, ...]]:
        """See base class.

        ``items * 1024`` samples are sorted together, a warp walks ``segment`` of them, a lane has
        ``vector`` outputs and asks for ``unroll`` samples at once; a multiprocessor holds ``blocks``.
        """
        return {
            "items": (1, 2, 4, 8, 16, 32),
            "segment": (32, 64, 128, 256, 512, 1024),
            "vector": (1, 2, 4, 8),
            "unroll": (2, 4, 8),
            "blocks": (2, 3, 4, 5),
        }

    def preference(self, problem: Problem) -> float:
        """Where tables of a tile fit into shared memory, reading them there is faster for one gradient."""
        return {Operation.BACKWARD: 1.0, Operation.GRAD_INPUT: -1.0}.get(problem.operation, 0.0)

    def violations(self, problem: Problem, parameters: Parameters) -> list[Violation]:
        """See base class."""
        shape, device = problem.shape, problem.device
        items, segment, vector, unroll, blocks = _values(parameters)
        found = []
        if problem.table is TableDtype.BFLOAT16 and device.compute_capability < 80:
            found.append(
                Violation("architecture", f"bfloat16 needs sm_80 or newer, {device.name} is {device.arch}")
            )
        if problem.deterministic:
            found.append(Violation("deterministic", "warps add to the same element in an order that varies"))
        if shape.pairs > _MAX_GRID:
            found.append(Violation("grid", f"{shape.pairs} input pairs, at most {_MAX_GRID} fit a launch"))
        if items > 1 and _SORT_THREADS * items // 2 >= shape.batch:
            found.append(
                Violation(
                    "wasted", f"items={items} sorts {_SORT_THREADS * items} samples, batch {shape.batch}"
                )
            )
        if items > 1 and (need := self._scratch(problem, items, vector)) > problem.workspace:
            found.append(
                Violation(
                    "workspace",
                    f"items={items} needs {need} bytes of scratch memory, the limit is {problem.workspace}",
                )
            )
        if vector > 1 and 16 * vector >= shape.outputs:
            found.append(
                Violation("wasted", f"vector={vector} covers {_WARP * vector} outputs of {shape.outputs}")
            )
        if segment > _SORT_THREADS * items:
            found.append(Violation("wasted", f"segment={segment} is longer than a chunk"))
        need, most = self._shared_memory(problem, parameters), device.shared_memory_per_multiprocessor
        if need > device.shared_memory_per_block or blocks * (need + 1024) > most:
            found.append(
                Violation(
                    "shared_memory",
                    f"{blocks} blocks with segment={segment} need {need} bytes of shared memory each, "
                    f"{device.name} has {device.shared_memory_per_block} per block, {most} in all",
                )
            )
        with_input = problem.operation is not Operation.GRAD_TABLE
        with_table = problem.operation is not Operation.GRAD_INPUT
        asked = 2 * unroll * _VALUE_BYTES[problem.table] / 4
        kept = (asked + 4 * with_table + 3 * with_input) * vector + 2 * unroll * with_input
        # addresses and weights; before sm_90 additions are single, each with an address of its own
        kept += 24 if device.compute_capability >= 90 else 40
        limit = min(255, _REGISTERS // (blocks * _WARP * _warps(problem, vector)))
        if kept > limit:
            found.append(
                Violation(
                    "registers",
                    f"{blocks} blocks leave {limit} registers a thread, vector={vector} and unroll={unroll} "
                    f"need about {kept}",
                )
            )
        return found

    @staticmethod
    def _scratch(problem: Problem, items: int, vector: int) -> int:
        """Bytes of one chunk's records and transposed gradients (packed tables come on top)."""
        shape = problem.shape
        return (
            _SORT_THREADS
            * items
            * (_RECORD_BYTES * shape.pairs + _VALUE_BYTES[problem.table] * _padded(shape.outputs, vector))
        )

    @staticmethod
    def _shared_memory(problem: Problem, parameters: Parameters) -> int:
        """Bytes of a walking block: staged records, and for input gradients two numbers a sample and warp."""
        _, segment, vector, _, _ = _values(parameters)
        warps = _warps(problem, vector)
        records = warps // _out_warps(problem, vector) * segment * _RECORD_BYTES
        return records + (problem.operation is not Operation.GRAD_TABLE) * warps * segment * 8

    def default(self, problem: Problem) -> Parameters | None:
        """Wide lanes, chunks whose gradients stay in cache, segments short enough to fill the device."""
        shape = problem.shape
        # finer grids need more samples in a chunk for runs of equal cells
        sizes = (16, 8, 4, 2, 1) if shape.knots > 1000 else (8, 4, 2, 1)
        warps_wanted = 16 * problem.device.multiprocessors
        for vector in (v for v in (8, 4, 2, 1) if v == 1 or 16 * v < shape.outputs):
            runs = shape.pairs * -(-shape.outputs // (_WARP * vector))
            for items in sizes:
                samples = min(shape.batch, items * _SORT_THREADS)
                enough = [s for s in (512, 256, 128, 64) if runs * -(-samples // s) >= warps_wanted]
                for segment in (*enough, 32):
                    parameters = {
                        "items": items,
                        "segment": segment,
                        "vector": vector,
                        "unroll": 2,
                        "blocks": 2,
                    }
                    if not self.violations(problem, parameters):
                        return parameters
        return None

    def spec(self, problem: Problem, parameters: Parameters) -> KernelSpec:
        """See base class."""
        items, segment, vector, unroll, blocks = _values(parameters)
        out_warps = _out_warps(problem, vector)
        return KernelSpec.make(
            "cell_sorted.cu.j2",
            problem.device.arch,
            {
                "operation": str(problem.operation),
                "grids": problem.shape.grids,
                "items": items,
                "segment": segment,
                "vector": vector,
                "unroll": unroll,
                "blocks": blocks,
                "out_warps": out_warps,
                "segments": _warps(problem, vector) // out_warps,
                "shift": _shift(problem.shape.knots),
                "capability": problem.device.compute_capability,
                "table": str(problem.table),
                "strided": int(not problem.is_plain),
                "odd": problem.shape.inputs % 2,
            },
        )

    def plan(self, problem: Problem, parameters: Parameters) -> LaunchPlan:
        """See base class."""
        shape, operation = problem.shape, problem.operation
        items, segment, vector, _, _ = _values(parameters)
        with_table, with_input = operation is not Operation.GRAD_INPUT, operation is not Operation.GRAD_TABLE
        chunk = _SORT_THREADS * items
        padded = _padded(shape.outputs, vector)
        out_warps, warps = _out_warps(problem, vector), _warps(problem, vector)
        out_blocks = -(-padded // (_WARP * vector * out_warps))
        coefficients = padded * shape.knots * shape.pairs
        value_bytes = _VALUE_BYTES[problem.table]
        tiles = (shape.knots, -(-shape.outputs // 32), -(-shape.pairs // 32))
        chunks = max(
            1, min(problem.workspace // self._scratch(problem, items, vector), _MAX_GRID // shape.pairs)
        )
        slab = min(chunk * chunks, -(-shape.batch // chunk) * chunk)
        workspaces = [
            Workspace("records", _RECORD_BYTES * shape.pairs * slab),
            Workspace("rows", value_bytes * padded * (min(slab, shape.batch) + 1)),
        ]
        steps: list[Fill | Launch] = []
        sizes = (shape.pairs, shape.outputs, padded)
        if with_table:
            workspaces.append(Workspace("sums", 4 * coefficients))
            steps.append(Fill("sums"))
        if with_input:
            workspaces.append(Workspace("packed", value_bytes * coefficients))
            # all of the padded outputs are read, so all of them are written
            grid = (shape.knots, padded // 32, -(-shape.pairs // 32))
            steps.append(Launch("lmkan_pack_table", ("table", "packed", *sizes), grid, 256))
            if out_blocks > 1:
                steps.append(Fill("grad_x"))
        batch = (shape.batch,) if problem.is_plain else ()
        buckets = (shape.knots >> _shift(shape.knots)) + 1
        samples_per_block = segment * (warps // out_warps)
        for first in range(0, shape.batch, slab):
            count = min(slab, shape.batch - first)
            chunks = -(-count // chunk)
            steps.append(
                Launch(
                    "lmkan_transpose_gradient",
                    ("grad", "rows", *strides("grad"), shape.outputs, padded, first, count),
                    (-(-(count + 1) // 32), padded // 32, 1),
                    256,
                )
            )
            steps.append(
                Launch(
                    "lmkan_sort_samples",
                    ("x", "borders", "records", *(batch or strides("x")), first, count),
                    (shape.pairs, chunks, 1),
                    _SORT_THREADS,
                    4 * (buckets + shape.grids + 1),
                )
            )
            arguments: list[str | int | Stride] = ["records", "rows"]
            if with_input:
                arguments += ["packed", "borders", "grad_x", *(batch or strides("grad_x")), first]
            if with_table:
                arguments += ["sums"]
            steps.append(
                Launch(
                    f"lmkan_{operation}_walk",
                    (*arguments, padded, count, shape.pairs),
                    (-(-min(chunk, count) // samples_per_block), out_blocks, shape.pairs * chunks),
                    _WARP * warps,
                    self._shared_memory(problem, parameters),
                )
            )
        if with_table:
            steps.append(Launch("lmkan_unpack_table", ("sums", "grad_table", *sizes), tiles, 256))
        return LaunchPlan(tuple(workspaces), tuple(steps))


def _values(parameters: Parameters) -> tuple[int, int, int, int, int]:
    items, segment, vector, unroll, blocks = (
        int(parameters[k]) for k in ("items", "segment", "vector", "unroll", "blocks")
    )
    return items, segment, vector, unroll, blocks


def _out_warps(problem: Problem, vector: int) -> int:
    """Warps of a block that stand side by side along the outputs; blocks of them make up a padded row."""
    warps = _padded(problem.shape.outputs, vector) // (_WARP * vector)
    return warps // -(-warps // _BLOCK_WARPS)


def _warps(problem: Problem, vector: int) -> int:
    """Warps of a walking block."""
    out_warps = _out_warps(problem, vector)
    return _BLOCK_WARPS // out_warps * out_warps


def _padded(outputs: int, vector: int) -> int:
    """Outputs as whole warps, and these as equal blocks."""
    warps = -(-outputs // (_WARP * vector))
    blocks = -(-warps // _BLOCK_WARPS)
    return -(-warps // blocks) * blocks * _WARP * vector


def _shift(knots: int) -> int:
    """Knots per sorting bucket as a power of two: 0 up to a grid of about 90."""
    return (knots // _MAX_BUCKETS).bit_length()


FAMILY = CellSorted()
