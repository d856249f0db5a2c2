"""Cell-sorted CUDA gradients: samples sorted by cell, what belongs to a cell kept in registers.

See the head of ``templates/cell_sorted.cu.j2`` for the idea and what bounds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

from lmkan_gen.families.base import Family, Parameters, Violation
from lmkan_gen.plan import Argument, Constant, Fill, KernelSpec, Launch, LaunchPlan, Workspace, strides
from lmkan_gen.problem import Operation, Problem, TableDtype

_WARP = 32
_SORT_THREADS = 1024
_BLOCK_WARPS = 8
_MAX_BUCKETS = 16384  # counters of a sort, 64 KiB
#: chunks of so many items are so long that not all outputs' gradients may have room
_SLICED_ITEMS = 128
#: pairs that a launch should have, where it cannot have all
_LEAST_PAIRS = 16
_RECORD_BYTES = 16
#: of an output gradient or a coefficient, which are rounded together
_VALUE_BYTES = {TableDtype.FLOAT32: 4, TableDtype.FLOAT16: 2, TableDtype.BFLOAT16: 2}
_REGISTERS = 65536
_MAX_GRID = 65535  # blocks along the second and third axis
#: along the outputs, where lanes get many of them: what a sample costs is shared by its lanes' outputs
_LEAST_LANES = 8
#: of a walk's launch, per multiprocessor: four times what it holds
_ENOUGH_WARPS = 64
#: in a fixed order shorter segments would leave more bytes at their edges than is worth their number
_LEAST_ORDERED_SEGMENT = 64
_SEGMENTS = (16, 32, 64, 128, 256, 512, 1024)


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

        ``items * 1024`` samples are sorted together; as many lanes as it takes, or several warps, walk
        ``segment`` of them, a lane having ``vector`` outputs and asking for ``unroll`` samples at once; a
        multiprocessor holds ``blocks``.
        """
        return {
            "items": (1, 2, 4, 8, 16, 32, 64, 128, 256),
            "segment": _SEGMENTS,
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
        items, segment, vector, unroll, blocks = _values(problem, parameters)
        found = []
        if problem.table is TableDtype.BFLOAT16 and device.compute_capability < 80:
            found.append(
                Violation("architecture", f"bfloat16 needs sm_80 or newer, {device.name} is {device.arch}")
            )
        with_input = problem.operation is not Operation.GRAD_TABLE
        with_table = problem.operation is not Operation.GRAD_INPUT
        # two numbers may be added to zero in any order
        if problem.deterministic and with_input and (beside := _out_blocks(problem, items, vector)) > 2:
            found.append(
                Violation(
                    "deterministic",
                    f"vector={vector} divides outputs among {beside} blocks, which add to the same element "
                    "in an order that varies; at most 2 would do",
                )
            )
        if _ordered(problem) and (need := _sort_memory(problem, items)) > device.shared_memory_per_block:
            found.append(
                Violation(
                    "shared_memory",
                    f"items={items} needs {need} bytes of shared memory to sort in a fixed order, "
                    f"{device.name} has {device.shared_memory_per_block} per block",
                )
            )
        if shape.pairs > _MAX_GRID:
            found.append(Violation("grid", f"{shape.pairs} input pairs, at most {_MAX_GRID} fit a launch"))
        if items > 1 and _SORT_THREADS * items // 2 >= shape.batch:
            found.append(
                Violation(
                    "wasted", f"items={items} sorts {_SORT_THREADS * items} samples, batch {shape.batch}"
                )
            )
        edges = _edge_bytes(problem, items, segment, vector)
        pairs = shape.pairs if _ordered(problem) else min(shape.pairs, _LEAST_PAIRS)
        slices = _out_blocks(problem, items, vector) if items >= _SLICED_ITEMS else 1
        need = _scratch(problem, items, vector, pairs, slices) + edges
        if need > problem.workspace and (items > 1 or edges):
            found.append(
                Violation(
                    "workspace",
                    f"items={items}, segment={segment} needs {need} bytes of scratch memory, "
                    f"the limit is {problem.workspace}",
                )
            )
        if (lanes := _lanes(shape.outputs, vector)) < 2 * unroll * with_input:
            found.append(
                Violation(
                    "lanes", f"vector={vector} leaves {lanes} lanes for sums of {unroll} samples over outputs"
                )
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
        asked = 2 * unroll * _VALUE_BYTES[problem.table] / 4
        kept = (asked + 4 * with_table + 3 * with_input) * vector + 2 * unroll * with_input
        # addresses and weights; before sm_90 additions are single, each with an address of its own
        kept += 24 if device.compute_capability >= 90 else 40
        limit = min(255, _REGISTERS // (blocks * _WARP * _warps(problem, items, vector)))
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
    def _shared_memory(problem: Problem, parameters: Parameters) -> int:
        """Bytes of a walking block: staged records, and for input gradients two numbers a sample and warp."""
        items, segment, vector, _, _ = _values(problem, parameters)
        warps = _warps(problem, items, vector)
        runs = warps * (_WARP // _lanes(problem.shape.outputs, vector))
        records = runs // _out_warps(problem, items, vector) * segment * _RECORD_BYTES
        return records + (problem.operation is not Operation.GRAD_TABLE) * runs * segment * 8

    def default(self, problem: Problem) -> Parameters | None:
        """Wide lanes, chunks whose gradients stay in cache, segments short enough to fill the device."""
        shape = problem.shape
        # finer grids need more samples in a chunk for runs of equal cells
        sizes = tuple(s for s in (64, 32, 16, 8, 4, 2, 1) if s <= 8 or 1000 * s < 16 * shape.knots)
        warps_wanted = 16 * problem.device.multiprocessors
        for vector in (v for v in (8, 4, 2, 1) if v == 1 or _LEAST_LANES * v <= max(shape.outputs, _WARP)):
            runs = shape.pairs * _padded(shape.outputs, vector) // (_WARP * vector)
            for items in sizes:
                samples = min(shape.batch, items * _SORT_THREADS)
                enough = [s for s in (512, 256, 128, 64) if runs * -(-samples // s) >= warps_wanted]
                # in a fixed order, short segments may need more scratch memory than there is
                for segment in (*enough, 32, *(_SEGMENTS if _ordered(problem) else ())):
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
        items, segment, vector, unroll, blocks = _values(problem, parameters)
        out_warps, lanes = _out_warps(problem, items, vector), _lanes(problem.shape.outputs, vector)
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
                "lanes": lanes,
                "segments": _warps(problem, items, vector) // out_warps * (_WARP // lanes),
                "shift": _shift(problem),
                "capability": problem.device.compute_capability,
                "table": str(problem.table),
                "strided": int(not problem.is_plain),
                "odd": problem.shape.inputs % 2,
                "deterministic": int(_ordered(problem)),
            },
        )

    def plan(self, problem: Problem, parameters: Parameters) -> LaunchPlan:
        """See base class."""
        shape, operation = problem.shape, problem.operation
        items, segment, vector, _, _ = _values(problem, parameters)
        with_table, with_input = operation is not Operation.GRAD_INPUT, operation is not Operation.GRAD_TABLE
        ordered = _ordered(problem)
        chunk = _SORT_THREADS * items
        padded = _padded(shape.outputs, vector)
        out_warps, warps = _out_warps(problem, items, vector), _warps(problem, items, vector)
        out_blocks = _out_blocks(problem, items, vector)
        coefficients = padded * shape.knots * shape.pairs
        value_bytes = _VALUE_BYTES[problem.table]
        tiles = (shape.knots, -(-shape.outputs // 32), -(-shape.pairs // 32))
        division = _divide(problem, parameters)
        slab = min(chunk * division.slab, -(-shape.batch // chunk) * chunk)
        width = padded // division.slices
        workspaces = [
            Workspace("records", _RECORD_BYTES * division.pairs * slab),
            Workspace("gradients", value_bytes * width * (min(slab, shape.batch) + 1)),
        ]
        steps: list[Fill | Launch] = []
        sizes = (shape.pairs, shape.outputs, padded)
        # what has nothing to do with the first slab's samples; the kernels of either overlap
        first_steps: list[Fill | Launch] = []
        if with_table:
            workspaces.append(Workspace("sums", 4 * coefficients * division.copies * division.planes))
            first_steps.append(Fill("sums"))
        if ordered:
            together = min(division.together, -(-shape.batch // chunk))
            edges = _edge_bytes(problem, items, segment, vector) * together
            workspaces.append(Workspace("edges", edges))
        if with_input:
            workspaces.append(Workspace("packed", value_bytes * coefficients))
            # all of the padded outputs are read, so all of them are written
            grid = (shape.knots, padded // 32, -(-shape.pairs // 32))
            if out_blocks > 1:
                first_steps.append(Fill("grad_x"))
            first_steps.append(Launch("lmkan_pack_table", ("table", "packed", *sizes), grid, 256))
        batch = (shape.batch,) if problem.is_plain else ()
        samples_per_block = segment * (warps // out_warps) * (_WARP // _lanes(shape.outputs, vector))
        parts = product(
            range(0, shape.batch, slab), range(0, shape.pairs, division.pairs), range(0, padded, width)
        )
        for first, first_pair, first_out in parts:
            count, pairs = min(slab, shape.batch - first), min(division.pairs, shape.pairs - first_pair)
            chunks = -(-count // chunk)
            reused = int(bool(steps))
            if first_out == 0:
                samples = (*(batch or strides("x")), first, count, first_pair, shape.pairs)
                steps.append(
                    Launch(
                        "lmkan_sort_samples",
                        ("x", "borders", "records", *samples, reused),
                        (pairs, chunks, 1),
                        _SORT_THREADS,
                        _sort_memory(problem, items),
                    )
                )
            if first_pair == 0 or division.slices > 1:
                part = (shape.outputs, width, first_out, first, count)
                steps.append(
                    Launch(
                        "lmkan_transpose_gradient",
                        ("grad", "gradients", *strides("grad"), *part, reused),
                        (-(-(count + 1) // 32), width // 32, 1),
                        256,
                    )
                )
            if not reused:
                steps += first_steps
            for skipped in range(0, chunks, division.together):
                walked = min(division.together, chunks - skipped)
                arguments: list[Argument] = ["records", "gradients"]
                if with_input:
                    arguments += ["packed", "borders", "grad_x", *(batch or strides("grad_x")), first]
                if with_table:
                    arguments += ["sums"]
                copy = 0 if division.planes > 1 else first // chunk + skipped
                upper = (shape.grids + 1) * padded + (division.planes - 1) * coefficients
                where = (
                    skipped,
                    copy,
                    division.planes * coefficients,
                    upper,
                    _edges(problem, items, segment),
                )
                if ordered:
                    arguments += ["edges", *where]
                steps.append(
                    Launch(
                        f"lmkan_{operation}_walk",
                        (*arguments, first_pair, shape.pairs, width, first_out, padded, count, pairs),
                        (
                            -(-min(chunk, count) // samples_per_block),
                            out_blocks // division.slices,
                            pairs * walked,
                        ),
                        _WARP * warps,
                        self._shared_memory(problem, parameters),
                    )
                )
                if ordered and edges:
                    steps.append(
                        Launch(
                            "lmkan_add_edges",
                            ("records", "edges", "sums", *where, padded, count),
                            (-(-padded // 128), shape.pairs, walked),
                            128,
                        )
                    )
        if with_table:
            copies = (division.copies * division.planes,) if ordered else ()
            steps.append(Launch("lmkan_unpack_table", ("sums", "grad_table", *sizes, *copies), tiles, 256))
        return LaunchPlan(tuple(workspaces), tuple(steps))


@dataclass(frozen=True)
class _Division:
    """How chunks follow each other.

    Attributes:
        pairs: that are sorted by one launch, and need scratch memory at the same time: all of them, or some.
        slab: chunks, likewise.
        together: chunks that are walked by one launch.
        slices: of the outputs, walked one after the other.
        copies: of the sums. Several only in a fixed order, where chunks of one launch have one each.
        planes: 2 where lower and upper corners have sums of their own, else 1.
    """

    pairs: int
    slab: int
    together: int
    slices: int = 1
    copies: int = 1
    planes: int = 1


def _divide(problem: Problem, parameters: Parameters) -> _Division:
    """As many chunks at a time as the workspace holds; in a fixed order, copies of the sums in it as well.

    Where it does not hold one chunk, of that as many pairs, beside all outputs or slices of them.
    """
    shape, limit = problem.shape, problem.workspace
    items, segment, vector, _, _ = _values(problem, parameters)
    most = max(1, _MAX_GRID // shape.pairs)
    scratch = _scratch(problem, items, vector, shape.pairs)
    if not _ordered(problem):
        if scratch > limit:
            blocks = _out_blocks(problem, items, vector) if items >= _SLICED_ITEMS else 1
            # samples of a slice and records should both have half of it
            fits = (
                s
                for s in range(1, blocks)
                if blocks % s == 0 and 2 * _scratch(problem, items, vector, 0, s) <= limit
            )
            slices = next(fits, blocks)
            left = limit - _scratch(problem, items, vector, 0, slices)
            slabs = -(-shape.pairs // max(1, left // (_SORT_THREADS * items * _RECORD_BYTES)))
            return _Division(-(-shape.pairs // slabs), 1, 1, slices)
        slab = max(1, min(limit // scratch, most))
        return _Division(shape.pairs, slab, slab)
    padded = _padded(shape.outputs, vector)
    sums, edges = 4 * padded * shape.knots * shape.pairs, _edge_bytes(problem, items, segment, vector)
    chunks = -(-shape.batch // (_SORT_THREADS * items))
    # of one chunk; a launch should have enough of them for its last ones not to matter
    warps = -(-shape.pairs * (_edges(problem, items, segment) + 1) * padded // (_WARP * vector))
    enough = _ENOUGH_WARPS * problem.device.multiprocessors
    # two copies, or planes, are allowed for: they are needed where there are several chunks
    beside = max(0, chunks - 2) * sums
    if chunks <= 2 or (chunks * warps <= 2 * enough and beside + scratch + edges <= limit):
        slab = max(1, min((limit - beside) // (scratch + edges), most))
        return _Division(shape.pairs, slab, slab, copies=chunks)
    together = max(1, min(enough // warps, most))
    while together > 1 and 2 * (together - 1) * sums + together * (scratch + edges) > limit:
        together -= 1
    left = limit - 2 * (together - 1) * sums - together * edges
    slab = max(1, min(left // scratch, most) // together) * together
    return _Division(shape.pairs, slab, together, copies=together, planes=2)


def _ordered(problem: Problem) -> bool:
    """Whether sums over samples need a fixed order. Input gradients have none of those."""
    return problem.deterministic and problem.operation is not Operation.GRAD_INPUT


def _edges(problem: Problem, items: int, segment: int) -> int:
    """Segments of a chunk that have another one before them."""
    return -(-min(problem.shape.batch, _SORT_THREADS * items) // segment) - 1


def _edge_bytes(problem: Problem, items: int, segment: int, vector: int) -> int:
    """Bytes of a chunk's edges: sums of four corners for each; none where no order is asked for."""
    if not _ordered(problem):
        return 0
    shape = problem.shape
    return 16 * _padded(shape.outputs, vector) * shape.pairs * _edges(problem, items, segment)


def _sort_memory(problem: Problem, items: int) -> int:
    """Bytes of dynamic shared memory of a sorting block."""
    grids = problem.shape.grids
    if not _ordered(problem):
        return 4 * ((problem.shape.knots >> _shift(problem)) + 1 + grids + 1)
    counts = _SORT_THREADS // _WARP * (grids | 1)
    # beside the counts: totals, knots, and two 16-bit numbers a sample
    return 4 * (counts + grids + grids + 1 + _SORT_THREADS * items)


def _scratch(problem: Problem, items: int, vector: int, pairs: int, slices: int = 1) -> int:
    """Bytes of one chunk's records, of so many pairs, and a slice's gradients (packed tables on top)."""
    gradients = _VALUE_BYTES[problem.table] * _padded(problem.shape.outputs, vector) // slices
    return _SORT_THREADS * items * (_RECORD_BYTES * pairs + gradients)


def _values(problem: Problem, parameters: Parameters) -> tuple[int, int, int, int, int]:
    """Items, segment, vector, unroll, blocks."""
    items, segment, vector, unroll, blocks = (
        int(parameters[k]) for k in ("items", "segment", "vector", "unroll", "blocks")
    )
    if _ordered(problem):
        segment = max(segment, _LEAST_ORDERED_SEGMENT)
    return items, segment, vector, unroll, blocks


def _lanes(outputs: int, vector: int) -> int:
    """Lanes of a warp that stand side by side along the outputs, a power of two."""
    enough = 1 << (-(-outputs // vector) - 1).bit_length()
    return min(_WARP, max(enough, _WARP // vector))


def _out_warps(problem: Problem, items: int, vector: int) -> int:
    """Warps of a block that stand side by side along the outputs; blocks of them make up a padded row.

    One where chunks are so long that outputs may have to be divided into slices, of whole blocks.
    """
    if items >= _SLICED_ITEMS:
        return 1
    warps = max(1, _padded(problem.shape.outputs, vector) // (_WARP * vector))
    return warps // -(-warps // _BLOCK_WARPS)


def _out_blocks(problem: Problem, items: int, vector: int) -> int:
    """Blocks that stand side by side along the outputs."""
    return -(-_padded(problem.shape.outputs, vector) // (_WARP * vector * _out_warps(problem, items, vector)))


def _warps(problem: Problem, items: int, vector: int) -> int:
    """Warps of a walking block."""
    out_warps = _out_warps(problem, items, vector)
    return _BLOCK_WARPS // out_warps * out_warps


def _padded(outputs: int, vector: int) -> int:
    """Outputs as whole warps, and these as equal blocks; or as part of a warp."""
    if (lanes := _lanes(outputs, vector)) < _WARP:
        return lanes * vector
    warps = -(-outputs // (_WARP * vector))
    blocks = -(-warps // _BLOCK_WARPS)
    return -(-warps // blocks) * blocks * _WARP * vector


def _shift(problem: Problem) -> int:
    """Knots per sorting bucket as a power of two: 0 up to a grid of 126, if shared memory has room for it."""
    room = problem.device.shared_memory_per_block // 4 - problem.shape.grids - 256
    return (problem.shape.knots // max(1024, min(_MAX_BUCKETS, room))).bit_length()


FAMILY = CellSorted()
