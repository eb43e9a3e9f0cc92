"""Source: what can be opened, and what a source does when it is closed, short or shared."""

from __future__ import annotations

import io
import os
import threading
from pathlib import Path
from typing import Any

import pytest

import zipslicer
from zipslicer.backend import choose
from zipslicer.errors import ChangedError
from zipslicer.source import LocalFile, open_source, read_at

CONTENT = bytes(range(256)) * 16


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "a.bin"
    made.write_bytes(CONTENT)
    return made


class OnlyRead:
    """A file object without readinto."""

    def __init__(self, content: bytes) -> None:
        self._file = io.BytesIO(content)

    def seek(self, *where: int) -> int:
        return self._file.seek(*where)

    def read(self, nbytes: int) -> bytes:
        return self._file.read(nbytes)


def sources(path: Path) -> list[Any]:
    return [str(path), path, CONTENT, bytearray(CONTENT), memoryview(CONTENT), io.BytesIO(CONTENT), OnlyRead(CONTENT)]


@pytest.mark.parametrize("which", range(7))
def test_every_kind_of_source_reads_the_same(path: Path, which: int) -> None:
    source = open_source(sources(path)[which])
    assert source.size == len(CONTENT)
    for start, nbytes in ((0, 10), (1000, 1), (4000, 96), (0, len(CONTENT)), (17, 0)):
        assert read_at(choose(), source, start, nbytes) == CONTENT[start : start + nbytes]
    source.close()


@pytest.mark.parametrize("which", range(7))
def test_a_closed_source_raises(path: Path, which: int) -> None:
    source = open_source(sources(path)[which])
    source.close()
    source.close()
    with pytest.raises(ValueError, match="closed"):
        read_at(choose(), source, 0, 1)


@pytest.mark.parametrize("which", range(7))
def test_a_read_past_the_end_is_no_short_read(path: Path, which: int) -> None:
    source = open_source(sources(path)[which])
    with pytest.raises(ChangedError) as caught:
        read_at(choose(), source, len(CONTENT) - 1, 2)
    assert caught.value.offset == len(CONTENT)
    source.close()


def test_a_file_object_stays_open(path: Path) -> None:
    with path.open("rb") as file:
        open_source(file).close()
        assert not file.closed


def test_a_path_is_remembered(path: Path) -> None:
    source = open_source(path)
    assert source.path == str(path)
    source.close()
    assert open_source(CONTENT).path is None


def test_the_descriptor_is_not_inherited(path: Path) -> None:
    source = LocalFile(path)
    assert isinstance(source.handle, int)
    assert not os.get_inheritable(source.handle)
    source.close()


def test_the_descriptor_goes_with_the_source(path: Path) -> None:
    source = LocalFile(path)
    fd = source.handle
    assert isinstance(fd, int)
    del source
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.mark.parametrize("bad", [3, None, 1.5, ["a.pt"], object()])
def test_what_is_no_source_is_a_type_error(bad: object) -> None:
    with pytest.raises(TypeError, match="path, bytes or a binary file object"):
        open_source(bad)


def test_missing_files_and_folders_are_the_systems_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        zipslicer.load(tmp_path / "none.pt")
    with pytest.raises(IsADirectoryError):
        zipslicer.load(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_fifo_is_refused_and_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="no regular file"):
        zipslicer.load(tmp_path / "fifo")


@pytest.mark.parametrize("which", range(7))
def test_threads_share_a_source(path: Path, which: int) -> None:
    source, backend = open_source(sources(path)[which]), choose()
    wrong: list[int] = []

    def work(seed: int) -> None:
        for i in range(200):
            start = (seed * 997 + i * 61) % 4000
            if read_at(backend, source, start, 50) != CONTENT[start : start + 50]:
                wrong.append(start)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    source.close()


def test_a_positioned_reader_fills_buffers_in_order(path: Path) -> None:
    """What stands in for preadv on Windows and WASM."""
    source = LocalFile(path)
    buffers = [memoryview(bytearray(n)) for n in (3, 0, 5)]
    assert source.preadv(buffers, 10) == 8
    assert b"".join(buffers) == CONTENT[10:18]
    assert source.preadv([memoryview(bytearray(10))], len(CONTENT) - 4) == 4
    source.close()
