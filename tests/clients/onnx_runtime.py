"""ONNX Runtime: networks that `torch.onnx.export` wrote, with importing lmkan_gen as the only preparation."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from lmkan_gen import convert
from lmkan_gen.nn import LMKANMLP, LMKANConv2d, lmkan_layers
from tests.clients.checks import close, deviation, outputs, require, run


def network(grids: int = 8) -> LMKANMLP:
    """A network with an odd number of inputs, and with statistics of batch norm."""
    model = LMKANMLP((5, 16, 16, 3), num_grids=grids, precondition="relu_first")
    for layer in lmkan_layers(model).values():
        nn.init.normal_(layer.func_parameter, std=0.3)
    model(torch.randn(200, 5))
    return model.eval()


def session(model: nn.Module, x: Tensor, folder: str, dynamic: bool = True) -> onnxruntime.InferenceSession:
    """What ONNX Runtime makes of the exported model; the first axis of its input may be dynamic."""
    path = Path(folder) / "model.onnx"
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    written = onnx.load(path)
    onnx.checker.check_model(written)
    own = {node.domain for node in written.graph.node} - {"", "ai.onnx"}
    require(not own, f"the graph needs operators of {own}")
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run_session(found: onnxruntime.InferenceSession, x: Tensor) -> Tensor:
    """The only output for the only input."""
    (y,) = found.run(None, {found.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(np.asarray(y))


def exact(model: nn.Module, x: Tensor) -> Tensor:
    """Outputs in float64, from plain torch; the model is float32 again afterwards."""
    y = outputs(model.double(), x.double())
    model.float()
    return y


def any_batch() -> str:
    """An exported network is as close to float64 as the kernels are, for any number of samples"""
    words = []
    for grids in (3, 8, 21):
        model = network(grids)
        x = torch.randn(1000, 5)
        expected = exact(model, x)
        with tempfile.TemporaryDirectory() as folder:
            found = session(model, torch.randn(7, 5), folder)
            parts = [run_session(found, part) for part in x.split((1, 2, 7, 990))]
        own = deviation(outputs(model, x), expected)
        words.append(f"{grids} grids: {close(torch.cat(parts), expected, 1e-6 + 3 * own)}, kernels {own:.1e}")
    return "; ".join(words)


def far_outside() -> str:
    """An exported network extrapolates far outside the grid, and takes inputs at knots"""
    model = nn.Sequential(convert(nn.Linear(4, 3), num_grids=8))
    layer = next(iter(lmkan_layers(model).values()))
    nn.init.normal_(layer.func_parameter)
    x = torch.cat([100 * torch.randn(200, 4), layer.borders[torch.randint(9, (200, 4))]])
    with tempfile.TemporaryDirectory() as folder:
        found = run_session(session(model, x, folder), x)
    expected = exact(model, x)
    close(found[200:], expected[200:], 1e-5)
    return close(found[:200], expected[:200], 1e-5)


def not_numbers() -> str:
    """NaN in gives NaN in that sample and in no other, as the layer itself does"""
    model = network()
    x = torch.randn(6, 5)
    x[2, 3] = torch.nan
    with tempfile.TemporaryDirectory() as folder:
        found = run_session(session(model, torch.randn(7, 5), folder), x)
    rows = found.isnan().all(1)
    require(rows.tolist() == [False, False, True, False, False, False], f"rows of NaN: {rows.tolist()}")
    others = [0, 1, 3, 4, 5]
    return close(found[others], exact(model, x)[others], 1e-5)


def converted() -> str:
    """A converted and exported MLP has the outputs of the MLP"""
    mlp = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))
    x = torch.randn(300, 6)
    with tempfile.TemporaryDirectory() as folder:
        found = run_session(session(convert(mlp, num_grids=8).eval(), x, folder), x)
    return close(found, exact(mlp, x), 1e-5)


def convolved(dynamic: bool) -> str:
    """The deviation of an exported convolutional network from float64."""
    convolution = LMKANConv2d(3, 8, 3, num_grids=8, padding=1, stride=2)
    model = nn.Sequential(convolution, nn.Flatten(), nn.Linear(128, 4)).eval()
    x = torch.randn(5, 3, 8, 8)
    with tempfile.TemporaryDirectory() as folder:
        found = session(model, x, folder, dynamic)
        for images in (x, torch.randn(9, 3, 8, 8))[: 1 + dynamic]:
            word = close(run_session(found, images), exact(model, images), 1e-5)
    return word


def convolution() -> str:
    """An exported convolutional network has the outputs of float64, for a fixed number of images"""
    return convolved(dynamic=False)


def convolution_any_batch() -> str:
    """An exported convolutional network has the outputs of float64, for any number of images"""
    return convolved(dynamic=True)


if __name__ == "__main__":
    run(any_batch, far_outside, not_numbers, converted, convolution, convolution_any_batch)
