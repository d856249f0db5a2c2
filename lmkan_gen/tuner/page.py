"""A tuning run as one HTML page that needs nothing else: no network, no files beside it."""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lmkan_gen.plan import Constant
from lmkan_gen.problem import TableDtype
from lmkan_gen.tuner.importance import importance
from lmkan_gen.tuner.record import ProblemRecord, RunRecord, Trial
from lmkan_gen.tuner.report import duration, ratio
from lmkan_gen.tuner.roofline import Peaks, bound_us

_COLUMNS = 3
_ROW_HEIGHT = 260
_COLOURS = ("#3366aa", "#cc7722", "#228855", "#884499")
_BEST = "#d62728"
_SCRIPT = re.compile(r"<script\b[^>]*>(.*?)</script>", re.DOTALL)


class PlotlyMissing(RuntimeError):
    """The library that draws is not installed."""


@dataclass(frozen=True)
class _Problem:
    """What the template shows of one problem."""

    record: ProblemRecord
    roofline: float | None
    rejected: list[Trial]
    reasons: list[tuple[str, int]]
    charts: list[tuple[str, str, Markup]]
    """Title, explanation, drawing."""


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
    drawings = [drawing for problem in problems for _, _, drawing in problem.charts]
    return environment.get_template("page.html.j2").render(
        run=run, problems=problems, library=library, policy=_policy([library, *drawings])
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


def _charts(p: ProblemRecord) -> list[tuple[str, str, Markup]]:
    measured = [t for t in p.trials if t.median is not None]
    of_winner = [t for t in measured if t.family == p.entry.family]
    shares = importance([t.parameters for t in of_winner], [t.median or 0.0 for t in of_winner])
    charts = []
    if any(share is not None for share in shares.values()):
        charts.append(
            (
                "Which parameters matter",
                f"Share of the variance of log time that a parameter of {p.entry.family} explains by itself, "
                f"over {len(of_winner)} measurements; epsilon squared, so chance alone is near 0. Parameters "
                "interact and the search favours what is fast, so read it as a hint.",
                _html(_importance(shares)),
            )
        )
    charts.append(
        (
            "Time against each parameter",
            "Every measured candidate, one panel a parameter; point at one to read it. The red star is the "
            "winner. Times are those of the search, before the finalists were measured again.",
            _html(_strips(p, measured)),
        )
    )
    charts.append(
        (
            "The search",
            "Candidates in the order in which they were tried, and the best so far.",
            _html(_progress(measured)),
        )
    )
    return charts


def _html(figure: Any) -> Markup:
    figure.update_layout(
        template="plotly_white", margin={"l": 70, "r": 20, "t": 30, "b": 40}, font={"size": 12}
    )
    config = {"displayModeBar": False, "responsive": True}
    return Markup(figure.to_html(full_html=False, include_plotlyjs=False, config=config))


def _importance(shares: dict[str, float | None]) -> Any:
    from plotly import graph_objects as go

    known = [(name, share) for name, share in shares.items() if share is not None][::-1]
    bars = go.Bar(
        x=[share for _, share in known],
        y=[name for name, _ in known],
        orientation="h",
        marker={"color": _COLOURS[0]},
        hovertemplate="%{y}: %{x:.0%}<extra></extra>",
    )
    figure = go.Figure(bars)
    figure.update_xaxes(range=[0, 1], tickformat=".0%")
    figure.update_yaxes(type="category")
    figure.update_layout(height=90 + 28 * len(known), showlegend=False)
    return figure


def _strips(p: ProblemRecord, measured: list[Trial]) -> Any:
    from plotly import graph_objects as go
    from plotly.subplots import make_subplots

    panels = [
        (family, name)
        for family in dict.fromkeys(t.family for t in measured)
        for name in dict.fromkeys(n for t in measured if t.family == family for n in t.parameters)
    ]
    families = list(dict.fromkeys(family for family, _ in panels))
    titles = [name if len(families) == 1 else f"{family}: {name}" for family, name in panels]
    rows = -(-len(panels) // _COLUMNS)
    figure = make_subplots(
        rows, _COLUMNS, subplot_titles=titles, vertical_spacing=0.35 / rows, horizontal_spacing=0.06
    )
    for i, (family, name) in enumerate(panels):
        place = {"row": i // _COLUMNS + 1, "col": i % _COLUMNS + 1}
        trials = sorted((t for t in measured if t.family == family), key=lambda t: _order(t.parameters[name]))
        winners = [t for t in trials if t.family == p.entry.family and t.parameters == p.entry.parameters]
        colour = _COLOURS[families.index(family) % len(_COLOURS)]
        for some, marker in (
            (trials, {"color": colour, "size": 7, "opacity": 0.6}),
            (winners, {"color": _BEST, "size": 13, "symbol": "star"}),
        ):
            points = go.Scatter(
                x=[str(t.parameters[name]) for t in some],
                y=[t.median for t in some],
                mode="markers",
                marker=marker,
                text=[f"{duration(t.median)}<br>{t.family}<br>{_lines(t.parameters)}" for t in some],
                hovertemplate="%{text}<extra></extra>",
            )
            figure.add_trace(points, **place)
        figure.update_xaxes(type="category", **place)
        figure.update_yaxes(type="log", title="µs" if place["col"] == 1 else None, **place)
    figure.update_layout(height=_ROW_HEIGHT * rows, showlegend=False)
    return figure


def _lines(parameters: dict[str, Constant]) -> str:
    return "<br>".join(f"{k}={v}" for k, v in sorted(parameters.items()))


def _order(value: Constant) -> tuple[int, str]:
    return (value, "") if isinstance(value, int) else (0, value)


def _progress(measured: list[Trial]) -> Any:
    from plotly import graph_objects as go

    times = [t.median or 0.0 for t in measured]
    numbers = list(range(1, len(times) + 1))
    tried = go.Scatter(
        x=numbers,
        y=times,
        mode="markers",
        name="tried",
        marker={"color": _COLOURS[0], "opacity": 0.6},
        text=[f"{t.family}<br>{_lines(t.parameters)}" for t in measured],
        hovertemplate="%{y:.4g} µs<br>%{text}<extra></extra>",
    )
    best = go.Scatter(
        x=numbers,
        y=list(accumulate(times, min)),
        mode="lines",
        name="best so far",
        line={"color": _BEST, "shape": "hv"},
        hovertemplate="%{y:.4g} µs<extra>best so far</extra>",
    )
    figure = go.Figure([tried, best])
    figure.update_yaxes(type="log", title="µs")
    figure.update_xaxes(title="measured candidate")
    figure.update_layout(height=300)
    return figure
