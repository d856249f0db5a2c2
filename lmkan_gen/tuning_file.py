"""Tuning files: the YAML that the tuner writes and selection reads, one file per device model.

A file is validated down to single parameter values when it is loaded, because those values end up
in generated source.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lmkan_gen import families
from lmkan_gen.device import Device
from lmkan_gen.plan import Constant
from lmkan_gen.problem import LayerShape, Operation, TableDtype

SCHEMA: Literal[1] = 1
#: name of the JSON Schema that lies beside the shipped files
SCHEMA_FILE = "schema.json"
#: tells editors where it is
_MODELINE = f"# yaml-language-server: $schema={SCHEMA_FILE}\n"
_MAX_REPORTED = 20


class TuningFileError(ValueError):
    """A tuning file that cannot be used; the message names file, entry, key, value and remedy."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


Microseconds = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]


class DeviceRecord(_Model):
    """The device that a file was measured on; see `lmkan_gen.device.Device` for the fields."""

    name: Annotated[str, Field(min_length=1)]
    arch: Annotated[str, Field(min_length=1)]
    multiprocessors: Annotated[int, Field(ge=1)]
    shared_memory_per_block: Count

    @property
    def kind(self) -> Literal["cpu", "cuda"]:
        """``"cuda"`` for ``sm_XY`` architectures, else ``"cpu"``."""
        return "cuda" if self.arch.startswith("sm_") else "cpu"

    @classmethod
    def of(cls, device: Device) -> Self:
        """The record of ``device``."""
        return cls(
            name=device.name,
            arch=device.arch,
            multiprocessors=device.multiprocessors,
            shared_memory_per_block=device.shared_memory_per_block,
        )


class Provenance(_Model):
    """What measured the entries: versions as text, the day of the last run."""

    lmkan_gen: str
    compiler: str
    driver: str | None = None
    torch: str
    date: date


class ShapeRecord(_Model):
    """A layer shape; the limits are `lmkan_gen.problem.LayerShape`'s."""

    inputs: int
    outputs: int
    grids: int
    batch: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _is_a_layer(self) -> Self:
        _ = self.layer
        return self

    @cached_property
    def layer(self) -> LayerShape:
        """The same as a `LayerShape`."""
        return LayerShape(self.inputs, self.outputs, self.grids, self.batch)

    @classmethod
    def of(cls, shape: LayerShape) -> Self:
        """The record of ``shape``."""
        return cls(inputs=shape.inputs, outputs=shape.outputs, grids=shape.grids, batch=shape.batch)


class Dtypes(_Model):
    """Element types of the table and of the inputs."""

    table: Annotated[TableDtype, Field(strict=False)] = TableDtype.FLOAT32
    input: Literal["float32"] = "float32"


class Times(_Model):
    """Measured times in microseconds, per call and as deployed.

    ``iqr`` is the interquartile range of the winner's samples, ``default`` the median of the
    analytic default and ``reference`` that of the plain torch fallback (None: not measured).
    """

    median: Microseconds
    iqr: Annotated[float, Field(ge=0)]
    default: Microseconds | None = None
    reference: Microseconds | None = None


class Search(_Model):
    """How many candidates were tried, and how many each limit or failure rejected."""

    tried: Count
    rejected: dict[str, Count]


class Entry(_Model):
    """The fastest kernel found for one operation on one shape.

    ``source`` begins the SHA-256 of the rendered kernel that was timed (see `lmkan_gen.freshness`).
    ``measured_on`` names the device model that stood in where it was not the file's; times are its.
    """

    operation: Annotated[Operation, Field(strict=False)]
    shape: ShapeRecord
    dtypes: Dtypes
    family: str
    parameters: dict[str, Constant]
    source: Annotated[str, Field(pattern="^[0-9a-f]{16}$")] | None = None
    measured_on: Annotated[str, Field(min_length=1)] | None = None
    time_us: Times
    search: Search

    @model_validator(mode="after")
    def _family_has_these_parameters(self) -> Self:
        family = families.family(self.family)
        if self.operation not in family.operations:
            raise ValueError(
                f"family {self.family} does not compute {self.operation}; "
                f"it computes {', '.join(sorted(family.operations))}"
            )
        if not family.computes(self.operation, self.dtypes.table):
            fitting = ", ".join(t for t in TableDtype if family.computes(self.operation, t))
            raise ValueError(
                f"family {self.family} computes {self.operation} with {fitting} tables, "
                f"not with {self.dtypes.table}"
            )
        family.check(self.operation, self.parameters)
        return self

    @property
    def key(self) -> tuple[Operation, LayerShape, TableDtype, str]:
        """What an entry is the answer to: there is one entry per key in a file."""
        return (self.operation, self.shape.layer, self.dtypes.table, self.dtypes.input)


class TuningFile(_Model):
    """Everything measured on one device model."""

    schema_: Literal[1] = Field(alias="schema")
    device: DeviceRecord
    provenance: Provenance
    entries: tuple[Entry, ...]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        seen: dict[object, int] = {}
        for i, entry in enumerate(self.entries):
            if entry.key in seen:
                raise ValueError(
                    f"entries {seen[entry.key]} and {i} both answer {entry.operation} {entry.shape.layer}; "
                    "keep one of them"
                )
            seen[entry.key] = i
            kind = families.family(entry.family).device_kind
            if kind != self.device.kind:
                raise ValueError(
                    f"entry {i}: family {entry.family} is for {kind}, but the file's device "
                    f"{self.device.name} ({self.device.arch}) is {self.device.kind}"
                )
        return self

    @classmethod
    def make(cls, device: Device, provenance: Provenance, entries: tuple[Entry, ...]) -> Self:
        """A file of the current schema."""
        return cls(schema=SCHEMA, device=DeviceRecord.of(device), provenance=provenance, entries=entries)


def load(path: Path) -> TuningFile:
    """Read and validate a tuning file.

    Raises:
        TuningFileError: unreadable, malformed YAML, or content that breaks the schema or that is
            not one of a family's parameters.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TuningFileError(f"{path}: cannot be read: {error}") from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise TuningFileError(f"{path}: malformed YAML: {error}") from error
    if not isinstance(content, dict):
        raise TuningFileError(
            f"{path}: must hold a mapping with the keys schema, device, provenance and entries, "
            f"got {type(content).__name__}"
        )
    # strict mode asks for a tuple, YAML knows only lists
    if isinstance(content.get("entries"), list):
        content = {**content, "entries": tuple(content["entries"])}
    try:
        return TuningFile.model_validate(content)
    except ValidationError as error:
        raise TuningFileError("\n".join(_explain(path, content, error))) from error


def _explain(path: Path, content: dict[str, Any], error: ValidationError) -> Iterator[str]:
    details = error.errors(include_url=False)
    for detail in details[:_MAX_REPORTED]:
        where = list(detail["loc"])
        prefix = f"{path}: "
        if len(where) >= 2 and where[0] == "entries" and isinstance(where[1], int):
            prefix += f"entry {where[1]}{_summary(content['entries'][where[1]])}: "
            where = where[2:]
        if where:
            prefix += ".".join(map(str, where)) + ": "
        message = detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            message = "unknown key; remove it or correct its spelling"
        elif detail["type"] == "missing":
            message = "is missing"
        elif detail["type"] == "tuple_type":
            message = "Input should be a valid list"
        value = detail["input"]
        shown = "" if isinstance(value, dict | list | tuple | BaseModel) else f" (got {value!r})"
        yield f"{prefix}{message}{shown}"
    if len(details) > _MAX_REPORTED:
        yield f"{path}: and {len(details) - _MAX_REPORTED} more"


def _summary(entry: object) -> str:
    """Operation and sizes of an entry that may be malformed."""
    if not isinstance(entry, dict):
        return ""
    shape = entry.get("shape")
    sizes = ",".join(str(v) for v in shape.values()) if isinstance(shape, dict) else ""
    return f" ({entry.get('operation', '?')} {sizes})".replace(" )", ")")


def dump(file: TuningFile) -> str:
    """The YAML text of ``file``: entries ordered by operation and shape, the same for equal files."""
    content = file.model_dump(mode="json", by_alias=True)
    content["provenance"]["date"] = file.provenance.date
    order = list(Operation)
    tables = list(TableDtype)
    entries = sorted(
        file.entries,
        key=lambda e: (order.index(e.operation), tables.index(e.dtypes.table), e.shape.layer),
    )
    content["entries"] = [e.model_dump(mode="json") for e in entries]
    for entry in content["entries"]:
        entry["parameters"] = dict(sorted(entry["parameters"].items()))
        for optional in ("source", "measured_on"):
            if entry[optional] is None:
                del entry[optional]
        entry["search"]["rejected"] = dict(sorted(entry["search"]["rejected"].items()))
    # default_flow_style=None puts the innermost mappings on one line each
    return yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)


def save(path: Path, file: TuningFile) -> None:
    """Write ``file`` to ``path``, whole or not at all; missing parent directories are made.

    Raises:
        OSError: the directory cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            if (path.parent / SCHEMA_FILE).is_file():
                stream.write(_MODELINE)
            stream.write(dump(file))
        temporary.chmod(0o644)  # mkstemp makes it private; a tuning file is there to be shared
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def merge(old: TuningFile, new: TuningFile) -> TuningFile:
    """``old`` with the entries of ``new`` added, replacing those with the same operation, shape and dtypes.

    Device and provenance are those of ``new``.

    Raises:
        TuningFileError: the files are of different devices.
    """
    if (old.device.name, old.device.arch) != (new.device.name, new.device.arch):
        raise TuningFileError(
            f"cannot merge results for {new.device.name} ({new.device.arch}) into a file for "
            f"{old.device.name} ({old.device.arch}); write them to another file"
        )
    replaced = {e.key for e in new.entries}
    kept = tuple(e for e in old.entries if e.key not in replaced)
    return new.model_copy(update={"entries": kept + new.entries})
