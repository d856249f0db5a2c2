"""`lmkan-gen inspect`: read the kernel that a layer call would run; compare tuning files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lmkan_gen.cli.options import OperationName, TableOption, parse_shape, parse_target, print_json

if TYPE_CHECKING:
    from lmkan_gen.compare import Difference
    from lmkan_gen.problem import Problem
    from lmkan_gen.selection import Choice

What = Literal["source", "ptx", "sass", "resources", "choice"]


def inspect_command(
    target: Annotated[
        str | None, typer.Option(metavar="TARGET", help="cpu (this machine's) or sm_75 ... sm_120.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(metavar="IN,OUT,GRIDS,BATCH", help="Sizes of the layer call.")
    ] = None,
    operation: Annotated[
        OperationName,
        typer.Option(help="backward: the kernels for both gradients, one fused or two."),
    ] = "forward",
    table: TableOption = "float32",
    what: Annotated[
        What,
        typer.Option(
            help="source and choice need neither GPU nor compiler; the others need nvcc and an sm_XY target."
        ),
    ] = "source",
    why: Annotated[
        bool,
        typer.Option(
            "--why", help="With --what choice: runners-up, their times, and why other families cannot run."
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, for programs; with --what choice or resources.")
    ] = False,
    diff: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="A.yaml B.yaml", help="Compare two tuning files instead."),
    ] = None,
) -> None:
    """Print the kernel a layer call would run on a target, or why that one was chosen.

    \b
    Examples:
      lmkan-gen inspect --target sm_90 --shape 128,128,26,1024
      lmkan-gen inspect --target sm_86 --shape 64,64,8,1024 --what choice
      lmkan-gen inspect --target sm_86 --shape 64,64,8,1024 --what choice --why
      lmkan-gen inspect --target cpu --shape 64,64,8,1024 --operation backward
      lmkan-gen inspect --target sm_120 --shape 64,64,8,1024 --what resources
      lmkan-gen inspect --diff before.yaml after.yaml
    """
    if diff is not None:
        if target is not None or shape is not None:
            raise typer.BadParameter("goes without --target and --shape", param_hint="--diff")
        _print_differences(*diff)
        return
    if target is None:
        raise typer.BadParameter("say for which device", param_hint="--target")
    if shape is None:
        raise typer.BadParameter("say for which layer call", param_hint="--shape")

    if why and what != "choice":
        raise typer.BadParameter(f"goes with --what choice, not with --what {what}", param_hint="--why")
    if as_json and what not in ("choice", "resources"):
        raise typer.BadParameter(f"goes with --what choice or resources, not {what}", param_hint="--json")

    from lmkan_gen.cli.why import choice_as_data, choice_in_words
    from lmkan_gen.problem import Operation, Problem, TableDtype
    from lmkan_gen.selection import select, select_backward

    problem = Problem.usual(Operation(operation), parse_shape(shape), parse_target(target), TableDtype(table))
    if what in ("ptx", "sass", "resources") and problem.device.kind == "cpu":
        raise typer.BadParameter(f"{what} exists for sm_75 ... sm_120 only", param_hint="--what")
    choices = select_backward(problem) if problem.operation is Operation.BACKWARD else (select(problem),)
    if what == "choice":
        if as_json:
            print_json([choice_as_data(choice, why=why) for choice in choices])
            return
        for choice in choices:
            typer.echo(choice_in_words(choice) if why else choice.describe())
        if why and problem.operation is Operation.BACKWARD:
            _tell_other_way(problem, choices)
        return
    if what == "resources" and as_json:
        print_json([{**choice_as_data(c, why=False), "kernels": _resources_of(c)} for c in choices])
        return
    for choice in choices:
        typer.echo(f"// {choice.describe()}")
        typer.echo(_text(choice, what))


def _tell_other_way(problem: Problem, taken: Sequence[Choice]) -> None:
    """One kernel for both gradients where two were taken, and the other way round."""
    from lmkan_gen.families import families
    from lmkan_gen.problem import Operation
    from lmkan_gen.selection import select

    both = len(taken) > 1
    others = (Operation.BACKWARD,) if both else (Operation.GRAD_INPUT, Operation.GRAD_TABLE)
    typer.echo(f"the other way, {'one kernel for both gradients' if both else 'a kernel for each gradient'}:")
    for operation in others:
        if families(problem.device.kind, operation, problem.table):
            typer.echo(f"  {select(replace(problem, operation=operation)).describe()}")
        else:
            typer.echo(f"  there is none for {problem.table} tables on {problem.device.name}")


def _print_differences(a: Path, b: Path) -> None:
    from rich.console import Console
    from rich.text import Text

    from lmkan_gen.compare import compare
    from lmkan_gen.sheet import Column, Sheet
    from lmkan_gen.text import printable
    from lmkan_gen.tuner.report import duration
    from lmkan_gen.tuning_file import load

    one, two = load(a), load(b)
    console = Console()
    devices = [f"{file.device.name} ({file.device.arch})" for file in (one, two)]
    if devices[0] != devices[1]:
        console.print(Text(f"A is of {devices[0]}, B of {devices[1]}"), soft_wrap=True)
    sheet = Sheet(
        [
            *map(Column, ("call", "shape")),
            *(Column(heading, number=True) for heading in ("A", "B", "B faster")),
            Column("kernel, A -> B", words=True),
        ],
        f"A = {printable(a)}, B = {printable(b)}",
    )
    for d in compare(one, two):
        entry = d.a or d.b
        assert entry is not None
        dtype = "" if entry.dtypes.table == "float32" else f" {entry.dtypes.table}"
        times = [duration(e.time_us.median) if e else "-" for e in (d.a, d.b)]
        sheet.add(entry.operation, f"{entry.shape.layer}{dtype}", *times, *_words(d))
    sheet.print(console)


def _words(d: Difference) -> tuple[str, str]:
    """How much faster, and what is different in the kernel."""
    if d.speedup is None:
        return "-", f"only in {'A' if d.b is None else 'B'}"
    changes = ", ".join(
        f"{name} {'-' if a is None else a} -> {'-' if b is None else b}" for name, (a, b) in d.changes.items()
    )
    from lmkan_gen.tuner.report import ratio

    return f"{ratio(d.speedup, 2)}{' (noise)' if d.is_noise else ''}", changes or "the same"


def _text(choice: Choice, what: What) -> str:
    from lmkan_gen import codegen, toolchain
    from lmkan_gen.families import family

    spec = family(_family(choice)).spec(choice.problem, choice.parameters)
    if what == "source":
        return codegen.render(spec)
    if what == "ptx":
        return toolchain.ptx(spec)
    if what == "sass":
        return toolchain.sass(toolchain.binary(spec))
    return "\n".join(
        f"{r['kernel']}: {r['threads']} threads, {r['registers']} registers per thread, "
        f"spills {r['spill_stores']} bytes stored {r['spill_loads']} loaded, stack {r['stack']} bytes, "
        f"shared memory {r['static_shared']} static + {r['dynamic_shared']} dynamic bytes per block"
        for r in _resources_of(choice)
    )


def _family(choice: Choice) -> str:
    if choice.family is None:
        raise RuntimeError(f"there is no generated kernel to show: {choice.describe()}")
    return choice.family


def _resources_of(choice: Choice) -> list[dict[str, str | int]]:
    """Of each kernel that the choice's plan starts: threads, registers; spills and memory in bytes."""
    from lmkan_gen import toolchain
    from lmkan_gen.families import family
    from lmkan_gen.plan import Launch

    chosen = family(_family(choice))
    binary = toolchain.binary(chosen.spec(choice.problem, choice.parameters))
    reported = {r.kernel: r for r in toolchain.resources(binary)}
    found: list[dict[str, str | int]] = []
    for step in chosen.plan(choice.problem, choice.parameters).steps:
        if isinstance(step, Launch):
            r = asdict(reported[step.kernel])
            found.append({**r, "threads": step.block, "dynamic_shared": step.shared_memory})
    return found
