"""Values: a tensor in, what its numbers are like out: extremes, moments, a histogram. A chunk at a time; needs NumPy.

Side door. Numbers are looked at as float64: exact for all dtypes but 64-bit integers beyond 2**53. A complex one is its
absolute value, a bool 0 or 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from .errors import UnsupportedError
from .plan import blocks
from .state_dict import LazySlice, LazyStateDict
from .table import TensorInfo

__all__ = ["Once", "Values", "doubles", "has_numbers", "once", "slice_of", "values_of"]

# Of the file: some ten times that with what is computed. Smaller ones make threads wait for each other.
CHUNK_NBYTES = 1 << 20
BINS = 32
FEW_NBYTES = 1 << 30  # that are read whatever they overlap, and else:
MOST_OVERLAPS = 64  # of each byte in the file: windows that slide over a signal


class Values(NamedTuple):
    """The numbers of a tensor.

    Attributes:
        numel: of elements.
        nans, infinities, zeros: how many of them are such.
        least, most, mean, deviation: of those that are finite; NaN where none is. The deviation is that of all of them,
            not of a sample.
        norm: the root of the sum of squares of the finite ones.
        bins: how many of the finite ones lie in each of 32 equal parts from the least to the most; empty where these are
            the same, or next to it.
    """

    numel: int
    nans: int
    infinities: int
    zeros: int
    least: float
    most: float
    mean: float
    deviation: float
    norm: float
    bins: tuple[int, ...]


def has_numbers(dtype_name: str) -> bool:
    """Whether the elements of a dtype are numbers, which bits and packed pairs of float4 are not."""
    return not dtype_name.startswith(("bits", "float4"))


def doubles(made: Any) -> Any:
    """A tensor or an array as a flat array of float64; the bytes of one that has no numbers."""
    import numpy as np

    if hasattr(made, "untyped_storage"):
        import torch

        made = made.detach()
        if not has_numbers(str(made.dtype).removeprefix("torch.")):
            made = made.contiguous().view(torch.uint8)
        made = made.to(torch.complex128).abs() if made.is_complex() else made.to(torch.float64)
        made = made.numpy()
    elif made.dtype.names is not None:  # complex numbers that NumPy has none of
        made = np.hypot(*(made[part].astype(np.float64) for part in made.dtype.names))
    elif made.dtype.kind == "c":
        made = np.abs(made.astype(np.complex128))
    return made.astype(np.float64, copy=False).ravel()


def slice_of(tensors: LazyStateDict, name: str, info: TensorInfo) -> LazySlice | None:
    """What numbers can be looked at of, itself or by its parts; None for a tensor that has none, or no tensor's storage."""
    if info.location == "meta" or not has_numbers(info.dtype_name):
        return None
    try:
        return tensors.get_slice(name)
    except TypeError:
        return None


class Once(NamedTuple):
    """What there is to read of one tensor, or of two of one shape: nothing twice that a stride of 0 repeats.

    Attributes:
        shape: 1 where it repeats.
        times: how often all of it is there.
        itemsize: of the wider one.
    """

    shape: tuple[int, ...]
    times: int
    itemsize: int

    def indexes(self) -> Iterator[tuple[Any, ...]]:
        """Of chunks."""
        for block in blocks(self.shape, self.itemsize, CHUNK_NBYTES):
            yield *block, *(slice(0, n) for n in self.shape[len(block) :])


def once(*infos: TensorInfo) -> Once:
    """A few bytes can stand for terabytes: those of a stride of 0 are read once.

    Raises: UnsupportedError for elements that overlap by other strides, so many times that it can only be meant.
    """
    shape, times = [], 1
    for dim, n in enumerate(infos[0].shape):
        repeats = n > 1 and all(dim < len(info.strides) and not info.strides[dim] for info in infos)
        shape.append(1 if repeats else n)
        times *= n if repeats else 1
    itemsize = max(info.itemsize for info in infos)
    nbytes, stored = math.prod(shape) * itemsize, sum(info.storage_nbytes for info in infos)
    if nbytes > max(FEW_NBYTES, MOST_OVERLAPS * stored):
        raise UnsupportedError(f"{nbytes} bytes would be read of a tensor that repeats {stored} bytes over and over")
    return Once(tuple(shape), times, itemsize)


def values_of(part: LazySlice) -> Values:
    """Read a tensor twice, a chunk at a time: once for its extremes and moments, and for the histogram between these.

    One that is a single chunk is read once. Several threads may do this at a time, for NumPy lets go of the interpreter.

    Raises: ImportError without NumPy; TypeError for a tensor that has no elements of its own, or several kinds (take its
        parts), or whose elements are no numbers; UnsupportedError for one that repeats a few bytes over and over, other
        than by a stride of 0. And as reading does.
    """
    import numpy as np

    info = part.info
    if not has_numbers(info.dtype_name):
        raise TypeError(f"elements of {info.dtype_name} are no numbers")
    found = once(info)
    count = nans = infinities = zeros = good = chunks = 0
    least, most, mean, spread, squares = math.inf, -math.inf, 0.0, 0.0, 0.0
    chunk: Any = None
    with np.errstate(over="ignore", invalid="ignore"):
        for chunk in map(doubles, map(part.read, found.indexes())):
            chunks += 1
            count += chunk.size
            zeros += chunk.size - int(np.count_nonzero(chunk))
            lowest, highest = float(chunk.min()), float(chunk.max())
            finite = chunk
            if not (math.isfinite(lowest) and math.isfinite(highest)):  # a NaN among them makes both NaN
                nans += int(np.isnan(chunk).sum())
                infinities += int(np.isinf(chunk).sum())
                finite = chunk[np.isfinite(chunk)]
                if not finite.size:
                    continue
                lowest, highest = float(finite.min()), float(finite.max())
            least, most = min(least, lowest), max(most, highest)
            # Chan, Golub and LeVeque 1979: the moments of two sets together, out of those of each.
            own_mean = float(finite.mean())
            centred = finite - own_mean
            both, delta = good + finite.size, own_mean - mean
            mean += delta * finite.size / both
            spread += _squares(centred) + delta * delta * good * finite.size / both
            squares += _squares(finite)
            good = both
        bins = np.zeros(BINS, np.int64)
        width = most / BINS - least / BINS if good else 0.0  # their difference itself may be no float64
        if width > 0:
            for each in [chunk] if chunks == 1 else map(doubles, map(part.read, found.indexes())):
                finite = each[np.isfinite(each)] if nans or infinities else each
                bins += np.bincount(_bin_of(finite, least, width), minlength=BINS)
    if not good:
        least = most = mean = deviation = math.nan
    else:
        deviation = math.sqrt(spread / good)
    times = found.times
    count, nans, infinities, zeros = (times * n for n in (count, nans, infinities, zeros))
    shown = tuple(times * int(n) for n in bins) if width > 0 else ()
    return Values(count, nans, infinities, zeros, least, most, mean, deviation, math.sqrt(squares * times), shown)


def _squares(flat: Any) -> float:
    """Their sum; numpy.dot would wake a thread for each core, which then spin."""
    import numpy as np

    return float(np.einsum("i,i->", flat, flat))


def _bin_of(finite: Any, least: float, width: float) -> Any:
    """The bin of each; a fourth of the time of numpy.histogram, whose bins may be any."""
    import numpy as np

    shifted = finite - least
    if not math.isfinite(float(shifted.max(initial=0.0))):
        shifted, width = finite / 2 - least / 2, width / 2
    shifted /= width
    return np.minimum(shifted.astype(np.int32), BINS - 1)  # to int64 takes fifty times as long where AVX-512 is missing
