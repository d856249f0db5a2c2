"""The store of compiled kernels: what it keeps, what it throws away, who may use it."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import multiprocessing
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import Pool
from pathlib import Path

import pytest
from filelock import FileLock
from jinja2 import DictLoader, Environment, StrictUndefined

from lmkan_gen import codegen, toolchain
from lmkan_gen.plan import KernelSpec
from lmkan_gen.toolchain import ninja_file, places, slot, store
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

    def counting(compilers, *more):  # type: ignore[no-untyped-def]
        runs.append(len(compilers))
        return real(compilers, *more)

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


DAMAGES = [
    "truncate", "garbage", "no description", "no binary", "empty directory", "another's", "open to others",
    "list",
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.filterwarnings("ignore:.*compiled code is executed")
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
        case "another's":  # such as one for another architecture, copied here
            other = toolchain.binary(spec(2))
            for file in good.path.parent.iterdir():
                file.write_bytes((other.path.parent / file.name).read_bytes())
        case "open to others":
            good.path.chmod(0o666)
        case "list":
            description.write_text("[]")
    (found,) = store.verify()
    assert found.directory == good.path.parent
    forget()
    runs = count_compilations(monkeypatch)
    again = toolchain.binary(spec())
    assert runs == [1]
    assert again.path == good.path
    assert store.verify() == []
    assert store.load(again.key, toolchain.compiler(spec())) == again


def _race(_: int) -> tuple[toolchain.Binary, int]:
    use_tiny_templates()
    forget()
    runs: list[int] = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        runs = count_compilations(monkeypatch)
        return toolchain.binary(spec()), sum(runs)


def test_sixteen_processes_agree_and_build_once(fresh_store: Path) -> None:
    pool: Pool
    with multiprocessing.get_context("fork").Pool(16) as pool:
        results = pool.map(_race, range(16), chunksize=1)
    assert len({binary for binary, _ in results}) == 1
    assert sum(compilations for _, compilations in results) == 1
    assert results[0][0].path.is_file()


def test_loser_of_a_race_without_locks_uses_the_winners(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody publishes the same binary while we compile it."""
    real = ninja_file.run

    def slow(*arguments):  # type: ignore[no-untyped-def]
        monkeypatch.setattr(ninja_file, "run", real)
        monkeypatch.setattr(store, "_LOCK_SECONDS", 0)
        winners.append(toolchain.binary(spec()))
        stamp.append(winners[0].path.stat().st_mtime_ns)
        return real(*arguments)

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
    usual = places._temporary()
    usual.chmod(0o777)
    assert places._temporary() != usual


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


def test_changed_source_is_found_by_verify(fresh_store: Path) -> None:
    binary = toolchain.binary(spec())
    assert store.verify() == []
    binary.source.write_text("something else")
    (found,) = store.verify()
    assert "changed" in found.why


def test_the_least_recently_used_is_removed_first(fresh_store: Path) -> None:
    first, second, third = (toolchain.binary(spec(n)) for n in (1, 2, 3))
    for age, binary in ((300, first), (200, second), (100, third)):
        for file in binary.path.parent.iterdir():
            os.utime(file, (time.time() - age,) * 2)
    forget()
    assert toolchain.binary(spec(1)) == first  # used again
    size = sum(file.stat().st_size for file in first.path.parent.iterdir())
    done = store.trim(size + 10)
    assert (done.removed, done.left) == (2, 1)
    assert done.left_bytes == size
    assert [entry.key for entry in store.entries()] == [first.key]
    assert store.trim(size + 10).removed == 0


def test_the_store_keeps_within_its_limit(fresh_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "DEFAULT_LIMIT", 1)
    toolchain.binary(spec(1))
    assert store.entries() == []
    toolchain.binary(spec(2))  # at most once a day
    assert len(store.entries()) == 1
    monkeypatch.setenv(store.LIMIT_VARIABLE, "3")
    assert store.limit() == 3 << 20
    monkeypatch.setenv(store.LIMIT_VARIABLE, "much")
    with pytest.raises(ValueError, match="LMKAN_GEN_CACHE_LIMIT is 'much', must be a positive number of MiB"):
        store.limit()


def test_clear_removes_everything_but_what_tune_keeps(fresh_store: Path) -> None:
    for name in ("entries", "bundles", "failed", "locks", "runs", "tuner"):
        (store.place(name) / "something").mkdir()
    store.clear()
    left = {path.parent.name for path in fresh_store.glob("*/*")}
    assert left == {"runs", "tuner"}


# --- whose it is, and where there is no room ------------------------------------------------------


def test_what_another_user_owns_is_not_executed(fresh_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = toolchain.binary(spec())
    compiler = toolchain.compiler(spec())
    root = store.root()
    monkeypatch.setattr(store, "root", lambda: root)
    mine = os.getuid()
    monkeypatch.setattr("os.getuid", lambda: mine + 1)
    with pytest.warns(UserWarning, match="belongs to another user"):
        assert store.load(binary.key, compiler) is None
    assert "another user" in store.verify()[0].why


@pytest.mark.parametrize("place", ["", "entries"])
def test_root_of_another_user_is_not_used(
    fresh_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (fresh_store / place).mkdir(parents=True)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    real = Path.stat

    def stat_of(path: Path, **arguments: bool) -> os.stat_result:
        status = real(path, **arguments)
        if path != fresh_store / place:
            return status
        fields = list(status)
        fields[4] += 1  # the owner
        return os.stat_result(fields)

    monkeypatch.setattr(Path, "stat", stat_of)
    with pytest.warns(UserWarning, match="belongs to another user"):
        assert store.root().is_relative_to(temporary)


def test_root_open_to_others_is_closed(fresh_store: Path) -> None:
    fresh_store.mkdir()
    fresh_store.chmod(0o777)
    assert store.root() == fresh_store
    assert fresh_store.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("name", ["entries", "bundles", "failed", "staging", "locks", "runs", "tuner"])
def test_places_are_closed_like_the_top(fresh_store: Path, name: str) -> None:
    (fresh_store / name).mkdir(parents=True)
    (fresh_store / name).chmod(0o777)
    before = os.umask(0)
    try:
        assert store.place(name).stat().st_mode & 0o777 == 0o755
        (fresh_store / name).rmdir()
        assert store.place(name).stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)


@pytest.mark.parametrize(("mode", "warned"), [(0o777, True), (0o1777, False), (0o755, False)])
def test_parents_that_others_may_change_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, warned: bool
) -> None:
    parent = tmp_path / "parent"
    parent.mkdir()
    parent.chmod(mode)
    monkeypatch.setenv(store.OVERRIDE, str(parent / "cache"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert store.root() == parent / "cache"
    assert [str(w.message).endswith(f"close it: chmod go-w {parent}") for w in said] == [True] * warned


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_parents_of_another_user_are_named(tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    parent.mkdir()
    os.chown(parent, 12345, 12345)
    (words,) = places.exposed(parent / "cache")
    assert words.startswith(f"{parent} belongs to another user")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_root_leaves_nothing_in_the_home_of_somebody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `sudo` without -H, and as pip answers it."""
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    temporary.mkdir()
    os.chown(home, 12345, 12345)
    monkeypatch.setenv(store.OVERRIDE, str(home / ".cache" / "lmkan_gen"))
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    with pytest.warns(UserWarning, match=rf"{home} belongs to another user; sudo -H"):
        assert store.root().is_relative_to(temporary)
    assert list(home.iterdir()) == []


def test_temporary_store_goes_with_the_last_process(tmp_path: Path) -> None:
    code = (  # without the package, which takes long to import
        "from importlib.util import module_from_spec, spec_from_file_location as of\n"
        f"spec = of('places', {places.__file__!r}); module = module_from_spec(spec)\n"
        "spec.loader.exec_module(module); print(module._temporary(), flush=True); input()"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    with start() as first, start() as second:
        assert first.stdout is not None
        assert second.stdout is not None
        path = Path(first.stdout.readline().strip())
        assert path == Path(second.stdout.readline().strip())
        first.communicate("\n")
        assert path.is_dir(), "the second uses it"
        second.communicate("\n")
        assert not path.exists()


def test_entries_are_private_whatever_the_umask(fresh_store: Path) -> None:
    before = os.umask(0)
    try:
        binary = toolchain.binary(spec())
    finally:
        os.umask(before)
    modes = {p.stat().st_mode & 0o777 for p in (binary.path.parent, *binary.path.parent.iterdir())}
    assert modes == {0o700, 0o600}
    assert (fresh_store / "entries").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("when", ["description", "compiling", "probe"])
def test_full_disk(fresh_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Wherever it shows first: one warning, and the kernel comes from the temporary directory."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if when == "description":
        write = Path.write_text

        def write_text(path: Path, text: str) -> int:
            if path.name == "entry.json" and path.is_relative_to(fresh_store):
                raise full
            return write(path, text)

        monkeypatch.setattr(Path, "write_text", write_text)
    elif when == "compiling":  # the compiler fails, and there is no room
        real = shutil.disk_usage
        monkeypatch.setattr(
            "shutil.disk_usage",
            lambda p: real(p)._replace(free=0) if Path(p).is_relative_to(fresh_store) else real(p),
        )
        run = ninja_file.run

        def without_room(compilers, staging, *more):  # type: ignore[no-untyped-def]
            if staging.is_relative_to(fresh_store):
                (staging / "0" / "kernel.cpp").write_text("#error no space left")
            return run(compilers, staging, *more)

        monkeypatch.setattr(ninja_file, "run", without_room)
    else:
        writable = places._writable

        def probe(path: Path) -> Path:
            if path == fresh_store:
                raise full
            return writable(path)

        monkeypatch.setattr(places, "_writable", probe)
    with pytest.warns(UserWarning, match=r"No space left on device.*LMKAN_GEN_CACHE") as caught:
        binary = toolchain.binary(spec())
    assert len(caught) == 1
    assert binary.path.is_relative_to(temporary)
    assert binary.path.is_file()


def test_no_room_anywhere_is_one_error(fresh_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store, "publish", full)
    with (
        pytest.warns(UserWarning, match="No space left"),
        pytest.raises(toolchain.ToolchainError, match=r"kernel store .* cannot be used: .*No space left"),
    ):
        toolchain.binary(spec())


def test_no_home_directory(tmp_path: Path) -> None:
    """A user that the system does not know, as in many containers."""
    code = (
        "import pwd\n"
        "def nobody(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = nobody\n"
        "import warnings; warnings.simplefilter('always')\n"
        "from lmkan_gen.toolchain import store\n"
        "print(store.root())\n"
        "from lmkan_gen import selection; selection.sources()"
    )
    environment = {
        k: v for k, v in os.environ.items() if k not in ("HOME", store.OVERRIDE) and "XDG" not in k
    }
    environment["TMPDIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)
    assert f"Set {store.OVERRIDE}" in done.stderr
    assert not (tmp_path / "~").exists()


# --- killed and hanging builds --------------------------------------------------------------------


def compiler_that(waits: str, directory: Path) -> Path:
    """A C++ compiler that runs ``waits`` before it compiles."""
    path = directory / "slow-c++"
    real = shlex.join(toolchain.compiler(spec()).executable)
    path.write_text(f'#!/bin/sh\ncase "$*" in *partial*) {waits} ;; esac\nexec {real} "$@"\n')
    path.chmod(0o700)
    return path


def test_killed_build_leaves_nothing_in_the_way(fresh_store: Path, tmp_path: Path) -> None:
    started = tmp_path / "started"
    slow = compiler_that(f"touch {started}; sleep 30", tmp_path)
    code = "from tests.test_store import *; use_tiny_templates(); toolchain.binary(spec())"
    environment = {**os.environ, "CXX": str(slow)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, start_new_session=True)
    deadline = time.monotonic() + 60
    while not started.exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not list((fresh_store / "entries").glob("*"))
    assert list((fresh_store / "staging").iterdir()), "it was killed in the middle"
    for lock in (fresh_store / "locks").glob("[0-9a-f]*"):  # not slots: the compiler still runs
        with FileLock(lock, timeout=0):  # no lock outlives its owner
            pass
    assert toolchain.binary(spec()).path.is_file()
    for left in (fresh_store / "staging").iterdir():  # swept after a day
        shutil.rmtree(left)


def test_hanging_compiler_costs_what_hangs(
    fresh_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = compiler_that("grep -q 'return 13' kernel.cpp && sleep 60", tmp_path)
    monkeypatch.setenv("CXX", str(slow))
    monkeypatch.setattr(ninja_file, "STALLED_S", 3.0)
    monkeypatch.setattr(ninja_file, "usable_cores", lambda: 1)
    hanging, fine = toolchain.build([spec(13), spec(1)])
    assert isinstance(hanging, toolchain.ToolchainError)
    assert "did not compile within 3 s" in str(hanging)
    assert "slow-c++" in str(hanging)
    assert isinstance(fine, toolchain.Binary)


# --- one bound for all -----------------------------------------------------------------------------


def test_compilers_of_all_processes_share_slots(tmp_path: Path) -> None:
    """Nine at once for two slots: never more than two run, and one that is killed leaves its slot."""
    running, seen = tmp_path / "running", tmp_path / "seen"
    running.mkdir()
    work = f"touch {running}/$$; ls {running} | wc -l >> {seen}; sleep 0.1; rm {running}/$$; echo done $1"

    def start(i: int, work: str) -> subprocess.Popen[bytes]:
        slots = [str(tmp_path / "slot-"), "2", str(tmp_path / f"log{i}")]
        command = [sys.executable, "-I", "-S", slot.__file__, *slots, "sh", "-c", work, "sh", str(i)]
        return subprocess.Popen(command)

    killed = start(9, "exec sleep 60")
    while not (tmp_path / "log9").exists():
        time.sleep(0.01)
    processes = [start(i, work) for i in range(9)]
    killed.kill()
    killed.wait()
    assert [process.wait() for process in processes] == [0] * 9
    counts = [int(line) for line in seen.read_text().split()]
    assert len(counts) == 9
    assert max(counts) == 2
    assert [(tmp_path / f"log{i}").read_text() for i in range(9)] == [f"done {i}\n" for i in range(9)]


def test_builds_take_slots(fresh_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its only slot taken, a build waits."""
    monkeypatch.setattr(ninja_file, "_parallel", lambda: 1)
    taken = Lock(f"{store.place('locks') / 'slot-'}{platform.node()}-0")
    with ThreadPoolExecutor() as pool:
        building = pool.submit(toolchain.binary, spec(1))
        with pytest.raises(TimeoutError):
            building.result(timeout=1.0)
        taken.release()
        assert building.result(timeout=60).path.is_file()


class Lock:
    """A slot that is taken."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT)
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def release(self) -> None:
        os.close(self._file)
