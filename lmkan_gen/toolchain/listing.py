"""Looking into a kernel: what the assembler reported, its PTX, its machine code."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass

from lmkan_gen import codegen
from lmkan_gen.plan import KernelSpec
from lmkan_gen.toolchain import nvcc
from lmkan_gen.toolchain.compiler import ask
from lmkan_gen.toolchain.errors import CompilerMissing, ToolchainError
from lmkan_gen.toolchain.store import Binary, staging

_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class KernelResources:
    """What ptxas reports for one kernel; all but registers in bytes, per thread but for shared memory."""

    kernel: str
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    static_shared: int


def resources(binary: Binary) -> list[KernelResources]:
    """Registers, spills, stack and static shared memory of each kernel of a cubin.

    Raises:
        ValueError: ``binary`` is not a cubin.
    """
    _require_cubin(binary)
    found = []
    # the text before the first kernel, then alternately a kernel's name and its report
    _, *parts = _ENTRY.split(binary.log.read_text())
    for kernel, report in zip(parts[::2], parts[1::2], strict=True):
        frame, used, shared = _FRAME.search(report), _USED.search(report), _SHARED.search(report)
        if frame is None or used is None:
            raise ToolchainError(f"no resource report for kernel {kernel} in {binary.log}")
        stack, stores, loads = map(int, frame.groups())
        static = int(shared.group(1)) if shared else 0
        found.append(KernelResources(kernel, int(used.group(1)), stores, loads, stack, static))
    return found


def ptx(spec: KernelSpec) -> str:
    """The PTX of a CUDA specification.

    Raises:
        ValueError: not a CUDA specification.
        CompilerMissing: no nvcc for its architecture.
        ToolchainError: the compiler refused the source (compile it with `binary` to see why).
    """
    if not spec.is_cuda:
        raise ValueError(f"{spec.template} is no CUDA template: it has no PTX")
    compiler = nvcc.tried(spec.arch)
    with staging() as directory:
        (directory / compiler.source).write_text(codegen.render(spec))
        flags = ["-ptx", *(flag for flag in compiler.flags if flag != "-cubin")]
        # file names only: nvcc splits paths with spaces
        command = [*compiler.executable, *flags, "-o", "kernel.ptx", compiler.source]
        if ask(command, directory=directory) is None:
            raise ToolchainError(f"{compiler.identity} made no PTX of {spec.template} for {spec.arch}")
        return (directory / "kernel.ptx").read_text()


def sass(binary: Binary) -> str:
    """The machine code of a cubin, disassembled.

    Raises:
        ValueError: ``binary`` is not a cubin.
        CompilerMissing: no nvdisasm on this machine.
        ToolchainError: it failed.
    """
    _require_cubin(binary)
    tool = disassembler()
    if tool is None:
        raise CompilerMissing(
            "no nvdisasm on this machine; install it with: pip install nvidia-cuda-nvdisasm"
        )
    text = ask([tool, "-c", str(binary.path)])
    if text is None:
        raise ToolchainError(f"{tool} -c {binary.path} failed")
    return text


def disassembler() -> str | None:
    """Path of nvdisasm: beside an nvcc, on the PATH, or in NVIDIA's PyPI wheels."""
    places = [str(found.path.resolve().parent) for found in nvcc.installed()]
    places += [os.environ.get("PATH", ""), *map(str, nvcc.wheel_directories())]
    return shutil.which("nvdisasm", path=os.pathsep.join(places))


def _require_cubin(binary: Binary) -> None:
    if binary.path.suffix != ".cubin":
        raise ValueError(f"{binary.path.name} is no CUDA binary: resources and SASS exist for cubins only")
