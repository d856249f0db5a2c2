"""Matrix-product CUDA kernels for tiny grids, wide layers and few samples: tables meet tensor cores.

See the head of ``templates/matrix_product.cu.j2`` for the idea and what bounds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import product

from lmkan_gen.device import registers_per_thread
from lmkan_gen.families import lanes
from lmkan_gen.families.base import Family, Parameters, Violation
from lmkan_gen.packing import FRAGMENT_SCALES, Fragments
from lmkan_gen.plan import Argument, Constant, KernelSpec, Launch, LaunchPlan, Workspace, strides
from lmkan_gen.problem import Layer, Operation, Problem, TableDtype

_STEP = 16  # pairs, or outputs, of a piece of a table
_PAD = 32  # pairs are located up to a multiple of it
_LOCATED = 4  # pairs of a thread that locates
_MAX_GRID = 65535  # blocks along the second and third axis
_MAX_BLOCKS = 2**31 - 1
_MAX_GRIDS = 15  # a cell has 4 bits per axis
_RESERVED = 1024  # bytes of shared memory of each block: the driver's, and what kernels have beside
_THREADS = 256  # of a block of what comes before and after


class MatrixProduct(Family):
    """Forward of all tables and both gradients of float ones, as dense products on tensor cores."""

    name = "matrix_product"
    device_kind = "cuda"
    operations = frozenset({Operation.FORWARD, Operation.GRAD_INPUT, Operation.GRAD_TABLE})
    idea = "for tiny grids, wide layers and few samples: a dense product of table and weights on tensor cores"

    def computes(self, operation: Operation, table: TableDtype) -> bool:
        """See base class."""
        return operation in self.operations and (
            operation is Operation.FORWARD or table is not TableDtype.INT8
        )

    def space(self, operation: Operation) -> Mapping[str, tuple[Constant, ...]]:
        """See base class.

        A block has a tile of ``samples``. Forward: its ``warps`` have ``tiles`` of 16 outputs each, of int8
        tables in twos, and make the weights of ``pairs`` together; it sums over a ``slice`` of the pairs.
        Gradients: it has the gradients of ``outs`` outputs, a warp 16 pairs of inputs or ``tiles`` of 8.
        Copies of tables run ahead by ``stages``.
        """
        if operation is Operation.FORWARD:
            return {
                "samples": (32, 64, 128),
                "warps": (4, 8, 16),
                "tiles": (1, 2, 4),
                "pairs": (16, 32),
                "slice": (32, 64, 128, 256, 512),
                "stages": (3, 4, 6, 8),
            }
        common: dict[str, tuple[Constant, ...]] = {"outs": (64, 128, 256, 352)}
        if operation is Operation.GRAD_INPUT:
            return common | {"samples": (32, 64), "warps": (4, 8, 12, 16), "stages": (3, 4, 6, 8, 12)}
        return common | {"samples": (32, 64, 128), "warps": (4, 8, 12, 16), "tiles": (1, 2, 4)}

    def shared_memory(self, problem: Problem, parameters: Parameters) -> int:
        """Bytes of dynamic shared memory of one block."""
        samples, warps = int(parameters["samples"]), int(parameters["warps"])
        if problem.operation is Operation.FORWARD:
            pairs, tiles = int(parameters["pairs"]), int(parameters["tiles"])
            weights = 4 * _parts(problem) * (problem.shape.grids + 1) * pairs * samples
            # a stage has 16 pairs of a knot, of bytes all that weights are made of
            size = {TableDtype.FLOAT32: 4, TableDtype.INT8: pairs // _STEP}.get(problem.table, 2)
            return weights + warps * int(parameters["stages"]) * size * _STEP * _STEP * tiles
        outs = int(parameters["outs"])
        if problem.operation is Operation.GRAD_TABLE:
            return 8 * outs * samples
        return 4 * (outs * samples + warps * int(parameters["stages"]) * _STEP * _STEP)

    @staticmethod
    def _registers(problem: Problem, parameters: Parameters) -> int:
        """What a lane keeps: sums, fragments of both factors, addresses."""
        samples = int(parameters["samples"])
        if problem.operation is Operation.GRAD_INPUT:
            return 2 * samples + 40
        tiles = int(parameters["tiles"])
        if problem.operation is Operation.GRAD_TABLE:
            return tiles * samples // 2 + 8 * tiles + 48
        if _parts(problem) == 1:
            ratios = tiles * int(parameters["pairs"]) // 8 if problem.table is TableDtype.INT8 else 0
            return tiles * samples // 2 + samples // 4 + ratios + 28
        return tiles * samples + samples // 2 + 28

    def broken(self, layer: Layer, parameters: Parameters) -> Iterator[Violation]:
        """See base class."""
        shape, device = layer.shape, layer.device
        if device.compute_capability < 80:
            why = f"tensor cores for float32 need sm_80 or newer, {device.name} is {device.arch}"
            yield Violation("architecture", why)
            return
        if layer.table is TableDtype.INT8:
            if int(parameters["tiles"]) % 2:
                why = f"int8 coefficients of 32 outputs lie together: tiles={parameters['tiles']} is odd"
                yield Violation("tile", f"{why}, must be 2 or 4")
            if not layer.constant:
                why = "int8 tables are arranged for tensor cores, which pays where they do not change"
                yield Violation("constant", why)
        if shape.grids > _MAX_GRIDS:
            yield Violation(
                "grid", f"num_grids={shape.grids}: a cell has 4 bits per axis, at most {_MAX_GRIDS} fit"
            )
        need = self.shared_memory(layer, parameters)
        if need + _RESERVED > device.shared_memory_per_block:
            yield Violation(
                "shared_memory",
                f"num_grids={shape.grids}: {dict(parameters)} need {need} bytes of shared memory, "
                f"{device.name} has {device.shared_memory_per_block} per block",
            )
        limit = registers_per_thread(lanes.WARP * int(parameters["warps"]))
        if (needed := self._registers(layer, parameters)) > limit:
            yield Violation(
                "registers",
                f"samples={parameters['samples']} need about {needed} registers, "
                f"{parameters['warps']} warps have {limit} each",
            )
        if layer.operation is Operation.FORWARD and int(parameters["slice"]) <= int(parameters["pairs"]):
            why = f"slice={parameters['slice']} is no more than pairs={parameters['pairs']}"
            yield Violation("wasted", f"{why}: no weights are made ahead")
        _, *rest = self._grid(layer, parameters)
        if max(rest) > _MAX_GRID:
            yield Violation("grid", f"{rest} blocks, at most {_MAX_GRID} fit a launch")

    def batch_violations(self, problem: Problem, parameters: Parameters) -> list[Violation]:
        """See base class."""
        found, shape = [], problem.shape
        widest = max(shape.outputs, _padded(problem))
        summed = widest * _located_samples(problem, parameters)
        if -(-summed // _THREADS) > _MAX_BLOCKS:
            found.append(Violation("grid", f"samples x outputs or inputs exceed {_MAX_BLOCKS} blocks"))
        scratch = self._planes(problem, parameters) + self._weights(problem, parameters)
        if scratch > problem.workspace:
            why = f"weights and partial sums need {scratch} bytes, the limit is {problem.workspace}"
            found.append(Violation("workspace", why))
        return found

    def wasted(self, problem: Problem, parameters: Parameters) -> bool:
        """Tiles, warps, slices or parts that are mostly padding, and tables that are read again and again."""
        shape = problem.shape
        samples, warps = int(parameters["samples"]), int(parameters["warps"])
        if samples >= 2 * max(shape.batch, lanes.WARP) or shape.batch > 8 * samples:
            return True
        if problem.operation is Operation.FORWARD:
            outs = _STEP * int(parameters["tiles"]) * warps
            few = int(parameters["slice"]) >= 2 * max(shape.pairs, lanes.WARP)
            return few or outs >= 2 * max(shape.outputs, 64)
        pairs = warps * (_STEP if problem.operation is Operation.GRAD_INPUT else 8 * int(parameters["tiles"]))
        return int(parameters["outs"]) >= 2 * max(shape.outputs, 64) or pairs >= 2 * max(shape.pairs, 64)

    def preference(self, problem: Problem) -> float:
        """Where reading the table dominates: its dense product costs tensor cores no more than that."""
        shape = problem.shape
        tiny = shape.grids <= 6 and 16 < shape.batch <= 256
        return 1.5 if tiny and min(shape.pairs, shape.outputs) >= 512 else -3.0

    def default(self, problem: Problem) -> Parameters | None:
        """Of a few good candidates the one whose blocks leave the fewest multiprocessors idle."""
        batch = problem.shape.batch
        samples = _default_samples(batch)
        return _default(problem.layer, -(-batch // samples) * samples)

    def default_of_whole_tiles(self, problem: Problem) -> Parameters | None:
        """The same for a batch of whole tiles, and so for all batches of as many tiles."""
        best: tuple[float, dict[str, Constant]] | None = None
        for parameters in self._default_candidates(problem):
            if self.violations(problem, parameters):
                continue
            x, y, z = self._grid(problem, parameters)
            blocks, processors = x * y * z, problem.device.multiprocessors
            rounds = -(-blocks // processors)
            idle = rounds * processors / blocks + 0.02 * rounds + 8.0 * self.wasted(problem, parameters)
            if best is None or idle < best[0]:
                best = (idle, parameters)
        return best[1] if best else None

    @staticmethod
    def _default_candidates(problem: Problem) -> Iterator[dict[str, Constant]]:
        samples = _default_samples(problem.shape.batch)
        if problem.operation is Operation.FORWARD:
            # less time goes by per coefficient of a byte, so more of them have to be under way
            ahead = (6, 4, 3) if problem.table is TableDtype.INT8 else (4, 3)
            for pairs, warps, sliced, stages in product((32, 16), (8, 4), (256, 128, 64, 32, 512), ahead):
                block: dict[str, Constant] = {"samples": samples, "warps": warps, "tiles": 2}
                yield block | {"pairs": pairs, "slice": sliced, "stages": stages}
        elif problem.operation is Operation.GRAD_INPUT:
            for warps, outs, stages in product((12, 8, 4), (352, 256, 128, 64), (4, 3)):
                yield {"samples": samples, "warps": warps, "outs": outs, "stages": stages}
        else:
            for (warps, tiles), outs in product(((16, 2), (8, 4), (4, 4)), (256, 128, 64)):
                yield {"samples": samples, "warps": warps, "outs": outs, "tiles": tiles}

    def layer_spec(self, layer: Layer, parameters: Parameters) -> KernelSpec:
        """See base class."""
        constants: dict[str, Constant] = {
            "operation": str(layer.operation),
            "grids": layer.shape.grids,
            # gradients of half operands: reading the table as it is takes no longer than to round it
            "table": str(layer.table if layer.operation is Operation.FORWARD else TableDtype.FLOAT32),
            **{name: parameters[name] for name in self.space(layer.operation) if name != "slice"},
        }
        return KernelSpec.make("matrix_product.cu.j2", layer.device.arch, constants)

    @staticmethod
    def _grid(problem: Problem, parameters: Parameters) -> tuple[int, int, int]:
        """Blocks of the product's kernel; those that share a table's part are neighbours."""
        shape, warps = problem.shape, int(parameters["warps"])
        tiles = _batch_tiles(problem, parameters)
        if problem.operation is Operation.FORWARD:
            outs = _STEP * int(parameters["tiles"]) * warps
            return tiles, -(-shape.outputs // outs), -(-shape.pairs // int(parameters["slice"]))
        parts = -(-shape.outputs // int(parameters["outs"]))
        if problem.operation is Operation.GRAD_INPUT:
            return tiles, -(-shape.pairs // (_STEP * warps)), parts
        return -(-shape.pairs // (8 * int(parameters["tiles"]) * warps)), parts, 1

    def _planes(self, problem: Problem, parameters: Parameters) -> int:
        """Bytes of partial sums, of which each block writes its own."""
        if problem.operation is Operation.GRAD_TABLE:
            return 0
        samples = _located_samples(problem, parameters)
        forward = problem.operation is Operation.FORWARD
        size = 4 * problem.shape.outputs if forward else 8 * _padded(problem)
        return self._grid(problem, parameters)[2] * samples * size

    @staticmethod
    def _weights(problem: Problem, parameters: Parameters) -> int:
        """Bytes of weights of all samples at all knots, in half precision: of float32 two parts of each."""
        if problem.operation is not Operation.FORWARD:
            return 0
        samples = _located_samples(problem, parameters)
        return 2 * _parts(problem) * problem.shape.knots * _padded(problem) * samples

    def plan(self, problem: Problem, parameters: Parameters) -> LaunchPlan:
        """See base class."""
        shape, operation = problem.shape, problem.operation
        rows, samples = _padded(problem), _located_samples(problem, parameters)
        grid = self._grid(problem, parameters)
        arguments: tuple[Argument, ...]
        steps: list[Launch] = []
        workspaces: list[Workspace] = []
        inputs: tuple[Argument, ...] = (shape.inputs, shape.batch, rows)
        if operation is Operation.FORWARD:
            # bfloat16 has room for any weight
            powers: tuple[str, ...] = () if problem.table is TableDtype.BFLOAT16 else ("powers",)
            located: tuple[str, ...] = ("weights", *powers)
            workspaces.append(Workspace("weights", self._weights(problem, parameters)))
            workspaces.extend(Workspace(name, 4 * samples * grid[2]) for name in powers)
            made = (*inputs, int(parameters["slice"]), *strides("x"))
            blocks = (samples // _STEP, rows // int(parameters["pairs"]), 1)
            steps.append(Launch("lmkan_make_weights", ("x", "borders", *located, *made), blocks, _THREADS))
        else:
            located = ("fractions", "cells")
            workspaces += [Workspace("fractions", 8 * rows * samples), Workspace("cells", rows * samples)]
            jobs = rows // _LOCATED * (samples // lanes.WARP)
            blocks = (-(-jobs // (_THREADS // lanes.WARP)), 1, 1)
            arguments = ("x", "borders", *located, *inputs, *strides("x"))
            steps.append(Launch("lmkan_locate", arguments, blocks, _THREADS))
        if operation is not Operation.GRAD_TABLE:
            workspaces.append(Workspace("planes", self._planes(problem, parameters)))
        # parts are as even as pieces of 16 outputs allow, so that they may be fewer
        parts = grid[1] if operation is Operation.GRAD_TABLE else grid[2]
        part = -(-shape.outputs // (_STEP * parts)) * _STEP
        parts = -(-shape.outputs // part)
        sizes: tuple[Argument, ...] = (shape.pairs, rows, shape.outputs)
        summed = 0
        ends: tuple[Argument, ...] = ()
        if operation is Operation.FORWARD:
            table = lanes.table_buffers(problem)
            if problem.table is TableDtype.INT8:
                table = (Fragments(int(parameters["pairs"])), FRAGMENT_SCALES)
            arguments = (*table, *located, "planes", *sizes, int(parameters["slice"]))
            summed = shape.outputs * samples
            ends = ("planes", "y", shape.outputs, shape.batch, grid[2])
        elif operation is Operation.GRAD_INPUT:
            grid = (grid[0], grid[1], parts)
            split = ("gradients", "powers")
            workspaces += [
                Workspace("gradients", 4 * parts * part * samples),
                Workspace("powers", 4 * parts * samples),
            ]
            whole = (shape.outputs, shape.batch, part, *strides("grad"))
            blocks = (samples // _STEP, parts, 1)
            steps.append(Launch("lmkan_split_gradients", ("grad", *split, *whole), blocks, _THREADS))
            arguments = ("table", *split, *located, "planes", *sizes, part)
            summed = rows * samples
            of_inputs = (shape.inputs, shape.batch, rows, parts, *strides("grad_x"))
            ends = ("planes", "cells", "borders", "grad_x", *of_inputs)
        else:
            grid = (grid[0], parts, 1)
            of_outputs = (shape.batch, part, *strides("grad"))
            arguments = ("grad", *located, "grad_table", *sizes, *of_outputs)
        threads = lanes.WARP * int(parameters["warps"])
        shared = self.shared_memory(problem, parameters)
        steps.append(Launch(f"lmkan_{operation}", arguments, grid, threads, shared))
        if ends:
            name = "lmkan_sum_outputs" if operation is Operation.FORWARD else "lmkan_sum_slopes"
            steps.append(Launch(name, ends, (-(-summed // _THREADS), 1, 1), _THREADS))
        return LaunchPlan(tuple(workspaces), tuple(steps))


def _default_samples(batch: int) -> int:
    return 64 if batch > lanes.WARP else lanes.WARP


def _padded(problem: Problem) -> int:
    """Pairs that are located."""
    return -(-problem.shape.pairs // _PAD) * _PAD


def _parts(problem: Problem) -> int:
    """Numbers in half precision that a weight of forward is made of."""
    return 2 if problem.table is TableDtype.FLOAT32 else 1


def _batch_tiles(problem: Problem, parameters: Parameters) -> int:
    samples = int(parameters["samples"])
    return -(-problem.shape.batch // samples)


def _located_samples(problem: Problem, parameters: Parameters) -> int:
    """Samples in whole tiles."""
    return _batch_tiles(problem, parameters) * int(parameters["samples"])


FAMILY = MatrixProduct()


@lru_cache(maxsize=1024)
def _default(layer: Layer, batch: int) -> Parameters | None:
    shape = replace(layer.shape, batch=batch)
    return FAMILY.default_of_whole_tiles(layer.of(shape))
