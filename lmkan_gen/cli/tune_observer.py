"""What `lmkan-gen tune` remembers of a run beside what it shows: for Ctrl-C, and for `--json`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from lmkan_gen.problem import Problem
from lmkan_gen.text import printable
from lmkan_gen.tuner.progress import Progress
from lmkan_gen.tuner.report import ConsoleObserver
from lmkan_gen.tuning_file import Entry


class Listener(ConsoleObserver):
    """Shows a run and remembers it."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._done = 0
        self._now: Progress | None = None
        self._skipped: list[dict[str, str]] = []
        self._cut_short: list[dict[str, str | int]] = []
        self._notes: list[str] = []

    def progress(self, progress: Progress) -> None:
        """See base class."""
        self._now = progress
        super().progress(progress)

    def finished(self, problem: Problem, entry: Entry) -> None:
        """See base class."""
        self._done += 1
        if self._now is not None:
            self._now = replace(self._now, done=0)
        super().finished(problem, entry)

    def skipped(self, problem: Problem, why: str) -> None:
        """See base class."""
        self._skipped.append({**_named(problem), "why": why})
        super().skipped(problem, why)

    def cut_short(self, problem: Problem, tried: int, total: int) -> None:
        """See base class."""
        self._cut_short.append({**_named(problem), "tried": tried, "of": total})
        super().cut_short(problem, tried, total)

    def noted(self, text: str) -> None:
        """See base class."""
        self._notes.append(text)
        super().noted(text)

    def kept(self, output: Path) -> str:
        """What an interrupted run leaves, in words."""
        if self._now is None:
            return "nothing was measured yet"
        words = f"{self._done} of {self._now.count} entries are in {printable(output)}"
        if self._now.done:
            words += f", {self._now.done} candidates of the next are measured and kept"
        return words

    def said(self) -> dict[str, Any]:
        """What the run told, for JSON."""
        return {"skipped": self._skipped, "ended_by_budget": self._cut_short, "notes": self._notes}


def _named(problem: Problem) -> dict[str, str]:
    return {"operation": problem.operation.value, "shape": str(problem.shape)}
