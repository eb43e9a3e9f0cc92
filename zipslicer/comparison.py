"""Comparison: everything in a file read with zipslicer, beside everything that torch.load gives, down to the last bit.

Side door; needs torch. What torch.load(weights_only=True) refuses is read here all the same, and compared with nothing:
no code of the file is run for the sake of a comparison.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import pickle  # for the name of its error only
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .checkpoint import Checkpoint
from .policy import Placeholder

__all__ = ["Compared", "compare"]

SHOWN = 200  # characters of a value in a message


@dataclasses.dataclass
class Compared:
    """What compare() has found.

    Attributes:
        tensors, nbytes: that were equal in both, and their bytes.
        values: others that were equal.
        difference: the first one, or None.
        refused: why torch.load did not read the file, or None: then nothing was compared.
    """

    tensors: int = 0
    nbytes: int = 0
    values: int = 0
    difference: str | None = None
    refused: str | None = None


class _DifferenceError(Exception):
    pass


def compare(checkpoint: Checkpoint) -> Compared:
    """The root of a file on disk with what torch.load gives for its path, which it maps where it can.

    Raises: ImportError without torch; ValueError for a checkpoint without a path.
    """
    import torch

    if checkpoint.path is None:
        raise ValueError("torch.load is asked for the file at a path, and this checkpoint has none")
    found = Compared()
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        try:
            eager = torch.load(checkpoint.path, mmap=True, **options)
        except RuntimeError:  # of files from before the ZIP format, which cannot be mapped
            eager = torch.load(checkpoint.path, **options)
    except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, AttributeError, EOFError, OSError) as error:
        found.refused = f"{type(error).__name__}: {str(error).splitlines()[0][:SHOWN] if str(error) else ''}"
        return found
    try:
        _Walk(torch, found).value("root", eager, checkpoint.root)
    except _DifferenceError as difference:
        found.difference = str(difference)
    return found


class _Walk:
    """Goes through both in step, without recursion: a file may nest as deep as Limits(depth=...) says."""

    def __init__(self, torch: Any, found: Compared) -> None:
        self._torch = torch
        self._found = found
        self._seen: set[int] = set()

    def value(self, where: str, eager: Any, lazy: Any) -> None:
        waiting: list[tuple[str, Any, Callable[[], Any]]] = [(where, eager, lambda: lazy)]
        while waiting:
            where, eager, get = waiting.pop()
            waiting += reversed(list(self._step(where, eager, get())))

    def _step(self, where: str, eager: Any, lazy: Any) -> Iterator[tuple[str, Any, Callable[[], Any]]]:
        """Compare one value -> what is in it."""
        if isinstance(eager, (Mapping, list, tuple)):
            if id(eager) in self._seen:
                return  # a container that is in several places, or in itself
            self._seen.add(id(eager))
        if isinstance(lazy, Placeholder):
            raise _DifferenceError(f"{where}: zipslicer has a placeholder, torch.load a {type(eager).__name__}")
        if isinstance(eager, self._torch.Tensor):
            self._tensor(where, eager, lazy)
        elif isinstance(eager, Mapping):
            _same(where, "keys", list(map(_key, eager)), list(map(_key, lazy)))
            for key, value in zip(lazy, eager.values()):
                yield f"{where}[{key!r:.60}]", value, functools.partial(operator.getitem, lazy, key)
        elif isinstance(eager, (list, tuple)) and not isinstance(eager, self._torch.Size):
            _same(where, "length", len(eager), len(lazy))
            for place, value in enumerate(eager):
                yield f"{where}[{place}]", value, functools.partial(operator.getitem, lazy, place)
        else:
            self._other(where, eager, lazy)

    def _tensor(self, where: str, eager: Any, lazy: Any) -> None:
        _same(where, "type", type(eager), type(lazy))
        # Nested tensors have no one shape: their sizes are compared as a part.
        for fact in ("dtype", "layout", "requires_grad", *(() if eager.is_nested else ("shape",))):
            _same(where, fact, getattr(eager, fact), getattr(lazy, fact))
        for left, right in zip(self._parts(eager), self._parts(lazy)):
            _same(where, "strides", left.stride(), right.stride())
            one, other = self._bytes(left), self._bytes(right)
            if not self._torch.equal(one, other):
                byte = int((one != other).nonzero()[0])
                raise _DifferenceError(f"{where}: the elements differ, first in byte {byte} of {len(one)}")
            self._found.nbytes += len(one)
        self._found.tensors += 1

    def _parts(self, tensor: Any) -> Iterator[Any]:
        """The dense tensors that a tensor consists of; for most, itself."""
        torch, tensor = self._torch, tensor.detach()
        if tensor.layout is torch.sparse_coo:
            yield from (tensor._indices(), tensor._values())
        elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
            yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
        elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
            yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
        elif tensor.is_nested:
            yield from (tensor._nested_tensor_size(), tensor.values())
        elif tensor.is_quantized:
            yield tensor.int_repr()
        elif not tensor.is_meta:
            yield tensor.resolve_conj().resolve_neg()

    def _bytes(self, tensor: Any) -> Any:
        """From the first element to the last, as bytes: for dtypes without kernels too."""
        torch = self._torch
        if not tensor.numel():
            return torch.empty(0, dtype=torch.uint8)
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
        width = tensor.element_size()
        place = tensor.storage_offset() * width
        return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage(), place, ((last + 1) * width,), (1,))

    def _other(self, where: str, eager: Any, lazy: Any) -> None:
        if all(isinstance(each, (self._torch.UntypedStorage, self._torch.TypedStorage)) for each in (eager, lazy)):
            # torch.load makes a TypedStorage of an untyped one, too.
            one, other = (getattr(each, "_untyped_storage", each) for each in (eager, lazy))
            _same(where, "bytes", bytes(one), bytes(other))
            self._found.values += 1
            return
        _same(where, "type", type(eager), type(lazy))
        if type(eager).__module__ == "numpy" and hasattr(eager, "tobytes"):
            _same(where, "dtype", eager.dtype, lazy.dtype)
            _same(where, "bytes", eager.tobytes(), lazy.tobytes())
        elif not (isinstance(eager, float) and math.isnan(eager) and math.isnan(lazy)):
            _same(where, "value", eager, lazy)
        self._found.values += 1


def _key(key: Any) -> Any:
    """By which keys are compared: NaN is no key that equals itself."""
    return repr(key) if isinstance(key, float) else key


def _same(where: str, fact: str, eager: Any, lazy: Any) -> None:
    if not bool(eager == lazy):
        raise _DifferenceError(f"{where}: {fact} differ: torch.load gives {eager!r:.200}, zipslicer {lazy!r:.200}")
