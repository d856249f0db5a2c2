"""Launching without Python: a library that registers the operators on torch's stable ABI.

The library (``templates/launcher.cpp.j2``) is compiled on demand, as kernels are. Once it is there, operators
on CPUs and GPUs go to it. What it does not know it asks of `lmkan_gen.launch.service.Service`:

- a call that has not been prepared: kernels are chosen and loaded, and the plan is handed over as numbers,
  with the arithmetic by which they follow from the batch (`lmkan_gen.tracing`): other batches need not ask;
- a form of a table that stays as it is: made, and kept for as long as the table lives;
- a call that it does not serve, in float64 or with arguments that do not belong together: the operator's
  Python implementation computes it, or raises.

``LMKAN_GEN_LAUNCHER=python`` in the environment leaves everything to Python; it is read at every call. A
library that cannot be built costs one warning and leaves everything to Python as well.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from lmkan_gen.call import Call
from lmkan_gen.plan import KernelSpec, LaunchPlan
from lmkan_gen.problem import TableDtype
from lmkan_gen.tracing import Trace

if TYPE_CHECKING:
    from lmkan_gen.launch.service import Service

VARIABLE = "LMKAN_GEN_LAUNCHER"
#: namespace of the operators of deployed libraries
DEPLOYED = "lmkan_deployed"


@dataclass(frozen=True)
class Part:
    """One of the plans of a call.

    Attributes:
        spec: whose kernels it launches.
        plan: what it launches.
        table: element type of the forms that it reads.
        starts: its steps with the addresses of kernels, as ``starts`` of the Python launchers gives them.
    """

    spec: KernelSpec
    plan: LaunchPlan
    table: TableDtype
    starts: Sequence[Any]


@dataclass(frozen=True)
class Recipe:
    """How plans follow from the batch.

    Attributes:
        batches: that kernels were chosen for.
        trace: what `parts` are made of; it knows for which of these batches it does not speak.
        parts: as those of `Prepared`, with traced numbers.
    """

    batches: range
    trace: Trace
    parts: Sequence[Part]


@dataclass(frozen=True)
class Prepared:
    """What a call launches, and what it would launch for other batches where that is arithmetic."""

    parts: Sequence[Part]
    recipe: Recipe | None


class Prepare(Protocol):
    """Chooses kernels for a call; None where plain torch runs."""

    def __call__(self, call: Call) -> Prepared | None: ...


#: what computes an operator in Python
implementations: dict[str, Callable[..., Any]] = {}
#: of a thread: the last exception that the library was told of
raised = threading.local()
_service: Service | None = None
_lock = threading.RLock()


def implement(name: str, function: Callable[..., Any]) -> None:
    """Say what computes the operator ``name`` where the library does not."""
    implementations[name] = function


def start(device: torch.device, prepare: Prepare) -> None:
    """Let the library serve a kind of device from now on, if it can be had.

    Args:
        device: CPU or CUDA.
        prepare: what to ask for plans.
    """
    global _service
    if os.environ.get(VARIABLE) == "python" or (_service is not None and device.type in _service.asked):
        return
    from lmkan_gen.launch.service import Service

    with _lock:
        if _service is None:
            _service = Service(prepare)
        _service.serve(device.type)


def is_serving(kind: str) -> bool:
    """Whether the library launches on ``cpu`` or ``cuda``."""
    return _service is not None and kind in _service.served


def by_recipe() -> list[Call]:
    """The calls that the library knows without having asked, oldest first."""
    return _service.by_recipe() if _service is not None and _service.library is not None else []


def forget() -> None:
    """Ask for everything anew: what was chosen may have changed."""
    if _service is not None and _service.library is not None:
        _service.library.lmkan_forget()


def cause(error: RuntimeError) -> BaseException:
    """What was raised in Python, where ``error`` came through the library; else ``error``."""
    found: BaseException | None = getattr(raised, "error", None)
    if found is None or str(found) not in str(error):
        return error
    raised.error = None
    return found
