"""One sample of one contestant at one case, in this fresh process: a line of JSON out. `run.py` starts it.

    python benchmarks/contestants.py CASE CONTESTANT [--seed N]

What is equal for all, before the clock starts: torch and the contestant are imported and have read a tiny file; the
file of the case has been read once, so that it lies in the page cache; memory has been touched and given back, since a
virtual machine otherwise fetches it from its host inside the clock, ten times as slowly, and who pays is a matter of luck;
and the tiny file was read again, so that code is in the processor's caches, which the touching has emptied.
What is equal after it has stopped: the tensors must lie in memory of their own, and their bytes are hashed.

Every contestant does the case in the best way that its own interface offers. Memory is the growth of the peak resident
set (VmHWM) from the start of the clock on; pages of a mapped file count, because they do in any memory limit.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import mmap
import os
import random
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from make_files import CACHE, EMBEDDING, HIDDEN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Tensors = dict[str, torch.Tensor]

SMALL_READS = 2000  # timed, of distinct random keys
SMALL_READS_BEFORE = 50  # of other keys, not timed
ROWS = slice(1000, 1500)
COLUMNS = slice(0, HIDDEN // 2)
RAW = "raw C++ read"  # the one that takes part in the case "whole" alone, and has no values to compare
TOUCHED = 256 << 20  # bytes of huge pages that are touched before the clock, beside what the work is known to need
TOUCHED_SMALL = 512 << 20  # the same of small pages
HOLD_SECONDS = 2.5
SOME_LAYERS = ("model.layers.11.", "model.layers.29.")


# ---------------------------------------------------------------- the contestants


class Contestant:
    """How one library does each piece of work."""

    suffix = ".pth"
    lazy = True  # False where opening reads everything: then no read of one tensor is left to measure

    def open(self, path: str) -> Any:
        raise NotImplementedError

    def keys(self, path: str) -> list[str]:
        return list(self.open(path).keys())

    def getter(self, path: str) -> Callable[[str], torch.Tensor]:
        raise NotImplementedError

    def some(self, path: str, prefixes: tuple[str, ...]) -> Tensors:
        raise NotImplementedError

    def whole(self, path: str) -> Tensors:
        return self.some(path, ("",))

    def rows(self, path: str, key: str, rows: slice) -> torch.Tensor:
        raise NotImplementedError

    def small(self, path: str) -> Tensors:
        """All of many small tensors; here alone they may be views of the file, of who gives such."""
        return self.whole(path)

    def columns(self, path: str, key: str, columns: slice) -> torch.Tensor:
        """Some columns of a matrix, in memory of their own; of who reads tensors whole, cut out of the whole."""
        raise NotImplementedError


class Zipslicer(Contestant):
    def __init__(self) -> None:
        import zipslicer

        self.library = zipslicer
        if zipslicer.backend() != os.environ["ZIPSLICER_BACKEND"]:
            raise RuntimeError(f"asked for {os.environ['ZIPSLICER_BACKEND']}, got {zipslicer.backend()}")

    def open(self, path: str) -> Any:
        return self.library.load(path)

    def getter(self, path: str) -> Callable[[str], torch.Tensor]:
        state_dict = self.open(path)
        return lambda key: state_dict[key]

    def some(self, path: str, prefixes: tuple[str, ...]) -> Tensors:
        state_dict = self.open(path)
        return state_dict.get_tensors([key for key in state_dict if key.startswith(prefixes)])

    def whole(self, path: str) -> Tensors:
        return self.open(path).materialize()

    def rows(self, path: str, key: str, rows: slice) -> torch.Tensor:
        return self.open(path).get_slice(key)[rows]

    def columns(self, path: str, key: str, columns: slice) -> torch.Tensor:
        return self.open(path).get_slice(key)[:, columns]


class TorchLoad(Contestant):
    lazy = False

    def open(self, path: str) -> Any:
        return torch.load(path, weights_only=True)

    def some(self, path: str, prefixes: tuple[str, ...]) -> Tensors:
        # A tensor keeps its own storage, so the rest of the file is freed again: the peak is what it costs.
        return {key: tensor for key, tensor in self.open(path).items() if key.startswith(prefixes)}

    def rows(self, path: str, key: str, rows: slice) -> torch.Tensor:
        return self.open(path)[key][rows].clone()

    def columns(self, path: str, key: str, columns: slice) -> torch.Tensor:
        return self.open(path)[key][:, columns].clone()


class TorchLoadMmap(Contestant):
    def open(self, path: str) -> Any:
        return torch.load(path, weights_only=True, mmap=True)

    def getter(self, path: str) -> Callable[[str], torch.Tensor]:
        state_dict = self.open(path)
        return lambda key: state_dict[key].clone()

    def some(self, path: str, prefixes: tuple[str, ...]) -> Tensors:
        return {key: tensor.clone() for key, tensor in self.open(path).items() if key.startswith(prefixes)}

    def rows(self, path: str, key: str, rows: slice) -> torch.Tensor:
        return self.open(path)[key][rows].clone()

    def small(self, path: str) -> Tensors:
        return self.open(path)

    def columns(self, path: str, key: str, columns: slice) -> torch.Tensor:
        return self.open(path)[key][:, columns].clone()


class SafetensorsMmap(Contestant):
    suffix = ".safetensors"

    def __init__(self) -> None:
        import safetensors

        self.library = safetensors

    def open(self, path: str) -> Any:
        return self.library.safe_open(path, "pt")

    def getter(self, path: str) -> Callable[[str], torch.Tensor]:
        handle = self.open(path)
        return lambda key: handle.get_tensor(key).clone()

    def some(self, path: str, prefixes: tuple[str, ...]) -> Tensors:
        handle = self.open(path)
        return {key: handle.get_tensor(key).clone() for key in handle.offset_keys() if key.startswith(prefixes)}

    def rows(self, path: str, key: str, rows: slice) -> torch.Tensor:
        return self.open(path).get_slice(key)[rows].clone()

    def small(self, path: str) -> Tensors:
        handle = self.open(path)
        return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 it is no mapping

    def columns(self, path: str, key: str, columns: slice) -> torch.Tensor:
        return self.open(path).get_tensor(key)[:, columns].clone()


class SafetensorsPread(SafetensorsMmap):
    def open(self, path: str) -> Any:
        return self.library.safe_open(path, "pt", backend="pread")

    def getter(self, path: str) -> Callable[[str], torch.Tensor]:
        handle = self.open(path)
        return lambda key: handle.get_tensor(key)  # noqa: PLW0108 one call around the call, as for all others

    def some(self, path: str, prefixes: tuple[str, ...]) -> Tensors:
        handle = self.open(path)
        return {key: handle.get_tensor(key) for key in handle.offset_keys() if key.startswith(prefixes)}

    def whole(self, path: str) -> Tensors:
        return self.open(path).get_tensors()

    def small(self, path: str) -> Tensors:
        return self.whole(path)

    def rows(self, path: str, key: str, rows: slice) -> torch.Tensor:
        return self.open(path).get_slice(key)[rows]


class FabricLazyLoad(Contestant):
    def __init__(self) -> None:
        from lightning_fabric.utilities import load

        self.library = load

    def open(self, path: str) -> Any:
        return self.library._lazy_load(path)

    def getter(self, path: str) -> Callable[[str], torch.Tensor]:
        state_dict = self.open(path)
        return lambda key: state_dict[key]._load_tensor()

    def some(self, path: str, prefixes: tuple[str, ...]) -> Tensors:
        return {key: lazy._load_tensor() for key, lazy in self.open(path).items() if key.startswith(prefixes)}

    def rows(self, path: str, key: str, rows: slice) -> torch.Tensor:
        return self.open(path)[key]._load_tensor()[rows].clone()

    def columns(self, path: str, key: str, columns: slice) -> torch.Tensor:
        return self.open(path)[key]._load_tensor()[:, columns].clone()


class Zipslicer081(Contestant):
    def __init__(self) -> None:
        folder = os.environ.get("ZIPSLICER_081", str(Path(sys.prefix) / "zipslicer-0.8.1"))
        sys.path.insert(0, folder)  # it shares its name with us
        import zipslicer

        if not str(zipslicer.__file__).startswith(folder):
            raise RuntimeError(f"zipslicer 0.8.1 should be in {folder}, and {zipslicer.__file__} was imported")
        self.library = zipslicer

    def open(self, path: str) -> Any:
        return self.library.load(path)

    def getter(self, path: str) -> Callable[[str], torch.Tensor]:
        state_dict = self.open(path)
        return lambda key: state_dict[key]

    def some(self, path: str, prefixes: tuple[str, ...]) -> Tensors:
        state_dict = self.open(path)
        return {key: state_dict[key] for key in state_dict.keys() if key.startswith(prefixes)}  # noqa: SIM118 iteration yields nothing there

    def rows(self, path: str, key: str, rows: slice) -> torch.Tensor:
        return self.open(path)[key][rows].clone()

    def columns(self, path: str, key: str, columns: slice) -> torch.Tensor:
        return self.open(path)[key][:, columns].clone()


class RawRead(Contestant):
    """No library: raw_read.cc, the bytes of the file into memory of their own. It opens nothing and makes no tensor."""

    def __init__(self) -> None:
        library = CACHE / "libraw_read.so"
        source = Path(__file__).parent / "raw_read.cc"
        if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
            flags = ["-O2", "-shared", "-fPIC", "-pthread"]
            subprocess.run(["c++", *flags, "-o", str(library), str(source)], check=True)
        self.library = ctypes.CDLL(str(library))
        self.library.raw_allocate.restype = ctypes.c_void_p
        self.threads = len(os.sched_getaffinity(0))

    def whole(self, path: str) -> Tensors:
        nbytes = Path(path).stat().st_size
        memory = self.library.raw_allocate(ctypes.c_size_t(nbytes))
        to = ctypes.c_void_p(memory)
        if not memory or self.library.raw_read(os.fsencode(path), to, ctypes.c_size_t(nbytes), self.threads):
            raise RuntimeError(f"raw_read.cc could not read {path}")
        return {}


CONTESTANTS: dict[str, type[Contestant]] = {
    "native": Zipslicer,
    "pure": Zipslicer,
    "torch.load": TorchLoad,
    "torch.load(mmap)": TorchLoadMmap,
    "safetensors mmap": SafetensorsMmap,
    "safetensors pread": SafetensorsPread,
    "fabric _lazy_load": FabricLazyLoad,
    "zipslicer 0.8.1": Zipslicer081,
    RAW: RawRead,
}


def environment(contestant: str) -> dict[str, str]:
    """The environment of the process that measures it: native and pure differ by this alone."""
    ours = {"ZIPSLICER_BACKEND": contestant} if contestant in {"native", "pure"} else {}
    return {**os.environ, **ours}


# ---------------------------------------------------------------- the cases

Timed = tuple[float, Any]  # seconds, and what the work gave


def timed(work: Callable[[], Any]) -> Timed:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def keys(contestant: Contestant, path: str, _seed: int) -> Timed:
    return timed(lambda: contestant.keys(path))


def one(contestant: Contestant, path: str, seed: int) -> Timed:
    chosen = random.Random(seed).sample(sorted(contestant.keys(path)), SMALL_READS_BEFORE + SMALL_READS)
    get = contestant.getter(path)
    kept = [get(key) for key in chosen[:SMALL_READS_BEFORE]]
    chosen = chosen[SMALL_READS_BEFORE:]
    kept.clear()
    start = time.perf_counter()
    for key in chosen:
        kept.append(get(key))  # noqa: PERF401 a loop, as users write it
    return (time.perf_counter() - start) / SMALL_READS, dict(zip(chosen, kept, strict=True))


def whole(contestant: Contestant, path: str, _seed: int) -> Timed:
    return timed(lambda: contestant.whole(path))


def some(contestant: Contestant, path: str, _seed: int) -> Timed:
    return timed(lambda: contestant.some(path, SOME_LAYERS))


def rows(contestant: Contestant, path: str, _seed: int) -> Timed:
    return timed(lambda: {EMBEDDING: contestant.rows(path, EMBEDDING, ROWS)})


def small(contestant: Contestant, path: str, _seed: int) -> Timed:
    return timed(lambda: contestant.small(path))


def columns(contestant: Contestant, path: str, _seed: int) -> Timed:
    return timed(lambda: {EMBEDDING: contestant.columns(path, EMBEDDING, COLUMNS)})


CASES: dict[str, tuple[str, Callable[[Contestant, str, int], Timed]]] = {  # name -> file, work
    "keys": ("many", keys),
    "one": ("many", one),
    "whole": ("model", whole),
    "some": ("model", some),
    "rows": ("model", rows),
    "small": ("many", small),
    "columns": ("model", columns),
}


# ---------------------------------------------------------------- before and after the clock


def rehearse(contestant: Contestant) -> None:
    """Do every kind of work on a tiny file: what a library imports or sets up once belongs to no sample."""
    path = str(CACHE / f"tiny{contestant.suffix}")
    if isinstance(contestant, RawRead):
        contestant.whole(path)
        return
    contestant.keys(path)
    if contestant.lazy:
        contestant.getter(path)("a")
    contestant.whole(path)
    contestant.some(path, ("b",))
    contestant.rows(path, "a", slice(1, 2))
    contestant.small(path)
    contestant.columns(path, "a", slice(0, 2))


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


def touch_memory(nbytes: int) -> None:
    """Take memory, write to every page, and give it back to this system's kernel, which will hand it out again.

    First small pages, which use up the remains of larger ones, as the first pages that the work gets will; then huge
    ones. Linux offers freed pages to the host two seconds after they were freed: holding these for longer lets what
    was freed before go its way, and then the clock has two seconds.
    """
    small = hold_memory(TOUCHED_SMALL, "MADV_NOHUGEPAGE")
    huge = hold_memory(nbytes)
    time.sleep(HOLD_SECONDS)
    huge.close()
    small.close()


def proc_bytes(path: str, field: str) -> int:
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"{path} has no {field}")


def forget_peak() -> None:
    """Set VmHWM, the peak of the resident set, back to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


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


def measure(case: str, contestant_name: str, seed: int) -> dict[str, Any]:
    file, work = CASES[case]
    contestant = CONTESTANTS[contestant_name]()
    path = str(CACHE / f"{file}{contestant.suffix}")
    rehearse(contestant)
    nbytes = read_once(path)
    gc.collect()
    touch_memory(TOUCHED + (nbytes if case == "whole" or not contestant.lazy else 0))
    rehearse(contestant)  # again: all that memory has driven the code out of the processor's caches
    resident = proc_bytes("/proc/self/status", "VmRSS")
    forget_peak()

    seconds, result = work(contestant, path, seed)

    growth = proc_bytes("/proc/self/status", "VmHWM") - resident
    if isinstance(result, list):
        return {"seconds": seconds, "digest": zlib.crc32("\n".join(sorted(result)).encode())}
    if isinstance(contestant, RawRead):
        return {"seconds": seconds, "kept": nbytes, "growth": growth, "digest": None}
    shown = [] if case == "small" else mapped_files()
    for name, tensor in result.items():
        address = tensor.data_ptr()
        if any(start <= address < end for start, end in shown):
            raise RuntimeError(f"{contestant_name} gave {name} as a view of the file, not as memory of its own")
    kept = sum(tensor.nbytes for tensor in result.values())
    return {"seconds": seconds, "kept": kept, "growth": growth, "digest": digest(result.items())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=CASES)
    parser.add_argument("contestant", choices=CONTESTANTS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(json.dumps(measure(options.case, options.contestant, options.seed)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
