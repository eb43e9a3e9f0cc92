"""Writer: values in, a file out that torch.load reads; the mirror of archive.py and program.py.

Tensors are written as they come, and the pickle that says what they are comes last, so that never more than a chunk of
them is held. What is in an open file goes from there to here without becoming a tensor: the kernel copies its bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import sys
import threading
import weakref
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .archive import Archive
from .archive_writer import ArchiveWriter
from .arrays import array_dtype
from .backend import Entry
from .checkpoint import Checkpoint
from .errors import UnsupportedError, ZipSlicerError
from .pickling import At, Kept, Pickler
from .plan import blocks, numel
from .policy import DTYPES, dtype_named, dtype_of, floating_index, is_floating
from .reader import below, default_threads
from .replacement import Output, Replacement
from .state_dict import LazySequence, LazySlice, LazyStateDict, View
from .stream import bar_of
from .table import Row, TensorInfo, TensorTable

__all__ = [
    "Group",
    "Records",
    "Writer",
    "cast_chunks",
    "elements_of",
    "finish",
    "is_code",
    "output_of",
    "refuse_repeated",
    "save",
    "views_of",
]

CHUNK_NBYTES = 16 << 20  # of a storage that are held at a time; a multiple of every itemsize
UNIT = 16  # bytes; of the largest element: parts of a storage are cut at multiples of it
SWAPPED = {2: "H", 4: "I", 8: "Q"}  # type codes of array.array for units of byte order
EXPANDED_NBYTES = 1 << 30  # of a tensor that repeats itself (stride 0): a few bytes in a file can stand for terabytes
VERSION = b"3\n"  # of the archive, as torch.save counts


def save(obj: Any, path: Any, *, dtype: Any = None, framework: str = "pt", progress: bool = False) -> None:
    """Write a file that torch.load reads; the one at `path` is replaced when the new one is whole and on the disk.

    What comes from zipslicer.load or open is written without being read: a LazyStateDict, selected, renamed, edited, or as
    it is; what is nested in it; a Checkpoint, as its root. Placeholders are written as their file has them, so that a
    checkpoint can be edited without the classes it names. Tensors share memory in the new file where they do in the old
    one, or in this process. Of a storage that a selection needs a part of, that part is written.

    Anything else is written as torch.save does it, objects of your own classes too.

    Args:
        obj: what to write.
        path: where to; or a binary file object, which is written to from its position on.
        dtype: a floating-point dtype, of torch or NumPy or by name: floating-point tensors of open files are cast to it, chunk
            by chunk; by default to the dtype that the file was opened with. Others, and those of this process, stay as they
            are.
        framework: "np" writes arrays of NumPy as tensors, as framework="np" reads them; else they stay arrays.
        progress: show a bar of bytes (needs tqdm).

    Raises:
        OSError: from the system. The old file is then still there, as after every other error.
        ValueError: two tensors see one memory as different dtypes, which this format cannot say; the name ends in
            ".safetensors", which is another; or `dtype` is given, and nothing is of an open file.
        TypeError, AttributeError: something cannot be pickled.
        UnsupportedError; and what reading raises, where `obj` is of an open file.
    """
    cast_to = None if dtype is None else floating_index(dtype)
    _refuse_name(path)
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(output_of(path))
        obj = _root(obj) if isinstance(obj, Checkpoint) else obj
        total = sum(last - first for first, last in _needed(obj).values()) if progress else 0
        bar = stack.enter_context(bar_of(progress, total))
        archive = stack.enter_context(contextlib.closing(ArchiveWriter(output, _root_of(path))))
        records = Records(archive, _is_numpy(framework, obj), bar, cast_to)
        pickler = Pickler(records)
        records.write(pickler, obj)
        if cast_to is not None and records.are_all_live:
            raise ValueError(
                "dtype= casts tensors of open files, and these are all of this process: cast them with .to(dtype)"
            )
        finish(archive, pickler)
        output.commit()


def entry_of(values: LazyStateDict, key: Any) -> Any:
    """What the Pickler takes for a value of a mapping: its place in the file, or an object of the user's own."""
    position = values._slots[key]
    return values._overlay[key] if position < 0 else At(values._view, position)


class Group:
    """A mapping of a file that is being written: what is assigned to it is written at once, and not held.

    Tensors that share memory when they are assigned share it in the file, if their bytes are still those that were written.
    """

    def __init__(self, records: Records, pickler: Pickler, metadata: Any) -> None:
        self._records = records
        self._pickler = pickler
        self._keys: set[Any] = set()
        self._groups: list[Group] = []
        self._is_open = True
        pickler.open_dict(metadata)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Write a value. Raises: KeyError for a key that is there already; and as `save` does."""
        with self._adding(key):
            self._records.write(self._pickler, value)

    def update(self, values: Mapping[Any, Any]) -> None:
        """Write all items of a mapping. Those of a LazyStateDict go from file to file, as in `save`. Raises: as for one."""
        with self._writing():
            self._records.begin(values)
        for key in values:
            with self._adding(key):
                self._pickler.write(entry_of(values, key) if isinstance(values, LazyStateDict) else values[key])

    def write_chunks(self, key: Any, chunks: Iterable[Any], *, dtype: Any, shape: Sequence[int]) -> None:
        """Write a tensor that never exists whole.

        Args:
            key: its name.
            chunks: its elements in row-major order, as tensors of torch, arrays, or buffers of bytes. Each is written before
                the next is asked for, so that one buffer will do.
            dtype: a torch.dtype, a dtype of NumPy, or the name of one of torch's: "bfloat16".
            shape: of the whole.

        Raises: ValueError where they are not of this dtype, or more or fewer than the shape says; and as `save` does.
        """
        index, sizes = dtype_of(dtype), tuple(int(n) for n in shape)
        if any(n < 0 for n in sizes):
            raise ValueError(f"no tensor has the shape {sizes}")
        with self._adding(key):
            nbytes = numel(sizes) * DTYPES[index].itemsize
            kept = self._records.chunked(nbytes, (view for chunk in chunks for view in views_of(chunk, index)))
            self._pickler.row(index, kept, sizes)

    def group(self, key: Any, *, metadata: Any = None) -> Group:
        """A mapping in this one, open for as long as this is. `metadata` is that of a state dict, its `_metadata`."""
        with self._adding(key):
            made = Group(self._records, self._pickler.child(), metadata)
            self._groups.append(made)
            return made

    @contextlib.contextmanager
    def _adding(self, key: Any) -> Iterator[None]:
        if key in self._keys:
            raise KeyError(f"{key!r} is written already")
        with self._writing():
            self._keys.add(key)
            self._pickler.write(key)
            yield

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        records = self._records
        if not self._is_open or records.is_broken:
            raise ValueError("the file is finished, or was given up after an error")
        if not records.lock.acquire(blocking=False):
            raise ValueError(
                "another tensor is being written: by another thread, or it is its chunks that write this one"
            )
        try:
            yield
        except BaseException:
            records.is_broken = True  # half an item may be in the pickle, half a record in the archive
            raise
        finally:
            records.lock.release()

    def _close(self) -> None:
        self._is_open = False
        for group in self._groups:
            group._close()
        self._pickler.close_dict()


class Writer(Group):
    """Writes a checkpoint, key by key. ``with zipslicer.Writer(path) as w: w["name"] = tensor``.

    The file is a dict, or with `metadata` an OrderedDict with that as its `_metadata`, as state_dict() gives it. It appears
    at `path` when the block is left, whole and on the disk; if that is by an exception, nothing happens to `path`.

    Args:
        path, dtype, framework: as for `save`.
        metadata: see above.

    Raises: as `save` does.
    """

    def __init__(self, path: Any, *, dtype: Any = None, framework: str = "pt", metadata: Any = None) -> None:
        cast_to = None if dtype is None else floating_index(dtype)
        _refuse_name(path)
        self._resources = contextlib.ExitStack()
        self._output = self._resources.enter_context(output_of(path))
        try:
            self._archive = self._resources.enter_context(
                contextlib.closing(ArchiveWriter(self._output, _root_of(path)))
            )
            records = Records(self._archive, _is_numpy(framework), None, cast_to)
            super().__init__(records, Pickler(records), metadata)
        except BaseException:
            self._resources.close()
            raise

    def close(self) -> None:
        """Finish the file, and let it take its place. Raises: OSError; ValueError after an error in it."""
        if not self._is_open:
            return
        with self._resources:
            self._close()
            if self._records.is_broken:
                raise ValueError("the file was given up after an error")
            finish(self._archive, self._pickler)
            self._output.commit()

    def discard(self) -> None:
        """Give the file up: what is at its path stays."""
        self._is_open = False
        self._resources.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


class _Live(NamedTuple):
    """A storage of this process that was written."""

    storage: weakref.ref[Any]
    key: str
    location: str
    nbytes: int
    checksum: int
    turn: int  # of `write` in which it was


class _Filed(NamedTuple):
    """A storage of an open file that was written: its bytes [first, last)."""

    kept: Kept
    first: int
    last: int
    table: TensorTable  # by whose id it is known


class Records:
    """The storages of one file: pickling.Storages. `dtype`: what floating-point elements of open files are cast to."""

    def __init__(self, archive: ArchiveWriter, arrays: bool, bar: Any, dtype: int | None = None) -> None:
        self.is_broken = False
        self.lock = threading.Lock()
        self._archive = archive
        self._arrays = arrays
        self._bar = bar
        self._numbers = itertools.count()
        self._turn = 0
        self._live: dict[int, _Live] = {}
        self._dtype = dtype
        self._quantizers: dict[int, set[Row]] = {}  # rows that are not cast, by table
        self._filed: dict[tuple[int, int, int | None], _Filed] = {}
        self._needed: dict[tuple[int, int], tuple[int, int]] = {}  # of a table's storage: the bytes [first, last)
        self._buffer: memoryview | None = None

    @property
    def are_all_live(self) -> bool:
        """Whether there are storages, and all are of this process."""
        return bool(self._live) and not self._filed

    def begin(self, value: Any) -> None:
        """Look at what is written next, as one."""
        self._turn += 1
        self._needed = _needed(value)

    def write(self, pickler: Pickler, value: Any) -> None:
        """A value with all its storages."""
        value = _root(value) if isinstance(value, Checkpoint) else value
        self.begin(value)
        pickler.write(value)

    # ---------------------------------------------------------------- of this process
    def live(self, storage: Any) -> tuple[str, str]:
        """A torch.UntypedStorage. Raises: UnsupportedError for one without bytes."""
        found, nbytes = self._live.get(storage._cdata), storage.nbytes()
        is_known = found is not None and found.storage() is not None and found.nbytes == nbytes
        # Within one turn it cannot have changed; since then it may have been filled with the next tensor.
        if found and is_known and (found.turn == self._turn or self._checksum(storage) == found.checksum):
            return found.key, found.location
        key, location = str(next(self._numbers)), _location_of(storage)
        checksum = self._stream(key, nbytes, _memory_of(storage))
        self._live[storage._cdata] = _Live(weakref.ref(storage), key, location, nbytes, checksum, self._turn)
        return key, location

    def _checksum(self, storage: Any) -> int:
        checksum = 0
        for part in _memory_of(storage):
            checksum = zlib.crc32(part, checksum)
        return checksum

    def array(self, value: Any) -> Kept | None:
        """A NumPy array; one of this machine's byte order, and of a dtype that torch has."""
        if not self._arrays or not value.dtype.isnative:
            return None
        try:
            dtype = dtype_of(value.dtype)
        except ValueError:
            return None
        return self.chunked(value.nbytes, views_of(value, dtype))

    def chunked(self, nbytes: int, parts: Iterable[Any]) -> Kept:
        """A storage out of buffers."""
        key = str(next(self._numbers))
        self._stream(key, nbytes, parts)
        return Kept(key, 0, nbytes)

    def _stream(self, key: str, nbytes: int, parts: Iterable[Any]) -> int:
        return self._archive.stream(f"data/{key}", nbytes, self._watched(parts))

    def _watched(self, parts: Iterable[Any]) -> Iterator[Any]:
        for part in parts:
            yield part
            self.done(len(part))

    def done(self, nbytes: int) -> None:
        """So many bytes were written."""
        if self._bar is not None:
            self._bar.update(nbytes)

    # ---------------------------------------------------------------- of open files
    def filed(self, view: View, storage: int, start: int, nbytes: int, row: Row | None) -> Kept:
        table = view.table
        given, wanted = self._cast_of(view, row)
        place = id(table), storage, wanted
        known = self._filed.get(place)
        if known is not None and (not nbytes or (known.first <= start and start + nbytes <= known.last)):
            return known.kept
        whole = table.storage_nbytes(storage)
        first, last = self._needed.get((id(table), storage), (0, whole))
        if nbytes and (start < first or start + nbytes > last):  # needed by what is nested where nobody has looked
            first, last = 0, whole
        first -= first % UNIT
        last = min(whole, last + -last % UNIT)
        size = last - first
        if wanted is not None:
            size = size // DTYPES[given].itemsize * DTYPES[wanted].itemsize
        kept = Kept(str(next(self._numbers)), first, size, wanted)
        self._filed[place] = _Filed(kept, first, last, table)
        try:
            self._copy(view, storage, self._filed[place], given)
        except ZipSlicerError as error:
            raise error.located(path=view.path) from None
        return kept

    def _cast_of(self, view: View, row: Row | None) -> tuple[int, int | None]:
        """What the elements of a row are, and what they become: None where they stay as they are.

        Raises: UnsupportedError where one storage has tensors of several dtypes.
        """
        to = self._dtype
        if to is None and row is not None and view.options.dtype is not None:
            to = floating_index(view.options.dtype)  # what a touch gives, and so what is meant
        if to is None or row is None:
            return -1, None
        table, given = view.table, dtype_named(view.table.dtype(row.dtype).name)
        if given == to or not is_floating(given):
            return given, None
        if id(table) not in self._quantizers:
            self._quantizers[id(table)] = set(table.quantizers())
        if row in self._quantizers[id(table)]:
            return given, None
        if table.storage_dtype(row.storage) != given and table.dtypes(row.storage) != {given}:
            raise UnsupportedError("a storage has tensors of several dtypes, and cannot be cast")
        return given, to

    def _copy(self, view: View, storage: int, made: _Filed, given: int) -> None:
        """The bytes of a storage into its record."""
        archive, record, kept = view.table.archive, view.table.record(storage), made.kept
        is_as_it_is = not view.table.swapped and archive.is_stored(record) and kept.dtype is None
        checksum = archive.field(record, Entry.CRC) if archive.has_checksums else 0
        if not (is_as_it_is and checksum and kept.nbytes == archive.field(record, Entry.NBYTES)):
            parts: Iterable[Any] = self._read(view, storage, record, made.first, made.last)
            if kept.dtype is not None:
                parts = cast_chunks(parts, given, kept.dtype)
            self._stream(kept.key, kept.nbytes, parts)
            return
        offset, nbytes = archive.extent(record)

        def rest(start: int, count: int) -> Iterator[memoryview]:
            return self._read(view, storage, record, start, start + count)

        self._archive.copy(f"data/{kept.key}", archive.source, offset, nbytes, checksum, rest)
        archive.part(record, 0, 0)  # which raises ChangedError if the file was written to meanwhile
        self.done(nbytes)

    def _read(self, view: View, storage: int, record: int, first: int, last: int) -> Iterator[memoryview]:
        """Bytes of a storage by chunks, in this host's byte order. Each is used again for the next one."""
        table = view.table
        archive = table.archive
        unit = table.whole_unit(storage)
        if len(table.units(storage)) > 1:
            raise UnsupportedError("a storage of foreign byte order has tensors of several element sizes")
        inflated = None if archive.is_stored(record) else memoryview(archive.read(record))
        if self._buffer is None:
            self._buffer = memoryview(archive.backend.allocate(CHUNK_NBYTES)).cast("B")
        for start in range(first, last, CHUNK_NBYTES):
            count = min(CHUNK_NBYTES, last - start)
            chunk = self._buffer[:count]
            if inflated is None:
                archive.read_into((record, start, count, 0, 0), [chunk], view.options.threads or default_threads())
            else:
                chunk[:] = inflated[start : start + count]
            yield _swapped(chunk, unit) if unit > 1 else chunk


def cast_chunks(chunks: Iterable[Any], given: int, wanted: int) -> Iterator[memoryview]:
    """Elements of one dtype as those of another, both indexes into DTYPES; what is no whole element is left out.

    By torch, or by NumPy where that is not there. REQUIRES: the chunks are writable, and of whole elements but for the last.
    """
    source, target = DTYPES[given], DTYPES[wanted]
    try:
        import torch
    except ImportError:
        import numpy as np

        before, after = array_dtype(source.name), array_dtype(target.name)
        for chunk in chunks:
            whole = len(chunk) - len(chunk) % source.itemsize
            yield from views_of(np.frombuffer(chunk[:whole], before).astype(after), wanted)
        return
    for chunk in chunks:
        whole = len(chunk) - len(chunk) % source.itemsize
        if whole:
            flat = torch.frombuffer(chunk[:whole], dtype=getattr(torch, source.name))
            yield from views_of(flat.to(getattr(torch, target.name)), wanted)


def refuse_repeated(info: TensorInfo, extent: int, name: Any, path: str | None) -> None:
    """Raises: UnsupportedError: a tensor has few elements in its file, `extent`, and would have very many without strides."""
    if info.numel > extent and info.nbytes > EXPANDED_NBYTES:
        raise UnsupportedError(
            f"{info.nbytes} bytes would be written of a tensor that repeats {extent * info.itemsize} bytes over and over; "
            "keys= and key_map= leave it out",
            key=name,
            path=path,
        )


def elements_of(part: LazySlice, dtype: int, start: int = 0) -> Iterator[memoryview]:
    """The elements of a tensor in row-major order, a chunk at a time, cast to a dtype; from byte `start` on."""
    name = DTYPES[dtype].name
    for index in blocks(part.shape, part.info.itemsize, CHUNK_NBYTES):
        made = part[index]
        if part.info.framework == "np":
            views = views_of(made.astype(array_dtype(name), copy=False), dtype)
        else:
            views = views_of(made if str(made.dtype) == f"torch.{name}" else made.to(_torch_dtype(name)), dtype)
        for view in views:
            if start < len(view):
                yield view[start:]
            start = max(0, start - len(view))


def _torch_dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)


def finish(archive: ArchiveWriter, pickler: Pickler) -> None:
    """The records that are not storages."""
    archive.add("byteorder", sys.byteorder.encode())
    archive.add("version", VERSION)
    archive.add("data.pkl", pickler.finish())
    archive.finish()


def is_code(checkpoint: Checkpoint) -> bool:
    """Whether a file is code with its tensors: TorchScript, or a package."""
    for archive in checkpoint._view.archives():
        if type(archive) is Archive and max(archive.find(["constants.pkl", ".data/extern_modules"])) >= 0:
            return True
    return False


def _root(checkpoint: Checkpoint) -> Any:
    """The root of a file. Raises: UnsupportedError for a file that is more than what its root holds."""
    if is_code(checkpoint):
        raise UnsupportedError(
            "TorchScript and packages are code with tensors: save its .tensors", path=checkpoint.path
        )
    view = checkpoint._view
    return At(view, 0) if type(view) is View else checkpoint.root


@contextlib.contextmanager
def output_of(path: Any) -> Iterator[Output]:
    """Where a file goes; given up where it is left without commit()."""
    made = Output(path) if hasattr(path, "write") else Replacement(path)
    try:
        yield made
    finally:
        made.discard()


def _root_of(path: Any) -> str:
    """The folder of the records, as torch.save calls it: by the name of the file, if that is ASCII."""
    if hasattr(path, "write"):
        return "archive"
    name = os.path.basename(os.fspath(path).replace("\\", "/")).rpartition(".")
    root = name[0] if name[1] else name[2]
    return root if root and root.isascii() and root.isprintable() else "archive"


def _refuse_name(path: Any) -> None:
    """One that says safetensors: whoever reads it would believe that."""
    if isinstance(path, (str, os.PathLike)) and os.fspath(path).endswith(".safetensors"):
        raise ValueError(
            f"{os.fspath(path)!r} would be an archive of torch.save: zipslicer.convert writes safetensors files, out of what "
            "is in files, and safetensors.torch.save_file those of tensors in memory"
        )


def _is_numpy(framework: str, obj: Any = None) -> bool:
    if framework not in ("pt", "np"):
        raise ValueError(f'framework must be "pt" or "np", not {framework!r}')
    return framework == "np" or (isinstance(obj, (LazyStateDict, LazySequence)) and obj._view.framework == "np")


def views_of(chunk: Any, dtype: int) -> Iterator[memoryview]:
    """The bytes of a tensor, an array or a buffer, in row-major order. Raises: ValueError for another dtype."""
    if hasattr(chunk, "untyped_storage"):
        _check_dtype(str(chunk.dtype).removeprefix("torch."), dtype)
        flat = chunk.detach().resolve_conj().resolve_neg().contiguous()
        if flat.device.type != "cpu":
            flat = flat.cpu()
        nbytes = flat.numel() * flat.element_size()
        yield _memory(flat.data_ptr(), nbytes)
        return
    if type(chunk).__module__ == "numpy" or hasattr(chunk, "__array_interface__"):
        import numpy as np

        made = np.ascontiguousarray(chunk)
        _check_dtype(str(made.dtype), dtype)
        yield memoryview(made.reshape(-1).view(np.uint8).data) if made.size else memoryview(b"")
        return
    yield memoryview(chunk).cast("B") if len(chunk) else memoryview(b"")


def _check_dtype(name: str, wanted: int) -> None:
    if name != DTYPES[wanted].name:
        raise ValueError(f"a chunk is of dtype {name}, the tensor of {DTYPES[wanted].name}")


def _memory(address: int, nbytes: int) -> memoryview:
    """REQUIRES: what is there outlives the view."""
    return memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B") if nbytes else memoryview(b"")


def _memory_of(storage: Any) -> Iterator[memoryview]:
    """The bytes of a torch.UntypedStorage, by chunks where they are on another device."""
    nbytes = storage.nbytes()
    if not nbytes:
        return
    if storage.device.type == "cpu":
        yield _memory(storage.data_ptr(), nbytes)
        return
    if storage.device.type == "meta":
        raise UnsupportedError("a storage on the meta device has no bytes to save")
    torch = sys.modules["torch"]
    flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    for start in range(0, nbytes, CHUNK_NBYTES):
        part = flat[start : start + CHUNK_NBYTES].cpu()
        yield _memory(part.data_ptr(), part.numel())


def _location_of(storage: Any) -> str:
    """What torch.save calls the device: "cuda:0"."""
    return str(sys.modules["torch"].serialization.location_tag(storage))


def _swapped(chunk: memoryview, unit: int) -> memoryview:
    """The same elements in the other byte order; what is left of a storage after its last one stays."""
    whole = len(chunk) - len(chunk) % unit
    units = array(SWAPPED[unit])
    units.frombytes(chunk[:whole])
    units.byteswap()
    return memoryview(bytearray(units) + chunk[whole:])


# Of the storages of open files, by table and number: bytes [first, last).
Extents = dict[tuple[int, int], tuple[int, int]]


def _needed(value: Any) -> Extents:
    """What a value needs of the storages of open files: of those that a selection alone needs, a part."""
    found: Extents = {}
    whole: Extents = {}
    todo, seen = [value], set()
    while todo:
        each = todo.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, At):
            _note([each.view.at(each.position)], found, whole)
        elif isinstance(each, LazyStateDict):
            is_selected = each._position is None or each._is_edited
            places = [each._view.at(p) for p in each._filed()] if is_selected else [each._view.at(each._position or 0)]
            _note(places, found, None if is_selected else whole)
            todo += each._overlay.values()
        elif isinstance(each, LazySequence):
            _note([each._view.at(p) for p in each._places], found, whole)
        elif type(each) in (dict, list, tuple):
            todo += each.values() if isinstance(each, dict) else each
    return {**found, **whole}


def _note(places: Sequence[tuple[View, int]], found: Extents, whole: Extents | None) -> None:
    """What stands at some positions, and below: into `found`, or into `whole` where there is one."""
    by_view: dict[int, tuple[View, list[int]]] = {}
    for view, position in places:
        by_view.setdefault(id(view), (view, []))[1].append(position)
    for view, positions in by_view.values():
        table, empty = view.table, set[tuple[int, int]]()
        numbers, storages = below(table, positions, {})
        if whole is not None:
            for storage in (*storages, *(table.row(number).storage for number in numbers)):
                whole[id(table), storage] = 0, table.storage_nbytes(storage)
            continue
        for storage in storages:
            found[id(table), storage] = 0, table.storage_nbytes(storage)
        for number in numbers:
            row = table.row(number)
            place, start = (id(table), row.storage), row.storage_offset * row.itemsize
            end = start + row.extent * row.itemsize
            first, last = found.get(place, (start, end))
            if row.extent:
                found[place] = min(first, start), max(last, end)
            else:
                empty.add(place)
        for place in empty - found.keys():
            found[place] = 0, 0
