"""Selection: the best founded choice, demands honoured or refused, and never a layer that cannot run."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmkan_gen import families, selection
from lmkan_gen.device import CUDA_ARCHITECTURES, Device, models
from lmkan_gen.families import Demand, Family, Parameters, Violation
from lmkan_gen.plan import Constant, KernelSpec, LaunchPlan
from lmkan_gen.problem import LayerShape, Operation, Problem
from lmkan_gen.selection import Tier, select, select_backward
from lmkan_gen.tuning_file import (
    Dtypes,
    Entry,
    Provenance,
    Search,
    ShapeRecord,
    Times,
    TuningFile,
    save,
)

GPU = Device("cuda", "GPU One", "sm_90", 100, 200_000, 210_000)
BIGGER = Device("cuda", "GPU Two", "sm_90", 120, 200_000, 210_000)
SMALLER = Device("cuda", "GPU Three", "sm_90", 40, 100_000, 110_000)
OLDER = Device("cuda", "GPU Zero", "sm_80", 100, 160_000, 170_000)
SHAPE = LayerShape(64, 64, 10, 1000)


class Tiles(Family):
    """A table of ``4 * tile**2 * knots`` bytes must fit shared memory; knows the seed's arguments."""

    name = "tiles"
    device_kind = "cuda"
    operations = frozenset({Operation.FORWARD, Operation.GRAD_INPUT, Operation.BACKWARD})
    idea = "made for tests"

    def space(self, operation: Operation) -> Mapping[str, tuple[Constant, ...]]:
        return {"tile": (4, 8, 16), "threads": (128, 256, 512), "mode": ("normal", "fast")}

    def demanded(self, problem: Problem, demand: Demand) -> Mapping[str, Constant] | None:
        fixed: dict[str, Constant] = {}
        if demand.tile_size is not None:
            fixed["tile"] = demand.tile_size
        if demand.block_size is not None:
            fixed["threads"] = demand.block_size
        if demand.fast_mode:
            fixed["mode"] = "fast"
        return fixed

    def default(self, problem: Problem) -> Parameters | None:
        for tile in (16, 8, 4):
            parameters = {"tile": tile, "threads": 256, "mode": "normal"}
            if not self.violations(problem, parameters):
                return parameters
        return None

    def violations(self, problem: Problem, parameters: Parameters) -> list[Violation]:
        tile, found = parameters["tile"], []
        assert isinstance(tile, int)
        if (need := 4 * tile**2 * problem.shape.knots) > problem.device.shared_memory_per_block:
            limit = problem.device.shared_memory_per_block
            found.append(Violation("shared_memory", f"tile {tile} needs {need} bytes, there are {limit}"))
        if parameters["mode"] == "fast" and parameters["threads"] != 128:
            found.append(Violation("threads", "fast mode needs 128 threads"))
        return found

    def spec(self, problem: Problem, parameters: Parameters) -> KernelSpec:
        raise NotImplementedError

    def plan(self, problem: Problem, parameters: Parameters) -> LaunchPlan:
        raise NotImplementedError


class Sorted(Tiles):
    """Fits everywhere, without tiles."""

    name = "sorted"
    operations = frozenset({Operation.GRAD_TABLE, Operation.BACKWARD})

    def space(self, operation: Operation) -> Mapping[str, tuple[Constant, ...]]:
        return {"chunk": (1024, 4096)}

    def demanded(self, problem: Problem, demand: Demand) -> Mapping[str, Constant] | None:
        return None

    def default(self, problem: Problem) -> Parameters | None:
        return {"chunk": 4096}

    def violations(self, problem: Problem, parameters: Parameters) -> list[Violation]:
        return []


@pytest.fixture(autouse=True)
def _two_families(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    register(monkeypatch, Tiles(), Sorted())
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(
        "lmkan_gen.tuning_sources.resource_directory", lambda name: tmp_path / "packaged" / name
    )
    selection.clear_caches()
    yield
    selection.clear_caches()


def register(monkeypatch: pytest.MonkeyPatch, *some: Family) -> None:
    monkeypatch.setattr(families, "_registry", lambda: {f.name: f for f in some})


def entry(
    shape: LayerShape = SHAPE,
    operation: Operation = Operation.FORWARD,
    family: str = "tiles",
    median: float = 10.0,
    **parameters: Constant,
) -> Entry:
    defaults: dict[str, Constant] = (
        {"tile": 4, "threads": 512, "mode": "normal"} if family == "tiles" else {"chunk": 1024}
    )
    return Entry(
        operation=operation,
        shape=ShapeRecord.of(shape),
        dtypes=Dtypes(),
        family=family,
        parameters={**defaults, **parameters},
        time_us=Times(median=median, iqr=0.1),
        search=Search(tried=1, rejected={}),
    )


def write(path: Path, device: Device, *entries: Entry) -> Path:
    provenance = Provenance(lmkan_gen="0", compiler="c", torch="2", date=date(2026, 1, 1))
    save(path, TuningFile.make(device, provenance, entries))
    selection.clear_caches()
    return path


def user(name: str = "a") -> Path:
    return selection.user_tuning_directory() / f"{name}.yaml"


def forward(shape: LayerShape = SHAPE, device: Device = GPU) -> Problem:
    return Problem(Operation.FORWARD, shape, device)


# --- tiers ----------------------------------------------------------------------------------------


def test_exact(tmp_path: Path) -> None:
    path = write(user(), GPU, entry(tile=8), entry(LayerShape(64, 64, 10, 1001), tile=4))
    choice = select(forward())
    assert (choice.tier, choice.family, choice.source) == (Tier.EXACT, "tiles", str(path))
    assert dict(choice.parameters) == {"tile": 8, "threads": 512, "mode": "normal"}
    assert choice.time_us == 10.0
    assert "exact" in choice.describe()
    assert "10.0 us" in choice.describe()
    assert str(path) in choice.describe()


def test_time_of_a_stand_in_is_not_given_as_the_devices_own() -> None:
    write(user(), GPU, entry(tile=8).model_copy(update={"measured_on": "Its Sister"}))
    choice = select(forward())
    assert (choice.tier, choice.parameters["tile"], choice.time_us) == (Tier.EXACT, 8, None)
    assert "measured on Its Sister" in choice.describe()


def test_exact_entry_that_does_not_fit_is_passed_over() -> None:
    write(user(), GPU, entry(LayerShape(64, 64, 30, 1000), tile=16))
    choice = select(forward(LayerShape(64, 64, 30, 1000)))
    assert choice.tier is Tier.DEFAULT
    assert choice.parameters["tile"] == 4


def test_nearest_shape_in_log_space_that_fits() -> None:
    near, far = LayerShape(64, 64, 12, 900), LayerShape(512, 512, 12, 900)
    write(user(), GPU, entry(far, tile=4), entry(near, tile=8), entry(LayerShape(64, 64, 11, 1000), tile=16))
    choice = select(forward())
    assert choice.tier is Tier.NEAREST_SHAPE
    assert choice.tuned_for == LayerShape(64, 64, 11, 1000)
    assert choice.time_us is None
    # at 17 grids tile 16 no longer fits, and the next nearest is asked
    choice = select(forward(LayerShape(64, 64, 17, 1000)))
    assert (choice.parameters["tile"], choice.tuned_for) == (8, near)


def test_other_operations_do_not_count() -> None:
    write(user(), GPU, entry(operation=Operation.GRAD_INPUT))
    assert select(forward()).tier is Tier.DEFAULT


def test_nearest_device_of_the_same_architecture() -> None:
    write(user("bigger"), BIGGER, entry(tile=8))
    write(user("smaller"), SMALLER, entry(tile=4))
    write(user("older"), OLDER, entry(tile=16))
    choice = select(forward())
    assert (choice.tier, choice.parameters["tile"]) == (Tier.NEAREST_DEVICE, 8)
    assert choice.time_us is None
    assert select(forward(device=OLDER)).tier is Tier.EXACT
    other = Device("cuda", "GPU Four", "sm_120", 100, 100_000, 110_000)
    assert select(forward(device=other)).tier is Tier.DEFAULT


def test_own_device_beats_exact_shape_elsewhere() -> None:
    write(user("a"), BIGGER, entry(tile=8))
    write(user("b"), GPU, entry(LayerShape(128, 128, 4, 500), tile=4))
    assert select(forward()).tier is Tier.NEAREST_SHAPE


def test_far_shapes_say_less_than_analysis() -> None:
    write(user("a"), GPU, entry(LayerShape(1024, 1024, 4, 1), tile=16))
    assert select(forward()).tier is Tier.DEFAULT
    # but more than plain torch, where no default fits; and the nearest other device is asked before
    write(user("b"), BIGGER, entry(tile=8))
    selection.clear_caches()
    assert select(forward()).tier is Tier.NEAREST_DEVICE


def test_what_a_family_is_not_for_is_not_taken_from_another_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """But where that was measured it is, and where nothing else fits."""
    few = LayerShape(SHAPE.inputs, SHAPE.outputs, SHAPE.grids, 100)
    monkeypatch.setattr(Tiles, "preference", lambda _, p: -1.0 if p.shape.batch < 500 else 1.0)
    write(user(), GPU, entry(tile=8))
    assert select(Problem(Operation.FORWARD, replace(few, batch=600), GPU)).tier is Tier.NEAREST_SHAPE
    assert select(Problem(Operation.FORWARD, few, GPU)).tier is Tier.DEFAULT
    monkeypatch.setattr(Tiles, "default", lambda _, problem: None)
    selection.clear_caches()
    assert select(Problem(Operation.FORWARD, few, GPU)).tier is Tier.NEAREST_SHAPE
    write(user(), GPU, entry(few, tile=16))
    selection.clear_caches()
    assert select(Problem(Operation.FORWARD, few, GPU)).tier is Tier.EXACT


def test_order_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged = write(tmp_path / "packaged" / "tuning" / "gpu.yaml", GPU, entry(tile=4))
    assert select(forward()).source == str(packaged)
    mine = write(user(), GPU, entry(tile=8))
    assert select(forward()).source == str(mine)
    directory = tmp_path / "named"
    named = write(directory / "x.yaml", GPU, entry(tile=16))
    for value in (named, directory):
        monkeypatch.setenv(selection.TUNING_VARIABLE, str(value))  # takes effect without clearing caches
        assert select(forward()).source == str(named)
    assert [s.origin for s in selection.sources()] == ["environment", "user", "packaged"]


def test_default_of_the_preferred_family(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(Operation.BACKWARD, SHAPE, GPU)
    assert select(problem).family == "tiles"
    monkeypatch.setattr(Sorted, "preference", lambda self, problem: 1.0)
    selection.clear_caches()
    assert select(problem).family == "sorted"


def test_reference_when_nothing_fits_with_one_warning() -> None:
    problem = forward(LayerShape(64, 64, 200, 1000))
    with pytest.warns(UserWarning, match=r"forward 64,64,200,1000 on GPU One.*plain torch") as caught:
        choice = select(problem)
    assert (choice.family, choice.tier, dict(choice.parameters)) == (None, Tier.REFERENCE, {})
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        select(problem)
        select(forward(LayerShape(64, 64, 200, 1001)))  # another batch is no news


def test_one_line_names_the_command_that_would_tune(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lmkan_gen"):
        select(forward())
        select(forward(LayerShape(64, 64, 10, 1001)))
    assert len(caplog.records) == 1
    assert "lmkan-gen tune --device cuda --shape 64,64,10,1000 --operation forward" in caplog.text
    caplog.clear()
    write(user(), GPU, entry())
    with caplog.at_level(logging.INFO, "lmkan_gen"):
        select(forward())
    assert not caplog.records


def test_broken_files_are_skipped_with_one_warning_each(monkeypatch: pytest.MonkeyPatch) -> None:
    good = write(user("good"), GPU, entry())
    user("broken").write_text("schema: 1\nentries: [")
    os.mkfifo(user("a_pipe"))
    monkeypatch.setenv(selection.TUNING_VARIABLE, "/nowhere/mine.yaml")
    selection.clear_caches()
    with pytest.warns(UserWarning, match="ignoring a tuning file") as caught:
        assert select(forward()).source == str(good)
    reasons = [str(w.message) for w in caught]
    for reason, words in zip(
        reasons,
        (r"/nowhere/mine\.yaml: .*No such file", r"a_pipe\.yaml: .*no regular", r"broken\.yaml: malformed"),
        strict=True,
    ):
        assert re.search(words, reason)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        select(forward(LayerShape(64, 64, 10, 5)))


def test_entries_for_kernels_of_another_version_are_passed_over_with_one_warning() -> None:
    other = replace(SHAPE, batch=2 * SHAPE.batch)
    path = write(user(), GPU, entry(), entry(shape=other))
    before, _, after = path.read_text().rpartition("family: tiles")
    path.write_text(f"{before}family: from_the_future{after}")
    selection.clear_caches()
    with pytest.warns(UserWarning, match=rf"a\.yaml: 1 of 2 entries .*{other}: unknown") as caught:
        assert {select(forward(shape)).tier for shape in (SHAPE, other)} == {Tier.EXACT, Tier.NEAREST_SHAPE}
    assert len(caught) == 1


def test_batch_of_zero() -> None:
    write(user(), GPU, entry())
    assert select(forward(LayerShape(64, 64, 10, 0))).tier is Tier.NEAREST_SHAPE


def test_what_would_be_wasted_on_a_shape_is_not_taken_from_another(monkeypatch: pytest.MonkeyPatch) -> None:
    write(
        user(),
        GPU,
        entry(LayerShape(128, 128, 10, 1000), tile=16),
        entry(LayerShape(256, 64, 10, 1000), tile=4),
    )
    assert select(forward()).parameters["tile"] == 16
    selection.clear_caches()
    monkeypatch.setattr(Tiles, "wasted", lambda self, problem, parameters: parameters["tile"] == 16)
    assert select(forward()).parameters["tile"] == 4
    assert select(forward(LayerShape(128, 128, 10, 1000))).tier is Tier.EXACT


def test_second_call_asks_no_family(monkeypatch: pytest.MonkeyPatch) -> None:
    first = select(forward())

    def fail(*_: object) -> Any:
        raise AssertionError("asked again")

    monkeypatch.setattr(Tiles, "default", fail)
    monkeypatch.setattr(Tiles, "violations", fail)
    assert select(forward()) is first


# --- backward -------------------------------------------------------------------------------------


def operations(choices: tuple[selection.Choice, ...]) -> list[Operation]:
    return [c.problem.operation for c in choices]


BACKWARD = Problem(Operation.BACKWARD, SHAPE, GPU)
SPLIT = [Operation.GRAD_INPUT, Operation.GRAD_TABLE]


def test_untuned_backward_is_fused() -> None:
    assert operations(select_backward(BACKWARD)) == [Operation.BACKWARD]
    # the fast mode is a wish about tiles; without one it changes nothing
    assert select_backward(BACKWARD, Demand(fast_mode=True)) == select_backward(BACKWARD)


def test_what_was_measured_for_this_shape_beats_what_is_scaled_from_another() -> None:
    other = LayerShape(64, 64, 10, 4000)
    write(
        user(),
        GPU,
        entry(shape=other, operation=Operation.GRAD_INPUT, median=1.0),
        entry(shape=other, operation=Operation.GRAD_TABLE, family="sorted", median=1.0),
        entry(operation=Operation.BACKWARD, median=30.0),
    )
    assert operations(select_backward(BACKWARD)) == [Operation.BACKWARD]
    assert operations(select_backward(Problem(Operation.BACKWARD, other, GPU))) == SPLIT


def test_on_another_device_as_well() -> None:
    sister, other = replace(GPU, name="Its Sister"), LayerShape(64, 64, 10, 4000)
    write(
        user(),
        GPU,
        entry(operation=Operation.GRAD_INPUT, median=1.0),
        entry(shape=other, operation=Operation.GRAD_TABLE, family="sorted", median=1.0),
        entry(operation=Operation.BACKWARD, median=30.0),
    )
    (choice,) = select_backward(replace(BACKWARD, device=sister))
    assert (choice.problem.operation, choice.tier) == (Operation.BACKWARD, Tier.NEAREST_DEVICE)


def test_family_that_asks_for_it_is_taken_unless_the_shape_was_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for family in (Tiles, Sorted):
        monkeypatch.setattr(family, "preference", lambda _, p: 2.0 if p.operation in SPLIT else 0.0)
    other = LayerShape(64, 64, 10, 4000)
    write(user(), GPU, entry(shape=other, operation=Operation.BACKWARD, median=1.0))
    assert operations(select_backward(BACKWARD)) == SPLIT
    write(user(), GPU, entry(operation=Operation.BACKWARD, median=1.0))
    assert operations(select_backward(BACKWARD)) == [Operation.BACKWARD]
    (choice,) = select_backward(replace(BACKWARD, device=replace(GPU, name="Its Sister")))
    assert choice.tier is Tier.NEAREST_DEVICE


@pytest.mark.parametrize(("fused", "expected"), [(29.0, [Operation.BACKWARD]), (31.0, SPLIT)])
def test_tuned_backward_is_the_faster_one(fused: float, expected: list[Operation]) -> None:
    write(
        user(),
        GPU,
        entry(operation=Operation.GRAD_INPUT, median=10.0),
        entry(operation=Operation.GRAD_TABLE, family="sorted", median=20.0),
        entry(operation=Operation.BACKWARD, median=fused),
    )
    for batch in (1000, 700):  # exact, and nearest
        shape = LayerShape(64, 64, 10, batch)
        assert operations(select_backward(Problem(Operation.BACKWARD, shape, GPU))) == expected


def test_fused_where_a_half_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, Tiles())
    assert operations(select_backward(BACKWARD)) == [Operation.BACKWARD]
    register(monkeypatch)
    selection.clear_caches()
    with pytest.warns(UserWarning, match="plain torch"):
        (choice,) = select_backward(BACKWARD)
    assert (choice.family, choice.problem.operation) == (None, Operation.BACKWARD)


def test_demand_on_backward_is_honoured_by_what_has_tiles() -> None:
    choices = select_backward(BACKWARD, Demand(tile_size=8))
    assert operations(choices) == SPLIT
    assert choices[0].parameters["tile"] == 8
    assert choices[0].tier is Tier.DEMANDED


def test_backward_demand_that_fits_nowhere_is_refused() -> None:
    shape = LayerShape(64, 64, 40, 1000)
    with pytest.raises(ValueError, match="tile size 16"):
        select_backward(Problem(Operation.BACKWARD, shape, GPU), Demand(tile_size=16))


# --- demands --------------------------------------------------------------------------------------


@given(
    tile=st.sampled_from([None, 4, 8, 16]),
    block=st.sampled_from([None, 128, 256, 512]),
    fast=st.booleans(),
    grids=st.integers(3, 60),
)
def test_demands_are_honoured_or_refused(tile: int | None, block: int | None, fast: bool, grids: int) -> None:
    demand = Demand(tile, block, fast)
    problem = forward(LayerShape(64, 64, grids, 1000))
    if 4 * (tile or 4) ** 2 * (grids + 1) ** 2 > GPU.shared_memory_per_block:
        if demand.is_free:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert select(problem, demand).tier is Tier.REFERENCE
        else:
            with pytest.raises(ValueError, match="does not fit forward"):
                select(problem, demand)
        return
    choice = select(problem, demand)
    assert choice.parameters["tile"] == tile or tile is None
    assert choice.parameters["threads"] == block or block is None
    assert not Tiles().violations(problem, choice.parameters)
    if fast and block in (None, 128):
        assert choice.parameters["mode"] == "fast"
    assert (choice.tier is Tier.DEMANDED) == (demand != Demand())


def test_refusal_says_what_breaks_and_what_fits() -> None:
    problem = forward(LayerShape(64, 64, 17, 1000))
    with pytest.raises(ValueError, match="does not fit") as caught:
        select(problem, Demand(tile_size=16))
    message = str(caught.value)
    for words in (
        "tile size 16",
        "num_grids=17",
        "GPU One",
        "tile 16 needs 331776 bytes, there are 200000",
        "num_grids up to 12 with it",  # 4 * 256 * 14**2 > 200000
        "tile size 4, 8 with num_grids=17",
        "leaving the argument out",
    ):
        assert words in message, message


def test_values_outside_the_space_are_refused_with_those_inside() -> None:
    with pytest.raises(ValueError, match=r"not made for tile=5 \(tile in 4, 8, 16\)"):
        select(forward(), Demand(tile_size=5))
    with pytest.raises(ValueError, match=r"threads in 128, 256, 512.*block size 128, 256, 512 with"):
        select(forward(), Demand(block_size=100))


def test_rest_of_a_demand_comes_from_tuning() -> None:
    write(
        user(),
        GPU,
        entry(LayerShape(64, 64, 11, 1000), tile=4, threads=128),
        entry(LayerShape(64, 64, 12, 1000), tile=8, threads=512),
    )
    choice = select(forward(), Demand(tile_size=8))
    assert (choice.tier, choice.parameters["threads"]) == (Tier.DEMANDED, 512)
    # nothing was tuned with 16: the nearest entry's other values
    assert select(forward(), Demand(tile_size=16)).parameters["threads"] == 128


def test_no_family_with_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, Sorted())
    with pytest.raises(ValueError, match=r"block size 128 cannot be honoured.*leave the argument out"):
        select(BACKWARD, Demand(block_size=128))
    assert select(BACKWARD, Demand(fast_mode=True)).family == "sorted"


def test_half_of_the_backward_pass_without_tiles_stays_free() -> None:
    choice = select(Problem(Operation.GRAD_TABLE, SHAPE, GPU), Demand(tile_size=8))
    assert (choice.family, choice.tier) == ("sorted", Tier.DEFAULT)


def test_demands_mean_nothing_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = Device("cpu", "A CPU", "x86-64-v3", 4)
    monkeypatch.setattr(Tiles, "device_kind", "cpu")
    monkeypatch.setattr(Tiles, "violations", lambda *_: [])
    assert select(forward(device=cpu), Demand(tile_size=5)).tier is Tier.DEFAULT


# --- the real families ----------------------------------------------------------------------------


KNOWN = [model for arch in CUDA_ARCHITECTURES for model in models(arch)]


@pytest.mark.parametrize("name", ["A100", "H100", "RTX 3080", "RTX 4090", "RTX 5090", "L4", "T4", "B200"])
def test_well_known_gpus_are_known(name: str) -> None:
    assert [m for m in KNOWN if re.search(rf"\b{name}\b", m.name)]


@pytest.mark.parametrize("device", KNOWN, ids=lambda d: d.name)
def test_every_gpu_gets_kernels_that_fit(monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    """Also those without a file of their own, and a layer is never without a kernel on them."""
    monkeypatch.undo()  # the real families and files
    selection.clear_caches()
    for grids in (3, 10, 26):
        for batch in (1, 1000, 262144):
            problem = Problem(Operation.FORWARD, LayerShape(128, 96, grids, batch), device)
            for choice in (select(problem), *select_backward(problem)):
                assert choice.family is not None
                fitting = families.family(choice.family)
                assert not fitting.violations(choice.problem, choice.parameters)
                fitting.check(choice.problem.operation, choice.parameters)
