"""Values: a tensor in, what its numbers are like out: extremes, moments, a histogram. A chunk at a time; needs NumPy.

Side door. Numbers are looked at as float64: exact for all dtypes but 64-bit integers beyond 2**53. A complex one is its
absolute value, a bool 0 or 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from .plan import blocks
from .state_dict import LazySlice

__all__ = ["Values", "doubles", "values_of"]

CHUNK_NBYTES = (
    1 << 20
)  # of the file: some ten times that with what is computed; smaller ones make threads wait for each other
BINS = 32


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


def doubles(made: Any) -> Any:
    """A tensor or an array as a flat array of float64."""
    import numpy as np

    if hasattr(made, "untyped_storage"):
        import torch

        made = made.detach()
        made = made.to(torch.complex128).abs() if made.is_complex() else made.to(torch.float64)
        made = made.numpy()
    elif made.dtype.kind == "c":
        made = np.abs(made.astype(np.complex128))
    return made.astype(np.float64, copy=False).ravel()


def _chunks(part: LazySlice) -> Iterator[Any]:
    for block in blocks(part.shape, part.info.itemsize, CHUNK_NBYTES):
        yield doubles(part[block])


def values_of(part: LazySlice) -> Values:
    """Read a tensor twice, a chunk at a time: once for its extremes and moments, and for the histogram between these.

    One that is a single chunk is read once. Several threads may do this at a time, for NumPy lets go of the interpreter.

    Raises: ImportError without NumPy; TypeError for a tensor that has no elements of its own, or several kinds: take its
        parts. And as reading does.
    """
    import numpy as np

    count = nans = infinities = zeros = good = chunks = 0
    least, most, mean, spread, squares = math.inf, -math.inf, 0.0, 0.0, 0.0
    chunk: Any = None
    with np.errstate(over="ignore", invalid="ignore"):
        for chunk in _chunks(part):
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
            for each in [chunk] if chunks == 1 else _chunks(part):
                finite = each[np.isfinite(each)] if nans or infinities else each
                bins += np.bincount(_bin_of(finite, least, width), minlength=BINS)
    if not good:
        least = most = mean = deviation = math.nan
    else:
        deviation = math.sqrt(spread / good)
    found = tuple(int(n) for n in bins) if width > 0 else ()
    return Values(count, nans, infinities, zeros, least, most, mean, deviation, math.sqrt(squares), found)


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
