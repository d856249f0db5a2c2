"""Bundles: compiled kernels in one archive, for machines that have no compiler.

A bundle is a zip file: ``kernels/<key>/`` with a binary, its source, the compiler's output and
``entry.json``, and ``tuning/*.yaml``, the tuning files that the kernels were chosen by. Loaded, it lies
in the store under ``bundles/``. The key holds what a kernel computes and runs on, and not who compiled it.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from lmkan_gen.toolchain import store
from lmkan_gen.toolchain.errors import ToolchainError
from lmkan_gen.toolchain.ninja_file import LOG
from lmkan_gen.toolchain.store import Binary

_ENTRY = "entry.json"
_MEMBER = re.compile(
    r"kernels/[0-9a-f]{64}/((kernel|launcher)\.(cubin|so|cu|cpp)|build\.log|entry\.json)|tuning/[\w.-]+\.yaml"
)


def key(source: str, arch: str, is_cuda: bool) -> str:
    """The name of a kernel in bundles: SHA-256 over its source, architecture, kind and the store's ABI."""
    return hashlib.sha256(json.dumps([store.ABI, source, arch, is_cuda]).encode()).hexdigest()


def write(path: Path, binaries: Iterable[Binary], tuning_files: Iterable[Path]) -> int:
    """Write a bundle, whole or not at all; returns its number of kernels.

    Raises:
        OSError: ``path`` cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    names = set()
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
            for binary in binaries:
                entry = store.description(binary.path.parent)
                source = binary.source.read_text()
                name = key(source, entry["arch"], binary.path.suffix == ".cubin")
                if name in names:
                    continue
                names.add(name)
                entry["key"] = name
                archive.writestr(f"kernels/{name}/{_ENTRY}", json.dumps(entry, indent=1))
                for file in (binary.path, binary.source, binary.log):
                    archive.write(file, f"kernels/{name}/{file.name}")
            for i, file in enumerate(tuning_files):  # numbered: they are asked in this order
                archive.write(file, f"tuning/{i}_{re.sub(r'[^A-Za-z0-9_.-]', '_', file.stem)}.yaml")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return len(names)


def load(path: Path) -> int:
    """Unpack a bundle into the store; returns its number of kernels.

    Its code will be executed: load only what you would install.

    Raises:
        ToolchainError: it is no bundle, it is damaged, or it is of another version of this package.
        OSError: it cannot be read, or the store cannot be written.
    """
    name = hashlib.sha256(path.read_bytes()).hexdigest()[:32]
    try:
        with store.staging() as staging, zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                if _MEMBER.fullmatch(member) is None:
                    raise ToolchainError(f"{path} is no bundle: {member!r} does not belong into one")
            archive.extractall(staging / name)
            kernels = sorted((staging / name / "kernels").glob("*"))
            if not kernels:
                raise ToolchainError(f"{path} is no bundle: there are no kernels in it")
            for directory in kernels:
                _check(path, directory)
            (staging / name).chmod(0o700)
            destination = store.root() / "bundles" / name
            destination.parent.mkdir(mode=0o700, exist_ok=True)
            if destination.exists():  # the same content, perhaps damaged since
                destination.rename(staging / "before")
            (staging / name).rename(destination)
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError) as error:
        raise ToolchainError(f"{path} is no bundle, or damaged: {error}") from error
    return len(kernels)


def _check(path: Path, directory: Path) -> None:
    entry = store.description(directory)
    if entry["abi"] != store.ABI:
        raise ToolchainError(
            f"{path} was built by another version of lmkan-gen: calling convention {entry['abi']}, "
            f"this one has {store.ABI}; build it again"
        )
    store.make_private(directory)
    source = (directory / entry["source"]).read_text()
    expected = key(source, entry["arch"], entry["output"].endswith(".cubin"))
    if (why := store.damage(directory, entry)) or expected != directory.name:
        raise ToolchainError(f"{path} is damaged: {why or 'a source was changed'}")


def find(source: str, arch: str, is_cuda: bool) -> Binary | None:
    """The kernel with this source in a loaded bundle; None when there is none that is whole."""
    name = key(source, arch, is_cuda)
    for directory in (store.root() / "bundles").glob(f"*/kernels/{name}"):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            entry = store.description(directory)
            if store.damage(directory, entry) is None:
                return Binary(directory / entry["output"], directory / entry["source"], directory / LOG, name)
    return None


def verify() -> list[store.Damage]:
    """What is wrong with the kernels of loaded bundles; see `store.verify`."""
    found = []
    for directory in store.bundled():
        try:
            entry = store.description(directory)
            why = store.damage(directory, entry)
            source = (directory / entry["source"]).read_text()
            if (
                why is None
                and key(source, entry["arch"], entry["output"].endswith(".cubin")) != directory.name
            ):
                why = f"{entry['source']} was changed"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            why = f"incomplete: {error}"
        if why is not None:
            found.append(store.Damage(directory, why))
    return found


def tuning_files() -> Iterator[Path]:
    """Tuning files of the loaded bundles."""
    yield from sorted((store.root() / "bundles").glob("*/tuning/*.yaml"))
