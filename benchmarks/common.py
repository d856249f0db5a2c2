"""What the benchmark scripts share: options, devices, shapes, CSV files."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from lmkan_gen.cli.options import parse_shape
from lmkan_gen.problem import LayerShape

DeviceOption = Annotated[
    Literal["cuda", "cpu"] | None, typer.Option(help="By default a GPU, where there is one.")
]
OutputOption = Annotated[Path | None, typer.Option(help="CSV file for all numbers; written as they come in.")]
ShapeOption = Annotated[
    list[str] | None,
    typer.Option(metavar="IN,OUT,GRIDS,BATCH", help="Layer calls to time; repeatable."),
]

Record = Mapping[str, str | int | float | None]


def choose_device(kind: Literal["cuda", "cpu"] | None) -> torch.device:
    """The device to measure on.

    Raises:
        typer.BadParameter: a GPU is asked for and torch sees none.
    """
    if kind == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no CUDA device", param_hint="--device")
    if kind != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def choose_shapes(given: list[str] | None, default: Sequence[LayerShape]) -> list[LayerShape]:
    """The shapes given on the command line, or else the default ones.

    Raises:
        typer.BadParameter: a shape is none.
    """
    return [parse_shape(text) for text in given] if given else list(default)


def write_csv(records: Iterable[Record], path: Path) -> None:
    """One line per record; empty where something was not measured."""
    lines = list(records)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
