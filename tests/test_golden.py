"""``generated/``: the sources of what shipped tuning files choose, never older than the templates."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path

import pytest
import typer

from lmkan_gen import codegen, golden
from lmkan_gen.device import Device, target
from lmkan_gen.families import family
from lmkan_gen.problem import LayerShape, Operation, Problem
from lmkan_gen.resources import resource_directory
from lmkan_gen.selection import default_choice
from lmkan_gen.tuning_file import Dtypes, Entry, Provenance, Search, ShapeRecord, Times, TuningFile, save

ROOT = Path(__file__).resolve().parent.parent
GPU = target("sm_90")
CPU = Device("cpu", "A CPU", "x86-64-v3", 8)
PROVENANCE = Provenance(lmkan_gen="0.1.0", compiler="none", torch="2.13.0", date=date(2026, 11, 24))
NAME = re.compile(r"(forward|backward|grad_input|grad_table)_\d+x\d+_g\d+_[0-9a-f]{8}\.(cu|cpp)")


def entry(operation: Operation, batch: int, device: Device) -> Entry:
    """The analytic default for a large batch as if it had been measured for ``batch``."""
    choice = default_choice(Problem(operation, LayerShape(64, 32, 8, 65536), device))
    assert choice is not None
    assert choice.family is not None
    return Entry(
        operation=operation,
        shape=ShapeRecord.of(LayerShape(64, 32, 8, batch)),
        dtypes=Dtypes(),
        family=choice.family,
        parameters=dict(choice.parameters),
        time_us=Times(median=1.0, iqr=0.1),
        search=Search(tried=1, rejected={}),
    )


@pytest.fixture
def tuning(tmp_path: Path) -> Path:
    """A GPU's file, with two batches served by one source, and a CPU's."""
    directory = tmp_path / "tuning"
    calls = ((Operation.FORWARD, 4096), (Operation.FORWARD, 65536), (Operation.BACKWARD, 65536))
    gpu = tuple(entry(operation, batch, GPU) for operation, batch in calls)
    save(directory / "some_gpu.yaml", TuningFile.make(GPU, PROVENANCE, gpu))
    cpu = (entry(Operation.GRAD_TABLE, 65536, CPU),)
    save(directory / "some_cpu.yaml", TuningFile.make(CPU, PROVENANCE, cpu))
    return directory


def test_written_files_are_the_rendered_kernels(tuning: Path, tmp_path: Path) -> None:
    output = tmp_path / "generated"
    assert golden.write(tuning, output) == 3
    assert golden.differences(tuning, output) == []
    found = {path.relative_to(output): path.read_text() for path in output.rglob("*") if path.is_file()}
    assert all(NAME.fullmatch(path.name) for path in found)
    kinds = sorted((str(path.parent), path.name.split("_6")[0], path.suffix) for path in found)
    assert kinds == [
        ("some_cpu", "grad_table", ".cpp"),
        ("some_gpu", "backward", ".cu"),
        ("some_gpu", "forward", ".cu"),
    ]
    # what a layer on such a GPU would compile, for any batch
    winner = entry(Operation.FORWARD, 4096, GPU)
    problem = Problem(Operation.FORWARD, LayerShape(64, 32, 8, 12345), GPU)
    spec = family(winner.family).spec(problem, winner.parameters)
    assert codegen.render(spec) in found.values()


def test_differences_are_named_and_written_anew(tuning: Path, tmp_path: Path) -> None:
    output = tmp_path / "generated"
    golden.write(tuning, output)
    (output / "README.md").write_text("about")
    tampered, missing, _ = sorted(output.glob("*/*.c*"))
    tampered.write_text(tampered.read_text() + "\n")
    missing.unlink()
    stale = output / "gone" / "forward_2x1_g3_00000000.cu"
    stale.parent.mkdir()
    stale.touch()
    expected = {f"different: {tampered}", f"missing: {missing}", f"stale: {stale}"}
    assert set(golden.differences(tuning, output)) == expected
    golden.write(tuning, output)
    assert golden.differences(tuning, output) == []
    assert not stale.exists()
    assert (output / "README.md").read_text() == "about"


def test_command(
    tuning: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(golden, "resource_directory", lambda name: tmp_path / name)
    golden.main()
    golden.main(check=True)
    first = min((tmp_path / "generated").glob("*/*"))
    first.unlink()
    with pytest.raises(typer.Exit) as caught:
        golden.main(check=True)
    assert caught.value.exit_code == 1
    assert f"missing: {first}" in capsys.readouterr().err
    assert not first.exists()


def test_generated_is_up_to_date() -> None:
    tuning = resource_directory("tuning")
    if not any(tuning.glob("*.yaml")):
        pytest.skip("no tuning files are shipped yet, so there is nothing to render")
    assert golden.differences(tuning, ROOT / "generated") == [], "run: make golden"
