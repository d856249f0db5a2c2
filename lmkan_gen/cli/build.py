"""`lmkan-gen build`: compile kernels before they are needed, for this machine or for others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmkan_gen.cli.options import check_output, parse_shape, parse_target, read_shapes, told_of_interrupt

if TYPE_CHECKING:
    from lmkan_gen.device import Device


def build_command(
    arch: Annotated[
        str,
        typer.Option(metavar="TARGET,...", help="sm_75 ... sm_120 and cpu (this machine's), with commas."),
    ],
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", metavar="IN,OUT,GRIDS,BATCH", help="Sizes of a layer call; repeatable."),
    ] = None,
    shapes: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            metavar="FILE",
            help="Text file, one IN,OUT,GRIDS,BATCH a line.",
        ),
    ] = None,
    forward_only: Annotated[
        bool, typer.Option("--forward-only", help="Leave out gradients: for inference.")
    ] = False,
    bundle: Annotated[
        Path | None,
        typer.Option(dir_okay=False, metavar="FILE", help="Also pack them for machines without a compiler."),
    ] = None,
) -> None:
    """Compile the kernels that layers would run, without a GPU and before the first call.

    Kernels are chosen by the tuning files of this machine for the common GPU models of an architecture.
    `lmkan-gen cache load FILE` on another machine makes a bundle's kernels, and the tuning files that
    chose them, available there: layers then need no compiler.

    \b
    Examples:
      lmkan-gen build --arch sm_80,sm_90 --shapes shapes.txt
      lmkan-gen build --arch sm_90,cpu --shape 512,512,18,65536 --bundle kernels.zip
    """
    wanted = [parse_shape(s) for s in shape or []] + (read_shapes(shapes) if shapes else [])
    if not wanted:
        raise typer.BadParameter("give the layers with --shape or --shapes", param_hint="--shape / --shapes")
    devices = [device for name in arch.split(",") for device in _devices(name.strip())]
    if bundle is not None:
        check_output(bundle, "--bundle")

    from rich.console import Console
    from rich.progress import Progress

    from lmkan_gen import toolchain
    from lmkan_gen.ahead import kernels

    specs = kernels(wanted, devices, backward=not forward_only)
    console = Console(stderr=True)
    kept = "kernels that are done are kept; the same command compiles the rest"
    with (
        told_of_interrupt(lambda: kept),
        Progress(console=console, transient=True, disable=not console.is_terminal) as bar,
    ):
        task = bar.add_task("compiling", total=len(specs))
        results = toolchain.build(specs, lambda spec, result: bar.advance(task))
    binaries = [r for r in results if isinstance(r, toolchain.Binary)]
    for error in dict.fromkeys(str(r) for r in results if isinstance(r, toolchain.ToolchainError)):
        typer.echo(error, err=True)
    typer.echo(f"{len(binaries)} of {len(specs)} kernels for {arch} are in the store")
    if len(binaries) < len(specs):
        typer.echo("nothing was packed" if bundle else "the others did not compile", err=True)
        raise typer.Exit(1)
    if bundle is not None:
        from lmkan_gen.launch.service import SPEC as LAUNCHER
        from lmkan_gen.selection import sources
        from lmkan_gen.toolchain import bundle as bundles

        own = [s.path for s in sources() if s.origin != "packaged"]
        (launcher,) = toolchain.build([LAUNCHER])
        if isinstance(launcher, toolchain.ToolchainError):
            typer.echo(f"the native launcher is left out, calls will cost more: {launcher}", err=True)
        else:
            binaries.append(launcher)
        packed = bundles.write(bundle, binaries, own)
        load = f"lmkan-gen cache load {bundle.name} --sha256 {packed.sha256}"
        typer.echo(
            f"{bundle}: {packed.kernels} binaries, SHA-256 {packed.sha256}; load it elsewhere with:\n{load}"
        )


def _devices(name: str) -> tuple[Device, ...]:
    from lmkan_gen.device import models

    device = parse_target(name, "--arch")
    return models(name) if device.kind == "cuda" else (device,)
