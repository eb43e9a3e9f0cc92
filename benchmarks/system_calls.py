"""Which bytes of a checkpoint zipslicer reads, and in how many calls, as strace(1) sees it.

    python benchmarks/system_calls.py

What a loader asks the system for is exact where a clock is not: a payload byte that is read twice, or never, shows.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from cases import CASES
from contestants import ENTRANTS, OURS
from make_files import CACHE

HERE = Path(__file__).resolve().parent
TRACED = ("whole", "stream", "load_into", "small")

# The end of a line of strace: arguments that it knows when the call begins may stand on another line than the result.
READ = re.compile(r"(?:pread64|preadv2?)\b.*?, (\d+)(?:, (?:0|RWF_\w+))?\)\s+= (-?\d+)")


def reads(trace: str) -> list[tuple[int, int]]:
    """(offset, bytes that came) of each positioned read."""
    found = []
    for line in trace.splitlines():
        if line.endswith("<unfinished ...>") or ("(" not in line and "resumed" not in line):
            continue
        match = READ.search(line)
        if match and int(match[2]) >= 0:
            found.append((int(match[1]), int(match[2])))
    return found


def payloads(path: Path) -> list[tuple[int, int]]:
    """(offset, bytes) of the payload of each storage."""
    found = []
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for entry in archive.infolist():
            if "/data/" in entry.filename:
                file.seek(entry.header_offset + 26)
                name, extra = struct.unpack("<HH", file.read(4))
                found.append((entry.header_offset + 30 + name + extra, entry.file_size))
    return sorted(found)


def times_read(calls: list[tuple[int, int]], wanted: list[tuple[int, int]]) -> dict[int, int]:
    """How many bytes of the wanted ranges were read how many times."""
    events = [event for at, nbytes in calls for event in ((at, 1, 0), (at + nbytes, -1, 0))]
    events += [event for at, nbytes in wanted for event in ((at, 0, 1), (at + nbytes, 0, -1))]
    counts: dict[int, int] = {}
    times = ranges = last = 0
    for at, of_calls, of_ranges in sorted(events):
        if ranges:
            counts[times] = counts.get(times, 0) + at - last
        times, ranges, last = times + of_calls, ranges + of_ranges, at
    return counts


def trace(case: str, contestant: str) -> dict[str, Any]:
    path = CACHE / f"{CASES[case].file}.pth"
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "trace"
        command = ["strace", "-f", "-s", "0", "-e", "trace=pread64,preadv,preadv2", "-P", str(path), "-o", str(log)]
        subprocess.run(
            [*command, sys.executable, str(HERE / "sample.py"), case, contestant],
            env={**os.environ, **ENTRANTS[contestant].environment},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        calls = reads(log.read_text())
    wanted = payloads(path)
    counts = times_read(calls, wanted)
    return {
        "calls": len(calls),
        "bytes read": sum(nbytes for _, nbytes in calls),
        "payload bytes": sum(nbytes for _, nbytes in wanted),
        "never read": counts.get(0, 0),
        "read once": counts.get(1, 0),
        "read again": sum(nbytes for times, nbytes in counts.items() if times > 1),
    }


def trace_all() -> dict[str, dict[str, Any]]:
    """case -> contestant -> what was found; nothing where there is no strace."""
    if not shutil.which("strace"):
        print("no strace here: nothing is told of the system calls", file=sys.stderr)
        return {}
    return {case: {name: trace(case, name) for name in OURS} for case in TRACED}


if __name__ == "__main__":
    for case, rows in trace_all().items():
        for name, found in rows.items():
            print(f"{case:10} {name:7} {found}")
