"""Whether a measured time is still that of the kernel: entries know the source that they timed."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from lmkan_gen.codegen import render
from lmkan_gen.families import family
from lmkan_gen.plan import KernelSpec
from lmkan_gen.problem import Problem
from lmkan_gen.tuning_file import Entry, TuningFile


def source_digest(spec: KernelSpec) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the rendered source."""
    return hashlib.sha256(render(spec).encode()).hexdigest()[:16]


def is_stale(entry: Entry, problem: Problem) -> bool:
    """Whether templates or family have changed since ``entry`` was measured, on ``problem``'s device.

    Entries that say nothing of their source count as fresh.
    """
    if entry.source is None:
        return False
    timed = replace(problem, deterministic=False)
    return entry.source != source_digest(family(entry.family).spec(timed, entry.parameters))


def stale_entries(file: TuningFile) -> list[Entry]:
    """Entries whose kernels have changed since."""
    from lmkan_gen.golden import specs

    problems = (problem for problem, _ in specs(file))
    return [entry for entry, problem in zip(file.entries, problems, strict=True) if is_stale(entry, problem)]
