"""NumPy tensors: rows in, arrays out. The sibling of tensors.py for framework="np"; torch is nowhere in it.

An array lies over a buffer that nobody else has, of exactly the bytes it needs. It is writable, but where two indices
name one element, as in an expanded tensor. What arrays cannot be (sparse, quantized, nested, meta) is refused, and its
parts are read one by one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Final

from .arrays import CARRIERS, array_dtype, array_value
from .backend import COMPLEX, DIFFERENTIABLE
from .composites import Composite, Dense, Member
from .errors import TableError, UnsupportedError
from .plan import Geometry, Piece, hull, index, is_contiguous, may_overlap, numel, pieces
from .policy import DTYPES, NOT_PLAIN, Meaning, dtype_index
from .reader import ReadOptions, RowReader
from .table import Leaf, Row, TensorTable

__all__ = ["ArrayReader"]

DEVICE: Final = re.compile(r"[a-z_]{1,32}")
ARRAYS: Final = (Meaning.FROM_CPU, Meaning.FROM_NUMPY)  # the composites that are one dense tensor in the file


class ArrayReader(RowReader):
    """Makes arrays of NumPy.

    Raises: ImportError where NumPy is missing; later, where a dtype needs ml_dtypes and that is missing.
    """

    def __init__(self, table: TensorTable, options: ReadOptions) -> None:
        array_dtype("uint8")  # says what to install
        import numpy as np

        super().__init__(table, options)
        self.np: Any = np
        self.dtypes: list[Any] = [None] * 256  # by index, each when it is first met
        self._cast_to = options.dtype
        self._uncast = frozenset(table.quantizers()) if options.dtype is not None else frozenset()
        self._cache: dict[int, Any] | None = {} if options.cache_tensors else None
        self._is_plain = options.dtype is None and not options.cache_tensors
        self._hot = self._hot_with(None, bool)

    # ---------------------------------------------------------------- one array
    def tensor(self, number: int) -> Any:
        """A dense row as an array of its own, as options want it."""
        found = self._archive.backend.read_tensor(self._hot, ~number) if self._is_plain and self._is_at_hand else None
        return self._tensor_otherwise(number) if found is None else self._received(found)

    def _received(self, found: Any) -> Any:
        if found is None:
            return None
        buffer, dtype, sizes, strides = found
        return self._array(buffer, self.dtypes[dtype] or self._dtype(dtype), 0, sizes, strides)

    def _dtype(self, dtype: int) -> Any:
        made = self.dtypes[dtype]
        if made is None:
            made = self.dtypes[dtype] = array_dtype(self.table.dtype(dtype).name)
        return made

    def _array(self, buffer: Any, dtype: Any, start: int, sizes: Sequence[int], strides: Sequence[int]) -> Any:
        """An array over a buffer; start and strides are in elements. NumPy too looks whether it lies in there."""
        np, itemsize = self.np, dtype.itemsize
        try:
            if 0 in sizes:
                return np.empty(sizes, dtype)
            try:
                made = np.ndarray(sizes, dtype, buffer, start * itemsize, [stride * itemsize for stride in strides])
            except (ValueError, OverflowError):
                # The stride of a dimension of size 1 says nothing, and may be larger than NumPy can count.
                steps = [stride * itemsize if n != 1 else itemsize for n, stride in zip(sizes, strides)]
                made = np.ndarray(sizes, dtype, buffer, start * itemsize, steps)
        except ValueError as error:  # too many dimensions or, of one element that stands for many, too many bytes
            raise UnsupportedError(f"NumPy has no array of the shape {tuple(sizes)}: {error}") from None
        flags = made.flags
        if not flags.c_contiguous and may_overlap(sizes, strides):
            flags.writeable = False
        return made

    def _tensor_slowly(self, number: int) -> Any:
        row = self.table.row(number)
        return self._read(row, self.table.geometry(row))

    def _read(self, row: Row, geometry: Geometry) -> Any:
        self._dtype(row.dtype)  # before a byte is read
        if self._cache is not None:
            return self._finish(self._view(self._cached_storage(row.storage), row, geometry), row)
        start, nbytes = row.storage_offset * row.itemsize, row.extent * row.itemsize
        flat = self._storage(row.storage, start, nbytes, self.table.unit(row.dtype))
        return self._finish(self._view(flat, row, geometry._replace(storage_offset=0)), row)

    def _view(self, storage: Any, row: Row, geometry: Geometry) -> Any:
        return self._array(storage, self._dtype(row.dtype), *geometry)

    def _finish(self, made: Any, row: Row) -> Any:
        """What the file and the options want done with the numbers."""
        if row.conj or row.neg:
            made = self._over_hull(made, lambda part: self._resolved(part, row))
        return made if row in self._uncast else self._cast(made, row.dtype)

    def _cast(self, made: Any, dtype: int) -> Any:
        about = self.table.dtype(dtype)
        is_floating = about.traits & DIFFERENTIABLE and not about.traits & COMPLEX and about.name not in CARRIERS
        if self._cast_to is None or not is_floating:
            return made
        with self.np.errstate(all="ignore"):  # what is too large for the other type is infinite there
            return self._over_hull(made, lambda part: part.astype(self._cast_to, copy=False))

    def _over_hull(self, made: Any, work: Callable[[Any], Any]) -> Any:
        """Apply to each element what gives one of its own. Elements that many indices share are worked on once."""
        itemsize = made.itemsize
        strides = [stride // itemsize for stride in made.strides]
        extent = hull(Geometry(0, made.shape, tuple(strides)))
        if made.size <= extent:
            return work(made)
        flat = self.np.lib.stride_tricks.as_strided(made, (extent,), (itemsize,), writeable=False)
        done = work(flat)
        return self._array(done, done.dtype, 0, made.shape, strides)

    def _resolved(self, made: Any, row: Row) -> Any:
        """With conj and neg carried out: an array has no such bits."""
        np, name = self.np, self.table.dtype(row.dtype).name
        done = np.empty_like(made)
        if done.dtype.names is not None:  # complex numbers that NumPy has none of
            for part, is_turned in (("real", row.neg), ("imag", row.conj != row.neg)):
                done[part] = -made[part] if is_turned else made[part]
            return done
        if name in CARRIERS or name == "bool":
            raise UnsupportedError(f"a negated tensor of {name}")
        if row.conj:
            made = np.conjugate(made, out=done)
        return np.negative(made, out=done) if row.neg else made

    def _made(self, buffer: Any, row: Row) -> Any:
        _, sizes, strides = self.table.geometry(row)
        return self._array(buffer, self._dtype(row.dtype), 0, sizes, strides)

    def leaf(self, leaf: Leaf, attributes: Any = None) -> Any:
        """The array alone: what is wrapped around a tensor, NumPy's arrays do not have."""
        del attributes
        if leaf.composite is None:
            return self.tensor(leaf.number)
        return self.composite(leaf.composite, self._member, self._argument)

    def attributed(self, made: Any, state: Any) -> Any:
        del state
        return made

    # ---------------------------------------------------------------- tensors of several parts
    def composite(self, node: int, member: Callable[[Member], Any], argument: Callable[[int], Any]) -> Any:
        about = self.table.composite(node)
        if about.meaning not in ARRAYS:
            raise _no_array(about)
        wanted = self._dtype(about.dtype)
        if about.meaning == Meaning.FROM_CPU:
            made = member(about.members["tensor"])
        else:
            made = self._of_array(argument(about.arguments["array"]), about.sizes)
        return self._as(made, wanted, about)

    def _as(self, made: Any, wanted: Any, about: Composite) -> Any:
        if made.dtype != wanted:
            if made.dtype.names or wanted.names:
                raise UnsupportedError(f"NumPy casts no array to or from {DTYPES[about.dtype].name}")
            with self.np.errstate(all="ignore"):
                made = self._over_hull(made, lambda part: part.astype(wanted))
        return self._cast(made, about.dtype)

    def _of_array(self, found: Any, sizes: tuple[int, ...]) -> Any:
        if not isinstance(found, (self.np.ndarray, self.np.generic)) or found.shape != sizes:
            raise UnsupportedError("a tensor that was saved as a NumPy array needs an array of numbers")
        if found.dtype.kind not in "biufc":
            raise TableError(f"torch has no tensors like this NumPy array, of {found.dtype}")
        return self.np.asarray(found).astype(found.dtype.newbyteorder("="))

    def _member(self, each: Member) -> Any:
        assert not isinstance(each, Dense)  # those are of quantized tensors
        return self.tensor(self.table.program.payloads[each])

    # ---------------------------------------------------------------- storages, as arrays of their bytes
    def _storage(self, storage: int, start: int, nbytes: int, unit: int = 1) -> Any:
        """Bytes [start, start + nbytes) of a storage, in this host's byte order."""
        return self._storages([(storage, start, nbytes, unit)])[0]

    def _storages(self, wanted: Sequence[tuple[int, int, int, int]], bar: Any = None) -> list[Any]:
        """Many at once, in file order, on threads; each (storage, start, nbytes, unit of its elements)."""
        np, made = self.np, []
        for buffer, (_, _, nbytes, unit) in zip(self._buffers([extent[:3] for extent in wanted], bar=bar), wanted):
            flat = np.empty(0, np.uint8) if buffer is None else np.ndarray((nbytes,), np.uint8, buffer)
            if unit > 1:
                flat[: nbytes - nbytes % unit].view(f"u{unit}").byteswap(inplace=True)
            made.append(flat)
        return made

    def _cached_storage(self, storage: int) -> Any:
        assert self._cache is not None
        made = self._cache.get(storage)
        if made is None:
            nbytes = self.table.storage_nbytes(storage)
            made = self._cache.setdefault(storage, self._storage(storage, 0, nbytes, self.table.whole_unit(storage)))
        return made

    def storage_value(self, storage: int, untyped: Any = None) -> Any:
        """A storage that stands as a value: an array of its bytes."""
        if untyped is not None:
            return untyped
        if self._cache is not None:
            return self._cached_storage(storage)
        return self._storage(storage, 0, self.table.storage_nbytes(storage), self.table.own_unit(storage))

    # ---------------------------------------------------------------- into memory that is there
    def room(self, leaf: Leaf, out: Any, wanted: Any = ()) -> tuple[Row, Geometry, memoryview] | None:
        if leaf.composite is not None or not self._is_plain or not out.size:
            return None
        if not (out.flags.c_contiguous and out.flags.writeable):
            return None
        row = self.table.row(leaf.number)
        geometry, flips = index(self.table.geometry(row), wanted)
        if geometry.sizes != out.shape or self._dtype(row.dtype) != out.dtype or not self._is_as_it_is(row) or flips:
            return None
        if hull(geometry) <= out.size and not is_contiguous(geometry.sizes, geometry.strides):
            return None
        if not self._archive.is_stored(self.table.record(row.storage)):
            return None
        return row, geometry, memoryview(out.reshape(-1).view(self.np.uint8))

    def put(self, value: Any, out: Any) -> None:
        out[...] = value

    # ---------------------------------------------------------------- a part of one tensor
    def slice(self, leaf: Leaf, wanted: Any) -> Any:
        if leaf.composite is None:
            row = self.table.row(leaf.number)
            return self._slice(row, self.table.geometry(row), wanted)
        about = self.table.composite(leaf.composite)
        if about.meaning == Meaning.FROM_CPU:
            return self._as(self.slice_member(about.members["tensor"], wanted), self._dtype(about.dtype), about)
        whole = self.leaf(leaf)
        steps = [stride // whole.itemsize for stride in whole.strides]
        index(Geometry(0, whole.shape, tuple(steps)), wanted)  # what is no basic index is refused as elsewhere
        return self.np.array(whole[wanted])

    def slice_member(self, each: Member, wanted: Any) -> Any:
        row, geometry = self.table.member(each)
        return self._slice(row, geometry, wanted)

    def _slice(self, row: Row, whole: Geometry, wanted: Any) -> Any:
        np = self.np
        (start, sizes, strides), flips = index(whole, wanted)
        dtype = self._dtype(row.dtype)
        nbytes = numel(sizes) * row.itemsize
        is_run = nbytes > 0 and not flips and is_contiguous(sizes, strides)
        if is_run and self._is_plain and not (self.table.swapped or row.conj or row.neg):  # some rows: a step less
            (buffer,) = self._buffers([(row.storage, start * row.itemsize, nbytes)])
            return self._array(buffer, dtype, 0, sizes, strides)
        # An expanded dimension is one element that stands for many: it is read once, and expanded again.
        own = tuple(min(n, 1) if not stride else n for n, stride in zip(sizes, strides))
        made = self._read_slice(row, Geometry(start, own, strides), dtype)
        flips = tuple(dim for dim in flips if strides[dim])
        if flips:
            made = np.flip(made, flips).copy()
        made = self._finish(made, row)
        return made if own == sizes else _expanded(np, made, sizes)

    def _read_slice(self, row: Row, geometry: Geometry, dtype: Any) -> Any:
        itemsize, unit = row.itemsize, self.table.unit(row.dtype)
        count = numel(geometry.sizes)
        if not count:
            return self._array(None, dtype, *geometry)
        if self._is_as_in_file(row.storage):  # a view of the file, as an index of NumPy gives one
            start, extent = geometry.storage_offset, hull(geometry)
            flat = self._storage(row.storage, start * itemsize, extent * itemsize, unit)
            return self._array(flat, dtype, 0, geometry.sizes, geometry.strides)
        made: Any = None
        for piece in pieces(geometry, itemsize):
            sizes, strides = piece.geometry.sizes, piece.geometry.strides
            if piece.run_numel:
                part = self.np.ndarray(sizes, dtype, self._read_runs(row, piece, unit))
            else:
                start, extent = piece.geometry.storage_offset, hull(piece.geometry)
                flat = self._storage(row.storage, start * itemsize, extent * itemsize, unit)
                part = self._array(flat, dtype, 0, sizes, strides)
                if not piece.part and extent > count:
                    part = part.copy()  # a stretch that was read through holds bytes that nobody asked for
            if not piece.part:
                return part
            if made is None:
                made = self.np.ndarray(geometry.sizes, dtype, self._archive.backend.allocate(count * itemsize))
            target = made
            for dim, start, length in piece.part:
                target = target[(slice(None),) * dim + (slice(start, start + length),)]
            target[...] = part
        return made

    def _read_runs(self, row: Row, piece: Piece, unit: int) -> Any:
        """Runs of a storage, one after the other."""
        if self._archive.is_stored(self.table.record(row.storage)) and unit == 1:
            return self._gather(row, piece)
        nbytes = piece.run_numel * row.itemsize
        starts = [start * row.itemsize for start in piece.starts]
        return self.np.concatenate(self._storages([(row.storage, start, nbytes, unit) for start in starts]))

    # ---------------------------------------------------------------- many tensors, sharing as the file does
    def shared(
        self, numbers: Sequence[int], storages: Sequence[int] = (), bar: Any = None
    ) -> tuple[dict[int, Any], dict[int, Any]]:
        table = self.table
        rows = {number: table.row(number) for number in dict.fromkeys(numbers)}
        for dtype in {row.dtype for row in rows.values()}:
            self._dtype(dtype)  # before a byte is read
        made: dict[int, Any] = {}
        if self._is_plain and not storages:
            made = dict(zip(rows, self._read_small(list(rows), whole=True)))
            rows = {number: row for number, row in rows.items() if made[number] is None}
        units, mixed = self._units(rows.values())
        wanted = list(dict.fromkeys([*(s for s in units if s not in mixed), *storages]))
        if self._cache is not None:
            whole = {storage: self._cached_storage(storage) for storage in wanted}
        else:
            extents = [(s, 0, table.storage_nbytes(s), max(units.get(s) or {self.table.own_unit(s)})) for s in wanted]
            whole = dict(zip(wanted, self._storages(extents, bar)))
        for number, row in rows.items():
            if row.storage in mixed:
                made[number] = self._tensor_slowly(number)
            else:
                made[number] = self._finish(self._view(whole[row.storage], row, table.geometry(row)), row)
        return made, whole

    # ---------------------------------------------------------------- values that are no tensors
    def special(self, meaning: int, name: str, args: Sequence[Any], state: Any) -> Any:
        if meaning >= Meaning.NUMPY_ARRAY:
            return array_value(meaning, args, state)
        if meaning == Meaning.DTYPE and not args:
            return _dtype_value(name)
        if meaning == Meaning.SIZE and len(args) == 1 and isinstance(args[0], (tuple, list)):
            return tuple(args[0]) if all(type(n) is int and -1 << 63 <= n < 1 << 63 for n in args[0]) else NOT_PLAIN
        if meaning == Meaning.DEVICE and 1 <= len(args) <= 2 and type(args[0]) is str:
            return _device(args[0], args[1:])
        if meaning == Meaning.TYPED and len(args) == 3:  # a node of its own kind: tensor, class, state
            return args[0]
        if meaning in (Meaning.PARAMETER, Meaning.PARAMETER_WITH_STATE):
            count = 3 + (meaning == Meaning.PARAMETER_WITH_STATE)
            if len(args) == count and isinstance(args[0], self.np.ndarray) and type(args[1]) is bool:
                return args[0]
        return NOT_PLAIN


def _expanded(np: Any, made: Any, sizes: Sequence[int]) -> Any:
    try:
        return np.broadcast_to(made, sizes)
    except ValueError as error:
        raise UnsupportedError(f"NumPy has no array of the shape {tuple(sizes)}: {error}") from None


def _no_array(about: Composite) -> UnsupportedError:
    """Why a tensor is not had as an array, and what can be had of it."""
    if about.meaning == Meaning.META:
        return UnsupportedError("a meta tensor has no elements in the file; get_meta has what it says of it")
    kind = "quantized" if about.meaning == Meaning.QUANTIZED else about.layout
    names = ", ".join(map(repr, about.members))
    return UnsupportedError(
        f"NumPy has no {kind} tensors; get_slice(key).part(name)[...] reads what this one is made of, with name one of {names}"
    )


def _dtype_value(name: str) -> Any:
    """A dtype that stands as a value: that of NumPy which means the same, where there is one."""
    found = dtype_index(f"torch.{name}")
    if found is None or DTYPES[found].name in CARRIERS:
        return NOT_PLAIN
    try:
        return array_dtype(DTYPES[found].name)
    except ImportError:  # without ml_dtypes; a dict of settings must not fail for it
        return NOT_PLAIN


def _device(kind: str, place: Sequence[Any]) -> Any:
    """torch.device("cuda", 0) -> "cuda:0", as `TensorInfo.location` spells it."""
    if any(type(n) is not int or not 0 <= n < 128 for n in place) or not DEVICE.fullmatch(kind):
        return NOT_PLAIN
    return f"{kind}:{place[0]}" if place else kind
