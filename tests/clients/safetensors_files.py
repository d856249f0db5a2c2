"""safetensors: files of trained and of frozen networks."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from lmkan_gen.nn import LMKANMLP, lmkan_layers
from tests.clients.checks import close, outputs, require, run, samples

WIDTHS = (5, 32, 32, 1)


def network(seed: int) -> LMKANMLP:
    """A network after a few steps of training, so that no buffer has its initial value."""
    torch.manual_seed(seed)
    model = LMKANMLP(WIDTHS, num_grids=9, precondition="relu_last")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x, y = samples(256, 5)
    for _ in range(5):
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def whole_model() -> str:
    """save_model and load_model give the same outputs"""
    x, _ = samples(200, 5)
    first, second = network(1), network(2)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.safetensors")
        save_model(first, path)
        missing, unexpected = load_model(second, path, strict=True)
    require(not missing and not unexpected, f"missing {missing}, unexpected {unexpected}")
    return close(outputs(second, x), outputs(first, x), 0)


def frozen_file(table_dtype: torch.dtype) -> str:
    """Outputs before and after, and the size of the file."""
    x, _ = samples(200, 5)
    first, second = network(1).eval(), network(2).eval()
    wide = sum(t.nbytes for t in first.state_dict().values())
    coefficients = sum(layer.func_parameter.numel() for layer in lmkan_layers(first).values())
    float32 = outputs(first, x)
    for layer in lmkan_layers(first).values():
        layer.freeze(table_dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(first.state_dict(), path)
        size = path.stat().st_size
        second.load_state_dict(load_file(path), strict=True)
    saved = coefficients * (4 - torch.empty(0, dtype=table_dtype).element_size())
    require(size < wide - 0.9 * saved, f"the file has {size} bytes, float32 {wide}, {saved} could be saved")
    close(outputs(first, x), float32, 3e-2)
    return close(outputs(second, x), outputs(first, x), 0)


def frozen_float16() -> str:
    """A file with float16 tables gives the same outputs in a fresh network, and is half as large"""
    return frozen_file(torch.float16)


def frozen_bfloat16() -> str:
    """A file with bfloat16 tables gives the same outputs in a fresh network, and is half as large"""
    return frozen_file(torch.bfloat16)


def frozen_int8() -> str:
    """A file with int8 tables gives the same outputs in a fresh network, and is a quarter as large"""
    return frozen_file(torch.int8)


if __name__ == "__main__":
    run(whole_model, frozen_float16, frozen_bfloat16, frozen_int8)
