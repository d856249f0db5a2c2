"""Bundles: compiled kernels in one archive, for machines that have no compiler.

A bundle is a zip file: ``kernels/<key>/`` with a binary, its source, the compiler's output and
``entry.json``, and ``tuning/*.yaml``, the tuning files that the kernels were chosen by. Loaded, it lies
in the store under ``bundles/``. The key holds what a kernel computes and runs on, and not who compiled it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from lmkan_gen import tuning_file
from lmkan_gen.text import printable
from lmkan_gen.toolchain import description, store
from lmkan_gen.toolchain.description import SOURCES, Description
from lmkan_gen.toolchain.errors import ToolchainError
from lmkan_gen.toolchain.ninja_file import LOG
from lmkan_gen.toolchain.store import Binary

_KERNEL = re.compile(r"kernels/([0-9a-f]{64})/([\w.]+)", re.ASCII)
_TUNING = re.compile(r"tuning/\w[\w.-]{0,199}\.yaml", re.ASCII)
_MIB = 1 << 20
#: bytes that a file of a kernel may have, by its name
_LIMITS = {
    description.FILE: description.MAX_BYTES,
    LOG: 16 * _MIB,
    **dict.fromkeys(SOURCES, 256 * _MIB),
    **dict.fromkeys(SOURCES.values(), 16 * _MIB),
}
_MAX_TUNING_BYTES = 2 * _MIB
#: of an archive, and of what it unpacks to
_MAX_BYTES = 2048 * _MIB
_MAX_MEMBERS = 100_000
#: kernels that could not be loaded in this process
_aside: set[Path] = set()


@dataclass(frozen=True)
class Packed:
    """A bundle: its number of kernels, and the SHA-256 of the archive."""

    kernels: int
    sha256: str


def key(source: str, arch: str, is_cuda: bool) -> str:
    """The name of a kernel in bundles: SHA-256 over its source, architecture, kind and the store's ABI."""
    return hashlib.sha256(json.dumps([store.ABI, source, arch, is_cuda]).encode()).hexdigest()


def write(path: Path, binaries: Iterable[Binary], tuning_files: Iterable[Path]) -> Packed:
    """Write a bundle, whole or not at all. A link at ``path`` is replaced, not followed.

    Raises:
        OSError: ``path`` cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    partial = Path(name)
    try:
        with os.fdopen(handle, "w+b") as stream:
            count = _pack(stream, binaries, tuning_files)
            stream.seek(0)
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        partial.chmod(0o644)  # it is there to be shared
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return Packed(count, digest)


def _pack(stream: BinaryIO, binaries: Iterable[Binary], tuning_files: Iterable[Path]) -> int:
    names = set()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for binary in binaries:
            entry = description.read(binary.path.parent)
            name = key(binary.source.read_text(), entry.arch, entry.is_cuda)
            if name in names:
                continue
            names.add(name)
            described = entry.model_copy(update={"key": name})
            archive.writestr(f"kernels/{name}/{description.FILE}", described.model_dump_json(indent=1))
            for file in (binary.path, binary.source, binary.log):
                archive.write(file, f"kernels/{name}/{file.name}")
        for i, file in enumerate(tuning_files):  # numbered: they are asked in this order
            archive.write(file, f"tuning/{i}_{re.sub(r'[^A-Za-z0-9_.-]', '_', file.stem)[:100]}.yaml")
    return len(names)


def load(path: Path, sha256: str | None = None) -> Packed:
    """Unpack a bundle into the store.

    Its code will be executed: load only what you would install.

    Args:
        path: the archive.
        sha256: what its SHA-256 must be; None: any.

    Raises:
        ToolchainError: it is no bundle, it is damaged or another one than asked for, it is larger than any
            bundle should be, or it is of another version of this package.
        OSError: it cannot be read, or the store cannot be written.
    """
    shown = printable(path)
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
            digest = _identify(shown, stream, sha256)
            with store.staging() as staging, zipfile.ZipFile(stream) as archive:
                unpacked = staging / "bundle"
                kernels = _unpack(shown, archive, unpacked)
                for directory in kernels:
                    _check(shown, directory)
                for file in (unpacked / "tuning").glob("*"):
                    _check_tuning_file(shown, file)
                destination = store.place("bundles") / digest[:32]
                if destination.exists():  # the same content, perhaps damaged since
                    destination.rename(staging / "before")
                unpacked.rename(destination)
    except (zipfile.BadZipFile, zlib.error, ValueError, NotImplementedError, EOFError) as error:
        raise ToolchainError(f"{shown} is no bundle, or damaged: {printable(error)}") from error
    return Packed(len(kernels), digest)


def _identify(shown: str, stream: BufferedReader, expected: str | None) -> str:
    """The SHA-256 of an archive of bearable size, which must be the expected one."""
    status = os.fstat(stream.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise ToolchainError(f"{shown} is no bundle: it is no regular file")
    if status.st_size > _MAX_BYTES:
        raise ToolchainError(f"{shown} has {status.st_size} bytes, more than the {_MAX_BYTES} of any bundle")
    digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if expected is not None and digest != expected.strip().lower():
        raise ToolchainError(f"{shown} is another bundle: its SHA-256 is {digest}, not {printable(expected)}")
    return digest


def _unpack(shown: str, archive: zipfile.ZipFile, destination: Path) -> list[Path]:
    """Unpack what belongs into a bundle; the directories of its kernels."""
    members = archive.infolist()
    if len(members) > _MAX_MEMBERS:
        raise ToolchainError(
            f"{shown} holds {len(members)} files, more than the {_MAX_MEMBERS} of any bundle"
        )
    if (total := sum(member.file_size for member in members)) > _MAX_BYTES:
        raise ToolchainError(f"{shown} unpacks to {total} bytes, more than the {_MAX_BYTES} of any bundle")
    kernels: dict[Path, None] = {}
    for member in members:
        name = member.filename
        limit = _limit(name)
        if limit is None:
            raise ToolchainError(f"{shown} is no bundle: {printable(repr(name))} does not belong into one")
        if member.file_size > limit:
            raise ToolchainError(f"{shown}: {name} has {member.file_size} bytes, more than {limit}")
        if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ToolchainError(f"{shown} is no bundle: {name} is encrypted, or compressed otherwise")
        file = destination / name
        for parent in (destination, destination / name.partition("/")[0], file.parent):
            parent.mkdir(mode=0o700, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise ToolchainError(f"{shown} is no bundle: it holds {name} twice") from None
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(archive.read(member))
        if name.startswith("kernels/"):
            kernels[file.parent] = None
    if not kernels:
        raise ToolchainError(f"{shown} is no bundle: there are no kernels in it")
    return list(kernels)


def _limit(name: str) -> int | None:
    """How large a member with this name may be; None: it may not be."""
    if _TUNING.fullmatch(name):
        return _MAX_TUNING_BYTES
    kernel = _KERNEL.fullmatch(name)
    return _LIMITS.get(kernel[2]) if kernel else None


def _check(shown: str, directory: Path) -> None:
    entry = description.read(directory)
    if entry.abi != store.ABI:
        raise ToolchainError(
            f"{shown} was built by another version of lmkan-gen: calling convention {entry.abi}, "
            f"this one has {store.ABI}; build it again"
        )
    if {file.name for file in directory.iterdir()} != {description.FILE, LOG, entry.output, entry.source}:
        raise ToolchainError(
            f"{shown} is damaged: kernel {directory.name[:8]} has other files than it should"
        )
    if (why := _wrong(directory, entry)) is not None:
        raise ToolchainError(f"{shown} is damaged: {why}")


def _check_tuning_file(shown: str, file: Path) -> None:
    try:
        tuning_file.load(file)
    except tuning_file.TuningFileError as error:
        raise ToolchainError(f"{shown} holds a tuning file that cannot be used: {error}") from error


def _wrong(directory: Path, entry: Description) -> str | None:
    """What is wrong with a kernel of a bundle.

    Raises:
        OSError: a file cannot be read.
        ValueError: it is no text, or no regular file.
    """
    if (why := store.damage(directory, entry)) is not None:
        return why
    source = description.read_regular(directory / entry.source, _LIMITS[entry.source]).decode()
    return None if key(source, entry.arch, entry.is_cuda) == directory.name else f"{entry.source} was changed"


def find(source: str, arch: str, is_cuda: bool) -> Binary | None:
    """The kernel with this source in a loaded bundle; None when there is none that is whole."""
    name = key(source, arch, is_cuda)
    for directory in (store.root() / "bundles").glob(f"*/kernels/{name}"):
        if directory not in _aside:
            with suppress(OSError, ValueError):
                entry = description.read(directory)
                if store.damage(directory, entry) is None:
                    return store.binary(directory, entry)
    return None


def set_aside(binary: Binary) -> bool:
    """Pass over a kernel that cannot be loaded, in this process from now on.

    Another machine that shares the store may well be able to. False: no bundle brought it.
    """
    directory = binary.path.parent
    if directory.parent.parent.parent != store.root() / "bundles":
        return False
    _aside.add(directory)
    return True


def verify() -> list[store.Damage]:
    """What is wrong with the kernels of loaded bundles; see `store.verify`."""
    found = []
    for directory in store.bundled():
        try:
            why = _wrong(directory, description.read(directory))
        except (OSError, ValueError) as error:
            why = f"incomplete: {error}"
        if why is not None:
            found.append(store.Damage(directory, why))
    return found


def tuning_files() -> Iterator[Path]:
    """Tuning files of the loaded bundles."""
    yield from sorted((store.root() / "bundles").glob("*/tuning/*.yaml"))
