"""DeferredTensor: a tensor of a file that is read when it is used. Importing this module imports torch.

`patch_torch_load(lazy=True)` puts them where torch.load puts tensors, so that code that walks, merges or copies a state
dict never holds more of it than it uses.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch.utils._pytree import tree_map_only

from .backend import Kind
from .errors import ZipSlicerError
from .reader import below
from .state_dict import View
from .tensors import TensorReader

__all__ = ["Deferral", "DeferredTensor", "build_deferred"]

DEFERRED = 1 << 16  # bytes; a smaller storage is read at once: it costs less than what stands for it

_Tensor: Any = torch.Tensor

# What a DeferredTensor answers for itself: facts that the file has given.
_FACTS: set[Any] = {
    getattr(_Tensor, name).__get__
    for name in (
        "_base", "_grad", "device", "dtype", "grad", "grad_fn", "is_cpu", "is_cuda", "is_leaf", "is_meta", "is_mkldnn",
        "is_nested", "is_quantized", "is_sparse", "is_sparse_csr", "itemsize", "layout", "nbytes", "ndim", "requires_grad",
        "shape",
    )
    if hasattr(_Tensor, name)
} | {
    _Tensor.__len__, _Tensor.dim, _Tensor.element_size, _Tensor.get_device, _Tensor.is_complex, _Tensor.is_conj,
    _Tensor.is_contiguous, _Tensor.is_floating_point, _Tensor.is_neg, _Tensor.is_signed, _Tensor.ndimension,
    _Tensor.nelement, _Tensor.numel, _Tensor.size, _Tensor.storage_offset, _Tensor.stride, torch.is_complex,
    torch.is_conj, torch.is_floating_point, torch.is_neg, torch.is_signed, torch.numel,
}  # fmt: skip

# What shows memory, or hands it on to stay: an address must not be that of a tensor that is gone a moment later, or two
# tensors would seem to be one.
_SHOWS_MEMORY: set[Any] = {
    _Tensor.data.__get__, _Tensor.data_ptr, _Tensor.detach, _Tensor.storage, _Tensor.untyped_storage, torch.detach
}  # fmt: skip
_IN_PLACE = {"__set__", "__delete__", "__setitem__"} | {
    f"__i{name}__"
    for name in (
        "add",
        "and",
        "div",
        "floordiv",
        "lshift",
        "mod",
        "mul",
        "or",
        "pow",
        "rshift",
        "sub",
        "truediv",
        "xor",
    )
}


class DeferredTensor(torch.Tensor):
    """Has the dtype, shape and strides of a tensor in a file, and no memory.

    A function of torch that is given one gets the tensor, read for this call and held by nobody. One that changes it, or
    shows where its memory is, makes it that tensor for good: its class is torch.Tensor from then on.
    """

    _zipslicer: tuple[Deferral, int]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if func in _SHOWS_MEMORY or name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")):
            tree_map_only(DeferredTensor, _settled, args[:1])
        if "out" in kwargs:
            tree_map_only(DeferredTensor, _settled, kwargs["out"])
        args, kwargs = tree_map_only(DeferredTensor, _read, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """The same for calls that come from C++, where what is given cannot become another tensor any more."""
        for arg, declared in zip(args, func._schema.arguments):
            if isinstance(arg, DeferredTensor) and declared.alias_info is not None and declared.alias_info.is_write:
                raise RuntimeError(f"{func} would change a tensor that is still in the file: clone() it first")
        args, kwargs = tree_map_only(DeferredTensor, _read, (args, kwargs or {}))
        return func(*args, **kwargs)


def _read(tensor: DeferredTensor) -> Any:
    found = tensor.__dict__.get("_zipslicer")  # none where another thread has settled it meanwhile
    return found[0].read(found[1]) if found else tensor


def _settled(tensor: DeferredTensor) -> Any:
    found = tensor.__dict__.get("_zipslicer")
    if found:
        found[0].settle(tensor)
    return tensor


class Deferral:
    """The open file behind deferred tensors. Safe for concurrent use."""

    def __init__(self, reader: TensorReader, path: str | None) -> None:
        self._reader = reader
        self._path = path
        self._lock = threading.Lock()
        rows = range(reader.table.program.tensor_count)
        self._uses = collections.Counter(reader.table.row(number).storage for number in rows)
        self._tied: dict[int, list[DeferredTensor]] = collections.defaultdict(list)  # by storage, where several use it

    def tensor(self, number: int) -> DeferredTensor:
        """What stands for a row."""
        row = self._reader.table.row(number)
        geometry = self._reader.table.geometry(row)
        made: DeferredTensor = _Tensor._make_wrapper_subclass(
            DeferredTensor,
            geometry.sizes,
            strides=geometry.strides,
            storage_offset=geometry.storage_offset,
            dtype=self._reader.dtypes[row.dtype],
            device="cpu",
        )
        made._zipslicer = self, number
        if self._uses[row.storage] > 1:
            self._tied[row.storage].append(made)
        return made

    def read(self, number: int) -> Any:
        try:
            return self._reader.tensor(number)
        except ZipSlicerError as error:
            raise error.located(path=self._path) from None

    def settle(self, tensor: DeferredTensor) -> None:
        """Make it the tensor it stands for, and with it all that share its storage, so that they share it from now on."""
        with self._lock:
            if type(tensor) is not DeferredTensor:  # another thread was here first
                return
            number = tensor._zipslicer[1]
            together = self._tied.pop(self._reader.table.row(number).storage, [tensor])
            numbers = [one._zipslicer[1] for one in together]
            try:
                made, _ = self._reader.shared(numbers)
            except ZipSlicerError as error:
                raise error.located(path=self._path) from None
            for one, number in zip(together, numbers):
                torch.utils.swap_tensors(one, made.pop(number))  # type: ignore[no-untyped-call]


def build_deferred(view: View) -> Any:
    """The root of a file, as torch.load would return it, with a DeferredTensor for each row on a large storage.

    Read at once is what is part of something else (a Parameter, a tensor with attributes, an object), tensors that
    require grad or are conjugated, and whatever is not to be on the CPU or is of foreign byte order.
    """
    reader, table, program = cast("TensorReader", view.reader), view.table, view.program
    kinds, payloads = program.kinds, program.payloads
    rows = [table.row(number) for number in range(program.tensor_count)]
    now = [
        position
        for position, kind in enumerate(kinds)
        if kind == Kind.STORAGE
        or (kind in (Kind.CALL, Kind.OBJECT, Kind.TYPED) and not program.is_mapping(payloads[position]))
    ]
    numbers, storages = below(table, now, {})
    if table.swapped or not reader._is_plain:
        numbers = list(range(len(rows)))
    # A storage is deferred as a whole, or not at all: what is tied must stay so.
    at_once = {*storages, *(rows[number].storage for number in numbers)}
    at_once.update(row.storage for row in rows if row.flags or table.storage_nbytes(row.storage) < DEFERRED)
    now += [p for p, kind in enumerate(kinds) if kind == Kind.TENSOR and rows[payloads[p]].storage in at_once]
    builder = reader.builder(now)
    read = builder.leaf
    deferral = Deferral(reader, table.archive.source.path)

    def leaf(kind: int, payload: int) -> Any:
        is_deferred = kind == Kind.TENSOR and rows[payload].storage not in at_once
        return deferral.tensor(payload) if is_deferred else read(kind, payload)

    builder.leaf = leaf
    return builder.build(0)
