"""Sweeps: every byte of a checkpoint bent in every way, and every place to cut it; told from a process that may die of it.

    python sweeps.py FILE [--bytes-of FILE]

Opens each mutant with verify=True, from memory, and reads all of it. Prints a JSON object: how often what came of it, by
"right", "wrong" and the names of errors, for all mutants of the structure and for those of payloads. An exception that is
none of ours ends the process, and so does a signal.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import conformance
import torch

import zipslicer
from zipslicer.legacy import Legacy

Facts = dict[str, tuple[Any, ...]]


def facts_of(checkpoint: Any, *, with_bytes: bool) -> Facts:
    """Every tensor by its name: what is known of it, and its elements."""
    found: Facts = {}
    for name in checkpoint.tensors:
        info = checkpoint.tensors.get_meta(name)
        found[name] = info.dtype_name, info.shape, info.strides, info.requires_grad, info.location
        if with_bytes:
            value = checkpoint.tensors[name]  # a bent program may name a storage
            is_tensor = isinstance(value, torch.Tensor)
            found[name] += (conformance.logical_bytes(value) if is_tensor else conformance.storage_bytes(value),)
    return found


def outcome(mutant: bytes | bytearray, wanted: Facts, *, with_bytes: bool) -> str:
    try:
        with zipslicer.open(mutant, verify=True) as checkpoint:
            return "right" if facts_of(checkpoint, with_bytes=with_bytes) == wanted else "wrong"
    except zipslicer.ZipSlicerError as error:
        return type(error).__name__


def bent(content: bytes, places: Iterable[int]) -> Iterator[tuple[int, bytearray]]:
    """(place, mutant): each bit flipped, and the byte 0 and 255. The mutant is made right again when the next is asked for."""
    mutant = bytearray(content)
    for at in places:
        for value in {content[at] ^ 1 << bit for bit in range(8)} | {0, 255} - {content[at]}:
            mutant[at] = value
            yield at, mutant
        mutant[at] = content[at]


def payloads_of(content: bytes) -> list[range]:
    """Where the bytes of storages lie."""
    with zipslicer.open(content) as checkpoint:
        table = checkpoint._view.table
        archive = table.archive
        numbers = (
            range(archive.count)
            if isinstance(archive, Legacy)
            else [i for i, name in enumerate(archive.names()) if "/data/" in name]
        )
        return [
            range(start, start + nbytes)
            for start, nbytes in (archive.extent(i) for i in numbers if archive.is_stored(i))
        ]


def swept(content: bytes, *, payload_bytes: int | None, cuts: Iterable[int]) -> dict[str, dict[str, int]]:
    """payload_bytes: so many of those of payloads, chosen at random; None for all."""
    with zipslicer.open(content) as checkpoint:
        whole = facts_of(checkpoint, with_bytes=True)
        bare = facts_of(checkpoint, with_bytes=False)
        is_legacy = isinstance(checkpoint._view.table.archive, Legacy)
    inside = [place for part in payloads_of(content) for place in part]
    within = set(inside)
    if payload_bytes is not None and len(inside) > payload_bytes:
        inside = sorted(random.Random(3).sample(inside, payload_bytes))
    structure = [place for place in range(len(content)) if place not in within]
    # Nothing vouches for the numbers of a format without checksums: there the facts must be right, or an error comes.
    counts = {
        "payloads": collections.Counter(
            outcome(mutant, bare if is_legacy else whole, with_bytes=not is_legacy)
            for _, mutant in bent(content, inside)
        ),
        "structure": collections.Counter(
            outcome(mutant, whole, with_bytes=True) for _, mutant in bent(content, structure)
        ),
        "cuts": collections.Counter(outcome(content[:length], whole, with_bytes=True) for length in cuts),
    }
    return {kind: dict(count) for kind, count in counts.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--payload-bytes", type=int)
    parser.add_argument("--cuts", type=int, help="so many, spread over the file; all by default")
    options = parser.parse_args()
    content = options.file.read_bytes()
    step = max(1, len(content) // options.cuts) if options.cuts else 1
    json.dump(swept(content, payload_bytes=options.payload_bytes, cuts=range(0, len(content), step)), sys.stdout)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
