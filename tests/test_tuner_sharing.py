"""Several processes at one search: nothing is measured twice, and nobody waits for the dead."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.trial import FrozenTrial, TrialState

from lmkan_gen import device as devices
from lmkan_gen import families, selection
from lmkan_gen.problem import LayerShape, Operation, Problem
from lmkan_gen.tuner import storage, study
from lmkan_gen.tuner.measure import Timing
from lmkan_gen.tuner.space import Candidate, Space, explore
from lmkan_gen.tuner.study import Study
from tests.fault_family import Faulty

SHAPE = LayerShape(6, 5, 4, 40)
VARIANTS = 16

#: tunes when it is told to: arguments are the storage and the output file
PROGRAM = f"""
import sys
from pathlib import Path
import torch
from lmkan_gen import families
from lmkan_gen.problem import LayerShape, Operation
from lmkan_gen.tuner.run import tune
from tests.fault_family import Faulty

if __name__ == "__main__":
    family = Faulty(("none",), variants={VARIANTS})
    families._registry = lambda: {{family.name: family}}
    print("ready", flush=True)
    sys.stdin.readline()
    tune(
        [LayerShape{SHAPE.inputs, SHAPE.outputs, SHAPE.grids, SHAPE.batch}], torch.device("cpu"),
        [Operation.FORWARD], trials={VARIANTS}, storage_url=sys.argv[1], output=Path(sys.argv[2]),
    )
"""


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Space]:
    family = Faulty(("none",), variants=6)
    monkeypatch.setattr(families, "_registry", lambda: {family.name: family})
    # shipped files name families that are not there now
    monkeypatch.setattr("lmkan_gen.tuning_sources.resource_directory", lambda name: tmp_path / name)
    selection.clear_caches()
    yield explore(Problem(Operation.FORWARD, SHAPE, devices.cpu()))
    selection.clear_caches()


def start(tmp_path: Path, url: str, outputs: list[Path]) -> list[subprocess.Popen[str]]:
    """Processes that all begin at the same moment."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    processes = [
        subprocess.Popen(
            [sys.executable, str(program), url, str(output)],
            env={**os.environ, "PYTHONPATH": path, "XDG_CONFIG_HOME": str(tmp_path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for output in outputs
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return processes


def measured(url: str) -> list[FrozenTrial]:
    kept = storage.shared(url)
    names = [s.study_name for s in optuna.get_all_study_summaries(kept)]
    trials = optuna.load_study(study_name=names[0], storage=kept).get_trials() if names else []
    return [t for t in trials if "samples_us" in t.user_attrs]


def end(process: subprocess.Popen[str]) -> int:
    code = process.wait(timeout=120)
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        stream.close()
    return code


def check(url: str, outputs: list[Path]) -> None:
    """Everything was measured, once, and all know it."""
    files = [yaml.safe_load(path.read_text()) for path in outputs]
    variants = Counter(t.params["faulty.variant"] for t in measured(url))
    assert variants == dict.fromkeys(range(VARIANTS), 1)
    assert [f["entries"][0]["search"]["tried"] for f in files] == [VARIANTS] * len(files)


@pytest.mark.parametrize("kind", ["journal", "database"])
def test_two_processes_share_one_search(tmp_path: Path, kind: str) -> None:
    url = str(tmp_path / "study.journal") if kind == "journal" else f"sqlite:///{tmp_path / 'studies.db'}"
    outputs = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    assert [end(p) for p in start(tmp_path, url, outputs)] == [0, 0]
    check(url, outputs)
    assert len({t.user_attrs["owner"] for t in measured(url)}) == 2, "both took part"


def test_what_a_killed_process_was_at_is_done_by_the_other(tmp_path: Path) -> None:
    url = f"journal://{tmp_path / 'study.journal'}"
    outputs = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    victim, other = start(tmp_path, url, outputs)
    deadline = time.monotonic() + 100
    while len(measured(url)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    victim.send_signal(signal.SIGKILL)
    end(victim)
    assert end(other) == 0
    check(url, [outputs[1]])
    assert not outputs[0].exists()


# --- the study, in one process --------------------------------------------------------------------


def pretend(monkeypatch: pytest.MonkeyPatch, *owner: object) -> None:
    monkeypatch.setattr(study, "_this_process", lambda: json.dumps(owner))


def test_nothing_is_suggested_twice(faulty: Space, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    url = str(tmp_path / "study.journal")
    pretend(monkeypatch, "another machine", 1, 0.0)
    theirs = Study(faulty, 6, storage.shared(url), shared=True)
    pretend(monkeypatch, "a third", 1, 0.0)
    ours = Study(faulty, 6, storage.shared(url), shared=True)
    asked: list[Candidate] = []
    for turn in range(6):
        of = (ours, theirs)[turn % 2]
        candidate = of.ask()
        assert candidate is not None
        asked.append(candidate)
    assert sorted(asked) == sorted(faulty.candidates())
    assert ours.ask() is theirs.ask() is None
    assert ours.elsewhere == 3
    theirs.tell(asked[1], Timing((7.0,)))
    ours.refresh()
    assert ours.results == {asked[1]: Timing((7.0,))}
    assert (ours.elsewhere, ours.taken) == (2, 5)
    theirs.release()  # it stops early
    assert {ours.ask(), ours.ask()} == {asked[3], asked[5]}


def test_same_moment(faulty: Space, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both have read that a candidate is free; the one whose trial came first has it."""
    url = str(tmp_path / "study.journal")
    pretend(monkeypatch, "another machine", 1, 0.0)
    theirs = Study(faulty, 6, storage.shared(url), shared=True)
    pretend(monkeypatch, "a third", 1, 0.0)
    ours = Study(faulty, 6, storage.shared(url), shared=True)
    refresh = ours.refresh
    taken: list[Candidate | None] = []

    def refresh_then_others_ask() -> None:
        refresh()
        if not taken:
            taken.append(theirs.ask())

    monkeypatch.setattr(ours, "refresh", refresh_then_others_ask)
    first = ours.ask()
    assert taken[0] == faulty.default
    assert first is not None
    assert first != taken[0]


def test_a_result_is_seen_before_its_trial_is_closed(
    faulty: Space, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whoever reads between the two leaves the closing to the owner, and nobody minds who did it."""
    url = str(tmp_path / "study.journal")
    pretend(monkeypatch, "another machine", 1, 0.0)
    theirs = Study(faulty, 6, storage.shared(url), shared=True)
    candidate = theirs.ask()
    assert candidate is not None
    pretend(monkeypatch, "a third", 1, 0.0)
    finish = theirs._finish

    def read_in_between(*arguments: Any) -> None:
        ours = Study(faulty, 6, storage.shared(url), shared=True)
        assert ours.results == {candidate: Timing((4.0,))}
        assert ours._study.get_trials()[0].state is TrialState.RUNNING
        finish(*arguments)

    monkeypatch.setattr(theirs, "_finish", read_in_between)
    theirs.tell(candidate, Timing((4.0,)))
    assert theirs._study.get_trials()[0].value == 4.0
    # taken for dead, and closed by another
    other = theirs.ask()
    assert other is not None
    theirs._study.tell(1, state=TrialState.FAIL)
    theirs._finish = finish  # type: ignore[method-assign]
    theirs.tell(other, Timing((5.0,)))
    assert theirs.results[other] == Timing((5.0,))


@pytest.mark.parametrize(
    ("owner", "alive"),
    [
        (("another machine", 1, 0.0), True),
        ((platform.node(), 2**22 + 1, 0.0), False),  # no such process
        ((platform.node(), os.getppid(), 0.0), False),  # its number belongs to another one now
    ],
    ids=["elsewhere", "gone", "number used again"],
)
def test_who_is_waited_for(
    faulty: Space, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, owner: tuple[object, ...], alive: bool
) -> None:
    url = str(tmp_path / "study.journal")
    pretend(monkeypatch, *owner)
    theirs = Study(faulty, 6, storage.shared(url), shared=True)
    candidate = theirs.ask()
    pretend(monkeypatch, "a third", 1, 0.0)
    ours = Study(faulty, 6, storage.shared(url), shared=True)
    assert ours.elsewhere == int(alive)
    assert (ours.ask() != candidate) == alive
    # nobody is waited for for ever
    monkeypatch.setattr(study, "_LEASE_S", -study._LEASE_S)
    ours.refresh()
    assert ours.elsewhere == 0


@pytest.mark.parametrize("url", ["{}/study.journal", "sqlite:///{}/study.db"])
def test_a_machine_of_another_time_zone_is_alive(
    faulty: Space, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str
) -> None:
    def move(zone: str) -> None:
        monkeypatch.setenv("TZ", zone)
        time.tzset()

    try:
        pretend(monkeypatch, "another machine", 1, 0.0)
        move("WEST+11")
        assert Study(faulty, 6, storage.shared(url.format(tmp_path)), shared=True).ask() is not None
        pretend(monkeypatch, "a third", 1, 0.0)
        move("EAST-11")
        assert Study(faulty, 6, storage.shared(url.format(tmp_path)), shared=True).elsewhere == 1
    finally:
        monkeypatch.delenv("TZ")
        time.tzset()


def test_seeds_that_only_one_machine_knows(faulty: Space, tmp_path: Path) -> None:
    """Tuning files differ between machines; the search they share must not."""
    strange = Candidate.make("faulty", {"fault": "none", "variant": 99})
    other = dataclasses.replace(faulty, seeds=(*faulty.seeds, strange))
    assert other.fingerprint() == faulty.fingerprint()
    url = str(tmp_path / "study.journal")
    for space in (faulty, other):
        one = Study(space, 6, storage.shared(url), shared=True)
        asked = one.ask()
        assert asked is not None
        one.tell(asked, Timing((1.0,)))
    assert len(one.results) == 2


# --- storage --------------------------------------------------------------------------------------


def test_a_line_cut_short_is_dropped(faulty: Space, tmp_path: Path) -> None:
    journal = tmp_path / "study.journal"
    first = Study(faulty, 6, storage.shared(str(journal)))
    candidate = first.ask()
    assert candidate is not None
    first.tell(candidate, Timing((5.0,)))
    with journal.open("ab") as stream:
        stream.write(b'{"op_code":4,"worker_')
    again = Study(faulty, 6, storage.shared(str(journal)))
    assert again.results == {candidate: Timing((5.0,))}
    other = again.ask()
    assert other is not None
    again.tell(other, Timing((6.0,)))
    assert len(Study(faulty, 6, storage.shared(str(journal))).results) == 2


def test_a_line_that_is_cut_short_while_others_work(
    faulty: Space, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A full disk, say. Who opened the journal before goes on, and so does who comes later."""
    journal = tmp_path / "study.journal"
    pretend(monkeypatch, "elsewhere", 1, 1.0)
    one = Study(faulty, 6, storage.shared(str(journal)), shared=True)
    pretend(monkeypatch, "elsewhere", 2, 2.0)
    two = Study(faulty, 6, storage.shared(str(journal)), shared=True)
    for number, study_ in enumerate((one, two, one, two)):
        with journal.open("ab") as stream:
            stream.write(b'{"op_code":4,"worker_')
        candidate = study_.ask()
        assert candidate is not None
        study_.tell(candidate, Timing((5.0 + number,)))
    assert len(measured(str(journal))) == 4
    one.refresh()
    assert len(one.results) == 4


def test_messages_name_the_journal(faulty: Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = tmp_path / "study.journal"
    first = Study(faulty, 6, storage.shared(str(journal)))
    candidate = first.ask()
    assert candidate is not None
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full_disk)
        with pytest.raises(storage.StorageFailed, match=r"study\.journal cannot be written: .*No space left"):
            first.tell(candidate, Timing((5.0,)))
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(lines[0] + b'{"op_code":4,"wor' + b"".join(lines[1:]))  # glued by another version
    with pytest.raises(storage.StorageFailed, match=r"study\.journal is damaged after line 1"):
        Study(faulty, 6, storage.shared(str(journal)))


def full_disk(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_private_search_is_for_one_process(tmp_path: Path) -> None:
    with storage.private(tmp_path, "search", resume=False):
        assert (tmp_path / "search.journal").exists()
        with (
            pytest.raises(storage.StorageFailed, match="--storage"),
            storage.private(tmp_path, "search", resume=True),
        ):
            pass
    with storage.private(tmp_path, "search", resume=True):
        pass


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgresql+nonsense://me:secret@nowhere/studies", "nonsense"),
        ("sqlite:////nowhere/at/all/studies.db", "unable to open"),
        ("nonsense://somewhere", "nonsense"),
    ],
)
def test_storage_that_cannot_be_opened(url: str, words: str) -> None:
    with pytest.raises(storage.StorageFailed, match=words) as caught:
        storage.shared(url)
    assert "secret" not in str(caught.value)


def test_closed_trials_are_closed(faulty: Space, tmp_path: Path) -> None:
    """What a killed process left open does not stay open for ever."""
    url = str(tmp_path / "study.journal")
    Study(faulty, 6, storage.shared(url)).ask()
    resumed = Study(faulty, 6, storage.shared(url))
    states = [t.state for t in resumed._study.get_trials()]
    assert states == [TrialState.FAIL]


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://me:hunter2@db.example.org/studies",  # no driver, or no such host
        "postgresql://me:hunter2",  # the password where the port is expected
        "postgresql://me:hun@hunter2/x@localhost:1/studies",
        "mysql+nothing://me:hunter2@localhost/studies",
        "redis://:hunter2@localhost:1x/0",
        "redis://hunter2:1x",
        "sqlite:///nowhere/hunter2?mode=hunter2",
        "hunter2@nonsense://localhost",
        "me:hunter2://localhost",
        "postgresql:/me:hunter2@localhost/studies",
        "postgresql//me/hunter2",
        "me:hunter2@localhost",
        "redis:hunter2",
        "%68unter2@nonsense",
    ],
)
def test_a_storage_url_is_never_echoed(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(storage.StorageFailed) as caught:
        storage.shared(url)
    shown = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert "hunter2" not in shown
    assert "unter2@" not in shown
    assert "journal file's path, redis://..., or a database URL" in shown
    assert not list(tmp_path.iterdir()), "no journal is called like a URL"


def test_a_file_that_is_called_like_a_url_can_be_named(tmp_path: Path) -> None:
    storage.shared(f"journal://{tmp_path}/me@home:1.journal")
    assert (tmp_path / "me@home:1.journal").exists()


def test_journals_are_private_unless_made_otherwise(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        storage.shared(str(tmp_path / "new.journal"))
        with storage.private(tmp_path, "own", resume=False):
            pass
        shared = tmp_path / "shared.journal"
        shared.touch(mode=0o660)
        storage.shared(str(shared))
    finally:
        os.umask(umask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.glob("*.journal")}
    assert modes == {"new.journal": 0o600, "own.journal": 0o600, "shared.journal": 0o660}
