"""Tensors: rows in, torch tensors out. The one floor that imports torch, and only when something is touched.

What is handed out owns its memory: a storage of exactly the bytes it needs, over a buffer that nobody else has.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

from .arrays import array_value
from .backend import (
    TENSOR_FIELDS,
    Maker,
    TensorField,
)
from .composites import Composite, Dense, Member, compose, is_sliceable
from .errors import TableError
from .plan import Geometry, Piece, hull, index, is_contiguous, may_overlap, numel, pieces, row_major
from .policy import DTYPES, NOT_PLAIN, Meaning, floating_index
from .reader import SMALL_TO, ReadOptions, RowReader, check_dtype
from .staging import CHUNK_NBYTES, LANE_FROM, Lane, cast, lane_of, memory_of, ring_of, send
from .table import NO_GRAD, ROW, ROW_NBYTES, Leaf, Row, TensorTable

__all__ = ["TensorReader", "bump", "has_memory", "torch_dtype"]


@functools.cache
def _maker(torch: Any) -> Maker:
    """What makes small tensors; and the dtypes of this torch, by their index."""
    dtypes = [getattr(torch, dtype.name, None) for dtype in DTYPES]
    dtypes += [torch.uint8] * (256 - len(DTYPES))  # an untyped storage without a dtype is bytes
    return Maker(
        torch.empty_strided, ("dtype", "device"), torch.device("cpu"), dtypes, torch.Tensor, torch.Tensor.data_ptr
    )


class TensorReader(RowReader):
    """Makes tensors of torch."""

    def __init__(self, table: TensorTable, options: ReadOptions) -> None:
        try:
            import torch
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise ImportError('tensors need torch (pip install torch); framework="np" makes NumPy arrays') from error

        super().__init__(table, options)
        self.torch: Any = torch
        maker = _maker(torch)
        self.dtypes = maker.dtypes
        self.place = _Place(torch, options)
        self._cache: dict[int, Any] | None = {} if options.cache_tensors else None
        # What a quantized tensor is made with is not cast: torch wants these types.
        self._uncast = frozenset(table.quantizers()) if options.dtype is not None else frozenset()
        self._is_plain = not (self.place.special or options.cache_tensors) and self._knows_all()
        self._hot = self._hot_with(maker, torch.is_inference_mode_enabled)
        if self._is_plain and self._is_at_hand:
            self.fast = table.archive.backend.read_tensor, self._hot

    def _knows_all(self) -> bool:
        """Whether this torch has the dtypes of all rows: an older one lacks the newest."""
        absent = {number for number, dtype in enumerate(self.dtypes) if dtype is None}
        columns = memoryview(self.table.program.tensors).cast("q")
        return not absent or absent.isdisjoint(columns[TensorField.DTYPE :: TENSOR_FIELDS].tolist())

    # ---------------------------------------------------------------- one tensor
    def tensor(self, number: int) -> Any:
        """A dense row as a tensor of its own, as options want it."""
        made = self._archive.backend.read_tensor(self._hot, ~number) if self.fast is not None else None
        return self._tensor_otherwise(number) if made is None else made

    def _dtype(self, dtype: int) -> Any:
        made = self.dtypes[dtype]
        if made is None:
            raise NotImplementedError(
                f"torch {self.torch.__version__} has no dtype {DTYPES[dtype].name}; a newer one does"
            )
        return made

    def _tensor_slowly(self, number: int) -> Any:
        row = self.table.row(number)
        geometry = self.table.geometry(row)
        with self.torch.inference_mode(False):
            if self.place.is_meta:
                made = self._view(self.torch.UntypedStorage(0, device="meta"), row, geometry)
            elif self._cache is not None:
                made = self._view(self._cached_storage(row.storage), row, geometry)
            else:
                start, nbytes = row.storage_offset * row.itemsize, row.extent * row.itemsize
                wanted = self._wanted(row)
                made = self._staged(row.storage, start, nbytes, row.dtype, wanted)
                if made is None:
                    storage = self._storage(row.storage, start, nbytes, self.table.unit(row.dtype))
                    storage = self.place.storage(storage, self.table.program.locations[row.storage])
                    made = self._view(storage, row, geometry._replace(storage_offset=0))
                else:
                    made = made.as_strided_(geometry.sizes, geometry.strides)
            return self._finish(made, row)

    def _wanted(self, row: Row) -> Any:
        """What dtype a row is to come out as."""
        given = self._dtype(row.dtype)
        is_cast = self.place.dtype is not None and given.is_floating_point and row not in self._uncast
        return self.place.dtype if is_cast else given

    def _staged(self, storage: int, start: int, nbytes: int, dtype: int, wanted: Any) -> Any:
        """Bytes of a storage as a flat tensor where it is to be and of the dtype `wanted`, brought there by chunks.

        None where they are just to be read, or go to a device in another way.
        """
        torch, place, given = self.torch, self.place, self._dtype(dtype)
        device = place.where(self.table.program.locations[storage])
        lane = None if device is None or nbytes < LANE_FROM else lane_of(torch, device)
        if place.is_call or not nbytes or (lane is None and (device is not None or wanted == given)):
            return None
        count = nbytes // given.itemsize
        read = self._part_reader(storage, start, nbytes, self.table.unit(dtype))
        if lane is not None:
            made = torch.empty(count, dtype=wanted, device=device)
            send(lane, ring_of(), read, count * given.itemsize, given, made)
            return made
        made = torch.frombuffer(self._archive.backend.allocate(count * wanted.itemsize), dtype=wanted)
        cast(torch, read, count * given.itemsize, given, made)
        return made

    def _part_reader(self, storage: int, start: int, nbytes: int, unit: int) -> Callable[[int, memoryview], None]:
        """What reads parts of a stretch of a storage, in this host's byte order. A part is of whole elements."""
        torch, archive, record = self.torch, self._archive, self.table.record(storage)
        inflated = None
        if not archive.is_stored(record):
            inflated = memoryview(archive.read(record))[start : start + nbytes]

        def read(at: int, memory: memoryview) -> None:
            if inflated is not None:
                memory[:] = inflated[at : at + len(memory)]
            else:
                archive.read_into((record, start + at, len(memory), 0, 0), [memory], self.threads)
            if unit > 1:
                turned = torch.frombuffer(memory, dtype=torch.uint8).view(-1, unit)
                turned.copy_(turned.flip(1))

        return read

    def _view(self, storage: Any, row: Row, geometry: Geometry) -> Any:
        """A tensor on a storage. The geometry is proved to lie in it, so that set_ never grows it."""
        torch = self.torch
        dtype = self._dtype(row.dtype)
        if storage.device.type == "meta":
            return torch.empty_strided(geometry.sizes, geometry.strides, dtype=dtype, device="meta")
        made = torch.empty(0, dtype=dtype, device=storage.device)
        return made.set_(storage, geometry.storage_offset, geometry.sizes, geometry.strides)

    def _finish(self, made: Any, row: Row) -> Any:
        made = made if row in self._uncast else self.place.cast(made)
        if row.conj or row.neg:
            bits = {name: True for name, on in (("conj", row.conj), ("neg", row.neg)) if on}
            self.torch._C._set_tensor_metadata(made, bits)
        return made.requires_grad_() if row.requires_grad else made

    def _received(self, found: Any) -> Any:
        return found

    def _made(self, buffer: Any, row: Row) -> Any:
        _, sizes, strides = self.table.geometry(row)
        # In place, so that the result is no view of another tensor; half the cost of view().
        made = self.torch.frombuffer(buffer, dtype=self.dtypes[row.dtype]).as_strided_(sizes, strides)
        return made.requires_grad_() if row.requires_grad else made

    def leaf(self, leaf: Leaf, attributes: Any = None) -> Any:
        if leaf.composite is None:
            made = self.tensor(leaf.number)
        else:
            made = self.composite(leaf.composite, self._member, self._argument)
        if leaf.parameter:
            _check_grad(made, leaf.requires_grad)
            made = self.torch.nn.Parameter(made.detach(), leaf.requires_grad)
        return self.attributed(made, attributes)

    def attributed(self, made: Any, state: Any) -> Any:
        return _with_attributes(self.torch, made, state)

    def composite(self, node: int, member: Callable[[Member], Any], argument: Callable[[int], Any]) -> Any:
        about = self.table.composite(node)
        with self.torch.inference_mode(False), self.torch.no_grad():
            made = self._placed(compose(self.torch, about, member, argument), about)
            return made.detach().requires_grad_() if about.requires_grad else made

    def _placed(self, made: Any, about: Composite) -> Any:
        """What the options want of a tensor whose parts have not had it already."""
        if about.meaning in (Meaning.FROM_CPU, Meaning.FROM_NUMPY):
            made = self.place.named(made, about.location, is_cpu=about.meaning == Meaning.FROM_NUMPY)
        return self.place.cast(made) if about.meaning in (Meaning.META, Meaning.FROM_NUMPY, Meaning.FROM_CPU) else made

    def _member(self, each: Member) -> Any:
        """A dense part by itself."""
        table = self.table
        if not isinstance(each, Dense):
            return self.tensor(table.program.payloads[each])
        row, geometry = table.member(each)
        if self._cache is not None:
            return self._view(self._cached_storage(row.storage), row, geometry)
        start, nbytes = row.storage_offset * row.itemsize, row.extent * row.itemsize
        untyped = self._storage(row.storage, start, nbytes, self.table.unit(row.dtype))
        untyped = self.place.storage(untyped, table.program.locations[row.storage])
        return self._view(untyped, row, geometry._replace(storage_offset=0))

    def _storage(self, storage: int, start: int, nbytes: int, unit: int = 1) -> Any:
        """Bytes [start, start + nbytes) of a storage, in this host's byte order, as an UntypedStorage of just these."""
        return self._storages([(storage, start, nbytes, unit)])[0]

    def _storages(self, wanted: Sequence[tuple[int, int, int, int]], bar: Any = None) -> list[Any]:
        """Many at once, in file order, on threads; each (storage, start, nbytes, unit of its elements)."""
        torch, made = self.torch, []
        for buffer, (_, _, nbytes, unit) in zip(self._buffers([extent[:3] for extent in wanted], bar=bar), wanted):
            if buffer is None:
                made.append(torch.UntypedStorage(0, device="cpu"))
                continue
            flat = torch.frombuffer(buffer, dtype=torch.uint8)
            if unit > 1:
                turned = flat[: nbytes - nbytes % unit].view(-1, unit)
                turned.copy_(turned.flip(1))
            made.append(flat.untyped_storage())
        return made

    def _cached_storage(self, storage: int) -> Any:
        assert self._cache is not None
        made = self._cache.get(storage)
        if made is None:
            unit = self.table.whole_unit(storage)
            made = self._storage(storage, 0, self.table.storage_nbytes(storage), unit)
            made = self._cache.setdefault(storage, self.place.storage(made, self.table.program.locations[storage]))
        return made

    def storage_value(self, storage: int, untyped: Any = None) -> Any:
        """A storage that stands as a value: torch.UntypedStorage, or a TypedStorage where the file has a typed class."""
        torch = self.torch
        if untyped is None:
            if self._cache is not None:
                untyped = self._cached_storage(storage)
            else:
                untyped = self._storage(storage, 0, self.table.storage_nbytes(storage), self.table.own_unit(storage))
                untyped = self.place.storage(untyped, self.table.program.locations[storage])
        dtype = self.table.storage_dtype(storage)
        if dtype >= len(DTYPES):
            return untyped
        return torch.storage.TypedStorage(wrap_storage=untyped, dtype=self._dtype(dtype), _internal=True)

    def lane_to(self, device: Any) -> Lane | None:
        """The lane to a device by whatever name; None where there is none, and tensors are moved in another way."""
        return lane_of(self.torch, self.torch.device(device))

    # ---------------------------------------------------------------- into memory that is there
    def room(self, leaf: Leaf, out: Any, wanted: Any = ()) -> tuple[Row, Geometry, memoryview] | None:
        if not self._is_dense(leaf, out) or out.device.type != "cpu":
            return None
        row = self.table.row(leaf.number)
        geometry, flips = index(self.table.geometry(row), wanted)
        if geometry.sizes != tuple(out.shape) or self.dtypes[row.dtype] != out.dtype or not self._is_as_it_is(row):
            return None
        is_runs = out.is_contiguous() and hull(geometry) > out.numel()
        if flips or not (is_runs or _is_laid_out(geometry, out)):
            return None
        if not self._archive.is_stored(self.table.record(row.storage)):
            return None
        return row, geometry, memory_of(out, out.numel() * row.itemsize)

    def _is_dense(self, leaf: Leaf, out: Any) -> bool:
        """Whether both are tensors that consist of elements in memory, and no more."""
        torch = self.torch
        is_plain = type(out) in (torch.Tensor, torch.nn.Parameter) and out.layout is torch.strided
        return bool(leaf.composite is None and is_plain and out.numel() and not (out.is_conj() or out.is_neg()))

    def put(self, value: Any, out: Any) -> None:
        with self.torch.no_grad():
            out.copy_(value)

    def fill(self, leaf: Leaf, out: Any, wanted: Any = ()) -> None:
        if not has_memory(self.torch, out):
            raise ValueError("the storage of out was resized, and is too small for it")
        if not self.stage_into(leaf, out, wanted):
            super().fill(leaf, out, wanted)
        bump(self.torch, out)

    def stage_into(self, leaf: Leaf, out: Any, wanted: Any = ()) -> bool:
        """Fill a tensor of another dtype, or on a device with a lane, by chunks. False where that is not the way."""
        if not self._is_dense(leaf, out) or out.device.type == "meta" or self.place.special or self._cache is not None:
            return False
        row = self.table.row(leaf.number)
        geometry, flips = index(self.table.geometry(row), wanted)
        is_same = geometry.sizes == tuple(out.shape) and _is_laid_out(geometry, out)
        if flips or row.conj or row.neg or not is_same:
            return False
        given, nbytes = self._dtype(row.dtype), out.numel() * row.itemsize
        lane = None if nbytes < LANE_FROM else lane_of(self.torch, out.device)
        if lane is None and (out.device.type != "cpu" or out.dtype == given or nbytes <= CHUNK_NBYTES):
            return False
        read = self._part_reader(
            row.storage, geometry.storage_offset * row.itemsize, nbytes, self.table.unit(row.dtype)
        )
        with self.torch.no_grad():
            flat = out.detach().as_strided((out.numel(),), (1,))
            if lane is None:
                cast(self.torch, read, nbytes, given, flat)
            else:
                send(lane, ring_of(), read, nbytes, given, flat)
        return True

    # ---------------------------------------------------------------- a part of one tensor
    def slice(self, leaf: Leaf, wanted: Any) -> Any:
        if leaf.composite is not None:
            return self._slice_composite(leaf, self.table.composite(leaf.composite), wanted)
        row = self.table.row(leaf.number)
        return self._slice(row, self.table.geometry(row), wanted, leaf.requires_grad)

    def slice_member(self, each: Member, wanted: Any) -> Any:
        row, geometry = self.table.member(each)
        return self._slice(row, geometry, wanted, row.requires_grad)

    def _slice_composite(self, leaf: Leaf, about: Composite, wanted: Any) -> Any:
        if not is_sliceable(about):
            parts = ", ".join(map(repr, about.members))
            raise TypeError(
                f"a {about.layout} {self.dtypes[about.dtype]} tensor of several parts is not sliced: read it whole, or "
                f"slice a part of it, get_slice(key).part(name), with name one of {parts}"
            )
        each = next(iter(about.members.values()), None)
        with self.torch.inference_mode(False), self.torch.no_grad():
            if each is None:
                assert leaf.composite is not None
                whole = self.composite(leaf.composite, self._member, self._argument)
                geometry, flips = index(Geometry(0, tuple(whole.size()), whole.stride()), wanted)
                made = whole.as_strided(geometry.sizes, geometry.strides, geometry.storage_offset).flip(flips).clone()
            else:
                part = self.slice_member(each, wanted)
                cut = about._replace(sizes=tuple(part.size()), strides=part.stride())
                if about.axis is not None:
                    cut = cut._replace(**_channels(about.sizes, about.axis, wanted))

                def member(other: Member) -> Any:
                    return part if other is each else self._member(other)

                made = self._placed(compose(self.torch, cut, member, self._argument), about)
            grad = leaf.requires_grad if leaf.parameter else about.requires_grad
            return made.detach().requires_grad_() if grad else made.detach()

    def _slice(self, row: Row, whole: Geometry, wanted: Any, requires_grad: bool) -> Any:
        torch = self.torch
        geometry, flips = index(whole, wanted)
        dtype = self._dtype(row.dtype)
        nbytes = numel(geometry.sizes) * row.itemsize
        is_run = nbytes > 0 and not flips and is_contiguous(geometry.sizes, geometry.strides)
        if is_run and self._is_as_it_is(row) and not torch.is_inference_mode_enabled():  # some rows: a step less
            (buffer,) = self._buffers([(row.storage, geometry.storage_offset * row.itemsize, nbytes)])
            made = torch.frombuffer(buffer, dtype=dtype).as_strided_(geometry.sizes, geometry.strides)
            return made.requires_grad_() if requires_grad else made
        with torch.inference_mode(False):
            if self.place.is_meta:
                made = torch.empty(geometry.sizes, dtype=dtype, device="meta")
            else:
                # An expanded dimension is one element that stands for many: it is read once, and expanded again.
                sizes = tuple(min(n, 1) if not stride else n for n, stride in zip(geometry.sizes, geometry.strides))
                bits = self._read_slice(row, geometry._replace(sizes=sizes))
                flips = tuple(dim for dim in flips if geometry.strides[dim])
                bits = bits.flip(flips) if flips else bits
                made = self._view(
                    bits.untyped_storage(), row, Geometry(bits.storage_offset(), bits.size(), bits.stride())
                )
                made = self.place.tensor(made, self.table.program.locations[row.storage])
                made = self._finish(made, row._replace(flags=row.flags & ~1)).expand(geometry.sizes)
        return made.requires_grad_() if requires_grad else made

    def _read_slice(self, row: Row, geometry: Geometry) -> Any:
        """The elements as integers of the same size, which every kernel of torch can copy and turn around."""
        torch, itemsize, unit = self.torch, row.itemsize, self.table.unit(row.dtype)
        carrier = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}[itemsize]
        count = numel(geometry.sizes)
        if not count:
            return torch.empty(geometry.sizes, dtype=carrier, device="cpu")

        def viewed(untyped: Any, sizes: Sequence[int], strides: Sequence[int]) -> Any:
            return torch.empty(0, dtype=carrier, device="cpu").set_(untyped, 0, sizes, strides)

        if self._is_as_in_file(row.storage):  # a view of the file, as an index of torch gives one
            start, extent = geometry.storage_offset, hull(geometry)
            whole = self._storage(row.storage, start * itemsize, extent * itemsize, unit)
            return viewed(whole, geometry.sizes, geometry.strides)
        made: Any = None
        for piece in pieces(geometry, itemsize):
            sizes, strides = piece.geometry.sizes, piece.geometry.strides
            if piece.run_numel:
                part = viewed(self._read_runs(row, piece, unit), sizes, row_major(sizes))
            else:
                start, extent = piece.geometry.storage_offset, hull(piece.geometry)
                part = viewed(self._storage(row.storage, start * itemsize, extent * itemsize, unit), sizes, strides)
                if not piece.part and extent > count:
                    part = part.contiguous()  # a stretch that was read through holds bytes that nobody asked for
            if not piece.part:
                return part
            if made is None:
                buffer = self._archive.backend.allocate(count * itemsize)
                made = torch.frombuffer(buffer, dtype=carrier).view(geometry.sizes)
            target = made
            for cut in piece.part:
                target = target.narrow(*cut)
            target.copy_(part)
        return made

    def _read_runs(self, row: Row, piece: Piece, unit: int) -> Any:
        """Runs of a storage, one after the other, as an UntypedStorage."""
        torch, nbytes = self.torch, piece.run_numel * row.itemsize
        if self._archive.is_stored(self.table.record(row.storage)) and unit == 1:
            return torch.frombuffer(self._gather(row, piece), dtype=torch.uint8).untyped_storage()
        starts = piece.starts
        parts = self._storages([(row.storage, start * row.itemsize, nbytes, unit) for start in starts])
        joined = torch.empty(len(starts) * nbytes, dtype=torch.uint8, device="cpu")
        for i, part in enumerate(parts):
            view = torch.empty(0, dtype=torch.uint8, device="cpu").set_(part, 0, (nbytes,), (1,))
            joined[i * nbytes : (i + 1) * nbytes] = view
        return joined.untyped_storage()

    # ---------------------------------------------------------------- many tensors, sharing as the file does
    def shared(
        self, numbers: Sequence[int], storages: Sequence[int] = (), bar: Any = None
    ) -> tuple[dict[int, Any], dict[int, Any]]:
        with self.torch.inference_mode(False):
            if self._is_plain and not self.table.swapped:
                return self._shared_plainly(dict.fromkeys(numbers), storages, bar)
            rows = {number: self.table.row(number) for number in dict.fromkeys(numbers)}
            if self.place.is_meta:
                return {number: self._tensor_slowly(number) for number in rows}, self._read_whole(storages, {}, bar)
            units, mixed = self._units(rows.values())
            cast = self._cast_whole(rows.values(), {*mixed, *storages}, bar)
            wanted = [storage for storage in units if not (storage in mixed or storage in cast)]
            whole = self._read_whole([*wanted, *storages], units, bar)
            made = {}
            for number, row in rows.items():
                if row.storage in mixed:
                    made[number] = self._tensor_slowly(number)
                    continue
                geometry = self.table.geometry(row)
                if (flat := cast.get(row.storage)) is not None:
                    tensor = self.torch.empty(0, dtype=flat.dtype, device=flat.device)
                    tensor.set_(flat.untyped_storage(), *geometry)
                else:
                    tensor = self._view(whole[row.storage], row, geometry)
                made[number] = self._finish(tensor, row)
        return made, whole

    def _cast_whole(self, rows: Iterable[Row], but: Container[int], bar: Any) -> dict[int, Any]:
        """Storages of which each tensor wants the same: as flat tensors, cast once, so that what is tied stays so.

        Those of another dtype, and large ones for a device with a lane. `but`: storages that are read as they are. Small
        ones are read together, large ones by chunks.
        """
        if self._cache is not None:
            return {}
        found: dict[int, set[tuple[int, Any]]] = collections.defaultdict(set)
        for row in rows:
            if row.storage not in but:
                found[row.storage].add((row.dtype, self._wanted(row)))
        made: dict[int, Any] = {}
        together: list[tuple[int, int, Any]] = []
        for storage, kinds in found.items():
            nbytes = self.table.storage_nbytes(storage)
            ((dtype, wanted), *others) = kinds
            if others:
                continue
            flat = None if nbytes < SMALL_TO else self._staged(storage, 0, nbytes, dtype, wanted)
            if flat is not None:
                made[storage] = flat
                if bar is not None:
                    bar.update(nbytes)
            elif nbytes and wanted != self._dtype(dtype):
                together.append((storage, dtype, wanted))
        nbytes_of, locations = self.table.storage_nbytes, self.table.program.locations
        read = self._storages([(s, 0, nbytes_of(s), self.table.unit(dtype)) for s, dtype, _ in together], bar)
        for (storage, dtype, wanted), untyped in zip(together, read):
            given = self._dtype(dtype)
            placed = self.place.storage(untyped, locations[storage])
            flat = self.torch.empty(0, dtype=given, device=placed.device)
            made[storage] = flat.set_(placed, 0, (nbytes_of(storage) // given.itemsize,), (1,)).to(wanted)
        return made

    def _shared_plainly(
        self, numbers: Iterable[int], storages: Iterable[int], bar: Any
    ) -> tuple[dict[int, Any], dict[int, Any]]:
        """The same on the CPU and in this host's byte order: what thousands of small tensors go through."""
        torch, table = self.torch, self.table
        program, frombuffer, empty = table.program, torch.frombuffer, torch.empty
        tensors, all_dims, unpack = program.tensors, program.dims, ROW.unpack_from
        numbers, made = list(numbers), {}
        if not storages:
            made = dict(zip(numbers, self._read_small(numbers, whole=True)))
            numbers = [number for number, each in made.items() if each is None]
        rows = [(number, unpack(tensors, number * ROW_NBYTES)) for number in numbers]
        uses = collections.Counter(row[0] for _, row in rows)
        uses.update(storages)
        sizes = {storage: table.storage_nbytes(storage) for storage in uses}
        buffers = dict(zip(uses, self._buffers(((storage, 0, nbytes) for storage, nbytes in sizes.items()), bar=bar)))
        whole: dict[int, Any] = {}

        def base(storage: int) -> Any:
            made = whole.get(storage)
            if made is None:
                buffer = buffers[storage]
                if buffer is None:
                    made = torch.UntypedStorage(0, device="cpu")
                else:
                    made = frombuffer(buffer, dtype=torch.uint8).untyped_storage()
                whole[storage] = made
            return made

        for storage in storages:
            base(storage)
        for number, row in rows:
            storage, dtype, itemsize, offset, dims, ndim, flags, _, extent = row
            middle = dims + ndim
            shape, strides = all_dims[dims:middle].tolist(), all_dims[middle : middle + ndim].tolist()
            if uses[storage] == 1 and not offset and 0 < extent * itemsize == sizes[storage]:
                tensor = frombuffer(buffers[storage], dtype=self._dtype(dtype)).as_strided_(shape, strides)
            else:
                tensor = empty(0, dtype=self._dtype(dtype), device="cpu").set_(base(storage), offset, shape, strides)
            made[number] = self._finish(tensor, Row(*row)) if flags else tensor
        return made, whole

    def _read_whole(self, storages: Iterable[int], units: dict[int, set[int]], bar: Any) -> dict[int, Any]:
        wanted = list(dict.fromkeys(storages))
        if self._cache is not None:
            return {storage: self._cached_storage(storage) for storage in wanted}
        table = self.table
        extents = [(s, 0, table.storage_nbytes(s), max(units.get(s) or {self.table.own_unit(s)})) for s in wanted]
        read = self._storages(extents, bar)
        locations = table.program.locations
        return {s: self.place.storage(made, locations[s]) for s, made in zip(wanted, read)}

    # ---------------------------------------------------------------- values that are no tensors
    def special(self, meaning: int, name: str, args: Sequence[Any], state: Any) -> Any:
        return special_value(self.torch, meaning, name, args, state)


def special_value(torch: Any, meaning: int, name: str, args: Sequence[Any], state: Any) -> Any:
    if meaning >= Meaning.NUMPY_ARRAY:
        return array_value(meaning, args, state)
    if meaning == Meaning.DTYPE or meaning == Meaning.QSCHEME or meaning == Meaning.MEMORY_FORMAT:
        return getattr(torch, name.removeprefix("torch."), NOT_PLAIN) if not args else NOT_PLAIN
    if meaning == Meaning.SIZE and len(args) == 1 and isinstance(args[0], (tuple, list)):
        return torch.Size(args[0]) if all(type(n) is int and -1 << 63 <= n < 1 << 63 for n in args[0]) else NOT_PLAIN
    if meaning == Meaning.DEVICE and 1 <= len(args) <= 2 and type(args[0]) is str:
        if any(type(index) is not int or not 0 <= index < 128 for index in args[1:]):  # torch keeps it in 8 bits
            return NOT_PLAIN
        try:
            return torch.device(*args)
        except RuntimeError:  # a device type that this torch does not know
            return NOT_PLAIN
    if meaning == Meaning.LAYOUT and len(args) == 1 and type(args[0]) is str:
        made = getattr(torch, args[0].removeprefix("torch."), None) if args[0] in _LAYOUTS else None
        return NOT_PLAIN if made is None else made
    if meaning == Meaning.TYPED and len(args) == 3:  # a node of its own kind: tensor, class, state
        return _with_attributes(torch, args[0], args[2])
    if meaning in (Meaning.PARAMETER, Meaning.PARAMETER_WITH_STATE):
        stateful = meaning == Meaning.PARAMETER_WITH_STATE
        if len(args) == 3 + stateful and isinstance(args[0], torch.Tensor) and type(args[1]) is bool:
            _check_grad(args[0], args[1])
            made = torch.nn.Parameter(args[0].detach(), args[1])
            made.__dict__.update(args[0].__dict__)
            return _with_attributes(torch, made, args[3] if stateful else None)
    return NOT_PLAIN


def _channels(sizes: tuple[int, ...], axis: int, wanted: Any) -> dict[str, Any]:
    """The fields of a Composite that say which channels a basic index leaves, and along which dimension."""
    cut, flips = index(Geometry(0, sizes, tuple(int(dim == axis) for dim in range(len(sizes)))), wanted)
    kept = [dim for dim, stride in enumerate(cut.strides) if stride]
    if not kept:
        return {"axis": None, "channels": [cut.storage_offset]}
    (dim,) = kept
    channels = range(cut.storage_offset, cut.storage_offset + cut.sizes[dim] * cut.strides[dim], cut.strides[dim])
    return {"axis": dim, "channels": channels[::-1] if dim in flips else channels}


def _is_laid_out(geometry: Geometry, out: Any) -> bool:
    """Whether elements of a storage and of a tensor of the same sizes fill their memory in the same order."""
    if hull(geometry) != out.numel() or may_overlap(geometry.sizes, geometry.strides):
        return False  # with gaps, which are somebody else's memory
    in_a_row = is_contiguous(geometry.sizes, geometry.strides) and out.is_contiguous()
    return bool(in_a_row or geometry.strides == out.stride())


def has_memory(torch: Any, target: Any) -> bool:
    """False as FSDP leaves parameters whose memory it has given back: torch would write to it all the same."""
    if type(target) not in (torch.Tensor, torch.nn.Parameter) or target.layout is not torch.strided:
        return True
    extent = hull(Geometry(0, tuple(target.shape), target.stride()))
    needed = (target.storage_offset() + extent) * target.itemsize if extent else 0
    return bool(target.untyped_storage().nbytes() >= needed)


def torch_dtype(torch: Any, given: Any) -> Any:
    """A dtype that was asked for, maybe by its name. Raises: TypeError, ValueError."""
    check_dtype(given)
    return getattr(torch, DTYPES[floating_index(given)].name) if isinstance(given, str) else given


def bump(torch: Any, target: Any) -> None:
    """Let autograd know that a tensor was written to."""
    if not target.is_inference():
        torch.autograd.graph.increment_version(target)


def _check_grad(made: Any, wanted: bool) -> None:
    if wanted and not (made.is_floating_point() or made.is_complex()):
        raise TableError(NO_GRAD)


_LAYOUTS = {"torch." + name for name in (
    "strided", "sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc", "jagged", "_mkldnn"
)}  # fmt: skip


def _with_attributes(torch: Any, made: Any, state: Any) -> Any:
    """Give a tensor the Python attributes that the file has for it, except those that would hide torch's own."""
    parts = state if type(state) is tuple and len(state) == 2 else (state,)
    for part in parts:
        if isinstance(part, dict):
            for name, value in part.items():
                if type(name) is str and not hasattr(torch.Tensor, name):
                    made.__dict__[name] = value
    return made


class _Place:
    """map_location and dtype: where tensors go, and as what."""

    def __init__(self, torch: Any, options: ReadOptions) -> None:
        self.torch = torch
        where = options.map_location
        self._call: Callable[[Any, str], Any] | None = None
        self._table: dict[str, Any] | None = None
        self.device: Any = None
        if where is None or (isinstance(where, str) and where == "cpu"):
            pass
        elif isinstance(where, (str, torch.device, int)):
            device = torch.device(where)
            self.device = None if device.type == "cpu" else device
        elif isinstance(where, dict):
            self._table = where
        else:
            self._call = where
        self.is_call = self._call is not None
        self.is_meta = self.device is not None and self.device.type == "meta"
        self.dtype = torch_dtype(torch, options.dtype)
        self.special = bool(self.device or self._call or self._table or self.dtype)

    def where(self, location: str) -> Any:
        """The device for what was saved on one; None for the CPU. Not for callables, which say it of a storage."""
        device = self.device
        if self._table is not None:
            device = self.torch.device(self._table.get(location, "cpu"))
        return None if device is None or device.type == "cpu" else device

    def storage(self, untyped: Any, location: str) -> Any:
        """A CPU storage -> where it belongs. A location without an entry stays on the CPU."""
        if self._call is not None:
            made = self._call(untyped, location)
            return untyped if made is None else getattr(made, "_untyped_storage", made)
        device = self.where(location)
        if device is None:
            return untyped
        if device.type == "meta":
            return self.torch.UntypedStorage(untyped.nbytes(), device="meta")
        # Not untyped.to(device), which is Python of torch's own, several calls deep.
        flat = self.torch.empty(0, dtype=self.torch.uint8, device="cpu").set_(untyped, 0, (untyped.nbytes(),), (1,))
        return flat.to(device).untyped_storage()

    def tensor(self, made: Any, location: str) -> Any:
        """The same for a slice, whose storage is its own."""
        untyped = made.untyped_storage()
        placed = self.storage(untyped, location)
        if placed is untyped:
            return made
        if placed.device.type == "meta":
            return self.torch.empty_strided(made.size(), made.stride(), dtype=made.dtype, device="meta")
        empty = self.torch.empty(0, dtype=made.dtype, device=placed.device)
        return empty.set_(placed, made.storage_offset(), made.size(), made.stride())

    def named(self, made: Any, location: str | None, *, is_cpu: bool) -> Any:
        """A tensor of a device whose storages torch does not save, which stands on the CPU."""
        device = self.device if is_cpu else None
        if self._table is not None:
            device = self._table.get(location or "")
        return made if device is None else made.to(device)

    def cast(self, made: Any) -> Any:
        """To the dtype that was asked for. Elements that many indices share, as expanded ones, are cast once."""
        if self.dtype is None or not made.dtype.is_floating_point:
            return made
        extent = hull(Geometry(0, made.size(), made.stride()))
        if made.numel() <= extent or self.is_meta:
            return made.to(self.dtype)
        flat = made.as_strided((extent,), (1,), made.storage_offset()).to(self.dtype)
        return flat.as_strided(made.size(), made.stride(), 0)
