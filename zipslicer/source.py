"""ByteSource: an offset and a buffer in, bytes out, of a file, a file object, or memory.

A source is what the backends read through. Its `handle` is a file descriptor where the platform reads at an offset
(POSIX), and the source itself, with `preadv`, everywhere else. No source keeps a position, so that threads and forked
children share one. opening.py makes them.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import re
import stat
import sys
import threading
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, Union

from .backend import Backend, Handle, Text
from .errors import ChangedError

__all__ = [
    "HEAD_NBYTES",
    "ByteSource",
    "LocalFile",
    "beside",
    "head_at",
    "is_outside",
    "is_url",
    "read_at",
    "read_into",
    "text_at",
    "without_secrets",
]

Pathish = Union[str, "os.PathLike[str]"]

Ahead = Callable[[Iterable[tuple[int, int]]], contextlib.AbstractContextManager[None]]

FEW = 1 << 18  # bytes that a source is not told of before they are read: what follows them will be wanted, too
HEAD_NBYTES = 512  # a block of tar
NORESERVE = 0x4000 if sys.platform == "linux" else 0
CLOSED = "what the checkpoint was opened from is closed"
CLOSED_CHECKPOINT = "the checkpoint is closed"
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+::.*|[A-Za-z][A-Za-z0-9+.-]+://.*", re.DOTALL)


class ByteSource(Protocol):
    """Bytes that can be read at any offset."""

    size: int
    start: int  # where an archive begins for whom no window is given: the position of a file object
    head: bytes  # HEAD_NBYTES from there on, or what there is, of which formats are told; empty if nobody has looked
    stamp: bytes  # size, mtime in ns and inode as native int64, which the backend compares after each read; or b""
    path: str | None  # to say where
    origin: str | None  # to open it again, after pickling

    handle: Handle

    @property
    def keeps(self) -> bool:
        """Whether what was read is near from then on, for every process of this machine: in the page cache, or another."""
        ...

    @property
    def ahead(self) -> Ahead | None:
        """Around reads, told of the (offset, nbytes) of each; None where waiting for them in turn is as good."""
        ...

    def close(self) -> None: ...


class Closed:
    """The handle of a source after close()."""

    def preadv(self, _buffers: Sequence[Any], _offset: int, /) -> int:
        raise ValueError(CLOSED_CHECKPOINT)


class OpenFile:
    """A regular file by its descriptor, which is closed with it; nobody's position is moved where reads are positioned.

    Raises: OSError: for what is no regular file: a FIFO would hang, a device would never end.
    """

    ahead: None = None
    keeps = True

    def __init__(self, fd: int, path: str | None = None, start: int = 0) -> None:
        self._fd = fd
        self.origin: str | None = path
        self._direct_fd = -1
        self._mapped: memoryview | None = None
        self.path: str | None = path
        self.start = start
        self.head = b""
        try:
            facts = os.fstat(fd)
            if stat.S_ISDIR(facts.st_mode):
                raise IsADirectoryError(21, "is a directory; open a file in it", path)
            if not stat.S_ISREG(facts.st_mode):
                raise OSError(22, "is no regular file", path)
        except BaseException:
            self.close()
            raise
        self.size = facts.st_size
        self.stamp = _stamp_of(facts)
        self._lock = threading.Lock()
        # An attribute, looked up for each tensor that is read: closing replaces it.
        self.handle: Handle = self._fd if hasattr(os, "preadv") else self

    def go_direct(self) -> None:
        """Read large, well placed stretches past the page cache from now on, where the system and its disk can do so."""
        if self.path is None or not hasattr(os, "O_DIRECT") or not isinstance(self.handle, int):
            return
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:  # a file system in memory, or one of another kind that has no such reads
            return
        if _stamp_of(os.fstat(fd)) != self.stamp:
            os.close(fd)  # another file by now
            return
        self._direct_fd, self.handle = fd, (self._fd, fd)

    def mapped(self) -> memoryview:
        """The file in memory, each page copied when it is written to; mapped once. Raises: OSError, ChangedError."""
        with self._lock:
            if self._fd < 0:
                raise ValueError(CLOSED_CHECKPOINT)
            if _stamp_of(os.fstat(self._fd)) != self.stamp:
                raise ChangedError("the file was changed after it was opened", path=self.path)
            if self._mapped is None:
                # NORESERVE: a file that is larger than the memory may be mapped, too. Python names the flag from 3.13 on.
                private = {}
                if hasattr(mmap, "MAP_PRIVATE"):
                    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", NORESERVE)
                    private = {"flags": flags, "prot": mmap.PROT_READ | mmap.PROT_WRITE}
                self._mapped = memoryview(mmap.mmap(self._fd, self.size, **(private or {"access": mmap.ACCESS_COPY})))
            return self._mapped

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
        """What was mapped stays so, for as long as a tensor shows it."""
        fds, self._fd, self._direct_fd, self.handle, self._mapped = (self._fd, self._direct_fd), -1, -1, Closed(), None
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()


def _stamp_of(facts: os.stat_result) -> bytes:
    return array("q", (facts.st_size, facts.st_mtime_ns, facts.st_ino)).tobytes()


class LocalFile(OpenFile):
    """A regular file, opened once; never by its path again, so that it stays the one that was checked.

    Raises:
        FileNotFoundError, PermissionError, IsADirectoryError: as the system says.
    """

    def __init__(self, path: Pathish) -> None:
        name = os.fspath(path)
        if not isinstance(name, str):
            raise TypeError("a path must be a str or an os.PathLike of str")
        flags = os.O_RDONLY
        for flag in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
            flags |= getattr(os, flag, 0)
        super().__init__(os.open(name, flags), name)


class Memory:
    """Bytes that are already in memory: held, and looked into only while they are read.

    So the caller may close a mapping, or let a bytearray grow, and later reads say what is wrong.
    """

    stamp = b""
    head = b""
    path: str | None = None
    origin: str | None = None
    ahead: None = None
    keeps = False
    start = 0

    def __init__(self, content: Any) -> None:
        self._content = content
        with memoryview(content) as view:
            if not view.c_contiguous:
                raise TypeError("a memoryview must be contiguous; take bytes(view)")
            self.size = view.nbytes
        self.handle: Handle = self

    def preadv(self, buffers: Sequence[Any], offset: int, /) -> int:
        done = 0
        try:
            whole = memoryview(self._content)
        except ValueError:  # a mapping that was closed, a memoryview that was released
            raise ValueError(CLOSED) from None
        with whole, whole.cast("B") as view:
            for buffer in buffers:
                part = view[offset + done : offset + done + len(buffer)]
                buffer[: len(part)] = part
                done += len(part)
        return done

    def close(self) -> None:
        self.handle = Closed()
        self._content = b""


class FileObject:
    """A seekable binary file object, read under a lock; its position is put back. It stays open, and the caller's."""

    stamp = b""
    head = b""
    path: str | None = None
    origin: str | None = None
    ahead: None = None
    keeps = False

    def __init__(self, file: Any) -> None:
        self._file = file
        self._lock = threading.Lock()
        self.start = _seek(file, 0, io.SEEK_CUR)
        self.size = _seek(file, 0, io.SEEK_END)
        file.seek(self.start)
        self.handle: Handle = self

    def preadv(self, buffers: Sequence[Any], offset: int, /) -> int:
        file = self._file
        with self._lock:
            if getattr(file, "closed", False):
                raise ValueError(CLOSED)
            before = _seek(file, 0, io.SEEK_CUR)
            try:
                file.seek(offset)
                done = 0
                for buffer in buffers:
                    got = file.readinto(buffer) if hasattr(file, "readinto") else self._copy(buffer)
                    done += got or 0
                    if (got or 0) < len(buffer):
                        break
                return done
            finally:
                file.seek(before)

    def _copy(self, buffer: Any) -> int:
        got = self._file.read(len(buffer))
        buffer[: len(got)] = got
        return len(got)

    def close(self) -> None:
        self.handle = Closed()


def _seek(file: Any, offset: int, whence: int) -> int:
    """Some file objects return no position from seek()."""
    place = file.seek(offset, whence)
    return int(file.tell() if place is None else place)


def is_url(path: Any) -> bool:
    """Whether a path names something behind a protocol: "s3://bucket/key". No path of a file does, on any system."""
    return isinstance(path, str) and URL.fullmatch(path) is not None


def without_secrets(url: str) -> str:
    """A URL for people: without user and password, and without a query, in which signatures stand."""
    return re.sub(r"(://)[^/@]*@", r"\1", url).partition("?")[0] if is_url(url) else url


def is_outside(file: str) -> str | None:
    """Why a name is none of a file at or below a folder, on this system or another; None if it is one."""
    if not file or "\0" in file or any("\ud800" <= c <= "\udfff" for c in file):
        return "is no name"
    if "\\" in file or ":" in file:
        return "has a drive, a stream or backslashes in it"
    if file.startswith("/"):
        return "is an absolute path"
    if any(part in ("", ".", "..") for part in file.split("/")):
        return "has '..', '.' or nothing between its slashes"
    return None


def beside(path: str, file: str) -> str:
    """The path or URL of a file that another one names. REQUIRES: not is_outside(file)."""
    if is_url(path):
        from urllib.parse import quote

        # Where "%2e%2e" would be "..", and what follows a "?" another question.
        name = quote(file) if path.lower().startswith("http") else file
        return f"{path.rpartition('/')[0]}/{name}"
    return os.path.join(os.path.dirname(path), file)


def read_at(backend: Backend, source: ByteSource, offset: int, nbytes: int) -> bytes:
    """Bytes of a source, whole. REQUIRES: offset + nbytes <= source.size, and nbytes is bounded."""
    return bytes(text_at(backend, source, offset, nbytes))  # which are bytes already, if they are few


def read_into(source: ByteSource, buffer: memoryview, offset: int) -> None:
    """Fill a buffer of bytes, and see that the file is still the one that was opened. Raises: OSError, ChangedError."""
    handle, done = source.handle, 0
    fd = handle[0] if isinstance(handle, tuple) else handle
    while done < len(buffer):
        rest = buffer[done:] if done else buffer
        got = os.preadv(fd, [rest], offset + done) if isinstance(fd, int) else fd.preadv([rest], offset + done)
        if not got:
            raise ChangedError("the file ends here: it is shorter than when it was opened", offset=offset + done)
        done += got
    if isinstance(fd, int) and source.stamp and _stamp_of(os.fstat(fd)) != source.stamp:
        raise ChangedError("the file was changed after it was opened", path=source.path)


def text_at(backend: Backend, source: ByteSource, offset: int, nbytes: int) -> Text:
    """The same for the parsers, which take many as the backend has read them."""
    if offset < 0 or offset + nbytes > source.size:
        raise ChangedError("the file ends before the bytes that are wanted of it", offset=source.size, path=source.path)
    if source.ahead is not None and nbytes > FEW:
        with source.ahead([(offset, nbytes)]):
            return backend.read_bytes(source.handle, offset, nbytes)
    return backend.read_bytes(source.handle, offset, nbytes)


def head_at(backend: Backend, source: ByteSource, offset: int, nbytes: int) -> bytes:
    """Up to HEAD_NBYTES of the `nbytes` that begin at an offset, to tell formats by; at the start they are at hand."""
    if offset == source.start and source.head:
        return source.head[:nbytes]
    return read_at(backend, source, offset, min(HEAD_NBYTES, nbytes))
