"""The backend in C++ (csrc/module.cc). backend.py says what each function does."""

from collections.abc import Sequence
from typing import Any, Final

from .backend import Actions, Buffer, Handle

name: Final = "native"

def allocate(nbytes: int, /) -> Buffer: ...
def read_bytes(handle: Handle, offset: int, nbytes: int, /) -> bytes: ...
def read_record(
    handle: Handle, stamp: bytes, block: bytes, entries: bytearray, record: int, start: int, nbytes: int, /
) -> Buffer: ...
def read_tensor(
    handle: Handle,
    stamp: bytes,
    block: bytes,
    entries: bytearray,
    tensors: Buffer,
    dims: Buffer,
    direct: Buffer,
    number: int,
    limit: int,
    /,
) -> tuple[Buffer, int, tuple[int, ...], tuple[int, ...]] | None: ...
def read_records(
    handle: Handle,
    stamp: bytes,
    block: bytes,
    entries: bytearray,
    jobs: bytes,
    buffers: Sequence[Buffer],
    threads: int,
    /,
) -> None: ...
def find_directory(tail: bytes, tail_offset: int, base: int, /) -> tuple[int, int, int]: ...
def parse_directory(block: bytes, count: int, offset: int, base: int, /) -> tuple[bytearray, int]: ...
def find_records(
    block: bytes, entries: bytearray, prefix: bytes, names: bytes, ends: Sequence[int], /
) -> list[int]: ...
def parse_local_header(head: bytes, block: bytes, entries: bytearray, record: int, /) -> int: ...
def scan_pickle(program: bytes, actions: Actions, limits: Sequence[int], /) -> tuple[Any, ...]: ...
