"""From a kernel specification to a binary on disk: compile, or find it compiled.

Compilers are looked for when first needed, never on import.
"""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmkan_gen import codegen
from lmkan_gen.plan import KernelSpec
from lmkan_gen.toolchain import host, ninja_file, nvcc, nvrtc, store
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
    "ptx",
    "resources",
    "sass",
]

Result = Binary | ToolchainError

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

    pending: list[_Compilation] = []
    for spec in count:
        known = _known.get((store.root(), spec))
        if known is not None and known.path.is_file():
            settle(spec, known)
            continue
        try:
            pending.append(_Compilation.of(spec))
        except ToolchainError as error:
            settle(spec, error)
    if pending := _load(pending, settle):
        try:
            with store.claim(c.key for c in pending):
                # whoever held the locks before may have built them meanwhile
                _compile(_load(pending, settle), settle)
        except (CompilerMissing, OSError) as error:
            problem = error if isinstance(error, CompilerMissing) else _store_failed(error)
            for c in pending:
                if c.spec not in results:
                    settle(c.spec, problem)
    return [results[spec] for spec in specs]


def compiler(spec: KernelSpec) -> Compiler:
    """The compiler that would compile ``spec`` here: host C++; nvcc, or without one NVRTC, for CUDA.

    Raises:
        CompilerMissing: there is none.
    """
    if not spec.is_cuda:
        return host.find(spec.arch)
    try:
        return nvcc.find(spec.arch)
    except CompilerMissing as without_nvcc:
        if os.environ.get(nvcc.OVERRIDE):
            raise
        try:
            return nvrtc.find(spec.arch)
        except CompilerMissing as without_nvrtc:
            raise CompilerMissing(f"{without_nvcc}. {without_nvrtc}") from without_nvrtc


@dataclass(frozen=True)
class _Compilation:
    spec: KernelSpec
    source: str
    compiler: Compiler
    key: str

    @classmethod
    def of(cls, spec: KernelSpec) -> _Compilation:
        source, chosen = codegen.render(spec), compiler(spec)
        return cls(spec, source, chosen, store.key(source, spec.arch, chosen))


_Settle = Callable[[KernelSpec, Result], None]


def _load(pending: Sequence[_Compilation], settle: _Settle) -> list[_Compilation]:
    """Settle what the store has; returns the rest."""
    missing = []
    for c in pending:
        if (found := store.load(c.key, c.compiler)) is not None:
            settle(c.spec, found)
        else:
            missing.append(c)
    return missing


def _store_failed(error: OSError) -> ToolchainError:
    return ToolchainError(f"the kernel store {store.root()} cannot be used: {error}")


def _compile(pending: Sequence[_Compilation], settle: _Settle) -> None:
    if not pending:
        return
    with store.staging() as staging:
        for i, c in enumerate(pending):
            (staging / str(i)).mkdir()
            (staging / str(i) / c.compiler.source).write_text(c.source)
        waiting = set(range(len(pending)))

        def finished(i: int) -> None:
            settle(pending[i].spec, _collect(pending[i], staging / str(i)))
            waiting.remove(i)

        said = ninja_file.run([c.compiler for c in pending], staging, finished)
        for i in waiting:
            settle(pending[i].spec, ToolchainError(f"ninja did not get to compile it: {said.strip()}"))


def _collect(c: _Compilation, staged: Path) -> Result:
    if (staged / c.compiler.output).is_file():
        return store.publish(staged, c.key, c.spec, c.compiler)
    kept = store.keep_failed(staged, c.key)
    what = f"{c.spec.template} ({', '.join(f'{k}={v}' for k, v in c.spec.constants)}) for {c.spec.arch}"
    command = shlex.join(c.compiler.command(c.compiler.output))
    return CompileError(what, kept / c.compiler.source, kept / ninja_file.LOG, command)
