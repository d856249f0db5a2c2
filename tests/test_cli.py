"""The command line: what it prints, exit codes, and that it needs no GPU or compiler to say it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

import lmkan_gen
from lmkan_gen import selection, toolchain
from lmkan_gen.codegen import render
from lmkan_gen.device import CUDA_ARCHITECTURES, cpu, target
from lmkan_gen.families import Demand, Family, Parameters, families, family
from lmkan_gen.limits import UNLIMITED, Limit, limits
from lmkan_gen.problem import LayerShape, Operation, Problem, TableDtype
from lmkan_gen.toolchain import host, nvcc, store
from tests.command import Command as Run

SHAPE = "64,48,8,1000"
VERBS = [
    ["tune"],
    ["report"],
    ["build"],
    ["inspect"],
    ["limits"],
    ["doctor"],
    ["configs", "list"],
    ["configs", "show"],
    ["configs", "validate"],
    ["cache", "path"],
    ["cache", "list"],
    ["cache", "clear"],
    ["cache", "verify"],
    ["cache", "load"],
]


@pytest.fixture
def run(run_cli: Run) -> Run:
    """Runs ``lmkan-gen`` with the given arguments."""
    return run_cli


@pytest.fixture
def no_compilers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever asks for a compiler fails the test, or is told that there is none."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)


def problem(operation: Operation, name: str) -> Problem:
    return Problem(operation, LayerShape(64, 48, 8, 1000), target(name))


# --- help, usage, errors --------------------------------------------------------------------------


@pytest.mark.parametrize("verb", [[], *VERBS], ids=" ".join)
def test_help_has_a_purpose_and_examples(run: Run, verb: list[str]) -> None:
    outcome = run(*verb, "--help")
    assert outcome.code == 0
    assert "Example" in outcome.out
    assert " ".join(["lmkan-gen", *verb]) in outcome.out
    assert outcome.err == ""


def test_help_and_import_stay_light(tmp_path: Path) -> None:
    script = (
        "import sys, lmkan_gen\n"
        "def loaded(): return {m.split('.')[0] for m in sys.modules}\n"
        "assert not loaded() & {'optuna', 'typer', 'rich', 'ninja'}, loaded()\n"
        "from lmkan_gen.cli import main\n"
        "sys.argv = ['lmkan-gen', 'tune', '--help']\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not loaded() & {'optuna', 'ninja'}, loaded()\n"
        "import torch; assert not torch.cuda.is_initialized()\n"
    )
    environment = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["inspect"], "--target"),
        (["inspect", "--target", "sm_90"], "--shape"),
        (["inspect", "--target", "sm_70", "--shape", SHAPE], "sm_70"),
        (["inspect", "--target", "sm_90", "--shape", "64,48,8"], "64,48,8"),
        (["inspect", "--target", "sm_90", "--shape", "0,48,8,1000"], "inputs must be at least 1"),
        (["inspect", "--target", "sm_90", "--shape", "64,48,2,1000"], "grids must be at least 3"),
        (["inspect", "--target", "sm_90", "--shape", "64,x,8,1000"], "64,x,8,1000"),
        (["inspect", "--target", "sm_90", "--shape", SHAPE, "--operation", "sideways"], "sideways"),
        (["inspect", "--target", "cpu", "--shape", SHAPE, "--what", "ptx"], "ptx"),
        (["limits"], "--target"),
        (["limits", "--target", "sm_86", "--device", "cuda"], "--device"),
        (["limits", "--target", "cpu"], "no limit"),
        (["limits", "--device", "tpu"], "tpu"),
        (["limits", "--device", "cuda:"], "cuda:"),
        (
            ["build", "--arch", "sm_91", "--shape", SHAPE],
            "--arch: unknown target 'sm_91'; choose cpu or one of",
        ),
        (["build", "--arch", "cpu,", "--shape", SHAPE], "--arch: unknown target ''"),
        (["build", "--arch", "cpu"], "--shape / --shapes"),
        (["build", "--arch", "cpu", "--shapes", "absent.txt"], "absent.txt"),
        (["plot", "absent.pt"], "absent.pt"),
        (["report", "absent.json"], "absent.json"),
        (["inspect", "--target", "sm_90", "--shape", SHAPE, "--why"], "goes with --what choice"),
        (
            ["inspect", "--target", "sm_90", "--shape", SHAPE, "--json"],
            "goes with --what choice or resources",
        ),
        (["fly"], "fly"),
        (["cache", "fly"], "fly"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_named_and_exits_with_2(run: Run, arguments: list[str], named: str) -> None:
    outcome = run(*arguments)
    assert outcome.code == 2
    assert named in outcome.out + outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"8,8,4,5\n# widths\n\n8,8,x,5\n", "line 4: '8,8,x,5' is not IN,OUT,GRIDS,BATCH"),
        (b"8,8,4,5\n8,8,2,5\n", "line 2: '8,8,2,5': grids must be at least 3"),
        (b"# nothing\n", "holds no shapes"),
        (b"\xff\xfe8", "is no text file"),
    ],
)
def test_a_file_of_shapes_is_named_with_its_line(
    run: Run, tmp_path: Path, content: bytes, words: str
) -> None:
    file = tmp_path / "shapes.txt"
    file.write_bytes(content)
    outcome = run("build", "--arch", "cpu", "--shapes", str(file))
    assert outcome.code == 2
    assert f"Invalid value for --shapes: {file}" in outcome.err
    assert words in outcome.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["tune", "--shape", SHAPE, "--device", "cpu", "--output"],
        ["build", "--arch", "cpu", "--shape", SHAPE, "--bundle"],
        ["report", "--output"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_outputs_are_checked_before_work_begins(
    run: Run, tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("work began")

    monkeypatch.setattr(toolchain, "build", work)
    (tmp_path / "file").write_text("kept")
    for path, words in (
        (tmp_path / "file" / "below.zip", "is not a directory"),
        (Path("/proc/nowhere/out.zip"), "cannot be written"),
        (tmp_path, "is a directory"),
    ):
        outcome = run(*arguments, str(path))
        assert outcome.code == 2
        assert f"Invalid value for {arguments[-1].strip()}" in outcome.err.replace("'", "")
        assert str(path) in outcome.err
        assert words in outcome.err
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_messages_are_not_broken_into_lines(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    path = tmp_path / ("long" * 20) / ("name" * 20)
    outcome = run("build", "--arch", "cpu", "--shapes", str(path))
    assert outcome.code == 2
    assert str(path) in outcome.err


def test_files_that_hold_something_else(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text("hello\n")
    torch.save([1, 2], tmp_path / "list.pt")
    for arguments, words in (
        (
            ["plot", str(file), "--output", str(tmp_path / "plots")],
            f"{file} is no checkpoint that torch can load",
        ),
        (
            ["plot", str(tmp_path / "list.pt"), "--output", str(tmp_path / "plots")],
            "holds no state_dict but a list",
        ),
        (["report", str(file)], f"{file} is no record of a tuning run: Invalid JSON"),
        (["cache", "load", str(file)], f"{file} is no bundle"),
        (["configs", "show", str(file)], str(file)),
    ):
        outcome = run(*arguments)
        assert outcome.code == 1
        (line,) = outcome.err.splitlines()
        assert words in line
    assert not (tmp_path / "plots").exists()


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"lmkan-gen {lmkan_gen.__version__}\n", "")


def test_an_interrupt_while_importing_is_no_traceback() -> None:
    script = (
        "import sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'typer': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "from _lmkan_gen_command import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "lmkan-gen: interrupted before it began\n")


def test_failures_are_one_line_and_exit_with_1(run: Run) -> None:
    device = f"cuda:{torch.cuda.device_count()}"
    outcome = run("limits", "--device", device)
    assert outcome.code == 1
    assert outcome.out == ""
    (line,) = outcome.err.splitlines()
    assert device in line


# --- inspect --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_compilers")
@pytest.mark.parametrize("name", ["cpu", *CUDA_ARCHITECTURES])
@pytest.mark.parametrize("operation", list(Operation))
def test_inspect_source_shows_every_kernel_of_the_choice(run: Run, name: str, operation: Operation) -> None:
    p = problem(operation, name)
    backward = operation is Operation.BACKWARD
    choices = selection.select_backward(p) if backward else (selection.select(p),)
    outcome = run("inspect", "--target", name, "--shape", SHAPE, "--operation", operation)
    assert outcome.code == 0, outcome.err
    for choice in choices:
        assert choice.family is not None
        assert choice.describe() in outcome.out
        assert render(family(choice.family).spec(choice.problem, choice.parameters)) in outcome.out
    assert outcome.out.count('extern "C"') >= len(choices)


@pytest.mark.usefixtures("no_compilers")
def test_inspect_choice(run: Run) -> None:
    arguments = ("--target", "sm_90", "--shape", SHAPE, "--operation", "backward", "--what", "choice")
    outcome = run("inspect", *arguments)
    expected = [c.describe() for c in selection.select_backward(problem(Operation.BACKWARD, "sm_90"))]
    assert outcome == (0, "\n".join(expected) + "\n", "")


@pytest.mark.usefixtures("no_compilers")
def test_inspect_shows_what_a_frozen_table_gets(run: Run) -> None:
    """Narrow tables stay from call to call, which some kernels for them depend on."""
    shape = LayerShape(4096, 4096, 4, 64)
    arguments = ("--target", "sm_90", "--shape", str(shape), "--table", "int8", "--what", "choice")
    frozen = Problem(Operation.FORWARD, shape, target("sm_90"), TableDtype.INT8, constant=True)
    assert run("inspect", *arguments) == (0, selection.select(frozen).describe() + "\n", "")


def test_inspect_compiled_views(run: Run) -> None:
    base = ("inspect", "--target", "sm_90", "--shape", SHAPE, "--what")
    resources = run(*base, "resources")
    assert resources.code == 0, resources.err
    _, *kernels = resources.out.splitlines()
    assert any(line.startswith("lmkan_forward: ") for line in kernels)
    assert all("registers per thread, spills 0 bytes stored 0 loaded" in line for line in kernels)
    ptx = run(*base, "ptx")
    assert ".target sm_90" in ptx.out
    assert ".entry lmkan_forward" in ptx.out
    assert "lmkan_forward" in run(*base, "sass").out


@pytest.mark.usefixtures("no_compilers")
def test_inspect_without_nvcc_says_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvcc, "installed", lambda: ())
    outcome = run("inspect", "--target", "sm_90", "--shape", SHAPE, "--what", "ptx")
    assert outcome.code == 1
    assert "lmkan-gen[nvcc]" in outcome.err
    assert "Traceback" not in outcome.err


def test_inspect_choice_as_data(run: Run) -> None:
    arguments = ("--target", "sm_90", "--shape", SHAPE, "--operation", "backward", "--what", "choice")
    found = json.loads(run("inspect", *arguments, "--json").out)
    expected = selection.select_backward(problem(Operation.BACKWARD, "sm_90"))
    assert [f["family"] for f in found] == [c.family for c in expected]
    assert [f["parameters"] for f in found] == [dict(c.parameters) for c in expected]
    assert all("why" not in f for f in found)


def test_inspect_resources_as_data(run: Run) -> None:
    arguments = ("--target", "sm_90", "--shape", SHAPE, "--what", "resources", "--json")
    (found,) = json.loads(run("inspect", *arguments).out)
    assert found["operation"] == "forward"
    (kernel,) = [k for k in found["kernels"] if k["kernel"] == "lmkan_forward"]
    assert kernel["registers"] > 0
    assert kernel["threads"] % 32 == 0
    assert kernel["spill_stores"] == kernel["spill_loads"] == 0


def test_inspect_why_lists_what_else_there_was(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("lmkan_gen.tuner.record.directory", lambda: tmp_path)
    shape = "128,128,26,1024"
    arguments = ("inspect", "--target", "sm_90", "--shape", shape, "--what", "choice", "--why")
    (found,) = json.loads(run(*arguments, "--json").out)
    p = Problem(Operation.FORWARD, LayerShape(128, 128, 26, 1024), target("sm_90"))
    chosen = selection.select(p)
    why = found["why"]
    # every family is the chosen one, a runner-up that can run, or one that cannot
    runners_up, excluded = why["runners_up"], why["could_not_run"]
    names = [chosen.family, *(r["family"] for r in runners_up), *(e["family"] for e in excluded)]
    assert sorted(names) == sorted(f.name for f in families("cuda", Operation.FORWARD))
    for r in runners_up:
        assert not family(r["family"]).violations(p, r["parameters"])
        assert (r["time_us"] is None) == (r["origin"] == "analytic default")
    for e in excluded:
        f = family(e["family"])
        guess = f.default(p)
        assert guess is None or f.violations(p, guess)
    assert "num_grids=26: a cell has 4 bits per axis" in next(
        e["reason"] for e in excluded if e["family"] == "matrix_product"
    )
    assert why["measured_here"] is None

    words = run(*arguments).out
    assert words.startswith(f"{chosen.describe()}\n  runners-up")
    assert all(f"    {name}" in words for name in names[1:])


def test_inspect_why_knows_what_was_measured_here(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("lmkan_gen.tuner.record.directory", lambda: tmp_path)
    chip = cpu()
    shape = {"inputs": 8, "outputs": 6, "grids": 4, "batch": 50}
    trial = {"family": "row_vector", "parameters": {"batch_tile": 64}}
    record = {
        "started": "2026-11-30T10:00:00Z",
        "device": {"name": chip.name, "arch": chip.arch, "multiprocessors": 2, "shared_memory_per_block": 0},
        "provenance": {"lmkan_gen": "0", "compiler": "c", "driver": None, "torch": "2", "date": "2026-11-30"},
        "peaks": None,
        "problems": [
            {
                "entry": {
                    "operation": "forward",
                    "shape": shape,
                    "dtypes": {"table": "float32"},
                    "time_us": {"median": 7.0, "iqr": 0.1, "default": None, "reference": None},
                    "search": {"tried": 3, "rejected": {}},
                    **trial,
                },
                "default": None,
                "feasible": 3,
                "pruned": {"wasted": 48},
                "trials": [
                    {**trial, "median": 9.0, "iqr": 0.1},
                    {"family": "pair_vector", "parameters": {}, "median": 8.0, "iqr": 0.1},
                    {**trial, "rejected": "verify", "message": "y differs\nmore"},
                ],
                "ranking": [{**trial, "median": 7.0, "iqr": 0.1}],
                "seconds": 1.0,
            }
        ],
    }
    (tmp_path / "20261130.json").write_text(json.dumps(record))
    (tmp_path / "20261201.json").write_text("broken")
    words = run("inspect", "--target", "cpu", "--shape", "8,6,4,50", "--what", "choice", "--why").out
    lines = [line.strip() for line in words.splitlines()]
    start = lines.index(f"measured on this machine, 2026-11-30, {tmp_path}/20261130.json:")
    assert lines[start + 1 : start + 5] == [
        "7.0 us row_vector(batch_tile=64)",
        "8.0 us pair_vector()",
        "1 failed: verify, such as y differs",
        "never tried, for the limit that they break: wasted 48",
    ]


# --- limits ---------------------------------------------------------------------------------------

#: the published figures for tile 8, by shared memory per block
PUBLISHED = {
    "sm_86": {"forward": 26, "normal": 18, "fast": 11},
    "sm_90": {"forward": 40, "normal": 28, "fast": 17},
}


known_limits = cache(limits)


def test_limits_are_found_with_few_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family has millions of points; at every grid they would take hours."""
    chosen, device, asked = family("output_stationary"), target("sm_90"), 0
    check = type(chosen).first_limit

    def counting(self: Family, problem: Problem, parameters: Parameters) -> str | None:
        nonlocal asked
        asked += 1
        return check(self, problem, parameters)

    monkeypatch.setattr(type(chosen), "first_limit", counting)
    found = [r for r in limits(device) if r.family == chosen.name and r.operation is Operation.FORWARD]
    # tables that are copied as they lie need whole rows of banks, arranged ones make do with half of them
    by_variant = {limit.variant: limit.num_grids or 0 for limit in found}
    assert by_variant.keys() == {"copies=bulk", "copies=tensor"}
    assert by_variant["copies=bulk"] > by_variant["copies=tensor"] > 0
    assert 0 < asked < 20_000


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_limits_are_reproduced(run: Run, name: str) -> None:
    published = PUBLISHED[name]
    found = {
        (limit.operation, limit.variant): limit.num_grids
        for limit in known_limits(target(name))
        if limit.family == "tile_stationary" and limit.tile == 8
    }
    assert found[Operation.FORWARD, "coordinates=inline"] == published["forward"]
    assert found[Operation.BACKWARD, "mode=normal"] == published["normal"]
    assert found[Operation.BACKWARD, "mode=fast"] == published["fast"]

    outcome = run("limits", "--target", name)
    assert outcome.code == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in outcome.out.splitlines()]
    assert ["forward", "tile_stationary", "8", "coordinates=inline", str(published["forward"])] in rows
    assert ["backward", "tile_stationary", "8", "mode=normal", str(published["normal"])] in rows
    assert ["grad_table", "cell_sorted", "-", "-", "no limit"] in rows


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("tile", [4, 8, 16])
def test_half_tables_leave_room_for_finer_grids(name: str, tile: int) -> None:
    def largest(table: TableDtype) -> int:
        rows = known_limits(target(name), table)
        return max(r.num_grids or 0 for r in rows if r.operation is Operation.FORWARD and r.tile == tile)

    knots = {table: (largest(table) + 1) ** 2 for table in TableDtype if table is not TableDtype.INT8}
    # twice the knots, to within a row of them
    full = knots[TableDtype.FLOAT32]
    assert knots[TableDtype.FLOAT16] == knots[TableDtype.BFLOAT16]
    assert 2 * full - 4 * full**0.5 <= knots[TableDtype.FLOAT16] <= 2 * full + 4 * full**0.5


@pytest.mark.parametrize("name", CUDA_ARCHITECTURES)
def test_a_layer_accepts_the_limit_and_refuses_one_more(name: str) -> None:
    device = target(name)
    for operation in (Operation.FORWARD, Operation.BACKWARD):
        for tile in (4, 8, 16):
            rows = [r for r in known_limits(device) if r.operation is operation and r.tile == tile]
            largest = max(r.num_grids or 0 for r in rows)
            demand = Demand(tile_size=tile)

            def select(grids: int, operation: Operation = operation, demand: Demand = demand) -> None:
                shape = LayerShape(512, 512, grids, 4096)
                selection.select(Problem(operation, shape, device), demand)

            assert 3 <= largest < UNLIMITED
            select(largest)
            with pytest.raises(ValueError, match=f"num_grids={largest + 1}|{tile}"):
                select(largest + 1)


def test_limits_as_data_and_as_records(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        Limit(Operation.FORWARD, "some_family_with_a_long_name", 8, "mode=fast", 26),
        Limit(Operation.FORWARD, "another", None, "", UNLIMITED),
        Limit(Operation.FORWARD, "third", 16, "", None),
    ]
    monkeypatch.setattr("lmkan_gen.limits.limits", lambda *_: found)
    data = json.loads(run("limits", "--target", "sm_86", "--json").out)
    assert data["device"]["arch"] == "sm_86"
    assert [(d["tile"], d["num_grids"], d["unlimited"]) for d in data["limits"]] == [
        (8, 26, False),
        (None, None, True),
        (16, None, False),
    ]
    monkeypatch.setenv("COLUMNS", "60")
    title, *lines = run("limits", "--target", "sm_86").out.splitlines()
    assert "sm_86" in title
    assert lines[:5] == [
        "operation: forward",
        "family: some_family_with_a_long_name",
        "tile: 8",
        "variant: mode=fast",
        "max num_grids: 26",
    ]


@pytest.mark.gpu
def test_limits_of_the_gpu_here(run: Run) -> None:
    outcome = run("limits", "--device", "cuda")
    assert outcome.code == 0
    assert torch.cuda.get_device_name(0) in outcome.out
    assert run("limits", "--device", "cuda:0").out == outcome.out


# --- cache ----------------------------------------------------------------------------------------


def test_cache(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(store.OVERRIDE, str(tmp_path / "store"))
    assert run("cache", "path").out == f"{tmp_path / 'store'}\n"
    assert "no compiled kernels" in run("cache", "list").out
    choice = selection.select(problem(Operation.FORWARD, "cpu"))
    assert choice.family is not None
    binary = toolchain.binary(family(choice.family).spec(choice.problem, choice.parameters))
    listed = run("cache", "list")
    assert listed.code == 0
    (kernel,) = json.loads(run("cache", "list", "--json").out)["kernels"]
    assert (kernel["key"], kernel["directory"]) == (binary.key, str(binary.path.parent))
    assert json.loads(run("cache", "verify", "--json").out)["checked"] == 1
    assert binary.key[:8] in listed.out
    assert "operation=forward" in listed.out
    assert run("cache", "clear").out.startswith("removed 1 ")
    assert not binary.path.exists()
    assert "no compiled kernels" in run("cache", "list").out


# --- doctor ---------------------------------------------------------------------------------------


def findings(run: Run) -> dict[str, dict[str, str]]:
    outcome = run("doctor", "--json")
    assert outcome.code == 0, outcome.err
    return {f.pop("topic"): f for f in json.loads(outcome.out)}


def test_doctor_runs_a_layer_and_says_why(run: Run) -> None:
    found = findings(run)
    assert found["torch"]["status"] == "ok"
    assert torch.__version__ in found["torch"]["detail"]
    assert found["C++ compiler"]["status"] == "ok"
    assert found["nvcc"]["status"] == "ok"
    if not torch.cuda.is_available():
        assert found["CUDA kernels"]["detail"].startswith("sm_90: nvcc")
        assert "the first that knows sm_90" in found["CUDA kernels"]["detail"]
    layer = found["sample layer on cpu"]
    assert layer["status"] == "ok"
    assert all(f"{o} 128,128,8,1024" in layer["detail"] for o in ("forward", "grad_input", "grad_table"))
    assert str(store.root()) in found["kernel cache"]["detail"]
    printed = run("doctor")
    assert printed.code == 0
    assert all(topic in printed.out for topic in found)


@pytest.mark.usefixtures("no_compilers")
def test_doctor_on_a_bare_machine(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmkan_gen import dispatch
    from lmkan_gen.launch import cpu

    dispatch.clear_caches()
    cpu.unload()
    toolchain._known.clear()
    monkeypatch.setattr(nvcc, "installed", lambda: ())
    found = findings(run)
    dispatch.clear_caches()
    assert found["C++ compiler"]["status"] == "missing"
    assert host.ADVICE in found["C++ compiler"]["detail"]
    assert found["nvcc"]["status"] == "missing"
    way = found["CUDA kernels"]["detail"]
    assert ("because of no nvcc" in way) if found["NVRTC"]["status"] == "ok" else ("plain torch" in way)
    layer = found["sample layer on cpu"]
    assert layer["status"] == "problem"
    assert "plain torch ran instead" in layer["detail"]


def test_doctor_survives_whatever_is_broken(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object) -> None:
        raise OSError("the disk is on fire")

    tuning = tmp_path / "bad.yaml"
    tuning.write_text("schema: 1\nsurprise: true\n")
    monkeypatch.setenv(selection.TUNING_VARIABLE, str(tuning))
    monkeypatch.setattr(store, "entries", broken)
    monkeypatch.setattr(nvcc, "installed", broken)
    found = findings(run)
    assert found["kernel cache"] == {"status": "problem", "detail": "the disk is on fire"}
    assert found["nvcc"]["status"] == "problem"
    assert found["tuning file (environment)"]["status"] == "problem"
    assert "surprise" in found["tuning file (environment)"]["detail"]
    assert found["python"]["status"] == "ok"

    monkeypatch.setattr(selection, "sources", broken)
    assert findings(run)["tuning files"]["status"] == "problem"
    (tmp_path / "bad.yaml").rename(bad := tmp_path / "[red]\x1b[31m.yaml")
    monkeypatch.setattr(selection, "sources", lambda: [selection.Source("user", bad)])
    said = run("doctor").out
    assert "[red]\\x1b[31m.yaml: surprise: unknown key" in said
    assert "\x1b[31m" not in said
