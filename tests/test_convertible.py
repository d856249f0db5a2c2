"""Layers of all kinds: `convert` leaves alone what it cannot convert exactly, and says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from lmkan_gen import convert, dispatch, fold, refine
from lmkan_gen.nn import LMKANLinear, ReLUFirst
from tests.converting import assert_same, convert_silently, convert_with_warning, converted_names


@pytest.fixture(autouse=True)
def _plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.DISABLE_VARIABLE, "1")


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.inner(self.embedding(x)))
        return y


def test_tied_weights_stay_tied() -> None:
    model = Tied().double()
    converted = convert_with_warning(model, r"left 1 of 2 .*\n- 'head': tied to 'embedding.weight'; give it")
    assert converted_names(converted) == ["inner"]
    assert isinstance(converted, Tied)
    assert converted.head.weight is converted.embedding.weight
    assert_same(converted, model, torch.randint(9, (5,)))
    with pytest.raises(ValueError, match=r"'head': tied to 'embedding.weight'"):
        convert(model, only=["head"])


def test_ties_between_linear_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)).double()
    model[2].bias = model[0].bias
    converted = convert_with_warning(model, r"- '0': tied to '2.bias'.*\n- '2': tied to '0.bias'")
    assert converted_names(converted) == ["1"]
    assert_same(converted, model, torch.randn(5, 4).double())


def test_layers_that_are_held_beside_the_tree_of_modules() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.groups = {"fast": [model[1]]}  # type: ignore[assignment]
    converted = convert_with_warning(model, "- '1': tied to 'groups'")
    assert converted_names(converted) == ["0"]
    assert converted.groups["fast"][0] is converted[1]  # type: ignore[index]


def test_a_layer_in_two_places_stays_one_layer() -> None:
    linear = nn.Linear(4, 4)
    model = nn.Sequential(linear, nn.ReLU(), linear, nn.Sequential(nn.ReLU(), nn.Linear(4, 4))).double()
    converted = convert_silently(model)
    assert converted.get_submodule("0") is converted.get_submodule("2")
    assert [name for name, m in converted.named_modules() if isinstance(m, nn.ReLU)] == ["1"]
    assert_same(converted, model, torch.randn(50, 4).double())


def doubled(*arguments: Any) -> Any:
    return 2 * arguments[-1]


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward hooks": lambda m: m.register_forward_hook(doubled),
    "forward pre-hooks": lambda m: m.register_forward_pre_hook(lambda _, x: (2 * x[0],)),
    "backward hooks": lambda m: m.register_full_backward_hook(lambda *_: None),
    "backward pre-hooks": lambda m: m.register_full_backward_pre_hook(lambda *_: None),
    "state dict hooks": lambda m: m.register_state_dict_post_hook(lambda *_: None),
    "state dict pre-hooks": lambda m: m.register_state_dict_pre_hook(lambda *_: None),
    "load state dict pre-hooks": lambda m: m.register_load_state_dict_pre_hook(lambda *_: None),
    "load state dict post-hooks": lambda m: m.register_load_state_dict_post_hook(lambda *_: None),
    "hooks on parameters": lambda m: m.get_parameter("weight").register_hook(lambda g: g),
    "a patched forward": lambda m: setattr(m, "forward", lambda x: 2 * x),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_layers_with_hooks_are_left_alone(kind: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).double()
    HOOKS[kind](model[2])
    converted = convert_with_warning(model, f"- '2': {kind}; ")
    assert converted_names(converted) == ["0"]
    assert_same(converted, model, torch.randn(50, 4).double())
    with pytest.raises(ValueError, match=f"'2': {kind}; "):
        convert(model, only=["2"])


@pytest.mark.parametrize("kind", ["forward hooks", "forward pre-hooks", "a patched forward"])
def test_activations_with_hooks_are_not_absorbed(kind: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).double()
    HOOKS[kind](model[1])
    converted = convert_silently(model)
    assert converted_names(converted) == ["0", "2"]
    assert_same(converted, model, torch.randn(50, 4).double())


def test_nothing_moves_across_hooks_on_a_sequential() -> None:
    inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model = nn.Sequential(inner, nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).double()
    inner.register_forward_hook(lambda _, x, y: y - 0.2)
    converted = convert_silently(model)
    assert [name for name, m in converted.named_modules() if isinstance(m, nn.ReLU)] == ["0.1"]
    assert_same(converted, model, torch.randn(50, 4).double())


def pruned(layer: nn.Module) -> nn.Module:
    prune.random_unstructured(layer, "weight", 0.5)
    return layer


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize(
    "change",
    [weight_norm, spectral_norm, parametrizations.weight_norm, parametrizations.spectral_norm, pruned],
)
def test_computed_weights_are_left_alone(change: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).double()
    change(model[2])
    x = torch.randn(50, 4).double()
    model(x).sum().backward()
    model.eval()
    converted = convert_with_warning(model, "- '2': weight computed anew at every call .*; make it a plain")
    assert converted_names(converted) == ["0"]
    torch.testing.assert_close(converted(x), model(x), rtol=1e-10, atol=1e-12)
    before = converted(x)
    optimizer = torch.optim.SGD(converted.parameters(), lr=0.1)
    converted(x).square().sum().backward()
    optimizer.step()
    assert not torch.allclose(converted(x), before)


class OwnInitialisation(nn.Linear):
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        nn.init.normal_(self.bias)


class WithActivation(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sin()


class QuantLinear(nn.Module):
    qweight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.eye(4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.qweight


class Masked(OwnInitialisation):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("mask", torch.ones(4))


def test_subclasses_and_relatives() -> None:
    model = nn.Sequential(
        OwnInitialisation(4, 4), WithActivation(4, 4), QuantLinear(), Masked(), nn.Bilinear(4, 4, 4)
    ).double()
    converted = convert_with_warning(
        model,
        r"left 3 of 4 .*\n- '1': class .*WithActivation, which may .*\n- '2': class .*QuantLinear.*"
        r"\n- '3': more, or less, in it than weight and bias: mask; put a plain",
    )
    assert converted_names(converted) == ["0"]
    assert_same(converted[:4], model[:4], torch.randn(5, 4).double())  # type: ignore[index]


def test_lazy_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LazyLinear(3)).double()
    assert converted_names(convert_with_warning(model, "- '2': no weight yet; run a batch")) == ["0"]
    x = torch.randn(5, 4).double()
    model(x)
    converted = convert_silently(model)
    assert converted_names(converted) == ["0", "2"]
    assert_same(converted, model, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor")
def test_quantised_layers() -> None:
    if "x86" not in torch.backends.quantized.supported_engines:
        pytest.skip("this build of torch does not quantise")
    part = nn.Sequential(nn.Linear(4, 4))
    quantised = torch.ao.quantization.quantize_dynamic(part)
    model = nn.Sequential(quantised, nn.Linear(4, 4))
    converted = convert_with_warning(
        model, r"- '0.0': class torch.ao.nn.quantized.dynamic\S+Linear, which may"
    )
    assert converted_names(converted) == ["1"]
    x = torch.randn(5, 4)
    torch.testing.assert_close(converted(x), model(x), rtol=1e-5, atol=1e-6)


class GraphLinear(nn.Module):
    """As the class of torch-geometric."""

    __module__, __qualname__ = "torch_geometric.nn.dense.linear", "Linear"

    def __init__(self) -> None:
        super().__init__()
        self.in_channels, self.out_channels = 4, 5
        self.weight = nn.Parameter(torch.randn(5, 4))
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class Transposed(GraphLinear):
    """As the class of transformers."""

    __module__, __qualname__ = "transformers.pytorch_utils", "Conv1D"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Dense(nn.Linear):
    """As the class of schnetpack."""

    __module__, __qualname__ = "schnetpack.nn.base", "Dense"

    def __init__(self, activation: Any = None) -> None:
        super().__init__(4, 5)
        self.activation = activation or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation(super().forward(x))
        return y


@pytest.mark.parametrize("make", [GraphLinear, Transposed, Dense])
def test_linear_layers_of_other_libraries(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.ReLU(), make()).double()
    converted = convert_silently(model)
    assert converted_names(converted) == ["1"]
    assert not any(isinstance(m, nn.ReLU) for m in converted.modules())
    assert_same(converted, model, torch.randn(50, 4).double())


@pytest.mark.parametrize("activation", [nn.Tanh(), torch.tanh])
def test_linear_layers_of_other_libraries_that_do_more(activation: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Dense(activation)).double()
    message = (
        "'1': class schnetpack.nn.base.Dense, which" if activation is torch.tanh else "'1': .*: activation"
    )
    converted = convert_with_warning(model, message)
    assert converted_names(converted) == ["0"]
    assert_same(converted, model, torch.randn(50, 4).double())


class Skipped(nn.Module):
    """The ReLU at the front changes the other summand too."""

    def __init__(self) -> None:
        super().__init__()
        relu = nn.ReLU(inplace=True)
        self.net = nn.Sequential(
            relu, nn.Linear(4, 4), relu, nn.Linear(4, 4), nn.Identity(), relu, nn.Linear(4, 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        y: Tensor = self.net(x) + x
        return y


def test_activations_that_work_in_place() -> None:
    model = Skipped().double()
    converted = convert_silently(model)
    kept = [name for name, m in converted.named_modules(remove_duplicate=False) if isinstance(m, nn.ReLU)]
    assert kept == ["net.0", "net.5"]
    assert_same(converted, model, torch.randn(50, 4).double())


def blocks() -> nn.ModuleDict:
    def block() -> nn.ModuleDict:
        mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        return nn.ModuleDict({"attention": nn.Linear(4, 4), "mlp": mlp})

    return nn.ModuleDict({"blocks": nn.ModuleList(block() for _ in range(12)), "head": nn.Linear(4, 2)})


def test_names_and_patterns() -> None:
    model = blocks()
    every = {f"blocks.{i}.{name}" for i in range(12) for name in ("attention", "mlp.0", "mlp.2")} | {"head"}
    mlps = {name for name in every if "mlp" in name}
    assert set(converted_names(convert(model))) == every
    assert set(converted_names(convert(model, only=["*.mlp.*"]))) == mlps
    assert set(converted_names(convert(model, skip=["*.mlp.*", "head"]))) == every - mlps - {"head"}
    assert set(converted_names(convert(model, only=["*.mlp.*"], skip=["*.0"]))) == {
        name for name in mlps if name.endswith(".2")
    }
    assert set(converted_names(convert(model, only=["head", "blocks.1[01].attention"]))) == {
        "head",
        "blocks.10.attention",
        "blocks.11.attention",
    }


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"only": ["*.ffn.*"]},
            ValueError,
            r"only names '\*.ffn.\*', which is not a linear layer; there are \['blocks.\*.attention' "
            r"\(12 layers\), 'blocks.\*.mlp.0' \(12 layers\), 'blocks.\*.mlp.2' \(12 layers\), 'head'\]",
        ),
        ({"skip": ["head", "blocks.0"]}, ValueError, "skip names 'blocks.0', which is not a linear layer"),
        (
            {"only": "head"},
            TypeError,
            r"only must be a list of names or patterns, got 'head'; take \['head'\]",
        ),
        ({"skip": "head"}, TypeError, "skip must be a list"),
        ({"only": ["head"], "skip": ["he*"]}, ValueError, "ModuleDict has no linear layer to convert"),
        ({"only": []}, ValueError, "ModuleDict has no linear layer to convert"),
    ],
)
def test_names_and_patterns_that_say_nothing(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        convert(blocks(), **arguments)


def test_patterns_of_only_leave_alone_what_cannot_be_converted() -> None:
    parts = [nn.ModuleDict({"wi": nn.Linear(4, 4), "wo": nn.Linear(4, 4)}) for _ in "ab"]
    for part in parts:
        part["wo"].register_forward_hook(doubled)
    model = nn.ModuleDict(dict(zip("ab", parts, strict=True)))
    converted = convert_with_warning(model, r"left 1 of 2 .*\n- 'a.wo': forward hooks", only=["a.*"])
    assert converted_names(converted) == ["a.wi"]
    assert converted_names(convert_silently(model, only=["*.wi"])) == ["a.wi", "b.wi"]


def test_layers_of_half_precision_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).bfloat16())
    message = r"'1' has dtype torch.bfloat16; .*float\(\), or leave it alone with skip=\['1'\]"
    with pytest.raises(TypeError, match=message):
        convert(model)
    assert converted_names(convert(model, skip=["1"])) == ["0"]


def normed() -> nn.Sequential:
    model = nn.Sequential(LMKANLinear(4, 4), nn.BatchNorm1d(4), ReLUFirst(4, 4)).double()
    nn.init.normal_(model.get_parameter("1.weight"))
    model(torch.randn(50, 4).double() + 1)
    return model


@pytest.mark.parametrize("hooked", ["0", "0.layer", "1", "2"])
def test_fold_keeps_hooks(hooked: str) -> None:
    model = normed()
    model.get_submodule(hooked).register_forward_hook(lambda _, x, y: 2 * y)
    folded = fold(model)
    torch.testing.assert_close(
        folded(x := torch.randn(5, 4).double()), model.eval()(x), rtol=1e-10, atol=1e-12
    )


def test_refine_refuses_what_it_would_lose() -> None:
    first, second = LMKANLinear(4, 4), LMKANLinear(4, 4)
    model = nn.Sequential(first, second)
    handle = second.layer.register_forward_hook(doubled)
    with pytest.raises(ValueError, match=r"layer '1.layer' has forward hooks, .*: remove them, "):
        refine(model)
    handle.remove()
    refine(model)
    second.layer.func_parameter = first.layer.func_parameter
    with pytest.raises(ValueError, match=r"layers '0.layer' and '1.layer' share a table"):
        refine(model)
