"""A layer on every patch of an image, as torch operators that lay out patches a slab at a time.

``torch.ops.lmkan_gen.convolve`` and ``convolve_backward`` are ``forward`` and ``backward`` of
`lmkan_gen.ops` on patches, ``frozen_convolve`` and ``frozen_convolve_grad_input`` those of
`lmkan_gen.frozen`. Images are kept for backward instead of their patches. The loop over slabs is inside the
operators, where neither a compiler nor an exporter follows: a graph holds one node for any number of slabs,
and the batch may vary.

Second derivatives and forward mode are made of the layer's operators, some whole images at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import fold, pad

from lmkan_gen import frozen, ops
from lmkan_gen.operators import Differentiable, Dims, below_autograd, one_by_one, primals, register
from lmkan_gen.ops import own_dtype

Pair = tuple[int, int]

_GEOMETRY = "int[] kernel, int[] stride, int[] padding, int[] dilation, int workspace"
_LIBRARY = torch.library.Library("lmkan_gen", "FRAGMENT")
_LIBRARY.define(f"convolve(Tensor x, Tensor table, Tensor borders, {_GEOMETRY}) -> Tensor")
_LIBRARY.define(
    "convolve_backward(Tensor grad, Tensor x, Tensor table, Tensor borders, bool need_x, bool need_table, "
    f"{_GEOMETRY}) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    f"frozen_convolve(Tensor x, Tensor values, Tensor? scales, Tensor borders, {_GEOMETRY}) -> Tensor"
)
_LIBRARY.define(
    f"frozen_convolve_grad_input(Tensor grad, Tensor x, Tensor values, Tensor borders, {_GEOMETRY}) -> Tensor"
)
_ops = torch.ops.lmkan_gen
_convolve_op = _ops.convolve.default
_backward_op = _ops.convolve_backward.default
_frozen_op = _ops.frozen_convolve.default
_frozen_grad_input_op = _ops.frozen_convolve_grad_input.default


class Geometry(NamedTuple):
    """Which patches an image has; the last arguments of every operator.

    Attributes:
        kernel: height and width of a patch; all pairs are (vertical, horizontal).
        stride: steps between patches.
        padding: rows and columns of zeros on every side.
        dilation: steps between the pixels of a patch.
        workspace: bytes of the largest copy of patches to make, unless one row of output pixels of one
            image takes more.
    """

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    workspace: int

    def output_size(self, height: int, width: int) -> Pair:
        """Rows and columns of patches of an image of this size.

        Raises:
            ValueError: the image is smaller than a patch.
        """
        rows, columns = (
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in zip(
                (height, width), self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )
        for count in (rows, columns):
            torch._check_value(
                count >= 1,
                lambda: (
                    f"an image of {[height, width]} with padding {list(self.padding)} is smaller than one "
                    f"patch of {list(self.kernel)} with dilation {list(self.dilation)}"
                ),
            )
        return rows, columns


class Slab(NamedTuple):
    """Images ``first`` to ``last``, rows of patches ``top`` to ``bottom``, ends excluded; all columns."""

    first: int
    last: int
    top: int
    bottom: int
    columns: int

    def of(self, y: Tensor) -> Tensor:
        """This part of ``y`` ``[batch, O, rows, columns]``, as a view ``[O, images, rows, columns]``."""
        return y[self.first : self.last, :, self.top : self.bottom].transpose(0, 1)


def patches(x: Tensor, geometry: Geometry, slab: Slab | None = None) -> Tensor:
    """What a layer sees of images; differentiable.

    Args:
        x: ``[batch, channels, height, width]``.
        geometry: of the patches.
        slab: which of them; None: all.

    Returns:
        ``[channels * kernel height * kernel width, images * rows * columns]``.
    """
    if slab is None:
        rows, columns = geometry.output_size(x.shape[2], x.shape[3])
        slab = Slab(0, x.shape[0], 0, rows, columns)
    v = _window(x.shape[2], 0, geometry, slab.top, slab.bottom)
    h = _window(x.shape[3], 1, geometry, 0, slab.columns)
    pixels = x[slab.first : slab.last, :, v.start : v.stop, h.start : h.stop]
    pixels = pad(pixels, (h.before, h.after, v.before, v.after)).transpose(0, 1)
    views = [pixels[:, :, rows, columns] for rows, columns in _offsets(geometry, slab)]
    return torch.stack(views, dim=1).flatten(0, 1).flatten(1)


def by_images(y: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    """``[batch, O, rows, columns]`` of what a layer makes, ``[O, ...]``, of all `patches` of ``x``."""
    size = geometry.output_size(x.shape[2], x.shape[3])
    images: Tensor = y.unflatten(1, (x.shape[0], *size)).transpose(0, 1)
    return images


class _Window(NamedTuple):
    """Pixels of an image's axis that a range of patches needs, and zeros to add before and after."""

    start: int
    stop: int
    before: int
    after: int


def _window(size: int, axis: int, geometry: Geometry, first: int, last: int) -> _Window:
    start = first * geometry.stride[axis] - geometry.padding[axis]
    stop = (last - 1) * geometry.stride[axis] - geometry.padding[axis]
    stop += geometry.dilation[axis] * (geometry.kernel[axis] - 1) + 1
    low, high = min(max(start, 0), size), min(max(stop, 0), size)
    if high <= low:  # nothing but padding
        return _Window(0, 0, 0, stop - start)
    return _Window(low, high, low - start, stop - high)


def _add_patches(grad: Tensor, geometry: Geometry, slab: Slab, out: Tensor) -> None:
    """The adjoint of `patches`: add ``grad`` ``[I, ...]`` to ``out``, of the shape of ``x``."""
    v = _window(out.shape[2], 0, geometry, slab.top, slab.bottom)
    h = _window(out.shape[3], 1, geometry, 0, slab.columns)
    channels, images, rows = out.shape[1], slab.last - slab.first, slab.bottom - slab.top
    offsets = list(_offsets(geometry, slab))
    height, width = v.before + v.stop - v.start + v.after, h.before + h.stop - h.start + h.after
    pixels = grad.new_zeros((channels, images, height, width))
    grad = grad.reshape(channels, len(offsets), images, rows, slab.columns)
    for i, (down, across) in enumerate(offsets):
        pixels[:, :, down, across] += grad[:, i]
    inside = pixels[
        :, :, v.before : v.before + v.stop - v.start, h.before : h.before + h.stop - h.start
    ].transpose(0, 1)
    out[slab.first : slab.last, :, v.start : v.stop, h.start : h.stop] += inside


def _offsets(geometry: Geometry, slab: Slab) -> Iterator[tuple[slice, slice]]:
    """For each pixel of a patch, where it lies in the padded slab for all patches."""
    for i in range(geometry.kernel[0]):
        for j in range(geometry.kernel[1]):
            yield (
                _strided(i, slab.bottom - slab.top, geometry, 0),
                _strided(j, slab.columns, geometry, 1),
            )


def _strided(position: int, count: int, geometry: Geometry, axis: int) -> slice:
    start = position * geometry.dilation[axis]
    return slice(start, start + (count - 1) * geometry.stride[axis] + 1, geometry.stride[axis])


def _slabs(x: Tensor, outputs: int, geometry: Geometry) -> Iterator[Slab]:
    """Slabs whose patches fit the workspace, and the layer's output for them as well."""
    rows, columns = geometry.output_size(x.shape[2], x.shape[3])
    inputs = x.shape[1] * geometry.kernel[0] * geometry.kernel[1]
    at_a_time = max(1, geometry.workspace // (columns * max(inputs, outputs) * x.element_size()))
    images, step = max(1, at_a_time // rows), min(rows, at_a_time)
    for first in range(0, x.shape[0], images):
        for top in range(0, rows, step):
            yield Slab(first, min(first + images, x.shape[0]), top, min(top + step, rows), columns)


def _by_slabs(x: Tensor, outputs: int, geometry: Geometry, layer: Callable[[Slab, Tensor], Tensor]) -> Tensor:
    """``[batch, outputs, rows, columns]`` of what ``layer`` makes of each slab's patches."""
    y = x.new_empty((x.shape[0], outputs, *geometry.output_size(x.shape[2], x.shape[3])))
    for slab in _slabs(x, outputs, geometry):
        part = slab.of(y)
        part.copy_(layer(slab, patches(x, geometry, slab)).view(part.shape))
    return y


def _convolve(x: Tensor, table: Tensor, borders: Tensor, *sizes: Any) -> Tensor:
    def layer(_: Slab, seen: Tensor) -> Tensor:
        y: Tensor = _ops.forward.default(seen, table, borders, 0, 0, 0, 0, False, own_dtype(table))
        return y

    return _by_slabs(x, table.shape[2], Geometry(*sizes), layer)


def _frozen_convolve(
    x: Tensor, values: Tensor, scales: Tensor | None, borders: Tensor, *sizes: Any
) -> Tensor:
    def layer(_: Slab, seen: Tensor) -> Tensor:
        y: Tensor = _ops.frozen_forward.default(seen, values, scales, borders)
        return y

    return _by_slabs(x, values.shape[2], Geometry(*sizes), layer)


def _convolve_backward(
    grad: Tensor,
    x: Tensor,
    table: Tensor,
    borders: Tensor,
    need_x: bool,
    need_table: bool,
    *sizes: Any,
) -> tuple[Tensor, Tensor]:
    geometry, options = Geometry(*sizes), (need_x, need_table, 0, 0, False, own_dtype(table))
    grad_x, grad_table = _zeros(x, need_x), _zeros(table, need_table)
    for slab in _slabs(x, table.shape[2], geometry):
        seen, upper = patches(x, geometry, slab), slab.of(grad).flatten(1)
        of_x, of_table = _ops.backward.default(upper, seen, table, borders, *options)
        if need_x:
            _add_patches(of_x, geometry, slab, grad_x)
        if need_table:
            grad_table += of_table
    return grad_x, grad_table


def _frozen_convolve_grad_input(
    grad: Tensor, x: Tensor, values: Tensor, borders: Tensor, *sizes: Any
) -> Tensor:
    geometry, grad_x = Geometry(*sizes), _zeros(x, True)
    for slab in _slabs(x, values.shape[2], geometry):
        seen, upper = patches(x, geometry, slab), slab.of(grad).flatten(1)
        of_x = _ops.frozen_grad_input.default(upper, seen, values, borders)
        _add_patches(of_x, geometry, slab, grad_x)
    return grad_x


def _zeros(like: Tensor, needed: bool) -> Tensor:
    """Zeros to add to, of the shape of ``like``, contiguous; empty when nobody needs them."""
    return like.new_zeros(like.shape if needed else (0,))


def _fake_patches(x: Tensor, geometry: Geometry) -> Tensor:
    """An empty tensor for `patches`."""
    if x.dim() != 4:
        raise ValueError(f"x must be [batch, channels, height, width], got {list(x.shape)}")
    rows, columns = geometry.output_size(x.shape[2], x.shape[3])
    inputs = x.shape[1] * geometry.kernel[0] * geometry.kernel[1]
    return x.new_empty((inputs, x.shape[0] * rows * columns))


def _convolve_fake(x: Tensor, table: Tensor, borders: Tensor, *sizes: Any) -> Tensor:
    geometry = Geometry(*sizes)
    ops._check(_fake_patches(x, geometry), table, borders)
    return x.new_empty((x.shape[0], table.shape[2], *geometry.output_size(x.shape[2], x.shape[3])))


def _frozen_convolve_fake(
    x: Tensor, values: Tensor, scales: Tensor | None, borders: Tensor, *sizes: Any
) -> Tensor:
    geometry = Geometry(*sizes)
    frozen._check(_fake_patches(x, geometry), values, scales, borders)
    return x.new_empty((x.shape[0], values.shape[2], *geometry.output_size(x.shape[2], x.shape[3])))


def _convolve_backward_fake(
    grad: Tensor, x: Tensor, table: Tensor, borders: Tensor, need_x: bool, need_table: bool, *_: Any
) -> tuple[Tensor, Tensor]:
    return _zeros(x, need_x), _zeros(table, need_table)


def _frozen_convolve_grad_input_fake(grad: Tensor, x: Tensor, *_: Any) -> Tensor:
    return _zeros(x, True)


def _image_step(x: Tensor, geometry: Geometry) -> int:
    """How many images' patches fit the workspace; at least one."""
    rows, columns = geometry.output_size(x.shape[2], x.shape[3])
    inputs = x.shape[1] * geometry.kernel[0] * geometry.kernel[1]
    return max(1, geometry.workspace // (inputs * rows * columns * x.element_size()))


def _tangent(v_x: Tensor, x: Tensor, table: Tensor, borders: Tensor, geometry: Geometry) -> Tensor:
    """The tangent of ``convolve`` along the images; differentiable, as is what follows."""
    step, size = _image_step(x, geometry), geometry.output_size(x.shape[2], x.shape[3])
    parts = [
        _ops.tangent.default(patches(v, geometry), patches(images, geometry), table, borders)
        .unflatten(1, (-1, *size))
        .transpose(0, 1)
        for v, images in zip(v_x.split(step), x.split(step), strict=True)
    ]
    return torch.cat(parts)


def _double_backward(
    v_x: Tensor | None,
    v_table: Tensor | None,
    grad: Tensor,
    x: Tensor,
    table: Tensor,
    borders: Tensor,
    needs: tuple[bool, bool, bool],
    geometry: Geometry,
) -> list[Tensor | None]:
    """Gradients of ``<v_x, grad_x> + <v_table, grad_table>`` with respect to ``grad``, ``x``, ``table``."""
    step, size = _image_step(x, geometry), geometry.output_size(x.shape[2], x.shape[3])
    parts: list[list[Tensor]] = [[], [], []]
    for i, (images, upper) in enumerate(zip(x.split(step), grad.split(step), strict=True)):
        found = _ops.double_backward.default(
            None if v_x is None else patches(v_x.split(step)[i], geometry),
            v_table,
            upper.transpose(0, 1).flatten(1),
            patches(images, geometry),
            table,
            borders,
            *needs,
        )
        if needs[0]:
            parts[0].append(found[0].unflatten(1, (-1, *size)).transpose(0, 1))
        if needs[1]:
            parts[1].append(_folded(found[1], images, geometry))
        if needs[2]:
            parts[2].append(found[2])
    return [
        torch.cat(parts[0]) if needs[0] else None,
        torch.cat(parts[1]) if needs[1] else None,
        torch.stack(parts[2]).sum(0) if needs[2] else None,
    ]


def _folded(grad: Tensor, images: Tensor, geometry: Geometry) -> Tensor:
    """The adjoint of `patches` as torch has it."""
    by_image = grad.unflatten(1, (len(images), -1)).transpose(0, 1)
    return fold(
        by_image,
        images.shape[2:],
        geometry.kernel,
        geometry.dilation,
        geometry.padding,
        geometry.stride,
    )


class _Convolve(Differentiable):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, borders: Tensor, *sizes: Any) -> Tensor:
        ops._refuse_grid_gradient(ctx.needs_input_grad[2])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, table, borders)
        ctx.save_for_forward(x, table, borders)
        ctx.sizes = sizes
        y: Tensor = below_autograd(_convolve_op, x, table, borders, *sizes)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (1 + len(ctx.sizes))
        if grad is None:
            return None, None, *nothing
        need_x, need_table = ctx.needs_input_grad[:2]
        grad_x, grad_table = _backward_op(grad, *ctx.saved_tensors, need_x, need_table, *ctx.sizes)
        return grad_x if need_x else None, grad_table if need_table else None, *nothing

    @staticmethod
    def jvp(ctx: Any, v_x: Tensor | None, v_table: Tensor | None, *_: Any) -> Tensor:
        with primals(ctx.saved_tensors) as (x, table, borders):
            along: Tensor | None = None
            if v_x is not None:
                assert x is not None
                assert table is not None
                assert borders is not None
                along = _tangent(v_x, x, table, borders, Geometry(*ctx.sizes))
            if v_table is None:
                assert along is not None
                return along
            # the layer is linear in its table
            of_table: Tensor = _convolve_op(x, v_table, borders, *ctx.sizes)
            return of_table if along is None else along + of_table


class _ConvolveBackward(Differentiable):
    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        x: Tensor,
        table: Tensor,
        borders: Tensor,
        need_x: bool,
        need_table: bool,
        *sizes: Any,
    ) -> tuple[Tensor, Tensor]:
        ops._refuse_grid_gradient(ctx.needs_input_grad[3])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, x, table, borders)
        ctx.save_for_forward(grad, x, table, borders)
        ctx.needed, ctx.sizes = (need_x, need_table), sizes
        found = below_autograd(_backward_op, grad, x, table, borders, need_x, need_table, *sizes)
        ctx.mark_non_differentiable(*(t for t, n in zip(found, ctx.needed, strict=True) if not n))
        return found[0], found[1]

    @staticmethod
    def backward(ctx: Any, v_x: Tensor | None, v_table: Tensor | None) -> tuple[Tensor | None, ...]:
        v_x, v_table = (v if needed else None for v, needed in zip((v_x, v_table), ctx.needed, strict=True))
        needs = ctx.needs_input_grad[:3]
        grad, x, table, borders = ctx.saved_tensors
        geometry = Geometry(*ctx.sizes)
        found = _double_backward(v_x, v_table, grad, x, table, borders, needs, geometry)
        return (*found, *(None,) * (3 + len(ctx.sizes)))

    @staticmethod
    def jvp(
        ctx: Any, v_grad: Tensor | None, v_x: Tensor | None, v_table: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, Tensor | None]:
        with primals(ctx.saved_tensors) as (grad, x, table, borders):
            assert grad is not None
            assert x is not None
            assert table is not None
            assert borders is not None
            # sum(grad * y) has a symmetric Hessian: its product with the tangents, by parts
            found: list[Tensor | None] = [torch.zeros_like(x), torch.zeros_like(table)]
            if v_x is not None or v_table is not None:
                needs = (False, *ctx.needed)
                geometry = Geometry(*ctx.sizes)
                found = _double_backward(v_x, v_table, grad, x, table, borders, needs, geometry)[1:]
            if v_grad is not None:
                of_grad = _backward_op(v_grad, x, table, borders, *ctx.needed, *ctx.sizes)
                found = [f + t if n else f for f, t, n in zip(found, of_grad, ctx.needed, strict=True)]
        along_x, along_table = (f if n else None for f, n in zip(found, ctx.needed, strict=True))
        return along_x, along_table


class _FrozenConvolve(Differentiable):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, scales: Tensor | None, borders: Tensor, *sizes: Any
    ) -> Tensor:
        frozen.refuse_gradient(ctx.needs_input_grad[1])
        ctx.save_for_backward(x, values, borders)
        ctx.save_for_forward(x, values, borders)
        ctx.sizes = sizes
        y: Tensor = below_autograd(_frozen_op, x, values, scales, borders, *sizes)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values, borders = ctx.saved_tensors
        frozen.refuse_int8(values)
        grad_x: Tensor = _frozen_grad_input_op(grad, x, values, borders, *ctx.sizes)
        return (grad_x, *(None,) * (3 + len(ctx.sizes)))

    @staticmethod
    def jvp(ctx: Any, v_x: Tensor, *_: Any) -> Tensor:
        with primals(ctx.saved_tensors) as (x, values, borders):
            assert x is not None
            assert values is not None
            assert borders is not None
            frozen.refuse_int8(values)
            return _tangent(v_x, x, values.to(x.dtype), borders, Geometry(*ctx.sizes))


class _FrozenGradInput(Differentiable):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        grad_x: Tensor = below_autograd(_frozen_grad_input_op, *arguments)
        return grad_x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(frozen.ONCE)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(frozen.ONCE)


def _more_images(op: Any, images: tuple[int, ...], folds: Callable[..., bool]) -> Callable[..., Any]:
    """A rule for ``vmap`` that makes one call of more images, where only images are mapped over.

    Args:
        op: the operator.
        images: positions of its arguments whose first dimension is the batch.
        folds: given the arguments, whether every output that is not empty has the batch first.
    """
    apart = one_by_one(op)

    def rule(info: Any, in_dims: Dims, *arguments: Any) -> tuple[Any, Any]:
        mapped = {i for i, d in enumerate(in_dims) if isinstance(d, int)}
        if not mapped <= set(images) or not folds(*arguments):
            outputs, dims = apart(info, in_dims, *arguments)
            return outputs, dims
        size, folded = info.batch_size, list(arguments)
        for i in images:
            dim, argument = in_dims[i], arguments[i]
            argument = argument.unsqueeze(0) if dim is None else argument.movedim(dim, 0)
            folded[i] = argument.expand(size, *argument.shape[1:]).flatten(0, 1)
        outputs = op(*folded)
        if isinstance(outputs, Tensor):
            return outputs.unflatten(0, (size, -1)), 0
        apart_again = [y.unflatten(0, (size, -1)) if y.dim() == 4 else y.expand(size, 0) for y in outputs]
        return tuple(apart_again), (0,) * len(outputs)

    return rule


register(
    _LIBRARY,
    "convolve",
    _convolve,
    _convolve_fake,
    _Convolve,
    _more_images(_convolve_op, (0,), lambda *_: True),
)
register(
    _LIBRARY,
    "convolve_backward",
    _convolve_backward,
    _convolve_backward_fake,
    _ConvolveBackward,
    _more_images(_backward_op, (0, 1), lambda *arguments: not arguments[5]),
)
register(
    _LIBRARY,
    "frozen_convolve",
    _frozen_convolve,
    _frozen_convolve_fake,
    _FrozenConvolve,
    _more_images(_frozen_op, (0,), lambda *_: True),
)
register(
    _LIBRARY,
    "frozen_convolve_grad_input",
    _frozen_convolve_grad_input,
    _frozen_convolve_grad_input_fake,
    _FrozenGradInput,
    _more_images(_frozen_grad_input_op, (0, 1), lambda *_: True),
)
