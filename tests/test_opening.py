"""Opening: what can be opened, what is spooled first, and what is refused, in words."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import pickle
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from byte_sources import CONTENT, KINDS, NoSeek, Stream

import zipslicer
from zipslicer.backend import choose
from zipslicer.opening import open_source
from zipslicer.source import read_at


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "a.bin"
    made.write_bytes(CONTENT)
    return made


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
        assert isinstance(source.handle, int) == hasattr(os, "preadv")
    assert read_at(choose(), source, 10, 10) == CONTENT[10:20]
    source.close()


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
