"""What families hand to the launchers: plain data, no device code, no tensors.

A `KernelSpec` says which source to render and for which architecture; it never depends on the
batch, so one binary serves all batches. A `LaunchPlan` says which kernels of that binary to start,
in which order, on which buffers; it does depend on the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

Constant = int | str


@dataclass(frozen=True)
class KernelSpec:
    """One rendered source file: template, its constants, and the architecture to compile for.

    ``constants`` holds integers and names out of closed sets only (see `Family.space`); codegen
    refuses anything else, so nothing unvalidated can reach generated source.
    """

    template: str
    """File name under ``templates/``, e.g. ``tile_stationary.cu.j2``."""
    arch: str
    """``sm_90``, ... for CUDA; ``x86-64-v3``, ... for CPU (see `lmkan_gen.device`)."""
    constants: tuple[tuple[str, Constant], ...]

    @classmethod
    def make(cls, template: str, arch: str, constants: Mapping[str, Constant]) -> KernelSpec:
        """Build a spec with its constants in a canonical order."""
        return cls(template, arch, tuple(sorted(constants.items())))

    @property
    def context(self) -> Mapping[str, Constant]:
        """The constants as a read-only mapping, the template's whole input."""
        return MappingProxyType(dict(self.constants))

    @property
    def is_cuda(self) -> bool:
        """Whether the source is CUDA device code (else C++)."""
        return self.template.endswith(".cu.j2")


@dataclass(frozen=True)
class Workspace:
    """Scratch memory for the duration of one plan; contents undefined at the start."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Fill:
    """Set a whole named buffer to zero bytes."""

    buffer: str


@dataclass(frozen=True)
class Stride:
    """How many elements a buffer's neighbours along ``axis`` are apart, known at the call."""

    buffer: str
    axis: int


def strides(buffer: str) -> tuple[Stride, Stride]:
    """Both strides of a buffer of two axes."""
    return Stride(buffer, 0), Stride(buffer, 1)


@dataclass(frozen=True)
class TensorMap:
    """A buffer of 32-bit words as hardware copies boxes out of it, passed by value (sm_90 and newer).

    ``sizes`` are its dimensions and ``box`` is what one copy takes of them, both with the innermost first;
    there are no gaps between rows.
    """

    buffer: str
    sizes: tuple[int, ...]
    box: tuple[int, ...]


#: of a launch: a buffer's name, a number, a stride, or how a buffer lies
Argument = str | int | Stride | TensorMap


@dataclass(frozen=True)
class Launch:
    """Start one kernel (CUDA) or call one function (CPU).

    ``arguments``: a string names a buffer, passed as its address; integers and strides are passed as
    signed 64-bit integers, tensor maps by value. ``grid``, ``block`` and ``shared_memory`` (bytes) are for
    CUDA only.
    """

    kernel: str
    arguments: tuple[Argument, ...]
    grid: tuple[int, int, int] = (1, 1, 1)
    block: int = 1
    shared_memory: int = 0


@dataclass(frozen=True)
class LaunchPlan:
    """Workspace and steps of one operation call.

    Buffer names a plan may use without declaring them: ``x`` ``[I, B]``, ``table``
    ``[G+1, G+1, O, ceil(I/2)]``, ``borders`` ``[G+1]``; for gradients ``grad`` ``[O, B]``; outputs ``y``,
    ``grad_x``, ``grad_table``. The Hessian regulariser has ``table`` and ``borders``, and the output
    ``value`` ``[]``, or for its gradient ``scale`` ``[]`` and the output ``grad_table``. All float32 and
    contiguous, except that a plan gets ``x``, ``grad`` and ``grad_x`` as they lie in memory if it asks for
    their strides (``grad_x`` without gaps in any case). Where tables are narrow also ``words`` and, for
    int8, ``scales``; where they do not change ``rows``, and names that `lmkan_gen.packing` makes: `Rows` (for
    int8 with ``row_scales``), `Stages`, and for int8 `Fragments` with ``fragment_scales``. Outputs arrive
    uninitialised: the plan must write every element.
    """

    workspaces: tuple[Workspace, ...]
    steps: tuple[Fill | Launch, ...]

    @cached_property
    def buffers(self) -> frozenset[str]:
        """Names of the buffers that steps are given, but for workspaces: what the caller has to have."""
        given = frozenset(a for a in self._arguments if isinstance(a, str))
        given |= {m.buffer for m in self.tensor_maps}
        return given - {workspace.name for workspace in self.workspaces}

    @cached_property
    def tensor_maps(self) -> frozenset[TensorMap]:
        """The tensor maps that steps are given."""
        return frozenset(a for a in self._arguments if isinstance(a, TensorMap))

    @cached_property
    def strides(self) -> frozenset[Stride]:
        """The strides that steps are given."""
        return frozenset(a for a in self._arguments if isinstance(a, Stride))

    @property
    def _arguments(self) -> Iterator[Argument]:
        return (a for step in self.steps if isinstance(step, Launch) for a in step.arguments)
