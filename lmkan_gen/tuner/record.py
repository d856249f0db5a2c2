"""What a tuning run did, candidate by candidate: a JSON file to make reports from."""

from __future__ import annotations

import os
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from lmkan_gen.plan import Constant
from lmkan_gen.problem import Operation
from lmkan_gen.toolchain import store
from lmkan_gen.tuner.measure import Timing
from lmkan_gen.tuner.roofline import Peaks
from lmkan_gen.tuner.space import Candidate, Space
from lmkan_gen.tuner.worker import Rejected
from lmkan_gen.tuning_file import DeviceRecord, Doubt, Dtypes, Entry, Provenance, Search, ShapeRecord, Times


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Trial(_Record):
    """One candidate and how it did: times in microseconds, or why it was rejected."""

    family: str
    parameters: dict[str, Constant]
    median: float | None = None
    iqr: float | None = None
    rejected: str | None = None
    message: str | None = None

    @classmethod
    def of(cls, candidate: Candidate, result: Timing | Rejected) -> Trial:
        """The record of a candidate's result."""
        if isinstance(result, Rejected):
            return cls(
                family=candidate.family,
                parameters=candidate.parameters,
                rejected=result.reason,
                message=str(result),
            )
        return cls(
            family=candidate.family, parameters=candidate.parameters, median=result.median, iqr=result.iqr
        )


class Winner(_Record):
    """What an entry says, free of its demand that the family still has these parameters."""

    operation: Operation
    shape: ShapeRecord
    dtypes: Dtypes
    family: str
    parameters: dict[str, Constant]
    time_us: Times
    search: Search
    unsteady: tuple[Doubt, ...] = ()


class ProblemRecord(_Record):
    """The search of one problem.

    ``feasible`` candidates could have been tried; ``pruned`` counts the others by the limit they break.
    ``ranking`` holds what the finalists and the default took when measured again, in turns. ``seconds``
    is wall-clock time, compilation included. ``ended_by_budget``: not all were tried that should have been.
    """

    entry: Winner
    default: Trial | None
    feasible: int
    pruned: dict[str, int]
    trials: tuple[Trial, ...]
    ranking: tuple[Trial, ...]
    seconds: float
    ended_by_budget: bool = False

    @classmethod
    def of(
        cls,
        entry: Entry,
        space: Space,
        results: dict[Candidate, Timing | Rejected],
        ranking: dict[Candidate, Timing],
        seconds: float,
        ended_by_budget: bool,
    ) -> ProblemRecord:
        """The record of a finished search."""
        default = space.default
        return cls(
            entry=Winner(
                operation=entry.operation,
                shape=entry.shape,
                dtypes=entry.dtypes,
                family=entry.family,
                parameters=entry.parameters,
                time_us=entry.time_us,
                search=entry.search,
                unsteady=entry.unsteady,
            ),
            default=Trial.of(default, results[default]) if default and default in results else None,
            feasible=space.tally.candidates,
            pruned=dict(space.tally.rejected),
            trials=tuple(Trial.of(c, r) for c, r in results.items()),
            ranking=tuple(Trial.of(c, t) for c, t in ranking.items()),
            seconds=seconds,
            ended_by_budget=ended_by_budget,
        )


class RunRecord(_Record):
    """A tuning run. ``peaks`` are None where they could not be measured."""

    schema_version: Literal[1] = 1
    started: datetime
    device: DeviceRecord
    provenance: Provenance
    peaks: Peaks | None
    problems: tuple[ProblemRecord, ...]


def directory() -> Path:
    """Where records of runs lie."""
    return store.place("runs")


def save(path: Path, run: RunRecord) -> None:
    """Write a record, whole or not at all."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(run.model_dump_json(indent=1))
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load(path: Path) -> RunRecord:
    """Read a record.

    Raises:
        ValueError: it is not one; says in one line what is wrong with it.
        OSError: it cannot be read.
    """
    try:
        return RunRecord.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {first['msg']}" if where else first["msg"]) from error


def latest() -> Path | None:
    """The newest record; None when nothing was tuned yet."""
    return max(directory().glob("*.json"), key=lambda path: path.name, default=None)
