"""DcpWriter: values in, a folder of torch.distributed.checkpoint out; the mirror of dcp.py.

Each tensor and each other value is an archive of its own, one after the other in .distcp files, and `.metadata`, which says
where they are, comes last: the folder holds what it held before until that file has taken its place. Then the files that
the old one named are deleted. Torch's own conversion has the whole checkpoint in memory; here it is a chunk.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

from .archive import Archive
from .archive_writer import ArchiveWriter
from .backend import Entry, Kind, choose
from .dcp_metadata import METADATA, MODULE, STORAGE_MODULE, Path, Window, read_folder
from .errors import TableError, ZipSlicerError
from .pickling import At, Kept, Pickler, Storages
from .policy import DTYPES, Description, Limits, Placeholder, dtype_named, is_floating
from .replacement import Output
from .state_dict import LazySequence, LazySlice, LazyStateDict, View
from .table import TOO_LONG
from .writer import Records, elements_of, finish, output_of, refuse_repeated

__all__ = ["Item", "items_of", "write_folder"]

VERSION = "1.0.0"  # of the metadata, as torch counts since 2.4: dicts are flattened, whatever is in them


class Item(NamedTuple):
    """A tensor or another value, and where it is in the structure.

    Attributes:
        name: the path with dots, by which torch.distributed.checkpoint knows it.
        path: keys, as text, and the indexes of lists.
        part: what reads it, if it is a dense tensor.
        value: what the Pickler takes, if it is not.
        dtype: an index into DTYPES, of the tensor as it is written.
    """

    name: str
    path: Path
    part: LazySlice | None
    value: Any
    dtype: int

    @property
    def nbytes(self) -> int:
        """Of the tensor, as it is written."""
        return 0 if self.part is None else self.part.info.numel * DTYPES[self.dtype].itemsize


def items_of(root: LazyStateDict, dtype: int | None) -> list[Item]:
    """What torch.distributed.checkpoint makes of nested dicts and lists. Dicts are taken apart, and lists that hold tensors
    or dicts; an empty dict, which torch drops, is kept as a value.

    Raises: ValueError: two values have one name, since keys become text.
    """
    found: dict[str, Item] = {}
    for path, container, position, value in _leaves(root):
        name = ".".join(map(str, path))
        if name in found:
            raise ValueError(f"two values are called {name!r}, where keys are joined by dots: rename one of them")
        view = root._view if position < 0 else container._view
        found[name] = _item(name, path, view, position, value, dtype)
    return list(found.values())


def _leaves(root: LazyStateDict) -> Iterator[tuple[Path, Any, int, Any]]:
    """(path, container, position in its view, or -1 for a value of the user's own, that value), in the order of the file.

    Raises: TableError: containers that are shared over and over would have far more names than the file has bytes.
    ValueError: one holds itself.
    """
    todo: list[tuple[Path, Any, int, Any]] = [((), None, -1, root)]
    above: list[int] = []  # ids of the containers that are gone through, by their depth
    room = root._view.name_room()
    while todo:
        path, container, position, value = todo.pop()
        room -= sum(len(step) if isinstance(step, str) else 1 for step in path)
        if room < 0:
            raise TableError(TOO_LONG, path=root.path)
        if position >= 0 and not container._view.is_tensor(position):
            value = container._view.touch(position)
        if path and not _is_taken_apart(value):
            yield path, container, position, value
            continue
        del above[len(path) :]
        if id(value) in above:
            raise ValueError(f"the value {'.'.join(map(str, path))!r} holds itself: a folder has no place for that")
        above.append(id(value))
        todo += reversed([((*path, step), value, *child) for step, *child in _children(value)])


def _children(container: Any) -> Iterator[tuple[str | int, int, Any]]:
    if isinstance(container, LazyStateDict):
        for key, position in container._slots.items():
            yield str(key), position, container._overlay[key] if position < 0 else None
    elif isinstance(container, LazySequence):
        yield from ((place, position, None) for place, position in enumerate(container._places))
    elif isinstance(container, Mapping):
        yield from ((str(key), -1, value) for key, value in container.items())
    else:
        yield from ((place, -1, value) for place, value in enumerate(container))


def _is_taken_apart(value: Any) -> bool:
    """As torch has it: a dict with something in it, and a list in which one or a tensor is, at any depth."""
    seen: set[int] = set()
    todo = [value]
    while todo:
        each = todo.pop()
        if isinstance(each, (LazyStateDict, Mapping)):
            if len(each):
                return True
        elif isinstance(each, LazySequence):
            return each._position is None or each._view.kinds[each._position] == Kind.LIST
        elif type(each) is list and id(each) not in seen:
            seen.add(id(each))
            if any(_is_tensor(one) for one in each):
                return True
            todo += each
    return False


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "untyped_storage")


def _item(name: str, path: Path, view: View, position: int, value: Any, wanted: int | None) -> Item:
    one = LazyStateDict._of(view, None, {name: position}, {} if position >= 0 else {name: value}, None)
    info = one.get_meta(name)
    is_dense = info is not None and info.layout == "strided" and not info.parts and info.location != "meta"
    if is_dense and position >= 0:
        at, place = view.at(position)
        is_dense = at.kinds[place] != Kind.STORAGE
        leaf = at.table.leaf(place) if is_dense else None
        if leaf is not None and leaf.composite is None and info is not None:
            refuse_repeated(info, at.table.row(leaf.number).extent, name, view.path)
    if not is_dense or info is None:
        return Item(name, path, None, value if position < 0 else At(view, position), -1)
    dtype = dtype_named(info.dtype_name)
    if wanted is not None and is_floating(dtype):
        dtype = wanted
    return Item(name, path, one.get_slice(name), None, dtype)


def write_folder(items: Sequence[Item], path: str, shards: Sequence[Sequence[Item]], bar: Any) -> list[str]:
    """Write a folder; -> its files, the metadata last. `shards` are the items of each .distcp file.

    Raises: OSError, and what reading raises. What the folder held before is then still there, and what was written is not.
    """
    old = _old_files(path)
    is_new = not os.path.isdir(path)
    if is_new:
        try:
            os.mkdir(path)
        except FileNotFoundError:
            raise FileNotFoundError(2, "there is no such folder", os.path.dirname(path) or ".") from None
    made: list[str] = []
    windows: dict[str, Window] = {}
    try:
        for shard in shards:
            file = next(name for name in _names() if not os.path.exists(os.path.join(path, name)))
            made.append(file)
            with output_of(os.path.join(path, file)) as output:
                for item in shard:
                    start = output.offset
                    _write(item, output, bar)
                    windows[item.name] = Window(file, start, output.offset - start)
                output.commit()
        with output_of(os.path.join(path, METADATA)) as output:
            output.write([_metadata(items, windows)])
            output.commit()
    except BaseException:
        for file in made:
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(path, file))
        if is_new:
            with contextlib.suppress(OSError):
                os.rmdir(path)
        raise
    for file in old:
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(path, file))
    return [os.path.join(path, file) for file in (*made, METADATA)]


def _names() -> Iterator[str]:
    """As torch calls the files of rank 0."""
    return (f"__0_{number}.distcp" for number in itertools.count())


def _old_files(path: str) -> set[str]:
    """What the metadata that is there now names: files that nothing will name any more."""
    try:
        folder = read_folder(os.path.join(path, METADATA), choose(), Limits())
    except (OSError, ZipSlicerError):
        return set()
    return {window.file for window in folder.windows if window.file.endswith(".distcp")}


def _write(item: Item, output: Output, bar: Any) -> None:
    """An archive of torch.save."""
    with contextlib.closing(ArchiveWriter(output, "archive")) as archive:
        records = Records(archive, False, bar)
        pickler = Pickler(records)
        try:
            if item.part is None:
                records.write(pickler, item.value)
            else:
                pickler.row(item.dtype, _elements(item, item.part, archive, records), item.part.shape)
        except ZipSlicerError as error:
            raise error.located(key=item.name) from None
        finish(archive, pickler)


def _elements(item: Item, part: LazySlice, archive: ArchiveWriter, records: Records) -> Kept:
    """The elements of a tensor, which torch wants in an archive by themselves."""
    found = _record(part, item.dtype)
    if found is None:
        return records.chunked(item.nbytes, elements_of(part, item.dtype))
    source, record = found
    offset, nbytes = source.extent(record)

    def rest(start: int, count: int) -> Iterator[memoryview]:
        del count  # it is all that is left
        return elements_of(part, item.dtype, start)

    archive.copy("data/0", source.source, offset, nbytes, source.field(record, Entry.CRC), rest)
    source.part(record, 0, 0)  # which raises ChangedError if the file was written to meanwhile
    records.done(nbytes)
    return Kept("0", 0, nbytes)


def _record(part: LazySlice, dtype: int) -> tuple[Archive, int] | None:
    """The record that is just the elements of a tensor, with a checksum, if there is one: the kernel copies it."""
    leaf, table = part._leaf, part._view.table if part._leaf is not None else None
    if leaf is None or table is None or leaf.composite is not None:
        return None
    row, info = table.row(leaf.number), part.info
    if row.conj or row.neg or not row.extent or not info.is_contiguous or dtype != row.dtype or table.swapped:
        return None
    archive, record = table.archive, table.record(row.storage)
    is_all = archive.field(record, Entry.NBYTES) == info.nbytes and not row.storage_offset
    is_copied = archive.has_checksums and archive.field(record, Entry.CRC) and archive.is_stored(record)
    return (archive, record) if is_all and is_copied else None


# ---------------------------------------------------------------- .metadata


def _metadata(items: Sequence[Item], windows: Mapping[str, Window]) -> bytes:
    """The pickle that torch.distributed.checkpoint reads; without a class of its own being there."""
    layout = _called("torch.serialization", "_get_layout", "torch.strided")
    memory_format = _called(MODULE, "_MEM_FORMAT_ENCODING", 0)
    dtypes = {
        item.dtype: Placeholder(Description("torch", DTYPES[item.dtype].name))
        for item in items
        if item.part is not None
    }
    facts: dict[str, Any] = {}
    places: list[tuple[Any, Any]] = []
    for item in items:
        if item.part is None:
            facts[item.name], starts = _object(MODULE, "BytesStorageMetadata", {}), None
        else:
            sizes = _size(item.part.shape)
            starts = _size([0] * len(item.part.shape))
            properties = (dtypes[item.dtype], layout, False, memory_format, False)
            facts[item.name] = _object(
                MODULE,
                "TensorStorageMetadata",
                {
                    "properties": _object(MODULE, "TensorProperties", properties),
                    "size": sizes,
                    "chunks": [_object(MODULE, "ChunkStorageMetadata", {"offsets": starts, "sizes": sizes})],
                },
            )
        index: dict[str, Any] = {"fqn": item.name, "index": None if starts is None else 0}
        if starts is not None:
            index["offset"] = starts
        file, offset, nbytes = windows[item.name]
        place = {"relative_path": file, "offset": offset, "length": nbytes}
        places.append((_object(MODULE, "MetadataIndex", index), _object(STORAGE_MODULE, "_StorageInfo", place)))
    storage = dict(places)
    whole = {
        "state_dict_metadata": facts,
        "planner_data": {item.name: item.path for item in items},
        "storage_data": storage,
        "storage_meta": None,
        "version": VERSION,
    }
    pickler = Pickler(cast("Storages", None))  # there are none
    pickler.write(_object(MODULE, "Metadata", whole))
    return pickler.finish()


def _object(module: str, name: str, state: Any) -> Placeholder:
    return Placeholder(Description(module, name, called=True, is_new=True, state=state))


def _called(module: str, name: str, *args: Any) -> Placeholder:
    return Placeholder(Description(module, name, called=True, args=args))


def _size(sizes: Sequence[int]) -> Placeholder:
    return _called("torch", "Size", tuple(sizes))
