"""Extent: positioned reads into memory the caller owns. Read this beside csrc/extent.cc.

A handle is a POSIX file descriptor, or an object with preadv(buffers, offset). Reads are merged where neighbours are
near and done in file order. Threads help even here: os.preadv drops the GIL, and what a warm read costs is page faults.
"""

from __future__ import annotations

import collections
import contextlib
import errno
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
CHUNK = HUGE_PAGE  # what a thread takes of a large extent; more is no faster, and slower from a disk
CACHED_CALL = 512 << 10  # bytes; what one call of it asks of the page cache: readahead is best for small steps
THREADS_FROM = 4 << 20  # bytes; below, starting a thread costs more than it gives
NEAR = 4096  # bytes; a gap of at most a page is read along: its page is in memory or on its way anyway
# Of many small reads so many are done together: what is made for them is gone before the garbage collector, whose rounds
# cost more than the reading, looks at it.
BATCH = 512
# Of calls that wait for a disk so many are announced to the system at once, which then fetches them side by side. Only
# small ones: what is large keeps a disk busy by itself.
ANNOUNCED = 64
ANNOUNCED_TO = 1 << 20  # bytes
MAX_BUFFERS = 1024  # IOV_MAX of Linux, of one preadv
TENSOR = struct.Struct("=9q")  # a row of backend.Graph.tensors
TENSOR_KIND = 11  # backend.Kind.TENSOR
DIRECT_NBYTES = 4096  # backend.DIRECT_NBYTES
DIRECT_FROM = 1 << 20  # backend.DIRECT_FROM
HEADER_ROOM = 8 << 10  # bytes between a header and the wanted start that one preadv reads along

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
    try:
        room = mmap.mmap(-1, size, **PRIVATE)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise MemoryError(f"no {nbytes} bytes of memory") from None
        raise
    # Where there are no huge pages, those of 4 KiB are right, and slower.
    with contextlib.suppress(AttributeError, OSError, ValueError):
        room.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(room)
    start = -_address(room) % HUGE_PAGE
    return view[start : start + nbytes]


def _address(memory: Any) -> int:
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _preadv(handle: Any) -> Preadv:
    if isinstance(handle, int):
        return lambda buffers, offset: _preadv_cached(handle, buffers, offset)
    if isinstance(handle, tuple):
        return _direct(*handle)
    preadv: Preadv = handle.preadv
    return preadv


def _preadv_cached(fd: int, buffers: Sequence[Any], offset: int) -> int:
    if len(buffers[0]) > CACHED_CALL:
        buffers = [buffers[0][:CACHED_CALL]]
    return os.preadv(fd, buffers, offset)


def _descriptor(handle: Any) -> int | None:
    """The one that reads through the page cache; None for an object, which has none."""
    if isinstance(handle, tuple):
        handle = handle[0]
    return handle if isinstance(handle, int) else None


def _direct(fd: int, direct_fd: int) -> Preadv:
    """Reads whole pages past the page cache where place and memory allow it; what is before and after, through it."""

    def preadv(buffers: Sequence[Any], offset: int) -> int:
        nonlocal direct_fd
        view = buffers[0]
        before = -offset % DIRECT_NBYTES
        is_fit = direct_fd >= 0 and len(buffers) == 1 and len(view) - before >= DIRECT_FROM
        if not is_fit or (_address(view) - offset) % DIRECT_NBYTES:
            return _preadv_cached(fd, buffers, offset)
        if before:
            return os.preadv(fd, [view[:before]], offset)
        try:
            return os.preadv(direct_fd, [view[: len(view) // DIRECT_NBYTES * DIRECT_NBYTES]], offset)
        except OSError:
            direct_fd = -1  # refused, as by a disk that wants another alignment
            return _preadv_cached(fd, buffers, offset)

    return preadv


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
    """Cut a large extent where its memory is at a multiple of a huge page: no two threads then fault in the same one."""
    if len(view) <= CHUNK:
        return [Piece(offset, view)] if len(view) else []
    first = CHUNK - _address(view) % HUGE_PAGE
    ends = [*range(first, len(view), CHUNK), len(view)]
    return [Piece(offset + i, view[i:end]) for i, end in zip([0, *ends], ends, strict=False)]


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
    _do(handle, _calls(pieces), sum(len(piece.view) for piece in pieces), threads)


def _do(handle: Any, calls: list[tuple[int, list[memoryview]]], nbytes: int, threads: int) -> None:
    preadv = _preadv(handle)
    if threads < 2 or len(calls) < 2 or _descriptor(handle) is None or nbytes < THREADS_FROM:
        for i, (offset, buffers) in enumerate(calls):
            if i % ANNOUNCED == 0:
                _announce(handle, calls, i)
            _fill(preadv, buffers, offset)
        return
    turn = itertools.count()  # next() on it is atomic, in free-threaded Python too
    errors: list[BaseException] = []

    def work() -> None:
        try:
            while not errors and (i := next(turn)) < len(calls):
                if i % ANNOUNCED == 0:
                    _announce(handle, calls, i)
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


def _announce(handle: Any, calls: list[tuple[int, list[memoryview]]], i: int) -> None:
    """Tell the system of the calls after this one, if a disk will be waited for."""
    fd = _descriptor(handle)
    if i + 1 == len(calls) or fd is None or not hasattr(os, "RWF_NOWAIT"):
        return
    try:
        os.preadv(fd, [bytearray(1)], calls[i][0], os.RWF_NOWAIT)
    except BlockingIOError:
        for offset, buffers in calls[i + 1 : i + ANNOUNCED]:
            nbytes = sum(map(len, buffers))
            if nbytes <= ANNOUNCED_TO:
                os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_WILLNEED)
    except OSError:  # a file system that cannot tell
        return


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
            _read_unproved(preadv, block, entries, record, ~payload, start, view)
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
    job = _job(hot, row)
    if job is None or (hot.maker is not None and hot.is_off()):
        return None
    record, start, nbytes = job
    made, buffer = _made(hot, row, nbytes)
    if made is not None:
        view = memoryview(buffer)
        _read_record(hot.source.handle, hot.source.stamp, hot.block, hot.entries, record, start, view)
    return made


def read_tensors(hot: Any, numbers: Sequence[int], whole: bool, threads: int) -> list[Any]:
    """See backend.Backend.read_tensors."""
    if hot.maker is not None and hot.is_off():
        return [None] * len(numbers)
    size = TENSOR.size
    uses = collections.Counter(TENSOR.unpack_from(hot.tensors, number * size)[0] for number in numbers) if whole else {}
    entries = memoryview(hot.entries).cast("q")
    source = hot.source
    found: list[Any] = []
    for first in range(0, len(numbers), BATCH):
        jobs = array("q")
        buffers: list[Any] = []
        for number in numbers[first : first + BATCH]:
            row = TENSOR.unpack_from(hot.tensors, number * size)
            made, job = None, _job(hot, row)
            if job is not None:
                record, start, nbytes = job
                if not whole or (uses[row[0]] == 1 and not start and nbytes == entries[record * ENTRY_FIELDS + 3]):
                    made, buffer = _made(hot, row, nbytes)
                    if made is not None:
                        jobs.extend((record, start, nbytes, len(buffers), 0))
                        buffers.append(buffer)
            found.append(made)
        read_records(source.handle, source.stamp, hot.block, hot.entries, jobs.tobytes(), buffers, threads)
    return found


def _job(hot: Any, row: tuple[int, ...]) -> tuple[int, int, int] | None:
    """Record, start and nbytes of a row that read_tensor is for."""
    storage, _, itemsize, offset, _, _, flags, _, extent = row
    record, nbytes = hot.direct[storage], extent * itemsize
    return None if record < 0 or flags or not 0 < nbytes < hot.limit else (record, offset * itemsize, nbytes)


def _made(hot: Any, row: tuple[int, ...], nbytes: int) -> tuple[Any, Any]:
    """What read_tensor returns for a row, and its memory, which is to be filled; None where the maker makes nothing."""
    _, dtype, _, _, start, ndim, _, _, extent = row
    shape = hot.dims[start : start + 2 * ndim].tolist()
    sizes, strides, maker = tuple(shape[:ndim]), tuple(shape[ndim:]), hot.maker
    if maker is None:
        buffer = allocate(nbytes)
        return (buffer, dtype, sizes, strides), buffer
    # Of so many elements the memory will be.
    if extent != 1 + sum((n - 1) * stride for n, stride in zip(sizes, strides)):
        raise ValueError("the extent of a row is not that of its sizes and strides")
    wanted = maker.dtypes[dtype]
    made = None if wanted is None else maker.make(sizes, strides, dtype=wanted, device=maker.device)
    if type(made) is not maker.type or not (address := maker.address(made)):
        return None, None
    import ctypes

    return made, memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B")


def _read_unproved(
    preadv: Preadv, block: bytes, entries: Any, record: int, guess: int, start: int, view: memoryview
) -> None:
    """Read a payload and the header that proves where it is: in one call where the guess is right and they are near.

    The guess is handed over, not read again: another thread may have written the truth in its place since.
    """
    header = memoryview(entries).cast("q")[record * ENTRY_FIELDS]
    # For no bytes there is nothing to read up to: then a file may end before them.
    near = len(view) > 0 and guess - header + start <= HEADER_ROOM
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
    fd = _descriptor(handle)
    if not stamp or fd is None:
        return
    now = os.fstat(fd)
    if array("q", (now.st_size, now.st_mtime_ns, now.st_ino)).tobytes() != stamp:
        raise ChangedError("the file was changed after it was opened")


def read_records(
    handle: Any, stamp: bytes, block: bytes, entries: Any, jobs: bytes, buffers: Sequence[Any], threads: int
) -> None:
    """See backend.Backend.read_records."""
    rows = memoryview(entries).cast("q")
    wanted = memoryview(jobs).cast("q").tolist()
    columns = [wanted[i::5] for i in range(5)]
    payloads = [rows[record * ENTRY_FIELDS + 1] for record in columns[0]]
    # All in file order.
    offsets = [(at if at >= 0 else ~at) + start for at, start in zip(payloads, columns[1])]
    order = sorted(range(len(offsets)), key=offsets.__getitem__)
    try:
        for first in range(0, len(order), BATCH):
            batch = [tuple(column[i] for column in columns) for i in order[first : first + BATCH]]
            _read_batch(handle, block, entries, batch, buffers, threads)
    except ArchiveError:
        _check_stamp(handle, stamp)
        raise
    _check_stamp(handle, stamp)


def _read_batch(
    handle: Any, block: bytes, entries: Any, batch: list[tuple[int, ...]], buffers: Sequence[Any], threads: int
) -> None:
    preadv = _preadv(handle)
    rows = memoryview(entries).cast("q")
    pieces: list[Piece] = []
    heads: dict[int, tuple[int, bytearray]] = {}  # of records not yet proved: (guess, header bytes)
    waiting: list[tuple[int, int, memoryview]] = []  # jobs of each such record, should the guess be wrong
    for record, start, nbytes, buffer, place in batch:
        view = memoryview(buffers[buffer]).cast("B")
        if place or nbytes != len(view):
            view = view[place : place + nbytes]
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
    _read(handle, pieces, threads)
    for record in sorted(heads, key=lambda record: rows[record * ENTRY_FIELDS]):  # of two bad ones the first is told
        _prove(preadv, bytes(heads[record][1]), block, entries, record)
    again: list[Piece] = []
    for record, start, view in waiting:
        payload = rows[record * ENTRY_FIELDS + 1]
        if payload != heads[record][0]:
            again += _pieces(payload + start, view)
    if again:
        _read(handle, again, threads)


def read_runs(
    handle: Any,
    stamp: bytes,
    block: bytes,
    entries: Any,
    record: int,
    start: int,
    nbytes: int,
    dims: Sequence[int],
    buffer: Any,
    threads: int,
) -> None:
    """See backend.Backend.read_runs."""
    view = memoryview(buffer).cast("B")
    starts = [start]
    for count, stride in zip(dims[::2], dims[1::2]):
        starts = [first + i * stride for first in starts for i in range(count)]
    if len(starts) * nbytes != len(view):
        raise ValueError(f"a buffer of {len(view)} bytes is not for {len(starts)} runs of {nbytes}")
    rows = memoryview(entries).cast("q")
    if rows[record * ENTRY_FIELDS + 1] < 0:
        _read_record(handle, stamp, block, entries, record, 0, memoryview(bytearray()))
    payload = rows[record * ENTRY_FIELDS + 1]
    calls: list[tuple[int, list[memoryview]]] = []
    scratch = memoryview(bytearray(NEAR))
    buffers: list[memoryview] = []  # of the last call
    end, room = -NEAR - 1, 0
    for place, first in enumerate(starts):  # thousands of them: no object for each, as _calls has it
        part = view[place * nbytes : (place + 1) * nbytes]
        gap = first - end
        if 0 <= gap <= NEAR and room > 1:
            if gap:
                buffers.append(scratch[:gap])
            buffers.append(part)
            room -= 2
        else:
            buffers, room = [part], min(MAX_BUFFERS - 1, CHUNK // nbytes)
            calls.append((payload + first, buffers))
        end = first + nbytes
    calls.sort(key=lambda call: call[0])
    _do(handle, calls, len(view), threads)
    _check_stamp(handle, stamp)
