"""`lmkan-gen tune` and `lmkan-gen configs`: what users see, and exit codes 0, 1 and 2."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lmkan_gen import cli, selection
from lmkan_gen import device as devices
from lmkan_gen.problem import LayerShape, Operation, Problem
from lmkan_gen.tuner.progress import Observer, Progress
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


def test_a_log_has_a_line_for_each_problem_and_no_bars(run: Runner, tmp_path: Path) -> None:
    output = tmp_path / "mine.yaml"
    arguments = ["--device", "cpu", "--operation", "forward", "--trials", "1", "--output", str(output)]
    outcome = run("tune", "--shape", SHAPE, "--shape", "8,6,4,51", *arguments, "--json")
    assert outcome.code == 0
    done = [line for line in outcome.err.splitlines() if line.startswith("done ")]
    assert [line.split(":")[0] for line in done] == ["done 1/2 forward 8,6,4,50", "done 2/2 forward 8,6,4,51"]
    assert all("1 tried, 0 failed" in line for line in done)
    assert not any(character in outcome.err for character in "━\r\x1b")
    found = json.loads(outcome.out)
    assert found["output"] == str(output)
    assert [e["time_us"]["median"] for e in found["entries"]] == [
        e.time_us.median for e in load(output).entries
    ]
    assert found["ended_by_budget"] == found["skipped"] == []


def test_a_budget_that_ended_a_search_says_so(run: Runner, tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--operation", "forward", "--output", str(tmp_path / "mine.yaml")]
    outcome = run("tune", "--shape", "64,64,8,1000", *arguments, "--time-budget", "0", "--json")
    assert outcome.code == 0
    (ended,) = json.loads(outcome.out)["ended_by_budget"]
    assert (ended["operation"], ended["shape"], ended["tried"]) == ("forward", "64,64,8,1000", 1)
    assert f"the time budget ended the search after 1 of {ended['of']} candidates" in outcome.err


@pytest.mark.parametrize(
    ("extra", "go_on"),
    [
        ([], "the same command with --resume goes on"),
        (["--resume"], "the same command goes on"),
        (["--storage", "studies.journal"], "the same command goes on"),
    ],
)
def test_an_interrupt_says_what_was_kept(
    run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: list[str], go_on: str
) -> None:
    def interrupted(*_: object, observer: Observer, **__: object) -> None:
        problem = Problem(Operation.FORWARD, LayerShape(8, 6, 4, 50), devices.cpu())
        observer.progress(Progress(problem, 0, 4, "measuring", 3, 16, None))
        raise KeyboardInterrupt

    monkeypatch.setattr("lmkan_gen.tuner.run.tune", interrupted)
    output = tmp_path / "mine.yaml"
    outcome = run("tune", "--shape", SHAPE, "--device", "cpu", "--output", str(output), *extra)
    assert outcome.code == 130
    kept = f"0 of 4 entries are in {output}, 3 candidates of the next are measured and kept; {go_on}"
    assert outcome.err.splitlines()[-2:] == [kept, "lmkan-gen: interrupted"]


def test_configs_as_data(run: Runner, tmp_path: Path) -> None:
    broken = selection.user_tuning_directory() / "broken.yaml"
    broken.parent.mkdir(parents=True)
    broken.write_text("schema: 3\n")
    listed = json.loads(run("configs", "list", "--json").out)
    assert [f["found_in"] for f in listed] == ["user", *["packaged"] * (len(listed) - 1)]
    assert (listed[0]["valid"], listed[0]["device"]) == (False, None)
    assert f"{broken}: schema:" in listed[0]["error"]
    (h200,) = [f for f in listed if f["file"].endswith("/nvidia_h200.yaml")]
    shown = json.loads(run("configs", "show", "nvidia_h200", "--json").out)
    assert shown["device"]["name"] == h200["device"] == "NVIDIA H200"
    assert len(shown["entries"]) == h200["entries"]
    validated = run("configs", "validate", "--json")
    assert validated.code == 1
    assert [f["valid"] for f in json.loads(validated.out)] == [False, *[True] * (len(listed) - 1)]


def test_files_are_listed_as_records_where_it_is_narrow(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    lines = run("configs", "list").out.splitlines()
    (path,) = [s.path for s in selection.sources() if s.path.stem == "nvidia_h200"]
    at = lines.index("device: NVIDIA H200")
    assert lines[at + 1] == "arch: sm_90"
    assert f"file: {path}" in lines
