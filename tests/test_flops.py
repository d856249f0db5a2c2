"""FLOPs are those of two linear layers; scripts are refused in our words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lmkan_gen import LMKAN2DLayer


@pytest.mark.parametrize("inputs", [8, 6])
def test_flops_are_twice_those_of_a_linear_layer(inputs: int) -> None:
    layer, linear = LMKAN2DLayer(5, inputs, 7), torch.nn.Linear(inputs, 7, bias=False)
    x = torch.randn(inputs, 20, requires_grad=True)
    for backward in (False, True):
        counts = []
        for module, y in ((layer, x), (linear, x.T)):
            with FlopCounterMode(display=False) as counter:
                result = module(y)
                if backward:
                    result.sum().backward()
            counts.append(counter.get_total_flops())
        assert counts[0] == 2 * counts[1] > 0
    layer.eval().freeze(torch.float16)
    with FlopCounterMode(display=False) as counter:
        layer(x.detach())
    assert counter.get_total_flops() == 4 * inputs * 7 * 20


def test_flops_of_forward_mode() -> None:
    layer, x = LMKAN2DLayer(5, 8, 7), torch.randn(8, 20)
    with FlopCounterMode(display=False) as counter:
        torch.func.jvp(layer, (x,), (torch.randn_like(x),))
    one_pass = 4 * 8 * 7 * 20  # twice a linear layer
    assert counter.get_total_flops() == 2 * one_pass


def count(function: Any, module: torch.nn.Module, x: torch.Tensor) -> int:
    """FLOPs of the second backward pass of a loss on the gradient of ``function`` in the inputs."""
    (force,) = torch.autograd.grad(function(module(x)), x, create_graph=True)
    loss = force.square().sum()
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(loss, [x, *module.parameters()], allow_unused=True)
    total: int = counter.get_total_flops()
    return total


def test_flops_of_second_derivatives() -> None:
    layer, linear = LMKAN2DLayer(5, 8, 7), torch.nn.Linear(8, 7, bias=False)
    one_pass = 4 * 8 * 7 * 20
    x = torch.randn(8, 20, requires_grad=True)
    # outputs get no gradient: terms for inputs (zero in a linear layer) and table
    assert count(torch.sum, layer, x) == 2 * one_pass
    # they do: a term more for them, and the first backward pass again
    samples = x.detach().T.clone().requires_grad_()
    of_linear = count(lambda y: y.square().sum(), linear, samples)
    assert count(lambda y: y.square().sum(), layer, x) == 2 * of_linear + one_pass


def test_scripts_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script knows no lmKAN layers; use torch\.compile"):
        torch.jit.script(torch.nn.Sequential(LMKAN2DLayer(5, 4, 3)))
