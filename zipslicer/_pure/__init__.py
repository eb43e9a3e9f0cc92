"""The backend in Python: no compiler, any platform. Read it as the specification of csrc/."""

from __future__ import annotations

from .directory import find_directory, find_records, parse_directory, parse_local_header
from .extent import allocate, read_bytes, read_record, read_records, read_runs, read_tensor, read_tensors
from .machine import scan_pickle

__all__ = [
    "allocate",
    "find_directory",
    "find_records",
    "name",
    "parse_directory",
    "parse_local_header",
    "read_bytes",
    "read_record",
    "read_records",
    "read_runs",
    "read_tensor",
    "read_tensors",
    "scan_pickle",
]

name = "pure"
