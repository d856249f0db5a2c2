"""`make test-clients`: install what users combine lmkan-gen with, run every script of this folder, report.

    python tests/clients/run.py [SCRIPT ...] [--markdown FILE]

The environment is `.venv-clients` at the top of the repository. It is made when it is missing and installed
anew when one of the files with versions has changed. A script passes if all its checks do.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
VENV = ROOT / ".venv-clients"
PYTHON = VENV / "bin" / "python"
REQUIREMENTS = HERE / "requirements.txt"
#: lists of packages, installed into a folder each that few scripts see, without what they ask for
ALONE = sorted((HERE / "alone").glob("*.txt"))
MARKS = ("<!-- clients -->", "<!-- /clients -->")
SECONDS = 300

#: script: the packages whose versions the table shows
CLIENTS = {
    "trainer": ("transformers",),
    "accelerate_bf16": ("accelerate",),
    "safetensors_files": ("safetensors",),
    "timm_model": ("timm",),
    "lightning_ddp": ("lightning",),
    "skorch_grid": ("skorch",),
    "geometric": ("torch-geometric",),
    "schnet": ("schnetpack",),
    "convert_models": ("transformers", "timm", "torch-geometric", "schnetpack"),
    "captum_attribution": ("captum",),
    "mlflow_model": ("mlflow",),
    "onnx_runtime": ("onnxruntime",),
    "openvino_model": ("openvino",),
}

#: the folders of packages that a script sees
SEEN = {
    "timm_model": ("timm",),
    "schnet": ("schnetpack",),
    "convert_models": ("timm", "schnetpack"),
}


class Row(NamedTuple):
    """What one script did."""

    script: str
    packages: str
    passed: bool
    seconds: float
    message: str


def install() -> None:
    """Make the environment what the files say, unless it is that already."""
    files = (REQUIREMENTS, *ALONE, ROOT / "constraints.txt", ROOT / "pyproject.toml")
    state = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    stamp = VENV / ".installed"
    if stamp.exists() and stamp.read_text() == state:
        return
    subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=True)
    pip = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    constrained = [*pip, "-c", str(ROOT / "constraints.txt")]
    print(f"installing into {VENV}, which takes a few minutes", flush=True)
    # torch before all others: nothing may resolve another build of it
    subprocess.run([*constrained, "torch"], check=True)
    subprocess.run([*constrained, "-r", REQUIREMENTS, "-e", ROOT], check=True)
    for path in ALONE:
        subprocess.run([*pip, "--no-deps", "--target", VENV / "alone" / path.stem, "-r", path], check=True)
    stamp.write_text(state)


def run(script: str) -> Row:
    """Run one script in a process of its own and read its lines."""
    paths = os.pathsep.join(str(VENV / "alone" / folder) for folder in SEEN.get(script, ()))
    environment = dict(os.environ, OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    environment["PYTHONPATH"] = paths
    start = time.monotonic()
    try:
        done = subprocess.run(
            [PYTHON, "-m", f"tests.clients.{script}"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        status, output, errors = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as expired:
        status, output, errors = -1, _text(expired.stdout), f"no end after {SECONDS} s"
    seconds = time.monotonic() - start
    passed = re.findall(r"^ok: .*", output, re.MULTILINE)
    failed = re.findall(r"^FAILED: (.*)", output, re.MULTILINE)
    print("\n".join(line for line in output.splitlines() if line.startswith(("ok: ", "FAILED: "))))
    if failed:
        short = [claim if len(claim) < 200 else f"{claim[:200]} ..." for claim in failed]
        message = f"{len(failed)} of {len(failed) + len(passed)} checks failed. {'; '.join(short)}"
    elif status or not passed:  # it ended otherwise than by its checks
        message = f"exit status {status}: {(errors.strip().splitlines() or ['no output'])[-1]}"
    else:
        message = f"{len(passed)} checks"
    good = status == 0 and bool(passed) and not failed
    packages = ", ".join(f"{package} {version(package, paths)}" for package in CLIENTS[script])
    return Row(script, packages, good, seconds, message)


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def version(package: str, paths: str = "") -> str:
    """The version that is installed, in one of the ``paths`` or for all scripts."""
    code = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
    environment = dict(os.environ, PYTHONPATH=paths)
    found = subprocess.run([PYTHON, "-c", code, package], env=environment, capture_output=True, text=True)
    return found.stdout.strip() or "not installed"


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| script | with | verdict | seconds | message |", "|---|---|---|---|---|"]
    for row in rows:
        verdict = "passes" if row.passed else "**fails**"
        message = row.message.replace("|", "\\|")
        lines.append(f"| {row.script} | {row.packages} | {verdict} | {row.seconds:.0f} | {message} |")
    return "\n".join(lines)


def write(text: str, path: Path) -> None:
    """Put ``text`` between the marks of a file, or into a new file.

    Raises:
        SystemExit: the file exists and does not have both marks.
    """
    block = f"{MARKS[0]}\n{text}\n{MARKS[1]}"
    if not path.exists():
        path.write_text(block + "\n")
        return
    page = path.read_text()
    before, first, rest = page.partition(MARKS[0])
    _, last, after = rest.partition(MARKS[1])
    if not (first and last):
        raise SystemExit(f"{path} has no lines {MARKS[0]} and {MARKS[1]} to put the table between")
    path.write_text(before + block + after)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Run the scripts that combine lmkan-gen with other libraries."
    )
    parser.add_argument("script", nargs="*", help=f"one or more of {', '.join(CLIENTS)}; all by default")
    parser.add_argument(
        "--markdown", type=Path, help=f"file to put the table into, between {' and '.join(MARKS)}"
    )
    options = parser.parse_args()
    if unknown := sorted(set(options.script) - set(CLIENTS)):
        parser.error(f"there is no script {unknown[0]!r}; there are {', '.join(CLIENTS)}")
    install()
    rows = []
    for script in options.script or CLIENTS:
        print(f"== {script}", flush=True)
        rows.append(run(script))
    torch_version = version("torch")
    text = f"Python {sys.version.split()[0]}, torch {torch_version}, CPU.\n\n{table(rows)}"
    print(text)
    if options.markdown is not None:
        write(text, options.markdown)
    sys.exit(not all(row.passed for row in rows))


if __name__ == "__main__":
    main()
