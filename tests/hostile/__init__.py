"""Hostile files: one small maker for each trick, named for it; `CORPUS` has them all.

A trick is a function without arguments that yields attacks: the bytes of a file, or a function that lays something out
in a folder, and what zipslicer may make of it. `victim.py` tries each in a process of its own.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import makers
from makers import Pickle

TRAP = "zipslicer_trap"  # a module that files name and nobody may import; on the victim's path lies one that tells
PWNED = "ZS_PWNED"  # the folder that hostile files try to make

ARCHIVE, PROGRAM, TABLE, UNSUPPORTED = "ArchiveError", "ProgramError", "TableError", "UnsupportedError"
INERT = "inert"  # it opened, and holds no tensor
DESCRIBED = "described"  # of a tensor that is too large to be looked at: its facts came, and its first element
RIGHT = "right"  # a tensor came, with the elements that `holds` says

Content = bytes | Callable[[Path], Path]


@dataclasses.dataclass(frozen=True)
class Attack:
    """One file.

    Attributes:
        tag: what sets it apart from the others of its trick.
        content: its bytes; or a function of an empty folder, which lays it out there and returns its path.
        wanted: what may come of it: the class of the error at opening or at the touch of a tensor, INERT, DESCRIBED or
            RIGHT. `outcomes.json` has what does.
        holds: the tensors that are RIGHT, as nested lists.
    """

    tag: str
    content: Content
    wanted: frozenset[str]
    holds: Mapping[str, Any]
    unpacks: bool = False  # what is compressed as a whole goes to a temporary file


CORPUS: dict[str, Callable[[], Iterable[Attack]]] = {}


def trick(make: Callable[[], Iterable[Attack]]) -> Callable[[], Iterable[Attack]]:
    """Put a maker into CORPUS, under its own name."""
    name = f"{make.__module__.rpartition('.')[2]}.{make.__name__}"
    assert name not in CORPUS, name
    CORPUS[name] = make
    return make


def attack(
    tag: object, content: Content, *wanted: str, holds: Mapping[str, Any] | None = None, unpacks: bool = False
) -> Attack:
    """By default `holds` is FOUR_FLOATS under "w" where RIGHT is wanted."""
    if holds is None:
        holds = {"w": NUMBERS} if RIGHT in wanted else {}
    return Attack(str(tag), content, frozenset(wanted), holds, unpacks)


# --- what most of them bend ---

NUMBERS = [1.0, 2.0, 3.0, 4.0]
FOUR_FLOATS = struct.pack("<4f", *NUMBERS)


def w(**bent: Any) -> Callable[[Pickle], object]:
    """Writes the tensor of FOUR_FLOATS, but for the keywords of `Pickle.tensor`."""
    right: dict[str, Any] = {"cls": "FloatStorage", "key": "0", "numel": 4, "size": [4], "stride": [1]}
    return lambda pickle: pickle.tensor(**{**right, **bent})


def raw(content: bytes) -> Callable[[Pickle], object]:
    """Writes these opcodes."""
    return lambda pickle: pickle.raw(content)


def program(**items: Callable[[Pickle], object]) -> bytes:
    """A pickle of a dict; without arguments that of FOUR_FLOATS under "w"."""
    return Pickle().dict(items or {"w": w()}).stop()


def checkpoint(pickle: bytes, **storages: bytes) -> bytes:
    """An archive of a pickle, beside the storage "0" of FOUR_FLOATS."""
    return makers.checkpoint(pickle, {"0": FOUR_FLOATS, **storages}).data


def beside(write: Callable[[Pickle], object]) -> bytes:
    """An archive of a dict in which stands what is written, under "x", beside a good tensor under "w"."""
    return checkpoint(program(w=w(), x=write))
