"""Tables on terminals of any width."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lmkan_gen.sheet import Column, Sheet

PATH = "/a/path/" + "that is long/" * 6 + "kernel.yaml"


def printed(sheet: Sheet, width: int) -> str:
    stream = io.StringIO()
    sheet.print(Console(file=stream, width=width))
    return stream.getvalue()


def sheet(*rows: tuple[str, ...]) -> Sheet:
    made = Sheet([Column("name"), Column("words", words=True), Column("size", number=True)], "a title")
    for row in rows:
        made.add(*row)
    return made


def test_a_table_where_it_fits() -> None:
    text = printed(sheet(("short", "a few words", "7"), ("x", "", "1234")), 60)
    assert text.startswith("a title\n")
    assert "│ short │ a few words │    7 │" in text
    assert "│ x     │             │ 1234 │" in text


def test_words_are_broken_before_columns_are_lost() -> None:
    text = printed(sheet(("short", "many words " * 9, "7")), 60)
    assert "│ short │" in text
    assert text.count("many words") >= 2
    assert max(map(len, text.splitlines())) <= 60


@pytest.mark.parametrize("width", [20, 60, 80])
def test_records_where_it_does_not(width: int) -> None:
    text = printed(sheet((PATH, "family\nwith settings", "7"), ("[red]x[/]", "two", "8")), width)
    assert text == (
        f"a title\nname: {PATH}\nwords: family with settings\nsize: 7\n\n"
        "name: [red]x[/]\nwords: two\nsize: 8\n"
    )


def test_a_title_is_never_broken() -> None:
    made = Sheet([Column("a")], PATH)
    made.add("1")
    assert PATH in printed(made, 30)
