"""`lmkan-gen tune`: find the fastest kernels for layer shapes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lmkan_gen.cli.options import TableOption, parse_cuda_device, parse_shape

if TYPE_CHECKING:
    import torch


def tune_command(
    shape: Annotated[
        list[str],
        typer.Option("--shape", metavar="IN,OUT,GRIDS,BATCH", help="Sizes of a layer call; repeatable."),
    ],
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda[:N]", help="auto: the first GPU, or else the CPU.")
    ] = "auto",
    operation: Annotated[
        Literal["forward", "backward", "all"],
        typer.Option(help="backward: input and table gradients, each alone and both together."),
    ] = "all",
    table: TableOption = "float32",
    preset: Annotated[
        Literal["quick", "full"],
        typer.Option(help="quick tries 16 candidates per shape and operation, full 400."),
    ] = "quick",
    trials: Annotated[
        int | None, typer.Option(min=1, help="Candidates per shape and operation, instead of a preset's.")
    ] = None,
    time_budget: Annotated[
        float | None, typer.Option(min=0, metavar="SECONDS", help="Limit of the whole run, shared evenly.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="Tuning file to write or add to. By default one that layers find by themselves.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run of the same search.")
    ] = False,
) -> None:
    """Find the fastest kernels for layer shapes and write them to a tuning file.

    Candidates are compiled in parallel, checked against the reference, and timed in a process of
    their own.

    \b
    Examples:
      lmkan-gen tune --shape 128,128,26,1024
      lmkan-gen tune --device cuda:1 --shape 512,512,18,65536 --operation forward --preset full
      lmkan-gen tune --shape 64,128,8,4096 --shape 128,10,8,4096 --time-budget 300 --output my_gpu.yaml
      lmkan-gen tune --shape 512,512,18,65536 --preset full --resume
    """
    from lmkan_gen.problem import CALL_OPERATIONS, Operation, TableDtype

    shapes = [parse_shape(s) for s in shape]
    for s in shapes:
        if s.batch < 1:
            raise typer.BadParameter(f"{s}: the batch must be at least 1 to be timed", param_hint="--shape")
    chosen = _device(device)
    operations = {
        "forward": (Operation.FORWARD,),
        "backward": (Operation.GRAD_INPUT, Operation.GRAD_TABLE, Operation.BACKWARD),
        "all": CALL_OPERATIONS,
    }[operation]

    from rich.console import Console

    from lmkan_gen import device as devices
    from lmkan_gen.tuner.report import ConsoleObserver, summary
    from lmkan_gen.tuner.run import FULL_TRIALS, QUICK_TRIALS, default_output, tune

    chip = devices.of(chosen)
    target = output or default_output(chip)
    console = Console()
    console.print(f"tuning for {chip.name} ({chip.arch}), writing {target}", highlight=False, soft_wrap=True)
    with ConsoleObserver(console) as observer:
        result = tune(
            shapes,
            chosen,
            operations,
            table=TableDtype(table),
            trials=trials or (QUICK_TRIALS if preset == "quick" else FULL_TRIALS),
            time_budget=time_budget,
            output=target,
            resume=resume,
            observer=observer,
        )
    console.print(summary(result.entries, f"{chip.name}, time per call"))


def _device(text: str) -> torch.device:
    import torch

    if text == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if text == "cpu":
        return torch.device("cpu")
    try:
        parse_cuda_device(text)
    except typer.BadParameter:
        raise typer.BadParameter(
            f"{text!r} is none of auto, cpu, cuda, cuda:N", param_hint="--device"
        ) from None
    return torch.device(text)
