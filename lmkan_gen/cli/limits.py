"""`lmkan-gen limits`: the largest grid a GPU can serve."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from lmkan_gen.cli.options import JsonOption, TableOption, parse_cuda_device, parse_target, print_json


def limits_command(
    target: Annotated[
        str | None, typer.Option(metavar="TARGET", help="A typical GPU of an architecture: sm_75 ... sm_120.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="cuda[:N]", help="A GPU of this machine, instead of --target.")
    ] = None,
    table: TableOption = "float32",
    as_json: JsonOption = False,
) -> None:
    """Print the largest num_grids per operation, kernel family and tile size.

    A tile of tables has to fit into a GPU's shared memory, so a larger tile leaves room for a coarser
    grid only. Without a demanded tile, a layer always finds a kernel that fits.

    \b
    Examples:
      lmkan-gen limits --target sm_86
      lmkan-gen limits --target sm_90 --table float16
      lmkan-gen limits --device cuda
    """
    if (target is None) == (device is None):
        raise typer.BadParameter("give one of --target and --device", param_hint="--target / --device")

    from rich.console import Console

    from lmkan_gen.limits import limits
    from lmkan_gen.problem import TableDtype
    from lmkan_gen.sheet import Column, Sheet

    if target is None:
        assert device is not None
        chip = parse_cuda_device(device)
    else:
        chip = parse_target(target)
    if chip.kind == "cpu":
        raise typer.BadParameter(
            "cpu kernels have no limit on num_grids; choose sm_75 ... sm_120", param_hint="--target"
        )
    found = limits(chip, TableDtype(table))
    if as_json:
        print_json(
            {
                "device": asdict(chip),
                "table": table,
                # null beside "unlimited": does not fit
                "limits": [
                    {
                        "operation": limit.operation.value,
                        "family": limit.family,
                        "tile": limit.tile,
                        "variant": limit.variant or None,
                        "num_grids": None if limit.is_unlimited else limit.num_grids,
                        "unlimited": limit.is_unlimited,
                    }
                    for limit in found
                ],
            }
        )
        return
    memory = f"{chip.shared_memory_per_block // 1024} KiB per block"
    headings = ("operation", "family", "tile", "variant")
    rows = Sheet(
        [*map(Column, headings), Column("max num_grids", number=True)],
        f"{chip.name} ({chip.arch}, {memory}), {table} tables",
    )
    for limit in found:
        if limit.is_unlimited:
            largest = "no limit"
        else:
            largest = "does not fit" if limit.num_grids is None else str(limit.num_grids)
        tile = "-" if limit.tile is None else str(limit.tile)
        rows.add(limit.operation.value, limit.family, tile, limit.variant or "-", largest)
    rows.print(Console())
