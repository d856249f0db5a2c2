"""Options that several verbs share. Heavy imports stay inside: `--help` must answer at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
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

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def print_json(data: object) -> None:
    """Print lists, mappings, texts and numbers as JSON; anything else in them as its text."""
    typer.echo(json.dumps(data, indent=2, default=str, ensure_ascii=False))


def parse_shape(text: str, option: str = "--shape", where: str = "") -> LayerShape:
    """``IN,OUT,GRIDS,BATCH`` -> shape.

    Args:
        text: what was given.
        option: how, for messages.
        where: file and line, for messages.

    Raises:
        typer.BadParameter: not four integers, or not a possible layer.
    """
    from lmkan_gen.problem import LayerShape

    place = f"{where}: " if where else ""
    try:
        inputs, outputs, grids, batch = (int(f) for f in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{place}{text!r} is not IN,OUT,GRIDS,BATCH; write four integers such as 128,128,26,1024",
            param_hint=option,
        ) from None
    try:
        return LayerShape(inputs, outputs, grids, batch)
    except ValueError as error:
        raise typer.BadParameter(f"{place}{text!r}: {error}", param_hint=option) from None


def read_shapes(path: Path) -> list[LayerShape]:
    """Shapes from a text file: one a line, with empty lines and ``#`` comments.

    Raises:
        typer.BadParameter: names the file, and the line that is none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise typer.BadParameter(
            f"{path} is no text file; write one IN,OUT,GRIDS,BATCH a line", param_hint="--shapes"
        ) from None
    texts = [(number, line.split("#")[0].strip()) for number, line in enumerate(lines, start=1)]
    found = [parse_shape(text, "--shapes", f"{path}, line {number}") for number, text in texts if text]
    if not found:
        raise typer.BadParameter(
            f"{path} holds no shapes; write one IN,OUT,GRIDS,BATCH a line", param_hint="--shapes"
        )
    return found


def parse_target(name: str, option: str = "--target") -> Device:
    """Target name -> device.

    Raises:
        typer.BadParameter: no such target.
    """
    from lmkan_gen.device import target

    try:
        return target(name)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def check_output(path: Path, option: str, *, directory: bool = False) -> None:
    """Make sure before work begins that what it makes can be written.

    Raises:
        typer.BadParameter: names the option, the path and what stands in the way.
    """
    from lmkan_gen.outputs import require_writable

    try:
        require_writable(path, directory=directory)
    except OSError as error:
        # those of the system carry a number before their text
        raise typer.BadParameter(error.strerror or str(error), param_hint=option) from None


@contextmanager
def told_of_interrupt(say: Callable[[], str]) -> Iterator[None]:
    """On Ctrl-C, print what was kept and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(say(), err=True)
        raise


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
