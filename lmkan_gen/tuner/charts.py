"""The drawings of a report, as Plotly figures that a page lays out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from lmkan_gen.plan import Constant
from lmkan_gen.problem import TableDtype
from lmkan_gen.tuner.record import ProblemRecord, Trial
from lmkan_gen.tuner.report import duration
from lmkan_gen.tuner.roofline import Peaks, compulsory_bytes, operations

_COLOURS = ("#3366aa", "#cc7722", "#228855", "#884499")
_BEST = "#d62728"
_MARGIN = {"l": 64, "r": 24, "t": 12, "b": 44}
#: ticks of a logarithmic axis by their first digits, the fewest first
_MANTISSAS = ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0))
_FEWEST_TICKS, _MOST_TICKS = 3, 8


def importance_bars(shares: dict[str, float | None]) -> Any:
    """Share of variance by parameter, where it is known."""
    from plotly import graph_objects as go

    known = [(name, share) for name, share in shares.items() if share is not None][::-1]
    bars = go.Bar(
        x=[share for _, share in known],
        y=[name for name, _ in known],
        orientation="h",
        marker={"color": _COLOURS[0]},
        hovertemplate="%{y}: %{x:.0%}<extra></extra>",
    )
    figure = _figure([bars], 60 + 28 * len(known))
    figure.update_xaxes(range=[0, 1], tickformat=".0%")
    figure.update_yaxes(type="category", automargin=True)
    return figure


def strips(p: ProblemRecord, measured: Sequence[Trial]) -> list[tuple[str, Any]]:
    """A panel for each parameter that took several values: its name, and times against its values."""
    families = list(dict.fromkeys(t.family for t in measured))
    found = []
    for family in families:
        trials = [t for t in measured if t.family == family]
        for name in dict.fromkeys(n for t in trials for n in t.parameters):
            if len({t.parameters.get(name) for t in trials}) > 1:
                colour = _COLOURS[families.index(family) % len(_COLOURS)]
                title = name if len(families) == 1 else f"{family}: {name}"
                found.append((title, _strip(p, trials, name, colour, [t.median or 0.0 for t in measured])))
    return found


def _strip(p: ProblemRecord, trials: list[Trial], name: str, colour: str, times: list[float]) -> Any:
    from plotly import graph_objects as go

    trials = sorted((t for t in trials if name in t.parameters), key=lambda t: _order(t.parameters[name]))
    winners = [t for t in trials if t.family == p.entry.family and t.parameters == p.entry.parameters]
    points = [
        go.Scatter(
            x=[str(t.parameters[name]) for t in some],
            y=[t.median for t in some],
            mode="markers",
            marker=marker,
            text=[f"{duration(t.median)}<br>{t.family}<br>{_lines(t.parameters)}" for t in some],
            hovertemplate="%{text}<extra></extra>",
        )
        for some, marker in (
            (trials, {"color": colour, "size": 7, "opacity": 0.6}),
            (winners, {"color": _BEST, "size": 13, "symbol": "star"}),
        )
    ]
    figure = _figure(points, 220)
    figure.update_xaxes(type="category")
    figure.update_yaxes(**_log_axis(times, duration))
    return figure


def search_progress(measured: Sequence[Trial]) -> Any:
    """Times of candidates in the order in which they were tried, and the best so far."""
    from plotly import graph_objects as go

    times = [t.median or 0.0 for t in measured]
    numbers = list(range(1, len(times) + 1))
    tried = go.Scatter(
        x=numbers,
        y=times,
        mode="markers",
        name="tried",
        marker={"color": _COLOURS[0], "opacity": 0.6},
        text=[f"{duration(t.median)}<br>{t.family}<br>{_lines(t.parameters)}" for t in measured],
        hovertemplate="%{text}<extra></extra>",
    )
    best = go.Scatter(
        x=numbers,
        y=list(accumulate(times, min)),
        mode="lines",
        name="best so far",
        line={"color": _BEST, "shape": "hv"},
        hovertemplate="%{y:.4g} µs<extra>best so far</extra>",
    )
    figure = _figure([tried, best], 300)
    figure.update_yaxes(**_log_axis(times, duration))
    figure.update_xaxes(title="measured candidate", tickformat="d", nticks=_MOST_TICKS)
    if len(times) <= _MOST_TICKS:
        figure.update_xaxes(dtick=1)  # no half candidates
    figure.update_layout(showlegend=True, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"})
    return figure


def roofline(problems: Sequence[ProblemRecord], peaks: Peaks) -> Any | None:
    """Winners under what memory and arithmetic of the device allow; None where no call has a known bound."""
    from plotly import graph_objects as go

    found: dict[str, list[tuple[float, float, str]]] = {}
    for p in problems:
        e = p.entry
        size = compulsory_bytes(e.operation, e.shape.layer, TableDtype(e.dtypes.table))
        count = operations(e.operation, e.shape.layer)
        if size is None or count is None:
            continue
        rate = 1e6 * count / e.time_us.median
        words = f"{e.operation} {e.shape.layer}<br>{e.family}, {duration(e.time_us.median)}<br>{_rate(rate)}"
        found.setdefault(e.operation.value, []).append((count / size, rate, words))
    if not found:
        return None
    intensities = [x for points in found.values() for x, _, _ in points]
    rates = [y for points in found.values() for _, y, _ in points]
    ridge = peaks.flops / peaks.bandwidth
    low, high = min(*intensities, ridge) / 2, max(*intensities, ridge) * 2
    roof = go.Scatter(
        x=[low, ridge, high],
        y=[low * peaks.bandwidth, peaks.flops, peaks.flops],
        mode="lines",
        name="roof",
        line={"color": "#555555"},
        hovertemplate="%{x:.3g} operations per byte<extra>roof</extra>",
    )
    points = [
        go.Scatter(
            x=[x for x, _, _ in some],
            y=[y for _, y, _ in some],
            mode="markers",
            name=operation,
            marker={"size": 10, "color": _COLOURS[i % len(_COLOURS)]},
            text=[words for _, _, words in some],
            hovertemplate="%{text}<extra></extra>",
        )
        for i, (operation, some) in enumerate(found.items())
    ]
    figure = _figure([roof, *points], 380)
    x_axis = _log_axis([low, high], lambda value: f"{value:g}")
    figure.update_xaxes(title="operations per byte", **x_axis)
    figure.update_yaxes(**_log_axis([*rates, low * peaks.bandwidth, peaks.flops], _rate))
    figure.update_layout(showlegend=True, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"})
    return figure


def _rate(per_second: float) -> str:
    for unit, scale in (("TFLOP/s", 1e12), ("GFLOP/s", 1e9), ("MFLOP/s", 1e6)):
        if per_second >= scale:
            return f"{per_second / scale:.3g} {unit}"
    return f"{per_second:.3g} FLOP/s"


def _figure(traces: list[Any], height: int) -> Any:
    from plotly import graph_objects as go

    figure = go.Figure(traces)
    figure.update_layout(
        template="plotly_white", height=height, margin=_MARGIN, font={"size": 12}, showlegend=False
    )
    return figure


def _log_axis(values: Sequence[float], label: Callable[[float], str]) -> dict[str, Any]:
    """A logarithmic axis with a few round numbers on it, each with its unit."""
    low, high = min(values), max(values)
    margin = max((high / low) ** 0.06, 1.02)
    low, high = low / margin, high * margin
    at = ticks(low, high)
    return {
        "type": "log",
        "range": [math.log10(low), math.log10(high)],
        "tickvals": at,
        "ticktext": [label(value) for value in at],
        "automargin": True,
    }


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from ``low`` to ``high`` (both positive), few enough to be read and at least three."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in _MANTISSAS:
        found = [m * 10.0**d for d in decades for m in mantissas if low <= m * 10.0**d <= high]
        if len(found) >= _FEWEST_TICKS:
            return found[:: -(-len(found) // _MOST_TICKS)]
    # less than about a factor of two: evenly
    rough = (high - low) / _FEWEST_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = max(m * power for m in (1.0, 2.0, 5.0) if m * power <= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def _lines(parameters: dict[str, Constant]) -> str:
    return "<br>".join(f"{k}={v}" for k, v in sorted(parameters.items()))


def _order(value: Constant) -> tuple[int, str]:
    return (value, "") if isinstance(value, int) else (0, value)
