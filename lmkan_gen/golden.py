"""The rendered sources of the shipped choices, written to ``generated/`` so that anyone can read them.

python -m lmkan_gen.golden           write them anew
python -m lmkan_gen.golden --check   exit code 1 when they are not those of templates and tuning files
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from lmkan_gen import codegen
from lmkan_gen.device import CUDA_ARCHITECTURES, KIB, Device, target
from lmkan_gen.families import family
from lmkan_gen.plan import KernelSpec
from lmkan_gen.problem import Problem, TableDtype
from lmkan_gen.resources import resource_directory
from lmkan_gen.tuning_file import DeviceRecord, TuningFile, load

_SUFFIXES = (".cu", ".cpp")


def specs(file: TuningFile) -> Iterator[tuple[Problem, KernelSpec]]:
    """Each entry's problem, on the file's device, and the kernel that answers it."""
    device = _device(file.device)
    for entry in file.entries:
        problem = Problem.usual(entry.operation, entry.shape.layer, device, entry.dtypes.table)
        yield problem, family(entry.family).spec(problem, entry.parameters)


def _device(record: DeviceRecord) -> Device:
    shared = _shared_memory_per_multiprocessor(record) if record.kind == "cuda" else 0
    return Device(
        record.kind,
        record.name,
        record.arch,
        record.multiprocessors,
        record.shared_memory_per_block,
        shared,
    )


def _shared_memory_per_multiprocessor(record: DeviceRecord) -> int:
    if record.arch in CUDA_ARCHITECTURES:  # all GPUs of one have the same
        return target(record.arch).shared_memory_per_multiprocessor
    return record.shared_memory_per_block + KIB  # what CUDA keeps of each block


def sources(tuning: Path) -> dict[Path, str]:
    """File name, relative to the output directory, and text of every kernel in ``tuning``'s YAML files.

    Raises:
        lmkan_gen.tuning_file.TuningFileError: a file is not valid.
    """
    found = {}
    for path in sorted(tuning.glob("*.yaml")):
        for problem, spec in specs(load(path)):
            text, shape = codegen.render(spec), problem.shape
            digest = hashlib.sha256(text.encode()).hexdigest()[:8]
            # no batch: it does not change the source
            table = "" if problem.table is TableDtype.FLOAT32 else f"_{problem.table}"
            name = f"{problem.operation}{table}_{shape.inputs}x{shape.outputs}_g{shape.grids}_{digest}"
            found[Path(path.stem, name + (".cu" if spec.is_cuda else ".cpp"))] = text
    return found


def write(tuning: Path, output: Path) -> int:
    """Make the sources in ``output`` those of `sources`, and count them; stale ones are removed."""
    wanted = sources(tuning)
    for name in _present(output) - wanted.keys():
        (output / name).unlink()
    for name, text in wanted.items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_bytes(text.encode())
    return len(wanted)


def differences(tuning: Path, output: Path) -> list[str]:
    """What `write` would change, one line per file; empty when all is up to date."""
    wanted, present = sources(tuning), _present(output)
    found = dict.fromkeys(wanted.keys() - present, "missing")
    found |= dict.fromkeys(present - wanted.keys(), "stale")
    for name in wanted.keys() & present:
        if (output / name).read_bytes() != wanted[name].encode():
            found[name] = "different"
    return [f"{what}: {output / name}" for name, what in sorted(found.items())]


def _present(output: Path) -> set[Path]:
    return {path.relative_to(output) for path in output.glob("*/*") if path.suffix in _SUFFIXES}


def main(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit code 1 names what differs.")
    ] = False,
) -> None:
    """Render the kernels of the shipped tuning files into generated/."""
    tuning = resource_directory("tuning")
    output = tuning.parent / "generated"
    if not check:
        typer.echo(f"{output}: {write(tuning, output)} sources")
    elif found := differences(tuning, output):
        typer.echo("\n".join(found), err=True)
        typer.echo("render them again with: make golden", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
