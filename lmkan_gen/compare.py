"""What differs between two tuning files."""

from __future__ import annotations

from dataclasses import dataclass

from lmkan_gen.plan import Constant
from lmkan_gen.problem import Operation
from lmkan_gen.tuning_file import Entry, TuningFile


@dataclass(frozen=True)
class Difference:
    """The entries of two files for one call; one of them may be missing."""

    a: Entry | None
    b: Entry | None

    @property
    def speedup(self) -> float | None:
        """How many times faster the second is; None where one is missing."""
        return None if self.a is None or self.b is None else self.a.time_us.median / self.b.time_us.median

    @property
    def is_noise(self) -> bool:
        """Whether the times differ by no more than the larger spread, or a device was busy."""
        if self.a is None or self.b is None:
            return False
        if self.a.doubts or self.b.doubts:
            return True
        a, b = self.a.time_us, self.b.time_us
        return abs(a.median - b.median) <= max(a.iqr, b.iqr)

    @property
    def changes(self) -> dict[str, tuple[Constant | None, Constant | None]]:
        """Parameters that differ, and ``family``; None for one that a kernel does not have."""
        if self.a is None or self.b is None:
            return {}
        one = {"family": self.a.family, **self.a.parameters}
        two = {"family": self.b.family, **self.b.parameters}
        return {n: (one.get(n), two.get(n)) for n in {**one, **two} if one.get(n) != two.get(n)}


def compare(a: TuningFile, b: TuningFile) -> list[Difference]:
    """All calls that either file answers, ordered by operation and shape."""
    one, two = ({e.key: e for e in file.entries} for file in (a, b))
    order = list(Operation)
    keys = sorted(one.keys() | two.keys(), key=lambda key: (order.index(key[0]), *key[1:]))
    return [Difference(one.get(key), two.get(key)) for key in keys]
