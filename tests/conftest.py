"""What all tests share: nothing of the user's, the same random numbers in every run, GPU tests by marker."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.command import Command, command


def pytest_configure(config: pytest.Config) -> None:
    """Keep the user's tuning files and kernel cache out, here and in subprocesses.

    Compiled kernels stay beside pytest's own cache, so that a second run compiles nothing.
    """
    cache = Path(config.rootpath) / ".pytest_cache"
    for name in [n for n in os.environ if n.startswith("LMKAN_GEN_")]:
        del os.environ[name]
    os.environ["LMKAN_GEN_CACHE"] = str(cache / "kernels")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` run where torch has one."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def _empty_configuration(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        yield


@pytest.fixture(autouse=True)
def _seed_by_name(request: pytest.FixtureRequest) -> None:
    seed = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where CUDA kernels that are compiled for the CPU are kept."""
    return tmp_path_factory.mktemp("emulation")


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs ``lmkan-gen`` with the given arguments, on a wide terminal."""
    return command(monkeypatch, capsys)
