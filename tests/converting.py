"""Models before and after `convert`."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmkan_gen import convert
from lmkan_gen.nn import LMKANLinear


def converted_names(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, LMKANLinear)]


def assert_same(found: nn.Module, expected: nn.Module, x: Tensor) -> None:
    """In both modes, with and without gradients."""
    for training in (True, False):
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                a, b = found.train(training)(x), expected.train(training)(x)
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def convert_with_warning(model: nn.Module, message: str, **arguments: Any) -> nn.Module:
    """Convert; there is one warning, it matches, and outputs are the same."""
    with pytest.warns(UserWarning, match=message) as caught:
        converted = convert(model, **arguments)
    assert len([w for w in caught if "convert left" in str(w.message)]) == 1
    return converted


def convert_silently(model: nn.Module, **arguments: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return convert(model, **arguments)
