"""`lmkan-gen plot`: draw what a layer in a checkpoint has learned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmkan_gen.cli.options import check_output

if TYPE_CHECKING:
    from torch import Tensor

    from lmkan_gen.layer import LMKAN2DLayer

_TABLE = "func_parameter"


def plot_command(
    checkpoint: Annotated[
        Path,
        typer.Argument(exists=True, dir_okay=False, help="A saved state_dict, alone or under 'state_dict'."),
    ],
    layer: Annotated[str | None, typer.Option(help="Which lmKAN layer, if there are several.")] = None,
    inputs: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="What reached the layer, a tensor (.pt) or an array (.npy) of inputs x samples.",
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many of the strongest functions to draw.")] = 9,
    output: Annotated[Path, typer.Option(help="Directory for the pictures.")] = Path("plots"),
) -> None:
    """Draw a trained layer: strongest functions, strengths, occupancy of knots; count functions near affine.

    \b
    Examples:
      lmkan-gen plot model.pt --layer blocks.0.lmkan.layer
      lmkan-gen plot model.pt --layer blocks.0.lmkan.layer --inputs inputs.npy --output pictures
    """
    check_output(output, "--output", directory=True)

    from lmkan_gen.inspection import near_affine
    from lmkan_gen.plot import plot_functions, plot_occupancy, plot_strengths

    chosen = _layer(checkpoint, layer)
    x = None if inputs is None else _inputs(inputs, chosen)
    figures = {"functions": plot_functions(chosen, x, count=count), "strengths": plot_strengths(chosen, x)}
    if x is not None:
        figures["occupancy"] = plot_occupancy(chosen, x)
    output.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        path = output / f"{name}.png"
        figure.savefig(path, dpi=120)
        typer.echo(path)
    total = chosen.output_dim * chosen.func_parameter.shape[3]
    typer.echo(f"{len(near_affine(chosen, x))} of {total} functions could be affine at 1 % of their output")


def _layer(path: Path, name: str | None) -> LMKAN2DLayer:
    import torch

    from lmkan_gen.layer import LMKAN2DLayer

    state = _load(path, "checkpoint")
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise ValueError(f"{path} holds no state_dict but a {type(state).__name__}")
    names = [key.removesuffix(_TABLE).rstrip(".") for key in state if key.split(".")[-1] == _TABLE]
    if not names:
        raise ValueError(f"{path} holds no lmKAN layer: no entry is called {_TABLE}")
    if name is None and len(names) > 1:
        raise ValueError(f"{path} holds several lmKAN layers, choose with --layer: {', '.join(names)}")
    name = names[0] if name is None else name
    if name not in names:
        raise ValueError(f"{path} holds no lmKAN layer {name!r}; it holds {', '.join(names)}")
    table = state[f"{name}.{_TABLE}" if name else _TABLE]
    if not isinstance(table, torch.Tensor) or table.dim() != 4 or not table.is_floating_point():
        raise ValueError(f"{path} holds no lmKAN layer {name!r}: its {_TABLE} is no table of four dimensions")
    layer = LMKAN2DLayer(table.shape[0] - 1, 2 * table.shape[3], table.shape[2])
    with torch.no_grad():
        layer.func_parameter.copy_(table)
    return layer


def _inputs(path: Path, layer: LMKAN2DLayer) -> Tensor:
    import torch

    x = _load(path, "tensor")
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{path} holds no tensor but a {type(x).__name__}")
    # a table does not say whether the last pair has a second input
    if x.dim() != 2 or x.shape[0] not in (layer.input_dim - 1, layer.input_dim):
        raise ValueError(f"{path} must hold [{layer.input_dim}, samples], it holds {list(x.shape)}")
    return x.to(layer.func_parameter.dtype)


def _load(path: Path, what: str) -> Any:
    """What a file of torch's or numpy's holds.

    Raises:
        ValueError: it is none; readers raise whatever the bytes at hand lead to.
    """
    import numpy as np
    import torch

    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False))
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        first, *_ = str(error).strip().splitlines() or [""]
        raise ValueError(
            f"{path} is no {what} that torch can load without running code from it: "
            f"{type(error).__name__}: {first}"
        ) from error
