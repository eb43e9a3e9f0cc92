"""Opening: a path, a URL, bytes or a file object in, its ByteSource out.

What can only be read from front to back, and what is packed by gzip, is first copied to a temporary file.
"""

from __future__ import annotations

import io
import itertools
import mmap
import os
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .errors import ArchiveError, ChangedError, ZipSlicerError
from .policy import Limits
from .source import HEAD_NBYTES, ByteSource, FileObject, LocalFile, Memory, OpenFile, Pathish, is_url

__all__ = ["open_source"]

GZIP = b"\x1f\x8b"
CHUNK = 1 << 16  # bytes that are copied at a time; as gzip they become 66 MB at most
# They can seek, by decompressing from the start again.
FRONT_TO_BACK = {"gzip.GzipFile", "bz2.BZ2File", "lzma.LZMAFile", "zipfile.ZipExtFile"}


def open_source(
    source: Any,
    limits: Limits | None = None,
    storage_options: Mapping[str, Any] | None = None,
    cache_dir: Pathish | None = None,
) -> ByteSource:
    """A path, a URL, bytes (also a bytearray, memoryview or mmap) or a binary file object -> a ByteSource.

    A file object is read from its position on. One that cannot seek, and whatever begins as a gzip stream, is copied to
    a temporary file, which is gone when the source is closed.

    Raises:
        OSError: from the system or the file object.
        TypeError: it is none of these.
        ArchiveError: it is a gzip stream, and damaged, or grows beyond `limits`.
    """
    if is_url(source):
        from .remote import RemoteFile  # which brings libraries that files do without

        opened: ByteSource = RemoteFile(source, storage_options, cache_dir)
    elif storage_options or cache_dir is not None:
        raise ValueError("storage_options= and cache_dir= are of a URL")
    elif isinstance(source, (str, os.PathLike)):
        opened = LocalFile(source)
    elif isinstance(source, (bytes, bytearray, memoryview, mmap.mmap)):
        opened = Memory(source)
    elif hasattr(source, "read"):
        opened = _open_object(source, limits or Limits())
    else:
        raise TypeError(
            f"a checkpoint is opened from a path, bytes or a binary file object, not {type(source).__name__}"
        )
    try:
        made = opened
        if opened.size > opened.start and not opened.head:
            made.head = b"".join(_chunks(opened, min(HEAD_NBYTES, opened.size - opened.start)))
        if made.head.startswith(GZIP):
            made = _spooled(_gunzipped(_chunks(opened), limits or Limits()), opened.path)
            made.origin = opened.origin
            made.head = b"".join(_chunks(made, min(HEAD_NBYTES, made.size)))
    except BaseException as error:
        opened.close()
        if isinstance(error, ZipSlicerError):
            error.located(path=opened.path)
        raise
    if made is not opened:
        opened.close()
    return made


def _open_object(file: Any, limits: Limits) -> ByteSource:
    if getattr(file, "closed", False):
        raise ValueError("the file object is closed")
    if isinstance(file, io.TextIOBase) or (not isinstance(file, io.IOBase) and isinstance(file.read(0), str)):
        raise TypeError("the file object is in text mode; open it in binary: open(path, 'rb')")
    if isinstance(file, io.IOBase) and not file.readable():
        raise io.UnsupportedOperation("the file object is not open for reading")
    fd = _descriptor(file)
    if fd is not None:
        start = file.tell()
        return OpenFile(os.dup(fd), None, start)
    can_seek = file.seekable() if hasattr(file, "seekable") else hasattr(file, "seek")
    if can_seek and FRONT_TO_BACK.isdisjoint(f"{cls.__module__}.{cls.__qualname__}" for cls in type(file).__mro__):
        return FileObject(file)
    start = file.tell() if can_seek else None
    made = _spooled(_maybe_gunzipped(_read_through(file), limits))
    if start is not None:
        file.seek(start)
    return made


def _descriptor(file: Any) -> int | None:
    """The descriptor of a regular file whose bytes are what the object reads, or None.

    Only where the class is known: the fileno() of a GzipFile is that of the compressed file, and that of a
    SpooledTemporaryFile makes it write one.
    """
    if not hasattr(os, "preadv"):
        return None  # there a read would move the caller's position
    if type(file).__module__ == "tempfile" and type(file).__name__ == "_TemporaryFileWrapper":
        file = file.file
    if type(file) is io.BufferedRandom:
        file.flush()
    if type(file) in (io.BufferedReader, io.BufferedRandom):
        file = file.raw
    if type(file) is not io.FileIO:
        return None
    fd = file.fileno()
    return fd if stat.S_ISREG(os.fstat(fd).st_mode) else None


def _chunks(source: ByteSource, nbytes: int | None = None) -> Iterator[bytes]:
    """A source from its start on, or `nbytes` of it."""
    offset, handle = source.start, source.handle
    end = source.size if nbytes is None else offset + nbytes
    while offset < end:
        buffer = memoryview(bytearray(min(CHUNK, end - offset)))
        if isinstance(handle, (int, tuple)):
            got = os.preadv(handle if isinstance(handle, int) else handle[0], [buffer], offset)
        else:
            got = handle.preadv([buffer], offset)
        if not got:
            raise ChangedError("the file ends here: it is shorter than when it was opened", offset=offset)
        yield bytes(buffer[:got])
        offset += got


def _read_through(file: Any) -> Iterator[bytes]:
    """What a file object has left."""
    while True:
        try:
            chunk = file.read(CHUNK)
        except (EOFError, zlib.error) as error:
            raise ArchiveError(f"the compressed stream is damaged: {error}") from None
        except OSError as error:
            if type(error).__name__ == "BadGzipFile":
                raise ArchiveError(f"the gzip stream is damaged: {error}") from None
            raise
        if chunk is None:
            raise BlockingIOError("the file object has nothing to read yet; open it in blocking mode")
        if not chunk:
            return
        yield chunk


def _maybe_gunzipped(chunks: Iterator[bytes], limits: Limits) -> Iterator[bytes]:
    head = b""
    for chunk in chunks:
        head += chunk
        if len(head) >= len(GZIP):
            break
    whole = itertools.chain([head], chunks)
    return _gunzipped(whole, limits) if head.startswith(GZIP) else whole


def _gunzipped(chunks: Iterable[bytes], limits: Limits) -> Iterator[bytes]:
    """The content of a gzip stream. Several members, one after the other, are one content (RFC 1952, 2.2)."""
    machine = None
    offset = made = 0
    for chunk in chunks:
        offset += len(chunk)
        rest = chunk
        while rest:
            if machine is None:
                rest = rest.lstrip(b"\0")  # as gzip does: tapes and disks padded it
                machine = zlib.decompressobj(31) if rest else None
                continue
            try:
                part = machine.decompress(rest)
            except zlib.error as error:
                raise ArchiveError(f"the gzip stream is damaged: {error}", offset=offset - len(rest)) from None
            made += len(part)
            if made > max(limits.inflated_nbytes, limits.inflated_ratio * offset):
                raise ArchiveError(
                    f"the gzip stream inflates from {offset} to {made} bytes and more; Limits(inflated_ratio=...) allows it"
                )
            yield part
            rest = machine.unused_data
            machine = None if machine.eof else machine
    if machine is not None:
        raise ArchiveError("the gzip stream is cut short", offset=offset)


def _spooled(chunks: Iterable[bytes], path: str | None = None) -> ByteSource:
    """What comes front to back, in a temporary file without a name."""
    import tempfile  # takes longer to import than the rest of zipslicer, and is seldom needed

    with tempfile.TemporaryFile(prefix="zipslicer-") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        return OpenFile(os.dup(file.fileno()), path)
