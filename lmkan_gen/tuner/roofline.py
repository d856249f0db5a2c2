"""How far a kernel is from what its device could do: a roofline of two roofs, both measured.

A call moves its inputs and outputs through memory at least once, and computes each bilinear function at
least once. The longer of both times, at rates that torch's own kernels reach on the device, is a bound
that no kernel beats; the measured time is compared with it. It is a distant bound: it knows nothing of
shared memory, which is what limits lookups most (see docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import BaseModel, ConfigDict

from lmkan_gen.problem import LayerShape, Operation, TableDtype
from lmkan_gen.tuner.measure import measure

_COPY_BYTES = 1 << 28
_MATRIX = {"cpu": 1024, "cuda": 4096}
_ELEMENT_BYTES = {
    TableDtype.FLOAT32: 4,
    TableDtype.FLOAT16: 2,
    TableDtype.BFLOAT16: 2,
    TableDtype.INT8: 1,
}
#: Multiplications and additions of one bilinear function, weights of the corners apart, which a pair's
#: outputs share: four products summed; for the input gradients two slopes of two products each beside the
#: output's gradient; for the table four products added to sums.
_FLOPS = {
    Operation.FORWARD: 8,
    Operation.GRAD_INPUT: 8,
    Operation.GRAD_TABLE: 8,
    Operation.BACKWARD: 16,
}


class Peaks(BaseModel):
    """What torch reaches on a device: bytes per second read and written by a copy, float32 operations per
    second of a matrix product without tensor cores."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bandwidth: float
    flops: float


def measure_peaks(device: torch.device) -> Peaks:
    """Measure them; takes below a second."""
    n = _MATRIX[device.type]
    source = torch.empty(_COPY_BYTES // 4, device=device, dtype=torch.float32)
    target = torch.empty_like(source)
    source.zero_()
    a, b, c = (torch.randn(n, n, device=device, dtype=torch.float32) for _ in range(3))
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        copy_us = _best_us(lambda: target.copy_(source), device)
        product_us = _best_us(lambda: torch.mm(a, b, out=c), device)
    finally:
        torch.set_float32_matmul_precision(precision)
    return Peaks(bandwidth=2e6 * source.nbytes / copy_us, flops=2e6 * n**3 / product_us)


def _best_us(call: Callable[[], object], device: torch.device) -> float:
    return min(measure([lambda: (call(), None)[1]], device).samples)


def bound_us(
    operation: Operation, shape: LayerShape, peaks: Peaks, table: TableDtype = TableDtype.FLOAT32
) -> float | None:
    """Microseconds that no kernel for this call can beat; None for operations that it is not known of."""
    size, count = compulsory_bytes(operation, shape, table), operations(operation, shape)
    if size is None or count is None:
        return None
    return 1e6 * max(size / peaks.bandwidth, count / peaks.flops)


def operations(operation: Operation, shape: LayerShape) -> int | None:
    """Multiplications and additions that a call cannot do without; None where that is not known."""
    return _FLOPS[operation] * shape.evaluations if operation in _FLOPS else None


def compulsory_bytes(
    operation: Operation, shape: LayerShape, table: TableDtype = TableDtype.FLOAT32
) -> int | None:
    """Bytes of a call's inputs and outputs, each once; of a table no more than can be touched."""
    inputs, outputs = 4 * shape.inputs * shape.batch, 4 * shape.outputs * shape.batch
    # at most four knots a sample of each function
    touched = min(shape.table_bytes, 16 * shape.evaluations) * _ELEMENT_BYTES[table] // 4
    match operation:
        case Operation.FORWARD:
            return inputs + touched + outputs
        case Operation.GRAD_INPUT:
            return 2 * inputs + outputs + touched
        case Operation.GRAD_TABLE:
            return inputs + outputs + shape.table_bytes
        case Operation.BACKWARD:
            return 2 * inputs + outputs + touched + shape.table_bytes
    return None
