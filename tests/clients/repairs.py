"""What two libraries lack to be imported beside a CPU wheel of torch 2.13: call before their import."""

from __future__ import annotations

import sys
import typing

import torch
import torch.utils.data.dataloader as dataloader

_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")


def make_torchvision_importable() -> None:
    """Define the operators at which its import stops where its libraries, built for CUDA, cannot be loaded.

    timm and Transformers need torchvision's Python code alone: schemas are enough.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for operator in ("nms", "qnms"):
            _LIBRARY.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for module in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[module]


def make_schnetpack_importable() -> None:
    """Put the type variable that schnetpack 2.1.1 imports where torch 2.13 has one of another name."""
    if not hasattr(dataloader, "T_co"):
        dataloader.T_co = typing.TypeVar("T_co", covariant=True)  # type: ignore[attr-defined]
