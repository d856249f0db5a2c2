"""nvcc: CUDA device code to a cubin, wherever NVIDIA's compiler happens to be installed."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from lmkan_gen.toolchain import host
from lmkan_gen.toolchain.compiler import Compiler, ask
from lmkan_gen.toolchain.errors import CompilerMissing

ADVICE = (
    'install NVIDIA\'s compiler with: pip install "lmkan-gen[nvcc]", or the CUDA toolkit 12.8 or newer, '
    "or name an nvcc in the environment variable LMKAN_GEN_NVCC"
)
OVERRIDE = "LMKAN_GEN_NVCC"

_USUAL_PLACE = "/usr/local/cuda/bin"
_FLAGS = ("-O3", "-std=c++17", "-Xptxas", "-v")


@dataclass(frozen=True)
class Nvcc:
    """An nvcc that runs: its path, its version and the architectures it compiles for."""

    path: Path
    version: str
    architectures: frozenset[str]


def find(arch: str) -> Compiler:
    """An nvcc that compiles for ``arch`` (``sm_XY``).

    The file named by ``$LMKAN_GEN_NVCC`` if set; else the first that runs and knows ``arch`` in
    ``$CUDA_HOME/bin``, ``$CUDA_PATH/bin``, the PATH, ``/usr/local/cuda/bin`` and NVIDIA's PyPI wheels.

    Raises:
        CompilerMissing: there is none, or there is no host compiler, which nvcc needs as preprocessor.
    """
    found = installed()
    if not found:
        named = os.environ.get(OVERRIDE)
        where = f"{OVERRIDE}={named} does not run" if named else "no nvcc on this machine"
        raise CompilerMissing(f"{where}; {ADVICE}")
    suitable = next((nvcc for nvcc in found if arch in nvcc.architectures), None)
    if suitable is None:
        those = ", ".join(f"{nvcc.path} ({nvcc.version})" for nvcc in found)
        raise CompilerMissing(f"no nvcc here compiles for {arch}: {those}; {ADVICE}")
    flags = ("-cubin", f"-arch={arch}", *_FLAGS)
    executable = (str(suitable.path), *_host_compiler())
    return Compiler(f"nvcc {suitable.version}", flags, executable, "kernel.cu", "kernel.cubin")


def installed() -> tuple[Nvcc, ...]:
    """Every nvcc that runs here, best first."""
    environment = os.environ
    if override := environment.get(OVERRIDE):
        return _probed((override,))
    places = [f"{environment[name]}/bin" for name in ("CUDA_HOME", "CUDA_PATH") if environment.get(name)]
    places += [environment.get("PATH", ""), _USUAL_PLACE, *map(str, wheel_directories())]
    # one which() per directory: each may hold another version
    directories = os.pathsep.join(places).split(os.pathsep)
    paths = (shutil.which("nvcc", path=directory) for directory in directories if directory)
    return _probed(tuple(dict.fromkeys(path for path in paths if path)))


def wheel_directories() -> Iterator[Path]:
    """``bin`` directories of NVIDIA's CUDA wheels (``nvidia-cuda-nvcc``, ``nvidia-cuda-nvdisasm``)."""
    package = find_spec("nvidia")
    for location in (package.submodule_search_locations or ()) if package else ():
        yield from sorted(Path(location).glob("cu*/bin"), reverse=True)


@cache
def _probed(paths: tuple[str, ...]) -> tuple[Nvcc, ...]:
    return tuple(nvcc for path in paths if (nvcc := _probe(path)) is not None)


def _probe(path: str) -> Nvcc | None:
    version, architectures = ask([path, "--version"]), ask([path, "--list-gpu-code"])
    number = re.search(r"\bV(\d+\.\d+\.\d+)", version or "")
    if number is None or architectures is None:
        return None
    return Nvcc(Path(path), number.group(1), frozenset(architectures.split()))


def _host_compiler() -> tuple[str, ...]:
    """nvcc takes gcc from the PATH by itself; point it to another one only when there is none."""
    if shutil.which("gcc"):
        return ()
    try:
        return ("-ccbin", host.command()[0][-1])
    except CompilerMissing as error:
        raise CompilerMissing(f"nvcc needs a host compiler as preprocessor: {error}") from error
