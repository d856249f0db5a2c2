"""The host C++ compiler: a shared object with a plain C interface."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch

from lmkan_gen.toolchain.compiler import Compiler, ask
from lmkan_gen.toolchain.errors import CompilerMissing

ADVICE = (
    "install a C++ compiler (Debian/Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; "
    "conda: conda install cxx-compiler) or name one in the environment variable CXX"
)

#: Instruction sets are spelled out: compilers older than the x86-64-v3 names know them too, and
#: -march=native would put illegal instructions into a cache directory that machines share.
#: x86-64-v4 leaves out AVX512CD, which no kernel needs.
_V3 = ("-mavx2", "-mfma", "-mbmi", "-mbmi2", "-mf16c", "-mlzcnt", "-mmovbe", "-mpopcnt")
_V4 = (*_V3, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_ARCHITECTURE_FLAGS = {"generic": (), "x86-64-v3": _V3, "x86-64-v4": _V4}

#: no -ffast-math: NaN and infinities must come out as the formulas say
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=fast")
#: what stands for an architecture in libraries that serve torch: any that the compiler builds for by itself
TORCH = "torch"
#: of the stable ABI, which has all that is used from this release on
_TORCH_FLAGS = ("-O2", "-std=c++20", "-shared", "-fPIC", "-DTORCH_TARGET_VERSION=0x020a000000000000")
_OPENMP_PROBE = '#include <omp.h>\nextern "C" int probe() { return omp_get_max_threads(); }\n'


def find(arch: str) -> Compiler:
    """The C++ compiler for ``arch``: ``generic``, ``x86-64-v3``, ``x86-64-v4``, or `TORCH` with its headers.

    Looked for in ``$CXX``, then ``c++``, ``g++``, ``clang++`` on the PATH. OpenMP is used when a
    trial compilation with it succeeds.

    Raises:
        CompilerMissing: there is none, or ``$CXX`` does not run.
        ValueError: unknown ``arch``.
    """
    if arch == TORCH:
        executable, identity = command()
        return Compiler(identity, _TORCH_FLAGS, (*executable, *_torch_paths()), "launcher.cpp", "launcher.so")
    if arch not in _ARCHITECTURE_FLAGS:
        raise ValueError(f"unknown CPU architecture {arch!r}; known: {', '.join(_ARCHITECTURE_FLAGS)}")
    executable, identity = command()
    openmp = ("-fopenmp",) if _has_openmp(executable) else ()
    flags = (*_FLAGS, *openmp, *_ARCHITECTURE_FLAGS[arch])
    return Compiler(identity, flags, executable, "kernel.cpp", "kernel.so")


def _torch_paths() -> tuple[str, ...]:
    """Where torch's headers and libraries are, and which of them to ask for."""
    root = Path(torch.__file__).parent
    libraries = ("-Wl,--no-as-needed", f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10")
    return (f"-I{root / 'include'}", *libraries)


def command() -> tuple[tuple[str, ...], str]:
    """Command prefix and identity of the host compiler.

    Raises:
        CompilerMissing: there is none, or ``$CXX`` does not run.
    """
    return _command(os.environ.get("CXX", ""), os.environ.get("PATH", ""))


def has_openmp() -> bool:
    """Whether the host compiler builds OpenMP code here.

    Raises:
        CompilerMissing: as `command`.
    """
    return _has_openmp(command()[0])


@cache
def _command(cxx: str, path: str) -> tuple[tuple[str, ...], str]:
    if cxx.strip():
        words = tuple(shlex.split(cxx))
        if (identity := _identity(words)) is None:
            raise CompilerMissing(f"the C++ compiler named by CXX={cxx!r} does not run; {ADVICE}")
        return words, identity
    for name in ("c++", "g++", "clang++"):
        found = shutil.which(name, path=path)
        if found and (identity := _identity((found,))) is not None:
            return (found,), identity
    raise CompilerMissing(f"no C++ compiler (c++, g++, clang++) on the PATH; {ADVICE}")


def _identity(words: tuple[str, ...]) -> str | None:
    version, machine = ask([*words, "--version"]), ask([*words, "-dumpmachine"])
    if not version or not machine:
        return None
    first = version.splitlines()[0]
    # the first word of gcc's answer repeats the name it was called by (c++, g++): not what it is
    name = first if "clang" in first else f"gcc {first.split(maxsplit=1)[-1]}"
    return f"{name} for {machine.strip()}"


@cache
def _has_openmp(executable: tuple[str, ...]) -> bool:
    with tempfile.TemporaryDirectory() as directory:
        output = str(Path(directory) / "probe.so")
        probe = [*executable, "-x", "c++", "-shared", "-fPIC", "-fopenmp", "-", "-o", output]
        return ask(probe, stdin=_OPENMP_PROBE) is not None
