"""Captum: attributions of lmKAN networks against what they must add up to."""

from __future__ import annotations

import torch
from captum.attr import (
    FeatureAblation,
    IntegratedGradients,
    LayerIntegratedGradients,
    Saliency,
    ShapleyValues,
)
from torch import Tensor, nn

from lmkan_gen import convert
from lmkan_gen.nn import LMKANBlock, hessian_penalty, lmkan_layers
from tests.clients.checks import close, outputs, require, run, samples

INPUTS, STEPS = 4, 1000


def network() -> nn.Sequential:
    """A trained network in evaluation mode, smooth enough for integrals along lines.

    Its blocks take the batch first, as Captum wants it of inner layers.
    """
    model = nn.Sequential(LMKANBlock(INPUTS, 16, normalize=False), LMKANBlock(16, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        x, y = samples(512, INPUTS)
        loss = nn.functional.mse_loss(model(x), y) + 1e-3 * hessian_penalty(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def changes(model: nn.Module, x: Tensor, baseline: Tensor) -> Tensor:
    """Outputs for ``x`` less those for ``baseline``, ``[samples]``."""
    return (outputs(model, x) - outputs(model, baseline.expand_as(x))).squeeze(1)


def integrated() -> str:
    """Integrated gradients add up to the change of the output"""
    model = network()
    x, baseline = samples(50, INPUTS)[0], torch.full((1, INPUTS), 0.1)
    # the integrand jumps at knots, so that the sum converges like 1 / n_steps
    options = {"target": 0, "n_steps": STEPS, "method": "riemann_middle"}
    found = IntegratedGradients(model).attribute(x, baseline, **options)
    require(found.abs().mean(0).min().item() > 1e-3, "an input is never attributed anything")
    return close(found.sum(1), changes(model, x, baseline), 2e-3)


def frozen() -> str:
    """Integrated gradients of a network with float16 tables add up to the change of its output"""
    model = network()
    for layer in lmkan_layers(model).values():
        layer.freeze(torch.float16)
    x, baseline = samples(50, INPUTS)[0], torch.full((1, INPUTS), 0.1)
    options = {"target": 0, "n_steps": STEPS, "method": "riemann_middle"}
    found = IntegratedGradients(model).attribute(x, baseline, **options)
    return close(found.sum(1), changes(model, x, baseline), 2e-3)


def of_a_layer() -> str:
    """Integrated gradients of an inner layer's units add up to the change of the output"""
    model = network()
    x, baseline = samples(50, INPUTS)[0], torch.full((1, INPUTS), 0.1)
    inner = LayerIntegratedGradients(model, model[0])
    options = {"target": 0, "n_steps": STEPS, "method": "riemann_middle"}
    found = inner.attribute(x, baseline.expand_as(x), **options)
    require(found.shape == (50, 16), f"attributions have shape {list(found.shape)}")
    return close(found.sum(1), changes(model, x, baseline), 2e-3)


def converted() -> str:
    """Integrated gradients of a converted MLP are those of the MLP"""
    mlp = nn.Sequential(nn.Linear(INPUTS, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    x, baseline = samples(50, INPUTS)[0], torch.full((1, INPUTS), 0.1)
    found, expected = (
        IntegratedGradients(model).attribute(x, baseline, target=0, n_steps=100)
        for model in (convert(mlp, num_grids=8), mlp)
    )
    return close(found, expected, 1e-4)


def ablated() -> str:
    """Ablating a feature is attributed the change of the output that ablation makes"""
    model = network()
    x, baseline = samples(50, INPUTS)[0], torch.full((1, INPUTS), 0.1)
    found = FeatureAblation(model).attribute(x, baseline.expand_as(x), target=0)
    expected = torch.empty_like(x)
    for feature in range(INPUTS):
        without = x.clone()
        without[:, feature] = baseline[0, feature]
        expected[:, feature] = outputs(model.double(), x.double()).squeeze(1) - outputs(
            model, without.double()
        ).squeeze(1)
        model.float()
    return close(found, expected, 1e-5)


def shared() -> str:
    """Shapley values add up to the change of the output"""
    model = network()
    x, baseline = samples(20, INPUTS)[0], torch.full((1, INPUTS), 0.1)
    found = ShapleyValues(model).attribute(x, baseline.expand_as(x), target=0)
    return close(found.sum(1), changes(model, x, baseline), 1e-5)


def salient() -> str:
    """Saliency is the gradient that finite differences give in float64"""
    model = network()
    x = samples(30, INPUTS)[0]
    found = Saliency(model).attribute(x, target=0, abs=False)
    model, x = model.double(), x.double()
    expected, step = torch.empty_like(x), 1e-6
    for feature in range(INPUTS):
        shift = torch.zeros(INPUTS, dtype=torch.float64)
        shift[feature] = step
        rise = outputs(model, x + shift) - outputs(model, x - shift)
        expected[:, feature] = rise.squeeze(1) / (2 * step)
    return close(found, expected, 1e-4)


if __name__ == "__main__":
    run(integrated, frozen, of_a_layer, converted, ablated, shared, salient)
