"""What a search has learned: expected times of candidates that were not measured yet.

A Gaussian process over log times. Candidates are alike when their parameters are; those of different families
have nothing to do with each other. Its constants were chosen on measured spaces (`benchmarks/replay.py`),
where halving or doubling them made little difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lmkan_gen.plan import Constant
from lmkan_gen.tuner.measure import Timing
from lmkan_gen.tuner.space import Candidate
from lmkan_gen.tuner.worker import Rejected

#: doublings of a parameter, or half as many other names, after which little is left of a likeness
_LENGTH = 6.0
#: what all candidates of a family have in common, of the variance
_FAMILY = 0.2
_NOISE = 1e-3
#: standard deviations below what is expected that a candidate is hoped to reach
_HOPE = 2.0
#: how much slower than the best is all the same
_SLOW = 8.0
_LEAST_SPREAD = 0.05
#: results that are looked at, the fastest ones: work grows with the cube of their number
_MOST_RESULTS = 500

_Vector = NDArray[np.float64]


def most_promising(
    pool: Sequence[Candidate], results: Mapping[Candidate, Timing | Rejected], under_way: Sequence[Candidate]
) -> Candidate:
    """The candidate of ``pool`` that may be the fastest.

    Args:
        pool: at least one candidate.
        results: what is known; at least one candidate ran.
        under_way: what is being measured, so that it need not be chosen to find out about the same.
    """
    times = _log_times(results)
    fastest = sorted(times, key=lambda c: times[c])[:_MOST_RESULTS]
    count, known = len(fastest), [*fastest, *under_way]
    logs = np.array([times[c] for c in fastest])
    observed = (logs - np.median(logs)) / max(float(np.std(logs)), _LEAST_SPREAD)
    covariance, cross = _likeness(known, known), _likeness(pool, known)
    covariance[np.diag_indices(len(known))] += _NOISE
    # what is under way, as if it took what is expected of it
    weights = np.linalg.solve(covariance[:count, :count], observed)
    observed = np.concatenate((observed, covariance[count:, :count] @ weights))
    solved = np.linalg.solve(covariance, np.column_stack((observed, cross.T)))
    expected = cross @ solved[:, 0]
    variance = np.maximum(0.0, 1.0 - np.sum(cross * solved[:, 1:].T, axis=1))
    return pool[int(np.argmin(expected - _HOPE * np.sqrt(variance)))]


def _log_times(results: Mapping[Candidate, Timing | Rejected]) -> dict[Candidate, float]:
    """Logarithms; a failure, which says nothing about time, counts as an ordinary candidate."""
    ran = {c: math.log(r.median) for c, r in results.items() if isinstance(r, Timing)}
    slowest = min(ran.values()) + math.log(_SLOW)
    ran = {c: min(time, slowest) for c, time in ran.items()}
    ordinary = float(np.median(list(ran.values())))
    return {c: ran.get(c, ordinary) for c in results}


def _likeness(some: Sequence[Candidate], others: Sequence[Candidate]) -> _Vector:
    """Correlations, 1 for the same candidate."""
    found = np.zeros((len(some), len(others)))
    for family in {c.family for c in some} & {c.family for c in others}:
        rows = [i for i, c in enumerate(some) if c.family == family]
        columns = [i for i, c in enumerate(others) if c.family == family]
        distance = np.zeros((len(rows), len(columns)))
        for k in range(len(some[rows[0]].settings)):  # which are in one order
            distance += _distances(
                [some[i].settings[k][1] for i in rows], [others[i].settings[k][1] for i in columns]
            )
        found[np.ix_(rows, columns)] = _FAMILY + (1 - _FAMILY) * np.exp(-distance / _LENGTH)
    return found


def _distances(some: Sequence[Constant], others: Sequence[Constant]) -> _Vector:
    """Of each value to each: in doublings, 0 being half of 1; names are two doublings from each other."""
    if isinstance(some[0], str):
        return np.where(np.array(some)[:, None] == np.array(others)[None, :], 0.0, 2.0)
    a, b = (np.log2(np.maximum(np.array(values, np.float64), 0.5)) for values in (some, others))
    return np.asarray(np.abs(a[:, None] - b[None, :]))
