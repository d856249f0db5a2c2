"""FLOPs are those of two linear layers; scripts are refused in our words."""

from __future__ import annotations

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


def test_scripts_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script knows no lmKAN layers; use torch\.compile"):
        torch.jit.script(torch.nn.Sequential(LMKAN2DLayer(5, 4, 3)))
