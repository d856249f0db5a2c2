"""Other orders of a table that outlive one call, and whose they are.

A form may be used only where it provably belongs to the present values of its table, and no property of a
tensor proves that: writes through ``.data``, by fused optimisers or by FSDP leave its identity and its
version as they were. So nothing is kept of a table that others can write to. `keep_forms` names the tensors
of which forms are kept:

- the table of a frozen layer, which freezing declares to be constant. Writes that torch counts, replacing the
  tensor and assigning to its ``.data`` are noticed all the same;
- the rounded copy of a table that a differentiable forward makes for itself. Nobody else has it, and it lives
  until the backward of that call has run.

Tensors of a compiled graph are never among the latter: the compiler may give the memory of one to another.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

Made = dict[str, Tensor]


class Forms:
    """Forms of one table by name. They go with their table."""

    def __init__(self, of: Tensor, scales: Tensor | None = None) -> None:
        self._of = weakref.ref(of)
        self.scales = scales
        self._in_graph = _capturing(of)
        self._state = _states(of, scales)
        self._made: dict[str, Made] = {}

    def get(self, name: str, make: Callable[[], Made]) -> Made:
        """The form called ``name``; made where it is not known, or the table has changed since."""
        of = self._of()
        assert of is not None
        state = _states(of, self.scales)
        if state != self._state:
            self._made, self._state = {}, state
        found = self._made.get(name)
        if found is None:
            found = _outside_pools(make, of)
            # what is made while a CUDA graph is captured has values only once that graph has run; a view of
            # the table costs nothing to make, and would keep the table alive
            views = any(_storage(t) == _storage(of) for t in found.values())
            if state is not None and not views and (self._in_graph or not _capturing(of)):
                self._made[name] = found
        return found

    def holds(self, tensors: Iterable[Tensor]) -> bool:
        """Whether all of these are kept, or are the scales: others go when their call is done."""
        kept = {id(t) for made in self._made.values() for t in made.values()} | {id(self.scales)}
        return all(id(t) in kept for t in tensors)


_kept: dict[int, tuple[weakref.ref[Tensor], Forms]] = {}


def keep_forms(of: Tensor, scales: Tensor | None = None) -> None:
    """From now on keep the forms of a table for as long as it lives.

    Args:
        of: a tensor that nobody writes to unnoticed: see above.
        scales: of an int8 table, which are in its forms too.
    """
    known = forms_of(of)
    if known is None or known.scales is not scales:
        key = id(of)
        _kept[key] = weakref.ref(of, lambda _: _kept.pop(key, None)), Forms(of, scales)


def forms_of(table: Tensor) -> Forms | None:
    """What is kept of a table; None: nothing may be."""
    known = _kept.get(id(table))
    return known[1] if known is not None and known[0]() is table else None


def kept_at(address: int) -> tuple[Tensor, Forms] | None:
    """The table at an address in memory and its forms, if they are kept."""
    for reference, forms in list(_kept.values()):
        table = reference()
        if table is not None and _has_memory(table) and table.data_ptr() == address:
            return table, forms
    return None


def _has_memory(tensor: Tensor) -> bool:
    """Whether a tensor is neither a meta nor a fake one, nor a wrapper of another."""
    if type(tensor) is not Tensor or tensor.is_meta:
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _states(of: Tensor, scales: Tensor | None) -> tuple[tuple[int, int], ...] | None:
    """`_state` of all tensors that forms are made of; None: torch does not tell of one."""
    states = [_state(t) for t in (of, scales) if t is not None]
    known = tuple(state for state in states if state is not None)
    return known if len(known) == len(states) else None


def _state(of: Tensor) -> tuple[int, int] | None:
    """What changes when the tensor is written to, as far as torch tells; None: it does not tell."""
    if of.is_inference() or not _has_memory(of):
        return None
    return of._version, of.data_ptr()


def _outside_pools(make: Callable[[], Made], of: Tensor) -> Made:
    """What ``make`` makes, in ordinary memory.

    Before compiled functions are captured in CUDA graphs (``mode="reduce-overhead"``) they run with a pool of
    the graphs' for their thread, from which nothing may outlive the call.
    """
    if not of.is_cuda or "torch._inductor.cudagraph_trees" not in sys.modules or _capturing(of):
        return make()
    stream = torch.cuda.current_stream(of.device)

    def work() -> Made:
        with torch.cuda.device(of.device), torch.cuda.stream(stream):
            return make()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _capturing(of: Tensor) -> bool:
    return of.is_cuda and torch.cuda.is_current_stream_capturing()
