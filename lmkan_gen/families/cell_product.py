"""Gradients with half operands on tensor cores: samples sorted by cell, cells as matrix products.

See the head of ``templates/cell_product.cu.j2`` for the idea and what bounds it.
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

_RESERVED = 1024  # bytes of shared memory of each block: the driver's
_STEP = 16  # samples
_FEW = 4096  # samples
_SEGMENTS = (64, 128, 256, 512, 1024)


class CellProduct(Family):
    """Gradients from float16 and bfloat16 operands; any grid, any width."""

    name = "cell_product"
    device_kind = "cuda"
    operations = frozenset({Operation.GRAD_INPUT, Operation.GRAD_TABLE, Operation.BACKWARD})
    idea = "half operands: samples sorted by cell, a window of cells at a time as products on tensor cores"

    def computes(self, operation: Operation, table: TableDtype) -> bool:
        """See base class."""
        return operation in self.operations and table in (TableDtype.FLOAT16, TableDtype.BFLOAT16)

    def space(self, operation: Operation) -> Mapping[str, tuple[Constant, ...]]:
        """See base class.

        ``items * 1024`` samples are sorted together; warps walk ``segment`` of them for ``32 * vector``
        outputs each; gradients of 16 samples at a time are copied ``stages - 1`` steps ahead; a
        multiprocessor holds ``blocks``.
        """
        return {
            "items": (1, 2, 4, 8, 16, 32, 64, 128, 256),
            "segment": _SEGMENTS,
            "vector": (1, 2, 4, 8),
            "stages": (2, 3, 4),
            "blocks": (1, 2, 3, 4),
        }

    def preference(self, problem: Problem) -> float:
        """Before the same without tensor cores; with few samples input gradients by tiles are faster."""
        few = problem.operation is Operation.GRAD_INPUT and problem.shape.batch < _FEW
        return -0.5 if few else 1.0

    @staticmethod
    def _shared_memory(walk: cells.Walk, stages: int) -> int:
        """Bytes of a walking block: records, slopes, and of each warp the gradients of some steps."""
        gradients = cells.VALUE_BYTES[walk.layer.table] * WARP * walk.vector * _STEP
        return walk.walk_memory + walk.warps * stages * gradients

    def broken(self, layer: Layer, parameters: Parameters) -> Iterator[Violation]:
        """See base class."""
        device = layer.device
        if device.compute_capability < 80:
            why = f"products of half operands need sm_80 or newer, {device.name} is {device.arch}"
            yield Violation("architecture", why)
            return
        walk = cells.Walk.with_parameters(layer, parameters)
        yield from walk.violations()
        if walk.ordered:
            yield Violation("deterministic", "segments add to the same coefficients in an order that varies")
        if walk.lanes < WARP:
            yield Violation(
                "tile",
                f"vector={walk.vector} gives a warp {WARP * walk.vector} outputs, "
                f"of {layer.shape.outputs} it would have half or less",
            )
        _, stages, blocks = _values(layer, parameters)
        need, most = self._shared_memory(walk, stages), device.shared_memory_per_multiprocessor
        if need > device.shared_memory_per_block or blocks * (need + _RESERVED) > most:
            yield Violation(
                "shared_memory",
                f"{blocks} blocks with segment={walk.segment}, vector={walk.vector} and stages={stages} "
                f"need {need} bytes of shared memory each, {device.name} has "
                f"{device.shared_memory_per_block} per block, {most} in all",
            )
        # sums and coefficients of a window; records, addresses and weights
        kept = (8 * walk.with_table + 4 * walk.with_input) * walk.vector + 50
        limit = registers_per_thread(blocks * WARP * walk.warps)
        if kept > limit:
            yield Violation(
                "registers",
                f"{blocks} blocks leave {limit} registers a thread, vector={walk.vector} needs about {kept}",
            )

    def batch_violations(self, problem: Problem, parameters: Parameters) -> list[Violation]:
        """See base class."""
        walk = cells.Walk.with_parameters(problem.layer, parameters)
        return walk.batch_violations(problem.shape.batch)

    def default(self, problem: Problem) -> Parameters | None:
        """Wide warps, chunks whose gradients stay in cache, segments short enough to fill the device."""
        return cells.first(_guesses(problem.layer), problem.shape.batch)

    def guesses(self, layer: Layer) -> Iterator[cells.Guess]:
        """Candidates for the default, the best first."""
        # finer grids need more samples in a chunk for windows to have steps of them
        knots = layer.shape.knots
        sizes = tuple(s for s in (256, 128, 64, 32, 16, 8, 4, 2, 1) if s <= 16 or 350 * s < 16 * knots)
        for vector, items, segment in product((4, 2, 1), sizes, (512, 256, 128, 64)):
            walk = cells.Walk.of(layer, items, vector, segment)
            for blocks in (2, 1):
                parameters = {"items": items, "segment": segment, "vector": vector, "stages": 2}
                parameters["blocks"] = blocks
                if not self.layer_violations(layer, parameters):
                    yield cells.Guess(parameters, walk, filling=segment > 64)
                    break

    def layer_spec(self, layer: Layer, parameters: Parameters) -> KernelSpec:
        """See base class."""
        walk, stages, blocks = _values(layer, parameters)
        constants = {**walk.constants(), "stages": stages, "blocks": blocks}
        return KernelSpec.make("cell_product.cu.j2", layer.device.arch, constants)

    def plan(self, problem: Problem, parameters: Parameters) -> LaunchPlan:
        """See base class."""
        walk, stages, _ = _values(problem.layer, parameters)
        return walk.plan(problem.shape.batch, self._shared_memory(walk, stages))


def _values(layer: Layer, parameters: Parameters) -> tuple[cells.Walk, int, int]:
    """The walk, its stages, and blocks of a multiprocessor."""
    walk = cells.Walk.with_parameters(layer, parameters)
    return walk, int(parameters["stages"]), int(parameters["blocks"])


FAMILY = CellProduct()


@lru_cache(maxsize=1024)
def _guesses(layer: Layer) -> tuple[cells.Guess, ...]:
    return tuple(FAMILY.guesses(layer))
