"""Archives: tricks with the ZIP container."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Iterator

import makers
from makers import DEFLATED, Zip, deflated, extra_field

from hostile import ARCHIVE, FOUR_FLOATS, INERT, PROGRAM, RIGHT, TABLE, UNSUPPORTED, Attack, attack, program, trick

NAMES = ("archive/data.pkl", "archive/byteorder", "archive/data/0", "archive/version")
CONTENTS = dict(zip(NAMES, (program(), b"little", FOUR_FLOATS, b"3\n")))


def bent(which: str = "archive/data/0", /, **keywords: object) -> Zip:
    """The archive of FOUR_FLOATS, one record of which is added with these keywords of `Zip.add`."""
    archive = Zip()
    for name, data in CONTENTS.items():
        archive.add(name, data, **(keywords if name == which else {}))  # type: ignore[arg-type]
    return archive


def whole() -> Zip:
    return bent()


@trick
def name_twice() -> Iterator[Attack]:
    """miniz finds the first, Python's zipfile the last."""
    for name, data in CONTENTS.items():
        archive = whole()
        archive.add(name, b"\xff" * len(data))
        yield attack(name, archive.finish().data, ARCHIVE)


@trick
def name_twice_but_for_case() -> Iterator[Attack]:
    """miniz looks names up without case."""
    for name, other in (
        ("archive/data/0", "archive/DATA/0"),
        ("archive/data.pkl", "Archive/data.pkl"),
        ("archive/data.pkl", "archive/data.PKL"),
        ("archive/byteorder", "archive/ByteOrder"),
    ):
        archive = whole()
        archive.add(other, b"\xff" * len(CONTENTS[name]))
        yield attack(other, archive.finish().data, ARCHIVE)


@trick
def two_programs() -> Iterator[Attack]:
    """Which one is the checkpoint depends on who asks."""
    for name in ("other/data.pkl", "data.pkl"):
        for first in (True, False):
            archive = Zip()
            if first:
                archive.add(name, program())
            archive.add_all(CONTENTS.items())
            if not first:
                archive.add(name, program())
            yield attack(f"{name} {'first' if first else 'last'}", archive.finish().data, ARCHIVE)
    archive = whole()
    archive.add("archive/data.pkl/", program())
    yield attack("a folder of the name", archive.finish().data, RIGHT)


@trick
def local_name_differs() -> Iterator[Attack]:
    for tag, name in (
        ("another", b"archive/data/1"),
        ("case", b"archive/DATA/0"),
        ("longer", b"archive/data/0/"),
        ("shorter", b"archive/data/"),
        ("empty", b""),
        ("NUL", b"archive/data/\0"),
    ):
        yield attack(tag, bent(local_name=name).finish().data, ARCHIVE)
    yield attack("program", bent("archive/data.pkl", local_name=b"archive/data.pkX").finish().data, ARCHIVE)


@trick
def local_size_differs() -> Iterator[Attack]:
    for field in ("nbytes", "stored_nbytes"):
        for value in (0, 15, 17, 1 << 31, 0xFFFFFFFF):
            yield attack(f"{field} {value}", bent(local={field: value}).finish().data, ARCHIVE)


@trick
def local_method_differs() -> Iterator[Attack]:
    for method in (8, 12, 99):
        yield attack(method, bent(local={"method": method}).finish().data, ARCHIVE)


@trick
def local_crc_differs() -> Iterator[Attack]:
    yield attack("storage", bent(local={"crc": 1}).finish().data, ARCHIVE)
    yield attack("program", bent("archive/data.pkl", local={"crc": 1}).finish().data, ARCHIVE)


@trick
def local_flags_differ() -> Iterator[Attack]:
    """A flipped bit makes a scanner fail where torch goes on."""
    for bit in (0, 6, 13):
        yield attack(f"local {bit}", bent(local={"flags": 1 << bit}).finish().data, ARCHIVE, UNSUPPORTED)
        yield attack(f"directory {bit}", bent(central={"flags": 1 << bit}).finish().data, ARCHIVE, UNSUPPORTED)


@trick
def encrypted() -> Iterator[Attack]:
    for bit in (0, 6, 13):
        for name in ("archive/data/0", "archive/data.pkl"):
            yield attack(f"{name} {bit}", bent(name, flags=1 << bit).finish().data, ARCHIVE, UNSUPPORTED)


@trick
def local_signature_differs() -> Iterator[Attack]:
    for signature in (b"PK\5\6", b"PK\1\2", b"PK\7\x08", b"\0\0\0\0"):
        yield attack(signature, bent(local={"signature": signature}).finish().data, ARCHIVE)


@trick
def end_record_in_the_comment() -> Iterator[Attack]:
    """miniz and zipfile search backwards, and find the last signature: the comment's own archive."""
    inner = makers.checkpoint(program(), {"0": b"\xff" * 16}).data
    yield attack("archive", whole().finish(comment=inner).data, ARCHIVE)
    yield attack("end record", whole().finish(comment=makers.END.pack({"signature": b"PK\5\6"})).data, ARCHIVE)
    yield attack("signature", whole().finish(comment=b"PK\5\6" + bytes(30)).data, ARCHIVE)


@trick
def comment_length_lies() -> Iterator[Attack]:
    """Shorter ones leave bytes after the end, which some disks and tapes add."""
    for comment, nbytes, wanted in (
        (b"hello", 0, RIGHT),
        (b"hello", 4, RIGHT),
        (b"hello", 6, ARCHIVE),
        (b"", 1, ARCHIVE),
        (b"", 0xFFFF, ARCHIVE),
    ):
        data = whole().finish(comment=comment, end={"comment_nbytes": nbytes}).data
        yield attack(f"{nbytes} for {len(comment)}", data, wanted)


@trick
def bytes_after_the_end() -> Iterator[Attack]:
    """What cannot be another archive is padding, as torch.load and zipfile have it."""
    for tail in (b"\0", b"MZ" + bytes(600), bytes(70_000)):
        yield attack(len(tail), whole().finish(tail=tail).data, ARCHIVE if len(tail) > 0xFFFF else RIGHT)
    for signature in (b"PK\5\6", b"PK\6\6", b"PK\6\7", b"PK\1\2", b"PK\3\4"):
        yield attack(signature, whole().finish(tail=signature + bytes(60)).data, ARCHIVE, RIGHT)


@trick
def bytes_before_the_beginning() -> Iterator[Attack]:
    """A self-extracting archive; a GIF; a shell script."""
    for before in (b"\0", b"GIF89a", b"#!/bin/sh\nmkdir ZS_PWNED\n", bytes(70_000), b"PK\7\x08"):
        yield attack(f"shifted {before[:4]!r}", before + whole().finish().data, ARCHIVE)
        data = Zip(before).add_all(CONTENTS.items()).finish().data
        yield attack(f"with right offsets {before[:4]!r}", data, ARCHIVE, UNSUPPORTED)


@trick
def two_archives_joined() -> Iterator[Attack]:
    one, other = whole().finish().data, makers.checkpoint(program(), {"0": b"\xff" * 16}).data
    yield attack("one after the other", one + other, ARCHIVE)
    yield attack("twice the same", one + one, ARCHIVE)
    yield attack("the second within a record", bent("archive/version", stored=other).finish().data, ARCHIVE)


@trick
def zip64_locator_lies() -> Iterator[Attack]:
    """CVE-2025-8291: the offset was not compared with where the record is."""
    for field, value in (
        ("offset", 0),
        ("offset", (1 << 64) - 1),
        ("offset", 60),
        ("disk", 1),
        ("disks", 2),
    ):
        yield attack(f"{field} {value}", whole().finish(zip64=True, locator={field: value}).data, ARCHIVE)
    yield attack("signature", whole().finish(zip64=True, locator={"signature": b"PK\0\0"}).data, ARCHIVE)


@trick
def zip64_end_lies() -> Iterator[Attack]:
    for field in ("count", "here", "nbytes", "offset", "size"):
        for value in (0, 1, (1 << 63) - 1, (1 << 64) - 1):
            yield attack(f"{field} {value}", whole().finish(zip64=True, end64={field: value}).data, ARCHIVE)
    for field in ("disk", "directory_disk"):
        yield attack(field, whole().finish(zip64=True, end64={field: 1}).data, ARCHIVE)


@trick
def zip64_end_disagrees() -> Iterator[Attack]:
    """Two counts, of which one reader takes the one, the next the other."""
    for field, value in (("count", 1), ("here", 1), ("nbytes", 1), ("offset", 1)):
        yield attack(field, whole().finish(zip64=True, end={field: value}).data, ARCHIVE)


@trick
def zip64_missing() -> Iterator[Attack]:
    for field, value in (("count", 0xFFFF), ("offset", 0xFFFFFFFF), ("nbytes", 0xFFFFFFFF)):
        yield attack(field, whole().finish(end={field: value}).data, ARCHIVE)


@trick
def zip64_extra_field_lies() -> Iterator[Attack]:
    sizes = struct.pack("<2Q", 16, 16)
    saturated = {"nbytes": 0xFFFFFFFF, "stored_nbytes": 0xFFFFFFFF}
    for tag, central, field in (
        ("missing", saturated, b""),
        ("too short", saturated, extra_field(1, sizes[:8])),
        ("twice", saturated, extra_field(1, sizes) + extra_field(1, struct.pack("<2Q", 8, 8))),
        ("huge", saturated, extra_field(1, struct.pack("<2Q", 1 << 63, 1 << 63))),
        ("all ones", saturated, extra_field(1, b"\xff" * 16)),
        ("cut", saturated, extra_field(1, sizes)[:10]),
        ("length beyond", saturated, struct.pack("<2H", 1, 200) + sizes),
        ("offset", {"header_offset": 0xFFFFFFFF}, extra_field(1, struct.pack("<Q", 1 << 62))),
    ):
        yield attack(tag, bent(central=central, central_extra=field).finish().data, ARCHIVE)


@trick
def zip64_extra_field_without_need() -> Iterator[Attack]:
    """Sizes of which a reader that believes the field sees others."""
    for where in ("central_extra", "local_extra"):
        field = extra_field(1, struct.pack("<2Q", 8, 8))
        yield attack(where, bent(**{where: field}).finish().data, ARCHIVE, RIGHT)


@trick
def directory_count_lies() -> Iterator[Attack]:
    for count in (0, 1, 3, 5, 0xFFFE):
        yield attack(count, whole().finish(end={"count": count, "here": count}).data, ARCHIVE)
    yield attack("here", whole().finish(end={"here": 1}).data, ARCHIVE)


@trick
def directory_size_lies() -> Iterator[Attack]:
    for nbytes in (0, 1, 46, 0x7FFFFFFF, 0xFFFFFFFE):
        yield attack(nbytes, whole().finish(end={"nbytes": nbytes}).data, ARCHIVE)


@trick
def directory_offset_lies() -> Iterator[Attack]:
    right = whole().finish().directory_offset
    for offset in (0, right - 1, right + 1, right + 46, 0x7FFFFFFF, 0xFFFFFFFE):
        yield attack(offset - right, whole().finish(end={"offset": offset}).data, ARCHIVE)


@trick
def several_disks() -> Iterator[Attack]:
    for field in ("disk", "directory_disk"):
        yield attack(field, whole().finish(end={field: 1}).data, ARCHIVE)
    yield attack("of a record", bent(central={"disk": 1}).finish().data, ARCHIVE)


@trick
def header_offset_lies() -> Iterator[Attack]:
    for offset in (0, 1, 29, 0x7FFFFFFF, 0xFFFFFFFE):
        yield attack(offset, bent(central={"header_offset": offset}).finish().data, ARCHIVE)


@trick
def size_in_the_directory_lies() -> Iterator[Attack]:
    for field in ("nbytes", "stored_nbytes"):
        for value in (0, 15, 17, 0x7FFFFFFF, 0xFFFFFFFE):
            yield attack(f"{field} {value}", bent(central={field: value}).finish().data, ARCHIVE)


@trick
def both_sizes_lie() -> Iterator[Attack]:
    """Both headers agree, and the payload reaches into what comes next."""
    for nbytes in (17, 60, 200, 0x7FFFFFFF):
        fields = {"nbytes": nbytes, "stored_nbytes": nbytes}
        yield attack(nbytes, bent(local=fields, central=fields).finish().data, ARCHIVE)


@trick
def records_that_overlap() -> Iterator[Attack]:
    """CVE-2024-0450: a bomb without compression."""
    for shift in (0, 1, 30):
        archive = whole()
        at = archive.offset
        archive.add("archive/data/1", FOUR_FLOATS)
        archive.add("archive/data/2", FOUR_FLOATS, central={"header_offset": at + shift})
        yield attack(f"by {shift}", archive.finish().data, ARCHIVE)


@trick
def header_quoted_in_a_payload() -> Iterator[Attack]:
    """A record within a record: both names are whole and right."""
    inner = Zip()
    inner.add("archive/data/0", FOUR_FLOATS)
    quoted = bytes(inner._bytes)
    archive = Zip()
    archive.add("archive/data.pkl", program())
    at = archive.offset
    archive.add("archive/data/1", quoted)
    archive.add("archive/data/0", FOUR_FLOATS, central={"header_offset": at + 30 + len("archive/data/1")})
    yield attack("", archive.finish().data, ARCHIVE)


@trick
def record_into_the_directory() -> Iterator[Attack]:
    for more in (1, 50):
        fields = {"nbytes": 2 + more, "stored_nbytes": 2 + more}
        yield attack(more, bent("archive/version", local=fields, central=fields).finish().data, ARCHIVE)


@trick
def record_that_no_directory_lists() -> Iterator[Attack]:
    """Who walks the local headers sees it; nobody else does."""
    hidden = Zip()
    hidden.add("archive/data/0", b"\xff" * 16)
    archive = Zip()
    for name, data in CONTENTS.items():
        archive.raw(bytes(hidden._bytes))
        archive.add(name, data)
    yield attack("between", archive.finish().data, RIGHT)
    archive = whole()
    archive.raw(bytes(hidden._bytes))
    yield attack("before the directory", archive.finish().data, RIGHT)


@trick
def record_order_of_the_directory() -> Iterator[Attack]:
    """A right archive: the directory's order is nobody's business."""
    for order in ((3, 2, 1, 0), (2, 0, 3, 1)):
        yield attack(order, whole().finish(order=order).data, RIGHT)


@trick
def deflated_bomb() -> Iterator[Attack]:
    zeros = bytes(200 << 20)
    bomb = deflated(zeros)
    yield attack("program", makers.Zip().add_all([("archive/data.pkl", zeros)], method=DEFLATED).finish().data, PROGRAM)
    fields = {"nbytes": 16}
    yield attack("storage", bent(method=DEFLATED, stored=bomb, local=fields, central=fields).finish().data, ARCHIVE)
    yield attack("byteorder", bent("archive/byteorder", method=DEFLATED, stored=bomb).finish().data, ARCHIVE)


@trick
def deflated_size_lies() -> Iterator[Attack]:
    for nbytes in (0, 15, 17, 1 << 20, 0xFFFFFFF0):
        fields = {"nbytes": nbytes}
        data = bent(method=DEFLATED, local=fields, central=fields).finish().data
        yield attack(nbytes, data, ARCHIVE, TABLE)


@trick
def deflated_stream_is_damaged() -> Iterator[Attack]:
    right = deflated(FOUR_FLOATS)
    for tag, stored in (
        ("cut", right[:-1]),
        ("empty", b""),
        ("more after it", right + b"\0" * 9),
        ("two streams", right + right),
        ("reserved block", b"\x07" + right),
        ("endless", b"\x00\x00\x00\xff\xff" * 8),
        ("distance too far", bytes.fromhex("0a40000000")),
        ("zlib, not raw", zlib.compress(FOUR_FLOATS)),
    ):
        yield attack(tag, bent(method=DEFLATED, stored=stored).finish().data, ARCHIVE)


@trick
def method_unknown() -> Iterator[Attack]:
    for method in (1, 6, 9, 12, 14, 93, 95, 99, 0xFFFF):
        yield attack(method, bent(method=method).finish().data, ARCHIVE, UNSUPPORTED)


@trick
def name_is_hostile() -> Iterator[Attack]:
    """Names are keys, never paths: what has no say on the checkpoint may be there, and must stay a name."""
    for name in (
        b"../../etc/passwd",
        b"/etc/passwd",
        b"C:\\windows\\x",
        b"archive\\data\\0",
        b"archive/./data/0",
        b"a//b",
    ):
        archive = whole()
        archive.add(name, b"x")
        yield attack(name, archive.finish().data, ARCHIVE, RIGHT)
    for name in (b"archive/data/0\0.txt", b"\0", b"archive/data.pkl\0"):
        archive = whole()
        archive.add(name, b"x")
        yield attack(name, archive.finish().data, ARCHIVE)


@trick
def name_is_no_text() -> Iterator[Attack]:
    for flags in (0, makers.UTF8_FLAG):
        for name in (b"\xff\xfe", b"archive/\xed\xa0\x80", b"archive/\xc0\xae\xc0\xae", b"\x1b[2J\x1b]0;x\x07", b""):
            archive = whole()
            archive.add(name, b"x", flags=flags)
            yield attack((name, flags), archive.finish().data, ARCHIVE, RIGHT)


@trick
def name_is_long() -> Iterator[Attack]:
    for name in (b"a" * 0xFFFF, b"archive/" + b"b/" * 30_000, b"archive/data/" + b"0" * 60_000):
        archive = whole()
        archive.add(name, b"x")
        yield attack(name[-9:], archive.finish().data, ARCHIVE, RIGHT)


@trick
def prefix_is_hostile() -> Iterator[Attack]:
    for prefix in ("..", ".", "", "../..", "a/../b", "\x1b[2J"):
        archive = Zip().add_all((name.replace("archive", prefix, 1), data) for name, data in CONTENTS.items())
        yield attack(repr(prefix), archive.finish().data, ARCHIVE, RIGHT)


@trick
def program_missing() -> Iterator[Attack]:
    for name in ("archive/data.pkl/", "archive/DATA.PKL", "archive/data.pkl.txt", "archive/xdata.pkl", "data.pkl"):
        records = [(name if key == "archive/data.pkl" else key, data) for key, data in CONTENTS.items()]
        yield attack(name, Zip().add_all(records).finish().data, ARCHIVE, UNSUPPORTED)
    yield attack("no record at all", Zip().finish().data, ARCHIVE)


@trick
def many_names() -> Iterator[Attack]:
    """40,000 records, whose names once collided in a hash table without a secret."""
    names = [f"archive/data/{i}" for i in range(1, 20_001)]
    archive = whole().add_all((name, b"") for name in names)
    yield attack("", archive.finish().data, RIGHT)


@trick
def names_of_one_hash() -> Iterator[Attack]:
    """Names that FNV-1a and a plain sum hash alike are permutations and repetitions: no table may mind."""
    shuffled = random.Random(1)
    letters = list("abcdefghijkl")
    names: set[str] = set()
    while len(names) < 20_000:
        shuffled.shuffle(letters)
        names.add("archive/data/" + "".join(letters))
    archive = whole().add_all((name, b"") for name in sorted(names))
    yield attack("", archive.finish().data, RIGHT)


@trick
def byteorder_is_hostile() -> Iterator[Attack]:
    for content in (b"", b"LITTLE", b"middle", b"little\n", b"\0", b"big\0", b"little" * 20_000):
        records = {**CONTENTS, "archive/byteorder": content}
        wanted = PROGRAM if len(content) > 64 else ARCHIVE  # which is the limit of such a record
        yield attack(content[:8], Zip().add_all(records.items()).finish().data, wanted)


@trick
def claims_of_the_layout() -> Iterator[Attack]:
    """Records by which torch computes where tensors lie, without looking."""
    for name, content in (
        ("archive/.format_version", b"1"),
        ("archive/.storage_alignment", b"1"),
        ("archive/.storage_alignment", b"-1"),
        ("archive/.storage_alignment", b"9" * 5000),
        ("archive/.data/serialization_id", b"\xff" * 40),
        ("archive/version", b"99999999999999999999"),
    ):
        records = {**CONTENTS, name: content}
        yield attack((name, content[:8]), Zip().add_all(records.items()).finish().data, RIGHT)


@trick
def descriptor_lies() -> Iterator[Attack]:
    archive = Zip()
    for name, data in CONTENTS.items():
        archive.add(name, data, flags=makers.DESCRIPTOR_FLAG, local={"crc": 0, "stored_nbytes": 0, "nbytes": 0})
    yield attack("none there", archive.finish().data, ARCHIVE, RIGHT)
    lies = bytearray(bent(descriptor=16).finish().data)
    at = lies.index(b"PK\7\x08")
    lies[at + 8 : at + 16] = struct.pack("<2L", 8, 8)
    yield attack("other sizes", bytes(lies), ARCHIVE, RIGHT)


@trick
def extra_field_lies() -> Iterator[Attack]:
    for where in ("central", "local"):
        for tag, field in (
            ("length beyond", struct.pack("<2H", 0x4246, 5000) + b"Z" * 4),
            ("one byte", b"Z"),
            ("three bytes", b"ZZZ"),
        ):
            yield attack(f"{where} {tag}", bent(**{f"{where}_extra": field}).finish().data, ARCHIVE, RIGHT)
        yield attack(f"{where} nbytes", bent(**{where: {"extra_nbytes": 0xFFFF}}).finish().data, ARCHIVE)


@trick
def extra_field_of_another_name() -> Iterator[Attack]:
    """Info-ZIP's Unicode path: who honours it sees the record under that name."""
    field = extra_field(0x7075, b"\1" + struct.pack("<L", zlib.crc32(b"archive/data/0")) + b"archive/data/9")
    yield attack("directory", bent(central_extra=field).finish().data, ARCHIVE, RIGHT)
    yield attack("local", bent(local_extra=field).finish().data, ARCHIVE, RIGHT)


@trick
def lengths_in_the_directory_lie() -> Iterator[Attack]:
    for field in ("name_nbytes", "extra_nbytes", "comment_nbytes"):
        for value in (1, 0xFFFF):
            yield attack(f"{field} {value}", bent(central={field: value}).finish().data, ARCHIVE)


@trick
def comment_of_a_record() -> Iterator[Attack]:
    yield attack("headers in it", bent(comment=makers.CENTRAL.pack({"signature": b"PK\1\2"}) * 9).finish().data, RIGHT)


@trick
def signature_of_the_directory() -> Iterator[Attack]:
    for signature in (b"PK\5\5", b"PK\3\4", b"\0\0\0\0"):
        yield attack(signature, bent(central={"signature": signature}).finish().data, ARCHIVE)


@trick
def archive_in_an_archive() -> Iterator[Attack]:
    """What is stored in a record stays there."""
    inner = whole().finish().data
    yield attack("a record", Zip().add_all([("x.pth", inner)]).finish().data, ARCHIVE, UNSUPPORTED)
    archive = whole()
    archive.add("archive/extra.pth", inner)
    yield attack("beside", archive.finish().data, ARCHIVE, RIGHT)


@trick
def archive_that_holds_itself() -> Iterator[Attack]:
    """The directory lists a record that reaches from the first byte to the directory."""
    archive = Zip()
    nbytes = 4000
    fields = {"nbytes": nbytes, "stored_nbytes": nbytes}
    archive.add("archive/data.pkl", program(), local=fields, central=fields)
    archive.add_all(list(CONTENTS.items())[1:])
    archive.raw(bytes(nbytes))
    yield attack("", archive.finish().data, ARCHIVE)


@trick
def other_containers() -> Iterator[Attack]:
    """7z was how nullifAI went past a scanner."""
    for tag, head in (
        ("7z", b"7z\xbc\xaf\x27\x1c\0\4"),
        ("rar", b"Rar!\x1a\7\1\0"),
        ("bz2", b"BZh91AY&SY"),
        ("xz", b"\xfd7zXZ\0"),
        ("zstd", b"\x28\xb5\x2f\xfd"),
        ("lz4", b"\4\x22\x4d\x18"),
        ("hdf5", b"\x89HDF\r\n\x1a\n"),
        ("gguf", b"GGUF\3\0\0\0"),
        ("numpy", b"\x93NUMPY\1\0"),
        ("elf", b"\x7fELF\2\1\1\0"),
        ("html", b"<!DOCTYPE html><html>"),
        ("lfs pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:"),
        ("xml", b"<?xml version='1.0'?>"),
    ):
        yield attack(tag, head + bytes(500), ARCHIVE, UNSUPPORTED)


@trick
def gzip_bomb() -> Iterator[Attack]:
    target = io.BytesIO()
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    for _ in range(300):
        target.write(packer.compress(bytes(1 << 20)))
    target.write(packer.flush())
    yield attack("zeros", target.getvalue(), ARCHIVE, unpacks=True)


@trick
def tiny_files() -> Iterator[Attack]:
    for content in (
        b"",
        b"P",
        b"PK",
        b"PK\3\4",
        b"PK\5\6",
        b"PK\5\6" + bytes(17),
        b"PK\5\6" + bytes(18),
        b"\x80",
        b"\x80\2",
    ):
        yield attack((content[:6], len(content)), content, ARCHIVE, UNSUPPORTED)


@trick
def nothing_in_it() -> Iterator[Attack]:
    """Right, and empty."""
    yield attack("dict", makers.checkpoint(b"\x80\2}.").data, INERT)
    yield attack("none", makers.checkpoint(b"\x80\2N.").data, INERT)
