"""Networks into equal networks: linear layers to lmKAN, finer grids, fewer operations at inference.

All three functions leave the model that they are given alone and return another, whose outputs agree
with the original's up to rounding.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Collection
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from lmkan_gen.chains import Slot, chains, interceptions
from lmkan_gen.code_reading import Uses, uses
from lmkan_gen.convertible import affine, describe, full_name, linear_layers, obstacles, shortened
from lmkan_gen.layer import LMKAN2DLayer
from lmkan_gen.nn.layers import (
    BatchLastNorm,
    LMKANLinear,
    ReLUFirst,
    ReLULast,
    lmkan_layers,
    preconditioned_layers,
)
from lmkan_gen.tables import affine_table, refined_table, scaled_table

#: linear on either side of zero, where even grids have a knot
_ABSORBED = (nn.ReLU, nn.LeakyReLU)

_NEW_OUTPUTS = (nn.Linear, LMKANLinear, nn.BatchNorm1d, nn.LayerNorm)


def linear_to_lmkan(
    linear: nn.Module, num_grids: int = 8, activation: nn.Module | None = None
) -> LMKANLinear:
    """A layer that computes what ``linear`` does, or ``linear(activation(x))``, and can learn more.

    Args:
        linear: an `nn.Linear`, or a layer of another class that `convert` knows; float32 or float64.
        num_grids: cells per axis, at least 3.
        activation: `nn.ReLU` or `nn.LeakyReLU`; needs an even ``num_grids``.

    Returns:
        A batch-first `LMKANLinear` on the device and of the dtype of ``linear``.

    Raises:
        TypeError: ``linear`` is of a class that is not known or has another dtype, or ``activation`` is of
            another kind.
        ValueError: ``num_grids`` is below 3, or odd although there is an activation.
    """
    found = affine(linear)
    if found is None:
        raise TypeError(f"linear must be an nn.Linear, got {full_name(type(linear))}")
    weight, bias = found
    if weight.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"linear has dtype {weight.dtype}; tables are float32 or float64: convert model.float()"
        )
    if activation is not None:
        if type(activation) not in _ABSORBED:
            raise TypeError(f"activation must be nn.ReLU or nn.LeakyReLU, got {type(activation).__name__}")
        if num_grids % 2:
            raise ValueError(
                f"num_grids must be even for {type(activation).__name__}, whose kink at 0 has to be a knot: "
                f"got {num_grids}, take {num_grids + 1}"
            )
    layer = LMKANLinear(weight.shape[1], weight.shape[0], num_grids, device=weight.device, dtype=weight.dtype)
    _write(layer.layer, affine_table(weight, bias, num_grids, activation))
    layer.requires_grad_(weight.requires_grad)
    return layer.train(linear.training)


def convert(
    model: nn.Module,
    num_grids: int = 8,
    *,
    only: Collection[str] | None = None,
    skip: Collection[str] = (),
) -> nn.Module:
    """Put lmKAN layers in the places of linear layers: the same outputs, more to learn.

    Linear layers are `nn.Linear`, subclasses that inherit its ``forward``, ``torch_geometric.nn.Linear``,
    ``Conv1D`` of transformers and schnetpack's ``Dense`` without activation.

    In `nn.Sequential`, nested or not, a ReLU or LeakyReLU right before a linear layer becomes part of it;
    `nn.Identity` takes its place. Other activations, those that a ``forward`` of its own applies, those with
    hooks, and those in a Sequential that the model's code indexes or iterates over stay where they are.

    A layer that cannot be converted without changing what the model does is left alone. One warning names all
    of these with reasons and remedies. They are layers with hooks; with parameters that others hold too; with
    a weight that is computed at every call; without a weight yet; of an unknown class; and layers whose
    ``weight``, or another attribute that the new layer lacks, is read by the source code of the model.

    Args:
        model: any module; a lone `nn.Linear` too.
        num_grids: cells per axis of the new layers; even, if there are activations to absorb.
        only: qualified names of the linear layers to convert, or patterns for them such as ``"*.mlp.*"``; all
            by default.
        skip: names or patterns of linear layers to leave alone, without a warning.

    Returns:
        A converted copy; its new layers are `lmkan_gen.nn.LMKANLinear` and take ``[*, inputs]``.

    Raises:
        TypeError: a linear layer is neither float32 nor float64, or ``only`` or ``skip`` is a string.
        ValueError: no linear layer was found; a name or pattern matches none; one that ``only`` names in full
            cannot be converted; ``num_grids`` is below 3, or odd although there is an activation to absorb.

    Warns:
        UserWarning: layers were left alone that ``skip`` does not name.
    """
    layers = linear_layers(model)
    chosen = _chosen(layers, only, skip)
    if not chosen:
        raise ValueError(f"{type(model).__name__} has no linear layer to convert")
    used = uses(model)
    found = obstacles(model, [layers[name] for name in chosen], used)
    left = {name: found[id(layers[name])] for name in chosen if id(layers[name]) in found}
    if refused := {name: left[name] for name in only or () if name in left}:
        raise ValueError(f"only names layers that cannot be converted:\n{describe(refused)}")
    for name in chosen:
        dtype = layers[name].weight.dtype if name not in left else torch.float32
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"linear layer {name!r} has dtype {dtype}; tables are float32 or float64: convert "
                f"model.float(), or leave it alone with skip=[{name!r}]"
            )
    if left:
        distinct = {id(layers[name]): name for name in reversed(left)}
        warnings.warn(
            f"convert left {len(distinct)} of {len({id(layers[name]) for name in chosen})} linear layers of "
            f"{type(model).__name__} as they are, because outputs or training would change:\n"
            + describe({name: left[name] for name in reversed(distinct.values())})
            + "\nName them in skip= to leave them alone without this warning.",
            stacklevel=2,
        )
    root = nn.Sequential(_copied(model))  # so that the model itself stands in a slot
    opened = _opened(root[0], model, used)
    names = {root[0].get_submodule(name): name for name in reversed(chosen) if name not in left}
    _put_lmkans(root, num_grids, names, opened)
    return root[0]


def _chosen(layers: dict[str, nn.Module], only: Collection[str] | None, skip: Collection[str]) -> list[str]:
    """All names of the layers to convert."""
    wanted = {id(m) for m in layers.values()} if only is None else _matching(layers, "only", only)
    wanted -= _matching(layers, "skip", skip)
    return [name for name, module in layers.items() if id(module) in wanted]


def _matching(layers: dict[str, nn.Module], argument: str, patterns: Collection[str]) -> set[int]:
    """Ids of the layers of which one name matches."""
    if isinstance(patterns, str):
        raise TypeError(
            f"{argument} must be a list of names or patterns, got {patterns!r}; take [{patterns!r}]"
        )
    found: set[int] = set()
    for pattern in patterns:
        matches = {id(m) for name, m in layers.items() if name == pattern or fnmatchcase(name, pattern)}
        if not matches:
            raise ValueError(
                f"{argument} names {pattern!r}, which is not a linear layer; there are "
                f"[{', '.join(shortened(layers))}]"
            )
        found |= matches
    return found


def _copied(model: nn.Module) -> nn.Module:
    """A deep copy, also of layers whose hooks recompute a weight, which torch refuses to copy."""
    memo: dict[int, object] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            recomputed = not module._parameters.keys().isdisjoint((f"{name}_g", f"{name}_orig"))
            if isinstance(value, Tensor) and recomputed:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def _opened(copied: nn.Module, model: nn.Module, used: Uses) -> set[int]:
    """Ids of the copies of modules whose members the model's code looks at."""
    names = [name for name, module in model.named_modules() if id(module) in used.opened]
    return {id(copied.get_submodule(name)) for name in names}


def _put_lmkans(
    root: nn.Module, num_grids: int, names: dict[nn.Module, str], opened: Collection[int]
) -> None:
    """Replace the linear layers that have names."""
    converted: dict[nn.Module, LMKANLinear] = {}  # shared layers stay shared
    listed = list(chains(root, opened))
    used = Counter(slot for chain in listed for slot in chain)
    places = Counter(slot.module for slot in used)
    for chain in listed:
        for i, slot in enumerate(chain):
            linear, activation = slot.module, None
            if linear not in names:
                continue
            # what is called in several places may have something else before or after it there
            if _absorbs(chain[:i]) and used[chain[i - 1]] == used[slot] == places[linear] == 1:
                activation = chain[i - 1].module
                chain[i - 1].put(nn.Identity().train(activation.training))
            if linear not in converted:
                converted[linear] = linear_to_lmkan(linear, num_grids, activation)
                converted[linear].replaced = names[linear]
            slot.put(converted[linear])


def _absorbs(before: list[Slot]) -> bool:
    """Whether the last of the slots, if any, computes the next layer's inputs, does no more, and can go."""
    activation = before[-1].module if before else None
    if activation is None or type(activation) not in _ABSORBED or interceptions(activation):
        return False
    # one that works in place changes what others hold, unless it stands behind a layer with new outputs
    return not activation.inplace or (len(before) > 1 and isinstance(before[-2].module, _NEW_OUTPUTS))


def refine(model: nn.Module, factor: int = 2) -> nn.Module:
    """Every lmKAN layer on a grid of ``factor`` times as many cells, computing the same.

    Train on a coarse grid, refine, train on. An optimiser has to be made anew.

    Args:
        model: any module with lmKAN layers, or such a layer.
        factor: 1 or more.

    Returns:
        A refined copy.

    Raises:
        ValueError: ``factor`` is below 1, or the model has no lmKAN layer, a frozen one, one with hooks, or
            two that share a table.
    """
    layers = lmkan_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no LMKAN2DLayer to refine")
    _refuse_frozen(model, "refined")
    first: dict[Tensor, str] = {}
    for name, layer in layers.items():
        if kinds := interceptions(layer):
            raise ValueError(
                f"layer {name!r} has {' and '.join(kinds)}, which the finer one would not have: remove them, "
                "refine, and put them on the copy's layer"
            )
        other = first.setdefault(layer.func_parameter, name)
        if other != name:
            raise ValueError(
                f"layers {other!r} and {name!r} share a table and would not afterwards: give one a table of "
                "its own, or put the same layer in both places"
            )
    # deepcopy takes these for copies made already
    return copy.deepcopy(model, {id(layer): _refined(layer, factor) for layer in layers.values()})


def fold(model: nn.Module) -> nn.Module:
    """Fewer operations for inference, the same outputs in evaluation mode.

    - `ReLUFirst` becomes a plain lmKAN layer: ``W relu(x)`` goes into the table.
    - Batch norm right after an lmKAN layer goes into that layer's table, in `LMKANMLP`, `LMKANBlock` and
      `nn.Sequential`. One with no such layer before it stays: a table cannot scale its inputs exactly.

    What has hooks, or stands in an `nn.Sequential` that the model's code takes apart, stays as it is.

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
    copied = copy.deepcopy(model).eval()
    first = [m for m in preconditioned_layers(copied).values() if isinstance(m, ReLUFirst)]
    merged = {id(layer): _merged(layer) for layer in first if not interceptions(layer)}
    root = nn.Sequential(copy.deepcopy(copied, merged))
    listed = list(chains(root, _opened(root[0], model, uses(model))))
    used = Counter(slot for chain in listed for slot in chain)
    shared = Counter(slot.module for chain in listed for slot in chain)
    for chain in listed:
        before: Slot | None = None
        for slot in chain:
            if type(slot.module) in (nn.Identity, nn.Dropout) and not interceptions(slot.module):
                continue  # nothing happens here in evaluation mode
            # what is called in several places may have something else before or after it there
            alone = before is not None and shared[before.module] == used[slot] == 1
            if before and alone and _absorb_norm(before.module, slot.module):
                slot.put(nn.Identity().eval())
            else:
                before = slot
    return root[0]


def _refuse_frozen(model: nn.Module, what: str) -> None:
    for name, layer in lmkan_layers(model).items():
        if layer.frozen is not None:
            raise ValueError(f"layer {name!r} is frozen and cannot be {what}; call unfreeze() first")


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
    if any(interceptions(module) for module in (layer, *layer.children(), norm, *norm.children())):
        return False  # hooks see, or change, what would be different or gone
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
        device=table.device,
        dtype=table.dtype,
    )
    _write(finer, table)
    finer.requires_grad_(layer.func_parameter.requires_grad)
    return finer.train(layer.training)


@torch.no_grad()
def _write(layer: LMKAN2DLayer, table: Tensor) -> None:
    layer.func_parameter.copy_(table)
