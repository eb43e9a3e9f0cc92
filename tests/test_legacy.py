"""Legacy: streams and tar files. What is right is in test_conformance; here is how they are opened, and what is refused."""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import makers
import pytest
from makers import Pickle

torch = pytest.importorskip("torch")

import zipslicer  # noqa: E402
from zipslicer.errors import (  # noqa: E402
    ArchiveError,
    ChangedError,
    ProgramError,
    TableError,
    UnsafeError,
    UnsupportedError,
    ZipSlicerError,
)

FLOATS = struct.pack("<4f", 1, 2, 3, 4)


def two(view: Any = "") -> bytes:
    """A program of {"0": a tensor on the storage 0, "1": one on 1}, of four floats each."""

    def write(key: str) -> Callable[[Pickle], Pickle]:
        return lambda p: p.tensor("FloatStorage", key, 4, size=[4], stride=[1], view=view)

    return Pickle().dict({key: write(key) for key in "01"}).stop()


STREAM = makers.stream(two(), {"0": (4, FLOATS), "1": (4, FLOATS)})


def keyed(program: bytes, storages: list[Any] | None = None, views: list[Any] = [], tensors: Any = None) -> bytes:  # noqa: B006
    """A tar file of one tensor, 11, on the storage 1."""
    storages = [(1, "FloatStorage", 4, FLOATS)] if storages is None else storages
    tensors = [(11, 1, [2, 2], [2, 1], 0)] if tensors is None else tensors
    return makers.tar(makers.tar_members(storages, views, tensors, program))


PROGRAM = Pickle().dict({"w": lambda p: p.integer(11).raw(b"Q"), "again": lambda p: p.text("11").raw(b"Q")}).stop()
TAR = keyed(PROGRAM)


class Recording(io.BytesIO):
    """Bytes that remember how far they were read."""

    furthest = 0

    def readinto(self, buffer: Any) -> int:
        got = super().readinto(buffer)
        self.furthest = max(self.furthest, self.tell())
        return got


def touch_all(content: bytes, **keywords: Any) -> dict[str, Any]:
    with zipslicer.open(content, **keywords) as checkpoint:
        return {name: checkpoint.tensors[name] for name in checkpoint.tensors}


def refused(content: bytes, error: type[ZipSlicerError], says: str, at: int | None, **keywords: Any) -> None:
    with pytest.raises(error, match=says) as caught:
        touch_all(content, **keywords)
    assert caught.value.offset == at
    assert type(caught.value) is error


# --- streams ----------------------------------------------------------------------------------------------------------


def test_records_are_the_storages_and_the_window_is_the_object() -> None:
    with zipslicer.open(b"junk" + STREAM + b"more", window=(4, len(STREAM) + 4)) as checkpoint:
        assert checkpoint.records == ["data/0", "data/1"]
        assert checkpoint.window == (4, len(STREAM))


def test_objects_in_one_file_are_walked_by_their_windows() -> None:
    """As often as torch.load may be called on one file object."""
    content = STREAM + makers.stream(Pickle().text("second").stop(), {}) + STREAM
    found, at = [], 0
    while at < len(content):
        with zipslicer.open(content, window=(at, len(content) - at)) as checkpoint:
            root = checkpoint.root
            found.append(root if isinstance(root, str) else list(root))
            at = sum(checkpoint.window)
    assert found == [["0", "1"], "second", ["0", "1"]]


def test_opening_reads_a_bounded_first_part_and_a_touch_its_own_bytes() -> None:
    large = bytes(1 << 24)
    program = Pickle().mark().storage("ByteStorage", "0", len(large), view="").storage("ByteStorage", "1", 4, view="")
    file = Recording(makers.stream(program.raw(b"t").stop(), {"0": (len(large), large), "1": (4, b"last")}))
    with zipslicer.open(file) as checkpoint:
        assert file.furthest < 3 << 20
        assert bytes(checkpoint.tensors["1"]) == b"last"


@pytest.mark.parametrize("nbytes", [4000, 5000, (1 << 20) - 60, 1 << 20, (1 << 22) - 50, 5 << 20])
def test_a_program_may_be_longer_than_what_is_read_first(nbytes: int) -> None:
    text = "x" * nbytes
    program = Pickle().dict(
        {"w": lambda p: p.storage("ByteStorage", "k" * 9000, 4, view=""), "t": lambda p: p.text(text)}
    )
    content = makers.stream(program.stop(), {"k" * 9000: (4, b"abcd")})
    with zipslicer.open(content) as checkpoint:
        assert checkpoint.root["t"] == text
        assert bytes(checkpoint.root["w"]) == b"abcd"
    with pytest.raises(ProgramError, match=r"see zipslicer\.Limits"):
        zipslicer.open(content, limits=zipslicer.Limits(program_nbytes=3000))


def test_a_byte_string_of_python_2_is_a_key() -> None:
    pid = b"(U\7storagectorch\nFloatStorage\nU\x010U\6cuda:0\x8a\1\4Nt"
    program = b"\x80\2}U\1wctorch._utils\n_rebuild_tensor\n(" + pid + b"QK\0(\x8a\1\4t(\x8a\1\1ttRs."
    content = makers.stream(program, {"0": (4, FLOATS)})
    with zipslicer.open(content) as checkpoint:
        assert checkpoint.root["w"].tolist() == [1, 2, 3, 4]
        assert checkpoint.root.get_meta("w").location == "cuda:0"


def test_a_count_that_is_not_the_pickle_s_is_refused_on_touch_by_every_way() -> None:
    content = makers.stream(two(), {"0": (4, FLOATS), "1": (5, FLOATS)})
    at = len(content) - len(FLOATS) - 8
    with zipslicer.open(content) as checkpoint:
        ways: list[Callable[[], Any]] = [
            lambda: checkpoint.tensors["1"],
            lambda: checkpoint.tensors.get_slice("1")[1:],
            lambda: checkpoint.root.materialize(),
            lambda: checkpoint.tensors["1"],
        ]
        for act in ways:
            with pytest.raises(ArchiveError, match="5 elements stands where the pickle has one of 4") as caught:
                act()
            assert caught.value.offset == at
        assert checkpoint.tensors["0"].tolist() == [1, 2, 3, 4]


def test_keys_and_persistent_ids_must_agree() -> None:
    storages = {"0": (4, FLOATS), "1": (4, FLOATS)}
    listed = len(makers.stream(two(), {})) - len(Pickle().raw(b"](e").stop())
    refused(makers.stream(two(), {**storages, "2": (4, FLOATS)}), ArchiveError, "pickle names none", listed)
    refused(makers.stream(two(), storages, keys=["0", "0"]), ArchiveError, "listed twice", listed)
    refused(makers.stream(two(), {"0": (4, FLOATS)}), ArchiveError, "no such record", None)


def test_a_storage_that_was_dropped_again_still_takes_its_room() -> None:
    program = Pickle().storage("FloatStorage", "0", 4, view="").raw(b"0").storage("ByteStorage", "1", 4, view="").stop()
    content = makers.stream(program, {"0": (4, FLOATS), "1": (4, b"abcd")})
    with zipslicer.open(content) as checkpoint:
        assert bytes(checkpoint.root) == b"abcd"


def test_views_are_bounded_by_their_root_and_tensors_by_their_view() -> None:
    def content(view: tuple[str, int, int], size: int = 1, offset: int = 0) -> bytes:
        write = Pickle().tensor("FloatStorage", "0", 4, size=[size], stride=[1], storage_offset=offset, view=view)
        return makers.stream(write.stop(), {"0": (4, FLOATS)})

    assert zipslicer.load(content(("v", 1, 3), size=2, offset=1)).tolist() == [3, 4]
    for view, size, offset in [
        (("v", 1, 4), 1, 0),
        (("v", -1, 2), 1, 0),
        (("v", 5, 0), 0, 0),
        (("v", 0, -1), 0, 0),
        (("v", 1, 2), 3, 0),
        (("v", 1, 2), 1, 2),
        (("v", 1, 2), 0, (1 << 63) - 1),
    ]:
        with pytest.raises(TableError):
            zipslicer.open(content(view, size, offset))
    with pytest.raises(ProgramError, match="a view in one"):
        zipslicer.open(content(("0", 0, 4)))


def test_a_view_that_stands_as_a_value_is_not_supported_yet() -> None:
    program = Pickle().storage("FloatStorage", "0", 4, view=("v", 1, 2)).stop()
    with pytest.raises(UnsupportedError, match="a view of a storage"):
        zipslicer.open(makers.stream(program, {"0": (4, FLOATS)}))


def test_an_archive_has_no_persistent_ids_of_streams() -> None:
    with pytest.raises(ProgramError):
        zipslicer.open(makers.checkpoint(two(), {"0": FLOATS, "1": FLOATS}).data)
    with pytest.raises(ProgramError):
        zipslicer.open(makers.stream(two(view="none"), {"0": (4, FLOATS), "1": (4, FLOATS)}))


def test_offsets_in_a_stream_are_those_of_the_file() -> None:
    program = Pickle().name("os", "mkdir").raw(b"!").stop()
    content = makers.stream(program, {})
    at = content.index(b"cos\nmkdir")
    refused(content, ProgramError, "no pickle opcode", at + len(b"cos\nmkdir\n"))
    refused(b"junk" + content, ProgramError, "no pickle opcode", at + 14, window=(4, len(content)))
    refused(content, UnsafeError, "os.mkdir", at, unknown="error")


def test_another_protocol_is_not_supported() -> None:
    content = STREAM.replace(Pickle().integer(1001).stop(), Pickle().integer(1002).stop())
    refused(content, UnsupportedError, "1002", len(Pickle().integer(0x1950A86A20F9469CFC6C).stop()))


def test_there_are_no_other_records_in_a_stream() -> None:
    with pytest.raises(ArchiveError, match=r"constants\.pkl"):
        zipslicer.open(STREAM, record="constants.pkl")


@pytest.mark.parametrize("content", [STREAM, TAR], ids=["stream", "tar"])
def test_damage_is_an_error_or_shows(content: bytes) -> None:
    """Cut at every length, and with each byte flipped: an error, or the tensors of a file."""
    end = len(content) if content is STREAM else content.rindex(FLOATS) + len(FLOATS)
    for length in range(end):
        with pytest.raises(ZipSlicerError):
            touch_all(content[:length])

    def stands(at: int) -> bool:
        try:
            return bool(touch_all(content[:at] + bytes([content[at] ^ 0x21]) + content[at + 1 :]))
        except ZipSlicerError:
            return False

    assert sum(map(stands, range(end))) < end / 2


@pytest.mark.parametrize("content", [STREAM, TAR], ids=["stream", "tar"])
def test_it_pickles_as_its_path_and_knows_another_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    path.write_bytes(content)
    packed = pickle.dumps(zipslicer.load(path))
    again = pickle.loads(packed)
    assert [again[key].flatten().tolist() for key in again] == [[1, 2, 3, 4]] * 2
    path.write_bytes(content.replace(b"X\1\0\0\0w", b"X\1\0\0\0W") if content is TAR else makers.stream(two(), {}))
    with pytest.raises(ChangedError):
        pickle.loads(packed)


# --- tar files --------------------------------------------------------------------------------------------------------


def test_a_tar_file_keeps_sharing() -> None:
    made = zipslicer.load(TAR).materialize()
    assert made["w"] is made["again"]
    assert made["w"].tolist() == [[1, 2], [3, 4]]


def test_a_storage_of_a_tar_file_stands_as_a_value() -> None:
    made = zipslicer.load(keyed(Pickle().raw(b"]").integer(1).raw(b"Qa").stop()))[0]
    assert bytes(made.untyped() if hasattr(made, "untyped") else made) == FLOATS
    with pytest.raises(UnsupportedError, match="a view of a storage"):
        zipslicer.load(keyed(Pickle().integer(2).raw(b"Q").stop(), views=[(2, 1, 1, 2)]))


def test_a_class_of_a_tar_file_is_inert() -> None:
    program = Pickle().mark().name("os", "mkdir").none().none().raw(b"tQ)\x81").stop()
    assert isinstance(zipslicer.load(keyed(program)), zipslicer.Placeholder)


@pytest.mark.parametrize(
    ("made", "error"),
    [
        ({"storages": [(1, "FloatStorage", 5, FLOATS)]}, ZipSlicerError),
        ({"storages": [(1, "FloatStorage", 1 << 62, FLOATS)]}, ArchiveError),
        ({"storages": [(1, "FloatStorage", -1, FLOATS)]}, ArchiveError),
        ({"storages": [(1, "FloatTensor", 4, FLOATS)]}, ProgramError),
        ({"storages": [(1, "FloatStorage", 4, FLOATS)] * 2}, ArchiveError),
        ({"views": [(2, 1, 3, 2)]}, TableError),
        ({"views": [(2, 9, 0, 0)]}, TableError),
        ({"views": [(2, 1, -1, 2)]}, TableError),
        ({"views": [(1, 1, 0, 2)]}, ArchiveError),
        ({"views": [(2, 1)]}, ProgramError),
        ({"tensors": [(11, 1, [5], [1], 0)]}, TableError),
        ({"tensors": [(11, 1, [2], [-1], 3)]}, TableError),
        ({"tensors": [(11, 1, [1 << 62, 1 << 62], [0, 0], 0)]}, TableError),
        ({"tensors": [(11, 1, [1] * 65, [1] * 65, 0)]}, ProgramError),
        ({"tensors": [(11, 7, [1], [1], 0)]}, ArchiveError),
        ({"tensors": [(1, 1, [1], [1], 0)]}, ArchiveError),
        ({"tensors": [(11, 1, [1], [1], 0)] * 2}, ArchiveError),
        ({"tensors": []}, ArchiveError),
    ],
    ids=str,
)
def test_a_tar_file_that_contradicts_itself(made: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        zipslicer.load(keyed(PROGRAM, **made)).materialize()


def test_a_tar_file_counts_what_is_in_it() -> None:
    members = makers.tar_members([(1, "FloatStorage", 4, FLOATS)], [], [(11, 1, [4], [1], 0)], PROGRAM)
    for name in ("storages", "tensors"):
        count = Pickle().integer(1).stop()
        for wrong in (-1, 2, 1 << 40):
            with pytest.raises(ZipSlicerError):
                zipslicer.load(
                    makers.tar({**members, name: members[name].replace(count, Pickle().integer(wrong).stop(), 1)})
                )
        with pytest.raises(ArchiveError, match=name):
            zipslicer.load(makers.tar({other: data for other, data in members.items() if other != name}))


def test_a_tar_file_means_one_thing() -> None:
    end = TAR.rindex(FLOATS) // 512 * 512 + 512
    with pytest.raises(ArchiveError, match="there are two"):
        zipslicer.load(TAR[:end] + TAR)
    spoiled = bytearray(TAR)
    spoiled[TAR.index(b"ustar") - 257 + 1] ^= 1  # the name of the first header
    refused(bytes(spoiled), ArchiveError, "checksum", 0)
    link = bytearray(TAR[:512])
    link[156:157] = b"2"
    link[148:156] = b"%06o\0 " % (sum(link) - sum(link[148:156]) + 8 * 0x20)
    refused(bytes(link) + TAR[512:], UnsupportedError, "plain files", 0)
