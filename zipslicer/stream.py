"""Stream: tensors in file order out, read ahead of whoever takes them, within a budget of memory.

One thread reads, group after group, for as long as what was read and not yet taken fits the budget; a large read has
threads of its own below that. What was taken is the caller's, and is not counted.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

from .backend import Allocate
from .errors import ZipSlicerError
from .plan import index, numel
from .staging import LANE_FROM
from .table import Leaf

__all__ = ["BUDGET_NBYTES", "WHOLE", "Wanted", "bar_of", "nbytes_of", "stream"]

BUDGET_NBYTES = 256 << 20
# Small neighbours are read in one call. Of a group all is read before the first of it can be taken.
GROUP_NBYTES = 16 << 20
GROUP_COUNT = 256
# From here on memory is given back to the system when its tensor is dropped; what is smaller malloc keeps by itself.
RECYCLED_FROM = 2 << 20
WHOLE = object()  # in place of an index
PULSE = 0.5  # seconds after which a waiting thread looks whether the other one is still there


class Wanted(NamedTuple):
    """A tensor to be read.

    nbytes: of memory that it will take.
    view: the file that it is in; None for a `value` that is there already.
    index: of a slice, or WHOLE.
    device: to where it is moved; None leaves it where map_location has put it.
    """

    key: Any
    nbytes: int
    view: Any
    position: int
    leaf: Leaf | None
    index: Any = WHOLE
    value: Any = None
    device: Any = None


def nbytes_of(view: Any, leaf: Leaf | None, wanted: Any = WHOLE) -> int:
    """What a tensor, or the slice of it, will take. Raises: IndexError, TypeError, ValueError for a bad index."""
    if leaf is None:
        return 0
    if leaf.composite is not None:
        return int(view.table.info(leaf).nbytes)
    row = view.table.row(leaf.number)
    if wanted is WHOLE:
        return int(row.extent * row.itemsize)
    sliced = index(view.table.geometry(row), wanted)
    return numel(sliced.geometry.sizes) * int(row.itemsize)


def stream(
    wanted: Sequence[Wanted], *, budget_nbytes: int, progress: bool = False
) -> Generator[tuple[Any, Any], None, None]:
    """(key, tensor) of each that is wanted, in this order; the generator stops the reading when it is closed.

    Raises: ImportError for a progress bar without tqdm. The generator: OSError and the errors of zipslicer.errors, with
    `.key`, after what stands before it has come.
    """
    bar = bar_of(progress, sum(each.nbytes for each in wanted))
    return _streamed(wanted, budget_nbytes, bar)


def bar_of(progress: bool, total: int = 0) -> contextlib.AbstractContextManager[Any]:
    """A bar of bytes, which opens when it is entered; or None in its place. Raises: ImportError."""
    if not progress:
        return contextlib.nullcontext()
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from error
    return _opened(tqdm, total)


@contextlib.contextmanager
def _opened(tqdm: Any, total: int) -> Iterator[Any]:
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024) as bar:
        yield bar


def _streamed(
    wanted: Sequence[Wanted], budget_nbytes: int, bar: contextlib.AbstractContextManager[Any]
) -> Generator[tuple[Any, Any], None, None]:
    ahead = _Ahead(wanted, budget_nbytes)
    with bar as shown:
        try:
            ahead.start()
            for _ in wanted:
                # Nothing here may hold what was taken: it would live on for as long as the next one is waited for.
                yield ahead.take(shown)
        finally:
            ahead.stop()


class _StoppedError(Exception):
    """Nobody wants the rest."""


class _Ahead:
    """The thread that reads, and what it has read."""

    def __init__(self, wanted: Sequence[Wanted], budget_nbytes: int) -> None:
        self._wanted = wanted
        self._budget = budget_nbytes
        self._recycler = _Recycler(budget_nbytes // 4)
        self._changed = threading.Condition()
        # key, value, bytes, and what the taker is to call with the value first
        self._ready: collections.deque[tuple[Any, Any, int, Callable[[Any], None] | None]] = collections.deque()
        self._held = 0  # bytes that are ready, or are being read
        self._error: BaseException | None = None
        self._is_done = self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name="zipslicer-stream", daemon=True)

    # ---------------------------------------------------------------- the taker's side
    def start(self) -> None:
        self._thread.start()

    def take(self, bar: Any = None) -> tuple[Any, Any]:
        with self._changed:
            while not self._ready:
                if self._error is not None:
                    raise self._error
                if self._is_done or (not self._changed.wait(PULSE) and not self._thread.is_alive()):
                    raise RuntimeError("the thread of this stream is gone: it was begun before a fork, in the parent")
            key, value, nbytes, wait = self._ready.popleft()
            self._held -= nbytes
            self._changed.notify_all()
        if wait is not None:
            wait(value)
        if bar is not None:
            bar.update(nbytes)
        return key, value

    def stop(self) -> None:
        """Let the thread end after what it is reading now, which is one portion at most, and wait for that."""
        with self._changed:
            self._is_stopped = True
            self._ready.clear()
            self._changed.notify_all()
        if self._thread.ident is not None and self._thread.is_alive():
            self._thread.join()
        self._recycler.close()

    # ---------------------------------------------------------------- the reader's side
    def _run(self) -> None:
        try:
            for group in _groups(self._wanted, min(GROUP_NBYTES, self._budget // 4)):
                self._await_room(sum(each.nbytes for each in group))
                self._read(group)
        except _StoppedError:
            pass
        except BaseException as error:  # handed to the taker
            self._error = error
        with self._changed:
            self._is_done = True
            self._changed.notify_all()

    def _await_room(self, nbytes: int) -> None:
        """What is larger than the budget waits until nothing else is held, and goes alone."""
        with self._changed:
            while self._held and self._held + nbytes > self._budget and not self._is_stopped:
                self._changed.wait()
            if self._is_stopped:
                raise _StoppedError
            self._held += nbytes
            self._recycler.shrink(self._budget - self._held)

    def _pause(self) -> None:
        if self._is_stopped:
            raise _StoppedError

    def _read(self, group: Sequence[Wanted]) -> None:
        """All of a group in one call, where that is possible; else one by one."""
        try:
            made = self._together(group)
        except ZipSlicerError:
            made = None  # one by one, which tells the key, and hands out what comes before it
        for i, each in enumerate(group):
            self._pause()
            self._give(each, self._one(each) if made is None else made[i])
            if made is not None:
                made[i] = None

    def _together(self, group: Sequence[Wanted]) -> list[Any] | None:
        first = group[0]
        if any(each.nbytes >= LANE_FROM for each in group) and self._lane(first) is not None:
            return None
        if any(each.view is not first.view or each.leaf is None or each.index is not WHOLE for each in group):
            return None
        reader = first.view.reader
        leaves = [each.leaf for each in group if each.leaf is not None]
        if not all(map(reader.is_plain_row, leaves)):
            return None
        made: list[Any] = reader.each(leaves, self._pause, self._recycler.allocate_by(reader.allocate))
        return made

    def _one(self, each: Wanted) -> Any:
        if each.view is None:
            return each.value if each.index is WHOLE else each.value[each.index]
        if each.index is WHOLE:
            view = each.view if self._lane(each) is None else each.view.on(each.device)
            return view.touch(each.position, each.key)
        try:
            return each.view.reader.slice(each.leaf, each.index)
        except ZipSlicerError as error:
            raise error.located(path=each.view.path, key=each.key) from None

    def _lane(self, each: Wanted) -> Any:
        return None if each.device is None or each.view is None else each.view.reader.lane_to(each.device)

    def _give(self, each: Wanted, value: Any) -> None:
        if each.device is not None:
            value = value.to(each.device)
        lane = self._lane(each)
        wait = None if lane is None else lane.handover()
        with self._changed:
            self._ready.append((each.key, value, each.nbytes, wait))
            self._changed.notify_all()


class _Recycler:
    """Memory whose tensors the taker has dropped, for the tensors that come next: its pages need no clearing again.

    What the system does for a fresh page costs as much as reading it. A tensor's memory comes back when nothing is left
    that shows it: tensor, view, array or memoryview. Each holds the ctypes array from which its buffer was taken, and that
    one is what a weak reference waits for.
    """

    def __init__(self, most: int) -> None:
        self._most = most  # bytes that may wait for a use
        # Weak references call back on any thread at any moment, within a lock of this very thread too. So there is no
        # lock: a dict takes and gives an item in one step.
        self._lent: dict[int, tuple[weakref.ref[Any], memoryview]] = {}  # by the id of the reference
        self._kept: dict[int, memoryview] = {}  # by its id
        self._is_closed = False

    def allocate_by(self, allocate: Allocate) -> Allocate:
        return lambda nbytes: allocate(nbytes) if nbytes < RECYCLED_FROM else self._lend(nbytes, allocate)

    def _lend(self, nbytes: int, allocate: Allocate) -> memoryview:
        memory = self._taken(nbytes) or memoryview(allocate(nbytes)).cast("B")
        lent = (ctypes.c_char * memory.nbytes).from_buffer(memory)
        weak = weakref.ref(lent, self._back)
        self._lent[id(weak)] = weak, memory
        return memoryview(lent).cast("B")[:nbytes]

    def _taken(self, nbytes: int) -> memoryview | None:
        """Of what is kept a piece of this size, or of little more."""
        fits = [
            (memory.nbytes, key)
            for key, memory in list(self._kept.items())
            if 0 <= memory.nbytes - nbytes <= nbytes // 20
        ]
        return self._kept.pop(min(fits)[1], None) if fits else None

    def _back(self, lent: weakref.ref[Any]) -> None:
        _, memory = self._lent.pop(id(lent), (None, None))
        if memory is not None and not self._is_closed and self._nbytes() + memory.nbytes <= self._most:
            self._kept[id(memory)] = memory

    def _nbytes(self) -> int:
        return sum(memory.nbytes for memory in list(self._kept.values()))

    def shrink(self, most: int) -> None:
        """Give memory back until no more than so many bytes wait for a use."""
        while self._kept and self._nbytes() > most:
            with contextlib.suppress(KeyError):
                self._kept.popitem()

    def close(self) -> None:
        self._is_closed = True
        self._lent.clear()
        self._kept.clear()


def _groups(wanted: Sequence[Wanted], most: int) -> Iterator[list[Wanted]]:
    """Neighbours in one file, as many as are small together."""
    group: list[Wanted] = []
    nbytes = 0
    for each in wanted:
        alike = group and each.view is group[0].view and each.device == group[0].device
        fits = alike and each.index is WHOLE and group[0].index is WHOLE
        if group and not (fits and nbytes + each.nbytes <= most and len(group) < GROUP_COUNT):
            yield group
            group, nbytes = [], 0
        group.append(each)
        nbytes += each.nbytes
    if group:
        yield group
