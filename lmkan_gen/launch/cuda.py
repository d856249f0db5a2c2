"""Runs launch plans on CUDA through the driver API, on torch's current stream and memory.

From sm_90 on kernels follow each other closely: see the head of ``templates/launches.cuh.j2`` for what they
promise, and `in_order` for who is launched so.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from lmkan_gen import toolchain
from lmkan_gen.plan import Argument, Fill, KernelSpec, Launch, LaunchPlan, Stride, TensorMap
from lmkan_gen.toolchain import Binary


@dataclass(frozen=True)
class Size:
    """Bytes of a buffer, known at the call."""

    buffer: str


@dataclass(frozen=True)
class Start:
    """A kernel of the device, and what it is started with.

    Attributes:
        function: the driver's handle; None: not loaded.
        launch: grid, block, shared memory, and the kernel's name.
        arguments: in the kernel's order.
        closely: whether it may start before its turn.
        address: the handle as a number.
    """

    function: Any
    launch: Launch
    arguments: tuple[Argument | Size, ...]
    closely: bool
    address: int = 0


Runner = Callable[[Mapping[str, torch.Tensor]], None]
_Values = Mapping[str | Stride | Size, int]
_Step = Callable[[_Values, int], None]

_ZERO, _ZERO_THREADS = "lmkan_zero", 256  # of templates/lmkan.cuh.j2
_TENSOR_ALIGNMENT = 16  # bytes, of buffers that tensor maps are of
#: compute capability from which on kernels can wait for others by themselves
_CLOSELY = 90


def prepare(spec: KernelSpec, plan: LaunchPlan, device: torch.device) -> Runner:
    """Load the binary of ``spec`` and bind ``plan`` to it.

    The result takes float32 tensors on ``device`` by the names of `LaunchPlan`, enqueues all
    steps on the current stream and returns at once. It may be captured in a CUDA graph.

    Raises:
        lmkan_gen.toolchain.ToolchainError: the kernel cannot be compiled here.
        RuntimeError: the driver refuses the binary or a launch; the message names the kernel.
    """
    index = device.index if device.index is not None else torch.cuda.current_device()
    target = torch.device("cuda", index)
    with torch.cuda.device(index):
        steps = [
            _memset(s.buffer) if isinstance(s, Fill) else _bind(s)
            for s in _steps(spec, plan, _path(spec, index), index)
        ]
    strides = plan.strides
    mapped = {tensor_map.buffer for tensor_map in plan.tensor_maps}
    lock = Lock()

    def run(buffers: Mapping[str, torch.Tensor]) -> None:
        with torch.cuda.device(index):
            # no tensors: those are filled where deterministic algorithms are asked for
            scratch = {w.name: torch.UntypedStorage(w.bytes, device=target) for w in plan.workspaces}
            odd = {n: buffers[n].clone() for n in mapped if buffers[n].data_ptr() % _TENSOR_ALIGNMENT}
            buffers = {**buffers, **odd} if odd else buffers
            values: dict[str | Stride | Size, int] = {name: t.data_ptr() for name, t in buffers.items()}
            values.update((name, storage.data_ptr()) for name, storage in scratch.items())
            values.update((s, buffers[s.buffer].stride(s.axis)) for s in strides)
            values.update((Size(name), tensor.nbytes) for name, tensor in buffers.items())
            values.update((Size(w.name), w.bytes) for w in plan.workspaces)
            stream = torch.cuda.current_stream(index).cuda_stream
            with lock:  # argument memory is shared between calls
                for step in steps:
                    step(values, stream)

    return run


def _follows_closely(spec: KernelSpec) -> bool:
    """Whether the kernels of ``spec`` wait for those before them, by themselves."""
    return int(spec.arch.removeprefix("sm_")) >= _CLOSELY


def starts(spec: KernelSpec, plan: LaunchPlan, device: torch.device) -> list[Start | Fill]:
    """What `prepare` would run, for launchers of another kind.

    Raises:
        lmkan_gen.toolchain.ToolchainError: the kernel cannot be compiled here.
        RuntimeError: the driver refuses the binary.
    """
    index = device.index if device.index is not None else torch.cuda.current_device()
    with torch.cuda.device(index):
        return list(_steps(spec, plan, _path(spec, index), index))


@cache
def _path(spec: KernelSpec, index: int) -> Path:
    """Where the binary of ``spec`` is, which the device can load; it is read once."""

    def load(binary: Binary) -> Path:
        _module(binary.path, index)
        return binary.path

    return toolchain.loaded(spec, load)


def in_order(spec: KernelSpec, plan: LaunchPlan, multiprocessors: int) -> Iterator[Start | Fill]:
    """The plan's steps as devices of an architecture know them; kernels have no functions yet.

    All kernels but the first may start before the one ahead has ended. The first follows kernels that know
    nothing of it. What zeroes does not wait, so it keeps its turn where the buffer has been touched before.

    Args:
        spec: whose kernels they are.
        plan: the plan.
        multiprocessors: how many the device has.
    """
    closely = _follows_closely(spec)
    touched: set[str] = set()
    for k, step in enumerate(plan.steps):
        if isinstance(step, Launch):
            yield Start(None, step, step.arguments, closely and k > 0)
            touched.update(a for a in step.arguments if isinstance(a, str))
            continue
        if closely:
            zero = Launch(_ZERO, (), (2 * multiprocessors, 1, 1), _ZERO_THREADS)
            arguments = (step.buffer, Size(step.buffer))
            yield Start(None, zero, arguments, k > 0 and step.buffer not in touched)
        else:
            yield step
        touched.add(step.buffer)


def _steps(spec: KernelSpec, plan: LaunchPlan, path: Path, index: int) -> Iterator[Start | Fill]:
    """`in_order`, with the functions of a device."""
    for step in in_order(spec, plan, _multiprocessors(index)):
        yield step if isinstance(step, Fill) else _loaded(step, path, index)


@cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


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


_modules: dict[tuple[Path, int], Any] = {}


def _module(path: Path, index: int) -> Any:
    if (path, index) not in _modules:
        torch.cuda.synchronize(index)  # makes sure that the device's primary context exists and is current
        loaded = _check(_driver().cuModuleLoadData(path.read_bytes()), f"loading {path} on cuda:{index}")
        _modules[path, index] = loaded
    return _modules[path, index]


@cache
def _function(path: Path, index: int, kernel: str) -> tuple[Any, int]:
    """The driver's handle of a kernel, and the same as a number."""
    function = _check(
        _driver().cuModuleGetFunction(_module(path, index), kernel.encode()), f"looking up {kernel} in {path}"
    )
    return function, int(function)


def _memset(buffer: str) -> _Step:
    def zero(known: _Values, stream: int) -> None:
        _check(_driver().cuMemsetD8Async(known[buffer], 0, known[Size(buffer)], stream), f"zeroing {buffer}")

    return zero


def _loaded(start: Start, path: Path, index: int) -> Start:
    """A start with the device's function."""
    launch = start.launch
    function, address = _function(path, index, launch.kernel)
    known = (path, index, launch.kernel)
    if (needed := int(launch.shared_memory)) > _allowed.get(known, 0):
        _allow(function, launch)
        _allowed[known] = needed
    return replace(start, function=function, address=address)


#: bytes of dynamic shared memory that kernels may have: the most that one of their plans starts them with
_allowed: dict[tuple[Path, int, str], int] = {}


def _allow(function: Any, step: Launch) -> None:
    """Let a kernel have the dynamic shared memory that it is started with."""
    driver = _driver()
    attribute = driver.CUfunction_attribute
    for key, value in (
        (attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, step.shared_memory),
        (attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),
    ):
        _check(
            driver.cuFuncSetAttribute(function, key, value),
            f"giving {step.kernel} {step.shared_memory} bytes of shared memory",
        )


def _bind(start: Start) -> _Step:
    """A start as a call of the driver."""
    driver = _driver()
    step, arguments, function = start.launch, start.arguments, start.function
    # every argument is 8 bytes, an address or a signed integer, or a tensor map
    values = (ctypes.c_int64 * len(arguments))(*(a if isinstance(a, int) else 0 for a in arguments))
    base = ctypes.addressof(values)
    pointers = (ctypes.c_void_p * len(values))(*(base + 8 * k for k in range(len(values))))
    parameters = ctypes.addressof(pointers)
    variable = [(k, a) for k, a in enumerate(arguments) if isinstance(a, str | Stride | Size)]
    mapped = [(k, a) for k, a in enumerate(arguments) if isinstance(a, TensorMap)]
    encoded: dict[int, tuple[int, Any]] = {}  # by argument: address and map
    doing = (
        f"launching {step.kernel} (grid {step.grid}, block {step.block}, shared memory {step.shared_memory})"
    )
    config = _close_launch(step) if start.closely else None

    def launch(known: _Values, stream: int, _keep: Any = pointers) -> None:
        nonlocal config
        for k, argument in variable:
            values[k] = known[argument]
        for k, tensor_map in mapped:
            address = known[tensor_map.buffer]
            if k not in encoded or encoded[k][0] != address:
                encoded[k] = address, _encode(tensor_map, address)
                pointers[k] = encoded[k][1].getPtr()
        if config is not None:
            config.hStream = stream
            if int(driver.cuLaunchKernelEx(config, function, parameters, 0)[0]) == 0:
                return
            config = None  # a driver that has no such launches; or else the ordinary one fails as well
        status = driver.cuLaunchKernel(
            function, *step.grid, step.block, 1, 1, step.shared_memory, stream, parameters, 0
        )
        _check(status, doing)

    return launch


def _encode(tensor_map: TensorMap, address: int) -> Any:
    """The driver's form of a tensor map at an address."""
    driver = _driver()
    rank, size = len(tensor_map.sizes), driver.cuuint64_t
    pitches = [4 * prod(tensor_map.sizes[: k + 1]) for k in range(rank - 1)]
    return _check(
        driver.cuTensorMapEncodeTiled(
            driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_INT32,
            rank,
            address,
            [size(n) for n in tensor_map.sizes],
            [size(n) for n in pitches],
            [driver.cuuint32_t(n) for n in tensor_map.box],
            [driver.cuuint32_t(1)] * rank,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_NONE,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ),
        f"encoding {tensor_map}",
    )


def _close_launch(step: Launch) -> Any:
    """What the driver is to know of a launch that may overlap the kernel before it."""
    driver = _driver()
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = step.grid
    config.blockDimX, config.blockDimY, config.blockDimZ = step.block, 1, 1
    config.sharedMemBytes = step.shared_memory
    config.attrs, config.numAttrs = [attribute], 1
    return config


def unload() -> None:
    """Unload all modules. Plans that were prepared must not be run any more, nor CUDA graphs of them."""
    while _modules:
        (path, index), module = _modules.popitem()
        with torch.cuda.device(index):
            torch.cuda.synchronize(index)
            _check(_driver().cuModuleUnload(module), f"unloading {path} from cuda:{index}")
    _path.cache_clear()
    _function.cache_clear()
    _allowed.clear()
