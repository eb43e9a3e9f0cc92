"""What can be opened, of each kind, with the same bytes in it."""

from __future__ import annotations

import gzip
import io
import mmap
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONTENT = bytes(range(256)) * 16


class OnlyRead:
    """A file object without readinto."""

    def __init__(self, content: bytes) -> None:
        self._file = io.BytesIO(content)

    def seek(self, *where: int) -> int:
        return self._file.seek(*where)

    def read(self, nbytes: int) -> bytes:
        return self._file.read(nbytes)


class Stream(io.RawIOBase):
    """What comes out of a pipe or a socket: read from front to back, in pieces of any size."""

    def __init__(self, content: bytes) -> None:
        self._file = io.BytesIO(content)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._file.readinto(memoryview(buffer)[:777])


class NoSeek:
    """The least that can be read: an object with read() alone."""

    def __init__(self, content: bytes) -> None:
        self._file = io.BytesIO(content)

    def read(self, nbytes: int) -> bytes:
        return self._file.read(nbytes)


def mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def packed(path: Path) -> Path:
    made = path.with_suffix(".gz")
    made.write_bytes(gzip.compress(CONTENT[:1000]) + gzip.compress(CONTENT[1000:]) + bytes(512))  # two members, padded
    return made


def temporary(path: Path) -> Any:
    made = tempfile.NamedTemporaryFile()  # noqa: SIM115
    made.write(CONTENT)
    made.seek(0)
    return made


def spooled(path: Path) -> Any:
    made = tempfile.SpooledTemporaryFile(max_size=1 << 20)  # noqa: SIM115
    made.write(CONTENT)
    made.seek(0)
    return made


KINDS: dict[str, Callable[[Path], Any]] = {
    "str": str,
    "path": lambda path: path,
    "bytes": lambda path: CONTENT,
    "bytearray": lambda path: bytearray(CONTENT),
    "memoryview": lambda path: memoryview(CONTENT).cast("I"),
    "mmap": mapped,
    "BytesIO": lambda path: io.BytesIO(CONTENT),
    "OnlyRead": lambda path: OnlyRead(CONTENT),
    "open": lambda path: path.open("rb"),
    "open for writing": lambda path: path.open("r+b"),
    "raw": lambda path: path.open("rb", buffering=0),
    "temporary": temporary,
    "spooled": spooled,
    "stream": lambda path: Stream(CONTENT),
    "buffered stream": lambda path: io.BufferedReader(Stream(CONTENT)),
    "no seek": lambda path: NoSeek(CONTENT),
    "gzip path": packed,
    "gzip bytes": lambda path: packed(path).read_bytes(),
    "gzip open": lambda path: packed(path).open("rb"),
    "gzip BytesIO": lambda path: io.BytesIO(packed(path).read_bytes()),
    "gzip stream": lambda path: Stream(packed(path).read_bytes()),
    "GzipFile": lambda path: gzip.open(packed(path)),  # noqa: SIM115
}
