"""Run launch plans on the CPU: functions of a shared object, called through ctypes.

Every function of a CPU kernel takes the plan's arguments, addresses and 64-bit integers, and last
the number of threads to use (torch's); it returns 0, or 1 when it could not allocate memory.
"""

from __future__ import annotations

import _ctypes
import ctypes
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lmkan_gen import toolchain
from lmkan_gen.plan import Argument, Fill, KernelSpec, Launch, LaunchPlan, Workspace
from lmkan_gen.toolchain import Binary, ToolchainError
from lmkan_gen.toolchain.store import OVERRIDE

_ALIGNMENT = 64
_MAPPED = Path("/proc/self/maps")
_OPENMP = re.compile(r"(/\S*/lib(?:gomp|i?omp5?)[-.]\S*)$", re.MULTILINE)

Buffers = Mapping[str, torch.Tensor]


class Kernels:
    """The functions of one shared object.

    Raises:
        ToolchainError: it cannot be loaded, e.g. from a file system mounted noexec.
    """

    def __init__(self, binary: Binary) -> None:
        try:
            self._library = ctypes.CDLL(str(binary.path))
        except OSError as error:
            raise ToolchainError(
                f"compiled kernel {binary.path} cannot be loaded ({error}); "
                f"set {OVERRIDE} to a directory from which programs may be loaded"
            ) from error

    def function(self, launch: Launch) -> Callable[..., int]:
        """The function that ``launch`` calls, typed for its arguments and the thread count."""
        function = self._library[launch.kernel]
        kinds = [ctypes.c_void_p if isinstance(a, str) else ctypes.c_int64 for a in launch.arguments]
        function.argtypes = [*kinds, ctypes.c_int64]
        function.restype = ctypes.c_int
        return function

    def address(self, launch: Launch) -> int:
        """Where the function that ``launch`` calls is, until `unload`."""
        return ctypes.cast(self._library[launch.kernel], ctypes.c_void_p).value or 0

    def close(self) -> None:
        """Unload them; nobody may call one of them any more."""
        _ctypes.dlclose(self._library._handle)


@dataclass(frozen=True)
class Start:
    """A function of a shared object, by its address, and what it is called with."""

    address: int
    launch: Launch
    arguments: tuple[Argument, ...]
    closely: bool = False


_loaded: dict[KernelSpec, Kernels] = {}
_loading = threading.RLock()


def _kernels(spec: KernelSpec) -> Kernels:
    """The functions of ``spec``, loaded once."""
    with _loading:
        if spec not in _loaded:
            _loaded[spec] = toolchain.loaded(spec, Kernels)
        return _loaded[spec]


def starts(spec: KernelSpec, plan: LaunchPlan, device: torch.device) -> list[Start | Fill]:
    """What `prepare` would run, for launchers of another kind. Shared objects stay loaded.

    Raises:
        ToolchainError: the kernel cannot be compiled or loaded here.
    """
    kernels = _kernels(spec)
    return [s if isinstance(s, Fill) else Start(kernels.address(s), s, s.arguments) for s in plan.steps]


def prepare(spec: KernelSpec, plan: LaunchPlan, device: torch.device) -> Callable[[Buffers], None]:
    """Load the kernels of ``spec``; returns what runs ``plan`` on named buffers.

    The result may be called from several threads at once: workspaces are a thread's own, and are
    kept between calls (one block per thread, as large as the largest plan it ran).

    Raises:
        ToolchainError: the kernel cannot be compiled or loaded here.
    """
    kernels = _kernels(spec)
    offsets, total = _layout(plan.workspaces)
    sizes = {workspace.name: workspace.bytes for workspace in plan.workspaces}
    steps = [(kernels.function(s), s.arguments) if isinstance(s, Launch) else s for s in plan.steps]
    strides = plan.strides

    def run(buffers: Buffers) -> None:
        base = _scratch(total)
        values: dict[Argument, int] = {name: base + offset for name, offset in offsets.items()}
        values.update((name, tensor.data_ptr()) for name, tensor in buffers.items())
        values.update((s, buffers[s.buffer].stride(s.axis)) for s in strides)
        threads = torch.get_num_threads()
        for step in steps:
            if isinstance(step, Fill):
                size = sizes[step.buffer] if step.buffer in sizes else buffers[step.buffer].nbytes
                ctypes.memset(values[step.buffer], 0, size)
                continue
            function, arguments = step
            if function(*(a if isinstance(a, int) else values[a] for a in arguments), threads):
                raise MemoryError(f"{spec.template}: no memory for the scratch space of {threads} threads")

    return run


def _layout(workspaces: Sequence[Workspace]) -> tuple[dict[str, int], int]:
    """Aligned offsets of the workspaces in one block, and its size in bytes."""
    offsets, total = {}, 0
    for workspace in workspaces:
        offsets[workspace.name] = total
        total += -(-workspace.bytes // _ALIGNMENT) * _ALIGNMENT
    return offsets, total


_of_thread = threading.local()


def _scratch(size: int) -> int:
    """Aligned address of this thread's scratch block of at least ``size`` bytes."""
    block: torch.Tensor | None = getattr(_of_thread, "block", None)
    if block is None or block.nbytes < size + _ALIGNMENT:
        # the old block goes before the new one comes
        block = _of_thread.block = None
        block = _of_thread.block = torch.empty(size + _ALIGNMENT, dtype=torch.uint8, device="cpu")
    address = block.data_ptr()
    return address + -address % _ALIGNMENT


def unload() -> None:
    """Unload all libraries. Plans that were prepared must not be run any more, nor be running."""
    with _loading:
        found = list(_loaded.values())
        _loaded.clear()
        if _keep_openmp():
            for kernels in found:
                kernels.close()


def _keep_openmp() -> bool:
    """Keep OpenMP runtimes loaded: their threads outlive the last library that uses them.

    False where nobody tells which there are; libraries must stay then.
    """
    try:
        mapped = _MAPPED.read_text()
    except OSError:
        return False
    for path in set(_OPENMP.findall(mapped)):
        ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NODELETE)
    return True
