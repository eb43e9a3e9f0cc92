"""zipslicer convert, extract, merge: what was written, and what could not be written as it was."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from .terminal import GOOD, Say, size

__all__ = ["convert", "framework", "merge"]

SHOWN = 5  # names of a kind


def convert(path: str, options: argparse.Namespace, say: Say) -> tuple[int, dict[str, Any]]:
    return _converted(path, options, say)


def merge(_path: str, options: argparse.Namespace, say: Say) -> tuple[int, dict[str, Any]]:
    return _converted(options.sources, options, say)


def _converted(src: Any, options: argparse.Namespace, say: Say) -> tuple[int, dict[str, Any]]:
    from ..conversion import convert as convert_file

    strip = options.strip
    found = convert_file(
        src,
        options.dst,
        dtype=options.dtype,
        keys=options.keys,
        key_map=None if strip is None else lambda key: key.removeprefix(strip),
        max_shard_size=options.max_shard_size,
        format=options.format,
        verify=options.verify,
        progress=options.progress,
        framework=framework(),
    )
    compared = ", read again and equal" if options.verify else ""
    lines = [f"wrote {found.tensors:,} tensors, {size(found.nbytes)}{compared}"]
    lines += [f"  {file}" for file in found.files]
    tied = [f"{name} (is {kept})" for name, kept in found.tied.items()]
    for what, names in (
        ("tied, written once", tied),
        ("shared memory, now by themselves", found.untied),
        ("left out, being no tensors", found.left_out),
    ):
        if names:
            more = f", ... {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines.append(f"  {what}: {', '.join(names[:SHOWN])}{more}")
    say("\n".join(lines))
    return GOOD, dataclasses.asdict(found)


def framework() -> str:
    """Of what tensors are made, where they must be: NumPy is there in a tenth of the time, if it is there."""
    import importlib.util

    return "np" if importlib.util.find_spec("numpy") and importlib.util.find_spec("ml_dtypes") else "pt"
