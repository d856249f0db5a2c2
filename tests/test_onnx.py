"""`torch.onnx.export` and ONNX Runtime: standard operators, the numbers of the layer for any input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim, export

from lmkan_gen import LMKAN2DLayer, fold
from lmkan_gen.nn import LMKANMLP, LMKANConv2d, LMKANLinear, lmkan_layers
from tests import truth

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Runtime:
    """An ONNX file in ONNX Runtime."""

    def __init__(self, path: Path) -> None:
        model = onnx.load(path)
        onnx.checker.check_model(model)
        assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
        self.operators = {node.op_type for node in model.graph.node}
        self.nodes = len(model.graph.node)
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def __call__(self, x: Tensor) -> NDArray[Any]:
        (y,) = self.session.run(None, {self.session.get_inputs()[0].name: x.numpy()})
        return np.asarray(y)


def exported(model: nn.Module, x: Tensor, path: Path, axis: int = 0) -> Runtime:
    """The model with a dynamic batch, in ONNX Runtime."""
    shapes = ({axis: Dim("batch")},)
    torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    return Runtime(path)


def exact(layer: LMKAN2DLayer, x: Tensor) -> truth.Truth:
    """Outputs from the formulas in float64, of the table that the layer computes with."""
    table = layer.func_parameter.detach() if layer.frozen is None else layer.frozen.table.to(torch.float64)
    if layer.input_dim % 2:
        x = torch.cat((x, torch.zeros_like(x[:1])))
    return truth.compute(x, table.double(), layer.borders, torch.zeros(layer.output_dim, x.shape[1]))


@pytest.mark.parametrize("frozen", [None, torch.float32, torch.float16, torch.bfloat16, torch.int8])
def test_layers(tmp_path: Path, frozen: torch.dtype | None) -> None:
    layer = LMKAN2DLayer(7, 75, 4).eval()
    nn.init.normal_(layer.func_parameter)
    if frozen is not None:
        layer.freeze(frozen)
    runtime = exported(layer, torch.randn(75, 3), tmp_path / "layer.onnx", axis=1)
    assert "MatMul" not in runtime.operators
    assert runtime.nodes < 90
    inputs = [1.5 * torch.randn(75, batch) for batch in (1, 2, 10)]
    inputs += [layer.borders[torch.randint(8, (75, 20))], 1e3 * torch.randn(75, 5)]
    for x in inputs:
        expected = exact(layer, x)
        assert truth.scaled_error(runtime(x), expected.y, expected.y_magnitude) < 1e-6
    assert runtime(torch.randn(75, 0)).shape == (4, 0)
    if frozen is not None:  # the file has narrow coefficients
        coefficients = layer.func_parameter.numel() * frozen.itemsize
        held = sum(path.stat().st_size for path in tmp_path.iterdir())
        assert coefficients < held < coefficients + 2e5


@pytest.mark.parametrize("value", [1e30, -1e30, torch.inf, -torch.inf, torch.nan])
def test_any_input(tmp_path: Path, value: float) -> None:
    layer = LMKANLinear(5, 4, 6).eval()
    nn.init.normal_(layer.layer.func_parameter)
    runtime = exported(layer, torch.randn(3, 5), tmp_path / "layer.onnx")
    x = torch.randn(30, 5)
    x[torch.arange(10), torch.randint(5, (10,))] = value
    y = runtime(x)
    with torch.no_grad():
        expected = layer(x).numpy()
    assert np.array_equal(np.isfinite(y), np.isfinite(expected))
    assert np.isfinite(y[10:]).all()
    assert np.isnan(y[:10]).all() or value == value
    finite = np.isfinite(y).all(1)
    right = exact(layer.layer, x[torch.from_numpy(finite)].T)
    assert truth.scaled_error(y[finite].T, right.y, right.y_magnitude) < 1e-6


@pytest.mark.parametrize("finished", [True, False])
def test_networks(tmp_path: Path, finished: bool) -> None:
    model = LMKANMLP((5, 16, 3), 6, precondition="relu_first", normalize_input=True)
    for layer in lmkan_layers(model).values():
        nn.init.normal_(layer.func_parameter)
    model(torch.randn(100, 5))
    x = torch.randn(50, 5)
    for each in (model.eval(), fold(model)):
        if finished:
            program = export(each, (torch.randn(2, 5),), dynamic_shapes=({0: Dim("batch")},))
            torch.onnx.export(program, (), tmp_path / "network.onnx", dynamo=True, verbose=False)
            runtime = Runtime(tmp_path / "network.onnx")
        else:
            runtime = exported(each, torch.randn(2, 5), tmp_path / "network.onnx")
        with torch.no_grad():
            expected = each.double()(x.double()).numpy()
        each.float()
        assert truth.relative_error(runtime(x), expected) < 3e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_types(tmp_path: Path, dtype: torch.dtype) -> None:
    layer = LMKANLinear(7, 4, 6, dtype=dtype).eval()
    nn.init.normal_(layer.layer.func_parameter)
    x = torch.randn(30, 7, dtype=dtype)
    y = exported(layer, torch.randn(3, 7, dtype=dtype), tmp_path / "layer.onnx")(x)
    assert y.dtype == x.numpy().dtype
    expected = exact(layer.layer, x.double().T)
    assert truth.scaled_error(y.T, expected.y, expected.y_magnitude) < torch.finfo(dtype).eps


@pytest.mark.parametrize("frozen", [None, torch.float16])
def test_convolutions(tmp_path: Path, frozen: torch.dtype | None) -> None:
    model = LMKANConv2d(2, 3, 3, 5, stride=2, padding=1).eval()
    nn.init.normal_(model.layer.func_parameter)
    if frozen is not None:
        model.layer.freeze(frozen)
    runtime = exported(model, torch.randn(3, 2, 8, 8), tmp_path / "convolution.onnx")
    for batch in (1, 4):
        x = torch.randn(batch, 2, 8, 8)
        np.testing.assert_allclose(runtime(x), model(x).detach().numpy(), rtol=1e-5, atol=1e-5)
