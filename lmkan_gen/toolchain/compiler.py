"""What a compiler is to the rest of the toolchain: an identity for the key, and a command."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_PROBE_SECONDS = 60


@dataclass(frozen=True)
class Compiler:
    """A way to turn one source file into one binary.

    Attributes:
        identity: name and version, part of a binary's key; holds no path, so that equal compilers
            in different places share binaries.
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


def ask(command: Sequence[str], stdin: str = "", directory: Path | None = None) -> str | None:
    """What ``command`` prints (run in ``directory``), or None when it cannot be run or fails."""
    try:
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, timeout=_PROBE_SECONDS, cwd=directory
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None
