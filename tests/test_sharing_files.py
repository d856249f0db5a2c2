"""Tuning files that travel: what is stale is noticed, editors know the schema, contributions are checked."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from rich.console import Console

from lmkan_gen import device as devices
from lmkan_gen import resources, selection, tuning_schema
from lmkan_gen.export import export
from lmkan_gen.families import family
from lmkan_gen.freshness import source_digest, stale_entries
from lmkan_gen.problem import LayerShape, Operation, Problem
from lmkan_gen.selection import Tier, select
from lmkan_gen.tuner.report import ConsoleObserver
from lmkan_gen.tuner.space import Candidate
from lmkan_gen.tuner.worker import Rejected
from lmkan_gen.tuning_file import (
    DeviceRecord,
    Dtypes,
    Entry,
    Provenance,
    Search,
    ShapeRecord,
    Times,
    TuningFile,
    TuningFileError,
    load,
    save,
)
from tests.command import Command

GPU = devices.target("sm_89")
SHAPE = LayerShape(64, 64, 8, 4096)
PROBLEM = Problem(Operation.FORWARD, SHAPE, GPU)


Run = Callable[..., tuple[int, str]]


def entry(shape: LayerShape = SHAPE, **changes: Any) -> Entry:
    """What the default would be if it had been measured now."""
    problem = replace(PROBLEM, shape=shape)
    chosen = selection.default_choice(problem)
    assert chosen is not None
    assert chosen.family is not None
    parameters = dict(chosen.parameters)
    fields = {
        "operation": problem.operation,
        "shape": ShapeRecord.of(shape),
        "dtypes": Dtypes(),
        "family": chosen.family,
        "parameters": parameters,
        "source": source_digest(family(chosen.family).spec(problem, parameters)),
        "time_us": Times(median=10.0, iqr=0.1),
        "search": Search(tried=1, rejected={}),
    }
    return Entry(**{**fields, **changes})


def write(path: Path, *entries: Entry, device: devices.Device = GPU) -> Path:
    provenance = Provenance(lmkan_gen="1", compiler="nvcc 1", driver="1", torch="1", date=date(2026, 1, 2))
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, TuningFile.make(device, provenance, entries))
    return path


@pytest.fixture(autouse=True)
def shipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty directory in place of the shipped files."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    directory = tmp_path / "shipped"
    directory.mkdir()
    real = resources.resource_directory

    def of(name: str) -> Path:
        return directory if name == "tuning" else real(name)

    for module in ("lmkan_gen.tuning_sources", "lmkan_gen.export"):
        monkeypatch.setattr(f"{module}.resource_directory", of)
    selection.clear_caches()
    yield directory
    selection.clear_caches()


@pytest.fixture
def run(run_cli: Command) -> Run:
    """Runs ``lmkan-gen``; returns its exit code and all that it printed."""

    def run(*arguments: str) -> tuple[int, str]:
        code, out, err = run_cli(*arguments)
        return code, out + err

    return run


# --- stale entries --------------------------------------------------------------------------------


def change_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmkan_gen.freshness.render", lambda spec: "another source")
    selection.clear_caches()


def test_changed_kernels_make_entries_stale(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unknown = entry(LayerShape(64, 64, 8, 8192), source=None)
    path = write(tmp_path / "file.yaml", entry(), unknown)
    assert stale_entries(load(path)) == []
    change_templates(monkeypatch)
    assert [e.shape.layer for e in stale_entries(load(path))] == [SHAPE]


def test_selection_says_so(
    monkeypatch: pytest.MonkeyPatch, shipped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(shipped / "gpu.yaml", entry())
    with caplog.at_level(logging.INFO, "lmkan_gen"):
        assert not select(PROBLEM).stale
    assert caplog.messages == []
    change_templates(monkeypatch)
    with caplog.at_level(logging.INFO, "lmkan_gen"):
        choice = select(PROBLEM)
    assert (choice.tier, choice.stale) == (Tier.EXACT, True)
    (message,) = caplog.messages
    assert "[exact, kernels changed since" in message
    assert "lmkan-gen tune --device cuda --shape 64,64,8,4096" in message


def test_commands_say_so(run: Run, monkeypatch: pytest.MonkeyPatch, shipped: Path) -> None:
    path = write(shipped / "gpu.yaml", entry())
    assert "stale:" not in run("configs", "validate", str(path))[1]
    change_templates(monkeypatch)
    code, said = run("configs", "validate", str(path))
    assert code == 0
    assert "stale: forward 64,64,8,4096, its kernel has changed since" in said
    assert "NVIDIA GeForce RTX 4090 │ sm_89 │       1 │     1 " in run("configs", "list")[1]


@pytest.mark.parametrize("arch", ["sm_87", "sm_130"])
def test_devices_of_architectures_that_no_table_lists(run: Run, shipped: Path, arch: str) -> None:
    write(shipped / "gpu.yaml", entry(source="0" * 16), device=replace(GPU, arch=arch))
    code, said = run("configs", "list")
    assert code == 0, said
    assert f"│ {arch}" in said


def test_no_kernel_is_zero_times_faster(run: Run, tmp_path: Path) -> None:
    slow = Times(median=5000.0, iqr=0.1, reference=100.0)
    path = write(tmp_path / "slow.yaml", entry(time_us=slow))
    assert "0.02x" in run("configs", "show", str(path))[1]
    path = write(tmp_path / "busy.yaml", entry(time_us=slow, unsteady=("spread",)))
    assert (
        "unsteady: forward 64,64,8,4096, measured on a busy device (spread)"
        in run("configs", "validate", str(path))[1]
    )
    said = run("configs", "show", str(path))[1]
    assert "unsteady" in said
    assert "0.02x" not in said


# --- names from elsewhere -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["[/] [bold", "[link=http://evil]x[/link]", ":smile: [red]GPU"])
def test_names_are_shown_as_they_are(run: Run, shipped: Path, name: str) -> None:
    path = write(shipped / "[red].yaml", entry(), device=replace(GPU, name=name))
    for command in (["configs", "list"], ["configs", "show", str(path)], ["configs", "validate"]):
        code, said = run(*command)
        assert code == 0, said
        assert name in said
        assert "[red].yaml" in said
    findings = json.loads(run("doctor", "--json")[1])
    assert any(name in f["detail"] and f["status"] == "ok" for f in findings)


def test_what_a_compiler_says_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    observer = ConsoleObserver(Console(width=200))
    observer.rejected(PROBLEM, Candidate.make("faulty", {}), Rejected("compile", "[/] a\x1b[31m[b]"))
    observer.skipped(PROBLEM, "[/] nothing")
    observer.noted("[/] something")
    said = capsys.readouterr().out
    for words in ("[/] a\\x1b[31m[b]", "[/] nothing", "[/] something"):
        assert words in said


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("NVIDIA GeForce RTX 4090", "nvidia_geforce_rtx_4090"),
        ("AMD EPYC™ 9V84", "amd_epyc_9v84"),
        ("寒武纪 370", "device_"),
        ("華為 370", "device_"),
        ("a" * 200, "a" * 100),
    ],
)
def test_every_device_has_a_file_name(name: str, file: str) -> None:
    slug = devices.slug(name)
    assert slug.startswith(file)
    assert re.fullmatch("[a-z0-9_]{1,100}", slug)
    assert devices.slug("寒武纪 370") != devices.slug("華為 370")


def test_a_vendors_name_is_one_that_a_file_may_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    devices.cpu.cache_clear()
    monkeypatch.setattr(devices, "_cpu_name", lambda: "A\x1b[31m CPU\u202e" + "!" * 300)
    assert DeviceRecord.of(devices.cpu()).name == "A [31m CPU " + "!" * 189
    devices.cpu.cache_clear()
    monkeypatch.setattr(devices, "_cpu_name", lambda: "")
    assert DeviceRecord.of(devices.cpu()).name == "unknown"
    devices.cpu.cache_clear()


# --- the schema -----------------------------------------------------------------------------------


def content(path: Path) -> Any:
    """A tuning file as editors see it: JSON has no dates."""
    return json.loads(json.dumps(yaml.safe_load(path.read_text()), default=str))


def test_shipped_schema_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuning_schema.path().read_text() == tuning_schema.text(), "write it anew with: make golden"


def test_schema_accepts_what_ships_and_what_is_written(tmp_path: Path) -> None:
    checker = jsonschema.Draft202012Validator(tuning_schema.schema())
    written = write(tmp_path / "one.yaml", entry(unsteady=("clocks",)))
    files = [*resources.resource_directory("tuning").glob("*.yaml"), written]
    assert len(files) > 1
    for path in files:
        assert [e.message for e in checker.iter_errors(content(path))] == []


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"surprise": 1},
        {"entries": {"family": "row_victor"}},
        {"entries": {"parameters": {"pairs": 4}}},
        {"entries": {"operation": "sideways"}},
        {"entries": {"source": "xyz"}},
        {"entries": {"parameters": {"a b": 1}}},
        {"entries": {"unsteady": ["mood"]}},
        {"device": {"name": "\x1b[31m", "arch": "sm_89", "multiprocessors": 1, "shared_memory_per_block": 0}},
        {"device": {"name": "a", "arch": "sm_x", "multiprocessors": 1, "shared_memory_per_block": 0}},
        {"device": {"name": "a", "arch": "sm_89", "multiprocessors": 10**9, "shared_memory_per_block": 0}},
        {"entries": {"shape": {"inputs": 64, "outputs": 64, "grids": 8, "batch": 0}}},
        {"entries": {"time_us": {"median": -1.0, "iqr": 0.0}}},
    ],
)
def test_schema_refuses_what_loading_refuses(tmp_path: Path, change: dict[str, Any]) -> None:
    path = write(tmp_path / "one.yaml", entry())
    data = yaml.safe_load(path.read_text())
    for key, value in change.items():
        if key == "entries":
            data["entries"][0].update(value)
        else:
            data[key] = value
    path.write_text(yaml.safe_dump(data))
    with suppress(TuningFileError):
        assert load(path).skipped
    checker = jsonschema.Draft202012Validator(tuning_schema.schema())
    assert list(checker.iter_errors(content(path)))


def test_schema_knows_every_value_of_every_parameter(tmp_path: Path) -> None:
    path = write(tmp_path / "one.yaml", entry())
    checker = jsonschema.Draft202012Validator(tuning_schema.schema())
    for name, values in family("tile_stationary").space(Operation.FORWARD).items():
        for value in (*values, 3, "nonsense"):
            data = content(path)
            data["entries"][0]["parameters"][name] = value
            assert checker.is_valid(data) == (value in values)


def test_files_beside_a_schema_name_it(tmp_path: Path) -> None:
    assert not write(tmp_path / "a.yaml", entry()).read_text().startswith("#")
    (tmp_path / "schema.json").write_text("{}")
    path = write(tmp_path / "b.yaml", entry())
    assert path.read_text().startswith("# yaml-language-server: $schema=schema.json\n")
    assert len(load(path).entries) == 1


def test_validate_names_what_layers_pass_over(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "foreign.yaml", entry())
    path.write_text(path.read_text().replace("family: ", "family: new_"))
    code, said = run("configs", "validate", str(path))
    assert code == 1
    assert f"{path}: not valid, 0 entries" in said
    assert "passed over: forward 64,64,8,4096: unknown kernel family 'new_" in said
    assert "passed over: forward 64,64,8,4096" in run("configs", "show", str(path))[1]


def test_schema_command(run: Run) -> None:
    assert run("configs", "schema") == (0, tuning_schema.text())


# --- export ---------------------------------------------------------------------------------------


def test_export_adds_to_what_ships(run: Run, shipped: Path, tmp_path: Path) -> None:
    other = LayerShape(128, 128, 8, 4096)
    write(shipped / "nvidia_geforce_rtx_4090.yaml", entry(other), entry(time_us=Times(median=99.0, iqr=0.0)))
    mine = write(tmp_path / "mine.yaml", entry())
    code, said = run("configs", "export", str(mine), "--output", str(tmp_path / "out"))
    assert code == 0, said
    assert "make golden" in said
    exported = load(tmp_path / "out" / "nvidia_geforce_rtx_4090.yaml")
    assert {e.shape.layer: e.time_us.median for e in exported.entries} == {other: 10.0, SHAPE: 10.0}


def test_export_adds_to_what_is_there(shipped: Path, tmp_path: Path) -> None:
    """A checkout may be ahead of what is installed."""
    newer, other = LayerShape(128, 128, 8, 4096), LayerShape(256, 256, 8, 4096)
    write(shipped / "gpu.yaml", entry(other))
    write(tmp_path / "checkout" / "nvidia_geforce_rtx_4090.yaml", entry(newer), entry(other))
    path, added, total = export(write(tmp_path / "mine.yaml", entry()), tmp_path / "checkout")
    assert (added, total) == (1, 3)
    assert {e.shape.layer for e in load(path).entries} == {newer, other, SHAPE}


def test_export_refuses_what_is_not_worth_sharing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(TuningFileError, match="no entries"):
        export(write(tmp_path / "empty.yaml"), tmp_path / "out")
    foreign = write(tmp_path / "foreign.yaml", entry())
    foreign.write_text(foreign.read_text().replace("family: ", "family: new_"))
    with pytest.raises(TuningFileError, match="forward 64,64,8,4096: unknown kernel family 'new_"):
        export(foreign, tmp_path / "out")
    good = entry()
    wasteful = entry(parameters={**good.parameters, "pairs": 16, "outs": 32}, source=None)
    with pytest.raises(TuningFileError, match="does not fit NVIDIA GeForce RTX 4090: num_grids=8"):
        export(write(tmp_path / "big.yaml", wasteful), tmp_path / "out")
    busy = write(tmp_path / "busy.yaml", entry(unsteady=("repeats", "spread")))
    assert "unsteady: [repeats, spread]" in busy.read_text()
    with pytest.raises(TuningFileError, match=r"busy or .* \(repeats, spread\); .*lmkan-gen tune"):
        export(busy, tmp_path / "out")
    noisy = write(tmp_path / "noisy.yaml", entry(time_us=Times(median=500.0, iqr=20_000.0)))
    with pytest.raises(TuningFileError, match=r"busy or .* \(spread\)"):  # by a version that did not notice
        export(noisy, tmp_path / "out")
    path = write(tmp_path / "stale.yaml", good)
    change_templates(monkeypatch)
    with pytest.raises(
        TuningFileError, match=r"another version of its kernel; again: lmkan-gen tune .*64,64,8"
    ):
        export(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- comparison -----------------------------------------------------------------------------------


def test_two_files_are_compared(run: Run, tmp_path: Path) -> None:
    good, other, third = entry(), LayerShape(64, 64, 8, 1), LayerShape(64, 64, 8, 2)
    faster = {**good.parameters, "threads": 256 if good.parameters["threads"] != 256 else 512}
    a = write(tmp_path / "a.yaml", good, entry(other))
    b = write(
        tmp_path / "b.yaml",
        entry(parameters=faster, source=None, time_us=Times(median=5.0, iqr=0.1)),
        entry(third),
    )
    code, said = run("inspect", "--diff", str(a), str(b))
    assert code == 0, said
    rows = {tuple(cells[1:3]): cells[3:] for line in said.splitlines() if len(cells := split(line)) > 6}
    change = f"threads {good.parameters['threads']} -> {faster['threads']}"
    assert rows["forward", str(SHAPE)][:4] == ["10 us", "5 us", "2.00x", change]
    assert rows["forward", str(other)][:4] == ["10 us", "-", "-", "only in A"]
    assert rows["forward", str(third)][:4] == ["-", "10 us", "-", "only in B"]
    assert "is of" not in said
    code, said = run("inspect", "--diff", str(a), str(a))
    assert "1.00x (noise)" in said
    assert "the same" in said
    slow = write(tmp_path / "slow.yaml", entry(time_us=Times(median=1e4, iqr=0.1)))
    assert "0.001x" in run("inspect", "--diff", str(a), str(slow))[1]
    slow = write(tmp_path / "slow.yaml", entry(time_us=Times(median=20, iqr=0.1), unsteady=("spread",)))
    assert "0.5x (noise)" in run("inspect", "--diff", str(a), str(slow))[1]
    code, said = run("inspect", "--diff", str(a), str(b), "--target", "cpu")
    assert code == 2


def split(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("│")]
