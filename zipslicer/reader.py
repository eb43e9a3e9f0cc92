"""Reader: rows in, bytes in memory out: what the makers of torch's tensors and of NumPy's arrays have in common.

How things are to be read, by how many threads, in which order, into what memory; and the values of a file that hold tensors,
put together out of tensors that were all read at once. Imports neither.
"""

from __future__ import annotations

import abc
import collections
import ctypes
import dataclasses
import functools
import math
import operator
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from .arrays import floating_dtype
from .backend import (
    DIRECT_FROM,
    DIRECT_NBYTES,
    FIRST_NODE_KIND,
    JOB_FIELDS,
    Allocate,
    Hot,
    Job,
    Kind,
    Maker,
)
from .composites import Dense, Member, find
from .errors import TableError, ZipSlicerError
from .plan import Geometry, Piece, hull, numel, pieces
from .policy import COMPOSITES, Meaning, floating_index
from .program import ARGS, Builder
from .source import OpenFile
from .table import Leaf, Row, TensorTable

__all__ = ["SMALL_TO", "Pause", "ReadOptions", "RowReader", "below", "check_dtype", "cpu_quota", "default_threads"]

SMALL_TO = (2 << 20) - (2 << 20) // 21  # bytes; from here on a tensor is worth huge pages, which allocate() gives
ALIGNED = 16  # bytes, of which a mapped tensor's place must be a multiple: its largest element has so many
PORTION_NBYTES = 128 << 20  # after which a read that can be stopped looks whether it is to stop
LOCAL_THREADS = 8  # a warm copy is limited by memory bandwidth, which a few threads use up

Pause = Callable[[], None]


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """How tensors are to come out."""

    map_location: Any = "cpu"
    dtype: Any = None
    cache_tensors: bool = False
    threads: int | None = None
    framework: str = "pt"
    mmap: bool = False
    direct: bool = False
    storage_options: Mapping[str, Any] | None = dataclasses.field(default=None, repr=False)  # credentials, maybe
    cache_dir: Any = None

    def __post_init__(self) -> None:
        # What can be told without torch is told at once, not at the first touch.
        if self.threads is not None and operator.index(self.threads) < 1:
            raise ValueError(f"threads must be at least 1, not {self.threads}")
        if self.framework not in ("pt", "np"):
            raise ValueError(f'framework must be "pt" or "np", not {self.framework!r}')
        if self.mmap and self.direct:
            raise ValueError("mmap=True shows the page cache, direct=True reads past it: only one can be had")
        if self.framework == "np":
            self._check_for_arrays()
            return
        check_dtype(self.dtype)
        where = self.map_location
        known = where is None or isinstance(where, (str, int, dict)) or callable(where)
        if isinstance(where, bool) or not (known or type(where).__name__ == "device"):
            raise TypeError(f"map_location is a device, a dict, a callable or None, not {type(where).__name__}")
        if isinstance(where, str) and (torch := sys.modules.get("torch")) is not None:  # only torch knows its devices
            torch.device(where)

    def _check_for_arrays(self) -> None:
        where = self.map_location
        if not (where is None or (isinstance(where, str) and where == "cpu") or getattr(where, "type", None) == "cpu"):
            raise ValueError(f'arrays are on the CPU: map_location={where!r} needs framework="pt"')
        if self.dtype is not None:
            object.__setattr__(self, "dtype", floating_dtype(self.dtype))


def check_dtype(given: Any) -> None:
    """What is to be a floating-point dtype of torch, its name, or None. Raises: TypeError, ValueError."""
    if isinstance(given, str):
        floating_index(given)
    elif given is not None and not getattr(given, "is_floating_point", False):
        raise TypeError(f"dtype must be a floating-point torch.dtype, not {given!r}")


@functools.cache
def cpu_quota(root: str = "/") -> float:
    """CPUs' worth of time that the control groups of this process have (Linux); infinite without a limit.

    Of version 2 cpu.max counts, of version 1 cpu.cfs_quota_us; a limit of any group above holds as well.
    """
    most = math.inf
    try:
        with open(os.path.join(root, "proc/self/cgroup")) as file:
            lines = file.read().splitlines()
    except OSError:
        return most
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = os.path.join(root, "sys/fs/cgroup", "cpu" if controllers else "")
        parts = path.strip("/").split("/")
        # In a container the path may be that of the host, and only the root be there.
        for depth in range(len(parts) + 1):
            most = min(most, _quota_of(os.path.join(mount, *parts[:depth])))
    return most


def _quota_of(folder: str) -> float:
    try:
        if os.path.exists(os.path.join(folder, "cpu.max")):
            quota, period = _words(folder, "cpu.max")
        else:
            quota, period = *_words(folder, "cpu.cfs_quota_us"), *_words(folder, "cpu.cfs_period_us")
        return math.inf if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


def _words(folder: str, name: str) -> list[str]:
    with open(os.path.join(folder, name)) as file:
        return file.read().split()


def default_threads() -> int:
    """ZIPSLICER_THREADS, or the CPUs this process may use by its affinity and its control group, at most 8."""
    given = os.environ.get("ZIPSLICER_THREADS")
    if given:
        if not given.isdigit() or int(given) < 1:
            raise ValueError(f"ZIPSLICER_THREADS must be a number from 1 on, not {given!r}")
        return int(given)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(LOCAL_THREADS, cpus, math.ceil(min(cpu_quota(), LOCAL_THREADS))))


class RowReader(abc.ABC):
    """What readers of one table have in common, whatever they make of a row: bytes, units, and the order of reading.

    Those of arrays are in numpy_tensors.py. Safe for concurrent use.
    """

    def __init__(self, table: TensorTable, options: ReadOptions) -> None:
        self.table = table
        self._threads = options.threads
        self._archive = table.archive
        self.allocate: Allocate = table.archive.backend.allocate
        self._is_mapped, self._is_direct = options.mmap, options.direct
        # Small reads one by one, as files are read; a source that wants to be told of them first is.
        self._is_at_hand = not options.mmap and table.archive.source.ahead is None
        self._is_plain = False  # no device, no cast, no cache: bytes become tensors as they are
        self._hot: Hot
        # read_tensor, and what it is to be called with; None where not each tensor can be read so.
        self.fast: tuple[Callable[[Hot, int], Any], Hot] | None = None

    @property
    def threads(self) -> int:
        """For one large read."""
        if self._threads is None:
            self._threads = default_threads()
        return self._threads

    # ---------------------------------------------------------------- what each makes in its own way
    @abc.abstractmethod
    def tensor(self, number: int) -> Any:
        """A dense row as a tensor of its own, as options want it."""

    @abc.abstractmethod
    def leaf(self, leaf: Leaf, attributes: Any = None) -> Any:
        """A tensor with what is wrapped around it."""

    @abc.abstractmethod
    def composite(self, node: int, member: Callable[[Member], Any], argument: Callable[[int], Any]) -> Any:
        """A tensor of several parts; see composites.py."""

    @abc.abstractmethod
    def attributed(self, made: Any, state: Any) -> Any:
        """A tensor with the Python attributes that the file has for it."""

    @abc.abstractmethod
    def storage_value(self, storage: int, untyped: Any = None) -> Any:
        """A storage that stands as a value."""

    @abc.abstractmethod
    def slice(self, leaf: Leaf, wanted: Any) -> Any:
        """The elements of a basic index, in memory of their own. Reads these bytes, and little else."""

    @abc.abstractmethod
    def slice_member(self, each: Member, wanted: Any) -> Any:
        """The same of a dense part of a composite."""

    @abc.abstractmethod
    def room(self, leaf: Leaf, out: Any, wanted: Any = ()) -> tuple[Row, Geometry, memoryview] | None:
        """The memory of `out`, if the bytes of a tensor, or of a basic index into it, can be read into it as they are.

        With the row, and where in its storage what is wanted lies. None where that takes another step.
        """

    @abc.abstractmethod
    def put(self, value: Any, out: Any) -> None:
        """Copy a value into what has its shape."""

    def fill(self, leaf: Leaf, out: Any, wanted: Any = ()) -> None:
        """Read a tensor, or a basic index into it, into `out`: straight into its memory where that can be."""
        found = self.room(leaf, out, wanted)
        if found is not None:
            row, geometry, memory = found
            record, itemsize = self.table.record(row.storage), row.itemsize
            if hull(geometry) * itemsize == len(memory):
                self.read_jobs([record, geometry.storage_offset * itemsize, len(memory), 0, 0], [memory])
                return
            piece, *others = pieces(geometry, itemsize)
            if piece.run_numel and not others:
                self._read_piece(row, piece, memory)
                return
        is_whole = isinstance(wanted, tuple) and not wanted
        self.put(self.leaf(leaf) if is_whole and leaf.composite is not None else self.slice(leaf, wanted), out)

    @abc.abstractmethod
    def shared(
        self, numbers: Sequence[int], storages: Sequence[int] = (), bar: Any = None
    ) -> tuple[dict[int, Any], dict[int, Any]]:
        """Rows by number and storages, each storage read once and whole -> (tensors by row, storages by id).

        As torch.load does it: all tensors of one storage key are views of one storage. `bar`: see View.materialized.
        """

    @abc.abstractmethod
    def special(self, meaning: int, name: str, args: Sequence[Any], state: Any) -> Any:
        """What a known global or call of torch or NumPy means; see program.Special."""

    @abc.abstractmethod
    def _tensor_slowly(self, number: int) -> Any: ...

    @abc.abstractmethod
    def _received(self, found: Any) -> Any:
        """What the backend's read_tensor returns, as a tensor; None stays None."""

    @abc.abstractmethod
    def _made(self, buffer: Any, row: Row) -> Any:
        """A tensor on a buffer that holds its extent alone. REQUIRES: _is_as_it_is."""

    @abc.abstractmethod
    def _view(self, storage: Any, row: Row, geometry: Geometry) -> Any:
        """A tensor on a storage that was read. The geometry is proved to lie in it."""

    # ---------------------------------------------------------------- what is the same
    def _storages_of(self, numbers: Iterable[int]) -> Iterator[int]:
        return (self.table.row(number).storage for number in numbers)

    def _hot_with(self, maker: Maker | None, is_off: Callable[[], bool]) -> Hot:
        """All that a small read needs."""
        archive, program = self._archive, self.table.program
        return Hot(
            archive.source,
            archive.block,
            archive.entries,
            program.kinds,
            program.payloads,
            program.tensors,
            program.dims,
            self.table.direct,
            SMALL_TO,
            maker,
            is_off,
        )

    def _tensor_otherwise(self, number: int) -> Any:
        """A first touch, which finds the records of all storages; or a row that is not for the hot path."""
        table, row = self.table, self.table.row(number)
        storage = row.storage
        found_now = self._is_plain and self._is_at_hand and table.direct[storage] < 0 and row.extent > 0
        if found_now and table.record(storage) == table.direct[storage] and not row.flags:
            return self.tensor(number) if row.extent * row.itemsize < SMALL_TO else self._tensor_slowly(number)
        return self._tensor_slowly(number)

    def _argument(self, position: int) -> Any:
        """An argument that is no tensor: a number, a list, a NumPy array."""
        return self.table.program.build(position, self._no_leaf, self.special)

    def _no_leaf(self, _kind: int, _payload: int) -> Any:
        raise TableError("a tensor stands where a number is meant")

    def _is_as_it_is(self, row: Row) -> bool:
        """Whether bytes of a row become a tensor without a further step, but for requires_grad."""
        return self._is_plain and not (self.table.swapped or row.conj or row.neg)

    def is_plain_row(self, leaf: Leaf) -> bool:
        """Whether a tensor is one row and its bytes as they are, as `each` wants it."""
        if leaf.composite is not None or leaf.parameter or leaf.attributes is not None:
            return False
        row = self.table.row(leaf.number)
        return row.extent > 0 and self._is_as_it_is(row)

    def each(self, leaves: Sequence[Leaf], pause: Pause, allocate: Allocate | None = None) -> list[Any]:
        """Tensors as touching one after the other gives them, each in memory of its own, in one read.

        Not under inference_mode. `pause` is called between portions, and may raise. `allocate`: what large ones get
        their memory from, instead of the backend's. REQUIRES: is_plain_row of all.
        """
        numbers = [leaf.number for leaf in leaves]
        made = self._read_small(numbers, whole=False)
        pause()
        left = [i for i, each in enumerate(made) if each is None]
        rows = [self.table.row(numbers[i]) for i in left]
        wanted = ((row.storage, row.storage_offset * row.itemsize, row.extent * row.itemsize) for row in rows)
        for i, buffer, row in zip(left, self._buffers(wanted, pause, allocate=allocate), rows):
            made[i] = self._made(buffer, row)
        return made

    def _read_small(self, numbers: list[int], *, whole: bool) -> list[Any]:
        """Small tensors by the numbers of their rows, made and read in one call; None for each that is no such one.

        `whole`: only those that have a storage to themselves. REQUIRES: _is_plain.
        """
        archive = self._archive
        if not self._is_at_hand:
            return [None] * len(numbers)
        self.table.find_records()
        try:
            return [
                self._received(each) for each in archive.backend.read_tensors(self._hot, numbers, whole, self.threads)
            ]
        except ZipSlicerError as error:
            records = (self.table.direct[storage] for storage in self._storages_of(numbers))
            raise archive.located(error, (record for record in records if record >= 0)) from None

    def _buffers(
        self,
        wanted: Iterable[tuple[int, int, int]],
        pause: Pause | None = None,
        bar: Any = None,
        allocate: Allocate | None = None,
    ) -> list[Any]:
        """The bytes [start, start + nbytes) of storages, each in a new buffer, as they are in the file; None for no bytes."""
        table, archive = self.table, self._archive
        direct, allocate = table.direct, allocate or archive.backend.allocate
        jobs: list[int] = []
        buffers: list[Any] = []
        for storage, start, nbytes in wanted:
            record = direct[storage]
            if not nbytes:
                buffers.append(None)
                continue
            if record < 0:
                record = table.record(storage)
                if not archive.is_stored(record):
                    buffers.append(bytearray(archive.read(record)[start : start + nbytes]))
                    continue
            if self._is_mapped and (shown := self._shown(record, start, nbytes)) is not None:
                buffers.append(shown)
                continue
            jobs += (record, start, nbytes, len(buffers), 0)
            buffers.append(self._congruent(record, start, nbytes, allocate) if self._is_direct else allocate(nbytes))
        given = [b"" if buffer is None else buffer for buffer in buffers]
        self.read_jobs(jobs, given, pause, bar)
        return buffers

    def read_jobs(self, jobs: list[int], buffers: Sequence[Any], pause: Pause | None = None, bar: Any = None) -> None:
        """Rows of backend.Job, on threads; by portions only for who watches, since with each a thread runs out of work."""
        for portion in [jobs] if pause is None and bar is None else _portions(jobs):
            if portion:
                self._archive.read_into(portion, buffers, self.threads)
            if pause is not None:
                pause()
            if bar is not None:
                bar.update(sum(portion[Job.NBYTES :: JOB_FIELDS]))

    def _is_as_in_file(self, storage: int) -> bool:
        """Whether the file is mapped, and shows a storage as it is."""
        return self._is_mapped and self.table.record(storage) == self.table.direct[storage]

    def _shown(self, record: int, start: int, nbytes: int) -> Any:
        """A part of a stored record in the mapped file; None where elements would not be aligned in memory."""
        offset = self._archive.extent(record)[0] + start
        source = self._archive.source
        assert isinstance(source, OpenFile)  # open() has refused any other
        return source.mapped()[offset : offset + nbytes] if offset % ALIGNED == 0 else None

    def _congruent(self, record: int, start: int, nbytes: int, allocate: Allocate) -> Any:
        """Memory that lies in its page as a part of a record in the file's, so that it can be read past the page cache."""
        if nbytes < DIRECT_FROM:
            return allocate(nbytes)
        # Proved first: a header that is read along would be in the way.
        offset = self._archive.extent(record)[0] + start
        view = memoryview(allocate(nbytes + 2 * DIRECT_NBYTES))
        first = (offset - ctypes.addressof(ctypes.c_char.from_buffer(view))) % DIRECT_NBYTES
        return view[first : first + nbytes]

    def _gather(self, row: Row, piece: Piece) -> Any:
        """The runs of a piece, one after the other, in a new buffer. REQUIRES: a stored record."""
        buffer = self._archive.backend.allocate(numel(piece.geometry.sizes) * row.itemsize)
        self._read_piece(row, piece, buffer)
        return buffer

    def _read_piece(self, row: Row, piece: Piece, buffer: Any) -> None:
        itemsize = row.itemsize
        self._archive.read_runs(
            self.table.record(row.storage),
            piece.geometry.storage_offset * itemsize,
            piece.run_numel * itemsize,
            [number for n, stride in piece.outer for number in (n, stride * itemsize)],
            buffer,
            self.threads,
        )

    def _units(self, rows: Iterable[Row]) -> tuple[dict[int, set[int]], set[int]]:
        """For each storage the units of the rows on it; and which have several.

        In a file of foreign byte order, one storage under two element sizes has no whole form that is right for both:
        such tensors are read one by one.
        """
        units: dict[int, set[int]] = collections.defaultdict(set)
        for row in rows:
            units[row.storage].add(self.table.unit(row.dtype))
        return units, {storage for storage, found in units.items() if len(found) > 1}

    def builder(
        self, positions: Sequence[int], instead: Mapping[int, Sequence[int]] | None = None, bar: Any = None
    ) -> Builder:
        """Builds these values as `materialize` returns them, out of tensors that are all read here, in parallel.

        `instead`: by node, the positions that are now below it in place of those in the file.
        """
        numbers, storages = below(self.table, positions, instead or {})
        done = 0
        if bar is not None:
            done = bar.n + sum(map(self.table.storage_nbytes, {*self._storages_of(numbers), *storages}))
            bar.total = done
        tensors, whole = self.shared(numbers, storages, bar)
        if bar is not None:
            bar.update(done - bar.n)  # what was not read in one go with the rest

        def leaf(kind: int, payload: int) -> Any:
            return tensors[payload] if kind == Kind.TENSOR else self.storage_value(payload, whole[payload])

        return _Builder(self, leaf, whole)


def _portions(jobs: Sequence[int]) -> Iterator[list[int]]:
    """Rows of backend.Job, in runs of which each reads at most PORTION_NBYTES; large ones are cut."""
    portion: list[int] = []
    nbytes = 0
    for at in range(0, len(jobs), JOB_FIELDS):
        record, start, left, buffer, place = jobs[at : at + JOB_FIELDS]
        while left:
            size = min(left, PORTION_NBYTES - nbytes)
            portion += (record, start, size, buffer, place)
            start, place, left, nbytes = start + size, place + size, left - size, nbytes + size
            if nbytes == PORTION_NBYTES:
                yield portion
                portion, nbytes = [], 0
    yield portion


class _Builder(Builder):
    """A Builder that knows the composites, whose parts are views of the storages that were read."""

    def __init__(self, reader: RowReader, leaf: Callable[[int, int], Any], whole: Mapping[int, Any]) -> None:
        super().__init__(reader.table.program, leaf, reader.special)
        self._reader = reader
        self._whole = whole

    def call(self, node: int) -> Any:
        program = self.program
        meaning = program.meaning(node)
        if not (meaning in COMPOSITES or meaning == Meaning.TYPED) or find(program, node) is None:
            return super().call(node)
        made = self._reader.composite(node, self._member, self.value)
        if meaning == Meaning.TYPED:
            first, _ = program.span(program.payloads[program.span(node)[0] + ARGS])
            made = self._reader.attributed(made, self.value(first + 3))
        return made

    def _member(self, each: Member) -> Any:
        if not isinstance(each, Dense):
            return self.value(each)
        row, geometry = self._reader.table.member(each)
        return self._reader._view(self._whole[row.storage], row, geometry)


def below(
    table: TensorTable, positions: Sequence[int], instead: Mapping[int, Sequence[int]]
) -> tuple[list[int], list[int]]:
    """The rows and storages that values reach."""
    program = table.program
    kinds, payloads = program.kinds, program.payloads
    if positions[:1] == [0] and not instead:  # the root: all of them
        return list(range(program.tensor_count)), [payloads[i] for i in _find(kinds, Kind.STORAGE)]
    numbers: list[int] = []
    storages: list[int] = []
    seen: set[int] = set()
    runs: list[Sequence[int]] = [positions]
    while runs:
        for position in runs.pop():
            kind, payload = kinds[position], payloads[position]
            if kind == Kind.TENSOR:
                numbers.append(payload)
            elif kind == Kind.STORAGE:
                storages.append(payload)
            elif kind >= FIRST_NODE_KIND and payload not in seen:
                seen.add(payload)
                runs.append(instead[payload] if payload in instead else range(*program.span(payload)))
    return numbers, storages


def _find(kinds: bytes, kind: int) -> list[int]:
    found, at = [], kinds.find(kind)
    while at >= 0:
        found.append(at)
        at = kinds.find(kind, at + 1)
    return found
