"""Notebook: a mapping in, a collapsible tree of HTML out, by the dots in its keys and by what is nested in it.

For Jupyter and its like. No script and no style sheet: `<details>` opens and closes by itself. All
text of the file is escaped, and how much of it is shown is bounded.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from .errors import ZipSlicerError, printable
from .lazy import Lazy, size_text, summary
from .table import TensorInfo

__all__ = ["tree"]

LEAVES = 2000  # lines of the whole tree
OPENED = 12  # children at most of a level that is open from the start
DEEPEST = 20  # levels, of which a file does not decide: what makes them, and shows them, recurses
NAME = 200  # characters

# A name, with 0 for a level of dotted keys, or a number of its own -> what is there.
Branch = dict[tuple[str, int], Any]


def tree(mapping: Lazy, title: str) -> str:
    """HTML of a mapping, with the title above it."""
    left = [LEAVES]
    root = _branch(mapping, left, DEEPEST)
    _, _, lines = _shown(root, "", 0)
    more = "" if left[0] >= 0 else f"<p>... more than {LEAVES:,} lines</p>"
    style = "font-family:monospace;font-size:90%;line-height:1.4"
    return f"<div style='{style}'><p>{_text(title)}</p>{''.join(lines)}{more}</div>"


def _branch(value: Any, left: list[int], depth: int) -> Branch:
    """What is in a container, each dotted key at its place; until there is no room left."""
    made: Branch = {}
    keys = value if isinstance(value, Mapping) else range(len(value))
    for key in keys:
        left[0] -= 1
        if left[0] < 0:
            break
        place, names = made, str(key).split(".", depth)
        for name in names[:-1]:
            place = place.setdefault((name, 0), {})
        place[names[-1], len(place) + 1] = _leaf(value, key, left, depth - len(names))
    return made


def _leaf(value: Any, key: Any, left: list[int], depth: int) -> Any:
    try:
        info = value.get_meta(key)
        if info is not None:
            return info
        child = value[key]
    except ZipSlicerError as error:
        return type(error).__name__, summary(str(error))
    if isinstance(child, Lazy) and depth > 0:
        return _branch(child, left, depth)
    return type(child).__name__, summary(child)


def _shown(value: Any, name: str, level: int) -> tuple[int, int, list[str]]:
    """-> (tensors, bytes, HTML) of a branch or leaf."""
    if isinstance(value, TensorInfo):
        facts = f"{value.dtype_name} {list(value.shape)}"
        if value.layout != "strided":
            facts += f" {value.layout}"
        return 1, value.nbytes, [_line(name, facts, size_text(value.nbytes))]
    if isinstance(value, tuple):
        return 0, 0, [_line(name, value[0], value[1])]
    count = nbytes = 0
    inside: list[str] = []
    for (inner, _), child in value.items():
        own_count, own_nbytes, lines = _shown(child, inner, level + 1)
        count, nbytes = count + own_count, nbytes + own_nbytes
        inside += lines
    if not level:
        return count, nbytes, inside
    is_open = " open" if level == 1 and len(value) <= OPENED else ""
    head = f"<b>{_text(name)}</b> <span style='opacity:.6'>{count:,} tensors, {size_text(nbytes)}</span>"
    body = f"<div style='margin-left:1.4em'>{''.join(inside)}</div>"
    return count, nbytes, [f"<details{is_open}><summary>{head}</summary>{body}</details>"]


def _line(name: str, facts: str, more: str) -> str:
    return f"<div>{_text(name)} <span style='opacity:.6'>{_text(facts)} &middot; {_text(more)}</span></div>"


def _text(text: str) -> str:
    return html.escape(printable(text if len(text) <= NAME else text[: NAME - 3] + "..."))
