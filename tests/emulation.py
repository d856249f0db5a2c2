"""CUDA kernels run on the CPU by `cuda_on_cpu.h`: float32 only, and small problems."""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lmkan_gen import codegen
from lmkan_gen.plan import Fill, KernelSpec, LaunchPlan, Stride

_ADDITION = re.compile(r'asm volatile\("red\.global\.add\.f32 .*?\(address\), "f"\(value\) : "memory"\);')
_DYNAMIC = re.compile(r"extern __shared__ (?:__align__\(16\) )?(\w+) (\w+)\[\];")


def run(
    spec: KernelSpec, plan: LaunchPlan, directory: Path, buffers: Mapping[str, Tensor], seed: int = 0
) -> dict[str, Tensor]:
    """Run all steps of ``plan``; the result is its workspaces, which were poisoned.

    Args:
        spec: of the kernels; float32 only, and for sums an architecture before sm_90, which adds one by one.
        directory: for what is compiled.
        buffers: contiguous CPU tensors, outputs included.
        seed: the order of blocks; 0: by their indices.
    """
    kernels = {s.kernel: len(s.arguments) for s in plan.steps if not isinstance(s, Fill)}
    library = _compiled(codegen.render(spec), tuple(sorted(kernels.items())), directory)
    scratch = {w.name: torch.full((w.bytes,), 0xFF, dtype=torch.uint8) for w in plan.workspaces}
    everything = {**buffers, **scratch}
    for step in plan.steps:
        if isinstance(step, Fill):
            everything[step.buffer].zero_()
            continue
        values = [_value(a, everything) for a in step.arguments]
        arguments = (ctypes.c_int64 * len(values))(*values)
        library[f"call_{step.kernel}"](*step.grid, step.block, seed, arguments)
    return scratch


def _value(argument: str | int | Stride, buffers: Mapping[str, Tensor]) -> int:
    if isinstance(argument, Stride):
        return buffers[argument.buffer].stride(argument.axis)
    return buffers[argument].data_ptr() if isinstance(argument, str) else argument


@cache
def _compiled(source: str, kernels: tuple[tuple[str, int], ...], directory: Path) -> ctypes.CDLL:
    """The kernels of a CUDA source, by name and number of arguments, as functions of the CPU."""
    calls = []
    for name, count in kernels:
        arguments = ", ".join(f"Argument{{a[{k}]}}" for k in range(count))
        calls.append(
            f'extern "C" void call_{name}(unsigned x, unsigned y, unsigned z, '
            "unsigned threads, unsigned seed, const int64_t* a) {\n"
            f"    launch({{x, y, z}}, threads, seed, [&] {{ {name}({arguments}); }});\n"
            "}\n"
        )
    header = Path(__file__).with_name("cuda_on_cpu.h").read_text()
    source = _ADDITION.sub("add_atomically(address, value);", source)
    source = _DYNAMIC.sub(r"\1* \2 = reinterpret_cast<\1*>(dynamic_shared_memory);", source)
    text = "\n".join((header, source, *calls))
    path = directory / hashlib.sha256(text.encode()).hexdigest()[:16]
    path.with_suffix(".cpp").write_text(text)
    compiler = shutil.which("c++") or shutil.which("g++") or "c++"
    # one rounding per operation, or fused where the GPU's compiler would: either is within the tolerance
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-w"]
    command = [compiler, *flags, str(path.with_suffix(".cpp")), "-o", str(path.with_suffix(".so"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(path.with_suffix(".so")))
