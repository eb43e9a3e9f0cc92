"""ByteSource: a path, a file object or bytes in, positioned reads out.

A source is what the backends read through. Its `handle` is a file descriptor where the platform reads at an offset
(POSIX), and the source itself, with `preadv`, everywhere else. No source keeps a position, so that threads and forked
children share one.
"""

from __future__ import annotations

import io
import os
import stat
import threading
from array import array
from collections.abc import Sequence
from typing import Any, Protocol, Union

from .backend import Backend, Handle
from .errors import ChangedError

__all__ = ["ByteSource", "LocalFile", "open_source"]

Pathish = Union[str, "os.PathLike[str]"]


class ByteSource(Protocol):
    """Bytes that can be read at any offset."""

    size: int
    stamp: bytes  # size, mtime in ns and inode as native int64, which the backend compares after each read; or b""
    path: str | None  # to say where, and to open again after pickling

    handle: Handle

    def close(self) -> None: ...


class Closed:
    """The handle of a source after close()."""

    def preadv(self, _buffers: Sequence[Any], _offset: int, /) -> int:
        raise ValueError("the checkpoint is closed")


class LocalFile:
    """A regular file, opened once; never by its path again, so that it stays the one that was checked.

    Raises:
        FileNotFoundError, PermissionError, IsADirectoryError: as the system says.
        OSError: for what is no regular file: a FIFO would hang, a device would never end.
    """

    def __init__(self, path: Pathish) -> None:
        self.path: str | None = os.fspath(path)
        if not isinstance(self.path, str):
            raise TypeError("a path must be a str or an os.PathLike of str")
        self._fd = os.open(
            self.path,
            os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0),
        )
        try:
            facts = os.fstat(self._fd)
            if stat.S_ISDIR(facts.st_mode):
                raise IsADirectoryError(21, "is a directory; open a file in it", self.path)
            if not stat.S_ISREG(facts.st_mode):
                raise OSError(22, "is no regular file", self.path)
        except BaseException:
            self.close()
            raise
        self.size = facts.st_size
        self.stamp = array("q", (facts.st_size, facts.st_mtime_ns, facts.st_ino)).tobytes()
        self._lock = threading.Lock()
        # An attribute, looked up for each tensor that is read: closing replaces it.
        self.handle: Handle = self._fd if hasattr(os, "preadv") else self

    def preadv(self, buffers: Sequence[Any], offset: int, /) -> int:
        """For platforms without a positioned read (Windows, WASM): seek and read under a lock."""
        with self._lock:
            os.lseek(self._fd, offset, os.SEEK_SET)
            done = 0
            for buffer in buffers:
                got = os.read(self._fd, len(buffer))
                buffer[: len(got)] = got
                done += len(got)
                if len(got) < len(buffer):
                    break
            return done

    def close(self) -> None:
        fd, self._fd, self.handle = self._fd, -1, Closed()
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()


class Memory:
    """Bytes that are already in memory."""

    stamp = b""
    path: str | None = None

    def __init__(self, content: Any) -> None:
        self._view = memoryview(content).cast("B")
        self.size = len(self._view)
        self.handle: Handle = self

    def preadv(self, buffers: Sequence[Any], offset: int, /) -> int:
        done = 0
        for buffer in buffers:
            part = self._view[offset + done : offset + done + len(buffer)]
            buffer[: len(part)] = part
            done += len(part)
        return done

    def close(self) -> None:
        self.handle = Closed()
        self._view = memoryview(b"")


class FileObject:
    """A seekable binary file object, read under a lock. It stays open, and the caller's."""

    stamp = b""
    path: str | None = None

    def __init__(self, file: Any) -> None:
        self._file = file
        self._lock = threading.Lock()
        self.size = file.seek(0, io.SEEK_END)
        self.handle: Handle = self

    def preadv(self, buffers: Sequence[Any], offset: int, /) -> int:
        with self._lock:
            self._file.seek(offset)
            done = 0
            for buffer in buffers:
                got = self._file.readinto(buffer) if hasattr(self._file, "readinto") else self._copy(buffer)
                done += got or 0
                if (got or 0) < len(buffer):
                    break
            return done

    def _copy(self, buffer: Any) -> int:
        got = self._file.read(len(buffer))
        buffer[: len(got)] = got
        return len(got)

    def close(self) -> None:
        self.handle = Closed()


def open_source(source: Any) -> ByteSource:
    """A path, bytes or a seekable binary file object -> a ByteSource."""
    if isinstance(source, (str, os.PathLike)):
        return LocalFile(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return Memory(source)
    if hasattr(source, "seek") and hasattr(source, "read"):
        return FileObject(source)
    raise TypeError(f"a checkpoint is opened from a path, bytes or a seekable binary file, not {type(source).__name__}")


def read_at(backend: Backend, source: ByteSource, offset: int, nbytes: int) -> bytes:
    """Bytes of a source, whole, for the parsers. REQUIRES: offset + nbytes <= source.size, and nbytes is bounded."""
    if offset < 0 or offset + nbytes > source.size:
        raise ChangedError("the file ends before the bytes that are wanted of it", offset=source.size, path=source.path)
    return backend.read_bytes(source.handle, offset, nbytes)
