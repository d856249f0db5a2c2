"""`LMKAN2DLayer`: the layer as a torch module."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lmkan_gen import packing
from lmkan_gen.frozen import FREEZABLE, FREEZABLE_NAMES, FrozenTable, frozen_lmkan
from lmkan_gen.grid import knots
from lmkan_gen.layout import BatchLastModule
from lmkan_gen.ops import lmkan
from lmkan_gen.packing import RoundedTable
from lmkan_gen.problem import MIN_GRIDS
from lmkan_gen.regularization import hessian_regularization
from lmkan_gen.tables import affine_table

_WARP = 32
_MAX_BLOCK = 1024


class LMKAN2DLayer(BatchLastModule):
    """Lookup multivariate Kolmogorov-Arnold layer with functions of two inputs.

    ``y[o, b] = sum_p f_{o,p}(x[2p, b], x[2p+1, b])``, where each of the ``output_dim * input_dim / 2``
    functions is piecewise bilinear on a fixed grid and extrapolates linearly. A drop-in replacement
    for a linear layer, except that the batch is the last axis unless ``batch_first`` is set. The cost of a
    call does not depend on ``num_grids``; the number of parameters,
    ``(num_grids + 1)**2 * output_dim * input_dim / 2``, does.

    Inputs should have about zero mean and unit variance: put ``BatchNorm(affine=False)`` before every
    such layer but the first.

    Tile and block sizes describe CUDA kernels. Left out, they are chosen by tuning; given, they are
    honoured, or refused at the first call if they do not fit the GPU. CPUs ignore them.

    Args:
        num_grids: cells per axis of each function's grid, at least 3. Start with 8 to 10.
        input_dim: number of inputs. An odd number is completed by an input that is always zero; kernels know.
        output_dim: number of outputs.
        block_size_forward: threads per block of the forward kernel, a multiple of 32 up to 1024.
        block_size_backward: the same for the backward kernel.
        tile_size_forward: inputs and outputs whose tables a block holds at a time, a power of two.
        tile_size_backward: the same for the backward kernel.
        init_scale: the table starts uniform within ``+-init_scale / sqrt(input_dim)``.
        backward_fast_mode: a wish that goes with a tile or block size for backward: where one kernel of that
            tile computes both gradients, take its variant that trades shared memory for speed, if it fits.
            Without tile and block the fastest kernel is taken anyway, and this changes nothing.
        batch_first: take ``[*, input_dim]``, as `nn.Linear` does, and return ``[*, output_dim]``: a view,
            since outputs lie batch-last in memory either way.
        device: where the table is made.
        dtype: of the table: float32 by default, whatever torch's default dtype, as kernels want it; float64,
            float16 and bfloat16 work too.

    Attributes:
        func_parameter: parameter ``[num_grids+1, num_grids+1, output_dim, ceil(input_dim/2)]``;
            entry ``[i1, i2, o, p]`` is ``f_{o,p}`` at the knots ``borders[i1], borders[i2]``.
        borders: buffer ``[num_grids+1]``, the knots; float64 if the table is, else float32. They follow from
            ``num_grids``, so that a layer restores them whatever comes of its buffers.
        frozen: the constant table while the layer is frozen, else None; see `freeze`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of its range.
    """

    func_parameter: nn.Parameter
    borders: Tensor
    frozen: FrozenTable | None

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
        *,
        batch_first: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_dim, batch_first)
        _check_integer("num_grids", num_grids, MIN_GRIDS)
        _check_integer("input_dim", input_dim, 1)
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
        if not isinstance(batch_first, bool):
            raise TypeError(f"batch_first must be True or False, got {batch_first!r}")
        self.num_grids = num_grids
        self._pairs = -(-input_dim // 2)
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
        dtype = check_dtype(dtype)
        self.func_parameter = nn.Parameter(
            torch.empty(side, side, output_dim, self._pairs, device=device, dtype=dtype)
        )
        self.register_buffer("borders", knots(num_grids).to(self.func_parameter.device, _exact(dtype)))
        self._vetted: tuple[Tensor, int] | None = None
        self.frozen = None
        self._master: Tensor | None = None
        self._master_requires_grad = True
        self.reset_parameters()

    @classmethod
    def from_linear(cls, linear: nn.Linear, num_grids: int = 8) -> LMKAN2DLayer:
        """The layer that computes what ``linear`` does, on transposed inputs and outputs.

        See `lmkan_gen.convert` for whole networks and inputs with the batch first.

        Args:
            linear: float32 or float64.
            num_grids: cells per axis, at least 3.

        Returns:
            A layer of the dtype and on the device of ``linear``.

        Raises:
            ValueError: ``num_grids`` below 3.
        """
        layer = cls(num_grids, linear.in_features, linear.out_features)
        layer.to(linear.weight.device, linear.weight.dtype)
        with torch.no_grad():
            layer.func_parameter.copy_(affine_table(linear.weight, linear.bias, num_grids))
        return layer

    def reset_parameters(self) -> None:
        """Draw the table anew, uniform within ``+-init_scale / sqrt(input_dim)``, and restore the knots.

        Raises:
            RuntimeError: the layer is frozen and has no ``func_parameter``.
        """
        self._restore_grid()
        if self.func_parameter is None:
            raise RuntimeError("a frozen layer without func_parameter cannot be drawn anew; call unfreeze()")
        bound = self.init_scale / math.sqrt(self.input_dim)
        nn.init.uniform_(self.func_parameter, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: ``[input_dim, batch]``, or ``[*, input_dim]`` if ``batch_first``; of the dtype and on the
                device of ``func_parameter``, of any float dtype under ``torch.autocast`` and while frozen.
                Kernels read it as it lies in memory.

        Returns:
            ``[output_dim, batch]``, or ``[*, output_dim]``.

        Raises:
            ValueError: wrong shape or device, a tile or block size that does not fit the GPU, or ``borders``
                holds something else than the grid.
            TypeError: wrong dtype.
        """
        return super().forward(x)

    def batch_last(self, x: Tensor) -> Tensor:
        """``[input_dim, batch]`` -> ``[output_dim, batch]``."""
        self.check_grid()
        if self.frozen is not None:
            return frozen_lmkan(x, self.frozen.table, self.borders)
        return lmkan(x, self.func_parameter, self.borders, *self._options)

    def freeze(self, table_dtype: torch.dtype, master: Literal["keep", "cpu", "drop"] = "keep") -> Self:
        """Declare the table constant and compute with it as ``table_dtype`` from now on.

        Kernels then may read it in an order of their own, which is made once. Inputs and outputs keep their
        dtype. Inputs still have a gradient, but not with int8; the table has none. The state dict of a frozen
        layer holds the table in ``table_dtype`` only (``frozen.values``, and ``frozen.scales`` for int8), and
        freezes the layer that loads it.

        Errors relative to the output are about 4e-4 for float16 and 3e-3 for bfloat16; for int8 below 1e-2
        where functions are smooth. Beyond ``|x|`` of about 150 float16 weights of the extrapolation overflow.

        Args:
            table_dtype: ``torch.float32``, ``torch.float16``, ``torch.bfloat16`` or ``torch.int8``.
            master: what happens to ``func_parameter``: kept; moved to the CPU's memory, where ``unfreeze``
                finds it; or dropped, after which ``unfreeze`` makes one of the frozen table. Meanwhile
                ``func_parameter`` is None unless kept.

        Returns:
            The layer.

        Raises:
            RuntimeError: the layer is in training mode, or frozen already, or ``func_parameter`` is
                parametrized and is not to be kept.
            ValueError: ``table_dtype`` or ``master`` is none of the above, or int8 is asked for and the table
                holds infinities or NaN.
        """
        if self.training:
            raise RuntimeError("a layer in training mode cannot be frozen; call eval() first")
        if self.frozen is not None:
            dtype = str(self.frozen.values.dtype).removeprefix("torch.")
            raise RuntimeError(f"the layer is frozen to {dtype} already; call unfreeze() first")
        if table_dtype not in FREEZABLE:
            raise ValueError(f"table_dtype must be one of {FREEZABLE_NAMES}, got {table_dtype}")
        if master not in ("keep", "cpu", "drop"):
            raise ValueError(f"master must be keep, cpu or drop, got {master!r}")
        if master != "keep" and self._is_parametrized():
            raise RuntimeError(
                f"func_parameter is parametrized, so that master={master!r} cannot take it away; use "
                "master='keep', or torch.nn.utils.parametrize.remove_parametrizations first"
            )
        with torch.no_grad():
            table = packing.round_table(self.func_parameter.detach(), packing.table_dtype(table_dtype))
            if table_dtype == self.func_parameter.dtype:
                table = RoundedTable(table.values.clone())  # what is frozen does not follow the parameter
        if master == "cpu" and not self.func_parameter.is_meta:
            self._master = self.func_parameter.detach().cpu()
        self._set_frozen(FrozenTable(table), keep=master == "keep")
        return self

    def unfreeze(self) -> Self:
        """Undo `freeze`: compute with ``func_parameter`` again.

        It is the one from before if that was kept or moved to the CPU's memory (then as a new parameter,
        which an optimiser has to be told of), else the frozen table in float32. The latter too, in the
        kept parameter if there is one, where the frozen table was written to meanwhile.

        Returns:
            The layer.

        Raises:
            RuntimeError: the layer is not frozen.
        """
        if self.frozen is None:
            raise RuntimeError("the layer is not frozen")
        written = not self.frozen.is_as_made()
        if self.func_parameter is None or written:
            table = RoundedTable(self.frozen.values, self.frozen.scales).to(self.borders.dtype)
            if self._master is not None and not written:
                table = self._master.to(self.borders.device)
            if self.func_parameter is None:
                self.func_parameter = nn.Parameter(table, requires_grad=self._master_requires_grad)
            else:
                with torch.no_grad():
                    self.func_parameter.copy_(table)
        self.frozen = self._master = None
        return self

    def _is_parametrized(self) -> bool:
        return parametrize.is_parametrized(self, "func_parameter")

    def _set_frozen(self, frozen: FrozenTable, *, keep: bool) -> None:
        if not (keep or self._is_parametrized() or self.func_parameter is None):
            self._master_requires_grad = self.func_parameter.requires_grad
            self.register_parameter("func_parameter", None)
        self.frozen = frozen

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._restore_grid()
        return self

    def _restore_grid(self) -> None:
        """The knots as they are by definition, whatever rounded them or left them uninitialised."""
        borders = self.borders
        dtype = _exact(borders.dtype)
        if not _has_values(borders):
            if borders.dtype != dtype:
                self.borders = borders.to(dtype)
            return
        exact = knots(self.num_grids).to(borders.device, dtype)
        if borders.dtype != dtype or not torch.equal(borders, exact):
            self.borders = exact
        self._vetted = None

    def check_grid(self) -> None:
        """Refuse a grid that somebody put there: cells are found by formula, so values would be wrong.

        What is rounded only is restored. Compiled calls do not look.

        Raises:
            ValueError: ``borders`` holds something else than the grid.
        """
        borders = self.borders
        if torch.compiler.is_compiling() or borders.is_inference() or not _has_values(borders):
            return
        now = borders._version
        if self._vetted is not None and self._vetted[0] is borders and self._vetted[1] == now:
            return
        if borders.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        if error := self._grid_error(borders):
            raise ValueError(f"borders {error}; reset_parameters() or loading a state restores it")
        self._restore_grid()
        self._vetted = (self.borders, self.borders._version)

    def _grid_error(self, borders: Tensor) -> str | None:
        """What is wrong with knots from elsewhere, beyond the rounding of their type."""
        expected = knots(self.num_grids, torch.float64)
        if borders.shape != expected.shape:
            return f"has the shape {list(borders.shape)}, must be {list(expected.shape)}"
        error = (borders.detach().to("cpu", torch.float64) - expected).abs().max().item()
        rounding = torch.finfo(borders.dtype).eps if borders.is_floating_point() else 0.0
        if error <= 1e-4 + rounding * expected[-1].item():
            return None
        return (
            f"is not the static percentile grid of {self.num_grids} cells: a knot is off by {error:.3g}; "
            "this layer knows no other grid"
        )

    def get_hessian_regularization(self) -> Tensor:
        """How far the functions are from affine, a scalar; add ``lambda`` times it to the loss.

        See `lmkan_gen.regularization.hessian_regularization`.

        Raises:
            RuntimeError: the layer is frozen.
        """
        if self.frozen is not None:
            raise RuntimeError("a frozen layer has no functions to regularise; call unfreeze() first")
        return hessian_regularization(self.func_parameter, self.borders)

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse `torch.jit.script`, which would fail somewhere inside."""
        raise RuntimeError(
            "torch.jit.script knows no lmKAN layers; use torch.compile, or torch.export for deployment"
        )

    def extra_repr(self) -> str:
        """Sizes, and whatever differs from the defaults."""
        words = [f"num_grids={self.num_grids}, input_dim={self.input_dim}, output_dim={self.output_dim}"]
        for name in ("block_size_forward", "block_size_backward", "tile_size_forward", "tile_size_backward"):
            if (value := getattr(self, name)) is not None:
                words.append(f"{name}={value}")
        if self.backward_fast_mode:
            words.append("backward_fast_mode=True")
        if self.batch_first:
            words.append("batch_first=True")
        return ", ".join(words)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.frozen is not None:
            destination.pop(f"{prefix}func_parameter", None)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._freeze_as_in(state_dict, prefix, args[-1])
        borders: Any = state_dict.get(f"{prefix}borders")
        given = isinstance(borders, Tensor) and borders.shape == self.borders.shape
        if given and _has_values(borders) and (error := self._grid_error(borders)):
            args[-1].append(f"{prefix}borders {error}")
        missing: list[str] = args[2]
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.frozen is not None and f"{prefix}func_parameter" in missing:
            missing.remove(f"{prefix}func_parameter")  # kept beside a frozen table, and not part of its state
        self._restore_grid()

    def _freeze_as_in(self, state_dict: dict[str, Any], prefix: str, error_messages: list[str]) -> None:
        """Freeze or unfreeze, as the layer was whose state this is; the frozen table then loads itself."""
        values = state_dict.get(f"{prefix}frozen.values")
        if values is None:
            if self.frozen is not None and f"{prefix}func_parameter" in state_dict:
                self.unfreeze()
            return
        scales = state_dict.get(f"{prefix}frozen.scales")
        if values.dtype not in (*FREEZABLE, torch.float64) or (scales is None) == (
            values.dtype == torch.int8
        ):
            error_messages.append(
                f"{prefix}frozen.values: a frozen table is float32, float16 or bfloat16, or int8 with "
                f"scales; got {values.dtype} {'without' if scales is None else 'with'} scales"
            )
            return
        now = self.frozen
        if now is not None and now.values.dtype == values.dtype and self._master is None:
            return
        groups = -(-self._pairs // packing.SCALE_PAIRS)
        side, device = self.num_grids + 1, self.borders.device
        empty = RoundedTable(
            torch.empty(side, side, self.output_dim, self._pairs, dtype=values.dtype, device=device),
            None if scales is None else torch.empty(groups, self.output_dim, device=device),
        )
        self._master = None
        self._set_frozen(FrozenTable(empty), keep=False)


def check_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a module's parameters: float32 unless said otherwise.

    Raises:
        TypeError: ``dtype`` is no floating-point type that layers compute in.
    """
    if dtype is None:
        return torch.float32
    if dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        raise TypeError(f"dtype must be float32, float64, float16 or bfloat16, got {dtype}")
    return dtype


def _exact(dtype: torch.dtype) -> torch.dtype:
    """What knots are kept in beside a table of some dtype: their values are those of float32 either way."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _has_values(tensor: Tensor) -> bool:
    """Whether a buffer can be looked at: it is no meta or fake tensor, and nothing is traced or mapped."""
    return (
        type(tensor) is Tensor
        and not tensor.is_meta
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
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
