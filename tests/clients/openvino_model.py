"""OpenVINO: exported lmKAN networks on the CPU, in float32.

On CPUs that have bfloat16 instructions OpenVINO uses them for matrix products unless told otherwise. The
linear paths of a preconditioned network, and linear layers beside lmKAN layers, are then about 1e-3 to 1e-2
off, as networks of linear layers alone are. ``INFERENCE_PRECISION_HINT`` switches that off.

`openvino.save_model` rounds constants to float16 by default, knots included; ``compress_to_fp16=False``
switches that off.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import openvino
import torch
from torch import Tensor, nn

from lmkan_gen import convert
from lmkan_gen.nn import LMKANMLP, LMKANLinear, lmkan_layers
from tests.clients.checks import close, outputs, run

FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}


def exported(model: nn.Module, x: Tensor, folder: str) -> Path:
    """The ONNX file of a model whose first axis is dynamic."""
    path = Path(folder) / "model.onnx"
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    return path


def predict(path: Path, x: Tensor, options: dict[str, str] = FLOAT32) -> Tensor:
    """What OpenVINO makes of the file on the CPU."""
    compiled = openvino.Core().compile_model(path, "CPU", options)
    return torch.from_numpy(compiled(x.numpy())[0])


def exact(model: nn.Module, x: Tensor) -> Tensor:
    """Outputs in float64, from plain torch; the model is float32 again afterwards."""
    y = outputs(model.double(), x.double())
    model.float()
    return y


def rough(model: nn.Module) -> nn.Module:
    """The model with larger coefficients than initial ones, and with statistics of batch norm."""
    for layer in lmkan_layers(model).values():
        nn.init.normal_(layer.func_parameter, std=0.3)
    model.train()(torch.randn(500, 5))
    return model.eval()


def any_batch() -> str:
    """An exported network has the outputs of float64, for any number of samples"""
    model = rough(LMKANMLP((5, 16, 16, 3), num_grids=8, precondition="relu_first"))
    with tempfile.TemporaryDirectory() as folder:
        path = exported(model, torch.randn(7, 5), folder)
        for count in (1, 2, 7, 2000):
            x = torch.randn(count, 5)
            worst = close(predict(path, x), exact(model, x), 1e-5)
    return f"1, 2, 7, 2000 samples; {worst}"


def without_products() -> str:
    """A network without matrix products has the outputs of float64 with OpenVINO's own settings too"""
    model = rough(LMKANLinear(5, 4, num_grids=21))
    x = torch.randn(2000, 5)
    with tempfile.TemporaryDirectory() as folder:
        path = exported(model, x, folder)
        return close(predict(path, x, {}), exact(model, x), 1e-5)


def saved() -> str:
    """OpenVINO's own files have the outputs of float64 if their constants stay float32"""
    model = rough(LMKANMLP((5, 16, 3), num_grids=8))
    x = torch.randn(500, 5)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        openvino.save_model(openvino.convert_model(exported(model, x, folder)), path, compress_to_fp16=False)
        return close(predict(path, x), exact(model, x), 1e-5)


def converted() -> str:
    """A converted and exported MLP has the outputs of the MLP"""
    mlp = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))
    x = torch.randn(300, 6)
    with tempfile.TemporaryDirectory() as folder:
        path = exported(convert(mlp, num_grids=8).eval(), x, folder)
        return close(predict(path, x), exact(mlp, x), 1e-5)


if __name__ == "__main__":
    run(any_batch, without_products, saved, converted)
