"""Checkpoint: open() and load(), the four steps from a path to what the user holds, in order."""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .archive import Archive, is_swapped
from .backend import Entry, choose
from .dcp import dcp_table
from .dcp_metadata import is_metadata, read_folder
from .errors import ArchiveError, ChangedError
from .exports import any_archive, is_checkpoint, is_config, is_package, read_config, read_layout
from .joined import join
from .legacy import Legacy, open_archive
from .opening import open_source
from .policy import Limits
from .program import run_program
from .reader import ReadOptions, default_threads
from .safetensors_file import is_safetensors, safetensors_table
from .shards import ShardedView, locate, read_index
from .source import ByteSource, OpenFile
from .state_dict import LazyStateDict, View
from .stream import bar_of
from .table import TensorTable
from .verify import Verified
from .verify import check as check_archives

__all__ = ["Checkpoint", "backend", "load", "open"]


_BACKEND = choose()  # once, whole, at import: a broken build shows at once, and opening a file loads no library


def backend() -> str:
    """What reads the files, "native" or "pure". ZIPSLICER_BACKEND chooses it before the first import."""
    return _BACKEND.name


class Checkpoint:
    """An open checkpoint file, whatever its root is. Closes with ``with``, with `close`, or when nothing refers to it.

    Attributes:
        root: what torch.load would return, lazily.
        tensors: every tensor of the file, flat, by dotted path: a LazyStateDict. Levels that a state_dict() does not name
            (`_modules`, `_parameters`, `_buffers` of a pickled nn.Module) are left out of the paths.
        placeholders: what the file names and zipslicer did not build, by dotted path; see zipslicer.describe.
    """

    def __init__(self, view: View) -> None:
        self._view = view
        self._tensors: LazyStateDict | None = None

    if not TYPE_CHECKING:  # which would take every name for one

        def __getattr__(self, name: str) -> Any:
            hint = f": .tensors.{name} has, and what load() returns, .root" if hasattr(LazyStateDict, name) else ""
            raise AttributeError(f"a Checkpoint has no {name!r}{hint}")

        def __getitem__(self, key: object) -> Any:
            raise TypeError(
                "a Checkpoint has no keys itself: .tensors has those of all tensors, .root is what load() returns"
            )

    @property
    def path(self) -> str | None:
        return self._view.path

    @property
    def root(self) -> Any:
        return self._view.root

    @property
    def tensors(self) -> LazyStateDict:
        if self._tensors is None:
            self._tensors = self._view.tensors()
        return self._tensors

    @property
    def placeholders(self) -> dict[str, Any]:
        return self._view.strangers()

    @property
    def window(self) -> tuple[int, int]:
        """(offset, nbytes) of this checkpoint in its file. Streams of torch before 1.6 may follow each other in one file:
        the next one begins where this one ends, and open(..., window=...) takes it.
        """
        return self._view.window

    @property
    def records(self) -> list[str]:
        """The names of all records of the archive, in directory order; after the name of its file where there are shards."""
        return self._view.records()

    def verify(self, *, strict: bool = True, threads: int | None = None, progress: bool = False) -> Verified:
        """Read the file once, whole, and compare every record with its CRC-32 in the directory: damage, not forgery.

        Args:
            strict: raise for damage. False returns it, in `damaged`.
            threads: as for reading.
            progress: show a bar of bytes (needs tqdm).

        Raises:
            ArchiveError: bytes are not those that were written. It names the first record, and says how many there are.
            UnsupportedError: a record is compressed in a way that torch does not write.
            ChangedError: the file was changed after it was opened.
            OSError: it cannot be read.
        """
        archives = self._view.archives()
        total = sum(sum(archive.column(Entry.STORED_NBYTES)) for archive in archives if archive.has_checksums)
        with bar_of(progress, total) as bar:
            found = check_archives(archives, threads or default_threads(), bar)
        if strict and found.damaged:
            error = found.damaged[0]
            if len(found.damaged) > 1:
                error.message += f"; {len(found.damaged)} records are damaged"
            raise error
        return found

    def close(self) -> None:
        self._view.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        tensors, storages = self._view.counts()
        return f"Checkpoint({self.path!r}: {tensors} tensors, {storages} storages)"


def open(
    source: Any,
    *,
    map_location: Any = "cpu",
    dtype: Any = None,
    cache_tensors: bool = False,
    framework: str = "pt",
    mmap: bool = False,
    direct: bool = False,
    unknown: str = "placeholder",
    allow: Mapping[str, Any] | None = None,
    threads: int | None = None,
    limits: Limits | None = None,
    window: tuple[int, int] | None = None,
    record: str = "data.pkl",
    check: bool = True,
    verify: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Checkpoint:
    """Open a checkpoint without reading a tensor of it, and without running a line of code from it.

    Args:
        source: a path; a URL ("s3://bucket/model.pth", "https://...", whatever fsspec knows); bytes, a bytearray, memoryview
            or mmap; a binary file object, which is read from its position on; a folder, or an index of shards (*.json).
            What is a gzip stream is unpacked to a temporary file first, and a
            safetensors file is opened through the package of that name.
        map_location: where tensors go: a device, a dict from the file's device names to devices, or a callable
            (storage, device name) -> storage or None, as torch.load has it. None is the CPU, whatever the file names.
        dtype: a floating-point torch.dtype, or its name: floating-point tensors are cast to it when they are read.
        cache_tensors: keep each storage that was read, whole; tensors then share memory as they do in the file.
        framework: "pt" makes tensors of torch, "np" arrays of NumPy, for which torch need not be there. Then `dtype` is a
            floating-point dtype of NumPy, and `map_location` "cpu" or None.
        mmap: tensors show the file, which is mapped, in place of memory of their own: nothing is read or copied before it
            is used, and processes share the pages. What is written to a tensor stays in memory. THE RISK: whoever touches
            a tensor whose file was cut short gets a signal (SIGBUS) that ends the process, and a file that is written to
            changes tensors. Deflated, byte-swapped and cast tensors are read as ever, and so are those whose bytes are
            not aligned. The file must be one on disk: a path, or a file object of one.
        direct: read large tensors past the page cache (O_DIRECT), so that reading a file once does not drive others out
            of it. Small reads, and file systems that refuse it, go through the page cache as ever.
        unknown: "placeholder" puts an inert Placeholder for what policy does not know; "error" refuses the file.
        allow: classes to build for real, by dotted name: {"pkg.Config": pkg.Config}. They are called with what the file says.
        threads: for large reads; by default the CPUs that affinity and control group leave to this process, at most 8, or
            ZIPSLICER_THREADS.
        limits: what the file may ask for before a tensor is touched.
        window: (offset, nbytes) of an archive inside a larger file.
        record: the one to read, where an archive has several: a pickle (TorchScript keeps its constants in
            "constants.pkl"), or a checkpoint that is stored in it. By default all that torch.export, torch.package and
            TorchScript have are listed.
        check: of shards: open all files at once and compare their keys with the index. False opens each when it is touched.
        verify: read the file once, whole, before it is returned, and compare all records with their checksums: see
            Checkpoint.verify.
        storage_options: of a URL, as fsspec has them for its protocol: keys, endpoints, headers.
        cache_dir: of a URL: a folder for what is read of tensors, in parts of 8 MiB, from which it is read the next time, by
            any process, if the object has not changed. Nothing in it is ever deleted.

    Raises:
        OSError: the system cannot open or read it.
        CheckpointError: it is damaged, or contradicts itself; UnsupportedError, UnsafeError.
    """
    options = ReadOptions(
        map_location, dtype, cache_tensors, threads, framework, mmap, direct, storage_options, cache_dir
    )
    terms = _Terms(unknown, {} if allow is None else allow, limits or Limits(), window, record)
    checkpoint = _opened(source, options, terms, check)
    if verify:
        try:
            checkpoint.verify(threads=threads)
        except BaseException:
            checkpoint.close()
            raise
    return checkpoint


def load(
    source: Any,
    map_location: Any = "cpu",
    dtype: Any = None,
    cache_tensors: bool = False,
    debug: bool = False,
    *,
    weights_only: bool = True,
    framework: str = "pt",
    mmap: bool = False,
    direct: bool = False,
    unknown: str = "placeholder",
    allow: Mapping[str, Any] | None = None,
    threads: int | None = None,
    limits: Limits | None = None,
    window: tuple[int, int] | None = None,
    record: str = "data.pkl",
    check: bool = True,
    verify: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Any:
    """What torch.load would return, lazily: a mapping is a LazyStateDict, a list or tuple with tensors a LazySequence.

    A root that is a tensor is read; a root that policy does not know (a whole pickled model) is an inert Placeholder,
    whose tensors are in ``zipslicer.open(source).tensors``. Arguments and errors are those of `open`; `debug` is taken
    for the sake of callers of zipslicer 0.8.1, and `weights_only=False` changes nothing: no code of a file is ever run.
    """
    del debug
    if not weights_only:
        warnings.warn("weights_only=False changes nothing: zipslicer never runs code from a file", stacklevel=2)
    return open(
        source,
        map_location=map_location,
        dtype=dtype,
        cache_tensors=cache_tensors,
        framework=framework,
        mmap=mmap,
        direct=direct,
        unknown=unknown,
        allow=allow,
        threads=threads,
        limits=limits,
        window=window,
        record=record,
        check=check,
        verify=verify,
        storage_options=storage_options,
        cache_dir=cache_dir,
    ).root


@dataclasses.dataclass(frozen=True)
class _Terms:
    """What open() was told of the file, as against what comes out of it."""

    unknown: str
    allow: Mapping[str, Any]
    limits: Limits
    window: tuple[int, int] | None
    record: str

    def __post_init__(self) -> None:
        if self.unknown not in ("placeholder", "error"):
            raise ValueError(f'unknown must be "placeholder" or "error", not {self.unknown!r}')
        if not isinstance(self.allow, Mapping):
            raise TypeError(f"allow maps dotted names to classes; it is no {type(self.allow).__name__}")
        object.__setattr__(self, "allow", dict(self.allow))  # a shard may be opened later, by what was said now
        if not isinstance(self.limits, Limits):
            raise TypeError(f"limits are zipslicer.Limits, not {type(self.limits).__name__}")
        window: Any = self.window
        if window is not None and not (isinstance(window, tuple) and [type(n) for n in window] == [int, int]):
            raise TypeError(f"window is a pair of offset and nbytes, not {window!r}")


def _opened(source: Any, options: ReadOptions, terms: _Terms, check: bool) -> Checkpoint:
    """A file, or the several of a folder or an index."""
    found, is_index = locate(source)
    if _is_folder_of_ranks(found):
        return Checkpoint(_folder(os.fspath(found), options, terms, check))
    if not is_index:
        try:
            return Checkpoint(_file(options, terms, found))
        except (IsADirectoryError, PermissionError):  # the latter is what Windows says of a folder
            if not (isinstance(source, (str, os.PathLike)) and os.path.isdir(source)):
                raise
        found, is_index = locate(source, is_folder=True)
    if _is_folder_of_ranks(found):
        return Checkpoint(_folder(os.fspath(found), options, terms, check))
    if not is_index:
        return Checkpoint(_file(options, terms, found))
    if terms.window is not None:
        raise ValueError("window= is of one file, and this is an index of several")
    return Checkpoint(_sharded(os.fspath(found), options, terms, check))


def _file(options: ReadOptions, terms: _Terms, source: Any) -> View:
    """One file, whatever holds it."""
    bytes_in = _source(source, options, terms.limits)
    try:
        return _view(bytes_in, options, terms)
    except BaseException:
        bytes_in.close()
        raise


def _source(source: Any, options: ReadOptions, limits: Limits | None = None) -> ByteSource:
    opened = open_source(source, limits, options.storage_options, options.cache_dir)
    if options.mmap and not isinstance(opened, OpenFile):
        opened.close()
        raise ValueError("mmap=True maps a file on disk: bytes, and objects that are none, are read without it")
    if options.direct and isinstance(opened, OpenFile):
        opened.go_direct()
    return opened


def _sharded(path: str, options: ReadOptions, terms: _Terms, check: bool) -> View:
    """The files of an index."""
    index = read_index(path, _BACKEND, terms.limits, options.storage_options)
    view = ShardedView(index, functools.partial(_file, options, terms), options.framework)
    try:
        if check:
            view.check(options.threads or default_threads())
    except BaseException:
        view.close()
        raise
    return view


def _is_folder_of_ranks(source: Any) -> bool:
    return isinstance(source, (str, os.PathLike)) and is_metadata(str(os.fspath(source)))


def _folder(path: str, options: ReadOptions, terms: _Terms, check: bool) -> View:
    """What torch.distributed.checkpoint wrote, by the path of its metadata."""
    if terms.window is not None or options.mmap or terms.record != "data.pkl":
        raise ValueError("window=, mmap= and record= are of one file, and this is a folder of several")
    folder = read_folder(path, _BACKEND, terms.limits, options.storage_options)
    table = dcp_table(
        folder, _BACKEND, terms.limits, check=check, threads=options.threads or default_threads(),
        unknown=terms.unknown, allow=terms.allow, storage_options=options.storage_options, cache_dir=options.cache_dir,
    )  # fmt: skip
    return _of_table(table, options, terms)


def _view(source: ByteSource, options: ReadOptions, terms: _Terms) -> View:
    """The steps: source -> archive -> program -> table; for each of its parts where a file has several programs."""
    if terms.window is None and is_safetensors(source, _BACKEND):
        return _one(source, options, terms)
    archive = _archive(source, terms)
    # Three look-ups for the price of one, which a large directory makes felt.
    order, main, constants = archive.find(["byteorder", "data.pkl", "constants.pkl"])
    swapped = is_swapped(archive, order)
    layout = None
    if not isinstance(archive, Legacy) and not (terms.record == "data.pkl" and main >= 0 > constants):
        layout = read_layout(archive, terms.record, swapped)
    if layout is None:
        return _of_table(_table(archive, terms, swapped, main), options, terms)
    views = []
    for part in layout.parts:
        of_part = dataclasses.replace(terms, record=part.record)
        views.append(_of_table(part.table or _table(archive, of_part, swapped), options, of_part))
    return join([part.prefix for part in layout.parts], views, layout.keys)


def _one(source: ByteSource, options: ReadOptions, terms: _Terms) -> View:
    """One program of a file."""
    if terms.window is None and is_safetensors(source, _BACKEND):
        return _of_table(safetensors_table(source, _BACKEND, terms.limits), options, terms)
    archive = _archive(source, terms)
    return _of_table(_table(archive, terms, is_swapped(archive, archive.find(["byteorder"])[0])), options, terms)


def _of_table(table: TensorTable, options: ReadOptions, terms: _Terms) -> View:
    source = table.archive.source
    again = None
    if source.origin is not None:
        again = (_reopen, (source.origin, options, terms))
    return View(table, options, again)


def _archive(source: ByteSource, terms: _Terms) -> Archive:
    return any_archive(source, _BACKEND, terms.limits, terms.window, terms.record)


def _table(archive: Archive, terms: _Terms, swapped: bool, main: int | None = None) -> TensorTable:
    """A record of an archive: a pickle, a config of torch.export, or a checkpoint of its own.

    `main` is the number of data.pkl, where it is known.
    """
    record = terms.record
    if record != "data.pkl" and not isinstance(archive, Legacy):
        if is_config(record):
            return read_config(archive, record, swapped)[0]
        if is_checkpoint(archive, record):
            window = archive.extent(archive.find([record])[0])
            archive, record, main = open_archive(archive.source, _BACKEND, terms.limits, window), "data.pkl", None
            swapped = is_swapped(archive, archive.find(["byteorder"])[0])
    if isinstance(archive, Legacy):
        if record != "data.pkl":
            raise ArchiveError(f"a file from before torch 1.6 has no record {record!r}", path=archive.source.path)
        return TensorTable(archive.run(terms.unknown, terms.allow), archive, swapped)
    number = main if record == "data.pkl" else None
    program = run_program(archive, terms.limits, record=record, number=number, unknown=terms.unknown, allow=terms.allow)
    if record != "data.pkl" and is_package(archive):
        return TensorTable(program, archive, swapped, ".data", ".storage")
    return TensorTable(program, archive, swapped, record.removesuffix(".pkl"))


def _reopen(origin: str, options: ReadOptions, terms: _Terms, fingerprint: int) -> View:
    """Unpickle: the same program of the same file at the same path, known by its directory."""
    if is_metadata(origin):
        view = _folder(origin, options, terms, check=False)
    else:
        source = _source(origin, options)
        try:
            view = _one(source, options, terms)
        except BaseException:
            source.close()
            raise
    if view.table.archive.fingerprint() != fingerprint:
        view.close()
        raise ChangedError("the file at this path is not the one that was pickled", path=view.path)
    return view
