"""The native launcher gives the bits and the errors of the Python launcher, and asks it only once."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lmkan_gen import LMKAN2DLayer, dispatch, knots, lmkan, set_workspace_limit
from lmkan_gen.device import cpu, models
from lmkan_gen.families import families
from lmkan_gen.launch import native, numbers
from lmkan_gen.launch.cuda import Start
from lmkan_gen.nn import LMKANMLP, lmkan_layers
from lmkan_gen.plan import Fill
from lmkan_gen.problem import CALL_OPERATIONS, LayerShape, Operation, Problem, TableDtype
from tests import layouts

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
OPS = torch.ops.lmkan_gen


@pytest.fixture(autouse=True)
def _afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(native.VARIABLE, raising=False)
    lmkan(torch.randn(2, 3), torch.randn(4, 4, 1, 1), knots(3))
    assert native.is_serving("cpu")
    yield
    dispatch.clear_caches()


def case(device: str, inputs: int, outputs: int, grids: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    table = torch.randn(grids + 1, grids + 1, outputs, -(-inputs // 2), device=device)
    return torch.randn(inputs, batch, device=device), table, knots(grids).to(device)


def both(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> tuple[Any, Any]:
    """What the native and the Python launcher make of a call, or what they raise."""
    found = []
    for launcher in ("native", "python"):
        monkeypatch.setenv(native.VARIABLE, launcher)
        try:
            found.append(call())
        except Exception as error:
            found.append((type(error), str(error)))
    monkeypatch.delenv(native.VARIABLE)
    return found[0], found[1]


def same(found: tuple[Any, Any]) -> bool:
    ours, expected = (torch.utils._pytree.tree_leaves(f) for f in found)
    return len(ours) == len(expected) and all(
        a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
        if isinstance(a, Tensor)
        else a == b
        for a, b in zip(ours, expected, strict=True)
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("sizes", [(8, 6, 5, 33), (7, 3, 4, 1), (64, 64, 8, 300)])
@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_same_bits(
    monkeypatch: pytest.MonkeyPatch, device: str, deterministic: bool, sizes: tuple[int, ...], layout: str
) -> None:
    x, table, borders = case(device, *sizes)
    x = layouts.laid_out(x, layout).detach()
    grad = torch.randn(sizes[1], sizes[3], device=device)
    # sums on GPUs have an order of their own in each run, unless another is asked for
    exact = deterministic or device == "cpu"
    torch.use_deterministic_algorithms(deterministic)
    try:
        found = both(monkeypatch, lambda: [OPS.forward(x, table, borders)])
        for needs in ((True, True), (True, False), (False, True), None):
            if exact:
                assert same(found), needs
            else:
                torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
            assert [t.stride() for t in found[0]] == [t.stride() for t in found[1]]
            if needs is not None:
                found = both(monkeypatch, partial(OPS.backward, grad, x, table, borders, *needs))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
def test_same_bits_of_frozen_layers(monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype) -> None:
    layer = LMKAN2DLayer(6, 16, 24, init_scale=2.0, device=device).eval().freeze(dtype)
    x = torch.randn(16, 100, device=device)
    with torch.no_grad():
        layer(x)
        assert same(both(monkeypatch, lambda: layer(x)))
    if dtype != torch.int8:
        x.requires_grad_()
        assert same(both(monkeypatch, lambda: torch.autograd.grad(layer(x).square().sum(), x)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_same_bits_under_autocast(monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype) -> None:
    layer = LMKAN2DLayer(6, 16, 24, init_scale=2.0, device=device)
    x = torch.randn(16, 100, device=device, requires_grad=True)

    def call() -> Any:
        with torch.autocast(device, dtype):
            y = layer(x)
        return y.detach(), *torch.autograd.grad(y.square().sum(), (x, layer.func_parameter))

    torch.use_deterministic_algorithms(True)
    try:
        assert same(both(monkeypatch, call))
    finally:
        torch.use_deterministic_algorithms(False)


def test_same_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    x, table, borders = case("cpu", 8, 6, 5, 33)
    frozen = torch.zeros(6, 6, 3, 4, dtype=torch.int8)
    calls: dict[str, Callable[[], Any]] = {
        "width": lambda: lmkan(x[:6], table, borders),
        "axes": lambda: lmkan(x[0], table, borders),
        "dtype": lambda: lmkan(x.double(), table, borders),
        "integers": lambda: lmkan(x.int(), table, borders),
        "knots": lambda: lmkan(x, table, knots(6)),
        "device": lambda: lmkan(x, table.to("meta"), borders),
        "type": lambda: OPS.forward(x, table, borders, 0, 0, 0, 0, False, "float8"),
        "grad": lambda: OPS.backward(torch.zeros(3, 33), x, table, borders, True, True),
        "no scales": lambda: OPS.frozen_forward(x, frozen, None, borders),
        "scales": lambda: OPS.frozen_forward(x, frozen, torch.ones(2, 3), borders),
        "gradient of int8": lambda: OPS.frozen_grad_input(torch.zeros(3, 33), x, frozen, borders),
    }
    for name, call in calls.items():
        ours, expected = both(monkeypatch, call)
        assert ours == expected, name
        assert issubclass(expected[0], (ValueError, TypeError)), name


def test_errors_of_choosing_have_their_type(monkeypatch: pytest.MonkeyPatch) -> None:
    x, table, borders = case("cpu", 8, 6, 5, 34)

    def refuse(*_: Any) -> Any:
        raise KeyError("asked for")

    monkeypatch.setattr(dispatch, "_prepare", refuse)
    with pytest.raises(KeyError, match="asked for"):
        lmkan(x, table, borders)


def test_python_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, table, borders = case("cpu", 8, 6, 5, 35)
    expected = lmkan(x, table, borders)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("Python was asked")

    for name in ("execute", "_find", "_prepare"):
        monkeypatch.setattr(dispatch, name, refuse)
    assert torch.equal(lmkan(x, table, borders), expected)
    with pytest.raises(AssertionError, match="Python was asked"):
        lmkan(x[:, :34].contiguous(), table, borders)


def test_settings_count_from_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    x, table, borders = case("cpu", 8, 6, 5, 36)
    lmkan(x, table, borders)
    monkeypatch.setenv(dispatch.DISABLE_VARIABLE, "1")
    lmkan(x, table, borders)
    assert dispatch.used()[-1].choice.family is None
    monkeypatch.delenv(dispatch.DISABLE_VARIABLE)
    lmkan(x, table, borders)
    limits: list[int] = []
    real = dispatch._find

    def find(*arguments: Any) -> Any:
        limits.append(dispatch.workspace_limit())
        return real(*arguments)

    monkeypatch.setattr(dispatch, "_find", find)
    lmkan(x, table, borders)
    assert not limits
    set_workspace_limit(3)
    try:
        lmkan(x, table, borders)
        assert limits == [3 << 20]
    finally:
        set_workspace_limit(None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_forms_follow_what_is_written(dtype: torch.dtype) -> None:
    layer = LMKAN2DLayer(6, 16, 24, init_scale=2.0).eval().freeze(dtype)
    x = torch.randn(16, 50)
    frozen = layer.frozen
    assert frozen is not None
    with torch.no_grad():
        y = layer(x)
        assert torch.equal(layer(x), y)
        frozen.values.zero_()
        assert not layer(x).any()
        frozen.values.fill_(1)
        expected = layer(x)
        if frozen.scales is not None:
            frozen.scales.mul_(2)
            torch.testing.assert_close(layer(x), 2 * expected)
        frozen.values.data = torch.zeros_like(frozen.values)
        assert not layer(x).any()


def test_forms_go_with_their_table() -> None:
    layer = LMKAN2DLayer(6, 16, 24).eval().freeze(torch.float16)
    x = torch.randn(16, 50)
    with torch.no_grad():
        layer(x)
        layer(x)
    assert native._service is not None
    assert layer.frozen is not None
    address = layer.frozen.values.data_ptr()
    assert address in native._service._held
    layer.unfreeze()
    assert address not in native._service._held


def test_what_is_held_of_a_table_does_not_grow() -> None:
    """Neither with batches, whose plans read the same forms, nor with writes, which have them made anew."""
    layer = LMKAN2DLayer(6, 16, 24).eval().freeze(torch.float16)
    assert native._service is not None
    assert layer.frozen is not None
    sizes = set()
    with torch.no_grad():
        layer(torch.randn(16, 60))
        for batch in range(60, 75):
            layer(torch.randn(16, batch))
            _, forms = native._service._held[layer.frozen.values.data_ptr()]
            sizes.add(sum(len(tensors) for tensors in forms.values()))
            layer.frozen.values.mul_(1)
    assert len(sizes) == 1


def test_eight_threads_call_one_cold_layer() -> None:
    layer = LMKAN2DLayer(7, 12, 10)
    x = torch.randn(12, 41)
    found: list[Tensor] = []
    start = threading.Barrier(8)

    def call() -> None:
        start.wait()
        for _ in range(20):
            found.append(layer(x).detach())

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 160
    assert all(torch.equal(y, found[0]) for y in found)


def test_numbers_of_threads() -> None:
    x, table, borders = case("cpu", 16, 16, 5, 700)
    before = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(lmkan(x, table, borders))
        assert torch.equal(*found)
    finally:
        torch.set_num_threads(before)


CALL = """
import torch, warnings
from lmkan_gen import lmkan, knots
from lmkan_gen.launch import native
from lmkan_gen.nn import LMKANMLP, lmkan_layers
{setup}
x, t, b = torch.randn(4, 5), torch.randn(5, 5, 3, 2, requires_grad=True), knots(4)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        y = lmkan(x, t, b)
    y.sum().backward()
print(native.is_serving("cpu"), [str(w.message) for w in caught])
"""


def fresh(setup: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", CALL.format(setup=setup)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout.strip()


def test_a_fresh_process_ends_quietly() -> None:
    assert fresh("") == "True []"


def test_a_library_that_cannot_be_built_costs_one_warning() -> None:
    said = fresh(
        "from lmkan_gen.toolchain import host\n"
        "from lmkan_gen.toolchain.errors import CompilerMissing\n"
        "def missing(*_): raise CompilerMissing('no compiler')\n"
        "from lmkan_gen import toolchain\n"
        "toolchain_binary = toolchain.binary\n"
        "toolchain.binary = lambda spec: missing() if 'launcher' in spec.template else toolchain_binary(spec)"
    )
    assert said.startswith("False [")
    assert said.count("the native launcher cannot be used") == 1
    assert "no compiler; LMKAN_GEN_LAUNCHER=python asks for this silently" in said


def test_the_environment_leaves_all_to_python() -> None:
    assert fresh("import os; os.environ['LMKAN_GEN_LAUNCHER'] = 'python'") == "False []"


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("table", TableDtype)
@pytest.mark.parametrize("operation", CALL_OPERATIONS)
def test_plans_of_every_family_can_be_written(
    operation: Operation, table: TableDtype, constant: bool
) -> None:
    """And name every buffer, stride, size and tensor map that a launch is given."""
    shape, kinds = LayerShape(512, 512, 18, 4096), ("cpu", "cuda")
    chips = {"cpu": cpu(), "cuda": next(d for d in models("sm_90") if "H200" in d.name)}
    for kind, family in ((k, f) for k in kinds for f in families(k, operation, table)):
        problem = Problem(operation, shape, chips[kind], table, constant=constant, strided=True)
        parameters = family.default(problem)
        if parameters is None:
            continue
        plan, spec = family.plan(problem, parameters), family.spec(problem, parameters)
        starts = [s if isinstance(s, Fill) else Start(None, s, s.arguments, False, 1) for s in plan.steps]
        written = numbers.write(native.Part(spec, plan, table, starts), table is not TableDtype.FLOAT32)
        assert written is not None, family.name
        forms = {b for b in plan.buffers if b not in numbers.BUFFERS}
        if table is not TableDtype.FLOAT32 and "table" in plan.buffers:
            forms.add("table")
        assert set(written.forms) == forms
        assert all(type(n) is int or isinstance(n, bool) for n in written.numbers)
        expected = 4 + 1 + len(plan.workspaces) + 1 + sum(2 + 2 * len(m.sizes) for m in plan.tensor_maps) + 1
        expected += sum(10 + 3 * (0 if isinstance(s, Fill) else len(s.arguments)) for s in plan.steps)
        assert len(written.numbers) == expected


def gpu_network() -> torch.nn.Module:
    return LMKANMLP((32, 64, 16), 6, device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_a_training_step_as_a_graph() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        networks = [gpu_network() for _ in range(2)]
        networks[1].load_state_dict(networks[0].state_dict())
        optimizers = [torch.optim.Adam(n.parameters(), fused=True, capturable=True) for n in networks]
        x = torch.randn(500, 32, device="cuda")

        def step(i: int) -> Tensor:
            optimizers[i].zero_grad(set_to_none=True)
            loss: Tensor = networks[i](x).square().mean()
            loss.backward()
            optimizers[i].step()
            return loss.detach()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(0)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(0)
        eager = [step(1) for _ in range(3)]
        for _ in range(4):
            x.copy_(torch.randn_like(x))
            graph.replay()
            eager.append(step(1))
            assert torch.equal(captured, eager[-1])
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_a_frozen_network_without_a_call_before_its_graphs(dtype: torch.dtype) -> None:
    network = gpu_network().eval()
    for layer in lmkan_layers(network).values():
        layer.freeze(dtype)
    x = torch.randn(300, 32, device="cuda")
    with torch.no_grad():
        compiled = torch.compile(network, mode="reduce-overhead")
        found = [compiled(x).clone() for _ in range(4)]
        expected = network(x)
    for y in found:
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_a_thread_that_is_in_no_context() -> None:
    """Its first call takes memory that torch has kept, and asks the runtime for nothing."""
    x, table, borders = case("cuda", 64, 64, 8, 400)
    for _ in range(2):
        expected = lmkan(x, table, borders)
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(lmkan(x, table, borders)))
    thread.start()
    thread.join()
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_the_current_stream_and_memory() -> None:
    x, table, borders = case("cuda", 64, 64, 8, 4000)
    grad = torch.randn(64, 4000, device="cuda")
    expected = lmkan(x, table, borders)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late = x.clone()
        x.zero_()
        late = lmkan(late, table, borders)
    assert torch.cuda.current_stream().query()
    torch.cuda.current_stream().wait_stream(side)
    torch.testing.assert_close(late, expected, rtol=1e-5, atol=1e-5)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(50):
        OPS.backward(grad, late[:64], table, borders, True, True)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
