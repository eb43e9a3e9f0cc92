"""Replacement: a path in; what is written goes to a temporary file beside it, which takes its place when it is whole.

Whatever happens meanwhile (an exception, a full disk, SIGKILL, a power cut), the path names the old file or the new one,
and never a part of one.
"""

from __future__ import annotations

import ctypes
import os
import stat
import sys
from collections.abc import Sequence
from typing import Any

from .source import ByteSource

__all__ = ["Output", "Replacement"]

NAME_LENGTH = 48  # characters of the target's name in that of its temporary file, which may have 255 bytes
COPIED_NBYTES = 64 << 20  # that the kernel copies in one call, between which Ctrl-C is heard
AHEAD_NBYTES = 64 << 20  # after so many the disk is told to begin with them: a third of the time of a large file, seen
MOST_BUFFERS = 512  # of one writev; IOV_MAX is 1024


class Output:
    """Bytes in, one after the other; `offset` counts them. A file object, or what Replacement makes of a path."""

    offset = 0

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, parts: Sequence[Any]) -> None:
        """Buffers, in order. Raises: OSError."""
        for part in parts:
            view = memoryview(part).cast("B") if len(part) else memoryview(b"")
            while len(view):
                done = self._file.write(view)
                done = len(view) if done is None else done  # some file objects do not say
                self.offset += done
                view = view[done:]

    def copy(self, source: ByteSource, offset: int, nbytes: int) -> int:
        """Let the kernel copy bytes of a file; -> how many it has: maybe none, and the others are to be written."""
        del source, offset, nbytes
        return 0

    def commit(self) -> None:
        """All was written."""
        if hasattr(self._file, "flush"):
            self._file.flush()

    def discard(self) -> None:
        """It was not."""


class Replacement(Output):
    """The file that is to be at a path.

    A symbolic link stays one, and what it points to is replaced; the new file has the permissions of the old one. What is
    there and no regular file (a pipe, /dev/stdout) is written to as it is, which is all that can be done with it.

    Raises: OSError, as for the folder or the file: IsADirectoryError, FileNotFoundError, PermissionError.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        name = os.fspath(path)
        if not isinstance(name, str):
            raise TypeError("a path must be a str or an os.PathLike of str")
        self._path = os.path.realpath(name)
        self._temporary: str | None = None
        self._fd = -1
        self._process = os.getpid()
        self._begun = 0  # bytes that the disk was told of
        flags = os.O_WRONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        try:
            facts: os.stat_result | None = os.stat(name)
        except FileNotFoundError:
            facts = None
        if facts is not None and stat.S_ISDIR(facts.st_mode):
            raise IsADirectoryError(21, "is a directory; name a file in it", name)
        if facts is not None and not stat.S_ISREG(facts.st_mode):
            self._fd = os.open(name, flags)
            return
        folder, base = os.path.split(self._path)
        self._temporary = os.path.join(folder, f".{base[:NAME_LENGTH]}.{os.urandom(4).hex()}.tmp")
        try:
            self._fd = os.open(self._temporary, flags | os.O_CREAT | os.O_EXCL, 0o666)
        except FileNotFoundError:
            raise FileNotFoundError(2, "there is no such folder", folder) from None
        try:
            if facts is not None and hasattr(os, "fchmod"):
                os.fchmod(self._fd, stat.S_IMODE(facts.st_mode))
        except BaseException:
            self.discard()
            raise

    def write(self, parts: Sequence[Any]) -> None:
        views = [memoryview(part).cast("B") for part in parts if len(part)]
        while views:
            batch = views[:MOST_BUFFERS]
            done = os.writev(self._fd, batch) if hasattr(os, "writev") else os.write(self._fd, batch[0])
            self.offset += done
            self._write_out()
            while done:
                if done < len(views[0]):
                    views[0] = views[0][done:]
                    break
                done -= len(views.pop(0))

    def copy(self, source: ByteSource, offset: int, nbytes: int) -> int:
        handle = source.handle
        fd = handle[0] if isinstance(handle, tuple) else handle
        if self._temporary is None or not isinstance(fd, int) or not hasattr(os, "copy_file_range"):
            return 0
        done = 0
        try:
            while done < nbytes:
                # Within one file system this shares the blocks where it can (btrfs, XFS), and else copies no bytes to us.
                count = os.copy_file_range(fd, self._fd, min(nbytes - done, COPIED_NBYTES), offset + done, self.offset)
                if not count:
                    break
                done += count
                self.offset += count
                self._write_out()
        except OSError:  # not between some file systems; what else is wrong, the reading of the rest will say
            pass
        finally:
            os.lseek(self._fd, self.offset, os.SEEK_SET)  # copying with offsets leaves the position alone
        return done

    def _write_out(self) -> None:
        """Let the disk begin, so that fsync finds little left to wait for."""
        if self.offset - self._begun >= AHEAD_NBYTES and self._temporary is not None:
            _begin_to_write(self._fd, self._begun, self.offset - self._begun)
            self._begun = self.offset

    def commit(self) -> None:
        """The file takes its place, once the disk has it. Raises: OSError; the old file is then still there."""
        if self._temporary is None:
            os.close(self._fd)
            self._fd = -1
            return
        try:
            os.fsync(self._fd)
            fd, self._fd = self._fd, -1
            os.close(fd)
            os.replace(self._temporary, self._path)
        except BaseException:
            self.discard()
            raise
        self._temporary = None
        if os.name == "posix":
            folder = os.open(os.path.dirname(self._path), os.O_RDONLY)
            try:
                os.fsync(folder)  # else a power cut may bring the old name back
            except OSError:  # some network file systems have no such thing for folders
                pass
            finally:
                os.close(folder)

    def discard(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        if self._temporary is not None and self._process == os.getpid():  # a forked child has it no less
            try:
                os.unlink(self._temporary)
            except FileNotFoundError:
                pass
            self._temporary = None

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.discard()


def _begin_to_write(fd: int, offset: int, nbytes: int) -> None:
    """sync_file_range(2), which Python has not: a hint, and none where it is missing."""
    if _sync_file_range is not None:
        _sync_file_range(fd, offset, nbytes, 2)  # SYNC_FILE_RANGE_WRITE: begin, and do not wait


def _found_in_libc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    try:
        found = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):
        return None
    found.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return found


_sync_file_range = _found_in_libc()
