"""Integers that remember how they follow from the batch.

A launch plan is made by plain arithmetic. Made for a traced batch, it says what it would be for others, too:
each of its numbers is a step of a `Trace`, which the native launcher repeats for another batch, without
Python. A comparison is decided for the batch at hand and kept as a guard: where another batch would decide it
otherwise, the trace does not speak for that batch. The same goes for numbers that are used as plain ones, in
``range`` or ``int``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NoReturn, SupportsIndex

#: operations by their number, as ``templates/run_plan.h.j2`` knows them
BATCH, CONSTANT, ADD, SUBTRACT, MULTIPLY, FLOOR_DIVIDE, REMAINDER, LESS, LESS_OR_EQUAL, EQUAL = range(10)
_FUNCTIONS: dict[int, Callable[[Any, Any], int]] = {
    ADD: operator.add,
    SUBTRACT: operator.sub,
    MULTIPLY: operator.mul,
    FLOOR_DIVIDE: operator.floordiv,
    REMAINDER: operator.mod,
    LESS: operator.lt,
    LESS_OR_EQUAL: operator.le,
    EQUAL: operator.eq,
}


class UntraceableError(Exception):
    """Something was asked of a traced number that the native launcher could not repeat."""


class Trace:
    """The steps that lead from a batch to the numbers of its plans.

    Attributes:
        steps: operation and two operands each: places of earlier steps, or the value of a constant.
        guards: places of comparisons, and how they were decided.
        batch: what to make plans for.
    """

    def __init__(self, batch: int) -> None:
        self.steps: list[tuple[int, int, int]] = [(BATCH, 0, 0)]
        self.guards: dict[int, int] = {}
        self._places: dict[tuple[int, int, int], int] = {}
        self.batch = Traced(self, 0, batch)

    def add(self, operation: int, a: int, b: int = 0) -> int:
        """The place of a step; equal steps share one."""
        step = (operation, a, b)
        place = self._places.get(step)
        if place is None:
            place = self._places[step] = len(self.steps)
            self.steps.append(step)
        return place

    def place(self, number: Traced | int) -> int:
        """Where a number stands."""
        return number.place if isinstance(number, Traced) else self.add(CONSTANT, number)

    def values(self, batch: int) -> list[int] | None:
        """What the steps come to for another batch; None where the trace does not speak for it."""
        found: list[int] = []
        for operation, a, b in self.steps:
            if operation == BATCH:
                found.append(batch)
            elif operation == CONSTANT:
                found.append(a)
            elif operation in (FLOOR_DIVIDE, REMAINDER) and found[b] == 0:
                return None
            else:
                found.append(int(_FUNCTIONS[operation](found[a], found[b])))
        return found if all(found[place] == outcome for place, outcome in self.guards.items()) else None


class Traced:
    """An integer of a trace.

    Raises:
        UntraceableError: a number is used as a key, which may be found again where another trace is meant.
    """

    __slots__ = ("place", "trace", "value")

    def __init__(self, trace: Trace, place: int, value: int) -> None:
        self.trace, self.place, self.value = trace, place, value

    def _with(self, operation: int, other: object, swapped: bool = False) -> Any:
        if not isinstance(other, Traced | int):
            return NotImplemented
        value = other.value if isinstance(other, Traced) else other
        a, b = (self.place, self.trace.place(other))
        if swapped:
            a, b = b, a
        operands = (value, self.value) if swapped else (self.value, value)
        result = int(_FUNCTIONS[operation](*operands))
        place = self.trace.add(operation, a, b)
        if operation < LESS:
            return Traced(self.trace, place, result)
        self.trace.guards[place] = result
        return bool(result)

    def __add__(self, other: object) -> Any:
        return self._with(ADD, other)

    def __radd__(self, other: object) -> Any:
        return self._with(ADD, other, swapped=True)

    def __sub__(self, other: object) -> Any:
        return self._with(SUBTRACT, other)

    def __rsub__(self, other: object) -> Any:
        return self._with(SUBTRACT, other, swapped=True)

    def __mul__(self, other: object) -> Any:
        return self._with(MULTIPLY, other)

    def __rmul__(self, other: object) -> Any:
        return self._with(MULTIPLY, other, swapped=True)

    def __floordiv__(self, other: object) -> Any:
        return self._with(FLOOR_DIVIDE, other)

    def __rfloordiv__(self, other: object) -> Any:
        return self._with(FLOOR_DIVIDE, other, swapped=True)

    def __mod__(self, other: object) -> Any:
        return self._with(REMAINDER, other)

    def __rmod__(self, other: object) -> Any:
        return self._with(REMAINDER, other, swapped=True)

    def __neg__(self) -> Any:
        return self._with(SUBTRACT, 0, swapped=True)

    def __lt__(self, other: object) -> Any:
        return self._with(LESS, other)

    def __le__(self, other: object) -> Any:
        return self._with(LESS_OR_EQUAL, other)

    def __gt__(self, other: object) -> Any:
        return self._with(LESS, other, swapped=True)

    def __ge__(self, other: object) -> Any:
        return self._with(LESS_OR_EQUAL, other, swapped=True)

    def __eq__(self, other: object) -> Any:
        return self._with(EQUAL, other)

    def __bool__(self) -> bool:
        return self != 0

    def __index__(self) -> int:
        """The plain number; the trace speaks for batches of the same one only."""
        assert self == self.value
        return self.value

    __int__ = __index__

    def __float__(self) -> float:
        return float(int(self))

    def __hash__(self) -> NoReturn:
        raise UntraceableError("a number that depends on the batch cannot be a key")

    def __repr__(self) -> str:
        return f"Traced({self.value})"


def plain(number: SupportsIndex) -> int:
    """The number at the batch at hand, without a guard: to show, or to start a plan for that very batch."""
    return number.value if isinstance(number, Traced) else operator.index(number)
