"""How fine a grid each kernel family can serve on a device, for the tile sizes users know.

Nothing here knows a memory formula: the families' own `violations` are asked, so the answer is what
the layer would do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

from lmkan_gen.device import Device
from lmkan_gen.families import Demand, Family, Parameters, families
from lmkan_gen.families.walk import branches
from lmkan_gen.problem import CALL_OPERATIONS, MIN_GRIDS, LayerShape, Operation, Problem, TableDtype

TILE_SIZES = (4, 8, 16)
#: a family that still runs here is taken to have no limit of its own
UNLIMITED = 256
#: a layer that every tile size divides and that is large enough to leave no tile under-used
_INPUTS = _OUTPUTS = 512
_BATCH = 1 << 18

#: tile, and the values of a family's named parameters
_Key = tuple[int | None, tuple[str, ...]]


@dataclass(frozen=True)
class Limit:
    """The largest grid of one way to run an operation.

    Attributes:
        operation: what is computed.
        family: the kernel family.
        tile: the seed's tile size; None for families without such a notion.
        variant: values of the family's named (non-numeric) parameters that the limit depends on, such
            as ``mode=fast``; empty when there is none.
        num_grids: largest feasible value, at most `UNLIMITED`; None when nothing fits.
    """

    operation: Operation
    family: str
    tile: int | None
    variant: str
    num_grids: int | None

    @property
    def is_unlimited(self) -> bool:
        """Whether the family runs at any grid a user may want."""
        return self.num_grids == UNLIMITED


def limits(device: Device, table: TableDtype = TableDtype.FLOAT32) -> list[Limit]:
    """One entry per operation, family, tile and variant, in that order, for ``device`` and a table dtype."""
    return [
        limit
        for operation in CALL_OPERATIONS
        for family in families(device.kind, operation, table)
        for limit in _family_limits(family, _problem(operation, device, table))
    ]


def _family_limits(family: Family, problem: Problem) -> list[Limit]:
    operation, space = problem.operation, family.space(problem.operation)
    named = [n for n, values in space.items() if isinstance(values[0], str)]
    largest: dict[_Key, int | None] = {}
    for tile, demanded in _by_tile(family, problem).items():
        for values in product(*(space[n] for n in named)):
            ways = [d for d in demanded if all(d.get(n, v) == v for n, v in zip(named, values, strict=True))]
            parts = [{**d, **dict(zip(named, values, strict=True))} for d in ways]
            if parts:
                largest[tile, tuple(map(str, values))] = _largest(family, problem, parts)
    shown = [i for i in range(len(named)) if _matters(i, largest)]
    rows = {
        (tile, ", ".join(f"{named[i]}={values[i]}" for i in shown)): num_grids
        for (tile, values), num_grids in largest.items()
    }
    return [Limit(operation, family.name, tile, variant, n) for (tile, variant), n in rows.items()]


def _by_tile(family: Family, problem: Problem) -> dict[int | None, list[Parameters]]:
    """What each tile size fixes, in one way or several; None: the family has no such notion."""
    if family.demanded(problem, Demand(tile_size=TILE_SIZES[0])) is None:
        return {None: [{}]}
    space = family.space(problem.operation)
    by_tile: dict[int | None, list[Parameters]] = {}
    for tile in TILE_SIZES:
        demands = (Demand(tile_size=tile), Demand(tile_size=tile, fast_mode=True))
        fixed = [f for d in demands if (f := family.demanded(problem, d)) is not None]
        by_tile[tile] = [f for f in fixed if all(value in space[name] for name, value in f.items())]
    return by_tile


def _matters(position: int, largest: Mapping[_Key, int | None]) -> bool:
    """Whether any limit changes with the named parameter at this position, all else equal."""
    seen: dict[_Key, int | None] = {}
    for (tile, values), num_grids in largest.items():
        others = (tile, values[:position] + values[position + 1 :])
        if seen.setdefault(others, num_grids) != num_grids:
            return True
    return False


def _problem(operation: Operation, device: Device, table: TableDtype) -> Problem:
    shape = LayerShape(_INPUTS, _OUTPUTS, MIN_GRIDS, _BATCH)
    return Problem(operation, shape, device, table, constant=True)


def _largest(family: Family, problem: Problem, parts: Sequence[Parameters]) -> int | None:
    """Of the points that have the values of one of ``parts``; asked for finer and finer grids first."""

    def fits(grids: int) -> bool:
        finer = replace(problem, shape=replace(problem.shape, grids=grids))
        judge = partial(family.first_limit, finer)
        space = family.space(problem.operation)
        return any(branch.limit is None for part in parts for branch in branches(space, judge, part))

    if not fits(grids := MIN_GRIDS):
        return None
    while grids < UNLIMITED:
        finer = min(2 * grids, UNLIMITED)
        if not fits(finer):
            # one by one: families may have reasons other than memory
            return next((g for g in range(finer - 1, grids, -1) if fits(g)), grids)
        grids = finer
    return UNLIMITED
