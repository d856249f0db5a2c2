"""Tuning for a whole model: every lmKAN layer is found, with the batch that it sees."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lmkan_gen
from lmkan_gen import LMKAN2DLayer, cli, dispatch, selection
from lmkan_gen.model_tuning import layer_calls, layer_shapes
from lmkan_gen.nn import LMKANConv2d
from lmkan_gen.problem import LayerShape, Operation
from lmkan_gen.selection import Tier
from lmkan_gen.tuning_file import load

FACTORY = """
import torch
from lmkan_gen import LMKAN2DLayer
from torch import nn

def model():
    return nn.Sequential(LMKAN2DLayer(4, 6, 8), LMKAN2DLayer(4, 8, 6))

def with_input():
    return model(), torch.randn(6, 21)

def nothing():
    return None

number = 5
"""


@pytest.fixture(autouse=True)
def _own_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr("lmkan_gen.tuner.run.journal_directory", lambda: tmp_path / "journals")
    selection.clear_caches()
    dispatch.clear_caches()
    yield
    selection.clear_caches()
    dispatch.clear_caches()


class Network(nn.Module):
    """Layers of one shape and of others, one called twice, one never; batches that differ."""

    def __init__(self) -> None:
        super().__init__()
        self.first = LMKAN2DLayer(4, 6, 8)
        self.norm = nn.BatchNorm1d(8, affine=False)
        self.same = nn.ModuleList([LMKAN2DLayer(4, 8, 8), LMKAN2DLayer(4, 8, 8)])
        self.head = LMKAN2DLayer(5, 8, 2)
        self.unused = LMKAN2DLayer(5, 10, 2)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        x = self.norm(self.first(scale * x).T).T
        for layer in self.same:
            x = layer(x)
        x = self.same[0](x=x)
        out: Tensor = self.head(x[:, ::2])
        return out


def test_calls_are_found_and_the_model_is_left_as_it_was() -> None:
    model = Network().train()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = [LayerShape(6, 8, 4, 11), LayerShape(8, 8, 4, 11), LayerShape(8, 2, 5, 6)]
    x = torch.randn(6, 11)
    for sample in (x, (x,), {"x": x, "scale": 2.0}):
        assert layer_calls(model, sample) == calls
    assert model.training
    assert not model.norm.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(layer._forward_pre_hooks for layer in model.modules())
    assert layer_calls(model, torch.randn(6, 0)) == []


def test_hooks_go_when_the_model_fails() -> None:
    model = Network()
    with pytest.raises(ValueError, match="9"):
        layer_calls(model, torch.randn(9, 3))
    assert model.training
    assert not any(layer._forward_pre_hooks for layer in model.modules())


def test_shapes_for_batches() -> None:
    model = nn.Sequential(LMKAN2DLayer(4, 6, 8), LMKAN2DLayer(4, 6, 8), LMKAN2DLayer(3, 8, 2))
    expected = [
        LayerShape(6, 8, 4, 1),
        LayerShape(8, 2, 3, 1),
        LayerShape(6, 8, 4, 50),
        LayerShape(8, 2, 3, 50),
    ]
    assert layer_shapes(model, [1, 50]) == expected


def test_models_that_cannot_be_tuned() -> None:
    with pytest.raises(ValueError, match="Linear makes no lmKAN call"):
        lmkan_gen.tune(nn.Linear(2, 2), torch.randn(2, 2))
    with pytest.raises(ValueError, match="Network makes no lmKAN call"):
        lmkan_gen.tune(Network(), torch.randn(6, 0))
    with pytest.raises(ValueError, match="Network makes no lmKAN call in float32"):
        lmkan_gen.tune(Network().double(), torch.randn(6, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="Linear has no LMKAN2DLayer"):
        layer_shapes(nn.Linear(2, 2), [3])


def test_layers_are_found_by_what_runs() -> None:
    convolution = LMKANConv2d(2, 3, 3, 4)
    assert layer_calls(convolution, torch.randn(4, 2, 5, 5)) == [LayerShape(18, 3, 4, 36)]
    convolution.eval().layer.freeze(torch.float16)
    assert layer_calls(convolution, torch.randn(4, 2, 5, 5)) == [LayerShape(18, 3, 4, 36)]
    slabs = LMKANConv2d(2, 3, 3, 4, workspace_bytes=3 * 9 * 18 * 4)
    assert layer_calls(slabs, torch.randn(4, 2, 5, 5)) == [LayerShape(18, 3, 4, 27), LayerShape(18, 3, 4, 9)]

    class Function(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return lmkan_gen.lmkan(x, torch.randn(5, 5, 2, 3), lmkan_gen.knots(4))

    assert layer_calls(Function(), torch.randn(6, 8)) == [LayerShape(6, 2, 4, 8)]
    compiled = nn.Sequential(LMKAN2DLayer(4, 6, 8))
    compiled.compile(backend="eager")
    assert layer_calls(compiled, torch.randn(6, 12)) == [LayerShape(6, 8, 4, 12)]
    before = dispatch.used()
    assert layer_calls(compiled, torch.randn(6, 12)) == [LayerShape(6, 8, 4, 12)]
    assert dispatch.used() == before


def test_layers_run_what_was_tuned() -> None:
    model = nn.Sequential(LMKAN2DLayer(4, 6, 8), LMKAN2DLayer(4, 8, 6))
    x = torch.randn(6, 19)
    result = lmkan_gen.tune(model, x, trials=1)
    assert {e.shape.layer for e in result.entries} == set(layer_calls(model, x))
    assert {e.operation for e in result.entries} > {Operation.FORWARD}
    dispatch.clear_caches()
    model(x).sum().backward()
    assert {used.choice.tier for used in dispatch.used()} == {Tier.EXACT}
    forward = lmkan_gen.tune(model, x, trials=1, forward_only=True)
    assert {e.operation for e in forward.entries} == {Operation.FORWARD}


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str]]:
    (tmp_path / "factory_module.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.delitem(sys.modules, "factory_module", raising=False)

    def run(*arguments: str) -> tuple[int, str]:
        options = ("--device", "cpu", "--operation", "forward", "--trials", "1", "--output", "out.yaml")
        monkeypatch.setattr(sys, "argv", ["lmkan-gen", "tune", *options, *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr()
        assert isinstance(end.value.code, int | None)
        return end.value.code or 0, said.out + said.err

    return run


@pytest.mark.parametrize(
    ("arguments", "batches"),
    [
        (("--model", "factory_module:model", "--batch", "13,17"), {13, 17}),
        (("--model", "factory_module:with_input"), {21}),
    ],
    ids=["batches", "sample"],
)
def test_command(
    run: Callable[..., tuple[int, str]], tmp_path: Path, arguments: tuple[str, ...], batches: set[int]
) -> None:
    code, said = run(*arguments)
    assert code == 0, said
    shapes = {e.shape.layer for e in load(tmp_path / "out.yaml").entries}
    assert shapes == {LayerShape(i, o, 4, b) for i, o in ((6, 8), (8, 6)) for b in batches}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "factory_module"], "is not MODULE:FACTORY"),
        (["--model", "nowhere_at_all:model"], "nowhere_at_all"),
        (["--model", "factory_module:absent"], "absent"),
        (["--model", "factory_module:number"], "is no function"),
        (["--model", "factory_module:nothing"], "must return a model"),
        (["--model", "factory_module:model"], "give the samples"),
        (["--model", "factory_module:model", "--batch", "4,x"], "64,1024"),
        (["--model", "factory_module:model", "--batch", "0"], "'0' is not a list of positive numbers"),
        (["--model", "factory_module:with_input", "--batch", "4"], "leave it out"),
        (["--shape", "6,8,4,9", "--batch", "4"], "goes with a model"),
        ([], "--model"),
    ],
)
def test_wrong_usage(run: Callable[..., tuple[int, str]], arguments: list[str], words: str) -> None:
    code, said = run(*arguments)
    assert code == 2
    assert words in " ".join(said.replace("│", " ").split())
