"""Networks for processes without this package, and without Python: one library beside an AOTInductor package.

A deployed layer holds the forms of its table that kernels read, as buffers, and calls an operator that the
library defines. An exported program then has these forms as constants, in place of the table: nothing has to
be arranged where it runs, and nothing can be out of date there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from lmkan_gen import device as devices
from lmkan_gen import dispatch
from lmkan_gen.chains import interceptions
from lmkan_gen.convolution import by_images, patches
from lmkan_gen.dtensor import is_dtensor
from lmkan_gen.launch.native import DEPLOYED
from lmkan_gen.layer import LMKAN2DLayer
from lmkan_gen.layout import BatchLastModule
from lmkan_gen.nn.conv import LMKANConv2d
from lmkan_gen.nn.layers import lmkan_layers
from lmkan_gen.ops import HALVES, autocasts
from lmkan_gen.packing import RoundedTable

if TYPE_CHECKING:  # it takes long to import, and most programs deploy nothing
    from lmkan_gen.launch.deployed import LayerKind

#: of torch, whose stable ABI has what libraries are built on
_LEAST_RELEASE = "2.10"
#: operators that torch has been told about
_known: set[str] = set()


def deploy(network: nn.Module, library: str | PathLike[str], batches: Iterable[int]) -> nn.Module:
    """Build one file that serves a network's lmKAN layers without Python, and the network that calls it.

    The file is a shared library with a launcher, kernels for the device where the network is, and plans. Load
    it with ``torch.ops.load_library`` or ``dlopen`` before the package that torch makes of what is returned:

    .. code-block:: python

        deployed = lmkan_gen.deploy(network, "network.so", batches=range(1, 1025))
        program = torch.export.export(deployed, (example,), dynamic_shapes=({0: Dim("batch")},))
        torch._inductor.aoti_compile_and_package(program, package_path="network.pt2")

    Each prepared batch runs as it would here: kernels are chosen by the tuning files of this machine. Any
    other batch is filled up to the next one that was prepared, and one longer than all is worked on in parts;
    outputs then are the same to the rounding of float32. Whether kernels add in a fixed order is what
    ``torch.use_deterministic_algorithms`` says now.

    Args:
        network: a module with lmKAN layers, all on one device. Frozen tables keep their type; others count as
            frozen to the type that they have. It is left as it is.
        library: the file to write, replaced if it is there.
        batches: numbers of samples to prepare for, as layers see them; an `LMKANConv2d` makes one of each
            patch. What a range costs is the kernels that are best for parts of it, not its length.

    Returns:
        A copy of the network in evaluation mode, for inference. It shares no memory with the tables of
        ``network`` and calls the library, which this process has loaded.

    Raises:
        ValueError: ``batches`` is empty or holds one below 1; there are no lmKAN layers, or they are on
            several devices, on none that kernels are made for, in float64, or DTensors; or one has hooks.
        TypeError: ``batches`` holds something else than integers.
        RuntimeError: torch is older than 2.10.
        lmkan_gen.toolchain.ToolchainError: a kernel or the library cannot be compiled.
        OSError: the file cannot be written.
    """
    from lmkan_gen.launch.deployed import LayerKind, Library

    if TorchVersion(torch.__version__) < _LEAST_RELEASE:
        raise RuntimeError(f"deploying needs torch {_LEAST_RELEASE} or newer, this is {torch.__version__}")
    wanted = _checked(batches)
    tables = {layer: _table(name, layer) for name, layer in lmkan_layers(network).items()}
    if not tables:
        raise ValueError(f"{type(network).__name__} holds no LMKAN2DLayer to deploy")
    kinds = {
        layer: LayerKind(layer.input_dim, layer.output_dim, layer.num_grids, table.dtype)
        for layer, table in tables.items()
    }
    listed = list(dict.fromkeys(kinds.values()))
    made = Library(
        listed,
        wanted,
        devices.of(_device(tables.values())),
        torch.are_deterministic_algorithms_enabled(),
        dispatch.workspace_limit(),
    )
    path = Path(library).absolute()
    made.save(path)
    _load(path, made.name, listed)
    replaced: dict[int, nn.Module] = {
        id(layer): DeployedLayer(layer, tables[layer], made.forms[kind], made.name, listed.index(kind))
        for layer, kind in kinds.items()
    }
    for module in network.modules():
        if isinstance(module, LMKANConv2d):
            replaced[id(module)] = DeployedConv2d(module, replaced[id(module.layer)])
    # deepcopy takes these for copies made already
    return copy.deepcopy(network, replaced).eval()


class DeployedLayer(BatchLastModule):
    """An `LMKAN2DLayer` for inference that calls a deployed library. Made by `deploy`.

    Attributes:
        borders: buffer ``[num_grids+1]``, the knots.
        form_0: buffer, and so on: the table, in the forms that kernels read.
    """

    def __init__(
        self, layer: LMKAN2DLayer, table: RoundedTable, forms: Iterable[str], operator: str, number: int
    ) -> None:
        from lmkan_gen.launch.deployed import arranged

        super().__init__(layer.input_dim, layer.batch_first)
        self.output_dim = layer.output_dim
        self._operator = operator
        self._number = number
        self.register_buffer("borders", layer.borders.detach().to(torch.float32, copy=True))
        self._names = []
        for i, form in enumerate(arranged(table, list(forms))):
            self._names.append(f"form_{i}")
            self.register_buffer(self._names[-1], form)

    def batch_last(self, x: Tensor) -> Tensor:
        """``[input_dim, batch]`` -> ``[output_dim, batch]``, of any float dtype but float64."""
        wanted = torch.float32 if autocasts(x) else x.dtype
        forms = [getattr(self, name) for name in self._names]
        operator = getattr(getattr(torch.ops, DEPLOYED), self._operator).default
        y: Tensor = operator(x.float() if x.dtype in HALVES else x, self.borders, forms, self._number)
        return y if y.dtype == wanted else y.to(wanted)


class DeployedConv2d(nn.Module):
    """An `LMKANConv2d` for inference that calls a deployed library, for all patches at once."""

    def __init__(self, convolution: LMKANConv2d, layer: nn.Module) -> None:
        super().__init__()
        self._geometry = convolution._geometry
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, channels, height, width]`` -> ``[batch, outputs, rows, columns]``."""
        return by_images(self.layer(patches(x, self._geometry)), x, self._geometry)


def _checked(batches: Iterable[int]) -> list[int]:
    wanted = sorted(set(batches))
    if not wanted:
        raise ValueError(
            "batches is empty; name the numbers of samples to prepare for, such as range(1, 1025)"
        )
    for batch in wanted:
        if isinstance(batch, bool) or not isinstance(batch, int):
            raise TypeError(f"batches must hold integers, got {batch!r}")
    if wanted[0] < 1:
        raise ValueError(f"batches holds {wanted[0]}; the least is 1, and empty batches need no preparation")
    return wanted


def _table(name: str, layer: LMKAN2DLayer) -> RoundedTable:
    """The table of a layer, as it is."""
    if kinds := interceptions(layer):
        raise ValueError(
            f"layer {name!r} has {' and '.join(kinds)}, which a deployed one would not have: remove them"
        )
    table = RoundedTable(layer.func_parameter.detach()) if layer.frozen is None else layer.frozen.table
    if table.values.dtype == torch.float64:
        raise ValueError(
            f"layer {name!r} is float64, which no kernel computes in; call float() on the network"
        )
    if is_dtensor(table.values):
        raise ValueError(f"the table of layer {name!r} is a DTensor; deploy a network of whole tables")
    layer.check_grid()
    scales = None if table.scales is None else table.scales.contiguous()
    return RoundedTable(table.values.contiguous(), scales)


def _device(tables: Iterable[RoundedTable]) -> torch.device:
    found = {table.values.device for table in tables}
    if len(found) > 1:
        names = ", ".join(sorted(map(str, found)))
        raise ValueError(f"the network's lmKAN layers are on {names}; move them to one device to deploy them")
    return found.pop()


def _load(path: Path, name: str, kinds: list[LayerKind]) -> None:
    """Load a library, and tell torch what it does not know of operators that C++ defines."""
    torch.ops.load_library(path)
    if name in _known:
        return

    def fake(x: Tensor, borders: Tensor, forms: list[Tensor], number: int) -> Tensor:
        kind = kinds[number]
        if x.dim() != 2 or x.shape[0] != kind.inputs or x.dtype != torch.float32:
            raise ValueError(f"x must be float32 [{kind.inputs}, batch], got {list(x.shape)} of {x.dtype}")
        return x.new_empty((kind.outputs, x.shape[1]))

    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError("deployed networks are for inference and have no derivatives; use the original")

    torch.library.register_fake(f"{DEPLOYED}::{name}", fake)
    torch.library.register_autograd(f"{DEPLOYED}::{name}", backward)
    _known.add(name)
