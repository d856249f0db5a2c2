"""The points of a family's space, without looking at each.

A check that reads a few parameters decides all points that begin with their values. So the walk asks about
points of which nothing is fixed yet, and fixes a parameter when the answer depends on it: its tree has the
parameters in the order in which checks read them, and ends where a check says no.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from random import Random

from lmkan_gen.plan import Constant

Space = Mapping[str, tuple[Constant, ...]]
Parameters = Mapping[str, Constant]
#: the limit that points with these parameters break, or None; it is called with some of them only
Judge = Callable[[Parameters], str | None]

#: points that are drawn before the walk looks for one that fits
_DRAWS = 1000


@dataclass(frozen=True)
class Branch:
    """Points that have some parameters in common and whatever values of the others.

    Attributes:
        fixed: the common ones.
        space: all values of all parameters.
        limit: what all these points break; None where all fit.
    """

    fixed: Mapping[str, Constant]
    space: Space
    limit: str | None

    @property
    def size(self) -> int:
        """Number of points."""
        return math.prod(len(values) for name, values in self.space.items() if name not in self.fixed)

    def points(self) -> Iterator[dict[str, Constant]]:
        """Each of them, with parameters in the order of the space."""
        choices = [(self.fixed[n],) if n in self.fixed else values for n, values in self.space.items()]
        return (dict(zip(self.space, point, strict=True)) for point in product(*choices))


class _Unread(Exception):
    """A check reads a parameter that is not fixed yet."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Prefix(dict[str, Constant]):
    """Some parameters of a point; whoever reads another one is told so by `_Unread`."""

    __slots__ = ("_space",)

    def __init__(self, fixed: Mapping[str, Constant], space: Space) -> None:
        super().__init__(fixed)
        self._space = space

    def __missing__(self, name: str) -> Constant:
        raise _Unread(name) if name in self._space else KeyError(name)

    def get(self, name: str, default: Constant | None = None) -> Constant | None:  # type: ignore[override]
        return self[name] if name in self._space else default

    def extended(self, name: str, value: Constant) -> _Prefix:
        longer = _Prefix(self, self._space)
        longer[name] = value
        return longer


def branches(
    space: Space, judge: Judge, fixed: Mapping[str, Constant] | None = None, random: Random | None = None
) -> Iterator[Branch]:
    """All points that have the values of ``fixed``, in branches; in a random order, if one is given."""
    stack = [_Prefix(fixed or {}, space)]
    while stack:
        prefix = stack.pop()
        try:
            limit = judge(prefix)
        except _Unread as unread:
            values = list(reversed(space[unread.name]))
            if random is not None:
                random.shuffle(values)
            stack.extend(prefix.extended(unread.name, value) for value in values)
        else:
            yield Branch(prefix, space, limit)


def fitting(space: Space, judge: Judge) -> Iterator[dict[str, Constant]]:
    """All points that break no limit, in a fixed order."""
    return (point for branch in branches(space, judge) if branch.limit is None for point in branch.points())


def draw(space: Space, judge: Judge, random: Random) -> dict[str, Constant] | None:
    """A point that breaks no limit, all of them alike unless they are very few; None where there is none."""
    for _ in range(_DRAWS):
        prefix = _Prefix({}, space)
        while True:
            try:
                limit = judge(prefix)
            except _Unread as unread:
                prefix[unread.name] = random.choice(space[unread.name])
            else:
                break
        if limit is None:
            return {n: prefix[n] if n in prefix else random.choice(values) for n, values in space.items()}
    for branch in branches(space, judge, random=random):
        if branch.limit is None:
            return random.choice(list(branch.points()))
    return None
