"""Source: what a source does when it is closed, short or shared, of whatever kind it is."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from byte_sources import CONTENT, KINDS

import zipslicer
from zipslicer.backend import choose
from zipslicer.errors import ChangedError
from zipslicer.opening import open_source
from zipslicer.source import LocalFile, read_at


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "a.bin"
    made.write_bytes(CONTENT)
    return made


@pytest.fixture(params=KINDS)
def given(path: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """What open_source takes, of each kind; closed after the test."""
    made = KINDS[request.param](path)
    yield made
    if hasattr(made, "close"):
        made.close()


def test_every_kind_of_source_reads_the_same(given: Any) -> None:
    source = open_source(given)
    assert source.size == len(CONTENT)
    for start, nbytes in ((0, 10), (1000, 1), (4000, 96), (0, len(CONTENT)), (17, 0)):
        assert read_at(choose(), source, start, nbytes) == CONTENT[start : start + nbytes]
    source.close()


def test_a_closed_source_raises(given: Any) -> None:
    source = open_source(given)
    source.close()
    source.close()
    with pytest.raises(ValueError, match="closed"):
        read_at(choose(), source, 0, 1)


def test_a_read_past_the_end_is_no_short_read(given: Any) -> None:
    source = open_source(given)
    with pytest.raises(ChangedError) as caught:
        read_at(choose(), source, len(CONTENT) - 1, 2)
    assert caught.value.offset == len(CONTENT)
    source.close()


def test_a_file_object_stays_open(given: Any) -> None:
    open_source(given).close()
    assert not getattr(given, "closed", False)


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


def test_threads_share_a_source(given: Any) -> None:
    source, backend = open_source(given), choose()
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


def is_native(source: Any) -> bool:
    return isinstance(source.handle, int)


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="no positioned reads here")
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("open", True),
        ("open for writing", True),
        ("raw", True),
        ("temporary", True),
        ("stream", True),  # from its temporary file
        ("gzip path", True),
        ("GzipFile", True),
        ("BytesIO", False),
        ("spooled", False),  # its fileno() would make it write a file
        ("mmap", False),
    ],
)
def test_files_are_read_by_their_descriptor(path: Path, kind: str, expected: bool) -> None:
    made = KINDS[kind](path)
    source = open_source(made)
    assert is_native(source) == expected
    source.close()
    if hasattr(made, "close"):
        made.close()


@pytest.mark.parametrize("kind", ["open", "raw", "BytesIO", "OnlyRead", "spooled", "GzipFile"])
def test_a_position_is_where_reading_begins_and_stays(path: Path, kind: str) -> None:
    made = KINDS[kind](path)
    made.seek(100)
    source = open_source(made)
    whole = source.size - source.start
    assert whole == len(CONTENT) - 100
    for _ in range(2):
        assert read_at(choose(), source, source.start, 50) == CONTENT[100:150]
        assert made.seek(0, io.SEEK_CUR) == 100
    source.close()
    if hasattr(made, "close"):
        made.close()


def test_an_archive_is_read_from_the_position_of_a_file_object(tmp_path: Path) -> None:
    """As torch.load does it."""
    torch = pytest.importorskip("torch")
    file = io.BytesIO()
    torch.save({"w": torch.arange(5)}, file)
    with pytest.raises(zipslicer.ArchiveError, match=f"nothing follows byte {file.tell()}"):
        zipslicer.load(file)
    end = file.tell()
    file.seek(1000, io.SEEK_CUR)
    with pytest.raises(zipslicer.ArchiveError, match=f"nothing follows byte {end}"):
        zipslicer.load(file)
    file.seek(end)
    (tmp_path / "a").write_bytes(b"0123456789" + file.getvalue())
    with (tmp_path / "a").open("rb") as opened:
        opened.seek(10)
        assert zipslicer.load(opened)["w"].tolist() == torch.load(opened)["w"].tolist() == [0, 1, 2, 3, 4]
        opened.seek(0)
        with pytest.raises(zipslicer.ArchiveError):
            zipslicer.load(opened)
        # A window says where, whatever the position is.
        assert zipslicer.load(opened, window=(10, file.tell()))["w"].tolist() == [0, 1, 2, 3, 4]


def test_what_a_caller_has_not_flushed_is_read(tmp_path: Path) -> None:
    with (tmp_path / "a").open("w+b") as file:
        file.write(CONTENT)
        file.seek(0)
        source = open_source(file)
        assert read_at(choose(), source, 0, source.size) == CONTENT
        source.close()


@pytest.mark.parametrize("kind", ["BytesIO", "open", "mmap", "GzipFile"])
def test_a_closed_object_is_an_error_that_says_so(path: Path, kind: str) -> None:
    made = KINDS[kind](path)
    made.close()
    with pytest.raises(ValueError, match="closed"):
        open_source(made)


@pytest.mark.parametrize("kind", ["BytesIO", "mmap"])
def test_an_object_that_is_closed_later_is_one_too(path: Path, kind: str) -> None:
    made = KINDS[kind](path)
    source = open_source(made)
    made.close()
    with pytest.raises(ValueError, match="opened from is closed"):
        read_at(choose(), source, 0, 1)
    source.close()


@pytest.mark.parametrize("kind", ["open", "stream", "gzip BytesIO"])
def test_a_file_that_is_closed_later_is_still_read(path: Path, kind: str) -> None:
    made = KINDS[kind](path)
    source = open_source(made)
    made.close()
    assert read_at(choose(), source, 0, len(CONTENT)) == CONTENT
    source.close()


def test_a_bytearray_may_grow_and_is_noticed_when_it_shrinks() -> None:
    content = bytearray(CONTENT)
    source = open_source(content)
    content += b"more"
    assert read_at(choose(), source, 0, len(CONTENT)) == CONTENT
    del content[100:]
    with pytest.raises(ChangedError):
        read_at(choose(), source, 90, 20)


def test_all_of_them_are_read_where_no_read_has_a_position(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows: seek and read, under a lock."""
    monkeypatch.delattr(os, "preadv", raising=False)
    source = open_source(given)
    assert not is_native(source)
    for start, nbytes in ((4000, 96), (0, 10), (0, len(CONTENT))):
        assert read_at(choose(), source, start, nbytes) == CONTENT[start : start + nbytes]
    source.close()
