"""Rough times of the tile-stationary candidates, and which of them is the fastest for a batch.

Almost everything in a time is the same for all batches of as many units of 32 samples. So times of all
candidates are computed once per number of units, and the few are kept that may be the fastest for some batch
of so many units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from lmkan_gen.families.base import Parameters

_UNIT = 32  # samples
#: measured on an H200, in bytes per microsecond; only their ratios matter
_ADD_RATE, _CACHED_ADD_RATE = 1.3e6, 3.3e6  # read and write count once
_CACHE_BYTES = 36 << 20  # results that stay in the level-2 cache from one tile to the next
_LAUNCH_US = 2.0
_TILE_US = 4.0  # from asking for a tile until all warps are at work on it; other blocks use the time


class Access(NamedTuple):
    """Parameters in full, and which part of the rate of additions they reach."""

    parameters: Parameters
    rate: float


@dataclass(frozen=True)
class Tile:
    """What the time of a candidate depends on, beside the batch.

    Attributes:
        accesses: ways to touch rows of results, all else equal; the first of equal ones is taken.
        segments: parts of the result that have a sum of their own.
        summed: tiles that each sum goes over.
        at_a_time: units that a block works on at a time.
        slots: blocks that the device holds.
        whole: whether a block has whole parts of a tile's batch.
        unit_us: what a unit costs a multiprocessor per tile.
        utilisation: of a multiprocessor, by its warps.
        staging_us: what loading a tile costs.
        launches: kernels, but for those that sums in parts need.
    """

    accesses: tuple[Access, ...]
    segments: int
    summed: int
    at_a_time: int
    slots: int
    whole: bool
    unit_us: float
    utilisation: float
    staging_us: float
    launches: int


class _Time(NamedTuple):
    """Of a candidate for a number of units; see `_us`."""

    accesses: tuple[Access, ...]
    summed: int
    compute: float
    staging: float
    launching: float


@dataclass(frozen=True, eq=False)
class Times:
    """The candidates of a layer.

    Attributes:
        tiles: at least one.
        multiprocessors: of the device.
        results: rows of results that are added to, one number a sample each.
        divides_sums: whether sums may go in parts to several blocks.
    """

    tiles: Sequence[Tile]
    multiprocessors: int
    results: int
    divides_sums: bool
    _columns: dict[str, np.ndarray] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        names = (
            "segments",
            "summed",
            "at_a_time",
            "slots",
            "unit_us",
            "utilisation",
            "staging_us",
            "launches",
        )
        for name in names:
            # as float64, which holds these integers and their quotients rounded down or up exactly
            self._columns[name] = np.array([getattr(tile, name) for tile in self.tiles], np.float64)
        self._columns["whole"] = np.array([tile.whole for tile in self.tiles])

    def best(self, batch: int) -> Parameters:
        """The candidate that takes the least time, the first of equal ones."""
        updated = 4 * batch * self.results
        shortlist = _shortlist(self, -(-batch // _UNIT))
        ways = [(time, access) for time in shortlist for access in time.accesses]
        return min(ways, key=lambda way: _us(way[0], way[1], updated))[1].parameters

    def of_units(self, units: int) -> list[_Time]:
        """The candidates that may be the best of some batch of so many units, in order."""
        c = self._columns
        segments, summed, at_a_time, slots = c["segments"], c["summed"], c["at_a_time"], c["slots"]
        # see `TileStationary._grid`
        full = segments * np.ceil(units / at_a_time)
        splits = np.ones_like(full)
        if self.divides_sums:
            splits = np.where(full < slots, np.minimum(summed, np.floor(slots / full)), splits)
        segments = segments * splits
        grid = np.maximum(1, np.minimum(slots, splits * full))
        grid = np.where(c["whole"] & (grid > segments), np.floor(grid / segments) * segments, grid)
        sharing = np.ceil(grid / self.multiprocessors)  # blocks of the busiest multiprocessor
        # units that a block works through per tile; warps without one wait for the others
        worked = np.ceil(segments * units / (grid * at_a_time)) * at_a_time
        compute = worked * c["unit_us"] * sharing * summed / splits / c["utilisation"]
        straddles = (np.fmod(segments, grid) != 0) & (np.fmod(grid, segments) != 0)
        loads = (np.ceil(segments / grid) + straddles) * summed / splits  # of one block
        staging = loads * np.maximum(c["staging_us"] * sharing, c["staging_us"] + _TILE_US)
        launching = (c["launches"] + (splits > 1)) * _LAUNCH_US

        # times grow with the batch
        least, most = 4 * self.results * (_UNIT * (units - 1) + 1), 4 * self.results * _UNIT * units
        at_least = np.maximum(compute, least * summed / _rate(least)) + staging + launching
        at_most = np.maximum(compute, most * summed / _rate(most)) + staging + launching
        kept: list[int] = np.flatnonzero(at_least <= at_most.min()).tolist()
        return [
            _Time(tile.accesses, tile.summed, float(compute[k]), float(staging[k]), float(launching[k]))
            for k, tile in ((k, self.tiles[k]) for k in kept)
        ]


def _us(time: _Time, access: Access, updated: int) -> float:
    added = updated * time.summed / (_rate(updated) * access.rate)
    return max(time.compute, added) + time.staging + time.launching


def _rate(updated: int) -> float:
    return _CACHED_ADD_RATE if updated < _CACHE_BYTES else _ADD_RATE


@lru_cache(maxsize=4096)
def _shortlist(times: Times, units: int) -> list[_Time]:
    return times.of_units(units)
