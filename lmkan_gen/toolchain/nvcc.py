"""nvcc: CUDA device code to a cubin, wherever NVIDIA's compiler happens to be installed."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from lmkan_gen.toolchain import host
from lmkan_gen.toolchain.compiler import Compiler, ask, why_not, with_variables
from lmkan_gen.toolchain.errors import CompilerMissing

ADVICE = (
    'install NVIDIA\'s compiler with: pip install "lmkan-gen[nvcc]", or the CUDA toolkit 12.8 or newer, '
    "or name an nvcc in the environment variable LMKAN_GEN_NVCC"
)
OVERRIDE = "LMKAN_GEN_NVCC"

_USUAL_PLACE = "/usr/local/cuda/bin"
_FLAGS = ("-O3", "-std=c++17", "-Xptxas", "-v")
#: what nvcc and its preprocessor read besides their arguments, and that changes a binary
_VARIABLES = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN", *host.VARIABLES)
#: a real kernel; nvcc adds its headers
PROBE = 'extern "C" __global__ void probe(float* x) { x[threadIdx.x] = 1.0f; }\n'

#: by identity and command: None for those that compile here, else why they do not
_tried: dict[tuple[str, tuple[str, ...]], str | None] = {}


class HostRefused(CompilerMissing):
    """nvcc takes none of the host compilers here."""


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

    Of the host compilers here it gets the first that `tried` has not seen it refuse.

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
    identity = with_variables(f"nvcc {suitable.version}", _VARIABLES)
    refusals = []
    for words in _host_compilers():
        executable = (str(suitable.path), *words)
        why = _tried.get((identity, executable))
        if why is None:
            return Compiler(identity, flags, executable, "kernel.cu", "kernel.cubin")
        refusals.append(f"with {_host_name(executable)}: {why}")
    raise HostRefused(
        f"nvcc {suitable.version} ({suitable.path}) compiles nothing with the host compilers here "
        f"({'; '.join(refusals)}); install a C++ compiler that it knows, or name one in CXX"
    )


def tried(arch: str) -> Compiler:
    """As `find`, with a host compiler that it takes: nvcc refuses those that are newer than itself.

    The first call compiles a small kernel, once per process; a warning tells of what was refused.

    Raises:
        CompilerMissing: as `find`, or nothing compiles.
    """
    first = find(arch)
    found = first
    while (key := (found.identity, found.executable)) not in _tried:
        _tried[key] = why_not(found, PROBE)
        if _tried[key] is not None:
            found = find(arch)
    if found != first:
        warnings.warn(
            f"{first.identity} compiles nothing with {_host_name(first.executable)} "
            f"({_tried[first.identity, first.executable]}); {_host_name(found.executable)} is used instead",
            RuntimeWarning,
            stacklevel=2,
        )
    return found


def _host_name(executable: tuple[str, ...]) -> str:
    return executable[-1] if len(executable) > 1 else "gcc"


def installed() -> tuple[Nvcc, ...]:
    """Every nvcc that runs here, best first."""
    environment = os.environ
    if override := environment.get(OVERRIDE):
        return _probed((_absolute(override),))
    places = [f"{environment[name]}/bin" for name in ("CUDA_HOME", "CUDA_PATH") if environment.get(name)]
    places += [environment.get("PATH", ""), _USUAL_PLACE, *map(str, wheel_directories())]
    # one which() per directory: each may hold another version
    directories = os.pathsep.join(places).split(os.pathsep)
    paths = (shutil.which("nvcc", path=directory) for directory in directories if directory)
    return _probed(tuple(dict.fromkeys(_absolute(path) for path in paths if path)))


def wheel_directories() -> Iterator[Path]:
    """``bin`` directories of NVIDIA's CUDA wheels (``nvidia-cuda-nvcc``, ``nvidia-cuda-nvdisasm``)."""
    package = find_spec("nvidia")
    for location in (package.submodule_search_locations or ()) if package else ():
        yield from sorted(Path(location).glob("cu*/bin"), reverse=True)


def _absolute(path: str) -> str:
    """Of a file that is named by a relative path: compilers run in other directories."""
    return os.path.abspath(path) if os.sep in path else path


@cache
def _probed(paths: tuple[str, ...]) -> tuple[Nvcc, ...]:
    return tuple(nvcc for path in paths if (nvcc := _probe(path)) is not None)


def _probe(path: str) -> Nvcc | None:
    version, architectures = ask([path, "--version"]), ask([path, "--list-gpu-code"])
    number = re.search(r"\bV(\d+\.\d+\.\d+)", version or "")
    if number is None or architectures is None:
        return None
    return Nvcc(Path(path), number.group(1), frozenset(architectures.split()))


def _host_compilers() -> Iterator[tuple[str, ...]]:
    """Arguments that give nvcc a preprocessor, best first; none for gcc, which it finds by itself."""
    own = shutil.which("gcc") is not None
    if own:
        yield ()
    try:
        others = host.programs()
    except CompilerMissing:
        if not own:
            raise
        return
    if not own and not others:
        raise CompilerMissing(f"nvcc needs a host compiler as preprocessor, and there is none; {host.ADVICE}")
    yield from (("-ccbin", path) for path in others)
