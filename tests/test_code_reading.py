"""Models whose code uses their layers by more than calls: found without running it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lmkan_gen import convert, dispatch, fold
from lmkan_gen.nn import LMKANLinear, ReLUFirst
from tests.converting import assert_same, convert_silently, convert_with_warning, converted_names


@pytest.fixture(autouse=True)
def _plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.DISABLE_VARIABLE, "1")


class GivenDtype(nn.Module):
    """As T5's feed-forward block, which looks at the type of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.wi = nn.Linear(4, 6)
        self.wo = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.wi(x).relu()
        if isinstance(self.wo.weight, Tensor) and hidden.dtype != self.wo.weight.dtype:
            hidden = hidden.to(self.wo.weight.dtype)
        y: Tensor = self.wo(hidden)
        return y


class OwnProduct(nn.Module):
    """As Mamba, BEiT, SwinV2: the weight and the bias go into a product of the block's own."""

    def __init__(self) -> None:
        super().__init__()
        self.wi = nn.Linear(4, 6)
        self.wo = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        projection = self.wo
        return functional.linear(self.wi(x), projection.weight, bias=2 * projection.bias)


class ByName(GivenDtype):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.wi(x), getattr(self, "wo").weight)  # noqa: B009


class BySuper(GivenDtype):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class ByProperty(OwnProduct):
    @property
    def scale(self) -> Tensor:
        return self.wo.weight.abs().mean()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.wo(self.wi(x)) * self.scale
        return y


def silent_decorator(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapper(*args: Any) -> Tensor:
        return function(*args)

    return wrapper


class Decorated(OwnProduct):
    @silent_decorator
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.wi(x), self.wo.weight)


class AskingType(GivenDtype):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.wo(self.wi(x))
        return 2 * y if isinstance(self.wo, nn.Linear) else y


def patched() -> nn.Module:
    """A forward that was put on the object."""
    model = GivenDtype()

    def forward(self: GivenDtype, x: Tensor) -> Tensor:
        return functional.linear(self.wi(x), self.wo.weight)

    model.forward = functools.partial(forward, model)  # type: ignore[method-assign]
    return model


def without_source() -> nn.Module:
    """From a prompt, or generated."""
    code = """class Sourceless(nn.Module):
        def __init__(self):
            super().__init__()
            self.wi, self.wo = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x):
            return functional.linear(self.inside(x), self.wo.weight)

        def inside(self, x):
            return self.wi(x)
    """
    names: dict[str, Any] = {"nn": nn, "functional": functional, "__name__": "prompt"}
    exec(code, names)
    model = names["Sourceless"]()
    assert isinstance(model, nn.Module)
    return model


READERS = [
    GivenDtype,
    OwnProduct,
    ByName,
    BySuper,
    ByProperty,
    Decorated,
    AskingType,
    patched,
    without_source,
]


@pytest.mark.parametrize("make", READERS)
def test_layers_whose_weights_are_read_are_left_alone(make: Callable[[], nn.Module]) -> None:
    model = make().double()
    read = "type" if make is AskingType else "weight"
    converted = convert_with_warning(
        model, rf"convert left 1 of 2 linear layers of .*\n- 'wo': {read} read by \w+.*; leave it so, or have"
    )
    assert converted_names(converted) == ["wi"]
    if make is not patched:  # a bound method stays that of the original, in any copy
        assert_same(converted, model, torch.randn(5, 4).double())
    with pytest.raises(
        ValueError, match=rf"only names layers .* cannot be converted:\n- 'wo': {read} read by"
    ):
        convert(model, only=["wo"])
    assert converted_names(convert_silently(model, skip=["wo"])) == ["wi"]


def test_traced_modules() -> None:
    model = torch.fx.symbolic_trace(OwnProduct().double())
    converted = convert_silently(model)
    assert converted_names(converted) == ["wi"]  # all that is left of wo is its weight
    assert_same(converted, model, torch.randn(5, 4).double())


def test_converted_models_compile_as_a_whole() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    compiled = torch.compile(convert(model), backend="eager", fullgraph=True)
    x = torch.randn(5, 4).double()
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-10, atol=1e-12)


class Above(nn.Module):
    """Reads weights two levels down, by index and in loops."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}) for _ in "12")

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            x = layer["b"](layer["a"](x))
        return x * sum(weight.mean() for weight in self.weights())

    def weights(self) -> list[Tensor]:
        return []


class FirstOf(Above):
    def weights(self) -> list[Tensor]:
        first = self.layers[0]
        return [first.a.weight]  # type: ignore[list-item, union-attr]


class AllOf(Above):
    def weights(self) -> list[Tensor]:
        return [block.a.weight for _, block in enumerate(self.layers)]  # type: ignore[misc, union-attr]


@pytest.mark.parametrize("make", [FirstOf, AllOf])
def test_weights_that_are_read_from_above(make: type[Above]) -> None:
    model = make().double()
    converted = convert_with_warning(model, r"- 'layers\.0\.a'.*: weight read by \w+\.weights")
    assert converted_names(converted) == ["layers.0.b", "layers.1.b"]  # any index counts as every one
    assert_same(converted, model, torch.randn(5, 4).double())


class Initialised(nn.Module):
    """Reads weights where that is over, and in a method that is overridden."""

    def __init__(self) -> None:
        super().__init__()
        self.wi = nn.Linear(4, 4)
        self.reset_parameters()
        self.init_weights()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.wi.bias)

    def init_weights(self) -> None:
        self.wi.weight.data.uniform_(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.wi.weight)


class Overridden(Initialised):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.wi(x).view(*x.shape[:-1], self.wi.out_features)
        return y + self.wi.in_features


def test_what_is_read_no_more_is_no_obstacle() -> None:
    model = Overridden().double()
    converted = convert_silently(model)
    assert converted_names(converted) == ["wi"]
    assert_same(converted, model, torch.randn(5, 4).double())


def test_a_weight_that_is_wanted_later_names_the_layer() -> None:
    converted = convert(nn.ModuleDict({"block": nn.Sequential(nn.Linear(4, 4))}))
    layer = copy.deepcopy(converted).get_submodule("block.0")
    for name in ("weight", "bias"):
        assert not hasattr(layer, name)
        with pytest.raises(
            AttributeError, match=rf"layer 'block.0' was .* no {name}: pass skip=\['block.0'\]"
        ):
            getattr(layer, name)
    with pytest.raises(AttributeError, match="no attribute 'weights'"):
        _ = layer.weights
    made = LMKANLinear(3, 4)
    assert (made.in_features, made.out_features) == (3, 4)
    with pytest.raises(AttributeError, match="no attribute 'weight'"):
        _ = made.weight
    assert ReLUFirst(3, 4).weight.shape == (4, 3)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True)


@pytest.mark.parametrize("make", [encoder, encoder_layer])
def test_encoders_of_torch(make: Callable[[], nn.Module]) -> None:
    """In evaluation mode without gradients they go another way, which takes weights."""
    model = make().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 5, 8).double()
    converted = convert_with_warning(
        model, r"weight read by TransformerEncoder.*set_fastpath_enabled\(False\)"
    )
    assert not converted_names(converted)
    assert_same(converted, model, x)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        converted = convert_with_warning(model, "out_proj'.*: weight read by MultiheadAttention.forward")
        assert {name.rpartition(".")[2] for name in converted_names(converted)} == {"linear1", "linear2"}
        assert_same(converted, model, x)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    with pytest.raises(AttributeError, match=r"pass skip=\['.*linear1'\]"), torch.no_grad():
        converted.eval()(x)


class TakenApart(nn.Module):
    """Wants what its members put out."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.rest = nn.Sequential(nn.ReLU(), nn.Linear(4, 4))
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.rest(getattr(self, self.way)(x))
        return y


class Iterates(TakenApart):
    def loop(self, x: Tensor) -> Tensor:
        outputs = []
        for layer in self.net:
            x = layer(x)
            outputs.append(x)
        return torch.stack(outputs).sum(0)


class Indexes(TakenApart):
    def loop(self, x: Tensor) -> Tensor:
        hidden = self.net[:2](x)
        y: Tensor = self.net[2:](hidden) + hidden
        return y


class Lists(TakenApart):
    def loop(self, x: Tensor) -> Tensor:
        outputs = []
        for _, layer in self.net.named_children():
            x = layer(x)
            outputs.append(x)
        return torch.stack(outputs).sum(0)


@pytest.mark.parametrize("make", [Iterates, Indexes, Lists])
def test_sequentials_that_are_taken_apart_keep_their_activations(make: type[TakenApart]) -> None:
    model = make("loop").double()
    converted = convert_silently(model)
    kept = [name for name, m in converted.named_modules() if isinstance(m, nn.ReLU)]
    assert kept == ["net.1", "net.3"]
    assert len(converted_names(converted)) == 4
    assert_same(converted, model, torch.randn(50, 4).double())


def test_fold_keeps_norms_of_sequentials_that_are_taken_apart() -> None:
    model = Iterates("loop")
    model.net = nn.Sequential(LMKANLinear(4, 4), nn.BatchNorm1d(4), LMKANLinear(4, 4))
    model.double()
    folded = fold(model)
    torch.testing.assert_close(
        folded(x := torch.randn(5, 4).double()), model.eval()(x), rtol=1e-10, atol=1e-12
    )
