"""Tables on a terminal that lose nothing where it is narrow: rows then become records, a line a column."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

#: columns of letters that a cell of words needs to be readable
_NARROWEST = 20


@dataclass(frozen=True)
class Column:
    """A column: what it is called, whether it holds numbers, whether its cells may be broken at spaces."""

    heading: str
    number: bool = False
    words: bool = False


class Sheet:
    """Rows of text under headings.

    Args:
        columns: at most one of them holds words; cells of the others stay in one line.
        title: a line above.
    """

    def __init__(self, columns: Iterable[Column], title: str = "") -> None:
        self._columns = tuple(columns)
        self._title = title
        self._rows: list[tuple[str, ...]] = []

    def add(self, *cells: str) -> None:
        """Add a row, a cell for each column; what is printed of it is text, without markup."""
        assert len(cells) == len(self._columns)
        self._rows.append(cells)

    def print(self, console: Console) -> None:
        """Print a table where the console is wide enough for it, records otherwise; no cell is ever cut."""
        if self._title:
            console.print(Text(self._title), soft_wrap=True)
        if self._width() <= console.width:
            console.print(self._table())
        else:
            console.print(Text("\n\n".join(map(self._record, self._rows))), soft_wrap=True)

    def _width(self) -> int:
        """Of a table that cuts nothing and breaks words' cells only."""
        width = 1  # a line, and one with two spaces for each column
        for i, c in enumerate(self._columns):
            cells = (c.heading, *(row[i] for row in self._rows))
            pieces = [piece for cell in cells for piece in cell.splitlines()]
            widest = max(map(cell_len, pieces), default=0)
            if c.words:
                longest = max((cell_len(word) for piece in pieces for word in piece.split()), default=0)
                widest = max(longest, min(widest, _NARROWEST))
            width += widest + 3
        return width

    def _table(self) -> Table:
        lines = any("\n" in cell for row in self._rows for cell in row)
        table = Table(show_lines=lines)
        for c in self._columns:
            table.add_column(
                Text(c.heading),
                justify="right" if c.number else "left",
                no_wrap=not c.words,
            )
        for row in self._rows:
            table.add_row(*map(Text, row))
        return table

    def _record(self, row: tuple[str, ...]) -> str:
        named = zip(self._columns, row, strict=True)
        return "\n".join(f"{c.heading}: {' '.join(cell.split())}" for c, cell in named)
