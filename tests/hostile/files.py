"""Files: tricks with the file itself, with what is no file, and with the JSON of the formats beside torch's own."""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hostile import (
    ARCHIVE,
    FOUR_FLOATS,
    INERT,
    NUMBERS,
    PROGRAM,
    RIGHT,
    UNSUPPORTED,
    Attack,
    attack,
    checkpoint,
    program,
    trick,
    w,
)


def laid(lay: Callable[[Path], object]) -> Callable[[Path], Path]:
    """A path in the folder, where something was laid."""

    def place(folder: Path) -> Path:
        lay(folder / "x.pth")
        return folder / "x.pth"

    return place


@trick
def not_a_file() -> Iterator[Attack]:
    """A FIFO hangs torch.load, and /dev/zero never ends."""
    yield attack("folder", laid(lambda path: path.mkdir()), "IsADirectoryError")
    yield attack("FIFO", laid(os.mkfifo), "OSError")
    yield attack("missing", laid(lambda path: None), "FileNotFoundError")
    yield attack("link to itself", laid(lambda path: path.symlink_to(path)), "OSError")
    yield attack("link to nowhere", laid(lambda path: path.symlink_to("/nowhere/at/all")), "FileNotFoundError")

    def listening(path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(os.path.relpath(path))

    yield attack("socket", laid(listening), "OSError")
    for device in ("/dev/zero", "/dev/full", "/dev/random", "/dev/tty"):
        yield attack(device, lambda folder, device=device: Path(device), "OSError")  # type: ignore[misc]
    for strange in ("/proc/self/mem", "/proc/self/environ", "/proc/kmsg"):
        yield attack(strange, lambda folder, strange=strange: Path(strange), "OSError", ARCHIVE)  # type: ignore[misc]


@trick
def not_readable() -> Iterator[Attack]:
    def lay(path: Path) -> None:
        path.write_bytes(checkpoint(program()))
        path.chmod(0)

    # Root reads it all the same.
    yield attack("", laid(lay), RIGHT if os.geteuid() == 0 else "PermissionError")


@trick
def mostly_hole() -> Iterator[Attack]:
    """A terabyte that takes no room on the disk, before and behind an archive."""
    data = checkpoint(program())

    def behind(path: Path) -> None:
        path.write_bytes(data)
        os.truncate(path, 1 << 40)

    def before(path: Path) -> None:
        with path.open("wb") as file:
            file.seek((1 << 40) - len(data))
            file.write(data)

    def hole(path: Path) -> None:
        path.touch()
        os.truncate(path, 1 << 40)

    yield attack("behind", laid(behind), ARCHIVE)
    yield attack("before", laid(before), ARCHIVE, UNSUPPORTED)
    yield attack("nothing else", laid(hole), ARCHIVE, UNSUPPORTED)


@trick
def name_of_the_file() -> Iterator[Attack]:
    """The path shows in errors, and in a repr."""
    for name in ("\x1b[2J.pth", "a\nb.pth", "\udcff.pth", "$(mkdir ZS_PWNED).pth", "x" * 200 + ".pth"):

        def place(folder: Path, name: str = name) -> Path:
            (folder / name).write_bytes(checkpoint(program()))
            return folder / name

        def broken(folder: Path, name: str = name) -> Path:
            (folder / name).write_bytes(b"PK\3\4")
            return folder / name

        yield attack(f"{name[:9]!r}", place, RIGHT)
        yield attack(f"{name[:9]!r} broken", broken, ARCHIVE)


# --- safetensors ---


def safe(header: Any, data: bytes = FOUR_FLOATS, *, nbytes: int | None = None) -> Callable[[Path], Path]:
    """A safetensors file with that header: an object, or its text."""

    def place(folder: Path) -> Path:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path = folder / "x.safetensors"
        path.write_bytes(struct.pack("<Q", len(text) if nbytes is None else nbytes) + text + data)
        return path

    return place


def one(**bent: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **bent}}


@trick
def safetensors_header_lies() -> Iterator[Attack]:
    right = json.dumps(one()).encode()
    for nbytes in (0, 1, len(right) - 1, len(right) + 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1):
        yield attack(nbytes, safe(right, nbytes=nbytes), ARCHIVE, UNSUPPORTED)
    for tag, text in (
        ("no JSON", b"{" * 200),
        ("deep", b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        ("no object", b"[1, 2]"),
        ("empty", b"{}"),
        ("not UTF-8", b'{"\xff": 1}'),
        ("number", b'{"w": 1e999}'),
    ):
        yield attack(tag, safe(text), ARCHIVE, UNSUPPORTED, "ChangedError")


@trick
def safetensors_tensor_lies() -> Iterator[Attack]:
    for tag, header in (
        ("offsets beyond", one(data_offsets=[0, 1 << 40], shape=[1 << 38])),
        ("offsets reversed", one(data_offsets=[16, 0])),
        ("offsets negative", one(data_offsets=[-16, 0])),
        ("hole", one(data_offsets=[4, 16], shape=[3])),
        ("shape", one(shape=[5])),
        ("shape wraps", one(shape=[1 << 62, 4])),
        ("shape negative", one(shape=[-4])),
        ("shape float", one(shape=[4.0])),
        ("dtype", one(dtype="os.system")),
        ("overlap", {**one(), "v": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}),
        ("many dimensions", one(shape=[1] * 5000 + [4])),
        ("no dtype", {"w": {"shape": [4], "data_offsets": [0, 16]}}),
        ("metadata of numbers", {**one(), "__metadata__": {"a": 1}}),
    ):
        yield attack(tag, safe(header), ARCHIVE, UNSUPPORTED)


@trick
def safetensors_name_is_hostile() -> Iterator[Attack]:
    for name in ("../x", "\x1b[2J", "a\0b", "\ud800", "__class__", "x" * 50_000):
        header = {**one(), name: {"dtype": "F32", "shape": [0], "data_offsets": [16, 16]}}
        wanted = (ARCHIVE,) if name == "\ud800" else (RIGHT,)
        yield attack(
            name[:9].encode("utf-8", "backslashreplace"),
            safe(header),
            *wanted,
            holds={"w": NUMBERS, name: []},
        )


# --- indices of shards ---


def sharded(index: Any) -> Callable[[Path], Path]:
    """An index of that content, beside one right shard, in a folder beside which lies another."""

    def place(folder: Path) -> Path:
        inside = folder / "model"
        inside.mkdir()
        (inside / "a.bin").write_bytes(checkpoint(program()))
        (folder / "outside.bin").write_bytes(checkpoint(program()))
        path = inside / "pytorch_model.bin.index.json"
        path.write_bytes(index if isinstance(index, bytes) else json.dumps(index).encode())
        return path

    return place


@trick
def index_leads_out() -> Iterator[Attack]:
    for name in (
        "../outside.bin",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a.bin\0",
        "sub/../../outside.bin",
        "..\\outside.bin",
        "a.bin/",
        "\x1b[2J",
    ):
        yield attack(repr(name), sharded({"weight_map": {"w": name}}), ARCHIVE)


@trick
def index_is_hostile() -> Iterator[Attack]:
    for tag, content in (
        ("no JSON", b"{"),
        ("deep", b"[" * 200_000),
        ("deep and whole", b'{"weight_map": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        ("empty", b""),
        ("no map", {"metadata": {}}),
        ("map is a list", {"weight_map": ["a.bin"]}),
        ("file is a number", {"weight_map": {"w": 1}}),
        ("file is a list", {"weight_map": {"w": ["a.bin"]}}),
        ("a key twice", b'{"weight_map": {"w": "a.bin", "w": "b.bin"}}'),
        ("number of digits", b'{"weight_map": ' + b"9" * 100_000 + b"}"),
        ("NaN", b'{"weight_map": NaN}'),
        ("not UTF-8", b'{"weight_map": {"\xff": "a.bin"}}'),
        ("key missing in the shard", {"weight_map": {"w": "a.bin", "v": "a.bin"}}),
        ("index names itself", {"weight_map": {"w": "pytorch_model.bin.index.json"}}),
        ("shard missing", {"weight_map": {"w": "b.bin"}}),
    ):
        yield attack(tag, sharded(content), ARCHIVE, PROGRAM, UNSUPPORTED, RIGHT)


@trick
def index_to_a_device() -> Iterator[Attack]:
    """A shard that is a FIFO, or a link that leads out."""

    def place(lay: Callable[[Path], object]) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            path = sharded({"weight_map": {"w": "b.bin"}})(folder)
            lay(path.with_name("b.bin"))
            return path

        return make

    yield attack("FIFO", place(os.mkfifo), "OSError", ARCHIVE)
    yield attack("folder", place(lambda path: path.mkdir()), "IsADirectoryError", ARCHIVE)
    yield attack("device", place(lambda path: path.symlink_to("/dev/zero")), "OSError", ARCHIVE)


@trick
def extension_lies() -> Iterator[Attack]:
    """picklescan CVE-2025-1889: what a file is called says nothing of what it is."""
    for name in ("x.safetensors", "x.index.json", "x.txt", "x.zip", "x.npz"):

        def place(folder: Path, name: str = name) -> Path:
            (folder / name).write_bytes(checkpoint(program(w=w())))
            return folder / name

        yield attack(name, place, RIGHT, ARCHIVE, UNSUPPORTED)


@trick
def empty_things() -> Iterator[Attack]:
    yield attack("empty file", laid(lambda path: path.touch()), ARCHIVE, UNSUPPORTED)
    yield attack("empty folder", lambda folder: folder, "IsADirectoryError")
    yield attack("empty dict", checkpoint(b"\x80\2}."), INERT)
