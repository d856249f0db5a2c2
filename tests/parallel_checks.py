"""What tables that are divided over processes compute, checked in each of them: run by `tests.test_parallel`.

Every check compares with the definition in `tests.truth`, or with a layer that is not divided. Float64 shows
that sums are complete; float32 goes through kernels.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module

from lmkan_gen import LMKAN2DLayer, hessian_regularization, knots, lmkan
from lmkan_gen.frozen import frozen_lmkan
from lmkan_gen.nn import LMKANMLP, LMKANLinear, ReLUFirst, hessian_penalty
from lmkan_gen.packing import RoundedTable, round_table
from lmkan_gen.parallel import ColwiseParallel, RowwiseParallel
from lmkan_gen.problem import TableDtype
from tests import truth
from tests.processes import main

GRIDS, BATCH = 5, 12
WHOLE = Replicate()
X_PLACEMENTS = (WHOLE, Shard(0), Shard(1))
TABLE_PLACEMENTS = (WHOLE, Shard(0), Shard(2), Shard(3))
#: placements of x, table, grad, then of y and both gradients: what needs no communication
WAYS: dict[str, tuple[Placement, ...]] = {
    "outputs": (WHOLE, Shard(2), Shard(0), Shard(0), Partial(), Shard(2)),
    "pairs": (Shard(0), Shard(3), WHOLE, Partial(), Shard(0), Shard(3)),
    "samples": (Shard(1), WHOLE, Shard(1), Shard(1), Shard(1), Partial()),
}
Check = Callable[[DeviceMesh], None]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def tensors(
    mesh: DeviceMesh, inputs: int, outputs: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``x, table, borders, grad``; inputs are off the knots, where gradients jump."""
    borders = knots(GRIDS, dtype)
    x = truth.away_from_knots(torch.randn(inputs, BATCH).numpy(), borders.numpy())
    table = torch.randn(GRIDS + 1, GRIDS + 1, outputs, -(-inputs // 2), dtype=dtype)
    drawn = (torch.from_numpy(x).to(dtype), table, borders, torch.randn(outputs, BATCH, dtype=dtype))
    return tuple(t.to(mesh.device_type) for t in drawn)  # type: ignore[return-value]


def spread(mesh: DeviceMesh, tensor: Tensor, placement: Placement, leaf: bool = False) -> Any:
    return distribute_tensor(tensor, mesh, [placement]).detach().requires_grad_(leaf)


def whole(tensor: Any, detach: bool = True) -> Tensor:
    full: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach() if detach else full


def near(found: Any, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert found.shape == expected.shape, (
        found.shape,
        expected.shape,
    )  # of a DTensor: what it says of itself
    found = whole(found)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    assert found.dtype == expected.dtype, (found.dtype, expected.dtype)
    if expected.numel():
        error, largest = (t.detach().abs().max().item() for t in (found - expected, expected))
        assert error <= tolerance * largest, (error, largest)


def tolerance(dtype: torch.dtype) -> float:
    return 1e-12 if dtype == torch.float64 else 2e-6


def placed(*tensors: Any) -> list[Placement]:
    return [t.placements[0] for t in tensors]


@check
def every_placement_gives_the_definition(mesh: DeviceMesh) -> None:
    n = mesh.size()
    # pairs and outputs that divide evenly; that do not; so few outputs that a process would have none
    for inputs, outputs in ((4 * n, 2 * n), (4 * n + 2, 2 * n + 1), (4 * n - 1, n + n // 2)):
        for dtype in (torch.float64, torch.float32) if inputs == 4 * n else (torch.float64,):
            x, table, borders, grad = tensors(mesh, inputs, outputs, dtype)
            even = torch.cat([x, x.new_zeros(1, BATCH)]) if inputs % 2 else x
            right = truth.compute(*(t.cpu() for t in (even, table, borders, grad)))
            for of_x, of_table in itertools.product(X_PLACEMENTS, TABLE_PLACEMENTS):
                dx, dtable = spread(mesh, x, of_x, True), spread(mesh, table, of_table, True)
                y = lmkan(dx, dtable, borders)
                y.backward(spread(mesh, grad, WHOLE))
                results = (y, right.y), (dx.grad, right.grad_x[:inputs]), (dtable.grad, right.grad_table)
                for found, expected in results:
                    error = truth.relative_error(whole(found).cpu(), expected)
                    assert error <= tolerance(dtype), (inputs, outputs, of_x, of_table, error)


@check
def work_divides_without_communication(mesh: DeviceMesh) -> None:
    x, table, borders, grad = tensors(mesh, 4 * mesh.size(), 2 * mesh.size())
    for of_x, of_table, of_grad, *expected in WAYS.values():
        dx, dtable = spread(mesh, x, of_x, True), spread(mesh, table, of_table, True)
        dgrad = spread(mesh, grad, of_grad)
        with CommDebugMode() as communication:
            y = lmkan(dx, dtable, borders)
            y.backward(dgrad)
        assert communication.get_total_counts() == 0
        assert placed(y, dx.grad, dtable.grad) == expected


@check
def empty_outputs_are_empty_whatever_was_asked_before(mesh: DeviceMesh) -> None:
    x, table, borders, grad = tensors(mesh, 4 * mesh.size(), 2 * mesh.size())
    given = (grad, x, table, borders)
    v_x, v_table = torch.randn_like(x), torch.randn_like(table)
    divided = [spread(mesh, t, WHOLE) for t in given]
    dv_x, dv_table = spread(mesh, v_x, WHOLE), spread(mesh, v_table, WHOLE)
    options = (0, 0, False, "float32")
    first, second = (getattr(torch.ops.lmkan_gen, n).default for n in ("backward", "double_backward"))
    for needs in itertools.product((True, False), repeat=2):
        for found, expected in zip(
            first(*divided, *needs, *options), first(*given, *needs, *options), strict=True
        ):
            near(found, expected)
    for needs in itertools.product((True, False), repeat=3):
        for along in ((v_x, v_table), (v_x, None)):
            dalong = (dv_x, None if along[1] is None else dv_table)
            for found, expected in zip(
                second(*dalong, *divided, *needs), second(*along, *given, *needs), strict=True
            ):
                near(found, expected)


@check
def derivatives_of_derivatives(mesh: DeviceMesh) -> None:
    x, table, borders, grad = tensors(mesh, 4 * mesh.size(), 2 * mesh.size())

    def penalties(x: Tensor, table: Tensor, grad: Tensor) -> list[Tensor]:
        found: list[Tensor | None] = []
        for of in ([x], [table], [x, table]):
            y = lmkan(x, table, borders)
            slopes = torch.autograd.grad((y * grad).sum(), of, create_graph=True)
            penalty = torch.stack([(slope**2).sum() for slope in slopes]).sum()
            found += torch.autograd.grad(penalty, [x, grad, table], allow_unused=True)
        return [torch.empty(0) if t is None else t for t in found]

    expected = penalties(*(t.clone().requires_grad_() for t in (x, table, grad)))
    for of_x, of_table, of_grad, *_ in WAYS.values():
        leaves = [spread(mesh, t, p, True) for t, p in ((x, of_x), (table, of_table), (grad, of_grad))]
        for found, wanted in zip(penalties(*leaves), expected, strict=True):
            near(found, wanted)
    v_x = torch.randn_like(x)
    tangent = torch.ops.lmkan_gen.tangent.default
    wanted = tangent(v_x, x, table, borders)
    for of_x, of_table, _, of_y, *_ in WAYS.values():
        arguments = ((v_x, of_x), (x, of_x), (table, of_table), (borders, WHOLE))
        divided = [spread(mesh, t, p) for t, p in arguments]
        with CommDebugMode() as counts:
            along = tangent(*divided)
        assert counts.get_total_counts() == 0
        assert placed(along) == [of_y]
        near(along, wanted)


@check
def narrow_tables(mesh: DeviceMesh) -> None:
    n = mesh.size()
    x, table, borders, grad = tensors(mesh, 16 * n, 2 * n, torch.float32)
    scales_of = {"outputs": Shard(1), "pairs": Shard(0), "samples": WHOLE}
    for dtype, (way, (of_x, of_table, of_grad, of_y, of_grad_x, _)) in itertools.product(
        TableDtype, WAYS.items()
    ):
        rounded = round_table(table, dtype)
        scales = None if rounded.scales is None else spread(mesh, rounded.scales, scales_of[way])
        divided = RoundedTable(spread(mesh, rounded.values, of_table), scales)
        derivatives = dtype is not TableDtype.INT8
        leaf, dleaf = x.clone().requires_grad_(derivatives), spread(mesh, x, of_x, derivatives)
        expected = frozen_lmkan(leaf, rounded.values, rounded.scales, borders)
        dgrad = spread(mesh, grad, of_grad)
        with CommDebugMode() as communication:
            found = frozen_lmkan(dleaf, divided.values, divided.scales, borders)
            if derivatives:
                found.backward(dgrad)
        assert communication.get_total_counts() == 0
        assert placed(found) == [of_y]
        near(found, expected, 2e-6)
        if derivatives:
            expected.backward(grad)
            assert placed(dleaf.grad) == [of_grad_x]
            near(dleaf.grad, leaf.grad, 2e-6)  # type: ignore[arg-type]
        # rounded for one call
        with torch.no_grad():
            near(lmkan(dleaf, spread(mesh, table, of_table), borders, table_dtype=dtype), expected, 2e-6)
    # groups of pairs that share a scale are not cut
    x, table, borders, _ = tensors(mesh, 4 * n, 2 * n, torch.float32)
    with torch.no_grad():
        found = lmkan(spread(mesh, x, Shard(0)), spread(mesh, table, Shard(3)), borders, table_dtype="int8")
        near(found, lmkan(x, table, borders, table_dtype="int8"), 2e-6)


@check
def regulariser(mesh: DeviceMesh) -> None:
    n = mesh.size()
    for pairs, outputs in ((2 * n, n), (2 * n + 1, n + 1)):
        table = torch.randn(GRIDS + 1, GRIDS + 1, outputs, pairs, dtype=torch.float64)
        value, gradient = truth.hessian(table, knots(GRIDS, torch.float64))
        for dtype, placement in itertools.product((torch.float64, torch.float32), TABLE_PLACEMENTS):
            leaf = spread(mesh, table.to(mesh.device_type, dtype), placement, True)
            found: Any = hessian_regularization(leaf, knots(GRIDS, dtype).to(mesh.device_type))
            (found * 3).backward()
            limit = 1e-12 if dtype == torch.float64 else 1e-5
            assert abs(whole(found).item() - value) <= limit * value
            assert leaf.grad is not None
            assert placed(leaf.grad) == [placement]
            assert truth.relative_error(whole(leaf.grad).cpu(), 3 * gradient) <= limit


@check
def regulariser_of_fully_sharded_tables(mesh: DeviceMesh) -> None:
    plain = pair_of_layers(mesh.device_type, torch.float64, mesh.size())
    sharded = copy.deepcopy(plain)
    for layer in (*sharded, sharded):
        fully_shard(layer, mesh=mesh)
    x = torch.randn(40, 6, dtype=torch.float64, device=mesh.device_type)
    for model in (plain, sharded):
        (model(x).square().mean() + 1e-3 * whole(hessian_penalty(model), detach=False)).backward()
    for found, expected in zip(sharded.parameters(), plain.parameters(), strict=True):
        near(found.grad, expected.grad)  # type: ignore[arg-type]


def layer_of(kind: str, inputs: int, outputs: int) -> LMKAN2DLayer | LMKANLinear:
    more: dict[str, Any] = {"init_scale": 1.0, "dtype": torch.float64}
    if kind == "linear":
        return LMKANLinear(inputs, outputs, GRIDS, **more)
    return LMKAN2DLayer(GRIDS, inputs, outputs, batch_first=kind == "batch first", **more)


def table_of(module: nn.Module) -> Any:
    return module.layer.func_parameter if isinstance(module, LMKANLinear) else module.func_parameter


@check
def styles_equal_the_whole_layer(mesh: DeviceMesh) -> None:
    n, rank = mesh.size(), mesh.get_rank()
    inputs, outputs = 4 * n, 2 * n + n // 2 * 2
    for kind, style in itertools.product(
        ("batch last", "batch first", "linear"), (ColwiseParallel, RowwiseParallel)
    ):
        features, samples = (0, 1) if kind == "batch last" else (1, 0)
        x = torch.randn((inputs, BATCH) if features == 0 else (BATCH, inputs), dtype=torch.float64)
        x = x.to(mesh.device_type)
        plain = layer_of(kind, inputs, outputs).to(mesh.device_type)
        expected = plain(leaf := x.clone().requires_grad_())
        weights = torch.randn_like(expected)
        (expected * weights).sum().backward()
        layouts = (None, WHOLE, Shard(features), Shard(samples))
        locally = itertools.cycle((True, False))
        for given, returned in itertools.product(layouts, layouts):
            local = next(locally) ^ (returned is None)
            if kind != "linear" and given is not returned:
                continue  # what follows is the same for all kinds
            parallel = copy.deepcopy(plain)
            parallel.zero_grad()
            options: dict[str, Any] = {
                "input_layouts": given,
                "output_layouts": returned,
                "use_local_output": local,
            }
            assert parallelize_module(parallel, mesh, style(**options)) is parallel
            assert table_of(parallel).to_local().numel() * n == table_of(plain).numel()
            column = style is ColwiseParallel
            of_x = given or (WHOLE if column else Shard(features))
            of_y = returned or (Shard(features) if column else WHOLE)
            mine = x.chunk(n, of_x.dim)[rank] if isinstance(of_x, Shard) else x
            mine = mine.clone().requires_grad_()
            y = parallel(mine)
            assert isinstance(y, DTensor) is not local
            if local:
                y = DTensor.from_local(y, mesh, [of_y])
            assert placed(y) == [of_y]
            near(y, expected)
            (y * spread(mesh, weights, WHOLE)).sum().backward()
            near(table_of(parallel).grad, table_of(plain).grad)
            assert mine.grad is not None
            assert leaf.grad is not None
            of_grad = of_x if isinstance(of_x, Shard) else WHOLE
            near(DTensor.from_local(mine.grad, mesh, [of_grad]), leaf.grad)


def pair_of_layers(device: str, dtype: torch.dtype, n: int) -> nn.Sequential:
    layers = (LMKANLinear(i, o, GRIDS, init_scale=1.0, dtype=dtype) for i, o in ((6, 4 * n), (4 * n, n)))
    return nn.Sequential(*layers).to(device)


BOTH: dict[str, Any] = {"0": ColwiseParallel(), "1": RowwiseParallel()}


@check
def one_after_the_other_communicate_once(mesh: DeviceMesh) -> None:
    model = pair_of_layers(mesh.device_type, torch.float32, mesh.size())
    parallelize_module(model, mesh, BOTH)
    with CommDebugMode() as communication:
        model(torch.randn(40, 6, device=mesh.device_type)).sum().backward()
    assert communication.get_total_counts() == 1


@check
def training_equals_that_of_the_whole(mesh: DeviceMesh) -> None:
    plain = pair_of_layers(mesh.device_type, torch.float64, mesh.size())
    parallel = copy.deepcopy(plain)
    parallelize_module(parallel, mesh, BOTH)
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (plain, parallel)]
    for _ in range(10):
        x = torch.randn(40, 6, dtype=torch.float64, device=mesh.device_type)
        losses = []
        for model, optimizer in zip((plain, parallel), optimizers, strict=True):
            loss = (model(x) - x[:, :1] * x[:, 1:2]).square().mean()
            penalty = hessian_penalty(model)
            optimizer.zero_grad()
            loss.backward()
            (1e-5 * penalty).backward()  # a DTensor of the parallel model, unlike its loss
            optimizer.step()
            losses.append(loss.detach())
        near(losses[1], losses[0], 1e-9)
    for found, expected in zip(parallel.parameters(), plain.parameters(), strict=True):
        near(found, expected, 1e-9)


@check
def autocast_equals_that_of_the_whole(mesh: DeviceMesh) -> None:
    plain = pair_of_layers(mesh.device_type, torch.float32, mesh.size())
    parallel = copy.deepcopy(plain)
    parallelize_module(parallel, mesh, BOTH)
    x = torch.randn(40, 6, device=mesh.device_type)
    for dtype in (torch.float16, torch.bfloat16):
        for model in (plain, parallel):
            model.zero_grad()
            with torch.autocast(mesh.device_type, dtype):
                y = model(x)
            y.square().mean().backward()
        for found, expected in zip(parallel.parameters(), plain.parameters(), strict=True):
            # a sum in another order may round to the neighbour in half precision
            near(found.grad, expected.grad, torch.finfo(dtype).eps / 8)  # type: ignore[arg-type]


@check
def compiled_models(mesh: DeviceMesh) -> None:
    plain = pair_of_layers(mesh.device_type, torch.float32, mesh.size())
    parallel = copy.deepcopy(plain)
    parallelize_module(parallel, mesh, BOTH)
    compiled = torch.compile(parallel, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(40, 6, device=mesh.device_type)
        (plain(x) ** 2).sum().backward()
        (compiled(x) ** 2).sum().backward()
        near(compiled(x), plain(x), 2e-6)
    for found, expected in zip(parallel.parameters(), plain.parameters(), strict=True):
        near(found.grad, expected.grad, 1e-5)  # type: ignore[arg-type]


@check
def frozen_layers(mesh: DeviceMesh) -> None:
    x = torch.randn(40, 6, device=mesh.device_type)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int8):
        plain = pair_of_layers(mesh.device_type, torch.float32, mesh.size()).eval()
        parallel = copy.deepcopy(plain)
        parallelize_module(parallel, mesh, BOTH)
        with torch.no_grad():
            before = parallel(x)
            for model in (plain, parallel):
                for layer in model:
                    layer.layer.freeze(dtype)  # type: ignore[union-attr, operator]
            near(parallel(x), plain(x), 2e-6)
            for layer in parallel:
                layer.layer.unfreeze()  # type: ignore[union-attr, operator]
            assert torch.equal(parallel(x), before)


@check
def states(mesh: DeviceMesh) -> None:
    n, device = mesh.size(), mesh.device_type
    plain = pair_of_layers(device, torch.float32, n)
    parallel = parallelize_module(pair_of_layers(device, torch.float32, n), mesh, BOTH)
    shapes = {name: t.shape for name, t in plain.state_dict().items()}
    assert {name: t.shape for name, t in parallel.state_dict().items()} == shapes
    set_model_state_dict(parallel, plain.state_dict(), options=StateDictOptions(full_state_dict=True))
    full = get_model_state_dict(parallel, options=StateDictOptions(full_state_dict=True))
    for name, tensor in plain.state_dict().items():
        found: Any = full[name]
        assert torch.equal(found, tensor), name
    files = tempfile.TemporaryDirectory()  # that of the first process is used
    directory = [files.name]
    dist.broadcast_object_list(directory)
    save(parallel.state_dict(), checkpoint_id=directory[0])
    # the same table in other parts, and in one
    other = pair_of_layers(device, torch.float32, n)
    parallelize_module(other, mesh, {"0": ColwiseParallel(), "1": ColwiseParallel()})
    alone = pair_of_layers(device, torch.float32, n)
    for model in (other, alone):
        load(model.state_dict(), checkpoint_id=directory[0])
        for name, tensor in plain.state_dict().items():
            assert torch.equal(whole(model.state_dict()[name]), tensor), name
    dist.barrier()  # then the directory goes


@check
def drawn_anew(mesh: DeviceMesh) -> None:
    n = mesh.size()
    for style in (ColwiseParallel, RowwiseParallel):
        layer = LMKANLinear(4 * n, 4 * n, GRIDS, device=mesh.device_type)
        parallelize_module(layer, mesh, style())
        torch.manual_seed(3)  # equal seeds must not make shards equal
        layer.layer.reset_parameters()
        table = whole(layer.layer.func_parameter)
        shards = table.chunk(n, style.table_dim)
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(shards, 2))
        bound = 0.1 / (4 * n) ** 0.5
        assert 0.98 * bound < table.abs().max() <= bound
        assert abs(table.std() / bound * 3**0.5 - 1) < 0.1
        seen = [torch.empty_like(table) for _ in range(n)]
        dist.all_gather(seen, table)
        assert all(torch.equal(t, table) for t in seen)


@check
def grids(mesh: DeviceMesh) -> None:
    device = mesh.device_type
    layer = LMKANLinear(4 * mesh.size(), 4, GRIDS, device=device)
    parallelize_module(layer, mesh, RowwiseParallel(input_layouts=WHOLE))
    exact, x = knots(GRIDS).to(device), torch.randn(BATCH, layer.input_dim, device=device)
    borders: Any = layer.layer.borders
    assert placed(borders) == [WHOLE]
    with torch.no_grad():
        borders[2] += 0.5
    with pytest.raises(ValueError, match="not the static percentile grid of 5 cells"):
        layer(x)
    layer.layer.reset_parameters()
    layer(x)
    layer.layer.borders = spread(mesh, exact.bfloat16(), WHOLE)  # rounded only
    layer(x)
    assert isinstance(layer.layer.borders, DTensor)
    assert torch.equal(whole(layer.layer.borders), exact)
    layer.double()
    assert torch.equal(whole(layer.layer.borders), exact.double())
    near(layer(x.double()), layer(x.double()))


@check
def refusals(mesh: DeviceMesh) -> None:
    n = mesh.size()
    row, column = RowwiseParallel(), ColwiseParallel()

    def refused(kind: type[Exception], pattern: str, module: nn.Module, style: Any) -> None:
        with pytest.raises(kind, match=pattern):
            parallelize_module(module, mesh, style)

    refused(ValueError, rf"input_dim is {4 * n + 2}; .*a multiple of {2 * n}", LMKANLinear(4 * n + 2, 4), row)
    refused(ValueError, f"input_dim is {2 * n - 1}", LMKAN2DLayer(GRIDS, 2 * n - 1, 4), row)
    refused(ValueError, "output_dim is 1; .*none for the last", LMKANLinear(4, 1), column)
    refused(NotImplementedError, "got ReLUFirst", ReLUFirst(4 * n, 4 * n), column)
    refused(NotImplementedError, "got Linear", nn.Linear(4, 4), row)
    frozen = LMKANLinear(4 * n, 4 * n).eval()
    frozen.layer.freeze(torch.float16)
    refused(ValueError, r"frozen layer; call unfreeze\(\)", frozen, column)
    halved = LMKAN2DLayer(GRIDS, 4 * n, 4 * n)
    nn.utils.parametrize.register_parametrization(halved, "func_parameter", nn.Identity())
    refused(ValueError, "parametrized", halved, column)


@check
def together_with_fully_shard(mesh: DeviceMesh) -> None:
    """Tables divided over one axis of a mesh, and those parts over the other, which splits the batch."""
    n = mesh.size()
    both = init_device_mesh(mesh.device_type, (2, n // 2), mesh_dim_names=("dp", "tp"))
    # a mesh of one process per axis has nothing to divide
    plain = pair_of_layers(mesh.device_type, torch.float64, n)
    parallel = copy.deepcopy(plain)
    parallelize_module(parallel, both["tp"], BOTH)
    for layer in parallel:
        fully_shard(layer, mesh=both["dp"])
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (plain, parallel)]
    for _ in range(4):
        x = torch.randn(40, 6, dtype=torch.float64, device=mesh.device_type)
        mine = x.chunk(2)[both["dp"].get_local_rank()]
        for model, optimizer, batch in zip((plain, parallel), optimizers, (x, mine), strict=True):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
    for found, expected in zip(parallel.parameters(), plain.parameters(), strict=True):
        near(found, expected, 1e-9)
    torch.manual_seed(3)
    for layer in parallel:
        layer.layer.reset_parameters()  # type: ignore[union-attr, operator]
        table = whole(layer.layer.func_parameter)  # type: ignore[union-attr]
        assert table.unique().numel() == table.numel()  # no part is the copy of another


@check
def a_whole_network(mesh: DeviceMesh) -> None:
    """Batch norm between the layers wants all features: layouts of `LMKANMLP`, which has the batch last."""
    n = mesh.size()
    plain = LMKANMLP((6, 4 * n, 3), GRIDS, dtype=torch.float64).to(mesh.device_type)
    parallel = copy.deepcopy(plain)
    plan: dict[str, Any] = {
        "blocks.0.lmkan": ColwiseParallel(output_layouts=WHOLE),
        "blocks.1.lmkan": RowwiseParallel(input_layouts=WHOLE),
    }
    parallelize_module(parallel, mesh, plan)
    x = torch.randn(40, 6, dtype=torch.float64, device=mesh.device_type)
    for model in (plain, parallel):
        model(x).square().mean().backward()
    for found, expected in zip(parallel.parameters(), plain.parameters(), strict=True):
        near(found.grad, expected.grad)  # type: ignore[arg-type]


def work(rank: int, world: int, device: str, settings: dict[str, Any]) -> dict[str, str]:
    """Checks by name with their errors, empty if they hold; after an error the rest are left out."""
    mesh = init_device_mesh(device, (world,))
    report: dict[str, str] = {}
    for name in settings["checks"]:
        torch.manual_seed(settings["seed"])
        try:
            CHECKS[name](mesh)
            report[name] = ""
        except (Exception, pytest.fail.Exception):
            report[name] = f"rank {rank}: {traceback.format_exc()}"
            break  # others may be waiting for what this process was about to send
    return report


if __name__ == "__main__":
    main(work)
