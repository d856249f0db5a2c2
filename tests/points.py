"""Candidates of a family without listing its whole space, which may have a hundred thousand of them."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from lmkan_gen.families import Family
from lmkan_gen.plan import Constant
from lmkan_gen.problem import Problem

DRAWN = 2000


def feasible(family: Family, problem: Problem, random: Random) -> Iterator[dict[str, Constant]]:
    """Points of the space that can run, of as many as are drawn."""
    space = family.space(problem.operation)
    for _ in range(DRAWN):
        point = {name: random.choice(values) for name, values in space.items()}
        if not family.violations(problem, point):
            yield point
