"""Pictures of trained layers. Needs matplotlib: ``pip install "lmkan-gen[plot]"``.

Each function returns a matplotlib figure; save it with ``figure.savefig(path)``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from lmkan_gen import reference
from lmkan_gen.inspection import FunctionReport, describe_functions, occupancy
from lmkan_gen.layer import LMKAN2DLayer

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError('lmkan_gen.plot needs matplotlib: pip install "lmkan-gen[plot]"') from error

_RESOLUTION = 120
_BINS = 40
_BLUR = 2.0  # bins: single samples should not show


def plot_functions(
    layer: LMKAN2DLayer,
    x: Tensor | None = None,
    functions: list[tuple[int, int]] | None = None,
    count: int = 9,
) -> Figure:
    """Heat maps of functions, with knots as ticks and the density of the data as contours.

    Colours are symmetric about the mean of each map. Contours enclose 50 % and 95 % of the samples
    inside the grid.

    Args:
        layer: any.
        x: ``[input_dim, samples]``, what reached it (see `lmkan_gen.inspection.layer_inputs`).
        functions: ``(output, pair)`` of each to draw; None: the strongest.
        count: how many of the strongest.
    """
    reports = describe_functions(layer, x)
    if functions is None:
        chosen = reports[:count]
    else:
        by_place = {(r.output, r.pair): r for r in reports}
        chosen = [by_place[place] for place in functions]
    columns = min(len(chosen), math.ceil(math.sqrt(len(chosen))))
    rows = math.ceil(len(chosen) / columns)
    figure = Figure(figsize=(3.4 * columns, 3.1 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes[len(chosen) :]:
        ax.set_visible(False)
    for ax, report in zip(axes, chosen, strict=False):
        _draw_function(figure, ax, layer, x, report)
    return figure


def _draw_function(figure: Figure, ax, layer: LMKAN2DLayer, x: Tensor | None, report: FunctionReport) -> None:  # type: ignore[no-untyped-def]
    knots = layer.borders.double().cpu()
    low, high = knots[0].item(), knots[-1].item()
    line = torch.linspace(low, high, _RESOLUTION, dtype=torch.float64)
    grid = torch.stack([t.flatten() for t in torch.meshgrid(line, line, indexing="ij")])
    o, p = report.output, report.pair
    table = layer.func_parameter.detach()[:, :, o : o + 1, p : p + 1].double().cpu()
    values = reference.evaluate(grid, table, knots).view(_RESOLUTION, _RESOLUTION)
    middle, spread = values.mean().item(), (values - values.mean()).abs().max().item() or 1.0
    image = ax.imshow(
        values.T.numpy(),
        origin="lower",
        extent=(low, high, low, high),
        cmap="RdBu_r",
        vmin=middle - spread,
        vmax=middle + spread,
    )
    figure.colorbar(image, ax=ax, shrink=0.8)
    if x is not None:
        rows = x[2 * p : 2 * p + 2].detach().double().cpu()
        _draw_density(ax, pad(rows, (0, 0, 0, 2 - len(rows))), low, high)
    inner = knots[1:-1].tolist()
    ax.set_xticks(inner, minor=True)
    ax.set_yticks(inner, minor=True)
    ax.grid(which="minor", color="black", alpha=0.15, linewidth=0.5)
    ax.tick_params(which="minor", length=3)
    ax.set_xlim(low, high)
    ax.set_ylim(low, high)
    ax.set_xlabel(f"input {2 * p}")
    ax.set_ylabel(f"input {2 * p + 1}")
    ax.set_title(f"output {o}, pair {p}: strength {report.strength:.3g}", fontsize=9)


def _draw_density(ax, x: Tensor, low: float, high: float) -> None:  # type: ignore[no-untyped-def]
    edges = torch.linspace(low, high, _BINS + 1, dtype=torch.float64)
    counts = torch.histogramdd(x.T.contiguous(), bins=[edges, edges]).hist
    distance = torch.arange(-6, 7, dtype=torch.float64)
    blur = torch.softmax(-(distance**2) / (2 * _BLUR**2), dim=0)
    counts = conv2d(counts[None, None], torch.outer(blur, blur)[None, None], padding=6)[0, 0]
    if counts.max() == 0:
        return
    falling = counts.flatten().sort(descending=True).values
    held = falling.cumsum(0) / falling.sum()
    # the count at which bins at least that full hold a given part of all samples
    levels = sorted({falling[min(int((held < part).sum()), len(falling) - 1)].item() for part in (0.5, 0.95)})
    levels = [level for level in levels if 0 < level < counts.max().item()]
    if levels:
        centres = ((edges[1:] + edges[:-1]) / 2).numpy()
        ax.contour(centres, centres, counts.T.numpy(), levels=levels, colors="black", linewidths=0.9)


def plot_occupancy(layer: LMKAN2DLayer, x: Tensor) -> Figure:
    """How many samples each knot has a say in: its average over pairs, and the emptiest pair.

    Args:
        layer: any.
        x: ``[input_dim, samples]``, what reached it.
    """
    counts = occupancy(layer, x).double().cpu()
    reached = (counts > 0).double().mean(dim=(1, 2))
    worst = int(reached.argmin())
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = (
        (counts.mean(0), f"mean of {len(counts)} pairs: {reached.mean():.0%} of knots reached"),
        (counts[worst], f"pair {worst}, the emptiest: {reached[worst]:.0%} reached"),
    )
    for ax, (values, title) in zip(figure.subplots(1, 2), panels, strict=True):
        image = ax.imshow((values + 1).log10().T.numpy(), origin="lower", cmap="viridis")
        figure.colorbar(image, ax=ax, label="log10(1 + samples)", shrink=0.8)
        ax.set(xlabel="knot of the first input", ylabel="knot of the second input")
        ax.set_title(title, fontsize=10)
    return figure


def plot_strengths(layer: LMKAN2DLayer, x: Tensor | None = None) -> Figure:
    """Strength of every function, and how much of it is not affine, as maps of outputs by pairs."""
    reports = describe_functions(layer, x)
    maps = torch.zeros(2, layer.output_dim, layer.func_parameter.shape[3], dtype=torch.float64)
    for report in reports:
        maps[0, report.output, report.pair] = report.strength
        maps[1, report.output, report.pair] = report.residual / (report.strength or 1.0)
    figure = Figure(figsize=(10, 4), layout="constrained")
    titles = ("strength", "part that is not affine")
    for ax, values, title in zip(figure.subplots(1, 2), maps, titles, strict=True):
        image = ax.imshow(values.numpy(), aspect="auto", cmap="magma", vmin=0, interpolation="nearest")
        figure.colorbar(image, ax=ax, shrink=0.8)
        ax.set(xlabel="pair of inputs", ylabel="output")
        ax.set_title(title, fontsize=10)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.yaxis.get_major_locator().set_params(integer=True)
    return figure
