"""`LMKANConv2d`: an lmKAN layer applied to every patch of an image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmkan_gen import convolution
from lmkan_gen.convolution import Geometry, Pair
from lmkan_gen.layer import LMKAN2DLayer
from lmkan_gen.layout import leaf
from lmkan_gen.ops import HALVES, autocasts

_OPS = torch.ops.lmkan_gen


class LMKANConv2d(nn.Module):
    """Convolution whose linear map of each patch is an lmKAN layer; takes the place of `nn.Conv2d`.

    A patch is flattened in the order of ``torch.nn.functional.unfold`` (channel, row, column), so that
    functions take neighbouring pixels. Padding is with zeros. There is one group.

    Patches are laid out for the kernels a slab at a time, in forward and backward, so that no copy of
    more than ``workspace_bytes`` exists (or of one row of output pixels of one image, if that is more).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: height and width of a patch.
        num_grids: cells per axis of each function's grid, at least 3.
        stride: steps between patches, one number or (vertical, horizontal), like all that follow.
        padding: rows and columns of zeros on every side.
        dilation: steps between the pixels of a patch.
        init_scale: see `LMKAN2DLayer`.
        workspace_bytes: the largest copy of patches to make.
        device: where the parameters are made.
        dtype: of the parameters; torch's default dtype if None.

    Attributes:
        layer: the `LMKAN2DLayer` with ``in_channels * height * width`` inputs.

    Raises:
        TypeError: a size is not an int or a pair of ints.
        ValueError: a size is out of range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        num_grids: int = 8,
        *,
        stride: int | Pair = 1,
        padding: int | Pair = 0,
        dilation: int | Pair = 1,
        init_scale: float = 0.1,
        workspace_bytes: int = 64 * 2**20,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_channels < 1:
            raise ValueError(f"in_channels must be at least 1, got {in_channels}")
        if workspace_bytes < 1:
            raise ValueError(f"workspace_bytes must be at least 1, got {workspace_bytes}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _pair("kernel_size", kernel_size, 1)
        self.stride = _pair("stride", stride, 1)
        self.padding = _pair("padding", padding, 0)
        self.dilation = _pair("dilation", dilation, 1)
        self.workspace_bytes = workspace_bytes
        inputs = in_channels * self.kernel_size[0] * self.kernel_size[1]
        self.layer = LMKAN2DLayer(
            num_grids, inputs, out_channels, init_scale=init_scale, device=device, dtype=dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to every patch.

        Args:
            x: ``[batch, in_channels, height, width]``, of the dtype and on the device of the table.

        Returns:
            ``[batch, out_channels, rows, columns]``, of the sizes that `nn.Conv2d` gives.

        Raises:
            ValueError: wrong shape, or an image smaller than a patch.
            TypeError: wrong dtype.
        """
        if (node := leaf(self, x)) is not None:
            return node  # type: ignore[no-any-return]
        self._check(x)
        layer, wanted = self.layer, x.dtype
        layer.check_grid()
        if layer.frozen is not None:
            table = layer.frozen.table
            wanted = torch.float32 if autocasts(x) else wanted
            x = x.float() if x.dtype in HALVES else x
            y: Tensor = _OPS.frozen_convolve(x, table.values, table.scales, layer.borders, *self._geometry)
            return y if y.dtype == wanted else y.to(wanted)
        if autocasts(x):
            x = x.to(layer.func_parameter.dtype)  # tables stay as they are, whatever came before
        wanted = x.dtype
        if wanted in HALVES and layer.func_parameter.dtype == wanted:
            x = x.float()  # as the layer does
        y = _OPS.convolve(x, layer.func_parameter, layer.borders, *self._geometry)
        return y if y.dtype == wanted else y.to(wanted)

    def patches(self, x: Tensor) -> Tensor:
        """What the layer sees of ``x``, all at once: ``[layer.input_dim, batch * rows * columns]``.

        Its size is not bounded; meant for looking at a sample of images.
        """
        self._check(x)
        return convolution.patches(x, self._geometry)

    @property
    def _geometry(self) -> Geometry:
        return Geometry(self.kernel_size, self.stride, self.padding, self.dilation, self.workspace_bytes)

    def _check(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"x must be [batch, in_channels, height, width] with {self.in_channels} channels, "
                f"got {list(x.shape)}"
            )

    def extra_repr(self) -> str:
        """Sizes."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}"
        )


def _pair(name: str, value: int | Pair, least: int) -> Pair:
    pair = value if isinstance(value, tuple) else (value, value)
    if len(pair) != 2 or not all(isinstance(v, int) and not isinstance(v, bool) for v in pair):
        raise TypeError(f"{name} must be an int or a pair of ints, got {value!r}")
    if min(pair) < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return pair
