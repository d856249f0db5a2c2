"""The command line, run inside the tests' process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from lmkan_gen import cli


class Outcome(NamedTuple):
    """What a command came to: its exit code, and what it printed."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """What runs ``lmkan-gen`` with the given arguments, on a wide terminal."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["lmkan-gen", *arguments])
        code: str | int | None = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        assert isinstance(code, int | None)
        return Outcome(code or 0, *capsys.readouterr())

    return run
