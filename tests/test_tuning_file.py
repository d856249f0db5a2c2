"""Tuning files: what is written is read back, and what is wrong is refused by name."""

from __future__ import annotations

import copy
import multiprocessing
import os
import time
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkan_gen import device as devices
from lmkan_gen.device import target
from lmkan_gen.families import family
from lmkan_gen.problem import Operation, Problem
from lmkan_gen.resources import resource_directory
from lmkan_gen.text import unprintable
from lmkan_gen.tuning_file import (
    SCHEMA_FILE,
    ShapeRecord,
    TuningFile,
    TuningFileError,
    dump,
    load,
    merge,
    save,
    update,
)

PARAMETERS = {name: values[0] for name, values in family("row_vector").space(Operation.FORWARD).items()}


def content() -> dict[str, Any]:
    """A valid file as YAML would give it."""
    return {
        "schema": 1,
        "device": {"name": "A CPU", "arch": "x86-64-v3", "multiprocessors": 8, "shared_memory_per_block": 0},
        "provenance": {
            "lmkan_gen": "0.1.0",
            "compiler": "gcc 12",
            "driver": None,
            "torch": "2.13.0",
            "date": date(2026, 11, 24),
        },
        "entries": [
            {
                "operation": "forward",
                "shape": {"inputs": 64, "outputs": 32, "grids": 10, "batch": batch},
                "dtypes": {"table": "float32", "input": "float32"},
                "family": "row_vector",
                "parameters": dict(PARAMETERS),
                "time_us": {"median": 10.5, "iqr": 1, "default": 12, "reference": None},
                "search": {"tried": 4, "rejected": {"compile": 0, "wasted": 2}},
            }
            for batch in (1000, 31)
        ],
    }


def write(tmp_path: Path, value: object) -> Path:
    path = tmp_path / "some_cpu.yaml"
    path.write_text(value if isinstance(value, str) else yaml.safe_dump(value, sort_keys=False))
    return path


def changed(**paths: object) -> dict[str, Any]:
    """Valid content with one value replaced; ``a__0__b`` stands for ``["a"][0]["b"]``."""
    result = copy.deepcopy(content())
    for path, value in paths.items():
        *parents, last = path.split("__")
        place: Any = result
        for key in parents:
            place = place[int(key)] if key.isdecimal() else place[key]
        place[int(last) if last.isdecimal() else last] = value
    return result


def test_round_trip_is_identical_and_ordered(tmp_path: Path) -> None:
    file = load(write(tmp_path, content()))
    path = tmp_path / "new" / "directory" / "file.yaml"
    save(path, file)
    again = load(path)
    assert [e.shape.batch for e in again.entries] == [31, 1000]
    assert {e.key: e for e in again.entries} == {e.key: e for e in file.entries}
    assert (again.device, again.provenance) == (file.device, file.provenance)
    assert dump(again) == path.read_text() == dump(file)
    assert list(path.parent.iterdir()) == [path], "temporary files were left behind"


def test_readable(tmp_path: Path) -> None:
    text = dump(load(write(tmp_path, content())))
    assert "shape: {inputs: 64, outputs: 32, grids: 10, batch: 31}" in text
    assert text.startswith("schema: 1\ndevice: {name: A CPU,")


@given(
    median=st.floats(1e-3, 1e9),
    iqr=st.floats(0, 1e6),
    text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(lambda t: not unprintable(t)),
)
def test_any_number_and_name_survive(
    tmp_path_factory: pytest.TempPathFactory, median: float, iqr: float, text: str
) -> None:
    value = changed(entries__0__time_us={"median": median, "iqr": iqr}, device__name=text)
    file = TuningFile.model_validate({**value, "entries": tuple(value["entries"])})
    path = tmp_path_factory.mktemp("survive") / "file.yaml"
    save(path, file)
    again = load(path)
    assert again.device.name == text
    assert again.entries[1].time_us.median == median
    assert again.entries[1].time_us.iqr == iqr


def test_what_cannot_be_written_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = load(write(tmp_path, content()))
    path = tmp_path / "target.yaml"
    path.write_text("before")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save(path, file)
    assert path.read_text() == "before"
    assert {p.name for p in tmp_path.iterdir()} == {"target.yaml", "some_cpu.yaml"}


WRONG: list[tuple[dict[str, object], list[str]]] = [
    ({"schema": 2}, ["schema", "1", "(got 2)"]),
    ({"device__name": 7}, ["device.name", "string", "(got 7)"]),
    ({"device__colour": "red"}, ["device.colour", "unknown key", "'red'"]),
    ({"device__multiprocessors": "8"}, ["device.multiprocessors", "integer", "'8'"]),
    ({"provenance__date": "today"}, ["provenance.date", "date", "'today'"]),
    ({"entries__1__operation": "sideways"}, ["entry 1", "operation", "'forward'", "'sideways'"]),
    ({"entries__1__shape__inputs": 0}, ["entry 1 (forward 0,32,10,31)", "shape", "at least 1", "0"]),
    ({"entries__1__shape__grids": 2}, ["entry 1", "grids", "at least 3", "2"]),
    ({"entries__0__shape__batch": 0}, ["entry 0", "shape.batch", "(got 0)"]),
    ({"entries__0__shape__batch": True}, ["entry 0", "shape.batch", "integer", "True"]),
    ({"entries__0__dtypes__table": "float64"}, ["entry 0", "dtypes.table", "'float32'", "'float64'"]),
    ({"entries__0__family": "no such"}, ["entry 0", "family", "match pattern", "'no such'"]),
    ({"entries__0__family": 5}, ["entry 0", "family", "string", "(got 5)"]),
    ({f"entries__0__parameters__{next(iter(PARAMETERS))}": "16; }"}, ["entry 0", "'16; }'", "pattern"]),
    ({"entries__0__parameters__a [b]": 3}, ["entry 0", "parameters.'a [b]'", "pattern"]),
    ({"surprise[red]": 3}, ["'surprise[red]': unknown key"]),
    ({"device__arch": "sm_x"}, ["device.arch", "pattern", "'sm_x'"]),
    ({"device__arch": "sm_99999"}, ["device.arch", "pattern"]),
    ({"device__arch": "z80"}, ["device.arch", "pattern", "'z80'"]),
    ({"device__name": "a" * 201}, ["device.name", "200 characters"]),
    ({"device__multiprocessors": 10**18}, ["device.multiprocessors", "65536", "1000000000000000000"]),
    ({"device__shared_memory_per_block": 2**40}, ["device.shared_memory_per_block", "less than or equal"]),
    ({"entries__1__shape__inputs": 10**9}, ["entry 1", "shape.inputs", "less than or equal"]),
    ({"entries__1__shape__outputs": 10**9}, ["entry 1", "shape.outputs", "less than or equal"]),
    ({"entries__1__shape__grids": 10**6}, ["entry 1", "shape.grids", "less than or equal"]),
    ({"entries__1__shape__batch": 10**15}, ["entry 1", "shape.batch", "less than or equal"]),
    ({"entries__1__time_us__median": 1e300}, ["entry 1", "time_us.median", "less than or equal"]),
    ({f"entries__0__parameters__{next(iter(PARAMETERS))}": 16.0}, ["entry 0", "parameters", "integer"]),
    ({"entries__0__time_us__median": 0}, ["entry 0", "time_us.median", "greater than 0", "(got 0)"]),
    ({"entries__0__time_us__median": float("nan")}, ["entry 0", "time_us.median", "finite", "nan"]),
    ({"entries__0__time_us__iqr": "fast"}, ["entry 0", "time_us.iqr", "number", "'fast'"]),
    ({"entries__0__search__tried": -1}, ["entry 0", "search.tried", "(got -1)"]),
    ({"entries__0__search__rejected__compile": 0.5}, ["entry 0", "search.rejected.compile", "integer"]),
    ({"entries__0__shape__batch": 31}, ["entries 0 and 1", "forward 64,32,10,31"]),
    ({"device__arch": "sm_90"}, ["entry 0", "row_vector", "is for cpu", "cuda"]),
    ({"entries": {}}, ["entries", "a valid list"]),
    ({"entries__0": "forward"}, ["entry 0"]),
]


@pytest.mark.parametrize(("change", "words"), WRONG, ids=lambda v: "".join(v) if isinstance(v, dict) else "")
def test_wrong_content_is_refused_by_name(
    tmp_path: Path, change: dict[str, object], words: list[str]
) -> None:
    path = write(tmp_path, changed(**change))
    with pytest.raises(TuningFileError) as caught:
        load(path)
    message = str(caught.value)
    for word in [str(path), *words]:
        assert word in message


@pytest.mark.parametrize("key", ["schema", "device", "provenance", "entries"])
def test_missing_key(tmp_path: Path, key: str) -> None:
    value = content()
    del value[key]
    with pytest.raises(TuningFileError, match=f"{key}: is missing"):
        load(write(tmp_path, value))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("entries: [", "malformed YAML"),
        ("", "must hold a mapping"),
        ("- 1\n- 2\n", "must hold a mapping"),
        ("schema: !!python/object/apply:os.system ['true']\n", "tags are not read"),
        ("schema: 1\nschema: 1\n", "line 2: the key 'schema' occurs twice"),
        ("device: {arch: a, arch: b}\n", "line 1: the key 'arch' occurs twice"),
        ("a: &x 1\nb: *x\n", "line 1: anchors and aliases"),
        ("[" * 100_000, "nested more than 16 levels"),
        ("a: " + "9" * 5000, "line 1: a text of 5000 characters"),
        ("a: " + "9" * 900, "a number beyond 64 bits"),
        ("a: 0x" + "f" * 900, "a number beyond 64 bits"),
        ("a: " + "1:" * 400 + "1.5", "line 1: '1:1:.* too large"),
        ("a: 2026-02-30", "line 1: '2026-02-30'"),
        ("1: 2", "a key must be text, got 1"),
        ("a: 1\n---\na: 1\n", "line 3: there must be one document"),
    ],
)
def test_not_a_tuning_file(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(TuningFileError, match=words):
        load(write(tmp_path, text))


def test_unreadable(tmp_path: Path) -> None:
    with pytest.raises(TuningFileError, match="cannot be read"):
        load(tmp_path / "missing.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TuningFileError, match="cannot be read"):
        load(binary)


FOREIGN: list[tuple[dict[str, object], list[str]]] = [
    ({"family": "no_such"}, ["unknown kernel family 'no_such'", "row_vector"]),
    ({"operation": "backward"}, ["row_vector", "does not compute", "backward"]),
    (
        {"dtypes": {"table": "int8", "input": "float32"}, "operation": "grad_table"},
        ["row_vector", "not with int8"],
    ),
    ({"parameters": {}}, ["missing", next(iter(PARAMETERS))]),
    ({"parameters": {**PARAMETERS, "volume": 11}}, ["unknown parameter", "'volume'", *PARAMETERS]),
    ({"parameters": {**PARAMETERS, next(iter(PARAMETERS)): 12345}}, ["12345", "must be one of"]),
]


@pytest.mark.parametrize(
    ("change", "words"), FOREIGN, ids=lambda v: "".join(v) if isinstance(v, dict) else ""
)
def test_entries_of_another_version_are_passed_over_and_kept(
    tmp_path: Path, change: dict[str, object], words: list[str]
) -> None:
    value = content()
    value["entries"][0].update(change)
    file = load(write(tmp_path, value))
    assert [e.shape.batch for e in file.entries] == [31]
    (skipped,) = file.skipped
    for word in words:
        assert word in (skipped.misfit or "")
    path = tmp_path / "again.yaml"
    save(path, merge(file, load(write(tmp_path, content())).model_copy(update={"entries": file.entries})))
    again = load(path)
    assert again.skipped == file.skipped, "what another version wrote is lost"
    assert again.entries == file.entries
    # a new answer to the same question replaces it
    answer = file.entries[0].model_copy(
        update={"operation": skipped.operation, "shape": skipped.shape, "dtypes": skipped.dtypes}
    )
    assert merge(file, file.model_copy(update={"entries": (answer,)}).skipping([])).skipped == ()


@pytest.mark.parametrize("value", ["\\e[31mred", "a\\nb", "\\u202eabc", "\\x9b"])
@pytest.mark.parametrize(
    "where", ["name: A CPU", "compiler: gcc 12", "torch: 2.13.0", "compile: 0", "inputs"]
)
def test_control_characters_are_refused_everywhere(tmp_path: Path, value: str, where: str) -> None:
    key, colon, _ = where.partition(": ")
    text = yaml.safe_dump(content(), sort_keys=False)
    assert where in text
    path = write(tmp_path, text.replace(where, f'{key}: "{value}"' if colon else f'"{value}"', 1))
    with pytest.raises(TuningFileError, match="control characters") as caught:
        load(path)
    assert not unprintable(str(caught.value))


def test_what_is_no_small_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    large = tmp_path / "large.yaml"
    with large.open("wb") as stream:
        stream.truncate(3 << 20)
    for path, words in (
        (pipe, "no regular file"),
        (Path("/dev/zero"), "no regular file"),
        (tmp_path, "cannot be read"),
        (large, "larger than 2 MiB"),
    ):
        with pytest.raises(TuningFileError, match=words) as caught:
            load(path)
        assert str(path) in str(caught.value)


@pytest.mark.skipif(not yaml.__with_libyaml__, reason="PyYAML was built without libyaml")
def test_a_large_file_loads_in_a_second(tmp_path: Path) -> None:
    head, _, entries = dump(load(write(tmp_path, content()))).partition("entries:\n")
    first, _, _ = entries.removeprefix("- ").partition("\n- ")
    many = (f"- {first}\n".replace("batch: 31}", f"batch: {batch}}}") for batch in range(1, 3300))
    path = write(tmp_path, f"{head}entries:\n{''.join(many)}")
    assert path.stat().st_size > 1 << 20
    start = time.process_time()
    assert len(load(path).entries) == 3299
    assert time.process_time() - start < 1.0


def test_a_file_does_not_grow_until_it_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, content())
    file = load(path)
    with monkeypatch.context() as patch:
        patch.setattr("lmkan_gen.tuning_file._MOST_BYTES", path.stat().st_size // 2)
        with pytest.raises(TuningFileError, match="would be larger than"):
            save(path, file)
    assert load(path) == file


@pytest.mark.skipif(not yaml.__with_libyaml__, reason="PyYAML was built without libyaml")
def test_shipped_files_do_not_hold_up_a_first_call() -> None:
    paths = list(resource_directory("tuning").glob("*.yaml"))
    start = time.process_time()
    for path in paths:
        load(path)
    assert time.process_time() - start < 0.1  # 20 ms on a quiet machine


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_whatever_a_file_holds_there_is_one_error(
    tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    """Any value in any place of a valid file, as YAML or as it comes."""
    odd = st.one_of(
        st.none(), st.booleans(), st.integers(), st.integers(10**30, 10**40), st.floats(),
        st.text(max_size=30), st.lists(st.integers(), max_size=2),
        st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
        st.sampled_from(["[" * 5000, "{a: " * 100, "9" * 5000, "&a [*a]", "!!set {}", "1:" * 300 + "1.5"]),
    )  # fmt: skip
    value = content()
    place: Any = value
    while True:
        key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else list(range(len(place)))))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = "PLACE"
    drawn = data.draw(odd)
    raw = data.draw(st.booleans()) and isinstance(drawn, str)
    text = drawn if raw else yaml.safe_dump(drawn, default_flow_style=True).removesuffix("...\n").strip()
    path = tmp_path_factory.getbasetemp() / "odd.yaml"
    path.write_text(yaml.safe_dump(value, sort_keys=False).replace("PLACE", text), errors="replace")
    try:
        assert dump(load(path))
    except TuningFileError as error:
        assert str(path) in str(error)  # noqa: PT017


def test_merge_replaces_equal_keys_only(tmp_path: Path) -> None:
    old = load(write(tmp_path, content()))
    value = changed(entries__0__time_us__median=1.0, provenance__torch="2.14.0")
    value["entries"][1]["shape"]["batch"] = 77
    new = load(write(tmp_path, value))
    merged = merge(old, new)
    assert {e.shape.batch: e.time_us.median for e in merged.entries} == {1000: 1.0, 31: 10.5, 77: 10.5}
    assert merged.provenance.torch == "2.14.0"


def test_merge_keeps_what_is_not_to_be_replaced(tmp_path: Path) -> None:
    old = load(write(tmp_path, content()))
    new = load(write(tmp_path, changed(entries__0__time_us__median=1.0)))
    slower = merge(old, new, lambda there, coming: there.time_us.median > coming.time_us.median)
    assert {e.shape.batch: e.time_us.median for e in slower.entries} == {1000: 10.5, 31: 10.5}


def _add(path: Path, batches: range) -> None:
    file = load(path)
    for batch in batches:
        shape = ShapeRecord(inputs=64, outputs=32, grids=10, batch=batch)
        entry = file.entries[0].model_copy(update={"shape": shape})
        update(path, file.model_copy(update={"entries": (entry,)}))


def test_several_processes_add_to_one_file(tmp_path: Path) -> None:
    path = write(tmp_path, content())
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_add, args=(path, range(start, start + 6))) for start in (2000, 3000, 4000)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    expected = {31, 1000, *range(2000, 2006), *range(3000, 3006), *range(4000, 4006)}
    assert {e.shape.batch for e in load(path).entries} == expected
    assert [p.name for p in tmp_path.glob("*.yaml")] == [path.name]


def test_a_file_that_another_process_keeps_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, content())
    monkeypatch.setattr("lmkan_gen.tuning_file._LOCK_S", 0.1)
    with FileLock(tmp_path / f".{path.name}.lock"), pytest.raises(OSError, match=r"some_cpu.*--resume"):
        update(path, load(path))


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(self: FileLock) -> None:
        raise OSError("No locks available")

    path = write(tmp_path, content())
    monkeypatch.setattr(FileLock, "acquire", no_locks)
    with pytest.warns(UserWarning, match=r"some_cpu\.yaml cannot be locked \(No locks available\)"):
        update(path, load(write(tmp_path, changed(entries__0__time_us__median=1.0))))
    assert min(e.time_us.median for e in load(path).entries) == 1.0


def test_merge_refuses_another_device(tmp_path: Path) -> None:
    old = load(write(tmp_path, content()))
    new = load(write(tmp_path, changed(device__name="Another CPU")))
    with pytest.raises(TuningFileError, match=r"Another CPU.*A CPU"):
        merge(old, new)


def test_shipped_files_are_valid() -> None:
    for path in sorted(resource_directory("tuning").glob("*")):
        if path.name == SCHEMA_FILE:
            continue
        assert path.suffix == ".yaml"
        file = load(path)
        assert file.entries, path
        assert [record.misfit for record in file.skipped] == []


@pytest.mark.parametrize("name", sorted(p.name for p in resource_directory("tuning").glob("*.yaml")))
def test_what_ships_fits_its_device(name: str) -> None:
    """An entry that a family refuses would never be used."""
    file = load(resource_directory("tuning") / name)
    chip = target("sm_90") if file.device.kind == "cuda" else devices.cpu()
    refused = [
        (entry.key, violations)
        for entry in file.entries
        if (
            violations := family(entry.family).violations(
                Problem.usual(entry.operation, entry.shape.layer, chip, entry.dtypes.table), entry.parameters
            )
        )
    ]
    assert refused == []
