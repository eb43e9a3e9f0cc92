"""DCP: a folder of torch.distributed.checkpoint in, an archive and a program like a checkpoint's out, so that code takes it.

A folder has chunks of tensors, each saved by one rank, and other values; each of them is a whole archive of torch.save, one
after the other in the .distcp files. Here every tensor is a record of one file (`dcp_source`), and the graphs of the other
values are parts of one graph: so slices, streams, conversions and ranks read a folder as they read any file.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Union

from .archive import Archive, Listed
from .backend import FIRST_NODE_KIND, NODE_FIELDS, STORAGE_FIELDS, TENSOR_FIELDS, Backend, Entry, Graph, Kind
from .dcp_metadata import Folder, Tensor, Value, Window
from .dcp_source import FolderSource, Record, table_of
from .errors import ArchiveError, ZipSlicerError
from .plan import numel, row_major
from .policy import DTYPES, Limits
from .program import Program
from .table import TensorTable

__all__ = ["DcpArchive", "dcp_table"]


class DcpArchive(Listed):
    """The tensors of a folder as records, called by their names; and the storages of tensors in its other values."""

    def __init__(self, source: FolderSource, backend: Backend, limits: Limits, folder: Folder) -> None:
        self.source, self.backend, self.limits, self.window = source, backend, limits, None
        self.base, self.nbytes, self.root = 0, 0, b""
        self._folder, self._files = folder, source

    def place(self, regions: Sequence[Tensor | Record]) -> None:
        """Make records of what is to be read. What pickling compares has the metadata in it."""
        self._list([(each.name, self._files.place(each), each.nbytes) for each in regions], self._folder.text)
        self.nbytes = self._files.size

    def parts(self) -> list[Archive]:
        """The archives of all chunks and values: for their checksums."""
        return [self._files.archive(window) for window in self._folder.windows]


def dcp_table(
    folder: Folder,
    backend: Backend,
    limits: Limits,
    *,
    check: bool,
    threads: int,
    unknown: str,
    allow: Mapping[str, Any],
    storage_options: Mapping[str, Any] | None = None,
    cache_dir: Any = None,
) -> TensorTable:
    """The values of a folder as they were nested when they were saved. Those that are no tensors are looked at now.

    Raises: as reading an archive does.
    """
    source = FolderSource(folder, backend, limits, storage_options, cache_dir)
    try:
        archive = DcpArchive(source, backend, limits, folder)
        columns = _Columns(limits)
        regions: list[Record] = []
        roots: dict[str, tuple[int, int]] = {}
        taken = {entry.name for entry in folder.entries}  # as names of records
        with source.told(_values_by_file(folder)):
            for entry in folder.entries:
                if isinstance(entry, Value):
                    roots[entry.name] = _value(entry, source, columns, regions, taken, unknown, allow)
        for entry in folder.entries:
            if isinstance(entry, Tensor):
                roots[entry.name] = Kind.TENSOR, columns.tensor(entry)
        columns.tree(_tree(folder.entries), roots)
        tensors = [entry for entry in folder.entries if isinstance(entry, Tensor)]
        # As they lie on the disk, so that who reads them in the order of their records goes through each file once.
        tensors.sort(key=lambda each: each.chunks[0].window if each.chunks else Window("", 0, 0))
        archive.place([*tensors, *regions])
        if check:
            source.check(threads)
        return TensorTable(Program(columns.graph(), allow), archive, False)
    except BaseException as error:
        source.close()
        if isinstance(error, ZipSlicerError):
            error.located(path=source.path)
        raise


def _values_by_file(folder: Folder) -> dict[str, list[tuple[int, int]]]:
    found: dict[str, list[tuple[int, int]]] = {}
    for entry in folder.entries:
        if isinstance(entry, Value):
            found.setdefault(entry.window.file, []).append(entry.window[1:])
    return found


def _value(
    value: Value,
    source: FolderSource,
    columns: _Columns,
    regions: list[Record],
    taken: set[str],
    unknown: str,
    allow: Mapping[str, Any],
) -> tuple[int, int]:
    """Put the graph of a value that is no tensor among the others; -> its root there."""
    try:
        archive = source.archive(value.window)
        table = table_of(archive, allow, unknown)
        program = table.program
        names = []
        for storage in range(program.storage_count):
            record = table.record_number(storage)
            name = f"{value.name}/{program.storage_key(storage)}"
            while name in taken:
                name += "'"
            taken.add(name)
            names.append(name)
            if record >= 0:
                regions.append(Record(archive, record, name, archive.field(record, Entry.NBYTES)))
        return columns.splice(program, names)
    except ZipSlicerError as error:
        raise error.located(key=value.name) from None


class _Tree(dict[Union[str, int], Any]):
    """Names to what is below; a list where all names are numbers."""

    is_list = False

    @property
    def length(self) -> int:
        """Of a list."""
        return 1 + max(step for step in self if isinstance(step, int)) if self.is_list else 0


def _tree(entries: Sequence[Tensor | Value]) -> _Tree:
    """Raises: ArchiveError where a value is to be in another that is none of dict and list."""
    root = _Tree()
    for entry in entries:
        place = root
        *above, last = entry.path
        for step in above:
            below = place.setdefault(step, _Tree())
            if not isinstance(below, _Tree):
                raise ArchiveError("the metadata puts a value into another one", key=entry.name)
            place = below
        if place.setdefault(last, entry.name) is not entry.name:
            raise ArchiveError("the metadata puts two values into one place", key=entry.name)
    todo = [*root.values()]
    while todo:
        tree = todo.pop()
        if isinstance(tree, _Tree):
            tree.is_list = all(isinstance(step, int) for step in tree)
            if tree.length > 2 * len(tree) + 1024:  # what is not there is None
                raise ArchiveError("the metadata has a list with next to nothing in it")
            todo += tree.values()
    return root


class _Columns:
    """A Graph in the making. Its first value and node are the root, whatever comes first."""

    def __init__(self, limits: Limits) -> None:
        self.kinds, self.payloads = bytearray([Kind.DICT]), array("q", [0])
        self.nodes = array("q", [0] * NODE_FIELDS)
        self.strings: list[str] = []
        self.blobs: list[bytes] = []
        self.longs: list[int] = []
        self.globals: list[tuple[str, str]] = []
        self.storages, self.keys, self.locations = array("q"), bytearray(), list[str]()
        self.tensors, self.dims = array("q"), array("q")
        self._room = limits.program_nbytes  # of values in columns, which all pickles together may fill

    def _storage(self, dtype: int, nbytes: int, key: str, location: str) -> int:
        self.keys += key.encode("utf-8", "surrogatepass")
        self.storages.extend((dtype, nbytes, 0, len(self.keys)))
        self.locations.append(location)
        return len(self.locations) - 1

    def tensor(self, tensor: Tensor) -> int:
        """A row of its own."""
        dtype, count = DTYPES[tensor.dtype], numel(tensor.sizes)
        storage = self._storage(tensor.dtype, count * dtype.itemsize, tensor.name, "cpu")
        row = (storage, tensor.dtype, dtype.itemsize, 0, len(self.dims), len(tensor.sizes), 0, 0, count)
        self.tensors.extend(row)
        assert len(row) == TENSOR_FIELDS
        self.dims.extend((*tensor.sizes, *row_major(tensor.sizes)))
        return len(self.tensors) // TENSOR_FIELDS - 1

    def splice(self, program: Program, names: Sequence[str]) -> tuple[int, int]:
        """All of another graph, whose storages are called otherwise here; -> (kind, payload) of its root."""
        self._room -= len(program.kinds)
        if self._room < 0:
            raise ArchiveError("the values that are no tensors are too many; see zipslicer.Limits(program_nbytes=...)")
        shift = {
            Kind.LONG: len(self.longs), Kind.STR: len(self.strings), Kind.BYTES: len(self.blobs),
            Kind.BYTEARRAY: len(self.blobs), Kind.GLOBAL: len(self.globals), Kind.STORAGE: len(self.locations),
            Kind.TENSOR: len(self.tensors) // TENSOR_FIELDS,
        }  # fmt: skip
        first_node, first_value = len(self.nodes) // NODE_FIELDS, len(self.kinds)
        moved = array("q", (
            payload + (first_node if kind >= FIRST_NODE_KIND else shift.get(kind, 0))
            for kind, payload in zip(program.kinds, program.payloads)
        ))  # fmt: skip
        self.kinds += program.kinds
        self.payloads += moved
        for node in range(program.node_count):
            kind, start, count, appends, depth = program.nodes[node * NODE_FIELDS : (node + 1) * NODE_FIELDS]
            self.nodes.extend((kind, start + first_value, count, appends, depth + 1))
        self.strings += program.strings
        self.blobs += program.blobs
        self.longs += program.longs
        self.globals += program.globals
        first_dim, first_storage = len(self.dims), len(self.locations)
        for storage, name in enumerate(names):
            dtype, nbytes, *_ = program.storages[storage * STORAGE_FIELDS : (storage + 1) * STORAGE_FIELDS]
            self._storage(dtype, nbytes, name, program.locations[storage])
        rows = memoryview(program.tensors).cast("B").cast("q")
        for start in range(0, len(rows), TENSOR_FIELDS):
            storage, dtype, itemsize, offset, dims, *rest = rows[start : start + TENSOR_FIELDS]
            self.tensors.extend((storage + first_storage, dtype, itemsize, offset, dims + first_dim, *rest))
        self.dims.extend(program.dims)
        return program.kinds[0], moved[0]

    def tree(self, root: _Tree, leaves: Mapping[str, tuple[int, int]]) -> None:
        """The nested dicts and lists, with what was put here before as their leaves."""
        todo: list[tuple[_Tree, int, int]] = [(root, 0, 0)]
        for tree, node, depth in todo:
            start = len(self.kinds)
            children = []
            for step, below in self._steps(tree):
                if not tree.is_list:
                    children.append(self._string(step) if isinstance(step, str) else (Kind.INT, step))
                if isinstance(below, _Tree):
                    number = len(self.nodes) // NODE_FIELDS
                    self.nodes.extend([0] * NODE_FIELDS)
                    todo.append((below, number, depth + 1))
                    children.append((Kind.LIST if below.is_list else Kind.DICT, number))
                else:
                    children.append((Kind.NONE, 0) if below is None else leaves[below])
            self.kinds += bytes(kind for kind, _ in children)
            self.payloads.extend(payload for _, payload in children)
            kind = Kind.LIST if tree.is_list else Kind.DICT
            row = array("q", (kind, start, len(children), 0, depth))
            self.nodes[node * NODE_FIELDS : (node + 1) * NODE_FIELDS] = row

    def _steps(self, tree: _Tree) -> Iterable[tuple[Any, Any]]:
        return ((i, tree.get(i)) for i in range(tree.length)) if tree.is_list else tree.items()

    def _string(self, text: str) -> tuple[int, int]:
        self.strings.append(text)
        return Kind.STR, len(self.strings) - 1

    def graph(self) -> Graph:
        return Graph(
            kinds=bytes(self.kinds), payloads=self.payloads.tobytes(), nodes=self.nodes.tobytes(), strings=self.strings,
            blobs=self.blobs, longs=self.longs, globals=self.globals, storages=self.storages.tobytes(),
            storage_keys=bytes(self.keys), locations=self.locations, tensors=self.tensors.tobytes(),
            dims=self.dims.tobytes(), nbytes=0,
        )  # fmt: skip
