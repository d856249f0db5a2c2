"""What a kernel family is: one way to compute some operations on one kind of device.

A family is one module in this package (plus one template) that assigns an instance to ``FAMILY``.
It is found by name; nothing else has to be edited to add one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import ClassVar, Literal

from lmkan_gen.plan import Constant, KernelSpec, LaunchPlan
from lmkan_gen.problem import Layer, Operation, Problem, TableDtype

#: answers that are kept, each for a layer and parameters
_CAPACITY = 1 << 13

Parameters = Mapping[str, Constant]


@dataclass(frozen=True)
class Violation:
    """One reason why parameters do not fit a problem: ``limit`` groups them in statistics."""

    limit: str
    """A short name: ``shared_memory``, ``threads``, ``registers``, ``divisibility``, ``wasted`` ..."""
    message: str
    """Names the parameter, its value, the limit, and what would fit."""


@dataclass(frozen=True)
class Demand:
    """What the user asked for in the seed's terms; ``None`` leaves it to tuning."""

    tile_size: int | None = None
    block_size: int | None = None
    fast_mode: bool = False

    @property
    def is_free(self) -> bool:
        """True when no tile or block was demanded."""
        return self.tile_size is None and self.block_size is None


class Family(ABC):
    """One way to compute some operations on one kind of device."""

    name: ClassVar[str]
    device_kind: ClassVar[Literal["cpu", "cuda"]]
    operations: ClassVar[frozenset[Operation]]
    #: one line for tables and docs
    idea: ClassVar[str]

    def computes(self, operation: Operation, table: TableDtype) -> bool:
        """Whether there is a kernel for ``operation`` on tables of this element type."""
        return operation in self.operations and table is TableDtype.FLOAT32

    @abstractmethod
    def space(self, operation: Operation) -> Mapping[str, tuple[Constant, ...]]:
        """All values each tunable parameter may take. Values are integers or identifiers."""

    @abstractmethod
    def default(self, problem: Problem) -> Parameters | None:
        """A good guess from analysis alone, or None when nothing fits."""

    def violations(self, problem: Problem, parameters: Parameters) -> list[Violation]:
        """Why ``parameters`` (inside the space) cannot or should not run; empty when they can."""
        of_layer = _violations(self, problem.layer, tuple(parameters.items()))
        return [*of_layer, *self.batch_violations(problem, parameters)]

    def rejection(self, problem: Problem, parameters: Parameters) -> str | None:
        """The first limit that ``parameters`` break, ``wasted`` included; None where they are worth trying.

        Nothing is kept, and no more parameters are read than the answer depends on: see `walk`.
        """
        if (limit := self.first_limit(problem, parameters)) is not None:
            return limit
        return "wasted" if self.wasted(problem, parameters) else None

    def first_limit(self, problem: Problem, parameters: Parameters) -> str | None:
        """The same of what cannot run, be it wasted or not."""
        if type(self).violations is not Family.violations:
            return next((v.limit for v in self.violations(problem, parameters)), None)
        for violation in self.broken(problem.layer, parameters):
            return violation.limit
        return next((v.limit for v in self.batch_violations(problem, parameters)), None)

    def layer_violations(self, layer: Layer, parameters: Parameters) -> list[Violation]:
        """Those of `violations` that every batch has."""
        return list(self.broken(layer, parameters))

    def broken(self, layer: Layer, parameters: Parameters) -> Iterator[Violation]:
        """The same one by one. What reads few parameters should come first."""
        return iter(())

    def batch_violations(self, problem: Problem, parameters: Parameters) -> list[Violation]:
        """Those of `violations` that depend on the batch."""
        return []

    def spec(self, problem: Problem, parameters: Parameters) -> KernelSpec:
        """The source to render, the same for every batch."""
        return _spec(self, problem.layer, tuple(parameters.items()))

    def layer_spec(self, layer: Layer, parameters: Parameters) -> KernelSpec:
        """What `spec` answers for every batch of a layer."""
        raise NotImplementedError(f"family {self.name} says nothing of its source")

    @abstractmethod
    def plan(self, problem: Problem, parameters: Parameters) -> LaunchPlan:
        """Launches for ``problem.shape.batch >= 1`` samples."""

    def demanded(self, problem: Problem, demand: Demand) -> Mapping[str, Constant] | None:
        """Parameters fixed by the seed's tile and block arguments; None: no such notion here."""
        return None

    def wasted(self, problem: Problem, parameters: Parameters) -> bool:
        """Whether feasible ``parameters`` are not worth trying, such as tiles that are mostly padding."""
        return False

    def preference(self, problem: Problem) -> float:
        """Rank among families whose defaults fit an untuned problem: the largest is taken.

        Above 1 the default is taken even over what was tuned for other shapes; below 0 nothing of this family
        is taken that was tuned for another shape.
        """
        return 0.0

    def check(self, operation: Operation, parameters: Parameters) -> None:
        """Raise ValueError unless ``parameters`` has exactly the space's names, with allowed values."""
        space = self.space(operation)
        if unknown := sorted(set(parameters) - set(space)):
            raise ValueError(
                f"family {self.name}: unknown parameter {unknown[0]!r} for {operation}; "
                f"it has {', '.join(sorted(space))}"
            )
        for name, allowed in space.items():
            if name not in parameters:
                raise ValueError(f"family {self.name}: parameter {name!r} is missing for {operation}")
            value = parameters[name]
            if isinstance(value, bool) or not any(value == a and type(value) is type(a) for a in allowed):
                choices = ", ".join(map(str, allowed))
                raise ValueError(
                    f"family {self.name}: parameter {name} is {value!r}, must be one of {choices}"
                )

    def drawn(self, problem: Problem, random: Random, draws: int = 2000) -> Iterator[dict[str, Constant]]:
        """Points at random that can run, of so many that are drawn: spaces are long to list."""
        space = self.space(problem.operation)
        for _ in range(draws):
            point = {name: random.choice(values) for name, values in space.items()}
            if not self.violations(problem, point):
                yield point


@lru_cache(_CAPACITY)
def _violations(
    family: Family, layer: Layer, parameters: tuple[tuple[str, Constant], ...]
) -> tuple[Violation, ...]:
    return tuple(family.layer_violations(layer, dict(parameters)))


@lru_cache(_CAPACITY)
def _spec(family: Family, layer: Layer, parameters: tuple[tuple[str, Constant], ...]) -> KernelSpec:
    return family.layer_spec(layer, dict(parameters))
