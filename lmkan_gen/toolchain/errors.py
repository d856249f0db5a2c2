"""What can go wrong between a kernel specification and a loadable binary."""

from __future__ import annotations

import re
from pathlib import Path

_LINES_AROUND = 3
_ERROR = re.compile(r"\b(error|fatal)\b", re.IGNORECASE)
_POSITION = re.compile(r"kernel\.(?:cu|cpp)[:(](\d+)")


class ToolchainError(RuntimeError):
    """A kernel could not be compiled; the torch reference can still compute the operation."""


class CompilerMissing(ToolchainError):
    """No usable compiler (or disassembler) on this machine; the message says what to install."""


class CompileError(ToolchainError):
    """The compiler refused generated source.

    Attributes:
        source: the kept source file.
        log: the kept output of the compiler.
    """

    def __init__(self, what: str, source: Path, log: Path, command: str) -> None:
        self.source = source
        self.log = log
        output = log.read_text(errors="replace") if log.is_file() else ""
        first = first_error(output)
        parts = [f"{what} did not compile: {first}"]
        if position := _POSITION.search(first):
            parts.append(_excerpt(source, int(position.group(1))))
        parts += [f"repeat with: {command}", f"whole log: {log}"]
        super().__init__("\n".join(parts))


def first_error(output: str) -> str:
    """The first line of a compiler's output that speaks of an error."""
    lines = (line.strip() for line in output.splitlines() if _ERROR.search(line))
    return next(lines, "the compiler said nothing")


def _excerpt(source: Path, line: int) -> str:
    lines = source.read_text().splitlines()
    first = max(1, line - _LINES_AROUND)
    numbered = enumerate(lines[first - 1 : line + _LINES_AROUND], first)
    return "\n".join(f"{'>' if n == line else ' '}{n:5d} | {text}" for n, text in numbered)
