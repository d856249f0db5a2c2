"""`LMKAN2DLayer`: the layer as a torch module."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lmkan_gen.grid import knots
from lmkan_gen.ops import lmkan
from lmkan_gen.problem import MIN_GRIDS
from lmkan_gen.regularization import hessian_regularization

_WARP = 32
_MAX_BLOCK = 1024


class LMKAN2DLayer(nn.Module):
    """Lookup multivariate Kolmogorov-Arnold layer with functions of two inputs.

    ``y[o, b] = sum_p f_{o,p}(x[2p, b], x[2p+1, b])``, where each of the ``output_dim * input_dim / 2``
    functions is piecewise bilinear on a fixed grid and extrapolates linearly. A drop-in replacement
    for a linear layer, except that the batch is the last axis. The cost of a call does not depend on
    ``num_grids``; the number of parameters, ``(num_grids + 1)**2 * output_dim * input_dim / 2``, does.

    Inputs should have about zero mean and unit variance: put ``BatchNorm(affine=False)`` before every
    such layer but the first.

    Tile and block sizes describe CUDA kernels. Left out, they are chosen by tuning; given, they are
    honoured, or refused at the first call if they do not fit the GPU. CPUs ignore them.

    Args:
        num_grids: cells per axis of each function's grid, at least 3. Start with 8 to 10.
        input_dim: number of inputs, even.
        output_dim: number of outputs.
        block_size_forward: threads per block of the forward kernel, a multiple of 32 up to 1024.
        block_size_backward: the same for the backward kernel.
        tile_size_forward: inputs and outputs whose tables a block holds at a time, a power of two.
        tile_size_backward: the same for the backward kernel.
        init_scale: the table starts uniform within ``+-init_scale / sqrt(input_dim)``.
        backward_fast_mode: prefer the backward kernel that trades shared memory for speed.

    Attributes:
        func_parameter: parameter ``[num_grids+1, num_grids+1, output_dim, input_dim/2]``, float32; entry
            ``[i1, i2, o, p]`` is ``f_{o,p}`` at the knots ``borders[i1], borders[i2]``.
        borders: buffer ``[num_grids+1]``, float32, the knots.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of its range.
    """

    func_parameter: nn.Parameter
    borders: Tensor

    def __init__(
        self,
        num_grids: int,
        input_dim: int,
        output_dim: int,
        block_size_forward: int | None = None,
        block_size_backward: int | None = None,
        tile_size_forward: int | None = None,
        tile_size_backward: int | None = None,
        init_scale: float = 0.1,
        backward_fast_mode: bool = False,
    ) -> None:
        super().__init__()
        _check_integer("num_grids", num_grids, MIN_GRIDS)
        _check_integer("input_dim", input_dim, 2)
        if input_dim % 2:
            raise ValueError(
                f"input_dim must be even, got {input_dim}: inputs are consumed in pairs; "
                "append an input that is always zero"
            )
        _check_integer("output_dim", output_dim, 1)
        _check_block("block_size_forward", block_size_forward)
        _check_block("block_size_backward", block_size_backward)
        _check_tile("tile_size_forward", tile_size_forward)
        _check_tile("tile_size_backward", tile_size_backward)
        if isinstance(init_scale, bool) or not isinstance(init_scale, (int, float)):
            raise TypeError(f"init_scale must be a number, got {init_scale!r}")
        if not (math.isfinite(init_scale) and init_scale >= 0):
            raise ValueError(f"init_scale must be finite and not negative, got {init_scale}")
        if not isinstance(backward_fast_mode, bool):
            raise TypeError(f"backward_fast_mode must be True or False, got {backward_fast_mode!r}")
        self.num_grids = num_grids
        self.input_dim = input_dim
        self.output_dim = output_dim
        self.block_size_forward = block_size_forward
        self.block_size_backward = block_size_backward
        self.tile_size_forward = tile_size_forward
        self.tile_size_backward = tile_size_backward
        self.init_scale = init_scale
        self.backward_fast_mode = backward_fast_mode
        self._options = (
            tile_size_forward or 0,
            block_size_forward or 0,
            tile_size_backward or 0,
            block_size_backward or 0,
            backward_fast_mode,
        )
        side = num_grids + 1
        # float32 whatever torch's default dtype: that is what the kernels and checkpoints have
        self.func_parameter = nn.Parameter(
            torch.empty(side, side, output_dim, input_dim // 2, dtype=torch.float32)
        )
        self.register_buffer("borders", knots(num_grids))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table anew, uniform within ``+-init_scale / sqrt(input_dim)``."""
        bound = self.init_scale / math.sqrt(self.input_dim)
        nn.init.uniform_(self.func_parameter, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: ``[input_dim, batch]``, of the dtype and on the device of ``func_parameter``.

        Returns:
            ``[output_dim, batch]``.

        Raises:
            ValueError: wrong shape or device, or a tile or block size that does not fit the GPU.
            TypeError: wrong dtype.
        """
        return lmkan(x, self.func_parameter, self.borders, *self._options)

    def get_hessian_regularization(self) -> Tensor:
        """How far the functions are from affine, a scalar; add ``lambda`` times it to the loss.

        See `lmkan_gen.regularization.hessian_regularization`.
        """
        return hessian_regularization(self.func_parameter, self.borders)

    def extra_repr(self) -> str:
        """Sizes, and whatever differs from the defaults."""
        words = [f"num_grids={self.num_grids}, input_dim={self.input_dim}, output_dim={self.output_dim}"]
        for name in ("block_size_forward", "block_size_backward", "tile_size_forward", "tile_size_backward"):
            if (value := getattr(self, name)) is not None:
                words.append(f"{name}={value}")
        if self.backward_fast_mode:
            words.append("backward_fast_mode=True")
        return ", ".join(words)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        # Cells are found by the grid's formula, so that other knots would give wrong values silently.
        borders = state_dict.get(f"{prefix}borders")
        expected = knots(self.num_grids)
        if isinstance(borders, Tensor) and borders.shape == expected.shape and not borders.is_meta:
            error = (borders.detach().to("cpu", torch.float32) - expected).abs().max().item()
            if not error <= 1e-4:
                error_messages: list[str] = args[-1]
                error_messages.append(
                    f"{prefix}borders is not the static percentile grid of {self.num_grids} cells: "
                    f"a knot is off by {error:.3g}; this layer knows no other grid"
                )


def _check_integer(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_block(name: str, value: int | None) -> None:
    if value is None:
        return
    _check_integer(name, value, _WARP)
    if value % _WARP or value > _MAX_BLOCK:
        raise ValueError(f"{name} must be a multiple of {_WARP} up to {_MAX_BLOCK}, got {value}")


def _check_tile(name: str, value: int | None) -> None:
    if value is None:
        return
    _check_integer(name, value, 1)
    if value & (value - 1):
        raise ValueError(f"{name} must be a power of two such as 4, 8 or 16, got {value}")
