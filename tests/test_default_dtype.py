"""torch.set_default_dtype: modules follow it as those of torch do, and nothing else depends on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from lmkan_gen import LMKAN2DLayer, convert, fold, refine
from lmkan_gen.inspection import describe_functions
from lmkan_gen.nn import LMKANMLP, BatchLastNorm, LMKANBlock, LMKANConv2d, LMKANLinear, ReLUFirst, ReLULast
from lmkan_gen.problem import LayerShape, Operation, TableDtype
from lmkan_gen.tuner import roofline
from lmkan_gen.tuner.bench import rotated_buffers
from lmkan_gen.tuner.verify import Mismatch, make_cases, output_shapes

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
OTHERS = DTYPES[1:]

MODULES: dict[str, Callable[..., nn.Module]] = {
    "layer": lambda **o: LMKAN2DLayer(6, 5, 4, batch_first=True, **o),
    "linear": lambda **o: LMKANLinear(5, 4, **o),
    "relu_first": lambda **o: ReLUFirst(5, 4, **o),
    "relu_last": lambda **o: ReLULast(5, 4, **o),
    "block": lambda **o: LMKANBlock(5, 4, **o),
    "mlp": lambda **o: LMKANMLP((5, 6, 4), precondition="relu_last", normalize_input=True, **o),
    "norm": lambda **o: BatchLastNorm(5, **o),
    "convolution": lambda **o: LMKANConv2d(5, 4, 1, **o),
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What torch makes without a dtype has this one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_modules_are_made_as_with_that_dtype(name: str, dtype: torch.dtype) -> None:
    seed = torch.initial_seed()
    expected = MODULES[name](dtype=dtype).state_dict()
    torch.manual_seed(seed)
    with default_dtype(dtype):
        module = MODULES[name]()
    found = module.state_dict()
    assert {p.dtype for p in module.parameters()} <= {dtype}
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor)
        if key.endswith("borders"):  # exact whatever the table is rounded to
            assert tensor.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["linear", "mlp", "relu_first"])
def test_a_module_works_between_layers_of_torch(name: str, dtype: torch.dtype) -> None:
    with default_dtype(dtype):
        model = nn.Sequential(nn.Linear(3, 5), MODULES[name](), nn.BatchNorm1d(4), nn.Linear(4, 2))
        y = model(torch.randn(20, 3))
        y.square().sum().backward()
    assert y.dtype == dtype
    assert all(
        p.grad is not None and p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters()
    )


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
def test_a_float32_layer_computes_the_same(dtype: torch.dtype) -> None:
    layer, x = LMKAN2DLayer(6, 5, 4, dtype=torch.float32), torch.randn(5, 40)

    def results() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        (y.square().sum() + layer.get_hessian_regularization()).backward()
        assert leaf.grad is not None
        assert layer.func_parameter.grad is not None
        table, layer.func_parameter.grad = layer.func_parameter.grad, None
        return [y.detach(), leaf.grad, table]

    expected = results()
    with default_dtype(dtype):
        found = results()
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
@pytest.mark.parametrize("table_dtype", [torch.float16, torch.int8], ids=str)
def test_frozen_states_are_made_and_loaded_the_same(table_dtype: torch.dtype, dtype: torch.dtype) -> None:
    first = LMKAN2DLayer(6, 20, 4).eval()
    second = LMKAN2DLayer(6, 20, 4).eval()
    twin = LMKAN2DLayer(6, 20, 4).eval()
    twin.load_state_dict(first.state_dict())
    expected, x = first.freeze(table_dtype).state_dict(), torch.randn(20, 30)
    with default_dtype(dtype), torch.no_grad():
        made = twin.freeze(table_dtype).state_dict()
        second.load_state_dict(expected)
        outputs = [layer(x) for layer in (twin, second)]
    for state in (made, second.state_dict()):
        assert state.keys() == expected.keys()
        for key, tensor in expected.items():
            assert state[key].dtype == tensor.dtype
            assert torch.equal(state[key], tensor)
    with torch.no_grad():
        assert all(torch.equal(y, first(x)) for y in outputs)


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
def test_conversions_keep_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    linear = nn.Linear(5, 8)
    mlp = nn.Sequential(linear, nn.ReLU(), nn.Linear(8, 3)).eval()
    network = LMKANMLP((5, 6, 3), precondition="relu_first")
    network(torch.randn(50, 5))

    def made() -> list[Tensor]:
        layer = LMKAN2DLayer.from_linear(linear)
        models = [layer, convert(mlp), refine(network), fold(network)]
        return [t for model in models for t in model.state_dict().values()]

    expected = made()
    with default_dtype(dtype):
        found = made()
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
def test_reports_on_functions_stay_the_same(dtype: torch.dtype) -> None:
    layer, x = LMKAN2DLayer(6, 4, 3), torch.randn(4, 100)
    expected = [describe_functions(layer), describe_functions(layer, x)]
    with default_dtype(dtype):
        assert [describe_functions(layer), describe_functions(layer, x)] == expected


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
@pytest.mark.parametrize("operation", [Operation.FORWARD, Operation.BACKWARD], ids=str)
def test_kernels_are_tuned_on_float32(operation: Operation, dtype: torch.dtype) -> None:
    shape, device = LayerShape(6, 4, 5, 20), torch.device("cpu")
    seen: list[dict[str, Tensor]] = []
    with default_dtype(dtype):
        seen += rotated_buffers(operation, shape, device)[:1]
        for table in TableDtype:
            if table is TableDtype.INT8 and operation is not Operation.FORWARD:
                continue
            case = make_cases(operation, shape, device, table)[-1]
            with pytest.raises(Mismatch, match="not written"):
                case.check(lambda buffers: seen.append(dict(buffers)), "nothing")
    assert len(seen) > 2
    for buffers in seen:
        for name in ("x", "borders", "table", *output_shapes(operation, shape)):
            assert buffers[name].dtype == torch.float32, name


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
def test_peaks_are_those_of_float32(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    seen: set[torch.dtype] = set()
    product, copy = torch.mm, torch.Tensor.copy_

    def mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        seen.add(a.dtype)
        return product(a[:1], b, out=out[:1])

    def copy_(self: Tensor, other: Tensor) -> Tensor:
        seen.add(other.dtype)
        return copy(self[:1], other[:1])

    def once(call: Callable[[], object], device: torch.device) -> float:
        call()
        return 1.0

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    monkeypatch.setattr(roofline, "_best_us", once)
    with default_dtype(dtype):
        roofline.measure_peaks(torch.device("cpu"))
    assert seen == {torch.float32}


def test_a_default_that_layers_do_not_compute_in_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.float8_e4m3fn)
    with pytest.raises(TypeError, match="float8_e4m3fn, torch's default dtype"):
        LMKAN2DLayer(6, 4, 3)
