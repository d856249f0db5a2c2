"""`lmkan-gen limits`: the largest grid a GPU can serve."""

from __future__ import annotations

from typing import Annotated

import typer

from lmkan_gen.cli.options import TableOption, parse_cuda_device, parse_target


def limits_command(
    target: Annotated[
        str | None, typer.Option(metavar="TARGET", help="A typical GPU of an architecture: sm_75 ... sm_120.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="cuda[:N]", help="A GPU of this machine, instead of --target.")
    ] = None,
    table: TableOption = "float32",
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
    from rich.table import Table
    from rich.text import Text

    from lmkan_gen.limits import limits
    from lmkan_gen.problem import TableDtype

    if target is None:
        assert device is not None
        chip = parse_cuda_device(device)
    else:
        chip = parse_target(target)
    if chip.kind == "cpu":
        raise typer.BadParameter(
            "cpu kernels have no limit on num_grids; choose sm_75 ... sm_120", param_hint="--target"
        )
    memory = f"{chip.shared_memory_per_block // 1024} KiB per block"
    rows = Table(title=Text(f"{chip.name} ({chip.arch}, {memory}), {table} tables"))
    for heading in ("operation", "family", "tile", "variant"):
        rows.add_column(heading)
    rows.add_column("max num_grids", justify="right")
    for limit in limits(chip, TableDtype(table)):
        if limit.is_unlimited:
            largest = "no limit"
        else:
            largest = "does not fit" if limit.num_grids is None else str(limit.num_grids)
        tile = "-" if limit.tile is None else str(limit.tile)
        rows.add_row(limit.operation.value, limit.family, tile, limit.variant or "-", largest)
    Console().print(rows)
