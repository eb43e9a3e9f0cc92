"""Prefetch: tensors in, one rank's share of their bytes read to where whoever reads them next will find them.

That is the page cache for a file, and the folder of `cache_dir` for a URL: both are of the node, and not of the process.
So of N processes each reads 1/N of what all of them want, and nothing crosses the network twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from .backend import Entry
from .reader import below, default_threads
from .source import ByteSource, read_into
from .table import TensorTable

__all__ = ["prefetch"]

CELL = 8 << 20  # bytes; a file is shared out by stretches of so many, which are also the parts that a cache keeps


Places = Iterable[tuple[TensorTable, list[int]]]  # of each file its table, and positions in it


class _Cell(NamedTuple):
    """A stretch of a file, [number * CELL, (number + 1) * CELL), and the (offset, nbytes) that are wanted of it."""

    source: ByteSource
    number: int
    wanted: list[tuple[int, int]]

    @property
    def nbytes(self) -> int:
        return sum(nbytes for _, nbytes in self.wanted)


def prefetch(places: Places, rank: int, world_size: int, threads: int | None, bar: Any) -> int:
    """Read the share of a rank of the tensors there; -> its bytes.

    Raises: ValueError: there is no such rank, or nothing that would keep what is read; and as reading does.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"of {world_size} ranks there is no rank {rank}")
    cells = list(_cells(places))
    for source in {id(cell.source): cell.source for cell in cells}.values():
        if not source.keeps:
            raise ValueError("nothing would keep what is read: prefetch is of files, and of URLs with cache_dir=")
    share = _share(cells, rank, world_size)
    if bar is not None:
        bar.total = sum(cell.nbytes for cell in share)
    by_source: dict[int, list[_Cell]] = {}
    for cell in share:
        by_source.setdefault(id(cell.source), []).append(cell)
    for each in by_source.values():
        _read(each[0].source, [extent for cell in each for extent in cell.wanted], threads or default_threads(), bar)
    return sum(cell.nbytes for cell in share)


def _cells(places: Places) -> Iterator[_Cell]:
    """All that has bytes of the tensors, file by file, in the order of their bytes."""
    for table, positions in places:
        archive = table.archive
        found: dict[int, list[tuple[int, int]]] = {}
        for offset, nbytes in _merged(archive._extents(_wanted(table, positions))):
            for start in range(offset - offset % CELL, offset + nbytes, CELL):
                first, last = max(start, offset), min(start + CELL, offset + nbytes)
                found.setdefault(start // CELL, []).append((first, last - first))
        for number in sorted(found):
            yield _Cell(archive.source, number, found[number])


def _wanted(table: TensorTable, positions: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(record, start, nbytes) of what is read of each row and storage; all of a record that is compressed."""
    numbers, storages = below(table, positions, {})
    rows = [table.row(number) for number in numbers]
    wanted = [(row.storage, row.storage_offset * row.itemsize, row.extent * row.itemsize) for row in rows]
    wanted += [(storage, 0, table.storage_nbytes(storage)) for storage in storages]
    for storage, start, nbytes in wanted:
        record = table.record_number(storage)
        if record >= 0 and nbytes:
            if table.archive.is_stored(record):
                yield record, start, nbytes
            else:
                yield record, 0, table.archive.field(record, Entry.STORED_NBYTES)


def _merged(extents: Iterator[tuple[int, int]]) -> list[tuple[int, int]]:
    """In file order, those that touch or overlap as one."""
    merged: list[list[int]] = []  # start, end
    for offset, nbytes in sorted(extents):
        if merged and offset <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], offset + nbytes)
        else:
            merged.append([offset, offset + nbytes])
    return [(start, end - start) for start, end in merged]


def _share(cells: Sequence[_Cell], rank: int, world_size: int) -> list[_Cell]:
    """Cells one after the other, as evenly as they can be given away whole: each to the rank that its middle falls to."""
    total, before, share = sum(cell.nbytes for cell in cells), 0, []
    for cell in cells:
        if (2 * before + cell.nbytes) * world_size // (2 * total) == rank:
            share.append(cell)
        before += cell.nbytes
    return share


def _read(source: ByteSource, extents: Sequence[tuple[int, int]], threads: int, bar: Any) -> None:
    def through(extent: tuple[int, int]) -> None:
        offset, nbytes = extent
        read_into(source, memoryview(bytearray(nbytes)), offset)
        if bar is not None:
            bar.update(nbytes)

    if source.ahead is not None:  # which has threads of its own
        with source.ahead(extents):
            for extent in extents:
                through(extent)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(through, extents))
