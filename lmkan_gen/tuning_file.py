"""Tuning files: the YAML that the tuner writes and selection reads, one file per device model.

A file is validated down to single parameter values when it is loaded, because those values end up
in generated source.
"""

from __future__ import annotations

import os
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, ValidationError

from lmkan_gen import plain_yaml
from lmkan_gen.problem import Operation, TableDtype
from lmkan_gen.text import printable, quoted
from lmkan_gen.tuning_records import (
    DeviceRecord,
    Doubt,
    Dtypes,
    Entry,
    EntryRecord,
    FileContent,
    Provenance,
    Search,
    ShapeRecord,
    Times,
    TuningFile,
)

__all__ = [
    "SCHEMA_FILE",
    "DeviceRecord",
    "Doubt",
    "Dtypes",
    "Entry",
    "EntryRecord",
    "Provenance",
    "Search",
    "ShapeRecord",
    "Times",
    "TuningFile",
    "TuningFileError",
    "dump",
    "load",
    "merge",
    "save",
    "update",
]

#: name of the JSON Schema that lies beside the shipped files
SCHEMA_FILE = "schema.json"
#: tells editors where it is
_MODELINE = f"# yaml-language-server: $schema={SCHEMA_FILE}\n"
_MAX_REPORTED = 20
#: writing takes far less than a second
_LOCK_S = 60
#: some five thousand entries
_MOST_BYTES = 2 << 20
_TOO_LARGE = f"larger than {_MOST_BYTES >> 20} MiB, of which nothing is read; keep entries in several files"


#: of an entry that there is and one that comes: whether the first one stays
Keeps = Callable[[Entry, Entry], bool]


class TuningFileError(ValueError):
    """A tuning file that cannot be used; the message names file, entry, key, value and remedy."""


def load(path: Path) -> TuningFile:
    """Read and validate a tuning file.

    Entries for kernels that this version does not have are left out, but for `TuningFile.skipped`.

    Raises:
        TuningFileError: no readable regular file of at most 2 MiB, malformed YAML, or content that breaks
            the schema.
    """
    shown = printable(path)
    try:
        content = plain_yaml.parse(_read(path))
    except (OSError, UnicodeDecodeError) as error:
        raise TuningFileError(f"{shown}: cannot be read: {printable(error)}") from error
    except plain_yaml.PlainYamlError as error:
        raise TuningFileError(f"{shown}: malformed YAML: {error}") from error
    if not isinstance(content, dict):
        raise TuningFileError(
            f"{shown}: must hold a mapping with the keys schema, device, provenance and entries, "
            f"got {type(content).__name__}"
        )
    # strict mode asks for a tuple, YAML knows only lists
    if isinstance(content.get("entries"), list):
        content = {**content, "entries": tuple(content["entries"])}
    try:
        return TuningFile.of(FileContent.model_validate(content))
    except ValidationError as error:
        raise TuningFileError("\n".join(_explain(shown, content, error))) from error


def _read(path: Path) -> str:
    """The text of a regular file; nothing is waited for, as opening a pipe would."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise OSError("it is no regular file")
        data = stream.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise OSError(f"it is {_TOO_LARGE}")
    return data.decode()


def _explain(path: str, content: dict[str, Any], error: ValidationError) -> Iterator[str]:
    details = error.errors(include_url=False)
    for detail in details[:_MAX_REPORTED]:
        where = list(detail["loc"])
        prefix = f"{path}: "
        if len(where) >= 2 and where[0] == "entries" and isinstance(where[1], int):
            prefix += f"entry {where[1]}{_summary(content['entries'][where[1]])}: "
            where = where[2:]
        if where:
            prefix += ".".join(map(_key, where)) + ": "
        message = detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            message = "unknown key; remove it or correct its spelling"
        elif detail["type"] == "missing":
            message = "is missing"
        elif detail["type"] == "tuple_type":
            message = "Input should be a valid list"
        value = detail["input"]
        shown = "" if isinstance(value, dict | list | tuple | BaseModel) else f" (got {quoted(value)})"
        yield f"{prefix}{message}{shown}"
    if len(details) > _MAX_REPORTED:
        yield f"{path}: and {len(details) - _MAX_REPORTED} more"


def _key(key: int | str) -> str:
    return key if isinstance(key, str) and key.isidentifier() and len(key) <= 64 else quoted(key)


def _summary(entry: object) -> str:
    """Operation and sizes of an entry that may be malformed."""
    if not isinstance(entry, dict):
        return ""
    operation = entry.get("operation", "?")
    what = operation if operation in tuple(Operation) else quoted(operation)
    shape = entry.get("shape")
    sizes = ",".join(map(quoted, list(shape.values())[:4])) if isinstance(shape, dict) else ""
    return f" ({what} {sizes})".replace(" )", ")")


def dump(file: TuningFile) -> str:
    """The YAML text of ``file``: entries ordered by operation and shape, the same for equal files."""
    content = file.model_dump(mode="json", by_alias=True)
    content["provenance"]["date"] = file.provenance.date
    order = list(Operation)
    tables = list(TableDtype)
    entries: list[EntryRecord] = sorted(
        (*file.entries, *file.skipped),
        key=lambda e: (order.index(e.operation), tables.index(e.dtypes.table), e.shape.layer),
    )
    content["entries"] = [e.model_dump(mode="json") for e in entries]
    for entry in content["entries"]:
        entry["parameters"] = dict(sorted(entry["parameters"].items()))
        for optional in ("source", "measured_on", "unsteady"):
            if not entry[optional]:
                del entry[optional]
        entry["search"]["rejected"] = dict(sorted(entry["search"]["rejected"].items()))
    return plain_yaml.dump(content)


def save(path: Path, file: TuningFile) -> None:
    """Write ``file`` to ``path``, whole or not at all; missing parent directories are made.

    Raises:
        TuningFileError: it would be too large to be read again.
        OSError: the directory cannot be written.
    """
    text = dump(file)
    if len(text.encode()) > _MOST_BYTES:
        raise TuningFileError(f"{printable(path)} would be {_TOO_LARGE}")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            if (path.parent / SCHEMA_FILE).is_file():
                stream.write(_MODELINE)
            stream.write(text)
        temporary.chmod(0o644)  # mkstemp makes it private; a tuning file is there to be shared
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def update(path: Path, new: TuningFile, keeps: Keeps = lambda old, new: False) -> TuningFile:
    """Add the entries of ``new`` to a file, which others may be adding to at the same time; see `merge`.

    Returns:
        What the file holds now.

    Raises:
        TuningFileError: the file exists and is not a tuning file of this device.
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        merged = merge(load(path), new, keeps) if path.exists() else new
        save(path, merged)
    return merged


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock beside the file, where everybody sees it who sees the file.

    It belongs to the process, so that a crash releases it. Where the file system has none, a warning says so.
    """
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=_LOCK_S)
    try:
        lock.acquire()
    except Timeout:
        raise OSError(
            f"{printable(path)}: another process has been writing it for {_LOCK_S} s; end that and try again "
            "(`lmkan-gen tune --resume` measures nothing again)"
        ) from None
    except (OSError, NotImplementedError) as error:
        warnings.warn(
            f"{printable(path)} cannot be locked ({error}): runs at the same time may lose entries",
            stacklevel=4,
        )
    try:
        yield
    finally:
        lock.release()


def merge(old: TuningFile, new: TuningFile, keeps: Keeps = lambda old, new: False) -> TuningFile:
    """``old`` with the entries of ``new`` added, replacing those with the same operation, shape and dtypes.

    Device and provenance are those of ``new``. What ``old`` skips stays in it, too, unless it is replaced; so
    do entries of which ``keeps`` says that they are not to be replaced.

    Raises:
        TuningFileError: the files are of different devices.
    """
    if (old.device.name, old.device.arch) != (new.device.name, new.device.arch):
        raise TuningFileError(
            f"cannot merge results for {new.device.name} ({new.device.arch}) into a file for "
            f"{old.device.name} ({old.device.arch}); write them to another file"
        )
    coming = {e.key: e for e in new.entries}
    kept = tuple(e for e in old.entries if e.key not in coming or keeps(e, coming[e.key]))
    fresh = tuple(e for e in new.entries if e.key not in {k.key for k in kept})
    answered = {e.key for e in kept + fresh}
    skipped = {e.key: e for e in old.skipped + new.skipped if e.key not in answered}
    return new.model_copy(update={"entries": kept + fresh}).skipping(skipped.values())
