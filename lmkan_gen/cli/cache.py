"""`lmkan-gen cache`: the store of compiled kernels."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lmkan_gen.cli.options import JsonOption, print_json
from lmkan_gen.text import counted

cache_app = typer.Typer(
    help="Look at, or empty, the store of compiled kernels.\n\n"
    "The store is in the platform's cache directory, or where $LMKAN_GEN_CACHE points. Everything in it "
    "is rebuilt when it is missing.\n\n"
    "\b\nExamples:\n  lmkan-gen cache list\n  lmkan-gen cache clear",
    no_args_is_help=True,
)


@cache_app.command("path")
def path_command() -> None:
    """Print the directory.

    \b
    Example:
      du -sh "$(lmkan-gen cache path)"
    """
    from lmkan_gen.toolchain import store

    typer.echo(store.root())


@cache_app.command("list")
def list_command(as_json: JsonOption = False) -> None:
    """Print the compiled kernels, newest first, those that bundles brought too.

    \b
    Example:
      lmkan-gen cache list
    """
    from rich.console import Console

    from lmkan_gen.sheet import Column, Sheet
    from lmkan_gen.text import printable
    from lmkan_gen.toolchain import store

    entries = store.entries()
    if as_json:
        print_json({"directory": store.root(), "kernels": [asdict(e) for e in entries]})
        return
    if not entries:
        typer.echo(f"no compiled kernels in {store.root()}")
        return
    sheet = Sheet(
        [
            Column("key"),
            Column("target"),
            Column("KiB", number=True),
            Column("created"),
            Column("kernel, compiler", words=True),
        ],
        printable(store.root()),
    )
    for e in entries:
        constants = ", ".join(f"{name}={value}" for name, value in sorted(e.constants.items()))
        created = e.created[:16].replace("T", " ")
        origin = f", from bundle {e.bundle[:8]}" if e.bundle else ""
        what = f"{printable(f'{e.template}: {constants}')}\n{printable(e.compiler)}{origin}"
        row = (e.key[:8], e.arch, f"{e.bytes / 1024:.0f}", created)
        sheet.add(*map(printable, row), what)
    sheet.print(Console())


@cache_app.command("clear")
def clear_command(as_json: JsonOption = False) -> None:
    """Remove all compiled kernels, loaded bundles and the sources kept of failed compilations.

    It counts the kernels, those of bundles too. What `tune` keeps for --resume and for reports stays.

    \b
    Example:
      lmkan-gen cache clear
    """
    from lmkan_gen.toolchain import store

    removed = store.clear()
    if as_json:
        print_json({"directory": store.root(), "removed": removed})
        return
    typer.echo(f"removed {counted(removed, 'compiled kernel', 'compiled kernels')} from {store.root()}")


@cache_app.command("trim")
def trim_command(
    to: Annotated[
        int | None,
        typer.Option(min=0, metavar="MIB", help="How much to leave; $LMKAN_GEN_CACHE_LIMIT, else 4096."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Remove the compiled kernels and kept failures that have not been used for longest.

    This also happens by itself, at most once a day, when something was compiled. Bundles stay.

    \b
    Examples:
      lmkan-gen cache trim
      lmkan-gen cache trim --to 500
    """
    from lmkan_gen.toolchain import store

    done = store.trim(store.limit() if to is None else to << 20)
    if as_json:
        print_json({"directory": store.root(), **dataclasses.asdict(done)})
        return
    typer.echo(
        f"removed {done.removed} kernels and failures ({done.removed_bytes / 2**20:.1f} MiB) from "
        f"{store.root()}; {done.left} are left ({done.left_bytes / 2**20:.1f} MiB)"
    )


@cache_app.command("verify")
def verify_command(as_json: JsonOption = False) -> None:
    """Check that every kernel is what was compiled under its name; exit code 1 when one is not.

    Kernels of bundles too. A damaged one is never used: it is compiled again when it is next needed.

    \b
    Example:
      lmkan-gen cache verify
    """
    from lmkan_gen.text import printable
    from lmkan_gen.toolchain import bundle as bundles
    from lmkan_gen.toolchain import store

    damaged = store.verify() + bundles.verify()
    checked = store.count()
    if as_json:
        print_json({"directory": store.root(), "checked": checked, "damaged": [asdict(d) for d in damaged]})
    else:
        for found in damaged:
            typer.echo(printable(f"{found.directory}: {found.why}"), err=True)
        typer.echo(f"{checked - len(damaged)} of {checked} kernels in {store.root()} are whole")
    if damaged:
        raise typer.Exit(1)


@cache_app.command("load", no_args_is_help=True)
def load_command(
    bundle: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A file of `build --bundle`.")],
    sha256: Annotated[
        str | None,
        typer.Option(metavar="HASH", help="What the file's SHA-256 must be, as `build` printed it."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Add the kernels of a bundle, so that layers run them without a compiler.

    Its code will be executed: load only what you would install.

    \b
    Example:
      lmkan-gen cache load kernels.zip
      lmkan-gen cache load kernels.zip --sha256 $(cat kernels.sha256)
    """
    from lmkan_gen.toolchain import bundle as bundles
    from lmkan_gen.toolchain import store

    loaded = bundles.load(bundle, sha256)
    if as_json:
        print_json({"directory": store.root(), "loaded": loaded.kernels, "sha256": loaded.sha256})
        return
    kernels = counted(loaded.kernels, "kernel", "kernels")
    typer.echo(f"{kernels} loaded into {store.root()}, SHA-256 {loaded.sha256}")
