"""Errors: their classes, what they print, and that they survive a process boundary."""

from __future__ import annotations

import copy
import pickle

import pytest

from zipslicer import errors
from zipslicer.errors import (
    ArchiveError,
    ChangedError,
    CheckpointError,
    ProgramError,
    TableError,
    UnsafeError,
    UnsupportedError,
    ZipSlicerError,
)


@pytest.mark.parametrize("name", errors.__all__)
def test_all_are_zipslicer_errors(name: str) -> None:
    assert issubclass(getattr(errors, name), ZipSlicerError)


@pytest.mark.parametrize("cls", [ArchiveError, ProgramError, TableError, ChangedError])
def test_a_wrong_file_is_a_value_error(cls: type[ZipSlicerError]) -> None:
    assert issubclass(cls, CheckpointError)
    assert issubclass(cls, ValueError)


def test_what_is_not_the_files_fault_is_no_value_error() -> None:
    assert issubclass(UnsupportedError, NotImplementedError)
    assert not issubclass(UnsupportedError, CheckpointError)
    assert not issubclass(UnsafeError, CheckpointError)


def test_the_message_says_where() -> None:
    error = ArchiveError("it is short", offset=64, path="a.pt", record="a/data/0", key="w")
    assert str(error) == "it is short (key 'w', byte 64 of record 'a/data/0', file 'a.pt')"


def test_without_a_place_there_is_only_the_message() -> None:
    assert str(ArchiveError("it is short")) == "it is short"


def test_located_fills_in_what_is_unknown_and_keeps_the_rest() -> None:
    error = ArchiveError("x", path="a.pt")
    assert error.located(path="b.pt", record="r", key="k") is error
    assert (error.path, error.record, error.key) == ("a.pt", "r", "k")


def test_a_message_is_bounded() -> None:
    assert len(str(ArchiveError("x" * 100_000, key="k" * 100_000))) <= errors.MAX_MESSAGE


@pytest.mark.parametrize("evil", ["\x1b[31m", "\n", "\r", "\x00", "\ud800", "\u202e", "\x9b"])
def test_a_message_is_printable(evil: str) -> None:
    error = ArchiveError(f"record {evil} is wrong", key=evil, path=evil, record=evil)
    assert str(error).isprintable()
    str(error).encode()


@pytest.mark.parametrize("again", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy, copy.deepcopy])
def test_errors_keep_their_attributes(again: object) -> None:
    error = UnsafeError("no", global_name="os.system", offset=3, path="a.pt", record="r", key=("k", 1))
    made = again(error)  # type: ignore[operator]
    assert type(made) is UnsafeError
    assert vars(made) == vars(error)
    assert str(made) == str(error)
