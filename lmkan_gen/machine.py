"""What this process may use of the machine: a container is often granted less than the machine has."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Processor cores, at least 1: those that the process may be scheduled on, at most its cgroups' quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if (quota := _cpu_quota()) is not None:
        cores = min(cores, int(quota))
    return max(1, cores)


def available_memory() -> int:
    """Bytes that can be had without swapping, at most what the cgroups' limits leave."""
    free = int(psutil.virtual_memory().available)
    if (left := _memory_left()) is not None:
        free = min(free, left)
    return max(0, free)


def _cpu_quota() -> float | None:
    """Cores' worth of time that the cgroup and those around it grant; None: no limit."""
    quotas = []
    for group in _groups("cpu"):
        if len(words := _read(group / "cpu.max").split()) == 2:
            limit, period = words
        else:
            limit, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
        if limit.isdecimal() and period.isdecimal():  # not "max", "-1", or no such file
            quotas.append(int(limit) / int(period))
    return min(quotas, default=None)


def _memory_left() -> int | None:
    """Bytes below the limits of the cgroup and those around it, file cache that can be dropped not counted.

    None: no limit.
    """
    left = []
    for group in _groups("memory"):
        for limit, used, droppable in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            if _read(group / limit).isdecimal() and _read(group / used).isdecimal():
                fields = dict(line.split(maxsplit=1) for line in _read(group / "memory.stat").splitlines())
                free = int(_read(group / limit)) - int(_read(group / used))
                left.append(free + int(fields.get(droppable, 0)))
    return min(left, default=None)


def _groups(controller: str) -> list[Path]:
    """Directories of the cgroup that this process is in, and of those around it, outermost first.

    Of version 1, where each controller has a tree of its own, and of version 2. In a container the tree's top
    may be the process's group, whatever its path says.
    """
    found: dict[Path, None] = {}
    for line in _read(_OWN).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        group = _CGROUP / controller if controllers else _CGROUP
        for part in ("", *Path(path).parts[1:]):
            group = group / part
            found[group] = None
    return [*dict.fromkeys((_CGROUP, _CGROUP / controller, *found))]


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
