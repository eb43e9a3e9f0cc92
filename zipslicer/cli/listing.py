"""zipslicer ls: the tensors of a file, as a list, as a tree, as JSON. Nothing of them is read."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterable, Sequence
from typing import Any

from ..checkpoint import open as open_checkpoint
from ..state_dict import LazyStateDict
from ..table import Glance
from .terminal import GOOD, Say, size, table

__all__ = ["ls"]

Listed = tuple[str, Glance, Any]  # name, facts, and what it shares memory by: None where it does not


def ls(path: str, options: argparse.Namespace, say: Say) -> tuple[int, dict[str, Any]]:
    was_enabled = gc.isenabled()
    gc.disable()  # objects are made by the thousand here, and none of them is garbage: its rounds took a third of the time
    try:
        return _ls(path, options, say)
    finally:
        if was_enabled:
            gc.enable()


def _ls(path: str, options: argparse.Namespace, say: Say) -> tuple[int, dict[str, Any]]:
    with open_checkpoint(path) as checkpoint:
        tensors = checkpoint.tensors.select(*options.keys) if options.keys else checkpoint.tensors
        listed = _listed(tensors)
        _sort(listed, options.sort)
        if options.json:
            return GOOD, _as_json(path, tensors, listed)
        if options.tree or options.depth is not None:
            say(_tree(listed, options.depth))
        else:
            say(_list(listed))
        say(_totals(listed, len(checkpoint.tensors)))
        strangers = len(checkpoint.placeholders)
        if strangers:
            say(f"{strangers:,} objects of classes that were not built: zipslicer scan names them")
    return GOOD, {}


def _listed(tensors: LazyStateDict) -> list[Listed]:
    at = tensors._view.at
    found = []
    for name, position in tensors._slots.items():
        view, place = at(position)
        facts = view.table.glance(place)
        found.append((name, facts, (id(view), facts.storage) if facts.storage >= 0 and facts.nbytes else None))
    return found


def _sort(listed: list[Listed], by: str) -> None:
    if by == "name":
        listed.sort(key=lambda each: each[0])
    elif by == "size":
        listed.sort(key=lambda each: (-each[1].nbytes, each[0]))
    elif by == "dtype":
        listed.sort(key=lambda each: (each[1].dtype_name, each[0]))


def _list(listed: Sequence[Listed]) -> str:
    first: dict[Any, str] = {}
    rows: list[tuple[str, ...]] = []
    said: dict[Any, tuple[str, str, str]] = {}  # most tensors are like another but for their name
    shares = False
    for name, facts, storage in listed:
        kind = facts[:3]
        shown = said.get(kind)
        if shown is None:
            shown = said[kind] = facts.dtype_name, str(list(facts.shape)), size(facts.nbytes)
        whose = name if storage is None else first.setdefault(storage, name)
        if whose == name:
            rows.append((name, *shown))
        else:
            shares = True
            rows.append((name, *shown, f"shares {whose}"))
    if shares:
        rows = [row if len(row) == 5 else (*row, "") for row in rows]
    return table(rows, "<<<><") if rows else "no tensors"


def _totals(listed: Sequence[Listed], of_all: int) -> str:
    """What they are together. Memory that several share counts once for the whole, and for each of its dtypes."""
    by_dtype: dict[str, list[int]] = {}
    stored: dict[Any, int] = {}
    alone = 0
    for _, facts, storage in listed:
        dtype_name, _, nbytes, _ = facts
        counts = by_dtype.get(dtype_name)
        if counts is None:
            counts = by_dtype[dtype_name] = [0, 0]
        counts[0] += 1
        counts[1] += nbytes
        if storage is None:
            alone += nbytes
        elif stored.get(storage, -1) < nbytes:
            stored[storage] = nbytes
    some = f"{len(listed):,} tensors" if len(listed) == of_all else f"{len(listed):,} of {of_all:,} tensors"
    kinds = ", ".join(f"{count:,} {name} ({size(nbytes)})" for name, (count, nbytes) in by_dtype.items())
    return f"{some}, {size(alone + sum(stored.values()))}" + (f": {kinds}" if kinds else "")


def _tree(listed: Iterable[Listed], depth: int | None) -> str:
    """Modules by the dots in names, each with its tensors and bytes."""
    counts: dict[tuple[str, ...], list[int]] = {}
    leaves: dict[tuple[str, ...], Glance] = {}
    for name, facts, _ in listed:
        path = tuple(str(name).split("."))
        leaves[path] = facts
        for end in range(1, len(path)):
            total = counts.setdefault(path[:end], [0, 0])
            total[0] += 1
            total[1] += facts.nbytes
    rows, seen = [], set()
    for path, facts in leaves.items():
        for end in range(1, len(path)):
            module = path[:end]
            if module in seen or (depth is not None and end > depth):
                continue
            seen.add(module)
            count, nbytes = counts[module]
            rows.append((f"{'  ' * (end - 1)}{module[-1]}", f"{count:,} tensor{'s' * (count != 1)}", size(nbytes)))
        if depth is None or len(path) <= depth:
            shown = f"{facts.dtype_name} {list(facts.shape)}"
            rows.append((f"{'  ' * (len(path) - 1)}{path[-1]}", shown, size(facts.nbytes)))
    return table(rows, "<<>") if rows else "no tensors"


def _as_json(path: str, tensors: LazyStateDict, listed: Iterable[Listed]) -> dict[str, Any]:
    found = []
    for name, _, _ in listed:
        info = tensors.get_meta(name)
        assert info is not None
        facts = {fact: getattr(info, fact) for fact in SHOWN}
        found.append({"name": name, **facts, "shape": list(info.shape), "strides": list(info.strides)})
    return {"path": path, "tensors": found}


SHOWN = (
    "dtype_name", "shape", "strides", "storage_offset", "nbytes", "storage_key", "storage_nbytes", "layout", "location",
    "requires_grad", "is_parameter", "class_name",
)  # fmt: skip
