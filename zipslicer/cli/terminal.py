"""What all commands share: exit statuses, and text that is fit for a terminal.

What `ls` can do without is imported when it is needed: it is to be there before one has let go of the key.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterable, Sequence

from ..errors import printable
from ..lazy import size_text as size

__all__ = [
    "FOUND",
    "GOOD",
    "INTERRUPTED",
    "REFUSED",
    "UNREADABLE",
    "WRONG_USE",
    "Say",
    "clipped",
    "fitted",
    "say",
    "silent",
    "size",
    "table",
    "wrapped",
]

GOOD, FOUND, WRONG_USE, REFUSED, UNREADABLE = range(5)
INTERRUPTED = 130  # as shells say it: 128 and the number of the signal

Say = Callable[[str], None]


def say(text: str) -> None:
    """Lines, printable whatever the file has in its names."""
    print(
        text if text.isascii() and text.replace("\n", "").isprintable() else "\n".join(map(printable, text.split("\n")))
    )


def silent(text: str) -> None:
    del text


def width() -> int | None:
    """Columns of the terminal; None where the output goes elsewhere, and nothing is cut."""
    if "COLUMNS" not in os.environ and not sys.stdout.isatty():
        return None
    import shutil

    return shutil.get_terminal_size().columns


def clipped(text: str, room: int) -> str:
    """Text in so many columns, without its middle where it is longer."""
    if len(text) <= room or room < 5:
        return text
    left = (room - 3) // 2
    return f"{text[:left]}...{text[len(text) - (room - 3 - left) :]}"


def fitted(name: str, facts: str) -> str:
    """A name and what is said of it: in one line, or where the terminal is too narrow for that in two."""
    columns = width()
    if columns is None or len(name) + 2 + len(facts) <= columns:
        return f"{name}  {facts}"
    return f"{clipped(name, columns)}\n    {facts}"


def wrapped(text: str) -> str:
    """A sentence, set in from the left, in lines of 80 columns at most."""
    import textwrap

    return textwrap.fill(text, 79, initial_indent="  ", subsequent_indent="    ", break_long_words=False)


def table(rows: Iterable[Sequence[str]], align: str) -> str:
    """Rows in columns; `align` has "<" or ">" for each. The first one is cut where the terminal is too narrow."""
    cells = [list(row) for row in rows]
    if not all(map(str.isprintable, itertools.chain.from_iterable(cells))):
        cells = [list(map(printable, row)) for row in cells]
    widths = [max(map(len, column)) for column in zip(*cells)]
    columns = width()
    if columns is not None and widths:
        room = columns - sum(widths[1:]) - 2 * (len(widths) - 1)
        if room < widths[0]:
            widths[0] = max(room, 5)
            for row in cells:
                row[0] = clipped(row[0], widths[0])
    form = "  ".join(f"{{:{side}{n}}}" for side, n in zip(align, widths))
    return "\n".join([form.format(*row).rstrip() for row in cells])
