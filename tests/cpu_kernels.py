"""Kernels of CPU families by themselves, and a float64 evaluation of the formulas from the definition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from lmkan_gen import packing
from lmkan_gen.families import Family
from lmkan_gen.launch.cpu import prepare
from lmkan_gen.problem import LayerShape, Operation, Problem

TOLERANCE = 5e-6
OPERATIONS = (Operation.FORWARD, Operation.GRAD_INPUT, Operation.GRAD_TABLE)
OUTPUT = {Operation.FORWARD: "y", Operation.GRAD_INPUT: "grad_x", Operation.GRAD_TABLE: "grad_table"}
CPU = torch.device("cpu")

#: float32 arrays by buffer name
Arrays = dict[str, Any]


def knots(grids: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    quantile = np.arange(1, grids) / grids
    g = np.where(quantile <= 0.5, np.log(2 * quantile), -np.log(2 * (1 - quantile)))
    return np.concatenate([[2 * g[0] - g[1]], g, [2 * g[-1] - g[-2]]])


def inputs_of(shape: LayerShape, seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    # wide enough that both outermost cells and the extrapolation beyond them are visited
    x = rng.normal(scale=2.0, size=(shape.inputs, shape.batch))
    return {
        "x": x.astype(np.float32),
        "table": rng.normal(size=(shape.grids + 1, shape.grids + 1, shape.outputs, shape.pairs)).astype(
            np.float32
        ),
        "borders": knots(shape.grids).astype(np.float32),
        "grad": rng.normal(size=(shape.outputs, shape.batch)).astype(np.float32),
    }


def locate(x: Any, g: Any) -> tuple[Any, Any, Any]:
    """Cell, position in it and its width, float64."""
    grids = len(g) - 1
    with np.errstate(over="ignore", invalid="ignore"):
        sigma = np.where(x <= 0, 0.5 * np.exp(np.minimum(x, 0)), 1 - 0.5 * np.exp(-np.maximum(x, 0)))
        t = np.nan_to_num(np.floor(grids * sigma))
        i = np.clip(t, 0, grids - 1).astype(int)
        h = g[i + 1] - g[i]
        return i, (x - g[i]) / h, h


def truth(operation: Operation, a: Arrays) -> Any:
    x, table, g = (a[name].astype(np.float64) for name in ("x", "table", "borders"))
    grad = a["grad"].astype(np.float64)
    i, d, h = locate(x, g)
    if len(x) % 2:  # the other input of the last pair is zero
        i, d, h = (
            np.concatenate([part, of_zero])
            for part, of_zero in zip((i, d, h), locate(0 * x[:1], g), strict=True)
        )
    i1, i2, d1, d2 = i[::2], i[1::2], d[::2], d[1::2]  # [P, B]
    corners = [(1 - d1) * (1 - d2), (1 - d1) * d2, d1 * (1 - d2), d1 * d2]
    steps = [(0, 0), (0, 1), (1, 0), (1, 1)]
    p = np.arange(len(i1))[:, None]
    c = [np.moveaxis(table[i1 + s, i2 + t, :, p], -1, 0) for s, t in steps]  # each [O, P, B]
    if operation is Operation.FORWARD:
        return sum(w * v for w, v in zip(corners, c, strict=True)).sum(axis=1)
    if operation is Operation.GRAD_INPUT:
        result = np.empty_like(d)
        result[::2] = np.einsum("ob,opb->pb", grad, (1 - d2) * (c[2] - c[0]) + d2 * (c[3] - c[1])) / h[::2]
        result[1::2] = np.einsum("ob,opb->pb", grad, (1 - d1) * (c[1] - c[0]) + d1 * (c[3] - c[2])) / h[1::2]
        return result[: len(x)]
    result = np.zeros_like(table)
    for w, (s, t) in zip(corners, steps, strict=True):
        contribution = np.moveaxis(w[None] * grad[:, None], 0, -1)  # [P, B, O]
        where: Any = (i1 + s, i2 + t, slice(None), np.broadcast_to(p, i1.shape))
        np.add.at(result, where, contribution)
    return result


def run(family: Family, problem: Problem, parameters: Mapping[str, Any], a: Arrays) -> torch.Tensor:
    """The family's result, its output buffer poisoned beforehand."""
    s = problem.shape
    family.check(problem.operation, parameters)
    shapes = {
        "y": (s.outputs, s.batch),
        "grad_x": (s.inputs, s.batch),
        "grad_table": (s.grids + 1, s.grids + 1, s.outputs, s.pairs),
    }
    name = OUTPUT[problem.operation]
    output = torch.full(shapes[name], torch.nan)
    buffers = {key: torch.from_numpy(value) for key, value in a.items()}
    plan = family.plan(problem, parameters)
    arranged = packing.arranged({**buffers, name: output}, plan.buffers, problem.table)
    prepare(family.spec(problem, parameters), plan, CPU)(arranged)
    return output


def away_from_knots(a: Arrays) -> Arrays:
    """Move samples that rounding may count to either cell (their input gradients differ)."""
    x, g = a["x"].astype(np.float64), a["borders"].astype(np.float64)
    _, d, h = locate(x, g)
    near = np.abs(d - np.round(d)) < 1e-4
    return {**a, "x": np.where(near, x + 1e-3 * h, x).astype(np.float32)}


def check(family: Family, problem: Problem, parameters: Mapping[str, Any], seed: int) -> None:
    """Compare with the truth for the table that the problem's type makes of a random one."""
    operation = problem.operation
    a = inputs_of(problem.shape, seed)
    rounded = packing.round_table(torch.from_numpy(a["table"]), problem.table)
    a["table"] = rounded.to(torch.float32).numpy()
    if operation is Operation.GRAD_INPUT:
        a = away_from_knots(a)
    expected = truth(operation, a)
    got = run(family, problem, parameters, a).numpy()
    error = np.abs(got - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCE, f"{problem} {parameters} seed {seed}: error {error:.2e}"
