"""What is reported of layers whose functions are known, and that pictures come out."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from lmkan_gen import LMKAN2DLayer, dispatch
from lmkan_gen.cli import app
from lmkan_gen.inspection import describe_functions, layer_inputs, near_affine, occupancy
from lmkan_gen.nn import LMKANMLP, LMKANConv2d
from lmkan_gen.plot import plot_functions, plot_occupancy, plot_strengths


@pytest.fixture(autouse=True)
def _plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.DISABLE_VARIABLE, "1")


def known_layer() -> LMKAN2DLayer:
    """Output 0: affine in the first pair, a product of the second. Output 1: faint, and nothing."""
    layer = LMKAN2DLayer(8, 4, 2)
    g = layer.borders
    with torch.no_grad():
        layer.func_parameter.zero_()
        layer.func_parameter[:, :, 0, 0] = 3 * g.unsqueeze(1) - g + 5
        layer.func_parameter[:, :, 0, 1] = g.unsqueeze(1) * g
        layer.func_parameter[:, :, 1, 0] = 1e-3 * g.unsqueeze(1) * g
    return layer


@pytest.mark.parametrize("data", [False, True])
def test_functions_are_told_apart(data: bool) -> None:
    layer = known_layer()
    reports = describe_functions(layer, torch.randn(4, 5000) if data else None)
    assert [(r.output, r.pair) for r in reports] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    affine, product, faint, nothing = reports
    assert affine.residual < 1e-5 * affine.strength
    assert product.residual == pytest.approx(product.strength, rel=0.05)  # x y is orthogonal to 1, x and y
    assert faint.share == pytest.approx(1, rel=0.05)
    assert (nothing.strength, nothing.share) == (0, 0)
    assert {(r.output, r.pair) for r in near_affine(layer)} == {(0, 0), (1, 1)}
    assert len(near_affine(layer, tolerance=2)) == 4


def test_strength_is_the_standard_deviation_over_the_data() -> None:
    layer = known_layer()
    x = torch.rand(4, 200_000) * layer.borders[5:7].diff() + layer.borders[5]  # one cell in the second pair
    x[2:] = torch.rand(2, 200_000) * layer.borders[5:7].diff() + layer.borders[5]
    (product,) = [r for r in describe_functions(layer, x) if (r.output, r.pair) == (0, 1)]
    corners = torch.outer(layer.borders[5:7], layer.borders[5:7])
    assert product.strength == pytest.approx(corners.std(correction=0).item(), rel=1e-4)


def test_occupancy_counts_samples_around_each_knot() -> None:
    layer = LMKAN2DLayer(6, 4, 1)
    x = torch.randn(4, 300) * 2
    counts = occupancy(layer, x)
    assert counts.shape == (2, 7, 7)
    assert (counts.sum(dim=(1, 2)) == 4 * 300).all()
    probe = torch.zeros_like(layer.func_parameter)
    for p in range(2):
        cells = torch.bucketize(
            x[2 * p : 2 * p + 2].contiguous(), layer.borders[1:-1].contiguous(), right=True
        )
        for i, j in cells.T.tolist():
            probe[i : i + 2, j : j + 2, 0, p] += 1
    assert torch.equal(counts, probe[:, :, 0].permute(2, 0, 1).long())


def test_odd_widths() -> None:
    """The last pair's second input is always zero, which the middle cell holds."""
    layer = LMKAN2DLayer(5, 3, 2)
    x = torch.randn(3, 20)
    padded = torch.cat((x, torch.zeros(1, 20)))
    assert torch.equal(occupancy(layer, x), occupancy(LMKAN2DLayer(5, 4, 2), padded))
    for figure in (plot_functions(layer, x), plot_strengths(layer, x), plot_occupancy(layer, x)):
        figure.savefig(io.BytesIO())


def test_inputs_of_all_layers_are_caught() -> None:
    model = nn.Sequential(LMKANConv2d(1, 2, 3, 4), nn.Flatten(), LMKANMLP((2 * 2 * 2, 3, 1), 4)).train()
    model[0].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(6, 1, 4, 4)
    found = layer_inputs(model, x)
    assert {name: tuple(t.shape) for name, t in found.items()} == {
        "0.layer": (9, 24),
        "2.blocks.0.lmkan.layer": (8, 6),
        "2.blocks.1.lmkan.layer": (3, 6),
    }
    assert [m.training for m in model] == [False, True, True]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    torch.testing.assert_close(found["2.blocks.0.lmkan.layer"], model[1](model[0](x)).T)


def test_pictures(tmp_path: Path) -> None:
    layer, x = known_layer(), torch.randn(4, 2000)
    for i, figure in enumerate(
        (
            plot_functions(layer, x),
            plot_functions(layer, functions=[(1, 0), (0, 1), (0, 0)]),
            plot_functions(layer, x + 1e6, count=1),  # nothing inside the grid
            plot_occupancy(layer, x),
            plot_strengths(layer),
        )
    ):
        figure.savefig(tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").stat().st_size > 5000


def test_command(tmp_path: Path) -> None:
    model = LMKANMLP((4, 6, 1), 5)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "model.pt")
    np.save(tmp_path / "inputs.npy", np.random.randn(4, 100).astype(np.float32))
    arguments = ["plot", str(tmp_path / "model.pt"), "--output", str(tmp_path / "out")]
    run = CliRunner().invoke
    done = run(app, [*arguments, "--layer", "blocks.0.lmkan.layer", "--inputs", str(tmp_path / "inputs.npy")])
    assert done.exit_code == 0, done.output
    assert "of 12 functions could be affine" in done.output
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"functions.png", "strengths.png", "occupancy.png"}
    for extra, message in (
        ([], "holds several lmKAN layers, choose with --layer: blocks.0.lmkan.layer, blocks.1"),
        (["--layer", "head"], "holds no lmKAN layer 'head'"),
        (
            ["--layer", "blocks.1.lmkan.layer", "--inputs", str(tmp_path / "inputs.npy")],
            "must hold [6, samples], it holds [4, 100]",
        ),
    ):
        failed = run(app, [*arguments, *extra])
        assert isinstance(failed.exception, ValueError)
        assert message in str(failed.exception)
