"""The Hessian regulariser on CPUs: strips of functions, SIMD along them.

See the head of ``templates/hessian_strips.cpp.j2``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from lmkan_gen.families.base import Family, Parameters
from lmkan_gen.plan import Constant, KernelSpec, Launch, LaunchPlan, Workspace
from lmkan_gen.problem import Layer, Operation, Problem

#: floats of one SIMD register
_LANES = {"generic": 4, "x86-64-v3": 8, "x86-64-v4": 16}
#: functions of a task
_STRIP = 128


class HessianStrips(Family):
    """Value and gradient on any CPU with gcc or clang; nothing to tune."""

    name: ClassVar[str] = "hessian_strips"
    device_kind: ClassVar[Literal["cpu", "cuda"]] = "cpu"
    operations: ClassVar[frozenset[Operation]] = frozenset({Operation.HESSIAN, Operation.GRAD_HESSIAN})
    idea: ClassVar[str] = "all knots of a strip of functions at a time, SIMD along the functions"

    def space(self, operation: Operation) -> Mapping[str, tuple[Constant, ...]]:
        return {}

    def default(self, problem: Problem) -> Parameters | None:
        return {}

    def layer_spec(self, layer: Layer, parameters: Parameters) -> KernelSpec:
        return KernelSpec.make(
            "hessian_strips.cpp.j2",
            layer.device.arch,
            {
                "operation": str(layer.operation),
                "grids": layer.shape.grids,
                "lanes": _LANES[layer.device.arch],
                "strip": _STRIP,
            },
        )

    def plan(self, problem: Problem, parameters: Parameters) -> LaunchPlan:
        functions = problem.shape.outputs * problem.shape.pairs
        if problem.operation is Operation.GRAD_HESSIAN:
            buffers = ("table", "borders", "scale", "grad_table", functions)
            return LaunchPlan((), (Launch("grad_hessian", buffers),))
        partial = Workspace("partial", 8 * -(-functions // _STRIP))
        return LaunchPlan(
            (partial,), (Launch("hessian", ("table", "borders", "partial", "value", functions)),)
        )


FAMILY = HessianStrips()
