"""Modules in the order in which they are called, as far as the tree of modules shows it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

from torch import nn

from lmkan_gen.nn.layers import LMKANMLP, LMKANBlock

_HOOKS = {
    "_forward_hooks": "forward hooks",
    "_forward_pre_hooks": "forward pre-hooks",
    "_backward_hooks": "backward hooks",
    "_backward_pre_hooks": "backward pre-hooks",
    "_state_dict_hooks": "state dict hooks",
    "_state_dict_pre_hooks": "state dict pre-hooks",
    "_load_state_dict_pre_hooks": "load state dict pre-hooks",
    "_load_state_dict_post_hooks": "load state dict post-hooks",
}


def interceptions(module: nn.Module) -> list[str]:
    """What happens at a call, at saving or loading beside what the class says: hooks, a patched forward."""
    kinds = [kind for attribute, kind in _HOOKS.items() if getattr(module, attribute)]
    return kinds + ["a patched forward"] * ("forward" in vars(module))


class Slot(NamedTuple):
    """A place in the tree of modules."""

    parent: nn.Module
    name: str

    @property
    def module(self) -> nn.Module:
        """What stands there now."""
        module: nn.Module = getattr(self.parent, self.name)
        return module

    def put(self, module: nn.Module) -> None:
        """Let ``module`` stand there."""
        setattr(self.parent, self.name, module)


def chains(module: nn.Module, opened: Collection[int] = ()) -> Iterator[list[Slot]]:
    """Lists of modules that are called one after the other, each taking the output of the last.

    A slot of which no order is known is alone in its list. One that is called several times is listed as
    often.

    Args:
        module: the root, itself in no slot.
        opened: ids of modules whose members are not, or not only, called by the module itself.
    """
    if is_ordered(module) and id(module) not in opened:
        chain = list(_leaves(module, opened))
        yield chain
        inner = [slot.module for slot in chain]
    else:
        slots = [Slot(module, name) for name, child in module._modules.items() if child is not None]
        yield from ([slot] for slot in slots)
        inner = [slot.module for slot in slots]
    for child in inner:
        yield from chains(child, opened)


def is_ordered(module: nn.Module) -> bool:
    """Whether the module calls its members in order, and does nothing else."""
    ordered = type(module).forward is nn.Sequential.forward or type(module) in (LMKANBlock, LMKANMLP)
    return ordered and "forward" not in vars(module)


def _leaves(module: nn.Module, opened: Collection[int]) -> Iterator[Slot]:
    """The chain of an ordered module. Nested ones are unrolled, unless something happens at their borders."""
    for name, child in module._modules.items():
        if child is not None:
            if is_ordered(child) and id(child) not in opened and not interceptions(child):
                yield from _leaves(child, opened)
            else:
                yield Slot(module, name)
