"""`lmkan-gen report`: a tuning run as an HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmkan_gen.cli.options import check_output


def report_command(
    run: Annotated[
        Path | None,
        typer.Argument(
            exists=True, dir_okay=False, metavar="[RECORD]", help="A run's record; by default the last run's."
        ),
    ] = None,
    output: Annotated[Path, typer.Option(dir_okay=False, help="The page to write.")] = Path("report.html"),
) -> None:
    """Write one HTML page about a tuning run: what matters, what was tried, what failed and why.

    The page needs no network. Records of runs are kept in the cache directory, under runs/; one can be
    copied and reported on another machine.

    \b
    Examples:
      lmkan-gen report
      lmkan-gen report 20261124-135516-000000-nvidia_h200.json --output h200.html
    """
    check_output(output, "--output")

    from lmkan_gen.tuner import page, record

    path = run or record.latest()
    if path is None:
        raise RuntimeError(f"no tuning run is recorded in {record.directory()}; lmkan-gen tune makes one")
    try:
        loaded = record.load(path)
    except ValueError as error:
        raise RuntimeError(f"{path} is no record of a tuning run: {error}") from error
    text = page.render(loaded)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    typer.echo(f"{output}: {len(loaded.problems)} problems on {loaded.device.name}, from {path}")
