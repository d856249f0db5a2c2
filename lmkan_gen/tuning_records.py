"""What a tuning file holds: entries, the device that they were measured on, and what measured them.

Everything is bounded, since files come from elsewhere: what passes here cannot stop what reads it.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date
from functools import cached_property
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from lmkan_gen import families
from lmkan_gen.device import Device
from lmkan_gen.problem import LayerShape, Operation, TableDtype
from lmkan_gen.text import LONGEST, UNPRINTABLE

SCHEMA: Literal[1] = 1
#: interquartile range as a part of the median, at most, where nothing else uses a device (0.07 on an H200,
#: 0.05 on CPUs, where these were quiet)
STEADY = 0.15


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


#: of families, parameters and their values, limits
Name = Annotated[str, Field(pattern="^[A-Za-z_][A-Za-z0-9_]*$", max_length=64)]
#: of devices and versions
Text = Annotated[str, Field(pattern=f"^[^{UNPRINTABLE}]+$", max_length=LONGEST)]
Microseconds = Annotated[float, Field(gt=0, le=1e12)]
Count = Annotated[int, Field(ge=0, le=2**53)]
#: far beyond what memories hold, and far from what arithmetic cannot
Width = Annotated[int, Field(le=2**24)]
Grids = Annotated[int, Field(le=2**14)]
Batch = Annotated[int, Field(ge=1, le=2**40)]


class DeviceRecord(_Model):
    """The device that a file was measured on; see `lmkan_gen.device.Device` for the fields."""

    name: Text
    arch: Annotated[str, Field(pattern="^(sm_[1-9][0-9]{1,2}|x86-64-v[1-4]|generic)$")]
    multiprocessors: Annotated[int, Field(ge=1, le=2**16)]
    shared_memory_per_block: Annotated[int, Field(ge=0, le=2**30)]

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

    lmkan_gen: Text
    compiler: Text
    driver: Text | None = None
    torch: Text
    date: date


class ShapeRecord(_Model):
    """A layer shape; the lower limits are `lmkan_gen.problem.LayerShape`'s."""

    inputs: Width
    outputs: Width
    grids: Grids
    batch: Batch

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
    iqr: Annotated[float, Field(ge=0, le=1e12)]
    default: Microseconds | None = None
    reference: Microseconds | None = None


class Search(_Model):
    """How many candidates were tried, and how many each limit or failure rejected."""

    tried: Count
    rejected: Annotated[dict[Name, Count], Field(max_length=64)]


#: why a measurement says less than others: clocks or repetitions differ, others had the cores, the search
#: found another time, samples spread
Doubt = Literal["clocks", "load", "repeats", "search", "spread"]


class EntryRecord(_Model):
    """What an entry says, be it for kernels that this version has or not.

    ``source`` begins the SHA-256 of the rendered kernel that was timed (see `lmkan_gen.freshness`).
    ``measured_on`` names the device model that stood in where it was not the file's; times are its.
    ``unsteady`` says in what the times show that the device was busy or its clocks varied.
    """

    operation: Annotated[Operation, Field(strict=False)]
    shape: ShapeRecord
    dtypes: Dtypes
    family: Name
    parameters: Annotated[dict[Name, int | Name], Field(max_length=64)]
    source: Annotated[str, Field(pattern="^[0-9a-f]{16}$")] | None = None
    measured_on: Text | None = None
    unsteady: Annotated[tuple[Doubt, ...], Field(strict=False, max_length=5)] = ()
    time_us: Times
    search: Search

    @property
    def key(self) -> tuple[Operation, LayerShape, TableDtype, str]:
        """What an entry is the answer to: there is one entry per key in a file."""
        return (self.operation, self.shape.layer, self.dtypes.table, self.dtypes.input)

    @cached_property
    def misfit(self) -> str | None:
        """Why this version has no such kernel; None where it has."""
        try:
            family = families.family(self.family)
            if self.operation not in family.operations:
                return (
                    f"family {self.family} does not compute {self.operation}; "
                    f"it computes {', '.join(sorted(family.operations))}"
                )
            if not family.computes(self.operation, self.dtypes.table):
                fitting = ", ".join(t for t in TableDtype if family.computes(self.operation, t))
                return (
                    f"family {self.family} computes {self.operation} with {fitting} tables, "
                    f"not with {self.dtypes.table}"
                )
            family.check(self.operation, self.parameters)
        except ValueError as error:
            return str(error)
        return None

    @property
    def doubts(self) -> tuple[Doubt, ...]:
        """`unsteady`, and what the times themselves show."""
        spreads = self.time_us.iqr > STEADY * self.time_us.median
        return tuple(sorted({*self.unsteady, "spread"})) if spreads else self.unsteady

    def describe(self) -> str:
        """What it is the answer to, and why this version has no such kernel, where that is so."""
        table = "" if self.dtypes.table is TableDtype.FLOAT32 else f" with {self.dtypes.table} tables"
        return f"{self.operation} {self.shape.layer}{table}" + (f": {self.misfit}" if self.misfit else "")


class Entry(EntryRecord):
    """The fastest kernel found for one operation on one shape, which this version has."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.misfit is not None:
            raise ValueError(self.misfit)
        return self


class FileContent(_Model):
    """A tuning file as it stands there."""

    schema_: Literal[1] = Field(alias="schema")
    device: DeviceRecord
    provenance: Provenance
    entries: tuple[EntryRecord, ...]

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
            if entry.misfit is not None:
                continue
            kind = families.family(entry.family).device_kind
            if kind != self.device.kind:
                raise ValueError(
                    f"entry {i}: family {entry.family} is for {kind}, but the file's device "
                    f"{self.device.name} ({self.device.arch}) is {self.device.kind}"
                )
        return self


class TuningFile(FileContent):
    """Everything measured on one device model, as far as this version has the kernels."""

    entries: tuple[Entry, ...]
    _skipped: tuple[EntryRecord, ...] = PrivateAttr(())

    @property
    def skipped(self) -> tuple[EntryRecord, ...]:
        """Entries of the file for kernels that this version does not have."""
        return self._skipped

    @classmethod
    def make(cls, device: Device, provenance: Provenance, entries: tuple[Entry, ...]) -> Self:
        """A file of the current schema."""
        return cls(schema=SCHEMA, device=DeviceRecord.of(device), provenance=provenance, entries=entries)

    @classmethod
    def of(cls, content: FileContent) -> Self:
        """``content``, with what this version has no kernels for in `skipped`."""
        names = EntryRecord.model_fields
        fitting = [e for e in content.entries if e.misfit is None]
        file = cls(
            schema=content.schema_,
            device=content.device,
            provenance=content.provenance,
            # they are valid, and need not be checked again
            entries=tuple(Entry.model_construct(**{n: getattr(e, n) for n in names}) for e in fitting),
        )
        return file.skipping(e for e in content.entries if e.misfit is not None)

    def skipping(self, records: Iterable[EntryRecord]) -> Self:
        """The same file with these as `skipped`."""
        file = self.model_copy()
        file._skipped = tuple(records)
        return file
