"""The output-stationary family: every piece of work is done once, and tables are laid out as they stream."""

from __future__ import annotations

import ctypes
import math
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkan_gen import device as devices
from lmkan_gen import packing
from lmkan_gen.codegen import render
from lmkan_gen.device import target
from lmkan_gen.families import family
from lmkan_gen.plan import Constant, Launch, TensorMap
from lmkan_gen.problem import LayerShape, Operation, Problem, TableDtype
from lmkan_gen.selection import select
from lmkan_gen.tuner.verify import make_case

FAMILY = family("output_stationary")
GPU = target("sm_90")
(H200,) = (model for model in devices.models("sm_90") if model.name == "NVIDIA H200")
PARAMETERS: dict[str, Constant] = {
    "pairs": 4, "outs": 16, "samples": 3, "threads": 384, "stages": 2, "blocks": 1, "ahead": 2, "vector": 1,
    "together": 4, "copies": "bulk", "coordinates": "prepass",
}  # fmt: skip

Items = Callable[[int, int, int, int], list[tuple[int, int, int]]]

HARNESS = """
#include <algorithm>
using std::max; using std::min;
#define __device__
#define __forceinline__ inline
typedef long long index_t;
struct { unsigned x; } blockIdx, gridDim;
constexpr int kSamples = %d, kWarps = %d;
%s
extern "C" int items_of_block(index_t units, int tiles, int together, int blocks, int block, long long* out) {
    gridDim.x = blocks;
    blockIdx.x = block;
    Schedule schedule;
    schedule.divide(units, tiles, together);
    for (int k = 0; k < schedule.mine; ++k) {
        const Item item = schedule(k);
        out[3 * k] = item.tile;
        out[3 * k + 1] = item.unit;
        out[3 * k + 2] = item.columns;
    }
    return schedule.mine;
}
"""


def problem(operation: Operation, shape: LayerShape, table: TableDtype = TableDtype.FLOAT32) -> Problem:
    return Problem(operation, shape, GPU, table)


@pytest.fixture(scope="module")
def items_of_all_blocks(tmp_path_factory: pytest.TempPathFactory) -> Items:
    """What the rendered source's ``Schedule`` gives to each block, run on the CPU."""
    source = render(FAMILY.spec(problem(Operation.FORWARD, LayerShape(64, 64, 8, 4096)), PARAMETERS))
    schedule = source[source.index("struct Item {") : source.index("// What a block's warps share")]
    directory = tmp_path_factory.mktemp("schedule")
    code, library = directory / "schedule.cpp", directory / "schedule.so"
    code.write_text(HARNESS % (PARAMETERS["samples"], int(PARAMETERS["threads"]) // 32, schedule))
    subprocess.run(["g++", "-std=c++17", "-O1", "-shared", "-fPIC", code, "-o", library], check=True)
    function = ctypes.CDLL(str(library)).items_of_block
    function.argtypes = [ctypes.c_longlong, *(ctypes.c_int,) * 4, ctypes.POINTER(ctypes.c_longlong)]

    def items(units: int, tiles: int, together: int, blocks: int) -> list[tuple[int, int, int]]:
        found: list[tuple[int, int, int]] = []
        room = (ctypes.c_longlong * (3 * (units * tiles + 2)))()
        for block in range(blocks):
            count = function(units, tiles, together, blocks, block, room)
            found += [(room[3 * k], room[3 * k + 1], room[3 * k + 2]) for k in range(count)]
        return found

    return items


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 40), st.integers(1, 140))
def test_every_column_of_every_tile_is_done_once(
    items_of_all_blocks: Items, units: int, tiles: int, together: int, blocks: int
) -> None:
    """Whatever is left over when items are dealt out, and however few tiles the last round has."""
    samples, warps = int(PARAMETERS["samples"]), int(PARAMETERS["threads"]) // 32
    done: dict[tuple[int, int], int] = {}
    for tile, unit, columns in items_of_all_blocks(units, tiles, min(together, tiles), blocks):
        assert 0 <= tile < tiles
        assert unit % warps == 0
        assert 1 <= columns <= samples
        for column in range(unit // warps, unit // warps + columns):
            done[tile, column] = done.get((tile, column), 0) + 1
    groups = math.ceil(units / (samples * warps))
    assert done == {(tile, column): 1 for tile in range(tiles) for column in range(groups * samples)}


@pytest.mark.parametrize("pairs", [2, 4])
@pytest.mark.parametrize("vector", [1, 4])
@pytest.mark.parametrize("table", [TableDtype.FLOAT32, TableDtype.FLOAT16, TableDtype.INT8])
def test_stages_hold_tiles_with_zeros_beyond_the_edges(table: TableDtype, vector: int, pairs: int) -> None:
    grids, outputs, inputs, width = 6, 13, 18, 8
    floats = torch.randn(grids + 1, grids + 1, outputs, inputs // 2)
    packed = None if table is TableDtype.FLOAT32 else packing.pack(floats, table)
    words = floats if packed is None else packed.words
    stages = packing.stages(words, packed.scales if packed else None, pairs, width, vector)
    flat = words.flatten(0, 1).view(torch.int32)
    out_tiles, pair_tiles = math.ceil(flat.shape[1] / width), math.ceil(inputs / 2 / pairs)
    scales = 32 if table is TableDtype.INT8 else 0
    size = flat.shape[0] * width * pairs
    assert stages.shape == (out_tiles, pair_tiles, math.ceil(size / 32) * 32 + scales)
    for o in range(out_tiles):
        for p in range(pair_tiles):
            tile = stages[o, p, :size].view(flat.shape[0], width // vector, pairs, vector)
            tile = tile.transpose(2, 3).flatten(1, 2)
            part = flat[:, o * width : (o + 1) * width, p * pairs : (p + 1) * pairs]
            assert torch.equal(tile[:, : part.shape[1], : part.shape[2]], part)
            assert not tile[:, part.shape[1] :].any()
            assert not tile[:, :, part.shape[2] :].any()
            if packed is not None and packed.scales is not None:
                group = p * pairs // packing.SCALE_PAIRS
                expected = packed.scales[group, o * width : (o + 1) * width] / packing.WEIGHT_ONE
                of_tile = stages[o, p, -scales:].view(torch.float32)
                assert torch.equal(of_tile[: len(expected)], expected)
                assert not of_tile[len(expected) :].any()


@pytest.mark.parametrize("constant", [False, True])
def test_only_tables_that_change_are_arranged_by_the_plan(constant: bool) -> None:
    asked = Problem(
        Operation.FORWARD, LayerShape(512, 512, 18, 65536), GPU, TableDtype.FLOAT16, constant=constant
    )
    plan = FAMILY.plan(asked, PARAMETERS)
    kernels = [step.kernel for step in plan.steps if isinstance(step, Launch)]
    assert ("lmkan_arrange_table" in kernels) is not constant
    assert (packing.Stages(4, 8, 1) in plan.buffers) is constant


def test_results_need_no_zeros_and_no_order_but_their_own() -> None:
    """Every result is written by one lane: the same parameters serve deterministic algorithms."""
    for operation in (Operation.FORWARD, Operation.GRAD_INPUT):
        shape = LayerShape(512, 512, 18, 65536)
        usual = Problem(operation, shape, GPU)
        ordered = Problem(operation, shape, GPU, deterministic=True)
        default = FAMILY.default(usual)
        assert default is not None
        assert FAMILY.violations(ordered, default) == []
        assert FAMILY.spec(ordered, default) == FAMILY.spec(usual, default)
        assert all(isinstance(step, Launch) for step in FAMILY.plan(usual, default).steps)


@pytest.mark.parametrize(
    ("change", "limit"),
    [
        ({"pairs": 1, "outs": 8, "ahead": 1}, "tile"),
        ({"pairs": 16, "outs": 32}, "shared_memory"),
        ({"ahead": 8}, "wasted"),
        ({"samples": 8, "threads": 512}, "registers"),
        ({"coordinates": "inline"}, "wasted"),
    ],
)
def test_what_does_not_fit_is_said(change: dict[str, Constant], limit: str) -> None:
    found = FAMILY.violations(
        problem(Operation.FORWARD, LayerShape(512, 512, 18, 65536)), PARAMETERS | change
    )
    assert limit in {v.limit for v in found}


BOXES = PARAMETERS | {"copies": "tensor"}


@pytest.mark.parametrize(
    ("inputs", "table", "change", "limit"),
    [
        (512, TableDtype.INT8, {}, "table"),
        (512, TableDtype.FLOAT32, {"vector": 2}, "tile"),
        (512, TableDtype.FLOAT32, {"pairs": 2, "outs": 16}, "tile"),
        (510, TableDtype.FLOAT32, {}, "table"),
    ],
)
def test_what_cannot_be_copied_as_it_lies_is_said(
    inputs: int, table: TableDtype, change: dict[str, Constant], limit: str
) -> None:
    asked = problem(Operation.FORWARD, LayerShape(inputs, 512, 18, 65536), table)
    assert limit in {v.limit for v in FAMILY.violations(asked, BOXES | change)}
    bulk = {v.message for v in FAMILY.violations(asked, BOXES | change | {"copies": "bulk"})}
    assert not any("tensor copies" in message for message in bulk)
    assert FAMILY.violations(problem(Operation.FORWARD, LayerShape(512, 512, 18, 65536)), BOXES) == []


@pytest.mark.parametrize("operation", [Operation.FORWARD, Operation.GRAD_INPUT])
@pytest.mark.parametrize(("table", "words"), [(TableDtype.FLOAT32, 43), (TableDtype.FLOAT16, 22)])
def test_tables_that_are_copied_as_they_lie_are_not_arranged(
    operation: Operation, table: TableDtype, words: int
) -> None:
    """A box is a stage: all knots of a tile; and what is copied is the table itself, or its words."""
    asked = problem(operation, LayerShape(24, 43, 9, 65536), table)
    plan = FAMILY.plan(asked, BOXES)
    pack = 1 if table is TableDtype.FLOAT32 else 2
    buffer = "table" if table is TableDtype.FLOAT32 else "words"
    assert plan.tensor_maps == {TensorMap(buffer, (12, words, 10, 10), (4, 16 // pack, 10, 10))}
    assert buffer in plan.buffers
    before = ["lmkan_coordinates"] if operation is Operation.FORWARD else []
    assert [step.kernel for step in plan.steps if isinstance(step, Launch)] == [
        *before,
        f"lmkan_{operation}",
    ]
    inline = FAMILY.plan(asked, BOXES | {"ahead": 4, "coordinates": "inline"})
    assert inline.workspaces == ()
    assert len(inline.steps) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("operation", [Operation.FORWARD, Operation.GRAD_INPUT])
@pytest.mark.parametrize("table", [TableDtype.FLOAT32, TableDtype.FLOAT16, TableDtype.BFLOAT16])
@pytest.mark.parametrize("offset", [0, 1])
def test_tables_copied_as_they_lie_on_a_gpu(operation: Operation, table: TableDtype, offset: int) -> None:
    """Edges of all kinds, and tables that do not lie where such copies could start."""
    device = torch.device("cuda")
    asked = Problem(operation, LayerShape(24, 43, 9, 1000), devices.of(device), table)
    parameters = {name: BOXES[name] for name in FAMILY.space(operation)}
    parameters["samples"] = 1
    assert FAMILY.violations(asked, parameters) == []
    plan = FAMILY.plan(asked, parameters)
    run = import_module("lmkan_gen.launch.cuda").prepare(FAMILY.spec(asked, parameters), plan, device)

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        larger = tensor.new_empty(tensor.numel() + offset)[offset:].view(tensor.shape)
        return larger.copy_(tensor)

    def run_moved(buffers: Mapping[str, torch.Tensor]) -> None:
        run({name: moved(t) if name in ("table", "words") else t for name, t in buffers.items()})

    case = make_case(operation, asked.shape, device, spread=2.0, most=256, table=table)
    case.check(run_moved, f"{operation} {table}")


@pytest.mark.parametrize("operation", [Operation.FORWARD, Operation.GRAD_INPUT])
def test_few_samples_do_not_get_what_keeps_sums_of_many(operation: Operation) -> None:
    """On the GPU that the package is tuned for, between shapes that were measured."""
    families_of = {
        batch: select(Problem(operation, LayerShape(512, 512, 18, batch), H200)).family
        for batch in (64, 256, 16384)
    }
    assert families_of == {64: "tile_stationary", 256: "tile_stationary", 16384: "output_stationary"}


def test_tables_that_were_arranged_before_pay_for_fewer_samples() -> None:
    """Int8 stages have to be arranged, but not by each call."""
    asked = Problem(Operation.FORWARD, LayerShape(1024, 1024, 12, 1024), H200, TableDtype.INT8, constant=True)
    assert select(asked).family == "output_stationary"
    assert FAMILY.preference(replace(asked, constant=False)) < 0 < FAMILY.preference(asked)


def test_older_gpus_have_no_bulk_copies() -> None:
    old = Problem(Operation.FORWARD, LayerShape(512, 512, 10, 65536), target("sm_80"))
    assert {v.limit for v in FAMILY.violations(old, PARAMETERS)} >= {"architecture"}
    assert FAMILY.default(old) is None
