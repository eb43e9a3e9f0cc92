"""Conversion: any checkpoint in, and out a safetensors file, an archive of torch.save, several with an index, or a DCP folder.

One tensor after the other, and of that a chunk at a time. What has the same bytes in both files is copied by the kernel.
Each file appears when it is whole, an index when all its files have: who runs it again after a crash gets the same result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Union

from .archive import Archive
from .backend import Kind
from .checkpoint import Checkpoint
from .checkpoint import open as open_checkpoint
from .dcp_metadata import is_metadata
from .dcp_writer import Item, items_of, write_folder
from .errors import ArchiveError, UnsupportedError, ZipSlicerError
from .policy import DTYPES, dtype_named, floating_index, is_floating
from .reader import default_threads
from .replacement import Output
from .safetensors_file import PACKED
from .state_dict import LazySequence, LazySlice, LazyStateDict, Patterns
from .stream import bar_of
from .table import TensorInfo
from .writer import CHUNK_NBYTES, Writer, elements_of, is_code, output_of, refuse_repeated, save

__all__ = ["Converted", "convert"]

FORMATS = ("safetensors", "torch", "dcp")
KeyMap = Union[Callable[[str], Union[str, None]], Mapping[str, Union[str, None]]]

SAFETENSORS = ".safetensors"
HEADER_NBYTES = 100_000_000  # the safetensors package reads no longer one
UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
}


@dataclasses.dataclass
class Converted:
    """What convert() has done.

    Attributes:
        files: their paths; with several, the last is that of the index.
        tensors, nbytes: that were written.
        tied: names that safetensors files do not have, because another name has the same elements, to that name. It is
            also in the file's metadata, as safetensors.torch.save_model has it.
        untied: names of tensors that lie on memory of others in part, and are now by themselves.
        left_out: paths of values that are no tensors, which a safetensors file has no place for.
    """

    files: list[str] = dataclasses.field(default_factory=list)
    tensors: int = 0
    nbytes: int = 0
    tied: dict[str, str] = dataclasses.field(default_factory=dict)
    untied: list[str] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)


def convert(
    src: Any,
    dst: str | os.PathLike[str],
    *,
    dtype: Any = None,
    keys: Patterns | None = None,
    key_map: KeyMap | None = None,
    max_shard_size: int | str | None = None,
    format: str | None = None,
    verify: bool = False,
    progress: bool = False,
    **options: Any,
) -> Converted:
    """Write a checkpoint in another format, dtype or number of files. Memory is that of a chunk, whatever its size.

    A safetensors file gets every tensor of `src` by its dotted path, as `open(src).tensors` lists them. An archive of
    torch.save gets the root as it is, placeholders too; but with `keys`, `key_map` or `max_shard_size` that flat mapping.
    A folder for torch.distributed.checkpoint gets the root, too, whose dicts and lists it knows by dotted paths: every
    tensor by itself, so that what was tied no longer is.

    Args:
        src: what `open` takes; a Checkpoint that is open already; a LazyStateDict, whose own tensors are meant; or a list of
            such, whose tensors go together.
        dst: "name.safetensors", "name/" for a folder of torch.distributed.checkpoint, or any other name for an archive of
            torch.save. With `max_shard_size` the files are called "name-00001-of-00003.safetensors", beside
            "name.safetensors.index.json"; if all fits into one, as without it.
        dtype: a floating-point dtype, of torch or by name: floating-point tensors are cast to it.
        keys: names or globs of the tensors that are wanted.
        key_map: new names by the old ones, as a function or a mapping; None leaves a tensor out.
        max_shard_size: bytes of tensors in a file; or text: "5GB".
        format: "safetensors", "torch" or "dcp", where the name of `dst` does not say it.
        verify: read all once more, and compare.
        progress: show a bar of bytes (needs tqdm).
        options: for `open`, where `src` is not open yet.

    Returns: what was written, and what could not be written as it was.

    Raises:
        UnsupportedError: safetensors has no such tensors: sparse, quantized, nested, meta, or of some dtypes.
        ValueError: two tensors would get one name.
        ArchiveError: with verify=True, the file does not have the bytes that were written.
        OSError; and what opening and reading raises. Files that were there before are then still there.
    """
    path = os.fspath(dst)
    form = _format_of(path, format)
    limit = None if max_shard_size is None else _nbytes(max_shard_size)
    if dtype is not None:
        floating_index(dtype)
    sources = src if isinstance(src, list) else [src]
    found = Converted()
    with contextlib.ExitStack() as stack:
        opened = [_opened(each, options, stack) for each in sources]
        whole = opened[0][0]
        chosen = [_chosen(tensors, keys, key_map) for _, tensors in opened]
        _refuse_doubles(chosen)
        if form == "dcp":
            is_flat = len(opened) > 1 or whole is None or is_code(whole) or not (keys is None and key_map is None)
            root = None if is_flat or whole is None else _mapping_at_root(whole)
            roots = chosen if root is None else [root]
            _write_dcp(roots, path, limit, found, dtype, progress)
            if verify:
                _verify_dcp(roots, found, dtype)
            return found
        if form == "safetensors":
            planned = [each for tensors in chosen for each in _plan(tensors, found, dtype)]
            if keys is None:
                found.left_out = [
                    name for checkpoint, _ in opened if checkpoint is not None for name in _others(checkpoint)
                ]
            bar = stack.enter_context(bar_of(progress, sum(each.nbytes for each in planned)))
            _write_safetensors(planned, path, limit, found, _metadata_of(chosen), bar)
            if verify:
                _verify_safetensors(planned, found)
            return found
        if (
            len(opened) > 1
            or whole is None
            or is_code(whole)
            or not (keys is None and key_map is None and limit is None)
        ):
            _write_archives(chosen, path, limit, found, dtype)
        else:
            save(whole, path, dtype=dtype, progress=progress)
            found.files, found.tensors = [path], len(chosen[0])
            found.nbytes = sum(_info(chosen[0], name).nbytes for name in chosen[0])
        if verify:
            _verify_archives(chosen, found, dtype)
    return found


def _format_of(path: str, wanted: str | None) -> str:
    """Raises: ValueError."""
    if wanted is not None and wanted not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {wanted!r}")
    if wanted == "torch" and path.endswith(".safetensors"):
        raise ValueError(f"{path!r} says another format than {wanted!r}")
    if is_metadata(path):
        raise ValueError(f"{path!r} is a file of a folder: name the folder, with a slash at its end")
    if wanted is not None:
        return wanted
    if path.endswith(("/", os.sep)):
        return "dcp"
    return "safetensors" if path.endswith(SAFETENSORS) else "torch"


def _opened(
    src: Any, options: Mapping[str, Any], stack: contextlib.ExitStack
) -> tuple[Checkpoint | None, LazyStateDict]:
    """-> the file, where its root is meant, and its tensors by name."""
    if isinstance(src, LazyStateDict):
        return None, src.flatten()
    if not isinstance(src, Checkpoint):
        src = stack.enter_context(open_checkpoint(src, **options))
    return src, src.tensors


def _refuse_doubles(chosen: Sequence[LazyStateDict]) -> None:
    seen: set[Any] = set()
    for tensors in chosen:
        for name in tensors:
            if name in seen:
                raise ValueError(f"two of the checkpoints have a tensor {name!r}: keys= and key_map= tell them apart")
            seen.add(name)


def _chosen(tensors: LazyStateDict, keys: Patterns | None, key_map: KeyMap | None) -> LazyStateDict:
    made = tensors.select(*([keys] if isinstance(keys, str) else keys)) if keys is not None else tensors.copy()
    if key_map is None:
        return made
    names = {key: key_map.get(key, key) if isinstance(key_map, Mapping) else key_map(key) for key in made}
    for key, name in names.items():
        if name is None:
            del made[key]
    return made.rename({key: name for key, name in names.items() if name is not None})


def _others(checkpoint: Checkpoint) -> list[str]:
    """Paths of values that are no tensors and hold none: what is lost where only tensors are kept."""
    found: list[str] = []
    todo: list[tuple[str, Any]] = [("", checkpoint.root)]
    seen: set[int] = set()
    while todo:
        prefix, value = todo.pop()
        if not isinstance(value, (LazyStateDict, LazySequence)) or id(value) in seen:
            continue
        seen.add(id(value))
        view, deeper = value._view, []
        places = value._slots if isinstance(value, LazyStateDict) else dict(enumerate(value._places))
        for key, position in places.items():
            if position < 0 or view.is_tensor(position):
                continue
            child = view.touch(position)
            if isinstance(child, (LazyStateDict, LazySequence)):
                deeper.append((f"{prefix}{key}.", child))
            else:
                found.append(f"{prefix}{key}")
        todo += reversed(deeper)
    return found


def _info(tensors: LazyStateDict, name: Any) -> TensorInfo:
    info = tensors.get_meta(name)
    assert info is not None
    return info


def _nbytes(size: int | str) -> int:
    """Raises: ValueError."""
    if isinstance(size, str):
        digits = size.strip().upper().rstrip("KMGTIB ")
        unit = size.strip().upper()[len(digits) :].strip()
        try:
            size = int(float(digits) * UNITS[unit])
        except (KeyError, ValueError, OverflowError):
            raise ValueError(f"max_shard_size is a number of bytes, or text such as '5GB': not {size!r}") from None
    if size < 1:
        raise ValueError(f"max_shard_size must be at least 1, not {size}")
    return size


def _shards(sizes: Sequence[tuple[Any, int]], limit: int | None) -> list[list[Any]]:
    """Names in their order, together for as long as they are not too large. One that is too large is alone."""
    shards: list[list[Any]] = [[]]
    room = limit
    for name, nbytes in sizes:
        if room is not None and limit is not None:
            if nbytes > room and shards[-1]:
                shards.append([])
                room = limit
            room -= nbytes
        shards[-1].append(name)
    return shards


def _names_of(path: str, count: int) -> list[str]:
    """The paths of `count` files, as the hubs have them."""
    if count == 1:
        return [path]
    stem, suffix = os.path.splitext(path)
    return [f"{stem}-{number:05}-of-{count:05}{suffix}" for number in range(1, count + 1)]


def _write_index(path: str, names: Mapping[Any, str], nbytes: int) -> str:
    made = {
        "metadata": {"total_size": nbytes},
        "weight_map": {name: os.path.basename(file) for name, file in names.items()},
    }
    index = f"{path}.index.json"
    with output_of(index) as output:
        output.write([json.dumps(made, indent=2, sort_keys=True).encode() + b"\n"])
        output.commit()
    return index


# ---------------------------------------------------------------- archives of torch.save


def _write_archives(
    chosen: Sequence[LazyStateDict], path: str, limit: int | None, found: Converted, dtype: Any
) -> None:
    sizes: dict[Any, int] = {}  # of what shares memory, which stays in one file
    group_of: dict[Any, Any] = {}
    for tensors in chosen:
        for name, position in tensors._slots.items():
            info = _info(tensors, name)
            group = (
                (id(tensors._view.at(position)[0]), info.storage_key) if position >= 0 and info.storage_key else name
            )
            group_of[name] = group
            sizes[group] = max(sizes.get(group, 0), info.storage_nbytes or info.nbytes)
            found.nbytes += info.nbytes
    shards = _shards(list(sizes.items()), limit)
    files = _names_of(path, len(shards))
    file_of = {group: file for shard, file in zip(shards, files) for group in shard}
    places = {name: file_of[group] for name, group in group_of.items()}
    for file in files:
        with Writer(file, dtype=dtype, framework=chosen[0]._view.framework, metadata=chosen[0]._metadata) as w:
            for tensors in chosen:
                w.update(tensors._part([name for name in tensors if places[name] == file]))
    found.tensors, found.files = len(places), files
    if len(files) > 1:
        found.files.append(_write_index(path, places, found.nbytes))


def _verify_archives(chosen: Sequence[LazyStateDict], found: Converted, dtype: Any) -> None:
    """Raises: ArchiveError."""
    index = None if dtype is None else floating_index(dtype)
    with open_checkpoint(found.files[-1], framework=chosen[0]._view.framework) as again:
        again.verify()
        if list(again.tensors) != [name for tensors in chosen for name in tensors]:
            raise ArchiveError("the tensors that were written are called otherwise than before", path=found.files[-1])
        for tensors in chosen:
            for name in tensors:
                for one, other in zip(_dense(tensors, name), _dense(again.tensors, name)):
                    wanted = dtype_named(one.info.dtype_name)
                    if index is not None and wanted != dtype_named(other.info.dtype_name):
                        wanted = index
                    parts = zip(elements_of(one, wanted), elements_of(other, wanted))
                    if one.info.shape != other.info.shape or any(left != right for left, right in parts):
                        raise ArchiveError("what was written is not what was read", path=found.files[-1], key=name)


def _dense(tensors: LazyStateDict, name: Any) -> list[LazySlice]:
    """The dense tensors that a tensor consists of; none for one without elements of its own, or for a bare storage."""
    info = _info(tensors, name)
    if info.location == "meta" or (position := tensors._slots[name]) < 0:
        return []
    view, place = tensors._view.at(position)
    if view.kinds[place] == Kind.STORAGE:
        return []
    whole = tensors.get_slice(name)
    return [whole.part(part) for part in info.parts] if info.parts else [whole]


# ---------------------------------------------------------------- folders of torch.distributed.checkpoint


def _mapping_at_root(checkpoint: Checkpoint) -> LazyStateDict | None:
    """The root of a file, if it is a dict; also one without tensors, which is a plain one."""
    root = checkpoint.root
    if isinstance(root, dict):
        return LazyStateDict._of(checkpoint._view, None, dict.fromkeys(root, -1), dict(root), None)
    return root if isinstance(root, LazyStateDict) else None


def _write_dcp(
    roots: Sequence[LazyStateDict], path: str, limit: int | None, found: Converted, dtype: Any, progress: bool
) -> None:
    items = _items(roots, dtype)
    tensors = [item for item in items if item.part is not None]
    by_name = {item.name: item for item in items}
    shards = _shards([(item.name, item.nbytes) for item in items], limit)
    found.tensors, found.nbytes = len(tensors), sum(item.nbytes for item in tensors)
    storages: dict[Any, str] = {}
    for item in items:
        key = "" if item.part is None else item.part.info.storage_key
        if item.part is not None and key and storages.setdefault((id(item.part._view), key), item.name) != item.name:
            found.untied.append(item.name)
    with bar_of(progress, found.nbytes) as bar:
        found.files = write_folder(items, path, [[by_name[name] for name in shard] for shard in shards], bar)


def _items(roots: Sequence[LazyStateDict], dtype: Any) -> list[Item]:
    index = None if dtype is None else floating_index(dtype)
    return [item for root in roots for item in items_of(root, index)]


def _verify_dcp(roots: Sequence[LazyStateDict], found: Converted, dtype: Any) -> None:
    """Raises: ArchiveError."""
    path = found.files[-1]
    with open_checkpoint(path, framework=roots[0]._view.framework) as again:
        again.verify()
        root = _mapping_at_root(again)
        written = {} if root is None else {item.name: item for item in items_of(root, None)}
        for item in _items(roots, dtype):
            other = written.pop(item.name, None)
            if other is None or other.dtype != item.dtype:
                raise ArchiveError("it is missing in what was written", path=path, key=item.name)
            if item.part is None or other.part is None:
                continue
            parts = itertools.zip_longest(elements_of(item.part, item.dtype), elements_of(other.part, item.dtype))
            if item.part.shape != other.part.shape or any(left != right for left, right in parts):
                raise ArchiveError("what was written is not what was read", path=path, key=item.name)


# ---------------------------------------------------------------- safetensors


class _Planned(NamedTuple):
    """A tensor of a safetensors file.

    Attributes:
        part: what reads it.
        dtype: an index into DTYPES, which it has there.
        nbytes: there.
        extent: (archive, record, first byte) where the bytes are the same in the file it comes from; else None.
        place: to sort by, so that the source is read from front to back.
    """

    name: str
    part: LazySlice
    dtype: int
    nbytes: int
    extent: tuple[Archive, int, int] | None
    place: Any

    @property
    def code(self) -> str:
        code = DTYPES[self.dtype].code
        assert code is not None
        return code


def _plan(tensors: LazyStateDict, found: Converted, dtype: Any) -> list[_Planned]:
    """The tensors to write. What is tied is written once, as the format wants it."""
    wanted = None if dtype is None else floating_index(dtype)
    planned: list[_Planned] = []
    first_of: dict[Any, str] = {}
    taken: dict[Any, list[tuple[int, int]]] = {}
    for name, position in tensors._slots.items():
        info = _info(tensors, name)
        view, place = tensors._view.at(position) if position >= 0 else (None, -1)
        if view is not None and view.options.dtype is not None:
            raise ValueError("open the checkpoint without dtype=, and convert it with that: else it is rounded twice")
        leaf = None if view is None else view.table.leaf(place)
        given = _check(name, info, is_bare=view is not None and leaf is None, path=tensors.path)
        made = given
        if wanted is not None and is_floating(given):
            made = wanted
        extent = None
        if view is not None and leaf is not None and leaf.composite is None:
            table, row = view.table, view.table.row(leaf.number)
            refuse_repeated(info, row.extent, name, tensors.path)
            same = (
                id(table),
                row.storage,
                info.storage_offset,
                info.shape,
                info.strides,
                given,
                info.is_conj,
                info.is_neg,
            )
            if row.extent and same in first_of:
                found.tied[name] = first_of[same]
                continue
            first_of[same] = name
            start = row.storage_offset * row.itemsize
            end = start + row.extent * row.itemsize
            others = taken.setdefault((id(table), row.storage), [])
            if any(start < other_end and other < end for other, other_end in others):
                found.untied.append(name)
            others.append((start, end))
            as_it_is = made == given and info.is_contiguous and not (row.conj or row.neg or table.swapped)
            if as_it_is and row.extent and table.archive.is_stored(record := table.record(row.storage)):
                extent = table.archive, record, start
        order = (view is None, 0 if view is None else tensors._view.place(position))
        planned.append(_Planned(name, tensors.get_slice(name), made, info.numel * DTYPES[made].itemsize, extent, order))
    found.tensors += len(planned)
    found.nbytes += sum(each.nbytes for each in planned)
    return planned


def _check(name: Any, info: TensorInfo, *, is_bare: bool, path: str | None) -> int:
    """The dtype of a tensor that the format has. Raises: UnsupportedError for any other; TypeError for its name."""
    if not isinstance(name, str):
        raise TypeError(f"names in a safetensors file are text, and {name!r} is none: key_map gives it another")
    if is_bare:
        why = "bare storages"
    elif info.location == "meta":
        why = "tensors without elements (of the meta device)"
    elif info.parts or info.layout != "strided":
        why = f"{info.layout if info.layout != 'strided' else info.dtype_name} tensors"
    else:
        dtype = dtype_named(info.dtype_name)
        code = DTYPES[dtype].code
        if code is not None and not (code in PACKED and not info.shape):
            return dtype
        why = f"tensors of dtype {info.dtype_name}"
    raise UnsupportedError(f"safetensors has no {why}; keys= and key_map= leave it out", key=name, path=path)


def _metadata_of(chosen: Sequence[LazyStateDict]) -> dict[str, str]:
    """What safetensors files say of themselves is kept; that of another file is the format's own."""
    found = {key: value for tensors in chosen for key, value in tensors.metadata().items() if key != "total_size"}
    return {"format": "pt", **found}


def _write_safetensors(
    planned: Sequence[_Planned], path: str, limit: int | None, found: Converted, metadata: Mapping[str, str], bar: Any
) -> None:
    by_name = {each.name: each for each in planned}
    shards = _shards([(each.name, each.nbytes) for each in planned], limit)
    found.files = _names_of(path, len(shards))
    places: dict[Any, str] = {}
    for shard, file in zip(shards, found.files):
        tied = {name: kept for name, kept in found.tied.items() if kept in shard}
        _write_one([by_name[name] for name in shard], file, {**tied, **metadata}, bar)
        places.update(dict.fromkeys(shard, file))
    if len(shards) > 1:
        found.files.append(_write_index(path, places, found.nbytes))


def _laid_out(tensors: Iterable[_Planned]) -> list[_Planned]:
    """In the order of a file: large elements first, so that all are aligned; then as their bytes lie in the source."""
    return sorted(tensors, key=lambda each: (-DTYPES[each.dtype].itemsize, each.place))


def _header(tensors: Sequence[_Planned], metadata: Mapping[str, str]) -> bytes:
    """Raises: ValueError for one that no reader takes."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for each in tensors:
        shape = list(each.part.shape)
        if each.code in PACKED:
            shape[-1] *= PACKED[each.code]
        entries[each.name] = {"dtype": each.code, "shape": shape, "data_offsets": [offset, offset + each.nbytes]}
        offset += each.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_NBYTES:
        raise ValueError(
            f"the header would have {len(text)} bytes, and readers take {HEADER_NBYTES}: use max_shard_size"
        )
    return struct.pack("<Q", len(text)) + text


def _write_one(planned: Sequence[_Planned], path: str, metadata: Mapping[str, str], bar: Any) -> None:
    ordered = _laid_out(planned)
    with output_of(path) as output:
        output.write([_header(ordered, metadata)])
        for each in ordered:
            try:
                done = _copy(each, output)
                for part in _bytes_of(each, done):
                    output.write([part])
            except ZipSlicerError as error:
                raise error.located(key=each.name) from None
            if bar is not None:
                bar.update(each.nbytes)
        output.commit()


def _copy(each: _Planned, output: Output) -> int:
    """What the kernel can copy; -> bytes."""
    if each.extent is None:
        return 0
    archive, record, start = each.extent
    done = output.copy(archive.source, archive.extent(record)[0] + start, each.nbytes)
    archive.part(record, 0, 0)  # which raises ChangedError if the file was written to meanwhile
    return done


def _bytes_of(each: _Planned, done: int = 0) -> Iterator[Any]:
    """Its bytes from `done` on, as they are to be written."""
    if each.extent is None:
        yield from elements_of(each.part, each.dtype)
        return
    archive, record, start = each.extent
    buffer = memoryview(bytearray(min(CHUNK_NBYTES, each.nbytes - done)))
    for at in range(done, each.nbytes, CHUNK_NBYTES):
        part = buffer[: min(CHUNK_NBYTES, each.nbytes - at)]
        archive.read_into((record, start + at, len(part), 0, 0), [part], default_threads())
        yield part


def _verify_safetensors(planned: Sequence[_Planned], found: Converted) -> None:
    """Raises: ArchiveError."""
    by_name = {each.name: each for each in planned}
    files = found.files[:-1] if len(found.files) > 1 else found.files
    for path in files:
        with open(path, "rb") as file:
            (count,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(count))
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                each = by_name.pop(name)
                file.seek(8 + count + entry["data_offsets"][0])
                if any(file.read(len(part)) != part for part in _bytes_of(each)):
                    raise ArchiveError("what was written is not what was read", path=path, key=name)
    if by_name:
        raise ArchiveError("tensors are missing in what was written", path=found.files[-1], key=next(iter(by_name)))
