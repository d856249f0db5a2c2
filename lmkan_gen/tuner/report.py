"""A tuning run on the terminal: a progress line while it goes on, a table when it is done."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from lmkan_gen.problem import Problem
from lmkan_gen.text import printable
from lmkan_gen.tuner.progress import Observer, Progress
from lmkan_gen.tuner.space import Candidate
from lmkan_gen.tuner.worker import FAILURES, Rejected
from lmkan_gen.tuning_file import Entry


class ConsoleObserver(Observer):
    """Shows a run's progress; use it as a context manager."""

    def __init__(self, console: Console) -> None:
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[best]}"),
            console=console,
        )
        self._console = console
        self._task = self._bar.add_task("starting", total=None, best="")
        self._problem: Problem | None = None

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
        what = f"{progress.index + 1}/{progress.count} {p.operation} {p.shape}"
        if p != self._problem:
            self._problem = p
            self._bar.reset(self._task)
            if not self._console.is_terminal:  # a log shows no bar, but should not be silent
                self._console.print(what, highlight=False)
        best = f"best {duration(progress.best_us)}" if progress.best_us is not None else ""
        self._bar.update(
            self._task,
            description=f"{what}: {progress.phase}",
            completed=progress.done,
            total=progress.total,
            best=best,
        )

    def rejected(self, problem: Problem, candidate: Candidate, rejected: Rejected) -> None:
        """See base class."""
        first, *_ = str(rejected).splitlines() or [""]
        text = escape(printable(f"{problem.operation} {candidate}: {first}"))
        self._console.print(f"[yellow]{rejected.reason}[/] {text}", highlight=False)

    def skipped(self, problem: Problem, why: str) -> None:
        """See base class."""
        text = escape(f"{problem.operation} {problem.shape}: {why}")
        self._console.print(f"[yellow]skipped[/] {text}", highlight=False)

    def noted(self, text: str) -> None:
        """See base class."""
        self._console.print(f"[yellow]note[/] {escape(text)}", highlight=False, soft_wrap=True)


def summary(entries: Iterable[Entry], title: str) -> Table:
    """One row per entry: what won, and by how much."""
    table = Table(title=Text(title), show_lines=True)
    table.add_column("layer call", no_wrap=True)
    table.add_column("kernel", overflow="fold")
    for heading in ("time\n±IQR", "default", "torch\nspeedup", "tried\nfailed"):
        table.add_column(heading, justify="right", no_wrap=True)
    for e in entries:
        settings = " ".join(f"{k}={v}" for k, v in sorted(e.parameters.items()))
        t = e.time_us
        speedup = "" if t.reference is None or e.doubts else f"\n{ratio(t.reference / t.median)}"
        unsteady = "\nunsteady" if e.doubts else ""
        failed = sum(n for reason, n in e.search.rejected.items() if reason in FAILURES)
        table.add_row(
            f"{e.operation}\n{e.shape.layer}",
            Text(f"{e.family}\n{settings}"),
            f"{duration(t.median)}\n±{duration(t.iqr)}{unsteady}",
            duration(t.default),
            f"{duration(t.reference)}{speedup}",
            f"{e.search.tried}\n{failed}",
        )
    return table


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
