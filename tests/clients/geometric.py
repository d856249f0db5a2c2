"""PyTorch Geometric: lmKAN networks inside message passing."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GINConv, NNConv, SAGEConv, global_add_pool, to_hetero

from lmkan_gen.nn import LMKANMLP, LMKANBlock, LMKANLinear, lmkan_layers
from tests.clients.checks import close, falls, require, run

FEATURES = 3


class Network(nn.Module):
    """Two convolutions whose functions are lmKANs, a sum over nodes, and an lmKAN readout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = GINConv(LMKANMLP((FEATURES, 16, 16)), train_eps=True)
        # the weights of each edge's messages come from its attributes through an lmKAN
        self.second = NNConv(16, 8, LMKANLinear(1, 16 * 8), aggr="mean")
        self.readout = LMKANMLP((8, 16, 1), normalize_input=True)

    def forward(self, data: Data) -> Tensor:
        """One number per graph."""
        x = self.first(data.x, data.edge_index)
        x = self.second(x, data.edge_index, data.edge_attr)
        y: Tensor = self.readout(global_add_pool(x, data.batch))
        return y


def graph() -> Data:
    """A ring with chords; the target is a sum over edges that no function of single nodes gives."""
    nodes = int(torch.randint(5, 12, ()))
    ring = torch.arange(nodes)
    chords = torch.randint(nodes, (2, 4))
    ends = torch.cat([torch.stack([ring, (ring + 1) % nodes]), chords], 1)
    edges = torch.cat([ends, ends.flip(0)], 1)
    x = torch.randn(nodes, FEATURES)
    length = torch.rand(ends.shape[1], 1).repeat(2, 1)
    target = (x[edges[0], :1] * x[edges[1], :1]).tanh().mean() + x[:, 1].abs().mean()
    return Data(x=x, edge_index=edges, edge_attr=length, y=target.view(1, 1))


def trained() -> str:
    """A graph network with lmKAN functions learns, in batches of graphs of different sizes"""
    model = Network()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    loader = DataLoader([graph() for _ in range(256)], batch_size=32, shuffle=True)
    for _ in range(20):
        for batch in loader:
            loss = nn.functional.mse_loss(model(batch), batch.y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return falls(losses, 0.3)


def symmetric() -> str:
    """A batch gives what its graphs give alone, and the order of nodes does not matter"""
    model = Network().eval()
    graphs = [graph() for _ in range(6)]
    with torch.no_grad():
        together = model(Batch.from_data_list(graphs))
        alone = torch.cat([model(Batch.from_data_list([g])) for g in graphs])
        shuffled = []
        for g in graphs:
            order = torch.randperm(g.num_nodes)
            place = torch.empty_like(order)
            place[order] = torch.arange(g.num_nodes)
            shuffled.append(Data(x=g.x[order], edge_index=place[g.edge_index], edge_attr=g.edge_attr))
        permuted = model(Batch.from_data_list(shuffled))
    close(permuted, together, 1e-5)
    return close(alone, together, 1e-5)


def differentiated() -> str:
    """Gradients with respect to node features agree with finite differences in float64"""
    model = Network().double().eval()
    data = Batch.from_data_list([graph(), graph()])
    data.edge_attr = data.edge_attr.double()
    x = data.x.double().requires_grad_()

    def energy(features: Tensor) -> Tensor:
        data.x = features
        total: Tensor = model(data).sum()
        return total

    (exact,) = torch.autograd.grad(energy(x), x)
    numeric = torch.zeros_like(x)
    step = 1e-6
    with torch.no_grad():
        for place in range(x.numel()):
            shift = torch.zeros(x.numel(), dtype=torch.float64)
            shift[place] = step
            difference = energy(x + shift.view_as(x)) - energy(x - shift.view_as(x))
            numeric.view(-1)[place] = difference / (2 * step)
    require(exact.abs().min().item() > 0, "a feature has no influence")
    return close(exact, numeric, 1e-6)


class Plain(nn.Module):
    """Convolutions for one kind of node, with an lmKAN layer and a block between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = SAGEConv((-1, -1), 16)
        self.linear = LMKANLinear(16, 16)
        self.block = LMKANBlock(16, 16, precondition="relu_first")
        self.last = SAGEConv((-1, -1), 4)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """Four numbers per node."""
        y: Tensor = self.last(self.block(self.linear(self.first(x, edges))), edges)
        return y


def heterogeneous() -> str:
    """to_hetero makes layers for each kind of node of a network that it traces, and all are trained"""
    people, places = torch.randn(20, FEATURES), torch.randn(30, FEATURES + 2)
    edges = torch.stack([torch.randint(20, (60,)), torch.randint(30, (60,))])
    kinds = [("person", "visits", "place"), ("place", "visited", "person")]
    x = {"person": people, "place": places}
    links = {kinds[0]: edges, kinds[1]: edges.flip(0)}
    model = to_hetero(Plain(), (list(x), kinds))
    with torch.no_grad():
        model(x, links)  # SAGEConv learns its widths
    model.train()
    sum(y.square().sum() for y in model(x, links).values()).backward()
    layers = lmkan_layers(model)
    require(len(layers) == 4, f"there are {sorted(layers)}")
    for name, layer in layers.items():
        grad = layer.func_parameter.grad
        require(grad is not None and bool(grad.any()), f"{name} has no gradient")
    return f"{len(layers)} layers"


if __name__ == "__main__":
    run(trained, symmetric, differentiated, heterogeneous)
