"""The backend in C++ (csrc/module.cc). backend.py says what each function does."""

from collections.abc import Sequence
from typing import Any, Final

from .backend import Actions, Buffer, Handle, Hot, Text

name: Final = "native"

def allocate(nbytes: int, /) -> Buffer: ...
def read_bytes(handle: Handle, offset: int, nbytes: int, /) -> Text: ...
def read_record(
    handle: Handle, stamp: bytes, block: Text, entries: Buffer, record: int, start: int, nbytes: int, /
) -> Buffer: ...
def read_tensor(hot: Hot, value: int, /) -> Any: ...
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
def read_tensors(hot: Hot, numbers: list[int], whole: bool, threads: int, /) -> list[Any]: ...
def read_runs(
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
) -> None: ...
def find_directory(tail: Text, tail_offset: int, base: int, /) -> tuple[int, int, int]: ...
def parse_directory(block: Text, count: int, offset: int, base: int, /) -> tuple[Buffer, int]: ...
def find_records(block: Text, entries: Buffer, prefix: bytes, names: bytes, ends: Sequence[int], /) -> list[int]: ...
def parse_local_header(head: bytes, block: Text, entries: Buffer, record: int, /) -> int: ...
def scan_pickle(program: Text, actions: Actions, limits: Sequence[int], /) -> tuple[Any, ...]: ...
