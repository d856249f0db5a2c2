"""timm: lmKAN layers in a vision transformer and as the head of a convolutional network."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmkan_gen import convert
from lmkan_gen.nn import LMKANBlock, lmkan_layers
from tests.clients.checks import close, falls, outputs, require, run
from tests.clients.repairs import make_torchvision_importable

make_torchvision_importable()
import timm  # noqa: E402
from timm.models import create_feature_extractor, load_checkpoint  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402
from timm.utils import ModelEmaV3  # noqa: E402

CLASSES = 4


def images(count: int) -> tuple[Tensor, Tensor]:
    """Noise with stripes whose direction is the class."""
    labels = torch.randint(CLASSES, (count,))
    angles = labels * torch.pi / CLASSES
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    waves = rows * angles.cos().view(-1, 1, 1) + columns * angles.sin().view(-1, 1, 1)
    phases = 2 * torch.pi * torch.rand(count, 1, 1)
    return (waves + phases).sin().unsqueeze(1) + 0.5 * torch.randn(count, 3, 32, 32), labels


def transformer() -> nn.Module:
    """A tiny vision transformer for ``[*, 3, 32, 32]``."""
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=CLASSES,
    )
    return model


def converted() -> str:
    """A vision transformer converted to lmKAN layers has the outputs of the original, and its gradients"""
    model = transformer()
    network = convert(model, num_grids=8)
    count = len(lmkan_layers(network))
    require(count == 9, f"{count} layers were converted, expected 4 per block and the head")
    x, _ = images(16)
    close(outputs(network, x), outputs(model, x), 1e-4)
    grads = []
    for m in (network, model):
        leaf = x.clone().requires_grad_()
        m(leaf).square().sum().backward()
        require(leaf.grad is not None, "the images have no gradient")
        grads.append(leaf.grad)
    return f"{count} layers, gradients {close(grads[0], grads[1], 1e-3)}"


def trained() -> str:
    """A ResNet with an lmKAN head learns with timm's optimiser and averages, and its file loads"""
    model = timm.create_model("resnet10t", num_classes=CLASSES)
    model.fc = LMKANBlock(model.num_features, CLASSES, num_grids=8)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-3, weight_decay=1e-2)
    averages = ModelEmaV3(model, decay=0.8)
    losses = []
    model.train()
    for _ in range(40):
        x, labels = images(32)
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        averages.update(model)
        losses.append(loss.item())
    x, labels = images(200)
    for name, m in {"model": model, "average": averages.module}.items():
        right = (outputs(m, x).argmax(1) == labels).double().mean().item()
        require(right > 0.9, f"the {name} is right in {right:.0%} of new images")
    other = timm.create_model("resnet10t", num_classes=CLASSES)
    other.fc = LMKANBlock(other.num_features, CLASSES, num_grids=8)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "checkpoint.pth.tar")
        torch.save({"state_dict": model.state_dict()}, path)
        load_checkpoint(other, path)
    close(outputs(other, x), outputs(model, x), 0)
    return f"{falls(losses, 0.3)}, {right:.0%} right"


def extracted() -> str:
    """Features are extracted in front of and behind an lmKAN head, by tracing the network"""
    model = timm.create_model("resnet10t", num_classes=CLASSES)
    model.fc = LMKANBlock(model.num_features, CLASSES, num_grids=8)
    model.eval()
    x, _ = images(8)
    with torch.no_grad():
        found = create_feature_extractor(model, {"global_pool": "pooled", "fc": "logits"})(x)
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    close(found["pooled"].flatten(1), pooled, 0)
    return close(found["logits"], outputs(model, x), 0)


def checkpointed() -> str:
    """Gradient checkpointing does not change the gradients of a converted vision transformer"""
    network: Any = convert(transformer(), num_grids=8)
    x, _ = images(8)
    grads = []
    for enabled in (False, True):
        network.set_grad_checkpointing(enabled)
        network.zero_grad()
        network(x).square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
    return close(grads[1], grads[0], 0)


if __name__ == "__main__":
    run(converted, trained, extracted, checkpointed)
