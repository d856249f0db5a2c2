"""What a plan that was traced for one batch says of others is what families say of these."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lmkan_gen import LMKAN2DLayer, dispatch, selection
from lmkan_gen.call import Call
from lmkan_gen.device import Device, models
from lmkan_gen.families import Family, Parameters, families
from lmkan_gen.launch import cpu, cuda, native, numbers
from lmkan_gen.plan import KernelSpec
from lmkan_gen.problem import CALL_OPERATIONS, LayerShape, Operation, Problem, TableDtype
from lmkan_gen.tracing import Trace, Traced, UntraceableError, plain

H200, T4 = models("sm_90")[0], models("sm_75")[0]
CPU = Device("cpu", "AMD EPYC", "x86-64-v4", 16)


@pytest.fixture(autouse=True)
def _kernels_of_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses of kernels that nothing compiled; plans are made, not run."""
    monkeypatch.setattr(cuda, "_function", lambda path, index, kernel: (None, 1))
    monkeypatch.setattr(cuda, "_allow", lambda function, step: None)
    monkeypatch.setattr(cuda, "_multiprocessors", lambda index: 132)


def starts(spec: KernelSpec, plan: Any) -> Sequence[Any]:
    if spec.is_cuda:
        return list(cuda._steps(spec, plan, Path("none"), 0))
    return [cpu.Start(1, step, step.arguments) for step in plan.steps]


def written(asked: Problem, family: Family, parameters: Parameters) -> Any:
    plan, spec = family.plan(asked, parameters), family.spec(asked, parameters)
    part = native.Part(spec, plan, asked.table, starts(spec, plan))
    return numbers.write(part, asked.table is not TableDtype.FLOAT32)


def with_batch(asked: Problem, batch: Any) -> Problem:
    return asked.layer.of(replace(asked.shape, batch=batch))


@pytest.mark.parametrize("device", [H200, T4, CPU], ids=lambda d: d.name)
@pytest.mark.parametrize("table", TableDtype)
@pytest.mark.parametrize("operation", CALL_OPERATIONS)
@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
def test_a_traced_plan_is_that_of_other_batches(
    device: Device, table: TableDtype, operation: Operation, deterministic: bool
) -> None:
    served = asked = 0
    for family in families(device.kind, operation, table):
        for _ in range(6):
            inputs, outputs = random.choices((16, 64, 100, 384), k=2)
            shape = LayerShape(inputs, outputs, random.choice((4, 9, 26)), 1)
            constant, strided = random.random() < 0.7, random.random() < 0.3
            some = Problem(operation, shape, device, table, deterministic, constant, strided=strided)
            batch = int(2 ** random.uniform(5, 18))
            batches, _ = selection.batches_alike(with_batch(some, batch))
            parameters = family.default(with_batch(some, batch))
            if parameters is None or family.violations(with_batch(some, batch), parameters):
                continue
            trace = Trace(batch)
            traced = with_batch(some, trace.batch)
            assert not family.violations(traced, parameters)
            found = written(traced, family, parameters)
            assert [plain(n) for n in found.numbers] == written(
                with_batch(some, batch), family, parameters
            ).numbers
            for other in (batch, *random.choices(batches, k=4)):
                asked += 1
                values = trace.values(other)
                if values is None:
                    continue
                served += 1
                exact = with_batch(some, other)
                assert not family.violations(exact, parameters)
                expected = written(exact, family, parameters)
                numbers = [values[n.place] if isinstance(n, Traced) else n for n in found.numbers]
                assert numbers == expected.numbers, (family.name, parameters, shape, batch, other)
                assert found.names == expected.names
    # guards that hardly anything passes would be of no use
    assert served >= asked / 2


def test_arithmetic_of_traced_numbers_is_that_of_integers() -> None:
    operations = ("+", "-", "*", "//", "%")
    for _ in range(200):
        text = "b"
        for _ in range(random.randint(1, 6)):
            number = random.choice([-7, -3, -1, 2, 5, 64])
            left = random.choice(["{t}", "-({t})"]).format(t=text)
            text = f"({left}) {random.choice(operations)} {number}"
            if random.random() < 0.2:
                text = f"{random.randint(-99, 99)} {random.choice(operations[:3])} ({text})"
            if random.random() < 0.3:
                text = f"{random.choice(['min', 'max'])}({text}, {random.randint(-50, 50)})"
        trace = Trace(random.randint(1, 1000))
        result = eval(text, {"b": trace.batch, "min": min, "max": max})
        for batch in (plain(trace.batch), *random.choices(range(1, 2000), k=20)):
            values = trace.values(batch)
            if values is not None:
                expected = eval(text, {"b": batch, "min": min, "max": max})
                assert (values[result.place] if isinstance(result, Traced) else result) == expected


def test_uses_as_plain_numbers_are_guarded() -> None:
    for use in (
        int,
        float,
        list[int]().__mul__,
        lambda n: list(range(n)),
        bool,
        lambda n: n > 99,
        lambda n: n == 100,
    ):
        trace = Trace(100)
        use(trace.batch)
        assert trace.values(100) is not None
        assert trace.values(98) is None or use is bool
    trace = Trace(1)
    assert bool(trace.batch)
    assert trace.values(0) is None
    with pytest.raises(UntraceableError):
        {Trace(1).batch: 0}
    trace = Trace(5)
    10 // trace.batch
    assert trace.values(0) is None


def test_new_batches_of_a_range_do_not_ask_python(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, grad = LMKAN2DLayer(5, 6, 10), torch.randn(10, 1024)

    def call(x: Tensor) -> tuple[Tensor, ...]:
        y = layer(x)
        return y.detach(), *torch.autograd.grad(y, [layer.func_parameter], grad[:, : x.shape[1]])

    dispatch.clear_caches()
    for batch in (1000, 1001):  # Python runs the first call
        call(torch.randn(6, batch))
    asked: list[Call] = []
    find = dispatch._find

    def ask(call: Call) -> Any:
        asked.append(call)
        return find(call)

    monkeypatch.setattr(dispatch, "_find", ask)
    inputs = [torch.randn(6, batch) for batch in (999, 993, 1024)]
    found = [call(x) for x in inputs]
    assert not asked
    assert {c.shape.batch for c in native.by_recipe()} >= {999, 993, 1024}
    assert {u.shape.batch for u in dispatch.used()} == {1000, 1001, 999, 993, 1024}
    call(torch.randn(6, 992))
    assert {c.shape.batch for c in asked} >= {992}
    monkeypatch.setenv(native.VARIABLE, "python")
    for x, ours in zip(inputs, found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, call(x), strict=True))
