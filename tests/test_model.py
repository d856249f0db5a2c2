"""What a search expects of candidates that it has not measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

import numpy as np
import pytest
from numpy.typing import NDArray

from lmkan_gen.tuner import model
from lmkan_gen.tuner.measure import Timing
from lmkan_gen.tuner.model import most_promising
from lmkan_gen.tuner.space import Candidate
from lmkan_gen.tuner.worker import Rejected


def made(family: str = "a", **parameters: int | str) -> Candidate:
    return Candidate.make(family, parameters)


def test_parameters_that_made_candidates_fast_are_tried_on() -> None:
    """Times that are products of factors of each parameter: the best is among the first fifth."""

    def us(c: Candidate) -> float:
        p = c.parameters
        size, ahead = abs(math.log2(int(p["size"])) - 4), abs(math.log2(int(p["ahead"])) - 1)
        return 100.0 * 1.4**size * 1.3**ahead * (2.0 if p["way"] == "slow" else 1.0)  # type: ignore[no-any-return]

    points = [
        made(size=2**i, ahead=2**j, way=way) for i in range(8) for j in range(4) for way in ("fast", "slow")
    ]
    best = min(points, key=us)
    found_after = []
    for seed in range(5):
        pool = list(points)
        Random(seed).shuffle(pool)
        first = next(p for p in pool if us(p) > 3 * us(best))
        results: dict[Candidate, Timing | Rejected] = {first: Timing((us(first),))}
        while best not in results:
            chosen = most_promising([p for p in pool if p not in results], results, [])
            results[chosen] = Timing((us(chosen),))
        found_after.append(len(results))
    assert max(found_after) < len(points) / 5


def test_a_failure_says_nothing_about_time() -> None:
    results: dict[Candidate, Timing | Rejected] = {
        made("a", n=1): Timing((10.0,)),
        made("a", n=2): Timing((10.0,)),
        made("b", n=1): Rejected("spills", "registers spill"),
        made("c", n=1): Timing((1000.0,)),
    }
    pool = [made("a", n=4), made("b", n=64), made("c", n=64)]
    assert most_promising(pool, results, []) == made("b", n=64)


def test_what_is_under_way_is_not_asked_about_twice() -> None:
    results: dict[Candidate, Timing | Rejected] = {made(n=32): Timing((10.0,)), made(n=2): Timing((30.0,))}
    pool = [made(n=64), made(n=16)]
    first = most_promising(pool, results, [])
    (second,) = (c for c in pool if c != first)
    assert most_promising([first, second], results, [first]) == second


def test_families_without_parameters() -> None:
    results: dict[Candidate, Timing | Rejected] = {
        made("a"): Timing((10.0,)),
        made("b", n=1): Timing((20.0,)),
    }
    assert most_promising([made("c"), made("b", n=2)], results, [made("d")]) in (made("c"), made("b", n=2))


def test_long_searches_look_at_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_MOST_RESULTS", 3)
    likenesses: list[int] = []
    likeness = model._likeness

    def counting(some: Sequence[Candidate], others: Sequence[Candidate]) -> NDArray[np.float64]:
        likenesses.append(len(some) * len(others))
        return likeness(some, others)

    monkeypatch.setattr(model, "_likeness", counting)
    results: dict[Candidate, Timing | Rejected] = {
        made(n=2**i): Timing((10.0 + abs(i - 6),)) for i in range(12)
    }
    pool = [made(n=3), made(n=50), made(n=3000)]
    assert most_promising(pool, results, []) == made(n=50)
    assert sum(likenesses) == 3 * 3 + 3 * 3
