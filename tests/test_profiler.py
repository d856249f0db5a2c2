"""What a profiler shows: operators on any device, kernels by readable names that the documentation lists."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from random import Random

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lmkan_gen import LMKAN2DLayer, dispatch
from lmkan_gen.device import target
from lmkan_gen.families import families
from lmkan_gen.plan import Fill, Launch
from lmkan_gen.problem import LayerShape, Operation, Problem, TableDtype

PERFORMANCE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
OPERATORS = {f"lmkan_gen::{name}" for name in ("forward", "backward", "hessian", "grad_hessian")}


def step(layer: LMKAN2DLayer, x: torch.Tensor) -> None:
    (layer(x).square().mean() + 1e-3 * layer.get_hessian_regularization()).backward()


def documented() -> set[str]:
    section = PERFORMANCE.read_text(encoding="utf-8").split("## In a profiler")[1].split("\n## ")[0]
    return set(re.findall(r"`(lmkan_[a-z_]+)`", section))


def test_kernel_names_are_documented() -> None:
    """Those of every family and operation, in every way that parameters and determinism make it launch."""
    launched = set()
    for operation, table, deterministic in product(Operation, TableDtype, (False, True)):
        for family in families("cuda", operation, table):
            problem = Problem(operation, LayerShape(64, 128, 9, 16384), target("sm_90"), table, deterministic)
            for parameters in family.drawn(problem, Random(0)):
                steps = family.plan(problem, parameters).steps
                launched |= {s.kernel for s in steps if isinstance(s, Launch)}
                launched |= {"lmkan_zero" for s in steps if isinstance(s, Fill)}
    assert documented() == launched


def test_operators_have_names() -> None:
    layer, x = LMKAN2DLayer(5, 4, 3), torch.randn(4, 20, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step(layer, x)
    assert {e.key for e in profiler.key_averages()} >= OPERATORS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_kernels_have_names_on_a_gpu() -> None:
    layer, x = LMKAN2DLayer(9, 64, 128).cuda(), torch.randn(64, 4096, device="cuda", requires_grad=True)
    step(layer, x)
    assert all(u.kernel for u in dispatch.used() if u.device.type == "cuda")
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step(layer, x)
        torch.cuda.synchronize()
    names = {e.key for e in profiler.key_averages()}
    assert names >= OPERATORS
    ours = {n for n in names if n.startswith("lmkan_") and "::" not in n}
    assert ours >= {"lmkan_forward", "lmkan_hessian", "lmkan_hessian_total", "lmkan_grad_hessian"}
    assert ours <= documented()
