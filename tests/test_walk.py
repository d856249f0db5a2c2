"""Walks through spaces find what looking at every point finds, with far fewer looks."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import product
from random import Random

import pytest
from optuna.storages import InMemoryStorage

from lmkan_gen.device import Device, target
from lmkan_gen.families import Family, families, family, walk
from lmkan_gen.limits import UNLIMITED, limits
from lmkan_gen.plan import Constant
from lmkan_gen.problem import MIN_GRIDS, LayerShape, Operation, Problem, TableDtype
from lmkan_gen.tuner.space import Space, explore
from lmkan_gen.tuner.study import Study

DEVICES = ["cpu", "sm_75", "sm_86", "sm_90"]
SHAPES = [LayerShape(24, 40, 10, 3000), LayerShape(65, 10, 28, 64), LayerShape(512, 512, 4, 100)]
#: of the values of a space
PART = 300


def part(space: walk.Space, random: Random) -> dict[str, tuple[Constant, ...]]:
    """Fewer values of some parameters, so that every point can be looked at."""
    some = dict(space)
    while math.prod(map(len, some.values())) > PART:
        name = max(some, key=lambda n: len(some[n]))
        left_out = random.choice(some[name])
        some[name] = tuple(v for v in some[name] if v != left_out)
    return some


def truth(f: Family, problem: Problem, space: walk.Space) -> list[dict[str, Constant]]:
    points = [dict(zip(space, values, strict=True)) for values in product(*space.values())]
    return [p for p in points if not f.violations(problem, p) and not f.wasted(problem, p)]


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("table", [TableDtype.FLOAT32, TableDtype.FLOAT16, TableDtype.INT8])
def test_walks_find_every_candidate_and_nothing_else(name: str, table: TableDtype) -> None:
    chip, random, found_any = target(name), Random(0), 0
    for operation, shape in product(Operation, SHAPES):
        for f in families(chip.kind, operation, table):
            problem = Problem.usual(operation, shape, chip, table)
            problem = replace(problem, deterministic=random.random() < 0.3)
            space = part(f.space(operation), random)
            judge = partial(f.rejection, problem)
            expected = truth(f, problem, space)
            branches = list(walk.branches(space, judge))
            found = [p for b in branches if b.limit is None for p in b.points()]
            what = f"{f.name} {problem}"
            assert sorted(map(str, found)) == sorted(map(str, expected)), what
            assert sum(b.size for b in branches) == math.prod(map(len, space.values())), what
            for b in branches:  # a limit is one that all its points break
                point = next(b.points())
                broken = {v.limit for v in f.violations(problem, point)} or {"wasted"}
                assert b.limit is None or b.limit in broken, what
            drawn = walk.draw(space, judge, random)
            assert (drawn in expected) if expected else (drawn is None), what
            found_any += len(expected)
    assert found_any or (name, table) == ("sm_75", TableDtype.INT8)


def test_draws_are_even_and_find_a_needle() -> None:
    space: walk.Space = {"a": (0, 1, 2, 3), "b": tuple(range(50)), "c": ("x", "y")}
    even = Counter(
        walk.draw(space, lambda p: "odd" if int(p["a"]) % 2 else None, Random(i))["a"]  # type: ignore[index]
        for i in range(400)
    )
    assert set(even) == {0, 2}
    assert min(even.values()) > 150
    wide = {name: tuple(range(1000)) for name in "abcd"}
    needle = dict.fromkeys("abcd", 7)

    def judge(p: walk.Parameters) -> str | None:
        return None if all(p[name] == 7 for name in "abcd") else "missed"

    assert walk.draw(wide, judge, Random(0)) == needle
    assert walk.draw(wide, lambda p: "never", Random(0)) is None


def count_questions(space: Space) -> tuple[Space, list[str]]:
    asked: list[str] = []

    def judge(name: str, parameters: walk.Parameters) -> str | None:
        asked.append(name)
        return space.judge(name, parameters)

    return replace(space, judge=judge), asked


@pytest.mark.parametrize("operation", [Operation.FORWARD, Operation.GRAD_INPUT])
def test_a_search_begins_without_listing_its_space(operation: Operation) -> None:
    """A listing took 22 s and a gigabyte."""
    problem = Problem(operation, LayerShape(512, 512, 18, 65536), target("sm_90"))
    space, asked = count_questions(explore(problem))
    study = Study(space, 400, InMemoryStorage())
    assert study.ask() is not None
    assert len(asked) < 5000
    tally = space.tally
    assert tally.candidates > 40_000
    points = sum(math.prod(map(len, values.values())) for values in space.values.values())
    assert tally.candidates + sum(tally.rejected.values()) == points
    assert len(asked) < points / 10


def brute_force(f: Family, operation: Operation, chip: Device, mode: str) -> int | None:
    shape = LayerShape(512, 512, MIN_GRIDS, 1 << 18)
    points = [p for p in product(*f.space(operation).values()) if mode in p]
    names = list(f.space(operation))
    for grids in range(UNLIMITED, MIN_GRIDS - 1, -1):
        problem = Problem(operation, replace(shape, grids=grids), chip, constant=True)
        if any(not f.layer_violations(problem.layer, dict(zip(names, p, strict=True))) for p in points):
            return grids
    return None


@pytest.mark.parametrize("mode", ["normal", "fast"])
def test_limits_are_those_of_the_best_candidate(mode: str) -> None:
    chip, f = target("sm_86"), family("tile_stationary")
    shown = [r for r in limits(chip) if r.family == f.name and r.operation is Operation.BACKWARD]
    best = max(r.num_grids or 0 for r in shown if r.variant == f"mode={mode}")
    assert best == brute_force(f, Operation.BACKWARD, chip, mode)
