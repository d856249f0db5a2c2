"""Files of exported programs and AOTInductor packages, opened by another process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.export import Dim, export

from lmkan_gen.nn import LMKANMLP, lmkan_layers

OPEN = {
    "program": ("torch.export.load(file).module()", "an error when deserializing the saved file"),
    "package": ("torch._inductor.aoti_load_package(file)", "Could not find schema for lmkan_gen::"),
}


def in_another_process(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module", params=["float32", "frozen"])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files of one network, inputs, and outputs in float64."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = LMKANMLP((5, 12, 3), 6, precondition="relu_first", normalize_input=True)
    model(torch.randn(100, 5))
    model.eval()
    if request.param == "frozen":
        for layer in lmkan_layers(model).values():
            layer.freeze(torch.float32)
    with torch.no_grad():
        program = export(model, (torch.randn(2, 5),), dynamic_shapes=({0: Dim("batch")},))
        torch.export.save(program, folder / "program.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "package.pt2"))
        x = torch.randn(9, 5)
        torch.save((x, model.double()(x.double())), folder / "samples.pt")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPEN)
def test_files_need_the_package_imported_first(files: Path, kind: str) -> None:
    opening, message = OPEN[kind]
    code = (
        f"import torch, LIBRARY\nfile = '{kind}.pt2'\nx, expected = torch.load('samples.pt')\n"
        f"model = {opening}\n"
        "for part in (x, x[:1], x[:0]):\n"
        "    error = (model(part).double() - expected[:len(part)]).abs()\n"
        "    assert len(part) == 0 or error.max() < 1e-5 * expected.abs().max(), error\n"
    )
    done = in_another_process(code.replace("LIBRARY", "lmkan_gen"), files)
    assert done.returncode == 0, done.stderr
    done = in_another_process(code.replace("LIBRARY", "math"), files)
    assert done.returncode == 1
    assert message in done.stderr
    assert "lmkan_gen" in done.stderr
