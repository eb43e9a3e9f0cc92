"""Faults: what happens to a checkpoint whose file breaks, told from a process that may die of it.

    python faults.py FAULT FOLDER

Prints a JSON list of outcomes, one for each time the file was broken: "right" (all tensors as they were saved), "wrong"
(they came, and are others), or the name of the class of the ZipSlicerError or OSError. Any other exception ends the
process with its traceback, and a signal ends it with the signal's number: both are the caller's to see.
"""

from __future__ import annotations

import collections
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import conformance
import torch

import zipslicer

LONG_AGO = (
    1_000_000_000  # seconds; a clock tick of the file system is too coarse to tell a fresh file from its rewriting
)
TRUNCATIONS = 200
RACES = 200


def tensors() -> dict[str, torch.Tensor]:
    """Small ones, one that is read on threads, a strided one, and two that share."""
    large = torch.arange(1 << 21, dtype=torch.int64)
    small = torch.arange(5000, dtype=torch.float32)
    return collections.OrderedDict(
        a=torch.arange(7), large=large, strided=small[::3], shared=small[100:200], z=torch.ones(3, 3)
    )


def save(path: Path, wanted: dict[str, torch.Tensor]) -> bytes:
    torch.save(wanted, path)
    os.utime(path, (LONG_AGO, LONG_AGO))
    return path.read_bytes()


def outcome(act: Callable[[], dict[str, Any]], wanted: dict[str, torch.Tensor]) -> str:
    try:
        got = act()
    except (zipslicer.ZipSlicerError, OSError) as error:
        return type(error).__name__
    same = [is_same(got[key], wanted.get(key)) for key in got]
    return "right" if same and all(same) else "wrong"


def is_same(got: object, wanted: torch.Tensor | None) -> bool:
    if not isinstance(got, torch.Tensor) or wanted is None:
        return False
    return got.dtype == wanted.dtype and conformance.logical_bytes(got) == conformance.logical_bytes(wanted)


def touch_each(mapping: Any) -> Iterator[Callable[[], dict[str, Any]]]:
    """Every way to a tensor's bytes, one at a time."""
    for key in mapping:
        yield lambda key=key: {key: mapping[key]}  # type: ignore[misc]
        yield lambda key=key: {key: mapping.get_slice(key)[...]}  # type: ignore[misc]
    yield lambda: mapping.materialize()


def everything(path: Path) -> dict[str, Any]:
    with zipslicer.open(path) as checkpoint:
        touched = {key: checkpoint.tensors[key] for key in checkpoint.tensors}
        checkpoint.tensors.materialize()
        return touched


def truncated(folder: Path) -> list[str]:
    """Cut at 200 places, spread over the file and near both of its ends."""
    wanted = {key: tensor for key, tensor in tensors().items() if key != "large"}
    path = folder / "model.pt"
    content = save(path, wanted)
    spread = {len(content) * i // (TRUNCATIONS - 60) for i in range(TRUNCATIONS - 60)}
    lengths = sorted(spread | set(range(1, 31)) | set(range(len(content) - 30, len(content))))
    outcomes = []
    for length in lengths:
        path.write_bytes(content[:length])
        outcomes.append(outcome(lambda: everything(path), wanted))
    return outcomes


def flipped(folder: Path) -> list[str]:
    """Every byte of a small file changed, one at a time."""
    wanted = {"w": torch.arange(6, dtype=torch.float32).reshape(2, 3), "n": torch.tensor(7)}
    path = folder / "model.pt"
    content = save(path, wanted)
    outcomes = []
    for at in range(len(content)):
        broken = bytearray(content)
        broken[at] ^= (0xFF, 0x01, 0x80, 0x20)[at % 4]
        path.write_bytes(broken)
        outcomes.append(outcome(lambda: everything(path), wanted))
    return outcomes


def after_opening(folder: Path, harm: Callable[[Path, bytes], None]) -> list[str]:
    """Break the file once it is open, then try every way to every tensor: of a fresh mapping, and of one in use."""
    wanted = tensors()
    path = folder / "model.pt"
    outcomes = []
    for warm in (False, True):
        content = save(path, wanted)
        with zipslicer.open(path) as checkpoint:
            mapping = checkpoint.tensors
            if warm:
                assert all(outcome(act, wanted) == "right" for act in touch_each(mapping))
            harm(path, content)
            outcomes += [outcome(act, wanted) for act in touch_each(mapping)]
    return outcomes


def replaced(folder: Path) -> list[str]:
    """Another file under the name, as an atomic save does."""

    def harm(path: Path, content: bytes) -> None:
        other = path.with_suffix(".new")
        other.write_bytes(b"\xff" * len(content))
        other.replace(path)

    return after_opening(folder, harm)


def deleted(folder: Path) -> list[str]:
    return after_opening(folder, lambda path, content: path.unlink())


def shrunk(folder: Path) -> list[str]:
    """Shorter by a byte, by half, and by all but the first bytes."""

    def cut(kept: Callable[[int], int]) -> list[str]:
        return after_opening(folder, lambda path, content: os.truncate(path, kept(len(content))))

    return (
        cut(lambda nbytes: nbytes - 1)
        + cut(lambda nbytes: nbytes // 2)
        + cut(lambda nbytes: 100)
        + cut(lambda nbytes: 0)
    )


def grown(folder: Path) -> list[str]:
    def harm(path: Path, content: bytes) -> None:
        with path.open("ab") as file:
            file.write(b"more")

    return after_opening(folder, harm)


def rewritten(folder: Path) -> list[str]:
    """Other bytes of the same number, in place."""

    def harm(path: Path, content: bytes) -> None:
        with path.open("r+b") as file:
            file.write(bytes(byte ^ 0xFF for byte in content[:4096]) + content[4096:])

    return after_opening(folder, harm)


def raced(folder: Path) -> list[str]:
    """Cut and made whole again, over and over, while it is read."""
    wanted = tensors()
    path = folder / "model.pt"
    content = save(path, wanted)
    half = len(content) // 2
    done = threading.Event()

    def spoil() -> None:
        with path.open("r+b", buffering=0) as file:
            while not done.is_set():
                file.truncate(half)
                file.seek(half)
                file.write(content[half:])
                os.utime(path, (LONG_AGO, LONG_AGO))

    outcomes: list[str] = []
    with zipslicer.open(path) as checkpoint:
        spoiler = threading.Thread(target=spoil)
        spoiler.start()
        try:
            while len(outcomes) < RACES:
                outcomes += [outcome(act, wanted) for act in touch_each(checkpoint.tensors)]
        finally:
            done.set()
            spoiler.join()
        outcomes += [outcome(act, wanted) for act in touch_each(checkpoint.tensors)]
    return outcomes


FAULTS: dict[str, Callable[[Path], list[str]]] = {
    fault.__name__: fault for fault in (truncated, flipped, replaced, deleted, shrunk, grown, rewritten, raced)
}

if __name__ == "__main__":
    print(json.dumps(FAULTS[sys.argv[1]](Path(sys.argv[2]))))
