"""What a compiler is to the rest of the toolchain: an identity for the key, and a command."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmkan_gen.toolchain.errors import first_error

_PROBE_SECONDS = 60


@dataclass(frozen=True)
class Compiler:
    """A way to turn one source file into one binary.

    Attributes:
        identity: name and version, and what the user adds to its flags; part of a binary's key. Holds no
            path of the compiler, so that equal compilers in different places share binaries.
        flags: part of a binary's key; hold no path either.
        executable: command prefix with absolute paths; not part of the key.
        source: name of the source file it reads.
        output: name of the binary it writes.
    """

    identity: str
    flags: tuple[str, ...]
    executable: tuple[str, ...]
    source: str
    output: str

    def command(self, output: str) -> list[str]:
        """The command that compiles `source` in the current directory to ``output``."""
        return [*self.executable, *self.flags, "-o", output, self.source]


def with_variables(identity: str, names: Iterable[str]) -> str:
    """``identity``, and those of the environment variables ``names`` that are set: they change binaries."""
    given = (f"{name}={os.environ[name]}" for name in names if os.environ.get(name))
    return ", ".join((identity, *given))


def ask(command: Sequence[str], stdin: str = "", directory: Path | None = None) -> str | None:
    """What ``command`` prints (run in ``directory``), or None when it cannot be run or fails."""
    try:
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, timeout=_PROBE_SECONDS, cwd=directory
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


def why_not(compiler: Compiler, source: str) -> str | None:
    """Try to compile ``source``: None when that works, else what the compiler says."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / compiler.source).write_text(source)
        try:
            done = subprocess.run(
                compiler.command(compiler.output),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=_PROBE_SECONDS,
                cwd=directory,
            )
        except (OSError, subprocess.SubprocessError) as error:
            return str(error)
        return None if (Path(directory) / compiler.output).is_file() else first_error(done.stdout)
