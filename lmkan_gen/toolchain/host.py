"""The host C++ compiler: a shared object with a plain C interface."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from lmkan_gen.toolchain.compiler import Compiler, ask, with_variables
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
#: what gcc and clang read besides their arguments, and that changes a binary
VARIABLES = (
    "CPATH",
    "C_INCLUDE_PATH",
    "CPLUS_INCLUDE_PATH",
    "COMPILER_PATH",
    "GCC_EXEC_PREFIX",
    "LIBRARY_PATH",
    "LD_RUN_PATH",
    "CCC_OVERRIDE_OPTIONS",
)
_NAMES = ("c++", "g++", "clang++")
_TORCH_ROOT = Path(torch.__file__).parent
_OPENMP_PROBE = '#include <omp.h>\nextern "C" int probe() { return omp_get_max_threads(); }\n'


def find(arch: str) -> Compiler:
    """The C++ compiler for ``arch``: ``generic``, ``x86-64-v3``, ``x86-64-v4``, or `TORCH` with its headers.

    Looked for in ``$CXX``, then ``c++``, ``g++``, ``clang++`` on the PATH. OpenMP is used when a
    trial compilation with it succeeds.

    Raises:
        CompilerMissing: there is none, or ``$CXX`` does not run, or torch is too old for `TORCH`.
        ValueError: unknown ``arch``.
    """
    if arch == TORCH:
        if not (_TORCH_ROOT / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
            raise CompilerMissing(
                f"its stable ABI came with torch 2.10, and this is torch {torch.__version__}"
            )
        executable, identity = command()
        return Compiler(identity, _TORCH_FLAGS, (*executable, *_torch_paths()), "launcher.cpp", "launcher.so")
    if arch not in _ARCHITECTURE_FLAGS:
        raise ValueError(f"unknown CPU architecture {arch!r}; known: {', '.join(_ARCHITECTURE_FLAGS)}")
    executable, identity = command()
    openmp = ("-fopenmp",) if _has_openmp(executable, identity) else ()
    flags = (*_FLAGS, *openmp, *_ARCHITECTURE_FLAGS[arch])
    return Compiler(identity, flags, executable, "kernel.cpp", "kernel.so")


def _torch_paths() -> tuple[str, ...]:
    """Where torch's headers and libraries are, and which of them to ask for."""
    libraries = ("-Wl,--no-as-needed", f"-L{_TORCH_ROOT / 'lib'}", "-ltorch_cpu", "-lc10")
    return (f"-I{_TORCH_ROOT / 'include'}", *libraries)


def command() -> tuple[tuple[str, ...], str]:
    """Command prefix and identity of the host compiler.

    Raises:
        CompilerMissing: there is none, or ``$CXX`` does not run.
    """
    if words := _named():
        try:
            identity = _identity(words)
        except CompilerMissing as error:
            raise CompilerMissing(
                f"the C++ compiler named by CXX={os.environ['CXX']!r} does not run; {ADVICE}"
            ) from error
        # which of them are the compiler's own nobody can tell: of `env LANG=C g++ -O0`, say
        more = " ".join(words[1:])
        return words, with_variables(f"{identity}, called with {more}" if more else identity, VARIABLES)
    for path in _found(_NAMES):
        with suppress(CompilerMissing):
            return (path,), with_variables(_identity((path,)), VARIABLES)
    raise CompilerMissing(f"no C++ compiler ({', '.join(_NAMES)}) on the PATH; {ADVICE}")


def programs() -> list[str]:
    """Paths of C++ compilers that another compiler may be given, best first: the one of ``$CXX`` without its
    arguments, those of the usual names, and those named after their versions, newest first.

    Raises:
        CompilerMissing: ``$CXX`` cannot be read.
    """
    words = tuple(word for word in reversed(_named()) if not word.startswith("-") and shutil.which(word))
    versions = [f"{name}-{version}" for version in range(25, 8, -1) for name in ("g++", "clang++")]
    found: dict[str, str] = {}
    for path in _found((*words[:1], *_NAMES, *versions)):
        found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def _found(names: Iterable[str]) -> list[str]:
    return [os.path.abspath(path) for name in names if (path := shutil.which(name))]


def _named() -> tuple[str, ...]:
    """The words of ``$CXX``, relative paths made absolute: compilers run in other directories.

    Raises:
        CompilerMissing: it is not a command, or a relative path in it leads nowhere.
    """
    text = os.environ.get("CXX", "")
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise CompilerMissing(
            f"CXX={text!r} is not a command: {str(error).lower()}; quote it as for a shell, such as "
            "CXX='g++ -O2' or CXX=\"'/opt/my tools/g++'\""
        ) from error
    for i, word in enumerate(words):
        if word.startswith(("./", "../")) or (i == 0 and "/" in word):
            words[i] = os.path.abspath(word)
            if words[i] != word and not Path(words[i]).is_file():
                raise CompilerMissing(
                    f"CXX={text!r} names {word}, and there is no {words[i]}: a relative path counts from "
                    "the current directory; name the compiler by its absolute path"
                )
    return tuple(words)


def has_openmp() -> bool:
    """Whether the host compiler builds OpenMP code here.

    Raises:
        CompilerMissing: as `command`.
    """
    return _has_openmp(*command())


@cache
def _identity(words: tuple[str, ...]) -> str:
    version, machine = ask([*words, "--version"]), ask([*words, "-dumpmachine"])
    if not version or not machine:
        raise CompilerMissing(f"{shlex.join(words)} does not run")
    first = version.splitlines()[0]
    # the first word of gcc's answer repeats the name it was called by (c++, g++): not what it is
    name = first if "clang" in first else f"gcc {first.split(maxsplit=1)[-1]}"
    return f"{name} for {machine.strip()}"


@cache
def _has_openmp(executable: tuple[str, ...], identity: str) -> bool:
    """Whether a trial compilation succeeds; the identity names the variables that it depends on."""
    with tempfile.TemporaryDirectory() as directory:
        output = str(Path(directory) / "probe.so")
        probe = [*executable, "-x", "c++", "-shared", "-fPIC", "-fopenmp", "-", "-o", output]
        return ask(probe, stdin=_OPENMP_PROBE) is not None
