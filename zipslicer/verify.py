"""Verify: the CRC-32 of every record of an archive, computed on threads, against the one in its directory.

Reading a tensor checks that its bytes are where the directory says, not that they are the ones that were written. This
does, in one pass over the file in its order, through buffers that stay in the cache. Large records are cut into pieces,
whose checksums are combined as zlib's crc32_combine does: by multiplication with a power of x, modulo the polynomial.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from .archive import Archive
from .backend import Entry
from .errors import ArchiveError

__all__ = ["Verified", "check"]

PIECE = 1 << 20  # bytes that a thread reads and sums at a time
PIECES = 64  # that one task has at most
POLYNOMIAL = 0xEDB88320  # of CRC-32, its bits reversed as ZIP has them


@dataclasses.dataclass(frozen=True)
class Verified:
    """What Checkpoint.verify() has found.

    Attributes:
        records: how many have the bytes that were written, by their CRC-32.
        nbytes: of those records.
        unchecked: the names of records for which the file has no checksum: torch.save writes none where
            `torch.serialization.set_crc32_options(False)` says so, and formats other than ZIP have none.
        damaged: an ArchiveError for each record whose bytes are not those that were written. verify() raises the first.
    """

    records: int = 0
    nbytes: int = 0
    unchecked: tuple[str, ...] = ()
    damaged: tuple[ArchiveError, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Stored bytes [start, start + nbytes) of a record."""

    record: int
    start: int
    nbytes: int


def check(archives: Sequence[Archive], threads: int, bar: Any = None) -> Verified:
    """Compare the bytes of all records with their checksums. `bar` is told of bytes.

    Raises: UnsupportedError for a compression that torch does not write, ChangedError, OSError.
    """
    found = Verified()
    for archive in archives:
        one = _Checking(archive, bar).run(threads)
        found = Verified(
            found.records + one.records,
            found.nbytes + one.nbytes,
            found.unchecked + one.unchecked,
            found.damaged + one.damaged,
        )
    return found


class _Checking:
    """One archive."""

    def __init__(self, archive: Archive, bar: Any) -> None:
        self._archive = archive
        self._bar = bar
        self._lock = threading.Lock()
        self._own = threading.local()
        self._sums: dict[int, dict[int, tuple[int, int]]] = {}  # record -> start of a piece -> (checksum, bytes)
        self._damaged: dict[int, ArchiveError] = {}

    def run(self, threads: int) -> Verified:
        from concurrent.futures import ThreadPoolExecutor  # which imports logging, and much else

        archive = self._archive
        if not archive.has_checksums:
            return Verified(unchecked=tuple(archive.names()))
        records = sorted(range(archive.count), key=lambda record: archive.field(record, Entry.HEADER_OFFSET))
        tasks = list(self._tasks(records))
        with ThreadPoolExecutor(threads, thread_name_prefix="zipslicer-verify") as pool:
            waiting = [pool.submit(task) for task in tasks]
            try:
                for one in waiting:
                    one.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        good, nbytes, unchecked = 0, 0, list[str]()
        for record in records:
            if record in self._damaged or record not in self._sums:
                continue
            made, wanted = self._sum_of(record), archive.field(record, Entry.CRC)
            if made == wanted:
                good += 1
                nbytes += archive.field(record, Entry.NBYTES)
            elif wanted == 0:
                unchecked.append(archive.name(record))
            else:
                self._blame(record, f"its bytes have the CRC-32 {made:08x}, and {wanted:08x} was written")
        damaged = tuple(self._damaged[record] for record in records if record in self._damaged)
        return Verified(good, nbytes, tuple(unchecked), damaged)

    def _tasks(self, records: Iterable[int]) -> Iterator[Callable[[], None]]:
        """What one thread does at a time: many small records, a stretch of a large one, or one that is deflated."""
        pieces: list[_Piece] = []
        for record in records:
            stored = self._archive.field(record, Entry.STORED_NBYTES)
            if not self._archive.is_stored(record):
                yield functools.partial(self._inflate, record)
                continue
            for start in range(0, max(stored, 1), PIECE):
                pieces.append(_Piece(record, start, min(PIECE, stored - start)))
                if len(pieces) == PIECES:
                    yield functools.partial(self._sum_all, pieces)
                    pieces = []
        yield functools.partial(self._sum_all, pieces)

    def _sum_all(self, pieces: Sequence[_Piece]) -> None:
        """Read as many at once as fit the buffer of a thread."""
        at = 0
        while at < len(pieces):
            ends = itertools.accumulate(piece.nbytes for piece in pieces[at:])
            count = max(1, sum(1 for end in itertools.takewhile(lambda end: end <= PIECE, ends)))
            self._sum(pieces[at : at + count])
            at += count

    def _sum(self, pieces: Sequence[_Piece]) -> None:
        try:
            for piece, view in zip(pieces, self._read(pieces)):
                self._note(piece.record, piece.start, zlib.crc32(view), len(view))
        except ArchiveError as error:
            if len(pieces) > 1:  # the header of one of them disagrees with the directory; the others are none the worse
                for piece in pieces:
                    self._sum([piece])
                return
            self._damaged.setdefault(pieces[0].record, error)

    def _inflate(self, record: int) -> None:
        """As in Archive: exactly the bytes that the directory names, out of exactly those that are stored."""
        archive = self._archive
        stored, nbytes = archive.field(record, Entry.STORED_NBYTES), archive.field(record, Entry.NBYTES)
        machine, total, made, rest = zlib.decompressobj(-15), 0, 0, b""
        try:
            for start in range(0, stored, PIECE):
                (packed,) = self._read([_Piece(record, start, min(PIECE, stored - start))])
                text = machine.decompress(packed, PIECE)
                rest, total, made = machine.unconsumed_tail, zlib.crc32(text, total), made + len(text)
                while (rest or len(text) == PIECE) and not machine.eof and made <= nbytes:
                    text = machine.decompress(rest, PIECE)
                    rest, total, made = machine.unconsumed_tail, zlib.crc32(text, total), made + len(text)
                if rest or (machine.eof and start + PIECE < stored):
                    rest = rest or b"more"  # than the stream needs
                    break
        except ArchiveError as error:
            self._damaged.setdefault(record, error)
            return
        except zlib.error as error:
            self._blame(record, f"its deflated data is damaged: {error}")
            return
        if made != nbytes or not machine.eof or machine.unused_data or rest:
            self._blame(record, f"it does not inflate to the {nbytes} bytes that the directory names")
            return
        self._note(record, 0, total, made)

    def _read(self, pieces: Sequence[_Piece]) -> list[memoryview]:
        """The bytes of each, in the buffer of this thread: until the next call."""
        archive, nbytes = self._archive, sum(piece.nbytes for piece in pieces)
        buffer = getattr(self._own, "buffer", None)
        if buffer is None:
            buffer = self._own.buffer = memoryview(archive.backend.allocate(PIECE))
        jobs: list[int] = []
        views: list[memoryview] = []
        place = 0
        for piece in pieces:
            jobs += (piece.record, piece.start, piece.nbytes, 0, place)
            views.append(buffer[place : place + piece.nbytes])
            place += piece.nbytes
        archive.read_into(jobs, [buffer], 1)
        if self._bar is not None:
            with self._lock:
                self._bar.update(nbytes)
        return views

    def _note(self, record: int, start: int, checksum: int, nbytes: int) -> None:
        with self._lock:
            self._sums.setdefault(record, {})[start] = checksum, nbytes

    def _sum_of(self, record: int) -> int:
        pieces = self._sums[record]
        total = 0
        for start in sorted(pieces):
            checksum, nbytes = pieces[start]
            total = combined(total, checksum, nbytes)
        return total

    def _blame(self, record: int, what: str) -> None:
        archive = self._archive
        self._damaged[record] = ArchiveError(
            f"the record is damaged: {what}",
            offset=archive.field(record, Entry.HEADER_OFFSET),
            record=archive.name(record),
            path=archive.source.path,
        )


# ---------------------------------------------------------------- arithmetic of CRC-32


def combined(first: int, second: int, nbytes: int) -> int:
    """The CRC-32 of two stretches one after the other, the second of which has `nbytes`, from that of each."""
    return _product(_x_to_the(8 * nbytes), first) ^ second if first else second


def _product(a: int, b: int) -> int:
    """Of two polynomials modulo POLYNOMIAL; the highest bit is the coefficient of 1."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (POLYNOMIAL if b & 1 else 0)
    return product


@functools.lru_cache(maxsize=64)
def _x_to_the(n: int) -> int:
    """By squaring."""
    power, square = 1 << 31, 1 << 30
    while n:
        if n & 1:
            power = _product(power, square)
        square = _product(square, square)
        n >>= 1
    return power
