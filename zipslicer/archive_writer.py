"""ArchiveWriter: records in, a ZIP archive out, as torch.save lays one out; the mirror of archive.py.

Nothing is written twice and nothing is gone back to, so that a pipe will do. Sizes and checksums follow each payload in a
data descriptor, payloads begin at multiples of 64 bytes, and what has no room in 32 bits goes to ZIP64 fields.
`docs/format.md` has the picture.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .replacement import Output
from .source import ByteSource

__all__ = ["ArchiveWriter"]

ALIGNMENT = 64  # bytes; that of torch.save, for who maps the file
MANY = 0xFFFFFFFF  # APPNOTE 4.4.8: this in a field of 32 bits sends us to the ZIP64 extra field
MANY_RECORDS = 0xFFFF  # APPNOTE 4.4.21: the same in a count of 16
UTF8, DESCRIBED = 1 << 11, 1 << 3  # flags: the name is UTF-8; sizes and checksum follow the payload
DATE = 1 << 5 | 1  # 1980-01-01, the first day that ZIP has: equal content gives equal files
NEEDED, NEEDED_ZIP64 = 10, 45  # versions of the format, times ten
PADDING = b"FB"  # the extra field that torch pads with

LOCAL = struct.Struct("<IHHHHHIIIHH")
CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
END64 = struct.Struct("<IQHHIIQQQQ")
LOCATOR = struct.Struct("<IIQI")
END = struct.Struct("<IHHHHIIH")

SMALL = 1 << 16  # bytes; a payload of fewer is gathered with its neighbours
GATHERED = 1 << 20  # bytes that are written in one call, if they are in small parts
PIECE = 8 << 20  # bytes that are summed on one thread while another writes them; Ctrl-C is heard after each
ALONE = 1 << 20  # bytes; fewer are not worth a second thread


Rest = Callable[[int, int], Iterable[Any]]  # (start, nbytes) of a record -> buffers with these bytes of it


class ArchiveWriter:
    """One archive, record after record. Not safe for concurrent use.

    Args:
        output: where it goes.
        root: the folder that all records are in, without its slash.
    """

    def __init__(self, output: Output, root: str) -> None:
        self._output = output
        self._start = output.offset  # offsets in an archive count from its first byte
        self._root = root.encode() + b"/"
        self._directory = bytearray()
        self._count = 0
        self._gathered: list[Any] = []
        self._gathered_nbytes = 0
        self._summing: ThreadPoolExecutor | None = None

    @property
    def _offset(self) -> int:
        return self._output.offset + self._gathered_nbytes - self._start

    def add(self, name: str, content: Any) -> int:
        """A record out of one buffer; -> its CRC-32."""
        return self.stream(name, len(content), (content,))

    def stream(self, name: str, nbytes: int, parts: Iterable[Any]) -> int:
        """A record of `nbytes` bytes out of buffers that come one after the other; -> its CRC-32.

        A buffer may be used again when the next one is asked for.

        Raises: ValueError: they have more or fewer bytes. The archive cannot be finished then.
        """
        offset = self._begin(name, nbytes)
        checksum, left = 0, nbytes
        for part in parts:
            view = memoryview(part).cast("B") if len(part) else memoryview(b"")
            left -= len(view)
            if left < 0:
                break
            checksum = self._write(view, checksum)
        if left:
            raise ValueError(
                f"record {name!r} was to have {nbytes} bytes, and got {'more' if left < 0 else nbytes - left}"
            )
        self._end(name, offset, nbytes, checksum)
        return checksum

    def copy(self, name: str, source: ByteSource, offset: int, nbytes: int, checksum: int, rest: Rest) -> None:
        """A record out of the bytes [offset, offset + nbytes) of a file, which need not pass through this process.

        `checksum` is their CRC-32, or 0 for none. It is passed on, not computed: damage stays as visible as it was. What the
        system cannot copy comes from `rest`.
        """
        header = self._begin(name, nbytes)
        self._flush()
        done = self._output.copy(source, offset, nbytes)
        if done < nbytes:
            for part in rest(done, nbytes - done):
                self._output.write([part])
        self._end(name, header, nbytes, checksum)

    def finish(self) -> None:
        """Write the directory. The output is the caller's to commit."""
        offset, nbytes, count = self._offset, len(self._directory), self._count
        end = offset + nbytes
        self._gather(self._directory)
        # Always there, as torch writes them, whether there is need or not.
        self._gather(
            END64.pack(0x06064B50, END64.size - 12, NEEDED_ZIP64, NEEDED_ZIP64, 0, 0, count, count, nbytes, offset)
        )
        self._gather(LOCATOR.pack(0x07064B50, 0, end, 1))
        few = min(count, MANY_RECORDS)
        self._gather(END.pack(0x06054B50, 0, 0, few, few, min(nbytes, MANY), min(offset, MANY), 0))
        self._flush()
        self.close()

    def close(self) -> None:
        """Let the thread go."""
        if self._summing is not None:
            self._summing.shutdown()
            self._summing = None

    # ---------------------------------------------------------------- parts of a record
    def _begin(self, name: str, nbytes: int) -> int:
        """The local header; -> its offset."""
        encoded, offset = self._root + name.encode("utf-8", "surrogatepass"), self._offset
        flags = UTF8 | (DESCRIBED if nbytes else 0)
        extra = b""
        if _is_large(nbytes, offset):
            sizes = (nbytes, nbytes) if nbytes >= MANY else ()
            # No other writer puts it here, and readers of torch's files know it.
            places = (offset,) if offset >= MANY else ()
            extra = struct.pack(f"<HH{len(sizes) + len(places)}Q", 1, 8 * (len(sizes) + len(places)), *sizes, *places)
        before = offset + LOCAL.size + len(encoded) + len(extra) + 4
        padding = -before % ALIGNMENT
        extra += struct.pack("<2sH", PADDING, padding) + b"Z" * padding
        needed = NEEDED_ZIP64 if _is_large(nbytes, offset) else NEEDED
        head = LOCAL.pack(0x04034B50, needed, flags, 0, 0, DATE, 0, 0, 0, len(encoded), len(extra))
        self._gather(head + encoded + extra)
        return offset

    def _end(self, name: str, offset: int, nbytes: int, checksum: int) -> None:
        """What follows the payload, and the record's place in the directory."""
        encoded = self._root + name.encode("utf-8", "surrogatepass")
        large = _is_large(nbytes, offset)
        if nbytes:
            self._gather(struct.pack("<IIQQ" if large else "<IIII", 0x08074B50, checksum, nbytes, nbytes))
        wide = [*(2 * [nbytes] if nbytes >= MANY else []), *([offset] if offset >= MANY else [])]
        extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        size, needed = min(nbytes, MANY), NEEDED_ZIP64 if large else NEEDED
        self._directory += CENTRAL.pack(
            0x02014B50, 0, needed, UTF8 | (DESCRIBED if nbytes else 0), 0, 0, DATE, checksum, size, size, len(encoded),
            len(extra), 0, 0, 0, 0, min(offset, MANY),
        )  # fmt: skip
        self._directory += encoded + extra
        self._count += 1

    def _write(self, view: memoryview, checksum: int) -> int:
        """A part of a payload; -> the checksum with it."""
        if len(view) <= SMALL:
            self._gather(bytes(view))
            return zlib.crc32(view, checksum)
        self._flush()
        for start in range(0, len(view), PIECE):
            piece = view[start : start + PIECE]
            if len(piece) < ALONE:
                checksum = zlib.crc32(piece, checksum)
                self._output.write([piece])
                continue
            if self._summing is None:
                self._summing = ThreadPoolExecutor(1, thread_name_prefix="zipslicer-sum")
            summed = self._summing.submit(zlib.crc32, piece, checksum)
            try:
                self._output.write([piece])
            finally:
                checksum = summed.result()
        return checksum

    def _gather(self, part: Any) -> None:
        self._gathered.append(part)
        self._gathered_nbytes += len(part)
        if self._gathered_nbytes >= GATHERED:
            self._flush()

    def _flush(self) -> None:
        parts, self._gathered, self._gathered_nbytes = self._gathered, [], 0
        self._output.write(parts)


def _is_large(nbytes: int, offset: int) -> bool:
    """Whether a record needs ZIP64 fields."""
    return nbytes >= MANY or offset >= MANY
