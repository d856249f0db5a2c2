"""`torch.use_deterministic_algorithms(True)`: the same call gives the same bits every time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lmkan_gen import LMKAN2DLayer, dispatch, selection
from lmkan_gen.device import target
from lmkan_gen.families import family
from lmkan_gen.plan import Fill
from lmkan_gen.problem import LayerShape, Operation, Problem, TableDtype

GPU = target("sm_90")
#: too few samples to fill the device, so that sums over tiles would be split; and enough
BATCHES = (256, 65536)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("operation", [Operation.FORWARD, Operation.GRAD_INPUT])
@pytest.mark.parametrize("table", [TableDtype.FLOAT32, TableDtype.FLOAT16])
def test_sums_over_tiles_are_not_split(batch: int, operation: Operation, table: TableDtype) -> None:
    def zeroes(deterministic: bool) -> bool:
        """Whether results are zeroed, as is done where several blocks add to them."""
        problem = Problem(operation, LayerShape(128, 128, 20, batch), GPU, table, deterministic)
        choice = selection.select(problem)
        assert choice.family is not None
        chosen = family(choice.family)
        assert deterministic is False or choice.family == "tile_stationary"
        return any(isinstance(step, Fill) for step in chosen.plan(problem, choice.parameters).steps)

    assert not zeroes(deterministic=True)
    if batch == 256 and table is TableDtype.FLOAT32 and operation is Operation.FORWARD:
        assert zeroes(deterministic=False)  # else this test would show nothing


def test_gradients_of_tables_are_left_to_torch() -> None:
    """No kernel has a fixed order for them yet."""
    with pytest.warns(UserWarning, match="correct but slow"):
        choices = selection.select_backward(
            Problem(Operation.BACKWARD, LayerShape(126, 126, 20, 4096), GPU, deterministic=True)
        )
    assert [c.family for c in choices] == [None]


def test_a_call_asks_for_it(deterministic: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.DISABLE_VARIABLE, "0")
    dispatch.clear_caches()
    layer = LMKAN2DLayer(4, 6, 5)
    layer(torch.randn(6, 7)).sum().backward()
    assert {u.choice.problem.deterministic for u in dispatch.used()} == {True}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("batch", BATCHES)
def test_equal_bits_on_a_gpu(deterministic: None, batch: int) -> None:
    layer = LMKAN2DLayer(20, 128, 128).cuda()
    x = torch.randn(128, batch, device="cuda", requires_grad=True)
    results = []
    for _ in range(3):
        y = layer(x)
        (grad_x,) = torch.autograd.grad(y.sum(), x)
        results.append((y.detach(), grad_x))
    for y, grad_x in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(grad_x, results[0][1])
