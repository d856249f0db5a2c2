"""`torch.fx`: layers are leaves of traced models, containers are traced into."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace

from lmkan_gen import LMKAN2DLayer, reference
from lmkan_gen.layout import BatchLastModule
from lmkan_gen.nn import LMKANMLP, LMKANBlock, LMKANConv2d, LMKANLinear, ReLUFirst, ReLULast, lmkan_layers

LAYERS: dict[str, BatchLastModule] = {
    "layer": LMKAN2DLayer(5, 6, 6, batch_first=True),
    "linear": LMKANLinear(6, 6),
    "relu first": ReLUFirst(6, 6),
    "relu last": ReLULast(6, 6),
}


class Network(nn.Module):
    """Layers within what others write."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.tanh(x + self.layer(x)))
        return y


def called(traced: GraphModule) -> list[type[nn.Module]]:
    """Types of the modules that the graph calls."""
    return [type(traced.get_submodule(str(n.target))) for n in traced.graph.nodes if n.op == "call_module"]


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_leaves(name: str) -> None:
    layer = copy.deepcopy(LAYERS[name])
    model = Network(layer)
    traced = symbolic_trace(model)
    assert called(traced) == [type(layer), nn.Linear]
    for x in (torch.randn(7, 6), torch.randn(2, 3, 6)):
        assert torch.equal(traced(x), model(x))
    with pytest.raises(ValueError, match=r"x must be \[\*, 6\], samples first, got \[7, 5\]"):
        layer(torch.randn(7, 5))


@pytest.mark.parametrize("precondition", [None, "relu_first", "relu_last"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("outermost", [True, False])
def test_containers_are_traced_into(precondition: None, batch_first: bool, outermost: bool) -> None:
    network = LMKANMLP((5, 8, 6), 5, precondition=precondition, batch_first=batch_first)
    model = network if outermost else nn.Sequential(network, nn.ReLU())
    traced = symbolic_trace(model)
    kind = type(network.blocks[0].lmkan)
    assert called(traced)[:3] == [nn.Identity, kind, nn.BatchNorm1d]
    for x in (torch.randn(5, 5), torch.randn(9, 5) if batch_first else torch.randn(5, 9)):
        assert torch.equal(traced(x), model(x))  # both in training mode
    assert torch.equal(pickle.loads(pickle.dumps(traced))(x), traced(x))
    if batch_first:
        x = torch.randn(2, 3, 5)
        assert torch.equal(traced(x), model(x))
        with pytest.raises(RuntimeError, match="unflatten"):
            traced(torch.randn(4, 10))


@pytest.mark.parametrize("layer", [LMKANLinear(6, 4), ReLUFirst(6, 4), ReLULast(6, 4), LMKANBlock(6, 4)])
def test_what_is_traced_itself_is_traced_into(layer: BatchLastModule) -> None:
    layer.eval()
    traced, x = symbolic_trace(layer), torch.randn(3, 6)
    assert torch.equal(traced(x), layer(x))


def test_a_single_layer_is_refused_in_words() -> None:
    with pytest.raises(TypeError, match=r"not by itself: trace torch\.nn\.Sequential\(layer\)"):
        symbolic_trace(LMKAN2DLayer(5, 4, 3))
    layer, x = LMKAN2DLayer(5, 4, 3), torch.randn(4, 9)
    assert torch.equal(symbolic_trace(nn.Sequential(layer))(x), layer(x))


def test_traced_models_train_and_are_copied() -> None:
    traced = symbolic_trace(Network(LMKANLinear(6, 6)))
    (layer,) = lmkan_layers(traced).values()
    optimizer = torch.optim.SGD(traced.parameters(), lr=1e-2)
    x, target = torch.randn(50, 6), torch.randn(50, 3)
    losses = []
    for _ in range(5):
        loss = (traced(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    # the gradient is that of the formula
    table = layer.func_parameter.detach().double().requires_grad_()
    inner = reference.evaluate(x.double().T, table, layer.borders.double()).T
    linear = copy.deepcopy(traced.get_submodule("last")).double()
    (linear(torch.tanh(x.double() + inner)) - target).square().mean().backward()
    optimizer.zero_grad()
    (traced(x) - target).square().mean().backward()
    assert table.grad is not None
    torch.testing.assert_close(layer.func_parameter.grad, table.grad.float(), rtol=1e-4, atol=1e-8)
    for other in (copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        assert torch.equal(other(x), traced(x))
        assert called(other) == called(traced)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_frozen_layers(dtype: torch.dtype) -> None:
    model = Network(LMKANLinear(6, 6)).eval()
    traced, x = symbolic_trace(model), torch.randn(9, 6)
    for layer in lmkan_layers(model).values():
        layer.freeze(dtype)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(traced(x), expected)  # the layer is shared
        assert torch.equal(symbolic_trace(model)(x), expected)


def test_convolutions_are_leaves() -> None:
    model = nn.Sequential(LMKANConv2d(2, 3, 3, 5), nn.ReLU())
    traced = symbolic_trace(model)
    assert called(traced) == [LMKANConv2d, nn.ReLU]
    x = torch.randn(2, 2, 5, 5)
    assert torch.equal(traced(x), model(x))
