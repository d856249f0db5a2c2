"""Run many compilations at once with ninja."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Timer

from lmkan_gen.machine import available_memory, usable_cores
from lmkan_gen.toolchain.compiler import Compiler
from lmkan_gen.toolchain.errors import CompilerMissing

LOG = "build.log"

#: what one nvcc with its cicc and ptxas may need
_BYTES_PER_JOB = 1 << 30
#: seconds without any compilation coming to its end, after which those that run count as hanging
STALLED_S = 600.0
_FINISHED = re.compile(r"(?:\[\d+/\d+\] )?finished (\d+)")  # the status may be put back by a debugger
_RULE = """\
rule compile
  command = cd $directory && {slot} {log} $compile && mv {partial} $output
  description = finished $directory
"""
_PARTIAL = "partial"


def run(
    compilers: Mapping[int, Compiler], staging: Path, finished: Callable[[int], None], locks: Path
) -> str:
    """Run ``compilers[i]`` on the source in directory ``str(i)``, a bad one without stopping the others.

    Output files exist afterwards for exactly the jobs that succeeded; each job's compiler output is
    in its `LOG`, which exists as soon as the compiler was started. ``finished(i)`` is called as job ``i``
    ends, well or not; not for jobs that were stopped because nothing had ended for `STALLED_S`, nor for
    those that were still waiting then. On any exception (Ctrl-C among them) all compilers are stopped
    before it goes on. Compilers see no GPU. All processes that name the same directory of ``locks`` share
    one bound on compilers that run at a time. Returns what else ninja said.

    Raises:
        CompilerMissing: no ninja.
    """
    slots = _parallel()
    (staging / "build.ninja").write_text(_build_file(compilers, locks, slots))
    command = [executable(), "-k", "0", "-j", str(min(slots, len(compilers)))]
    # an empty status: each line of output is then a description
    environment = {**os.environ, "NINJA_STATUS": "", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        command,
        cwd=staging,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        said = []
        watch = _watch(process)
        try:
            for line in process.stdout:
                if match := _FINISHED.fullmatch(line.strip()):
                    watch.cancel()
                    finished(int(match.group(1)))
                    watch = _watch(process)
                else:
                    said.append(line)
        except BaseException:
            process.terminate()
            raise
        finally:
            watch.cancel()
    return "".join(said)


def _watch(process: subprocess.Popen[str]) -> Timer:
    """Stop ninja, which stops its compilers, unless cancelled in time."""
    watch = Timer(STALLED_S, process.terminate)
    watch.daemon = True
    watch.start()
    return watch


def _build_file(compilers: Mapping[int, Compiler], locks: Path, slots: int) -> str:
    # a directory that several machines share has slots of each
    script, path = Path(__file__).with_name("slot.py"), locks / f"slot-{platform.node()}-"
    slot = shlex.join([sys.executable, "-I", "-S", str(script), str(path), str(slots)]).replace("$", "$$")
    parts = [_RULE.format(slot=slot, log=LOG, partial=_PARTIAL)]
    for i, compiler in compilers.items():
        command = shlex.join(compiler.command(_PARTIAL)).replace("$", "$$")
        parts.append(
            f"build {i}/{compiler.output}: compile {i}/{compiler.source}\n"
            f"  directory = {i}\n"
            f"  output = {compiler.output}\n"
            f"  compile = {command}\n"
        )
    return "".join(parts)


def executable() -> str:
    """Path of ninja: of its Python package, else on the PATH.

    Raises:
        CompilerMissing: there is none.
    """
    try:
        from ninja import BIN_DIR
    except ImportError:
        BIN_DIR = ""
    found = shutil.which("ninja", path=BIN_DIR) if BIN_DIR else None
    found = found or shutil.which("ninja")
    if found is None:
        raise CompilerMissing("no ninja on this machine; install it with: pip install ninja")
    return found


def _parallel() -> int:
    return max(1, min(usable_cores(), available_memory() // _BYTES_PER_JOB))
