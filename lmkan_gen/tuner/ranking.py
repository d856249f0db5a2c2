"""The best few measured again, in turns: which is the fastest, and was the device quiet enough to tell?"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

from lmkan_gen.tuner.measure import WAITED, Timing
from lmkan_gen.tuner.space import Candidate
from lmkan_gen.tuning_records import STEADY, Doubt

_ROUNDS = 3
#: by how much, as parts, medians and clocks of one candidate may differ from round to round on a quiet one:
#: its power limit alone moved the clock of an H200 by more than 5 %
_REPEATS, _CLOCKS = 0.1, 0.12
#: the same for the median that the search found: of many, the best is too good by its noise
_SEARCH = 0.25
#: how often to measure in all, and how long to wait in between for others to finish
_ATTEMPTS = 2
PAUSE_S = 1.0

#: each candidate's timings, round by round
Rounds = dict[Candidate, list[Timing]]


@dataclass(frozen=True)
class Ranking:
    """What candidates took, and what speaks against it: nothing where the device was quiet."""

    times: dict[Candidate, Timing]
    doubts: tuple[Doubt, ...] = ()


def rank(
    finalists: Sequence[Candidate],
    default: Candidate | None,
    searched: Mapping[Candidate, Timing],
    measure: Callable[[Candidate], Timing | None],
    is_late: Callable[[], bool],
) -> Ranking:
    """Measure candidates in turns, and again where the device turns out to be busy.

    Args:
        finalists: which.
        default: is kept where nothing is faster by more than the noise; see `winner`.
        searched: what they took in the search.
        measure: times a candidate; None when it fails, which rules it out.
        is_late: whether there is no time to measure again.
    """
    tries: list[Rounds] = []
    while True:
        left = [c for c in finalists if not tries or c in tries[-1]]
        tries.append(_in_turns(left, measure))
        times = {c: reduce(add, timings) for c, timings in tries[-1].items()}
        if not times:
            return Ranking({})
        judged = {winner(times, default), *([default] if default in times else [])}
        doubts = _doubts(judged, tries[-1], times, searched)
        if not doubts:
            return Ranking(times)
        if len(tries) == _ATTEMPTS or is_late():
            break
        time.sleep(PAUSE_S)
    # what others do only adds time, so that the least says most
    best = {
        c: min((*(t for rounds in tries for t in rounds[c]), *_known(c, searched)), key=lambda t: t.median)
        for c in times
    }
    return Ranking(best, doubts)


def winner(times: Mapping[Candidate, Timing], default: Candidate | None) -> Candidate:
    """The fastest candidate, or the default when it is no slower than the noise of either."""
    best = min(times, key=lambda c: times[c].median)
    if default is None or default not in times:
        return best
    noise = max(times[best].iqr, times[default].iqr)
    return default if times[default].median - times[best].median <= noise else best


def _in_turns(candidates: Sequence[Candidate], measure: Callable[[Candidate], Timing | None]) -> Rounds:
    found: Rounds = {c: [] for c in candidates}
    for _ in range(_ROUNDS if len(candidates) > 1 else 1):
        for candidate in list(found):
            timing = measure(candidate)
            if timing is None:
                del found[candidate]
            else:
                found[candidate].append(timing)
    return found


def _doubts(
    judged: Iterable[Candidate],
    rounds: Rounds,
    times: Mapping[Candidate, Timing],
    searched: Mapping[Candidate, Timing],
) -> tuple[Doubt, ...]:
    found: dict[Doubt, None] = {}
    for c in judged:
        clocks = [t.clock for t in rounds[c] if t.clock is not None]
        checks: dict[Doubt, bool] = {
            "spread": any(t.spread > STEADY for t in rounds[c]),
            "repeats": _differ((t.median for t in rounds[c]), _REPEATS),
            "clocks": _differ(clocks, _CLOCKS),
            "load": any((t.waited or 0.0) > WAITED for t in rounds[c]),
            "search": _differ((times[c].median, *(t.median for t in _known(c, searched))), _SEARCH),
        }
        found.update(dict.fromkeys(doubt for doubt, is_so in checks.items() if is_so))
    return tuple(sorted(found))


def _known(candidate: Candidate, searched: Mapping[Candidate, Timing]) -> list[Timing]:
    """What the search found, where it timed the candidate carefully."""
    timing = searched.get(candidate)
    return [timing] if timing is not None and timing.is_careful and timing.is_quiet else []


def _differ(values: Iterable[float], most: float) -> bool:
    some = list(values)
    return bool(some) and max(some) > (1 + most) * min(some)
