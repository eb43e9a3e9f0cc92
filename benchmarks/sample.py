"""One sample of one contestant at one case, in this fresh process: a line of JSON out. `run.py` starts it.

    python benchmarks/sample.py CASE CONTESTANT [--seed N] [--gate]

What is equal for all, before the clock starts: torch and the contestant are imported and have read a tiny file; the
file of the case has been read once, so that it lies in the page cache; memory has been touched and given back, since a
virtual machine otherwise fetches it from its host inside the clock, ten times as slowly, and who pays is a matter of luck;
and the tiny file was read again, so that code is in the processor's caches, which the touching has emptied. Where the
case is a cold one, the file is then thrown out of the page cache, and `mincore` must find none of it there.
What is equal after it has stopped: the tensors must lie in memory of their own, and their bytes are hashed.

Memory is the growth of the peak resident set (VmHWM) from the start of the clock on; pages of a mapped file count,
because they do in any memory limit. `--gate`: say "ready", and wait for a line before the clock starts.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import mmap
import os
import resource
import sys
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from cases import CASES, rehearse, small
from contestants import ENTRANTS
from make_files import CACHE

if TYPE_CHECKING:
    from collections.abc import Iterable

# Bytes of huge pages that are touched before the clock, beside what the work is known to need. With 256 MiB a read of
# 103 MB got pages that nobody had touched, and took 18 or 40 ms by luck.
TOUCHED = 2 << 30
TOUCHED_SMALL = 512 << 20  # the same of small pages
# A kernel that reports free pages to its host does so two seconds after the first of them was freed.
REPORTING = Path("/sys/module/page_reporting/parameters/page_reporting_order")
HOLD_SECONDS = 2.5


# ---------------------------------------------------------------- before the clock


def read_once(path: str) -> int:
    """Bring the file into the page cache. Returns its length."""
    nbytes = 0
    with mmap.mmap(-1, 16 << 20) as buffer, Path(path).open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            nbytes += count
    return nbytes


def hold_memory(nbytes: int, advice: str = "MADV_HUGEPAGE") -> mmap.mmap:
    """Take private memory and write to each of its pages."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, advice):
        memory.madvise(getattr(mmap, advice))
    view = (ctypes.c_char * nbytes).from_buffer(memory)
    ctypes.memset(view, 1, nbytes)
    del view
    return memory


def reports_pages() -> bool:
    """Whether free pages go back to the host of this virtual machine: of the order that is set, if there is such a one."""
    return REPORTING.exists() and int(REPORTING.read_text()) <= 10


def touch_memory(nbytes: int) -> None:
    """Take memory, write to every page, and give it back to this system's kernel, which will hand it out again.

    First small pages, which use up the remains of larger ones, as the first pages that the work gets will; then huge
    ones. Where free pages are reported to the host, holding these for longer than it waits lets what was freed before go
    its way; and then the clock has two seconds.
    """
    small_pages = hold_memory(TOUCHED_SMALL, "MADV_NOHUGEPAGE")
    huge_pages = hold_memory(nbytes)
    if reports_pages():
        time.sleep(HOLD_SECONDS)
    huge_pages.close()
    small_pages.close()


def cached_share(path: str) -> float:
    """Which share of a file is in the page cache, from 0 to 1, by mincore(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    nbytes = Path(path).stat().st_size
    pages = -(-nbytes // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages)()
    with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as mapped:
        start = ctypes.c_char.from_buffer(mapped)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(nbytes), found)
        del start
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(page & 1 for page in found) / pages


def forget(path: str) -> None:
    """Throw a file out of the page cache, and see that it is."""
    with Path(path).open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if (share := cached_share(path)) > 0.001:
        raise RuntimeError(f"{share:.1%} of {path} stayed in the page cache")


# ---------------------------------------------------------------- around the clock


def proc_bytes(path: str, field: str) -> int:
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"{path} has no {field}")


def forget_peak() -> None:
    """Set VmHWM, the peak of the resident set, back to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def usage() -> dict[str, float]:
    """What the system has counted for this process up to now: getrusage(2), and /proc/self/io."""
    of = resource.getrusage(resource.RUSAGE_SELF)
    io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {
        "user": of.ru_utime,
        "system": of.ru_stime,
        "minor faults": of.ru_minflt,
        "major faults": of.ru_majflt,
        "voluntary switches": of.ru_nvcsw,
        "read calls": int(io["syscr"]),
        "bytes by read calls": int(io["rchar"]),
        "bytes from disk": int(io["read_bytes"]),
    }


# ---------------------------------------------------------------- after the clock


def mapped_files() -> list[tuple[int, int]]:
    """Address ranges of this process that show one of our files."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(CACHE) in line:
            start, _, end = line.split()[0].partition("-")
            ranges.append((int(start, 16), int(end, 16)))
    return ranges


def digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> int:
    """CRC-32 over names, dtypes, shapes and bytes; of a large tensor one byte in 997."""
    crc = 0
    for name, tensor in sorted(tensors):
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        sample = flat[:: 997 if len(flat) > 1 << 22 else 1].numpy().tobytes()
        crc = zlib.crc32(sample, zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc))
    return crc


def measure(case_name: str, contestant_name: str, seed: int, gate: bool) -> dict[str, Any]:
    case = CASES[case_name]
    contestant = ENTRANTS[contestant_name].kind()
    path = str(CACHE / f"{case.file}{contestant.suffix}")
    tiny = str(CACHE / f"tiny{contestant.suffix}")
    rehearse(contestant, tiny)
    prepared = case.before() if case.before else None
    nbytes = read_once(path)
    gc.collect()
    needed = TOUCHED + (nbytes if case.fills or not contestant.lazy else 0)
    touch_memory(needed)
    rehearse(contestant, tiny)
    hold_memory(needed).close()  # what has gone to the host all the same
    rehearse(contestant, tiny)  # all that memory has driven the code out of the processor's caches
    if case.cold:
        forget(path)
    if gate:
        print("ready", flush=True)
        sys.stdin.readline()
    resident = proc_bytes("/proc/self/status", "VmRSS")
    forget_peak()
    before = usage()

    seconds, result = case.work(contestant, path, seed, prepared)

    after = usage()
    growth = proc_bytes("/proc/self/status", "VmHWM") - resident
    taken = {"seconds": round(seconds, 8), "usage": {name: round(after[name] - before[name], 4) for name in after}}
    if isinstance(result, list):
        return {**taken, "digest": zlib.crc32("\n".join(sorted(result)).encode())}
    if isinstance(result, tuple):
        crc, kept = result
        return {**taken, "kept": kept, "growth": growth, "digest": crc}
    shown = [] if case.work is small else mapped_files()
    for name, tensor in result.items():
        address = tensor.data_ptr()
        if any(start <= address < end for start, end in shown):
            raise RuntimeError(f"{contestant_name} gave {name} as a view of the file, not as memory of its own")
    kept = sum(tensor.nbytes for tensor in result.values())
    return {**taken, "kept": kept, "growth": growth, "digest": digest(result.items())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=CASES)
    parser.add_argument("contestant", choices=ENTRANTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gate", action="store_true")
    options = parser.parse_args()
    print(json.dumps(measure(options.case, options.contestant, options.seed, options.gate)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
