"""Memory of long-lived processes: what calls leave behind is bounded, and kernels can be unloaded."""

from __future__ import annotations

import subprocess
import sys

PREAMBLE = """
import os, warnings
from pathlib import Path
import torch
import lmkan_gen
from lmkan_gen import LMKAN2DLayer
torch.set_num_threads(2)

def libraries():
    return {line.split()[-1] for line in Path("/proc/self/maps").open() if line.endswith("kernel.so\\n")}
"""

CLEAR = """
layer = LMKAN2DLayer(6, 16, 8)
x = torch.randn(16, 64)
with torch.no_grad():
    before = layer(x)
    assert libraries()
    for _ in range(3):
        lmkan_gen.clear()
        assert not libraries()
        assert torch.equal(layer(x), before)
        assert libraries()
"""

GROWTH = """
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

with torch.no_grad():
    layer = LMKAN2DLayer(6, 16, 8)
    layer(torch.randn(16, 3000))
    before = resident()
    for batch in range(1, 2001):
        layer(torch.randn(16, batch))
    layers = [LMKAN2DLayer(6, 2 * (i % 20 + 1), i // 20 + 1) for i in range(400)]
    for one in layers:
        one(torch.randn(one.input_dim, 8))
    print((resident() - before) / 2**20)
"""


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_clear_unloads_kernels_and_layers_go_on() -> None:
    run(CLEAR)


def test_many_batches_and_layers_stay_small() -> None:
    assert float(run(GROWTH)) <= 100
