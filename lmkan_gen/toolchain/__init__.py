"""From a kernel specification to a binary on disk: compile, or find it compiled.

Compilers are looked for when first needed, never on import.
"""

from __future__ import annotations

import errno
import logging
import os
import shlex
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lmkan_gen import codegen
from lmkan_gen.plan import KernelSpec
from lmkan_gen.toolchain import bundle, host, ninja_file, nvcc, nvrtc, store
from lmkan_gen.toolchain.compiler import Compiler
from lmkan_gen.toolchain.errors import CompileError, CompilerMissing, ToolchainError
from lmkan_gen.toolchain.listing import KernelResources, ptx, resources, sass
from lmkan_gen.toolchain.store import Binary

__all__ = [
    "Binary",
    "CompileError",
    "CompilerMissing",
    "KernelResources",
    "ToolchainError",
    "binary",
    "build",
    "compiler",
    "forget",
    "loaded",
    "ptx",
    "resources",
    "sass",
]

logger = logging.getLogger("lmkan_gen")

Result = Binary | ToolchainError
Loaded = TypeVar("Loaded")
_Settle = Callable[[KernelSpec, Result], None]

#: a compilation that fails on a disk with less left failed for that reason
_FULL_BYTES = 1 << 20
#: binaries this process has seen, per store
_known: dict[tuple[Path, KernelSpec], Binary] = {}


def binary(spec: KernelSpec) -> Binary:
    """The compiled kernel of ``spec``, from the store or compiled now.

    Raises:
        CompilerMissing: no compiler for it on this machine.
        CompileError: the compiler refused the source.
    """
    (result,) = build([spec])
    if isinstance(result, ToolchainError):
        raise result
    return result


def loaded(spec: KernelSpec, load: Callable[[Binary], Loaded]) -> Loaded:
    """What ``load`` makes of the compiled kernel of ``spec``.

    A kernel that a bundle brought and that ``load`` cannot load, because it needs a newer C library, say, is
    passed over from then on in this process: with one warning, it is compiled instead.

    Raises:
        ToolchainError: as `binary`.
        RuntimeError, OSError: what ``load`` raises for a kernel that was compiled here.
    """
    found = binary(spec)
    try:
        return load(found)
    except (RuntimeError, OSError) as error:
        if not bundle.set_aside(found):
            raise
        _known.pop((store.root(), spec), None)
        why = f"a kernel of a bundle cannot be loaded here ({error})"
    try:
        result = loaded(spec, load)
    except CompilerMissing as error:
        raise CompilerMissing(f"{why}, and not be compiled either: {error}") from error
    warnings.warn(f"{why}; it is compiled instead", RuntimeWarning, stacklevel=3)
    return result


def forget() -> None:
    """Look for every binary anew when it is next asked for."""
    _known.clear()


def build(
    specs: Sequence[KernelSpec], on_done: Callable[[KernelSpec, Result], None] | None = None
) -> list[Result]:
    """Binaries of many specifications, those missing compiled in parallel; results in their order.

    A specification that does not compile has its error as result and does not stop the others.
    ``on_done`` is called once per element of ``specs``, as soon as its result is known.
    """
    count = Counter(specs)
    results: dict[KernelSpec, Result] = {}

    def settle(spec: KernelSpec, result: Result) -> None:
        results[spec] = result
        if isinstance(result, Binary):
            _known[store.root(), spec] = result
        for _ in range(count[spec] if on_done else 0):
            assert on_done is not None
            on_done(spec, result)

    def waiting() -> list[KernelSpec]:
        return [spec for spec in count if spec not in results]

    try:
        _build(waiting(), settle)
    except OSError as error:
        problem = error
        if store.abandon(error):
            try:
                _build(waiting(), settle)
            except OSError as again:
                problem = again
        for spec in waiting():
            settle(spec, ToolchainError(f"the kernel store {store.root()} cannot be used: {problem}"))
    return [results[spec] for spec in specs]


def _build(specs: Sequence[KernelSpec], settle: _Settle) -> None:
    """Settle all of ``specs``.

    Raises:
        OSError: the store fails; some of them are settled.
    """
    pending: list[_Compilation] = []
    for spec in specs:
        known = _known.get((store.root(), spec))
        if known is not None and known.path.is_file():
            settle(spec, known)
            continue
        source = codegen.render(spec)
        try:
            pending.append(_Compilation.of(spec, source, compiler(spec)))
        except ToolchainError as error:
            settle(spec, bundle.find(source, spec.arch, spec.is_cuda) or error)
    if (pending := _load(pending, settle)) and (pending := _load(_tried(pending, settle), settle)):
        with store.claim(c.key for c in pending):
            # whoever held the locks before may have built them meanwhile
            _compile(_load(pending, settle), settle)
        store.keep_within_limit()


def compiler(spec: KernelSpec, *, tried: bool = False) -> Compiler:
    """The compiler that would compile ``spec`` here: host C++; nvcc, or without one NVRTC, for CUDA.

    Args:
        spec: what is to be compiled.
        tried: make sure that nvcc compiles at all here, which takes a second once per process; if it does not
            with any of the host compilers, NVRTC is taken, with one warning.

    Raises:
        CompilerMissing: there is none.
    """
    if not spec.is_cuda:
        return host.find(spec.arch)
    try:
        return nvcc.tried(spec.arch) if tried else nvcc.find(spec.arch)
    except CompilerMissing as without_nvcc:
        if os.environ.get(nvcc.OVERRIDE):
            raise
        try:
            found = nvrtc.find(spec.arch)
        except CompilerMissing as without_nvrtc:
            raise CompilerMissing(f"{without_nvcc}. {without_nvrtc}") from without_nvrtc
        if isinstance(without_nvcc, nvcc.HostRefused):
            warnings.warn(
                f"{found.identity} compiles CUDA kernels: {without_nvcc}", RuntimeWarning, stacklevel=2
            )
        return found


@dataclass(frozen=True)
class _Compilation:
    spec: KernelSpec
    source: str
    compiler: Compiler
    key: str

    @classmethod
    def of(cls, spec: KernelSpec, source: str, chosen: Compiler) -> _Compilation:
        return cls(spec, source, chosen, store.key(source, spec.arch, chosen))


def _tried(pending: Sequence[_Compilation], settle: _Settle) -> list[_Compilation]:
    """``pending`` with compilers that compile; settles those for which there is none."""
    found = []
    for c in pending:
        try:
            found.append(_Compilation.of(c.spec, c.source, compiler(c.spec, tried=True)))
        except ToolchainError as error:
            settle(c.spec, error)
    return found


def _load(pending: Sequence[_Compilation], settle: _Settle) -> list[_Compilation]:
    """Settle what the store or a loaded bundle has; returns the rest."""
    missing = []
    for c in pending:
        found = store.load(c.key, c.compiler) or bundle.find(c.source, c.spec.arch, c.spec.is_cuda)
        if found is not None:
            logger.debug("%s: compiled before, %s", _what(c), found.path)
            settle(c.spec, found)
        else:
            missing.append(c)
    return missing


def _compile(pending: Sequence[_Compilation], settle: _Settle) -> None:
    if not pending:
        return
    with store.staging() as staging:
        for i, c in enumerate(pending):
            (staging / str(i)).mkdir()
            (staging / str(i) / c.compiler.source).write_text(c.source)
        waiting = {i: c.compiler for i, c in enumerate(pending)}

        def finished(i: int) -> None:
            result = _collect(pending[i], staging / str(i))
            outcome = "does not compile" if isinstance(result, ToolchainError) else f"compiled, {result.path}"
            logger.debug("%s: %s, by %s", _what(pending[i]), outcome, pending[i].compiler.identity)
            settle(pending[i].spec, result)
            del waiting[i]

        while waiting:
            try:
                said = ninja_file.run(dict(waiting), staging, finished, store.place("locks"))
            except CompilerMissing as error:
                for i in waiting:
                    settle(pending[i].spec, error)
                return
            hanging = [i for i in waiting if (staging / str(i) / ninja_file.LOG).exists()]
            for i in hanging:
                settle(pending[i].spec, _hung(pending[i], staging / str(i)))
                del waiting[i]
            if not hanging:
                break
        for i in waiting:
            settle(pending[i].spec, ToolchainError(f"ninja did not get to compile it: {said.strip()}"))


def _hung(c: _Compilation, staged: Path) -> ToolchainError:
    kept = store.keep_failed(staged, c.key)
    return ToolchainError(
        f"{_what(c)} did not compile within {ninja_file.STALLED_S:g} s and was stopped\n"
        f"repeat with: {_repeat(c, kept)}"
    )


def _collect(c: _Compilation, staged: Path) -> Result:
    if (staged / c.compiler.output).is_file():
        return store.publish(staged, c.key, c.spec, c.compiler)
    if shutil.disk_usage(staged).free < _FULL_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(staged))
    kept = store.keep_failed(staged, c.key)
    return CompileError(_what(c), kept / c.compiler.source, kept / ninja_file.LOG, _repeat(c, kept))


def _what(c: _Compilation) -> str:
    return f"{c.spec.template} ({', '.join(f'{k}={v}' for k, v in c.spec.constants)}) for {c.spec.arch}"


def _repeat(c: _Compilation, kept: Path) -> str:
    return f"cd {shlex.quote(str(kept))} && {shlex.join(c.compiler.command(c.compiler.output))}"
