"""How operators of this package meet autograd, forward mode and ``vmap``.

Derivatives stand below the dispatcher's Autograd key, as those of torch's own operators do, so that every
transform of `torch.func` applies to them, nested too. Registering by hand costs a third of the overhead
per call of ``torch.library.custom_op``, which is what a small layer's time consists of.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from lmkan_gen.launch import native

#: dimension that is mapped over, for each argument; None: the same for all
Dims = tuple[int | None, ...]

#: operators in terms of torch's own. They are not in torch's table of all decompositions, because others read
#: that too: inductor raises an error for what it finds there if the variable CI is set, DTensor looks inside.
DECOMPOSITIONS: dict[torch._ops.OpOverload, Callable[..., Any]] = {}


class Differentiable(_SingleLevelFunction):
    """Base of the autograd functions of operators: one that nests in transforms of `torch.func`."""


def is_differentiated(arguments: Sequence[Any]) -> bool:
    """Whether anything asks for derivatives of a call: a gradient later, or a tangent along with it."""
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return True
    # a level is entered by dual_level and by torch.func
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


def runs_eagerly(x: Tensor, table: Tensor, borders: Tensor) -> bool:
    """Whether nothing but autograd wants to see an operator that is called on these now.

    Neither a compiler nor a transform, forward mode, autocast, nor a mode or subclass of tensors; then the
    way through the dispatcher and its Python kernels can be left out.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and type(table) in _ORDINARY
        and type(borders) is Tensor
        and not borders.requires_grad
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not torch._C._is_any_autocast_enabled()
    )


_ORDINARY = (Tensor, torch.nn.Parameter)


@contextmanager
def primals(saved: Sequence[Tensor | None]) -> Iterator[list[Tensor | None]]:
    """Within the context of a ``jvp``: what was saved, without the tangents of the level that is worked on.

    Tangents of outer levels go on, so that forward mode nests.
    """
    with forward_ad._set_fwd_grad_enabled(True):
        yield [None if t is None else forward_ad.unpack_dual(t).primal for t in saved]


def below_autograd(op: Any, *arguments: Any) -> Any:
    """Call ``op`` in the forward of its own autograd function: its kernel, or the next transform outwards.

    An autograd function turns differentiation off inside; transforms further out still want it.
    """
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        return directly(op, *arguments)


def directly(op: Any, *arguments: Any) -> Any:
    """What the kernel of ``op`` returns, past autograd: `called` below the dispatcher's Autograd key."""
    with torch._C._AutoDispatchBelowAutograd():
        return called(op, *arguments)


def called(op: Any, *arguments: Any) -> Any:
    """What ``op`` returns; an exception that the native launcher passed on has its own type again."""
    try:
        return op(*arguments)
    except RuntimeError as error:
        raise native.cause(error) from None


def register(
    library: torch.library.Library,
    name: str,
    real: Callable[..., Any],
    fake: Callable[..., Any],
    function: type[Differentiable],
    batched: Callable[..., Any],
) -> None:
    """Register all that belongs to an operator which ``library`` has defined.

    Args:
        library: the library.
        name: the operator's, without its namespace.
        real: computes it, on any device.
        fake: gives outputs of the right shape.
        function: is applied to the operator's arguments where a derivative is asked for.
        batched: its rule for ``vmap``, as `torch.library.register_vmap` takes it.
    """
    op = getattr(torch.ops.lmkan_gen, name).default

    def autograd(*arguments: Any) -> Any:
        # traced tensors are fake ones: nothing else costs a call more than that comparison
        if type(arguments[0]) is not Tensor and op in DECOMPOSITIONS and _exports_to_onnx():
            return DECOMPOSITIONS[op](*arguments)
        if not is_differentiated(arguments):
            return directly(op, *arguments)
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return function.apply(*arguments)  # type: ignore[attr-defined]
        return function.apply(*arguments)  # type: ignore[attr-defined]

    library.impl(name, real, "CompositeExplicitAutograd")
    native.implement(name, real)
    library.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"lmkan_gen::{name}", fake, lib=library)
    torch.library.register_vmap(f"lmkan_gen::{name}", batched, lib=library)


def _exports_to_onnx() -> bool:
    """Whether `torch.onnx.export` is at work; does not import what it takes to do so."""
    return "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()


def one_by_one(op: Any) -> Callable[..., Any]:
    """A rule for ``vmap`` that calls ``op`` for each element of the mapped dimension."""

    def rule(info: Any, in_dims: Dims, *arguments: Any) -> tuple[Any, Any]:
        calls = [
            # the dimension of a list of numbers is a list
            op(
                *(
                    a.select(d, i) if isinstance(d, int) else a
                    for a, d in zip(arguments, in_dims, strict=True)
                )
            )
            for i in range(info.batch_size)
        ]
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        return tuple(torch.stack(parts) for parts in zip(*calls, strict=True)), (0,) * len(calls[0])

    return rule


def longer_batch(op: Any, batches: Sequence[int], folds: Callable[..., bool]) -> Callable[..., Any]:
    """A rule for ``vmap`` that makes one call of more samples, where only samples are mapped over.

    Args:
        op: the operator.
        batches: positions of its arguments whose last dimension is the batch.
        folds: given the arguments, whether every output that is not empty has the batch last.
    """
    apart = one_by_one(op)

    def rule(info: Any, in_dims: Dims, *arguments: Any) -> tuple[Any, Any]:
        mapped = {i for i, d in enumerate(in_dims) if d is not None}
        if not mapped <= set(batches) or not folds(*arguments):
            outputs, dims = apart(info, in_dims, *arguments)
            return outputs, dims
        size = info.batch_size
        folded = list(arguments)
        for i in batches:
            if isinstance(argument := arguments[i], Tensor):
                dim = in_dims[i]
                argument = argument.unsqueeze(0) if dim is None else argument.movedim(dim, 0)
                folded[i] = argument.expand(size, -1, -1).transpose(0, 1).flatten(1)
        outputs = op(*folded)
        if isinstance(outputs, Tensor):
            return outputs.unflatten(1, (size, -1)), 1
        apart_again = [y.unflatten(1, (size, -1)) if y.dim() == 2 else y.expand(size, 0) for y in outputs]
        return tuple(apart_again), tuple(1 if y.dim() == 2 else 0 for y in outputs)

    return rule
