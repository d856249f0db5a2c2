"""`tune --model MODULE:FACTORY`: users' code in the current directory, and what may be wrong with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from lmkan_gen.cli.model import shapes_of_model
from lmkan_gen.problem import LayerShape
from tests.command import Command

ROOT = Path(__file__).resolve().parent.parent
MODULE = """
import torch
from lmkan_gen import LMKAN2DLayer

def make():
    return LMKAN2DLayer(4, 8, 6)

def with_sample():
    return make(), torch.randn(8, 40)

def wrong_sample():
    return make(), torch.randn(7, 40)

def needs(width, *, depth):
    return make()

def has_defaults(width=8, *rest, **more):
    return make()

def fails():
    return {}["missing"]

def plain():
    return torch.nn.Linear(2, 2)

def nothing():
    return None

number = 3
"""


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "nets": MODULE,
        "broken": "x = 1\ndef f(:\n",
        "importing": "import nothing_of_this_name\n",
        "raising": "\n\nraise KeyError('boom')\n",
        "leaving": "import sys\nsys.exit()\n",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nets", "'nets' is not MODULE:FACTORY, such as my_package.networks:make_model"),
        (".nets:make", "is not MODULE:FACTORY"),
        ("nets.py:make", "there is no module nets.py in the current directory"),
        ("absent:make", "there is no module absent in the current directory"),
        ("nets:absent", "module nets ({0}/nets.py) has no absent"),
        ("nets:number", "nets:number is no function but 3"),
        ("nets:needs", "takes arguments (width, depth), but is called with none"),
        ("nets:fails", "nets:fails raised KeyError: 'missing' ({0}/nets.py, line 21, in fails)"),
        ("nets:nothing", "returned None; it must return a model, or a model and its sample input"),
        ("nets:plain", "Linear has no LMKAN2DLayer to tune for"),
        ("broken:f", "importing broken raised SyntaxError: invalid syntax ({0}/broken.py, line 2)"),
        (
            "importing:f",
            "importing importing raised ModuleNotFoundError: No module named 'nothing_of_this_name' "
            "({0}/importing.py, line 1, in <module>)",
        ),
        ("raising:f", "importing raising raised KeyError: 'boom' ({0}/raising.py, line 3, in <module>)"),
        ("leaving:f", "importing leaving raised SystemExit ({0}/leaving.py, line 2, in <module>)"),
    ],
)
def test_what_is_wrong_is_named(path: str, words: str, tmp_path: Path, run_cli: Command) -> None:
    outcome = run_cli("tune", "--model", path, "--batch", "4", "--device", "cpu")
    assert outcome.code == 2
    assert "Invalid value for --model: " in outcome.err
    assert words.format(tmp_path) in outcome.err
    assert "Traceback" not in outcome.err


def test_a_sample_input_of_the_wrong_size(run_cli: Command) -> None:
    outcome = run_cli("tune", "--model", "nets:wrong_sample", "--device", "cpu")
    assert outcome.code == 2
    assert "the model of nets:wrong_sample, run on its sample input, raised ValueError: " in outcome.err


@pytest.mark.parametrize("batches", ["0", "4,", "x", "-1", "1.5"])
def test_batches_that_are_none(batches: str, run_cli: Command) -> None:
    outcome = run_cli("tune", "--model", "nets:make", "--batch", batches, "--device", "cpu")
    assert outcome.code == 2
    assert f"Invalid value for --batch: {batches!r} is not a list of positive numbers" in outcome.err


def test_shapes_of_a_model() -> None:
    assert shapes_of_model("nets:make", "4,5") == [LayerShape(8, 6, 4, 4), LayerShape(8, 6, 4, 5)]
    assert shapes_of_model("nets:has_defaults", "4") == [LayerShape(8, 6, 4, 4)]
    assert shapes_of_model("nets:with_sample", None) == [LayerShape(8, 6, 4, 40)]
    with pytest.raises(typer.BadParameter, match="returns a sample input"):
        shapes_of_model("nets:with_sample", "4")


def test_the_search_path_is_as_before() -> None:
    before = list(sys.path)
    shapes_of_model("nets:with_sample", None)
    assert sys.path == before


def test_files_of_the_current_directory_are_not_taken_for_ours(tmp_path: Path) -> None:
    """Neither in the command nor in its measuring process."""
    for name in ("optuna", "ninja", "secrets", "selectors", "socket", "jinja2", "lmkan_gen", "rich"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('shadowed by ' + __file__)\n")
    script = tmp_path / "elsewhere" / "lmkan-gen"  # as pip installs it
    script.parent.mkdir()
    script.write_text(
        "from _lmkan_gen_command import main\nif __name__ == '__main__':\n    main()\n", encoding="utf-8"
    )
    command = [sys.executable, str(script), "tune", "--model", "nets:with_sample", "--device", "cpu"]
    command += ["--operation", "forward", "--trials", "1", "--output", "out.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.yaml").exists()
