"""Any width, any layout: kernels read inputs as they lie, and no input is copied on the way to them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from lmkan_gen import LMKAN2DLayer, dispatch, lmkan, ops, reference, selection, toolchain
from lmkan_gen import device as devices
from lmkan_gen.families import Family, families, family, walk
from lmkan_gen.frozen import frozen_lmkan
from lmkan_gen.launch import cpu
from lmkan_gen.nn import LMKANMLP, LMKANLinear
from lmkan_gen.packing import round_table
from lmkan_gen.plan import Constant
from lmkan_gen.problem import CALL_OPERATIONS, DEFAULT_WORKSPACE, LayerShape, Operation, Problem, TableDtype
from lmkan_gen.tuner.verify import make_inputs
from tests import emulation, layouts
from tests.emulation import CLUSTERED, OUTER, PRODUCT, SLOPES, STREAMED

CPU = torch.device("cpu")
FLOAT32, INT8 = TableDtype.FLOAT32, TableDtype.INT8
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
DEVICES = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", id="cuda", marks=[pytest.mark.gpu, needs_gpu]),
]

# --- kernels --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulation")


TILES: dict[str, Constant] = {
    "pairs": 4,
    "outs": 8,
    "threads": 64,
    "ahead": 2,
    "ranges": "even",
    "access": "aligned",
}
WIDE: dict[str, Constant] = {**TILES, "pairs": 32}
FUSED: dict[str, Constant] = {"pairs": 2, "outs": 4, "threads": 128, "mode": "normal"}
SORTED: dict[str, Constant] = {"items": 1, "segment": 32, "vector": 1, "unroll": 2, "blocks": 2}
#: forward, with a pre-pass
AHEAD: dict[str, Constant] = {**STREAMED, "coordinates": "prepass", "ahead": 2}
#: rows of half as many words as there are banks, read two at a time
HALVES: dict[str, Constant] = {**STREAMED, "pairs": 2, "vector": 2, "stages": 3}
#: without a pre-pass
WITHOUT: dict[str, Constant] = {**STREAMED, "ahead": 4, "coordinates": "inline"}
ROWS: dict[str, Constant] = {"warps": 2, "vector": 1, "unroll": 2}
#: so few multiprocessors that each block has several items of work, and pieces of others
STREAMING = replace(devices.target("sm_90"), multiprocessors=3)
#: family, operation, table, parameters; inputs, outputs, batch
EMULATED: list[tuple[str, Operation, TableDtype, dict[str, Constant], tuple[int, int, int]]] = [
    ("tile_stationary", Operation.FORWARD, FLOAT32, {**TILES, "coordinates": "prepass"}, (11, 9, 75)),
    ("tile_stationary", Operation.FORWARD, FLOAT32, {**WIDE, "coordinates": "prepass"}, (66, 4, 33)),
    ("tile_stationary", Operation.FORWARD, FLOAT32, {**TILES, "coordinates": "inline"}, (11, 9, 75)),
    ("tile_stationary", Operation.FORWARD, INT8, {**TILES, "coordinates": "prepass"}, (11, 9, 75)),
    ("tile_stationary", Operation.GRAD_INPUT, FLOAT32, {**TILES, "coordinates": "prepass"}, (11, 9, 75)),
    ("tile_stationary", Operation.BACKWARD, FLOAT32, FUSED, (7, 5, 75)),
    ("output_stationary", Operation.FORWARD, FLOAT32, AHEAD, (19, 11, 333)),
    ("output_stationary", Operation.FORWARD, INT8, {**AHEAD, "ahead": 4}, (19, 11, 333)),
    ("output_stationary", Operation.FORWARD, FLOAT32, WITHOUT, (19, 11, 333)),
    ("output_stationary", Operation.GRAD_INPUT, FLOAT32, STREAMED, (19, 11, 333)),
    ("output_stationary", Operation.FORWARD, FLOAT32, {**AHEAD, **HALVES, "ahead": 2}, (19, 11, 700)),
    ("output_stationary", Operation.FORWARD, INT8, {**AHEAD, "ahead": 4, "vector": 4}, (19, 11, 700)),
    ("output_stationary", Operation.GRAD_INPUT, FLOAT32, {**HALVES, "ahead": 2}, (19, 11, 700)),
    ("cluster_stationary", Operation.FORWARD, FLOAT32, CLUSTERED, (35, 9, 300)),
    ("cluster_stationary", Operation.GRAD_INPUT, FLOAT32, CLUSTERED, (9, 35, 300)),
    ("cell_sorted", Operation.BACKWARD, FLOAT32, SORTED, (7, 5, 75)),
    ("cell_sorted", Operation.GRAD_INPUT, FLOAT32, SORTED, (4, 260, 40)),  # outputs of two blocks
    ("cell_sorted", Operation.GRAD_TABLE, FLOAT32, SORTED, (3, 4, 1030)),  # two slabs
    ("matrix_product", Operation.FORWARD, FLOAT32, PRODUCT, (35, 9, 35)),
    ("matrix_product", Operation.FORWARD, TableDtype.FLOAT16, PRODUCT, (35, 9, 35)),
    ("matrix_product", Operation.FORWARD, INT8, {**PRODUCT, "tiles": 2}, (35, 9, 35)),
    ("matrix_product", Operation.GRAD_INPUT, FLOAT32, SLOPES, (35, 9, 35)),
    ("matrix_product", Operation.GRAD_TABLE, FLOAT32, OUTER, (35, 9, 35)),
    ("row_gather", Operation.FORWARD, FLOAT32, {**ROWS, "slice": 16}, (35, 9, 5)),
    ("row_gather", Operation.GRAD_INPUT, FLOAT32, ROWS, (7, 70, 5)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "operation", "table", "parameters", "sizes"),
    EMULATED,
    ids=[
        f"{e[0]}-{e[1]}-{e[2]}-{e[4][0]}-{e[3].get('coordinates', '')}-{e[3].get('vector', '')}"
        for e in EMULATED
    ],
)
def test_cuda_kernel_in_emulation(
    directory: Path,
    name: str,
    operation: Operation,
    table: TableDtype,
    parameters: dict[str, Constant],
    sizes: tuple[int, int, int],
) -> None:
    kind, (inputs, outputs, batch) = family(name), sizes
    # threads are slow: the largest launches get one layout
    few = name == "cell_sorted" or outputs == 4
    chosen = ("batch_first",) if few else layouts.LAYOUTS
    # the fixed order of sorted gradients has a sort of its own
    fixed = (False, True) if name == "cell_sorted" and outputs < 100 else (False,)
    # tables that change are arranged by a kernel
    constants = (True, False) if name == "output_stationary" and operation is Operation.FORWARD else (True,)
    for layout, deterministic, constant in product(chosen, fixed, constants):
        problem = Problem(
            operation,
            LayerShape(inputs, outputs, 4, batch),
            STREAMING if name in ("output_stationary", "cluster_stationary") else devices.target("sm_80"),
            table,
            deterministic=deterministic,
            constant=constant,
            # 1: as many slabs as possible; partial sums of products have no smaller form
            workspace=DEFAULT_WORKSPACE if deterministic or name == "matrix_product" else 1,
            strided=layout != "batch_last",
        )
        run = emulation.prepare(kind, problem, parameters, directory)
        layouts.check(problem, layout, run, kind.plan(problem, parameters), CPU)


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize(
    ("kind", "operation"),
    [
        pytest.param(kind, operation, id=f"{kind.name}-{operation}")
        for operation in (Operation.FORWARD, Operation.GRAD_INPUT, Operation.GRAD_TABLE)
        for kind in families("cpu", operation)
    ],
)
def test_cpu_kernel(kind: Family, operation: Operation, layout: str) -> None:
    for inputs, outputs, batch in ((1, 1, 1), (7, 5, 40), (33, 19, 300), (34, 70, 129)):
        problem = Problem(
            operation, LayerShape(inputs, outputs, 7, batch), devices.cpu(), strided=layout != "batch_last"
        )
        parameters = kind.default(problem)
        assert parameters is not None
        plan = kind.plan(problem, parameters)
        run = cpu.prepare(kind.spec(problem, parameters), plan, CPU)
        layouts.check(problem, layout, run, plan, CPU)
        if batch > 1:  # every tensor is read and written as it lies
            assert {s.buffer for s in plan.strides} == {"x", "grad", "grad_x"} & plan.buffers


FAMILIES = [
    pytest.param(operation, kind, table, id=f"{operation}-{table}-{kind.name}")
    for operation in CALL_OPERATIONS
    for table in TableDtype
    for kind in families("cuda", operation, table)
]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("operation", "kind", "table"), FAMILIES)
@pytest.mark.parametrize("sizes", [(21, 19, 9, 20011), (6, 1100, 4, 500), (131, 67, 5, 37)], ids=str)
def test_cuda_kernel(
    operation: Operation, kind: Family, table: TableDtype, sizes: tuple[int, int, int, int]
) -> None:
    from lmkan_gen.launch import cuda

    device = torch.device("cuda", 0)
    some = Problem(operation, LayerShape(*sizes), devices.cuda(0), table, constant=True, strided=True)
    problems = {layout: replace(some, strided=layout != "batch_last") for layout in layouts.LAYOUTS}
    feasible = list(walk.fitting(kind.space(operation), partial(kind.first_limit, some)))
    chosen = Random(f"{operation} {table} {sizes}").sample(feasible, min(3, len(feasible)))
    assert chosen
    toolchain.build(list({kind.spec(p, c) for p in problems.values() for c in chosen}))
    for parameters in chosen:
        for layout, problem in problems.items():
            plan = kind.plan(problem, parameters)
            run = cuda.prepare(kind.spec(problem, parameters), plan, device)
            layouts.check(problem, layout, run, plan, device)


def test_only_kernels_that_read_inputs_have_a_version_for_strides() -> None:
    """One binary for all strides, and the choice of a kernel does not depend on them."""
    for sizes, operation in (((64, 64, 8, 4096), Operation.FORWARD), ((64, 64, 8, 4096), Operation.BACKWARD)):
        problem = Problem(operation, LayerShape(*sizes), devices.target("sm_90"))
        strided = Problem(operation, LayerShape(*sizes), devices.target("sm_90"), strided=True)
        a, b = selection.select(problem), selection.select(strided)
        assert (a.family, a.parameters, a.tier, a.stale) == (b.family, b.parameters, b.tier, b.stale)
    rows = family("row_gather")
    problem = Problem(Operation.FORWARD, LayerShape(65, 9, 5, 3), devices.target("sm_90"), constant=True)
    parameters = rows.default(problem)
    assert parameters is not None
    assert "strided" not in rows.spec(problem, parameters).context


# --- operators ------------------------------------------------------------------------------------


def case(inputs: int, outputs: int, grids: int, batch: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    # slopes jump at knots, where either side is right: none of these inputs is near one
    shape, seed = LayerShape(inputs, outputs, grids, batch), int(torch.randint(2**31, ()))
    b = make_inputs(Operation.FORWARD, shape, torch.device(device), seed, spread=2.0)
    return b["x"], b["table"], b["borders"]


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    if expected.numel():
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_width_and_strides(data: st.DataObject) -> None:
    """Forward and both gradients, whatever lies between the elements."""
    inputs, outputs = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    batch, grids = data.draw(st.integers(0, 20)), data.draw(st.sampled_from([3, 8]))
    x, table, borders = case(inputs, outputs, grids, batch, "cpu")
    grad = torch.randn(outputs, batch)
    layout = st.sampled_from(layouts.LAYOUTS)
    check_operator(x, table, borders, grad, data.draw(layout), data.draw(layout))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [0, 1, 2, 33, 5000])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (7, 33), (12, 5), (65, 130)])
def test_operator(device: str, inputs: int, outputs: int, batch: int) -> None:
    if device == "cpu" and inputs * outputs * batch > 10**6:
        batch = 100
    x, table, borders = case(inputs, outputs, 8, batch, device)
    grad = torch.randn(outputs, batch, device=device)
    for layout in layouts.LAYOUTS:
        check_operator(x, table, borders, grad, layout, "batch_first")
    check_operator(x, table, borders, grad[:, :1].expand(-1, batch), "batch_first", "as it is")


def check_operator(x: Tensor, table: Tensor, borders: Tensor, grad: Tensor, of_x: str, of_grad: str) -> None:
    a = layouts.laid_out(x, of_x).detach().requires_grad_()
    t = table.clone().requires_grad_()
    y = lmkan(a, t, borders)
    grad = grad if of_grad == "as it is" else layouts.laid_out(grad, of_grad)
    found = torch.autograd.grad(y, (a, t), grad)
    exact = (x.detach().double().requires_grad_(), table.detach().double().requires_grad_())
    expected = reference.evaluate(exact[0], exact[1], borders.double())
    assert_close(y.detach(), expected.detach())
    assert y.is_contiguous()
    for f, e in zip(found, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        assert_close(f, e)
    if min(x.shape) > 1 and "gaps" not in of_x:
        assert found[0].stride() == a.stride()
    only_x = torch.autograd.grad(lmkan(a, table, borders), a, grad)[0]
    assert_close(only_x, found[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [TableDtype.FLOAT16, TableDtype.BFLOAT16, TableDtype.INT8])
@pytest.mark.parametrize("batch", [1, 3, 300])
def test_packed_tables(device: str, dtype: TableDtype, batch: int) -> None:
    x, table, borders = case(37, 11, 8, batch, device)
    rounded = round_table(table / 10, dtype)
    expected = reference.evaluate(x.double(), rounded.to(torch.double), borders.double())
    for layout in layouts.LAYOUTS:
        a = layouts.laid_out(x, layout).detach()
        y = frozen_lmkan(a, rounded.values, rounded.scales, borders)
        assert (y - expected).norm() <= 8e-3 * expected.norm()
        if dtype is not INT8:
            a.requires_grad_()
            found = torch.autograd.grad(frozen_lmkan(a, rounded.values, rounded.scales, borders).sum(), a)[0]
            exact = x.double().requires_grad_()
            y = reference.evaluate(exact, rounded.to(torch.double), borders.double())
            wanted = torch.autograd.grad(y.sum(), exact)[0]
            assert (found - wanted).norm() <= 8e-3 * wanted.norm()


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("inputs", [5, 6])
def test_opcheck(layout: str, inputs: int) -> None:
    """Fake tensors have the strides of real ones."""
    x, table, borders = case(inputs, 4, 5, 20, "cpu")
    a = layouts.laid_out(x, layout).detach().requires_grad_()
    grad = layouts.laid_out(torch.randn(4, 20), layout)
    opcheck(torch.ops.lmkan_gen.forward.default, (a, table, borders, 0, 0, 0, 0, False, "float32"))
    backward = torch.ops.lmkan_gen.backward.default
    opcheck(backward, (grad, a, table, borders, True, True, 0, 0, False, "float32"))
    values = table.half()
    opcheck(torch.ops.lmkan_gen.frozen_forward.default, (a, values, None, borders))
    narrow = (grad, a.detach(), values, borders)
    opcheck(torch.ops.lmkan_gen.frozen_grad_input.default, narrow)


@pytest.mark.parametrize("inputs", [1, 5])
def test_gradients_of_odd_widths(inputs: int) -> None:
    x, table, borders = (t.double() for t in case(inputs, 2, 3, 4, "cpu"))
    view = x.T.contiguous().T.requires_grad_()
    table.requires_grad_()
    assert torch.autograd.gradcheck(lmkan, (view, table, borders))
    assert torch.autograd.gradgradcheck(lmkan, (view, table, borders))


# --- modules --------------------------------------------------------------------------------------


#: what copies, some of it only where a view would not do
VIEWS = ("contiguous", "reshape", "flatten")
COPIES = ("clone", "copy_", "_to_copy", "constant_pad_nd", "cat", *VIEWS)
OPERATORS: dict[str, Callable[..., Any]] = {
    "lmkan_gen::forward": ops._forward,
    "lmkan_gen::backward": ops._backward,
}


class Copies(TorchDispatchMode):
    """Notes copies of tensors of at least so many elements, those inside of our operators too."""

    def __init__(self, least: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.least, self.seen = least, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in OPERATORS:
            with self:
                return OPERATORS[name](*args)
        result: Any = func(*args, **(kwargs or {}))
        name = name.removeprefix("aten::")
        copied = name in COPIES and (name not in VIEWS or result.data_ptr() != args[0].data_ptr())
        if copied and result.numel() >= self.least:
            self.seen.append(name)
        return result


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [16, 17])
@pytest.mark.parametrize("kind", ["linear", "layer", "mlp"])
def test_nothing_is_copied(device: str, width: int, kind: str) -> None:
    """Samples first, forward and backward: neither inputs nor outputs are transposed by torch."""
    batch = 4096
    models: dict[str, Callable[[], nn.Module]] = {
        "linear": lambda: LMKANLinear(width, 24, 6),
        "layer": lambda: LMKAN2DLayer(6, width, 24, batch_first=True),
        "mlp": lambda: LMKANMLP((width, 24, 20, 16), 6),
    }
    model = models[kind]().to(device)
    x = torch.randn(batch, width, device=device, requires_grad=True)
    dispatch.clear_caches()
    model(x).sum().backward()
    gradients = [used.kernel for used in dispatch.used() if used.operation is not Operation.FORWARD]
    with Copies(batch * 16) as copies:
        y = model(x)
        assert copies.seen == []
        torch.autograd.grad(y, (x, *model.parameters()), torch.ones(y.shape, device=device))
    if "tile_stationary" not in gradients:  # whose lanes lie along the batch
        assert copies.seen == []
    assert None not in gradients


def test_copies_are_seen() -> None:
    x, table, borders = case(16, 3, 6, 4096, "cpu")
    with Copies(table.numel()) as copies:
        lmkan(x.T.contiguous().T.contiguous(), table.permute(1, 0, 2, 3), borders)
    assert copies.seen == ["clone", "clone", "contiguous"]  # the last inside of the operator


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [1, 5, 6])
@pytest.mark.parametrize("lead", [(), (7,), (2, 3, 4), (0, 3)])
def test_layer_takes_samples_first(device: str, width: int, lead: tuple[int, ...]) -> None:
    layer = LMKAN2DLayer(6, width, 3, init_scale=2.0, batch_first=True).to(device)
    x = torch.randn(*lead, width, device=device)
    y = layer(x)
    assert y.shape == (*lead, 3)
    last = LMKAN2DLayer(6, width, 3).to(device)
    last.load_state_dict(layer.state_dict())
    torch.testing.assert_close(y.reshape(-1, 3).T, last(x.reshape(-1, width).T.contiguous()))
    for wrong in (x[..., 1:], torch.zeros((), device=device)):
        with pytest.raises(ValueError, match=rf"x must be \[\*, {width}\], samples first"):
            layer(wrong)
    with pytest.raises(ValueError, match=rf"x must be \[{width}, batch\], the batch last"):
        last(torch.zeros(width + 1, 2, device=device))


def test_what_depends_on_the_layout_knows_samples_first() -> None:
    from lmkan_gen import fold, refine
    from lmkan_gen.inspection import layer_inputs
    from lmkan_gen.model_tuning import layer_calls

    norm = nn.BatchNorm1d(4)
    model = nn.Sequential(LMKAN2DLayer(4, 5, 4, batch_first=True, init_scale=1.0), norm).eval()
    assert norm.running_mean is not None
    norm.running_mean.normal_()
    x = torch.randn(30, 5)
    for changed in (fold(model), refine(model), copy.deepcopy(model)):
        torch.testing.assert_close(changed(x), model(x), rtol=1e-4, atol=1e-5)
    assert isinstance(fold(model)[1], nn.Identity)  # type: ignore[index]
    assert torch.equal(layer_inputs(model, x)["0"], x.T)
    assert layer_calls(model, x) == [LayerShape(5, 4, 4, 30)]
    assert "batch_first=True" in repr(model[0])
    with pytest.raises(TypeError, match="batch_first must be True or False, got 1"):
        LMKAN2DLayer(4, 5, 4, batch_first=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_network(device: str) -> None:
    model = LMKANMLP((5, 7, 3), 6).to(device).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for leaf in (torch.randn(50, 5, device=device), torch.randn(50, 10, device=device)[:, ::2]):
        a, b = (leaf.clone().as_strided(leaf.shape, leaf.stride()) if leaf.is_contiguous() else leaf, leaf)
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        found, expected = compiled(a), model(b)
        torch.testing.assert_close(found, expected)
        assert found.stride() == expected.stride()
        g = torch.randn(50, 3, device=device)
        torch.testing.assert_close(torch.autograd.grad(found, a, g), torch.autograd.grad(expected, b, g))


@pytest.mark.gpu
@needs_gpu
def test_autocast_and_graphs_take_samples_first() -> None:
    model = LMKANMLP((33, 64, 10), 8).cuda().eval()
    x = torch.randn(500, 33, device="cuda")
    expected = model(x)
    with torch.autocast("cuda", torch.float16):
        y = model(x)
    assert (y - expected).norm() <= 5e-3 * expected.norm()
    with torch.no_grad():
        model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        x.normal_()
        graph.replay()
        torch.testing.assert_close(y, model(x))


def test_frozen_layer_takes_samples_first() -> None:
    layer = LMKAN2DLayer(8, 7, 5, batch_first=True, init_scale=1.0).eval()
    x = torch.randn(2, 20, 7)
    expected = layer(x)
    layer.freeze(torch.float16)
    y = layer(x)
    assert (y - expected).norm() <= 2e-3 * expected.norm()
