"""The store of compiled kernels: what it keeps, what it throws away, who may use it."""

from __future__ import annotations

import dataclasses
import multiprocessing
import warnings
from collections.abc import Iterator
from multiprocessing.pool import Pool
from pathlib import Path

import pytest
from jinja2 import DictLoader, Environment, StrictUndefined

from lmkan_gen import codegen, toolchain
from lmkan_gen.plan import KernelSpec
from lmkan_gen.toolchain import ninja_file, store
from lmkan_gen.toolchain.compiler import Compiler

TEMPLATES = {"tiny.cpp.j2": 'extern "C" int answer() { return {{ n }}; }\n'}
COMPILER = Compiler("gcc 1.0 for here", ("-O3",), ("/usr/bin/c++",), "kernel.cpp", "kernel.so")


def spec(n: int = 1) -> KernelSpec:
    return KernelSpec.make("tiny.cpp.j2", "generic", {"n": n})


def use_tiny_templates() -> None:
    environment = Environment(loader=DictLoader(TEMPLATES), undefined=StrictUndefined)
    codegen._environment = lambda: environment  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def fresh_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    root = tmp_path / "cache"
    monkeypatch.setenv(store.OVERRIDE, str(root))
    monkeypatch.setattr(codegen, "_environment", codegen._environment)
    use_tiny_templates()
    yield root
    assert list((root / "staging").glob("*")) == []


def count_compilations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the number of jobs at each run of ninja."""
    runs: list[int] = []
    real = ninja_file.run

    def counting(compilers, staging, finished):  # type: ignore[no-untyped-def]
        runs.append(len(compilers))
        return real(compilers, staging, finished)

    monkeypatch.setattr(ninja_file, "run", counting)
    return runs


def forget() -> None:
    """What a new process would not know."""
    toolchain._known.clear()


def test_cold_then_warm(fresh_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = count_compilations(monkeypatch)
    first = toolchain.binary(spec())
    assert first.path.parent == fresh_store / "entries" / first.key
    assert first.path.is_file()
    assert first.log.is_file()
    assert first.source.read_text() == codegen.render(spec())
    assert toolchain.binary(spec()) is first
    forget()
    assert toolchain.binary(spec()) == first
    assert runs == [1]


@pytest.mark.parametrize("damage", ["truncate", "garbage", "no description", "no binary", "empty directory"])
def test_damaged_entry_is_rebuilt(damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    good = toolchain.binary(spec())
    content = good.path.read_bytes()
    description = good.path.with_name("entry.json")
    match damage:
        case "truncate":
            good.path.write_bytes(content[:-1])
        case "garbage":
            good.path.write_bytes(bytes(len(content)))
        case "no description":
            description.unlink()
        case "no binary":
            good.path.unlink()
        case "empty directory":
            for file in good.path.parent.iterdir():
                file.unlink()
    forget()
    runs = count_compilations(monkeypatch)
    again = toolchain.binary(spec())
    assert runs == [1]
    assert again.path == good.path
    assert store.load(again.key, toolchain.compiler(spec())) == again


def _race(_: int) -> tuple[toolchain.Binary, int]:
    use_tiny_templates()
    forget()
    runs: list[int] = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        runs = count_compilations(monkeypatch)
        return toolchain.binary(spec()), sum(runs)


def test_eight_processes_agree_and_build_once(fresh_store: Path) -> None:
    pool: Pool
    with multiprocessing.get_context("fork").Pool(8) as pool:
        results = pool.map(_race, range(8), chunksize=1)
    assert len({binary for binary, _ in results}) == 1
    assert sum(compilations for _, compilations in results) == 1
    assert results[0][0].path.is_file()


def test_loser_of_a_race_without_locks_uses_the_winners(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody publishes the same binary while we compile it."""
    real = ninja_file.run

    def slow(compilers, staging, finished):  # type: ignore[no-untyped-def]
        monkeypatch.setattr(ninja_file, "run", real)
        monkeypatch.setattr(store, "_LOCK_SECONDS", 0)
        winners.append(toolchain.binary(spec()))
        stamp.append(winners[0].path.stat().st_mtime_ns)
        return real(compilers, staging, finished)

    winners: list[toolchain.Binary] = []
    stamp: list[int] = []
    monkeypatch.setattr(ninja_file, "run", slow)
    assert toolchain.binary(spec()) == winners[0]
    assert winners[0].path.stat().st_mtime_ns == stamp[0]


def test_key_changes_with_every_ingredient(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(source: str = "source", arch: str = "sm_90", compiler: Compiler = COMPILER) -> str:
        return store.key(source, arch, compiler)

    keys = [
        key(),
        key(source="other"),
        key(arch="sm_80"),
        key(compiler=dataclasses.replace(COMPILER, identity="gcc 2.0 for here")),
        key(compiler=dataclasses.replace(COMPILER, flags=("-O2",))),
        key(compiler=dataclasses.replace(COMPILER, output="kernel.cubin")),
    ]
    monkeypatch.setattr(store, "ABI", store.ABI + 1)
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_key_holds_no_path() -> None:
    elsewhere = dataclasses.replace(COMPILER, executable=("/opt/other/bin/c++",))
    assert store.key("source", "generic", COMPILER) == store.key("source", "generic", elsewhere)
    found = toolchain.compiler(spec())
    assert "/" not in found.identity + "".join(found.flags)


def test_unwritable_root_falls_back_with_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a file where a directory is needed: unwritable even for root
    (tmp_path / "file").touch()
    monkeypatch.setenv(store.OVERRIDE, str(tmp_path / "file" / "cache"))
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    with pytest.warns(UserWarning, match=store.OVERRIDE) as caught:
        binary = toolchain.binary(spec())
    assert len(caught) == 1
    assert binary.path.is_relative_to(temporary)
    assert store.root().stat().st_mode & 0o777 == 0o700
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        toolchain.binary(spec(2))


def test_temporary_directory_of_somebody_else_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    usual = store._private_temporary()
    usual.chmod(0o777)
    assert store._private_temporary() != usual


def test_root_is_private(fresh_store: Path) -> None:
    assert store.root().stat().st_mode & 0o777 == 0o700


def test_entries_and_clear(fresh_store: Path) -> None:
    assert store.entries() == []
    first, second = toolchain.build([spec(1), spec(2)])
    assert isinstance(first, toolchain.Binary)
    assert isinstance(second, toolchain.Binary)
    listed = {entry.key: entry for entry in store.entries()}
    assert set(listed) == {first.key, second.key}
    entry = listed[first.key]
    assert (entry.template, entry.arch, entry.constants) == ("tiny.cpp.j2", "generic", {"n": 1})
    assert entry.bytes == first.path.stat().st_size
    assert entry.compiler == toolchain.compiler(spec()).identity
    assert store.clear() == 2
    assert store.entries() == []
    assert toolchain.binary(spec()).path.is_file()


def test_stale_staging_is_swept(fresh_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = store.root() / "staging" / "left-by-a-crash"
    left.mkdir(parents=True)
    monkeypatch.setattr(store, "_STALE_SECONDS", -1)
    toolchain.binary(spec())
    assert not left.exists()


def test_interrupted_build_leaves_nothing(fresh_store: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toolchain.build([spec(1), spec(2), spec(3)], interrupt)
    # the one that was finished may stay; nothing else
    assert len(store.entries()) == len(list((fresh_store / "entries").iterdir())) <= 1
