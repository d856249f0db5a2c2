"""The cluster-stationary family: blocks of a cluster add up what they have, in a fixed order."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lmkan_gen import codegen, packing
from lmkan_gen.device import target
from lmkan_gen.families import family
from lmkan_gen.plan import Constant, Fill, KernelSpec, Launch
from lmkan_gen.problem import LayerShape, Operation, Problem, TableDtype
from lmkan_gen.selection import default_choice
from lmkan_gen.tuner.verify import make_inputs
from tests import emulation, layouts
from tests.emulation import CLUSTERED

FAMILY = family("cluster_stationary")
GPU = target("sm_90")
CPU = torch.device("cpu")
FLOAT32, FLOAT16, BFLOAT16 = TableDtype.FLOAT32, TableDtype.FLOAT16, TableDtype.BFLOAT16
FORWARD, GRAD_INPUT = Operation.FORWARD, Operation.GRAD_INPUT
#: operation, inputs, outputs, batch, and what differs of the parameters
EDGES: list[tuple[Operation, int, int, int, dict[str, Constant]]] = [
    (FORWARD, 16, 8, 256, {}),  # everything whole
    (FORWARD, 41, 19, 300, {}),  # 6 tiles for 2 blocks; an odd input, parts of tiles, groups of samples
    (FORWARD, 38, 11, 70, {"cluster": 8, "ahead": 1}),  # 5 tiles for 8 blocks
    (FORWARD, 10, 5, 31, {"pairs": 8, "outs": 4, "cluster": 2, "ahead": 4}),  # one tile
    (FORWARD, 34, 33, 700, {"pairs": 2, "outs": 16, "samples": 2, "cluster": 4, "ahead": 1}),
    (FORWARD, 35, 6, 1100, {"pairs": 16, "outs": 4, "samples": 2, "cluster": 2, "ahead": 4}),
    (FORWARD, 41, 19, 300, {"splits": 2}),  # 6 tiles for 4 blocks, one and two each
    (FORWARD, 38, 11, 70, {"splits": 4}),  # 5 tiles for 8 blocks
    (GRAD_INPUT, 16, 32, 256, {}),
    (GRAD_INPUT, 19, 43, 300, {"splits": 2}),
    (GRAD_INPUT, 12, 37, 70, {"splits": 4, "ahead": 1}),
    (GRAD_INPUT, 19, 43, 300, {}),
    (GRAD_INPUT, 12, 37, 70, {"cluster": 8, "ahead": 1}),
    (GRAD_INPUT, 5, 7, 31, {"pairs": 8, "outs": 4, "cluster": 2, "ahead": 4}),
    (GRAD_INPUT, 10, 50, 700, {"pairs": 2, "outs": 16, "samples": 2, "cluster": 4, "ahead": 1}),
    (GRAD_INPUT, 35, 9, 1100, {"pairs": 16, "outs": 4, "samples": 2, "cluster": 2, "ahead": 4}),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulation")


def problem(
    operation: Operation, shape: LayerShape, table: TableDtype = FLOAT32, strided: bool = False
) -> Problem:
    return Problem(operation, shape, GPU, table, strided=strided)


@pytest.mark.parametrize(("operation", "inputs", "outputs", "batch", "change"), EDGES)
def test_edges(
    directory: Path, operation: Operation, inputs: int, outputs: int, batch: int, change: dict[str, Constant]
) -> None:
    asked = problem(operation, LayerShape(inputs, outputs, 5, batch))
    parameters = CLUSTERED | change
    run = emulation.prepare(FAMILY, asked, parameters, directory)
    layouts.check(asked, "batch_last", run, FAMILY.plan(asked, parameters), CPU)


@pytest.mark.parametrize("operation", [FORWARD, GRAD_INPUT])
def test_whole_pairs_that_lie_apart(directory: Path, operation: Operation) -> None:
    """Odd ones, and samples one after the other, are among what all families are tested on."""
    asked = problem(operation, LayerShape(16, 16, 5, 300), strided=True)
    run = emulation.prepare(FAMILY, asked, CLUSTERED, directory)
    layouts.check(asked, "batch_first_gaps", run, FAMILY.plan(asked, CLUSTERED), CPU)


@pytest.mark.parametrize("operation", [FORWARD, GRAD_INPUT])
@pytest.mark.parametrize("table", [FLOAT16, BFLOAT16])
@pytest.mark.parametrize("samples", [1, 2])
def test_half_tables(directory: Path, operation: Operation, table: TableDtype, samples: int) -> None:
    asked = problem(operation, LayerShape(26, 43, 5, 300), table)
    parameters = CLUSTERED | {"outs": 16, "cluster": 4, "samples": samples}
    run = emulation.prepare(FAMILY, asked, parameters, directory)
    layouts.check(asked, "batch_last", run, FAMILY.plan(asked, parameters), CPU)


def results(asked: Problem, parameters: Mapping[str, Constant], directory: Path, seed: int) -> Tensor:
    inputs = make_inputs(asked.operation, asked.shape, CPU, seed=1, table=asked.table)
    ((name, right),) = layouts.right(asked.operation, inputs).items()
    result = torch.full(right.shape, torch.nan)
    emulation.prepare(FAMILY, asked, parameters, directory, seed)({**inputs, name: result})
    return result


@pytest.mark.parametrize("operation", [FORWARD, GRAD_INPUT])
def test_the_order_of_blocks_does_not_matter(directory: Path, operation: Operation) -> None:
    asked = problem(operation, LayerShape(41, 43, 5, 600))
    parameters = CLUSTERED | {"cluster": 4}
    expected = results(asked, parameters, directory, seed=0)
    for seed in (1, 2, 3):
        assert torch.equal(results(asked, parameters, directory, seed), expected)


@pytest.mark.parametrize("operation", [FORWARD, GRAD_INPUT])
def test_it_may_start_early(directory: Path, operation: Operation) -> None:
    """Should something precede it that works on its results: those it leaves alone until it has waited."""
    asked = problem(operation, LayerShape(20, 19, 5, 75))
    inputs = make_inputs(operation, asked.shape, CPU, seed=1)
    ((name, right),) = layouts.right(operation, inputs).items()
    plan = FAMILY.plan(asked, CLUSTERED)
    after_another = replace(plan, steps=(Fill(name), *plan.steps))
    buffers = {**inputs, name: torch.empty_like(right)}
    emulation.check_early_starts(FAMILY.spec(asked, CLUSTERED), after_another, directory, buffers, inputs)


BLOCK_BARRIER = r"__syncthreads\(\);"
CLUSTER_BARRIER = r"arrive_(at_cluster|having_read)\(\);.*\n *wait_for_cluster\(\);"


@pytest.mark.parametrize("operation", [FORWARD, GRAD_INPUT])
@pytest.mark.parametrize(
    ("barrier", "number"),
    [(BLOCK_BARRIER, 0), (BLOCK_BARRIER, 1), (BLOCK_BARRIER, 2), (CLUSTER_BARRIER, 0), (CLUSTER_BARRIER, 1)],
)
def test_no_barrier_can_be_left_out(
    monkeypatch: pytest.MonkeyPatch,
    directory: Path,
    tmp_path: Path,
    operation: Operation,
    barrier: str,
    number: int,
) -> None:
    """Else the tests above would not show that threads and blocks wait for each other."""
    render = codegen.render

    def without(spec: KernelSpec) -> str:
        source = render(spec)
        found = list(re.finditer(barrier, source))[number]
        return source[: found.start()] + ";" + source[found.end() :]

    asked = problem(operation, LayerShape(41, 43, 5, 200))
    expected = results(asked, CLUSTERED, directory, seed=0)
    assert not expected.isnan().any()
    monkeypatch.setattr(codegen, "render", without)
    assert not torch.equal(results(asked, CLUSTERED, tmp_path, seed=0), expected)


def test_one_launch_writes_every_result_once() -> None:
    for operation in (FORWARD, GRAD_INPUT):
        usual = problem(operation, LayerShape(128, 128, 26, 1024))
        ordered = replace(usual, deterministic=True)
        default = FAMILY.default(usual)
        assert default is not None
        assert FAMILY.violations(ordered, default) == []
        assert FAMILY.spec(ordered, default) == FAMILY.spec(usual, default)
        plan = FAMILY.plan(usual, default)
        (launch,) = plan.steps
        assert isinstance(launch, Launch)
        assert launch.grid[0] % int(default["cluster"]) == 0
        assert plan.workspaces == ()


@pytest.mark.parametrize(
    ("table", "change", "limit", "said"),
    [
        (FLOAT32, {"pairs": 2}, "tile", "2 pairs x 8 words"),
        (FLOAT32, {"pairs": 16, "outs": 32}, "shared_memory", "16 pairs x 32 outputs"),
        (
            FLOAT32,
            {"outs": 32, "samples": 2, "threads": 1024},
            "shared_memory",
            "2 x 1024 samples need 262144 bytes",
        ),
        (FLOAT32, {"outs": 16, "samples": 2, "threads": 1024}, "registers", "1024 threads have 64 registers"),
        (FLOAT32, {"pairs": 2, "outs": 16, "ahead": 4}, "wasted", "ahead=4"),
        (FLOAT16, {"outs": 16, "ahead": 1}, "table", "ahead=1 is odd; take 2 or 4"),
    ],
)
def test_what_does_not_fit_is_said(
    table: TableDtype, change: dict[str, Constant], limit: str, said: str
) -> None:
    asked = problem(FORWARD, LayerShape(128, 128, 10, 1024), table)
    found = {v.limit: v.message for v in FAMILY.violations(asked, CLUSTERED | change)}
    assert said in found[limit]
    assert FAMILY.violations(asked, CLUSTERED | {"outs": 16}) == []


def test_clusters_that_add_to_zeros_are_not_for_a_fixed_order() -> None:
    asked = problem(FORWARD, LayerShape(128, 128, 10, 1024))
    parameters = CLUSTERED | {"outs": 16, "splits": 2}
    assert FAMILY.violations(asked, parameters) == []
    assert [type(step) for step in FAMILY.plan(asked, parameters).steps] == [Fill, Launch]
    (violation,) = FAMILY.violations(replace(asked, deterministic=True), parameters)
    assert violation.limit == "deterministic"
    assert "splits=1" in violation.message


def test_older_gpus_have_no_clusters() -> None:
    old = Problem(FORWARD, LayerShape(128, 128, 10, 1024), target("sm_89"))
    (violation,) = FAMILY.violations(old, CLUSTERED)
    assert violation.limit == "architecture"
    assert "sm_90" in violation.message
    assert FAMILY.default(old) is None


@pytest.mark.parametrize(
    ("shape", "change"),
    [
        (LayerShape(128, 3, 10, 1024), {}),
        (LayerShape(4, 128, 10, 1024), {}),
        (LayerShape(20, 128, 10, 1024), {"cluster": 8}),
        (LayerShape(128, 128, 10, 256), {"samples": 2}),
        (LayerShape(128, 128, 10, 256), {"threads": 512}),
    ],
)
def test_padding_is_wasted(shape: LayerShape, change: dict[str, Constant]) -> None:
    assert FAMILY.wasted(problem(FORWARD, shape), CLUSTERED | change)
    for batch in (1, 256, 1024):
        assert not FAMILY.wasted(problem(FORWARD, LayerShape(128, 128, 10, batch)), CLUSTERED)


def test_int8_tables_are_for_others() -> None:
    assert not FAMILY.computes(FORWARD, TableDtype.INT8)


@pytest.mark.parametrize("operation", [FORWARD, GRAD_INPUT])
@pytest.mark.parametrize("table", [FLOAT32, FLOAT16, BFLOAT16])
def test_nothing_of_it_is_taken_untuned(operation: Operation, table: TableDtype) -> None:
    for batch in (1, 1024, 65536):
        choice = default_choice(problem(operation, LayerShape(128, 128, 26, batch), table))
        assert choice is not None
        assert choice.family != FAMILY.name


def test_defaults_fill_a_gpu_with_few_samples() -> None:
    """What it is for: large tiles, and blocks for about all multiprocessors at a time."""
    for operation in (FORWARD, GRAD_INPUT):
        asked = problem(operation, LayerShape(128, 128, 26, 1024))
        default = FAMILY.default(asked)
        assert default is not None
        assert int(default["pairs"]) * int(default["outs"]) == 64
        assert not FAMILY.wasted(asked, default)
    assert FAMILY.default(problem(FORWARD, LayerShape(128, 128, 200, 1024))) is None


def test_packed_tables_are_read_as_they_are() -> None:
    plan = FAMILY.plan(problem(FORWARD, LayerShape(64, 64, 8, 300), FLOAT16), CLUSTERED | {"outs": 16})
    assert plan.buffers == {"x", "borders", "words", "y"}
    assert packing.pack(torch.zeros(9, 9, 64, 32), FLOAT16).buffers().keys() == {"words"}
