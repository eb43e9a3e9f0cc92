"""Legacy: the two layouts that torch wrote before 1.6, behind the face of Archive: a stream, or a tar file.

    stream (0.1.10 to 1.5)     magic, protocol, sizes of C types, object, keys: five pickles back to back
                               then for each key its element count (8 bytes) and its elements
    tar (before 0.1.10)        members `storages`, `tensors`, `pickle`, of pickles and raw numbers

Both become an Archive whose records are data/<key>, so that no floor above knows the difference. Where a pickle ends is
known only by running it, and where a stream's storages lie only from its object and keys: so here the program runs first,
and the records come out of it. No storage is read meanwhile; the count before each is proved by the read that fetches it.

The numbers of both formats are little-endian, whoever wrote them.
"""

from __future__ import annotations

import struct
import zlib
from array import array
from collections.abc import Iterator, Mapping
from typing import Any

from .archive import LOCAL_SIGNATURE, STORED, Archive, window_of
from .backend import (
    COUNTED,
    STORAGE_FIELDS,
    UNTYPED,
    Backend,
    Dialect,
    Graph,
    Kind,
    StorageField,
    Verb,
)
from .errors import ArchiveError, ProgramError, TableError, UnsupportedError, ZipSlicerError
from .policy import DTYPES, Limits, machine_limits
from .program import Program, known_actions
from .source import ByteSource, head_at, read_at

__all__ = ["Legacy", "open_archive"]

MAGIC = 0x1950A86A20F9469CFC6C
MAGIC_BYTES = b"\x8a\x0a" + MAGIC.to_bytes(10, "little")  # as every binary protocol writes it
PROTOCOL = 1001
COUNT = struct.Struct("<q")
FEW, MANY = 1 << 12, 1 << 20  # bytes of a small pickle, and of one that may be large, that are read at first
BLOCK = 512  # of a tar file
MAX_MEMBERS = 1024  # of a tar file; torch wrote four
TAR_TYPES = (b"0", b"\0", b"5", b"x", b"g")  # a file, a file, a folder, an extended header of one member or of all
MAX_ROWS = 1 << 16  # storages or tensors of a tar file, which are run one by one
MAX_PAX = 1 << 16  # bytes of the extended header of one
MEMBERS = ("storages", "tensors", "pickle")
INT64_MAX = (1 << 63) - 1


def open_archive(
    source: ByteSource, backend: Backend, limits: Limits, window: tuple[int, int] | None = None
) -> Archive:
    """The archive that a file is, known by its first bytes. A Legacy one has no records before it was run."""
    base, nbytes = window_of(source, window)
    head = head_at(backend, source, base, nbytes)
    if head[:4] != LOCAL_SIGNATURE:
        if MAGIC_BYTES in head[:32]:
            return Stream(source, backend, limits, window)
        if head[257:262] == b"ustar":
            return Tar(source, backend, limits, window)
    return Archive(source, backend, limits, window)


class Pickles:
    """Pickles of which each begins where running the one before it has ended.

    Attributes:
        offset: of the next one, in the file. The caller may move it.
        crc: of all that were run.
    """

    def __init__(self, archive: Legacy, offset: int, end: int, actions: Mapping[tuple[str, str], int], refuse: bool):
        self.offset = offset
        self.crc = 0
        self._archive = archive
        self._end = end
        self._actions = actions
        self._refuse = refuse

    def next(self, dialect: int = Dialect.ZIP, nbytes: int = FEW) -> Graph:
        """Run the next pickle. Reads `nbytes`, and four times as many for as long as it does not end in them.

        Raises: ProgramError, TableError, UnsupportedError, UnsafeError; the offset is that in the file.
        """
        archive, limits = self._archive, self._archive.limits
        most = min(self._end - self.offset, limits.program_nbytes)
        nbytes = min(nbytes, most)
        before: tuple[Any, ...] = ()
        while True:
            text = read_at(archive.backend, archive.source, self.offset, nbytes)
            try:
                graph = Graph(
                    *archive.backend.scan_pickle(text, self._actions, machine_limits(limits, self._refuse, dialect))
                )
                break
            except ZipSlicerError as error:
                # An error that more bytes do not change is none of those that a cut makes: the cut is elsewhere now.
                told = (type(error), error.message, error.offset)
                if nbytes == most or told == before:
                    if nbytes == limits.program_nbytes < self._end - self.offset:
                        error.message += f"; a pickle may have {nbytes} bytes (see zipslicer.Limits)"
                    error.offset = self.offset + (error.offset or 0)
                    raise
                before = told
                nbytes = min(4 * nbytes, most)
        self.crc = zlib.crc32(memoryview(text)[: graph.nbytes], self.crc)
        self.offset += graph.nbytes
        archive.named.update(dict.fromkeys(graph.globals))
        return graph

    def integer(self) -> int | None:
        """Run the next pickle, if it is one integer."""
        graph = self.next()
        if graph.kinds == bytes([Kind.INT]):
            return int(memoryview(graph.payloads).cast("q")[0])
        return graph.longs[0] if graph.kinds == bytes([Kind.LONG]) else None

    def numbers(self, form: str) -> tuple[int, ...]:
        """The next bytes as numbers, by a form of struct."""
        nbytes = struct.calcsize(form)
        if nbytes > self._end - self.offset:
            raise ArchiveError("the file is truncated: numbers are missing", offset=self._end)
        found = struct.unpack(form, read_at(self._archive.backend, self._archive.source, self.offset, nbytes))
        self.offset += nbytes
        return found


class Legacy(Archive):
    """Records are data/<key>, one for each storage; there are none before `run`.

    Attributes:
        named: the globals that the pickles name, (module, name).
    """

    has_checksums = False

    def _read_directory(self) -> None:
        self.named: dict[tuple[str, str], None] = {}
        self._set_records([], 0)

    def _set_records(self, records: list[tuple[str, tuple[int, ...]]], crc: int) -> None:
        """(key, the first eight fields of backend.Entry) of each record; the block also tells the programs apart."""
        rows, names = array("q"), bytearray()
        for key, fields in records:
            name = b"data/" + key.encode("utf-8", "surrogatepass")
            rows.extend((*fields, len(names), len(name)))
            names += name
        self.block = bytes(names) + crc.to_bytes(4, "little")
        self.entries = bytearray(rows.tobytes())
        self.count = len(records)
        self._columns = memoryview(self.entries).cast("q")
        self.root = b""

    def run(self, unknown: str, allow: Mapping[str, Any]) -> Program:
        """Run the pickles of the file: the program, and the records by the way.

        Raises: ArchiveError, ProgramError, TableError, UnsupportedError; UnsafeError with unknown="error".
        """
        try:
            return Program(self._run(known_actions(unknown, allow), unknown == "error"), allow)
        except ZipSlicerError as error:
            raise error.located(path=self.source.path) from None

    def _run(self, actions: Mapping[tuple[str, str], int], refuse: bool) -> Graph:
        raise NotImplementedError


class Stream(Legacy):
    """What torch.save wrote from 0.1.10 to 1.5, and still writes with _use_new_zipfile_serialization=False.

    One file may hold several, one after the other: `nbytes` is what this one has, once it was run.
    """

    def _run(self, actions: Mapping[tuple[str, str], int], refuse: bool) -> Graph:
        end = self.base + self.nbytes
        pickles = Pickles(self, self.base, end, actions, refuse)
        if pickles.integer() != MAGIC:
            raise ArchiveError("the file does not begin with torch's magic number", offset=self.base)
        at = pickles.offset
        if (protocol := pickles.integer()) != PROTOCOL:
            raise UnsupportedError(f"the stream has protocol {protocol}; the one known is {PROTOCOL}", offset=at)
        pickles.next()  # the sizes of the writer's C types, on which nothing depends
        graph = pickles.next(Dialect.STREAM, MANY)
        at = pickles.offset
        keys = _list_of_text(pickles.next(nbytes=MANY), at)
        storages = {key: row for key, *row in _storages(graph)}
        records: dict[str, tuple[int, ...]] = {}
        place = pickles.offset
        for key in keys:
            if key in records:
                raise ArchiveError(f"storage {key!r} is listed twice", offset=at)
            if key not in storages:
                raise ArchiveError(f"storage {key!r} is listed, and the pickle names none", offset=at)
            dtype, nbytes = storages[key]
            payload = place + COUNT.size
            if nbytes > end - payload:
                raise ArchiveError(
                    f"the file is truncated: storage {key!r} of {nbytes} bytes begins at byte {payload}", offset=end
                )
            count = nbytes // _itemsize(dtype)
            records[key] = (place, ~payload, nbytes, nbytes, payload + nbytes, count, STORED, COUNTED)
            place = payload + nbytes
        self.nbytes = place - self.base
        self._set_records(list(records.items()), pickles.crc)
        return graph


def _itemsize(dtype: int) -> int:
    return 1 if dtype == UNTYPED else DTYPES[dtype].itemsize


def _storages(graph: Graph) -> Iterator[tuple[str, int, int]]:
    """(key, dtype, nbytes) of each storage."""
    rows = memoryview(graph.storages).cast("q")
    start = 0
    for at in range(0, len(rows), STORAGE_FIELDS):
        end = rows[at + StorageField.KEY_END]
        key = graph.storage_keys[start:end].decode("utf-8", "surrogatepass")
        yield key, rows[at + StorageField.DTYPE], rows[at + StorageField.NBYTES]
        start = end


def _list_of_text(graph: Graph, at: int) -> list[str]:
    if graph.kinds[:1] != bytes([Kind.LIST]) or graph.kinds.count(Kind.STR, 1) != len(graph.kinds) - 1:
        raise ProgramError("the storages' keys must be a list of strings", offset=at)
    return graph.strings


class Tar(Legacy):
    """What torch.save wrote before 0.1.10."""

    def _run(self, actions: Mapping[tuple[str, str], int], refuse: bool) -> Graph:
        members = self._members()
        for name in MEMBERS:
            if name not in members:
                raise ArchiveError(f"a tar file without a member {name!r} is no checkpoint", offset=self.base)
        storages, tensors, program = (Pickles(self, *members[name], actions, refuse) for name in MEMBERS)
        rows = _TarRows(self.limits)
        rows.read_storages(storages, members["storages"][1], actions)
        rows.read_tensors(tensors)
        graph = rows.resolve(program.next(Dialect.TAR, MANY), program.offset)
        self._set_records(rows.records, zlib.crc32(struct.pack("<2L", storages.crc, tensors.crc), program.crc))
        return graph

    def _members(self) -> dict[str, tuple[int, int]]:
        """The offsets [start, end) of the members we need, by name."""
        found: dict[str, tuple[int, int]] = {}
        extended: dict[str, bytes] = {}
        at, end = self.base, self.base + self.nbytes
        for _ in range(MAX_MEMBERS):
            head = read_at(self.backend, self.source, at, min(BLOCK, end - at))
            if not head.strip(b"\0"):  # the end; a whole block of it, or what is left of the file
                return found
            name, nbytes, kind = _tar_header(head, at)
            nbytes = _decimal(extended.get("size"), nbytes, at)
            start = at + BLOCK
            if kind not in TAR_TYPES or (kind == b"5" and nbytes):
                raise UnsupportedError(f"a tar member of type {kind!r}; torch wrote plain files", offset=start - BLOCK)
            if nbytes > end - start:
                raise ArchiveError(f"the file is truncated: member {name!r} has {nbytes} bytes", offset=end)
            at = min(start + -(-nbytes // BLOCK) * BLOCK, end)
            if kind in (b"x", b"g"):
                if nbytes > MAX_PAX:
                    raise ArchiveError(f"an extended header of {nbytes} bytes", offset=start)
                if kind == b"x":
                    extended = _pax(read_at(self.backend, self.source, start, nbytes), start)
                continue
            if "path" in extended:
                name = extended["path"].decode("utf-8", "backslashreplace")
            extended = {}
            if name in MEMBERS:
                if kind not in (b"0", b"\0") or name in found:
                    raise ArchiveError(f"member {name!r} is no plain file, or there are two", offset=start - BLOCK)
                found[name] = start, start + nbytes
        raise ArchiveError(f"more than {MAX_MEMBERS} members; torch wrote four", offset=at)


def _tar_header(head: bytes, at: int) -> tuple[str, int, bytes]:
    """(name, bytes, type) of a member."""
    if len(head) < BLOCK or head[257:262] != b"ustar":
        raise ArchiveError("no header of a tar member stands here", offset=at)
    digits = [head[a:b].strip(b"\0 ") for a, b in ((148, 156), (124, 136))]
    if any(each.strip(b"01234567") for each in digits):
        raise ArchiveError("a number in a tar header is not octal", offset=at)
    told, nbytes = (int(each or b"0", 8) for each in digits)
    if told != sum(head) - sum(head[148:156]) + 8 * 0x20:  # its own eight bytes count as spaces
        raise ArchiveError("the checksum of a tar header is wrong", offset=at)
    name, prefix = (head[a:b].partition(b"\0")[0] for a, b in ((0, 100), (345, 500)))
    return (prefix + b"/" * bool(prefix) + name).decode("utf-8", "backslashreplace"), nbytes, head[156:157]


def _pax(text: bytes, at: int) -> dict[str, bytes]:
    """An extended header: lines "length key=value", each as long as it says."""
    found: dict[str, bytes] = {}
    while text:
        length = _decimal(text[:20].partition(b" ")[0], 0, at)
        key, equals, value = text[:length].partition(b" ")[2].partition(b"=")
        if length > len(text) or not equals or value[-1:] != b"\n":
            raise ArchiveError("an extended tar header is malformed", offset=at)
        found[key.decode("utf-8", "backslashreplace")] = value[:-1]
        text = text[length:]
    return found


def _decimal(digits: bytes | None, default: int, at: int) -> int:
    if digits is None:
        return default
    if not digits.isdigit() or len(digits) > 18:
        raise ArchiveError("a number in an extended tar header is malformed", offset=at)
    return int(digits)


class _TarRows:
    """What `storages` and `tensors` say, and with it the program's keys turned into rows."""

    def __init__(self, limits: Limits) -> None:
        self.records: list[tuple[str, tuple[int, ...]]] = []
        self.storages = array("q")  # rows of the graph
        self.keys = bytearray()
        self.locations: list[str] = []
        self.parts: dict[str, tuple[int, int, int]] = {}  # storage or view -> (storage, its first element, elements)
        self.tensors: dict[str, tuple[int, tuple[int, ...], tuple[int, ...], int]] = {}
        self._limits = limits

    def read_storages(self, pickles: Pickles, end: int, actions: Mapping[tuple[str, str], int]) -> None:
        at = pickles.offset
        for _ in range(_count(pickles, at)):
            at = pickles.offset
            graph = pickles.next()
            if graph.kinds[:1] != bytes([Kind.TUPLE]) or len(graph.kinds) != 4:
                raise UnsupportedError("a storage of a tar file must be (key, location, class)", offset=at)
            program = Program(graph, {})
            key = _key(program, 1, at)
            action = actions.get(graph.globals[0], 0) if graph.kinds[3] == Kind.GLOBAL else 0
            if action & 0xFF != Verb.STORAGE or graph.kinds[2] != Kind.STR:
                raise ProgramError("a storage of a tar file must be (key, location, class)", offset=at)
            (count,) = pickles.numbers("<q")
            payload, itemsize = pickles.offset, action >> 16 & 0xFF
            nbytes = count * itemsize
            if count < 0 or nbytes > end - payload:
                raise ArchiveError(
                    f"storage {key!r} of {count} elements leaves its member", offset=payload - COUNT.size
                )
            self._add(key, (len(self.locations), 0, count), at)
            limit = pickles.offset = payload + nbytes
            self.records.append((key, (payload - COUNT.size, payload, nbytes, nbytes, limit, 0, STORED, 0)))
            self.keys += key.encode("utf-8", "surrogatepass")
            self.storages.extend((action >> 8 & 0xFF, nbytes, at, len(self.keys)))
            self.locations.append(graph.strings[-1])
        self._read_views(pickles)

    def _read_views(self, pickles: Pickles) -> None:
        at = pickles.offset
        program = Program(pickles.next(nbytes=MANY), {})
        if program.kinds[0] != Kind.LIST:
            raise ProgramError("the views of storages must be a list", offset=at)
        for position in range(*program.span(program.payloads[0])):
            start, end = program.span(program.payloads[position]) if program.kinds[position] == Kind.TUPLE else (0, 0)
            if end - start != 4 or program.kinds[start + 2 : end] != bytes([Kind.INT, Kind.INT]):
                raise ProgramError("a view of a storage must be (key, root, offset, size)", offset=at)
            root = self.parts.get(_key(program, start + 1, at))
            first, size = program.payloads[start + 2], program.payloads[start + 3]
            if root is None or min(first, size) < 0 or first + size > root[2]:
                raise TableError("a view reaches outside its storage", offset=at)
            self._add(_key(program, start, at), (root[0], root[1] + first, size), at)

    def _add(self, key: str, part: tuple[int, int, int], at: int) -> None:
        if key in self.parts:
            raise ArchiveError(f"two storages are called {key!r}", offset=at)
        self.parts[key] = part

    def read_tensors(self, pickles: Pickles) -> None:
        at = pickles.offset
        for _ in range(_count(pickles, at)):
            at = pickles.offset
            graph = pickles.next()
            if graph.kinds[:1] != bytes([Kind.TUPLE]) or len(graph.kinds) != 4 or graph.kinds[2] == Kind.NONE:
                raise UnsupportedError("a tensor of a tar file must be (key, storage key, class)", offset=at)
            program = Program(graph, {})
            key, storage = _key(program, 1, at), _key(program, 2, at)
            ndim, _ = pickles.numbers("<2i")
            if not 0 <= ndim <= self._limits.dimensions:
                raise ProgramError(f"a tensor has {ndim} dimensions; the limit is {self._limits.dimensions}", offset=at)
            numbers = pickles.numbers(f"<{2 * ndim + 1}q")
            if key in self.tensors or key in self.parts or storage not in self.parts:
                raise ArchiveError(f"tensor {key!r} is there twice, or lies on no storage", offset=at)
            sizes, strides, offset = numbers[:ndim], numbers[ndim:-1], numbers[-1]
            extent = _extent(self.parts[storage][2], offset, sizes, strides, at)
            first = self.parts[storage][1] + offset
            if first > INT64_MAX:
                raise TableError("a tensor's extent passes 2**63 - 1 elements", offset=at)
            self.tensors[key] = self.parts[storage][0], (first, extent), numbers[:-1], at

    def resolve(self, graph: Graph, at: int) -> Graph:
        """The program's graph, in which storages are keys yet, with the rows that these keys stand for."""
        pids = list(_storages(graph))
        kinds, payloads = bytearray(graph.kinds), array("q", memoryview(graph.payloads).cast("q"))
        rows, dims = array("q"), array("q")
        numbers: dict[int, int] = {}  # pid -> row
        position = graph.kinds.find(Kind.STORAGE)
        while position >= 0:
            pid = payloads[position]
            key = pids[pid][0]
            if key in self.tensors:
                if pid not in numbers:
                    numbers[pid] = len(numbers)
                    storage, (first, extent), shape, offset = self.tensors[key]
                    dtype = self.storages[storage * STORAGE_FIELDS + StorageField.DTYPE]
                    rows.extend(
                        (storage, dtype, _itemsize(dtype), first, len(dims), len(shape) // 2, 0, offset, extent)
                    )
                    dims.extend(shape)
                kinds[position], payloads[position] = Kind.TENSOR, numbers[pid]
            else:
                storage, first, count = self.parts.get(key, (-1, 0, 0))
                if storage < 0:
                    raise ArchiveError(f"the program names {key!r}, which is no tensor and no storage", offset=at)
                dtype, nbytes = self.storages[storage * STORAGE_FIELDS : storage * STORAGE_FIELDS + 2]
                if count * _itemsize(dtype) != nbytes:
                    raise UnsupportedError("a view of a storage stands as a value", offset=at)
                payloads[position] = storage
            position = graph.kinds.find(Kind.STORAGE, position + 1)
        return graph._replace(
            kinds=bytes(kinds),
            payloads=payloads.tobytes(),
            storages=self.storages.tobytes(),
            storage_keys=bytes(self.keys),
            locations=self.locations,
            tensors=rows.tobytes(),
            dims=dims.tobytes(),
        )


def _count(pickles: Pickles, at: int) -> int:
    count = pickles.integer()
    if count is None or not 0 <= count <= MAX_ROWS:
        raise ProgramError(
            f"a member of a tar file begins with how many there are in it, at most {MAX_ROWS}", offset=at
        )
    return count


def _key(program: Program, position: int, at: int) -> str:
    """An integer or a string, as text."""
    if program.kinds[position] not in (Kind.INT, Kind.STR):
        raise UnsupportedError("a key in a tar file is neither an integer nor a string", offset=at)
    return str(program.scalar(position))


def _extent(count: int, offset: int, sizes: tuple[int, ...], strides: tuple[int, ...], at: int) -> int:
    """Refuse a tensor that leaves its storage -> its extent in elements."""
    if min((offset, *sizes, *strides)) < 0:
        raise TableError("a tensor has a negative storage_offset, size or stride", offset=at)
    numel, last = 1, offset
    for n, step in zip(sizes, strides):
        numel *= n or 1
        last += max(n - 1, 0) * step
    if max(numel, last) > INT64_MAX:
        raise TableError("a tensor's extent passes 2**63 - 1 elements", offset=at)
    if 0 in sizes:
        return 0
    if last >= count:
        raise TableError(f"a tensor reaches to element {last} of a storage of {count}", offset=at)
    return last - offset + 1
