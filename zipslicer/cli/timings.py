"""zipslicer bench: this file, on this machine, beside torch.load."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..errors import printable
from ..timing import Timed, timed
from .terminal import GOOD, Say, clipped, size, table

__all__ = ["bench"]

TITLES = {"list": "open and list", "read": "read all", "stream": "stream all"}


def bench(path: str, options: argparse.Namespace, say: Say) -> tuple[int, dict[str, Any]]:
    found = list(timed(path, options.samples, _heard if sys.stderr.isatty() else None))
    best = {each.case: each.median for each in found if each.contestant == "zipslicer" and each.seconds}
    head = ("", "", "median", "beside zipslicer", "memory")
    say(table([head, *(_row(each, best.get(each.case)) for each in found)], "<<>>>"))
    say(f"medians of {options.samples} fresh processes; imports not counted; file in the page cache")
    for each in found:
        if each.error is not None:
            say(f"{TITLES[each.case]}, {each.contestant}: {clipped(printable(each.error), 200)}")
    return GOOD, {"path": path, "samples": options.samples, "timed": [each._asdict() for each in found]}


def _heard(what: str) -> None:
    print(f"\r{what:40}\r", end="", file=sys.stderr, flush=True)


def _row(each: Timed, best: float | None) -> tuple[str, ...]:
    if not each.seconds:
        return TITLES[each.case], each.contestant, "-", "-", "-"
    beside = "" if best is None else f"{each.median / best:.2f}x"
    return TITLES[each.case], each.contestant, _shown(each.median), beside, size(each.growth) if each.growth else ""


def _shown(seconds: float) -> str:
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds * 1e6:.3g} us"
