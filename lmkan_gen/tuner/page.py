"""A tuning run as one HTML page that needs nothing else: no network, no files beside it."""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lmkan_gen.plan import Constant
from lmkan_gen.problem import TableDtype
from lmkan_gen.tuner import charts
from lmkan_gen.tuner.importance import importance
from lmkan_gen.tuner.record import ProblemRecord, RunRecord, Trial
from lmkan_gen.tuner.report import duration, ratio
from lmkan_gen.tuner.roofline import Peaks, bound_us

_SCRIPT = re.compile(r"<script\b[^>]*>(.*?)</script>", re.DOTALL)


class PlotlyMissing(RuntimeError):
    """The library that draws is not installed."""


@dataclass(frozen=True)
class _Chart:
    """A title, an explanation, and panels beside each other, each with its own title."""

    title: str
    note: str
    panels: list[tuple[str, Markup]]


@dataclass(frozen=True)
class _Problem:
    """What the template shows of one problem."""

    record: ProblemRecord
    roofline: float | None
    rejected: list[Trial]
    reasons: list[tuple[str, int]]
    charts: list[_Chart]


def render(run: RunRecord) -> str:
    """The page.

    Raises:
        PlotlyMissing: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise PlotlyMissing(
            'the report needs plotly; install it with: pip install "lmkan-gen[report]" (a record can '
            "be copied to another machine and reported there)"
        ) from error
    environment = Environment(
        loader=PackageLoader("lmkan_gen.tuner", "."), undefined=StrictUndefined, autoescape=True
    )
    environment.filters["duration"] = duration
    environment.filters["ratio"] = ratio
    environment.filters["settings"] = _settings
    library = Markup(f"<script>{get_plotlyjs()}</script>")
    problems = [_problem(p, run.peaks) for p in run.problems]
    drawings = [drawing for p in problems for chart in p.charts for _, drawing in chart.panels]
    figure = None if run.peaks is None else charts.roofline(run.problems, run.peaks)
    roofline = Markup() if figure is None else _html(figure)
    return environment.get_template("page.html.j2").render(
        run=run,
        problems=problems,
        roofline=roofline,
        library=library,
        policy=_policy([library, roofline, *drawings]),
    )


def _policy(trusted: Iterable[Markup]) -> str:
    """What a browser may do on the page: run the scripts in ``trusted``, and fetch nothing.

    A script that came with a name or a message, past the escaping, would not be run.
    """
    scripts = (script for part in trusted for script in _SCRIPT.findall(part))
    hashes = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in dict.fromkeys(hashes))
    # Plotly writes styles, and draws images of its own
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"


def _settings(parameters: dict[str, Constant]) -> str:
    return ", ".join(f"{k}={v}" for k, v in sorted(parameters.items()))


def _problem(p: ProblemRecord, peaks: Peaks | None) -> _Problem:
    e = p.entry
    table = TableDtype(e.dtypes.table)
    bound = None if peaks is None else bound_us(e.operation, e.shape.layer, peaks, table)
    rejected = sorted((t for t in p.trials if t.rejected is not None), key=lambda t: t.rejected or "")
    reasons = Counter(t.rejected for t in rejected if t.rejected)
    return _Problem(
        record=p,
        roofline=None if bound is None else bound / e.time_us.median,
        rejected=rejected,
        reasons=reasons.most_common(),
        charts=_charts(p),
    )


def _charts(p: ProblemRecord) -> list[_Chart]:
    measured = [t for t in p.trials if t.median is not None]
    of_winner = [t for t in measured if t.family == p.entry.family]
    shares = importance([t.parameters for t in of_winner], [t.median or 0.0 for t in of_winner])
    found = []
    if any(share is not None for share in shares.values()):
        found.append(
            _Chart(
                "Which parameters matter",
                f"Share of the variance of log time that a parameter of {p.entry.family} explains by itself, "
                f"over {len(of_winner)} measurements; epsilon squared, so chance alone is near 0. Parameters "
                "interact and the search favours what is fast, so read it as a hint.",
                [("", _html(charts.importance_bars(shares)))],
            )
        )
    if panels := charts.strips(p, measured):
        found.append(
            _Chart(
                "Time against each parameter",
                "Every measured candidate, one panel for each parameter that took several values; point at a "
                "candidate to read it. The red star is the winner. Times are those of the search, before the "
                "finalists were measured again.",
                [(title, _html(figure)) for title, figure in panels],
            )
        )
    if measured:
        found.append(
            _Chart(
                "The search",
                "Candidates in the order in which they were tried, and the best so far.",
                [("", _html(charts.search_progress(measured)))],
            )
        )
    return found


def _html(figure: Any) -> Markup:
    config = {"displayModeBar": False, "responsive": True}
    return Markup(figure.to_html(full_html=False, include_plotlyjs=False, config=config))
