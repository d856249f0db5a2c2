"""CUDA kernels run on the CPU, thread by thread: their results are checked where there is no GPU.

Instructions that sources name in assembly are put in C++. Asynchronous copies are made when they are waited
for, bulk copies at once.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
from collections.abc import Callable, Collection, Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lmkan_gen import codegen
from lmkan_gen.families import Family
from lmkan_gen.families.base import Parameters
from lmkan_gen.plan import Argument, Constant, Fill, KernelSpec, Launch, LaunchPlan, Stride, TensorMap
from lmkan_gen.problem import Problem

Run = Callable[[Mapping[str, Tensor]], None]

#: small parameters of families: output- and cluster-stationary, and matrix products, forward and for both
#: gradients
STREAMED: dict[str, Constant] = {
    "pairs": 4, "outs": 8, "samples": 2, "threads": 64, "stages": 2, "blocks": 1, "vector": 1,
    "together": 2, "copies": "bulk", "ahead": 1,
}  # fmt: skip
CLUSTERED: dict[str, Constant] = {
    "pairs": 4, "outs": 8, "samples": 1, "threads": 256, "cluster": 2, "splits": 1, "ahead": 2,
}  # fmt: skip
PRODUCT: dict[str, Constant] = {
    "samples": 32, "warps": 4, "tiles": 1, "pairs": 16, "slice": 32, "stages": 3,
}  # fmt: skip
SLOPES: dict[str, Constant] = {"outs": 64, "samples": 32, "warps": 4, "stages": 3}
OUTER: dict[str, Constant] = {"outs": 64, "samples": 32, "warps": 4, "tiles": 2}

#: by the beginning of an instruction, with the operands that the sources give it
_INSTRUCTIONS = {
    "prefetch": ";",
    "ld.shared.b32": "value = *reinterpret_cast<const word_t*>(shared_memory + address);",
    "ld.shared.v": "value = *reinterpret_cast<const Words*>(shared_memory + address);",
    "ld.global.v2.f32": "value = *address;",
    "ld.global.f32": "value = *address;",
    "cp.async.wait_all": "copies_of_thread().wait_all();",
    "cp.async.wait_group": "copies_of_thread().wait(PENDING);",
    "cp.async.commit_group": "copies_of_thread().commit();",
    "cp.async.cg.shared.global.L2::128B [%0], [%1], 16,": "copy_or_clear(target, source, bytes, 16);",
    "cp.async.ca.shared.global [%0], [%1], 4,": "copy_or_clear(target, source, bytes, 4);",
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32": "warp_product<1>(c, a, b0, b1, part_in_tf32);",
    "mma.sync.aligned.m16n8k16.row.col.f32.f16": "warp_product<2>(c, a, b0, b1, part_in_half);",
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16": "warp_product<2>(c, a, b0, b1, part_in_bfloat);",
    ".reg .b16 l, h; mov.b32 { l, h }, %1; cvt.f32.f16 %0, l;": "v = part_in_half(w, 0);",
    ".reg .b16 l, h; mov.b32 { l, h }, %1; cvt.f32.f16 %0, h;": "v = part_in_half(w, 1);",
    "cvt.rn.f16.f32": "rounded = in_half(v);",
    "cvt.rn.bf16.f32": "rounded = in_bfloat(v);",
    "cvt.f32.f16": "f = part_in_half(v, 0);",
    "cvt.rn.f16x2.f32 %0, %1, %1": "w = in_half(v) * 0x10001u;",
    "cvt.rn.bf16x2.f32 %0, %1, %1": "w = in_bfloat(v) * 0x10001u;",
    "fma.rn.f16x2": "d = fused_twice(a, b, c, part_in_half, in_half);",
    "fma.rn.bf16x2": "d = fused_twice(a, b, c, part_in_bfloat, in_bfloat);",
    "cvt.rn.f16x2.f32": "both = unsigned(in_half(second)) << 16 | in_half(first);",
    "cvt.rn.bf16x2.f32": "both = unsigned(in_bfloat(second)) << 16 | in_bfloat(first);",
    ".reg .b16 l, u;": "sums = fused_in_half(two, ratio);",
    "fence.mbarrier_init": ";",
    "mbarrier.init": "arrivals_of(barrier) = {0, unsigned(arrivals), 0};",
    "mbarrier.arrive.expect_tx": ";",  # the copy arrives
    "mbarrier.arrive.shared": "arrive_at(barrier);",
    "cp.async.bulk.tensor.4d": (
        "copy_box(*source, shared_memory + tables + into * kStageBytes, { pair, word, 0, 0 }); "
        "arrive_at(barrier);"
    ),
    "cp.async.bulk": (
        "std::memcpy(shared_memory + tables + into * kStageBytes, from, kFilledBytes); arrive_at(barrier);"
    ),
    # the first word of mbarrier.try_wait
    ".reg .pred": "done = (arrivals_of(barrier).phase & 1) != phase; if (!done) end_turn();",
    "cp.async": "copy_or_clear(target + 4 * kCopy * k, source, bytes, 4 * kCopy);",
    "xor.b32": "pair = (step + k) ^ key;",
    "barrier.cluster.arrive": "cluster_arrive();",
    "barrier.cluster.wait": "cluster_wait();",
    "mapa.shared::cluster": "other = address_in_cluster(address, rank);",
    "ld.shared::cluster.v4.f32": (
        "value = *reinterpret_cast<const float4*>(shared_memory_of_cluster + other);"
    ),
    "griddepcontrol.launch_dependents": ";",
    "griddepcontrol.wait": "wait_for_earlier_kernels();",
    "ldmatrix.sync.aligned.m8n8.x4.shared": "rows_of_matrices(to, address, false);",
    "ldmatrix.sync.aligned.m8n8.x4.trans": "rows_of_matrices(to, address, true);",
    "red.relaxed.gpu.global.add.v4.f32": (
        "add_global(target, a), add_global(target + 1, b), "
        "add_global(target + 2, c), add_global(target + 3, d);"
    ),
    "red.global.add.v4.f32": (
        "for (int j = k; j < k + 4; ++j) std::atomic_ref<float>(target[offset_of(j)]).fetch_add(values[j]);"
    ),
    "red.global.add.v2.f32": (
        "for (int j = 0; j < 2; ++j) std::atomic_ref<float>(target[j]).fetch_add(values[j]);"
    ),
    "red.global.add.f32": "std::atomic_ref<float>(*address).fetch_add(value);",
    "dp2a.lo": "sum = dot2(weights, corners, 0, sum);",
    "dp2a.hi": "sum = dot2(weights, corners, 2, sum);",
}
_ASSEMBLY = re.compile(r'\basm(?: volatile)?\(\s*"(?:\{ )?([^"]+)".*?\);$', re.DOTALL | re.MULTILINE)
_DYNAMIC_SHARED = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];")


def _in_cpp(source: str, arch: str) -> str:
    def instruction(match: re.Match[str]) -> str:
        return next(code for known, code in _INSTRUCTIONS.items() if match[1].startswith(known))

    source = _DYNAMIC_SHARED.sub(r"\1* const \2 = reinterpret_cast<\1*>(shared_memory);", source)
    return f"#define __CUDA_ARCH__ {arch.removeprefix('sm_')}0\n" + _ASSEMBLY.sub(instruction, source)


def run(
    spec: KernelSpec, plan: LaunchPlan, directory: Path, buffers: Mapping[str, Tensor], seed: int = 0
) -> dict[str, Tensor]:
    """Run all steps of ``plan``; the result is its workspaces, which were poisoned.

    Args:
        spec: of the kernels.
        plan: what to run.
        directory: for what is compiled.
        buffers: CPU tensors, outputs included.
        seed: the order of blocks; 0: by their indices.
    """
    library = _library_of(spec, plan, directory)
    scratch = _poisoned(plan)
    everything = {**buffers, **scratch}
    for step in plan.steps:
        if isinstance(step, Fill):
            everything[step.buffer].zero_()
            continue
        values = [_value(a, everything) for a in step.arguments]
        arguments = (ctypes.c_int64 * len(values))(*values)
        grid = (ctypes.c_uint * 3)(*step.grid)
        library[f"call_{step.kernel}"](grid, step.block, seed, arguments)
    return scratch


def check_early_starts(
    spec: KernelSpec,
    plan: LaunchPlan,
    directory: Path,
    buffers: Mapping[str, Tensor],
    inputs: Collection[str],
) -> None:
    """Start every kernel of ``plan`` but the first before any other, as a GPU may from sm_90 on.

    Until it waits it must touch nothing that earlier steps are given but ``inputs``, and it has to wait.
    """
    library = _library_of(spec, plan, directory)
    library.untouchable.restype = ctypes.c_void_p
    forbidden = library.untouchable()
    everything = {**buffers, **_poisoned(plan)}
    touched: set[Argument] = set()
    for k, step in enumerate(plan.steps):
        if isinstance(step, Fill):
            touched.add(step.buffer)
            continue
        if k:
            values = (forbidden if a in touched else _value(a, everything) for a in step.arguments)
            arguments = (ctypes.c_int64 * len(step.arguments))(*values)
            found = library[f"early_{step.kernel}"]((ctypes.c_uint * 3)(*step.grid), step.block, arguments)
            assert found != 1, f"{step.kernel}, step {k}, does not wait for those before"
            assert found != 2, (
                f"{step.kernel}, step {k}, touches what those before work on and has not waited"
            )
        touched |= {a for a in step.arguments if isinstance(a, str)} - set(inputs)


def prepare(family: Family, problem: Problem, parameters: Parameters, directory: Path, seed: int = 0) -> Run:
    """What runs a family's plan on named buffers in the CPU's memory; ``seed`` as in `run`."""
    family.check(problem.operation, parameters)
    assert not family.violations(problem, parameters)
    spec, plan = family.spec(problem, parameters), family.plan(problem, parameters)

    def of_plan(buffers: Mapping[str, Tensor]) -> None:
        run(spec, plan, directory, buffers, seed)

    return of_plan


def _poisoned(plan: LaunchPlan) -> dict[str, Tensor]:
    return {w.name: torch.full((w.bytes,), 0xFF, dtype=torch.uint8) for w in plan.workspaces}


def _library_of(spec: KernelSpec, plan: LaunchPlan, directory: Path) -> ctypes.CDLL:
    kernels = {s.kernel: len(s.arguments) for s in plan.steps if isinstance(s, Launch)}
    return _library(spec, tuple(sorted(kernels.items())), directory)


def _value(argument: Argument, buffers: Mapping[str, Tensor]) -> int:
    if isinstance(argument, Stride):
        return buffers[argument.buffer].stride(argument.axis)
    if isinstance(argument, TensorMap):
        return _encoded(argument, buffers[argument.buffer].data_ptr())
    return buffers[argument].data_ptr() if isinstance(argument, str) else argument


@cache
def _encoded(tensor_map: TensorMap, address: int) -> int:
    """The address of a tensor map as the emulation has it: 16 numbers of 8 bytes."""
    assert {address % 16, 4 * tensor_map.sizes[0] % 16, 4 * tensor_map.box[0] % 16} == {0}
    assert max(tensor_map.box) <= 256
    numbers = (address, len(tensor_map.sizes), *tensor_map.sizes, *tensor_map.box)
    _kept.append((ctypes.c_int64 * 16)(*numbers))
    return ctypes.addressof(_kept[-1])


_kept: list[ctypes.Array[ctypes.c_int64]] = []


@cache
def _library(spec: KernelSpec, kernels: tuple[tuple[str, int], ...], directory: Path) -> ctypes.CDLL:
    """The kernels of a CUDA source, by name and number of arguments, as functions of the CPU."""
    source = codegen.render(spec)
    calls = []
    for name, count in kernels:
        sized = re.search(rf"__cluster_dims__\((\w+), 1, 1\)[^;{{]*\b{name}\(", source)
        cluster = sized[1] if sized else "1"
        arguments = ", ".join(f"Argument{{a[{k}]}}" for k in range(count))
        calls.append(
            f'extern "C" void call_{name}(const unsigned* grid, unsigned threads, unsigned seed, '
            "const int64_t* a) {\n"
            f"    launch(grid, threads, {cluster}, seed, [&] {{ {name}({arguments}); }});\n"
            "}\n"
            f'extern "C" int early_{name}(const unsigned* grid, unsigned threads, const int64_t* a) {{\n'
            f"    return launch_early(grid, threads, {cluster}, [&] {{ {name}({arguments}); }});\n"
            "}\n"
        )
    header = Path(__file__).with_name("cuda_on_cpu.h").read_text()
    text = "\n".join((header, _in_cpp(source, spec.arch), *calls))
    path = directory / hashlib.sha256(text.encode()).hexdigest()[:16]
    path.with_suffix(".cpp").write_text(text)
    compiler = shutil.which("c++") or shutil.which("g++") or "c++"
    # one rounding per operation, or fused where the GPU's compiler would: either is within the tolerance
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-w"]
    command = [compiler, *flags, str(path.with_suffix(".cpp")), "-o", str(path.with_suffix(".so"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(path.with_suffix(".so")))
