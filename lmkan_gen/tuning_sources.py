"""Tuning files on this machine, and which of their entries speak for a problem."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import platformdirs

from lmkan_gen.device import Device
from lmkan_gen.problem import LayerShape, Problem
from lmkan_gen.resources import resource_directory
from lmkan_gen.toolchain.bundle import tuning_files
from lmkan_gen.tuning_file import DeviceRecord, Entry, TuningFile, TuningFileError, load

TUNING_VARIABLE = "LMKAN_GEN_TUNING"
#: How far apart shapes are per factor of two: a table's size decides what fits, the batch least.
_WEIGHTS = {"inputs": 1.0, "outputs": 1.0, "grids": 1.5, "batch": 0.5}


@dataclass(frozen=True)
class Source:
    """A tuning file and how it was found: ``environment``, ``user``, ``bundle`` or ``packaged``."""

    origin: str
    path: Path


def user_tuning_directory() -> Path:
    """Where ``lmkan-gen tune`` writes unless told otherwise, and where selection looks."""
    return Path(platformdirs.user_config_dir("lmkan_gen")) / "tuning"


def sources() -> list[Source]:
    """All tuning files in the order of precedence.

    ``$LMKAN_GEN_TUNING`` (a file or a directory) comes first, then the user's directory, then those of
    loaded bundles, then the packaged files.
    """
    found = []
    if value := os.environ.get(TUNING_VARIABLE):
        found += [Source("environment", p) for p in _yaml_files(Path(value))]
    with suppress(RuntimeError):  # there is no home directory
        found += [Source("user", p) for p in _yaml_files(user_tuning_directory())]
    found += [Source("bundle", p) for p in tuning_files()]
    found += [Source("packaged", p) for p in _yaml_files(resource_directory("tuning"))]
    return found


def _yaml_files(path: Path) -> list[Path]:
    try:
        return sorted(path.glob("*.yaml")) if path.is_dir() else [path] if path.is_file() else []
    except OSError:  # a home directory that may not be read has no tuning files for us
        return []


@cache
def _files(environment: str | None) -> tuple[tuple[Source, TuningFile], ...]:
    """All usable files. A broken one must not stop a layer: it is named once and passed over."""
    usable = []
    for source in sources():
        try:
            usable.append((source, load(source.path)))
        except TuningFileError as error:
            warnings.warn(
                f"ignoring a tuning file; `lmkan-gen configs validate` checks it again: {error}",
                stacklevel=2,
            )
    return tuple(usable)


def forget_files() -> None:
    """Read the files again when they are next asked for."""
    _files.cache_clear()


@dataclass(frozen=True)
class Evidence:
    """An entry that may speak for a problem: from ``source``, measured on this device model or not.

    ``distance`` is that of the shapes, 0 for equal ones.
    """

    source: Source
    entry: Entry
    same_device: bool
    distance: float


def evidence(problem: Problem) -> Iterator[Evidence]:
    """Entries for the operation, best first: this device's, then those of its architecture's nearest
    other device; the nearest shapes first."""
    device = problem.device
    own, others = [], []
    for source, file in _files(os.environ.get(TUNING_VARIABLE)):
        if (file.device.name, file.device.arch) == (device.name, device.arch):
            own.append((source, file))
        elif file.device.arch == device.arch:
            others.append((source, file))
    # sorting is stable: precedence decides ties
    yield from sorted(
        (e for source, file in own for e in _of_file(problem, source, file, True)), key=lambda e: e.distance
    )
    for source, file in sorted(others, key=lambda item: _device_distance(device, item[1].device)):
        yield from sorted(_of_file(problem, source, file, False), key=lambda e: e.distance)


def _of_file(problem: Problem, source: Source, file: TuningFile, same_device: bool) -> Iterator[Evidence]:
    for entry in file.entries:
        if entry.operation is problem.operation and entry.dtypes.table is problem.table:
            yield Evidence(source, entry, same_device, shape_distance(problem.shape, entry.shape.layer))


def shape_distance(a: LayerShape, b: LayerShape) -> float:
    """How unlike two shapes are: factors of two between their sizes, weighted."""
    return sum(w * abs(math.log2(getattr(a, n) / getattr(b, n))) for n, w in _WEIGHTS.items())


def _device_distance(device: Device, record: DeviceRecord) -> float:
    processors = abs(math.log2(device.multiprocessors / record.multiprocessors))
    # +1: a CPU has none
    memory = abs(math.log2((device.shared_memory_per_block + 1) / (record.shared_memory_per_block + 1)))
    return processors + memory
