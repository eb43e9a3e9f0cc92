"""Difference: two checkpoints in, what differs out: names, shapes, dtypes, and values by their norms. Needs NumPy for these.

Side door. Both are read in step, a chunk at a time, so that neither need fit in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from .backend import Kind
from .state_dict import LazySlice, LazyStateDict
from .table import TensorInfo
from .values import doubles, once

__all__ = ["Change", "Difference", "differences"]


class Change(NamedTuple):
    """How the numbers of two tensors of one shape differ, as float64.

    Attributes:
        differing: how many elements are not the same. A NaN is the same as a NaN. Of dtypes that have no numbers (bits,
            packed float4) it is bytes that count.
        numel: of elements.
        largest: the largest absolute difference of two that are finite.
        norm: the root of the sum of squares of these differences; `relative`: that over the norm of the first tensor.
    """

    differing: int
    numel: int
    largest: float
    norm: float
    relative: float


class Difference(NamedTuple):
    """One name that is not the same in both.

    Attributes:
        name: of the tensor.
        kind: "removed", "added", "kind" (layout, or what a tensor consists of), "shape", "dtype" or "values".
        before, after: the facts in each file; None where it is not there.
        change: of values, where they were compared.
    """

    name: str
    kind: str
    before: TensorInfo | None
    after: TensorInfo | None
    change: Change | None = None


def differences(before: LazyStateDict, after: LazyStateDict, *, values: bool = True) -> Iterator[Difference]:
    """What differs between the tensors of two mappings, in the order of the first, then what only the second has.

    With values=False nothing is read. Raises: as reading does.
    """
    for name in before:
        one = before.get_meta(name)
        if one is None:
            continue
        other = after.get_meta(name) if name in after else None
        if other is None:
            yield Difference(name, "removed", one, None)
            continue
        kind = _kind(one, other)
        if kind in ("kind", "shape"):
            yield Difference(name, kind, one, other)
            continue
        change = _changed(before, after, name) if values else None
        if kind or (change is not None and change.differing):
            yield Difference(name, kind or "values", one, other, change)
    for name in after:
        one = after.get_meta(name)
        if one is not None and name not in before:
            yield Difference(name, "added", None, one)


def _kind(one: TensorInfo, other: TensorInfo) -> str:
    if one.layout != other.layout or list(one.parts) != list(other.parts):
        return "kind"
    if one.shape != other.shape or any(one.parts[name].shape != other.parts[name].shape for name in one.parts):
        return "shape"
    return "" if one.dtype_name == other.dtype_name else "dtype"


def _changed(before: LazyStateDict, after: LazyStateDict, name: Any) -> Change | None:
    """None for tensors without elements of their own."""
    info = before.get_meta(name)
    assert info is not None
    if info.location == "meta":
        return None
    if _is_bare(before, name) or _is_bare(after, name):
        return _sum([_of_bytes(before[name], after[name])])
    one, other = before.get_slice(name), after.get_slice(name)
    if info.parts:
        return _sum([_of_parts(one.part(part), other.part(part)) for part in info.parts])
    return _sum([_of_parts(one, other)])


def _is_bare(tensors: LazyStateDict, name: Any) -> bool:
    """Whether a name is that of a storage without a tensor."""
    position = tensors._slots[name]
    view, place = tensors._view.at(position) if position >= 0 else (None, 0)
    return view is not None and view.kinds[place] == Kind.STORAGE


_Sums = tuple[int, int, float, float, float]  # differing, count, largest, squares of differences, squares of the first


def _of_bytes(one: Any, other: Any) -> _Sums:
    """Of two bare storages; or of one, and a tensor of bytes."""
    left, right = (_bytes_of(each) for each in (one, other))
    wrong = sum(a != b for a, b in zip(left, right)) + abs(len(left) - len(right))
    return wrong, len(left), float(bool(wrong)), float(wrong), float(len(left))


def _bytes_of(value: Any) -> bytes:
    value = getattr(value, "_untyped_storage", value)
    return value.numpy().tobytes() if hasattr(value, "numpy") else bytes(value)


def _of_parts(one: LazySlice, other: LazySlice) -> _Sums:
    import numpy as np

    differing = count = 0
    largest = squares = whole = 0.0
    found = once(one.info, other.info)
    for index in found.indexes():
        left, right = doubles(one[index]), doubles(other[index])
        count += left.size
        finite = np.isfinite(left)
        whole += float((left[finite] ** 2).sum())
        wrong = (left != right) & ~(np.isnan(left) & np.isnan(right))
        if wrong.any():
            differing += int(wrong.sum())
            apart = np.abs(right[wrong & finite & np.isfinite(right)] - left[wrong & finite & np.isfinite(right)])
            largest = max(largest, float(apart.max(initial=0.0)))
            squares += float((apart**2).sum())
    times = found.times
    return times * differing, times * count, largest, times * squares, times * whole


def _sum(parts: list[_Sums]) -> Change:
    differing, count = sum(part[0] for part in parts), sum(part[1] for part in parts)
    largest = max((part[2] for part in parts), default=0.0)
    norm, whole = math.sqrt(sum(part[3] for part in parts)), math.sqrt(sum(part[4] for part in parts))
    relative = norm / whole if whole else math.inf if norm else 0.0
    return Change(differing, count, largest, norm, relative)
