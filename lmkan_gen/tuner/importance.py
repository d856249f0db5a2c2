"""Which parameters matter: how much of the differences in time goes with each of them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence


def importance(settings: Sequence[Mapping[str, Hashable]], times: Sequence[float]) -> dict[str, float | None]:
    """Share of the variance of log time that each parameter explains by itself, 0 to 1.

    It is epsilon squared of a one-way analysis of variance: corrected for values that explain only
    because there are many of them, so it is near 0 where a parameter means nothing. Shares need not add
    up to 1: parameters interact, and a search does not sample evenly. None where there are too few
    measurements to tell. Parameters with a single value are left out.
    """
    logs = [math.log(t) for t in times]
    names = dict.fromkeys(name for s in settings for name in s)
    found = {}
    for name in names:
        groups: dict[Hashable, list[float]] = defaultdict(list)
        for s, log in zip(settings, logs, strict=True):
            groups[s[name]].append(log)
        if len(groups) > 1:
            found[name] = _epsilon_squared(list(groups.values()))
    return dict(sorted(found.items(), key=lambda item: -1.0 if item[1] is None else item[1], reverse=True))


def _epsilon_squared(groups: Sequence[Sequence[float]]) -> float | None:
    everything = [x for group in groups for x in group]
    free = len(everything) - len(groups)
    total = _squares(everything)
    if free < 1 or total == 0.0:
        return None
    within = sum(map(_squares, groups))
    return max(0.0, 1.0 - (within / free) / (total / (len(everything) - 1)))


def _squares(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((v - mean) ** 2 for v in values)
