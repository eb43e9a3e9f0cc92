"""Safetensors: a file of that format in, an archive and a program like a checkpoint's out, so that code takes either.

The safetensors package reads and checks the header. The tensors' bytes are read here, like any others: into memory of
their own, in parallel, by slices.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import struct
import sys
from array import array

from .archive import Listed
from .backend import Backend, Graph, Kind
from .errors import ArchiveError, ChangedError, UnsupportedError
from .policy import DTYPES, Limits
from .program import Program
from .source import ByteSource, head_at, read_at
from .table import TensorTable

__all__ = ["SafetensorsArchive", "is_safetensors", "safetensors_table"]

LENGTH = struct.Struct("<Q")
CODES = {dtype.code: index for index, dtype in enumerate(DTYPES) if dtype.code is not None}
TOO_MANY = 1 << 58  # elements; of 16 bytes each they are more than 64 bits can count
PACKED = {"F4": 2}  # elements in what torch counts as one


def is_safetensors(source: ByteSource, backend: Backend) -> bool:
    """Whether a source begins as such a file does: the length of a header within it, and a JSON object."""
    room = source.size - source.start - LENGTH.size
    if room < 2:
        return False
    head = head_at(backend, source, source.start, source.size - source.start)
    return head[LENGTH.size : LENGTH.size + 1] == b"{" and 2 <= LENGTH.unpack_from(head)[0] <= room


class SafetensorsArchive(Listed):
    """The tensors of one file as the records of an archive, each called by its tensor's name.

    Attributes:
        tensors: of each record (name, index into DTYPES, elements, sizes and strides).

    Raises:
        ImportError: the safetensors package is not installed.
        ArchiveError: the package refuses the file.
        UnsupportedError: a dtype torch does not have.
    """

    def __init__(self, source: ByteSource, backend: Backend, limits: Limits) -> None:
        self.source, self.backend, self.limits, self.window = source, backend, limits, None
        self.base, self.nbytes, self.root = source.start, source.size - source.start, b""
        header_nbytes = LENGTH.size + LENGTH.unpack(read_at(backend, source, self.base, LENGTH.size))[0]
        if header_nbytes > limits.directory_nbytes:
            raise ArchiveError(
                f"the header has {header_nbytes} bytes; Limits(directory_nbytes=...) raises the limit", path=source.path
            )
        header = read_at(backend, source, self.base, header_nbytes)
        self.metadata, facts = _read_header(header, source)
        self.tensors: list[tuple[str, int, int, list[int]]] = []
        records, offset = [], self.base + header_nbytes
        for name, code, shape in facts:
            dtype = CODES.get(code)
            if dtype is None or (code in PACKED and (not shape or shape[-1] % PACKED[code])):
                raise UnsupportedError(
                    f"torch has no tensors of dtype {code} and shape {shape}", key=name, path=source.path
                )
            if code in PACKED:
                shape[-1] //= PACKED[code]
            strides, run = [], 1
            for n in reversed(shape):
                strides.append(run)
                run *= max(n, 1)
            if len(shape) > limits.dimensions or run >= TOO_MANY:
                raise ArchiveError(f"no tensor has the shape {shape[: limits.dimensions]}", key=name, path=source.path)
            count = 0 if 0 in shape else run
            nbytes = count * DTYPES[dtype].itemsize
            records.append((name, offset, nbytes))
            self.tensors.append((name, dtype, count, [*shape, *reversed(strides)]))
            offset += nbytes
        if offset != source.size:
            raise ChangedError("the header names other bytes than the file has", offset=offset, path=source.path)
        self._list(records, header)


def _read_header(header: bytes, source: ByteSource) -> tuple[dict[str, str], list[tuple[str, str, list[int]]]]:
    """Metadata, and (name, dtype, shape) of each tensor in the order of their bytes, which follow without a gap.

    The package takes a path. Where the bytes that are read here have none, it gets a file with this header and, in the
    place of the tensors, a hole as large as they are.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(
            f"{source.path} is a safetensors file, and the safetensors package is not there: pip install safetensors"
        ) from error
    # The package imports the framework it is told; of the two, NumPy is the light one.
    framework = "np" if importlib.util.find_spec("numpy") else "pt"
    is_at_its_path = _is_at_its_path(source)
    with contextlib.ExitStack() as stack:
        if is_at_its_path:
            path = str(source.path)
        else:
            import tempfile

            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="zipslicer-"))
            path = os.path.join(folder, "header.safetensors")
            with open(path, "wb") as hollow:
                hollow.write(header)
                hollow.truncate(source.size - source.start)
        try:
            with safe_open(path, framework=framework) as file:
                metadata = file.metadata() or {}
                parts = [(name, file.get_slice(name)) for name in file.offset_keys()]
                facts = [(name, part.get_dtype(), list(part.get_shape())) for name, part in parts]
        except SafetensorError as error:
            raise ArchiveError(f"no safetensors file: {error}", path=source.path) from None
    # The package opens the path a second time: it must have seen the file that is read here.
    if is_at_its_path and not _is_at_its_path(source):
        raise ChangedError("the file was changed after it was opened", path=source.path)
    return metadata, facts


def _is_at_its_path(source: ByteSource) -> bool:
    """Whether who opens the path gets the bytes of the source: no file object, no bytes, nothing unpacked or remote."""
    if source.path is None or not source.stamp:
        return False
    now = os.stat(source.path)
    return source.stamp == array("q", (now.st_size, now.st_mtime_ns, now.st_ino)).tobytes()


def safetensors_table(source: ByteSource, backend: Backend, limits: Limits) -> TensorTable:
    """The tensors of a safetensors file, which has them in little-endian order."""
    archive = SafetensorsArchive(source, backend, limits)
    return TensorTable(_program(archive), archive, sys.byteorder == "big")


def _program(archive: SafetensorsArchive) -> Program:
    """What a pickle of the same tensors in a dict would give."""
    tensors, dims, storages, ends = array("q"), array("q"), array("q"), 0
    for number, (name, index, elements, sizes_and_strides) in enumerate(archive.tensors):
        itemsize = DTYPES[index].itemsize
        ends += len(name.encode("utf-8", "surrogatepass"))
        tensors.extend((number, index, itemsize, 0, len(dims), len(sizes_and_strides) // 2, 0, 0, elements))
        storages.extend((index, elements * itemsize, 0, ends))
        dims.extend(sizes_and_strides)
    count = archive.count
    names = [name for name, *_ in archive.tensors]
    graph = Graph(
        kinds=bytes([Kind.DICT]) + bytes([Kind.STR, Kind.TENSOR]) * count,
        payloads=array("q", [0, *itertools.chain(*zip(range(count), range(count)))]).tobytes(),
        nodes=array("q", [Kind.DICT, 1, 2 * count, 0, 0]).tobytes(),
        strings=names,
        blobs=[],
        longs=[],
        globals=[],
        storages=storages.tobytes(),
        storage_keys="".join(names).encode("utf-8", "surrogatepass"),
        locations=["cpu"] * count,
        tensors=tensors.tobytes(),
        dims=dims.tobytes(),
        nbytes=0,
    )
    return Program(graph, {})
