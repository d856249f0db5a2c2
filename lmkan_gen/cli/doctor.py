"""`lmkan-gen doctor`: what this machine has, and what a layer will therefore run."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

    from lmkan_gen.selection import Source

#: a middling layer: IN, OUT, GRIDS, BATCH
_SAMPLE = (128, 128, 8, 1024)
#: relative to the largest output; float32 sums of this length stay far below
_TOLERANCE = 1e-5


class Status(StrEnum):
    """``missing``: something optional is not here, and the detail says how to get it."""

    OK = "ok"
    MISSING = "missing"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """Result of one probe."""

    topic: str
    status: Status
    detail: str


class _Missing(Exception):
    """Raised by probes for what is absent but optional."""


_Probe = tuple[str, Callable[[], str]]


def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of {topic, status, detail}.")] = False,
) -> None:
    """Report compilers, GPUs, torch, cache and tuning files, and run a sample layer on each device.

    A problem it finds is part of the report, not a failure of the command.

    \b
    Examples:
      lmkan-gen doctor
      lmkan-gen doctor --json
    """
    findings = [_examine(topic, probe) for topic, probe in _probes()]
    if as_json:
        typer.echo(json.dumps([asdict(f) for f in findings], indent=2))
        return
    from rich.console import Console
    from rich.text import Text

    from lmkan_gen.text import printable

    style = {Status.OK: "green", Status.MISSING: "yellow", Status.PROBLEM: "red"}
    console = Console()
    widest, longest = max(len(f.topic) for f in findings), max(map(len, Status))
    for f in findings:
        # lines are left whole, so that paths in them are
        lines = [printable(line) for line in f.detail.splitlines()] or [""]
        indent = "\n" + " " * (widest + longest + 2)
        status = (f.status.ljust(longest), style[f.status])
        console.print(
            Text.assemble(f.topic.ljust(widest), " ", status, " ", indent.join(lines)), soft_wrap=True
        )


def _probes() -> Iterator[_Probe]:
    yield "python", lambda: f"{sys.version.split()[0]}, {sys.executable}"
    yield "lmkan-gen", _package
    yield "torch", _torch
    yield "GPUs", _gpus
    yield "nvcc", _nvcc
    yield "NVRTC", _nvrtc
    yield "CUDA kernels", _cuda_path
    yield "C++ compiler", _host_compiler
    yield "ninja", _ninja
    yield "kernel cache", _cache
    yield from _listed("tuning files", _tuning_file_probes)
    yield from _listed("sample layers", _sample_layer_probes)


def _listed(topic: str, probes: Callable[[], list[_Probe]]) -> Iterator[_Probe]:
    """Probes that have to be found first, which may fail as well."""
    try:
        found = probes()
    except Exception as error:  # see `_examine`
        reason = _words(error)
        found = [(topic, partial(_fail, reason))]
    yield from found


def _fail(reason: str) -> str:
    raise RuntimeError(reason)


def _examine(topic: str, probe: Callable[[], str]) -> Finding:
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            detail = probe()
    except _Missing as error:
        return Finding(topic, Status.MISSING, str(error))
    except Exception as error:  # whatever is broken here, the rest of the report is wanted all the more
        return Finding(topic, Status.PROBLEM, _words(error))
    if said:
        return Finding(topic, Status.PROBLEM, "\n".join([detail, *(str(w.message) for w in said)]))
    return Finding(topic, Status.OK, detail)


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__


def _package() -> str:
    import lmkan_gen

    return f"{lmkan_gen.__version__}, {Path(lmkan_gen.__file__).parent}"


def _torch() -> str:
    import torch

    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return f"{torch.__version__}, {built}, {torch.get_num_threads()} CPU threads"


def _gpus() -> str:
    import torch

    from lmkan_gen.device import cuda

    if not torch.cuda.is_available():
        raise _Missing("none that torch can use; layers run on the CPU")
    found = [cuda(i) for i in range(torch.cuda.device_count())]
    return "\n".join(
        f"cuda:{i}: {d.name}, {d.arch}, {d.multiprocessors} multiprocessors, "
        f"{d.shared_memory_per_block // 1024} KiB shared memory per block"
        for i, d in enumerate(found)
    )


def _nvcc() -> str:
    from lmkan_gen.toolchain import nvcc

    found = nvcc.installed()
    if not found:
        raise _Missing(f"none; needed for CUDA kernels unless NVRTC is there. {nvcc.ADVICE}")
    return "\n".join(f"{n.version}, {n.path}" for n in found)


def _nvrtc() -> str:
    from lmkan_gen.toolchain import CompilerMissing, nvrtc

    try:
        return f"{nvrtc.find('sm_90').identity}; used for CUDA kernels where nvcc is missing"
    except CompilerMissing as error:
        raise _Missing(str(error)) from None


def _cuda_path() -> str:
    """Which way CUDA kernels are compiled here, and why. Compiles one."""
    import os

    import torch

    from lmkan_gen.device import cuda
    from lmkan_gen.plan import KernelSpec
    from lmkan_gen.toolchain import CompilerMissing, compiler, nvcc
    from lmkan_gen.toolchain.compiler import why_not

    here = [cuda(i).arch for i in range(torch.cuda.device_count())]
    lines = []
    for arch in dict.fromkeys(here) or ("sm_90",):
        try:
            found = compiler(KernelSpec.make("any.cu.j2", arch, {}), tried=True)
        except CompilerMissing as error:
            raise _Missing(f"{arch}: plain torch, since nothing compiles for it: {error}") from None
        if not found.identity.startswith("nvcc"):
            if (refusal := why_not(found, nvcc.PROBE)) is not None:
                raise RuntimeError(f"{arch}: plain torch, since {found.identity} does not compile: {refusal}")
            why = _why_no_nvcc(arch)
        elif named := os.environ.get(nvcc.OVERRIDE):
            why = f"named by {nvcc.OVERRIDE}={named}"
        else:
            why = f"the first that knows {arch}: {found.executable[0]}"
        lines.append(f"{arch}: {found.identity}, {why}")
    if not here:
        lines.append("there is no GPU here; an example")
    return "\n".join(lines)


def _why_no_nvcc(arch: str) -> str:
    from lmkan_gen.toolchain import CompilerMissing, nvcc

    try:
        nvcc.find(arch)
    except CompilerMissing as error:
        return f"because of {str(error).split(';')[0]}"
    return "preferred"


def _host_compiler() -> str:
    from lmkan_gen.toolchain import CompilerMissing, host
    from lmkan_gen.toolchain.compiler import why_not

    try:
        executable, identity = host.command()
        if (refusal := why_not(host.find("generic"), "#include <cmath>\n")) is not None:
            raise RuntimeError(f"{' '.join(executable)}, {identity}, does not compile: {refusal}")
        openmp = "with OpenMP" if host.has_openmp() else "without OpenMP: CPU kernels use one thread"
    except CompilerMissing as error:
        raise _Missing(str(error)) from None
    return f"{' '.join(executable)}, {identity}, {openmp}"


def _ninja() -> str:
    from lmkan_gen.toolchain import ninja_file
    from lmkan_gen.toolchain.compiler import ask

    executable = ninja_file.executable()
    version = ask([executable, "--version"])
    if version is None:
        raise RuntimeError(f"{executable} does not run")
    return f"{version.strip()}, {executable}"


def _cache() -> str:
    from lmkan_gen.toolchain import places, store

    for words in places.exposed(store.root()):
        warnings.warn(words, stacklevel=2)
    root, entries = store.root(), store.entries()
    brought = sum(e.bundle is not None for e in entries)
    bundled = f" ({brought} from bundles)" if brought else ""
    return f"{root}, {len(entries)} kernels{bundled}, {sum(e.bytes for e in entries) / 2**20:.1f} MiB"


def _tuning_file_probes() -> list[_Probe]:
    from lmkan_gen import selection

    found = selection.sources()
    if not found:
        return [("tuning files", lambda: "none; `lmkan-gen tune` writes one")]
    return [(f"tuning file ({source.origin})", partial(_tuning_file, source)) for source in found]


def _tuning_file(source: Source) -> str:
    from lmkan_gen.freshness import stale_entries
    from lmkan_gen.tuning_file import load

    file = load(source.path)
    stale = len(stale_entries(file))
    words = f", {stale} of them measured with other kernel sources: tune them again" if stale else ""
    return f"{source.path}: {file.device.name}, {len(file.entries)} entries{words}"


def _sample_layer_probes() -> list[_Probe]:
    import torch

    names = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return [(f"sample layer on {name}", partial(_sample_layer, torch.device(name))) for name in names]


def _sample_layer(device: torch.device) -> str:
    import torch

    from lmkan_gen import LMKAN2DLayer, dispatch, reference
    from lmkan_gen.problem import LayerShape

    shape = LayerShape(*_SAMPLE)
    layer = LMKAN2DLayer(shape.grids, shape.inputs, shape.outputs).to(device)
    x = torch.randn(shape.inputs, shape.batch, device=device, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    expected = torch.empty_like(y)
    with torch.no_grad():
        reference.forward(x, layer.func_parameter, layer.borders, expected)
        error = ((y - expected).abs().max() / expected.abs().max()).item()
    if not error <= _TOLERANCE:
        raise RuntimeError(f"the output is off by {error:.1e} of its largest value: please report this")
    ran = [u.describe() for u in dispatch.used() if u.shape == shape and u.device == x.device]
    return "\n".join(ran)
