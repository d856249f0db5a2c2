"""`make test-oldest`: the command line, a layer and a short tune with the oldest versions that are allowed.

They are the lower bounds in pyproject.toml, installed in `.venv-oldest` at the top of the repository. Needs
nothing but Python: it makes the environment that it tests.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv-oldest"
PYTHON, COMMAND = str(VENV / "bin" / "python"), str(VENV / "bin" / "lmkan-gen")
SHAPE = "16,12,5,64"
LAYER = """
import torch
from lmkan_gen import LMKAN2DLayer, dispatch
from lmkan_gen.reference import evaluate
layer, x = LMKAN2DLayer(5, 16, 12), torch.randn(16, 64, requires_grad=True)
y = layer(x)
y.square().sum().backward()
right = evaluate(x.detach().double(), layer.func_parameter.detach().double(), layer.borders.double())
assert torch.allclose(y.double(), right, atol=1e-5), (y - right).abs().max()
assert x.grad.isfinite().all() and layer.func_parameter.grad.abs().sum() > 0
assert {used.kernel for used in dispatch.used()} == {"row_vector"}, dispatch.used()
print("a layer computes with torch", torch.__version__)
"""


def lower_bounds() -> list[str]:
    """What the package requires, each at its lower bound.

    Raises:
        ValueError: a requirement has none.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = []
    for requirement in project["dependencies"]:
        match = re.match(r"([\w.-]+)>=([\w.]+)", requirement)
        if match is None:
            raise ValueError(f"{requirement!r} in pyproject.toml has no lower bound; write NAME>=VERSION")
        found.append(f"{match[1]}=={match[2]}")
    return found


def install(bounds: list[str]) -> None:
    """Make the environment, unless it is there with these bounds."""
    stamp = VENV / "bounds.txt"
    wanted = "".join(f"{bound}\n" for bound in bounds)
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    venv.create(VENV, clear=True, with_pip=True)
    constraints = VENV / "constraints.txt"
    constraints.write_text(wanted)
    run(PYTHON, "-m", "pip", "install", "-q", "-c", str(constraints), "-e", str(ROOT))
    stamp.write_text(wanted)


def run(*command: str, **environment: str) -> str:
    """The output of a command, which must succeed."""
    print("+", " ".join(command)[:100], flush=True)
    done = subprocess.run(
        command,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\nexit code {done.returncode}: {' '.join(command)}")
    return done.stdout


def check(directory: Path) -> int:
    """Use what is installed; returns the number of checks."""
    own = {"LMKAN_GEN_CACHE": str(directory / "cache"), "XDG_CONFIG_HOME": str(directory / "config")}
    output = directory / "tuned.yaml"
    search = ("--device", "cpu", "--shape", SHAPE, "--trials", "2", "--output", str(output))
    shared = ("--storage", f"sqlite:///{directory / 'study.db'}", "--operation", "forward")
    commands = [
        *([*verb, "--help"] for verb in ([], ["tune"], ["build"], ["inspect"], ["configs"], ["cache"])),
        ["doctor"],
        ["tune", *search],
        ["tune", *search, *shared],
        ["configs", "validate", str(output)],
        ["inspect", "--target", "sm_90", "--shape", SHAPE, "--what", "choice"],
        ["build", "--arch", "cpu", "--shape", SHAPE, "--forward-only", "--bundle", str(directory / "b.zip")],
        ["cache", "load", str(directory / "b.zip")],
        ["cache", "verify"],
    ]
    for arguments in commands:
        run(COMMAND, *arguments, **own)
    print(run(PYTHON, "-c", LAYER, **own), end="")
    return len(commands) + 1


def main() -> None:
    """Install and check."""
    bounds = lower_bounds()
    print("the oldest versions:", " ".join(bounds), flush=True)
    install(bounds)
    with tempfile.TemporaryDirectory() as directory:
        print(f"{check(Path(directory))} passed, 0 failed")


if __name__ == "__main__":
    main()
