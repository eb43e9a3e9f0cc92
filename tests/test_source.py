"""Source: what can be opened, and what a source does when it is closed, short or shared."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import mmap
import os
import pickle
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
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


@pytest.mark.parametrize("bad", [3, None, 1.5, ["a.pt"], object()])
def test_what_is_no_source_is_a_type_error(bad: object) -> None:
    with pytest.raises(TypeError, match="path, bytes or a binary file object"):
        open_source(bad)


def test_missing_files_and_folders_are_the_systems_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        zipslicer.load(tmp_path / "none.pt")
    with pytest.raises(IsADirectoryError):
        open_source(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_fifo_is_refused_and_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="no regular file"):
        zipslicer.load(tmp_path / "fifo")


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


# ---------------------------------------------------------------- file objects


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


def test_a_memoryview_with_gaps_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="contiguous"):
        open_source(memoryview(CONTENT)[::2])


class Text:
    def read(self, nbytes: int) -> str:
        return ""


def test_text_is_a_type_error_that_says_how_to_open(path: Path) -> None:
    with path.open(encoding="latin-1") as file, tempfile.TemporaryFile("w+") as other:
        for text in (file, other, io.StringIO("x"), Text()):
            with pytest.raises(TypeError, match="open it in binary"):
                open_source(text)


def test_an_object_for_writing_is_refused(path: Path) -> None:
    with path.open("ab") as file, pytest.raises(io.UnsupportedOperation, match="not open for reading"):
        open_source(file)


def test_an_object_that_would_block_is_refused() -> None:
    class Empty(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> None:
            return None

    with pytest.raises(BlockingIOError):
        open_source(Empty())


def test_a_pipe_is_read_to_its_end(path: Path) -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as file:
        file.write(CONTENT)
    with os.fdopen(reading, "rb") as file:
        source = open_source(file)
    assert read_at(choose(), source, 0, source.size) == CONTENT
    source.close()


@pytest.mark.parametrize("kind", ["stream", "gzip path", "gzip BytesIO"])
def test_temporary_files_have_no_name_and_go(
    path: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    source: Any = open_source(KINDS[kind](path))
    fd = source.handle
    assert list(folder.iterdir()) == []
    assert os.fstat(fd).st_size == len(CONTENT)
    source.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.mark.parametrize("opener", [bz2.open, lzma.open])
def test_what_another_reader_unpacks_is_spooled(path: Path, opener: Any) -> None:
    with opener(path.with_suffix(".x"), "wb") as file:
        file.write(CONTENT)
    with opener(path.with_suffix(".x")) as file:
        source = open_source(file)
    assert read_at(choose(), source, 10, 10) == CONTENT[10:20]
    source.close()


def test_a_member_of_a_zip_is_spooled(path: Path) -> None:
    with zipfile.ZipFile(path.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", CONTENT)
    with zipfile.ZipFile(path.with_suffix(".zip")) as archive, archive.open("a") as file:
        source = open_source(file)
        assert is_native(source) == hasattr(os, "preadv")
    assert read_at(choose(), source, 10, 10) == CONTENT[10:20]
    source.close()


def test_all_of_them_are_read_where_no_read_has_a_position(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows: seek and read, under a lock."""
    monkeypatch.delattr(os, "preadv", raising=False)
    source = open_source(given)
    assert not is_native(source)
    for start, nbytes in ((4000, 96), (0, 10), (0, len(CONTENT))):
        assert read_at(choose(), source, start, nbytes) == CONTENT[start : start + nbytes]
    source.close()


# ---------------------------------------------------------------- gzip


@pytest.mark.parametrize("kind", ["path", "bytes", "object", "stream", "GzipFile"])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda content: content[:-4], "cut short|end-of-stream"),
        (lambda content: content[: len(content) // 2], "cut short|end-of-stream"),
        (lambda content: content[:-8] + bytes(8), "damaged"),  # CRC and length
        (lambda content: content[:50] + bytes(8) + content[58:], "damaged"),
        (lambda content: content + b"more", "damaged"),
        (lambda content: content[:3], "cut short|end-of-stream"),
    ],
)
def test_a_damaged_gzip_stream_is_an_archive_error(path: Path, damage: Any, says: str, kind: str) -> None:
    content = damage(gzip.compress(os.urandom(3000)))
    path.write_bytes(content)
    given: dict[str, Callable[[], Any]] = {
        "path": lambda: path,
        "bytes": lambda: content,
        "object": lambda: io.BytesIO(content),
        "stream": lambda: Stream(content),
        "GzipFile": lambda: gzip.open(path),  # noqa: SIM115
    }
    made = given[kind]()
    with pytest.raises(zipslicer.ArchiveError, match=says) as caught:
        open_source(made)
    assert caught.value.path == (str(path) if kind == "path" else None)
    if hasattr(made, "close"):
        made.close()


def test_a_gzip_stream_may_not_grow_without_bounds(tmp_path: Path) -> None:
    bomb = gzip.compress(bytes(80 << 20))
    with pytest.raises(zipslicer.ArchiveError, match="inflated_ratio"):
        open_source(bomb)
    source = open_source(bomb, zipslicer.Limits(inflated_ratio=2000))
    assert source.size == 80 << 20
    source.close()


def test_a_gzipped_checkpoint_keeps_its_path_and_pickles_by_it(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    file = io.BytesIO()
    torch.save({"w": torch.arange(5)}, file)
    path = tmp_path / "a.pth.gz"
    path.write_bytes(gzip.compress(file.getvalue()))
    sd = zipslicer.load(path)
    assert sd.path == str(path)
    assert pickle.loads(pickle.dumps(sd))["w"].tolist() == [0, 1, 2, 3, 4]
    path.write_bytes(gzip.compress(b"1234" + file.getvalue() + b"56789"))
    assert zipslicer.load(path, window=(4, file.tell()))["w"].tolist() == [0, 1, 2, 3, 4]


# ---------------------------------------------------------------- what is no checkpoint


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"<!DOCTYPE html><html><title>404</title>", "web page"),
        (b"\xef\xbb\xbf  <HTML>", "web page"),
        (b'{"error": "Repository not found"}', "JSON text"),
        (b'{"weight_map": {"a": "b.bin"}}', r"called \*.json"),
        (b"(\xb5/\xfd" + bytes(100), "zstd"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
    ],
)
@pytest.mark.parametrize("kind", ["path", "bytes", "object", "stream", "gzip"])
def test_what_else_is_called_a_checkpoint_is_named(tmp_path: Path, content: bytes, says: str, kind: str) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(gzip.compress(content) if kind == "gzip" else content)
    given: Any = {"bytes": content, "object": io.BytesIO(content), "stream": Stream(content)}.get(kind, path)
    with pytest.raises(zipslicer.ArchiveError, match=says) as caught:
        zipslicer.load(given)
    assert caught.value.path == (str(path) if given is path else None)


def test_empty_sources_say_so(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(b"")
    for given in (tmp_path / "a.pth", b"", io.BytesIO(), Stream(b""), NoSeek(b""), gzip.compress(b"")):
        with pytest.raises(zipslicer.ArchiveError, match="empty"):
            zipslicer.load(given)


def test_a_link_is_followed_and_its_path_is_reported_as_given(tmp_path: Path) -> None:
    """As in the cache of Hugging Face, whose files are called by their hash."""
    torch = pytest.importorskip("torch")
    (tmp_path / "blobs").mkdir()
    torch.save({"w": torch.arange(5)}, tmp_path / "blobs" / "0123abcd")
    link = tmp_path / "pytorch_model.bin"
    link.symlink_to("blobs/0123abcd")
    sd = zipslicer.load(link)
    assert sd.path == str(link)
    assert sd["w"].tolist() == [0, 1, 2, 3, 4]


class AsPath:
    def __init__(self, path: Any) -> None:
        self._path = path

    def __fspath__(self) -> Any:
        return self._path


def test_anything_with_a_path_is_a_path(path: Path) -> None:
    source = open_source(AsPath(str(path)))
    assert source.path == str(path)
    source.close()
    with pytest.raises(TypeError, match="str"):
        open_source(AsPath(os.fsencode(path)))
