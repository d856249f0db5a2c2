"""Cell-sorted CUDA gradients: samples sorted by cell, what belongs to a cell kept in registers.

See the head of ``templates/cell_sorted.cu.j2`` for the idea and what bounds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import product

from lmkan_gen.device import registers_per_thread
from lmkan_gen.families import cells
from lmkan_gen.families.base import Family, Parameters, Violation
from lmkan_gen.families.lanes import WARP
from lmkan_gen.plan import Constant, KernelSpec, LaunchPlan
from lmkan_gen.problem import Layer, Operation, Problem, TableDtype

#: along the outputs, where lanes get many of them: what a sample costs is shared by its lanes' outputs
_LEAST_LANES = 8
_SEGMENTS = (16, 32, 64, 128, 256, 512, 1024)


class CellSorted(Family):
    """Gradients with samples sorted by cell; any grid, any width."""

    name = "cell_sorted"
    device_kind = "cuda"
    operations = frozenset({Operation.GRAD_INPUT, Operation.GRAD_TABLE, Operation.BACKWARD})
    idea = "samples sorted by cell, a warp walks a run with the cell's corners in registers"

    def computes(self, operation: Operation, table: TableDtype) -> bool:
        """See base class."""
        return operation in self.operations and table in cells.VALUE_BYTES

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
        return {Operation.BACKWARD: 0.9, Operation.GRAD_INPUT: -1.0}.get(problem.operation, 0.0)

    def broken(self, layer: Layer, parameters: Parameters) -> Iterator[Violation]:
        """See base class."""
        device = layer.device
        walk = cells.Walk.with_parameters(layer, parameters)
        yield from walk.violations()
        _, unroll, blocks = _values(layer, parameters)
        if walk.lanes < 2 * unroll * walk.with_input:
            yield Violation(
                "lanes",
                f"vector={walk.vector} leaves {walk.lanes} lanes for sums of {unroll} samples over outputs",
            )
        need, most = walk.walk_memory, device.shared_memory_per_multiprocessor
        if need > device.shared_memory_per_block or blocks * (need + 1024) > most:
            yield Violation(
                "shared_memory",
                f"{blocks} blocks with segment={walk.segment} need {need} bytes of shared memory each, "
                f"{device.name} has {device.shared_memory_per_block} per block, {most} in all",
            )
        asked = 2 * unroll * cells.VALUE_BYTES[layer.table] / 4
        kept = (
            asked + 4 * walk.with_table + 3 * walk.with_input
        ) * walk.vector + 2 * unroll * walk.with_input
        # addresses and weights; before sm_90 additions are single, each with an address of its own
        kept += 24 if device.compute_capability >= 90 else 40
        limit = registers_per_thread(blocks * WARP * walk.warps)
        if kept > limit:
            yield Violation(
                "registers",
                f"{blocks} blocks leave {limit} registers a thread, vector={walk.vector} and "
                f"unroll={unroll} need about {kept}",
            )

    def batch_violations(self, problem: Problem, parameters: Parameters) -> list[Violation]:
        """See base class."""
        walk = cells.Walk.with_parameters(problem.layer, parameters)
        return walk.batch_violations(problem.shape.batch)

    def default(self, problem: Problem) -> Parameters | None:
        """Wide lanes, chunks whose gradients stay in cache, segments short enough to fill the device."""
        return cells.first(_guesses(problem.layer), problem.shape.batch)

    def guesses(self, layer: Layer) -> Iterator[cells.Guess]:
        """Candidates for the default, the best first."""
        shape = layer.shape
        # finer grids need more samples in a chunk for runs of equal cells
        sizes = tuple(s for s in (64, 32, 16, 8, 4, 2, 1) if s <= 8 or 1000 * s < 16 * shape.knots)
        outputs = max(shape.outputs, WARP)
        vectors = tuple(v for v in (8, 4, 2, 1) if v == 1 or _LEAST_LANES * v <= outputs)
        filling = [(segment, True) for segment in (512, 256, 128, 64)]
        for vector, items in product(vectors, sizes):
            # in a fixed order, short segments may need more scratch memory than there is
            ordered = cells.Walk.of(layer, items, vector, WARP).ordered
            others = [(segment, False) for segment in (32, *(_SEGMENTS if ordered else ()))]
            for segment, fills in (*filling, *others):
                walk = cells.Walk.of(layer, items, vector, segment)
                parameters = {"items": items, "segment": segment, "vector": vector, "unroll": 2, "blocks": 2}
                if not self.layer_violations(layer, parameters):
                    yield cells.Guess(parameters, walk, fills)

    def layer_spec(self, layer: Layer, parameters: Parameters) -> KernelSpec:
        """See base class."""
        walk, unroll, blocks = _values(layer, parameters)
        constants = {**walk.constants(), "unroll": unroll, "blocks": blocks, "lanes": walk.lanes}
        return KernelSpec.make("cell_sorted.cu.j2", layer.device.arch, constants)

    def plan(self, problem: Problem, parameters: Parameters) -> LaunchPlan:
        """See base class."""
        walk, _, _ = _values(problem.layer, parameters)
        return walk.plan(problem.shape.batch, walk.walk_memory)


def _values(layer: Layer, parameters: Parameters) -> tuple[cells.Walk, int, int]:
    """The walk, samples asked for together, and blocks of a multiprocessor."""
    walk = cells.Walk.with_parameters(layer, parameters)
    return walk, int(parameters["unroll"]), int(parameters["blocks"])


FAMILY = CellSorted()


@lru_cache(maxsize=1024)
def _guesses(layer: Layer) -> tuple[cells.Guess, ...]:
    return tuple(FAMILY.guesses(layer))
