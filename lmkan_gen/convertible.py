"""Which linear layers of a model an lmKAN layer can stand for, and what is in the way of the others."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lmkan_gen.chains import interceptions
from lmkan_gen.code_reading import Uses
from lmkan_gen.nn.layers import LMKANLinear


class Affine(NamedTuple):
    """``y = weight @ x + bias`` along the last axis."""

    weight: Tensor
    bias: Tensor | None


class Obstacle(NamedTuple):
    """Why a linear layer cannot be converted, and what a user can do."""

    reason: str
    remedy: str


def _as_linear(module: nn.Module) -> Affine:
    return Affine(module.get_parameter("weight"), module._parameters["bias"])


def _as_dense(module: nn.Module) -> Affine | None:
    return _as_linear(module) if type(module.activation) is nn.Identity else None


def _as_conv1d(module: nn.Module) -> Affine:
    return Affine(module.get_parameter("weight").T, module._parameters["bias"])


#: attributes in which torch itself keeps parameters, members, hooks and the mode
_OF_TORCH = frozenset(vars(nn.Module()))

#: what other code finds in the new layer too
_OFFERED = _OF_TORCH | frozenset(dir(LMKANLinear))

#: parameters of layers with old-style weight norm, spectral norm or pruning
_RECOMPUTED = {"weight_g", "weight_orig"}

#: Classes other than `nn.Linear` by their full names, so that nothing has to be imported; exact classes only.
_KNOWN: dict[str, Callable[[nn.Module], Affine | None]] = {
    "torch_geometric.nn.dense.linear.Linear": _as_linear,
    "transformers.pytorch_utils.Conv1D": _as_conv1d,
    "schnetpack.nn.base.Dense": _as_dense,
}


def full_name(kind: type) -> str:
    """``package.module.Class``."""
    return f"{kind.__module__}.{kind.__qualname__}"


def affine(module: nn.Module) -> Affine | None:
    """The weight ``[O, I]`` and bias ``[O]`` of a layer that computes nothing else, None of any other layer.

    The class decides, as long as nothing was added to the object. Hooks are for `obstacles` to find.
    """
    kind = full_name(type(module))
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    if not (plain or kind in _KNOWN) or _additions(module):
        return None
    return _KNOWN.get(kind, _as_linear)(module)


def _additions(module: nn.Module) -> list[str]:
    """What a layer holds beside its weight and its bias, or lacks, and what may do something."""
    missing = [f"no parameter {name!r}" for name in ("weight", "bias") if name not in module._parameters]
    tensors = (module._parameters.keys() - {"weight", "bias"}) | module._buffers.keys()
    children = [name for name, child in module._modules.items() if type(child) is not nn.Identity]
    return [*missing, *sorted(tensors), *children]


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer that is linear, or that a reader of the model would call so, under each of its names."""
    return {name: m for name, m in model.named_modules(remove_duplicate=False) if _looks_linear(m)}


def _looks_linear(module: nn.Module) -> bool:
    kinds = type(module).__mro__
    if isinstance(module, nn.Linear) or full_name(type(module)) in _KNOWN:
        return True
    if isinstance(module, LMKANLinear) or not any(kind.__name__.endswith("Linear") for kind in kinds):
        return False
    # a layer itself, quantised perhaps, not a block with linear layers in it
    weights = any("weight" in name for name in (*module._parameters, *module._buffers))
    weights = weights or callable(getattr(module, "weight", None))
    return weights and not any(_looks_linear(child) for child in module.children())


def obstacles(model: nn.Module, linears: Iterable[nn.Module], used: Uses) -> dict[int, Obstacle]:
    """What stands in the way of converting layers exactly, by their ``id``; the others can be converted.

    Args:
        model: what the layers are part of.
        linears: some of its `linear_layers`.
        used: what the model's code does with them.
    """
    holders = _holders(model)
    return {id(m): found for m in linears if (found := _obstacle(m, holders, used.reads.get(id(m), {})))}


def _obstacle(
    linear: nn.Module, holders: Mapping[int, list[tuple[int, str]]], reads: Mapping[str, str]
) -> Obstacle | None:
    weight = linear._parameters.get("weight")
    if isinstance(weight, UninitializedParameter):
        return Obstacle("no weight yet", "run a batch through the model first")
    if "parametrizations" in linear._modules or not linear._parameters.keys().isdisjoint(_RECOMPUTED):
        return Obstacle(
            "weight computed anew at every call (a parametrization, weight or spectral norm, pruning)",
            "make it a plain parameter with torch.nn.utils.parametrize.remove_parametrizations, "
            "torch.nn.utils.remove_weight_norm or the like, and convert then",
        )
    if affine(linear) is None:
        return _obstacle_of_class(linear)
    if type(weight) is not nn.Parameter:
        return Obstacle(f"weight of type {type(weight).__name__}", "convert before weights are changed")
    if kinds := interceptions(linear):
        return Obstacle(" and ".join(kinds), "remove them, convert, and put them on the new layer")
    parameters = [p for p in linear._parameters.values() if p is not None]
    if any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in parameters):
        return Obstacle("hooks on parameters", "put them on the copy, which does not have them")
    for held in (linear, *parameters):
        for owner, name in holders[id(held)]:
            if owner != id(linear):
                remedy = "give it parameters of its own first, if they need not stay the same"
                return Obstacle(f"tied to {name!r}", remedy)
    for name, where in reads.items():
        if (name not in _OFFERED or name == "__class__") and hasattr(linear, name):
            what = "type" if name == "__class__" else name
            return Obstacle(f"{what} read by {where}", _remedy_for(where))
    return None


def _obstacle_of_class(linear: nn.Module) -> Obstacle:
    kind = full_name(type(linear))
    plain = type(linear).forward is nn.Linear.forward or kind in _KNOWN
    if plain and (additions := _additions(linear)):
        return Obstacle(
            f"more, or less, in it than weight and bias: {', '.join(additions)}",
            "put a plain nn.Linear in its place",
        )
    return Obstacle(
        f"class {kind}, which may compute more than a linear layer",
        "put an nn.Linear in its place, and what else it does behind it",
    )


def _remedy_for(where: str) -> str:
    if where.startswith(("TransformerEncoderLayer.", "TransformerEncoder.")):
        return (
            "call torch.backends.mha.set_fastpath_enabled(False) before convert, and leave it so: torch then "
            "computes the same without reading weights"
        )
    return "leave it so, or have that code only call the layer"


def _holders(model: nn.Module) -> dict[int, list[tuple[int, str]]]:
    """By the ``id`` of a tensor or module: ids and names of what holds it, slots of the tree left out."""
    holders: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for path, module in model.named_modules():
        for name, held in _held(module):
            holders[id(held)].append((id(module), f"{path}.{name}".lstrip(".")))
    return holders


def _held(module: nn.Module) -> Iterator[tuple[str, object]]:
    yield from module._parameters.items()
    yield from module._buffers.items()
    for name, value in vars(module).items():
        if name not in _OF_TORCH:
            yield from ((name, item) for item in _items(value, depth=3))


def _items(value: object, depth: int) -> Iterator[object]:
    """Tensors and modules in plain containers."""
    if isinstance(value, (Tensor, nn.Module)):
        yield value
    elif depth and isinstance(value, (list, tuple, set, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _items(item, depth - 1)


def describe(found: Mapping[str, Obstacle]) -> str:
    """A line for each reason, with the names of the layers that it is about."""
    groups: dict[Obstacle, list[str]] = defaultdict(list)
    for name, obstacle in found.items():
        groups[Obstacle(re.sub(r"(?<=\.)\d+(?=\.)", "*", obstacle.reason), obstacle.remedy)].append(name)
    return "\n".join(
        f"- {', '.join(shortened(names))}: {obstacle.reason}; {obstacle.remedy}"
        for obstacle, names in groups.items()
    )


def shortened(names: Iterable[str], most: int = 8) -> list[str]:
    """Qualified names to read; those of more than three repeated blocks as one with ``*`` for numbers."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[re.sub(r"(?<![^.])\d+(?=\.)", "*", name)].append(name)
    short: list[str] = []
    for pattern, members in groups.items():
        short += [f"{pattern!r} ({len(members)} layers)"] if len(members) > 3 else map(repr, members)
    return short if len(short) <= most else [*short[:most], f"and {len(short) - most} more"]
