"""The wheel, the README and the pins: what reaches users besides the code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

from lmkan_gen import LMKAN2DLayer

ROOT = Path(__file__).resolve().parent.parent
VARIABLE = re.compile(r"LMKAN_GEN_[A-Z_]+")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = output.glob("*.whl")
    return built


def test_wheel_holds_the_package_and_its_data(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        str(path.relative_to(ROOT))
        for path in (*(ROOT / "lmkan_gen").rglob("*"), ROOT / "_lmkan_gen_command.py")
        if path.is_file() and "__pycache__" not in path.parts
    }
    for directory in ("templates", "tuning"):
        files = [path for path in (ROOT / directory).iterdir() if path.suffix in (".j2", ".yaml")]
        expected |= {f"lmkan_gen/_data/{directory}/{path.name}" for path in files}
    assert "lmkan_gen/_data/templates/row_vector.cpp.j2" in expected
    assert "lmkan_gen/py.typed" in expected
    assert expected <= names
    others = {name for name in names if not name.startswith("lmkan_gen/")}
    assert all(".dist-info/" in name for name in others - {"_lmkan_gen_command.py"})
    assert any(name.endswith("LICENSE") for name in others)


def test_wheel_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    script = (
        "import lmkan_gen; from lmkan_gen.cli import main; import sys;"
        "print(lmkan_gen.__file__);"
        "sys.argv = ['lmkan-gen', 'inspect', '--target', 'sm_90', '--shape', '64,64,8,1024']; main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-P", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    location, source = done.stdout.split("\n", 1)
    assert location == str(tmp_path / "lmkan_gen" / "__init__.py")
    assert "__global__" in source


def test_readme_example_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # one of them saves a file
    example, narrow, network = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    if not torch.cuda.is_available():
        example = example.replace(".cuda()", "")
    names: dict[str, object] = {}
    exec(example, names)
    output = names["output"]
    assert isinstance(output, torch.Tensor)
    assert output.shape == (128, 1024)
    assert output.isfinite().all()
    exec(narrow, names)
    layer, other = names["layer"], names["other"]
    assert isinstance(layer, LMKAN2DLayer)
    assert isinstance(other, LMKAN2DLayer)
    assert layer.frozen is None
    assert other.frozen is not None
    exec(network, names)  # its assertion holds


def test_readme_names_every_environment_variable() -> None:
    used = {v for p in (ROOT / "lmkan_gen").rglob("*.py") for v in VARIABLE.findall(p.read_text())}
    assert used == set(VARIABLE.findall((ROOT / "README.md").read_text()))


def test_readme_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_constraints_pin_every_requirement_and_nothing_else() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    assert pins["torch"] == "2.13.0"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    required = [*project["dependencies"], *(r for name in extras if name != "dev" for r in extras[name])]
    names = {re.split(r"[\[<>=~; ]", requirement)[0] for requirement in required} - {"lmkan-gen"}
    assert names == set(pins)


def test_pre_commit_runs_the_pinned_ruff() -> None:
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (revision,) = [r["rev"] for r in repositories if r["repo"].endswith("ruff-pre-commit")]
    assert f"ruff=={revision.removeprefix('v')}\n" in (ROOT / "constraints.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("compiler", [True, False], ids=["compiled", "without a compiler"])
def test_digits_example_reaches_its_accuracy(compiler: bool, tmp_path: Path) -> None:
    environment = dict(os.environ)
    if not compiler:
        environment |= {"PATH": str(tmp_path), "CXX": "/nowhere/c++", "LMKAN_GEN_NVCC": "/nowhere/nvcc"}
        environment |= {"CUDA_VISIBLE_DEVICES": ""}  # NVRTC would help out on a GPU
    output = tmp_path / "tuning.yaml"
    command = [sys.executable, str(ROOT / "examples" / "digits.py"), "--tuning", str(output)]
    command += ["--tuning-seconds", "5"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert output.exists() == compiler
    assert ("plain torch runs instead" in done.stderr) == (not compiler)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines()]
    tested = {row[0]: float(row[4]) for row in rows if len(row) == 5 and re.fullmatch(r"[01]\.\d+", row[4])}
    for narrow in ("float16 tables", "int8 tables"):
        assert abs(tested[narrow] - tested["lmKAN"]) <= 0.003
