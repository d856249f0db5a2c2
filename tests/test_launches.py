"""Kernels that follow each other closely: what they touch before they wait, and how they are launched."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lmkan_gen import codegen, packing
from lmkan_gen import device as devices
from lmkan_gen.families import families, family
from lmkan_gen.launch import cuda
from lmkan_gen.plan import Constant, Fill, KernelSpec, Launch, LaunchPlan, Stride, TensorMap, Workspace
from lmkan_gen.problem import DEFAULT_WORKSPACE, LayerShape, Operation, Problem, TableDtype
from lmkan_gen.tuner.verify import make_case, make_inputs
from tests import emulation, layouts
from tests.emulation import CLUSTERED, OUTER, PRODUCT, SLOPES, STREAMED

GPU = devices.target("sm_90")
#: so few multiprocessors that each block has several items of work
STREAMING = replace(GPU, multiprocessors=3)
CPU = torch.device("cpu")
FLOAT32, INT8 = TableDtype.FLOAT32, TableDtype.INT8

TILES: dict[str, Constant] = {
    "pairs": 4, "outs": 8, "threads": 64, "coordinates": "prepass", "ahead": 2, "ranges": "even",
    "access": "aligned",
}  # fmt: skip
INLINE: dict[str, Constant] = {**TILES, "coordinates": "inline"}
GATHERED: dict[str, Constant] = {"warps": 2, "vector": 1, "unroll": 2, "slice": 16}
MARCHED: dict[str, Constant] = {"vector": 1, "warps": 4, "ahead": 0}
FUSED: dict[str, Constant] = {"pairs": 4, "outs": 8, "threads": 128, "mode": "fast"}
SORTED: dict[str, Constant] = {"items": 1, "segment": 64, "vector": 1, "unroll": 2, "blocks": 2}
#: forward, with a pre-pass
AHEAD: dict[str, Constant] = {**STREAMED, "coordinates": "prepass", "ahead": 2}
HALVES: dict[str, Constant] = {**AHEAD, "pairs": 2, "vector": 2}
#: copied out of the table as it lies
BOXES: dict[str, Constant] = {**STREAMED, "copies": "tensor"}
WITHOUT: dict[str, Constant] = {**STREAMED, "ahead": 4, "coordinates": "inline"}
#: family, operation, table, parameters, shape, deterministic, workspace
EMULATED: list[
    tuple[str, Operation, TableDtype, dict[str, Constant], tuple[int, int, int, int], bool, int]
] = [
    ("tile_stationary", Operation.FORWARD, FLOAT32, TILES, (20, 9, 4, 75), False, 1),
    ("tile_stationary", Operation.FORWARD, FLOAT32, INLINE, (20, 9, 4, 75), False, 1),
    ("tile_stationary", Operation.FORWARD, INT8, TILES, (20, 9, 4, 75), False, 1),
    ("tile_stationary", Operation.GRAD_INPUT, FLOAT32, TILES, (20, 19, 4, 75), False, 1),
    ("tile_stationary", Operation.BACKWARD, FLOAT32, FUSED, (7, 5, 4, 75), False, 1),
    ("output_stationary", Operation.FORWARD, FLOAT32, AHEAD, (19, 11, 4, 333), False, 1),
    ("output_stationary", Operation.FORWARD, FLOAT32, HALVES, (19, 11, 4, 333), False, 1),
    ("output_stationary", Operation.FORWARD, INT8, {**AHEAD, "ahead": 4}, (19, 11, 4, 333), False, 1),
    ("output_stationary", Operation.GRAD_INPUT, FLOAT32, STREAMED, (19, 11, 4, 333), False, 1),
    (
        "output_stationary", Operation.FORWARD, FLOAT32, {**AHEAD, "copies": "tensor"}, (23, 11, 4, 333),
        False, 1,
    ),
    ("output_stationary", Operation.FORWARD, FLOAT32, WITHOUT, (19, 11, 4, 333), False, 1),
    (
        "output_stationary", Operation.FORWARD, FLOAT32, {**WITHOUT, "copies": "tensor"}, (24, 16, 4, 333),
        False, 1,
    ),
    ("output_stationary", Operation.GRAD_INPUT, FLOAT32, BOXES, (24, 19, 4, 333), False, 1),
    ("cluster_stationary", Operation.FORWARD, FLOAT32, CLUSTERED, (35, 9, 4, 75), False, 1),
    ("cluster_stationary", Operation.GRAD_INPUT, FLOAT32, CLUSTERED, (9, 35, 4, 75), False, 1),
    (
        "cluster_stationary", Operation.FORWARD, FLOAT32, {**CLUSTERED, "splits": 2}, (35, 9, 4, 75),
        False, 1,
    ),
    ("row_gather", Operation.FORWARD, FLOAT32, GATHERED, (35, 9, 4, 5), False, 1),
    ("cell_sorted", Operation.BACKWARD, FLOAT32, {**SORTED, "vector": 4}, (4, 70, 4, 2100), False, 1),
    ("cell_sorted", Operation.GRAD_INPUT, FLOAT32, SORTED, (4, 260, 4, 40), False, 1),
    ("cell_sorted", Operation.GRAD_TABLE, FLOAT32, {**SORTED, "vector": 2}, (3, 34, 4, 1030), False, 1),
    ("cell_sorted", Operation.BACKWARD, FLOAT32, {**SORTED, "segment": 256}, (2, 4, 8, 2300), True, 150_000),
    ("matrix_product", Operation.FORWARD, FLOAT32, PRODUCT, (35, 19, 4, 40), False, DEFAULT_WORKSPACE),
    (
        "matrix_product", Operation.FORWARD, INT8, {**PRODUCT, "tiles": 2}, (35, 19, 4, 40), False,
        DEFAULT_WORKSPACE,
    ),
    ("matrix_product", Operation.GRAD_INPUT, FLOAT32, SLOPES, (35, 70, 4, 40), False, DEFAULT_WORKSPACE),
    ("matrix_product", Operation.GRAD_TABLE, FLOAT32, OUTER, (35, 70, 4, 40), False, DEFAULT_WORKSPACE),
    ("hessian_marching", Operation.HESSIAN, FLOAT32, MARCHED, (6, 5, 4, 1), False, 1),
]  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulation")


def _may_be_alone(name: str, operation: Operation, parameters: Mapping[str, Constant]) -> bool:
    """Whether one kernel does: with nothing to fill, and no pre-pass."""
    if name == "output_stationary":
        return operation is Operation.GRAD_INPUT or parameters["coordinates"] == "inline"
    return name == "row_gather" or parameters.get("splits") == 1


@pytest.mark.parametrize(
    ("name", "operation", "table", "parameters", "sizes", "deterministic", "workspace"),
    EMULATED,
    ids=[
        f"{e[0]}-{e[1]}-{e[2]}-{e[3].get('coordinates') or e[3].get('copies', '')}-{e[5]}" for e in EMULATED
    ],
)
def test_kernels_wait_before_they_touch_what_others_work_on(
    directory: Path,
    name: str,
    operation: Operation,
    table: TableDtype,
    parameters: dict[str, Constant],
    sizes: tuple[int, int, int, int],
    deterministic: bool,
    workspace: int,
) -> None:
    """And compute the right thing, in the variant that is for such GPUs."""
    kind = family(name)
    # tables are arranged by a plan, or for many
    for constant in (True, False) if name == "output_stationary" else (True,):
        problem = Problem(operation, LayerShape(*sizes), STREAMING, table, deterministic, constant, workspace)
        spec, plan = kind.spec(problem, parameters), kind.plan(problem, parameters)
        assert len(plan.steps) > 1 or _may_be_alone(name, operation, parameters)
        if operation is Operation.HESSIAN:
            inputs: Mapping[str, Tensor] = {
                "table": torch.randn(5, 5, 5, 3),
                "borders": torch.arange(5.0),
            }
            outputs = {"value": torch.empty(())}
        else:
            inputs = make_inputs(operation, problem.shape, CPU, seed=1, spread=3.0, table=table)
            outputs = {n: torch.full(t.shape, torch.nan) for n, t in layouts.right(operation, inputs).items()}
            run = emulation.prepare(kind, problem, parameters, directory)
            layouts.check(problem, "batch_last", run, plan, CPU)
        inputs = packing.arranged(inputs, plan.buffers, table)
        emulation.check_early_starts(spec, plan, directory, {**inputs, **outputs}, inputs)


@pytest.mark.parametrize(("wait", "found"), [("", "does not wait"), ("wait_for_earlier(), ", "touches")])
def test_kernels_that_do_not_wait_are_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wait: str, found: str
) -> None:
    """Else the test above would show nothing: without the wait, and with the wait at the wrong place."""
    render = codegen.render

    def without(spec: KernelSpec) -> str:
        head, marker, kernel = render(spec).partition("lmkan_hessian_total(")
        kernel = kernel.replace("wait_for_earlier();", "")
        return head + marker + kernel.replace("*value = ", f"{wait}*value = ", 1)

    monkeypatch.setattr(codegen, "render", without)
    kind, parameters = family("hessian_marching"), MARCHED
    problem = Problem(Operation.HESSIAN, LayerShape(6, 5, 4, 1), GPU)
    buffers = {"table": torch.randn(5, 5, 5, 3), "borders": torch.arange(5.0), "value": torch.empty(())}
    plan = kind.plan(problem, parameters)
    if not wait:  # what it reads would be noticed first
        steps = tuple(
            replace(s, arguments=("table", *s.arguments[1:])) if s.kernel == "lmkan_hessian_total" else s
            for s in plan.steps
            if isinstance(s, Launch)
        )
        plan = replace(plan, steps=steps)
    with pytest.raises(AssertionError, match=found):
        emulation.check_early_starts(kind.spec(problem, parameters), plan, tmp_path, buffers, buffers)


def test_every_kernel_lets_the_next_start_and_waits() -> None:
    """Of all families: whichever kernels a plan has, each may follow another one."""
    seen = set()
    shape = LayerShape(64, 128, 9, 4096)
    for operation, table, deterministic in product(Operation, TableDtype, (False, True)):
        for kind in families("cuda", operation, table):
            problem = Problem(operation, shape, GPU, table, deterministic, constant=True)
            fitting = list(kind.drawn(problem, Random(0)))
            for parameters in fitting[:: max(1, len(fitting) // 4)]:
                source = codegen.render(kind.spec(problem, parameters))
                for kernel in source.split('extern "C" __global__')[1:]:
                    name = re.search(r"\b(lmkan_\w+)\(", kernel)
                    assert name is not None
                    seen.add(name[1])
                    body = kernel[: kernel.index("\n}")]
                    assert "let_next_start();" in body, f"{kind.name}: {name[1]}"
                    assert re.search(r"\b(wait_for|end_after)_earlier\(\);", body), f"{kind.name}: {name[1]}"
    assert {"lmkan_zero", "lmkan_forward", "lmkan_backward_walk", "lmkan_hessian_total"} <= seen


@pytest.mark.parametrize("offset", [0, 1, 4])
@pytest.mark.parametrize("size", [1, 3, 4, 1027, 5000])
def test_zeroing_covers_a_buffer_and_no_more(directory: Path, offset: int, size: int) -> None:
    problem = Problem(Operation.FORWARD, LayerShape(4, 4, 4, 4), GPU, constant=True)
    spec = family("row_gather").spec(problem, GATHERED)
    buffer = torch.full((size + 20,), torch.nan)
    target = buffer[offset : offset + size]
    plan = LaunchPlan((), (Launch("lmkan_zero", ("target", 4 * size), (2, 1, 1), 256),))
    emulation.run(spec, plan, directory, {"target": target})
    assert not target.any()
    assert buffer[:offset].isnan().all()
    assert buffer[offset + size :].isnan().all()


class Driver:
    """Notes launches; refuses close ones if told to."""

    def __init__(self, refuses: bool = False) -> None:
        self.calls: list[tuple[str, str, tuple[int, ...]]] = []
        self._refuses = refuses
        names = ("CUlaunchAttribute", "CUlaunchAttributeID", "CUlaunchConfig", "CUfunction_attribute")
        from cuda.bindings import driver

        for name in names:
            setattr(self, name, getattr(driver, name))

    def cuFuncSetAttribute(self, *_: object) -> tuple[int]:
        return (0,)

    def cuLaunchKernelEx(self, config: Any, kernel: tuple[str, int], parameters: int, _: int) -> tuple[int]:
        assert config.numAttrs == 1
        assert int(config.attrs[0].id) == 6  # programmatic stream serialization
        assert config.attrs[0].value.programmaticStreamSerializationAllowed == 1
        assert (config.gridDimX, config.gridDimY, config.gridDimZ) == (3, 2, 1) or kernel[0] == "lmkan_zero"
        assert (config.blockDimX, config.blockDimY, config.blockDimZ, config.sharedMemBytes) in (
            (64, 1, 1, 1000),
            (256, 1, 1, 0),
        )
        assert int(config.hStream) == 7
        if self._refuses:
            return (801,)
        self._note("close", kernel, parameters)
        return (0,)

    def cuLaunchKernel(self, kernel: tuple[str, int], *rest: int) -> tuple[int]:
        self._note("in order", kernel, rest[-2])
        return (0,)

    def cuMemsetD8Async(self, address: int, _: int, size: int, __: int) -> tuple[int]:
        self.calls.append(("memset", "", (address, size)))
        return (0,)

    def _note(self, how: str, kernel: tuple[str, int], parameters: int) -> None:
        name, count = kernel
        pointers = (ctypes.c_void_p * count).from_address(parameters)
        values = tuple(ctypes.c_int64.from_address(p).value for p in pointers)  # type: ignore[arg-type]
        self.calls.append((how, name, values))


PLAN = LaunchPlan(
    (Workspace("w", 40),),
    (
        Launch("first", ("x", "w", 5), (3, 2, 1), 64, 1000),
        Fill("y"),
        Launch("second", ("y", Stride("x", 0)), (3, 2, 1), 64, 1000),
        Fill("w"),
        Launch("third", ("w",), (3, 2, 1), 64, 1000),
    ),
)


def launched(monkeypatch: pytest.MonkeyPatch, arch: str, driver: Driver, times: int = 1) -> list[Any]:
    """What the launcher asks of a driver for `PLAN`: how, which kernel, and arguments."""
    counts = {s.kernel: len(s.arguments) for s in PLAN.steps if isinstance(s, Launch)} | {"lmkan_zero": 2}
    monkeypatch.setattr(cuda, "_driver", lambda: driver)
    monkeypatch.setattr(cuda, "_function", lambda path, index, kernel: ((kernel, counts[kernel]), 0))
    monkeypatch.setattr(cuda, "_multiprocessors", lambda index: 9)
    monkeypatch.setattr(cuda, "_allow", lambda function, step: None)
    cuda._allowed.clear()
    starts = cuda._steps(KernelSpec.make("none.cu.j2", arch, {}), PLAN, Path("none"), 0)
    steps = [cuda._memset(s.buffer) if isinstance(s, Fill) else cuda._bind(s) for s in starts]
    known: dict[Any, int] = {"x": 1, "y": 2, "w": 3, Stride("x", 0): 4}
    known |= {cuda.Size("y"): 20, cuda.Size("w"): 40}
    for _ in range(times):
        driver.calls.clear()
        for step in steps:
            step(known, 7)
    return driver.calls


def test_all_but_the_first_follow_closely(monkeypatch: pytest.MonkeyPatch) -> None:
    """But what zeroes a buffer that has been worked on."""
    assert launched(monkeypatch, "sm_90", Driver()) == [
        ("in order", "first", (1, 3, 5)),
        ("close", "lmkan_zero", (2, 20)),
        ("close", "second", (2, 4)),
        ("in order", "lmkan_zero", (3, 40)),
        ("close", "third", (3,)),
    ]


def test_older_gpus_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched(monkeypatch, "sm_89", Driver()) == [
        ("in order", "first", (1, 3, 5)),
        ("memset", "", (2, 20)),
        ("in order", "second", (2, 4)),
        ("memset", "", (3, 40)),
        ("in order", "third", (3,)),
    ]


@pytest.mark.parametrize("times", [1, 3])
def test_a_driver_may_refuse(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    calls = launched(monkeypatch, "sm_100", Driver(refuses=True), times)
    assert [(how, name) for how, name, _ in calls] == [
        ("in order", name) for name in ("first", "lmkan_zero", "second", "lmkan_zero", "third")
    ]


def test_tensor_maps_are_encoded_when_their_buffer_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a kernel is given the one of its call."""
    encoded: list[int] = []

    def encode(tensor_map: TensorMap, address: int) -> SimpleNamespace:
        encoded.append(address)
        return SimpleNamespace(getPtr=lambda: 1000 + address)

    given: list[int] = []
    driver = Driver()

    def launch(*arguments: Any) -> tuple[int]:
        pointers = ctypes.cast(arguments[-2], ctypes.POINTER(ctypes.c_void_p))
        given.append(int(pointers[1] or 0))
        return (0,)

    monkeypatch.setattr(driver, "cuLaunchKernel", launch)
    monkeypatch.setattr(cuda, "_driver", lambda: driver)
    monkeypatch.setattr(cuda, "_function", lambda path, index, kernel: (kernel, 0))
    monkeypatch.setattr(cuda, "_encode", encode)
    tensor_map = TensorMap("table", (8, 4), (4, 4))
    step = cuda._bind(cuda.Start("k", Launch("k", ()), ("x", tensor_map), False))
    for address in (16, 16, 32, 32, 16):
        step({"x": 1, "table": address}, 7)
    assert encoded == [16, 32, 16]
    assert given == [1016, 1016, 1032, 1032, 1016]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize(
    ("operation", "shape", "table"),
    [
        (Operation.FORWARD, LayerShape(128, 128, 26, 1024), FLOAT32),
        (Operation.FORWARD, LayerShape(64, 64, 10, 4096), FLOAT32),
        (Operation.FORWARD, LayerShape(64, 64, 10, 4096), TableDtype.FLOAT16),
        (Operation.FORWARD, LayerShape(64, 64, 10, 4096), INT8),
        (Operation.FORWARD, LayerShape(512, 64, 20, 16), FLOAT32),
        (Operation.GRAD_INPUT, LayerShape(128, 128, 26, 1024), FLOAT32),
        (Operation.GRAD_TABLE, LayerShape(22, 19, 9, 5011), FLOAT32),
        (Operation.BACKWARD, LayerShape(64, 64, 9, 300), FLOAT32),
        (Operation.BACKWARD, LayerShape(32, 96, 12, 9000), FLOAT32),
    ],
    ids=str,
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_calls_in_close_succession(
    operation: Operation, shape: LayerShape, table: TableDtype, graphs: bool, deterministic: bool
) -> None:
    """Many calls of every family back to back, with other inputs each, on the same workspaces and outputs."""
    device = torch.device("cuda", 0)
    for kind in families("cuda", operation, table):
        # a small workspace: as many slabs as possible
        problem = Problem(operation, shape, devices.cuda(0), table, deterministic, constant=True)
        tight = replace(problem, workspace=1 if not deterministic else DEFAULT_WORKSPACE)
        for asked in (problem, tight):
            parameters = kind.default(asked)
            if parameters is None:
                continue
            plan = kind.plan(asked, parameters)
            run = cuda.prepare(kind.spec(asked, parameters), plan, device)
            cases = [
                make_case(operation, shape, device, spread, 32, table) for spread in (0.1, 0.5, 1.0, 3.0)
            ]
            calls = []
            for case in cases:
                inputs = packing.arranged(case.inputs, plan.buffers, table)
                outputs = {
                    e.name: torch.full(_size(e.name, shape), torch.nan, device=device) for e in case.expected
                }
                calls.append((case, {**inputs, **outputs}, outputs))

            def call_all(calls: list[Any] = calls, run: cuda.Runner = run) -> None:
                for _ in range(5):
                    for _, buffers, _ in calls:
                        run(buffers)

            call_all()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            if graphs:
                with torch.cuda.graph(graph):
                    call_all()
            for _ in range(20):
                for _, _, outputs in calls:
                    for output in outputs.values():
                        output.fill_(torch.nan)
                graph.replay() if graphs else call_all()
                for case, _, outputs in calls:

                    def copy(buffers: Mapping[str, Tensor], outputs: dict[str, Tensor] = outputs) -> None:
                        for name, output in outputs.items():
                            buffers[name].copy_(output)

                    case.check(copy, f"{kind.name} {parameters}")


def _size(name: str, shape: LayerShape) -> tuple[int, ...]:
    side = shape.grids + 1
    return {
        "y": (shape.outputs, shape.batch),
        "grad_x": (shape.inputs, shape.batch),
        "grad_table": (side, side, shape.outputs, shape.pairs),
    }[name]
