from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lmkan_gen import knots, reference
from tests import truth


def case(
    inputs: int, outputs: int, grids: int, batch: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, table, borders, grad; samples away from knots, some far outside the grid."""
    borders = knots(grids).to(dtype)
    x = torch.randn(inputs, batch) * 2
    x = torch.from_numpy(truth.away_from_knots(x.numpy(), borders.double().numpy())).to(dtype)
    table = torch.randn(grids + 1, grids + 1, outputs, inputs // 2, dtype=torch.float32).to(dtype)
    return x, table, borders, torch.randn(outputs, batch, dtype=torch.float32).to(dtype)


def explicit(x: Tensor, table: Tensor, borders: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three functions without autograd, on outputs full of NaN."""
    y = torch.full_like(grad, torch.nan)
    grad_x = torch.full_like(x, torch.nan)
    grad_table = torch.full_like(table, torch.nan)
    reference.forward(x, table, borders, y)
    reference.grad_input(grad, x, table, borders, grad_x)
    reference.grad_table(grad, x, borders, grad_table)
    return y, grad_x, grad_table


@pytest.fixture(params=["one chunk", "many chunks"])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many chunks":  # several slices of pairs, of outputs and of the batch
        monkeypatch.setattr(reference, "_TEMPORARY", 2500)
        monkeypatch.setattr(reference, "_SAMPLES", 7)
        monkeypatch.setattr(reference, "_GATHERED_FUNCTIONS", 3)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 5e-6)])
@pytest.mark.parametrize(
    "shape", [(2, 1, 3, 1), (6, 5, 7, 40), (4, 3, 12, 33), (10, 8, 4, 0)], ids=lambda s: "x".join(map(str, s))
)
def test_agrees_with_the_formulas(shape: tuple[int, int, int, int], dtype: torch.dtype, limit: float) -> None:
    x, table, borders, grad = case(*shape, dtype)
    expected = truth.compute(x, table, borders, grad)
    y, grad_x, grad_table = explicit(x, table, borders, grad)
    assert truth.relative_error(reference.evaluate(x, table, borders), expected.y) <= limit
    assert truth.relative_error(y, expected.y) <= limit
    assert truth.relative_error(grad_x, expected.grad_x) <= limit
    if shape[-1]:
        assert truth.relative_error(grad_table, expected.grad_table) <= limit
    else:
        assert (grad_table == 0).all()


def test_chunking_is_real(monkeypatch: pytest.MonkeyPatch) -> None:
    _, table, _, _ = case(8, 6, 7, 1)
    assert len(list(reference._tiles(table))) == 1
    monkeypatch.setattr(reference, "_TEMPORARY", 2500)
    tiles = list(reference._tiles(table))
    assert len({pairs.start for pairs, _ in tiles}) > 1
    assert len({outs.start for _, outs in tiles}) > 1


def test_autograd_of_the_definition() -> None:
    x, table, borders, grad = case(6, 5, 7, 20)
    x.requires_grad_()
    table.requires_grad_()
    expected = truth.compute(x.detach(), table.detach(), borders, grad)
    grad_x, grad_table = torch.autograd.grad(reference.evaluate(x, table, borders), (x, table), grad)
    assert truth.relative_error(grad_x, expected.grad_x) <= 1e-13
    assert truth.relative_error(grad_table, expected.grad_table) <= 1e-13


def test_is_twice_differentiable() -> None:
    x, table, borders, _ = case(4, 2, 3, 3)
    inputs = (x.requires_grad_(), table.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, t: reference.evaluate(x, t, borders), inputs)
    assert torch.autograd.gradgradcheck(lambda x, t: reference.evaluate(x, t, borders), inputs)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("given", ["both", "v_x", "v_table"])
def test_double_backward_is_autograd_of_autograd(given: str) -> None:
    x, table, borders, grad = case(6, 5, 7, 20)
    v_x, v_table = torch.randn_like(x), torch.randn_like(table)
    leaves = tuple(t.clone().requires_grad_() for t in (grad, x, table))
    first = torch.autograd.grad(
        reference.evaluate(leaves[1], leaves[2], borders), leaves[1:], leaves[0], create_graph=True
    )
    pairs = zip(("v_x", "v_table"), first, (v_x, v_table), strict=True)
    kept = [(f, v) for name, f, v in pairs if given in ("both", name)]
    expected = torch.autograd.grad(
        [f for f, _ in kept], leaves, [v for _, v in kept], materialize_grads=True, allow_unused=True
    )
    out = tuple(torch.full_like(t, torch.nan) for t in (grad, x, table))
    reference.double_backward(
        v_x if given != "v_table" else None,
        v_table if given != "v_x" else None,
        grad, x, table, borders, *out,
    )  # fmt: skip
    for found, wanted in zip(out, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_stays_in_its_column(value: float) -> None:
    x, table, borders, grad = case(6, 5, 7, 12, torch.float32)
    clean = explicit(x, table, borders, grad)
    x[3, 5] = value
    y, grad_x, grad_table = explicit(x, table, borders, grad)
    assert not y[:, 5].isfinite().any()
    assert y[:, 5].isnan().all() or value == value
    others = [b for b in range(12) if b != 5]
    assert torch.equal(y[:, others], clean[0][:, others])
    assert torch.equal(grad_x[:, others], clean[1][:, others])
    assert torch.equal(grad_x[[0, 1, 4, 5], 5], clean[1][[0, 1, 4, 5], 5])
    assert torch.equal(grad_table[..., [0, 2]], clean[2][..., [0, 2]])
    assert not grad_table[..., 1].isfinite().all()
    assert torch.isnan(reference.evaluate(x, table, borders)[:, 5]).equal(torch.isnan(y[:, 5]))


def test_nothing_but_zero_weights_touches_nan_in_the_table() -> None:
    # samples whose cell does not touch the NaN knot must not see it, at whatever distance
    table = torch.zeros(6, 6, 2, 1)
    table[0, 0, 1, 0] = torch.nan
    y = torch.empty(2, 2)
    reference.forward(torch.tensor([[0.1, -9.0], [0.1, -9.0]]), table, knots(5), y)
    assert y.isnan().tolist() == [[False, False], [False, True]]


class _Uncapturable(TorchDispatchMode):
    """Notes calls that read a constant of the host or wait for the device: CUDA graphs refuse them."""

    refused = ("lift_fresh", "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    @property
    def found(self) -> set[str]:
        """Those of `refused` that were called."""
        return self.seen & set(self.refused)


def test_what_graphs_refuse_is_noticed() -> None:
    x = torch.arange(3)
    calls: dict[str, Callable[[], object]] = {
        "lift_fresh": lambda: torch.tensor((0, 1)),
        "_local_scalar_dense": x[1].item,
        "nonzero": x.nonzero,
    }
    for name, make in calls.items():
        with _Uncapturable() as mode:
            make()
        assert mode.found == {name}


def test_graphs_can_capture_it() -> None:
    x, table, borders, grad = case(6, 5, 7, 20)
    with _Uncapturable() as mode:
        explicit(x, table, borders, grad)
        out = (torch.empty_like(grad), torch.empty_like(x), torch.empty_like(table))
        reference.double_backward(torch.randn_like(x), torch.randn_like(table), grad, x, table, borders, *out)
    assert mode.seen
    assert not mode.found


_MEMORY = """
import resource, sys, torch
from lmkan_gen import knots, reference
torch.set_num_threads(1)
def peak():
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
def run(inputs, outputs, grids, batch):
    x, grad = torch.randn(inputs, batch), torch.randn(outputs, batch)
    table = torch.randn(grids + 1, grids + 1, outputs, inputs // 2)
    out = [torch.zeros_like(grad), torch.zeros_like(x), torch.zeros_like(table)]
    before = peak()
    reference.forward(x, table, knots(grids), out[0])
    reference.grad_input(grad, x, table, knots(grids), out[1])
    reference.grad_table(grad, x, knots(grids), out[2])
    return peak() - before
run(2, 2, 3, 2)  # libraries load lazily
print(run(64, 64, 40, 4000))
"""


def test_memory_is_bounded() -> None:
    # all gathered corners at once would be 4000 * 32 * 64 * 4 * 4 bytes = 125 MiB, four times over
    result = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 200 * 2**20
