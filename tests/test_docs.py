"""The code of the documentation, run as a reader would: top to bottom."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lmkan_gen
import lmkan_gen.nn

DOCS = Path(__file__).resolve().parent.parent / "docs"


def run(page: str) -> dict[str, object]:
    """Execute the page's Python blocks in one namespace; errors name the page and its line."""
    text = (DOCS / page).read_text()
    names: dict[str, object] = {"__name__": "documentation"}
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    assert blocks
    for block in blocks:
        above = text.count("\n", 0, block.start(1))
        exec(compile("\n" * above + block[1], page, "exec"), names)
    return names


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    """Broken links, names that are not there and parameters that functions lack are warnings."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=DOCS.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    reference = "".join(page.read_text() for page in (tmp_path / "reference").rglob("*.html"))
    for name in {*lmkan_gen.__all__, *lmkan_gen.nn.__all__} - {"__version__", "Precondition"}:
        assert f'id="lmkan_gen.{name}"' in reference or f'id="lmkan_gen.nn.{name}"' in reference, name


@pytest.mark.parametrize(
    "page", [DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md"))], ids=lambda p: p.name
)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run("networks.md")
    y, z, loss = (names[name] for name in ("y", "z", "loss"))
    assert isinstance(y, torch.Tensor)
    assert isinstance(z, torch.Tensor)
    assert isinstance(loss, torch.Tensor)
    assert y.shape == (256, 1)
    assert z.shape == (2, 16, 16, 16)
    assert loss.item() < 0.2


def test_tutorial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run("tutorial.md")  # its assertions hold
    assert (tmp_path / "functions.png").exists()
    assert "functions of the first layer could be affine" in capsys.readouterr().out


@pytest.mark.slow
def test_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    run("pytorch.md")  # its assertions hold
    assert {path.name for path in tmp_path.iterdir()} >= {"program.pt2", "package.pt2", "network.onnx"}


@pytest.mark.slow
def test_deployment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run("deployment.md")
    network, model = names["network"], names["model"]
    assert callable(network)
    assert callable(model)
    x = torch.randn(300, 64)
    torch.testing.assert_close(model(x), network(x), rtol=1e-5, atol=1e-5)
