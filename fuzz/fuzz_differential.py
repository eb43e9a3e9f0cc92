"""atheris target: native against pure. Both give the same graph and directory, or the same error at the same byte.

    python fuzz/fuzz_differential.py FOLDER -max_total_time=60

The pure backend is instrumented, and leads the way: what is new there is kept.
"""

from __future__ import annotations

import sys
from typing import Any

import atheris

with atheris.instrument_imports(include=["zipslicer"]):
    from zipslicer import _pure, policy
    from zipslicer.errors import ZipSlicerError

from zipslicer import _native

LIMITS = (policy.machine_limits(policy.Limits(), False), (8, 3, 40, 12, 2, True, 1), (8, 3, 40, 12, 2, False, 2))


def outcome(function: Any, *arguments: Any) -> tuple[Any, ...]:
    try:
        return ("came", plain(function(*arguments)))
    except ZipSlicerError as error:
        return (type(error), error.offset)


def plain(value: Any) -> Any:
    if isinstance(value, (bytearray, memoryview)):
        return bytes(value)
    return type(value)(map(plain, value)) if isinstance(value, (list, tuple)) else value


def same(name: str, *arguments: Any) -> Any:
    ours, theirs = (outcome(getattr(backend, name), *arguments) for backend in (_pure, _native))
    if ours != theirs:
        raise AssertionError(f"{name}: pure gives {ours!r:.2000}, native {theirs!r:.2000}")
    return ours[1] if ours[0] == "came" else None


def one_input(data: bytes) -> None:
    if data[:1] < b"\x80":
        same("scan_pickle", data[1:], policy.actions(), LIMITS[data[0] % 3] if data else LIMITS[0])
        return
    file = data[1:]
    found = same("find_directory", file, 0, 0)
    if found is None:
        return
    offset, nbytes, count = found
    block = file[offset : offset + nbytes]
    parsed = same("parse_directory", block, count, offset, 0)
    if parsed is None:
        return
    entries, _ = parsed
    rows = memoryview(entries).cast("q")
    for record in range(min(count, 20)):
        same("parse_local_header", file[rows[10 * record] :][: 1 << 16], block, bytearray(entries), record)


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
