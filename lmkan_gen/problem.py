"""What is to be computed: an operation, on a layer shape, on a device."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property, lru_cache

from lmkan_gen.device import Device

MIN_GRIDS = 3
DEFAULT_WORKSPACE = 256 << 20


class Operation(StrEnum):
    """One kernel's worth of work of an lmKAN layer.

    ``BACKWARD`` computes both gradients together; ``GRAD_INPUT`` and ``GRAD_TABLE`` one each, so
    that nobody pays for a gradient that was not asked for. ``HESSIAN`` is the value of the Hessian
    regulariser and ``GRAD_HESSIAN`` its gradient; they work on the table alone and ignore the batch,
    which is 1 by convention.
    """

    FORWARD = "forward"
    GRAD_INPUT = "grad_input"
    GRAD_TABLE = "grad_table"
    BACKWARD = "backward"
    HESSIAN = "hessian"
    GRAD_HESSIAN = "grad_hessian"


#: what a layer call consists of: operations that are tuned per shape and batch
CALL_OPERATIONS = (Operation.FORWARD, Operation.GRAD_INPUT, Operation.GRAD_TABLE, Operation.BACKWARD)


class TableDtype(StrEnum):
    """Element type of the tables that a kernel reads; inputs, sums and gradients are float32 throughout."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"


@dataclass(frozen=True, order=True)
class LayerShape:
    """Sizes of one layer call: ``x`` is ``[inputs, batch]``, ``y`` is ``[outputs, batch]``.

    Raises:
        ValueError: ``inputs`` or ``outputs`` below 1, ``grids`` below 3, ``batch`` negative.
    """

    inputs: int
    outputs: int
    grids: int
    batch: int

    def __post_init__(self) -> None:
        if self.inputs < 1:
            raise ValueError(f"inputs must be at least 1, got {self.inputs}")
        if self.outputs < 1:
            raise ValueError(f"outputs must be at least 1, got {self.outputs}")
        if self.grids < MIN_GRIDS:
            raise ValueError(
                f"grids must be at least {MIN_GRIDS}, got {self.grids}: "
                "the ghost knots are extrapolated from two inner ones"
            )
        if self.batch < 0:
            raise ValueError(f"batch must not be negative, got {self.batch}")

    @property
    def pairs(self) -> int:
        """Number of input pairs; of an odd number of inputs the last pair's second one is always zero."""
        return -(-self.inputs // 2)

    @property
    def knots(self) -> int:
        """Knots of one function's grid, ``(grids + 1) ** 2``."""
        return (self.grids + 1) ** 2

    @property
    def evaluations(self) -> int:
        """Function evaluations of one pass, ``batch * pairs * outputs``."""
        return self.batch * self.pairs * self.outputs

    @property
    def table_bytes(self) -> int:
        """Bytes of the float32 parameter table."""
        return 4 * self.knots * self.outputs * self.pairs

    def __str__(self) -> str:
        return f"{self.inputs},{self.outputs},{self.grids},{self.batch}"


def packs_once(operation: Operation, table: TableDtype) -> bool:
    """Whether it is usual that the table stays as it is from call to call: inference with narrow ones."""
    return operation is Operation.FORWARD and table is not TableDtype.FLOAT32


@dataclass(frozen=True)
class Problem:
    """An operation on a shape on a device: all that a kernel family needs to know to answer.

    Attributes:
        operation: what to compute.
        shape: sizes of the call.
        device: where.
        table: element type of the tables.
        deterministic: whether the same call must give the same bits every time.
        constant: whether the table stays as it is for many calls, so that arranging it otherwise pays.
        workspace: bytes of scratch memory, of that which could grow with the batch.
        strided: whether ``x`` lies otherwise than as contiguous ``[I, B]``: with its samples one after the
            other, say. Its gradient is laid out in the same order.
    """

    operation: Operation
    shape: LayerShape
    device: Device
    table: TableDtype = TableDtype.FLOAT32
    deterministic: bool = False
    constant: bool = False
    workspace: int = DEFAULT_WORKSPACE
    strided: bool = False

    @classmethod
    def usual(
        cls, operation: Operation, shape: LayerShape, device: Device, table: TableDtype = TableDtype.FLOAT32
    ) -> Problem:
        """What is timed and shown where nothing else is known of the calls: see `packs_once`."""
        return cls(operation, shape, device, table, constant=packs_once(operation, table))

    @property
    def is_plain(self) -> bool:
        """Whether ``x`` is contiguous and made of whole pairs, which needs no care in reading it."""
        return not self.strided and self.shape.inputs % 2 == 0

    @cached_property
    def layer(self) -> Layer:
        """What this problem has in common with those of other batches."""
        s = self.shape
        return _layer(
            self.operation,
            s.inputs,
            s.outputs,
            s.grids,
            self.device,
            self.table,
            self.deterministic,
            self.constant,
            self.workspace,
            self.strided,
        )


@dataclass(frozen=True, eq=False)
class Layer(Problem):
    """A problem whose batch does not matter; it says 1. Made by `Problem.layer` only, once each.

    What does not depend on the batch is kept by layer. A batch that was not seen before finds it there at
    little cost, because a layer is equal to itself only.
    """

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @cached_property
    def layer(self) -> Layer:
        """Itself."""
        return self

    def of(self, shape: LayerShape) -> Problem:
        """The problem of this layer with the batch of ``shape``, whose other sizes are the layer's."""
        problem = object.__new__(Problem)
        # several times as fast as setting the fields of a frozen dataclass one by one
        problem.__dict__.update(self.__dict__, shape=shape, layer=self)
        return problem

    def doing(self, operation: Operation) -> Layer:
        """The same layer with another operation."""
        return self._doing[operation]

    @cached_property
    def _doing(self) -> dict[Operation, Layer]:
        s, rest = self.shape, (self.device, self.table, self.deterministic, self.constant, self.workspace)
        return {o: _layer(o, s.inputs, s.outputs, s.grids, *rest, self.strided) for o in Operation}


@lru_cache(maxsize=4096)
def _layer(
    operation: Operation,
    inputs: int,
    outputs: int,
    grids: int,
    device: Device,
    table: TableDtype,
    deterministic: bool,
    constant: bool,
    workspace: int,
    strided: bool,
) -> Layer:
    shape = LayerShape(inputs, outputs, grids, 1)
    return Layer(operation, shape, device, table, deterministic, constant, workspace, strided)
