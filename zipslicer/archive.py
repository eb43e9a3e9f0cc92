"""Archive: the tail of a file in, records by name out.

Opening reads the tail and the central directory, and no local header: where a record's payload begins is predicted from
the directory, and proved by the read that first fetches it (backend.read_record). `docs/format.md` has the picture.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence

from .backend import ENTRY_FIELDS, JOB_FIELDS, Backend, Buffer, Entry, Job, Text
from .errors import ArchiveError, ProgramError, UnsupportedError, ZipSlicerError
from .policy import Limits
from .source import ByteSource, head_at, read_at, text_at

__all__ = ["LOCAL_SIGNATURE", "STORED", "Archive", "Listed", "is_swapped", "window_of"]

TAIL_NBYTES = 65535 + 22 + 20 + 56  # the longest comment, and the three records that may stand before it
STORED, DEFLATED = 0, 8
NOTHING = contextlib.nullcontext()
FEW_NBYTES = 512  # which are read in one call with their header
LOCAL_SIGNATURE = b"PK\x03\x04"
METHOD_NAMES = {1: "shrink", 9: "deflate64", 12: "bzip2", 14: "lzma", 93: "zstd", 95: "xz", 98: "ppmd"}
SIGNATURES = {
    b"\x1f\x8b": "a gzip stream inside another file; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it first",
    b"\xfd7zXZ\0": "compressed with xz; unpack it first",
    b"BZh": "compressed with bzip2; unpack it first",
    b"GGUF": "a GGUF file",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array (numpy.load reads it)",
}  # of other formats; torch.load reads none of them


class Archive:
    """The records of one ZIP archive. A record is known by its index in the directory, or by its name below the root.

    Safe for concurrent use: the directory does not change, and a payload offset that two threads prove at once is the same.

    Raises:
        ArchiveError: the container is damaged, or can be read in two ways.
        UnsupportedError: the file is something else that torch writes, or is compressed in a way torch does not.
    """

    metadata: Mapping[str, str] = {"format": "pt"}  # of the file, as safetensors has it
    has_checksums = True  # Entry.CRC is that of a record, or 0 where none was computed

    def __init__(
        self, source: ByteSource, backend: Backend, limits: Limits, window: tuple[int, int] | None = None
    ) -> None:
        self.source = source
        self.backend = backend
        self.limits = limits
        self.window = window
        self.base, self.nbytes = window_of(source, window)
        try:
            self._read_directory()
        except ZipSlicerError as error:
            raise error.located(path=source.path) from None

    def _read_directory(self) -> None:
        end = self.base + self.nbytes
        tail_offset = max(self.base, end - TAIL_NBYTES)
        tail = read_at(self.backend, self.source, tail_offset, end - tail_offset)
        head = head_at(self.backend, self.source, self.base, self.nbytes)
        _refuse_other_formats(head, tail, self.base)
        offset, nbytes, count = self.backend.find_directory(tail, tail_offset, self.base)
        if head[:4] != LOCAL_SIGNATURE:
            # torch.load goes by these four bytes; a ZIP whose records begin later is one that two readers see differently.
            raise ArchiveError("bytes that belong to no record stand before the archive", offset=self.base)
        if nbytes > self.limits.directory_nbytes:
            raise ArchiveError(
                f"the central directory has {nbytes} bytes; Limits(directory_nbytes=...) raises the limit",
                offset=offset,
            )
        if offset >= tail_offset:
            self.block: Text = tail[offset - tail_offset : offset - tail_offset + nbytes]
        else:
            self.block = text_at(self.backend, self.source, offset, nbytes)
        self.count = count
        self._parse_directory(offset)

    def _parse_directory(self, offset: int) -> None:
        self.entries, prefix_nbytes = self.backend.parse_directory(self.block, self.count, offset, self.base)
        self._columns = memoryview(self.entries).cast("q")
        start = self.field(0, Entry.NAME_START)
        self.root = bytes(self.block[start : start + prefix_nbytes])

    def fingerprint(self) -> int:
        """By which the same file is known again: the CRC-32 of its directory, which has those of all records."""
        return zlib.crc32(self.block)

    def field(self, record: int, field: int) -> int:
        """One Entry field of a record."""
        return self._columns[record * ENTRY_FIELDS + field]

    def column(self, field: int) -> memoryview:
        """One Entry field of all records."""
        return self._columns[field::ENTRY_FIELDS]

    def name(self, record: int) -> str:
        """A record's whole name, as text for people."""
        start = self.field(record, Entry.NAME_START)
        return str(self.block[start : start + self.field(record, Entry.NAME_NBYTES)], "utf-8", "backslashreplace")

    def names(self) -> list[str]:
        """All records, in directory order."""
        return [self.name(i) for i in range(self.count)]

    def find(self, names: Sequence[str]) -> list[int]:
        """For each name below the archive root its record, matched literally; -1 where there is none."""
        encoded = [name.encode("utf-8", "surrogatepass") for name in names]
        return self.find_in("", b"".join(encoded), list(itertools.accumulate(map(len, encoded))))

    def find_in(self, folder: str, names: bytes, ends: Sequence[int]) -> list[int]:
        """The same for many names in a folder ("data/") below the root; see backend.Backend.find_records."""
        prefix = self.root + folder.encode("utf-8", "surrogatepass")
        return self.backend.find_records(self.block, self.entries, prefix, names, ends)

    def is_stored(self, record: int) -> bool:
        """Whether a record's bytes lie in the file as they are. Raises: UnsupportedError for a foreign compression."""
        method = self.field(record, Entry.METHOD)
        if method not in (STORED, DEFLATED):
            name = METHOD_NAMES.get(method, f"method {method}")
            raise UnsupportedError(
                f"record {self.name(record)!r} is compressed with {name}; torch.save stores, and zip -0 does so again",
                offset=self.field(record, Entry.HEADER_OFFSET),
                path=self.source.path,
            )
        return method == STORED

    def extent(self, record: int) -> tuple[int, int]:
        """(offset, nbytes) of a stored record in the file, proved. Raises: ArchiveError, UnsupportedError, ChangedError."""
        if not self.is_stored(record):
            raise UnsupportedError(
                "the record is compressed; unpack the archive, and open the file",
                record=self.name(record),
                path=self.source.path,
            )
        if self.field(record, Entry.PAYLOAD_OFFSET) < 0:
            self._read(record, 0, 0)
        return self.field(record, Entry.PAYLOAD_OFFSET), self.field(record, Entry.NBYTES)

    def part(self, record: int, start: int, nbytes: int) -> bytes:
        """A few bytes of a stored record; those that are beyond its end are left out."""
        return bytes(self._read(record, start, max(0, min(nbytes, self.field(record, Entry.NBYTES) - start))))

    def read(self, record: int, limit: int | None = None) -> bytes:
        """A whole record, inflated if need be. For small records; `limit` bounds its bytes. Raises: as text."""
        return bytes(self.text(record, limit))

    def text(self, record: int, limit: int | None = None) -> Text:
        """The same as the backend has read it: for programs.

        Raises: ArchiveError, UnsupportedError, ChangedError, OSError; ProgramError where the limit is passed.
        """
        nbytes = self.field(record, Entry.NBYTES)
        limits = self.limits
        if limit is not None and nbytes > limit:
            raise ProgramError(
                f"record {self.name(record)!r} has {nbytes} bytes; the limit is {limit} (see zipslicer.Limits)",
                path=self.source.path,
            )
        if self.is_stored(record):
            if nbytes <= FEW_NBYTES:
                return bytes(self._read(record, 0, nbytes))
            return text_at(self.backend, self.source, *self.extent(record))
        stored = self.field(record, Entry.STORED_NBYTES)
        if limit is not None and nbytes > min(limits.inflated_nbytes, limits.inflated_ratio * max(stored, 1024)):
            raise ProgramError(
                f"record {self.name(record)!r} inflates from {stored} to {nbytes} bytes; see zipslicer.Limits",
                path=self.source.path,
            )
        return self._inflate(record, self._read(record, 0, stored), nbytes)

    def _read(self, record: int, start: int, nbytes: int) -> Buffer:
        source = self.source
        try:
            return self.backend.read_record(
                source.handle, source.stamp, self.block, self.entries, record, start, nbytes
            )
        except ZipSlicerError as error:
            raise error.located(path=source.path, record=self.name(record)) from None

    def _inflate(self, record: int, packed: Buffer, nbytes: int) -> bytes:
        """Exactly nbytes, out of exactly these bytes: torch.load hands out uninitialised memory here when they are damaged."""
        machine = zlib.decompressobj(-15)
        try:
            made = machine.decompress(packed, nbytes + 1)
        except zlib.error as error:
            raise ArchiveError(
                f"the deflated data of a record is damaged: {error}", record=self.name(record), path=self.source.path
            ) from None
        if len(made) != nbytes or not machine.eof or machine.unused_data or machine.unconsumed_tail:
            raise ArchiveError(
                f"a deflated record does not give the {nbytes} bytes that the directory names",
                record=self.name(record),
                path=self.source.path,
            )
        return made

    def read_into(self, jobs: Sequence[int], buffers: Sequence[Buffer], threads: int) -> None:
        """Many parts of stored records at once; `jobs` are rows of backend.Job, one after the other."""
        source, rows = self.source, array("q", jobs).tobytes()
        try:
            # Lazily: what is local asks for none of them.
            fields = (Job.RECORD, Job.START, Job.NBYTES)
            with self._ahead(zip(*(itertools.islice(jobs, field, None, JOB_FIELDS) for field in fields))):
                self.backend.read_records(source.handle, source.stamp, self.block, self.entries, rows, buffers, threads)
        except ZipSlicerError as error:
            raise self.located(error, jobs[Job.RECORD :: JOB_FIELDS]) from None

    def _ahead(self, wanted: Iterable[tuple[int, int, int]]) -> contextlib.AbstractContextManager[None]:
        """Around reads of (record, start, nbytes): tells a source that wants to know of them where they are."""
        source = self.source
        return NOTHING if source.ahead is None else source.ahead(self._extents(wanted))

    def _extents(self, wanted: Iterable[tuple[int, int, int]]) -> Iterator[tuple[int, int]]:
        for record, start, nbytes in wanted:
            payload = self.field(record, Entry.PAYLOAD_OFFSET)
            if payload < 0:  # the header will be read, too
                header, payload = self.field(record, Entry.HEADER_OFFSET), ~payload
                yield header, payload - header
            yield payload + start, nbytes

    def read_runs(self, record: int, start: int, nbytes: int, dims: list[int], buffer: Buffer, threads: int) -> None:
        """Runs of a stored record; see backend.Backend.read_runs."""
        source = self.source
        runs = ((record, at, nbytes) for at in _starts(start, dims))
        try:
            with self._ahead(runs):
                self.backend.read_runs(
                    source.handle, source.stamp, self.block, self.entries, record, start, nbytes, dims, buffer, threads
                )
        except ZipSlicerError as error:
            raise error.located(path=source.path, record=self.name(record)) from None

    def located(self, error: ZipSlicerError, records: Iterable[int]) -> ZipSlicerError:
        """An error with the path, and with that one of the records that were asked for which its offset lies in."""
        offset, name = -1 if error.offset is None else error.offset, None
        for record in records:
            if self.field(record, Entry.HEADER_OFFSET) <= offset < self.field(record, Entry.LIMIT):
                name = self.name(record)
                break
        return error.located(path=self.source.path, record=name)

    def parts(self) -> list[Archive]:
        """What is checked by its checksums: the archive itself, or those that it is made of."""
        return [self]

    def close(self) -> None:
        self.source.close()


class Listed(Archive):
    """Records of a file that is no archive: stretches with a name, whose bytes are there as they are, and need no proof."""

    has_checksums = False

    def _list(self, records: Sequence[tuple[str, int, int]], also: bytes) -> None:
        """(name, offset, nbytes) of each, in the order of the file; `also` is by what else the file is known again."""
        rows, names = array("q"), bytearray()
        numbers: dict[bytes, int] = {}
        for number, (name, offset, nbytes) in enumerate(records):
            encoded = name.encode("utf-8", "surrogatepass")
            row = (offset, offset, nbytes, nbytes, offset + nbytes, 0, STORED, 0, len(names), len(encoded))
            assert len(row) == ENTRY_FIELDS
            rows.extend(row)
            names += encoded
            numbers[encoded] = number
        self.count = len(records)
        self.entries = bytearray(rows.tobytes())
        self.block = bytes(names) + also
        self._columns = memoryview(self.entries).cast("q")
        self._numbers = numbers

    def find_in(self, folder: str, names: bytes, ends: Sequence[int]) -> list[int]:
        """A storage has its record, which is called as its key is."""
        del folder
        return [self._numbers.get(names[start:end], -1) for start, end in zip([0, *ends], ends)]


def is_swapped(archive: Archive, found: int) -> bool:
    """Whether the byte order that the record `found` names is not this host's; -1 for no record, which is little-endian,
    as torch has it since 2.1.

    Raises: ArchiveError.
    """
    order = b"little" if found < 0 else archive.read(found, 64)
    if order not in (b"little", b"big"):
        raise ArchiveError(
            f"byteorder is {order!r}; it must be b'little' or b'big'",
            record=archive.name(found),
            path=archive.source.path,
        )
    return order != sys.byteorder.encode()


def _starts(start: int, dims: Sequence[int]) -> Iterator[int]:
    """Where runs begin: a start, and (count, stride) of each dimension they lie in."""
    steps = (
        range(0, count * stride, stride) if stride else [0] * count for count, stride in zip(dims[::2], dims[1::2])
    )
    return (start + sum(place) for place in itertools.product(*steps))


def window_of(source: ByteSource, window: tuple[int, int] | None) -> tuple[int, int]:
    """(offset, nbytes) of what is to be read of a file: the window, or all of it."""
    if window is None:
        start = min(source.start, source.size)  # a file object may stand behind its end
        return start, source.size - start
    offset, nbytes = window
    if offset < 0 or nbytes < 0 or offset + nbytes > source.size:
        raise ValueError(f"window={window} does not lie in a file of {source.size} bytes")
    return offset, nbytes


def _refuse_other_formats(head: bytes, tail: bytes, base: int) -> None:
    """Name what a file is, where that is known and it is no ZIP archive."""
    if head[:4] == LOCAL_SIGNATURE:
        return
    if not head:
        nothing = f"nothing follows byte {base}, where the window or the position of the file object is"
        raise ArchiveError(nothing if base else "the file is empty", offset=base)
    other = _what_else(head)
    if other is not None:
        raise ArchiveError(f"no checkpoint: {other}", offset=base)
    if b"PK\x05\x06" not in tail:
        raise ArchiveError(
            f"no checkpoint: the file begins with {head[:4]!r}, a ZIP archive with {LOCAL_SIGNATURE!r}", offset=base
        )


def _what_else(head: bytes) -> str | None:
    """What is often found under the name of a checkpoint, and what to do about it."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:15].lower()
    if head.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not the file it points to; run `git lfs pull`"
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "this is a web page; the download has failed, or wants you to log in"
    if text.startswith((b"{", b"[")):
        is_index = b'"weight_map"' in head or b'"metadata"' in head
        return "this is JSON text" + ("; an index of shards must be called *.json to be read" if is_index else "")
    return next((f"this is {name}" for magic, name in SIGNATURES.items() if head.startswith(magic)), None)
