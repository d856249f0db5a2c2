"""Building blocks of networks: layers of any width in either layout, blocks, an MLP, a convolution."""

from lmkan_gen.nn.conv import LMKANConv2d
from lmkan_gen.nn.layers import (
    LMKANMLP,
    BatchLastNorm,
    LMKANBlock,
    LMKANLinear,
    Precondition,
    ReLUFirst,
    ReLULast,
    hessian_penalty,
    lmkan_layers,
    preconditioned_layers,
)

__all__ = [
    "LMKANMLP",
    "BatchLastNorm",
    "LMKANBlock",
    "LMKANConv2d",
    "LMKANLinear",
    "Precondition",
    "ReLUFirst",
    "ReLULast",
    "hessian_penalty",
    "lmkan_layers",
    "preconditioned_layers",
]
