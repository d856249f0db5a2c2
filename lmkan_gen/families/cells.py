"""What kernels that walk samples in the order of their cells share: how work is divided, and launches.

For the families whose templates include ``cells.cuh.j2``. Samples of an input pair are sorted by cell, a
chunk at a time; then warps walk segments of sorted samples, one warp or several beside each other along the
outputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from typing import NamedTuple

from lmkan_gen.families.base import Parameters, Violation
from lmkan_gen.families.lanes import WARP
from lmkan_gen.plan import Argument, Constant, Fill, Launch, LaunchPlan, Workspace, strides
from lmkan_gen.problem import Layer, Operation, TableDtype

_SORT_THREADS = 1024
#: of an output gradient or a coefficient, which are rounded together
VALUE_BYTES = {TableDtype.FLOAT32: 4, TableDtype.FLOAT16: 2, TableDtype.BFLOAT16: 2}
_RECORD_BYTES = 16
_BLOCK_WARPS = 8
_MAX_BUCKETS = 16384  # counters of a sort, 64 KiB
#: chunks of so many items are so long that not all outputs' gradients may have room
_SLICED_ITEMS = 128
#: pairs that a launch should have, where it cannot have all
_LEAST_PAIRS = 16
_MAX_GRID = 65535  # blocks along the second and third axis
#: of a walk's launch, per multiprocessor: four times what it holds
_ENOUGH_WARPS = 64
#: in a fixed order shorter segments would leave more bytes at their edges than is worth their number
_LEAST_ORDERED_SEGMENT = 64


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


@dataclass(frozen=True)
class Walk:
    """How the samples of a layer are walked.

    Attributes:
        layer: what is computed, for any batch.
        items: samples that are sorted together, in units of 1024.
        vector: outputs of a lane.
        asked_segment: sorted samples that a warp should walk.
    """

    layer: Layer
    items: int
    vector: int
    asked_segment: int

    @staticmethod
    @lru_cache(4096)
    def of(layer: Layer, items: int, vector: int, asked_segment: int) -> Walk:
        """The same, with what it has found out about itself if it was asked for before."""
        return Walk(layer, items, vector, asked_segment)

    @staticmethod
    def with_parameters(layer: Layer, parameters: Parameters) -> Walk:
        """The walk of a family's parameters."""
        items, vector, segment = parameters["items"], parameters["vector"], parameters["segment"]
        return Walk.of(layer, int(items), int(vector), int(segment))

    @cached_property
    def with_table(self) -> bool:
        """Whether the table's gradient is computed."""
        return self.layer.operation is not Operation.GRAD_INPUT

    @cached_property
    def with_input(self) -> bool:
        """Whether the input's gradient is computed."""
        return self.layer.operation is not Operation.GRAD_TABLE

    @cached_property
    def ordered(self) -> bool:
        """Whether sums over samples need a fixed order. Input gradients have none of those."""
        return self.layer.deterministic and self.with_table

    @cached_property
    def segment(self) -> int:
        """Sorted samples that a warp walks."""
        return max(self.asked_segment, _LEAST_ORDERED_SEGMENT) if self.ordered else self.asked_segment

    @cached_property
    def chunk(self) -> int:
        """Samples that are sorted together."""
        return _SORT_THREADS * self.items

    @cached_property
    def lanes(self) -> int:
        """Lanes of a warp that stand side by side along the outputs, a power of two."""
        enough = 1 << (-(-self.layer.shape.outputs // self.vector) - 1).bit_length()
        return min(WARP, max(enough, WARP // self.vector))

    @cached_property
    def padded(self) -> int:
        """Outputs as whole warps, and these as equal blocks; or as part of a warp."""
        if self.lanes < WARP:
            return self.lanes * self.vector
        warps = -(-self.layer.shape.outputs // (WARP * self.vector))
        blocks = -(-warps // _BLOCK_WARPS)
        return -(-warps // blocks) * blocks * WARP * self.vector

    @cached_property
    def out_warps(self) -> int:
        """Warps of a block that stand side by side along the outputs; blocks of them make up a padded row.

        One where chunks are so long that outputs may have to be divided into slices, of whole blocks.
        """
        if self.items >= _SLICED_ITEMS:
            return 1
        warps = max(1, self.padded // (WARP * self.vector))
        return warps // -(-warps // _BLOCK_WARPS)

    @cached_property
    def out_blocks(self) -> int:
        """Blocks that stand side by side along the outputs."""
        return -(-self.padded // (WARP * self.vector * self.out_warps))

    @cached_property
    def warps(self) -> int:
        """Warps of a walking block."""
        return _BLOCK_WARPS // self.out_warps * self.out_warps

    @cached_property
    def segments(self) -> int:
        """Segments of a walking block."""
        return self.warps // self.out_warps * (WARP // self.lanes)

    def is_filling(self, batch: int) -> bool:
        """Whether segments are short enough to leave enough warps for every multiprocessor."""
        segments = -(-min(batch, self.chunk) // self.asked_segment)
        return self._runs * segments >= 16 * self.layer.device.multiprocessors

    @cached_property
    def _runs(self) -> int:
        """Warps that walk one segment of every pair."""
        return self.layer.shape.pairs * self.padded // (WARP * self.vector)

    @cached_property
    def shift(self) -> int:
        """Knots per sorting bucket as a power of two: 0 up to a grid of 126, if shared memory has room."""
        shape, device = self.layer.shape, self.layer.device
        room = device.shared_memory_per_block // 4 - shape.grids - 256
        return (shape.knots // max(1024, min(_MAX_BUCKETS, room))).bit_length()

    @cached_property
    def walk_memory(self) -> int:
        """Bytes of shared memory of a block's records, and of slopes: two numbers a sample and warp."""
        slopes = 8 * self.out_warps * self.with_input
        return self.segments * self.segment * (_RECORD_BYTES + slopes)

    def _edges(self, batch: int) -> int:
        """Segments of a chunk that have another one before them."""
        return -(-min(batch, self.chunk) // self.segment) - 1

    def _edge_bytes(self, batch: int) -> int:
        """Bytes of a chunk's edges: sums of four corners for each; none where no order is asked for."""
        if not self.ordered:
            return 0
        return 16 * self.padded * self.layer.shape.pairs * self._edges(batch)

    @cached_property
    def _sort_memory(self) -> int:
        """Bytes of dynamic shared memory of a sorting block."""
        grids = self.layer.shape.grids
        if not self.ordered:
            return 4 * ((self.layer.shape.knots >> self.shift) + 1 + grids + 1)
        counts = _SORT_THREADS // WARP * (grids | 1)
        # beside the counts: totals, knots, and two 16-bit numbers a sample
        return 4 * (counts + grids + grids + 1 + self.chunk)

    def _scratch(self, pairs: int, slices: int = 1) -> int:
        """Bytes of one chunk's records, of so many pairs, and a slice's gradients (packed tables on top)."""
        gradients = VALUE_BYTES[self.layer.table] * self.padded // slices
        return self.chunk * (_RECORD_BYTES * pairs + gradients)

    def violations(self) -> list[Violation]:
        """Why the samples of any batch cannot or should not be walked like this."""
        layer, shape, device = self.layer, self.layer.shape, self.layer.device
        found = []
        if layer.table is TableDtype.BFLOAT16 and device.compute_capability < 80:
            found.append(
                Violation("architecture", f"bfloat16 needs sm_80 or newer, {device.name} is {device.arch}")
            )
        # two numbers may be added to zero in any order
        if layer.deterministic and self.with_input and self.out_blocks > 2:
            found.append(
                Violation(
                    "deterministic",
                    f"vector={self.vector} divides outputs among {self.out_blocks} blocks, which add to the "
                    "same element in an order that varies; at most 2 would do",
                )
            )
        if self.ordered and self._sort_memory > device.shared_memory_per_block:
            found.append(
                Violation(
                    "shared_memory",
                    f"items={self.items} needs {self._sort_memory} bytes of shared memory to sort in a fixed "
                    f"order, {device.name} has {device.shared_memory_per_block} per block",
                )
            )
        if shape.pairs > _MAX_GRID:
            found.append(Violation("grid", f"{shape.pairs} input pairs, at most {_MAX_GRID} fit a launch"))
        if self.segment > self.chunk:
            found.append(Violation("wasted", f"segment={self.segment} is longer than a chunk"))
        return found

    def batch_violations(self, batch: int) -> list[Violation]:
        """Why the samples of this batch cannot or should not be walked like this."""
        items, found = self.items, []
        if items > 1 and self.chunk // 2 >= batch:
            found.append(Violation("wasted", f"items={items} sorts {self.chunk} samples, batch {batch}"))
        edges = self._edge_bytes(batch)
        need, limit = self._least_scratch + edges, self.layer.workspace
        if need > limit and (items > 1 or edges):
            found.append(
                Violation(
                    "workspace",
                    f"items={items}, segment={self.segment} needs {need} bytes of scratch memory, "
                    f"the limit is {limit}",
                )
            )
        return found

    @cached_property
    def _least_scratch(self) -> int:
        """Bytes of a chunk's scratch memory, edges aside, with pairs and outputs divided as far as may be."""
        pairs = self.layer.shape.pairs
        slices = self.out_blocks if self.items >= _SLICED_ITEMS else 1
        return self._scratch(pairs if self.ordered else min(pairs, _LEAST_PAIRS), slices)

    def allows(self, batch: int) -> bool:
        """Whether there are no `batch_violations`."""
        # first what most walks fail by
        return (self.items == 1 or self.chunk // 2 < batch) and not self.batch_violations(batch)

    def constants(self) -> dict[str, Constant]:
        """Constants of the shared templates."""
        layer = self.layer
        return {
            "operation": str(layer.operation),
            "grids": layer.shape.grids,
            "items": self.items,
            "segment": self.segment,
            "vector": self.vector,
            "out_warps": self.out_warps,
            "segments": self.segments,
            "shift": self.shift,
            "capability": layer.device.compute_capability,
            "table": str(layer.table),
            "strided": int(not layer.is_plain),
            "odd": layer.shape.inputs % 2,
            "deterministic": int(self.ordered),
        }

    def _division(self, batch: int) -> _Division:
        """As many chunks at a time as the workspace holds; in a fixed order, copies of the sums as well.

        Where it does not hold one chunk, of that as many pairs, beside all outputs or slices of them.
        """
        if not self.ordered:
            return self._unordered_division
        shape, limit = self.layer.shape, self.layer.workspace
        most = max(1, _MAX_GRID // shape.pairs)
        scratch = self._scratch(shape.pairs)
        sums, edges = 4 * self.padded * shape.knots * shape.pairs, self._edge_bytes(batch)
        chunks = -(-batch // self.chunk)
        # of one chunk; a launch should have enough of them for its last ones not to matter
        warps = -(-shape.pairs * (self._edges(batch) + 1) * self.padded // (WARP * self.vector))
        enough = _ENOUGH_WARPS * self.layer.device.multiprocessors
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

    @cached_property
    def _unordered_division(self) -> _Division:
        """The same for any batch, where sums need no fixed order."""
        shape, limit = self.layer.shape, self.layer.workspace
        most = max(1, _MAX_GRID // shape.pairs)
        scratch = self._scratch(shape.pairs)
        if scratch > limit:
            blocks = self.out_blocks if self.items >= _SLICED_ITEMS else 1
            # samples of a slice and records should both have half of it
            fits = (s for s in range(1, blocks) if blocks % s == 0 and 2 * self._scratch(0, s) <= limit)
            slices = next(fits, blocks)
            left = limit - self._scratch(0, slices)
            slabs = -(-shape.pairs // max(1, left // (self.chunk * _RECORD_BYTES)))
            return _Division(-(-shape.pairs // slabs), 1, 1, slices)
        slab = max(1, min(limit // scratch, most))
        return _Division(shape.pairs, slab, slab)

    def plan(self, batch: int, walk_memory: int) -> LaunchPlan:
        """Sort, bring gradients and tables into rows, walk slab after slab, bring the sums back.

        Args:
            batch: samples, at least 1.
            walk_memory: bytes of shared memory of a walking block.
        """
        layer, shape, operation = self.layer, self.layer.shape, self.layer.operation
        chunk, padded, division = self.chunk, self.padded, self._division(batch)
        coefficients = padded * shape.knots * shape.pairs
        value_bytes = VALUE_BYTES[layer.table]
        tiles = (shape.knots, -(-shape.outputs // 32), -(-shape.pairs // 32))
        slab = min(chunk * division.slab, -(-batch // chunk) * chunk)
        width = padded // division.slices
        workspaces = [
            Workspace("records", _RECORD_BYTES * division.pairs * slab),
            Workspace("gradients", value_bytes * width * (min(slab, batch) + 1)),
        ]
        steps: list[Fill | Launch] = []
        sizes = (shape.pairs, shape.outputs, padded)
        # what has nothing to do with the first slab's samples; the kernels of either overlap
        first_steps: list[Fill | Launch] = []
        if self.with_table:
            workspaces.append(Workspace("sums", 4 * coefficients * division.copies * division.planes))
            first_steps.append(Fill("sums"))
        edges = 0
        if self.ordered:
            edges = self._edge_bytes(batch) * min(division.together, -(-batch // chunk))
            workspaces.append(Workspace("edges", edges))
        if self.with_input:
            workspaces.append(Workspace("packed", value_bytes * coefficients))
            # all of the padded outputs are read, so all of them are written
            grid = (shape.knots, padded // 32, -(-shape.pairs // 32))
            if self.out_blocks > 1:
                first_steps.append(Fill("grad_x"))
            first_steps.append(Launch("lmkan_pack_table", ("table", "packed", *sizes), grid, 256))
        size = (batch,) if layer.is_plain else ()
        samples_per_block = self.segment * self.segments
        slabs = [slab * k for k in range(-(-batch // slab))]
        parts = product(slabs, range(0, shape.pairs, division.pairs), range(0, padded, width))
        for first, first_pair, first_out in parts:
            count, pairs = min(slab, batch - first), min(division.pairs, shape.pairs - first_pair)
            chunks = -(-count // chunk)
            reused = int(bool(steps))
            if first_out == 0:
                samples = (*(size or strides("x")), first, count, first_pair, shape.pairs)
                steps.append(
                    Launch(
                        "lmkan_sort_samples",
                        ("x", "borders", "records", *samples, reused),
                        (pairs, chunks, 1),
                        _SORT_THREADS,
                        self._sort_memory,
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
                if self.with_input:
                    arguments += ["packed", "borders", "grad_x", *(size or strides("grad_x")), first]
                if self.with_table:
                    arguments += ["sums"]
                copy = 0 if division.planes > 1 else first // chunk + skipped
                upper = (shape.grids + 1) * padded + (division.planes - 1) * coefficients
                where = (skipped, copy, division.planes * coefficients, upper, self._edges(batch))
                if self.ordered:
                    arguments += ["edges", *where]
                steps.append(
                    Launch(
                        f"lmkan_{operation}_walk",
                        (*arguments, first_pair, shape.pairs, width, first_out, padded, count, pairs),
                        (
                            -(-min(chunk, count) // samples_per_block),
                            self.out_blocks // division.slices,
                            pairs * walked,
                        ),
                        WARP * self.warps,
                        walk_memory,
                    )
                )
                if edges:
                    steps.append(
                        Launch(
                            "lmkan_add_edges",
                            ("records", "edges", "sums", *where, padded, count),
                            (-(-padded // 128), shape.pairs, walked),
                            128,
                        )
                    )
        if self.with_table:
            if (copies := division.copies * division.planes) > 1:
                blocks = min(-(-coefficients // 1024), 8 * layer.device.multiprocessors)
                steps.append(Launch("lmkan_add_copies", ("sums", coefficients, copies), (blocks, 1, 1), 256))
            steps.append(Launch("lmkan_unpack_table", ("sums", "grad_table", *sizes), tiles, 256))
        return LaunchPlan(tuple(workspaces), tuple(steps))


class Guess(NamedTuple):
    """A candidate for a default that fits the layer; a ``filling`` one needs enough warps for the device."""

    parameters: Parameters
    walk: Walk
    filling: bool


def first(guesses: Iterable[Guess], batch: int) -> Parameters | None:
    """The first one that fits so many samples; None where none does."""
    for parameters, walk, filling in guesses:
        if (not filling or walk.is_filling(batch)) and walk.allows(batch):
            return parameters
    return None
