"""`lmkan-gen tune`: find the fastest kernels for layer shapes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lmkan_gen.cli.model import shapes_of_model
from lmkan_gen.cli.options import (
    JsonOption,
    TableOption,
    check_output,
    parse_cuda_device,
    parse_shape,
    print_json,
    told_of_interrupt,
)

if TYPE_CHECKING:
    import torch


def tune_command(
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", metavar="IN,OUT,GRIDS,BATCH", help="Sizes of a layer call; repeatable."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FACTORY",
            help="Tune for all lmKAN layers of the model that this function returns. Imports the module and "
            "runs the function, with the current directory first on the path: name only code that you trust.",
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            metavar="BATCH,...",
            help="Samples that its layers see; leave out when FACTORY returns (model, sample input).",
        ),
    ] = None,
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
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Share the search with all processes that name the same journal file or database.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Find the fastest kernels for layer shapes and write them to a tuning file.

    Candidates are compiled in parallel, checked against the reference, and timed in a process of
    their own. Progress goes to standard error, results to standard output.

    \b
    Examples:
      lmkan-gen tune --shape 128,128,26,1024
      lmkan-gen tune --device cuda:1 --shape 512,512,18,65536 --operation forward --preset full
      lmkan-gen tune --shape 64,128,8,4096 --shape 128,10,8,4096 --time-budget 300 --output my_gpu.yaml
      lmkan-gen tune --shape 512,512,18,65536 --preset full --resume
      lmkan-gen tune --model my_package.networks:make_model --batch 1024
      lmkan-gen tune --device cuda:1 --shape 512,512,18,65536 --preset full --storage studies.journal
    """
    from lmkan_gen.problem import CALL_OPERATIONS, Operation, TableDtype

    shapes = [parse_shape(s) for s in shape or []]
    if model is not None:
        shapes += shapes_of_model(model, batch)
    elif batch is not None:
        raise typer.BadParameter("a batch goes with a model", param_hint="--batch")
    if not shapes:
        raise typer.BadParameter("say what to tune with --shape or --model", param_hint="--shape / --model")
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
    from lmkan_gen.cli.tune_observer import Listener
    from lmkan_gen.text import counted, printable
    from lmkan_gen.tuner import record
    from lmkan_gen.tuner.report import summary
    from lmkan_gen.tuner.run import FULL_TRIALS, QUICK_TRIALS, default_output, tune

    chip = devices.of(chosen)
    target = output or default_output(chip)
    check_output(target, "--output")
    typer.echo(f"tuning for {chip.name} ({chip.arch}), writing {printable(target)}", err=True)
    listener = Listener(Console(stderr=True))
    go_on = "the same command" if storage or resume else "the same command with --resume"
    with (
        told_of_interrupt(lambda: f"{listener.kept(target)}; {go_on} goes on"),
        listener,
    ):
        result = tune(
            shapes,
            chosen,
            operations,
            table=TableDtype(table),
            trials=trials or (QUICK_TRIALS if preset == "quick" else FULL_TRIALS),
            time_budget=time_budget,
            output=target,
            resume=resume,
            storage_url=storage,
            observer=listener,
        )
    if as_json:
        found = result.model_dump(mode="json", by_alias=True)
        print_json({"output": target, "record": record.latest(), **found, **listener.said()})
        return
    summary(result.entries, f"{chip.name}, time per call").print(Console())
    typer.echo(f"written to {printable(target)}: {counted(len(result.entries), 'entry', 'entries')}")
    typer.echo("lmkan-gen report writes a page about this run")


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
