"""What this process may use of the machine: a container is often granted less than the machine has."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Processor cores, at least 1: those that the process may be scheduled on, at most its cgroup's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if (quota := _cpu_quota()) is not None:
        cores = min(cores, int(quota))
    return max(1, cores)


def available_memory() -> int:
    """Bytes that can be had without swapping, at most what the cgroup's limit leaves."""
    free = int(psutil.virtual_memory().available)
    if (left := _memory_left()) is not None:
        free = min(free, left)
    return max(0, free)


def _cpu_quota() -> float | None:
    """Cores' worth of time that the cgroup grants; None: no limit."""
    if len(words := _read("cpu.max").split()) == 2:
        limit, period = words
    else:
        limit, period = _read("cpu/cpu.cfs_quota_us"), _read("cpu/cpu.cfs_period_us")
    if not limit.isdecimal() or not period.isdecimal():  # "max", "-1", or no such file
        return None
    return int(limit) / int(period)


def _memory_left() -> int | None:
    """Bytes below the cgroup's limit, file cache that can be dropped not counted; None: no limit."""
    for limit, used, statistics, droppable in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    ):
        if _read(limit).isdecimal() and _read(used).isdecimal():
            fields = dict(line.split(maxsplit=1) for line in _read(statistics).splitlines())
            return int(_read(limit)) - int(_read(used)) + int(fields.get(droppable, 0))
    return None


def _read(name: str) -> str:
    try:
        return (_CGROUP / name).read_text().strip()
    except OSError:
        return ""
