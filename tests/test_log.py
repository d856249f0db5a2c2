"""`LMKAN_GEN_LOG`: each decision on standard error as it happens."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmkan_gen import selection
from lmkan_gen.device import cpu
from lmkan_gen.problem import LayerShape, Operation, Problem

SCRIPT = """
import torch
from lmkan_gen import LMKAN2DLayer
layer = LMKAN2DLayer(4, 8, 6)
with torch.no_grad():
    for batch in (50, 51, 500):
        layer(torch.randn(8, batch))
"""


def said(value: str | None) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    if value is not None:
        environment["LMKAN_GEN_LOG"] = value
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    return [line.split(": ", 1)[1] for line in done.stderr.splitlines() if line.startswith("lmkan-gen ")]


def test_decisions_are_printed_where_asked_for() -> None:
    lines = said("1")
    chosen = [line for line in lines if line.startswith("chosen: forward 8,6,4,")]
    assert len(chosen) >= 2, "one for each range of batches"
    assert any("row_vector.cpp.j2 (" in line or "pair_vector.cpp.j2 (" in line for line in lines)
    assert any(line.startswith("tuning file (packaged): ") for line in lines)


@pytest.mark.parametrize("value", [None, "0"])
def test_nothing_is_printed_otherwise(value: str | None) -> None:
    assert said(value) == []


def test_a_decision_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    selection.clear_caches()
    problem = Problem(Operation.FORWARD, LayerShape(8, 6, 4, 50), cpu())
    with caplog.at_level(logging.DEBUG, "lmkan_gen"):
        choices = {selection.select(problem) for _ in range(3)}
    (choice,) = choices
    messages = [r.getMessage() for r in caplog.records if r.levelno == logging.DEBUG]
    assert messages.count(f"chosen: {choice.describe()}") == 1
