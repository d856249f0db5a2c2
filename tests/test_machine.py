"""What a process may use: the machine's, or what its container grants."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from lmkan_gen import machine
from lmkan_gen.toolchain import ninja_file

GIB = 1 << 30


@pytest.fixture
def cgroup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(machine, "_OWN", tmp_path / "own")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    memory = psutil.virtual_memory()._replace(available=100 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    return tmp_path


def write(directory: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text + "\n")


def test_without_limits(cgroup: Path) -> None:
    assert (machine.usable_cores(), machine.available_memory()) == (64, 100 * GIB)
    write(cgroup, {"cpu.max": "max 100000", "memory.max": "max", "memory.current": "1"})
    assert (machine.usable_cores(), machine.available_memory()) == (64, 100 * GIB)
    write(cgroup, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"})
    assert machine.usable_cores() == 64


def test_limits_of_cgroups(cgroup: Path) -> None:
    files = {
        "cpu.max": "250000 100000",
        "memory.max": str(8 * GIB),
        "memory.current": str(6 * GIB),
        "memory.stat": f"anon 5\ninactive_file {GIB}",
    }
    write(cgroup, files)
    assert (machine.usable_cores(), machine.available_memory()) == (2, 3 * GIB)
    write(cgroup, {"cpu.max": "50000 100000", "memory.current": str(10 * GIB)})
    assert (machine.usable_cores(), machine.available_memory()) == (1, 0)


def test_limits_of_old_cgroups(cgroup: Path) -> None:
    files = {
        "cpu/cpu.cfs_quota_us": "400000",
        "cpu/cpu.cfs_period_us": "100000",
        "memory/memory.limit_in_bytes": str(4 * GIB),
        "memory/memory.usage_in_bytes": str(GIB),
        "memory/memory.stat": "total_inactive_file 0",
    }
    write(cgroup, files)
    assert (machine.usable_cores(), machine.available_memory()) == (4, 3 * GIB)


def test_limits_of_nested_cgroups(cgroup: Path) -> None:
    """The tightest of the groups that the process is in counts, with a container's own root or without."""
    write(
        cgroup,
        {
            "own": "0::/batch/job.7",
            "cpu.max": "max 100000",
            "batch/cpu.max": "300000 100000",
            "batch/job.7/cpu.max": "800000 100000",
            "batch/memory.max": str(9 * GIB),
            "batch/memory.current": str(1 * GIB),
            "batch/job.7/memory.max": str(4 * GIB),
            "batch/job.7/memory.current": str(1 * GIB),
        },
    )
    assert (machine.usable_cores(), machine.available_memory()) == (3, 3 * GIB)
    write(cgroup, {"own": "0::/../elsewhere", "cpu.max": "200000 100000"})
    assert machine.usable_cores() == 2


def test_limits_of_nested_old_cgroups(cgroup: Path) -> None:
    write(
        cgroup,
        {
            "own": "9:memory:/job\n5:cpu,cpuacct:/job\n1:name=systemd:/",
            "cpu/job/cpu.cfs_quota_us": "500000",
            "cpu/job/cpu.cfs_period_us": "100000",
            "memory/job/memory.limit_in_bytes": str(4 * GIB),
            "memory/job/memory.usage_in_bytes": str(GIB),
        },
    )
    assert (machine.usable_cores(), machine.available_memory()) == (5, 3 * GIB)


@pytest.mark.parametrize(("cores", "gib", "expected"), [(4, 99, 4), (64, 3, 3), (4, 0, 1)])
def test_compilations_are_bounded_by_cores_and_memory(
    monkeypatch: pytest.MonkeyPatch, cores: int, gib: int, expected: int
) -> None:
    monkeypatch.setattr(ninja_file, "usable_cores", lambda: cores)
    monkeypatch.setattr(ninja_file, "available_memory", lambda: gib * GIB)
    assert ninja_file._parallel() == expected
