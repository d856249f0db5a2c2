"""Networks into equal networks: linear layers to lmKAN, finer grids, fewer operations at inference.

All three functions leave the model that they are given alone and return another, whose outputs agree
with the original's up to rounding.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lmkan_gen.layer import LMKAN2DLayer
from lmkan_gen.nn.layers import (
    LMKANMLP,
    BatchLastNorm,
    LMKANBlock,
    LMKANLinear,
    ReLUFirst,
    ReLULast,
    lmkan_layers,
    preconditioned_layers,
)
from lmkan_gen.tables import affine_table, refined_table, scaled_table

#: linear on either side of zero, where even grids have a knot
_ABSORBED = (nn.ReLU, nn.LeakyReLU)


def linear_to_lmkan(
    linear: nn.Linear, num_grids: int = 8, activation: nn.Module | None = None
) -> LMKANLinear:
    """A layer that computes what ``linear`` does, or ``linear(activation(x))``, and can learn more.

    Args:
        linear: any width, float32 or float64.
        num_grids: cells per axis, at least 3.
        activation: `nn.ReLU` or `nn.LeakyReLU`; needs an even ``num_grids``.

    Returns:
        A batch-first `LMKANLinear` on the device and of the dtype of ``linear``.

    Raises:
        TypeError: ``linear`` has another dtype, or ``activation`` is of another kind.
        ValueError: ``num_grids`` is below 3, or odd although there is an activation.
    """
    if linear.weight.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"linear has dtype {linear.weight.dtype}; tables are float32 or float64: convert model.float()"
        )
    if activation is not None:
        if type(activation) not in _ABSORBED:
            raise TypeError(f"activation must be nn.ReLU or nn.LeakyReLU, got {type(activation).__name__}")
        if num_grids % 2:
            raise ValueError(
                f"num_grids must be even for {type(activation).__name__}, whose kink at 0 has to be a knot: "
                f"got {num_grids}, take {num_grids + 1}"
            )
    layer = LMKANLinear(linear.in_features, linear.out_features, num_grids)
    layer.to(linear.weight.device, linear.weight.dtype)
    _write(layer.layer, affine_table(linear.weight, linear.bias, num_grids, activation))
    layer.requires_grad_(linear.weight.requires_grad)
    return layer.train(linear.training)


def convert(model: nn.Module, num_grids: int = 8, *, skip: Collection[str] = ()) -> nn.Module:
    """Put an lmKAN layer in the place of every `nn.Linear`: the same outputs, more to learn.

    In `nn.Sequential`, nested or not, a ReLU or LeakyReLU right before a linear layer becomes part of it;
    `nn.Identity` takes its place. Other activations, and those that a ``forward`` of its own applies,
    stay where they are. Sequentials are taken to be called as a whole.

    Modules that use the ``weight`` of a linear layer of theirs themselves (`nn.TransformerEncoderLayer`
    does) find none afterwards; name such layers in ``skip``. Subclasses of `nn.Linear` are left alone.

    Args:
        model: any module; a lone `nn.Linear` too.
        num_grids: cells per axis of the new layers; even, if there are activations to absorb.
        skip: qualified names of linear layers to leave alone.

    Returns:
        A converted copy; its new layers are `lmkan_gen.nn.LMKANLinear` and take ``[*, inputs]``.

    Raises:
        TypeError: a linear layer is neither float32 nor float64.
        ValueError: no linear layer was found, a name in ``skip`` is not one's, or ``num_grids`` is below
            3, or odd although there is an activation to absorb.
    """
    names = {name for name, m in model.named_modules(remove_duplicate=False) if type(m) is nn.Linear}
    if unknown := sorted(set(skip) - names):
        raise ValueError(f"skip names {unknown[0]!r}, which is not a linear layer; there are {sorted(names)}")
    if not names - set(skip):
        raise ValueError(f"{type(model).__name__} has no linear layer to convert")
    root = nn.Sequential(copy.deepcopy(model))  # so that the model itself stands in a slot
    left_alone = {id(root[0].get_submodule(name)) for name in skip}
    converted: dict[tuple[int, int], LMKANLinear] = {}  # shared layers stay shared
    chains = list(_chains(root))
    used = Counter(slot for chain in chains for slot in chain)
    for chain in chains:
        for before, slot in pairwise((None, *chain)):
            assert slot is not None
            module, activation = slot.module, None
            if type(module) is not nn.Linear or id(module) in left_alone:
                continue
            # a slot that is called in several places may have something else before or after it there
            if before and type(before.module) in _ABSORBED and used[before] == used[slot] == 1:
                activation = before.module
                before.put(nn.Identity().train(activation.training))
            key = (id(module), id(activation))
            if key not in converted:
                converted[key] = linear_to_lmkan(module, num_grids, activation)
            slot.put(converted[key])
    return root[0]


def refine(model: nn.Module, factor: int = 2) -> nn.Module:
    """Every lmKAN layer on a grid of ``factor`` times as many cells, computing the same.

    Train on a coarse grid, refine, train on. An optimiser has to be made anew.

    Args:
        model: any module with lmKAN layers, or such a layer.
        factor: 1 or more.

    Returns:
        A refined copy.

    Raises:
        ValueError: ``factor`` is below 1, or the model has no lmKAN layer, or a frozen one.
    """
    layers = lmkan_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no LMKAN2DLayer to refine")
    _refuse_frozen(model, "refined")
    # deepcopy takes these for copies made already
    return copy.deepcopy(model, {id(layer): _refined(layer, factor) for layer in layers.values()})


def fold(model: nn.Module) -> nn.Module:
    """Fewer operations for inference, the same outputs in evaluation mode.

    - `ReLUFirst` becomes a plain lmKAN layer: ``W relu(x)`` goes into the table.
    - Batch norm right after an lmKAN layer goes into that layer's table, in `LMKANMLP`, `LMKANBlock` and
      `nn.Sequential`. One with no such layer before it stays: a table cannot scale its inputs exactly.

    Batch norm after batch-first layers is taken to act on inputs ``[batch, features]``.

    Args:
        model: any module.

    Returns:
        A folded copy in evaluation mode. Training it further makes no sense where batch norm is gone.

    Raises:
        ValueError: a layer is frozen, or a `ReLUFirst` has an odd grid, which has no knot at 0; `refine` by
            2 makes it even.
    """
    _refuse_frozen(model, "folded")
    root = nn.Sequential(copy.deepcopy(model)).eval()
    first = {name: m for name, m in preconditioned_layers(root).items() if isinstance(m, ReLUFirst)}
    root = copy.deepcopy(root, {id(layer): _merged(layer) for layer in first.values()})
    chains = list(_chains(root))
    used = Counter(slot for chain in chains for slot in chain)
    shared = Counter(id(slot.module) for chain in chains for slot in chain)
    for chain in chains:
        before: _Slot | None = None
        for slot in chain:
            if isinstance(slot.module, (nn.Identity, nn.Dropout)):
                continue  # nothing happens here in evaluation mode
            # what is called in several places may have something else before or after it there
            alone = before is not None and shared[id(before.module)] == used[slot] == 1
            if before and alone and _absorb_norm(before.module, slot.module):
                slot.put(nn.Identity().eval())
            else:
                before = slot
    return root[0]


def _refuse_frozen(model: nn.Module, what: str) -> None:
    for name, layer in lmkan_layers(model).items():
        if layer.frozen is not None:
            raise ValueError(f"layer {name!r} is frozen and cannot be {what}; call unfreeze() first")


class _Slot(NamedTuple):
    """A place in the tree of modules."""

    parent: nn.Module
    name: str

    @property
    def module(self) -> nn.Module:
        module: nn.Module = getattr(self.parent, self.name)
        return module

    def put(self, module: nn.Module) -> None:
        setattr(self.parent, self.name, module)


def _chains(module: nn.Module) -> Iterator[list[_Slot]]:
    """Lists of modules that are called one after the other, each taking the output of the last.

    A slot of which no order is known is alone in its list. One that is called several times is listed as
    often.
    """
    if _is_ordered(module):
        chain = list(_leaves(module))
        yield chain
        inner = [slot.module for slot in chain]
    else:
        children = {name: child for name, child in module._modules.items() if child is not None}
        yield from ([_Slot(module, name)] for name, child in children.items() if not _is_ordered(child))
        inner = list(children.values())
    for child in inner:
        yield from _chains(child)


def _is_ordered(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward or type(module) in (LMKANBlock, LMKANMLP)


def _leaves(module: nn.Module) -> Iterator[_Slot]:
    """The chain of an ordered module, nested ones unrolled. Sequential, block and MLP hold it in order."""
    for name, child in module._modules.items():
        if child is not None:
            if _is_ordered(child):
                yield from _leaves(child)
            else:
                yield _Slot(module, name)


def _merged(layer: ReLUFirst) -> LMKANLinear:
    """The plain layer that computes ``gamma * lmkan(x) + W relu(x)``."""
    grids = layer.layer.num_grids
    if grids % 2:
        raise ValueError(
            f"a ReLUFirst of {grids} cells per axis cannot be folded, ReLU bends at 0 and only even grids "
            "have a knot there; fold(refine(model, 2)) works"
        )
    plain = LMKANLinear(layer.input_dim, layer.output_dim, grids, batch_first=layer.batch_first)
    plain.layer = copy.deepcopy(layer.layer)  # with its tile and block sizes
    gamma = layer.gamma.double()
    linear = affine_table(layer.weight.double(), None, grids, torch.relu)
    table = gamma * layer.layer.func_parameter.detach().double() + linear
    _write(plain.layer, table)
    return plain.train(layer.training)


def _absorb_norm(layer: nn.Module, norm: nn.Module) -> bool:
    """Apply ``norm`` to the outputs of ``layer`` by changing its table, if that can be done exactly."""
    if not isinstance(layer, (LMKAN2DLayer, LMKANLinear)):
        return False
    if isinstance(norm, BatchLastNorm) and not layer.batch_first:
        norm = norm.norm
    elif not (type(norm) is nn.BatchNorm1d and layer.batch_first):
        return False
    assert isinstance(norm, nn.BatchNorm1d)
    if norm.running_mean is None or norm.running_var is None:
        return False  # statistics of the batch, in evaluation too
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    if isinstance(layer, ReLULast):
        if bool((scale < 0).any()):
            return False  # scale * relu(z) is relu(scale * z) for positive scales only
        with torch.no_grad():
            layer.weight.copy_(scale.unsqueeze(1) * layer.weight.double())
            inner = scale * layer.gamma.double()
            layer.gamma.fill_(1)
        _write(layer.layer, scaled_table(layer.layer.func_parameter.double(), inner, shift))
        return True
    table_of = layer.layer if isinstance(layer, LMKANLinear) else layer
    _write(table_of, scaled_table(table_of.func_parameter.double(), scale, shift))
    return True


def _refined(layer: LMKAN2DLayer, factor: int) -> LMKAN2DLayer:
    table = refined_table(layer.func_parameter, factor)
    finer = LMKAN2DLayer(
        layer.num_grids * factor,
        layer.input_dim,
        layer.output_dim,
        layer.block_size_forward,
        layer.block_size_backward,
        layer.tile_size_forward,
        layer.tile_size_backward,
        layer.init_scale,
        layer.backward_fast_mode,
        batch_first=layer.batch_first,
    ).to(table.device, table.dtype)
    _write(finer, table)
    finer.requires_grad_(layer.func_parameter.requires_grad)
    return finer.train(layer.training)


@torch.no_grad()
def _write(layer: LMKAN2DLayer, table: Tensor) -> None:
    layer.func_parameter.copy_(table)
