"""Plan: rows or slices wanted in, byte ranges to read out. Pure arithmetic: no I/O, no torch.

A geometry is (storage_offset, sizes, strides), in elements, as torch has it; strides out of a file are never negative.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

__all__ = [
    "Geometry",
    "Piece",
    "Sliced",
    "blocks",
    "hull",
    "index",
    "is_contiguous",
    "may_overlap",
    "numel",
    "pieces",
    "row_major",
]

LONG_RUN = 512  # bytes; shorter runs are cheaper read with what lies between them than named one by one
FAR_APART = 16384  # bytes between runs from which on skipping is cheaper than reading through, whatever the run
SLAB = 8 << 20  # bytes; what is read through at once
MAX_RUNS = 1 << 16  # of one read; bounds the lists that name them


class Geometry(NamedTuple):
    """Where the elements of a tensor lie in its storage."""

    storage_offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


class Sliced(NamedTuple):
    """A basic index applied to a geometry, before `flips`: the dimensions of the result that run backwards."""

    geometry: Geometry
    flips: tuple[int, ...]


class Piece(NamedTuple):
    """A part of a slice that is read in one go.

    part: which part of the result it fills: (dimension, start, length) cuts to narrow it by, one after the other.
    geometry: where that part lies in the storage.
    run_numel: elements of each contiguous run, which are read one by one in the result's own order; 0 where the hull of
        the geometry is to be read through.
    outer: (size, stride) of the dimensions around a run, outermost first; the first run begins at the storage_offset.
    """

    part: tuple[tuple[int, int, int], ...]
    geometry: Geometry
    run_numel: int
    outer: list[tuple[int, int]]

    @property
    def starts(self) -> list[int]:
        """The storage_offset of each run."""
        starts = [self.geometry.storage_offset]
        for n, stride in self.outer:
            starts = [start + i * stride for start in starts for i in range(n)]
        return starts


def numel(sizes: Sequence[int]) -> int:
    count = 1
    for n in sizes:
        count *= n
    return count


def row_major(sizes: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    strides, step = [], 1
    for n in reversed(sizes):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))


def hull(geometry: Geometry) -> int:
    """How many elements lie between the first and the last one, both included; 0 for an empty tensor."""
    last = 0
    for n, stride in zip(geometry.sizes, geometry.strides):
        if n == 0:
            return 0
        last += (n - 1) * stride
    return last + 1


def is_contiguous(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements lie one after the other in row-major order, as torch decides it."""
    if 0 in sizes:
        return True
    expected = 1
    for n, stride in zip(reversed(sizes), reversed(strides)):
        if n != 1:
            if stride != expected:
                return False
            expected *= n
    return True


def may_overlap(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether two indices may name one element. False is proved; a few tensors that do not overlap are True."""
    reach = 0
    for stride, n in sorted((stride, n) for n, stride in zip(sizes, strides) if n != 1):
        if n and stride <= reach:
            return True
        reach += (n - 1) * stride
    return False


def index(geometry: Geometry, wanted: Any) -> Sliced:
    """NumPy's basic indexing: integers, slices of any step, ..., None, and tuples of these.

    Raises:
        IndexError: an integer out of range, or more indices than dimensions.
        TypeError: an index that is not basic (a list, an array, a boolean).
        ValueError: a slice of step 0.
    """
    items = list(wanted) if isinstance(wanted, tuple) else [wanted]
    ellipses = [i for i, item in enumerate(items) if item is Ellipsis]
    if len(ellipses) > 1:
        raise IndexError("an index can have only one ellipsis ('...')")
    ndim = len(geometry.sizes)
    used = sum(1 for item in items if item is not None and item is not Ellipsis)
    if used > ndim:
        raise IndexError(f"too many indices: the tensor has {ndim} dimensions, the index {used}")
    fill = [slice(None)] * (ndim - used)
    if ellipses:
        items[ellipses[0] : ellipses[0] + 1] = fill
    else:
        items += fill
    offset = geometry.storage_offset
    sizes: list[int] = []
    strides: list[int] = []
    flips: list[int] = []
    dim = 0
    for item in items:
        if item is None:
            sizes.append(1)
            strides.append(0)
            continue
        n, stride = geometry.sizes[dim], geometry.strides[dim]
        if isinstance(item, slice):
            steps = range(*item.indices(n))
            if steps.step < 0:
                flips.append(len(sizes))
                steps = steps[::-1]
            if len(steps):
                offset += steps[0] * stride
            sizes.append(len(steps))
            strides.append(stride * steps.step if len(steps) > 1 else stride)
        else:
            offset += _integer(item, n, dim) * stride
        dim += 1
    return Sliced(Geometry(offset, tuple(sizes), tuple(strides)), tuple(flips))


def _integer(item: Any, n: int, dim: int) -> int:
    try:
        place = operator.index(item) if not isinstance(item, bool) else None
    except TypeError:  # an array has __index__ too, and it fails
        place = None
    if place is None:
        raise TypeError(
            f"a slice is read by basic indexing: integers, slices, ... and None, not {type(item).__name__}; "
            "read the tensor and index that"
        )
    if not -n <= place < n:
        raise IndexError(f"index {place} is out of bounds for dimension {dim} with size {n}")
    return place + n if place < 0 else place


def blocks(shape: Sequence[int], itemsize: int, nbytes: int) -> Iterator[tuple[Any, ...]]:
    """Indexes that cut a tensor, in row-major order, into parts of `nbytes` at most; an element is never cut."""
    if not numel(shape):
        return
    inner, dims = itemsize, len(shape)  # bytes below the dimensions that are cut
    while dims and inner * shape[dims - 1] <= nbytes:
        dims -= 1
        inner *= shape[dims]
    if not dims:
        yield ()
        return
    step = max(1, nbytes // inner)
    for outer in itertools.product(*map(range, shape[: dims - 1])):
        for start in range(0, shape[dims - 1], step):
            yield (*outer, slice(start, start + step))


def pieces(geometry: Geometry, itemsize: int) -> Iterator[Piece]:
    """How to read a slice, in pieces of bounded size.

    A dense one is a single piece. Otherwise its contiguous runs are named one by one where they are long or far apart;
    where they are short and near, the stretch they lie in is read through, a slab at a time.
    """
    yield from _pieces((), geometry, itemsize)


def _pieces(part: tuple[tuple[int, int, int], ...], geometry: Geometry, itemsize: int) -> Iterator[Piece]:
    asked = numel([n for n, stride in zip(geometry.sizes, geometry.strides) if stride]) * itemsize
    through = hull(geometry) * itemsize
    if through <= asked + asked // 20 + 4096:
        yield Piece(part, geometry, 0, [])
        return
    run_numel, outer = _runs(geometry)
    run_nbytes = run_numel * itemsize
    count = numel([n for n, _ in outer])
    nearest = min((stride for n, stride in outer if n > 1 and stride), default=0) * itemsize
    if run_nbytes >= LONG_RUN or nearest - run_nbytes >= FAR_APART:
        if count <= MAX_RUNS:
            yield Piece(part, geometry, run_numel, outer)
            return
    elif through <= SLAB:
        yield Piece(part, geometry, 0, [])
        return
    # Too much at once: cut the dimension that spans most, which leaves the cuts in file order.
    dim = max(range(len(geometry.sizes)), key=lambda d: (geometry.sizes[d] > 1, geometry.strides[d]))
    n, stride = geometry.sizes[dim], geometry.strides[dim]
    step = max(1, min(n // 2, SLAB // max(1, stride * itemsize)))
    for start in range(0, n, step):
        length = min(step, n - start)
        sizes = (*geometry.sizes[:dim], length, *geometry.sizes[dim + 1 :])
        cut = Geometry(geometry.storage_offset + start * stride, sizes, geometry.strides)
        yield from _pieces((*part, (dim, start, length)), cut, itemsize)


def _runs(geometry: Geometry) -> tuple[int, list[tuple[int, int]]]:
    """The longest run of elements that is contiguous in the result's own order, and the (size, stride) around it."""
    run = 1
    dims = list(zip(geometry.sizes, geometry.strides))
    while dims and (dims[-1][1] == run or dims[-1][0] == 1):
        run *= dims.pop()[0]
    return run, dims
