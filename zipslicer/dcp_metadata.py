"""DCP metadata: the `.metadata` of torch.distributed.checkpoint in, which tensors a folder has and where their chunks lie out.

It is a pickle, and torch's own reader unpickles it. Here the machine runs it that runs every other pickle, and what it says
is checked: a chunk is within its tensor, every element is in one chunk, and no two lie on the same bytes of a file.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Union

from .backend import Backend, Graph, Kind
from .errors import ArchiveError, UnsupportedError, ZipSlicerError
from .opening import open_source
from .plan import numel
from .policy import DTYPES, Limits, Meaning, actions, dtype_named, machine_limits
from .program import ARGS, Program, protocol_of
from .source import is_outside, read_at, without_secrets

__all__ = [
    "KNOWN",
    "METADATA",
    "MODULE",
    "OF_ONE_RANK",
    "STORAGE_MODULE",
    "Chunk",
    "Folder",
    "Path",
    "Tensor",
    "Value",
    "Window",
    "is_metadata",
    "read_folder",
]

METADATA = ".metadata"
OF_ONE_RANK = "__0.metadata"  # what a save without collectives leaves: one for each rank
MODULE = "torch.distributed.checkpoint.metadata"
STORAGE_MODULE = "torch.distributed.checkpoint.filesystem"
# What torch's writer names: dataclasses, an enum, and the path of the folder. Unpickling them runs nothing.
KNOWN = frozenset(
    {
        *(
            (MODULE, name)
            for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "ChunkStorageMetadata")
        ),
        *((MODULE, name) for name in ("TensorStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING")),
        (STORAGE_MODULE, "_StorageInfo"),
        *(("pathlib", name) for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
    }
)
MOST_NBYTES = 1 << 62  # of all tensors together: positions are 64 bits
COMPARED = 1 << 22  # pairs of chunks that are compared for overlaps where chunks are no grid; some seconds

Path = tuple[Union[str, int], ...]


class Window(NamedTuple):
    """An archive in a file of the folder."""

    file: str
    offset: int
    nbytes: int


class Chunk:
    """A box of a tensor, and the archive that has it.

    Attributes:
        starts, sizes: of the box, in elements.
        window: the archive.
        laid: (byte of the file where its first element lies, strides in bytes), once the archive was looked at.
    """

    __slots__ = ("laid", "sizes", "starts", "window")

    def __init__(self, starts: tuple[int, ...], sizes: tuple[int, ...], window: Window) -> None:
        self.starts, self.sizes, self.window = starts, sizes, window
        self.laid: tuple[int, tuple[int, ...]] | None = None


class Tensor(NamedTuple):
    """What `.metadata` says of a tensor. Chunks are sorted by where they start; they cover it, each element once."""

    name: str
    path: Path
    dtype: int
    sizes: tuple[int, ...]
    chunks: list[Chunk]

    @property
    def nbytes(self) -> int:
        return numel(self.sizes) * DTYPES[self.dtype].itemsize

    @property
    def windows(self) -> list[Window]:
        return [chunk.window for chunk in self.chunks]


class Value(NamedTuple):
    """What it says of a value that is no tensor."""

    name: str
    path: Path
    window: Window

    @property
    def windows(self) -> list[Window]:
        return [self.window]


class Folder(NamedTuple):
    """A `.metadata`, checked as far as it can be without opening another file.

    Attributes:
        path: of `.metadata` itself: a path, or a URL.
        text: its bytes.
        entries: tensors and values, in the order it has them.
    """

    path: str
    text: bytes
    entries: list[Tensor | Value]

    @property
    def windows(self) -> list[Window]:
        """All archives, in the order of the files."""
        return sorted(window for entry in self.entries for window in entry.windows)


def is_metadata(path: str) -> bool:
    """Whether a path or URL is that of such a pickle, by its name."""
    return path.replace("\\", "/").rpartition("/")[2] == METADATA


def read_folder(
    path: str, backend: Backend, limits: Limits, storage_options: Mapping[str, Any] | None = None
) -> Folder:
    """What the `.metadata` at a path or URL says.

    Raises:
        OSError: it cannot be read.
        ArchiveError: it contradicts itself, or names a file outside its folder; ProgramError and so on: it is no such pickle.
        UnsupportedError: the folder was written with an extension (compression), or its tensors have no dtype that torch has.
    """
    try:
        source = open_source(path, limits, storage_options)
        try:
            if source.size > limits.program_nbytes:
                raise ArchiveError(f"{source.size} bytes; Limits(program_nbytes=...) raises the limit")
            text = read_at(backend, source, 0, source.size)
        finally:
            source.close()
        graph = Graph(*backend.scan_pickle(text, actions(), machine_limits(limits, False)))
        said = _Said(Program(graph, {}, protocol_of(text)))
        return Folder(path, text, _entries(said, limits))
    except ZipSlicerError as error:
        raise error.located(path=without_secrets(path)) from None


class _Said:
    """The objects of a `.metadata`, by their positions in its graph."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._names = {
            node: program.called_name(node) for node in range(program.node_count) if program.kind(node) == Kind.OBJECT
        }

    def attributes(self, position: int, cls: str, module: str = MODULE) -> dict[str, int]:
        """Of an object of a class: names to positions. Raises: ArchiveError for any other value."""
        program = self.program
        node = program.payloads[position]
        if program.kinds[position] == Kind.OBJECT and self._names[node] == (module, cls):
            state = program.state_position(node)
            return {} if state is None else self.items(state)
        raise ArchiveError(f"no metadata of torch.distributed.checkpoint: a {cls} is missing")

    def is_a(self, position: int, cls: str) -> bool:
        program = self.program
        return program.kinds[position] == Kind.OBJECT and self._names[program.payloads[position]] == (MODULE, cls)

    def items(self, position: int) -> dict[Any, int]:
        """Of a dict whose keys are text."""
        return {self.text(p): p + 1 for p in self.pairs(position)}

    def pairs(self, position: int) -> range:
        """Positions of the keys of a dict."""
        if self.program.kinds[position] not in (Kind.DICT, Kind.ORDERED_DICT):
            raise ArchiveError("no metadata of torch.distributed.checkpoint: a dict is missing")
        return self.program.pairs(self.program.payloads[position])

    def sequence(self, position: int) -> range:
        """Positions of the values of a list or tuple."""
        if self.program.kinds[position] not in (Kind.LIST, Kind.TUPLE):
            raise ArchiveError("no metadata of torch.distributed.checkpoint: a list is missing")
        return range(*self.program.span(self.program.payloads[position]))

    def text(self, position: int) -> str:
        if self.program.kinds[position] != Kind.STR:
            raise ArchiveError("no metadata of torch.distributed.checkpoint: a name is missing")
        return self.program.strings[self.program.payloads[position]]

    def integer(self, position: int) -> int:
        """One that is not negative."""
        if self.program.kinds[position] == Kind.INT and self.program.payloads[position] >= 0:
            return int(self.program.payloads[position])
        raise ArchiveError("no metadata of torch.distributed.checkpoint: a number is missing, or negative")

    def size(self, position: int) -> tuple[int, ...]:
        """A torch.Size."""
        program = self.program
        if program.kinds[position] == Kind.CALL and program.meaning(program.payloads[position]) == Meaning.SIZE:
            start, _ = program.span(program.payloads[position])
            args = self.sequence(start + ARGS)
            if len(args) == 1:
                position = args[0]
        return tuple(self.integer(p) for p in self.sequence(position))

    def dtype(self, position: int) -> int:
        """Of the TensorProperties, whose state is a tuple that begins with it; before torch 2.1, a dict."""
        program = self.program
        node = program.payloads[position]
        if not self.is_a(position, "TensorProperties") or (state := program.state_position(node)) is None:
            raise ArchiveError("no metadata of torch.distributed.checkpoint: the dtype of a tensor is missing")
        if program.kinds[state] == Kind.TUPLE and (parts := self.sequence(state)):
            found = parts[0]
        else:
            found = self.items(state).get("dtype", state)
        module, name = program.globals[program.payloads[found]] if program.kinds[found] == Kind.GLOBAL else ("", "")
        if module != "torch" or name not in _DTYPES:
            raise UnsupportedError(f"torch has no tensors of dtype {name or 'that is none'}")
        return dtype_named(name)


_DTYPES = {dtype.name for dtype in DTYPES}


def _entries(said: _Said, limits: Limits) -> list[Tensor | Value]:
    whole = said.attributes(0, "Metadata")
    for name in ("state_dict_metadata", "storage_data"):
        if name not in whole:
            raise ArchiveError(f"the metadata has no {name!r}: torch.distributed.checkpoint did not finish it")
    windows = _windows(said, whole["storage_data"])
    paths = _paths(said, whole.get("planner_data"))
    found: list[Tensor | Value] = []
    total, compared = 0, 0
    for name, position in said.items(whole["state_dict_metadata"]).items():
        path = paths.get(name, (name,))
        try:
            if said.is_a(position, "BytesStorageMetadata"):
                found.append(Value(name, path, _window(windows, name, None)))
                continue
            facts = said.attributes(position, "TensorStorageMetadata")
            tensor = _tensor(said, facts, name, path, windows, limits)
            compared += _check_cover(tensor, COMPARED - compared)
        except KeyError as error:
            raise ArchiveError(f"no metadata of torch.distributed.checkpoint: {error} is missing", key=name) from None
        except ZipSlicerError as error:
            raise error.located(key=name) from None
        total += tensor.nbytes
        if total > MOST_NBYTES:
            raise ArchiveError("the tensors are larger than any disk", key=name)
        found.append(tensor)
    _check_windows(found)
    return found


def _tensor(
    said: _Said,
    facts: dict[str, int],
    name: str,
    path: Path,
    windows: Mapping[tuple[str, tuple[int, ...] | None], Window],
    limits: Limits,
) -> Tensor:
    sizes = said.size(facts["size"])
    dtype = said.dtype(facts["properties"])
    if len(sizes) > limits.dimensions or numel([max(n, 1) for n in sizes]) * DTYPES[dtype].itemsize > MOST_NBYTES:
        raise ArchiveError(f"no tensor has the shape {sizes[: limits.dimensions]}")
    chunks = []
    for position in said.sequence(facts["chunks"]):
        chunk = said.attributes(position, "ChunkStorageMetadata")
        starts, lengths = said.size(chunk["offsets"]), said.size(chunk["sizes"])
        if len(starts) != len(sizes) or len(lengths) != len(sizes):
            raise ArchiveError("a chunk has more or fewer dimensions than its tensor")
        if any(start + n > size for start, n, size in zip(starts, lengths, sizes)):
            raise ArchiveError(f"a chunk at {starts} of {lengths} is not within a tensor of {sizes}")
        if not numel(lengths):
            continue  # of a rank that has nothing of it
        window = _window(windows, name, starts)
        if numel(lengths) * DTYPES[dtype].itemsize > window.nbytes:
            raise ArchiveError(
                f"a chunk of {lengths} does not fit into the {window.nbytes} bytes that are said to hold it"
            )
        chunks.append(Chunk(starts, lengths, window))
    return Tensor(name, path, dtype, sizes, sorted(chunks, key=lambda chunk: chunk.starts))


def _windows(said: _Said, position: int) -> dict[tuple[str, tuple[int, ...] | None], Window]:
    """Where things are, by name and the start of the chunk."""
    found: dict[tuple[str, tuple[int, ...] | None], Window] = {}
    for p in said.pairs(position):
        index = said.attributes(p, "MetadataIndex")
        place = said.attributes(p + 1, "_StorageInfo", STORAGE_MODULE)
        if not {"fqn"} <= index.keys() or not {"relative_path", "offset", "length"} <= place.keys():
            raise ArchiveError("no metadata of torch.distributed.checkpoint: it does not say where a value lies")
        name, file = said.text(index["fqn"]), said.text(place["relative_path"])
        start = index.get("offset", -1)
        starts = None if start < 0 or said.program.kinds[start] == Kind.NONE else said.size(start)
        if (name, starts) in found:
            raise ArchiveError("the metadata says twice where a chunk lies", key=name)
        if wrong := is_outside(file):
            raise ArchiveError(f"the metadata names the file {file[:200]!r}, which {wrong}", key=name)
        transforms = place.get("transform_descriptors")
        if transforms is not None and said.program.kinds[transforms] != Kind.NONE and said.sequence(transforms):
            raise UnsupportedError("it was written through an extension, which compresses or encrypts it", key=name)
        found[name, starts] = Window(file, said.integer(place["offset"]), said.integer(place["length"]))
    return found


def _window(
    windows: Mapping[tuple[str, tuple[int, ...] | None], Window], name: str, starts: tuple[int, ...] | None
) -> Window:
    found = windows.get((name, starts))
    if found is None:
        raise ArchiveError("the metadata does not say where a part of this is", key=name)
    return found


def _paths(said: _Said, position: int | None) -> dict[str, Path]:
    """The way through the structure to each value, which the default planner notes."""
    program = said.program
    if position is None or program.kinds[position] not in (Kind.DICT, Kind.ORDERED_DICT):
        return {}
    found: dict[str, Path] = {}
    for name, value in said.items(position).items():
        path = [said.text(p) if program.kinds[p] == Kind.STR else said.integer(p) for p in said.sequence(value)]
        if not path:
            raise ArchiveError("the metadata gives a value no name", key=name)
        found[name] = tuple(path)
    return found


def _check_cover(tensor: Tensor, room: int) -> int:
    """How many pairs were compared. Raises: ArchiveError: elements are in no chunk, or in two."""
    chunks = tensor.chunks
    if sum(numel(chunk.sizes) for chunk in chunks) != numel(tensor.sizes):
        raise ArchiveError("the chunks are not all of the tensor, or are more")
    if len(chunks) < 2 or _is_grid(tensor):
        return 0
    # What starts before another ends, in the dimension that tells most of them apart.
    dim = max(range(len(tensor.sizes)), key=lambda d: len({chunk.starts[d] for chunk in chunks}))
    compared = 0
    active: list[Chunk] = []
    for chunk in sorted(chunks, key=lambda chunk: chunk.starts[dim]):
        active = [one for one in active if one.starts[dim] + one.sizes[dim] > chunk.starts[dim]]
        compared += len(active)
        if compared > room:
            raise ArchiveError("there are too many chunks to be compared")
        for one in active:
            if all(a < b + n and b < a + m for a, m, b, n in zip(one.starts, one.sizes, chunk.starts, chunk.sizes)):
                raise ArchiveError(f"two chunks have the same elements: those at {one.starts} and {chunk.starts}")
        active.append(chunk)
    return compared


def _is_grid(tensor: Tensor) -> bool:
    """Whether chunks are all cells of a grid, as meshes of ranks make them: then each element is in one."""
    cells = 1
    for dim, size in enumerate(tensor.sizes):
        stretches = sorted({(chunk.starts[dim], chunk.sizes[dim]) for chunk in tensor.chunks})
        ends = [start + n for start, n in stretches]
        if [start for start, _ in stretches] != [0, *ends[:-1]] or ends[-1] != size:
            return False
        cells *= len(stretches)
    return cells == len(tensor.chunks) == len({chunk.starts for chunk in tensor.chunks})


def _check_windows(entries: Sequence[Tensor | Value]) -> None:
    """Raises: ArchiveError: two lie on the same bytes."""
    placed = sorted((window, entry.name) for entry in entries for window in entry.windows)
    for (one, name), (other, key) in itertools.pairwise(placed):
        if one.file == other.file and other.offset < one.offset + one.nbytes:
            raise ArchiveError(f"this lies on bytes of {name!r} in {one.file!r}", offset=other.offset, key=key)
