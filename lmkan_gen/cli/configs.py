"""`lmkan-gen configs`: the tuning files that selection reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmkan_gen.cli.options import JsonOption, check_output, print_json

if TYPE_CHECKING:
    from lmkan_gen.tuning_file import TuningFile

configs_app = typer.Typer(help="List, show, validate and export tuning files.", no_args_is_help=True)


@configs_app.command("list")
def list_command(as_json: JsonOption = False) -> None:
    """List the tuning files in the order in which they are asked.

    Stale entries were measured with other kernel sources than there are now: tune them again.

    \b
    Examples:
      lmkan-gen configs list
      LMKAN_GEN_TUNING=my_gpu.yaml lmkan-gen configs list
    """
    from rich.console import Console

    from lmkan_gen.selection import TUNING_VARIABLE, sources, user_tuning_directory
    from lmkan_gen.sheet import Column, Sheet
    from lmkan_gen.text import printable

    found = [{"found_in": source.origin, **_checked(source.path)} for source in sources()]
    if as_json:
        print_json(found)
        return
    if not found:
        typer.echo(
            f"no tuning files: ${TUNING_VARIABLE} names none, and there are none in "
            f"{user_tuning_directory()} or in the package"
        )
        return
    numbers = (Column("entries", number=True), Column("stale", number=True))
    sheet = Sheet([*map(Column, ("found in", "device", "arch")), *numbers, Column("file")])
    for f in found:
        row = ("not valid", "-", "-", "-")
        if f["device"] is not None:
            skipped = f" and {len(f['passed_over'])} passed over" if f["passed_over"] else ""
            row = (f["device"], f["arch"], f"{f['entries']}{skipped}", str(len(f["stale"]) or "-"))
        sheet.add(f["found_in"], *map(printable, row), printable(f["file"]))
    sheet.print(Console())


@configs_app.command("show", no_args_is_help=True)
def show_command(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME|FILE", help="A file, or a listed one's name: nvidia_h200."),
    ],
    as_json: JsonOption = False,
) -> None:
    """Show what a tuning file holds, and what was measured with.

    \b
    Examples:
      lmkan-gen configs show nvidia_h200
      lmkan-gen configs show ./my_gpu.yaml
    """
    from rich.console import Console

    from lmkan_gen.text import printable
    from lmkan_gen.tuner.report import summary
    from lmkan_gen.tuning_file import load

    path = _find(name)
    file = load(path)
    if as_json:
        passed_over = [record.describe() for record in file.skipped]
        found = file.model_dump(mode="json", by_alias=True)
        print_json({"file": path, **found, "passed_over": passed_over})
        return
    console = Console()
    console.print(
        f"{printable(path)}\n{_provenance(file)}", highlight=False, soft_wrap=True, markup=False, emoji=False
    )
    summary(file.entries, f"{file.device.name} ({file.device.arch})").print(console)
    for record in file.skipped:
        typer.echo(f"passed over: {record.describe()}")


@configs_app.command("validate")
def validate_command(
    files: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME|FILE]...", help="By default all files that `list` shows."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check tuning files down to single parameter values; exit code 1 when one is not valid.

    \b
    Examples:
      lmkan-gen configs validate
      lmkan-gen configs validate ./my_gpu.yaml
    """
    from lmkan_gen.freshness import stale_entries
    from lmkan_gen.selection import sources
    from lmkan_gen.text import printable
    from lmkan_gen.tuning_file import TuningFileError, load

    paths = [_find(f) for f in files] if files else [s.path for s in sources()]
    if as_json:
        checked = [_checked(path) for path in paths]
        print_json(checked)
        if not all(c["valid"] for c in checked):
            raise typer.Exit(1)
        return
    invalid = 0
    for path in paths:
        try:
            file = load(path)
        except TuningFileError as error:
            invalid += 1
            typer.echo(str(error), err=True)
        else:
            what = f"{len(file.entries)} entries for {file.device.name}"
            typer.echo(f"{printable(path)}: {'not ' if file.skipped else ''}valid, {what}")
            invalid += bool(file.skipped)
            for record in file.skipped:
                typer.echo(f"  passed over: {record.describe()}", err=True)
            for entry in file.entries:
                if entry.doubts:
                    words = f"measured on a busy device ({', '.join(entry.doubts)})"
                    typer.echo(f"  unsteady: {entry.operation} {entry.shape.layer}, {words}")
            for entry in stale_entries(file):
                typer.echo(f"  stale: {entry.operation} {entry.shape.layer}, its kernel has changed since")
    if invalid:
        typer.echo(f"{invalid} of {len(paths)} files are not valid", err=True)
        raise typer.Exit(1)
    if not paths:
        typer.echo("no tuning files to check")


@configs_app.command("export", no_args_is_help=True)
def export_command(
    name: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A file, or a listed one's name.")],
    output: Annotated[
        Path,
        typer.Option(file_okay=False, help="Directory to write to, such as a checkout's tuning/."),
    ] = Path("tuning"),
    as_json: JsonOption = False,
) -> None:
    """Make a file that is ready to be contributed: checked, named after the device, added to what ships.

    Entries replace shipped ones for the same calls; what was measured with other kernel sources is refused.

    \b
    Examples:
      lmkan-gen configs export nvidia_geforce_rtx_4090
      lmkan-gen configs export ./my_gpu.yaml --output /tmp
    """
    check_output(output, "--output", directory=True)

    from lmkan_gen.export import export

    path, added, total = export(_find(name), output)
    if as_json:
        print_json({"file": path, "entries": total, "added": added})
        return
    typer.echo(f"{path}: {added} entries new or better founded, {total} in all")
    typer.echo("next: make golden, then make test, then a pull request (docs/contributing-a-gpu.md)")


@configs_app.command("schema")
def schema_command() -> None:
    """Print the JSON Schema of tuning files, for editors.

    \b
    Example:
      lmkan-gen configs schema > schema.json
    """
    from lmkan_gen.tuning_schema import text

    typer.echo(text(), nl=False)


def _checked(path: Path) -> dict[str, Any]:
    """What is to be said of a tuning file; no device where it cannot be read at all."""
    from lmkan_gen.freshness import stale_entries
    from lmkan_gen.tuning_file import TuningFileError, load

    try:
        file = load(path)
    except TuningFileError as error:
        return {"file": path, "valid": False, "error": str(error), "device": None}
    return {
        "file": path,
        "valid": not file.skipped,
        "error": None,
        "device": file.device.name,
        "arch": file.device.arch,
        "entries": len(file.entries),
        "passed_over": [record.describe() for record in file.skipped],
        "stale": [f"{entry.operation} {entry.shape.layer}" for entry in stale_entries(file)],
    }


def _find(name: str) -> Path:
    from lmkan_gen.selection import sources

    path = Path(name)
    if path.is_file():
        return path
    known = {s.path.stem: s.path for s in reversed(sources())}
    if name not in known:
        listed = ", ".join(known) or "none"
        raise typer.BadParameter(f"{name!r} is neither a file nor one of those known: {listed}")
    return known[name]


def _provenance(file: TuningFile) -> str:
    p = file.provenance
    driver = f", driver {p.driver}" if p.driver else ""
    return f"measured {p.date} with lmkan-gen {p.lmkan_gen}, {p.compiler}{driver}, torch {p.torch}"
