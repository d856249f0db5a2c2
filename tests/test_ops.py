from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from lmkan_gen import dispatch, knots, lmkan, reference
from lmkan_gen.call import Call
from lmkan_gen.problem import Operation
from tests import truth

FORWARD = torch.ops.lmkan_gen.forward.default
BACKWARD = torch.ops.lmkan_gen.backward.default
DOUBLE_BACKWARD = torch.ops.lmkan_gen.double_backward.default


@pytest.fixture(autouse=True)
def _plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.DISABLE_VARIABLE, "1")


def case(batch: int = 20, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    grids = 5
    return (
        torch.randn(6, batch, dtype=dtype),
        torch.randn(grids + 1, grids + 1, 4, 3, dtype=dtype),
        knots(grids, dtype),
    )


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[Operation]:
    """Operations that are really executed."""
    seen: list[Operation] = []
    execute = dispatch.execute

    def spy(call: Call, *arguments: Any) -> None:
        seen.append(call.operation)
        execute(call, *arguments)

    monkeypatch.setattr(dispatch, "execute", spy)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [0, 1, 20])
@pytest.mark.parametrize("grads", [(), (0,), (1,), (0, 1)])
def test_opcheck(dtype: torch.dtype, batch: int, grads: tuple[int, ...]) -> None:
    tensors = case(batch, dtype)
    for k in grads:
        tensors[k].requires_grad_()
    opcheck(FORWARD, (*tensors, 0, 0, 0, 0, False, "float32"))
    grad = torch.randn(4, batch, dtype=dtype, requires_grad=bool(grads))
    for needs in ((True, True), (True, False), (False, True)):
        opcheck(BACKWARD, (grad, *tensors, *needs, 0, 0, False, "float32"))


def test_opcheck_with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.DISABLE_VARIABLE, "0")
    x, table, borders = case()
    opcheck(FORWARD, (x.requires_grad_(), table.requires_grad_(), borders, 0, 0, 0, 0, False, "float32"))
    opcheck(BACKWARD, (torch.randn(4, 20), x, table, borders, True, True, 0, 0, False, "float32"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, True), (False, True, False)])
@pytest.mark.parametrize("given", ["x", "table", "both"])
def test_opcheck_of_double_backward(dtype: torch.dtype, needs: tuple[bool, bool, bool], given: str) -> None:
    x, table, borders = case(dtype=dtype)
    grad = torch.randn(4, 20, dtype=dtype)
    v_x = torch.randn_like(x) if given != "table" else None
    v_table = torch.randn_like(table) if given != "x" else None
    opcheck(DOUBLE_BACKWARD, (v_x, v_table, grad, x, table, borders, *needs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("disabled", ["0", "1"])
def test_opcheck_with_narrow_tables(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, disabled: str
) -> None:
    monkeypatch.setenv(dispatch.DISABLE_VARIABLE, disabled)
    x, table, borders = case()
    narrow, grad, v_x = table.to(dtype), torch.randn(4, 20), torch.randn_like(x)
    name = str(dtype).removeprefix("torch.")
    for given in (table, narrow):
        leaves = (x.clone().requires_grad_(), given.clone().requires_grad_())
        opcheck(FORWARD, (*leaves, borders, 0, 0, 0, 0, False, name))
        rounded = narrow if given is table else None
        opcheck(BACKWARD, (grad, x, given, borders, True, True, 0, 0, False, name, rounded))
    opcheck(torch.ops.lmkan_gen.tangent.default, (v_x, x, narrow, borders))
    opcheck(DOUBLE_BACKWARD, (v_x, torch.randn_like(narrow), grad, x, narrow, borders, True, True, True))


def test_opcheck_with_int8_tables() -> None:
    opcheck(FORWARD, (*case(), 0, 0, 0, 0, False, "int8"))


def test_compiles_without_graph_breaks() -> None:
    x, table, borders = case()
    compiled = torch.compile(
        lambda x, t: lmkan(x.relu(), t, borders).tanh(), backend="aot_eager", fullgraph=True
    )
    leaves = [t.clone().requires_grad_() for t in (x, table)]
    expected = [t.clone().requires_grad_() for t in (x, table)]
    compiled(*leaves).sum().backward()
    lmkan(expected[0].relu(), expected[1], borders).tanh().sum().backward()
    for found, wanted in zip(leaves, expected, strict=True):
        torch.testing.assert_close(found.grad, wanted.grad)


@pytest.mark.parametrize(
    ("need_x", "need_table", "operations"),
    [
        (False, False, [Operation.FORWARD]),
        (True, False, [Operation.FORWARD, Operation.GRAD_INPUT]),
        (False, True, [Operation.FORWARD, Operation.GRAD_TABLE]),
        (True, True, [Operation.FORWARD, Operation.BACKWARD]),
    ],
)
def test_no_gradient_is_computed_for_nobody(
    executed: list[Operation], need_x: bool, need_table: bool, operations: list[Operation]
) -> None:
    x, table, borders = case()
    x.requires_grad_(need_x)
    table.requires_grad_(need_table)
    scale = torch.ones((), requires_grad=True)  # so that there is something to go backward to
    (lmkan(x, table, borders) * scale).sum().backward()
    assert executed == operations
    assert (x.grad is not None) == need_x
    assert (table.grad is not None) == need_table


def test_one_of_two_gradients_asked_for(executed: list[Operation]) -> None:
    x, table, borders = case()
    y = lmkan(x.requires_grad_(), table.requires_grad_(), borders)
    torch.autograd.grad(y.sum(), x)
    assert executed[0] is Operation.FORWARD
    assert len(executed) == 2


def test_without_grad_mode_nothing_is_recorded() -> None:
    x, table, borders = case()
    with torch.no_grad():
        assert lmkan(x, table.requires_grad_(), borders).grad_fn is None
    with torch.inference_mode():
        assert lmkan(x, table, borders).shape == (4, 20)


def test_unneeded_gradients_come_back_empty() -> None:
    x, table, borders = case()
    grad = torch.randn(4, 20)
    grad_x, grad_table = BACKWARD(grad, x, table, borders, True, False, 0, 0, False, "float32")
    assert (grad_x.shape, grad_table.shape) == (x.shape, (0,))
    grad_x, grad_table = BACKWARD(grad, x, table, borders, False, True, 0, 0, False, "float32")
    assert (grad_x.shape, grad_table.shape) == ((0,), table.shape)


def test_float64_never_meets_a_kernel(executed: list[Operation]) -> None:
    x, table, borders = case(dtype=torch.float64)
    y = lmkan(x.requires_grad_(), table.requires_grad_(), borders)
    y.sum().backward()
    assert y.dtype == torch.float64
    assert executed == []


def test_gradcheck_inside_cells() -> None:
    x, table, borders = case(4, torch.float64)
    x = torch.from_numpy(truth.away_from_knots(x.numpy(), borders.numpy())).double()
    x, table = x.requires_grad_(), table[:, :, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lmkan, (x, table, borders))
    assert torch.autograd.gradgradcheck(lmkan, (x, table, borders))


@pytest.mark.parametrize("wanted", ["x", "table", "both"])
def test_double_backward_as_for_forces(wanted: str) -> None:
    # loss on dE/dx, differentiated with respect to the parameters, in float32
    x, table, borders = case()

    def forces(function: Any) -> list[Tensor]:
        leaves = {"x": x.clone().requires_grad_(), "table": table.clone().requires_grad_(wanted != "x")}
        energy = function(leaves["x"], leaves["table"], borders).square().sum()
        (force,) = torch.autograd.grad(energy, leaves["x"], create_graph=True)
        asked = list(leaves.values()) if wanted == "both" else [leaves[wanted]]
        return list(torch.autograd.grad(force.square().sum(), asked))

    for found, expected in zip(forces(lmkan), forces(reference.evaluate), strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * scale)


def test_third_derivatives_are_refused() -> None:
    x, table, borders = case(4)
    x.requires_grad_()
    first = torch.autograd.grad(lmkan(x, table, borders).square().sum(), x, create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), x, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="third derivatives"):
        second.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(20, 6)}, ValueError, r"x must be \[inputs, batch\] = \[6, batch\].*got \[20, 6\]"),
        ({"x": torch.zeros(6)}, ValueError, r"x must be .* got \[6\]"),
        ({"x": torch.zeros(7, 2)}, ValueError, r"x must be .* got \[7, 2\]"),
        ({"x": torch.zeros(6, 2).half()}, TypeError, "x has dtype float16; float32 .* float64"),
        ({"x": torch.zeros(6, 2).bfloat16()}, TypeError, "x has dtype bfloat16"),
        ({"x": torch.zeros(6, 2).long()}, TypeError, "x has dtype int64"),
        ({"x": torch.zeros(6, 2).double()}, TypeError, "table has dtype float32, x has float64"),
        ({"borders": torch.zeros(6).double()}, TypeError, "borders has dtype float64, x has float32"),
        ({"borders": torch.zeros(7)}, ValueError, r"borders must be \[G\+1\] = \[6\].*got \[7\]"),
        ({"table": torch.zeros(6, 5, 4, 3)}, ValueError, r"table must be .* got \[6, 5, 4, 3\]"),
        ({"table": torch.zeros(6, 6, 4)}, ValueError, r"table must be .* got \[6, 6, 4\]"),
        ({"table": torch.zeros(6, 6, 0, 3)}, ValueError, "outputs must be at least 1, got 0"),
        (
            {"table": torch.zeros(3, 3, 4, 3), "borders": torch.zeros(3)},
            ValueError,
            "grids must be at least 3, got 2",
        ),
        ({"table": torch.zeros(6, 6, 4, 3, device="meta")}, ValueError, "table is on meta, x is on cpu"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = dict(zip(("x", "table", "borders"), case(), strict=True)) | change
    with pytest.raises(error, match=message):
        lmkan(**arguments)


@pytest.mark.parametrize("bad", [torch.zeros(4, 19), torch.zeros(5, 20), torch.zeros(4)])
def test_bad_gradient_is_refused(bad: Tensor) -> None:
    with pytest.raises(ValueError, match=r"grad must be \[outputs, batch\] = \[4, 20\]"):
        BACKWARD(bad, *case(), True, True, 0, 0, False, "float32")


def test_grid_gradient_is_refused() -> None:
    x, table, borders = case()
    with pytest.raises(ValueError, match="the grid is fixed"):
        lmkan(x, table, borders.requires_grad_())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_mixed_devices_are_refused() -> None:
    x, table, borders = case()
    with pytest.raises(ValueError, match="table is on cpu, x is on cuda:0: move both to one device"):
        lmkan(x.cuda(), table, borders)
    with pytest.raises(ValueError, match="borders is on cuda:0, x is on cpu"):
        lmkan(x, table, borders.cuda())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("disabled", ["0", "1"])
def test_opcheck_on_a_gpu(monkeypatch: pytest.MonkeyPatch, disabled: str) -> None:
    monkeypatch.setenv(dispatch.DISABLE_VARIABLE, disabled)
    x, table, borders = (t.cuda() for t in case())
    opcheck(FORWARD, (x.requires_grad_(), table.requires_grad_(), borders, 0, 0, 0, 0, False, "float32"))
    opcheck(BACKWARD, (torch.randn(4, 20).cuda(), x, table, borders, True, True, 0, 0, False, "float32"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck_of_tangent(dtype: torch.dtype) -> None:
    x, table, borders = case(dtype=dtype)
    v_x = torch.randn_like(x, requires_grad=True)
    opcheck(torch.ops.lmkan_gen.tangent.default, (v_x, x, table.requires_grad_(), borders))
