"""Streams: tricks with what torch.save wrote before ZIP, a chain of pickles or a tar file of four."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import makers
from makers import Pickle

from hostile import (
    ARCHIVE,
    FOUR_FLOATS,
    INERT,
    PROGRAM,
    PWNED,
    RIGHT,
    TABLE,
    UNSUPPORTED,
    Attack,
    attack,
    program,
    trick,
    w,
)

FOUR = {"0": (4, FOUR_FLOATS)}
ANY = (ARCHIVE, PROGRAM, TABLE, UNSUPPORTED)


def legacy(**bent: object) -> Pickle:
    """A program of one tensor, whose persistent id has the sixth part that streams have."""
    pickle = Pickle().raw(b"}(").text("w")
    w(view="", **bent)(pickle)
    return pickle.raw(b"u")


@trick
def stream_element_count_lies() -> Iterator[Attack]:
    for count in (0, 3, 5, 1 << 20, (1 << 63) - 1, -1, -(1 << 63), 0x4000000000000004):
        yield attack(count, makers.stream(legacy().stop(), {"0": (count, FOUR_FLOATS)}), *ANY)


@trick
def stream_is_cut() -> Iterator[Attack]:
    data = makers.stream(legacy().stop(), FOUR)
    for kept in range(1, len(data), 23):
        yield attack(kept, data[:kept], *ANY)
    yield attack("last byte", data[:-1], *ANY)


@trick
def stream_lists_other_storages() -> Iterator[Attack]:
    for tag, keys in (
        ("none", []),
        ("twice", ["0", "0"]),
        ("another", ["1"]),
        ("one more", ["0", "1"]),
        ("hostile", ["../0"]),
    ):
        yield attack(tag, makers.stream(legacy().stop(), FOUR, keys=keys), *ANY)


@trick
def stream_with_a_hostile_head() -> Iterator[Attack]:
    """CVE-2025-32434: a way beside the safe one."""
    payload = Pickle().call("os", "mkdir", lambda p: p.text(PWNED)).stop()
    magic, protocol = Pickle().integer(0x1950A86A20F9469CFC6C).stop(), Pickle().integer(1001).stop()
    about, tail = (
        Pickle().raw(b"}").stop(),
        Pickle().raw(b"](").text("0").raw(b"e").stop() + struct.pack("<q", 4) + FOUR_FLOATS,
    )
    main = legacy().stop()
    for tag, parts in (
        ("instead of the magic number", (payload, protocol, about, main, tail)),
        ("instead of the protocol", (magic, payload, about, main, tail)),
        ("as the program", (magic, protocol, about, payload, tail)),
        ("instead of the keys", (magic, protocol, about, main, payload)),
        ("another protocol", (magic, Pickle().integer(1002).stop(), about, main, tail)),
        ("magic number twice", (magic, magic, protocol, about, main, tail)),
    ):
        yield attack(tag, b"".join(parts), *ANY, INERT)
    yield attack("as what the system was", b"".join((magic, protocol, payload, main, tail)), *ANY, RIGHT)


@trick
def stream_view_outside() -> Iterator[Attack]:
    for view in (("0", 5, 1), ("0", -1, 1), ("0", 0, 5), ("0", 1 << 62, 1 << 62), ("9", 0, 9), ("0", 0, -1)):
        pickle = Pickle().raw(b"}(").text("w")
        w(view=view, numel=4, size=[1])(pickle)
        yield attack(view, makers.stream(pickle.raw(b"u").stop(), FOUR), *ANY, RIGHT, holds={"w": [1.0]})


@trick
def stream_geometry_outside() -> Iterator[Attack]:
    for bent in ({"size": [5]}, {"stride": [9]}, {"storage_offset": 4}, {"size": [1 << 62], "stride": [4]}):
        yield attack(bent, makers.stream(legacy(**bent).stop(), FOUR), TABLE)


@trick
def stream_with_more_after_it() -> Iterator[Attack]:
    data = makers.stream(legacy().stop(), FOUR)
    for tail in (b"\0", b"PK\3\4" + bytes(100), data):
        yield attack(tail[:4], data + tail, *ANY, RIGHT)
    archive = makers.checkpoint(program(), {"0": b"\xff" * 16}).data
    yield attack("an archive", data + archive, *ANY, RIGHT)


@trick
def plain_pickle() -> Iterator[Attack]:
    """No torch file: what pickle.dump wrote, which others load and run."""
    for tag, content in (
        ("payload", Pickle().call("os", "mkdir", lambda p: p.text(PWNED)).stop()),
        ("numbers", b"\x80\4]\x94(K\1K\2e."),
        ("protocol 0", b"cos\nmkdir\n(S'" + PWNED.encode() + b"'\ntR."),
    ):
        yield attack(tag, content, *ANY)


def tarred(**bent: bytes) -> bytes:
    """A tar file of one tensor, some of whose members are others."""
    pickle = Pickle().raw(b"}(").text("w").raw(b"K\7Q").raw(b"u").stop()
    members = makers.tar_members([(3, "FloatStorage", 4, FOUR_FLOATS)], [], [(7, 3, [4], [1], 0)], pickle)
    return makers.tar({**members, **{name: content for name, content in bent.items() if content}})


@trick
def tar_member_lies() -> Iterator[Attack]:
    row = Pickle().mark().integer(3).text("cpu").name("torch", "FloatStorage").raw(b"t").stop()
    for count in (0, 5, 1 << 40, -1, (1 << 63) - 1):
        rows = Pickle().integer(1).stop() + row + struct.pack("<q", count) + FOUR_FLOATS + b"\x80\2]."
        yield attack(f"elements {count}", tarred(storages=rows), *ANY)
    for many in (-1, 0, 2, 1 << 40):
        rows = Pickle().integer(many).stop() + row + struct.pack("<q", 4) + FOUR_FLOATS + b"\x80\2]."
        yield attack(f"rows {many}", tarred(storages=rows), *ANY)


@trick
def tar_tensor_lies() -> Iterator[Attack]:
    head = Pickle().mark().integer(7).integer(3).name("torch", "FloatTensor").raw(b"t").stop()
    for tag, ndim, numbers in (
        ("size", 1, (5, 1, 0)),
        ("stride", 1, (4, 9, 0)),
        ("offset", 1, (4, 1, 1)),
        ("negative", 1, (4, 1, -1)),
        ("wraps", 2, (1 << 62, 4, 4, 1, 0)),
        ("dimensions", 1 << 30, ()),
        ("dimensions negative", -1, ()),
    ):
        row = head + struct.pack(f"<2i{len(numbers)}q", ndim, 0, *numbers)
        yield attack(tag, tarred(tensors=Pickle().integer(1).stop() + row), *ANY)


@trick
def tar_with_a_hostile_member() -> Iterator[Attack]:
    """The door of CVE-2025-32434: the tar loader ran these with the plain pickle."""
    payload = Pickle().call("os", "mkdir", lambda p: p.text(PWNED)).stop()
    for name in ("pickle", "storages", "tensors"):
        yield attack(name, tarred(**{name: payload}), *ANY, INERT)
    yield attack("sys_info", tarred(sys_info=payload), *ANY, RIGHT)


@trick
def tar_header_lies() -> Iterator[Attack]:
    data = tarred()
    at = data.index(b"storages")

    def bend(offset: int, content: bytes) -> bytes:
        changed = bytearray(data)
        changed[at + offset : at + offset + len(content)] = content
        head = changed[at : at + 512]
        head[148:156] = b" " * 8
        changed[at + 148 : at + 156] = b"%06o\0 " % sum(head)
        return bytes(changed)

    for tag, offset, content in (
        ("size", 124, b"77777777777\0"),
        ("size in binary", 124, b"\x80" + b"\xff" * 11),
        ("size negative", 124, b"\xff" * 12),
        ("size of words", 124, b"os.system()\0"),
        ("symbolic link", 156, b"2/etc/passwd"),
        ("hard link", 156, b"1sys_info"),
        ("device", 156, b"3"),
        ("sparse", 156, b"S"),
        ("name", 0, b"../../x"),
    ):
        yield attack(tag, bend(offset, content), *ANY)
    yield attack("checksum", data[: at + 148] + b"0000000\0" + data[at + 156 :], *ANY)
    for kept in (100, 512, 1000, at + 100, at + 530):
        yield attack(f"cut at {kept}", data[:kept], *ANY)


@trick
def tar_member_twice() -> Iterator[Attack]:
    data = tarred()
    end = data.rindex(b"\0" * 1024)
    yield attack("", data[:-10240] * 2 + data[-10240:] if end else data, *ANY, RIGHT)
