"""Archive: the directory as records, what a window shows, and what other formats are called. Damage is in test_conformance."""

from __future__ import annotations

import io
from typing import Any

import makers
import pytest
from makers import Zip

import zipslicer
from zipslicer.archive import Archive
from zipslicer.backend import choose
from zipslicer.errors import ArchiveError, ProgramError, UnsupportedError
from zipslicer.opening import open_source
from zipslicer.policy import Limits

RECORDS = [("a/data.pkl", b"N."), ("a/byteorder", b"little"), ("a/data/0", b"0123"), ("a/\u00fc", b"umlaut")]


def archive(data: bytes, limits: Limits = Limits(), window: tuple[int, int] | None = None) -> Archive:  # noqa: B008
    return Archive(open_source(data), choose(), limits, window)


def test_names_are_in_directory_order() -> None:
    written = Zip().add_all(RECORDS).finish(order=[2, 0, 1, 3])
    assert archive(written.data).names() == ["a/data/0", "a/data.pkl", "a/byteorder", "a/\u00fc"]


def test_records_are_found_by_their_name_below_the_root() -> None:
    opened = archive(Zip().add_all(RECORDS).finish().data)
    assert opened.find(["data/0", "none", "data.pkl", "a/data.pkl", "", "\u00fc", "DATA.PKL"]) == [
        2,
        -1,
        0,
        -1,
        -1,
        3,
        -1,
    ]


@pytest.mark.parametrize("method", [makers.STORED, makers.DEFLATED])
def test_a_record_is_read_whole(method: int) -> None:
    opened = archive(Zip().add_all([*RECORDS, ("a/big", b"abc" * 50_000)], method=method).finish().data)
    for i, (_, content) in enumerate([*RECORDS, ("a/big", b"abc" * 50_000)]):
        assert opened.read(i) == content
        assert opened.read(i) == content


def test_a_name_that_is_no_utf8_is_shown_escaped() -> None:
    opened = archive(Zip().add_all(RECORDS).finish().data + b"")
    assert opened.name(3) == "a/\u00fc"
    written = Zip()
    written.add(b"a/\xff\xfe", b"")
    assert archive(written.finish().data).names() == ["a/\\xff\\xfe"]


def test_read_keeps_to_its_limit() -> None:
    opened = archive(Zip().add_all(RECORDS).finish().data)
    assert opened.read(2, limit=4) == b"0123"
    with pytest.raises(ProgramError, match="limit is 3"):
        opened.read(2, limit=3)


def test_a_deflate_bomb_is_refused_before_it_is_inflated() -> None:
    data = Zip().add_all([("a/data.pkl", bytes(1 << 22))], method=makers.DEFLATED).finish().data
    with pytest.raises(ProgramError, match="inflates from"):
        archive(data).read(0, limit=1 << 30)
    raised = Limits(inflated_ratio=10_000)
    assert archive(data, raised).read(0, limit=1 << 30) == bytes(1 << 22)


def test_the_directory_has_a_limit() -> None:
    data = Zip().add_all(RECORDS).finish().data
    with pytest.raises(ArchiveError, match="directory_nbytes"):
        archive(data, Limits(directory_nbytes=10))


def test_a_window_is_an_archive_of_its_own() -> None:
    inner = Zip().add_all(RECORDS).finish().data
    data = b"x" * 1000 + inner + b"y" * 77
    opened = archive(data, window=(1000, len(inner)))
    assert opened.names() == [name for name, _ in RECORDS]
    assert opened.read(2) == b"0123"
    with pytest.raises(ArchiveError):
        archive(data)


@pytest.mark.parametrize("window", [(-1, 5), (0, -1), (0, 10**9), (10**9, 0)])
def test_a_window_outside_the_file_is_a_value_error(window: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="does not lie in a file"):
        archive(Zip().add_all(RECORDS).finish().data, window=window)


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        (b"", ArchiveError, "empty"),
        (b"PK", ArchiveError, "begins with"),
        (b"version https://git-lfs.github.com/spec/v1\n", ArchiveError, "git lfs pull"),
        (b"\x93NUMPY" + b"\0" * 100, ArchiveError, "NumPy array"),
        (b"{" + b" " * 1000, ArchiveError, "JSON text"),
        (b"\n<!DOCTYPE html><title>404</title>", ArchiveError, "web page"),
        (b"GGUF" + b"\0" * 100, ArchiveError, "GGUF"),
    ],
)
def test_other_formats_are_named(content: bytes, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        archive(content)
    assert caught.value.offset == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("records", "says"), [(["archive_format"], "torch.export"), ([".data/extern_modules"], "torch.package")]
)
def test_other_archives_of_torch_are_named(records: list[str], says: str) -> None:
    written = Zip().add_all([(f"a/{name}", b"pt2") for name in records]).finish()
    with pytest.raises(UnsupportedError, match=says):
        zipslicer.load(written.data)


def test_an_archive_without_a_program_is_unfinished() -> None:
    with pytest.raises(ArchiveError, match=r"no record 'data.pkl'"):
        zipslicer.load(Zip().add_all([("a/byteorder", b"little")]).finish().data)


def test_errors_name_the_file_and_the_record(tmp_path: Any) -> None:
    written = Zip()
    written.add("a/data.pkl", b"N.")
    written.add("a/data/0", b"0123", local_name=b"a/data/1")
    path = tmp_path / "a.pt"
    path.write_bytes(written.finish().data)
    source = open_source(path)
    with pytest.raises(ArchiveError) as caught:
        Archive(source, choose(), Limits()).read(1)
    assert (caught.value.path, caught.value.record) == (str(path), "a/data/0")
    source.close()


class Recording(io.BytesIO):
    """Bytes that remember which of them were asked for."""

    reads: list[tuple[int, int]]

    def readinto(self, buffer: Any) -> int:
        self.reads = [*getattr(self, "reads", []), (self.tell(), len(buffer))]
        return super().readinto(buffer)


def test_opening_reads_the_tail_and_no_payload() -> None:
    written = Zip().add_all([*RECORDS, *((f"a/data/{i}", bytes(4096)) for i in range(1, 200))]).finish()
    file = Recording(written.data)
    opened = Archive(open_source(file), choose(), Limits())
    assert opened.count == 203
    assert sum(nbytes for _, nbytes in file.reads) < 70_000 + 512
    assert min(offset for offset, _ in file.reads if offset) > len(written.data) - 70_000


def test_the_first_read_of_a_record_proves_its_header_the_next_need_not() -> None:
    written = Zip().add_all(RECORDS).finish()
    file = Recording(written.data)
    opened = Archive(open_source(file), choose(), Limits())
    file.reads = []
    opened.read(2)
    assert min(offset for offset, _ in file.reads) == written.record("a/data/0").header_offset
    file.reads = []
    opened.read(2)
    assert file.reads == [(written.record("a/data/0").payload_offset, 4)]
