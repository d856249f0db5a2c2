"""From an operation on tensors to the kernel that runs it.

The way is selection -> family -> compiler -> launcher. It is walked once per operation, shape,
device and demand; later calls find the prepared kernel in a dictionary. Where no kernel can be had,
`lmkan_gen.reference` runs instead and a warning says why. ``LMKAN_GEN_DISABLE_KERNELS=1`` in the
environment makes it run always; it is read at every call.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmkan_gen import device as devices
from lmkan_gen import hessian_reference, packing, reference
from lmkan_gen.call import Call
from lmkan_gen.families import Demand, family
from lmkan_gen.forms import Forms
from lmkan_gen.launch import native, recipes
from lmkan_gen.packing import RoundedTable
from lmkan_gen.plan import KernelSpec, LaunchPlan
from lmkan_gen.problem import DEFAULT_WORKSPACE, LayerShape, Operation, Problem, TableDtype

if TYPE_CHECKING:
    from lmkan_gen.selection import Choice

logger = logging.getLogger("lmkan_gen")

DISABLE_VARIABLE = "LMKAN_GEN_DISABLE_KERNELS"
WORKSPACE_VARIABLE = "LMKAN_GEN_WORKSPACE"

Buffers = Mapping[str, Tensor]
Run = Callable[[Buffers], None]

#: prepared kernels kept; a program with more shapes than that prepares some of them again
_CAPACITY = 4096


@dataclass(frozen=True)
class Used:
    """What one operation ran on: a record for reports.

    Attributes:
        operation: ``BACKWARD`` only when one kernel computes both gradients.
        shape: of the call.
        device: of the tensors.
        demand: what the caller had asked for.
        choice: what selection answered.
        fallback: why the torch reference ran instead of the chosen kernel; None when the choice ran.
    """

    operation: Operation
    shape: LayerShape
    device: torch.device
    demand: Demand
    choice: Choice
    fallback: str | None

    @property
    def table(self) -> TableDtype:
        """Element type of the tables that the call was about."""
        return self.choice.problem.table

    @property
    def kernel(self) -> str | None:
        """Name of the kernel family that ran; None: the torch reference."""
        return None if self.fallback else self.choice.family

    def describe(self) -> str:
        """One line: what ran, and why."""
        words = self.choice.describe()
        return f"{words}; plain torch ran instead: {self.fallback}" if self.fallback else words


#: a call, whether kernels are disabled, and the limit of workspaces
_Key = tuple[Call, bool, int]


@dataclass(frozen=True)
class _Prepared:
    runs: tuple[Run, ...]
    records: tuple[Used, ...]
    #: names of buffers that the runs read, and the element type of those that are made of the table
    reads: frozenset[str]
    table: TableDtype
    #: what the runs launch; None: plain torch
    parts: tuple[native.Part | None, ...]


_prepared: dict[_Key, _Prepared] = {}
_failed: dict[KernelSpec, str] = {}
_warned: set[str] = set()
#: whether every batch has to come by, not only one of each range
_is_recording = False
#: bytes; None: the environment says
_workspace_limit: int | None = None


def execute(
    call: Call, buffers: Buffers, rounded: RoundedTable | None = None, forms: Forms | None = None
) -> None:
    """Run a call on float32 buffers, reproducibly if torch is asked for deterministic algorithms.

    Args:
        call: what to compute. Its shape and device must be those of the buffers. Whether it is deterministic
            is taken from torch, and how ``x`` lies from ``x``.
        buffers: tensors by the names of `lmkan_gen.plan.LaunchPlan`: ``x``, ``table``, ``borders``, for
            gradients ``grad``, and so on, and the outputs, which need no initialisation. All contiguous but
            ``x`` and ``grad``, of any strides, and ``grad_x``, without gaps and in the order of ``x``.
        rounded: the table, of the call's type, in place of ``table`` among the buffers.
        forms: where other orders of this very table are kept; None: they are made for this call.

    Raises:
        ValueError: the demand cannot be honoured, the device is neither a CPU nor a CUDA device, the table
            cannot be packed, or ``LMKAN_GEN_WORKSPACE`` is not a number of mebibytes.
    """
    if call.shape.batch == 0:
        if "grad_table" in buffers:
            buffers["grad_table"].zero_()
        return
    deterministic = torch.are_deterministic_algorithms_enabled()
    strided = "x" in buffers and not buffers["x"].is_contiguous()
    if (deterministic, strided) != (call.deterministic, call.strided):
        call = replace(call, deterministic=deterministic, strided=strided)
    found = _find(call)
    buffers = packing.arranged(buffers, found.reads, found.table, rounded, forms)
    for run in found.runs:
        run(buffers)
    if None not in found.parts:
        native.start(call.device, _for_native)


def _find(call: Call) -> _Prepared:
    """What runs for a call; prepared where it is not known."""
    key = (call, kernels_disabled(), workspace_limit())
    found = _prepared.get(key)
    if found is None:
        if len(_prepared) >= _CAPACITY:
            _prepared.pop(next(iter(_prepared)))
        found = _prepared[key] = _prepare(call)
    return found


def _for_native(call: Call) -> native.Prepared | None:
    """What the native launcher runs for a call."""
    found = _find(call)
    parts = [part for part in found.parts if part is not None]
    if len(parts) < len(found.parts):
        return None
    if _is_recording:
        return native.Prepared(parts, None)
    choices = [record.choice for record in found.records]
    return native.Prepared(
        parts,
        recipes.traced(
            _problem(call), choices, lambda spec, plan: _launcher(spec).starts(spec, plan, call.device)
        ),
    )


def explain(call: Call) -> list[Choice]:
    """What `execute` would choose: one choice, or two where the gradients are computed apart.

    Nothing is compiled or run, so a kernel named here may still turn out not to compile; `used`
    tells what did run.

    Raises:
        ValueError: as `execute`.
    """
    from lmkan_gen import selection

    problem = _problem(call)
    if kernels_disabled():
        tier = selection.Tier.REFERENCE
        return [selection.Choice(problem, None, {}, tier, f"{DISABLE_VARIABLE} is set")]
    if call.operation is Operation.BACKWARD:
        return list(selection.select_backward(problem, call.demand))
    return [selection.select(problem, call.demand)]


def _problem(call: Call) -> Problem:
    """What families are asked for a call."""
    return Problem(
        call.operation,
        call.shape,
        devices.of(call.device),
        call.table,
        call.deterministic,
        call.constant,
        workspace_limit(),
        call.strided,
    )


def used() -> list[Used]:
    """What has run in this process, each shape and device once; oldest first, but for batches that the native
    launcher planned for by itself, which come last."""
    for call in native.by_recipe():
        _find(call)
    return [record for prepared in _prepared.values() for record in prepared.records]


@contextmanager
def recording() -> Iterator[list[Used]]:
    """Within the context kernels are chosen afresh; after it, the list holds what ran, as `used` tells it."""
    global _is_recording
    seen: list[Used] = []
    before = dict(_prepared)
    _prepared.clear()
    native.forget()
    _is_recording = True
    try:
        yield seen
    finally:
        _is_recording = False
        seen += used()
        for key, found in before.items():
            _prepared.setdefault(key, found)


def clear_caches() -> None:
    """Forget prepared kernels, failures and warnings given, so that everything is decided afresh."""
    for cache in (_prepared, _failed, _warned):
        cache.clear()
    native.forget()


def workspace_limit() -> int:
    """Bytes of scratch memory that kernels may take, of that which could grow with the batch.

    What `set_workspace_limit` was given, or else ``LMKAN_GEN_WORKSPACE`` MiB, or else 256 MiB; asked at every
    call.

    Raises:
        ValueError: the variable is not a positive integer.
    """
    if _workspace_limit is not None:
        return _workspace_limit
    text = os.environ.get(WORKSPACE_VARIABLE, "")
    if not text:
        return DEFAULT_WORKSPACE
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(
            f"{WORKSPACE_VARIABLE} is {text!r}, must be a positive number of MiB "
            f"such as {DEFAULT_WORKSPACE >> 20}"
        )
    return int(text) << 20


def set_workspace_limit(mebibytes: int | None) -> None:
    """Bound the scratch memory of backward on GPUs that could grow with the batch, from the next call on.

    Longer batches are worked on in slabs. Tables in another order come on top: twice the size of the layer's
    table, with deterministic algorithms up to three times.

    Args:
        mebibytes: for every layer in this process, at least 1. None: what the environment variable
            ``LMKAN_GEN_WORKSPACE`` says, or 256.

    Raises:
        TypeError: ``mebibytes`` is no integer.
        ValueError: ``mebibytes`` is below 1.
    """
    global _workspace_limit
    if mebibytes is None:
        _workspace_limit = None
        native.forget()
        return
    if isinstance(mebibytes, bool) or not isinstance(mebibytes, int):
        raise TypeError(f"mebibytes must be an integer or None, got {mebibytes!r}")
    if mebibytes < 1:
        raise ValueError(
            f"mebibytes is {mebibytes}, must be a positive number of MiB such as {DEFAULT_WORKSPACE >> 20}"
        )
    _workspace_limit = mebibytes << 20
    native.forget()


def kernels_disabled() -> bool:
    """Whether the environment forces the torch reference."""
    return os.environ.get(DISABLE_VARIABLE, "0") not in ("", "0")


def _prepare(call: Call) -> _Prepared:
    runs, records, parts = [], [], []
    for choice in explain(call):
        run, part, fallback = _prepare_choice(choice, call.shape, call.device)
        runs.append(run)
        parts.append(part)
        operation = choice.problem.operation
        records.append(Used(operation, call.shape, call.device, call.demand, choice, fallback))
    return _Prepared(
        tuple(runs),
        tuple(records),
        # the reference reads the table itself
        frozenset().union(*({"table"} if part is None else part.plan.buffers for part in parts)),
        records[0].table,
        tuple(parts),
    )


def _prepare_choice(
    choice: Choice, shape: LayerShape, device: torch.device
) -> tuple[Run, native.Part | None, str | None]:
    """The callable for ``choice``, its plan, and why it is the reference, which has none, if it is."""
    operation = choice.problem.operation
    if choice.family is None:
        return _REFERENCE[operation], None, None
    # selection may answer with the problem that it looked up; plans need the exact batch
    problem = replace(choice.problem, shape=shape)
    chosen = family(choice.family)
    spec = chosen.spec(problem, choice.parameters)
    if spec not in _failed:
        try:
            plan = chosen.plan(problem, choice.parameters)
            launcher = _launcher(spec)
            part = native.Part(spec, plan, problem.table, launcher.starts(spec, plan, device))
            return (
                _when_first_run(lambda: _contiguous(launcher.prepare(spec, plan, device), plan)),
                part,
                None,
            )
        # RuntimeError: no compiler, source that does not compile, a driver that refuses the binary;
        # OSError: a store that cannot be written, a library that cannot be loaded;
        # ImportError: CUDA bindings that are not installed
        except (RuntimeError, OSError, ImportError) as error:
            _failed[spec] = str(error) or type(error).__name__
            logger.debug("plain torch instead of %s: %s", choice.family, _failed[spec])
            _warn(device, error)
    return _REFERENCE[operation], None, _failed[spec]


def _launcher(spec: KernelSpec) -> ModuleType:
    return import_module(f"lmkan_gen.launch.{'cuda' if spec.is_cuda else 'cpu'}")


def _when_first_run(prepare: Callable[[], Run]) -> Run:
    """What ``prepare`` gives, prepared when it is first run: the native launcher needs none of it."""
    prepared: list[Run] = []

    def run(buffers: Buffers) -> None:
        if not prepared:
            prepared.append(prepare())
        prepared[0](buffers)

    return run


def _contiguous(run: Run, plan: LaunchPlan) -> Run:
    """``run`` for tensors of any strides: what the plan asks no strides of is copied before or after."""
    names = {"x", "grad", "grad_x"} & plan.buffers - {stride.buffer for stride in plan.strides}

    def run_on_copies(buffers: Buffers) -> None:
        copies: dict[str, Tensor] = {}
        for name in names:
            if not buffers[name].is_contiguous():
                copies[name] = torch.empty_like(buffers[name], memory_format=torch.contiguous_format)
        for name in {"x", "grad"} & copies.keys():
            copies[name].copy_(buffers[name])
        run({**buffers, **copies} if copies else buffers)
        if "grad_x" in copies:
            buffers["grad_x"].copy_(copies["grad_x"])

    return run_on_copies if names else run


def _warn(device: torch.device, error: Exception) -> None:
    cause = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    if cause in _warned:
        return
    _warned.add(cause)
    warnings.warn(
        f"no lmKAN kernel for {device.type}, plain torch runs instead (same numbers, slower): {cause}. "
        f"`lmkan-gen doctor` shows what is missing; {DISABLE_VARIABLE}=1 asks for plain torch silently",
        RuntimeWarning,
        stacklevel=2,
    )


def _forward(b: Buffers) -> None:
    reference.forward(b["x"], b["table"], b["borders"], b["y"])


def _grad_input(b: Buffers) -> None:
    reference.grad_input(b["grad"], b["x"], b["table"], b["borders"], b["grad_x"])


def _grad_table(b: Buffers) -> None:
    reference.grad_table(b["grad"], b["x"], b["borders"], b["grad_table"])


def _backward(b: Buffers) -> None:
    _grad_input(b)
    _grad_table(b)


def _hessian(b: Buffers) -> None:
    hessian_reference.value(b["table"], b["borders"], b["value"])


def _grad_hessian(b: Buffers) -> None:
    hessian_reference.gradient(b["scale"], b["table"], b["borders"], b["grad_table"])


_REFERENCE: dict[Operation, Run] = {
    Operation.FORWARD: _forward,
    Operation.GRAD_INPUT: _grad_input,
    Operation.GRAD_TABLE: _grad_table,
    Operation.BACKWARD: _backward,
    Operation.HESSIAN: _hessian,
    Operation.GRAD_HESSIAN: _grad_hessian,
}
