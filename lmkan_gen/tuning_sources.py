"""Tuning files on this machine, and which of their entries speak for a problem."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType

import platformdirs

from lmkan_gen.device import Device
from lmkan_gen.families import Parameters, family
from lmkan_gen.freshness import is_stale
from lmkan_gen.problem import Layer, LayerShape, Problem
from lmkan_gen.resources import resource_directory
from lmkan_gen.text import printable
from lmkan_gen.toolchain.bundle import tuning_files
from lmkan_gen.tuning_file import DeviceRecord, Entry, TuningFile, TuningFileError, load

logger = logging.getLogger("lmkan_gen")

TUNING_VARIABLE = "LMKAN_GEN_TUNING"
#: How far apart shapes are per factor of two: a table's size decides what fits, the batch least.
_WEIGHTS = {"inputs": 1.0, "outputs": 1.0, "grids": 1.5}
_BATCH_WEIGHT = 0.5


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
        named = Path(value)
        # what is no directory may not be there, which is to be said
        found += [Source("environment", p) for p in (_yaml_files(named) if os.path.isdir(named) else [named])]
    with suppress(RuntimeError):  # there is no home directory
        found += [Source("user", p) for p in _yaml_files(user_tuning_directory())]
    found += [Source("bundle", p) for p in tuning_files()]
    found += [Source("packaged", p) for p in _yaml_files(resource_directory("tuning"))]
    return found


def _yaml_files(directory: Path) -> list[Path]:
    try:
        return sorted(directory.glob("*.yaml"))
    except OSError:  # a home directory that may not be read has no tuning files for us
        return []


@cache
def _files(environment: str | None) -> tuple[tuple[Source, TuningFile], ...]:
    """All usable files. A broken one must not stop a layer: it is named once and passed over.

    So are entries for kernels that this version does not have.
    """
    usable = []
    for source in sources():
        try:
            file = load(source.path)
            usable.append((source, file))
            logger.debug("tuning file (%s): %s", source.origin, printable(source.path))
            if file.skipped:
                warnings.warn(_skipping(source.path, file), stacklevel=2)
        except TuningFileError as error:
            warnings.warn(
                f"ignoring a tuning file; `lmkan-gen configs validate` checks it again: {error}",
                stacklevel=2,
            )
    return tuple(usable)


def _skipping(path: Path, file: TuningFile) -> str:
    passed, total = len(file.skipped), len(file.skipped) + len(file.entries)
    return (
        f"{printable(path)}: {passed} of {total} entries are passed over, since this version of lmkan-gen "
        f"has no such kernels; for example, {file.skipped[0].describe()}"
    )


def forget_files() -> None:
    """Read the files again when they are next asked for."""
    _files.cache_clear()
    _of_layer.cache_clear()
    tuned_batches.cache_clear()


@dataclass(frozen=True, eq=False)
class Evidence:
    """An entry that may speak for a layer: from ``source``, measured on this device model or not.

    ``apart`` is the distance of the shapes but for the batch, ``batch`` the entry's. Of equally near entries
    the one with the lower ``rank`` goes first.
    """

    layer: Layer
    source: Source
    entry: Entry
    same_device: bool
    apart: float
    batch: int
    rank: int

    @cached_property
    def parameters(self) -> Parameters:
        """The entry's, read-only."""
        return MappingProxyType(dict(self.entry.parameters))

    @cached_property
    def cost(self) -> float:
        """Measured picoseconds per function evaluation."""
        return 1e6 * self.entry.time_us.median / self.entry.shape.layer.evaluations

    @cached_property
    def stale(self) -> bool:
        """Whether the kernel has changed since it was measured on this device. Renders its source."""
        of = self.layer
        measured = Problem(
            of.operation,
            self.entry.shape.layer,
            of.device,
            of.table,
            of.deterministic,
            of.constant,
            of.workspace,
        )
        return self.same_device and is_stale(self.entry, measured)


def evidence(problem: Problem, within: float = math.inf) -> Iterator[tuple[float, Evidence]]:
    """Entries for the operation and their distances, best first: this device's, then those of its
    architecture's nearest other device; the nearest shapes first.

    Left out are entries that fit the layer with no batch, and those of shapes farther than ``within``.
    """
    batch = problem.shape.batch
    for group in _of_layer(problem.layer, os.environ.get(TUNING_VARIABLE)):
        near = [
            (found.apart + _BATCH_WEIGHT * abs(math.log2(batch / found.batch)), found.rank, found)
            for found in group
            if found.apart <= within
        ]
        near.sort()  # ranks differ, so that nothing behind them is compared
        for distance, _, found in near:
            if distance > within:
                break
            yield distance, found


@lru_cache(maxsize=1024)
def tuned_batches(layer: Layer, environment: str | None) -> tuple[int, ...]:
    """Batches that entries of a layer's very sizes were measured at, on any device, in order.

    Args:
        layer: sizes, operation and device.
        environment: what ``LMKAN_GEN_TUNING`` says.
    """
    groups = _of_layer(layer, environment)
    return tuple(sorted({found.batch for group in groups for found in group if found.apart == 0}))


@lru_cache(maxsize=1024)
def _of_layer(layer: Layer, environment: str | None) -> tuple[tuple[Evidence, ...], ...]:
    """Evidence in groups, the best first: all files of this device, then file by file those of others."""
    device = layer.device
    own, others = [], []
    for source, file in _files(environment):
        if (file.device.name, file.device.arch) == (device.name, device.arch):
            own.append((source, file))
        elif file.device.arch == device.arch:
            others.append((source, file))
    others.sort(key=lambda item: _device_distance(device, item[1].device))
    return (
        _group(layer, own, True),
        *(_group(layer, [item], False) for item in others),
    )


def _group(
    layer: Layer, files: Sequence[tuple[Source, TuningFile]], same_device: bool
) -> tuple[Evidence, ...]:
    """What files say of a layer; their precedence decides between equally near shapes."""
    fitting = (
        (source, entry)
        for source, file in files
        for entry in file.entries
        if entry.operation is layer.operation
        and entry.dtypes.table is layer.table
        and not family(entry.family).layer_violations(layer, entry.parameters)
    )
    return tuple(
        Evidence(
            layer,
            source,
            entry,
            same_device,
            _layer_distance(layer.shape, entry.shape.layer),
            entry.shape.batch,
            rank,
        )
        for rank, (source, entry) in enumerate(fitting)
    )


def _layer_distance(a: LayerShape, b: LayerShape) -> float:
    """How unlike two shapes are but for the batch: factors of two between their sizes, weighted."""
    return sum(w * abs(math.log2(getattr(a, n) / getattr(b, n))) for n, w in _WEIGHTS.items())


def _device_distance(device: Device, record: DeviceRecord) -> float:
    processors = abs(math.log2(device.multiprocessors / record.multiprocessors))
    # +1: a CPU has none
    memory = abs(math.log2((device.shared_memory_per_block + 1) / (record.shared_memory_per_block + 1)))
    return processors + memory
