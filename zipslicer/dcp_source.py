"""DCP source: the chunks of a folder in, a ByteSource out in which every tensor is whole, in row-major order.

A file that nobody has written: whoever reads a stretch of it gets it out of the chunks that have a part of it. A chunk is
looked for in its archive when it is first read; what the archive says of it must be what the metadata says.
"""

from __future__ import annotations

import bisect
import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .archive import Archive, is_swapped
from .backend import Backend, Handle
from .dcp_metadata import Chunk, Folder, Tensor, Window
from .errors import ArchiveError, ChangedError, TableError, UnsupportedError, ZipSlicerError
from .opening import open_source
from .plan import numel, row_major
from .policy import DTYPES, Limits
from .program import run_program
from .source import ByteSource, Closed, OpenFile, beside, is_url, read_into, without_secrets
from .table import TensorTable

__all__ = ["FolderSource", "Record", "table_of"]

MOST_FILES = 200  # local ones that are open at a time: a process may have 1024 or fewer, and each rank wrote one
SLAB = 8 << 20  # bytes that are read through at a time where the wanted ones are scattered among them
LONG_RUN = 64 << 10  # bytes; longer ones are read into their place without a copy
TAIL_NBYTES, HEAD_NBYTES = 64 << 10, 4 << 10  # of an archive of one tensor: its directory, and its pickle


class _Files:
    """The files of a folder, each opened when it is first read; local ones are closed when there are too many."""

    def __init__(self, folder: str, limits: Limits, options: Mapping[str, Any] | None, cache_dir: Any) -> None:
        self._folder = folder
        self._open = (limits, options, cache_dir)
        self._lock = threading.Lock()
        self._files: dict[str, ByteSource] = {}
        self._stamps: dict[str, bytes] = {}
        self._is_closed = False

    def get(self, file: str) -> ByteSource:
        """Raises: OSError; ArchiveError where it is missing; ChangedError where another one has its place."""
        found = self._files.get(file)
        if found is not None:
            return found
        path = beside(self._folder, file)
        try:
            made = open_source(path, *self._open)
        except FileNotFoundError:
            raise ArchiveError("a file is missing that the metadata names", path=without_secrets(path)) from None
        with self._lock:
            if self._is_closed or self._stamps.setdefault(file, made.stamp) != made.stamp:
                made.close()
                if self._is_closed:
                    raise ValueError("the checkpoint is closed")
                raise ChangedError("the file was changed after it was opened", path=without_secrets(path))
            kept = self._files.setdefault(file, made)
            local = [name for name, each in self._files.items() if isinstance(each, OpenFile)]
            if len(local) > MOST_FILES:
                del self._files[local[0]]  # closed by whoever is the last to hold it
        if kept is not made:
            made.close()
        return kept

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            files, self._files = self._files, {}
        for file in files.values():
            file.close()


class Record(NamedTuple):
    """A record of an archive of a value: the storage of a tensor in it."""

    archive: Archive
    record: int
    name: str
    nbytes: int


class FolderSource:
    """All tensors of a folder one after the other, as if they were a file: see the first lines of this module.

    Safe for concurrent use.
    """

    stamp = b""
    head = b""
    start = 0

    def __init__(
        self, folder: Folder, backend: Backend, limits: Limits, options: Mapping[str, Any] | None, cache_dir: Any
    ) -> None:
        self.path: str | None = without_secrets(folder.path.replace("\\", "/").rpartition("/")[0] or ".")
        self.origin: str | None = folder.path
        self.handle: Handle = self
        self.size = 0
        self._folder = folder.path
        self._files = _Files(folder.path, limits, options, cache_dir)
        self._backend, self._limits = backend, limits
        self._starts: list[int] = []
        self._regions: list[Tensor | Record] = []
        self._is_remote = is_url(folder.path)
        self.keeps = not self._is_remote or cache_dir is not None

    def place(self, region: Tensor | Record) -> int:
        """Append what is to be read; -> where it begins."""
        if region.nbytes:  # else nothing is ever read of it
            self._starts.append(self.size)
            self._regions.append(region)
        self.size += region.nbytes
        return self.size - region.nbytes

    def check(self, threads: int) -> None:
        """Open all files, and see that they are as long as they are said to be. Raises: ArchiveError, OSError."""
        last: dict[str, Window] = {}
        for region in self._regions:
            for chunk in region.chunks if isinstance(region, Tensor) else ():
                last[chunk.window.file] = max(chunk.window, last.get(chunk.window.file, chunk.window))
        if self._is_remote:
            from concurrent.futures import ThreadPoolExecutor

            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(self._files.get, last))
        for window in last.values():
            self._file_of(window)

    def preadv(self, buffers: Sequence[Any], offset: int, /) -> int:
        done = 0
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            for region, start, count in self._parts(offset + done, len(view)):
                part, view = view[:count], view[count:]
                if isinstance(region, Tensor):
                    _Reading(self, region, start, count).run(part)
                else:
                    at, _ = region.archive.extent(region.record)
                    read_into(region.archive.source, part, at + start)
                done += count
        return done

    def _parts(self, offset: int, nbytes: int) -> Iterator[tuple[Tensor | Record, int, int]]:
        """(what has it, from which byte of that on, how many) of a stretch."""
        number = bisect.bisect_right(self._starts, offset) - 1
        end = min(offset + nbytes, self.size)
        while offset < end:
            region, start = self._regions[number], offset - self._starts[number]
            count = min(end - offset, region.nbytes - start)
            yield region, start, count
            offset += count
            number += 1

    @property
    def ahead(self) -> Any:
        return self._ahead if self._is_remote else None

    @contextlib.contextmanager
    def _ahead(self, extents: Iterable[tuple[int, int]]) -> Iterator[None]:
        """Tell the files what will be read of each. First of all, where chunks lie that nobody has looked at yet."""
        readings = [
            _Reading(self, region, start, count)
            for offset, nbytes in extents
            for region, start, count in self._parts(offset, nbytes)
            if isinstance(region, Tensor)
        ]
        unknown: dict[int, tuple[Tensor, Chunk]] = {}
        for reading in readings:
            unknown.update((id(c), (reading.tensor, c)) for c in reading.chunks() if c.laid is None)
        ends: dict[str, list[tuple[int, int]]] = {}
        for _, chunk in unknown.values():
            file, offset, nbytes = chunk.window
            head, tail = min(HEAD_NBYTES, nbytes), min(TAIL_NBYTES, nbytes)
            ends.setdefault(file, []).extend([(offset, head), (offset + nbytes - tail, tail)])
        with self.told(ends):
            for tensor, chunk in unknown.values():
                self.laid(tensor, chunk)
        wanted: dict[str, list[tuple[int, int]]] = {}
        for reading in readings:
            for file, offset, nbytes in reading.extents():
                wanted.setdefault(file, []).append((offset, nbytes))
        with self.told(wanted):
            yield

    @contextlib.contextmanager
    def told(self, extents: Mapping[str, list[tuple[int, int]]]) -> Iterator[None]:
        """Around reads: tells files what will be read of them, if they want to know."""
        with contextlib.ExitStack() as stack:
            for file, wanted in extents.items():
                source = self._files.get(file)
                if source.ahead is not None:
                    stack.enter_context(source.ahead(sorted(wanted)))
            yield

    # ---------------------------------------------------------------- chunks
    def archive(self, window: Window) -> Archive:
        """The archive of a chunk or value."""
        return Archive(self._file_of(window), self._backend, self._limits, (window.offset, window.nbytes))

    def _file_of(self, window: Window) -> ByteSource:
        source = self._files.get(window.file)
        if window.offset + window.nbytes > source.size:
            raise ArchiveError(
                f"the metadata names bytes up to {window.offset + window.nbytes}, the file has {source.size}",
                path=source.path,
            )
        return source

    def laid(self, tensor: Tensor, chunk: Chunk) -> tuple[ByteSource, int, tuple[int, ...]]:
        """(file, byte of the first element, strides in bytes) of a chunk; looked up once, and proved.

        Raises: TableError where it is another tensor than the metadata says; UnsupportedError for one that is not dense.
        """
        try:
            source = self._file_of(chunk.window)
            if chunk.laid is None:
                chunk.laid = self._found(tensor, chunk)
        except ZipSlicerError as error:
            raise error.located(
                path=without_secrets(beside(self._folder, chunk.window.file)), key=tensor.name
            ) from None
        return source, *chunk.laid

    def _found(self, tensor: Tensor, chunk: Chunk) -> tuple[int, tuple[int, ...]]:
        archive = self.archive(chunk.window)
        table = table_of(archive, {}, "placeholder")
        leaf = table.leaf(0)
        if leaf is None or leaf.composite is not None:
            raise UnsupportedError("a chunk is no dense tensor")
        row = table.row(leaf.number)
        geometry = table.geometry(row)
        dtype = table.dtype(row.dtype)
        if geometry.sizes != chunk.sizes or dtype is not DTYPES[tensor.dtype]:
            raise TableError(
                f"a chunk is a tensor of {dtype.name} and {geometry.sizes}, and the metadata says "
                f"{DTYPES[tensor.dtype].name} and {chunk.sizes}"
            )
        if row.conj or row.neg:
            raise UnsupportedError("a chunk is conjugated or negated when it is read")
        offset, _ = archive.extent(table.record(row.storage))
        return offset + row.storage_offset * row.itemsize, tuple(n * row.itemsize for n in geometry.strides)

    def close(self) -> None:
        self.handle = Closed()
        self._files.close()


Dims = list[tuple[int, int, int]]  # (count, bytes apart in the file, bytes apart in the result), outermost first


class _Reading:
    """A stretch of bytes [start, start + nbytes) of a tensor, out of its chunks.

    All is counted in bytes: a tensor of sizes (3, 4) of float32 has the sizes (3, 4, 4).
    """

    def __init__(self, source: FolderSource, tensor: Tensor, start: int, nbytes: int) -> None:
        self.source, self.tensor, self.start, self.nbytes = source, tensor, start, nbytes
        self.itemsize = DTYPES[tensor.dtype].itemsize
        self.sizes = (*tensor.sizes, self.itemsize)

    def boxes(self) -> Iterator[tuple[Chunk, list[int], list[int]]]:
        """(chunk, starts, sizes) of all parts of chunks that are needed."""
        for starts, sizes in _boxes(self.sizes, self.start, self.start + self.nbytes):
            for chunk in self._near(starts[0], sizes[0]):
                first, count = [], []
                for a, n, b, m in zip(starts, sizes, (*chunk.starts, 0), (*chunk.sizes, self.itemsize)):
                    low, high = max(a, b), min(a + n, b + m)
                    if low >= high:
                        break
                    first.append(low)
                    count.append(high - low)
                else:
                    yield chunk, first, count

    def _near(self, start: int, count: int) -> Sequence[Chunk]:
        """Chunks that may have a part of these first indexes."""
        chunks = self.tensor.chunks
        if len(chunks) < 8 or not self.tensor.sizes:
            return chunks
        longest = max(chunk.sizes[0] for chunk in chunks)
        first = bisect.bisect_right(chunks, start - longest, key=_first)
        return chunks[first : bisect.bisect_left(chunks, start + count, key=_first)]

    def chunks(self) -> Iterator[Chunk]:
        return (chunk for chunk, _, _ in self.boxes())

    def moves(self) -> Iterator[tuple[ByteSource, str, int, int, Dims]]:
        """(file, its name, first byte in it, first byte in the result, dimensions) of what is to be read."""
        apart = row_major(self.sizes)
        for chunk, starts, sizes in self.boxes():
            file, offset, strides = self.source.laid(self.tensor, chunk)
            strides = (*strides, 1)
            offset += sum((a - b) * stride for a, b, stride in zip(starts, (*chunk.starts, 0), strides))
            place = sum(a * stride for a, stride in zip(starts, apart)) - self.start
            yield file, chunk.window.file, offset, place, _joined(sizes, strides, apart)

    def extents(self) -> Iterator[tuple[str, int, int]]:
        """(file, offset, nbytes) of what will be read."""
        for _, file, offset, _, dims in self.moves():
            yield from ((file, at, nbytes) for at, nbytes in _hulls(offset, dims))

    def run(self, into: memoryview) -> None:
        """Read it."""
        for file, _, offset, place, dims in self.moves():
            for at, to, part in _pieces(offset, place, dims):
                if len(part) == 1 and part[0][1:] == (1, 1):
                    read_into(file, into[to : to + part[0][0]], at)
                    continue
                through = memoryview(bytearray(_hull(part)))
                read_into(file, through, at)
                _scatter(through, into, to, part)


def _first(chunk: Chunk) -> int:
    return chunk.starts[0]


def _boxes(sizes: Sequence[int], start: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Row-major elements [start, end) as (starts, sizes) of boxes."""
    if start >= end:
        return
    if len(sizes) == 1:
        yield (start,), (end - start,)
        return
    inner = numel(sizes[1:])
    row, last = start // inner, end // inner
    if start % inner:  # the rest of a row, which may be all
        for starts, counts in _boxes(sizes[1:], start % inner, min(inner, end - row * inner)):
            yield (row, *starts), (1, *counts)
        row += 1
    if row < last:
        yield (row, *[0] * (len(sizes) - 1)), (last - row, *sizes[1:])
    if row <= last and end % inner:
        for starts, counts in _boxes(sizes[1:], 0, end % inner):
            yield (last, *starts), (1, *counts)


def _joined(sizes: Sequence[int], strides: Sequence[int], apart: Sequence[int]) -> Dims:
    """Dimensions without those of size 1; neighbours that are one in the file and in the result are one."""
    dims: Dims = []
    for n, a, b in zip(sizes, strides, apart):
        if n == 1:
            continue
        if dims and dims[-1][1] == n * a and dims[-1][2] == n * b:
            dims[-1] = dims[-1][0] * n, a, b
        else:
            dims.append((n, a, b))
    return dims or [(1, 1, 1)]


def _hull(dims: Dims) -> int:
    return sum((n - 1) * apart for n, apart, _ in dims) + 1


def _pieces(offset: int, place: int, dims: Dims) -> Iterator[tuple[int, int, Dims]]:
    """(first byte in the file, in the result, dimensions) of parts that are read in one go.

    A run that is long is alone. Shorter ones are read through, with what lies between them if that is not more than they.
    """
    todo = [(offset, place, dims)]
    while todo:
        offset, place, dims = todo.pop()
        wanted, through = numel([n for n, _, _ in dims]), _hull(dims)
        run = dims[-1][0] if dims[-1][1:] == (1, 1) else 1
        if run == wanted or (run < LONG_RUN and through <= min(SLAB, 2 * wanted + LONG_RUN)):
            yield offset, place, dims
            continue
        # Cut what spans most of the file, in halves, which leaves the parts in file order.
        dim = max(range(len(dims)), key=lambda d: dims[d][1])
        n, apart, away = dims[dim]
        half = n // 2
        for start, count in ((half, n - half), (0, half)):
            part = [*dims[:dim], (count, apart, away), *dims[dim + 1 :]]
            part = [each for each in part if each[0] > 1] or [(1, 1, 1)]
            todo.append((offset + start * apart, place + start * away, part))


def _hulls(offset: int, dims: Dims) -> Iterator[tuple[int, int]]:
    return ((at, _hull(part)) for at, _, part in _pieces(offset, 0, dims))


def _scatter(given: memoryview, into: memoryview, place: int, dims: Dims) -> None:
    """Copy bytes from where they are in one piece to where they belong. By NumPy, or by torch where that is not there."""
    unit = 16  # bytes that are copied as one: as many as all distances allow
    inner = dims[-1][0] if dims[-1][1:] == (1, 1) else 1
    while any(n % unit for n in (inner, *(n for _, a, b in dims if (a, b) != (1, 1) for n in (a, b)))):
        unit //= 2
    counts = [n for n, a, b in dims if (a, b) != (1, 1)]
    left, right = ([each[i] // unit for each in dims if each[1:] != (1, 1)] for i in (1, 2))
    if inner > 1:
        counts, left, right = [*counts, inner // unit], [*left, 1], [*right, 1]
    reach = sum((n - 1) * stride for n, stride in zip(counts, right)) + 1
    target = into[place : place + reach * unit]
    try:
        import numpy as np
    except ImportError:
        import torch

        kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}[unit]
        one = torch.frombuffer(given, dtype=kind, count=len(given) // unit)
        other = torch.frombuffer(target, dtype=kind)
        other.as_strided(counts, right).copy_(one.as_strided(counts, left))
        return
    dtype = np.dtype({1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}[unit])
    one = np.ndarray(counts, dtype, given, 0, [n * unit for n in left])
    np.ndarray(counts, dtype, target, 0, [n * unit for n in right])[...] = one


def table_of(archive: Archive, allow: Mapping[str, Any], unknown: str) -> TensorTable:
    order, main = archive.find(["byteorder", "data.pkl"])
    if is_swapped(archive, order):
        raise UnsupportedError("a folder of the other byte order")
    number = main if main >= 0 else None
    program = run_program(archive, archive.limits, number=number, unknown=unknown, allow=allow)
    return TensorTable(program, archive, False)
