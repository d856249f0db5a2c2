"""What kernels with a sample per lane share: words of tables, the pre-pass, and samples too far for int8.

For the families whose templates include ``tile.cuh.j2`` and ``coordinates.cuh.j2``; what concerns a
table's words and buffers, for others as well.
"""

from __future__ import annotations

from lmkan_gen.packing import SCALE_PAIRS, WEIGHT_ONE
from lmkan_gen.plan import Argument, Constant, Launch, Stride, Workspace, strides
from lmkan_gen.problem import Operation, Problem, TableDtype

WARP = 32
_THREADS = 256  # of a block of the pre-pass, and of the pass over far samples


def pack(problem: Problem) -> int:
    """Outputs whose values share a 32-bit word of the table."""
    return 2 if problem.table in (TableDtype.FLOAT16, TableDtype.BFLOAT16) else 1


def rows(problem: Problem) -> int:
    """Rows of words in a table: one per knot, or per cell where a word holds a cell's corners."""
    return problem.shape.grids**2 if problem.table is TableDtype.INT8 else problem.shape.knots


def table_buffers(problem: Problem) -> tuple[str, ...]:
    """The names of the table's parts."""
    parts = {TableDtype.FLOAT32: ("table",), TableDtype.INT8: ("words", "scales")}
    return parts.get(problem.table, ("words",))


def is_partial(problem: Problem, pairs: int, outs: int) -> bool:
    """Whether some tiles of so many pairs and outputs reach beyond the layer's inputs or outputs."""
    return bool(problem.shape.inputs % (2 * pairs) or problem.shape.outputs % outs)


def tiles(problem: Problem, pairs: int, outs: int) -> tuple[int, int]:
    """Parts of the result that have a sum of their own, and tiles of so many pairs and outputs in each."""
    pair_tiles, out_tiles = -(-problem.shape.pairs // pairs), -(-problem.shape.outputs // outs)
    match problem.operation:
        case Operation.FORWARD:
            return out_tiles, pair_tiles
        case Operation.GRAD_INPUT:
            return pair_tiles, out_tiles
        case _:
            return out_tiles * pair_tiles, 1


def half_rows(problem: Problem, pairs: int, outs: int) -> bool:
    """Whether a row of so many pairs and outputs takes half of the banks, so that two knots share them."""
    return 2 * pairs * outs // pack(problem) == WARP


def layout(problem: Problem) -> tuple[Stride, ...]:
    """What kernels are told of how ``x`` lies: nothing where that needs no care."""
    return () if problem.is_plain else strides("x")


def constants(problem: Problem, pairs: int, outs: int, vector: int = 1) -> dict[str, Constant]:
    """Constants of the shared templates, for tiles of so many pairs and outputs, ``vector`` words a read."""
    return {
        "operation": str(problem.operation),
        "grids": problem.shape.grids,
        "pairs": pairs,
        "outs": outs,
        "partial": int(is_partial(problem, pairs, outs)),
        "vector": vector,
        "half_rows": int(half_rows(problem, pairs, outs)),
        "table": str(problem.table),
        "scale_pairs": SCALE_PAIRS,
        "weight_one": WEIGHT_ONE,
        "strided": int(not problem.is_plain),
        "odd": problem.shape.inputs % 2,
    }


def prepass(problem: Problem, pairs: int, spare: int) -> tuple[list[Workspace], Launch]:
    """Buffers and launch of the pre-pass: coordinates in tiles of so many pairs, and marks of far samples.

    Args:
        problem: what is computed.
        pairs: in a tile.
        spare: units of 32 samples behind the last coordinates, which loads that run ahead read in vain.
    """
    shape = problem.shape
    jobs = -(-shape.pairs // pairs) * -(-shape.batch // WARP)
    workspaces = [Workspace("coordinates", 8 * pairs * WARP * (jobs + spare))]
    marks: tuple[str, ...] = ("far",) if problem.table is TableDtype.INT8 else ()
    workspaces.extend(Workspace(name, 4 * jobs) for name in marks)
    blocks = min(-(-(jobs + spare) // (_THREADS // WARP)), 16 * problem.device.multiprocessors)
    sizes = (shape.batch, shape.pairs)
    arguments: tuple[Argument, ...] = ("x", "borders", "coordinates", *marks, *sizes, *layout(problem))
    return workspaces, Launch("lmkan_coordinates", arguments, (blocks, 1, 1), _THREADS)


def far_samples(problem: Problem) -> list[Launch]:
    """The pass over samples that the pre-pass marked; none unless tables are int8."""
    if problem.table is not TableDtype.INT8:
        return []
    shape = problem.shape
    blocks = min(-(-shape.batch // _THREADS), 8 * problem.device.multiprocessors)
    sizes = (shape.batch, shape.pairs, shape.outputs)
    parts = table_buffers(problem)
    arguments: tuple[Argument, ...] = ("x", "borders", *parts, "far", "y", *sizes, *layout(problem))
    return [Launch("lmkan_far_samples", arguments, (blocks, 1, 1), _THREADS)]
