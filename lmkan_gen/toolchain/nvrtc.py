"""NVRTC, the compiler library that every CUDA build of torch carries: device code without an nvcc."""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path

from lmkan_gen.toolchain.compiler import Compiler
from lmkan_gen.toolchain.errors import CompilerMissing

ADVICE = "install a CUDA build of torch, or: pip install cuda-bindings nvidia-cuda-nvrtc"


def find(arch: str) -> Compiler:
    """NVRTC as a compiler for ``arch`` (``sm_XY``).

    It runs in a process of its own, which costs about 0.2 s a kernel and keeps a crash of the
    library, and its memory, out of the user's process.

    Raises:
        CompilerMissing: cuda-bindings or the library is missing, or it does not know ``arch``.
    """
    version, architectures = _library(os.environ.get("LD_LIBRARY_PATH", ""), tuple(sys.path))
    if int(arch.removeprefix("sm_")) not in architectures:
        raise CompilerMissing(f"NVRTC {version} does not compile for {arch}; {ADVICE} of a newer release")
    # -P: the script's own directory must not shadow modules
    executable = (sys.executable, "-P", str(Path(__file__).with_name("nvrtc_main.py")))
    # unlike nvcc it takes generic lambdas for host code unless told otherwise
    everything = "--device-as-default-execution-space"
    flags = (f"--gpu-architecture={arch}", "--std=c++17", everything, "--ptxas-options=-v")
    return Compiler(f"nvrtc {version}", flags, executable, "kernel.cu", "kernel.cubin")


@cache
def _library(library_path: str, python_path: tuple[str, ...]) -> tuple[str, frozenset[int]]:
    """Version and architectures; the arguments are what the search depends on."""
    try:
        from cuda.bindings import nvrtc

        _, major, minor = nvrtc.nvrtcVersion()
        _, architectures = nvrtc.nvrtcGetSupportedArchs()
    except (ImportError, RuntimeError, OSError) as error:
        raise CompilerMissing(f"NVRTC cannot be used ({str(error).splitlines()[0]}); {ADVICE}") from error
    return f"{major}.{minor}", frozenset(architectures)
