"""Backend: the seam. A Protocol of few functions, and the one place that chooses native or pure.

Builtins in, builtins out: ints, bytes, buffers, lists, tuples; no class of ours crosses this line, so there is no object
whose methods must be kept twice. Neither side imports the other, and neither owns policy: what a global means is data
(`Actions`), and so are the limits. Both sides raise the same class of `zipslicer.errors` at the same byte offset.

All file offsets at the seam are absolute, also where the archive is a window of a larger file.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol, Union, cast

__all__ = [
    "DIRECT_FROM",
    "DIRECT_NBYTES",
    "ENTRY_FIELDS",
    "Backend",
    "Buffer",
    "Graph",
    "Handle",
    "Hot",
    "Kind",
    "Limits",
    "Maker",
    "Text",
    "Verb",
    "choose",
]

Buffer = Union[bytearray, memoryview, Any]  # anything writable and contiguous that speaks the buffer protocol

Allocate = Callable[[int], Buffer]  # memory for so many bytes: Backend.allocate, or what stands for it

Text = Union[bytes, memoryview]  # what a parser reads: bytes, or a view of such that nobody can write to


class Reader(Protocol):
    """A source without a file descriptor: bytes, a file object, Windows."""

    def preadv(self, buffers: Sequence[Buffer], offset: int, /) -> int:
        """Fill the buffers in order from the byte at offset; return how many bytes came, 0 only at the end."""
        ...


# A POSIX file descriptor; or two, the second of which reads past the page cache (O_DIRECT) what is large and lies as
# in the file: place and memory are congruent modulo DIRECT_NBYTES. Or a Reader.
Handle = Union[int, tuple[int, int], Reader]
DIRECT_NBYTES: Final = 4096
DIRECT_FROM: Final = 1 << 20  # bytes; of a stretch that is read so
Actions = Mapping[tuple[str, str], int]  # (module, name) -> Verb | dtype index << 8 | itemsize << 16 | traits << 24


class Entry:
    """Fields of one archive record: one row of the `entries` that parse_directory returns, as native int64."""

    HEADER_OFFSET: Final = 0  # of the local header
    PAYLOAD_OFFSET: Final = 1  # >= 0: proved by the local header. < 0: ~offset predicted from the directory alone
    STORED_NBYTES: Final = 2  # bytes in the file (compressed, if METHOD is 8)
    NBYTES: Final = 3  # bytes of the record itself
    LIMIT: Final = 4  # the next record's header, or the directory: the payload ends at or before it
    CRC: Final = 5  # CRC-32 of the record; 0 also means "not computed"
    METHOD: Final = 6  # 0 stored, 8 deflated, others are refused on touch
    FLAGS: Final = 7  # general purpose bit flags; or COUNTED
    NAME_START: Final = 8  # of the record's name within the directory block
    NAME_NBYTES: Final = 9


ENTRY_FIELDS: Final = 10
# A bit of FLAGS above the 16 that ZIP has: before the payload stands no local header but, as eight little-endian bytes,
# the count of its elements, which must be CRC. So it is in the stream format of torch before 1.6.
COUNTED: Final = 1 << 16


class Job:
    """Fields of one read: `nbytes` bytes of record `RECORD` from payload byte `START` into buffer `BUFFER` at `PLACE`."""

    RECORD: Final = 0
    START: Final = 1
    NBYTES: Final = 2
    BUFFER: Final = 3
    PLACE: Final = 4


JOB_FIELDS: Final = 5


class Verb:
    """What the pickle machine itself must know of a global. Everything else is left to policy, as an inert CALL."""

    NONE: Final = 0  # policy knows it; to the machine it is a name
    ORDERED_DICT: Final = 1
    STORAGE: Final = 2  # a storage class; dtype UNTYPED for torch.storage.UntypedStorage
    DTYPE: Final = 3  # torch.float32 as a value
    TENSOR: Final = 4  # _rebuild_tensor(storage, storage_offset, size, stride)
    TENSOR_V2: Final = 5  # (storage, storage_offset, size, stride, requires_grad, hooks[, metadata])
    TENSOR_V3: Final = 6  # (storage, storage_offset, size, stride, requires_grad, hooks, dtype[, metadata])
    TYPED: Final = 7  # _rebuild_from_type_v2(function, type, arguments, state)
    SIZE: Final = 8  # torch.Size


UNTYPED: Final = 255  # the dtype index of an untyped storage; its itemsize is 1
DIFFERENTIABLE: Final = 1  # trait of a dtype: a tensor of it may require grad
COMPLEX: Final = 2  # trait of a dtype: a tensor of it may be conjugated


class Kind:
    """Kinds of value in a graph. Payloads: see the comment of each. From TUPLE on the payload is a node id."""

    NONE: Final = 0
    FALSE: Final = 1
    TRUE: Final = 2
    INT: Final = 3  # the integer
    LONG: Final = 4  # index into longs (outside int64)
    FLOAT: Final = 5  # the bits of the IEEE double, as int64
    STR: Final = 6  # index into strings
    BYTES: Final = 7  # index into blobs
    BYTEARRAY: Final = 8  # index into blobs
    GLOBAL: Final = 9  # index into globals
    STORAGE: Final = 10  # index into storages
    TENSOR: Final = 11  # index into tensors
    ABSENT: Final = 12  # a part that is not there (the state of an object without BUILD)
    TUPLE: Final = 16  # children
    LIST: Final = 17  # children
    SET: Final = 18  # children
    FROZENSET: Final = 19  # children
    DICT: Final = 20  # key, value, key, value, ...
    ORDERED_DICT: Final = 21  # as DICT; an odd count means that the last child is the state given by BUILD
    CALL: Final = 22  # callable, args, kwargs, state, `appends` list items, then key, value, ...
    OBJECT: Final = 23  # as CALL, made by NEWOBJ
    TYPED: Final = 24  # tensor, type, state


FIRST_NODE_KIND: Final = 16


class NodeField:
    """Fields of one row of `Graph.nodes`."""

    KIND: Final = 0
    START: Final = 1  # of its children in kinds and payloads
    COUNT: Final = 2  # of children
    APPENDS: Final = 3  # CALL and OBJECT: how many of the children after the fourth are list items
    DEPTH: Final = 4  # nodes above it on the shortest way from the root


NODE_FIELDS: Final = 5


class StorageField:
    """Fields of one row of `Graph.storages`."""

    DTYPE: Final = 0  # dtype index of the class in its first persistent id, or UNTYPED
    NBYTES: Final = 1
    OFFSET: Final = 2  # of the BINPERSID opcode
    KEY_END: Final = 3  # where its key ends in storage_keys; it begins where that of the storage before it ends


STORAGE_FIELDS: Final = 4


class TensorField:
    """Fields of one row of `Graph.tensors`. Sizes are dims[DIMS : DIMS + NDIM], strides the NDIM after them."""

    STORAGE: Final = 0
    DTYPE: Final = 1
    ITEMSIZE: Final = 2
    STORAGE_OFFSET: Final = 3  # in elements
    DIMS: Final = 4
    NDIM: Final = 5
    FLAGS: Final = 6  # 1 requires_grad, 2 conj, 4 neg
    OFFSET: Final = 7  # of the REDUCE opcode
    EXTENT: Final = 8  # elements from the first to the last one, both included; 0 for an empty tensor


TENSOR_FIELDS: Final = 9


class Dialect:
    """What a persistent id may be."""

    ZIP: Final = 0  # ('storage', class, key, location, numel)
    STREAM: Final = 1  # the same with a view of the storage or None; ('module', class, source file, source)
    TAR: Final = 2  # the key of a tensor or storage, as a STORAGE without bytes; (class, source file, source)


class Limits(NamedTuple):
    """What the machine refuses to exceed; policy.Limits says why each has its default."""

    depth: int
    dimensions: int
    text_nbytes: int
    long_nbytes: int
    tuple_keys: int
    refuse_unknown: bool
    dialect: int  # of persistent ids, see Dialect


class Graph(NamedTuple):
    """What a pickle builds, in columns. A value is a (kind, payload) pair; value 0 is the root.

    The numbering is canonical, so that two backends give equal graphs: values are scanned from 0 on, and a node, tensor,
    storage or global that is met for the first time takes the next free id; a node's children are appended to the
    values at that moment (breadth first). strings, blobs and longs get one entry for each time one is met. What the
    pickle made and dropped again does not appear, but for its globals: all that it names are there, those that no value
    refers to last and as they come in the pickle, since plain pickle would have imported them.

    A backend returns a plain tuple of these, in this order. Rows are native-endian int64, in bytes or a read-only view.
    """

    kinds: bytes  # one byte a value
    payloads: Buffer  # int64 a value
    nodes: Buffer  # NODE_FIELDS int64 a node
    strings: list[str]
    blobs: list[bytes]
    longs: list[int]
    globals: list[tuple[str, str]]
    storages: Buffer  # STORAGE_FIELDS int64 a storage
    storage_keys: bytes  # all keys, one after the other, as UTF-8 (surrogatepass): most are never asked for
    locations: list[str]  # one a storage: "cpu", "cuda:0"
    tensors: Buffer  # TENSOR_FIELDS int64 a tensor
    dims: Buffer  # int64
    nbytes: int  # of the pickle, STOP included


class Maker(NamedTuple):
    """How read_tensor makes what it fills: make(sizes, strides, dtype=dtypes[dtype], device=device)."""

    make: Callable[..., Any]
    keywords: tuple[str, str]  # ("dtype", "device")
    device: Any
    dtypes: list[Any]  # None for one that is made in another way
    type: type  # of what it makes: anything else is not filled
    address: Callable[[Any], int]  # of its memory, which has the extent of sizes and strides; 0 for none


class Hot(NamedTuple):
    """What read_tensor needs to know of an open file; the fields that no other comment explains are those of read_record.

    Without a maker a tuple (buffer, dtype, sizes, strides) is made.
    """

    source: Any  # of which `handle` and `stamp` are looked up each time: closing changes them
    block: Text
    entries: Buffer
    kinds: Buffer  # and from here on columns of a Graph
    payloads: Buffer
    tensors: Buffer
    dims: Buffer
    direct: Buffer  # int64 a storage: the stored record that holds its bytes as they are, or -1
    limit: int  # bytes; of so many or more, a tensor is not read
    maker: Maker | None
    is_off: Callable[[], bool]  # asked before the maker is: true where what it makes would be of another sort


class Backend(Protocol):
    """What a backend does."""

    @property
    def name(self) -> str:
        """What ZIPSLICER_BACKEND calls it: native or pure."""
        ...

    def allocate(self, nbytes: int, /) -> Buffer:
        """A writable buffer of nbytes, of any content; about 2 MiB and more on huge pages, where there are any."""
        ...

    def read_bytes(self, handle: Handle, offset: int, nbytes: int, /) -> Text:
        """A stretch of the file, whole, for a parser; many bytes may be a read-only view that nobody else can write to.

        Raises: OSError; ChangedError where the file ends first, at the offset of the first byte that is missing.
        """
        ...

    def read_record(
        self, handle: Handle, stamp: bytes, block: Text, entries: Buffer, record: int, start: int, nbytes: int, /
    ) -> Buffer:
        """One small read: bytes [start, start + nbytes) of a stored record, in a new buffer. One preadv and one fstat.

        The first read of a record proves its local header, with the same preadv where the payload is near, and writes
        PAYLOAD_OFFSET into `entries`. `stamp` is three native int64 (size, mtime in ns, inode) that fstat must confirm
        after the read, or b"" for a source without them. REQUIRES: start + nbytes <= the record's STORED_NBYTES.

        Raises: OSError, ArchiveError, ChangedError.
        """
        ...

    def read_tensor(self, hot: Hot, value: int, /) -> Any:
        """A small tensor by read_record, in one call: the value at position `value`; of row ~value, where it is negative.

        None for what is no tensor, and for a row without a direct record, with flags, of no elements, or of too many
        bytes; and where the maker makes nothing that can be filled. Such are read in another way.

        Raises: OSError, ArchiveError, ChangedError.
        """
        ...

    def read_records(
        self,
        handle: Handle,
        stamp: bytes,
        block: Text,
        entries: Buffer,
        jobs: bytes,
        buffers: Sequence[Buffer],
        threads: int,
        /,
    ) -> None:
        """Many reads at once: `jobs` are rows of Job, merged where neighbours are near, in file order, on threads.

        Proves and stamps as read_record does. Raises: OSError, ArchiveError, ChangedError.
        """
        ...

    def read_tensors(self, hot: Hot, numbers: list[int], whole: bool, threads: int, /) -> list[Any]:
        """Small tensors by the numbers of their rows, in one read: what read_tensor gives for each, by read_records.

        `whole`: only of rows that are all of a storage in which no other of these rows lies; None for the others.

        Raises: OSError, ArchiveError, ChangedError.
        """
        ...

    def read_runs(
        self,
        handle: Handle,
        stamp: bytes,
        block: Text,
        entries: Buffer,
        record: int,
        start: int,
        nbytes: int,
        dims: list[int],
        buffer: Buffer,
        threads: int,
        /,
    ) -> None:
        """Many runs of `nbytes` bytes of one stored record, one after the other into `buffer`, which they fill.

        The first begins at byte `start`; `dims` is (count, stride in bytes) of each dimension around a run, outermost
        first: count 2, stride 9, count 3, stride 4 are runs at 0, 4, 8, 9, 13 and 17 from there on.

        Reads and proves as read_records does. Raises: OSError, ArchiveError, ChangedError.
        """
        ...

    def find_directory(self, tail: Text, tail_offset: int, base: int, /) -> tuple[int, int, int]:
        """The last bytes of an archive that begins at `base` -> (offset, nbytes, count) of its central directory.

        `tail` begins at file offset `tail_offset` and reaches to the archive's end; it holds the whole archive or at
        least 65,633 bytes (the longest comment and the three end records). Raises: ArchiveError.
        """
        ...

    def parse_directory(self, block: Text, count: int, offset: int, base: int, /) -> tuple[Buffer, int]:
        """The central directory, which lies at file offset `offset` -> (entries, prefix_nbytes).

        `entries` is count rows of ENTRY_FIELDS int64 in directory order; the archive root is the first prefix_nbytes
        bytes of any name, its slash included. Raises: ArchiveError, UnsupportedError.
        """
        ...

    def find_records(
        self, block: Text, entries: Buffer, prefix: bytes, names: bytes, ends: Sequence[int], /
    ) -> list[int]:
        """For each name the index of the record that is called prefix + name, byte for byte; -1 where there is none.

        The names stand one after the other in `names`; each ends at the byte that `ends` has for it.
        """
        ...

    def parse_local_header(self, head: bytes, block: Text, entries: Buffer, record: int, /) -> int:
        """The first bytes of a record, from its local header on -> file offset of its payload; proves that both headers agree.

        `head` must reach over the fixed 30 bytes, the name and the extra field. Raises: ArchiveError.
        """
        ...

    def scan_pickle(self, program: Text, actions: Actions, limits: Sequence[int], /) -> tuple[Any, ...]:
        """A pickle -> the fields of a Graph. Runs nothing, imports nothing, and never recurses.

        Raises: ProgramError, TableError, UnsupportedError, UnsafeError; offset counts from the pickle's first byte and
        is that of the opcode at fault.
        """
        ...


def choose(wanted: str | None = None) -> Backend:
    """The backend that ZIPSLICER_BACKEND (native, pure, or auto) asks for.

    auto takes native if it was built. A native module that is present and fails to load raises: a broken build must
    not look like a missing one.
    """
    wanted = wanted or os.environ.get("ZIPSLICER_BACKEND") or "auto"
    if wanted not in ("native", "pure", "auto"):
        raise ValueError(f"ZIPSLICER_BACKEND must be native, pure or auto, not {wanted!r}")
    built = importlib.util.find_spec("._native", __package__) is not None
    if wanted == "native" and not built:
        raise ImportError(
            "ZIPSLICER_BACKEND=native, and this installation has no zipslicer._native: it was built without a compiler. "
            "Reinstall with ZIPSLICER_REQUIRE_NATIVE=1 to see why, or set ZIPSLICER_BACKEND=pure."
        )
    name = "._native" if built and wanted != "pure" else "._pure"
    return cast("Backend", importlib.import_module(name, __package__))
