"""Kernels compiled ahead of time: built without a GPU, run without a compiler."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lmkan_gen import selection, toolchain
from lmkan_gen.ahead import kernels
from lmkan_gen.device import models, target
from lmkan_gen.launch import cpu
from lmkan_gen.plan import KernelSpec
from lmkan_gen.problem import LayerShape, Operation
from lmkan_gen.toolchain import ToolchainError, bundle, nvcc, store
from tests.command import Command

SHAPE = LayerShape(16, 12, 5, 64)

#: a layer forward and backward, and what it ran on, in a process that finds no compiler
LAYER = """
import torch
from lmkan_gen import LMKAN2DLayer, dispatch
layer = LMKAN2DLayer(5, 16, 12)
x = torch.randn(16, 64, requires_grad=True)
layer(x).square().sum().backward()
for used in dispatch.used():
    print(used.choice.problem.operation, used.kernel, used.choice.source)
"""

Run = Callable[..., tuple[int, str]]
Change = Callable[[str, bytes], tuple[str, bytes]]


@pytest.fixture(autouse=True)
def _own_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv(store.OVERRIDE, str(tmp_path / "store"))
    selection.clear_caches()
    toolchain._known.clear()
    yield
    selection.clear_caches()
    toolchain._known.clear()


@pytest.fixture
def run(run_cli: Command) -> Run:
    """Runs ``lmkan-gen``; returns its exit code and all that it printed."""

    def run(*arguments: str) -> tuple[int, str]:
        code, out, err = run_cli(*arguments)
        return code, out + err

    return run


def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From now on, as on another machine: an empty store, and no compiler."""
    monkeypatch.setenv(store.OVERRIDE, str(tmp_path / "elsewhere"))
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv(nvcc.OVERRIDE, "/nowhere/nvcc")
    toolchain._known.clear()


def test_kernels_cover_what_layers_run_on_every_model() -> None:
    hopper = models("sm_90")
    found = kernels([SHAPE], hopper)
    operations = {dict(s.constants)["operation"] for s in found}
    assert operations >= {str(o) for o in Operation if o is not Operation.BACKWARD}
    for device in hopper:
        assert set(kernels([SHAPE], [device])) <= set(found)
    forward = kernels([SHAPE], hopper, backward=False)
    assert {dict(s.constants)["operation"] for s in forward} == {"forward"}


def test_a_layer_runs_from_a_bundle_without_a_compiler(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shapes = tmp_path / "shapes.txt"
    shapes.write_text(f"# what the model has\n{SHAPE}  # first\n\n")
    mine = tmp_path / "mine.yaml"  # a choice of this machine's own travels along
    arguments = ["--device", "cpu", "--operation", "forward", "--shape", str(SHAPE), "--trials", "1"]
    code, said = run("tune", *arguments, "--output", str(mine))
    assert code == 0, said
    monkeypatch.setenv(selection.TUNING_VARIABLE, str(mine))
    selection.clear_caches()
    packed = tmp_path / "kernels.zip"
    code, said = run("build", "--arch", "cpu", "--shapes", str(shapes), "--bundle", str(packed))
    assert code == 0, said
    monkeypatch.delenv(selection.TUNING_VARIABLE)

    no_compiler(monkeypatch, tmp_path)
    command = [sys.executable, "-W", "error", "-c", LAYER]
    before = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "plain torch runs instead" in before.stderr
    code, said = run("cache", "load", str(packed))
    assert code == 0, said
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    used = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert {kernel for _, kernel, _ in used} == {"row_vector"}
    (source,) = (source for operation, _, source in used if operation == "forward")
    assert "bundles" in source
    assert run("cache", "clear")[0] == 0
    after = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "plain torch runs instead" in after.stderr


@pytest.mark.skipif(not nvcc.installed(), reason="no nvcc on this machine")
def test_cuda_kernels_for_another_machine(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    packed = tmp_path / "kernels.zip"
    arguments = ["--arch", "sm_80,sm_90", "--shape", str(SHAPE), "--forward-only", "--bundle", str(packed)]
    code, said = run("build", *arguments)
    assert code == 0, said
    wanted = kernels([SHAPE], [target("sm_80"), target("sm_90")], backward=False)
    compiled = {spec: toolchain.binary(spec).path.read_bytes() for spec in wanted}
    no_compiler(monkeypatch, tmp_path)
    with pytest.raises(toolchain.CompilerMissing):
        toolchain.binary(wanted[0])
    bundle.load(packed)
    for spec in wanted:
        found = toolchain.binary(spec)
        assert found.path.read_bytes() == compiled[spec]
        assert toolchain.resources(found)
    with pytest.raises(toolchain.CompilerMissing):  # not in it
        toolchain.binary(kernels([SHAPE], [target("sm_89")], backward=False)[0])


def forward() -> KernelSpec:
    return kernels([SHAPE], [target("cpu")], backward=False)[0]


@pytest.fixture(scope="module")
def packed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("packed")
    path = directory / "kernels.zip"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(store.OVERRIDE, str(directory / "store"))
        binary = toolchain.binary(forward())
        written = bundle.write(path, [binary, binary], [])
    assert written == bundle.Packed(1, hashlib.sha256(path.read_bytes()).hexdigest())
    return path


@pytest.fixture
def packed(packed_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(packed_once, tmp_path))


def changed(path: Path, change: Change) -> Path:
    """A copy of a bundle with names and contents changed."""
    output = path.with_name("changed.zip")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(output, "w") as new:
        for name in old.namelist():
            new.writestr(*change(name, old.read(name)))
    return output


def described(field: str, value: object) -> Change:
    """A change of one field of a kernel's description."""

    def change(name: str, content: bytes) -> tuple[str, bytes]:
        if not name.endswith(".json"):
            return name, content
        return name, json.dumps({**json.loads(content), field: value}).encode()

    return change


def test_loaded_twice_is_loaded_once(packed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_compiler(monkeypatch, tmp_path)
    assert bundle.load(packed).kernels == bundle.load(packed).kernels == 1
    assert len(list((store.root() / "bundles").iterdir())) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda n, c: (n.replace("kernel.so", "../../evil.so"), c), "does not belong"),
        (lambda n, c: (f"/{n}", c), "does not belong"),
        (lambda n, c: (n, b"\x7fELF else" if n.endswith(".so") else c), "not what was compiled"),
        (lambda n, c: (n, c + b"// more" if n.endswith(".cpp") else c), "kernel.cpp was changed"),
        (lambda n, c: (n, c.replace(b'"abi": 1', b'"abi": 99')), "another version"),
        (lambda n, c: (n, b"[]" if n.endswith(".json") else c), "no bundle"),
        (lambda n, c: (n, b"[" * 200_000 if n.endswith(".json") else c), "no bundle"),
        (lambda n, c: (n, b" " * (1 << 19) + c if n.endswith(".json") else c), "bytes, more than"),
        (described("output", "../../evil.so"), "entry.json is no description: output"),
        (described("source", "/etc/hostname"), "entry.json is no description: source"),
        (described("source", "kernel.cu"), "kernel.so is not made of kernel.cu"),
        (described("bytes", -1), "entry.json is no description: bytes"),
        (described("constants", ["a"]), "entry.json is no description: constants"),
        (described("key", "../" * 20), "entry.json is no description: key"),
        (lambda n, c: (n.replace("build.log", "kernel.cubin"), c), "other files than it should"),
        (lambda n, c: (n.replace("build.log", "kernel.cpp"), c), "kernel.cpp twice"),
    ],
    ids=[
        "path", "absolute", "binary", "source", "version", "description", "nested", "large", "output",
        "source outside", "source of another", "size", "constants", "key", "another file", "twice",
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_what_is_wrong_is_refused_whole(packed: Path, change: Change, words: str) -> None:
    with pytest.raises(ToolchainError, match=words):
        bundle.load(changed(packed, change))
    assert not list((store.root() / "bundles").glob("*"))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("_MAX_MEMBERS", 3, "4 files, more than the 3"),
        ("_MAX_BYTES", 10, "bytes, more than the 10"),
    ],
)
def test_sizes_are_bounded(
    packed: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: int, words: str
) -> None:
    monkeypatch.setattr(bundle, name, value)
    with pytest.raises(ToolchainError, match=words):
        bundle.load(packed)


def test_what_it_declares_to_unpack_to_is_bounded(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "_MAX_BYTES", packed.stat().st_size)
    with pytest.raises(ToolchainError, match="unpacks to"):
        bundle.load(packed)


def test_tuning_files_in_it_are_validated(packed: Path) -> None:
    with zipfile.ZipFile(packed, "a") as archive:
        archive.writestr("tuning/0_mine.yaml", "schema: 1\ndevice: none\n")
    with pytest.raises(ToolchainError, match="holds a tuning file that cannot be used"):
        bundle.load(packed)
    assert not list((store.root() / "bundles").glob("*"))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ToolchainError, match="no regular file"):
        bundle.load(tmp_path / "pipe")


def test_the_hash_that_is_asked_for(run: Run, packed: Path) -> None:
    digest = hashlib.sha256(packed.read_bytes()).hexdigest()
    code, said = run("cache", "load", str(packed), "--sha256", "0" * 64)
    assert (code, f"its SHA-256 is {digest}, not {'0' * 64}" in said) == (1, True)
    assert not list((store.root() / "bundles").glob("*"))
    code, said = run("cache", "load", str(packed), "--sha256", digest.upper())
    assert (code, f"SHA-256 {digest}" in said) == (0, True)


def test_links_in_the_way_are_not_followed(packed_once: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("precious")
    for name in ("kernels.zip", ".kernels.zip.partial"):
        (tmp_path / name).symlink_to(mine)
    assert bundle.write(tmp_path / "kernels.zip", [], []).kernels == 0
    assert mine.read_text() == "precious"
    assert not (tmp_path / "kernels.zip").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} >= {"mine", "kernels.zip", ".kernels.zip.partial"}
    assert len(list(tmp_path.glob("*.zip*"))) == 2


def test_metadata_that_was_changed_after_loading_leads_nowhere(
    packed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_compiler(monkeypatch, tmp_path)
    bundle.load(packed)
    (description,) = store.root().glob("bundles/*/kernels/*/entry.json")
    elsewhere = tmp_path / "elsewhere.so"
    shutil.copy(description.with_name("kernel.so"), elsewhere)
    elsewhere.chmod(0o600)
    content = json.loads(description.read_text())
    description.write_text(json.dumps({**content, "output": os.path.relpath(elsewhere, description.parent)}))
    with pytest.raises(toolchain.CompilerMissing):
        toolchain.binary(forward())
    description.write_text(json.dumps(content))
    description.with_name("kernel.so").unlink()
    description.with_name("kernel.so").symlink_to(elsewhere)
    with pytest.raises(toolchain.CompilerMissing):
        toolchain.binary(forward())


def not_loadable(name: str, content: bytes) -> tuple[str, bytes]:
    """Of a kernel that a system cannot load: its hash is right, its code is not."""
    broken = b"\x7fELF of another system"
    if name.endswith(".so"):
        return name, broken
    return described("sha256", hashlib.sha256(broken).hexdigest())(name, content)


def test_a_kernel_that_cannot_be_loaded_is_compiled_instead(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle.load(changed(packed, not_loadable))
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "/nowhere/c++")
        with pytest.raises(toolchain.CompilerMissing, match=r"cannot be loaded.*CXX='/nowhere/c\+\+'"):
            toolchain.loaded(forward(), cpu.Kernels)
    bundle._aside.clear()  # as in another process
    assert "bundles" in str(toolchain.binary(forward()).path)
    with pytest.warns(RuntimeWarning, match=r"a kernel of a bundle cannot be loaded here .*compiled instead"):
        toolchain.loaded(forward(), cpu.Kernels)
    assert "bundles" not in str(toolchain.binary(forward()).path)
    toolchain.forget()
    bundle._aside.clear()
    toolchain.loaded(forward(), cpu.Kernels)  # what was compiled is found first


def test_damage_after_loading_is_not_executed(
    packed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_compiler(monkeypatch, tmp_path)
    bundle.load(packed)
    (library,) = store.root().glob("bundles/*/kernels/*/kernel.so")
    library.write_bytes(library.read_bytes()[:-1])
    with pytest.raises(toolchain.CompilerMissing):
        toolchain.binary(kernels([SHAPE], [target("cpu")], backward=False)[0])


def test_usage(run: Run, tmp_path: Path) -> None:
    assert run("build", "--arch", "cpu")[0] == 2
    code, said = run("build", "--arch", "sm_12", "--shape", str(SHAPE))
    assert code == 2
    assert "sm_12" in said
    text = tmp_path / "bad.txt"
    text.write_text("16,12,5\n")
    code, said = run("build", "--arch", "cpu", "--shapes", str(text))
    assert code == 2
    assert "16,12,5" in said
    (tmp_path / "no.zip").write_text("no archive")
    code, said = run("cache", "load", str(tmp_path / "no.zip"))
    assert code == 1
    assert "no bundle" in said


def test_what_a_bundle_brought_is_listed_verified_and_removed(
    run: Run, packed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_compiler(monkeypatch, tmp_path)
    bundle.load(packed)
    (directory,) = store.bundled()
    listed = run("cache", "list")[1]
    assert directory.name[:8] in listed
    assert f"from bundle {directory.parent.parent.name[:8]}" in listed
    assert "1 kernels (1 from bundles)" in run("doctor", "--json")[1]
    assert run("cache", "verify") == (0, f"1 of 1 kernels in {store.root()} are whole\n")
    source = next(directory.glob("kernel.cpp"))
    source.write_text(source.read_text() + "// more")
    code, said = run("cache", "verify")
    assert (code, f"{directory}: kernel.cpp was changed" in said, "0 of 1" in said) == (1, True, True)
    (directory / "kernel.so").unlink()
    assert f"{directory}: incomplete" in run("cache", "verify")[1]
    assert run("cache", "clear")[1].startswith("removed 1 compiled kernel from")
    assert "no compiled kernels" in run("cache", "list")[1]


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"compiler": "[/] [red]gcc\x1b[31m", "arch": "[bold]x"}, "[/] [red]gcc\\x1b[31m"),
        ({"created": 7}, None),
        ({"constants": ["a"]}, None),
        ({"bytes": "many"}, None),
    ],
)
def test_whatever_a_description_says_the_list_is_shown(
    run: Run, packed: Path, change: dict[str, object], shown: str | None
) -> None:
    bundle.load(packed)
    (directory,) = store.bundled()
    path = directory / "entry.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    code, said = run("cache", "list")
    assert code == 0
    assert "\x1b[31m" not in said
    assert shown is None or shown in said
    path.write_text("[" * 100_000)
    assert run("cache", "list")[0] == 0
    assert run("cache", "verify")[0] == 1
    assert run("doctor", "--json")[0] == 0


def test_verify_says_what_is_damaged(run: Run) -> None:
    binary = toolchain.binary(kernels([SHAPE], [target("cpu")], backward=False)[0])
    assert run("cache", "verify") == (0, f"1 of 1 kernels in {store.root()} are whole\n")
    os.truncate(binary.path, 100)
    code, said = run("cache", "verify")
    assert code == 1
    assert f"{binary.path.parent}: kernel.so is not what was compiled" in said
    assert "0 of 1" in said
