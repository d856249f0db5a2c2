"""Kernels ahead of time: what layers of some shapes would run on some devices, found without running."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from lmkan_gen.device import Device
from lmkan_gen.families import family
from lmkan_gen.plan import KernelSpec
from lmkan_gen.problem import CALL_OPERATIONS, LayerShape, Operation, Problem, TableDtype
from lmkan_gen.selection import Choice, select, select_backward


def kernels(
    shapes: Iterable[LayerShape],
    devices: Iterable[Device],
    *,
    backward: bool = True,
    tables: Iterable[TableDtype] = (),
) -> list[KernelSpec]:
    """The kernels that layers without demands need, each once.

    Args:
        shapes: of the layer calls. Kernels do not depend on the batch, but the choice of a kernel does.
        devices: where layers will run; choices differ between models of one architecture.
        backward: also those for training: gradients together and each alone, and the regulariser.
        tables: element types to which layers will be frozen.
    """
    tables = tuple(tables)
    found: dict[KernelSpec, None] = {}
    for device in devices:
        for shape in shapes:
            for choice in _choices(shape, device, backward, tables):
                if choice.family is not None:
                    for strided in (False, True):  # nobody knows how inputs will lie
                        problem = replace(choice.problem, strided=strided)
                        found[family(choice.family).spec(problem, choice.parameters)] = None
    return list(found)


def _choices(
    shape: LayerShape, device: Device, backward: bool, tables: tuple[TableDtype, ...]
) -> list[Choice]:
    forward = Problem(Operation.FORWARD, shape, device)
    # for layers in use, and for those that are frozen to float32
    chosen = [select(forward), select(replace(forward, constant=True))]
    chosen += (select(replace(forward, table=table, constant=True)) for table in tables)
    if backward:
        chosen += select_backward(Problem(Operation.BACKWARD, shape, device))
        chosen += (select(Problem(o, shape, device)) for o in (Operation.GRAD_INPUT, Operation.GRAD_TABLE))
        # the regulariser works on the table alone
        table = replace(shape, batch=1)
        chosen += (select(Problem(o, table, device)) for o in Operation if o not in CALL_OPERATIONS)
    return chosen
