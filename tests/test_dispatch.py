from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from lmkan_gen import device, dispatch, knots, launch, reference, set_workspace_limit
from lmkan_gen.call import Call
from lmkan_gen.families import Demand
from lmkan_gen.launch import native
from lmkan_gen.plan import KernelSpec, Launch, LaunchPlan, Stride, strides
from lmkan_gen.problem import CALL_OPERATIONS, LayerShape, Operation, Problem
from lmkan_gen.selection import Choice, Tier
from lmkan_gen.toolchain import CompilerMissing

CPU = torch.device("cpu")
SHAPE = LayerShape(6, 4, 5, 20)


class FakeFamily:
    """A family whose kernels are whatever the fake launcher does; one binary for all batches."""

    def spec(self, problem: Problem, parameters: Mapping[str, Any]) -> KernelSpec:
        return KernelSpec.make("fake.cpp.j2", "generic", {"operation": str(problem.operation)})

    def plan(self, problem: Problem, parameters: Mapping[str, Any]) -> LaunchPlan:
        FakeLauncher.planned.append(problem)
        return LaunchPlan((), ())


class FakeLauncher(ModuleType):
    """Stands for `lmkan_gen.launch.cpu`; kernels fill their outputs with the number 7."""

    planned: ClassVar[list[Problem]] = []

    def __init__(self) -> None:
        super().__init__("lmkan_gen.launch.cpu")
        self.prepared: list[KernelSpec] = []
        self.ran: list[KernelSpec] = []
        self.failure: Exception | None = None

    def starts(self, spec: KernelSpec, plan: LaunchPlan, device: torch.device) -> list[Any]:
        self.prepared.append(spec)
        if self.failure is not None:
            raise self.failure
        return []

    def prepare(self, spec: KernelSpec, plan: LaunchPlan, device: torch.device) -> dispatch.Run:
        def run(buffers: Mapping[str, Tensor]) -> None:
            self.ran.append(spec)
            for name in {"y", "grad_x", "grad_table"} & set(buffers):
                buffers[name].fill_(7)

        return run


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeLauncher]:
    fake = FakeLauncher()
    FakeLauncher.planned.clear()
    monkeypatch.setitem(sys.modules, "lmkan_gen.launch.cpu", fake)
    monkeypatch.setattr(launch, "cpu", fake, raising=False)
    monkeypatch.setenv(native.VARIABLE, "python")
    monkeypatch.setattr(dispatch, "family", lambda name: FakeFamily())
    monkeypatch.delenv(dispatch.DISABLE_VARIABLE, raising=False)

    def choice(problem: Problem, demand: Demand) -> Choice:
        return Choice(problem, "fake", {}, Tier.EXACT, "a test")

    def both(problem: Problem, demand: Demand) -> tuple[Choice, ...]:
        split = (Operation.GRAD_INPUT, Operation.GRAD_TABLE)
        return tuple(choice(Problem(o, problem.shape, problem.device), demand) for o in split)

    monkeypatch.setattr("lmkan_gen.selection.select", choice)
    monkeypatch.setattr("lmkan_gen.selection.select_backward", both)
    dispatch.clear_caches()
    yield fake
    dispatch.clear_caches()


def buffers(shape: LayerShape = SHAPE) -> dict[str, Tensor]:
    side = shape.grids + 1
    table = torch.randn(side, side, shape.outputs, shape.pairs)
    x = torch.randn(shape.inputs, shape.batch)
    y = torch.full((shape.outputs, shape.batch), torch.nan)
    return {
        "x": x, "table": table, "borders": knots(shape.grids), "grad": torch.randn_like(y), "y": y,
        "grad_x": torch.full_like(x, torch.nan), "grad_table": torch.full_like(table, torch.nan),
    }  # fmt: skip


def run(operation: Operation = Operation.FORWARD, shape: LayerShape = SHAPE) -> dict[str, Tensor]:
    b = buffers(shape)
    dispatch.execute(Call(operation, shape, CPU), b)
    return b


def test_prepares_once_per_shape(launcher: FakeLauncher) -> None:
    for _ in range(3):
        assert (run()["y"] == 7).all()
    assert (len(launcher.prepared), len(launcher.ran)) == (1, 3)
    run(shape=LayerShape(6, 4, 5, 21))
    assert len(launcher.prepared) == 2
    assert [p.shape.batch for p in FakeLauncher.planned] == [20, 21]


def test_records_what_ran(launcher: FakeLauncher) -> None:
    run()
    dispatch.execute(Call(Operation.BACKWARD, SHAPE, CPU), buffers())
    assert [(u.operation, u.kernel, u.fallback) for u in dispatch.used()] == [
        (Operation.FORWARD, "fake", None),
        (Operation.GRAD_INPUT, "fake", None),
        (Operation.GRAD_TABLE, "fake", None),
    ]
    assert "fake" in dispatch.used()[0].describe()


def test_both_gradients_run_what_selection_says(launcher: FakeLauncher) -> None:
    b = run(Operation.BACKWARD)
    assert [dict(s.constants)["operation"] for s in launcher.ran] == ["grad_input", "grad_table"]
    assert (b["grad_x"] == 7).all()
    assert (b["grad_table"] == 7).all()


@pytest.mark.parametrize(
    "failure",
    [
        CompilerMissing("no C++ compiler was found.\nsecond line"),
        OSError("cannot load kernel.so"),
        ImportError("No module named 'cuda'"),
        RuntimeError("CUDA driver error 209"),
    ],
)
def test_falls_back_with_one_warning(launcher: FakeLauncher, failure: Exception) -> None:
    launcher.failure = failure
    cause = str(failure).splitlines()[0].rstrip(".")
    with pytest.warns(RuntimeWarning, match="plain torch runs instead") as caught:
        b = run()
    assert len(caught) == 1
    text = str(caught[0].message)
    assert cause in text
    assert "second line" not in text
    assert "lmkan-gen doctor" in text
    expected = torch.empty_like(b["y"])
    reference.forward(b["x"], b["table"], b["borders"], expected)
    assert torch.equal(b["y"], expected)
    assert dispatch.used()[0].kernel is None
    assert cause in dispatch.used()[0].describe()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run()
        run(shape=LayerShape(6, 4, 5, 21))  # the same binary: not tried again
        assert len(launcher.prepared) == 1
        b = run(Operation.BACKWARD)  # other binaries, the same cause
    assert len(launcher.prepared) == 3
    assert b["grad_x"].isfinite().all()
    assert b["grad_table"].isfinite().all()


def test_other_causes_warn_again(launcher: FakeLauncher) -> None:
    launcher.failure = CompilerMissing("one")
    with pytest.warns(RuntimeWarning, match="one"):
        run()
    launcher.failure = CompilerMissing("two")
    with pytest.warns(RuntimeWarning, match="two"):
        run(Operation.GRAD_INPUT)


def test_the_environment_forces_plain_torch(launcher: FakeLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    monkeypatch.setenv(dispatch.DISABLE_VARIABLE, "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not (run()["y"] == 7).any()
        for operation in CALL_OPERATIONS:
            run(operation)
    assert len(launcher.ran) == 1
    assert dispatch.used()[-1].kernel is None
    assert "LMKAN_GEN_DISABLE_KERNELS is set" in dispatch.used()[-1].describe()
    monkeypatch.setenv(dispatch.DISABLE_VARIABLE, "0")
    assert (run()["y"] == 7).all()


@pytest.mark.parametrize("operation", CALL_OPERATIONS)
def test_empty_batch_needs_no_kernel(launcher: FakeLauncher, operation: Operation) -> None:
    b = buffers(LayerShape(6, 4, 5, 0))
    if operation is Operation.GRAD_INPUT:
        del b["grad_table"]
    dispatch.execute(Call(operation, LayerShape(6, 4, 5, 0), CPU), b)
    assert launcher.prepared == []
    if "grad_table" in b:
        assert (b["grad_table"] == 0).all()


def test_refusals_pass_through(launcher: FakeLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(problem: Problem, demand: Demand) -> Choice:
        raise ValueError("tile size 16 does not fit")

    monkeypatch.setattr("lmkan_gen.selection.select", refuse)
    for _ in range(2):  # also the second time
        with pytest.raises(ValueError, match="tile size 16 does not fit"):
            run()
    with pytest.raises(ValueError, match="device meta is not supported"):
        dispatch.execute(Call(Operation.FORWARD, SHAPE, torch.device("meta")), {})


def test_prepared_kernels_are_bounded(launcher: FakeLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_CAPACITY", 2)
    for batch in (1, 2, 3):
        run(shape=LayerShape(6, 4, 5, batch))
    assert [u.shape.batch for u in dispatch.used()] == [2, 3]


def test_explain(launcher: FakeLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
    (choice,) = dispatch.explain(Call(Operation.FORWARD, SHAPE, CPU))
    assert (choice.family, choice.problem.device) == ("fake", device.cpu())
    assert len(dispatch.explain(Call(Operation.BACKWARD, SHAPE, CPU))) == 2
    assert launcher.prepared == []
    assert dispatch.used() == []
    monkeypatch.setenv(dispatch.DISABLE_VARIABLE, "1")
    (choice,) = dispatch.explain(Call(Operation.BACKWARD, SHAPE, CPU))
    assert (choice.family, choice.tier) == (None, Tier.REFERENCE)


@pytest.mark.parametrize(("text", "mebibytes"), [("", 256), ("1", 1), ("1024", 1024)])
def test_workspace_from_the_environment(monkeypatch: pytest.MonkeyPatch, text: str, mebibytes: int) -> None:
    monkeypatch.setenv(dispatch.WORKSPACE_VARIABLE, text)
    assert dispatch.workspace_limit() == mebibytes << 20
    (choice,) = dispatch.explain(Call(Operation.FORWARD, SHAPE, CPU))
    assert choice.problem.workspace == mebibytes << 20


@pytest.mark.parametrize("text", ["0", "-1", "a lot", "1.5"])
def test_workspace_that_is_none(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(dispatch.WORKSPACE_VARIABLE, text)
    with pytest.raises(ValueError, match=r"LMKAN_GEN_WORKSPACE is .*, must be a positive number of MiB"):
        dispatch.explain(Call(Operation.FORWARD, SHAPE, CPU))


@pytest.mark.parametrize("asked", [(), strides("x")])
def test_what_a_plan_asks_no_strides_of_it_gets_contiguous(asked: tuple[Stride, ...]) -> None:
    plan = LaunchPlan((), (Launch("k", ("x", "grad", "grad_x", *asked)),))
    seen: dict[str, Tensor] = {}

    def kernel(buffers: Mapping[str, Tensor]) -> None:
        seen.update(buffers)
        buffers["grad_x"].copy_(buffers["x"] + 1)

    x, grad, grad_x = torch.randn(5, 4).T, torch.randn(5, 3).T, torch.full((5, 4), torch.nan).T
    dispatch._contiguous(kernel, plan)({"x": x, "grad": grad, "grad_x": grad_x})
    assert {name for name, tensor in seen.items() if not tensor.is_contiguous()} == (
        {"x"} if asked else set()
    )
    assert torch.equal(seen["x"], x)
    assert torch.equal(seen["grad"], grad)
    assert torch.equal(grad_x, x + 1)


@pytest.fixture
def unlimited() -> Iterator[None]:
    yield
    dispatch.set_workspace_limit(None)


def test_workspace_as_an_argument(
    launcher: FakeLauncher, unlimited: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It outranks the environment, also for shapes that kernels were prepared for before."""
    monkeypatch.setenv(dispatch.WORKSPACE_VARIABLE, "64")
    for mebibytes in (None, 8, None, 8):
        set_workspace_limit(mebibytes)
        assert dispatch.workspace_limit() == (mebibytes or 64) << 20
        run()
    assert [p.workspace >> 20 for p in FakeLauncher.planned] == [64, 8]


@pytest.mark.parametrize("bad", [0, -5])
def test_workspace_below_one(unlimited: None, bad: int) -> None:
    with pytest.raises(ValueError, match=f"mebibytes is {bad}, must be a positive number of MiB such as 256"):
        set_workspace_limit(bad)
    assert dispatch.workspace_limit() == 256 << 20


@pytest.mark.parametrize("bad", [1.5, "64", True])
def test_workspace_that_is_no_integer(unlimited: None, bad: object) -> None:
    with pytest.raises(TypeError, match="mebibytes must be an integer or None"):
        set_workspace_limit(bad)  # type: ignore[arg-type]
