"""Tuning files for others: checked, named after the device, added to what ships for it."""

from __future__ import annotations

from pathlib import Path

from lmkan_gen import golden
from lmkan_gen.device import slug
from lmkan_gen.families import family
from lmkan_gen.freshness import stale_entries
from lmkan_gen.resources import resource_directory
from lmkan_gen.selection import tune_command
from lmkan_gen.text import printable
from lmkan_gen.tuning_file import TuningFile, TuningFileError, load, merge, update


def export(source: Path, directory: Path) -> tuple[Path, int, int]:
    """Write a file ready to be contributed into ``directory``.

    It adds to the file that is there already, or else to the one that ships for the device: their entries
    stay, but for those that ``source`` answers as well.

    Returns:
        The file, how many of its entries come from ``source``, and how many it has.

    Raises:
        TuningFileError: not valid, without entries, or with entries that are stale or unsteady, do not fit
            the device, or are for kernels that this version does not have.
        OSError: the directory cannot be written.
    """
    file = load(source)
    for record in file.skipped:
        raise TuningFileError(f"{printable(source)}: {record.describe()}")
    if not file.entries:
        raise TuningFileError(f"{source}: there are no entries to export")
    stale = set(map(id, stale_entries(file)))
    for entry, (problem, _) in zip(file.entries, golden.specs(file), strict=True):
        what = f"{source}: {entry.operation} {entry.shape.layer}"
        if id(entry) in stale:
            raise TuningFileError(
                f"{what} was measured with another version of its kernel; again: {tune_command(problem)}"
            )
        if entry.doubts:
            raise TuningFileError(
                f"{what} was measured while the device was busy or its clocks varied "
                f"({', '.join(entry.doubts)}); on a quiet device: {tune_command(problem)}"
            )
        if broken := family(entry.family).violations(problem, entry.parameters):
            raise TuningFileError(f"{what} does not fit {file.device.name}: {broken[0].message}")
    shipped = _shipped(file)
    path = directory / f"{slug(file.device.name)}.yaml"
    # what lies in a checkout may be newer than what is installed
    merged = update(path, merge(shipped, file) if shipped and not path.exists() else file)
    return path, len(file.entries), len(merged.entries)


def _shipped(file: TuningFile) -> TuningFile | None:
    for path in sorted(resource_directory("tuning").glob("*.yaml")):
        found = load(path)
        if (found.device.name, found.device.arch) == (file.device.name, file.device.arch):
            return found
    return None
