"""Output-stationary CUDA kernels: sums stay in registers, tables stream through shared memory.

See the head of ``templates/output_stationary.cu.j2`` for the idea and what bounds it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from lmkan_gen.device import REGISTERS, registers_per_thread
from lmkan_gen.families import lanes
from lmkan_gen.families.base import Family, Parameters, Violation
from lmkan_gen.packing import SCALE_PAIRS, Stages
from lmkan_gen.plan import Argument, Constant, KernelSpec, Launch, LaunchPlan, TensorMap, Workspace, strides
from lmkan_gen.problem import Layer, Operation, Problem, TableDtype

_MAX_GRID = 65535  # blocks along the second axis
_MAX_STAGES = 2**31 - 1
#: measured on an H200; only their ratios matter
_CYCLES_PER_US, _COPY_RATE, _LAUNCH_US = 1900.0, 4.0e6, 2.0
_CACHE_RATE = 25.0  # bytes a cycle from the level-2 cache to a multiprocessor
_TOGETHER = (1, 2, 4, 8, 16, 32)
#: of an input gradient, in passes: gradients are waited for. Tiles of 8 x 4 took 1.4 times as long as 8 x 8
_PER_STAGE = 64
_ARRANGED_WORDS = 512  # of a block that arranges a table, or a row of it
_TENSOR_WORDS = 4  # of which innermost rows of tensor copies are whole multiples
_MAX_BOX = 256  # elements of a tensor copy along an axis
_LATENCY_CYCLES = 800.0  # of the level-2 cache under load: what is asked for should be used no sooner


class OutputStationary(Family):
    """Sums in registers, tables streamed past them by bulk copies; Hopper and later."""

    name = "output_stationary"
    device_kind = "cuda"
    operations = frozenset({Operation.FORWARD, Operation.GRAD_INPUT})
    idea = "sums of a tile of samples x outputs in registers, tables streamed through shared memory"

    def computes(self, operation: Operation, table: TableDtype) -> bool:
        """See base class."""
        return operation in self.operations and (
            operation is Operation.FORWARD or table is not TableDtype.INT8
        )

    def space(self, operation: Operation) -> Mapping[str, tuple[Constant, ...]]:
        """See base class.

        A stage holds the tables of ``pairs`` pairs and ``outs`` outputs; a lane sums over pairs (forward) or
        outputs for ``samples`` samples. Loads run ``ahead``: those of coordinates by so many pairs, those of
        gradients by so many samples. It reads ``vector`` words of a table at a time. Blocks are at about
        ``together`` tiles at a time. Stages are ``bulk`` copies of a table that was arranged for it, or
        ``tensor`` copies out of the table as it is. Forward finds coordinates in a ``prepass`` or ``inline``,
        once for each tile of outputs; the input gradient does without a pre-pass.
        """
        common: dict[str, tuple[Constant, ...]] = {
            "samples": (1, 2, 3, 4, 5, 6, 8),
            "threads": (64, 256, 384, 448, 512, 640, 768),
            "stages": (2, 3, 4, 6, 8),
            "blocks": (1, 8),
            "vector": (1, 2, 4),
            "together": _TOGETHER,
            "copies": ("bulk", "tensor"),
        }
        if operation is Operation.FORWARD:
            tile = {"pairs": (1, 2, 4, 8), "outs": (8, 16, 32), "ahead": (1, 2, 4, 8)}
            return tile | common | {"coordinates": ("prepass", "inline")}
        return {"pairs": (1, 2, 4, 8, 16), "outs": (2, 4, 8, 16), "ahead": (1, 2)} | common

    def shared_memory(self, problem: Problem, parameters: Parameters) -> int:
        """Bytes of dynamic shared memory of one block."""
        stage = _stage_bytes(problem, int(parameters["pairs"]), int(parameters["outs"]))
        return int(parameters["stages"]) * stage

    def broken(self, layer: Layer, parameters: Parameters) -> Iterator[Violation]:
        """See base class."""
        shape, device, forward = layer.shape, layer.device, layer.operation is Operation.FORWARD
        if device.compute_capability < 90:
            why = f"bulk copies need sm_90 or newer, {device.name} is {device.arch}"
            yield Violation("architecture", why)
            return
        pairs, outs = int(parameters["pairs"]), int(parameters["outs"])
        words = outs // lanes.pack(layer)
        narrow_rows = lanes.half_rows(layer, pairs, outs) and layer.table is not TableDtype.INT8
        if pairs * words % lanes.WARP and not narrow_rows:
            yield Violation(
                "tile",
                f"a row of {pairs} pairs x {words} words is no multiple of the {lanes.WARP} banks, nor "
                "half of them with two knots to read from",
            )
        if layer.table is TableDtype.INT8 and pairs > SCALE_PAIRS:
            yield Violation("table", f"int8 scales are those of {SCALE_PAIRS} pairs, not {pairs}")
        need, most = self.shared_memory(layer, parameters), device.shared_memory_per_multiprocessor
        blocks = int(parameters["blocks"])
        # 1 KiB of each block's own, and the driver's share
        if need + 1024 > device.shared_memory_per_block or blocks * (need + 2048) > most:
            yield Violation(
                "shared_memory",
                f"num_grids={shape.grids}: {parameters['stages']} stages of {pairs} pairs x {outs} outputs "
                f"need {need} bytes of shared memory, {blocks} times, {device.name} has "
                f"{device.shared_memory_per_block} per block, {most} in all",
            )
        vector = _vector(parameters)
        places = lanes.WARP // (2 if narrow_rows else 1) // vector
        if words % vector or pairs > places:
            yield Violation(
                "tile",
                f"{pairs} pairs x {words} words cannot be read {vector} at a time without bank conflicts",
            )
        if _is_tensor(parameters):
            yield from self._tensor_violations(layer, pairs, vector)
        ahead = int(parameters["ahead"])
        if ahead > pairs:
            yield Violation("wasted", f"ahead={ahead} is more than a stage's {pairs} pairs")
        if forward and ahead < min(2, pairs):
            yield Violation("wasted", f"ahead={ahead} pair leaves loads no time")
        if forward and ahead % 2 and lanes.pack(layer) > 1:
            yield Violation("table", f"two pairs share a sum in {layer.table}, ahead={ahead} is odd")
        if forward and _is_inline(layer, parameters):
            if ahead != pairs:
                why = f"ahead={ahead}: inputs are asked for a stage at a time, by ahead={pairs} pairs"
                yield Violation("wasted", why)
            if layer.table is TableDtype.INT8:
                yield Violation("table", "int8 weights come from a pre-pass")
        needed = self._registers(layer, parameters)
        if needed > (limit := _register_limit(parameters)):
            yield Violation(
                "registers",
                f"{blocks} x {parameters['threads']} threads have {limit} registers each, "
                f"{parameters['samples']} samples x {outs} outputs need about {needed}",
            )

    def batch_violations(self, problem: Problem, parameters: Parameters) -> list[Violation]:
        """See base class."""
        shape = problem.shape
        pairs, outs, threads = int(parameters["pairs"]), int(parameters["outs"]), int(parameters["threads"])
        tiles = -(-shape.outputs // outs)
        stages_of_all = tiles * -(-shape.pairs // pairs) * -(-shape.batch // threads)
        if tiles <= _MAX_GRID and stages_of_all <= _MAX_STAGES:
            return []
        why = (
            f"{tiles} tiles of outputs and {stages_of_all} stages in all, at most {_MAX_GRID} and "
            f"{_MAX_STAGES} can be counted"
        )
        return [Violation("grid", why)]

    def takes_tensor_copies(self, layer: Layer) -> bool:
        """Whether some stages could be copied out of the layer's table as it is."""
        return not self._tensor_violations(layer, _TENSOR_WORDS, 1)

    @staticmethod
    def _tensor_violations(problem: Problem, pairs: int, vector: int) -> list[Violation]:
        """Why stages cannot be copied out of the table as it is."""
        found, shape = [], problem.shape
        if problem.table is TableDtype.INT8:
            found.append(Violation("table", "int8 stages hold scales, which tensor copies do not bring"))
        if vector > 1:
            why = f"tensor copies leave words as they are, not {vector} of them together"
            found.append(Violation("tile", why))
        if pairs % _TENSOR_WORDS:
            why = f"tensor copies take rows of {_TENSOR_WORDS} words, not of {pairs} pairs"
            found.append(Violation("tile", why))
        if shape.pairs % _TENSOR_WORDS:
            why = f"tensor copies need rows of whole 16 bytes, {shape.pairs} input pairs are no multiple of 4"
            found.append(Violation("table", why))
        if shape.grids + 1 > _MAX_BOX:
            why = f"num_grids={shape.grids}: tensor copies take at most {_MAX_BOX} knots along an axis"
            found.append(Violation("grid", why))
        return found

    def wasted(self, problem: Problem, parameters: Parameters) -> bool:
        """See base class."""
        samples, threads = int(parameters["samples"]), int(parameters["threads"])
        return (samples - 1) * threads >= problem.shape.batch or self._wasted_by_layer(problem, parameters)

    @staticmethod
    def _wasted_by_layer(problem: Problem, parameters: Parameters) -> bool:
        """The same for any batch."""
        shape, pairs, outs = problem.shape, int(parameters["pairs"]), int(parameters["outs"])
        if outs >= 2 * shape.outputs or pairs >= 2 * shape.pairs:
            return True
        return int(parameters["together"]) > _most_together(problem, parameters)

    @staticmethod
    def _default_together(problem: Problem, parameters: Parameters) -> int:
        """Tiles that blocks work at together, such that device memory is read the least.

        With ``n`` blocks at ``t`` of all tiles, and per stage ``s`` bytes of what belongs to samples,
        coordinates or gradients, and ``T`` of tables, ``t T + (n / t) s`` are new at a time. Half of the best
        ``t`` was as good or better on an H100 with float tables: blocks drift apart.
        """
        pairs, outs, samples, threads, _, _ = _values(parameters)
        forward = problem.operation is Operation.FORWARD
        of_samples = samples * threads * (8 * pairs if forward else 4 * outs)
        best = math.sqrt(_blocks(problem, parameters) * of_samples / _stage_bytes(problem, pairs, outs))
        best /= 1 if problem.table is TableDtype.INT8 else 2
        fitting = [t for t in _TOGETHER if t <= _most_together(problem, parameters)]
        return min(fitting, key=lambda t: abs(math.log(t / best)))

    @staticmethod
    def _registers(problem: Problem, parameters: Parameters) -> int:
        """What a lane keeps: sums, coordinates asked for and at hand, addresses and weights."""
        pairs, outs, samples, _, _, ahead = _values(parameters)
        if problem.operation is Operation.GRAD_INPUT:
            return 3 * samples * pairs + samples * -(-pairs // 2) + (1 + ahead) * outs + 2 * samples + 20
        narrow = {TableDtype.FLOAT32: 0, TableDtype.INT8: 2 * outs}.get(problem.table, outs // 2)
        return samples * outs + narrow + 4 * ahead + 24

    @staticmethod
    def _spare(problem: Problem, parameters: Parameters) -> int:
        """Registers by which what was never compiled has to stay below its limit."""
        if problem.operation is Operation.GRAD_INPUT:
            pairs, outs, *_ = _values(parameters)
            few = problem.table is TableDtype.FLOAT32 and not _is_later(problem)
            return (24 if few else 40) + 16 * lanes.is_partial(problem, pairs, outs)
        return {TableDtype.FLOAT32: 16, TableDtype.INT8: 8}.get(problem.table, 0)

    def preference(self, problem: Problem) -> float:
        """Faster than tiles that stay, where there are samples enough for every multiprocessor."""
        return 0.5 if problem.shape.batch >= _least_batch(problem.layer) else -0.5

    def default(self, problem: Problem) -> Parameters | None:
        """The fastest of a small set of candidates by their rough times."""
        return _guesses(problem.layer).best(problem.shape.batch)

    def candidates_that_fit(self, layer: Layer) -> Iterator[dict[str, Constant]]:
        """Those for the default that may be taken for some batch."""
        for parameters in self._default_candidates(layer):
            if self.layer_violations(layer, parameters) or self._wasted_by_layer(layer, parameters):
                continue
            needed = self._registers(layer, parameters) + self._spare(layer, parameters)
            if needed <= _register_limit(parameters):
                yield parameters

    @staticmethod
    def _default_candidates(problem: Problem) -> Iterator[dict[str, Constant]]:
        """What never needs more registers than there are: whole rows, read word by word."""
        forward, is_float = problem.operation is Operation.FORWARD, problem.table is TableDtype.FLOAT32
        few = (4, 8) if _is_later(problem) else (4, 8, 16)
        tiles = product((2, 4, 8), (8, 16, 32)) if forward else product((4, 8), few)
        several = (1, 2, 3, 4, 6, 8) if forward else (1, 2, 3, 4)
        ways = product(tiles, several, (256, 384, 512), ("bulk", "tensor"))
        for (pairs, outs), samples, threads, copies in ways:
            if lanes.half_rows(problem, pairs, outs):
                continue
            parameters: dict[str, Constant] = {"pairs": pairs, "outs": outs, "samples": samples}
            parameters |= {"threads": threads, "stages": 2, "blocks": 1, "vector": 1, "copies": copies}
            if forward:
                parameters |= {"ahead": min(pairs, 2 if is_float else 4), "coordinates": "prepass"}
            else:
                parameters["ahead"] = 1
            yield parameters | {"together": OutputStationary._default_together(problem, parameters)}

    @staticmethod
    def cycles(problem: Problem, parameters: Parameters) -> float:
        """Of a column of samples and a stage, roughly; ranks candidates where nothing was tuned."""
        forward = problem.operation is Operation.FORWARD
        pairs, outs, samples, threads, _, ahead = _values(parameters)
        warps = threads // lanes.WARP
        reads = {TableDtype.FLOAT32: 4, TableDtype.INT8: 1}.get(problem.table, 2)
        # of a warp for 32 samples and a stage: passes of the data path, and instructions
        passes = reads * pairs * outs + (4 * pairs if forward else 2 * outs)
        if forward:
            each = {TableDtype.FLOAT32: 8.6, TableDtype.INT8: 3.5}.get(problem.table, 5.3)
            instructions = pairs * (each * outs + 16) + 20
            instructions += 2 * outs * (problem.table is TableDtype.INT8)
            turn = warps * max(passes, instructions / 4) * ahead / pairs
        else:
            each = 10.5 if problem.table is TableDtype.FLOAT32 else 9.5
            instructions = each * pairs * outs + 6 * outs + 30
            turn = warps * max(passes, instructions / 4)
            passes += _PER_STAGE
        stage = _stage_bytes(problem, pairs, outs) / samples / warps
        if _is_tensor(parameters):  # the cache hands out no less than 8 words
            stage *= max(1.0, 8 / pairs)
        cycles = warps * max(passes + stage / 128, instructions / 4)
        cycles = max(cycles, warps * stage / _CACHE_RATE)
        return cycles * ((1 + 8 / warps**2) * max(1.0, _LATENCY_CYCLES / turn))

    def layer_spec(self, layer: Layer, parameters: Parameters) -> KernelSpec:
        """See base class."""
        pairs, outs, samples, threads, stages, ahead = _values(parameters)
        constants = lanes.constants(layer, pairs, outs, _vector(parameters)) | {
            "samples": samples,
            "threads": threads,
            "stages": stages,
            "ahead": ahead,
            "blocks": int(parameters["blocks"]),
            "coordinates": "inline" if _is_inline(layer, parameters) else "prepass",
            "tensor": int(_is_tensor(parameters)),
            "strided": int(not _is_plain(layer, parameters)),
        }
        return KernelSpec.make("output_stationary.cu.j2", layer.device.arch, constants)

    def plan(self, problem: Problem, parameters: Parameters) -> LaunchPlan:
        """See base class."""
        shape, forward = problem.shape, problem.operation is Operation.FORWARD
        pairs, outs, samples, threads, _, _ = _values(parameters)
        warps = threads // lanes.WARP
        pair_tiles, out_tiles = -(-shape.pairs // pairs), -(-shape.outputs // outs)
        workspaces: list[Workspace] = []
        steps: list[Launch] = []
        source: tuple[str, ...] = ("x", "borders")
        layout = () if _is_plain(problem, parameters) else strides("x")
        if not _is_inline(problem, parameters):
            source, layout = ("coordinates",), ()
            workspaces, launch = lanes.prepass(problem, pairs, spare=samples * warps)
            steps.append(launch)
        words, tile_words = -(-shape.outputs // lanes.pack(problem)), outs // lanes.pack(problem)
        arranged = _is_arranged(problem, parameters)
        stages: Argument = "stages"
        if _is_tensor(parameters):
            side = shape.grids + 1
            (table,) = lanes.table_buffers(problem)
            stages = TensorMap(table, (shape.pairs, words, side, side), (pairs, tile_words, side, side))
        elif arranged:
            stage_bytes = _stage_bytes(problem, pairs, outs)
            workspaces.append(Workspace("stages", out_tiles * pair_tiles * stage_bytes))
            of_block = -(-_ARRANGED_WORDS // (pair_tiles * pairs * tile_words))
            rows = min(lanes.rows(problem), of_block)
            sizes_of: tuple[Argument, ...] = (shape.pairs, words, rows)
            table_of = (*lanes.table_buffers(problem), "stages", *sizes_of)
            grid = (-(-lanes.rows(problem) // rows), out_tiles, 1)
            steps.append(Launch("lmkan_arrange_table", table_of, grid, 256))
        else:
            stages = Stages(pairs, tile_words, _vector(parameters))
        by_plan: tuple[int, ...] = (int(arranged),) if forward else ()
        buffers: tuple[str, ...] = ("y",) if forward else ("grad", "grad_x")
        tiles = out_tiles if forward else pair_tiles
        sizes = (shape.batch, shape.pairs, shape.outputs)
        # a column of samples is the least that a block works on
        columns = -(-shape.batch // threads) * tiles
        # a plain number: how it divides is not arithmetic that can be traced
        blocks = int(min(_blocks(problem, parameters), columns))
        # where that divides the blocks, each stays at its tile until all are through with it
        wanted = min(int(parameters["together"]), tiles, blocks)
        divisors = (t for t in range(1, blocks + 1) if blocks % t == 0)
        together = min(tiles, min(divisors, key=lambda t: abs(math.log(t / wanted))))
        steps.append(
            Launch(
                f"lmkan_{problem.operation}",
                (*source, stages, *buffers, *sizes, together, *by_plan, *layout),
                (blocks, 1, 1),
                threads,
                self.shared_memory(problem, parameters),
            )
        )
        return LaunchPlan(tuple(workspaces), (*steps, *lanes.far_samples(problem)))


def _values(parameters: Parameters) -> tuple[int, int, int, int, int, int]:
    return (
        int(parameters["pairs"]),
        int(parameters["outs"]),
        int(parameters["samples"]),
        int(parameters["threads"]),
        int(parameters["stages"]),
        int(parameters["ahead"]),
    )


def _blocks(problem: Problem, parameters: Parameters) -> int:
    """Blocks that run at a time."""
    return problem.device.multiprocessors * int(parameters["blocks"])


def _most_together(problem: Problem, parameters: Parameters) -> int:
    """Tiles that blocks can be at together."""
    tiles, _ = lanes.tiles(problem, int(parameters["pairs"]), int(parameters["outs"]))
    return min(tiles, _blocks(problem, parameters))


def _is_later(problem: Problem) -> bool:
    """Whether the architecture is one after Hopper, for which ptxas takes more registers."""
    return problem.device.compute_capability >= 100


def _is_tensor(parameters: Parameters) -> bool:
    """Whether stages are copied out of the table as it is."""
    return parameters["copies"] == "tensor"


def _is_arranged(problem: Problem, parameters: Parameters) -> bool:
    """Whether a kernel of the plan arranges the table, and not the caller for many calls, or nobody."""
    return not (_is_kept(problem) or _is_tensor(parameters))


def _is_kept(problem: Problem) -> bool:
    """Whether the caller arranges the table, once for many calls."""
    return problem.constant and problem.operation is Operation.FORWARD


def _is_inline(problem: Problem, parameters: Parameters) -> bool:
    """Whether coordinates are computed where they are needed: by input gradients, who need them twice."""
    return problem.operation is Operation.GRAD_INPUT or parameters["coordinates"] == "inline"


def _is_plain(problem: Problem, parameters: Parameters) -> bool:
    """Whether ``x`` as kernels read it needs no care: those without a pre-pass get a copy of strided inputs.

    Lanes would read them from a line of memory each: 1.4 times as long for a forward at 128, 128, 10, 16384.
    """
    return problem.is_plain or (_is_inline(problem, parameters) and problem.shape.inputs % 2 == 0)


def _vector(parameters: Parameters) -> int:
    return int(parameters["vector"])


def _register_limit(parameters: Parameters) -> int:
    """Registers that launch bounds leave a thread, in allocation units of 8."""
    threads = int(parameters["threads"]) * int(parameters["blocks"])
    return min(registers_per_thread(threads), REGISTERS // threads // 8 * 8)


def _stage_bytes(problem: Problem, pairs: int, outs: int) -> int:
    """Bytes of a stage: tables, and with int8 the scales of its outputs, each up to the next first bank."""
    scales = outs if problem.table is TableDtype.INT8 else 0
    words = (lanes.rows(problem) * pairs * outs // lanes.pack(problem), scales)
    return sum(4 * lanes.WARP * -(-count // lanes.WARP) for count in words)


FAMILY = OutputStationary()


class _Guesses:
    """Candidates for a layer's default, and their rough times for any batch."""

    def __init__(self, layer: Layer) -> None:
        self._candidates = list(FAMILY.candidates_that_fit(layer))
        self._multiprocessors = layer.device.multiprocessors

        def column(values: Iterable[float]) -> NDArray[np.float64]:
            return np.array(list(values), np.float64)

        tiles = [lanes.tiles(layer, int(c["pairs"]), int(c["outs"])) for c in self._candidates]
        self._tiles, self._summed = column(t for t, _ in tiles), column(summed for _, summed in tiles)
        self._threads = column(int(c["threads"]) for c in self._candidates)
        self._cycles = column(FAMILY.cycles(layer, c) for c in self._candidates)
        # with fewer samples than this some threads would have fewer than the others
        self._least = column((int(c["samples"]) - 1) * int(c["threads"]) + 1 for c in self._candidates)
        # bytes that are moved ahead of the kernel, per sample and in any case
        located = (not _is_inline(layer, c) for c in self._candidates)
        self._per_sample = column(16 * layer.shape.pairs * moved for moved in located)
        self._arranged = column(
            2 * t * summed * _stage_bytes(layer, int(c["pairs"]), int(c["outs"])) * _is_arranged(layer, c)
            for c, (t, summed) in zip(self._candidates, tiles, strict=True)
        )

    def best(self, batch: int) -> Parameters | None:
        """The fastest for so many samples, the first of equal ones; None where none fits."""
        if not self._candidates:
            return None
        columns = np.ceil(batch / self._threads) * self._tiles
        fits = (self._least <= batch) & (columns * self._summed <= _MAX_STAGES)
        # of the busiest multiprocessor
        busiest = np.ceil(columns / self._multiprocessors)
        moved = batch * self._per_sample + self._arranged
        times = busiest * self._summed * self._cycles / _CYCLES_PER_US + moved / _COPY_RATE + 3 * _LAUNCH_US
        best = int(np.where(fits, times, np.inf).argmin())
        return self._candidates[best] if fits[best] else None


@lru_cache(maxsize=1024)
def _least_batch(layer: Layer) -> int:
    """Samples that are enough for every multiprocessor; twice as many where the table has to be arranged."""
    width = layer.shape.outputs if layer.operation is Operation.FORWARD else layer.shape.pairs
    arranged = not (FAMILY.takes_tensor_copies(layer) or _is_kept(layer))
    return -(-(256 if arranged else 128) * lanes.WARP * layer.device.multiprocessors // width)


@lru_cache(maxsize=1024)
def _guesses(layer: Layer) -> _Guesses:
    return _Guesses(layer)
