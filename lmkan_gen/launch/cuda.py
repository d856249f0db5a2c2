"""Runs launch plans on CUDA through the driver API, on torch's current stream and memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from lmkan_gen import toolchain
from lmkan_gen.plan import Fill, KernelSpec, Launch, LaunchPlan, Stride

Runner = Callable[[Mapping[str, torch.Tensor]], None]
_Values = Mapping[str | Stride, int]
_Step = Callable[[_Values, int], None]


def prepare(spec: KernelSpec, plan: LaunchPlan, device: torch.device) -> Runner:
    """Load the binary of ``spec`` and bind ``plan`` to it.

    The result takes float32 tensors on ``device`` by the names of `LaunchPlan`, enqueues all
    steps on the current stream and returns at once. It may be captured in a CUDA graph.

    Raises:
        lmkan_gen.toolchain.ToolchainError: the kernel cannot be compiled here.
        RuntimeError: the driver refuses the binary or a launch; the message names the kernel.
    """
    binary = toolchain.binary(spec)
    index = device.index if device.index is not None else torch.cuda.current_device()
    target = torch.device("cuda", index)
    with torch.cuda.device(index):
        steps = [_bind(step, binary.path, index) for step in plan.steps]
    strides = plan.strides
    lock = Lock()

    def run(buffers: Mapping[str, torch.Tensor]) -> None:
        with torch.cuda.device(index):
            # no tensors: those are filled where deterministic algorithms are asked for
            scratch = {w.name: torch.UntypedStorage(w.bytes, device=target) for w in plan.workspaces}
            values: dict[str | Stride, int] = {name: tensor.data_ptr() for name, tensor in buffers.items()}
            values.update((name, storage.data_ptr()) for name, storage in scratch.items())
            values.update((s, buffers[s.buffer].stride(s.axis)) for s in strides)
            sizes = {name: tensor.nbytes for name, tensor in buffers.items()}
            sizes |= {w.name: w.bytes for w in plan.workspaces}
            stream = torch.cuda.current_stream(index).cuda_stream
            with lock:  # argument memory is shared between calls
                for step in steps:
                    if isinstance(step, str):
                        _check(
                            _driver().cuMemsetD8Async(values[step], 0, sizes[step], stream),
                            f"zeroing {step}",
                        )
                    else:
                        step(values, stream)

    return run


@cache
def _driver() -> Any:
    from cuda.bindings import driver

    torch.cuda.init()
    return driver


def _check(result: tuple[Any, ...], doing: str) -> Any:
    status, *values = result
    if int(status) != 0:
        _, name = _driver().cuGetErrorString(status)
        text = name.decode() if isinstance(name, bytes) else str(status)
        raise RuntimeError(f"CUDA driver error {int(status)} ({text}) while {doing}")
    return values[0] if values else None


@cache
def _module(path: Path, index: int) -> Any:
    torch.cuda.synchronize(index)  # makes sure that the device's primary context exists and is current
    return _check(_driver().cuModuleLoadData(path.read_bytes()), f"loading {path} on cuda:{index}")


@cache
def _function(path: Path, index: int, kernel: str) -> Any:
    return _check(
        _driver().cuModuleGetFunction(_module(path, index), kernel.encode()), f"looking up {kernel} in {path}"
    )


def _bind(step: Fill | Launch, path: Path, index: int) -> str | _Step:
    if isinstance(step, Fill):
        return step.buffer
    driver = _driver()
    function = _function(path, index, step.kernel)
    if step.shared_memory:
        attribute = driver.CUfunction_attribute
        for key, value in (
            (attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, step.shared_memory),
            (attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),
        ):
            _check(
                driver.cuFuncSetAttribute(function, key, value),
                f"giving {step.kernel} {step.shared_memory} bytes of shared memory",
            )
    # every argument is 8 bytes: an address or a signed integer
    values = (ctypes.c_int64 * len(step.arguments))(*(a if isinstance(a, int) else 0 for a in step.arguments))
    base = ctypes.addressof(values)
    pointers = (ctypes.c_void_p * len(values))(*(base + 8 * k for k in range(len(values))))
    parameters = ctypes.addressof(pointers)
    variable = [(k, a) for k, a in enumerate(step.arguments) if not isinstance(a, int)]
    doing = (
        f"launching {step.kernel} (grid {step.grid}, block {step.block}, shared memory {step.shared_memory})"
    )

    def launch(known: _Values, stream: int, _keep: Any = pointers) -> None:
        for k, argument in variable:
            values[k] = known[argument]
        status = driver.cuLaunchKernel(
            function, *step.grid, step.block, 1, 1, step.shared_memory, stream, parameters, 0
        )
        _check(status, doing)

    return launch


def unload() -> None:
    """Forget loaded modules (they stay valid for plans already prepared)."""
    _module.cache_clear()
    _function.cache_clear()
