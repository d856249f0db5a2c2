"""What a trained layer has learned, in numbers: which functions matter, which are affine, where data is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lmkan_gen.grid import coordinates
from lmkan_gen.layer import LMKAN2DLayer
from lmkan_gen.nn.conv import LMKANConv2d
from lmkan_gen.nn.layers import lmkan_layers
from lmkan_gen.watching import Watcher, watching


@dataclass(frozen=True)
class FunctionReport:
    """One function of a layer, over the data that reached it.

    Attributes:
        output: which output it contributes to, ``o``.
        pair: which inputs it takes: ``2 * pair`` and ``2 * pair + 1``.
        strength: standard deviation of its values.
        residual: root mean square of what the best affine function leaves of it.
        share: ``residual`` over the root sum of squares of the strengths of its output: about how much
            that output would change if the function were replaced by an affine one.
    """

    output: int
    pair: int
    strength: float
    residual: float
    share: float


def layer_inputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What reaches each lmKAN layer when the model is called on ``x``, in evaluation mode.

    Args:
        model: any module.
        x: its input.

    Returns:
        ``[inputs, samples]`` for each `LMKAN2DLayer` by its qualified name. For convolutions the samples
        are patches.
    """
    found: dict[str, Tensor] = {}
    watchers: dict[nn.Module, Watcher] = {}
    for name, module in model.named_modules():
        if isinstance(module, LMKANConv2d):
            watchers[module] = _keep_patches(found, f"{name}.layer".lstrip("."))
        elif isinstance(module, LMKAN2DLayer):
            watchers[module] = _keep(found, name)
    with watching(model, watchers):
        model(x)
    return {name: found[name] for name in lmkan_layers(model) if name in found}


def occupancy(layer: LMKAN2DLayer, x: Tensor) -> Tensor:
    """How many samples each knot has a say in: those in the four cells around it.

    Args:
        layer: any.
        x: ``[input_dim, samples]``, what reaches the layer.

    Returns:
        ``[ceil(input_dim/2), G+1, G+1]``, int64. Knots that nothing reaches keep their initial coefficients,
        or what the regularisation made of them.
    """
    grids = layer.num_grids
    if len(x) % 2:
        x = pad(x, (0, 0, 0, 1))
    index, _ = coordinates(x.detach(), layer.borders)
    cell = index[0::2] * grids + index[1::2]  # [P, samples]
    counts = torch.zeros(len(cell), grids * grids, dtype=torch.int64, device=x.device)
    counts.scatter_add_(1, cell, torch.ones_like(cell))
    around = torch.zeros(len(cell), grids + 1, grids + 1, dtype=torch.int64, device=x.device)
    for i in (0, 1):
        for j in (0, 1):
            around[:, i : grids + i, j : grids + j] += counts.view(-1, grids, grids)
    return around


@torch.no_grad()
def describe_functions(layer: LMKAN2DLayer, x: Tensor | None = None) -> list[FunctionReport]:
    """A report on every function, strongest first.

    Args:
        layer: any.
        x: ``[input_dim, samples]``: knots count as often as samples touch them. None: all inner knots
            count the same.
    """
    side = layer.num_grids + 1
    values = layer.func_parameter.double().flatten(0, 1).permute(2, 0, 1)  # [P, K, O]
    if x is None:
        weight = torch.zeros(side, side, dtype=torch.float64, device=values.device)
        weight[1:-1, 1:-1] = 1
        weights = weight.expand(len(values), side, side)
    else:
        weights = occupancy(layer, x).double()
    weights = weights.flatten(1)
    weights = weights / weights.sum(1, keepdim=True)
    g = layer.borders.double()
    knots = torch.stack(
        (torch.ones(side * side), *(t.flatten().cpu() for t in torch.meshgrid(g, g, indexing="ij")))
    )
    basis = knots.to(values.device).T  # [K, 3]: the affine functions
    weighted = basis.T * weights.unsqueeze(1)  # [P, 3, K]
    fit = torch.linalg.pinv(weighted @ basis) @ (weighted @ values)  # [P, 3, O]
    residual = _rms(values - basis @ fit, weights)
    strength = _rms(values - (weights.unsqueeze(1) @ values), weights)
    share = residual / strength.square().sum(0).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    reports = [
        FunctionReport(o, p, strength[p, o].item(), residual[p, o].item(), share[p, o].item())
        for p in range(len(values))
        for o in range(layer.output_dim)
    ]
    return sorted(reports, key=lambda report: -report.strength)


def near_affine(
    layer: LMKAN2DLayer, x: Tensor | None = None, tolerance: float = 0.01
) -> list[FunctionReport]:
    """Functions that an affine one could replace: candidates for pruning, least loss first.

    Args:
        layer: any.
        x: as for `describe_functions`.
        tolerance: largest `FunctionReport.share`.
    """
    reports = [report for report in describe_functions(layer, x) if report.share <= tolerance]
    return sorted(reports, key=lambda report: report.share)


def _rms(values: Tensor, weights: Tensor) -> Tensor:
    """``[P, K, O]`` -> ``[P, O]``."""
    return (values.square() * weights.unsqueeze(2)).sum(1).sqrt()


def _keep(found: dict[str, Tensor], name: str) -> Watcher:
    def watch(module: LMKAN2DLayer, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = (arguments[0] if arguments else named["x"]).detach()
        found[name] = x.reshape(-1, module.input_dim).T if module.batch_first else x

    return watch


def _keep_patches(found: dict[str, Tensor], name: str) -> Watcher:
    def watch(module: LMKANConv2d, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        found[name] = module.patches((arguments[0] if arguments else named["x"]).detach())

    return watch
