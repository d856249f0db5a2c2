"""How much GPU memory a whole training step takes at most, counted buffer by buffer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lmkan_gen import LMKAN2DLayer, dispatch, set_workspace_limit
from lmkan_gen.problem import LayerShape

#: of the allocator, which may round a large block up by a mebibyte
SLACK = 16 << 20
#: parameter, its gradient, Adam's two moments, the regulariser's gradient until it is added, and for backward
#: the table and the sums of its gradient in another order
TABLES = 7


@pytest.fixture(params=[False, True], ids=["usual", "deterministic"])
def deterministic(request: pytest.FixtureRequest) -> Iterator[bool]:
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[64, None], ids=["64 MiB", "default"])
def workspace(request: pytest.FixtureRequest) -> Iterator[int]:
    set_workspace_limit(request.param)
    yield dispatch.workspace_limit()
    set_workspace_limit(None)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [
        LayerShape(512, 512, 18, 4096),
        LayerShape(512, 512, 18, 1 << 16),
        LayerShape(512, 512, 18, 1 << 18),
        LayerShape(128, 128, 20, 1 << 18),
        LayerShape(512, 512, 40, 1 << 14),
    ],
    ids=str,
)
def test_training_step(shape: LayerShape, workspace: int, deterministic: bool) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    layer = LMKAN2DLayer(shape.grids, shape.inputs, shape.outputs).cuda()
    optimizer = torch.optim.Adam(layer.parameters(), fused=True)  # others have temporaries of their own
    x = torch.randn(shape.inputs, shape.batch, device="cuda", requires_grad=True)
    grad = torch.randn(shape.outputs, shape.batch, device="cuda")

    def step() -> None:
        optimizer.zero_grad()
        x.grad = None
        y = layer(x)
        torch.autograd.backward((y, layer.get_hessian_regularization()), (grad, None))
        optimizer.step()

    step()  # compiles, and makes the optimizer's state
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before

    assert all(u.kernel is not None for u in dispatch.used() if u.device.type == "cuda" and u.shape == shape)
    # lower and upper corners may have sums of their own
    tables = (TABLES + deterministic) * shape.table_bytes
    activations = 2 * 4 * shape.batch * (shape.inputs + shape.outputs)  # and their gradients
    assert peak <= tables + activations + workspace + SLACK
    # all of them are there at some time, so that the bound means something
    assert peak >= 5 * shape.table_bytes + activations
