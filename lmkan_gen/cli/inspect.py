"""`lmkan-gen inspect`: read the kernel that a layer call would run; compare tuning files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lmkan_gen.cli.options import OperationName, TableOption, parse_shape, parse_target

if TYPE_CHECKING:
    from lmkan_gen.compare import Difference
    from lmkan_gen.plan import LaunchPlan
    from lmkan_gen.selection import Choice
    from lmkan_gen.toolchain import Binary

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

    from lmkan_gen.problem import Operation, Problem, TableDtype
    from lmkan_gen.selection import select, select_backward

    problem = Problem.usual(Operation(operation), parse_shape(shape), parse_target(target), TableDtype(table))
    if what in ("ptx", "sass", "resources") and problem.device.kind == "cpu":
        raise typer.BadParameter(f"{what} exists for sm_75 ... sm_120 only", param_hint="--what")
    choices = select_backward(problem) if problem.operation is Operation.BACKWARD else (select(problem),)
    if what == "choice":
        for choice in choices:
            typer.echo(choice.describe())
        return
    for choice in choices:
        typer.echo(f"// {choice.describe()}")
        typer.echo(_text(choice, what))


def _print_differences(a: Path, b: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from lmkan_gen.compare import compare
    from lmkan_gen.text import printable
    from lmkan_gen.tuner.report import duration
    from lmkan_gen.tuning_file import load

    one, two = load(a), load(b)
    console = Console()
    devices = [f"{file.device.name} ({file.device.arch})" for file in (one, two)]
    if devices[0] != devices[1]:
        console.print(Text(f"A is of {devices[0]}, B of {devices[1]}"), soft_wrap=True)
    table = Table(title=Text(f"A = {printable(a)}, B = {printable(b)}"))
    for heading in ("call", "shape"):
        table.add_column(heading)
    for heading in ("A", "B", "B faster"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("kernel, A -> B", overflow="fold")
    for d in compare(one, two):
        entry = d.a or d.b
        assert entry is not None
        dtype = "" if entry.dtypes.table == "float32" else f" {entry.dtypes.table}"
        times = [duration(e.time_us.median) if e else "-" for e in (d.a, d.b)]
        table.add_row(entry.operation, f"{entry.shape.layer}{dtype}", *times, *_words(d))
    console.print(table)


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
    from lmkan_gen import codegen
    from lmkan_gen.families import family

    if choice.family is None:
        raise RuntimeError(f"there is no generated kernel to show: {choice.describe()}")
    chosen = family(choice.family)
    spec = chosen.spec(choice.problem, choice.parameters)
    if what == "source":
        return codegen.render(spec)

    from lmkan_gen import toolchain

    if what == "ptx":
        return toolchain.ptx(spec)
    binary = toolchain.binary(spec)
    if what == "sass":
        return toolchain.sass(binary)
    return _resources(binary, chosen.plan(choice.problem, choice.parameters))


def _resources(binary: Binary, plan: LaunchPlan) -> str:
    """One line per kernel that the plan starts."""
    from lmkan_gen import toolchain
    from lmkan_gen.plan import Launch

    reported = {r.kernel: r for r in toolchain.resources(binary)}
    lines = []
    for step in plan.steps:
        if isinstance(step, Launch):
            r = reported[step.kernel]
            lines.append(
                f"{r.kernel}: {step.block} threads, {r.registers} registers per thread, "
                f"spills {r.spill_stores} bytes stored {r.spill_loads} loaded, stack {r.stack} bytes, "
                f"shared memory {r.static_shared} static + {step.shared_memory} dynamic bytes per block"
            )
    return "\n".join(lines)
