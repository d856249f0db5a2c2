"""Measured spaces in files: all candidates of a problem, or a share of them, with all samples of their times.

Files are T4 results (schema 1.0.0 of the autotuning community), compressed: see `save`.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmkan_gen.plan import Constant
from lmkan_gen.problem import LayerShape, Operation, TableDtype
from lmkan_gen.tuner.measure import Timing
from lmkan_gen.tuner.space import Candidate
from lmkan_gen.tuner.worker import Rejected

DIRECTORY = Path(__file__).parent / "spaces"
_SCHEMA = "1.0.0"
_CORRECT = "correct"
#: what T4 calls the tuner's reasons
_INVALIDITY = {"compile": "compile", "spills": "constraints", "verify": "correctness", "timeout": "timeout"}
_OTHER = "runtime"


@dataclass(frozen=True)
class Measured:
    """How a candidate did, and the seconds that it took to compile (its share of a batch) and to measure."""

    result: Timing | Rejected
    compilation_s: float
    benchmark_s: float


@dataclass(frozen=True)
class Record:
    """The measured space of a problem.

    Attributes:
        device: the model.
        operation, shape, table: the problem.
        values: per family, the values of each parameter that the space is made of: fewer than the family's
            where all would have been too many to measure. Every point of these that can run was tried.
        seeds: where a search would begin: what tuning files have for similar problems, and defaults.
        results: each candidate's, in the order of their measurements.
    """

    device: str
    operation: Operation
    shape: LayerShape
    table: TableDtype
    values: Mapping[str, Mapping[str, tuple[Constant, ...]]]
    seeds: tuple[Candidate, ...]
    results: Mapping[Candidate, Measured]

    @property
    def name(self) -> str:
        """Of its file, without suffix."""
        return f"{self.operation}-{self.table}-{str(self.shape).replace(',', 'x')}"

    def timings(self) -> dict[Candidate, Timing]:
        """Of the candidates that ran."""
        return {c: m.result for c, m in self.results.items() if isinstance(m.result, Timing)}


def save(record: Record, directory: Path) -> Path:
    """Write ``<directory>/<name>.json.gz`` and return its path."""
    path = directory / f"{record.name}.json.gz"
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(t4(record), separators=(",", ":"))
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
    return path


def load(path: Path) -> Record:
    """Read what `save` wrote."""
    content = json.loads(gzip.decompress(path.read_bytes()))
    about = content["metadata"]
    return Record(
        device=about["device"],
        operation=Operation(about["operation"]),
        shape=LayerShape(*about["shape"]),
        table=TableDtype(about["table"]),
        values={f: {n: tuple(v) for n, v in of.items()} for f, of in about["values"].items()},
        seeds=tuple(_candidate(c) for c in about["seeds"]),
        results=dict(_measured(r) for r in content["results"]),
    )


def t4(record: Record) -> dict[str, Any]:
    """The record as a T4 results file; what T4 has no place for stands in its metadata."""
    s = record.shape
    return {
        "schema_version": _SCHEMA,
        "metadata": {
            "timeunit": "milliseconds",
            "device": record.device,
            "operation": str(record.operation),
            "shape": [s.inputs, s.outputs, s.grids, s.batch],
            "table": str(record.table),
            "values": {f: {n: list(v) for n, v in of.items()} for f, of in record.values.items()},
            "seeds": [_configuration(c) for c in record.seeds],
        },
        "results": [_result(c, m) for c, m in record.results.items()],
    }


def _result(candidate: Candidate, measured: Measured) -> dict[str, Any]:
    result = measured.result
    ran = isinstance(result, Timing)
    times: dict[str, Any] = {
        "compilation_time": round(1e3 * measured.compilation_s, 1),
        "compilation": round(1e3 * measured.compilation_s, 1),
        "benchmark": round(1e3 * measured.benchmark_s, 1),
        "framework": 0,
        "search_algorithm": 0,
        "validation": 0,
        "runtimes": [_ms(us) for us in result.samples] if isinstance(result, Timing) else [],
    }
    made: dict[str, Any] = {
        "configuration": _configuration(candidate),
        "objectives": ["time"],
        "times": times,
        "invalidity": _CORRECT,
        "correctness": int(ran),
        "measurements": [],
    }
    if isinstance(result, Timing):
        made["measurements"] = [{"name": "time", "value": _ms(result.median), "unit": "ms"}]
    else:
        made["invalidity"] = _INVALIDITY.get(result.reason, _OTHER)
        made["reason"] = result.reason
    return made


def _measured(result: Mapping[str, Any]) -> tuple[Candidate, Measured]:
    times = result["times"]
    found: Timing | Rejected
    if result["invalidity"] == _CORRECT:
        found = Timing(tuple(1e3 * ms for ms in times["runtimes"]))
    else:
        found = Rejected(result["reason"], result["reason"])
    measured = Measured(found, 1e-3 * times["compilation"], 1e-3 * times["benchmark"])
    return _candidate(result["configuration"]), measured


def _configuration(candidate: Candidate) -> dict[str, Constant]:
    return {"family": candidate.family, **candidate.parameters}


def _candidate(configuration: Mapping[str, Constant]) -> Candidate:
    parameters = {n: v for n, v in configuration.items() if n != "family"}
    return Candidate.make(str(configuration["family"]), parameters)


def _ms(us: float) -> float:
    """Milliseconds, to the nanosecond."""
    return round(1e-3 * us, 6)
