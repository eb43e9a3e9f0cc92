"""The backend in C++ (csrc/module.cc). backend.py says what each function does."""

from collections.abc import Sequence
from typing import Any, Final

from .backend import Actions, Buffer, Handle, Maker, Text

name: Final = "native"

def allocate(nbytes: int, /) -> Buffer: ...
def read_bytes(handle: Handle, offset: int, nbytes: int, /) -> Text: ...
def read_record(
    handle: Handle, stamp: bytes, block: Text, entries: Buffer, record: int, start: int, nbytes: int, /
) -> Buffer: ...
def read_tensor(
    handle: Handle,
    stamp: bytes,
    block: Text,
    entries: Buffer,
    tensors: Buffer,
    dims: Buffer,
    direct: Buffer,
    number: int,
    limit: int,
    maker: Maker | None,
    /,
) -> Any: ...
def read_records(
    handle: Handle,
    stamp: bytes,
    block: Text,
    entries: Buffer,
    jobs: bytes,
    buffers: Sequence[Buffer],
    threads: int,
    /,
) -> None: ...
def find_directory(tail: Text, tail_offset: int, base: int, /) -> tuple[int, int, int]: ...
def parse_directory(block: Text, count: int, offset: int, base: int, /) -> tuple[Buffer, int]: ...
def find_records(block: Text, entries: Buffer, prefix: bytes, names: bytes, ends: Sequence[int], /) -> list[int]: ...
def parse_local_header(head: bytes, block: Text, entries: Buffer, record: int, /) -> int: ...
def scan_pickle(program: Text, actions: Actions, limits: Sequence[int], /) -> tuple[Any, ...]: ...
