"""CUDA kernels run on the CPU, thread by thread: their results are checked where there is no GPU.

Instructions that sources name in assembly are put in C++; of those that narrow 16-bit tables need there are
none here.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lmkan_gen import codegen
from lmkan_gen.families import Family
from lmkan_gen.families.base import Parameters
from lmkan_gen.plan import Fill, KernelSpec, Launch, Stride
from lmkan_gen.problem import Problem

Run = Callable[[Mapping[str, Tensor]], None]

#: by the beginning of an instruction, with the operands that the sources give it
_INSTRUCTIONS = {
    "prefetch": ";",
    "ld.shared.b32": "value = *reinterpret_cast<const word_t*>(shared_memory + address);",
    "ld.global.v2.f32": "value = *address;",
    "ld.global.f32": "value = *address;",
    "cp.async.wait_all": ";",
    "cp.async": (
        "std::memcpy(std::memset(shared_memory + target + 4 * kCopy * k, 0, 4 * kCopy), source, bytes);"
    ),
    "red.global.add.f32": "std::atomic_ref<float>(*address).fetch_add(value);",
    "dp2a.lo": "sum = dot2(weights, corners, 0, sum);",
    "dp2a.hi": "sum = dot2(weights, corners, 2, sum);",
}
_ASSEMBLY = re.compile(r'\basm(?: volatile)?\(\s*"(?:\{ )?([\w.]+).*?\);$', re.DOTALL | re.MULTILINE)
_DYNAMIC_SHARED = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];")


def _in_cpp(source: str) -> str:
    def instruction(match: re.Match[str]) -> str:
        name = match[1]
        return next(code for known, code in _INSTRUCTIONS.items() if name.startswith(known))

    source = _DYNAMIC_SHARED.sub(r"\1* const \2 = reinterpret_cast<\1*>(shared_memory);", source)
    return _ASSEMBLY.sub(instruction, source)


@cache
def _library(spec: KernelSpec, kernels: tuple[tuple[str, int], ...], directory: Path) -> ctypes.CDLL:
    """The kernels of a CUDA source, by name and number of arguments, as functions of the CPU."""
    calls = []
    for name, count in kernels:
        arguments = ", ".join(f"Argument{{a[{k}]}}" for k in range(count))
        calls.append(
            f'extern "C" void call_{name}(const unsigned* grid, unsigned threads, const int64_t* a) {{\n'
            f"    launch(grid, threads, [&] {{ {name}({arguments}); }});\n"
            "}\n"
        )
    header = Path(__file__).with_name("cuda_in_turns.h").read_text()
    text = "\n".join((header, _in_cpp(codegen.render(spec)), *calls))
    path = directory / f"{abs(hash(text))}"
    path.with_suffix(".cpp").write_text(text)
    compiler = shutil.which("c++") or shutil.which("g++") or "c++"
    # one rounding per operation, or fused where the GPU's compiler would: either is within the tolerance
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-w"]
    command = [compiler, *flags, str(path.with_suffix(".cpp")), "-o", str(path.with_suffix(".so"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(path.with_suffix(".so")))


def prepare(family: Family, problem: Problem, parameters: Parameters, directory: Path) -> Run:
    """What runs a family's plan on named buffers in the CPU's memory, workspaces poisoned beforehand."""
    family.check(problem.operation, parameters)
    assert not family.violations(problem, parameters)
    plan = family.plan(problem, parameters)
    launches = {s.kernel: len(s.arguments) for s in plan.steps if isinstance(s, Launch)}
    library = _library(family.spec(problem, parameters), tuple(launches.items()), directory)

    def run(buffers: Mapping[str, Tensor]) -> None:
        scratch = {w.name: torch.full((w.bytes,), 0xFF, dtype=torch.uint8) for w in plan.workspaces}
        everything = {**buffers, **scratch}

        def value(argument: str | int | Stride) -> int:
            if isinstance(argument, Stride):
                return everything[argument.buffer].stride(argument.axis)
            return everything[argument].data_ptr() if isinstance(argument, str) else argument

        for step in plan.steps:
            if isinstance(step, Fill):
                everything[step.buffer].zero_()
                continue
            arguments = (ctypes.c_int64 * len(step.arguments))(*map(value, step.arguments))
            grid = (ctypes.c_uint * 3)(*step.grid)
            library[f"call_{step.kernel}"](grid, step.block, arguments)

    return run
