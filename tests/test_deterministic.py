"""`torch.use_deterministic_algorithms(True)`: the same call gives the same bits every time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lmkan_gen import LMKAN2DLayer, dispatch, selection
from lmkan_gen.device import models, target
from lmkan_gen.families import family
from lmkan_gen.plan import Fill
from lmkan_gen.problem import LayerShape, Operation, Problem, TableDtype

GPU = target("sm_90")
(H200,) = (d for d in models("sm_90") if d.name == "NVIDIA H200")
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
        assert deterministic is False or choice.family in (
            "tile_stationary",
            "output_stationary",
            "cell_product",
        )
        return any(isinstance(step, Fill) for step in chosen.plan(problem, choice.parameters).steps)

    assert not zeroes(deterministic=True)
    if batch == 256 and table is TableDtype.FLOAT32 and operation is Operation.FORWARD:
        assert zeroes(deterministic=False)  # else this test would show nothing


@pytest.mark.parametrize(
    ("shape", "families"),
    [
        # tuned, with the same parameters
        (LayerShape(512, 512, 18, 1 << 18), ["cell_sorted"]),
        (LayerShape(12, 256, 28, 1 << 16), ["cell_sorted"]),
        # tuned too, but in an order that varies: the tile-stationary kernel for both. Apart they are not
        (LayerShape(64, 64, 8, 256), ["cluster_stationary", "cell_sorted"]),
        # outputs for which no block is wide enough
        (LayerShape(64, 8192, 8, 1024), ["tile_stationary", "cell_sorted"]),
        (LayerShape(126, 126, 200, 4096), ["cell_sorted"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("table", [TableDtype.FLOAT32, TableDtype.FLOAT16])
def test_kernels_for_both_gradients(shape: LayerShape, families: list[str], table: TableDtype) -> None:
    problem = Problem(Operation.BACKWARD, shape, GPU, table, deterministic=True)
    choices = selection.select_backward(problem)
    if table is TableDtype.FLOAT32:
        assert [c.family for c in choices] == families
    for c in choices:
        assert c.family is not None
        assert c.problem.table is table
        assert c.problem.deterministic
        assert family(c.family).violations(c.problem, c.parameters) == []


def test_tuned_parameters_are_used_and_not_called_stale() -> None:
    shape = LayerShape(512, 512, 18, 1 << 18)
    usual, ordered = (
        selection.select(Problem(Operation.BACKWARD, shape, H200, deterministic=d)) for d in (False, True)
    )
    assert ordered.parameters == usual.parameters
    assert (ordered.tier, ordered.stale) == (selection.Tier.EXACT, usual.stale)
    assert usual.time_us is not None
    assert ordered.time_us is None  # it was measured in the usual order


def test_a_call_asks_for_it(deterministic: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.DISABLE_VARIABLE, "0")
    dispatch.clear_caches()
    layer = LMKAN2DLayer(4, 6, 5)
    layer(torch.randn(6, 7)).sum().backward()
    assert {u.choice.problem.deterministic for u in dispatch.used()} == {True}


# --- on a GPU -------------------------------------------------------------------------------------

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]


def inputs_of(skew: str, shape: LayerShape) -> Tensor:
    """On a GPU, ``[I, B]``."""
    x = torch.randn(shape.inputs, shape.batch, device="cuda")
    if skew == "one cell":
        return 0.05 + 0.01 * torch.rand_like(x)
    if skew == "constant":
        return torch.full_like(x, 0.3)
    if skew == "far":
        return 100 * x
    return x


class TestOnGpu:
    """Bits, over several runs; correctness is `test_random_parameters_in_a_fixed_order`."""

    pytestmark = gpu

    @pytest.mark.parametrize("batch", BATCHES)
    def test_forward_and_input_gradient(self, deterministic: None, batch: int) -> None:
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

    @pytest.mark.parametrize("skew", ["normal", "one cell", "constant", "far"])
    @pytest.mark.parametrize(
        "shape",
        [
            LayerShape(512, 512, 18, 20011),
            LayerShape(12, 256, 28, 65536),
            LayerShape(128, 128, 10, 16384),
            LayerShape(128, 128, 20, 100003),
            LayerShape(64, 64, 8, 256),
            LayerShape(34, 33, 9, 65),
            LayerShape(126, 126, 100, 5000),
            LayerShape(8, 4096, 5, 3000),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("narrow", [None, torch.float16, torch.bfloat16])
    def test_both_gradients(
        self, deterministic: None, shape: LayerShape, skew: str, narrow: torch.dtype | None
    ) -> None:
        """The same bits while another stream keeps the GPU busy, so that blocks run at other times."""
        layer = LMKAN2DLayer(shape.grids, shape.inputs, shape.outputs).cuda()
        x = inputs_of(skew, shape).requires_grad_()
        grad = torch.randn(shape.outputs, shape.batch, device="cuda")
        other, a = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
        results = []
        for run in range(4):
            if run % 2:
                with torch.cuda.stream(other):
                    for _ in range(20):
                        a = (a * 1.0001).sin()
            with torch.autocast("cuda", narrow or torch.float16, enabled=narrow is not None):
                y = layer(x)
            results.append(torch.autograd.grad(y, (x, layer.func_parameter), grad.to(y.dtype)))
        torch.cuda.synchronize()
        kernels = {
            u.kernel for u in dispatch.used() if u.shape == shape and u.operation is not Operation.FORWARD
        }
        assert None not in kernels
        for grad_x, grad_table in results:
            assert bool(grad_x.isfinite().all() & grad_table.isfinite().all())
            assert torch.equal(grad_x, results[0][0])
            assert torch.equal(grad_table, results[0][1])

    def test_nan_stays_in_its_rows(self, deterministic: None) -> None:
        shape = LayerShape(64, 48, 9, 5000)
        layer = LMKAN2DLayer(shape.grids, shape.inputs, shape.outputs).cuda()
        x = torch.randn(shape.inputs, shape.batch, device="cuda")
        x[6, 1234] = torch.nan
        x.requires_grad_()
        grad = torch.randn(shape.outputs, shape.batch, device="cuda")
        grad_x, grad_table = torch.autograd.grad(layer(x), (x, layer.func_parameter), grad)
        bad = ~grad_x.isfinite()
        assert set(map(tuple, bad.nonzero().tolist())) <= {(6, 1234), (7, 1234)}
        assert bool(bad.any())
        # of the pair that the input belongs to, the corners of one cell
        bad_knots = (~grad_table.isfinite()).any(2)
        assert int(bad_knots.sum()) == 4
        assert int(bad_knots[..., 3].sum()) == 4
