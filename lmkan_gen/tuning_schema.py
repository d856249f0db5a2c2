"""The JSON Schema of tuning files, for editors: it knows every family's parameters and their values.

python -m lmkan_gen.tuning_schema           write it anew, beside the shipped files
python -m lmkan_gen.tuning_schema --check   exit code 1 when it is not that of the models and families
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

from lmkan_gen.families import Family, families
from lmkan_gen.problem import Operation, TableDtype
from lmkan_gen.resources import resource_directory
from lmkan_gen.tuning_file import SCHEMA_FILE, TuningFile


def schema() -> dict[str, Any]:
    """What `lmkan_gen.tuning_file.load` accepts, as far as a schema can say it."""
    found = TuningFile.model_json_schema(by_alias=True)
    entry = found["$defs"]["Entry"]
    asked = product(("cpu", "cuda"), Operation, TableDtype)
    known = {f.name: f for problem in asked for f in families(*problem)}
    entry["properties"]["family"]["enum"] = sorted(known)
    entry["allOf"] = [
        _rule(family, operation)
        for _, family in sorted(known.items())
        for operation in sorted(family.operations)
    ]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


def _rule(family: Family, operation: Operation) -> dict[str, Any]:
    """For entries of ``family`` and ``operation``: which parameters they have."""
    space = family.space(operation)
    return {
        "if": {"properties": {"family": {"const": family.name}, "operation": {"const": str(operation)}}},
        "then": {
            "properties": {
                "parameters": {
                    "properties": {name: {"enum": list(values)} for name, values in space.items()},
                    "required": sorted(space),
                    "additionalProperties": False,
                }
            }
        },
    }


def text() -> str:
    """The schema as the file holds it."""
    return json.dumps(schema(), indent=1) + "\n"


def path() -> Path:
    """Where it is shipped."""
    return resource_directory("tuning") / SCHEMA_FILE


def main(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit code 1 if it differs.")] = False,
) -> None:
    """Write the JSON Schema of tuning files."""
    if not check:
        path().write_text(text())
        typer.echo(str(path()))
    elif not path().is_file() or path().read_text() != text():
        typer.echo(f"{path()} is out of date; write it again with: make golden", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
