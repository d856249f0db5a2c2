"""Convert models of other libraries, and compare outputs before and after, in float64 and evaluation mode.

A script, not a test: it needs libraries that the project does not depend on. Weights are random, sizes small,
and nothing is downloaded.

    pip install . torch==2.13.0 transformers timm torch-geometric
    pip install --no-deps torchvision schnetpack  # they ask for versions of torch and sympy
    pip install ase colorlog dirsync fasteners h5py hydra-core matscipy pytorch-lightning
    pip install tensorboardX torch-ema
    python tests/clients/convert_models.py              # all of them
    python tests/clients/convert_models.py -v t5 mamba  # these, with what convert says

Prints a line per model: its name, the library and its version, how many linear layers were converted and how
many were left alone, and the largest error relative to the largest output. Exits with 1 if an error exceeds
1e-5, or a model does not run.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
import traceback
import typing
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lmkan_gen import convert
from lmkan_gen.convertible import linear_layers
from lmkan_gen.nn import LMKANLinear

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
    return getattr(transformers, model)(config), lambda m: m(input_ids=tokens, **more)[0]


def image(model: str, **sizes: Any) -> Client:
    """A vision model of transformers."""
    import transformers

    config = getattr(transformers, model.replace("Model", "Config"))(**sizes)
    pixels = torch.randn(2, 3, config.image_size, config.image_size).double()
    return getattr(transformers, model)(config), lambda m: m(pixel_values=pixels)[0]


def timm(model: str, side: int, **sizes: Any) -> Client:
    """A vision model of timm."""
    import timm as library

    pixels = torch.randn(2, 3, side, side).double()
    return library.create_model(model, num_classes=10, **sizes), lambda m: m(pixels)


def make_torchvision_importable() -> None:
    """Define the operators that torchvision lacks beside a torch for which it was not built."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError:
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{name}", "(Tensor boxes, Tensor scores, float limit) -> Tensor"
            )


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
    import torch.utils.data.dataloader as loader

    if not hasattr(loader, "T_co"):
        setattr(loader, "T_co", typing.TypeVar("T_co"))  # noqa: B010  (schnetpack imports it from here)
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
    """An encoder of torch."""
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


def check(name: str, verbose: bool) -> bool:
    """Convert one model and print its line. False if outputs differ."""
    library, make = CLIENTS[name]
    torch.manual_seed(0)
    model, call = make()
    model.double().eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(
            parameter
        )  # heads of zeros, scales of 1e-6 would hide errors
    linears = {id(layer) for layer in linear_layers(model).values()}
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        converted = convert(model).eval()
        expected, found = call(model), call(converted)
    error = float((found - expected).abs().max() / expected.abs().max())
    count = len({id(m) for m in converted.modules() if isinstance(m, LMKANLinear)})
    version = importlib.metadata.version(library)
    print(
        f"{name:18} {library + ' ' + version:22} {count:4} converted {len(linears) - count:4} left alone "
        f"{error:9.1e}"
    )
    if verbose:
        print(*(str(w.message) + "\n" for w in caught if "convert left" in str(w.message)), sep="", end="")
    return error <= LIMIT


def main(arguments: list[str]) -> int:
    """Check the models named, or all."""
    make_torchvision_importable()
    verbose = "-v" in arguments
    good = True
    for name in [name for name in arguments if name != "-v"] or CLIENTS:
        try:
            good &= check(name, verbose)
        except Exception:
            good = False
            print(f"{name:18} failed: {traceback.format_exc(limit=-3)}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
