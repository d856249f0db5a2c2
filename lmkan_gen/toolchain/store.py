"""The store of compiled kernels: one directory per binary, named by a hash of all that went into it.

Nothing here is ever changed in place. An entry is written in a private staging directory and then
renamed, so readers see all of it or nothing; who comes second uses the first one's. The hash of the
binary stands in its ``entry.json``, and an entry that does not match it is no entry.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout
from platformdirs import user_cache_dir

from lmkan_gen.plan import KernelSpec
from lmkan_gen.toolchain.compiler import Compiler
from lmkan_gen.toolchain.ninja_file import LOG

OVERRIDE = "LMKAN_GEN_CACHE"

#: raise it whenever the way kernels are called changes (argument order or types)
ABI = 1

_LOCK_SECONDS = 120
_STALE_SECONDS = 24 * 3600
_ENTRY = "entry.json"


@dataclass(frozen=True)
class Binary:
    """A compiled kernel in the store: a cubin or a shared object, its source and the compiler's output."""

    path: Path
    source: Path
    log: Path
    key: str


@dataclass(frozen=True)
class Entry:
    """What the store says about one of its binaries."""

    key: str
    directory: Path
    template: str
    arch: str
    constants: dict[str, int | str]
    compiler: str
    created: str
    """ISO 8601, UTC."""
    bytes: int
    """Size of the binary."""


def key(source: str, arch: str, compiler: Compiler) -> str:
    """The name of a binary: SHA-256 over source, architecture, flags, compiler and `ABI`."""
    ingredients = [ABI, source, arch, compiler.identity, compiler.flags, compiler.output]
    return hashlib.sha256(json.dumps(ingredients).encode()).hexdigest()


def root() -> Path:
    """``$LMKAN_GEN_CACHE``, else the platform's cache directory; created if need be.

    When it cannot be written, a directory of this user's under the temporary directory, with one
    warning.
    """
    return _root(os.environ.get(OVERRIDE) or user_cache_dir("lmkan_gen"))


@cache
def _root(wanted: str) -> Path:
    path = Path(wanted).expanduser().absolute()
    try:
        return _writable(path)
    except OSError as error:
        reason = error.strerror or str(error)
    fallback = _private_temporary()
    warnings.warn(
        f"kernel cache {path} cannot be written ({reason}); using {fallback} instead. "
        f"Set {OVERRIDE} to a writable directory to keep compiled kernels.",
        stacklevel=3,
    )
    return fallback


def _writable(path: Path) -> Path:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
        return path


def _private_temporary() -> Path:
    path = Path(tempfile.gettempdir()) / f"lmkan_gen-{os.getuid()}"
    with suppress(OSError):
        _writable(path)
        status = path.lstat()
        # anybody may create that name in /tmp: code is loaded from it, so it must be ours alone
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
            return path
    return Path(tempfile.mkdtemp(prefix="lmkan_gen-"))


def load(key: str, compiler: Compiler) -> Binary | None:
    """The stored binary, or None when there is none or it is damaged."""
    directory = root() / "entries" / key
    binary = Binary(directory / compiler.output, directory / compiler.source, directory / LOG, key)
    try:
        entry = json.loads((directory / _ENTRY).read_text())
        return binary if entry["sha256"] == _hash(binary.path) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def staging() -> Iterator[Path]:
    """A private directory inside the store, removed at the end; sweeps those that crashes left."""
    parent = root() / "staging"
    parent.mkdir(mode=0o700, exist_ok=True)
    _sweep(parent, older_than=_STALE_SECONDS)
    directory = Path(tempfile.mkdtemp(dir=parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def publish(staged: Path, key: str, spec: KernelSpec, compiler: Compiler) -> Binary:
    """Move a finished compilation into the store; if somebody was faster, use theirs."""
    content = staged / compiler.output
    entry = {
        "sha256": _hash(content),
        "bytes": content.stat().st_size,
        "template": spec.template,
        "arch": spec.arch,
        "constants": dict(spec.constants),
        "compiler": compiler.identity,
        "flags": compiler.flags,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    (staged / _ENTRY).write_text(json.dumps(entry, indent=1))
    destination = root() / "entries" / key
    destination.parent.mkdir(mode=0o700, exist_ok=True)
    while True:
        try:
            staged.rename(destination)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if (binary := load(key, compiler)) is not None:
            return binary
        # a damaged entry is in the way: move it aside, whoever manages to, and try again
        with suppress(FileNotFoundError):
            destination.rename(staged.parent / f"damaged-{uuid.uuid4().hex}")


def keep_failed(staged: Path, key: str) -> Path:
    """Keep source and log of a failed compilation for the user to look at; returns the directory."""
    destination = root() / "failed" / key
    destination.mkdir(mode=0o700, parents=True, exist_ok=True)
    for file in staged.iterdir():
        file.replace(destination / file.name)
    return destination


@contextmanager
def claim(keys: Iterable[str]) -> Iterator[None]:
    """Hold the locks of ``keys``, so that other processes wait for these binaries instead of building too.

    Only saves work: after a time-out, or where the file system has no locks, it goes on without.
    """
    directory = root() / "locks"
    directory.mkdir(mode=0o700, exist_ok=True)
    deadline = time.monotonic() + _LOCK_SECONDS
    with ExitStack() as stack:
        # everybody takes them in the same order: no deadlock
        for name in sorted(keys):
            with suppress(Timeout, OSError, NotImplementedError):
                remaining = max(0.0, deadline - time.monotonic())
                stack.enter_context(FileLock(directory / name, timeout=remaining))
        yield


def entries() -> list[Entry]:
    """All entries, newest first; unreadable ones are left out."""
    found = []
    for directory in (root() / "entries").glob("*"):
        with suppress(OSError, ValueError, KeyError):
            data = json.loads((directory / _ENTRY).read_text())
            names = ("template", "arch", "constants", "compiler", "created", "bytes")
            found.append(Entry(directory.name, directory, **{name: data[name] for name in names}))
    return sorted(found, key=lambda entry: entry.created, reverse=True)


def clear() -> int:
    """Remove all entries and kept failures; returns how many entries. Builds in progress go on."""
    removed = 0
    with staging() as rubbish:
        for name in ("entries", "failed"):
            for directory in (root() / name).glob("*"):
                with suppress(FileNotFoundError):
                    directory.rename(rubbish / f"{name}-{directory.name}")
                    removed += name == "entries"
    return removed


def _sweep(parent: Path, older_than: float) -> None:
    for directory in parent.iterdir():
        with suppress(FileNotFoundError):
            if time.time() - directory.stat().st_mtime > older_than:
                shutil.rmtree(directory, ignore_errors=True)


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
