"""Starved: a checkpoint is opened and read where memory ends, at one limit after the other.

    python starved.py FOLDER

Prints a JSON list of what came of each attempt: "right", "MemoryError", or the name of another error. After each the limit
is lifted, and everything must be there again.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import zipslicer

# A thread that finds no memory for its first step is the end of others' code: Python's Thread.start() waits for it for ever
# (CPython 3.11), and glibc ends the process where there is none for what is local to the thread.
THREAD = 96 << 20
STEPS = [size << 20 for size in (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256)]


def used() -> int:
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(rows["VmSize"].split()[0]) << 10


def attempt(act: Callable[[], bool], room: int) -> str:
    """Act with `room` more bytes of address space than there are in use."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used() + room, most))
    try:
        return "right" if act() else "wrong"
    except MemoryError:
        return "MemoryError"
    except RuntimeError as error:  # torch's word for it
        return "MemoryError" if "alloc" in str(error) or "memory" in str(error) else f"{type(error).__name__}: {error}"
    except (zipslicer.ZipSlicerError, OSError) as error:
        return type(error).__name__
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main() -> None:
    path = Path(sys.argv[1]) / "m.pth"
    wanted: dict[str, Any] = {f"s{i}": torch.arange(i, i + 99) for i in range(3000)}
    wanted |= {f"l{i}": torch.full((2_000_000,), float(i)) for i in range(8)}
    torch.save(wanted, path)

    def is_right(got: dict[str, Any]) -> bool:
        return got.keys() == wanted.keys() and all(got[key].equal(wanted[key]) for key in got)

    def opened() -> bool:
        with zipslicer.load(path) as other:
            return list(other) == list(wanted) and other["s7"].equal(wanted["s7"])

    outcomes = []
    with zipslicer.load(path, threads=2) as sd, zipslicer.load(path, threads=1) as alone:
        assert is_right(sd.materialize())
        acts = (
            (opened, False),
            (lambda: all(sd[f"l{i}"].equal(wanted[f"l{i}"]) for i in range(3)), False),
            (lambda: sd.get_slice("l3")[::2].equal(wanted["l3"][::2]), False),
            (lambda: is_right(alone.materialize()), False),
            (lambda: is_right(sd.materialize()), True),
            (lambda: is_right(dict(sd.stream())), True),
        )
        for room in STEPS:
            for act, starts_threads in acts:
                if room >= THREAD or not starts_threads:
                    outcomes.append(attempt(act, room))
                    assert act(), "what failed once fails again"
    print(json.dumps(outcomes))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
