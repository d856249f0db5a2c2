"""`LMKANConv2d`: an lmKAN layer applied to every patch of an image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lmkan_gen.layer import LMKAN2DLayer
from lmkan_gen.ops import HALVES, lmkan, own_dtype

_Pair = tuple[int, int]


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
        dtype: of the parameters; float32 by default.

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
        kernel_size: int | _Pair,
        num_grids: int = 8,
        *,
        stride: int | _Pair = 1,
        padding: int | _Pair = 0,
        dilation: int | _Pair = 1,
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
        if self.layer.frozen is not None:
            return self._convolve_frozen(x)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(self.layer.func_parameter.dtype)  # tables stay as they are, whatever came before
        self.layer.check_grid()
        wanted = x.dtype
        if wanted in HALVES and self.layer.func_parameter.dtype == wanted:
            x = x.float()  # as the layer does
        apply: Callable[..., Tensor] = _Convolve.apply
        y = apply(x, self.layer.func_parameter, self.layer.borders, self._geometry(x))
        return y if y.dtype == wanted else y.to(wanted)

    def patches(self, x: Tensor) -> Tensor:
        """What the layer sees of ``x``, all at once: ``[layer.input_dim, batch * rows * columns]``.

        Its size is not bounded; meant for looking at a sample of images.
        """
        geometry = self._geometry(x)
        return _patches(x, geometry, _Slab(0, x.shape[0], 0, geometry.rows))

    def _convolve_frozen(self, x: Tensor) -> Tensor:
        geometry = self._geometry(x)
        y = x.new_empty((x.shape[0], self.out_channels, geometry.rows, geometry.columns))
        for slab in geometry.slabs(x.shape[0]):
            part = _slab_of(y, slab)
            part.copy_(self.layer(_patches(x, geometry, slab)).view(part.shape))
        return y

    def _geometry(self, x: Tensor) -> _Geometry:
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"x must be [batch, in_channels, height, width] with {self.in_channels} channels, "
                f"got {list(x.shape)}"
            )
        sizes = [
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in zip(
                x.shape[2:], self.kernel_size, self.stride, self.padding, self.dilation, strict=True
            )
        ]
        if min(sizes) < 1:
            raise ValueError(
                f"an image of {list(x.shape[2:])} with padding {self.padding} is smaller than one patch of "
                f"{self.kernel_size} with dilation {self.dilation}"
            )
        # the layer's output for a slab is a temporary of the same kind
        row = sizes[1] * max(self.layer.input_dim, self.out_channels) * x.element_size()
        return _Geometry(
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            sizes[0],
            sizes[1],
            max(1, self.workspace_bytes // row),
        )

    def extra_repr(self) -> str:
        """Sizes."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}"
        )


@dataclass(frozen=True)
class _Geometry:
    """Sizes of one call. ``slab_rows``: rows of output pixels, of all images together, at a time."""

    kernel: _Pair
    stride: _Pair
    padding: _Pair
    dilation: _Pair
    rows: int
    columns: int
    slab_rows: int

    def slabs(self, batch: int) -> Iterator[_Slab]:
        images = max(1, self.slab_rows // self.rows)
        rows = min(self.rows, self.slab_rows)
        for image in range(0, batch, images):
            for row in range(0, self.rows, rows):
                yield _Slab(image, min(image + images, batch), row, min(row + rows, self.rows))


class _Slab(NamedTuple):
    """Images ``first`` to ``last``, rows of output pixels ``top`` to ``bottom``, ends excluded."""

    first: int
    last: int
    top: int
    bottom: int


class _Window(NamedTuple):
    """Pixels of an image's axis that a range of outputs needs, and zeros to add before and after."""

    start: int
    stop: int
    before: int
    after: int


def _window(size: int, axis: int, geometry: _Geometry, first: int, last: int) -> _Window:
    start = first * geometry.stride[axis] - geometry.padding[axis]
    stop = (last - 1) * geometry.stride[axis] - geometry.padding[axis]
    stop += geometry.dilation[axis] * (geometry.kernel[axis] - 1) + 1
    low, high = min(max(start, 0), size), min(max(stop, 0), size)
    if high <= low:  # nothing but padding
        return _Window(0, 0, 0, stop - start)
    return _Window(low, high, low - start, stop - high)


def _patches(x: Tensor, geometry: _Geometry, slab: _Slab) -> Tensor:
    """Patches of a slab, ``[I, images * rows * columns]``; differentiable in ``x``."""
    v = _window(x.shape[2], 0, geometry, slab.top, slab.bottom)
    h = _window(x.shape[3], 1, geometry, 0, geometry.columns)
    pixels = x[slab.first : slab.last, :, v.start : v.stop, h.start : h.stop]
    pixels = pad(pixels, (h.before, h.after, v.before, v.after)).transpose(0, 1)
    views = [pixels[:, :, rows, columns] for rows, columns in _offsets(geometry, slab)]
    return torch.stack(views, dim=1).flatten(0, 1).flatten(1)


def _add_patches(grad: Tensor, geometry: _Geometry, slab: _Slab, out: Tensor) -> None:
    """The adjoint of `_patches`: add ``grad`` ``[I, ...]`` to ``out``, of the shape of ``x``."""
    v = _window(out.shape[2], 0, geometry, slab.top, slab.bottom)
    h = _window(out.shape[3], 1, geometry, 0, geometry.columns)
    channels, images, rows = out.shape[1], slab.last - slab.first, slab.bottom - slab.top
    offsets = list(_offsets(geometry, slab))
    height, width = v.before + v.stop - v.start + v.after, h.before + h.stop - h.start + h.after
    pixels = grad.new_zeros((channels, images, height, width))
    grad = grad.view(channels, len(offsets), images, rows, geometry.columns)
    for i, (down, across) in enumerate(offsets):
        pixels[:, :, down, across] += grad[:, i]
    inside = pixels[
        :, :, v.before : v.before + v.stop - v.start, h.before : h.before + h.stop - h.start
    ].transpose(0, 1)
    out[slab.first : slab.last, :, v.start : v.stop, h.start : h.stop] += inside


def _offsets(geometry: _Geometry, slab: _Slab) -> Iterator[tuple[slice, slice]]:
    """For each pixel of a patch, where it lies in the padded slab for all patches."""
    for i in range(geometry.kernel[0]):
        for j in range(geometry.kernel[1]):
            yield (
                _strided(i, slab.bottom - slab.top, geometry, 0),
                _strided(j, geometry.columns, geometry, 1),
            )


def _strided(position: int, count: int, geometry: _Geometry, axis: int) -> slice:
    start = position * geometry.dilation[axis]
    return slice(start, start + (count - 1) * geometry.stride[axis] + 1, geometry.stride[axis])


def _slab_of(y: Tensor, slab: _Slab) -> Tensor:
    """The slab's part of ``y`` ``[batch, O, rows, columns]`` as a view ``[O, images, rows, columns]``."""
    return y[slab.first : slab.last, :, slab.top : slab.bottom].transpose(0, 1)


class _Convolve(torch.autograd.Function):
    """Saves the images instead of their patches, and makes the patches of a slab again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, borders: Tensor, geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(x, table, borders)
        ctx.geometry = geometry
        y = x.new_empty((x.shape[0], table.shape[2], geometry.rows, geometry.columns))
        for slab in geometry.slabs(x.shape[0]):
            part = _slab_of(y, slab)
            part.copy_(
                lmkan(_patches(x, geometry, slab), table, borders, table_dtype=own_dtype(table)).view(
                    part.shape
                )
            )
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Made of differentiable operations, so that it can be differentiated again.
        x, table, borders = ctx.saved_tensors
        geometry: _Geometry = ctx.geometry
        need_x, need_table = ctx.needs_input_grad[:2]
        grad_x = torch.zeros_like(x) if need_x else None
        grad_table = torch.zeros_like(table) if need_table else None
        for slab in geometry.slabs(x.shape[0]):
            found = torch.ops.lmkan_gen.backward.default(
                _slab_of(grad, slab).flatten(1),
                _patches(x, geometry, slab),
                table,
                borders,
                need_x,
                need_table,
                0,
                0,
                False,
                own_dtype(table),
            )
            if grad_x is not None:
                _add_patches(found[0], geometry, slab, grad_x)
            if grad_table is not None:
                grad_table += found[1]
        return grad_x, grad_table, None, None


def _pair(name: str, value: int | _Pair, least: int) -> _Pair:
    pair = value if isinstance(value, tuple) else (value, value)
    if len(pair) != 2 or not all(isinstance(v, int) and not isinstance(v, bool) for v in pair):
        raise TypeError(f"{name} must be an int or a pair of ints, got {value!r}")
    if min(pair) < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return pair
