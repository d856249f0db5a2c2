"""A tuning run on the terminal: a progress line while it goes on, a table when it is done."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from lmkan_gen.problem import Problem
from lmkan_gen.sheet import Column, Sheet
from lmkan_gen.text import printable
from lmkan_gen.tuner.progress import Observer, Progress
from lmkan_gen.tuner.space import Candidate
from lmkan_gen.tuner.worker import FAILURES, Rejected
from lmkan_gen.tuning_file import Entry


class ConsoleObserver(Observer):
    """Shows a run's progress, and a line for each problem that is done; use it as a context manager."""

    def __init__(self, console: Console) -> None:
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[best]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,  # a log gets lines only
        )
        self._console = console
        self._task = self._bar.add_task("starting", total=None, best="")
        self._problem: Problem | None = None
        self._place = ""

    def __enter__(self) -> ConsoleObserver:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def progress(self, progress: Progress) -> None:
        """See base class."""
        p = progress.problem
        self._place = f"{progress.index + 1}/{progress.count}"
        if p != self._problem:
            self._problem = p
            self._bar.reset(self._task)
        best = f"best {duration(progress.best_us)}" if progress.best_us is not None else ""
        self._bar.update(
            self._task,
            description=f"{self._place} {p.operation} {p.shape}: {progress.phase}",
            completed=progress.done,
            total=progress.total,
            best=best,
        )

    def finished(self, problem: Problem, entry: Entry) -> None:
        """See base class."""
        t = entry.time_us
        against = ((t.default, "the default's speed"), (t.reference, "plain torch's"))
        speed = [f"{ratio(other / t.median)} {words}" for other, words in against if other is not None]
        words = [duration(t.median), *([] if entry.unsteady else speed)]
        words += [f"{entry.search.tried} tried", f"{_failed(entry)} failed"]
        what = f"{self._place} {problem.operation} {problem.shape}: {entry.family}"
        self._line(f"[green]done[/] {what}, {', '.join(words)}")

    def rejected(self, problem: Problem, candidate: Candidate, rejected: Rejected) -> None:
        """See base class."""
        first, *_ = str(rejected).splitlines() or [""]
        text = escape(printable(f"{problem.operation} {candidate}: {first}"))
        self._line(f"[yellow]{rejected.reason}[/] {text}")

    def skipped(self, problem: Problem, why: str) -> None:
        """See base class."""
        self._line(f"[yellow]skipped[/] {escape(f'{problem.operation} {problem.shape}: {why}')}")

    def noted(self, text: str) -> None:
        """See base class."""
        self._line(f"[yellow]note[/] {escape(text)}")

    def _line(self, markup: str) -> None:
        self._console.print(markup, highlight=False, soft_wrap=True)


def summary(entries: Iterable[Entry], title: str) -> Sheet:
    """One row per entry: what won, and by how much."""
    sheet = Sheet(
        [
            Column("layer call"),
            Column("kernel", words=True),
            Column("time, ±IQR", number=True),
            Column("default", number=True),
            Column("torch, speedup", number=True),
            Column("tried, failed", number=True),
        ],
        title,
    )
    for e in entries:
        t = e.time_us
        speedup = "" if t.reference is None or e.doubts else f"\n{ratio(t.reference / t.median)}"
        unsteady = "\nunsteady" if e.doubts else ""
        sheet.add(
            f"{e.operation}\n{e.shape.layer}",
            f"{e.family}\n{_settings(e)}",
            f"{duration(t.median)}\n±{duration(t.iqr)}{unsteady}",
            duration(t.default),
            f"{duration(t.reference)}{speedup}",
            f"{e.search.tried}\n{_failed(e)}",
        )
    return sheet


def _settings(entry: Entry) -> str:
    return " ".join(f"{k}={v}" for k, v in sorted(entry.parameters.items()))


def _failed(entry: Entry) -> int:
    return sum(n for reason, n in entry.search.rejected.items() if reason in FAILURES)


def ratio(value: float, decimals: int = 1) -> str:
    """How many times faster; two digits of what is below one, so that nothing is zero times faster."""
    return f"{value:.{decimals}f}x" if value >= 1 else f"{value:.2g}x"


def duration(us: float | None) -> str:
    """Microseconds in a unit that is easy to read; ``-`` for None."""
    if us is None:
        return "-"
    for limit, scale, unit in ((1e3, 1.0, "us"), (1e6, 1e-3, "ms")):
        if us < limit:
            return f"{us * scale:.3g} {unit}"
    return f"{us * 1e-6:.3g} s"
