"""Finding compilers, compiling, and saying clearly what went wrong."""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from jinja2 import DictLoader, Environment, StrictUndefined

from lmkan_gen import codegen, toolchain
from lmkan_gen.plan import KernelSpec
from lmkan_gen.toolchain import listing, ninja_file, nvcc, nvrtc, store

CUDA = """\
extern "C" __global__ void twice(const float* x, float* y, long long n) {
    __shared__ float tile[{{ n }}];
    const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    tile[threadIdx.x] = i < n ? x[i] : 0.0f;
    __syncthreads();
    if (i < n) y[i] = 2.0f * tile[threadIdx.x ^ 1];
}
extern "C" __global__ void once(float* y) { y[threadIdx.x] = 1.0f; }
"""
CPP = """\
#include <cmath>
// line two
{{ "undeclared = 1;" if n == 13 else "" }}
extern "C" int answer() { return {{ n }}; }
extern "C" double nan_or(double x) { return std::isnan(x) ? -1.0 : x; }
extern "C" int openmp() {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}
"""
needs_nvcc = pytest.mark.skipif(not nvcc.installed(), reason="no nvcc on this machine")


def cpp(n: int) -> KernelSpec:
    return KernelSpec.make("tiny.cpp.j2", "generic", {"n": n})


def cuda(n: int, arch: str = "sm_90") -> KernelSpec:
    return KernelSpec.make("tiny.cu.j2", arch, {"n": n})


@pytest.fixture(autouse=True)
def fresh_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # a space and a dollar: paths go through ninja and a shell
    root = tmp_path / "a $cache"
    monkeypatch.setenv(store.OVERRIDE, str(root))
    templates = {"tiny.cu.j2": CUDA, "tiny.cpp.j2": CPP}
    environment = Environment(loader=DictLoader(templates), undefined=StrictUndefined)
    monkeypatch.setattr(codegen, "_environment", lambda: environment)
    return root


@pytest.fixture
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No compiler anywhere; returns an empty directory that is the whole PATH."""
    empty = tmp_path / "bin"
    empty.mkdir()
    monkeypatch.setenv("PATH", str(empty))
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH", nvcc.OVERRIDE, "LD_LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(nvcc, "_USUAL_PLACE", str(empty))
    monkeypatch.setattr(nvcc, "wheel_directories", lambda: iter(()))
    return empty


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_cpu_binary_loads_and_runs() -> None:
    library = ctypes.CDLL(str(toolchain.binary(cpp(42)).path))
    assert library.answer() == 42


def test_cpu_flags_keep_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    library = ctypes.CDLL(str(toolchain.binary(cpp(1)).path))
    library.nan_or.argtypes, library.nan_or.restype = [ctypes.c_double], ctypes.c_double
    assert library.nan_or(float("nan")) == -1.0


def test_without_openmp_it_compiles_all_the_same(bare_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{bare_machine}:/usr/bin:/bin")
    refuse = 'case "$*" in *-fopenmp*) echo no such option >&2; exit 1;; esac; exec g++ "$@"'
    compiler = script(bare_machine / "plain", refuse)
    monkeypatch.setenv("CXX", str(compiler))
    library = ctypes.CDLL(str(toolchain.binary(cpp(7)).path))
    assert library.openmp() == 0


def test_cxx_may_have_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "env LANG=C g++")
    found = toolchain.compiler(cpp(1))
    assert found.executable == ("env", "LANG=C", "g++")
    assert found.identity.startswith("gcc ")
    toolchain.binary(cpp(8))


@pytest.mark.parametrize(
    ("variable", "value", "spec"),
    [
        ("CXX", "g++ -O0 -ffast-math", cpp(1)),
        ("CPATH", "/nowhere/include", cpp(1)),
        ("CPLUS_INCLUDE_PATH", "/nowhere/include", cpp(1)),
        pytest.param("CPLUS_INCLUDE_PATH", "/nowhere/include", cuda(1), marks=needs_nvcc),
        pytest.param("NVCC_PREPEND_FLAGS", "-use_fast_math", cuda(1), marks=needs_nvcc),
        pytest.param("NVCC_APPEND_FLAGS", "-O1", cuda(1), marks=needs_nvcc),
    ],
)
def test_what_the_environment_adds_is_part_of_the_key(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, spec: KernelSpec
) -> None:
    monkeypatch.setenv("CXX", "g++")
    before = store.key("source", spec.arch, toolchain.compiler(spec))
    monkeypatch.setenv(variable, value)
    assert store.key("source", spec.arch, toolchain.compiler(spec)) != before


def test_cxx_may_be_relative(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compilations run in other directories."""
    (tmp_path / "tools").mkdir()
    wrapper = script(tmp_path / "tools" / "wrapper", 'exec g++ "$@"')
    monkeypatch.chdir(tmp_path)
    for named in ("./tools/wrapper", "tools/wrapper", "env ./tools/wrapper"):
        monkeypatch.setenv("CXX", named)
        assert toolchain.compiler(cpp(1)).executable[-1] == str(wrapper)
    assert ctypes.CDLL(str(toolchain.binary(cpp(9)).path)).answer() == 9
    monkeypatch.setenv("CXX", "./nowhere/c++ -O2")
    with pytest.raises(toolchain.CompilerMissing, match=r"CXX='\./nowhere/c\+\+ -O2' names \./nowhere/c\+\+"):
        toolchain.compiler(cpp(1))


def test_cxx_that_is_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ '-O2")
    with pytest.raises(
        toolchain.CompilerMissing, match='CXX="g\\+\\+ \'-O2" is not a command: no closing quotation'
    ):
        toolchain.compiler(cpp(1))


def test_build_reports_each_and_keeps_order(fresh_store: Path) -> None:
    specs = [cpp(1), cpp(13), cpp(2), cpp(1)]
    seen: list[tuple[KernelSpec, object]] = []
    results = toolchain.build(specs, lambda spec, result: seen.append((spec, result)))
    assert [type(result) for result in results] == [
        toolchain.Binary,
        toolchain.CompileError,
        toolchain.Binary,
        toolchain.Binary,
    ]
    assert results[0] == results[3] != results[2]
    assert sorted(spec.constants for spec, _ in seen) == sorted(spec.constants for spec in specs)
    assert all(result == results[specs.index(spec)] for spec, result in seen)


def test_compile_error_shows_lines_command_and_log(fresh_store: Path) -> None:
    with pytest.raises(toolchain.CompileError) as caught:
        toolchain.binary(cpp(13))
    error = caught.value
    message = str(error)
    assert "tiny.cpp.j2 (n=13) for generic did not compile" in message
    assert "kernel.cpp:3:" in message
    assert ">    3 | undeclared = 1;" in message
    assert "     2 | // line two" in message
    assert str(error.log) in message
    assert error.log.is_relative_to(fresh_store / "failed")
    assert "undeclared" in error.log.read_text()
    assert error.source.read_text() == codegen.render(cpp(13))
    assert store.entries() == []
    assert list((fresh_store / "staging").iterdir()) == []
    # it is not remembered: the next attempt compiles again
    with pytest.raises(toolchain.CompileError):
        toolchain.binary(cpp(13))


def test_compilers_see_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    real = toolchain.compiler(cpp(1)).executable[0]
    compiler = script(tmp_path / "c++", f'echo "<$CUDA_VISIBLE_DEVICES>" > {seen}\nexec {real} "$@"')
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("CXX", str(compiler))
    toolchain.binary(cpp(1))
    assert seen.read_text() == "<>\n"


def test_no_host_compiler(bare_machine: Path) -> None:
    with pytest.raises(toolchain.CompilerMissing, match=r"apt-get install g\+\+"):
        toolchain.binary(cpp(1))


def test_cxx_that_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(toolchain.CompilerMissing, match="CXX='/nowhere/c\\+\\+'"):
        toolchain.binary(cpp(1))


def test_no_cuda_compiler(bare_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setattr(nvrtc, "_library", nvrtc._library.__wrapped__)
    with pytest.raises(toolchain.CompilerMissing) as caught:
        toolchain.binary(cuda(64))
    assert "lmkan-gen[nvcc]" in str(caught.value)
    assert "NVRTC cannot be used" in str(caught.value)


def test_one_missing_compiler_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(nvcc.OVERRIDE, "/nowhere/nvcc")
    first, second = toolchain.build([cuda(64), cpp(3)])
    assert isinstance(first, toolchain.CompilerMissing)
    assert "LMKAN_GEN_NVCC=/nowhere/nvcc does not run" in str(first)
    assert isinstance(second, toolchain.Binary)


def test_no_ninja(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ninja", None)
    which = shutil.which
    monkeypatch.setattr("shutil.which", lambda name, *_, **k: None if name == "ninja" else which(name, **k))
    with pytest.raises(toolchain.CompilerMissing, match="pip install ninja"):
        toolchain.binary(cpp(4))


def test_broken_ninja_is_quoted(bare_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{bare_machine}:{os.defpath}:/usr/bin")
    broken = script(bare_machine / "ninja", "echo ninja has the flu; exit 3")
    monkeypatch.setattr(ninja_file, "executable", lambda: str(broken))
    with pytest.raises(toolchain.ToolchainError, match="ninja has the flu"):
        toolchain.binary(cpp(4))


def fake_nvcc(path: Path, version: str, architectures: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return script(
        path,
        f'case "$1" in --version) echo "Cuda compilation tools, release 1.0, V{version}";; '
        f"--list-gpu-code) echo {architectures};; esac",
    )


def test_nvcc_search_order(bare_machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{bare_machine}:/usr/bin:/bin")
    on_path = fake_nvcc(bare_machine / "nvcc", "1.0.3", "sm_90")
    assert toolchain.compiler(cuda(1)).executable[0] == str(on_path)
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "path"))
    by_path = fake_nvcc(tmp_path / "path/bin/nvcc", "1.0.2", "sm_90")
    assert toolchain.compiler(cuda(1)).executable[0] == str(by_path)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    by_home = fake_nvcc(tmp_path / "home/bin/nvcc", "1.0.1", "sm_80")
    assert [found.version for found in nvcc.installed()] == ["1.0.1", "1.0.2", "1.0.3"]
    # the first one is too old for this architecture
    assert toolchain.compiler(cuda(1)).executable[0] == str(by_path)
    assert toolchain.compiler(cuda(1, "sm_80")).executable[0] == str(by_home)
    override = fake_nvcc(tmp_path / "mine", "1.0.0", "sm_90")
    monkeypatch.setenv(nvcc.OVERRIDE, str(override))
    assert toolchain.compiler(cuda(1)).executable[0] == str(override)
    with pytest.raises(
        toolchain.CompilerMissing, match=r"no nvcc here compiles for sm_80: .*mine \(1\.0\.0\)"
    ):
        toolchain.compiler(cuda(1, "sm_80"))


@pytest.mark.skipif(not list(nvcc.wheel_directories()), reason="the extra nvcc is not installed")
def test_compiler_wheels_are_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No toolkit: only what ``pip install lmkan-gen[nvcc]`` brings, and a gcc as preprocessor."""
    for tool in ("gcc", "g++", "as", "ld", "rm", "sh", "mv"):
        if found := shutil.which(tool):
            (tmp_path / tool).symlink_to(found)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_HOME", "CUDA_PATH", nvcc.OVERRIDE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(nvcc, "_USUAL_PLACE", str(tmp_path))
    binary = toolchain.binary(cuda(64))
    assert "site-packages" in toolchain.compiler(cuda(64)).executable[0]
    assert {resources.kernel for resources in toolchain.resources(binary)} == {"twice", "once"}


def test_nvcc_without_gcc_gets_the_compiler_there_is(
    bare_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_nvcc(bare_machine / "nvcc", "1.0.0", "sm_90")
    monkeypatch.setattr(nvrtc, "find", nvrtc_missing)
    with pytest.raises(toolchain.CompilerMissing, match="needs a host compiler"):
        toolchain.compiler(cuda(1))
    clang = script(bare_machine / "clang++", "echo clang version 1")
    assert toolchain.compiler(cuda(1)).executable[1:] == ("-ccbin", str(clang))


def picky_nvcc(path: Path, accepted: str) -> Path:
    """An nvcc that takes no host compiler but ``accepted``."""
    return script(
        path,
        'case "$*" in --version) echo "Cuda compilation tools, release 1.0, V1.0.0";; '
        "--list-gpu-code) echo sm_90;; "
        f'*"-ccbin {accepted} "*) while [ "$1" != -o ]; do shift; done; echo code > "$2";; '
        "*) echo 'host_config.h:143:2: error: -- unsupported GNU version!' >&2; exit 1;; esac",
    )


@pytest.fixture
def newer_gcc(bare_machine: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose gcc is newer than its nvcc."""
    monkeypatch.setenv("PATH", f"{bare_machine}:/usr/bin:/bin")
    monkeypatch.setattr(nvcc, "_tried", {})
    script(bare_machine / "gcc", "exit 1")
    return bare_machine


def test_nvcc_that_refuses_gcc_gets_another_compiler(newer_gcc: Path) -> None:
    older = script(newer_gcc / "g++-9", "echo gcc")
    picky_nvcc(newer_gcc / "nvcc", str(older))
    with pytest.warns(RuntimeWarning, match=r"nothing with gcc .*unsupported GNU version.*g\+\+-9 is used"):
        binary = toolchain.binary(cuda(64))
    assert binary.path.read_text() == "code\n"
    assert toolchain.compiler(cuda(1)).executable[1:] == ("-ccbin", str(older))


def test_nvcc_that_refuses_all_compilers_leaves_it_to_nvrtc(
    newer_gcc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picky_nvcc(newer_gcc / "nvcc", "none")
    try:
        nvrtc.find("sm_90")
    except toolchain.CompilerMissing as error:
        pytest.skip(str(error))
    with pytest.warns(RuntimeWarning, match=r"nvrtc .* compiles CUDA kernels: nvcc 1.0.0 .*unsupported GNU"):
        binary = toolchain.binary(cuda(64))
    assert {resources.kernel for resources in toolchain.resources(binary)} == {"twice", "once"}
    monkeypatch.setattr(nvrtc, "find", nvrtc_missing)
    with pytest.raises(toolchain.CompilerMissing, match=r"unsupported GNU version.*no NVRTC"):
        toolchain.binary(cuda(32))


def nvrtc_missing(arch: str) -> None:
    raise toolchain.CompilerMissing("no NVRTC")


@needs_nvcc
def test_cubin_and_its_resources() -> None:
    binary = toolchain.binary(cuda(64))
    assert binary.path.suffix == ".cubin"
    assert binary.path.read_bytes()[:4] == b"\x7fELF"
    found = {resources.kernel: resources for resources in toolchain.resources(binary)}
    assert set(found) == {"twice", "once"}
    assert found["twice"].static_shared == 256
    assert found["once"].static_shared == 0
    for resources in found.values():
        assert 1 < resources.registers < 64
        assert (resources.spill_stores, resources.spill_loads, resources.stack) == (0, 0, 0)


@needs_nvcc
def test_spills_are_seen() -> None:
    source = """
    extern "C" __global__ __launch_bounds__(1024) void hungry(float* y) {
        float v[{{ n }}];
        #pragma unroll
        for (int i = 0; i < {{ n }}; ++i) v[i] = y[i * 1024 + threadIdx.x];
        __syncthreads();
        #pragma unroll
        for (int i = 0; i < {{ n }}; ++i) y[i * 1024 + threadIdx.x] = v[({{ n }} - 1) - i] * v[i];
    }
    """
    codegen._environment().loader.mapping["tiny.cu.j2"] = source  # type: ignore[union-attr]
    codegen._environment().cache.clear()  # type: ignore[union-attr]
    (resources,) = toolchain.resources(toolchain.binary(cuda(120)))
    assert resources.registers <= 64
    assert min(resources.spill_stores, resources.spill_loads, resources.stack) > 0


@needs_nvcc
def test_cuda_error_is_shown() -> None:
    with pytest.raises(toolchain.CompileError) as caught:
        toolchain.binary(cuda(-1))
    assert ">    2 |     __shared__ float tile[-1];" in str(caught.value)


@needs_nvcc
def test_ptx() -> None:
    text = toolchain.ptx(cuda(64))
    assert ".target sm_90" in text
    assert ".entry twice" in text
    with pytest.raises(ValueError, match="no CUDA template"):
        toolchain.ptx(cpp(1))


@needs_nvcc
def test_sass_or_what_to_install() -> None:
    binary = toolchain.binary(cuda(64))
    if listing.disassembler() is None:
        with pytest.raises(toolchain.CompilerMissing, match="pip install nvidia-cuda-nvdisasm"):
            toolchain.sass(binary)
        return
    text = toolchain.sass(binary)
    assert "twice" in text
    assert "EXIT" in text


def test_host_code_has_no_gpu_listing() -> None:
    binary = toolchain.binary(cpp(5))
    with pytest.raises(ValueError, match="cubins only"):
        toolchain.resources(binary)
    with pytest.raises(ValueError, match="cubins only"):
        toolchain.sass(binary)


def test_nvrtc_compiles_when_there_is_no_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(nvcc.OVERRIDE, raising=False)
    monkeypatch.setattr(nvcc, "installed", lambda: ())
    try:
        found = toolchain.compiler(cuda(64))
    except toolchain.CompilerMissing as error:
        pytest.skip(str(error))
    assert found.identity.startswith("nvrtc ")
    binary = toolchain.binary(cuda(64))
    assert {resources.kernel for resources in toolchain.resources(binary)} == {"twice", "once"}
    with pytest.raises(toolchain.CompileError) as caught:
        toolchain.binary(cuda(-1))
    assert ">    2 |     __shared__ float tile[-1];" in str(caught.value)


def test_import_looks_for_no_compiler() -> None:
    """Neither importing nor describing needs one: nothing is started."""
    program = (
        "import torch, subprocess; subprocess.run = subprocess.Popen = None\n"
        "import lmkan_gen.toolchain, lmkan_gen.launch.cpu, lmkan_gen.families.row_vector"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
