"""`lmkan-gen inspect --what choice`: the choice, and with `--why` what else there was."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from lmkan_gen.plan import Constant
    from lmkan_gen.selection import Choice
    from lmkan_gen.tuner.record import ProblemRecord

#: candidates of a tuning run that are shown
_SHOWN = 5


def choice_as_data(choice: Choice, *, why: bool) -> dict[str, Any]:
    """A choice for JSON.

    Args:
        choice: what a call gets.
        why: add runners-up, families that cannot run, and what was measured on this machine.
    """
    p = choice.problem
    data: dict[str, Any] = {
        "operation": p.operation.value,
        "shape": str(p.shape),
        "table": p.table.value,
        "device": p.device.name,
        "family": choice.family,
        "parameters": dict(choice.parameters),
        "tier": choice.tier.value,
        "source": choice.source,
        "time_us": choice.time_us,
        "tuned_for": None if choice.tuned_for is None else str(choice.tuned_for),
        "stale": choice.stale,
    }
    if why:
        data["why"] = _reasons(choice)
    return data


def choice_in_words(choice: Choice) -> str:
    """A choice with its reasons, several lines."""
    reasons = _reasons(choice)
    lines = [choice.describe(), "  runners-up, one a kernel family:"]
    for r in reasons["runners_up"]:
        lines.append(f"    {_kernel(r)}: {_time(r)}")
    if not reasons["runners_up"]:
        lines.append("    none: no other family can run this")
    if (run := reasons["measured_here"]) is not None:
        lines.append(f"  measured on this machine, {run['date']}, {run['record']}:")
        lines += [f"    {t['time_us']:.1f} us {_kernel(t)}" for t in run["fastest"]]
        lines += [f"    {f['count']} failed: {f['reason']}, such as {f['example']}" for f in run["failed"]]
        if run["pruned"]:
            counts = ", ".join(f"{limit} {count}" for limit, count in run["pruned"].items())
            lines.append(f"    never tried, for the limit that they break: {counts}")
    if reasons["could_not_run"]:
        lines.append("  could not run:")
        lines += [f"    {e['family']}: {e['reason']}" for e in reasons["could_not_run"]]
    return "\n".join(lines)


def _kernel(data: dict[str, Any]) -> str:
    return f"{data['family']}({', '.join(f'{k}={v}' for k, v in sorted(data['parameters'].items()))})"


def _time(runner_up: dict[str, Any]) -> str:
    if runner_up["time_us"] is None:
        return f"not measured, {runner_up['origin']}"
    if runner_up["measured"]:
        return f"{runner_up['time_us']:.1f} us, {runner_up['origin']}"
    return f"{runner_up['time_us']:.3g} us if time grew with the work from {runner_up['origin']}"


def _reasons(choice: Choice) -> dict[str, Any]:
    from lmkan_gen.alternatives import excluded, runners_up

    return {
        "runners_up": [
            {
                "family": r.family,
                "parameters": dict(r.parameters),
                "time_us": r.time_us,
                "measured": r.measured,
                "origin": r.origin,
            }
            for r in runners_up(choice)
        ],
        "could_not_run": [{"family": e.family, "reason": e.reason} for e in excluded(choice)],
        "measured_here": _measured_here(choice),
    }


def _measured_here(choice: Choice) -> dict[str, Any] | None:
    """What the last tuning run on this machine measured for the problem; None when there was none."""
    from lmkan_gen.text import printable

    found = _record_of(choice)
    if found is None:
        return None
    path, date, of = found
    times: dict[tuple[str, tuple[tuple[str, Constant], ...]], float] = {}
    for t in (*of.trials, *of.ranking):  # finalists were measured again, more carefully
        if t.median is not None:
            times[t.family, tuple(sorted(t.parameters.items()))] = t.median
    fastest = sorted(times.items(), key=lambda item: item[1])[:_SHOWN]
    failed = [t for t in of.trials if t.rejected is not None]
    examples = {t.rejected: printable((t.message or "").split("\n")[0]) for t in reversed(failed)}
    return {
        "record": str(path),
        "date": date,
        "fastest": [{"family": f, "parameters": dict(p), "time_us": us} for (f, p), us in fastest],
        "failed": [
            {"reason": reason, "count": count, "example": examples[reason]}
            for reason, count in Counter(t.rejected for t in failed).most_common()
        ],
        "pruned": of.pruned,
    }


def _record_of(choice: Choice) -> tuple[Path, str, ProblemRecord] | None:
    from lmkan_gen.tuner import record

    p = choice.problem
    for path in sorted(record.directory().glob("*.json"), reverse=True):
        try:
            run = record.load(path)
        except (ValueError, OSError):  # of another version, or gone meanwhile
            continue
        if (run.device.name, run.device.arch) != (p.device.name, p.device.arch):
            continue
        for of in run.problems:
            e = of.entry
            if (e.operation, e.shape.layer, e.dtypes.table) == (p.operation, p.shape, p.table):
                return path, f"{run.started:%Y-%m-%d}", of
    return None
