"""Options that several verbs share. Heavy imports stay inside: `--help` must answer at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from lmkan_gen.device import Device
    from lmkan_gen.problem import LayerShape

OperationName = Literal["forward", "backward", "grad_input", "grad_table", "hessian", "grad_hessian"]

TableOption = Annotated[
    Literal["float32", "float16", "bfloat16", "int8"],
    typer.Option(help="Element type of the tables; the narrow ones are for CUDA."),
]


def parse_shape(text: str) -> LayerShape:
    """``IN,OUT,GRIDS,BATCH`` -> shape.

    Raises:
        typer.BadParameter: not four integers, or not a possible layer.
    """
    from lmkan_gen.problem import LayerShape

    fields = text.split(",")
    try:
        inputs, outputs, grids, batch = (int(f) for f in fields)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not IN,OUT,GRIDS,BATCH; write four integers such as 128,128,26,1024",
            param_hint="--shape",
        ) from None
    try:
        return LayerShape(inputs, outputs, grids, batch)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: {error}", param_hint="--shape") from None


def parse_target(name: str) -> Device:
    """Target name -> device.

    Raises:
        typer.BadParameter: no such target.
    """
    from lmkan_gen.device import target

    try:
        return target(name)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--target") from None


def parse_cuda_device(text: str) -> Device:
    """``cuda`` or ``cuda:N`` -> device.

    Raises:
        typer.BadParameter: not of that form.
        RuntimeError: torch sees no such device.
    """
    from lmkan_gen.device import cuda

    kind, _, index = text.partition(":")
    if kind != "cuda" or (index and not index.isdecimal()) or text.endswith(":"):
        raise typer.BadParameter(f"{text!r} is neither cuda nor cuda:N", param_hint="--device")
    import torch

    count = torch.cuda.device_count()
    number = int(index or 0)
    if number >= count:
        raise RuntimeError(f"device {text} does not exist: torch sees {count} CUDA devices")
    return cuda(number)
