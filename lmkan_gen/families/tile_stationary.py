"""Tile-stationary CUDA kernels: tables of a tile of pairs x outputs stay in shared memory.

Forward, input gradient, and both gradients fused in the seed's two modes. See the head of
``templates/tile_stationary.cu.j2`` for the idea and what bounds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from lmkan_gen.families.base import Demand, Family, Parameters, Violation
from lmkan_gen.plan import Constant, Fill, KernelSpec, Launch, LaunchPlan, Workspace
from lmkan_gen.problem import Operation, Problem

_WARP = 32
_LEAST_REGISTERS = 64  # what launch bounds leave each thread, at least
_REGISTERS = 65536
#: measured on an H200, in bytes per microsecond; only their ratios matter
_ADD_RATE, _EXTEND_RATE, _CACHED_ADD_RATE = 0.9e6, 1.0e6, 3.3e6  # read and write count once
_STAGING_RATE = 52e3  # of one multiprocessor, from the level-2 cache
_CACHE_BYTES = 36 << 20  # results that stay in the level-2 cache from one tile to the next
_CYCLES_PER_US = 1900.0
_LAUNCH_US = 2.0
_WHOLE = 1 << 30  # a slab as large as any batch
#: with `pairs` these make rows of tables that are whole multiples of 32 banks
_OUTS = (4, 8, 10, 12, 16, 20, 24, 28, 32, 40, 48, 64, 128)


class TileStationary(Family):
    """Tables of a tile in shared memory, batch streamed past them."""

    name = "tile_stationary"
    device_kind = "cuda"
    operations = frozenset({Operation.FORWARD, Operation.GRAD_INPUT, Operation.BACKWARD})
    idea = "a pairs x outs tile of tables in shared memory, the batch streamed past it"

    def space(self, operation: Operation) -> Mapping[str, tuple[Constant, ...]]:
        """See base class.

        ``groups`` warps share one sample's outputs, ``splits`` divides the sum over tiles where batches are
        too small to fill the device, loads of coordinates run ``ahead`` by so many pairs. ``update`` says
        how a tile's part of a sum joins the parts before it: by atomic addition (one access, but no
        faster than device memory's atomics) or by reading and writing (two accesses). ``slab`` is how many
        samples a launch works on: few keep results in the level-2 cache, many load each tile less often.
        """
        threads = (128, 256, 384, 512, 768, 1024)
        if operation is Operation.BACKWARD:
            return {"pairs": (2, 4, 8), "outs": (4, 8, 16), "threads": threads, "mode": ("normal", "fast")}
        return {
            "pairs": (2, 4, 8, 16),
            "outs": _OUTS,
            "groups": (1, 2),
            "threads": threads,
            "coordinates": ("prepass", "inline"),
            "splits": ("none", "auto"),
            "update": ("add", "extend"),
            "ahead": (2, 4),
            "slab": (16384, _WHOLE),
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
        side, knots = problem.shape.grids + 1, problem.shape.knots
        copies = 1
        if problem.operation is Operation.BACKWARD:
            copies += 1 if parameters["mode"] == "normal" else _integer(parameters, "threads") // _WARP
        tables = 4 * copies * knots * _integer(parameters, "pairs") * _integer(parameters, "outs")
        if _coordinates(parameters) == "inline":
            return tables + 2 * 4 * _WARP * side  # knots and inverse spacings, a copy per lane
        return tables + (4 * side if problem.operation is Operation.GRAD_INPUT else 0)

    def violations(self, problem: Problem, parameters: Parameters) -> list[Violation]:
        """See base class."""
        shape, device = problem.shape, problem.device
        pairs, outs, threads = (_integer(parameters, k) for k in ("pairs", "outs", "threads"))
        groups = _groups(parameters)
        found = []
        if (need := self.shared_memory(problem, parameters)) > device.shared_memory_per_block:
            found.append(
                Violation(
                    "shared_memory",
                    f"num_grids={shape.grids} with a tile of {pairs} pairs x {outs} outputs needs {need} "
                    f"bytes of shared memory per block, {device.name} has {device.shared_memory_per_block}",
                )
            )
        if threads // _WARP % groups:
            found.append(Violation("threads", f"{groups} groups do not divide {threads // _WARP} warps"))
        ahead = _integer(parameters, "ahead", absent=1)
        if ahead > pairs:
            found.append(Violation("wasted", f"ahead={ahead} is more than the tile's {pairs} pairs"))
        if parameters.get("slab", _WHOLE) != _WHOLE and _slab(problem, parameters) == shape.batch:
            found.append(Violation("wasted", f"slab={parameters['slab']} is the whole batch, {shape.batch}"))
        if outs % groups:
            found.append(Violation("divisibility", f"{groups} groups do not divide {outs} outputs"))
        lane_outs = outs // groups
        if not 4 <= lane_outs <= 32:
            found.append(
                Violation(
                    "registers", f"{outs} outputs over {groups} groups: {lane_outs} per lane, must be 4 to 32"
                )
            )
        needed = self._registers(problem, parameters)
        if needed > (limit := min(255, _REGISTERS // threads)):
            found.append(
                Violation(
                    "registers",
                    f"{threads} threads have {limit} registers each, a tile of {pairs} x {outs} "
                    f"over {groups} groups needs about {needed}",
                )
            )
        if problem.operation is Operation.BACKWARD and parameters["mode"] == "fast":
            if pairs * outs < _WARP:
                found.append(
                    Violation("tile", "fast mode needs a tile of at least 32 functions: tile size 8 or more")
                )
            if threads != 128:
                found.append(
                    Violation("threads", f"fast mode keeps a copy per warp: 128 threads, not {threads}")
                )
        return found

    def wasted(self, problem: Problem, parameters: Parameters) -> bool:
        """Whether most of a tile would be padding: such a choice is never worth trying."""
        shape = problem.shape
        pairs, outs = _integer(parameters, "pairs"), _integer(parameters, "outs")
        computed = -(-shape.pairs // pairs) * pairs * -(-shape.outputs // outs) * outs
        return computed > 2 * shape.pairs * shape.outputs and pairs * outs > 32

    def default(self, problem: Problem) -> Parameters | None:
        """The cheapest candidate of a small set by `estimate`."""
        best: tuple[float, dict[str, Constant]] | None = None
        for parameters in self._default_candidates(problem):
            if self.violations(problem, parameters):
                continue
            cost = self.estimate(problem, parameters)
            if best is None or cost < best[0]:
                best = (cost, parameters)
        return best[1] if best else None

    def _default_candidates(self, problem: Problem) -> list[dict[str, Constant]]:
        if problem.operation is Operation.BACKWARD:
            tiles = [(p, o) for p in (2, 4, 8) for o in (4, 8, 16)]
            return [
                {"pairs": p, "outs": o, "threads": t, "mode": m}
                for p, o in tiles
                for t, m in ((512, "normal"), (256, "normal"), (128, "fast"))
            ]
        return [
            {
                "pairs": p,
                "outs": o,
                "groups": g,
                "threads": t,
                "coordinates": c,
                "splits": "auto",
                "update": "add",
                "ahead": 2,
                "slab": slab,
            }
            for p in (2, 4, 8, 16)
            for o in _OUTS
            for g in (1, 2)
            for t in (256, 512, 768)
            for c in ("prepass", "inline")
            for slab in (16384, _WHOLE)
        ]

    def estimate(self, problem: Problem, parameters: Parameters) -> float:
        """A rough time in microseconds; ranks candidates where nothing was tuned."""
        shape, operation = problem.shape, problem.operation
        if (slab := _slab(problem, parameters)) < shape.batch:
            return self.estimate(_with_batch(problem, slab), parameters) * shape.batch / slab
        segments, summed = self._segments(problem, parameters)
        grid, splits = self._grid(problem, parameters)
        segments *= splits
        resident = self._resident(problem, parameters)
        warps = _integer(parameters, "threads") // _WARP * resident
        utilisation = warps**2 / (warps**2 + 16)  # 16 warps almost hide all latencies, 8 do not
        sharing = -(-grid // problem.device.multiprocessors)  # blocks of the busiest multiprocessor
        units = self._units_per_block(problem, parameters, segments, grid)
        compute = units * self._unit_us(problem, parameters) * sharing * summed / splits / utilisation

        updated = 4 * shape.batch * (shape.outputs if operation is Operation.FORWARD else shape.inputs)
        extend = parameters.get("update") == "extend"
        rate = _CACHED_ADD_RATE if updated < _CACHE_BYTES else _EXTEND_RATE if extend else _ADD_RATE
        straddles = bool(segments % grid and grid % segments)
        loads = (-(-segments // grid) + straddles) * summed / splits * sharing
        launches = (
            1 + (_coordinates(parameters) != "inline") + (splits > 1) + (operation is Operation.BACKWARD)
        )
        return (
            max(compute, updated * summed / rate)
            + loads * self._staging_us(problem, parameters)
            + launches * _LAUNCH_US
        )

    @staticmethod
    def _unit_us(problem: Problem, parameters: Parameters) -> float:
        """What a unit of 32 samples costs a multiprocessor per tile.

        The larger of cycles of its data path (32 words each; what comes from elsewhere passes it twice)
        and of instruction slots.
        """
        pairs, outs = _integer(parameters, "pairs"), _integer(parameters, "outs")
        groups, inline = _groups(parameters), _coordinates(parameters) == "inline"
        moves = 3 if parameters.get("update") == "extend" else 1
        data = 4 * pairs * outs * max(1, _WARP // (pairs * outs))
        data += 2 * pairs * (groups + 1) + 4 * pairs * groups * inline
        instructions = pairs * (9 * outs + (38 + 30 * inline) * groups) + 4 * outs + 60 * groups
        if problem.operation is Operation.FORWARD:
            data += moves * outs
        else:
            data += 2 * outs + 2 * moves * pairs * groups
            instructions += 2 * pairs * outs
        if problem.operation is Operation.BACKWARD:
            data *= 8 if parameters["mode"] == "normal" else 5
        return max(data, instructions / 4) / _CYCLES_PER_US

    @staticmethod
    def _staging_us(problem: Problem, parameters: Parameters) -> float:
        """What loading a tile costs: no less than 32 bytes can be read at a time, and rows are requests."""
        pairs, rows = _integer(parameters, "pairs"), problem.shape.knots * _integer(parameters, "outs")
        return rows * max(4 * max(pairs, 8) / _STAGING_RATE, 1 / _CYCLES_PER_US)

    @staticmethod
    def _segments(problem: Problem, parameters: Parameters) -> tuple[int, int]:
        """Parts of the result that have a sum of their own, and tiles that each sum goes over."""
        pair_tiles = -(-problem.shape.pairs // _integer(parameters, "pairs"))
        out_tiles = -(-problem.shape.outputs // _integer(parameters, "outs"))
        match problem.operation:
            case Operation.FORWARD:
                return out_tiles, pair_tiles
            case Operation.GRAD_INPUT:
                return pair_tiles, out_tiles
            case _:
                return out_tiles * pair_tiles, 1

    @staticmethod
    def _units_per_block(problem: Problem, parameters: Parameters, segments: int, grid: int) -> int:
        """Units of 32 samples that a block works through per tile; warps without one wait for the others."""
        units = -(-problem.shape.batch // _WARP)
        lanes = _lanes(parameters)
        return -(-segments * units // (grid * lanes)) * lanes

    @staticmethod
    def _registers(problem: Problem, parameters: Parameters) -> int:
        """What a lane keeps for the whole of its sample, with addresses and weights; checked by compiling."""
        pairs, lane_outs = _integer(parameters, "pairs"), _integer(parameters, "outs") // _groups(parameters)
        extend = parameters.get("update") == "extend"
        base = 2 * (_integer(parameters, "ahead", absent=1) - 1) + (
            40 if _coordinates(parameters) == "prepass" else 54
        )
        if problem.operation is Operation.FORWARD:
            return base + (1 + extend) * lane_outs
        # strides between rows, and limits where tiles are partial
        strides = 2 * min(lane_outs & -lane_outs, _WARP // pairs).bit_length()
        partial = problem.shape.pairs % pairs != 0 or problem.shape.outputs % lane_outs != 0
        return base + 9 + strides + 6 * partial + 2 * lane_outs + (2 + 2 * extend) * pairs

    def _resident(self, problem: Problem, parameters: Parameters) -> int:
        """Blocks one multiprocessor holds: what launch bounds promise the compiler."""
        threads = _integer(parameters, "threads")
        per_block = self.shared_memory(problem, parameters) + 1024  # the driver's own share
        return max(
            1,
            min(
                problem.device.shared_memory_per_multiprocessor // per_block,
                _REGISTERS // (threads * max(_LEAST_REGISTERS, self._registers(problem, parameters))),
                8,
            ),
        )

    def _grid(self, problem: Problem, parameters: Parameters) -> tuple[int, int]:
        """Number of blocks, and number of splits of the sum over tiles."""
        slots = problem.device.multiprocessors * self._resident(problem, parameters)
        segments, summed = self._segments(problem, parameters)
        # as many blocks as have work for all their warps
        lanes = _lanes(parameters)
        full = segments * -(-problem.shape.batch // (_WARP * lanes))
        splits = 1
        if parameters.get("splits") == "auto" and full < slots:
            splits = min(summed, slots // full)
        segments *= splits
        grid = max(1, min(slots, splits * full))
        whole = grid // segments * segments
        if not whole or whole == grid:
            return grid, splits
        # Blocks whose range reaches into a second segment load twice as many tiles. Leave a few
        # multiprocessors idle instead where that costs less.
        reload = self._staging_us(problem, parameters) / self._unit_us(problem, parameters)
        straddling = self._units_per_block(problem, parameters, segments, grid) + reload + lanes / 2
        aligned = self._units_per_block(problem, parameters, segments, whole)
        return (whole if aligned < straddling else grid), splits

    def spec(self, problem: Problem, parameters: Parameters) -> KernelSpec:
        """See base class."""
        shape = problem.shape
        pairs, outs = _integer(parameters, "pairs"), _integer(parameters, "outs")
        constants: dict[str, Constant] = {
            "operation": str(problem.operation),
            "grids": shape.grids,
            "pairs": pairs,
            "outs": outs,
            "groups": _groups(parameters),
            "threads": _integer(parameters, "threads"),
            "blocks": self._resident(problem, parameters),
            "coordinates": _coordinates(parameters),
            "copy": next(n for n in (4, 2, 1) if shape.pairs % n == 0 and pairs % n == 0),
            "partial": int(shape.pairs % pairs != 0 or shape.outputs % outs != 0),
            "mode": str(parameters.get("mode", "none")),
            "update": str(parameters.get("update", "add")),
            "ahead": _integer(parameters, "ahead", absent=1),
        }
        return KernelSpec.make("tile_stationary.cu.j2", problem.device.arch, constants)

    def plan(self, problem: Problem, parameters: Parameters) -> LaunchPlan:
        """See base class."""
        shape, operation = problem.shape, problem.operation
        slab = _slab(problem, parameters)
        splits = self._grid(_with_batch(problem, slab), parameters)[1]
        workspaces: list[Workspace] = []
        steps: list[Fill | Launch] = []
        if _coordinates(parameters) == "prepass":
            pairs = _integer(parameters, "pairs")
            samples = -(-shape.pairs // pairs) * -(-slab // _WARP) * _WARP
            # loads run ahead of their use: behind the last coordinates stand some that nobody uses
            beyond = _integer(parameters, "threads") // _groups(parameters)
            workspaces.append(Workspace("coordinates", 8 * pairs * (samples + beyond)))
        zeroed = {
            Operation.FORWARD: ("y",) if splits > 1 else (),
            Operation.GRAD_INPUT: ("grad_x",) if splits > 1 or _groups(parameters) > 1 else (),
            Operation.BACKWARD: ("grad_x", "grad_table"),
        }
        steps.extend(Fill(name) for name in zeroed[operation])
        for first in range(0, shape.batch, slab):
            steps.extend(self._launches(problem, parameters, first, min(slab, shape.batch - first), splits))
        return LaunchPlan(tuple(workspaces), tuple(steps))

    def _launches(
        self, problem: Problem, parameters: Parameters, first: int, count: int, splits: int
    ) -> Iterator[Launch]:
        """The launches for ``count`` samples from ``first`` on."""
        shape = problem.shape
        source = "x"
        if _coordinates(parameters) == "prepass":
            source = "coordinates"
            jobs = -(-shape.pairs // _integer(parameters, "pairs")) * -(-count // _WARP)
            blocks = min(-(-jobs // 8), 16 * problem.device.multiprocessors)
            arguments = ("x", "borders", source, shape.batch, first, count, shape.pairs)
            yield Launch("lmkan_coordinates", arguments, (blocks, 1, 1), 256)
        buffers = {
            Operation.FORWARD: ("y",),
            Operation.GRAD_INPUT: ("grad", "grad_x"),
            Operation.BACKWARD: ("grad", "grad_x", "grad_table"),
        }[problem.operation]
        sizes = (shape.batch, first, count, shape.pairs, shape.outputs)
        split = () if problem.operation is Operation.BACKWARD else (splits,)
        yield Launch(
            f"lmkan_{problem.operation}",
            (source, "borders", "table", *buffers, *sizes, *split),
            (self._grid(_with_batch(problem, count), parameters)[0], 1, 1),
            _integer(parameters, "threads"),
            self.shared_memory(problem, parameters),
        )


def _integer(parameters: Parameters, name: str, absent: int | None = None) -> int:
    """The parameter's value; ``absent`` where the operation's space has no such parameter."""
    value = parameters[name] if absent is None else parameters.get(name, absent)
    assert isinstance(value, int)
    return value


def _slab(problem: Problem, parameters: Parameters) -> int:
    """Samples of one launch."""
    return min(problem.shape.batch, _integer(parameters, "slab", absent=problem.shape.batch))


def _lanes(parameters: Parameters) -> int:
    """Units of 32 samples that a block works on at a time."""
    return max(1, _integer(parameters, "threads") // _WARP // _groups(parameters))


def _with_batch(problem: Problem, batch: int) -> Problem:
    return replace(problem, shape=replace(problem.shape, batch=batch))


def _groups(parameters: Parameters) -> int:
    return _integer(parameters, "groups", absent=1)


def _coordinates(parameters: Parameters) -> str:
    return str(parameters.get("coordinates", "inline"))


FAMILY = TileStationary()
