"""Shared objects with content: a source compiled together with bytes that it includes."""

from __future__ import annotations

import hashlib
import shlex
import shutil
import subprocess
from pathlib import Path

from lmkan_gen import codegen
from lmkan_gen.plan import KernelSpec
from lmkan_gen.toolchain import host, store
from lmkan_gen.toolchain.errors import CompileError
from lmkan_gen.toolchain.ninja_file import LOG

#: what sources include
_PAYLOAD = "payload.bin"


def link(spec: KernelSpec, payload: bytes, path: Path) -> None:
    """Compile ``spec`` to ``path``, whole or not at all.

    Args:
        spec: its source includes ``payload.bin``.
        payload: the content of that file.
        path: a file, which is replaced.

    Raises:
        CompilerMissing: there is no C++ compiler.
        CompileError: it refuses the source.
        OSError: the file cannot be written.
    """
    compiler = host.find(spec.arch)
    source = codegen.render(spec)
    with store.staging() as staging:
        (staging / compiler.source).write_text(source)
        (staging / _PAYLOAD).write_bytes(payload)
        with (staging / LOG).open("w") as log:
            done = subprocess.run(
                compiler.command(compiler.output),
                cwd=staging,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        if done.returncode:
            kept = store.keep_failed(staging, hashlib.sha256(source.encode() + payload).hexdigest())
            command = f"cd {shlex.quote(str(kept))} && {shlex.join(compiler.command(compiler.output))}"
            raise CompileError(spec.template, kept / compiler.source, kept / LOG, command)
        partial = path.with_name(f".{path.name}.partial")
        try:
            shutil.copyfile(staging / compiler.output, partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
