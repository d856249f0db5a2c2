"""The store of compiled kernels: one directory per binary, named by a hash of all that went into it.

Nothing here is ever changed in place. An entry is written in a private staging directory and then
renamed, so readers see all of it or nothing; who comes second uses the first one's. The hash of the
binary stands in its ``entry.json``, and an entry that does not match it is no entry. Compiled code is
executed, so what another user owns or may change is not touched.
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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

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
_OTHERS_WRITE = 0o022
_PROBE_BYTES = 1 << 16
#: what `Entry` takes from a description
_DESCRIBED = {
    "template": str,
    "arch": str,
    "constants": dict,
    "compiler": str,
    "created": str,
    "bytes": int,
}
_PLACES = ("entries", "bundles", "failed", "staging", "locks")
_FOREIGN = "it belongs to another user, or others may write to it, and compiled code is executed"


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
    bundle: str | None = None
    """Name of the bundle that brought it; None: it was compiled here."""


@dataclass(frozen=True)
class Damage:
    """An entry that will not be used, and why."""

    directory: Path
    why: str


def key(source: str, arch: str, compiler: Compiler) -> str:
    """The name of a binary: SHA-256 over source, architecture, flags, compiler and `ABI`."""
    return _key(ABI, source, arch, compiler.identity, compiler.flags, compiler.output)


def _key(*ingredients: object) -> str:
    return hashlib.sha256(json.dumps(ingredients).encode()).hexdigest()


def root() -> Path:
    """``$LMKAN_GEN_CACHE``, else the platform's cache directory; created if need be, for this user only.

    When it cannot be used (read-only, full, somebody else's, no home directory), a directory of this
    user's under the temporary directory, with one warning.
    """
    return _root(_wanted())


def _wanted() -> str:
    if override := os.environ.get(OVERRIDE):
        return override
    with suppress(RuntimeError):  # there is no home directory, which shows when this is expanded
        return user_cache_dir("lmkan_gen")
    return "~/.cache/lmkan_gen"


def abandon(error: OSError) -> bool:
    """Go on in the temporary directory after the store failed in use, because its disk is full, say.

    Returns whether that is a change; the caller then tries again.
    """
    wanted = _wanted()
    if wanted in _abandoned:
        return False
    _abandoned[wanted] = error.strerror or str(error)
    _root.cache_clear()
    return True


#: roots that failed in use, and how
_abandoned: dict[str, str] = {}


@cache
def _root(wanted: str) -> Path:
    reason = _abandoned.get(wanted)
    if reason is None:
        try:
            return _writable(Path(wanted).expanduser().absolute())
        except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
            reason = getattr(error, "strerror", None) or str(error)
    fallback = _private_temporary()
    warnings.warn(
        f"kernel cache {wanted} cannot be used ({reason}); using {fallback} instead. "
        f"Set {OVERRIDE} to a directory of yours that can be written to keep compiled kernels.",
        stacklevel=3,
    )
    return fallback


def _writable(path: Path) -> Path:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    for place in (path, *(path / name for name in _PLACES if (path / name).exists())):
        if place.stat().st_uid != os.getuid():
            raise PermissionError(errno.EPERM, "it belongs to another user, and compiled code is executed")
    status = path.stat()
    if status.st_mode & _OTHERS_WRITE:
        path.chmod(stat.S_IMODE(status.st_mode) & ~_OTHERS_WRITE)
    with tempfile.TemporaryFile(dir=path) as probe:  # a full disk still takes empty files
        probe.write(bytes(_PROBE_BYTES))
    return path


def _private_temporary() -> Path:
    path = Path(tempfile.gettempdir()) / f"lmkan_gen-{os.getuid()}"
    with suppress(OSError):
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
        # anybody may create that name in /tmp, or have put things there while it was open to all
        if stat.S_ISDIR(status.st_mode) and not status.st_mode & _OTHERS_WRITE:
            return _writable(path)
    return Path(tempfile.mkdtemp(prefix="lmkan_gen-"))


def load(key: str, compiler: Compiler) -> Binary | None:
    """The stored binary, or None when there is none, or it is damaged, or not this user's own."""
    directory = root() / "entries" / key
    try:
        entry = description(directory)
        if (why := damage(directory, entry)) is None and entry["output"] == compiler.output:
            return Binary(directory / compiler.output, directory / compiler.source, directory / LOG, key)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if why == _FOREIGN:
        warnings.warn(f"{directory}: {why}; it is not used", stacklevel=2)
    return None


def damage(directory: Path, entry: Mapping[str, Any]) -> str | None:
    """Why a kernel's directory, described by ``entry``, must not be used; None when it may.

    Raises:
        OSError: a file is missing.
        KeyError: the description is incomplete.
    """
    binary = directory / entry["output"]
    for path in (directory, binary):
        status = path.lstat()
        if status.st_uid != os.getuid() or status.st_mode & _OTHERS_WRITE:
            return _FOREIGN
    if entry["key"] != directory.name:
        return f"it describes another kernel, {entry['key'][:8]}"
    if entry["sha256"] != _hash(binary):
        return f"{binary.name} is not what was compiled"
    return None


def verify() -> list[Damage]:
    """What is wrong in the store: damaged entries, and such as are not what their name says."""
    found = []
    for directory in sorted((root() / "entries").glob("*")):
        try:
            entry = description(directory)
            why = damage(directory, entry)
            if why is None:
                names = ("arch", "compiler", "flags", "output")
                source = (directory / entry["source"]).read_text()
                if _key(entry["abi"], source, *(entry[n] for n in names)) != directory.name:
                    why = f"{entry['source']} or what it was compiled with was changed"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            why = f"incomplete: {error}"
        if why is not None:
            found.append(Damage(directory, why))
    return found


def description(directory: Path) -> dict[str, Any]:
    """What ``entry.json`` says of a kernel.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no mapping.
    """
    try:
        entry = json.loads((directory / _ENTRY).read_text())
    except RecursionError as error:
        raise ValueError(f"{_ENTRY} is nested too deeply") from error
    if not isinstance(entry, dict):
        raise ValueError(f"{_ENTRY} is no mapping")
    return entry


@contextmanager
def staging() -> Iterator[Path]:
    """A private directory inside the store, removed at the end; sweeps those that crashes left."""
    parent = root() / "staging"
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
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
        "key": key,
        "abi": ABI,
        "sha256": _hash(content),
        "bytes": content.stat().st_size,
        "output": compiler.output,
        "source": compiler.source,
        "template": spec.template,
        "arch": spec.arch,
        "constants": dict(spec.constants),
        "compiler": compiler.identity,
        "flags": compiler.flags,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    (staged / _ENTRY).write_text(json.dumps(entry, indent=1))
    make_private(staged)
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


def make_private(directory: Path) -> None:
    """Let nobody else read or change ``directory`` and its files, whatever the umask."""
    directory.chmod(0o700)
    for path in directory.iterdir():
        path.chmod(0o600)


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
    """All compiled kernels, those of bundles too, newest first; unreadable ones are left out."""
    found = []
    for directory in (root() / "entries").glob("*"):
        found += _entry(directory, None)
    for directory in bundled():
        found += _entry(directory, directory.parent.parent.name)
    return sorted(found, key=lambda entry: entry.created, reverse=True)


def _entry(directory: Path, bundle: str | None) -> list[Entry]:
    with suppress(OSError, ValueError, KeyError):
        data = description(directory)
        if all(isinstance(data[name], kind) for name, kind in _DESCRIBED.items()):
            return [Entry(directory.name, directory, **{n: data[n] for n in _DESCRIBED}, bundle=bundle)]
    return []


def count() -> int:
    """How many compiled kernels there are, whole or not, those of bundles too."""
    return len([*(root() / "entries").glob("*"), *bundled()])


def bundled() -> Iterator[Path]:
    """Directories of the kernels that bundles brought."""
    yield from sorted((root() / "bundles").glob("*/kernels/*"))


def clear() -> int:
    """Remove entries, bundles and kept failures; returns how many kernels. Builds in progress go on."""
    before = count()
    with staging() as rubbish:
        for name in ("entries", "failed", "bundles"):
            for directory in (root() / name).glob("*"):
                with suppress(FileNotFoundError):
                    directory.rename(rubbish / f"{name}-{directory.name}")
    return before - count()


def _sweep(parent: Path, older_than: float) -> None:
    for directory in parent.iterdir():
        with suppress(FileNotFoundError):
            if time.time() - directory.stat().st_mtime > older_than:
                shutil.rmtree(directory, ignore_errors=True)


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
