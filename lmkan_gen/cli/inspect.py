"""`lmkan-gen inspect`: read the kernel that a layer call would run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lmkan_gen.cli.options import (
    OperationName,
    ShapeOption,
    TableOption,
    TargetOption,
    parse_shape,
    parse_target,
)

if TYPE_CHECKING:
    from lmkan_gen.plan import LaunchPlan
    from lmkan_gen.selection import Choice
    from lmkan_gen.toolchain import Binary

What = Literal["source", "ptx", "sass", "resources", "choice"]


def inspect_command(
    target: TargetOption,
    shape: ShapeOption,
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
) -> None:
    """Print the kernel a layer call would run on a target, or why that one was chosen.

    \b
    Examples:
      lmkan-gen inspect --target sm_90 --shape 128,128,26,1024
      lmkan-gen inspect --target sm_86 --shape 64,64,8,1024 --what choice
      lmkan-gen inspect --target cpu --shape 64,64,8,1024 --operation backward
      lmkan-gen inspect --target sm_120 --shape 64,64,8,1024 --what resources
    """
    from lmkan_gen.problem import Operation, Problem, TableDtype
    from lmkan_gen.selection import select, select_backward

    problem = Problem(Operation(operation), parse_shape(shape), parse_target(target), TableDtype(table))
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
