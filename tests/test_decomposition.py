"""Operators in terms of torch's own: what exported graphs compute where this package is not at hand."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.onnx
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from lmkan_gen import LMKAN2DLayer, decompositions, fold, lmkan
from lmkan_gen.nn import LMKANMLP, LMKANConv2d, LMKANLinear, lmkan_layers
from tests import truth

NARROW = [torch.float32, torch.float16, torch.bfloat16, torch.int8]


def decomposed(model: nn.Module, x: Tensor, axis: int = 0) -> nn.Module:
    """The model as a graph of operators of torch, with a dynamic batch."""
    program = export(model, (x,), dynamic_shapes=({axis: Dim("batch")},))
    assert "lmkan_gen" in namespaces(program)
    plain = program.run_decompositions(decompositions())
    assert namespaces(plain) <= {"aten", "_operator"}
    module: nn.Module = plain.module()
    return module


def namespaces(program: ExportedProgram) -> set[str]:
    """Where the operators that a program calls come from."""
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    return {str(getattr(t, "namespace", None) or t.__module__) for t in targets}


def wide(model: nn.Module) -> nn.Module:
    """The model with coefficients of a normal distribution, as after training."""
    for layer in lmkan_layers(model).values():
        nn.init.normal_(layer.func_parameter)
    return model


def exact(layer: LMKAN2DLayer, x: Tensor) -> truth.Truth:
    """The layer's outputs from its formulas in float64, of the table that it computes with."""
    table = layer.func_parameter.detach()
    if layer.frozen is not None:
        table = layer.frozen.table.to(torch.float64)
    if layer.input_dim % 2:
        x = torch.cat((x, torch.zeros_like(x[:1])))
    return truth.compute(x, table.double(), layer.borders, torch.zeros(layer.output_dim, x.shape[1]))


@pytest.mark.parametrize("inputs", [1, 2, 7, 40, 300])
@pytest.mark.parametrize("grids", [3, 10])
@torch.no_grad()
def test_computes_the_definition(inputs: int, grids: int) -> None:
    layer = LMKAN2DLayer(grids, inputs, 5)
    found = decomposed(wide(layer), torch.randn(inputs, 7), axis=1)
    for batch in (1, 2, 15):
        x = 1.5 * torch.randn(inputs, batch)
        expected = exact(layer, x)
        assert truth.scaled_error(found(x), expected.y, expected.y_magnitude) < 1e-6


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("inputs", [5, 300])
@torch.no_grad()
def test_frozen_layers(dtype: torch.dtype, inputs: int) -> None:
    layer = LMKAN2DLayer(6, inputs, 4).eval()
    wide(layer)
    layer.freeze(dtype)
    x = 1.5 * torch.randn(inputs, 9)
    found = decomposed(layer, torch.randn(inputs, 7), axis=1)
    expected = exact(layer, x)
    assert truth.scaled_error(found(x), expected.y, expected.y_magnitude) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_other_types(dtype: torch.dtype) -> None:
    layer = LMKANLinear(7, 4, 6, dtype=dtype)
    wide(layer)
    x = torch.randn(30, 7, dtype=dtype)
    y = decomposed(layer, x)(x)
    assert y.dtype == dtype
    expected = exact(layer.layer, x.double().T)
    assert truth.scaled_error(y.T.double(), expected.y, expected.y_magnitude) < torch.finfo(dtype).eps


@pytest.mark.parametrize("table_dtype", ["float32", "float16", "bfloat16", "int8"])
@torch.no_grad()
def test_tables_that_a_call_rounds(table_dtype: str) -> None:
    class Rounds(LMKAN2DLayer):
        def batch_last(self, x: Tensor) -> Tensor:
            return lmkan(x, self.func_parameter, self.borders, table_dtype=table_dtype)

    model, x = Rounds(5, 6, 3), torch.randn(6, 20)
    assert truth.relative_error(decomposed(wide(model), x, axis=1)(x), model(x).double().numpy()) < 1e-6


@pytest.mark.parametrize("precondition", [None, "relu_first", "relu_last"])
@torch.no_grad()
def test_networks(precondition: Any) -> None:
    model = LMKANMLP((5, 40, 3), 6, precondition=precondition, normalize_input=True)
    wide(model)(torch.randn(300, 5))  # statistics
    model.eval()
    models = [model] if precondition == "relu_last" else [model, fold(model)]
    x = torch.randn(100, 5)
    for each in models:
        found = decomposed(each, torch.randn(7, 5))(x)
        expected = each.double()(x.double())
        assert truth.relative_error(found, expected.numpy()) < 2e-6
        each.float()


@pytest.mark.parametrize("value", [1e3, -1e3, 1e30, -1e30, torch.inf, -torch.inf, torch.nan])
@torch.no_grad()
def test_any_input(value: float) -> None:
    layer = LMKAN2DLayer(6, 5, 4)
    found = decomposed(wide(layer), torch.randn(5, 7), axis=1)
    x = torch.randn(5, 40)
    x[torch.randint(5, (10,)), torch.arange(10)] = value
    y = found(x)
    assert not y[:, 10:].isnan().any()
    if abs(value) < 1e31:
        expected = exact(layer, x)
        assert truth.scaled_error(y, expected.y, expected.y_magnitude) < 1e-6
    else:
        # infinities, or their differences: as the layer has them, up to which of the two
        assert torch.equal(y.isfinite(), layer(x).isfinite())
        expected = exact(layer, x[:, 10:])
        assert truth.scaled_error(y[:, 10:], expected.y, expected.y_magnitude) < 1e-6
    if value != value:
        assert y[:, :10].isnan().all()


@torch.no_grad()
def test_knots_belong_to_a_cell() -> None:
    layer = LMKAN2DLayer(9, 6, 4)
    found = decomposed(wide(layer), torch.randn(6, 7), axis=1)
    x = layer.borders[torch.randint(10, (6, 50))]
    expected = exact(layer, x)
    assert truth.scaled_error(found(x), expected.y, expected.y_magnitude) < 1e-6


def test_is_differentiable() -> None:
    layer = LMKAN2DLayer(6, 6, 4)
    wide(layer)
    x = torch.from_numpy(truth.away_from_knots(torch.randn(6, 9).numpy(), layer.borders.numpy()))
    plain = decompositions()[torch.ops.lmkan_gen.forward.default]
    leaf, table = x.clone().requires_grad_(), layer.func_parameter
    grad = torch.randn(4, 9)
    found = torch.autograd.grad(plain(leaf, table, layer.borders, "float32"), [leaf, table], grad)
    expected = truth.compute(x, table.detach(), layer.borders, grad)
    assert truth.scaled_error(found[0], expected.grad_x, expected.grad_x_magnitude) < 1e-6
    assert truth.scaled_error(found[1], expected.grad_table, expected.grad_table_magnitude) < 1e-6


@pytest.mark.parametrize("dtype", [None, *NARROW])
def test_onnx_export_decomposes(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | None) -> None:
    """As within `torch.onnx.export`, which gives a table of its own; its packages need not be there."""
    layer = LMKANLinear(5, 4).eval()
    if dtype is not None:
        layer.layer.freeze(dtype)
    x = torch.randn(7, 5)
    program = export(layer, (x,))
    assert "lmkan_gen" in namespaces(program.run_decompositions())
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    for before in (program, export(layer, (x,))):
        plain = before.run_decompositions()
        assert namespaces(plain) <= {"aten", "_operator"}
        with torch.no_grad():
            assert truth.relative_error(plain.module()(x), layer(x).double().numpy()) < 1e-6


def test_compile_calls_the_operators_as_they_are() -> None:
    """Also where CI is set: inductor then refuses operators with a decomposition in torch's own table."""
    script = (
        "import torch, lmkan_gen\n"
        "from torch._decomp import decomposition_table\n"
        "from torch._inductor.utils import run_and_get_code\n"
        "layer = lmkan_gen.LMKAN2DLayer(5, 4, 3)\n"
        "assert not [op for op in decomposition_table if 'lmkan_gen' in str(op)]\n"
        "with torch.no_grad():\n"
        "    y, code = run_and_get_code(torch.compile(layer), torch.randn(4, 7))\n"
        "assert 'torch.ops.lmkan_gen.forward.default' in code[0], code\n"
    )
    environment = {**os.environ, "CI": "true", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("frozen", [None, torch.float16, torch.int8])
@torch.no_grad()
def test_convolutions(frozen: torch.dtype | None) -> None:
    model = LMKANConv2d(
        2, 3, (2, 3), 5, stride=(2, 1), padding=1, dilation=(1, 2), workspace_bytes=500
    ).eval()
    wide(model)
    if frozen is not None:
        model.layer.freeze(frozen)
    found = decomposed(model, torch.randn(3, 2, 6, 7))
    for batch in (1, 2, 5):
        x = torch.randn(batch, 2, 6, 7)
        torch.testing.assert_close(found(x), model(x), rtol=1e-5, atol=1e-5)
