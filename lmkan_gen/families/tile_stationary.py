"""Tile-stationary CUDA kernels: tables of a tile of pairs x outputs stay in shared memory.

Forward, input gradient, and both gradients fused in the seed's two modes. See the head of
``templates/tile_stationary.cu.j2`` for the idea and what bounds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import product

from lmkan_gen.device import REGISTERS, registers_per_thread
from lmkan_gen.families import lanes
from lmkan_gen.families.base import Demand, Family, Parameters, Violation
from lmkan_gen.families.tile_times import Access, Tile, Times
from lmkan_gen.packing import SCALE_PAIRS
from lmkan_gen.plan import Constant, Fill, KernelSpec, Launch, LaunchPlan, Workspace
from lmkan_gen.problem import Layer, Operation, Problem, TableDtype

#: operations on narrow tables; int8 is for inference
_NARROW = {
    TableDtype.FLOAT16: (Operation.FORWARD, Operation.GRAD_INPUT),
    TableDtype.BFLOAT16: (Operation.FORWARD, Operation.GRAD_INPUT),
    TableDtype.INT8: (Operation.FORWARD,),
}
_LEAST_REGISTERS = 64  # what launch bounds leave each thread, at least
_INLINE_SLACK = 6  # by which small tiles without a pre-pass were found to need less than estimated
_SPARE_REGISTERS = 24  # by which what was never compiled has to stay below its limit
#: measured on an H200, in bytes per microsecond; only their ratios matter
_STAGING_RATE = 52e3  # of one multiprocessor, from the level-2 cache
_CYCLES_PER_US = 1900.0
#: with `pairs` these make rows of tables that are whole multiples of 32 banks
_OUTS = (4, 8, 10, 12, 16, 20, 24, 28, 32)


class TileStationary(Family):
    """Tables of a tile in shared memory, batch streamed past them."""

    name = "tile_stationary"
    device_kind = "cuda"
    operations = frozenset({Operation.FORWARD, Operation.GRAD_INPUT, Operation.BACKWARD})
    idea = "a pairs x outs tile of tables in shared memory, the batch streamed past it"

    def computes(self, operation: Operation, table: TableDtype) -> bool:
        """See base class."""
        return super().computes(operation, table) or operation in _NARROW.get(table, ())

    def space(self, operation: Operation) -> Mapping[str, tuple[Constant, ...]]:
        """See base class.

        Loads of coordinates run ``ahead`` by so many pairs. ``ranges`` of work are even, or whole parts of a
        tile's batch: some multiprocessors may idle, but no tile is loaded twice, and blocks reading the same
        coordinates do so at about the same time. ``access`` to rows of results is in each lane's own order,
        or aligned: registers are permuted first, so that a warp touches one row, a whole line, at a time.
        """
        threads = (64, 128, 256, 384, 512, 768, 1024)
        if operation is Operation.BACKWARD:
            return {
                "pairs": (2, 4, 8),
                "outs": (4, 8, 16),
                "threads": threads[1:],
                "mode": ("normal", "fast"),
            }
        return {
            "pairs": (2, 4, 8, 16, 32),
            "outs": _OUTS,
            "threads": threads,
            "coordinates": ("prepass", "inline"),
            "ahead": (2, 4, 8),
            "ranges": ("even", "whole"),
            "access": ("rotated", "aligned"),
        }

    def demanded(self, problem: Problem, demand: Demand) -> Mapping[str, Constant] | None:
        """The seed's tile of ``n`` is ``n`` inputs (``n / 2`` pairs) by ``n`` outputs."""
        fixed: dict[str, Constant] = {}
        if demand.tile_size is not None:
            fixed |= {"pairs": demand.tile_size // 2, "outs": demand.tile_size}
        if demand.block_size is not None:
            fixed["threads"] = demand.block_size
        if problem.operation is Operation.BACKWARD and demand.fast_mode:
            fixed["mode"] = "fast"
        return fixed

    def shared_memory(self, problem: Problem, parameters: Parameters) -> int:
        """Bytes of dynamic shared memory of one block."""
        side = problem.shape.grids + 1
        copies = 1
        if problem.operation is Operation.BACKWARD:
            copies += 1 if parameters["mode"] == "normal" else _integer(parameters, "threads") // lanes.WARP
        words = _integer(parameters, "pairs") * _integer(parameters, "outs") // lanes.pack(problem)
        tables = 4 * copies * lanes.rows(problem) * words
        if _coordinates(parameters) == "inline":
            return tables + 2 * 4 * lanes.WARP * side  # knots and inverse spacings, a copy per lane
        return tables + (4 * side if problem.operation is Operation.GRAD_INPUT else 0)

    def broken(self, layer: Layer, parameters: Parameters) -> Iterator[Violation]:
        """See base class."""
        shape, device = layer.shape, layer.device
        pairs, outs = _integer(parameters, "pairs"), _integer(parameters, "outs")
        if layer.table is not TableDtype.FLOAT32 and device.compute_capability < 80:
            yield Violation(
                "architecture",
                f"{layer.table} tables need sm_80 or newer, {device.name} is {device.arch}",
            )
        if (need := self.shared_memory(layer, parameters)) > device.shared_memory_per_block:
            yield Violation(
                "shared_memory",
                f"num_grids={shape.grids} with a tile of {pairs} pairs x {outs} outputs needs {need} "
                f"bytes of shared memory per block, {device.name} has {device.shared_memory_per_block}",
            )
        if (ahead := _integer(parameters, "ahead", absent=1)) > pairs:
            yield Violation("wasted", f"ahead={ahead} is more than the tile's {pairs} pairs")
        if layer.deterministic and layer.operation is Operation.BACKWARD:
            yield Violation("deterministic", "several warps add to the same element in an order that varies")
        if layer.table is TableDtype.INT8 and (
            pairs > 2 * SCALE_PAIRS or _coordinates(parameters) != "prepass"
        ):
            yield Violation(
                "table",
                f"int8 tables need coordinates=prepass, which marks far inputs, and at most "
                f"{2 * SCALE_PAIRS} pairs, not {_coordinates(parameters)} and {pairs}",
            )
        threads, needed = _integer(parameters, "threads"), self._registers(layer, parameters)
        spare = _INLINE_SLACK if _coordinates(parameters) == "inline" else 0
        if needed - spare > (limit := registers_per_thread(threads)):
            yield Violation(
                "registers",
                f"{threads} threads have {limit} registers each, a tile of {pairs} x {outs} "
                f"needs about {needed}",
            )
        if layer.operation is Operation.BACKWARD and parameters["mode"] == "fast":
            if pairs * outs < lanes.WARP:
                yield Violation(
                    "tile", "fast mode needs a tile of at least 32 functions: tile size 8 or more"
                )
            if threads != 128:
                yield Violation("threads", f"fast mode keeps a copy per warp: 128 threads, not {threads}")

    def wasted(self, problem: Problem, parameters: Parameters) -> bool:
        """Whether most of a tile would be padding: such a choice is never worth trying."""
        shape = problem.shape
        pairs, outs = _integer(parameters, "pairs"), _integer(parameters, "outs")
        computed = -(-shape.pairs // pairs) * pairs * -(-shape.outputs // outs) * outs
        return computed > 2 * shape.pairs * shape.outputs and pairs * outs > 32

    def default(self, problem: Problem) -> Parameters | None:
        """The fastest of a small set of candidates by their rough times."""
        times = _times(problem.layer)
        return times.best(problem.shape.batch) if times else None

    def times(self, layer: Layer) -> Times | None:
        """Rough times of the candidates for the default; None where nothing fits."""
        tiles = [
            self._tile(layer, parameters, accesses)
            for parameters, accesses in self._default_candidates(layer.operation)
            if not (self.layer_violations(layer, parameters) or self._may_spill(layer, parameters))
        ]
        if not tiles:
            return None
        forward = layer.operation is Operation.FORWARD
        results = layer.shape.outputs if forward else layer.shape.inputs
        divides_sums = layer.operation is not Operation.BACKWARD
        return Times(tiles, layer.device.multiprocessors, results, divides_sums)

    @staticmethod
    def _default_candidates(operation: Operation) -> Iterator[tuple[Parameters, tuple[Access, ...]]]:
        if operation is Operation.BACKWARD:
            for tile in product((2, 4, 8), (4, 8, 16), ((512, "normal"), (256, "normal"), (128, "fast"))):
                p, o, (t, m) = tile
                both: Parameters = {"pairs": p, "outs": o, "threads": t, "mode": m}
                yield both, (Access(both, 1.0),)
            return
        # few samples want small blocks; input gradients have too many registers for as many as would help
        few = (64, 128) if operation is Operation.FORWARD else ()
        threads = (*few, 256, 512, 768)
        ways = product((2, 4, 8, 16), (4, 8, 16, 32), threads, ("prepass", "inline"), ("even", "whole"))
        for pairs, outs, block, coordinates, ranges in ways:
            parameters: dict[str, Constant] = {"pairs": pairs, "outs": outs, "threads": block}
            parameters |= {"coordinates": coordinates, "ahead": 2, "ranges": ranges}
            rotated, aligned = parameters | {"access": "rotated"}, parameters | {"access": "aligned"}
            # rotated ones touch pieces of lines
            yield parameters, (Access(rotated, min(1.0, 0.6 + pairs / 40)), Access(aligned, 1.0))

    def _tile(self, layer: Layer, parameters: Parameters, accesses: tuple[Access, ...]) -> Tile:
        segments, summed = _segments(layer, parameters)
        resident = self.resident(layer, parameters)
        warps = _integer(parameters, "threads") // lanes.WARP * resident
        prepass, both = _coordinates(parameters) != "inline", layer.operation is Operation.BACKWARD
        return Tile(
            accesses,
            segments,
            summed,
            _units_at_a_time(parameters),
            slots=layer.device.multiprocessors * resident,
            whole=parameters.get("ranges") == "whole",
            unit_us=self._unit_us(layer, parameters),
            utilisation=warps**2 / (warps**2 + 16),  # 16 warps almost hide all latencies, 8 do not
            staging_us=self._staging_us(layer, parameters),
            launches=1 + prepass + both,
        )

    @staticmethod
    def _unit_us(problem: Problem, parameters: Parameters) -> float:
        """What a unit of 32 samples costs a multiprocessor per tile.

        The larger of cycles of its data path (32 words each; what comes from elsewhere passes it twice)
        and of instruction slots.
        """
        pairs, outs = _integer(parameters, "pairs"), _integer(parameters, "outs")
        inline = _coordinates(parameters) == "inline"
        words = outs // lanes.pack(problem)
        conflicts = max(1, lanes.WARP // (pairs * (words & -words)))  # lanes of equal bank
        reads = {TableDtype.FLOAT32: 4, TableDtype.INT8: 1}.get(problem.table, 2)
        data = reads * pairs * outs * conflicts
        data += 4 * pairs + 4 * pairs * inline
        each = {TableDtype.FLOAT32: 9, TableDtype.INT8: 4}.get(problem.table, 6)
        instructions = pairs * (each * outs + 38 + 30 * inline) + 4 * outs + 60
        if problem.operation is Operation.FORWARD:
            data += outs
        else:
            data += 2 * outs + 2 * pairs
            instructions += 2 * pairs * outs
        if problem.operation is Operation.BACKWARD:
            data *= 8 if parameters["mode"] == "normal" else 5
        return max(data, instructions / 4) / _CYCLES_PER_US

    @staticmethod
    def _staging_us(problem: Problem, parameters: Parameters) -> float:
        """What loading a tile costs: no less than 32 bytes can be read at a time, and rows are requests."""
        pairs, outs = _integer(parameters, "pairs"), _integer(parameters, "outs")
        rows = lanes.rows(problem) * outs // lanes.pack(problem)
        return rows * max(4 * max(pairs, 8) / _STAGING_RATE, 1 / _CYCLES_PER_US)

    @staticmethod
    def _registers(problem: Problem, parameters: Parameters) -> int:
        """What a lane keeps for the whole of its sample, with addresses and weights; checked by compiling."""
        pairs, outs = _integer(parameters, "pairs"), _integer(parameters, "outs")
        base = 2 * (_integer(parameters, "ahead", absent=1) - 1) + (
            40 if _coordinates(parameters) == "prepass" else 60
        )
        if problem.operation is Operation.FORWARD:
            # half: weights again, and sums of two steps; int8: scales, and integer sums
            scales = outs * (2 if pairs > SCALE_PAIRS else 1)
            held = {TableDtype.FLOAT32: 0, TableDtype.INT8: scales + outs}.get(problem.table, 4 + outs // 2)
            return base + outs + held
        # strides between rows, and limits where tiles are partial
        strides = 2 * min(outs & -outs, lanes.WARP // pairs).bit_length()
        return base + 12 + strides + 6 * _is_partial(problem, parameters) + 2 * outs + 2 * pairs

    def _may_spill(self, problem: Problem, parameters: Parameters) -> bool:
        """Whether registers are too few to be sure without compiling."""
        pairs, outs = _integer(parameters, "pairs"), _integer(parameters, "outs")
        needed = self._registers(problem, parameters) + _SPARE_REGISTERS
        needed += 2 * min(outs & -outs, lanes.WARP // pairs) + 12 * _is_partial(problem, parameters)
        return needed > registers_per_thread(_integer(parameters, "threads"))

    def resident(self, problem: Problem, parameters: Parameters) -> int:
        """Blocks one multiprocessor holds: what launch bounds promise the compiler."""
        threads = _integer(parameters, "threads")
        per_block = self.shared_memory(problem, parameters) + 1024  # the driver's own share
        return max(
            1,
            min(
                problem.device.shared_memory_per_multiprocessor // per_block,
                REGISTERS // (threads * max(_LEAST_REGISTERS, self._registers(problem, parameters))),
                8,
            ),
        )

    def _grid(self, problem: Problem, parameters: Parameters) -> tuple[int, int]:
        """Number of blocks, and number of splits of the sum over tiles."""
        resident, _ = _block(problem.layer, tuple(parameters.items()))
        slots = problem.device.multiprocessors * resident
        segments, summed = _segments(problem, parameters)
        # as many blocks as have work for all their warps
        at_a_time = _units_at_a_time(parameters)
        full = segments * -(-problem.shape.batch // (lanes.WARP * at_a_time))
        splits = 1
        if problem.operation is not Operation.BACKWARD and full < slots:
            splits = min(summed, slots // full)
        segments *= splits
        grid = max(1, min(slots, splits * full))
        if parameters.get("ranges") == "whole" and grid > segments:
            grid = grid // segments * segments
        return grid, splits

    def layer_spec(self, layer: Layer, parameters: Parameters) -> KernelSpec:
        """See base class."""
        shape = layer.shape
        pairs, outs = _integer(parameters, "pairs"), _integer(parameters, "outs")
        constants = lanes.constants(layer, pairs, outs) | {
            "threads": _integer(parameters, "threads"),
            "blocks": self.resident(layer, parameters),
            "coordinates": _coordinates(parameters),
            "copy": next(n for n in (4, 2, 1) if shape.pairs % n == 0 and pairs % n == 0),
            "mode": str(parameters.get("mode", "none")),
            "ahead": _integer(parameters, "ahead", absent=1),
            "access": str(parameters.get("access", "rotated")),
            "ordered": int(_ordered(layer)),
            # Turing has no copies past the registers
            "asynchronous": int(layer.device.compute_capability >= 80),
        }
        return KernelSpec.make("tile_stationary.cu.j2", layer.device.arch, constants)

    def plan(self, problem: Problem, parameters: Parameters) -> LaunchPlan:
        """See base class."""
        shape, operation = problem.shape, problem.operation
        grid, splits = self._grid(problem, parameters)
        workspaces: list[Workspace] = []
        steps: list[Fill | Launch] = []
        source, inner_layout = "x", lanes.layout(problem)
        if _coordinates(parameters) == "prepass":
            source, inner_layout = "coordinates", ()
            # loads run ahead of their use
            spare = _integer(parameters, "threads") // lanes.WARP
            workspaces, launch = lanes.prepass(problem, _integer(parameters, "pairs"), spare)
            steps.append(launch)
        results = {
            Operation.FORWARD: ("y",),
            Operation.GRAD_INPUT: ("grad_x",),
            Operation.BACKWARD: ("grad_x", "grad_table"),
        }[operation]
        added_up: list[Launch] = []
        if splits > 1 and _ordered(problem):
            count = shape.batch * (shape.outputs if operation is Operation.FORWARD else shape.inputs)
            workspaces.append(Workspace("parts", 4 * count * splits))
            blocks = min(-(-count // 256), 8 * problem.device.multiprocessors)
            added_up = [Launch("lmkan_add_parts", ("parts", *results, count, splits), (blocks, 1, 1), 256)]
            results = ("parts",)
        elif splits > 1 or operation is Operation.BACKWARD:
            steps.extend(Fill(name) for name in results)
        buffers = (*(() if operation is Operation.FORWARD else ("grad",)), *results)
        sizes = (shape.batch, shape.pairs, shape.outputs)
        split = () if operation is Operation.BACKWARD else (splits,)
        steps.append(
            Launch(
                f"lmkan_{operation}",
                (source, "borders", *lanes.table_buffers(problem), *buffers, *sizes, *split, *inner_layout),
                (grid, 1, 1),
                _integer(parameters, "threads"),
                _block(problem.layer, tuple(parameters.items()))[1],
            )
        )
        return LaunchPlan(tuple(workspaces), (*steps, *added_up, *lanes.far_samples(problem)))


def _integer(parameters: Parameters, name: str, absent: int | None = None) -> int:
    """The parameter's value; ``absent`` where the operation's space has no such parameter."""
    value = parameters[name] if absent is None else parameters.get(name, absent)
    assert isinstance(value, int)
    return value


def _ordered(problem: Problem) -> bool:
    """Whether what several blocks sum up has to be added in a fixed order."""
    return problem.deterministic and problem.operation is not Operation.BACKWARD


def _segments(problem: Problem, parameters: Parameters) -> tuple[int, int]:
    """Parts of the result that have a sum of their own, and tiles that each sum goes over."""
    return lanes.tiles(problem, _integer(parameters, "pairs"), _integer(parameters, "outs"))


def _is_partial(problem: Problem, parameters: Parameters) -> bool:
    return lanes.is_partial(problem, _integer(parameters, "pairs"), _integer(parameters, "outs"))


def _units_at_a_time(parameters: Parameters) -> int:
    """Units of 32 samples that a block works on at a time."""
    return max(1, _integer(parameters, "threads") // lanes.WARP)


def _coordinates(parameters: Parameters) -> str:
    return str(parameters.get("coordinates", "inline"))


FAMILY = TileStationary()


@lru_cache(maxsize=4096)
def _block(layer: Layer, parameters: tuple[tuple[str, Constant], ...]) -> tuple[int, int]:
    """Blocks that a multiprocessor holds, and bytes of shared memory of one."""
    known = dict(parameters)
    return FAMILY.resident(layer, known), FAMILY.shared_memory(layer, known)


@lru_cache(maxsize=1024)
def _times(layer: Layer) -> Times | None:
    return FAMILY.times(layer)
