"""A batch that was not seen before: a layer's choices are made from what is known of the layer."""

from __future__ import annotations

import builtins
import hashlib
import io
import logging
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lmkan_gen import codegen, freshness, problem, selection
from lmkan_gen.device import CUDA_ARCHITECTURES, Device, models
from lmkan_gen.families import Demand, family, lanes, walk
from lmkan_gen.families.output_stationary import OutputStationary
from lmkan_gen.families.tile_stationary import TileStationary
from lmkan_gen.families.tile_times import Access
from lmkan_gen.plan import KernelSpec, LaunchPlan
from lmkan_gen.problem import CALL_OPERATIONS, LayerShape, Operation, Problem, TableDtype
from lmkan_gen.resources import resource_directory
from lmkan_gen.tuning_file import load

H200, A100 = models("sm_90")[0], models("sm_80")[0]
CPU = Device("cpu", "AMD EPYC", "x86-64-v4", 16)
SHAPES = [(64, 64, 8, 256), (128, 128, 10, 1024), (128, 96, 8, 4096), (1024, 1024, 4, 200), (33, 7, 40, 64)]


@pytest.fixture(autouse=True)
def _shipped_files_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    forget()
    yield
    forget()


def forget() -> None:
    """Layers that are made anew have nothing kept for them."""
    selection.clear_caches()
    problem._layer.cache_clear()


def choose(asked: Problem, demand: Demand | None = None) -> tuple[selection.Choice, ...]:
    if asked.operation is Operation.BACKWARD:
        return selection.select_backward(asked, demand)
    return (selection.select(asked, demand),)


def prepare(asked: Problem, demand: Demand | None = None) -> list[tuple[Any, KernelSpec, LaunchPlan]]:
    """All that a first call needs from selection and families."""
    prepared = []
    for c in choose(asked, demand):
        assert c.family is not None
        chosen, exact = family(c.family), replace(c.problem, shape=asked.shape)
        what = (c.problem, c.family, dict(c.parameters), c.tier, c.source, c.time_us, c.tuned_for, c.cost)
        prepared.append((what, chosen.spec(exact, c.parameters), chosen.plan(exact, c.parameters)))
    return prepared


def with_batch(asked: Problem, batch: int) -> Problem:
    return replace(asked, shape=replace(asked.shape, batch=batch))


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    """No source, no file, no hash of a text, no list of candidates."""

    def fail(*_: object, **__: object) -> Any:
        raise AssertionError("more than arithmetic for a new batch")

    for module, name in (
        (codegen, "render"), (freshness, "render"), (hashlib, "sha256"), (builtins, "open"), (io, "open"),
        (walk, "branches"), (TileStationary, "_default_candidates"),
        (OutputStationary, "_default_candidates"), (selection, "_completions"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, fail)


@pytest.mark.parametrize("device", [H200, A100, CPU], ids=lambda d: d.name)
@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("operation", CALL_OPERATIONS)
def test_takes_arithmetic_only(
    monkeypatch: pytest.MonkeyPatch, device: Device, deterministic: bool, operation: Operation
) -> None:
    half = TableDtype.FLOAT16 if device.kind == "cuda" else TableDtype.FLOAT32
    layers = [
        Problem(operation, LayerShape(*shape), device, table, deterministic)
        for shape in SHAPES
        for table in {TableDtype.FLOAT32, half}
    ]
    for layer in layers:
        # some batches are tuned, or ask other families than most: what these know is found out once as well
        batch = layer.shape.batch
        for seen in (batch, batch - batch // 4, batch + batch // 4):
            prepare(with_batch(layer, seen))
    with monkeypatch.context() as patch:
        forbid(patch)
        for layer in layers:
            near = layer.shape.batch + random.choice([-1, 1]) * random.randint(1, layer.shape.batch // 8)
            prepare(with_batch(layer, near))


def test_of_a_demand_takes_arithmetic_only(monkeypatch: pytest.MonkeyPatch) -> None:
    demand = Demand(tile_size=8, block_size=256)
    layers = [
        Problem(o, LayerShape(128, 128, 8, 1000), H200) for o in (Operation.FORWARD, Operation.BACKWARD)
    ]
    for layer in layers:
        prepare(layer, demand)
    with monkeypatch.context() as patch:
        forbid(patch)
        for layer in layers:
            prepare(with_batch(layer, 1001), demand)


@pytest.mark.parametrize("arch", [*CUDA_ARCHITECTURES, "cpu"])
def test_gets_what_it_would_get_as_the_first(arch: str) -> None:
    for _ in range(3):
        device = CPU if arch == "cpu" else random.choice(models(arch))
        shape = (random.randint(1, 300), random.randint(1, 300), random.randint(3, 30))
        layer = Problem(
            random.choice(CALL_OPERATIONS),
            LayerShape(*shape, 1),
            device,
            TableDtype.FLOAT32 if arch in ("cpu", "sm_75") else random.choice(list(TableDtype)[:3]),
            deterministic=random.random() < 0.3,
            constant=random.random() < 0.3,
            strided=random.random() < 0.3,
        )
        asked = [with_batch(layer, int(2 ** random.uniform(0, 18))) for _ in range(5)]
        after_others = [prepare(p) for p in asked]
        for p, found in zip(asked, after_others, strict=True):
            forget()
            assert prepare(p) == found, p


def test_staleness_is_found_out_when_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rendered = []

    def render(spec: KernelSpec) -> str:
        rendered.append(spec)
        return "another source"

    monkeypatch.setattr(freshness, "render", render)
    file = load(resource_directory("tuning") / "nvidia_h200.yaml")
    plain = (Operation.FORWARD, TableDtype.FLOAT32)
    shapes = [e.shape.layer for e in file.entries if (e.operation, e.dtypes.table) == plain]
    shape = max(shapes, key=lambda s: s.batch)
    tuned = Problem(Operation.FORWARD, shape, H200)
    found = next(c for c in selection.tuned_choices(tuned) if c.tier is selection.Tier.EXACT)
    choice = selection.select(with_batch(tuned, shape.batch + 1))
    assert choice.tier is selection.Tier.NEAREST_SHAPE
    assert not rendered
    assert found.stale
    assert len(rendered) == 1
    assert "kernels changed since" in choice.describe()
    with caplog.at_level(logging.INFO, "lmkan_gen"):
        selection.clear_caches()
        for more in (0, 2, 0, 3):
            selection.select(with_batch(tuned, shape.batch + more))
    assert [("[exact" in m, "changed since" in m) for m in caplog.messages] == [(True, True), (False, True)]


# --- rough times of all candidates at once --------------------------------------------------------


def time_of(f: TileStationary, p: Problem, parameters: Any, access: Access) -> float:
    """What a tile-stationary kernel takes, candidate by candidate in integers."""
    tile = f._tile(p.layer, parameters, (access,))
    units, grid_splits = -(-p.shape.batch // lanes.WARP), f._grid(p, parameters)
    (grid, splits), segments = grid_splits, tile.segments * grid_splits[1]
    sharing = -(-grid // p.device.multiprocessors)
    worked = -(-segments * units // (grid * tile.at_a_time)) * tile.at_a_time
    compute = worked * tile.unit_us * sharing * tile.summed / splits / tile.utilisation
    updated = 4 * p.shape.batch * (p.shape.outputs if p.operation is Operation.FORWARD else p.shape.inputs)
    added = updated * tile.summed / ((3.3e6 if updated < 36 << 20 else 1.3e6) * access.rate)
    loads = (-(-segments // grid) + bool(segments % grid and grid % segments)) * tile.summed / splits
    staging = loads * max(tile.staging_us * sharing, tile.staging_us + 4.0)
    return max(compute, added) + staging + (tile.launches + (splits > 1)) * 2.0


@pytest.mark.parametrize("operation", [Operation.FORWARD, Operation.GRAD_INPUT, Operation.BACKWARD])
def test_default_tile_is_the_fastest_of_all(operation: Operation) -> None:
    f = TileStationary()
    for _ in range(3):
        inputs, outputs, grids = random.randint(1, 600), random.randint(1, 600), random.randint(3, 14)
        for batch in (random.randint(1, 64), random.randint(900, 1100), int(2 ** random.uniform(6, 20))):
            p = Problem(operation, LayerShape(inputs, outputs, grids, batch), random.choice([H200, A100]))
            times = [
                (time_of(f, p, parameters, access), access.parameters)
                for parameters, accesses in f._default_candidates(operation)
                if not f.violations(p, parameters) and not f._may_spill(p, parameters)
                for access in accesses
            ]
            assert f.default(p) == min(times, key=lambda time: time[0])[1]
