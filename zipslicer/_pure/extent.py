"""Extent: positioned reads into memory the caller owns. Read this beside csrc/extent.cc.

A handle is a POSIX file descriptor, or an object with preadv(buffers, offset). Reads are merged where neighbours are
near and done in file order. Threads help even here: os.preadv drops the GIL, and what a warm read costs is page faults.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import struct
import threading
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import ArchiveError, ChangedError
from .directory import COUNTED, ENTRY_FIELDS, LOCAL, parse_local_header

HUGE_PAGE = 2 << 20
LARGE_FROM = HUGE_PAGE - HUGE_PAGE // 21  # bytes; a huge page of which one byte in twenty is not used
CHUNK = 8 << 20  # one read of a large extent; a multiple of HUGE_PAGE, so that two threads never fault one page
THREADS_FROM = 4 << 20  # bytes; below, starting a thread costs more than it gives
NEAR = 4096  # bytes; a gap of at most a page is read along: its page is in memory or on its way anyway
MAX_BUFFERS = 1024  # IOV_MAX of Linux, of one preadv
TENSOR = struct.Struct("=9q")  # a row of backend.Graph.tensors
TENSOR_KIND = 11  # backend.Kind.TENSOR
MAX_NBYTES = 0x7FFFF000  # what Linux reads in one call at most
HEADER_ROOM = 4096  # bytes between a header and the wanted start that one preadv reads along

PRIVATE: dict[str, int] = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}

Preadv = Callable[[Sequence[Any], int], int]


def allocate(nbytes: int) -> Any:
    """See backend.Backend.allocate."""
    if nbytes < LARGE_FROM:
        return bytearray(nbytes)
    # Over-mapped to find an aligned start: kernels before 6.7 place a mapping on any page. A last page that is nearly
    # whole may become a huge one too.
    whole = -(-nbytes // HUGE_PAGE) * HUGE_PAGE
    size = (whole if whole - nbytes <= nbytes // 20 else nbytes) + HUGE_PAGE
    # Private, which is not mmap's default: a shared mapping gets no huge pages, and forked children would write to it.
    room = mmap.mmap(-1, size, **PRIVATE)
    with contextlib.suppress(
        AttributeError, OSError, ValueError
    ):  # no huge pages here: 4 KiB ones are right, and slower
        room.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(room)
    start = -_address(room) % HUGE_PAGE
    return view[start : start + nbytes]


def _address(room: mmap.mmap) -> int:
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(room))


def _preadv(handle: Any) -> Preadv:
    if not isinstance(handle, int):
        return handle.preadv  # type: ignore[no-any-return]
    return lambda buffers, offset: os.preadv(handle, buffers, offset)


def _fill(preadv: Preadv, buffers: list[memoryview], offset: int) -> None:
    """Fill the buffers from offset on, whole. os.preadv retries EINTR by itself (PEP 475)."""
    while buffers:
        got = preadv(buffers, offset)
        if got == 0 and any(len(b) for b in buffers):
            raise ChangedError("the file ends here: it is shorter than when it was opened", offset=offset)
        offset += got
        while buffers and got >= len(buffers[0]):
            got -= len(buffers[0])
            del buffers[0]
        if got:
            buffers[0] = buffers[0][got:]


class Piece:
    """A stretch of the file and where it goes."""

    __slots__ = ("offset", "view")

    def __init__(self, offset: int, view: memoryview) -> None:
        self.offset = offset
        self.view = view


def _pieces(offset: int, view: memoryview) -> list[Piece]:
    """Cut a large extent into chunks."""
    if 0 < len(view) <= CHUNK:
        return [Piece(offset, view)]
    return [Piece(offset + i, view[i : i + CHUNK]) for i in range(0, len(view), CHUNK)]


def _calls(pieces: list[Piece]) -> list[tuple[int, list[memoryview]]]:
    """Pieces -> (offset, buffers) of each preadv: in file order, neighbours together, gaps into scratch."""
    pieces.sort(key=lambda piece: piece.offset)
    calls: list[tuple[int, list[memoryview]]] = []
    scratch = memoryview(bytearray(NEAR))
    end = size = 0
    for piece in pieces:
        gap = piece.offset - end
        n = len(piece.view)
        if calls and 0 <= gap <= NEAR and len(calls[-1][1]) <= MAX_BUFFERS - 2 and size + gap + n <= CHUNK:
            if gap:
                calls[-1][1].append(scratch[:gap])
            calls[-1][1].append(piece.view)
            size += gap + n
        else:
            calls.append((piece.offset, [piece.view]))
            size = n
        end = piece.offset + n
    return calls


def _read(handle: Any, pieces: list[Piece], threads: int) -> None:
    preadv = _preadv(handle)
    calls = _calls(pieces)
    if threads < 2 or len(calls) < 2 or not isinstance(handle, int) or sum(len(p.view) for p in pieces) < THREADS_FROM:
        for offset, buffers in calls:
            _fill(preadv, buffers, offset)
        return
    turn = itertools.count()  # next() on it is atomic, in free-threaded Python too
    errors: list[BaseException] = []

    def work() -> None:
        try:
            while not errors and (i := next(turn)) < len(calls):
                _fill(preadv, calls[i][1], calls[i][0])
        except BaseException as error:  # handed to the caller below
            errors.append(error)

    workers = [threading.Thread(target=work, daemon=True) for _ in range(min(threads, len(calls)) - 1)]
    try:
        for worker in workers:
            worker.start()
        work()
    except BaseException as error:  # Ctrl-C: the others stop after their chunk
        errors.append(error)
    for worker in workers:
        if worker.ident is not None:
            worker.join()
    if errors:
        raise errors[0]


def read_bytes(handle: Any, offset: int, nbytes: int) -> bytes:
    """See backend.Backend.read_bytes."""
    buffer = bytearray(nbytes)
    _fill(_preadv(handle), [memoryview(buffer)], offset)
    return bytes(buffer)


def read_record(handle: Any, stamp: bytes, block: bytes, entries: Any, record: int, start: int, nbytes: int) -> Any:
    """See backend.Backend.read_record."""
    buffer = allocate(nbytes)
    _read_record(handle, stamp, block, entries, record, start, memoryview(buffer))
    return buffer


def _read_record(
    handle: Any, stamp: bytes, block: bytes, entries: Any, record: int, start: int, view: memoryview
) -> None:
    rows = memoryview(entries).cast("q")
    payload = rows[record * ENTRY_FIELDS + 1]
    preadv = _preadv(handle)
    try:
        if payload >= 0:
            _fill(preadv, [view], payload + start)
        else:
            _read_unproved(preadv, block, entries, record, start, view)
    except ArchiveError:
        _check_stamp(handle, stamp)  # a file rewritten under us is not an archive that lies
        raise
    _check_stamp(handle, stamp)


def read_tensor(hot: Any, value: int) -> Any:
    """See backend.Backend.read_tensor."""
    number = ~value if value < 0 else hot.payloads[value] if hot.kinds[value] == TENSOR_KIND else -1
    if number < 0:
        return None
    row = TENSOR.unpack_from(hot.tensors, number * TENSOR.size)
    storage, dtype, itemsize, offset, start, ndim, flags, _, extent = row
    record, nbytes = hot.direct[storage], extent * itemsize
    if record < 0 or flags or not 0 < nbytes < hot.limit:
        return None
    handle, stamp, block, entries = hot.source.handle, hot.source.stamp, hot.block, hot.entries
    shape = hot.dims[start : start + 2 * ndim].tolist()
    sizes, strides, maker = tuple(shape[:ndim]), tuple(shape[ndim:]), hot.maker
    if maker is None:
        return read_record(handle, stamp, block, entries, record, offset * itemsize, nbytes), dtype, sizes, strides
    if extent != 1 + sum(
        (n - 1) * stride for n, stride in zip(sizes, strides)
    ):  # of so many elements the memory will be
        raise ValueError("the extent of a row is not that of its sizes and strides")
    wanted = maker.dtypes[dtype]
    if hot.is_off() or wanted is None:
        return None
    made = maker.make(sizes, strides, dtype=wanted, device=maker.device)
    if type(made) is not maker.type or not (address := maker.address(made)):
        return None
    import ctypes

    view = memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B")
    _read_record(handle, stamp, block, entries, record, offset * itemsize, view)
    return made


def _read_unproved(preadv: Preadv, block: bytes, entries: Any, record: int, start: int, view: memoryview) -> None:
    """Read a payload and the header that proves where it is: in one call where the guess is right and they are near."""
    rows = memoryview(entries).cast("q")
    header = rows[record * ENTRY_FIELDS]
    guess = ~rows[record * ENTRY_FIELDS + 1]
    near = guess - header + start <= HEADER_ROOM
    if near:
        head = bytearray(guess - header + start)
        _fill(preadv, [memoryview(head), view], header)
        del head[guess - header :]
    else:
        head = bytearray(min(guess - header, HEADER_ROOM))
        _fill(preadv, [memoryview(head)], header)
    payload = _prove(preadv, bytes(head), block, entries, record)
    if not near or payload != guess:
        _fill(preadv, [view], payload + start)


def _prove(preadv: Preadv, head: bytes, block: bytes, entries: Any, record: int) -> int:
    """Check a local header, of which `head` holds a first part, and write down where the payload begins."""
    rows = memoryview(entries).cast("q")
    header, limit = rows[record * ENTRY_FIELDS], rows[record * ENTRY_FIELDS + 4]
    if len(head) >= LOCAL.size and not rows[record * ENTRY_FIELDS + 7] & COUNTED:
        fields = LOCAL.unpack_from(head)
        whole = min(LOCAL.size + fields[9] + fields[10], limit - header)
        if fields[0] == b"PK\x03\x04" and whole > len(head):
            grown = bytearray(whole)
            _fill(preadv, [memoryview(grown)], header)
            head = bytes(grown)
    payload = parse_local_header(head, block, entries, record)
    rows[record * ENTRY_FIELDS + 1] = payload
    return payload


def _check_stamp(handle: Any, stamp: bytes) -> None:
    if not stamp or not isinstance(handle, int):
        return
    now = os.fstat(handle)
    if array("q", (now.st_size, now.st_mtime_ns, now.st_ino)).tobytes() != stamp:
        raise ChangedError("the file was changed after it was opened")


def read_records(
    handle: Any, stamp: bytes, block: bytes, entries: Any, jobs: bytes, buffers: Sequence[Any], threads: int
) -> None:
    """See backend.Backend.read_records."""
    preadv = _preadv(handle)
    rows = memoryview(entries).cast("q")
    views = [memoryview(buffer).cast("B") for buffer in buffers]
    wanted = memoryview(jobs).cast("q").tolist()
    pieces: list[Piece] = []
    heads: dict[int, tuple[int, bytearray]] = {}  # of records not yet proved: (guess, header bytes)
    waiting: list[tuple[int, int, memoryview]] = []  # jobs of each such record, should the guess be wrong
    for record, start, nbytes, buffer, place in zip(*(wanted[i::5] for i in range(5))):
        view = views[buffer][place : place + nbytes]
        payload = rows[record * ENTRY_FIELDS + 1]
        if payload < 0:
            payload = ~payload
            if record not in heads:
                header = rows[record * ENTRY_FIELDS]
                head = bytearray(min(payload - header, HEADER_ROOM))
                heads[record] = payload, head
                pieces.append(Piece(header, memoryview(head)))
            waiting.append((record, start, view))
        pieces += _pieces(payload + start, view)
    try:
        _read(handle, pieces, threads)
        for record in sorted(
            heads, key=lambda record: rows[record * ENTRY_FIELDS]
        ):  # of two bad ones the first is told
            _, head = heads[record]
            _prove(preadv, bytes(head), block, entries, record)
    except ArchiveError:
        _check_stamp(handle, stamp)
        raise
    again: list[Piece] = []
    for record, start, view in waiting:
        payload = rows[record * ENTRY_FIELDS + 1]
        if payload != heads[record][0]:
            again += _pieces(payload + start, view)
    if again:
        _read(handle, again, threads)
    _check_stamp(handle, stamp)
