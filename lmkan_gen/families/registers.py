"""SIMD registers of CPUs, as `templates/registers.h.j2` is rendered for them."""

from lmkan_gen.device import Device

_LANES = {"generic": 4, "x86-64-v3": 8, "x86-64-v4": 16}


def lanes(device: Device) -> int:
    """Floats of one register of a CPU."""
    return _LANES[device.arch]
