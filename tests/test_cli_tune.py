"""`lmkan-gen tune` and `lmkan-gen configs`: what users see, and exit codes 0, 1 and 2."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lmkan_gen import cli, selection
from lmkan_gen import device as devices
from lmkan_gen.problem import LayerShape, Operation, Problem
from lmkan_gen.tuning_file import load


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def _wide_terminal_and_own_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    selection.clear_caches()
    yield
    selection.clear_caches()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Runner:
    return Runner(capsys, monkeypatch)


class Runner:
    """Runs the command in this process, as the console script would."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(self, *arguments: str) -> Outcome:
        self._monkeypatch.setattr("sys.argv", ["lmkan-gen", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        said = self._capsys.readouterr()
        code = caught.value.code
        return Outcome(code if isinstance(code, int) else 0, said.out, said.err)


SHAPE = "8,6,4,50"


def test_tune_then_show_list_validate(run: Runner, tmp_path: Path) -> None:
    output = tmp_path / "mine.yaml"
    arguments = ["--device", "cpu", "--operation", "forward", "--trials", "2"]
    outcome = run("tune", "--shape", SHAPE, "--shape", "8,6,4,51", *arguments, "--output", str(output))
    assert outcome.code == 0, outcome
    file = load(output)
    assert [str(e.shape.layer) for e in file.entries] == [SHAPE, "8,6,4,51"]
    assert {e.operation for e in file.entries} == {Operation.FORWARD}
    assert max(e.search.tried for e in file.entries) <= 2
    for words in (str(output), devices.cpu().name, SHAPE, "row_vector", "speedup", "tried"):
        assert words in outcome.out

    shown = run("configs", "show", str(output))
    assert shown.code == 0
    for words in (SHAPE, "row_vector", file.provenance.compiler, file.provenance.torch):
        assert words in shown.out

    valid = run("configs", "validate", str(output))
    assert (valid.code, "valid, 2 entries" in valid.out) == (0, True)


def test_default_output_is_found_by_layers_and_by_name(run: Runner) -> None:
    assert run("tune", "--shape", SHAPE, "--device", "cpu", "--trials", "1").code == 0
    (path,) = selection.user_tuning_directory().glob("*.yaml")
    choice = selection.select(Problem(Operation.FORWARD, LayerShape(8, 6, 4, 50), devices.cpu()))
    assert (choice.tier, choice.source) == (selection.Tier.EXACT, str(path))
    listed = run("configs", "list")
    assert listed.code == 0
    assert "user" in listed.out
    assert devices.cpu().name in listed.out
    assert run("configs", "show", path.stem).code == 0
    assert f"{path}: valid" in run("configs", "validate").out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shape", "8,6,4"], "IN,OUT,GRIDS,BATCH"),
        (["--shape", "0,6,4,50"], "inputs must be at least 1"),
        (["--shape", "8,6,4,0"], "batch must be at least 1"),
        (["--shape", SHAPE, "--device", "tpu"], "none of auto, cpu, cuda, cuda:N"),
        (["--shape", SHAPE, "--device", "cuda:x"], "none of auto, cpu, cuda, cuda:N"),
        (["--shape", SHAPE, "--operation", "sideways"], "sideways"),
        (["--shape", SHAPE, "--preset", "slow"], "slow"),
        (["--shape", SHAPE, "--trials", "0"], "--trials"),
        (["--shape", SHAPE, "--time-budget", "-1"], "--time-budget"),
        (["--device", "cpu"], "--shape"),
    ],
)
def test_wrong_usage(run: Runner, arguments: list[str], words: str) -> None:
    outcome = run("tune", *arguments)
    assert outcome.code == 2
    assert words in outcome.err


def test_shared_storage(run: Runner, tmp_path: Path) -> None:
    """A search that is complete is not repeated by whoever joins it, only ranked."""
    journal = tmp_path / "studies.journal"
    arguments = ["--shape", SHAPE, "--device", "cpu", "--operation", "forward", "--trials", "2"]
    for name in ("a", "b"):
        output = tmp_path / f"{name}.yaml"
        outcome = run("tune", *arguments, "--storage", str(journal), "--output", str(output))
        assert outcome.code == 0, outcome
        assert load(output).entries[0].search.tried == 2
    assert journal.read_text().count('"samples_us"') == 2
    outcome = run("tune", *arguments, "--storage", "nonsense://somewhere")
    assert outcome.code == 1
    assert "cannot open the storage (nonsense)" in outcome.err


def test_no_such_gpu(run: Runner) -> None:
    outcome = run("tune", "--shape", SHAPE, "--device", "cuda:99")
    assert outcome.code == 1
    assert "cuda:99" in outcome.err


def test_output_that_is_not_a_tuning_file_is_kept(run: Runner, tmp_path: Path) -> None:
    output = tmp_path / "precious.yaml"
    output.write_text("recipes: [soup]\n")
    outcome = run("tune", "--shape", SHAPE, "--device", "cpu", "--output", str(output))
    assert outcome.code == 1
    assert "recipes: unknown key" in outcome.err
    assert output.read_text() == "recipes: [soup]\n"


def test_operation_for_which_there_is_nothing(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmkan_gen.families._registry", dict)
    outcome = run("tune", "--shape", SHAPE, "--device", "cpu")
    assert outcome.code == 1
    assert "no cpu kernels for float32 tables to tune" in outcome.err


def test_validate_names_what_is_wrong(run: Runner, tmp_path: Path) -> None:
    broken = selection.user_tuning_directory() / "broken.yaml"
    broken.parent.mkdir(parents=True)
    broken.write_text("schema: 3\n")
    for arguments in ([], [str(broken)], ["broken"]):
        outcome = run("configs", "validate", *arguments)
        assert outcome.code == 1
        assert f"{broken}: schema:" in outcome.err
    assert "not valid" in run("configs", "list").out
    assert run("configs", "show", "broken").code == 1


def test_unknown_name(run: Runner) -> None:
    for verb in ("show", "validate"):
        outcome = run("configs", verb, "no_such_gpu")
        assert outcome.code == 2
        assert "no_such_gpu" in outcome.err


@pytest.mark.parametrize(
    "verb", [["tune"], ["configs", "list"], ["configs", "show"], ["configs", "validate"]]
)
def test_help_has_examples(run: Runner, verb: list[str]) -> None:
    outcome = run(*verb, "--help")
    assert outcome.code == 0
    assert f"lmkan-gen {' '.join(verb)}" in outcome.out.split("Examples:")[1]
