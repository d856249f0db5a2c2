"""Text from elsewhere: which characters it may have, and how it is shown."""

from __future__ import annotations

import re

#: control characters, line separators, and what changes the direction of writing, for regular expressions
UNPRINTABLE = r"\u0000-\u001f\u007f-\u009f\u2028\u2029\u202a-\u202e\u2066-\u2069"
_UNPRINTABLE = re.compile(f"[{UNPRINTABLE}]")
#: characters of a name or version that a tuning file holds
LONGEST = 200
_MOST_SHOWN = 100


def unprintable(text: str) -> bool:
    """Whether ``text`` has characters that could change what a terminal or a page shows around it."""
    return _UNPRINTABLE.search(text) is not None


def cleaned(text: str) -> str:
    """A name or version that somebody else made up, as a tuning file may hold it; never empty."""
    return re.sub(f"[{UNPRINTABLE}]+", " ", text).strip()[:LONGEST] or "unknown"


def printable(text: object) -> str:
    r"""``str(text)`` with such characters as escapes: ``\x1b``."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def quoted(value: object) -> str:
    """A foreign value for an error message: quoted if it is text, and cut where it is long."""
    text = printable(repr(value))
    return text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 3] + "..."


def counted(number: int, one: str, many: str) -> str:
    """``1 entry``, ``2 entries``."""
    return f"{number} {one if number == 1 else many}"
