"""TensorTable: the tensors of a program as rows, with their facts and their names.

A row is one dense part: storage, dtype, storage_offset, shape, strides. A value of the program is a tensor if it is such
a row, or a wrapper of one that we know (a Parameter, a tensor with attributes). Nothing here reads a tensor's bytes.
"""

from __future__ import annotations

import itertools
import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

from .archive import STORED, Archive
from .arrays import array_dtype
from .backend import DIFFERENTIABLE, FIRST_NODE_KIND, STORAGE_FIELDS, TENSOR_FIELDS, UNTYPED, Entry, Kind, StorageField
from .composites import NESTED, Composite, Dense, Member, find, read
from .errors import ArchiveError, TableError
from .plan import Geometry, hull, is_contiguous, numel
from .policy import COMPOSITES, DTYPES, LEVELS, NOT_PLAIN, Dtype, Meaning
from .program import ARGS, MISSING, STATE, Program

__all__ = ["Glance", "Leaf", "Row", "TensorInfo", "TensorTable", "dotted"]

ROW = struct.Struct(f"={TENSOR_FIELDS}q")
ROW_NBYTES = ROW.size
UINT8 = next(i for i, dtype in enumerate(DTYPES) if dtype.name == "uint8")
NAME_ROOM = 256  # characters of names for each value of the file; flat state dicts have two values a tensor
NO_GRAD = "a Parameter of this dtype cannot require grad"
TOO_LONG = "the names of the tensors are far longer than the file: long keys are nested over and over"

Step = tuple[str, Any]  # ("key", k), ("index", i), ("attribute", name) or ("part", name)


class Row(NamedTuple):
    """One dense tensor of the file; see backend.TensorField."""

    storage: int
    dtype: int
    itemsize: int
    storage_offset: int  # elements
    dims: int
    ndim: int
    flags: int
    offset: int
    extent: int  # elements from the first to the last one

    @property
    def requires_grad(self) -> bool:
        return bool(self.flags & 1)

    @property
    def conj(self) -> bool:
        return bool(self.flags & 2)

    @property
    def neg(self) -> bool:
        return bool(self.flags & 4)


class Leaf(NamedTuple):
    """A value that is a tensor: its row, and what is wrapped around it."""

    number: int  # of the row
    parameter: bool  # torch.nn.Parameter
    requires_grad: bool
    attributes: int | None  # the position of the state with its Python attributes
    cls: str | None  # "module.name" of a class of its own
    composite: int | None = None  # the node of its call where it is no row, and `number` is -1; see composites.py


class TensorInfo:
    """What the file says of one tensor. Nothing is read, and torch is not imported, unless `.dtype` is asked for.

    Attributes:
        dtype_name: "float32".
        shape: of ints.
        strides: in elements.
        storage_offset: in elements, within its storage.
        numel: elements.
        nbytes: numel times the element size.
        itemsize: bytes of one element.
        storage_key: of the record that holds the storage: "0" for data/0. Equal keys share memory.
        storage_nbytes: bytes of the whole storage.
        layout: "strided", "sparse_coo" and so on as torch has it, or "nested". Size -1 is that of a ragged dimension.
        parts: of a sparse, quantized or nested tensor, the facts of the dense tensors that it consists of, by name.
            nbytes is then the sum of theirs; storage_key and storage_nbytes are those of a quantized tensor's int_repr,
            and of the others "" and a sum.
        location: the device it was saved from, "cuda:0"; it is read to the CPU unless map_location says otherwise.
        requires_grad, is_parameter, is_contiguous, is_conj, is_neg: as torch has them.
        class_name: "module.name" of the tensor's own class, or None.
        framework: "pt" or "np", as the file was opened: whose `.dtype` is.
    """

    __slots__ = (
        "class_name",
        "dtype_name",
        "framework",
        "is_conj",
        "is_contiguous",
        "is_neg",
        "is_parameter",
        "itemsize",
        "layout",
        "location",
        "nbytes",
        "numel",
        "parts",
        "requires_grad",
        "shape",
        "storage_key",
        "storage_nbytes",
        "storage_offset",
        "strides",
    )  # fmt: skip

    dtype_name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    storage_offset: int
    numel: int
    nbytes: int
    itemsize: int
    storage_key: str
    storage_nbytes: int
    location: str
    requires_grad: bool
    is_parameter: bool
    is_contiguous: bool
    is_conj: bool
    is_neg: bool
    class_name: str | None
    layout: str
    parts: dict[str, TensorInfo]
    framework: str

    def __init__(
        self, *, dtype_name: str, shape: tuple[int, ...], strides: tuple[int, ...], storage_offset: int,
        numel: int, nbytes: int, itemsize: int, storage_key: str, storage_nbytes: int, location: str,
        requires_grad: bool, is_parameter: bool, is_contiguous: bool, is_conj: bool, is_neg: bool,
        class_name: str | None, layout: str = "strided",
        parts: dict[str, TensorInfo] | None = None, framework: str = "pt",
    ) -> None:  # fmt: skip
        self.dtype_name, self.shape, self.strides, self.storage_offset = dtype_name, shape, strides, storage_offset
        self.numel, self.nbytes, self.itemsize = numel, nbytes, itemsize
        self.storage_key, self.storage_nbytes, self.location = storage_key, storage_nbytes, location
        self.requires_grad, self.is_parameter, self.is_contiguous = requires_grad, is_parameter, is_contiguous
        self.is_conj, self.is_neg, self.class_name, self.layout = is_conj, is_neg, class_name, layout
        self.parts, self.framework = {} if parts is None else parts, framework

    @property
    def dtype(self) -> Any:
        """The torch.dtype, which imports torch; with framework="np" the dtype of the array."""
        if self.framework == "np":
            return array_dtype(self.dtype_name)
        import torch

        return getattr(torch, self.dtype_name)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """The shape, or one dimension of it; as Tensor.size()."""
        return self.shape if dim is None else self.shape[dim]

    def stride(self, dim: int | None = None) -> Any:
        """The strides, or one of them; as Tensor.stride()."""
        return self.strides if dim is None else self.strides[dim]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorInfo):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self.__slots__)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        extra = [name for name in ("requires_grad", "is_parameter", "is_conj", "is_neg") if getattr(self, name)]
        if self.layout != "strided":
            extra.append(f"layout={self.layout}")
        elif not self.is_contiguous:
            extra.append(f"strides={self.strides}")
        extra += [] if self.location == "cpu" else [f"location={self.location!r}"]
        return f"TensorInfo({self.dtype_name}, {list(self.shape)}{''.join(', ' + e for e in extra)})"


class Glance(NamedTuple):
    """What a list shows of a tensor: less than a TensorInfo, in a quarter of the time."""

    dtype_name: str
    shape: tuple[int, ...]
    nbytes: int
    storage: int  # its number, by which tensors of one file are known to share memory; -1 where it has several, or none


class TensorTable:
    """Rows and names over one program of one archive.

    Safe for concurrent use: what is filled in on touch is the same whoever does it.
    """

    def __init__(
        self, program: Program, archive: Archive, swapped: bool, folder: str = "data", suffix: str = ""
    ) -> None:
        self.program = program
        self.archive = archive
        self.swapped = swapped  # the file's byte order is not this host's
        self.folder = folder  # of the records that hold the storages: that of X.pkl is X
        self.suffix = suffix  # of their names, after the key
        self._records: list[int] | None = None
        self._is_asked = False  # for the record of a storage
        self._composites: dict[int, Composite] = {}
        self._leaves: dict[int, Leaf | None] = {}  # of composites, by node
        # For each storage: its record if that is known to be whole and to hold the bytes as they are, else -1.
        self.direct = array("q", [-1]) * program.storage_count
        self.framework = "pt"  # what `TensorInfo.dtype` is of; the View says so

    def row(self, number: int) -> Row:
        return Row(*ROW.unpack_from(self.program.tensors, number * ROW_NBYTES))

    def dtype(self, index: int) -> Dtype:
        return DTYPES[UINT8 if index == UNTYPED else index]

    def geometry(self, row: Row) -> Geometry:
        middle = row.dims + row.ndim
        dims = self.program.dims
        return Geometry(
            row.storage_offset,
            tuple(dims[row.dims : middle].tolist()),
            tuple(dims[middle : middle + row.ndim].tolist()),
        )

    def storage_nbytes(self, storage: int) -> int:
        return self.program.storages[storage * STORAGE_FIELDS + StorageField.NBYTES]

    def storage_dtype(self, storage: int) -> int:
        return self.program.storages[storage * STORAGE_FIELDS + StorageField.DTYPE]

    def unit(self, dtype: int) -> int:
        """How many bytes are turned round together, so that elements of a dtype are as this host has them."""
        return self.dtype(dtype).unit if self.swapped else 1

    def own_unit(self, storage: int) -> int:
        """The same for a storage without tensors: that of its class. Untyped bytes stay as they are."""
        dtype = self.storage_dtype(storage)
        return self.unit(dtype) if dtype < len(DTYPES) else 1

    def units(self, storage: int) -> set[int]:
        """Those of the tensors on a storage. If they are several, it has no whole form that is right for all."""
        if not self.swapped:
            return {1}
        rows = map(self.row, range(self.program.tensor_count))
        return {self.unit(row.dtype) for row in rows if row.storage == storage}

    def dtypes(self, storage: int) -> set[int]:
        """Those of the tensors on a storage."""
        rows = map(self.row, range(self.program.tensor_count))
        return {row.dtype for row in rows if row.storage == storage}

    def whole_unit(self, storage: int) -> int:
        """The unit by which a whole storage is byte-swapped: that of the tensors on it."""
        return max(self.units(storage), default=self.own_unit(storage))

    def record_number(self, storage: int) -> int:
        """The record of a storage, -1 if there is none. The first is looked up alone, with the second all are."""
        if self._records is None:
            keys, ends = self.program.storage_keys()
            if not self._is_asked:
                self._is_asked = True
                start = ends[storage - 1] if storage else 0
                return self._find_records(keys[start : ends[storage]], [ends[storage] - start], [storage])[0]
            self._records = self._find_records(keys, ends, range(len(ends)))
        return self._records[storage]

    def _find_records(self, keys: bytes, ends: Sequence[int], storages: Sequence[int]) -> list[int]:
        if self.suffix:
            names = [keys[start:end] + self.suffix.encode() for start, end in zip([0, *ends], ends)]
            keys, ends = b"".join(names), list(itertools.accumulate(map(len, names)))
        records = self.archive.find_in(f"{self.folder}/", keys, ends)
        if not self.swapped:
            # Those that need no second look: stored, and of just the size that the program says.
            wants = self.program.storages[StorageField.NBYTES :: STORAGE_FIELDS]
            has, methods = self.archive.column(Entry.NBYTES), self.archive.column(Entry.METHOD)
            for storage, record in zip(storages, records):
                if record >= 0 and has[record] == wants[storage] and methods[record] == STORED:
                    self.direct[storage] = record  # in place: a reader holds it
        return records

    def find_records(self) -> None:
        """Find those of all storages, which fills `direct`."""
        while self._records is None and self.program.storage_count:
            self.record_number(0)

    def record(self, storage: int) -> int:
        """The record of a storage, found and measured.

        Raises:
            ArchiveError: there is none.
            TableError: it has fewer bytes than the storage, or a whole element more.
        """
        archive, record = self.archive, self.record_number(storage)
        if record < 0:
            root = archive.root.decode("utf-8", "backslashreplace")
            name = f"{root}{self.folder}/{self.program.storage_key(storage)}{self.suffix}"
            raise ArchiveError("the archive has no such record", record=name, path=archive.source.path)
        has, wants = archive.field(record, Entry.NBYTES), self.storage_nbytes(storage)
        if has != wants and not 0 < has - wants < self.dtype(self.storage_dtype(storage)).itemsize:
            raise TableError(
                f"the record has {has} bytes, its storage {wants}",
                record=archive.name(record),
                path=archive.source.path,
            )
        if not self.swapped and archive.is_stored(record):
            self.direct[storage] = record
        return record

    def leaf(self, position: int) -> Leaf | None:
        """The tensor that a value is, or None."""
        program = self.program
        kind, payload = program.kinds[position], program.payloads[position]
        if kind == Kind.TENSOR:
            return Leaf(payload, False, self.row(payload).requires_grad, None, None)
        if kind == Kind.TYPED:
            start, _ = program.span(payload)
            number = program.payloads[start]
            return Leaf(number, False, self.row(number).requires_grad, start + 2, self._class_name(start + 1))
        if kind != Kind.CALL:
            return None
        meaning = program.meaning(payload)
        if meaning in (Meaning.PARAMETER, Meaning.PARAMETER_WITH_STATE):
            return self._parameter(payload)
        if meaning in COMPOSITES or meaning == Meaning.TYPED:
            return self._composite(payload, meaning)
        return None

    def _composite(self, node: int, meaning: int) -> Leaf | None:
        """A call of composites.py, by itself or with a class and attributes; what it says is checked by whoever asks."""
        found = self._leaves.get(node, MISSING)
        if found is MISSING:
            found = None
            if find(self.program, node) is not None:
                found = Leaf(-1, False, False, None, None, node)
                if meaning == Meaning.TYPED:
                    start, _ = self.program.span(self.program.payloads[self.program.span(node)[0] + ARGS])
                    found = found._replace(attributes=start + 3, cls=self._class_name(start + 1))
            self._leaves[node] = found
        return cast("Leaf | None", found)

    def composite(self, node: int) -> Composite:
        """What such a call says. Raises: TableError, UnsupportedError."""
        made = self._composites.get(node)
        if made is None:
            made = self._composites[node] = read(self, node)
        return made

    def quantizers(self) -> Iterator[Row]:
        """The rows that are scales or zero points of a quantized tensor."""
        program = self.program
        for node in range(program.node_count):
            found = find(program, node) if program.meaning(node) in (Meaning.QUANTIZED, Meaning.TYPED) else None
            for name in ("scales", "zero_points"):
                if found is not None and name in found and program.kinds[found[name]] == Kind.TENSOR:
                    yield self.row(program.payloads[found[name]])

    def member(self, each: Member) -> tuple[Row, Geometry]:
        """A dense part of a composite."""
        if not isinstance(each, Dense):
            row = self.row(self.program.payloads[each])
            return row, self.geometry(row)
        itemsize, ndim = DTYPES[each.dtype].itemsize, len(each.geometry.sizes)
        start = each.geometry.storage_offset
        return Row(each.storage, each.dtype, itemsize, start, -1, ndim, 0, -1, hull(each.geometry)), each.geometry

    def _parameter(self, node: int) -> Leaf | None:
        """_rebuild_parameter(tensor, requires_grad, hooks), _rebuild_parameter_with_state(..., state)."""
        program = self.program
        start, end = program.span(program.payloads[program.span(node)[0] + ARGS])
        stateful = program.meaning(node) == Meaning.PARAMETER_WITH_STATE
        if end - start != 3 + stateful or program.kinds[start + 1] not in (Kind.TRUE, Kind.FALSE):
            raise TableError("a Parameter is rebuilt with wrong arguments", path=self.archive.source.path)
        # One step only, so that no chain of Parameters of Parameters is followed.
        inner = None
        if program.kinds[start] in (Kind.TENSOR, Kind.TYPED) or (
            program.kinds[start] == Kind.CALL
            and program.meaning(program.payloads[start]) in (*COMPOSITES, Meaning.TYPED)
        ):
            inner = self.leaf(start)
        if inner is None:
            return None
        grad = program.kinds[start + 1] == Kind.TRUE
        if inner.composite is not None:
            attributes = start + 3 if stateful else inner.attributes
            return inner._replace(parameter=True, requires_grad=grad, attributes=attributes)
        if grad and not self.dtype(self.row(inner.number).dtype).traits & DIFFERENTIABLE:
            raise TableError(NO_GRAD, path=self.archive.source.path)
        return Leaf(inner.number, True, grad, start + 3 if stateful else inner.attributes, inner.cls)

    def _class_name(self, position: int) -> str | None:
        if self.program.kinds[position] != Kind.GLOBAL:
            return None
        name = ".".join(self.program.globals[self.program.payloads[position]])
        return None if name in ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Buffer") else name

    def glance(self, position: int) -> Glance:
        """Of a value that is a tensor or a storage. Raises: as `info`."""
        program = self.program
        if program.kinds[position] == Kind.TENSOR:
            storage, index, itemsize, _, dims, ndim, *_ = ROW.unpack_from(
                program.tensors, program.payloads[position] * ROW_NBYTES
            )
            sizes = tuple(program.dims[dims : dims + ndim].tolist())
            return Glance(self.dtype(index).name, sizes, numel(sizes) * itemsize, storage)
        if program.kinds[position] == Kind.STORAGE:
            storage = program.payloads[position]
            nbytes = self.storage_nbytes(storage)
            return Glance("uint8", (nbytes,), nbytes, storage)
        leaf = self.leaf(position)
        assert leaf is not None
        info = self.info(leaf)
        storage = -1 if leaf.composite is not None else self.row(leaf.number).storage
        return Glance(info.dtype_name, info.shape, info.nbytes, storage)

    def info(self, leaf: Leaf) -> TensorInfo:
        if leaf.composite is not None:
            return self._composite_info(leaf, self.composite(leaf.composite))
        row = self.row(leaf.number)
        return self._row_info(row, self.geometry(row), leaf)

    def _composite_info(self, leaf: Leaf, composite: Composite) -> TensorInfo:
        sizes, strides, dtype = composite.sizes, composite.strides, DTYPES[composite.dtype]
        parts = {name: self.member_info(each) for name, each in composite.members.items()}
        main = parts.get("int_repr") or parts.pop("tensor", None)  # whose elements are those of the whole
        if main is not None and main.itemsize != dtype.itemsize:  # cast when it is read
            main = None
        count = parts["values"].numel if composite.layout == NESTED else numel(sizes)
        nbytes = sum(part.nbytes for part in parts.values()) if parts else count * dtype.itemsize
        if main is not None:
            storage_nbytes = main.storage_nbytes
        elif parts:
            storage_nbytes = sum(part.storage_nbytes for part in parts.values())
        else:
            storage_nbytes = hull(Geometry(0, sizes, strides)) * dtype.itemsize
        location = next((part.location for part in parts.values()), "cpu")
        return TensorInfo(
            dtype_name=dtype.name, shape=sizes, strides=strides, numel=count, nbytes=nbytes, itemsize=dtype.itemsize,
            storage_offset=composite.storage_offset if main is None or "int_repr" in parts else main.storage_offset,
            storage_key="" if main is None else main.storage_key, storage_nbytes=storage_nbytes,
            location=location if composite.location is None else composite.location,
            requires_grad=leaf.requires_grad if leaf.parameter else composite.requires_grad,
            is_parameter=leaf.parameter, is_contiguous=composite.layout == "strided" and is_contiguous(sizes, strides),
            is_conj=False, is_neg=False, class_name=leaf.cls, layout=composite.layout, parts=parts,
            framework=self.framework,
        )  # fmt: skip

    def member_info(self, member: Member) -> TensorInfo:
        row, geometry = self.member(member)
        return self._row_info(row, geometry, Leaf(-1, False, row.requires_grad, None, None))

    def _row_info(self, row: Row, geometry: Geometry, leaf: Leaf) -> TensorInfo:
        dtype = self.dtype(row.dtype)
        count = numel(geometry.sizes)
        return TensorInfo(
            dtype_name=dtype.name,
            shape=geometry.sizes,
            strides=geometry.strides,
            storage_offset=geometry.storage_offset,
            numel=count,
            nbytes=count * dtype.itemsize,
            itemsize=dtype.itemsize,
            storage_key=self.program.storage_key(row.storage),
            storage_nbytes=self.storage_nbytes(row.storage),
            location=self.program.locations[row.storage],
            requires_grad=leaf.requires_grad,
            is_parameter=leaf.parameter,
            is_contiguous=is_contiguous(geometry.sizes, geometry.strides),
            is_conj=row.conj,
            is_neg=row.neg,
            class_name=leaf.cls,
            framework=self.framework,
        )

    def storage_info(self, storage: int) -> TensorInfo:
        """A storage that stands as a value, as the one-dimensional tensor of its bytes."""
        nbytes = self.storage_nbytes(storage)
        return TensorInfo(
            dtype_name="uint8", shape=(nbytes,), strides=(1,), storage_offset=0, numel=nbytes, nbytes=nbytes, itemsize=1,
            storage_key=self.program.storage_key(storage), storage_nbytes=nbytes, location=self.program.locations[storage],
            requires_grad=False, is_parameter=False, is_contiguous=True, is_conj=False, is_neg=False, class_name=None,
            framework=self.framework,
        )  # fmt: skip

    def file_offset(self, position: int) -> int:
        """Where a tensor's or storage's bytes lie, as well as the directory tells; to sort by."""
        program = self.program
        if program.kinds[position] == Kind.STORAGE:
            storage, start = program.payloads[position], 0
        else:
            leaf = self.leaf(position)
            assert leaf is not None
            if leaf.composite is not None:
                members = self.composite(leaf.composite).members.values()
                return min((self._offset_of(self.member(each)[0]) for each in members), default=-1)
            return self._offset_of(self.row(leaf.number))
        return self._record_offset(storage, start)

    def _offset_of(self, row: Row) -> int:
        return self._record_offset(row.storage, row.storage_offset * row.itemsize)

    def _record_offset(self, storage: int, start: int) -> int:
        record = self.record_number(storage)
        return -1 if record < 0 else self.archive.field(record, Entry.HEADER_OFFSET) + start

    def tensors(self, root: int) -> dict[str, int]:
        """Every tensor and storage at and below a position, each container once: dotted name -> position."""
        return self._flat(root) or _named(self._walk(root, self.is_tensor, self.program.with_tensors()))

    def _flat(self, root: int) -> dict[str, int]:
        """The same of a state dict that has nothing but tensors, which are called by its keys; nothing for any other value."""
        program = self.program
        if program.kinds[root] != Kind.DICT and program.kinds[root] != Kind.ORDERED_DICT:
            return {}
        pairs = program.pairs(program.payloads[root])
        keys, values = (program.kinds[pairs.start + i : pairs.stop + 1 : 2] for i in (0, 1))
        if keys.count(Kind.STR) != len(pairs) or values.count(Kind.TENSOR) != len(pairs):
            return {}
        names = program.keys(program.payloads[root], lambda *_: NOT_PLAIN)
        return dict(zip(names, range(pairs.start + 1, pairs.stop + 1, 2)))

    def strangers(self) -> dict[str, int]:
        """Every call or object that policy does not know: dotted name -> position."""
        kinds = self.program.kinds
        if kinds.find(Kind.CALL) < 0 and kinds.find(Kind.OBJECT) < 0:
            return {}
        return _named(self._walk(0, self._is_stranger, below=b"\1" * self.program.node_count))

    def is_tensor(self, position: int) -> bool:
        """Whether a value is a tensor or a storage."""
        kind = self.program.kinds[position]
        return kind in (Kind.TENSOR, Kind.STORAGE) or (kind >= FIRST_NODE_KIND and self.leaf(position) is not None)

    def _is_stranger(self, position: int) -> bool:
        program = self.program
        node = program.payloads[position]
        if program.kinds[position] not in (Kind.CALL, Kind.OBJECT):
            return False
        meaning = program.meaning(node)
        if meaning in COMPOSITES or meaning == Meaning.TYPED:
            return self.leaf(position) is None
        return meaning == Meaning.STRANGER and program.allowed(node) is MISSING

    def _walk(
        self, root: int, wanted: Callable[[int], bool], below: Sequence[int]
    ) -> Iterator[tuple[int, tuple[Step, ...]]]:
        """Wanted values, depth first, in file order, without recursion. Paths are linked, and spelled out for these only.

        `below`: for each node whether to go into it.

        Raises: TableError where the paths together are longer than an honest file's: one long key that every level of a
            nest repeats would otherwise fill the memory.
        """
        program = self.program
        seen: set[int] = set()
        room = name_room(program)
        todo: list[tuple[int, Any, int]] = [(root, None, 0)]
        while todo:
            position, path, size = todo.pop()
            if wanted(position):
                room -= size
                if room < 0:
                    raise TableError(TOO_LONG, path=self.archive.source.path)
                yield position, _spelled(path)
            if program.kinds[position] < FIRST_NODE_KIND:
                continue
            node = program.payloads[position]
            if node in seen or not below[node]:
                continue
            seen.add(node)
            for child, step in reversed(self._children(position, node)):
                if not _may_be_wanted(program.kinds[child]):
                    continue
                name = step[1]
                todo.append((child, (path, step), size + (len(name) if isinstance(name, (str, bytes)) else 1) + 1))

    def _children(self, position: int, node: int) -> list[tuple[int, Step]]:
        """The values under a node, with the step to each. What wraps a tensor's own bytes is no step."""
        program = self.program
        kind = program.kind(node)
        start, end = program.span(node)
        if kind in (Kind.DICT, Kind.ORDERED_DICT):
            return self._pairs(node, "key")
        if kind == Kind.TYPED:
            return self._attributes(start + 2)
        if kind not in (Kind.CALL, Kind.OBJECT):
            # Of a million Nones in a list nothing is made.
            kinds = program.kinds
            return [(p, ("index", p - start)) for p in range(start, end) if _may_be_wanted(kinds[p])]
        leaf = self.leaf(position)
        if leaf is not None:
            return [] if leaf.attributes is None else self._attributes(leaf.attributes)
        children: list[tuple[int, Step]] = []
        rebuilt = program.rebuilt(node)
        if rebuilt is not None:
            return self._rebuilt(node, rebuilt[0])
        arguments = range(*program.span(program.payloads[start + ARGS]))
        if program.meaning(node) in (Meaning.PARAMETER, Meaning.PARAMETER_WITH_STATE):
            # Of something that is no tensor here, as a wrapper subclass: its own names are those of its parts.
            children.append((arguments[0], ("part", ())))
            arguments = arguments[1:]
        for i, p in enumerate(arguments):
            # NEWOBJ's arguments are the items of a tuple subclass (a namedtuple): they keep their indexes.
            if kind == Kind.OBJECT:
                children.append((p, ("index", i)))
            else:
                children.append((p, ("part", ("args", i))))
        if program.kinds[start + STATE] != Kind.ABSENT:
            if program.meaning(node) == Meaning.PARTIAL:
                children += self._partial(start + STATE)
            else:
                children += self.attributes(node)
        children += [(p, ("index", i)) for i, p in enumerate(program.appended(node))]
        children += self._pairs(node, "key")
        return children

    def _pairs(self, node: int, kind: str) -> list[tuple[int, Step]]:
        """The values of a mapping node. Of equal keys the last value counts, as in the dict that Python would make."""
        named: dict[Any, tuple[int, Step]] = {}
        for p in self.program.pairs(node):
            key = self._key(p)
            # Text that stands for a key is not equal to a key that is this text.
            own = key if self.program.kinds[p] < FIRST_NODE_KIND else (key,)
            named[own] = p + 1, named[own][1] if own in named else (kind, key)
        return list(named.values())

    def attributes(self, node: int) -> list[tuple[int, Step]]:
        """The attributes of a CALL or OBJECT, and what of its state is none. One of two names wins as in a dict."""
        program = self.program
        rebuilt = program.rebuilt(node)
        if rebuilt is None:
            return self._attributes(program.span(node)[0] + STATE)
        arguments, state = rebuilt
        keywords = self.keywords(arguments)
        return [*([] if keywords is None else self._attributes(keywords)), *self._attributes(state)]

    def keywords(self, position: int) -> int | None:
        """Where the arguments of a tensor that is rebuilt are one dict, its position: they are as good as attributes."""
        program = self.program
        if program.kinds[position] != Kind.TUPLE:
            return None
        start, end = program.span(program.payloads[position])
        return start if end - start == 1 and program.kinds[start] in (Kind.DICT, Kind.ORDERED_DICT) else None

    def _rebuilt(self, node: int, arguments: int) -> list[tuple[int, Step]]:
        """The parts of a tensor of a class of its own. What it has by two names is listed by the first of them."""
        program = self.program
        children: list[tuple[int, Step]] = []
        if self.keywords(arguments) is None and program.kinds[arguments] == Kind.TUPLE:
            start, end = program.span(program.payloads[arguments])
            children += [(p, ("part", ("args", p - start))) for p in range(start, end)]
        met: set[tuple[int, int]] = set()
        for p, step in self.attributes(node):
            value = program.kinds[p], program.payloads[p]
            if value not in met:
                children.append((p, step))
            if value[0] >= FIRST_NODE_KIND or value[0] in (Kind.TENSOR, Kind.STORAGE):
                met.add(value)
        return children

    def _attributes(self, position: int) -> list[tuple[int, Step]]:
        """A state: a dict of attributes, (a dict or None, a dict of slots), or something of the class's own."""
        program = self.program
        kind, node = program.kinds[position], program.payloads[position]
        if kind in (Kind.DICT, Kind.ORDERED_DICT):
            return self._pairs(node, "attribute")
        if kind == Kind.TUPLE:
            start, end = program.span(node)
            parts = range(start, end)
            if len(parts) == 2 and all(program.kinds[p] in (Kind.NONE, Kind.DICT, Kind.ORDERED_DICT) for p in parts):
                return [child for p in parts for child in self._attributes(p)]
            return [(p, ("part", ("state", p - start))) for p in parts]
        return [(position, ("part", ("state",)))] if kind not in (Kind.NONE, Kind.ABSENT) else []

    def _partial(self, position: int) -> list[tuple[int, Step]]:
        """functools.partial has the state (func, args, kwargs, dict)."""
        program = self.program
        if program.kinds[position] != Kind.TUPLE:
            return self._attributes(position)
        children: list[tuple[int, Step]] = []
        for part, name in zip(range(*program.span(program.payloads[position])), ("func", "args", "keywords", "state")):
            if program.kinds[part] == Kind.TUPLE:
                start, end = program.span(program.payloads[part])
                children += [(p, ("part", (name, p - start))) for p in range(start, end)]
            else:
                children.append((part, ("part", (name,))))
        return children

    def _key(self, position: int) -> Any:
        """A dict key, as far as a name needs it."""
        kind = self.program.kinds[position]
        if kind < FIRST_NODE_KIND and kind not in (Kind.GLOBAL, Kind.STORAGE, Kind.TENSOR):
            return self.program.scalar(position)
        if kind == Kind.GLOBAL or (kind == Kind.TUPLE and self._is_short(position)):
            try:
                return str(self.program.build(position, lambda *_: None, lambda *_: NOT_PLAIN))
            except ValueError:  # Python does not print a range of integers of more than 4300 digits
                pass
        return f"<{position}>"

    def _is_short(self, position: int) -> bool:
        """Whether a tuple's text is no longer than a name should be."""
        program = self.program
        children = range(*program.span(program.payloads[position]))
        size = 0
        for p in children:
            if program.kinds[p] in (Kind.STR, Kind.BYTES):
                size += len(program.scalar(p))
        return size < 1000


def _may_be_wanted(kind: int) -> bool:
    """Whether a walk for tensors or placeholders looks at a value, or into it."""
    return kind >= FIRST_NODE_KIND or kind in (Kind.TENSOR, Kind.STORAGE)


def name_room(program: Program) -> int:
    """How many characters the paths of all tensors may have together."""
    return NAME_ROOM * (4096 + len(program.kinds))


def _named(found: Iterator[tuple[int, tuple[Step, ...]]]) -> dict[str, int]:
    """Positions by their dotted names.

    "a.b" beside a/b, 0 beside "0": the later one keeps its structural path, with its position where that is taken too.
    """
    names: dict[str, int] = {}
    for position, path in found:
        name = dotted(path)
        if name in names:
            name = structural(path)
        while name in names:
            name = f"{name}#{position}"
        names[name] = position
    return names


def _spelled(path: Any) -> tuple[Step, ...]:
    steps = []
    while path is not None:
        path, step = path
        steps.append(step)
    return tuple(reversed(steps))


def dotted(steps: tuple[Step, ...]) -> str:
    """A path through the structure -> the name it has in ckpt.tensors.

    Keys, indexes, attribute names and parts are joined by dots; the levels of a pickled nn.Module that its state_dict()
    does not name are left out, so that a whole model lists like one.
    """
    names: list[str] = []
    for kind, name in steps:
        if kind == "part":
            names += map(str, name if isinstance(name, tuple) else (name,))
        elif not (kind == "attribute" and name in LEVELS):
            names.append(str(name))
    return ".".join(names)


def structural(steps: tuple[Step, ...]) -> str:
    """The same path with nothing left out: "a/b" for keys and indexes, "@name" for attributes, "#name" for parts."""
    marks = {"key": "", "index": "", "attribute": "@", "part": "#"}
    spelled = []
    for kind, name in steps:
        if kind == "part" and isinstance(name, tuple):
            if not name:
                continue
            spelled.append("#" + "/".join(map(str, name)))
        else:
            spelled.append(f"{marks[kind]}{name}")
    return "/".join(spelled)
