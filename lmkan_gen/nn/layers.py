"""Layers to build networks from: any width, either layout, batch norm, preconditioning."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, ClassVar, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from lmkan_gen.layer import LMKAN2DLayer, check_dtype
from lmkan_gen.layout import BatchLastModule

Precondition = Literal["relu_first", "relu_last"]


class LMKANLinear(BatchLastModule):
    """`LMKAN2DLayer` for any number of inputs and either layout; takes the place of `nn.Linear`.

    Args:
        input_dim: number of inputs.
        output_dim: number of outputs.
        num_grids: cells per axis of each function's grid, at least 3.
        batch_first: take ``[*, input_dim]`` instead of ``[input_dim, batch]``.
        init_scale: see `LMKAN2DLayer`.
        device: where the parameters are made.
        dtype: of the parameters; torch's default dtype if None.

    Attributes:
        layer: the `LMKAN2DLayer` that does the work.
        replaced: qualified name of the linear layer in whose place `lmkan_gen.convert` put this one, or None.

    Raises:
        TypeError, ValueError: as `LMKAN2DLayer`.
    """

    replaced: str | None = None

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        num_grids: int = 8,
        *,
        batch_first: bool = True,
        init_scale: float = 0.1,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_dim, batch_first)
        self.output_dim = output_dim
        self.layer = LMKAN2DLayer(
            num_grids, input_dim, output_dim, init_scale=init_scale, device=device, dtype=dtype
        )

    @property
    def in_features(self) -> int:
        """``input_dim``, by the name that `nn.Linear` has for it."""
        return self.input_dim

    @property
    def out_features(self) -> int:
        """``output_dim``, by the name that `nn.Linear` has for it."""
        return self.output_dim

    def __getattr__(self, name: str) -> Any:
        """Say what to do where code wants the weight of the linear layer that this one replaced."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if self.replaced is None or name not in ("weight", "bias"):
                raise
            raise AttributeError(
                f"the linear layer {self.replaced!r} was converted to an {type(self).__name__}, which has no "
                f"{name}: pass skip=[{self.replaced!r}] to convert"
            ) from None

    def batch_last(self, x: Tensor) -> Tensor:
        """``[input_dim, batch]`` -> ``[output_dim, batch]``."""
        # looked up where torch keeps it: `__getattr__` takes as long as a call of a module
        y: Tensor = self._modules["layer"](x)  # type: ignore[misc]
        return y


class _Preconditioned(LMKANLinear):
    """An lmKAN layer weighted by ``gamma``, and a linear path that trains while ``gamma`` is small."""

    gamma: Tensor

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        num_grids: int = 8,
        *,
        gamma: float = 1.0,
        batch_first: bool = True,
        init_scale: float = 0.1,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            input_dim,
            output_dim,
            num_grids,
            batch_first=batch_first,
            init_scale=init_scale,
            device=device,
            dtype=dtype,
        )
        dtype = check_dtype(dtype)
        self.weight = nn.Parameter(torch.empty(output_dim, input_dim, device=device, dtype=dtype))
        self.register_buffer("gamma", torch.empty((), device=device, dtype=dtype))
        self._initial_gamma = gamma
        self._reset_linear()

    def reset_parameters(self) -> None:
        """Draw ``weight`` and the lmKAN's table anew, and set ``gamma`` to its initial value."""
        self._reset_linear()
        self.layer.reset_parameters()

    def _reset_linear(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as nn.Linear
        with torch.no_grad():
            self.gamma.fill_(self._initial_gamma)


class ReLUFirst(_Preconditioned):
    """``y = gamma * lmkan(x) + W relu(x)`` (section 3 of the paper): 2x the FLOPs of lmKAN's linear part.

    With even ``num_grids`` it costs nothing at inference: `lmkan_gen.fold` puts ``W relu`` into the table.

    Args:
        input_dim: number of inputs.
        output_dim: number of outputs.
        num_grids: cells per axis, at least 3.
        gamma: initial weight of the lmKAN, in [0, 1]. `lmkan_gen.fitting.FittingSchedule` moves it.
        batch_first: take ``[*, input_dim]`` instead of ``[input_dim, batch]``.
        init_scale: see `LMKAN2DLayer`.
        device: where the parameters are made.
        dtype: of the parameters; torch's default dtype if None.

    Attributes:
        layer: the `LMKAN2DLayer`.
        weight: parameter ``[output_dim, input_dim]``, ``W``.
        gamma: buffer, a scalar.
    """

    def batch_last(self, x: Tensor) -> Tensor:
        """``[input_dim, batch]`` -> ``[output_dim, batch]``."""
        return torch.addcmul(self.weight @ x.relu(), self.gamma, super().batch_last(x))


class ReLULast(_Preconditioned):
    """``y = gamma * lmkan(x) + relu(W x)`` (section 3 of the paper).

    Slightly better than `ReLUFirst`, at 3x instead of 2x the FLOPs of a linear layer, at inference too.
    Arguments and attributes are those of `ReLUFirst`.
    """

    def batch_last(self, x: Tensor) -> Tensor:
        """``[input_dim, batch]`` -> ``[output_dim, batch]``."""
        return torch.addcmul((self.weight @ x).relu(), self.gamma, super().batch_last(x))


class BatchLastNorm(nn.Module):
    """`nn.BatchNorm1d` for ``[features, batch]``, without trainable scale and shift by default.

    Args:
        features: number of rows.
        momentum: of the running statistics.
        device: where the statistics are kept.
        dtype: of the statistics; torch's default dtype if None.
    """

    def __init__(
        self,
        features: int,
        momentum: float = 0.1,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dtype = check_dtype(dtype)
        self.norm = nn.BatchNorm1d(features, momentum=momentum, affine=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each row of ``x`` ``[features, batch]``."""
        rows = x.unsqueeze(0)  # statistics over the last axis
        norm = self._modules["norm"]
        assert norm is not None
        plain = type(x) is Tensor and x.dim() == 2 and not torch.compiler.is_compiling()
        if plain and _only_normalizes(norm):
            # what the module would call, in half of its time
            known = norm._buffers
            y = torch.batch_norm(
                rows, None, None, known["running_mean"], known["running_var"], False, 0.0, norm.eps, True
            )
        else:
            y = norm(rows)
        return y.squeeze(0)


def _only_normalizes(norm: nn.Module) -> TypeGuard[nn.BatchNorm1d]:
    """Whether a call of the module comes to a normalisation with statistics that stay as they are."""
    return (
        type(norm) is nn.BatchNorm1d
        and not norm.training
        and norm.track_running_stats
        and not (norm.affine or norm._forward_hooks or norm._forward_pre_hooks)
        and not (hooks._global_forward_hooks or hooks._global_forward_pre_hooks)
    )


class LMKANBlock(BatchLastModule):
    """``BatchNorm1d(affine=False)``, then an lmKAN layer: the unit that networks are stacked from.

    The grids are made for inputs of zero mean and unit variance; batch norm provides them.

    Args:
        input_dim: number of inputs.
        output_dim: number of outputs.
        num_grids: cells per axis, at least 3.
        precondition: None, ``"relu_first"`` (`ReLUFirst`) or ``"relu_last"`` (`ReLULast`).
        normalize: whether to put batch norm in front; a network's first layer needs none if its
            inputs are standardised.
        batch_first: take ``[*, input_dim]`` instead of ``[input_dim, batch]``.
        device: where the parameters are made.
        dtype: of the parameters; torch's default dtype if None.

    Attributes:
        norm: `BatchLastNorm` or `nn.Identity`.
        lmkan: `LMKANLinear`, `ReLUFirst` or `ReLULast`.

    Raises:
        ValueError: ``precondition`` is none of these, or a size is out of range.
    """

    is_leaf: ClassVar[bool] = False

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        num_grids: int = 8,
        *,
        precondition: Precondition | None = None,
        normalize: bool = True,
        batch_first: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_dim, batch_first)
        kinds = {None: LMKANLinear, "relu_first": ReLUFirst, "relu_last": ReLULast}
        if precondition not in kinds:
            raise ValueError(f"precondition must be None, 'relu_first' or 'relu_last', got {precondition!r}")
        self.output_dim = output_dim
        self.norm = BatchLastNorm(input_dim, device=device, dtype=dtype) if normalize else nn.Identity()
        self.lmkan = kinds[precondition](
            input_dim, output_dim, num_grids, batch_first=False, device=device, dtype=dtype
        )

    def batch_last(self, x: Tensor) -> Tensor:
        """``[input_dim, batch]`` -> ``[output_dim, batch]``."""
        y: Tensor = self.lmkan(self.norm(x))
        return y


class LMKANMLP(BatchLastModule):
    """A ready-made network: `LMKANBlock` after `LMKANBlock`, batch norm before all but the first.

    Args:
        widths: numbers of inputs, of hidden units per layer, and of outputs: ``(32, 64, 64, 1)``.
        num_grids: cells per axis, at least 3; start with 8 to 10.
        precondition: None, ``"relu_first"`` or ``"relu_last"``.
        normalize_input: batch norm before the first layer too. Leave it off if inputs are standardised.
        batch_first: take ``[*, inputs]`` instead of ``[inputs, batch]``. Inside, the batch is always last:
            the first layer reads samples as they lie, and nothing is transposed.
        device: where the parameters are made.
        dtype: of the parameters; torch's default dtype if None.

    Attributes:
        blocks: `nn.Sequential` of batch-last `LMKANBlock`.

    Raises:
        ValueError: fewer than two widths, or a size is out of range.
    """

    is_leaf: ClassVar[bool] = False

    def __init__(
        self,
        widths: tuple[int, ...] | list[int],
        num_grids: int = 8,
        *,
        precondition: Precondition | None = None,
        normalize_input: bool = False,
        batch_first: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if len(widths) < 2:
            raise ValueError(f"widths must hold at least inputs and outputs, got {list(widths)}")
        super().__init__(widths[0], batch_first)
        self.blocks = nn.Sequential(
            *(
                LMKANBlock(
                    inputs,
                    outputs,
                    num_grids,
                    precondition=precondition,
                    normalize=i > 0 or normalize_input,
                    batch_first=False,
                    device=device,
                    dtype=dtype,
                )
                for i, (inputs, outputs) in enumerate(pairwise(widths))
            )
        )

    def batch_last(self, x: Tensor) -> Tensor:
        """``[inputs, batch]`` -> ``[outputs, batch]``."""
        y: Tensor = self.blocks(x)
        return y


def lmkan_layers(model: nn.Module) -> dict[str, LMKAN2DLayer]:
    """Every `LMKAN2DLayer` of a model by its qualified name, in order of definition."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LMKAN2DLayer)}


def preconditioned_layers(model: nn.Module) -> dict[str, ReLUFirst | ReLULast]:
    """Every preconditioned layer of a model by its qualified name, in order of definition."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (ReLUFirst, ReLULast))}


def hessian_penalty(model: nn.Module) -> Tensor:
    """`LMKAN2DLayer.get_hessian_regularization`, summed over a model's layers: a scalar.

    Raises:
        ValueError: the model has no lmKAN layer.
    """
    terms = [layer.get_hessian_regularization() for layer in lmkan_layers(model).values()]
    if not terms:
        raise ValueError(f"{type(model).__name__} holds no LMKAN2DLayer, so there is nothing to regularise")
    return torch.stack(terms).sum()
