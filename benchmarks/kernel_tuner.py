"""Records as cache files of Kernel Tuner, whose strategies can then be tried on them without a GPU.

A file is about one kernel family, since all configurations of a file have the same parameters:

    python -m benchmarks.kernel_tuner benchmarks/spaces/*.json.gz --output caches
    python -c "import kernel_tuner; kernel_tuner.tune_cache('caches/...json', strategy='genetic_algorithm')"
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.records import Measured, Record, load
from lmkan_gen.tuner.measure import Timing

#: what Kernel Tuner calls the tuner's reasons
_ERRORS = {"compile": "CompilationFailedConfig", "spills": "InvalidConfig"}
_OTHER_ERROR = "RuntimeFailedConfig"


def cache(record: Record, family: str) -> dict[str, Any]:
    """The content of a cache file, in Kernel Tuner's order; ``family`` is one of the record's."""
    measured = {c: m for c, m in record.results.items() if c.family == family}
    names = list(next(iter(measured)).parameters)
    s = record.shape
    return {
        "device_name": record.device,
        "kernel_name": f"{family}_{record.operation}_{record.table}",
        "problem_size": [s.inputs, s.outputs, s.grids, s.batch],
        "tune_params_keys": names,
        "tune_params": {
            n: sorted({c.parameters[n] for c in measured}, key=lambda v: (str(type(v)), v)) for n in names
        },
        "objective": "time",
        "cache": {
            ",".join(str(value) for _, value in c.settings): {**c.parameters, **_outcome(m)}
            for c, m in measured.items()
        },
    }


def _outcome(measured: Measured) -> dict[str, Any]:
    result = measured.result
    took = {"compile_time": 1e3 * measured.compilation_s, "verification_time": 0, "framework_time": 0}
    took |= {"strategy_time": 0, "benchmark_time": 1e3 * measured.benchmark_s}
    if isinstance(result, Timing):
        times = [1e-3 * us for us in result.samples]
        return {"time": 1e-3 * result.median, "times": times, **took}
    error = _ERRORS.get(result.reason, _OTHER_ERROR)
    return {"time": error, "__error__": error, **took}


def main(
    record: Annotated[list[Path], typer.Argument(help="Files of benchmarks.record.")],
    output: Annotated[Path, typer.Option(help="Directory for the cache files.")],
) -> None:
    """Write a cache file for each record and family."""
    output.mkdir(parents=True, exist_ok=True)
    for path in record:
        measured = load(path)
        for family in sorted({c.family for c in measured.results}):
            content = json.dumps(cache(measured, family))
            (output / f"{measured.name}-{family}.json").write_text(content)


if __name__ == "__main__":
    typer.run(main)
