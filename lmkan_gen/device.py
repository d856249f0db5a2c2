"""What a device offers. Plain data, so one can ask what an `sm_86` would get without owning one."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from lmkan_gen.text import cleaned

KIB = 1024
#: of a multiprocessor, on every architecture
REGISTERS = 65536


@dataclass(frozen=True)
class Device:
    """Capabilities that kernel choices depend on.

    Attributes:
        kind: ``"cpu"`` or ``"cuda"``.
        name: as the vendor calls the model; tuning files are matched by it.
        arch: ``sm_XY`` for CUDA; a compiler's ``-march`` level such as ``x86-64-v4``, or
            ``generic``, for CPU.
        multiprocessors: streaming multiprocessors (CUDA) or usable cores (CPU).
        shared_memory_per_block: largest opt-in shared memory of one block, bytes (0 on CPU).
        shared_memory_per_multiprocessor: bytes (0 on CPU).
    """

    kind: Literal["cpu", "cuda"]
    name: str
    arch: str
    multiprocessors: int
    shared_memory_per_block: int = 0
    shared_memory_per_multiprocessor: int = 0

    @property
    def compute_capability(self) -> int:
        """``90`` for ``sm_90``; 0 on CPU."""
        return int(self.arch.removeprefix("sm_")) if self.kind == "cuda" else 0


def registers_per_thread(threads: int) -> int:
    """Registers that are left each of so many threads of a multiprocessor."""
    return min(255, REGISTERS // threads)


#: Shared memory of a block and of a multiprocessor in KiB, then models as the driver names them with
#: their multiprocessors, the typical one first. CUDA C programming guide, technical specifications per
#: compute capability; multiprocessors from the vendor's data sheets.
_MODELS: dict[str, tuple[int, int, dict[str, int]]] = {
    "sm_75": (64, 64, {"Tesla T4": 40, "NVIDIA GeForce RTX 2080 Ti": 68}),
    "sm_80": (163, 164, {"NVIDIA A100": 108, "NVIDIA A30": 56}),
    "sm_86": (
        99,
        100,
        {"NVIDIA GeForce RTX 3080": 68, "NVIDIA GeForce RTX 3090": 82, "NVIDIA A10": 72, "NVIDIA A40": 84},
    ),
    "sm_89": (99, 100, {"NVIDIA GeForce RTX 4090": 128, "NVIDIA L4": 58, "NVIDIA L40S": 142}),
    "sm_90": (227, 228, {"NVIDIA H200": 132, "NVIDIA H100 80GB HBM3": 132, "NVIDIA H100 PCIe": 114}),
    "sm_100": (227, 228, {"NVIDIA B200": 148}),
    "sm_120": (99, 100, {"NVIDIA GeForce RTX 5090": 170, "NVIDIA GeForce RTX 5080": 84}),
}
CUDA_ARCHITECTURES = tuple(_MODELS)


def models(arch: str) -> tuple[Device, ...]:
    """Well-known GPUs of an architecture (``sm_75`` ... ``sm_120``), the typical one first.

    Raises:
        ValueError: an architecture that no kernels are made for.
    """
    if arch not in _MODELS:
        raise ValueError(f"unknown architecture {arch!r}; choose one of {', '.join(_MODELS)}")
    per_block, per_multiprocessor, known = _MODELS[arch]
    return tuple(
        Device("cuda", name, arch, multiprocessors, per_block * KIB, per_multiprocessor * KIB)
        for name, multiprocessors in known.items()
    )


def target(name: str) -> Device:
    """A device by target name: ``cpu`` (this machine's) or ``sm_75`` ... ``sm_120`` (a typical GPU).

    Raises:
        ValueError: the name is none of these.
    """
    if name == "cpu":
        return cpu()
    if name not in _MODELS:
        raise ValueError(f"unknown target {name!r}; choose cpu or one of {', '.join(_MODELS)}")
    return models(name)[0]


@cache
def cpu() -> Device:
    """This machine's processor."""
    level = {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3"}
    arch = level.get(torch.backends.cpu.get_cpu_capability(), "generic")
    return Device("cpu", cleaned(_cpu_name()), arch, torch.get_num_threads())


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    import platform

    return platform.processor() or platform.machine()


@cache
def cuda(index: int) -> Device:
    """The CUDA device with this index.

    Raises:
        RuntimeError: torch sees no such device.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA device")
    p = torch.cuda.get_device_properties(index)
    return Device(
        "cuda",
        cleaned(p.name),
        f"sm_{p.major}{p.minor}",
        p.multi_processor_count,
        p.shared_memory_per_block_optin,  # type: ignore[attr-defined]  # torch's stubs lack it
        p.shared_memory_per_multiprocessor,
    )


def of(device: torch.device) -> Device:
    """What a torch device is.

    Raises:
        ValueError: neither cpu nor cuda.
    """
    if device.type == "cpu":
        return cpu()
    if device.type == "cuda":
        return cuda(device.index if device.index is not None else torch.cuda.current_device())
    raise ValueError(f"device {device} is not supported; move the layer to cpu or cuda")


def slug(name: str) -> str:
    """A device's name as part of a file's: ``NVIDIA H200`` -> ``nvidia_h200``.

    A name without Latin letters gets digits that stand for it.
    """
    words = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")[:100]
    if re.search("[a-z]", words):
        return words
    return f"device_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
