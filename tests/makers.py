"""Makers: the bytes of archives and pickles, right or bent field by field, without zipfile, pickle or torch in the way.

A `Zip` writes records one after another and then the directory; every field of every header takes an override by its
name, so that a test says what it bends and nothing else. A `Pickle` is an assembler: one method an opcode or a shape
that torch writes. Whoever needs to know where something landed asks the `Written` archive, or `opcode_offset`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import os
import pickletools
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

# For tests that look at tensors, whatever makes them: those of the environment without torch run too.
FRAMEWORK = "pt" if importlib.util.find_spec("torch") else "np"


def unmeasured() -> dict[str, str]:
    """The environment of a process that coverage is not to follow into: its tracer is a hook, and takes time and memory."""
    return {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}


M16 = 0xFFFF
M32 = 0xFFFFFFFF

DESCRIPTOR_FLAG = 1 << 3
UTF8_FLAG = 1 << 11

STORED = 0
DEFLATED = 8

Value = int | bytes
Bend = Mapping[str, Value] | None  # field name -> what to write in place of the right value


@dataclasses.dataclass(frozen=True)
class Layout:
    """A fixed record of named little-endian fields; a field missing from `values` is 0."""

    format: str
    fields: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return struct.calcsize(self.format)

    def pack(self, values: Mapping[str, Value], bend: Bend = None) -> bytes:
        bend = bend or {}
        unknown = set(bend) - set(self.fields)
        if unknown:
            raise TypeError(f"no such field: {sorted(unknown)}; there are {self.fields}")
        return struct.pack(self.format, *(bend.get(name, values.get(name, 0)) for name in self.fields))


LOCAL = Layout(
    "<4s5H3L2H",
    (
        "signature",
        "version",
        "flags",
        "method",
        "time",
        "date",
        "crc",
        "stored_nbytes",
        "nbytes",
        "name_nbytes",
        "extra_nbytes",
    ),
)
CENTRAL = Layout(
    "<4s6H3L5H2L",
    (
        "signature",
        "made_by",
        "version",
        "flags",
        "method",
        "time",
        "date",
        "crc",
        "stored_nbytes",
        "nbytes",
        "name_nbytes",
        "extra_nbytes",
        "comment_nbytes",
        "disk",
        "internal",
        "external",
        "header_offset",
    ),
)
END = Layout("<4s4H2LH", ("signature", "disk", "directory_disk", "here", "count", "nbytes", "offset", "comment_nbytes"))
END64 = Layout(
    "<4sQ2H2L4Q",
    (
        "signature",
        "size",
        "made_by",
        "version",
        "disk",
        "directory_disk",
        "here",
        "count",
        "nbytes",
        "offset",
    ),
)
LOCATOR = Layout("<4sLQL", ("signature", "disk", "offset", "disks"))


def extra_field(ident: int, content: bytes) -> bytes:
    """One extra field: id, length, content."""
    return struct.pack("<2H", ident, len(content)) + content


def torch_padding(nbytes: int) -> bytes:
    """The field with which torch pads a local header: "FB", then Zs."""
    return extra_field(0x4246, b"Z" * nbytes)


@dataclasses.dataclass(frozen=True)
class Record:
    """Where a record was written."""

    name: str
    header_offset: int
    payload_offset: int
    stored_nbytes: int


@dataclasses.dataclass(frozen=True)
class Written:
    """A finished archive, and where its parts lie."""

    data: bytes
    records: tuple[Record, ...]
    central_offsets: tuple[int, ...]  # one central header a record
    directory_offset: int
    end_offset: int  # of the end record with the signature PK 5 6

    def record(self, name: str) -> Record:
        """The first record of that name."""
        return next(record for record in self.records if record.name == name)


class Zip:
    """Writes records, then the directory. What is not bent is right."""

    def __init__(self, before: bytes = b"") -> None:
        self._bytes = bytearray(before)
        self._records: list[Record] = []
        self._central: list[bytes] = []

    @property
    def offset(self) -> int:
        """Where the next local header will stand."""
        return len(self._bytes)

    def add(
        self,
        name: str | bytes,
        data: bytes = b"",
        *,
        method: int = STORED,
        stored: bytes | None = None,
        flags: int = 0,
        crc: int | None = None,
        descriptor: int = 0,
        zip64: bool = False,
        local_extra: bytes = b"",
        central_extra: bytes = b"",
        local_name: bytes | None = None,
        local: Bend = None,
        central: Bend = None,
        comment: bytes = b"",
    ) -> Record:
        """Write one record.

        Args:
            name: of the record; `local_name` if the local header shall have another one.
            data: what a reader gets. `stored`: the bytes to put into the file in place of the right ones.
            descriptor: 0, or the 12, 16 or 24 bytes of a data descriptor; the local sizes and CRC are then 0.
            zip64: true sizes and offset only in ZIP64 extra fields, the 32-bit fields saturated.
            local, central: fields of the two headers by name, in place of the right values.
        """
        raw_name = name.encode() if isinstance(name, str) else name
        if stored is None:
            stored = deflated(data) if method == DEFLATED else data
        crc = zlib.crc32(data) if crc is None else crc
        if descriptor:
            flags |= DESCRIPTOR_FLAG
        header_offset = self.offset
        written_name = raw_name if local_name is None else local_name
        if zip64:
            # In a streamed record the true sizes follow the payload: the local ZIP64 field is there, and holds zeros.
            sizes = (0, 0) if descriptor else (len(data), len(stored))
            local_extra = extra_field(1, struct.pack("<2Q", *sizes)) + local_extra
            central_extra = extra_field(1, struct.pack("<3Q", len(data), len(stored), header_offset)) + central_extra
        shared: dict[str, Value] = {"version": 45 if zip64 else 20, "flags": flags, "method": method, "date": 33}
        local_values: dict[str, Value] = {
            **shared,
            "signature": b"PK\3\4",
            "crc": 0 if descriptor else crc,
            "stored_nbytes": M32 if zip64 else 0 if descriptor else len(stored),
            "nbytes": M32 if zip64 else 0 if descriptor else len(data),
            "name_nbytes": len(written_name),
            "extra_nbytes": len(local_extra),
        }
        central_values: dict[str, Value] = {
            **shared,
            "signature": b"PK\1\2",
            "made_by": 45,
            "crc": crc,
            "stored_nbytes": M32 if zip64 else len(stored),
            "nbytes": M32 if zip64 else len(data),
            "name_nbytes": len(raw_name),
            "extra_nbytes": len(central_extra),
            "comment_nbytes": len(comment),
            "header_offset": M32 if zip64 else header_offset,
        }
        self._bytes += LOCAL.pack(local_values, local) + written_name + local_extra
        payload_offset = self.offset
        self._bytes += stored
        if descriptor == 12:
            self._bytes += struct.pack("<3L", crc, len(stored), len(data))
        elif descriptor == 16:
            self._bytes += struct.pack("<4s3L", b"PK\7\x08", crc, len(stored), len(data))
        elif descriptor == 24:
            self._bytes += struct.pack("<4sL2Q", b"PK\7\x08", crc, len(stored), len(data))
        elif descriptor:
            raise ValueError(f"a descriptor has 12, 16 or 24 bytes, not {descriptor}")
        self._central.append(CENTRAL.pack(central_values, central) + raw_name + central_extra + comment)
        record = Record(raw_name.decode("latin-1"), header_offset, payload_offset, len(stored))
        self._records.append(record)
        return record

    def add_all(self, records: Iterable[tuple[str, bytes]], **keywords: Any) -> Zip:
        """Add each (name, data) with the same keywords."""
        for name, data in records:
            self.add(name, data, **keywords)
        return self

    def raw(self, content: bytes) -> None:
        """Bytes that belong to no record."""
        self._bytes += content

    def finish(
        self,
        *,
        comment: bytes = b"",
        tail: bytes = b"",
        zip64: bool = False,
        order: Sequence[int] | None = None,
        end: Bend = None,
        end64: Bend = None,
        locator: Bend = None,
    ) -> Written:
        """Write the directory and the end records.

        Args:
            comment, tail: the archive's comment, and bytes after its end.
            zip64: also write the ZIP64 end record and locator; done anyway for 65,535 records and more.
            order: the records' order in the directory, if not the one they were written in.
            end, end64, locator: fields by name, in place of the right values.
        """
        central = self._central if order is None else [self._central[i] for i in order]
        directory_offset = self.offset
        central_offsets = []
        for header in central:
            central_offsets.append(self.offset)
            self._bytes += header
        nbytes, count = self.offset - directory_offset, len(central)
        zip64 = zip64 or count >= M16
        where: dict[str, Value] = {"here": count, "count": count, "nbytes": nbytes, "offset": directory_offset}
        if zip64:
            end64_offset = self.offset
            self._bytes += END64.pack(
                {**where, "signature": b"PK\6\6", "size": END64.nbytes - 12, "made_by": 45, "version": 45}, end64
            )
            self._bytes += LOCATOR.pack({"signature": b"PK\6\7", "offset": end64_offset, "disks": 1}, locator)
            where = {"here": min(count, M16), "count": min(count, M16), "nbytes": nbytes, "offset": M32}
        end_offset = self.offset
        self._bytes += END.pack({**where, "signature": b"PK\5\6", "comment_nbytes": len(comment)}, end) + comment + tail
        return Written(bytes(self._bytes), tuple(self._records), tuple(central_offsets), directory_offset, end_offset)


def deflated(data: bytes) -> bytes:
    """A raw deflate stream, as method 8 has it."""
    packer = zlib.compressobj(6, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


def checkpoint(
    program: bytes, storages: Mapping[str, bytes] | None = None, *, byteorder: bytes | None = b"little"
) -> Written:
    """The smallest archive that torch.load would take: a pickle, its storages, and the records beside them."""
    archive = Zip()
    archive.add("archive/data.pkl", program)
    if byteorder is not None:
        archive.add("archive/byteorder", byteorder)
    for key, data in (storages or {}).items():
        archive.add(f"archive/data/{key}", data)
    archive.add("archive/version", b"3\n")
    return archive.finish()


# --- before ZIP ---


def stream(program: bytes, storages: Mapping[str, tuple[int, bytes]], *, keys: Sequence[str] | None = None) -> bytes:
    """What torch.save wrote before 1.6: five pickles, then (element count, bytes) of each storage, in the keys' order."""
    listed = Pickle().raw(b"](")
    for key in storages if keys is None else keys:
        listed.text(key)
    head = Pickle().integer(0x1950A86A20F9469CFC6C).stop() + Pickle().integer(1001).stop() + Pickle().raw(b"}").stop()
    tail = b"".join(struct.pack("<q", count) + data for count, data in storages.values())
    return head + program + listed.raw(b"e").stop() + tail


def tar(members: Mapping[str, bytes]) -> bytes:
    """A tar file with the extended headers that Python writes."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members.items():
            about = tarfile.TarInfo(name)
            about.size, about.mtime = len(data), 1483228800.5  # a fraction, which needs an extended header
            archive.addfile(about, io.BytesIO(data))
    return target.getvalue()


def tar_members(
    storages: Iterable[tuple[int, str, int, bytes]],
    views: Iterable[tuple[int, int, int, int]],
    tensors: Iterable[tuple[int, int, Sequence[int], Sequence[int], int]],
    program: bytes,
) -> dict[str, bytes]:
    """The members of a checkpoint before 0.1.10.

    Args:
        storages: (key, class in torch, element count, bytes).
        views: (key, key of the root, offset, size).
        tensors: (key, storage key, sizes, strides, storage_offset).
        program: a pickle whose persistent ids are keys.
    """
    rows = [
        Pickle().mark().integer(key).text("cpu").name("torch", cls).raw(b"t").stop() + struct.pack("<q", count) + data
        for key, cls, count, data in storages
    ]
    listed = Pickle().raw(b"](")
    for view in views:
        listed.integers(view)
    shapes = [
        Pickle().mark().integer(key).integer(storage).name("torch", "FloatTensor").raw(b"t").stop()
        + struct.pack(f"<2i{2 * len(sizes) + 1}q", len(sizes), 0, *sizes, *strides, offset)
        for key, storage, sizes, strides, offset in tensors
    ]
    return {
        "sys_info": Pickle().raw(b"}").stop(),
        "pickle": program,
        "tensors": Pickle().integer(len(shapes)).stop() + b"".join(shapes),
        "storages": Pickle().integer(len(rows)).stop() + b"".join(rows) + listed.raw(b"e").stop(),
    }


# --- pickles ----------------------------------------------------------------------------------------------------------


class Pickle:
    """An assembler of pickles: each method writes what its name says and returns the assembler.

    Strings and globals are written each time they are used, never memoised: a memo is a test's own business, by
    `put` and `get`.
    """

    def __init__(self, protocol: int = 2) -> None:
        self._bytes = bytearray([0x80, protocol])

    @property
    def offset(self) -> int:
        """Where the next opcode will stand."""
        return len(self._bytes)

    def raw(self, content: bytes) -> Pickle:
        self._bytes += content
        return self

    def mark(self) -> Pickle:
        return self.raw(b"(")

    def none(self) -> Pickle:
        return self.raw(b"N")

    def boolean(self, value: bool) -> Pickle:
        return self.raw(b"\x88" if value else b"\x89")

    def integer(self, value: int) -> Pickle:
        if 0 <= value < 1 << 8:
            return self.raw(b"K" + bytes([value]))
        if 0 <= value < 1 << 16:
            return self.raw(b"M" + struct.pack("<H", value))
        if -(1 << 31) <= value < 1 << 31:
            return self.raw(b"J" + struct.pack("<i", value))
        digits = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return self.raw(b"\x8a" + bytes([len(digits)]) + digits)

    def real(self, value: float) -> Pickle:
        return self.raw(b"G" + struct.pack(">d", value))

    def text(self, value: str) -> Pickle:
        encoded = value.encode("utf-8", "surrogatepass")
        return self.raw(b"X" + struct.pack("<I", len(encoded)) + encoded)

    def name(self, module: str, name: str) -> Pickle:
        """GLOBAL."""
        return self.raw(f"c{module}\n{name}\n".encode())

    def integers(self, values: Iterable[int]) -> Pickle:
        """A tuple of integers, as a size or stride is."""
        self.mark()
        for value in values:
            self.integer(value)
        return self.raw(b"t")

    def put(self, slot: int) -> Pickle:
        return self.raw(b"q" + bytes([slot]) if slot < 256 else b"r" + struct.pack("<I", slot))

    def get(self, slot: int) -> Pickle:
        return self.raw(b"h" + bytes([slot]) if slot < 256 else b"j" + struct.pack("<I", slot))

    def reduce(self) -> Pickle:
        return self.raw(b"R")

    def ordered_dict(self) -> Pickle:
        """An empty OrderedDict: the hooks of every tensor."""
        return self.name("collections", "OrderedDict").raw(b")R")

    def storage(
        self, cls: str, key: str | int, numel: int, location: str = "cpu", view: tuple[str, int, int] | str = "none"
    ) -> Pickle:
        """A persistent id. `cls` is a name in torch, or "UntypedStorage"; torch.package has integers as keys.

        `view` is the sixth part that a stream has: (key, offset, size), or "" for None.
        """
        module = "torch.storage" if cls == "UntypedStorage" else "torch"
        self.mark().text("storage").name(module, cls)
        self.text(key) if isinstance(key, str) else self.integer(key)
        self.text(location).integer(numel)
        if view == "":
            self.none()
        elif view != "none":
            self.mark().text(str(view[0])).integer(int(view[1])).integer(int(view[2])).raw(b"t")
        return self.raw(b"tQ")

    def tensor(
        self,
        cls: str,
        key: str | int,
        numel: int,
        *,
        size: Iterable[int],
        stride: Iterable[int],
        storage_offset: int = 0,
        version: int = 2,
        dtype: str | None = None,
        requires_grad: bool = False,
        location: str = "cpu",
        metadata: Mapping[str, bool] | None = None,
        view: tuple[str, int, int] | str = "none",
    ) -> Pickle:
        """A rebuild call: version 1 (four arguments), 2, or 3 (with a dtype)."""
        suffix = {1: "", 2: "_v2", 3: "_v3"}[version]
        self.name("torch._utils", f"_rebuild_tensor{suffix}").mark()
        self.storage(cls, key, numel, location, view).integer(storage_offset).integers(size).integers(stride)
        if version > 1:
            self.boolean(requires_grad).ordered_dict()
        if version == 3:
            self.name("torch", dtype or "uint8")
        if metadata is not None:
            self.raw(b"}(")
            for bit, on in metadata.items():
                self.text(bit).boolean(on)
            self.raw(b"u")
        return self.raw(b"tR")

    def dict(self, items: Mapping[str, Callable[[Pickle], object]]) -> Pickle:
        """A dict with string keys, whose values are written by the given functions."""
        self.raw(b"}(")
        for key, write in items.items():
            self.text(key)
            write(self)
        return self.raw(b"u")

    def call(self, module: str, name: str, *arguments: Callable[[Pickle], object]) -> Pickle:
        """REDUCE of a global on a tuple."""
        self.name(module, name).mark()
        for write in arguments:
            write(self)
        return self.raw(b"tR")

    def stop(self) -> bytes:
        return bytes(self._bytes + b".")

    def body(self) -> bytes:
        """What was written after PROTO: a piece of another pickle."""
        return bytes(self._bytes[2:])


def opcode_offset(program: bytes, opcode: str, which: int = 0) -> int:
    """Where the which-th opcode of that name (as pickletools has it) stands in a pickle that ends with STOP."""
    found = [at for op, _, at in pickletools.genops(program) if op.name == opcode and at is not None]
    return found[which]


def first_opcode_offset(program: bytes, opcodes: Iterable[str]) -> int:
    """Where the first opcode of any of these names stands."""
    wanted = set(opcodes)
    return next(at for op, _, at in pickletools.genops(program) if op.name in wanted and at is not None)


# --- archives that another writer made --------------------------------------------------------------------------------


def records_of(archive: bytes) -> list[tuple[str, bytes]]:
    """(name, data) of each record, in directory order."""
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return [(name, opened.read(name)) for name in opened.namelist()]


def record_of(archive: bytes, suffix: str) -> bytes:
    """The data of the one record whose name ends so."""
    (data,) = [data for name, data in records_of(archive) if name.endswith(suffix)]
    return data


def rezipped(records: Iterable[tuple[str, bytes]], **keywords: Any) -> Written:
    """The records in a new archive, each added with the same keywords."""
    return Zip().add_all(records, **keywords).finish()


def rezipped_by_python(
    records: Iterable[tuple[str, bytes]], *, method: int = STORED, stream: bool = False, force_zip64: bool = False
) -> bytes:
    """The records in a new archive as Python's zipfile writes it; `stream`: as it does where it cannot seek."""
    target = io.BytesIO()
    sink: Any = _Unseekable(target) if stream else target
    with zipfile.ZipFile(sink, "w", method) as opened:
        for name, data in records:
            with opened.open(name, "w", force_zip64=force_zip64) as member:
                member.write(data)
    return target.getvalue()


class _Unseekable:
    """A pipe, as far as zipfile can tell."""

    def __init__(self, target: io.BytesIO) -> None:
        self._target = target

    def write(self, content: bytes) -> int:
        return self._target.write(content)

    def flush(self) -> None:
        pass


def edited(archive: bytes, change: Callable[[str, bytes], bytes | None], **keywords: Any) -> Written:
    """The archive written again, each record's data passed through `change`; None drops the record."""
    changed = [(name, change(name, data)) for name, data in records_of(archive)]
    return rezipped([(name, data) for name, data in changed if data is not None], **keywords)


def local_records(archive: bytes) -> list[tuple[str, bytes, bytes]]:
    """(name, local extra field, payload) of each stored record, in directory order."""
    found = []
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        for info in opened.infolist():
            name_nbytes, extra_nbytes = struct.unpack_from("<2H", archive, info.header_offset + 26)
            extra_at = info.header_offset + LOCAL.nbytes + name_nbytes
            payload_at = extra_at + extra_nbytes
            found.append(
                (info.filename, archive[extra_at:payload_at], archive[payload_at : payload_at + info.file_size])
            )
    return found


def payload_offset(path: Path, suffix: str) -> int:
    """Where the payload of the one record whose name ends so begins in a file, however large it is."""
    with zipfile.ZipFile(path) as opened:
        (info,) = [info for info in opened.infolist() if info.filename.endswith(suffix)]
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)
        name_nbytes, extra_nbytes = struct.unpack("<2H", file.read(4))
    return int(info.header_offset + LOCAL.nbytes + name_nbytes + extra_nbytes)
