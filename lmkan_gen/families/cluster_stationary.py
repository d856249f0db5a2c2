"""Cluster-stationary CUDA kernels: thread-block clusters hold the tiles of tables whose results are summed.

For small batches, on Hopper and later. See the head of ``templates/cluster_stationary.cu.j2`` for the idea
and what bounds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import NamedTuple

from lmkan_gen.device import registers_per_thread
from lmkan_gen.families import lanes
from lmkan_gen.families.base import Family, Parameters, Violation
from lmkan_gen.plan import Constant, Fill, KernelSpec, Launch, LaunchPlan
from lmkan_gen.problem import Layer, Operation, Problem, TableDtype

_MAX_GRID = 2**31 - 1  # blocks along the first axis
#: of one multiprocessor, from the level-2 cache, in bytes per microsecond; only ratios matter
_STAGING_RATE, _CYCLES_PER_US = 52e3, 1900.0
_START_US = 2.0  # of a block, until its first copies are under way


class ClusterStationary(Family):
    """A tile of tables per block, partial sums exchanged through the shared memory of a cluster."""

    name = "cluster_stationary"
    device_kind = "cuda"
    operations = frozenset({Operation.FORWARD, Operation.GRAD_INPUT})
    idea = "a tile of tables in shared memory per block, the blocks of a cluster add up their results"

    def computes(self, operation: Operation, table: TableDtype) -> bool:
        """See base class."""
        return operation in self.operations and table is not TableDtype.INT8

    def space(self, operation: Operation) -> Mapping[str, tuple[Constant, ...]]:
        """See base class.

        A block holds the tables of ``pairs`` pairs and ``outs`` outputs, for ``samples`` samples of each of
        its ``threads``; a ``cluster`` has so many blocks. So many ``splits`` of the tiles of a sum have a
        cluster each, which adds to zeros. Loads of inputs run ``ahead`` by so many pairs.
        """
        return {
            "pairs": (2, 4, 8, 16),
            "outs": (4, 8, 16, 32),
            "samples": (1, 2),
            "threads": (256, 512, 1024),
            "cluster": (2, 4, 8),
            "splits": (1, 2, 4, 8),
            "ahead": (1, 2, 4),
        }

    def shared_memory(self, problem: Problem, parameters: Parameters) -> int:
        """Bytes of dynamic shared memory of one block: the larger of what it has at first and in the end."""
        return max(self._tables(problem, parameters), self._parts(problem, parameters))

    @staticmethod
    def _tables(problem: Problem, parameters: Parameters) -> int:
        """Bytes of a block's tables and knots."""
        words = int(parameters["pairs"]) * int(parameters["outs"]) // lanes.pack(problem)
        knots = 2 * lanes.WARP * (problem.shape.grids + 1)  # with inverse spacings, a copy per lane
        return 4 * (lanes.rows(problem) * words + knots)

    @staticmethod
    def _parts(problem: Problem, parameters: Parameters) -> int:
        """Bytes of a block's partial results."""
        v = _values(parameters)
        rows = v.outs if problem.operation is Operation.FORWARD else 2 * v.pairs
        return 4 * rows * v.samples * v.threads

    def broken(self, layer: Layer, parameters: Parameters) -> Iterator[Violation]:
        """See base class."""
        shape, device = layer.shape, layer.device
        if device.compute_capability < 90:
            why = f"thread-block clusters need sm_90 or newer, {device.name} is {device.arch}"
            yield Violation("architecture", why)
            return
        pairs, outs = int(parameters["pairs"]), int(parameters["outs"])
        words = outs // lanes.pack(layer)
        if pairs * words % lanes.WARP:
            yield Violation(
                "tile",
                f"a row of {pairs} pairs x {words} words is no multiple of the {lanes.WARP} banks",
            )
        most = device.shared_memory_per_block
        if (need := self._tables(layer, parameters)) > most:
            yield Violation(
                "shared_memory",
                f"num_grids={shape.grids} with a tile of {pairs} pairs x {outs} outputs needs {need} bytes "
                f"of shared memory per block, {device.name} has {most}",
            )
        v = _values(parameters)
        if (need := self._parts(layer, parameters)) > most:
            yield Violation(
                "shared_memory",
                f"results of {v.samples} x {v.threads} samples need {need} bytes of shared memory per block, "
                f"{device.name} has {most}",
            )
        if layer.deterministic and v.splits > 1:
            why = f"{v.splits} clusters add to the same results in an order that varies, splits=1 has one"
            yield Violation("deterministic", why)
        if v.ahead > v.pairs:
            yield Violation("wasted", f"ahead={v.ahead} is more than the tile's {v.pairs} pairs")
        if layer.operation is Operation.FORWARD and v.ahead % 2 and lanes.pack(layer) > 1:
            yield Violation(
                "table", f"two pairs share a sum in {layer.table}, ahead={v.ahead} is odd; take 2 or 4"
            )
        needed = self._registers(layer, parameters)
        if needed > (limit := registers_per_thread(v.threads)):
            yield Violation(
                "registers",
                f"{v.threads} threads have {limit} registers each, {v.samples} samples with a tile of "
                f"{v.pairs} x {v.outs} need about {needed}",
            )

    def batch_violations(self, problem: Problem, parameters: Parameters) -> list[Violation]:
        """See base class."""
        if (blocks := self._blocks(problem, parameters)) <= _MAX_GRID:
            return []
        why = f"batch={problem.shape.batch} makes {blocks} blocks, at most {_MAX_GRID}"
        return [Violation("grid", why)]

    def wasted(self, problem: Problem, parameters: Parameters) -> bool:
        """Whether most of a tile, of a cluster or of a block's samples would be padding."""
        shape = problem.shape
        v = _values(parameters)
        _, summed = lanes.tiles(problem, v.pairs, v.outs)
        return (
            v.pairs >= 2 * shape.pairs
            or v.outs >= 2 * shape.outputs
            or v.cluster * v.splits > 2 * summed
            or (v.samples * v.threads >= 2 * shape.batch and (v.samples, v.threads) != (1, 256))
        )

    def preference(self, problem: Problem) -> float:
        """Nothing of this family is taken where it was not measured."""
        return -0.5

    def default(self, problem: Problem) -> Parameters | None:
        """The cheapest candidate of a small set by `estimate`."""
        fitting = (p for p in self._default_candidates(problem) if not self.violations(problem, p))
        return min(fitting, key=lambda p: self.estimate(problem, p), default=None)

    def _default_candidates(self, problem: Problem) -> Iterator[dict[str, Constant]]:
        ways = product((2, 4, 8, 16), (4, 8, 16), (1, 2), (256, 512, 1024))
        for pairs, outs, samples, threads in ways:
            parameters: dict[str, Constant] = {"pairs": pairs, "outs": outs, "samples": samples}
            parameters |= {"threads": threads, "ahead": 2, "splits": 1}
            _, summed = lanes.tiles(problem, pairs, outs)
            parameters["cluster"] = next(n for n in (2, 4, 8) if n >= min(summed, 8))
            # by which what was never compiled has to stay below its limit
            spare = 8 + 8 * lanes.is_partial(problem, pairs, outs)
            spare += 16 * (problem.operation is Operation.GRAD_INPUT)
            if self._registers(problem, parameters) + spare <= registers_per_thread(threads):
                yield parameters

    def estimate(self, problem: Problem, parameters: Parameters) -> float:
        """A rough time in microseconds; ranks candidates where nothing was tuned."""
        v = _values(parameters)
        forward, is_float = problem.operation is Operation.FORWARD, problem.table is TableDtype.FLOAT32
        # of a warp for 32 samples and a tile: passes of the data path, and instructions
        passes = (4 if is_float else 2) * v.pairs * v.outs + 10 * v.pairs + (0 if forward else v.outs)
        each = (9 if is_float else 6) if forward else 11
        instructions = v.pairs * (each * v.outs + 68) + 60
        warps = v.threads // lanes.WARP
        compute = v.samples * warps * max(passes, instructions / 4) / _CYCLES_PER_US
        compute *= 1 + 16 / warps**2  # 16 warps almost hide all latencies, 8 do not
        # no less than 32 bytes can be read at a time
        rows = lanes.rows(problem) * v.outs // lanes.pack(problem)
        staging = rows * 4 * max(v.pairs, 8) / _STAGING_RATE
        _, summed = lanes.tiles(problem, v.pairs, v.outs)
        waves = -(-self._blocks(problem, parameters) // problem.device.multiprocessors)
        exchange = 2 * self._parts(problem, parameters) / _STAGING_RATE
        return waves * (-(-summed // (v.cluster * v.splits)) * (staging + compute) + exchange + _START_US)

    @staticmethod
    def _registers(problem: Problem, parameters: Parameters) -> int:
        """What a lane keeps for the whole of its sample, with addresses and weights; checked by compiling."""
        v, is_float = _values(parameters), problem.table is TableDtype.FLOAT32
        if problem.operation is Operation.FORWARD:
            # half tables: weights again, and sums of two steps
            held = 42 + 2 * v.ahead if is_float else 34 + v.outs // 2 + 3 * v.ahead
            return held + v.samples * v.outs
        held = 36 + 2 * v.ahead + 12 * (v.samples > 1) + 8 * (not is_float)
        return held + 5 * v.samples * v.pairs // 2 + v.outs // 2

    def _blocks(self, problem: Problem, parameters: Parameters) -> int:
        """A cluster for every tile of the result, group of samples, and split of the sum."""
        v = _values(parameters)
        tiles, _ = lanes.tiles(problem, v.pairs, v.outs)
        return tiles * -(-problem.shape.batch // (v.samples * v.threads)) * v.cluster * v.splits

    def layer_spec(self, layer: Layer, parameters: Parameters) -> KernelSpec:
        """See base class."""
        v = _values(parameters)
        constants = lanes.constants(layer, v.pairs, v.outs) | {
            "samples": v.samples,
            "threads": v.threads,
            "cluster": v.cluster,
            "splits": v.splits,
            "ahead": v.ahead,
            "coordinates": "inline",
            "copy": next(n for n in (4, 2, 1) if layer.shape.pairs % n == 0 and v.pairs % n == 0),
            "asynchronous": 1,
        }
        return KernelSpec.make("cluster_stationary.cu.j2", layer.device.arch, constants)

    def plan(self, problem: Problem, parameters: Parameters) -> LaunchPlan:
        """See base class."""
        shape = problem.shape
        results = ("y",) if problem.operation is Operation.FORWARD else ("grad", "grad_x")
        buffers = ("x", "borders", *lanes.table_buffers(problem), *results)
        launch = Launch(
            f"lmkan_{problem.operation}",
            (*buffers, shape.batch, shape.pairs, shape.outputs, *lanes.layout(problem)),
            (self._blocks(problem, parameters), 1, 1),
            int(parameters["threads"]),
            self.shared_memory(problem, parameters),
        )
        zeros = (Fill(results[-1]),) if _values(parameters).splits > 1 else ()
        return LaunchPlan((), (*zeros, launch))


class _Values(NamedTuple):
    pairs: int
    outs: int
    samples: int
    threads: int
    cluster: int
    splits: int
    ahead: int


def _values(parameters: Parameters) -> _Values:
    return _Values(*(int(parameters[name]) for name in _Values._fields))


FAMILY = ClusterStationary()
