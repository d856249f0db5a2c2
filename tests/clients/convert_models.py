"""`convert`: models of other libraries have the same outputs before and after, in float64.

    python -m tests.clients.convert_models [MODEL ...]

Models are in evaluation mode, weights random, sizes small, and nothing is downloaded. What `convert` says of
layers that it leaves alone goes to stderr.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lmkan_gen import convert
from lmkan_gen.convertible import linear_layers
from lmkan_gen.nn import lmkan_layers
from tests.clients.checks import Check, close, require, run
from tests.clients.repairs import make_schnetpack_importable, make_torchvision_importable

LIMIT = 1e-5

#: a model, and how to get a tensor out of it
Client = tuple[nn.Module, Callable[[Any], Tensor]]


def text(model: str, **sizes: Any) -> Client:
    """A language model of transformers."""
    import transformers

    family = re.split("For|LMHead|Model", model)[0]
    config = getattr(transformers, f"{family}Config")(vocab_size=100, **sizes)
    tokens = torch.randint(100, (2, 12))
    more = {"decoder_input_ids": tokens} if config.is_encoder_decoder else {}
    return getattr(transformers, model)(config), lambda m: tensor(m(input_ids=tokens, **more))


def tensor(outputs: Any) -> Tensor:
    """What a model of transformers puts out, with the pooled output that some have."""
    pooled = getattr(outputs, "pooler_output", None)
    return outputs[0] if pooled is None else torch.cat((outputs[0].flatten(), pooled.flatten()))


def image(model: str, **sizes: Any) -> Client:
    """A vision model of transformers."""
    import transformers

    config = getattr(transformers, model.replace("Model", "Config"))(**sizes)
    pixels = torch.randn(2, 3, config.image_size, config.image_size).double()
    return getattr(transformers, model)(config), lambda m: tensor(m(pixel_values=pixels))


def timm(model: str, side: int, **sizes: Any) -> Client:
    """A vision model of timm."""
    import timm as library

    pixels = torch.randn(2, 3, side, side).double()
    return library.create_model(model, num_classes=10, **sizes), lambda m: m(pixels)


def graph(layer: str, **arguments: Any) -> Client:
    """A network of torch-geometric with two of its convolutions."""
    from torch_geometric import nn as graphs

    nodes = torch.randn(20, 8).double()
    edges = torch.randint(20, (2, 60))
    first, second = (getattr(graphs, layer)(8, 8, **arguments) for _ in range(2))
    step = "x, edges -> x"
    model = graphs.Sequential("x, edges", [(first, step), nn.ReLU(), (second, step), graphs.Linear(8, 3)])
    return model, lambda m: m(nodes, edges)


def isomorphism_network() -> Client:
    """Torch-geometric's GIN, whose convolutions hold MLPs."""
    from torch_geometric.nn import GIN

    nodes, edges = torch.randn(20, 8).double(), torch.randint(20, (2, 60))
    return GIN(8, 16, num_layers=2, out_channels=3), lambda m: m(nodes, edges)


def schnet_of_torch_geometric() -> Client:
    """SchNet with an interaction graph that needs no compiled extension."""
    from torch_geometric.nn import SchNet

    class AllPairs(nn.Module):
        def forward(self, positions: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
            edges = torch.combinations(torch.arange(len(positions))).T
            edges = torch.cat((edges, edges.flip(0)), dim=1)
            return edges, (positions[edges[0]] - positions[edges[1]]).norm(dim=1)

    charges, positions = torch.randint(1, 9, (7,)), torch.randn(7, 3).double() * 2
    model = SchNet(16, 16, 2, 10, interaction_graph=AllPairs())
    return model, lambda m: m(charges, positions)


def schnetpack(kind: str) -> Client:
    """SchNet or PaiNN of schnetpack, with its readout."""
    make_schnetpack_importable()
    import schnetpack as spk

    atoms = 7
    pairs = torch.combinations(torch.arange(atoms)).T
    pairs = torch.cat((pairs, pairs.flip(0)), dim=1)
    positions = torch.randn(atoms, 3).double() * 2
    inputs = {
        spk.properties.Z: torch.randint(1, 9, (atoms,)),
        spk.properties.Rij: positions[pairs[1]] - positions[pairs[0]],
        spk.properties.idx_i: pairs[0],
        spk.properties.idx_j: pairs[1],
        spk.properties.idx_m: torch.zeros(atoms, dtype=torch.int64),
    }
    basis, cutoff = spk.nn.GaussianRBF(10, 5.0), spk.nn.CosineCutoff(5.0)
    representation = getattr(spk.representation, kind)(16, 2, basis, cutoff_fn=cutoff)
    model = nn.Sequential(representation, spk.atomistic.Atomwise(16, output_key="energy"))
    return model, lambda m: m(dict(inputs))["energy"]


def transformer(model: type[nn.Module], **arguments: Any) -> Client:
    """An encoder of torch, without the fast path, which reads weights."""
    torch.backends.mha.set_fastpath_enabled(False)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    x = torch.randn(3, 5, 16).double()
    return (layer if model is nn.TransformerEncoderLayer else model(layer, 2)), lambda m: m(x)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "residual_in_fp32": False}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
PATCHES = {"image_size": 32, "patch_size": 8, **SMALL}
STAGES = {"depths": [1, 1], "num_heads": [2, 4], "embed_dim": 16}
WINDOWS = {"image_size": 32, "patch_size": 2, "window_size": 4, **STAGES}
CONVNEXT = {"image_size": 32, "hidden_sizes": [8, 16, 16, 32], "depths": [1] * 4}
SWIN, SWIN2 = "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"
BEIT, EVA = "beit_base_patch16_224", "eva02_tiny_patch14_224"
BLOCKS = {"depth": 2, "embed_dim": 48, "num_heads": 4}

CLIENTS: dict[str, tuple[str, Callable[[], Client]]] = {
    "bert": ("transformers", lambda: text("BertModel", **SMALL)),
    "bert-mlm": ("transformers", lambda: text("BertForMaskedLM", **SMALL)),
    "gpt2": ("transformers", lambda: text("GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=2)),
    "llama": ("transformers", lambda: text("LlamaForCausalLM", num_key_value_heads=2, **SMALL)),
    "t5": ("transformers", lambda: text("T5ForConditionalGeneration", **T5)),
    "t5-gated": ("transformers", lambda: text("T5Model", feed_forward_proj="gated-gelu", **T5)),
    "mamba": ("transformers", lambda: text("MambaForCausalLM", **MAMBA)),
    "vit": ("transformers", lambda: image("ViTModel", **PATCHES)),
    "convnext": ("transformers", lambda: image("ConvNextModel", **CONVNEXT)),
    "swin": ("transformers", lambda: image("SwinModel", **WINDOWS)),
    "swin2": ("transformers", lambda: image("Swinv2Model", **WINDOWS)),
    "beit": ("transformers", lambda: image("BeitModel", **PATCHES)),
    "timm-vit": ("timm", lambda: timm("vit_tiny_patch16_224", 32, img_size=32, depth=2)),
    "timm-convnext": ("timm", lambda: timm("convnext_atto", 64, conv_mlp=False)),
    "timm-mixer": ("timm", lambda: timm("mixer_s32_224", 64, img_size=64)),
    "timm-swin": ("timm", lambda: timm(SWIN, 64, img_size=64, window_size=4, **STAGES)),
    "timm-swin2": ("timm", lambda: timm(SWIN2, 64, img_size=64, **STAGES)),
    "timm-beit": ("timm", lambda: timm(BEIT, 32, img_size=32, **BLOCKS)),
    "timm-eva02": ("timm", lambda: timm(EVA, 28, img_size=28, **BLOCKS)),
    "gcn": ("torch-geometric", lambda: graph("GCNConv")),
    "gat": ("torch-geometric", lambda: graph("GATConv", heads=2, concat=False)),
    "sage": ("torch-geometric", lambda: graph("SAGEConv")),
    "graph-transformer": ("torch-geometric", lambda: graph("TransformerConv")),
    "gin": ("torch-geometric", isomorphism_network),
    "pyg-schnet": ("torch-geometric", schnet_of_torch_geometric),
    "schnet": ("schnetpack", lambda: schnetpack("SchNet")),
    "painn": ("schnetpack", lambda: schnetpack("PaiNN")),
    "encoder": ("torch", lambda: transformer(nn.TransformerEncoder)),
    "encoder-layer": ("torch", lambda: transformer(nn.TransformerEncoderLayer)),
}


def check(name: str) -> Check:
    """The check of one model."""
    library, make = CLIENTS[name]

    def same() -> str:
        model, call = make()
        model.double().eval()
        for parameter in model.parameters():
            # heads of zeros, scales of 1e-6 would hide errors
            parameter.data += 0.05 * torch.randn_like(parameter)
        linears = {id(layer) for layer in linear_layers(model).values()}
        converted = convert(model).eval()
        found = call(converted)
        with torch.no_grad():
            word = close(found, call(model), LIMIT)
        tables = {name: layer.func_parameter for name, layer in lmkan_layers(converted).items()}
        count = len(tables)
        require(count > 0, "no layer was converted")
        grads = torch.autograd.grad((found * torch.randn_like(found)).sum(), list(tables.values()))
        unused = [name for name, grad in zip(tables, grads, strict=True) if not grad.any()]
        require(not unused, f"{unused} have no influence on outputs")
        return f"{count} layers converted, {len(linears) - count} left alone, {word}"

    same.__doc__ = f"{name} of {library}"
    return same


if __name__ == "__main__":
    make_torchvision_importable()
    run(*(check(name) for name in sys.argv[1:] or CLIENTS))
