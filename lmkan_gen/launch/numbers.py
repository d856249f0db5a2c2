"""Plans and recipes as numbers, in the order in which ``templates/run_plan.h.j2`` reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain

from lmkan_gen.launch.native import Part, Recipe
from lmkan_gen.plan import Fill, Stride, TensorMap
from lmkan_gen.tracing import Traced

#: what libraries call buffers, by their places
BUFFERS = ("x", "table", "borders", "y", "grad", "grad_x", "grad_table")
_NUMBER, _ADDRESS, _STRIDE, _SIZE, _MAP = range(5)
_MAX_BUFFERS, _MAX_ARGUMENTS, _MAX_MAPS = 32, 31, 4


@dataclass(frozen=True)
class Written:
    """A plan as libraries read it.

    Attributes:
        numbers: all but the head, by which a library knows which forms are read together.
        names: of kernels and filled buffers, for messages.
        forms: of the table, in the order in which they are given.
    """

    numbers: list[int | Traced]
    names: list[str]
    forms: tuple[str, ...]


def write(part: Part, kept: bool) -> Written | None:
    """``part`` in the order of ``read_plan``, headless; None if it is more than libraries have room for.

    Args:
        part: what is launched.
        kept: whether ``table`` is a form of the table too, and not what a call is given.

    Raises:
        UntraceableError: a traced number is more than arithmetic.
    """
    plan = part.plan
    places, made = _places(plan.buffers, tuple([w.name for w in plan.workspaces]), kept)
    maps = sorted(plan.tensor_maps, key=repr) if plan.tensor_maps else []
    if len(places) > _MAX_BUFFERS or len(maps) > _MAX_MAPS:
        return None
    dense = plan.buffers - {s.buffer for s in plan.strides}
    numbers: list[int | Traced] = [0 if name in dense else 1 for name in ("x", "grad", "grad_x")]
    numbers += [len(made), len(plan.workspaces), *[w.bytes for w in plan.workspaces], len(maps)]
    for tensor_map in maps:
        numbers += [places[tensor_map.buffer], len(tensor_map.sizes), *tensor_map.sizes, *tensor_map.box]
    numbers.append(len(part.starts))
    names = []
    for step in part.starts:
        if isinstance(step, Fill):
            numbers += [1, 0, places[step.buffer], 0, 0, 0, 0, 0, 0, 0]
            names.append(step.buffer)
            continue
        arguments, launch = step.arguments, step.launch
        if len(arguments) > _MAX_ARGUMENTS:
            return None
        numbers += [0, step.closely, 0, step.address, *launch.grid, launch.block, launch.shared_memory]
        numbers.append(len(arguments))
        for argument in arguments:
            if isinstance(argument, int | Traced):
                numbers += (_NUMBER, argument, 0)
            elif isinstance(argument, str):  # some names know more than their letters
                numbers += (_ADDRESS, places[argument], 0)
            elif isinstance(argument, Stride):
                numbers += (_STRIDE, places[argument.buffer], argument.axis)
            elif isinstance(argument, TensorMap):
                numbers += (_MAP, maps.index(argument), 0)
            else:
                numbers += (_SIZE, places[argument.buffer], 0)
        names.append(launch.kernel)
    return Written(numbers, names, made)


@cache
def _places(
    buffers: frozenset[str], workspaces: tuple[str, ...], kept: bool
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Where the library has the buffers of a plan, and which of them are forms of the table.

    Args:
        buffers: of the plan.
        workspaces: of the plan.
        kept: whether ``table`` is one of these forms.
    """
    known = set(BUFFERS) - {"table"} if kept else set(BUFFERS)
    made = tuple(sorted(buffers - known))
    places = {name: i for i, name in enumerate(BUFFERS)}
    places |= {name: len(BUFFERS) + i for i, name in enumerate(made)}
    places |= {name: len(BUFFERS) + len(made) + i for i, name in enumerate(workspaces)}
    return places, made


def write_recipe(recipe: Recipe, written: Sequence[Written]) -> list[int | Traced]:
    """A recipe in the order of ``read_recipe``.

    Args:
        recipe: the recipe.
        written: its parts, with their heads.
    """
    trace = recipe.trace
    told: list[int | Traced] = [recipe.batches.start, recipe.batches.stop - 1]
    told += [len(trace.steps), *chain.from_iterable(trace.steps)]
    told += [len(trace.guards), *chain.from_iterable(trace.guards.items()), len(written)]
    for one in written:
        holes = [(i, n.place) for i, n in enumerate(one.numbers) if isinstance(n, Traced)]
        told += [len(one.numbers), *one.numbers]
        told += [len(holes), *chain.from_iterable(holes), len(one.names)]
    return told
