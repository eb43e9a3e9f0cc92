"""Timing: a file in, how long each way of reading it takes on this machine out. What `zipslicer bench` prints.

Side door. Each sample is a fresh process that has imported what it needs and then starts its clock; the contestants take
turns, the file has been read once, so that it lies in the page cache as far as that holds it. Short and rough: the careful
one is in benchmarks/.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

__all__ = ["CASES", "Timed", "timed"]

# Case -> contestant -> (what is imported before the clock, what is timed). `path` is the file.
CASES: dict[str, dict[str, tuple[str, str]]] = {
    "list": {
        "zipslicer": ("import zipslicer", "t = zipslicer.open(path).tensors; kept = [t.get_meta(name) for name in t]"),
        "torch.load": ("import torch", "kept = torch.load(path, weights_only=True, map_location='cpu')"),
        "torch.load(mmap)": (
            "import torch",
            "kept = torch.load(path, weights_only=True, map_location='cpu', mmap=True)",
        ),
    },
    "read": {
        "zipslicer": ("import torch, zipslicer", "kept = zipslicer.open(path).tensors.materialize()"),
        "torch.load": ("import torch", "kept = torch.load(path, weights_only=True, map_location='cpu')"),
        "torch.load(mmap)": (
            "import torch",
            "kept = copied(torch.load(path, weights_only=True, map_location='cpu', mmap=True))",
        ),
    },
    "stream": {
        "zipslicer": ("import torch, zipslicer", "for kept in zipslicer.open(path).tensors.stream(): pass"),
    },
}

SCRIPT = """
import json, sys, time
path = sys.argv[1]

def copied(value):
    todo, made = [value], []
    while todo:
        each = todo.pop()
        if hasattr(each, "untyped_storage"):
            made.append(each.clone())
        elif isinstance(each, dict):
            todo += each.values()
        elif isinstance(each, (list, tuple)):
            todo += each
    return made

def peak():
    try:
        with open("/proc/self/status") as status:
            return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) << 10
    except (OSError, StopIteration):
        return 0

{imports}
before, start = peak(), time.perf_counter()
{work}
json.dump([time.perf_counter() - start, peak() - before], sys.stdout)
"""


class Timed(NamedTuple):
    """One contestant at one case.

    Attributes:
        case: "list" (open, and the facts of all tensors), "read" (all tensors in memory of their own), or "stream" (one after
            the other, none of which is kept).
        contestant: who.
        seconds: of each sample.
        growth: bytes that the resident set grew by, the most of all samples; 0 where the system does not tell.
        error: why there are no samples, or None.
    """

    case: str
    contestant: str
    seconds: tuple[float, ...]
    growth: int
    error: str | None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def timed(path: str, samples: int = 3, heard: Callable[[str], None] | None = None) -> Iterator[Timed]:
    """Read a file in every way that is there. What would not fit in the memory that is free is left out, and says so.

    Args:
        path: of one file.
        samples: fresh processes of each.
        heard: told what is at work.

    Raises: OSError.
    """
    nbytes = _read_once(path)
    has_torch = importlib.util.find_spec("torch") is not None
    for case, contestants in CASES.items():
        taken: dict[str, list[tuple[float, int]]] = {name: [] for name in contestants}
        errors: dict[str, str] = {}
        for name, (imports, _) in contestants.items():
            if "torch" in imports and not has_torch:
                errors[name] = "torch is not installed"
            elif nbytes > _free_memory() * 0.8 and (case == "read" or name == "torch.load"):
                errors[name] = "the file is larger than the memory that is free"
        for _ in range(samples):
            for name, (imports, work) in contestants.items():
                if name in errors:
                    continue
                if heard is not None:
                    heard(f"{case}: {name}")
                sample = _sample(path, imports, work)
                if isinstance(sample, str):
                    errors[name] = sample
                else:
                    taken[name].append(sample)
        for name, found in taken.items():
            seconds = () if name in errors else tuple(each[0] for each in found)
            yield Timed(case, name, seconds, max((each[1] for each in found), default=0), errors.get(name))


def _sample(path: str, imports: str, work: str) -> tuple[float, int] | str:
    """(seconds, bytes), or the last line of what went wrong."""
    script = SCRIPT.replace("{imports}", imports).replace("{work}", work)
    command = [sys.executable, "-c", script, path]  # of which the path alone is not ours, and is an argument
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return next((line for line in lines if "Error" in line), lines[-1])
    seconds, growth = json.loads(done.stdout)
    return float(seconds), int(growth)


def _read_once(path: str) -> int:
    """Bring a file into the page cache; -> its length."""
    nbytes = 0
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(16 << 20)
        while count := file.readinto(buffer):
            nbytes += count
    return nbytes


def _free_memory() -> float:
    """Bytes; without a limit where the system does not tell."""
    try:
        with open("/proc/meminfo") as facts:
            return int(next(line for line in facts if line.startswith("MemAvailable")).split()[1]) << 10
    except (OSError, StopIteration):
        pages = os.sysconf("SC_AVPHYS_PAGES") if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names else 0
        return pages * os.sysconf("SC_PAGE_SIZE") if pages else float("inf")
