"""How the plans of a call follow from its batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lmkan_gen.families import family
from lmkan_gen.launch.native import Part, Recipe
from lmkan_gen.plan import KernelSpec, LaunchPlan
from lmkan_gen.problem import Problem
from lmkan_gen.tracing import Trace, UntraceableError

if TYPE_CHECKING:
    from lmkan_gen.selection import Choice

logger = logging.getLogger("lmkan_gen")

#: a plan's steps with the addresses of kernels, or what stands for them
Starts = Callable[[KernelSpec, LaunchPlan], Sequence[Any]]


def traced(problem: Problem, choices: Sequence[Choice], starts: Starts) -> Recipe | None:
    """The plans of ``choices`` for all batches that get them; None where that is more than arithmetic.

    Args:
        problem: what is computed, for one of the batches.
        choices: what was chosen for it, kernels of a family each.
        starts: gives the steps of plans.
    """
    from lmkan_gen import selection

    batches, _ = selection.batches_alike(problem)
    if len(batches) == 1:
        return None
    trace = Trace(problem.shape.batch)
    parts = []
    try:
        # typed as an integer, which it stands for
        shape = replace(problem.shape, batch=trace.batch)  # type: ignore[arg-type]
        for choice in choices:
            assert choice.family is not None
            asked, chosen = choice.problem.layer.of(shape), family(choice.family)
            if chosen.violations(asked, choice.parameters):
                return None
            spec, plan = chosen.spec(asked, choice.parameters), chosen.plan(asked, choice.parameters)
            parts.append(Part(spec, plan, choice.problem.table, starts(spec, plan)))
    # TypeError: of a family that computes otherwise than traced numbers do
    except (UntraceableError, TypeError) as error:
        logger.debug(
            "every batch of %s %s is planned for in Python: %s", problem.operation, problem.shape, error
        )
        return None
    return Recipe(batches, trace, parts)
