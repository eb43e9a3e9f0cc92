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

CHUNK_NBYTES = 4 << 20  # of the file; as float64 and with what is computed they are some ten times that
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
            the same.
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


def _finite(part: LazySlice) -> Iterator[tuple[Any, Any]]:
    """(all, the finite ones) of each chunk."""
    import numpy as np

    for block in blocks(part.shape, part.info.itemsize, CHUNK_NBYTES):
        flat = doubles(part[block])
        finite = np.isfinite(flat)
        yield flat, flat if finite.all() else flat[finite]


def values_of(part: LazySlice) -> Values:
    """Read a tensor twice, a chunk at a time: once for its extremes and moments, and for the histogram between these.

    Raises: ImportError without NumPy; TypeError for a tensor that has no elements of its own, or several kinds: take its
        parts. And as reading does.
    """
    import numpy as np

    count = nans = infinities = zeros = good = 0
    least, most, mean, spread, squares = math.inf, -math.inf, 0.0, 0.0, 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for flat, finite in _finite(part):
            count += flat.size
            nans += int(np.isnan(flat).sum())
            infinities += int(np.isinf(flat).sum())
            zeros += int((flat == 0).sum())
            if not finite.size:
                continue
            least, most = min(least, float(finite.min())), max(most, float(finite.max()))
            # Chan, Golub and LeVeque 1979: the moments of two sets together, out of those of each.
            own_mean = float(finite.mean())
            own_spread = float(((finite - own_mean) ** 2).sum())
            both, delta = good + finite.size, own_mean - mean
            mean += delta * finite.size / both
            spread += own_spread + delta * delta * good * finite.size / both
            squares += float((finite * finite).sum())
            good = both
        bins = np.zeros(BINS, np.int64)
        if most > least:
            for _, finite in _finite(part):
                bins += np.histogram(finite, BINS, (least, most))[0]
    if not good:
        least = most = mean = deviation = math.nan
    else:
        deviation = math.sqrt(spread / good)
    found = tuple(int(n) for n in bins) if most > least else ()
    return Values(count, nans, infinities, zeros, least, most, mean, deviation, math.sqrt(squares), found)
