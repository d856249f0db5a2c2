"""SIMD registers of CPUs, as `templates/registers.h.j2` is rendered for them, and gathers into them."""

from __future__ import annotations

from lmkan_gen.device import Device
from lmkan_gen.families.base import Parameters, Violation
from lmkan_gen.problem import LayerShape

#: indices of gathers are 32-bit integers
_MOST_PARAMETERS = 2**31 - 1

_LANES = {"generic": 4, "x86-64-v3": 8, "x86-64-v4": 16}


def lanes(device: Device) -> int:
    """Floats of one register of a CPU."""
    return _LANES[device.arch]


def gather_violations(shape: LayerShape) -> list[Violation]:
    """Why the table of a layer cannot be gathered from."""
    count = shape.table_bytes // 4
    if count <= _MOST_PARAMETERS:
        return []
    return [Violation("indices", f"the table has {count} parameters, at most {_MOST_PARAMETERS} fit")]


def is_half_empty(shape: LayerShape, parameters: Parameters, least: int) -> bool:
    """Whether half of ``outputs_tile`` would hold all outputs as well; ``least`` is the smallest tile."""
    tile = int(parameters.get("outputs_tile", least))
    return tile > least and tile // 2 >= shape.outputs
