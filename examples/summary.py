"""Who wins: tables, sentences and pictures made of the results of a comparison."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from examples.comparison import Result

Cost = Callable[["Result"], float]

#: relative; rounding changes errors by some 1e-4 of them, other widths by more than 1e-2
SAME_ERROR = 1e-2


@dataclass(frozen=True)
class Verdict:
    """lmKAN against one MLP.

    Attributes:
        mlp: the MLP's result.
        error: lmKAN's at the MLP's time; None where lmKANs were all slower.
        time_ratio: the MLP's time over lmKAN's at the MLP's error; None where lmKANs did not reach it.
        flops_ratio: the same of FLOPs.
        at_least: the ratios are bounds: the cheapest lmKAN of all is already as accurate.
    """

    mlp: Result
    error: float | None
    time_ratio: float | None
    flops_ratio: float | None
    at_least: bool


def frontier(rows: Sequence[Result], cost: Cost) -> list[Result]:
    """Those that nothing cheaper beats, cheapest first."""
    kept: list[Result] = []
    for row in sorted(rows, key=cost):
        if not kept or row.error < kept[-1].error:
            kept.append(row)
    return kept


def error_at(rows: Sequence[Result], cost: Cost, budget: float) -> float | None:
    """Error of the frontier at a cost, interpolated in logarithms; None below the cheapest.

    Beyond the most expensive it is that one's.
    """
    line = frontier(rows, cost)
    if not line or budget < cost(line[0]):
        return None
    if budget >= cost(line[-1]):
        return line[-1].error
    i = bisect_left([cost(row) for row in line], budget)
    if cost(line[i]) == budget:
        return line[i].error
    return _between(budget, (cost(line[i - 1]), cost(line[i])), (line[i - 1].error, line[i].error))


def cost_of(rows: Sequence[Result], cost: Cost, error: float) -> float | None:
    """What the frontier costs at an error, interpolated in logarithms; None below the smallest error.

    Above the largest error it is the cheapest one's.
    """
    line = frontier(rows, cost)
    if not line or error < line[-1].error:
        return None
    if error >= line[0].error:
        return cost(line[0])
    i = next(i for i, row in enumerate(line) if row.error <= error)
    return _between(error, (line[i - 1].error, line[i].error), (cost(line[i - 1]), cost(line[i])))


def _between(x: float, xs: tuple[float, float], ys: tuple[float, float]) -> float:
    """``y`` at ``x`` on the line through two points, in logarithms of both; all are positive."""
    fraction = math.log(x / xs[0]) / math.log(xs[1] / xs[0])
    return float(ys[0] * (ys[1] / ys[0]) ** fraction)


def best_arithmetics(rows: Sequence[Result]) -> list[Result]:
    """Of each model the fastest row whose error is within `SAME_ERROR` of its smallest, fastest first."""
    models = dict.fromkeys((row.model, row.width) for row in rows)
    of_models = [[row for row in rows if (row.model, row.width) == model] for model in models]
    smallest = [min(row.error for row in own) for own in of_models]
    kept = [
        min((row for row in own if row.error <= (1 + SAME_ERROR) * error), key=_time)
        for own, error in zip(of_models, smallest, strict=True)
    ]
    return sorted(kept, key=_time)


def verdicts(rows: Sequence[Result], arithmetic: str | None) -> list[Verdict]:
    """lmKAN against each MLP, fastest first.

    Args:
        rows: of all models.
        arithmetic: of both; None: any, and each MLP in the one of `best_arithmetics`.
    """
    rows = [row for row in rows if arithmetic in (None, row.arithmetic)]
    lmkans = [row for row in rows if row.model == "lmKAN"]
    found = []
    mlps = sorted((row for row in rows if row.model == "MLP"), key=_time)
    for row in mlps if arithmetic else best_arithmetics(mlps):
        time, flops = cost_of(lmkans, _time, row.error), cost_of(lmkans, _flops, row.error)
        found.append(
            Verdict(
                row,
                error_at(lmkans, _time, row.microseconds),
                None if time is None else row.microseconds / time,
                None if flops is None else row.flops / flops,
                row.error >= max((r.error for r in frontier(lmkans, _time)), default=math.inf),
            )
        )
    return found


def sentences(rows: Sequence[Result], arithmetic: str | None) -> list[str]:
    """What `verdicts` come to, in words."""
    found = verdicts(rows, arithmetic)
    kind = "every model in its best arithmetic" if arithmetic is None else arithmetic
    lines = []
    for word, chosen in (
        ("lmKAN is faster at equal error than", [v for v in found if (v.time_ratio or 0) > 1]),
        ("lmKAN is slower at equal error than", [v for v in found if _slower(v) and not v.at_least]),
        (
            "the fastest lmKAN here is slower, but more accurate, than",
            [v for v in found if _slower(v) and v.at_least],
        ),
        ("no lmKAN here is as accurate as", [v for v in found if v.time_ratio is None]),
    ):
        if chosen:
            names = ", ".join(f"{_name(v, arithmetic)}{_ratio(v)}" for v in chosen)
            lines.append(f"{kind}: {word} {names}")
    return lines


def _name(verdict: Verdict, arithmetic: str | None) -> str:
    return f"MLP {verdict.mlp.width}" + ("" if arithmetic else f" ({verdict.mlp.arithmetic})")


def _slower(verdict: Verdict) -> bool:
    return verdict.time_ratio is not None and verdict.time_ratio <= 1


def _ratio(verdict: Verdict) -> str:
    if verdict.time_ratio is None or (verdict.at_least and _slower(verdict)):
        return ""
    return f" ({'at least ' if verdict.at_least else ''}{verdict.time_ratio:.2f}x)"


def print_summary(rows: Sequence[Result], path: Path, error_name: str, console: Console) -> None:
    """Tables and sentences, on the console and in a text file."""
    with path.open("w") as stream:
        for target in (console, Console(file=stream, width=120)):
            for arithmetic in ("float32", None):
                target.print(_table(rows, arithmetic, error_name))
            for arithmetic in ("float32", None):
                for line in sentences(rows, arithmetic):
                    target.print(line)


def _table(rows: Sequence[Result], arithmetic: str | None, error_name: str) -> Table:
    table = Table(title=f"lmKAN against MLPs, {arithmetic or 'each in its best arithmetic'}")
    for heading in (
        "MLP",
        error_name,
        "µs",
        "lmKAN's error at that time",
        "MLP's time / lmKAN's at that error",
        "the same of FLOPs",
    ):
        table.add_column(heading)
    for v in verdicts(rows, arithmetic):
        bound = "≥ " if v.at_least else ""
        table.add_row(
            f"{v.mlp.width}" + ("" if arithmetic else f" {v.mlp.arithmetic}"),
            f"{v.mlp.error:.4f}",
            f"{v.mlp.microseconds:.0f}",
            "none so fast" if v.error is None else f"{v.error:.4f}",
            "not reached" if v.time_ratio is None else f"{bound}{v.time_ratio:.2f}",
            "not reached" if v.flops_ratio is None else f"{bound}{v.flops_ratio:.2f}",
        )
    return table


def _time(row: Result) -> float:
    return row.microseconds


def _flops(row: Result) -> float:
    return row.flops


_COLOURS = {"lmKAN": "tab:red", "MLP": "tab:blue"}
_STYLES = {
    "float32": "-",
    "TF32": "--",
    "float16": "-.",
    "bfloat16": ":",
    "float16 tables": "--",
    "int8 tables": ":",
}


def draw_pareto(rows: Sequence[Result], path: Path, error_name: str, title: str) -> None:
    """Error against FLOPs and against measured time, a line per model and arithmetic."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_flops, by_time = figure.subplots(1, 2, sharey=True)
    for model, arithmetic in dict.fromkeys((row.model, row.arithmetic) for row in rows):
        line = sorted(
            (r for r in rows if (r.model, r.arithmetic) == (model, arithmetic)), key=lambda r: r.width
        )
        full = arithmetic == "float32"
        drawn = {
            "color": _COLOURS.get(model),
            "linestyle": _STYLES.get(arithmetic),
            "marker": "o",
            "markersize": 5 if full else 3,
            "alpha": 1 if full else 0.6,
        }
        label = f"{model}, {arithmetic}"
        by_time.plot([r.microseconds for r in line], [r.error for r in line], label=label, **drawn)
        if full:
            by_flops.plot([r.flops for r in line], [r.error for r in line], label=model, **drawn)
            _number(by_flops, line, _flops)
            _number(by_time, line, _time)
    for ax, xlabel in ((by_flops, "FLOPs per sample"), (by_time, f"µs per batch of {rows[0].batch}")):
        ax.set(xscale="log", xlabel=xlabel)
        ax.margins(x=0.09, y=0.08)
        ax.grid(alpha=0.3, which="both")
        ax.legend(fontsize=8, handlelength=3)
    errors = [r.error for r in rows]
    if 0 < min(errors) < max(errors) / 5:
        by_flops.set_yscale("log")
        by_flops.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        by_flops.yaxis.set_major_formatter("{x:g}")
        by_flops.yaxis.set_minor_formatter("")
    by_flops.set_ylabel(error_name)
    figure.suptitle(f"{title} ({rows[0].device}; numbers are hidden widths)", fontsize=11)
    figure.savefig(path, dpi=150)


def _number(ax: Axes, line: Sequence[Result], cost: Cost) -> None:
    """Write widths beside points."""
    for row in line:
        ax.annotate(
            str(row.width),
            (cost(row), row.error),
            textcoords="offset points",
            xytext=(4, 4),
            color=_COLOURS.get(row.model),
            fontsize=8,
            path_effects=[withStroke(linewidth=2, foreground="white")],
        )
