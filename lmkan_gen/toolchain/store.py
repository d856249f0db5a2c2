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
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from lmkan_gen.plan import KernelSpec
from lmkan_gen.toolchain import description
from lmkan_gen.toolchain.compiler import Compiler
from lmkan_gen.toolchain.description import Description
from lmkan_gen.toolchain.ninja_file import LOG
from lmkan_gen.toolchain.places import OVERRIDE, abandon, place, root

__all__ = ["ABI", "OVERRIDE", "Binary", "Damage", "Entry", "abandon", "place", "root"]

#: in the environment: how large the store may become, in MiB
LIMIT_VARIABLE = "LMKAN_GEN_CACHE_LIMIT"
DEFAULT_LIMIT = 4 << 30

#: raise it whenever the way kernels are called changes (argument order or types)
ABI = 1

_LOCK_SECONDS = 120
_STALE_SECONDS = 24 * 3600
_TRIMMED_SECONDS = 24 * 3600
_TRIMMED = "trimmed"
_OTHERS_WRITE = 0o022
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


def load(key: str, compiler: Compiler) -> Binary | None:
    """The stored binary, or None when there is none, or it is damaged, or not this user's own."""
    directory = root() / "entries" / key
    try:
        entry = description.read(directory)
        why = damage(directory, entry)
    except (OSError, ValueError):
        return None
    if why is None and entry.output == compiler.output:
        with suppress(OSError):
            os.utime(directory / description.FILE)  # `trim` removes what has not been used for longest
        return binary(directory, entry)
    if why == _FOREIGN:
        warnings.warn(f"{directory}: {why}; it is not used", stacklevel=2)
    return None


def binary(directory: Path, entry: Description) -> Binary:
    """The kernel in ``directory``."""
    return Binary(directory / entry.output, directory / entry.source, directory / LOG, directory.name)


def damage(directory: Path, entry: Description) -> str | None:
    """Why a kernel's directory, described by ``entry``, must not be used; None when it may.

    Raises:
        OSError: a file is missing.
        ValueError: its binary is no file.
    """
    content = directory / entry.output
    for path in (directory, content):
        status = path.lstat()
        if status.st_uid != os.getuid() or status.st_mode & _OTHERS_WRITE:
            return _FOREIGN
    if not stat.S_ISREG(status.st_mode):
        return f"{entry.output} is no regular file"
    if entry.key != directory.name:
        return f"it describes another kernel, {entry.key[:8]}"
    if entry.sha256 != _hash(content):
        return f"{entry.output} is not what was compiled"
    return None


def verify() -> list[Damage]:
    """What is wrong in the store: damaged entries, and such as are not what their name says."""
    found = []
    for directory in sorted((root() / "entries").glob("*")):
        try:
            entry = description.read(directory)
            why = damage(directory, entry)
            source = (directory / entry.source).read_text()
            made_of = (entry.abi, source, entry.arch, entry.compiler, entry.flags, entry.output)
            if why is None and _key(*made_of) != directory.name:
                why = f"{entry.source} or what it was compiled with was changed"
        except (OSError, ValueError) as error:
            why = f"incomplete: {error}"
        if why is not None:
            found.append(Damage(directory, why))
    return found


@contextmanager
def staging() -> Iterator[Path]:
    """A private directory inside the store, removed at the end; sweeps those that crashes left."""
    parent = place("staging")
    _sweep(parent, older_than=_STALE_SECONDS)
    directory = Path(tempfile.mkdtemp(dir=parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def publish(staged: Path, key: str, spec: KernelSpec, compiler: Compiler) -> Binary:
    """Move a finished compilation into the store; if somebody was faster, use theirs."""
    content = staged / compiler.output
    entry = Description(
        key=key,
        abi=ABI,
        sha256=_hash(content),
        bytes=content.stat().st_size,
        output=compiler.output,  # type: ignore[arg-type]  # checked
        source=compiler.source,  # type: ignore[arg-type]  # checked
        template=spec.template,
        arch=spec.arch,
        constants=dict(spec.constants),
        compiler=compiler.identity,
        flags=list(compiler.flags),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    (staged / description.FILE).write_text(entry.model_dump_json(indent=1))
    make_private(staged)
    destination = place("entries") / key
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
    destination = place("failed") / key
    destination.mkdir(mode=0o700, exist_ok=True)
    for file in staged.iterdir():
        file.replace(destination / file.name)
    return destination


@contextmanager
def claim(keys: Iterable[str]) -> Iterator[None]:
    """Hold the locks of ``keys``, so that other processes wait for these binaries instead of building too.

    Only saves work: after a time-out, or where the file system has no locks, it goes on without.
    """
    directory = place("locks")
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
    with suppress(OSError, ValueError):
        e = description.read(directory)
        return [
            Entry(
                directory.name,
                directory,
                e.template,
                e.arch,
                e.constants,
                e.compiler,
                e.created,
                e.bytes,
                bundle,
            )
        ]
    return []


def count() -> int:
    """How many compiled kernels there are, whole or not, those of bundles too."""
    return len([*(root() / "entries").glob("*"), *bundled()])


def bundled() -> Iterator[Path]:
    """Directories of the kernels that bundles brought."""
    yield from sorted((root() / "bundles").glob("*/kernels/*"))


def clear() -> int:
    """Remove entries, bundles, kept failures and locks; returns how many kernels. Builds go on."""
    before = count()
    with staging() as rubbish:
        for name in ("entries", "failed", "bundles", "locks"):
            for found in (root() / name).glob("*"):
                with suppress(FileNotFoundError):
                    found.rename(rubbish / f"{name}-{found.name}")
    return before - count()


@dataclass(frozen=True)
class Trimmed:
    """What `trim` removed, and what it left: kernels and kept failures, and their bytes."""

    removed: int
    removed_bytes: int
    left: int
    left_bytes: int


def trim(limit: int) -> Trimmed:
    """Remove what has not been used for longest, until at most ``limit`` bytes are left.

    Kernels of bundles are neither counted nor removed: they cannot be compiled again everywhere.
    """
    found = []
    for directory in [*(root() / "entries").glob("*"), *(root() / "failed").glob("*")]:
        with suppress(OSError):
            files = [file.stat() for file in directory.iterdir()]
            used = max((file.st_mtime for file in files), default=0.0)
            found.append((used, directory, sum(file.st_size for file in files)))
    found.sort()
    left, removed, removed_bytes = sum(size for _, _, size in found), 0, 0
    with staging() as rubbish:
        for _, directory, size in found:
            if left <= limit:
                break
            with suppress(FileNotFoundError):
                directory.rename(rubbish / f"{directory.parent.name}-{directory.name}")
                removed, removed_bytes = removed + 1, removed_bytes + size
            left -= size
    return Trimmed(removed, removed_bytes, len(found) - removed, left)


def keep_within_limit() -> None:
    """`trim` the store to its limit, at most once a day."""
    stamp = root() / _TRIMMED
    with suppress(OSError):
        if time.time() - stamp.stat().st_mtime < _TRIMMED_SECONDS:
            return
    stamp.touch(mode=0o600)
    trim(limit())
    _sweep(place("locks"), older_than=_STALE_SECONDS)


def limit() -> int:
    """How large the store may become, in bytes: ``$LMKAN_GEN_CACHE_LIMIT`` MiB, else 4 GiB.

    Raises:
        ValueError: the variable is not a positive integer.
    """
    text = os.environ.get(LIMIT_VARIABLE, "")
    if not text:
        return DEFAULT_LIMIT
    if not text.isdecimal() or not 0 < len(text) < 10 or int(text) < 1:
        raise ValueError(
            f"{LIMIT_VARIABLE} is {text!r}, must be a positive number of MiB such as {DEFAULT_LIMIT >> 20}"
        )
    return int(text) << 20


def _sweep(parent: Path, older_than: float) -> None:
    for found in parent.iterdir():
        with suppress(FileNotFoundError):
            if time.time() - found.lstat().st_mtime > older_than:
                if found.is_dir() and not found.is_symlink():
                    shutil.rmtree(found, ignore_errors=True)
                else:
                    found.unlink()


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
