"""Errors: who is to blame, and at which byte.

    ZipSlicerError
        CheckpointError(ValueError)             the file is wrong
            ArchiveError                        truncated, overlapping, header disagrees with directory
            ProgramError                        bad opcode, limit passed, stack underflow
            TableError                          a row reaches outside its storage
            ChangedError                        the file is not the one that was opened
        UnsupportedError(NotImplementedError)   the file is right, we cannot read it yet
        UnsafeError                             unknown="error", and policy does not know a global

The caller's own mistakes stay builtin: KeyError, IndexError, TypeError, ValueError. The system's stay OSError.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = [
    "ArchiveError",
    "ChangedError",
    "CheckpointError",
    "ProgramError",
    "TableError",
    "UnsafeError",
    "UnsupportedError",
    "ZipSlicerError",
]

MAX_MESSAGE = 1024  # characters; names out of the file are quoted in messages, and a log line is not a place for 64 KiB


class ZipSlicerError(Exception):
    """Whatever zipslicer itself raises.

    Attributes:
        offset: the byte the error is about, or None. For ProgramError and TableError it counts from the first byte of
            the record that holds the pickle (``record``), where there is one; else from the first byte of the file.
        path: the file, once a floor that knows it has passed the error on.
        record: the name of the archive record the error is about.
        key: the key of the tensor that was asked for.
    """

    def __init__(
        self,
        message: str,
        *,
        offset: int | None = None,
        path: str | None = None,
        record: str | None = None,
        key: Any = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.offset = offset
        self.path = path
        self.record = record
        self.key = key

    def located(self, *, path: str | None = None, record: str | None = None, key: Any = None) -> ZipSlicerError:
        """Say where, for each of the three that is not yet known; returns the error itself, to be raised again."""
        if self.path is None:
            self.path = path
        if self.record is None:
            self.record = record
        if self.key is None:
            self.key = key
        return self

    def __str__(self) -> str:
        where = []
        if self.key is not None:
            where.append(f"key {self.key!r}")
        if self.offset is not None:
            where.append(f"byte {self.offset}" + (f" of record {self.record!r}" if self.record is not None else ""))
        elif self.record is not None:
            where.append(f"record {self.record!r}")
        if self.path is not None:
            where.append(f"file {self.path!r}")
        text = self.message + (f" ({', '.join(where)})" if where else "")
        # Names out of the file may hold terminal escapes, newlines or lone surrogates: none of them reaches a log.
        text = printable(text)
        return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 3] + "..."

    def __reduce__(self) -> tuple[Any, ...]:
        # The default would call cls(*args) and lose the keyword attributes on the way out of a worker.
        return (_rebuild, (type(self), self.message, self.__dict__.copy()))


def printable(text: str) -> str:
    """Text out of a file, for a terminal or a log: what is no sign is spelled out."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def some(names: Iterable[Any], count: int = 5) -> str:
    """Names for a message, cut."""
    listed = [printable(str(name)[:200]) for name in names]
    return ", ".join(listed[:count]) + (f" and {len(listed) - count} more" if len(listed) > count else "")


def _rebuild(cls: type[ZipSlicerError], message: str, state: dict[str, Any]) -> ZipSlicerError:
    error = cls(message)
    error.__dict__.update(state)
    return error


class CheckpointError(ZipSlicerError, ValueError):
    """The file is wrong: damaged, contradictory or hostile."""


class ArchiveError(CheckpointError):
    """The container is wrong: truncated, overlapping records, a local header that disagrees with the directory."""


class ProgramError(CheckpointError):
    """The pickle is wrong: a bad opcode, a stack underflow, a call of a known function with wrong arguments, a limit."""


class TableError(CheckpointError):
    """A tensor reaches outside its storage, or a storage outside its record."""


class ChangedError(CheckpointError):
    """The file is no longer the one that was opened: shorter, rewritten, or replaced."""


class UnsupportedError(ZipSlicerError, NotImplementedError):
    """The file is right, and zipslicer cannot read this in it yet."""


class UnsafeError(ZipSlicerError):
    """``unknown="error"`` was asked for, and the file names a global that policy does not know.

    Attributes:
        global_name: the dotted name, ``"os.system"``.
    """

    def __init__(self, message: str, *, global_name: str = "", **where: Any) -> None:
        super().__init__(message, **where)
        self.global_name = global_name
