"""Styles for `torch.distributed.tensor.parallel.parallelize_module`: one layer over several processes.

``ColwiseParallel`` and ``RowwiseParallel`` do for `LMKAN2DLayer` and `LMKANLinear` what torch's styles of
these names do for `nn.Linear`: the first divides outputs, the second inputs. One after the other need no
communication in between::

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module
    from lmkan_gen.nn import LMKANLinear
    from lmkan_gen.parallel import ColwiseParallel, RowwiseParallel

    network = nn.Sequential(LMKANLinear(64, 256), LMKANLinear(256, 64))
    mesh = init_device_mesh("cuda", (8,))
    parallelize_module(network, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})

Tables become DTensors; optimisers, `torch.distributed.checkpoint` and `reset_parameters` work on them. The
state dict of a layer holds the same names and shapes as before. A frozen layer is refused; one that has been
made parallel can be frozen.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ParallelStyle

from lmkan_gen.layer import LMKAN2DLayer
from lmkan_gen.nn import LMKANLinear, ReLUFirst, ReLULast
from lmkan_gen.sharding import divides_pairs, leaves_none_empty  # registers how operators are sharded

__all__ = ["ColwiseParallel", "RowwiseParallel"]


class _Style(ParallelStyle):
    """What both styles have in common.

    Attributes:
        table_dim: the axis of ``func_parameter`` that is sharded.
    """

    table_dim: int

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        self.input_layouts = input_layouts
        self.output_layouts = output_layouts
        self.use_local_output = use_local_output

    def layouts(self, features: Shard) -> tuple[Placement, Placement]:
        """Placements of inputs as the layer computes with them, and of outputs unless told otherwise."""
        raise NotImplementedError

    def check(self, layer: LMKAN2DLayer, processes: int) -> None:
        """Refuse a layer of sizes that cannot be divided."""
        raise NotImplementedError

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        name = type(self).__name__
        if not isinstance(module, LMKAN2DLayer | LMKANLinear) or isinstance(module, ReLUFirst | ReLULast):
            raise NotImplementedError(
                f"{name} takes LMKAN2DLayer and LMKANLinear, got {type(module).__name__}; of other modules, "
                "name the layers inside"
            )
        if device_mesh.ndim != 1:
            raise ValueError(
                f"{name} takes a mesh of one dimension, got {device_mesh.ndim}; pass one of them, such as "
                "mesh['tp']"
            )
        layer = module.layer if isinstance(module, LMKANLinear) else module
        assert isinstance(layer, LMKAN2DLayer)
        if layer.frozen is not None:
            raise ValueError(f"{name} takes no frozen layer; call unfreeze(), and freeze() afterwards")
        if "func_parameter" not in layer._parameters:
            raise ValueError(f"{name} takes no layer whose func_parameter is parametrized")
        self.check(layer, device_mesh.size())
        features = Shard(-1 if module.batch_first else 0)
        wanted, given = self.layouts(features)
        # torch declares both hooks to return nothing, but takes what they return
        before: Any = partial(_distribute_input, self.input_layouts or wanted, wanted)
        after: Any = partial(_place_output, self.output_layouts or given, self.use_local_output)
        return distribute_module(module, device_mesh, self._partition, before, after)

    def _partition(self, _: str, module: nn.Module, mesh: DeviceMesh) -> None:
        if not isinstance(module, LMKAN2DLayer):
            return
        table = module.func_parameter
        shards = distribute_tensor(
            table, mesh, [Shard(self.table_dim)], src_data_rank=getattr(self, "src_data_rank", 0)
        )
        module.func_parameter = nn.Parameter(shards, requires_grad=table.requires_grad)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(input_layouts={self.input_layouts}, "
            f"output_layouts={self.output_layouts}, use_local_output={self.use_local_output})"
        )


class ColwiseParallel(_Style):
    """Divide the outputs of a layer: every process reads all inputs and has the functions of its outputs.

    Outputs need not divide evenly; every process must have one.

    Keyword Args:
        input_layouts: placement of inputs that are ordinary tensors; replicated by default.
        output_layouts: placement of outputs; sharded along the features by default.
        use_local_output: return the process's part as an ordinary tensor rather than a `DTensor`.

    Raises:
        NotImplementedError: by ``parallelize_module``, for other modules than `LMKAN2DLayer` and
            `LMKANLinear`.
        ValueError: by ``parallelize_module``, if a process would have no outputs, the layer is frozen or
            parametrized, or the mesh has several dimensions.
    """

    table_dim = 2

    def layouts(self, features: Shard) -> tuple[Placement, Placement]:
        """Inputs replicated, outputs sharded."""
        return Replicate(), features

    def check(self, layer: LMKAN2DLayer, processes: int) -> None:
        """Refuse numbers of outputs that leave a process without one."""
        if not leaves_none_empty(layer.output_dim, processes):
            raise ValueError(
                f"output_dim is {layer.output_dim}; cut for {processes} processes by ColwiseParallel, "
                f"{-(-layer.output_dim // processes)} for each leave none for the last: multiples of "
                f"{processes} work"
            )


class RowwiseParallel(_Style):
    """Divide the inputs of a layer: outputs are sums over processes, each of the functions of its pairs.

    Every process has to have equally many whole pairs of inputs.

    Keyword Args:
        input_layouts: placement of inputs that are ordinary tensors; sharded along the features by default.
        output_layouts: placement of outputs; replicated by default.
        use_local_output: return an ordinary tensor rather than a `DTensor`.

    Raises:
        NotImplementedError: by ``parallelize_module``, for other modules than `LMKAN2DLayer` and
            `LMKANLinear`.
        ValueError: by ``parallelize_module``, if ``input_dim`` is no multiple of twice the number of
            processes, the layer is frozen or parametrized, or the mesh has several dimensions.
    """

    table_dim = 3

    def layouts(self, features: Shard) -> tuple[Placement, Placement]:
        """Inputs sharded, outputs replicated."""
        return features, Replicate()

    def check(self, layer: LMKAN2DLayer, processes: int) -> None:
        """Refuse pairs that would have to be cut, or shared unevenly."""
        if not divides_pairs(layer.input_dim, layer.func_parameter.shape[3], processes):
            raise ValueError(
                f"input_dim is {layer.input_dim}; RowwiseParallel over {processes} processes needs whole "
                f"pairs of inputs, as many for each: a multiple of {2 * processes}"
            )


def _distribute_input(
    given: Placement, wanted: Placement, module: nn.Module, inputs: tuple[Tensor, ...], mesh: DeviceMesh
) -> DTensor:
    x = inputs[0]
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, mesh, [given], run_check=False)
    return x.redistribute(placements=[wanted])


def _place_output(
    wanted: Placement, use_local: bool, module: nn.Module, output: DTensor, mesh: DeviceMesh
) -> Tensor:
    y = output.redistribute(placements=[wanted])
    return y.to_local() if use_local else y
