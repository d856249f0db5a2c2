"""The Hessian regulariser on CUDA: warps march along the first axis of the table.

See the head of ``templates/hessian_marching.cu.j2`` for the idea and what bounds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lmkan_gen.families.base import Family, Parameters, Violation
from lmkan_gen.plan import Constant, KernelSpec, Launch, LaunchPlan, Workspace
from lmkan_gen.problem import Layer, Operation, Problem

_WARP = 32
_TOTAL_THREADS = 1024
_STATIC_SHARED = 48 * 1024
#: warps that keep a multiprocessor's loads in flight; a march is cut into stretches of rows to have them
_WARPS_WANTED = 32
#: a stretch loads four rows more than it has
_LEAST_ROWS = 8


class HessianMarching(Family):
    """Value and gradient, every element of the table loaded from memory once for each."""

    name = "hessian_marching"
    device_kind = "cuda"
    operations = frozenset({Operation.HESSIAN, Operation.GRAD_HESSIAN})
    idea = "a warp marches along one axis of the grid, lanes along functions, rows in registers"

    def space(self, operation: Operation) -> Mapping[str, tuple[Constant, ...]]:
        """See base class.

        A lane has ``vector`` functions, a block ``warps`` neighbouring columns; rows are asked into the
        second-level cache ``ahead`` rows before they are loaded.
        """
        return {"vector": (1, 2, 4), "warps": (4, 8), "ahead": (0, 2, 4, 8)}

    def broken(self, layer: Layer, parameters: Parameters) -> Iterator[Violation]:
        """See base class."""
        functions, (vector, warps) = _functions(layer), _values(parameters)
        if functions % vector:
            yield Violation("divisibility", f"vector={vector} does not divide {functions} functions per knot")
        need = 8 * (layer.shape.grids + 5) + 8 * max(_WARP * warps, _TOTAL_THREADS)
        if need > _STATIC_SHARED:
            yield Violation(
                "shared_memory",
                f"{layer.shape.grids} grids need {need} bytes of shared memory, at most "
                f"{_STATIC_SHARED} are there",
            )

    def default(self, problem: Problem) -> Parameters | None:
        """Wide lanes as far as enough warps remain: they keep more bytes in flight."""
        enough = _WARPS_WANTED * problem.device.multiprocessors
        fitting = [{"vector": v, "warps": 8, "ahead": 4} for v in (4, 2, 1)]
        fitting = [p for p in fitting if not self.violations(problem, p)]
        busy = (p for p in fitting if self._marches(problem, p["vector"]) >= enough)
        return next(busy, fitting[-1] if fitting else None)

    @staticmethod
    def _marches(problem: Problem, vector: int) -> int:
        """Warps, when none of their columns is cut into stretches."""
        return -(-_functions(problem) // (_WARP * vector)) * _columns(problem)

    def layer_spec(self, layer: Layer, parameters: Parameters) -> KernelSpec:
        """See base class."""
        vector, warps = _values(parameters)
        return KernelSpec.make(
            "hessian_marching.cu.j2",
            layer.device.arch,
            {
                "operation": str(layer.operation),
                "grids": layer.shape.grids,
                "vector": vector,
                "warps": warps,
                "ahead": parameters["ahead"],
            },
        )

    def plan(self, problem: Problem, parameters: Parameters) -> LaunchPlan:
        """See base class."""
        vector, warps = _values(parameters)
        columns = _columns(problem)  # of the kernel's work, as many as rows
        marches = self._marches(problem, vector)
        wanted = -(-_WARPS_WANTED * problem.device.multiprocessors // marches)
        stretches = max(1, min(wanted, columns // _LEAST_ROWS))
        rows = -(-columns // stretches)
        stretches = -(-columns // rows)
        blocks = -(-marches * stretches // warps)
        sizes = (_functions(problem), rows, stretches)
        kernel, grid, block = f"lmkan_{problem.operation}", (blocks, 1, 1), _WARP * warps
        if problem.operation is Operation.GRAD_HESSIAN:
            buffers = ("table", "borders", "scale", "grad_table")
            return LaunchPlan((), (Launch(kernel, (*buffers, *sizes), grid, block),))
        return LaunchPlan(
            (Workspace("partial", 8 * blocks),),
            (
                Launch(kernel, ("table", "borders", "partial", *sizes), grid, block),
                Launch("lmkan_hessian_total", ("partial", "value", blocks), (1, 1, 1), _TOTAL_THREADS),
            ),
        )


def _values(parameters: Parameters) -> tuple[int, int]:
    return int(parameters["vector"]), int(parameters["warps"])


def _functions(problem: Problem) -> int:
    return problem.shape.outputs * problem.shape.pairs


def _columns(problem: Problem) -> int:
    """Knots along an axis that have a result: all have a gradient, the inner ones a second derivative."""
    grids = problem.shape.grids
    return grids + 1 if problem.operation is Operation.GRAD_HESSIAN else grids - 1


FAMILY = HessianMarching()
