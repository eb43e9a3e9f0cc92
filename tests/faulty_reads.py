"""Faulty reads: every way to a tensor, while reads of its file come short or fail; in a process under the shim.

    LD_PRELOAD=faulty_reads.so python faulty_reads.py FOLDER [--random CALLS]

Prints a JSON object: for each fault, how often what came of it ("right", "wrong", or the name of an error), how many calls
there were and how many of them failed. Without --random the k-th call of each way fails, for every k that there is.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import conformance
import torch

import zipslicer

FAULTS = {"short": 1, "EINTR": 2, "EIO": 3, "EAGAIN": 4, "ended": 5}
MOST_CALLS = 5000  # of one way; more means that it never ends


class Shim:
    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(None)
        self._library.arm.argtypes = [
            ctypes.c_int,
            ctypes.c_long,
            ctypes.c_int,
            ctypes.c_ulong,
            ctypes.c_ulong,
            ctypes.c_ulong,
        ]
        self._library.armed_calls.restype = self._library.armed_hits.restype = ctypes.c_long
        about = path.stat()
        self._file = about.st_dev, about.st_ino

    def arm(self, fault: str, at: int, rate: int = 0, seed: int = 1) -> None:
        self._library.arm(FAULTS[fault], at, rate, seed, *self._file)

    def disarm(self) -> None:
        self._library.arm(0, 1, 0, 1, 0, 0)

    def counts(self) -> tuple[int, int]:
        return self._library.armed_calls(), self._library.armed_hits()


def tensors() -> dict[str, Any]:
    """One that threads read, a strided one, a shared one, and small ones; in records and in one that is deflated."""
    large = torch.arange(700_000, dtype=torch.int64)
    small = torch.arange(5000, dtype=torch.float32)
    return {
        "a": torch.arange(7),
        "large": large.view(700, 1000),
        "strided": small[::3],
        "shared": small[100:200],
        "z": torch.ones(3, 3),
    }


def ways(path: Path, wanted: dict[str, Any]) -> dict[str, Callable[[], bool]]:
    """By name: open the file, read, and say whether it was right."""

    def same(got: Any, key: str, index: Any = ...) -> bool:
        part = wanted[key][index]
        return got.dtype == part.dtype and conformance.logical_bytes(got) == conformance.logical_bytes(part)

    def each() -> bool:
        with zipslicer.load(path) as sd:
            return list(sd) == list(wanted) and all(same(sd[key], key) for key in sd)

    def whole() -> bool:
        with zipslicer.load(path, threads=3) as sd:
            return all(same(tensor, key) for key, tensor in sd.materialize().items())

    def sliced() -> bool:
        with zipslicer.load(path, threads=3) as sd:
            part = sd.get_slice("large")
            return same(part[5:9], "large", slice(5, 9)) and same(
                part[:, 100:300], "large", (slice(None), slice(100, 300))
            )

    def streamed() -> bool:
        with zipslicer.load(path) as sd:
            return [same(tensor, key) for key, tensor in sd.stream()] == [True] * len(wanted)

    def loaded_into() -> bool:
        targets = {key: torch.full_like(tensor, 9) for key, tensor in wanted.items()}
        with zipslicer.load(path) as sd:
            sd.load_into(targets)
        return all(same(tensor, key) for key, tensor in targets.items())

    def verified() -> bool:
        with zipslicer.open(path, verify=True) as checkpoint:
            return not checkpoint.verify().damaged

    return {way.__name__: way for way in (each, whole, sliced, streamed, loaded_into, verified)}


def outcome(way: Callable[[], bool]) -> str:
    try:
        return "right" if way() else "wrong"
    except (zipslicer.ZipSlicerError, OSError) as error:
        return type(error).__name__


def every_call(shim: Shim, all_ways: dict[str, Callable[[], bool]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for fault in FAULTS:
        counted: collections.Counter[str] = collections.Counter()
        total = 0
        for name, way in all_ways.items():
            for at in range(1, MOST_CALLS):
                shim.arm(fault, at)
                came = outcome(way)
                calls, hits = shim.counts()
                shim.disarm()
                total += calls
                if not hits:
                    assert came == "right", f"{name}, without a fault: {came}"
                    break
                counted[came] += 1
            else:
                raise AssertionError(f"{name} makes more and more calls under {fault}")
        found[fault] = {"outcomes": counted, "calls": total, "faults": sum(counted.values())}
    return found


def at_random(shim: Shim, all_ways: dict[str, Callable[[], bool]], calls: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for fault, number in FAULTS.items():
        counted: collections.Counter[str] = collections.Counter()
        total = faults = round_ = 0
        # A fault that is an error seldom, so that reads come far; one that is none often.
        rate = 1 << 15 if fault in ("short", "EINTR") else 1 << 11
        while total < calls // len(FAULTS):
            for way in all_ways.values():
                shim.arm(fault, 0, rate, seed=7919 * round_ + number)
                counted[outcome(way)] += 1
                made, hits = shim.counts()
                shim.disarm()
                total, faults, round_ = total + made, faults + hits, round_ + 1
        found[fault] = {"outcomes": counted, "calls": total, "faults": faults}
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--random", type=int, metavar="CALLS")
    options = parser.parse_args()
    path, wanted = options.folder / "model.pt", tensors()
    torch.save(wanted, path)
    os.utime(path, (1_000_000_000, 1_000_000_000))
    shim, all_ways = Shim(path), ways(path, wanted)
    assert all(outcome(way) == "right" for way in all_ways.values())
    print(json.dumps(at_random(shim, all_ways, options.random) if options.random else every_call(shim, all_ways)))


if __name__ == "__main__":
    main()
