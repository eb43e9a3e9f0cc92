"""ArchiveWriter: an archive as torch lays one out, that other tools read too."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import zipslicer
from zipslicer.archive_writer import ArchiveWriter
from zipslicer.backend import choose
from zipslicer.exports import any_archive
from zipslicer.opening import open_source
from zipslicer.replacement import Replacement


def test_payloads_are_aligned_and_tools_read_the_archive(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with zipslicer.Writer(path) as w:
        for i in range(40):
            w.write_chunks(str(i), [bytes(i * 37)], dtype="uint8", shape=(i * 37,))
        w.write_chunks("large", [os.urandom(20_000_000)], dtype="int64", shape=(2_500_000,))
    with zipslicer.open(path) as checkpoint:
        archive = checkpoint._view.archives()[0]
        records = [record for record in range(archive.count) if "/data/" in archive.name(record)]
        assert len(records) == 41
        assert {archive.extent(record)[0] % 64 for record in records} == {0}
        predicted = zipslicer.open(path)._view.archives()[0]
        assert [~predicted.field(r, 1) for r in records] == [archive.field(r, 1) for r in records]
    with zipfile.ZipFile(path) as members:
        assert members.testzip() is None


class Sparse(Replacement):
    """Takes a large record by leaving a hole."""

    def copy(self, source: Any, offset: int, nbytes: int) -> int:
        self.offset += nbytes
        os.ftruncate(self._fd, self.offset)
        os.lseek(self._fd, self.offset, os.SEEK_SET)
        return nbytes


def test_zip64(tmp_path: Path) -> None:
    """A record of over 4 GiB, and others behind it."""
    path, large = tmp_path / "a.pt", (1 << 32) + 5
    output = Sparse(path)
    archive = ArchiveWriter(output, "a")
    archive.add("first", b"1")
    archive.copy("large", None, 0, large, 0, None)  # type: ignore[arg-type]
    archive.add("behind", b"22")
    archive.add("empty", b"")
    archive.finish()
    output.commit()
    with zipfile.ZipFile(path) as members:
        sizes = {each.filename: each.file_size for each in members.infolist()}
        assert sizes == {"a/first": 1, "a/large": large, "a/behind": 2, "a/empty": 0}
        assert members.read("a/behind") == b"22"
    archives = any_archive(open_source(path), choose(), zipslicer.Limits(), None, "behind")
    assert archives.read(archives.find(["behind"])[0]) == b"22"
    assert archives.extent(archives.find(["large"])[0])[1] == large
    assert archives.part(archives.find(["large"])[0], large - 1, 1) == b"\0"
    assert archives.extent(archives.find(["empty"])[0])[1] == 0
