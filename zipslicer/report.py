"""Report: a checkpoint in, one page of HTML out: what is in it, where its bytes are, what its numbers are like, what is odd.

Side door. All that the page shows is computed here and lies in it as JSON; page/ has what draws it. The page fetches
nothing and names no other address, and its Content-Security-Policy lets only the two scripts run that were put there: text
of a checkpoint is text, whatever it says.
"""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import hashlib
import html
import json
import math
import os
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ._version import __version__
from .checkpoint import backend
from .checkpoint import open as open_checkpoint
from .difference import Difference, differences
from .errors import ZipSlicerError, printable
from .policy import describe
from .reader import default_threads
from .replacement import Replacement
from .scan import scan
from .source import without_secrets
from .state_dict import LazySlice, LazyStateDict
from .stream import bar_of
from .table import TensorInfo
from .values import Values, slice_of, values_of

__all__ = ["Flag", "Reported", "flags_of", "write_report"]

PAGE = Path(__file__).parent / "page"
MAIN_PARTS = ("values", "int_repr")  # of a tensor of several, the one whose numbers are looked at
FAR = 20.0  # standard deviations from the mean; of 10^12 normal numbers, none is 8 away
FEW = 100  # elements, of which nothing is far away
PEERS = 6  # tensors of one shape and role, at least, before one of them can be unlike the others
UNLIKE = 5.0  # robust standard deviations of log10 of the root mean square, and that
TWICE = math.log10(2)
STRANGERS = 1000  # placeholders that are named one by one


class Flag(NamedTuple):
    """One thing that is odd about a tensor.

    Attributes:
        name: of the tensor.
        kind: "unreadable"; "NaN", "infinite"; "far" (an element more than 20 standard deviations from the mean of 100 or
            more); "unlike peers" (its root mean square is twice or half that of the median of at least 6 tensors whose
            names differ in numbers only and whose shape is the same, and 5 robust standard deviations away); "zero" and
            "constant" (all of two or more elements are the same).
        text: what was seen.
    """

    name: str
    kind: str
    text: str


class Reported(NamedTuple):
    """What a report says, in short.

    Attributes:
        tensors: how many; nbytes: of them, shared memory once.
        verdict: of scan().
        flags: of odd tensors.
        differences: to the other file; None where there was none.
    """

    tensors: int
    nbytes: int
    verdict: str
    flags: tuple[Flag, ...]
    differences: int | None


class _Row(NamedTuple):
    name: str
    info: TensorInfo
    storage: int  # what shares memory has the same number; -1 has none
    values: Values | None
    error: str


def write_report(
    path: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    other: str | os.PathLike[str] | None = None,
    values: bool = True,
    threads: int | None = None,
    progress: bool = False,
    **options: Any,
) -> Reported:
    """Write one page of HTML about a checkpoint, which needs no network and no other file.

    Tensors are read one chunk at a time; what is damaged is named in the page, and is no error.

    Args:
        path: a file, a folder or an index of shards.
        dst: of the page. It takes the place of what is there when it is whole.
        other: a second checkpoint; the page then says how it differs from the first.
        values: False reads no tensor: names, shapes and sizes only.
        threads: that look at numbers, as for reading.
        progress: show a bar of bytes (needs tqdm).
        options: of zipslicer.open: framework, limits, window and so on.

    Raises:
        ImportError: without NumPy, where values are wanted.
        ZipSlicerError: a file is refused. OSError: it cannot be read, or the page not be written.
    """
    with contextlib.ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(path, **options))
        second = None if other is None else stack.enter_context(open_checkpoint(other, **options))
        rows = _rows(checkpoint.tensors, values, threads or default_threads(), progress)
        flags = tuple(flags_of((row.name, row.info, row.values, row.error) for row in rows))
        scanned = scan(path, limits=options.get("limits"), storage_options=options.get("storage_options"))
        facts: dict[str, Any] = {
            "about": _about(path, rows),
            "tensors": [_as_json(row) for row in rows],
            "flags": flags,
            "strangers": _strangers(checkpoint.placeholders),
            "scan": {**scanned.to_dict(), "path": None},
            "difference": None,
        }
        if second is not None and other is not None:
            found = list(differences(checkpoint.tensors, second.tensors, values=values))
            facts["difference"] = {
                "other": _about(other, _rows(second.tensors, False, 1, False)),
                "found": [_difference_as_json(each) for each in found],
                "compared": values,
            }
    text = _page(f"{facts['about']['name']} - zipslicer", facts)
    output = Replacement(dst)
    try:
        output.write([text.encode()])
    except BaseException:
        output.discard()
        raise
    output.commit()
    about = facts["about"]
    return Reported(len(rows), about["nbytes"], scanned.verdict, flags, None if second is None else len(found))


# ---------------------------------------------------------------- facts


def _about(path: str | os.PathLike[str], rows: list[_Row]) -> dict[str, Any]:
    shown = os.fspath(path)
    return {
        "name": os.path.basename(os.path.normpath(without_secrets(shown))),
        "file_nbytes": os.path.getsize(shown) if os.path.isfile(shown) else None,
        "tensors": len(rows),
        "numel": sum(row.info.numel for row in rows),
        "nbytes": _stored(rows),
        "made": dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "by": f"zipslicer {__version__} ({backend()})",
    }


def _stored(rows: Iterable[_Row]) -> int:
    """Bytes of all, memory that several share once."""
    nbytes: dict[Any, int] = {}
    for number, row in enumerate(rows):
        place = row.storage if row.storage >= 0 else -1 - number
        nbytes[place] = max(nbytes.get(place, 0), row.info.nbytes)
    return sum(nbytes.values())


def _rows(tensors: LazyStateDict, values: bool, threads: int, progress: bool) -> list[_Row]:
    """Every tensor, with its numbers where these are wanted."""
    places: dict[Any, int] = {}
    found: list[tuple[str, TensorInfo, int]] = []
    for name, position in tensors._slots.items():
        info = tensors.get_meta(name)
        if info is None:
            continue
        view, place = tensors._view.at(position)
        facts = view.table.glance(place)
        shares = facts.storage >= 0 and facts.nbytes
        found.append((name, info, places.setdefault((id(view), facts.storage), len(places)) if shares else -1))
    if not values:
        return [_Row(*each, None, "") for each in found]
    import numpy as np  # threads would all import it at once

    del np
    rows = []
    with bar_of(progress, sum(info.nbytes for _, info, _ in found)) as bar:
        parts = (_part(tensors, name, info) for name, info, _ in found)
        for (name, info, storage), (seen, error) in zip(found, _looked_at(parts, threads)):
            rows.append(_Row(name, info, storage, seen, error))
            if bar is not None:
                bar.update(info.nbytes)
    return rows


def _part(tensors: LazyStateDict, name: str, info: TensorInfo) -> LazySlice | None:
    """Whose numbers are looked at: of a tensor of several parts, those of one."""
    part = slice_of(tensors, name, info)
    if part is not None and info.parts:
        return part.part(next((each for each in MAIN_PARTS if each in info.parts), next(iter(info.parts))))
    return part


def _looked_at(parts: Iterable[LazySlice | None], threads: int) -> Iterator[tuple[Values | None, str]]:
    """The numbers of each, in order; on threads, a few of them ahead."""
    rest = iter(parts)
    with ThreadPoolExecutor(threads) as pool:
        ahead: list[Future[tuple[Values | None, str]]] = [
            pool.submit(_seen, part) for part in islice(rest, 4 * threads)
        ]
        while ahead:
            yield ahead.pop(0).result()
            ahead += [pool.submit(_seen, part) for part in islice(rest, 1)]


def _seen(part: LazySlice | None) -> tuple[Values | None, str]:
    try:
        return (None if part is None else values_of(part)), ""
    except ZipSlicerError as error:
        return None, f"{type(error).__name__}: {error}"


def flags_of(seen: Iterable[tuple[str, TensorInfo, Values | None, str]]) -> Iterator[Flag]:
    """What is odd about tensors: (name, facts, numbers or None, why they could not be read or "") of each."""
    peers: dict[Any, list[tuple[str, float]]] = defaultdict(list)
    for name, info, values, error in seen:
        if error:
            yield Flag(name, "unreadable", error)
        if values is None or not values.numel:
            continue
        good = values.numel - values.nans - values.infinities
        if values.nans:
            yield Flag(name, "NaN", f"{values.nans:,} of {values.numel:,} elements")
        if values.infinities:
            yield Flag(name, "infinite", f"{values.infinities:,} of {values.numel:,} elements")
        if values.numel > 1 and values.zeros == values.numel:
            yield Flag(name, "zero", f"all {values.numel:,} elements")
        elif values.numel > 1 and good == values.numel and values.least == values.most:
            yield Flag(name, "constant", f"all {values.numel:,} elements are {values.least:.6g}")
        if not info.dtype_name.startswith(("float", "bfloat", "complex")):
            continue
        if values.deviation > 0 and good >= FEW:
            furthest = max(values.least, values.most, key=lambda each: abs(each - values.mean))
            reach = abs(furthest - values.mean) / values.deviation
            if reach > FAR:
                yield Flag(
                    name, "far", f"{furthest:.6g} is {reach:.3g} standard deviations from the mean {values.mean:.6g}"
                )
        if values.norm > 0 and math.isfinite(values.norm) and values.numel > 1:
            size = math.log10(values.norm / math.sqrt(good))
            peers[re.sub(r"\d+", "*", name), tuple(info.shape), info.dtype_name].append((name, size))
    for (role, _, _), group in peers.items():
        yield from _unlike(role, group)


def _unlike(role: str, group: list[tuple[str, float]]) -> Iterator[Flag]:
    """Those of a group whose root mean square is far from that of most (Iglewicz and Hoaglin 1993, by the median)."""
    if len(group) < PEERS:
        return
    middle = statistics.median(size for _, size in group)
    spread = 1.4826 * statistics.median(abs(size - middle) for _, size in group)
    for name, size in group:
        if abs(size - middle) > max(TWICE, UNLIKE * spread):
            text = f"root mean square {10**size:.3g}; the median of {len(group):,} {role} is {10**middle:.3g}"
            yield Flag(name, "unlike peers", text)


def _strangers(placeholders: dict[str, Any]) -> dict[str, Any]:
    classes: dict[str, int] = {}
    for stranger in placeholders.values():
        qualified = describe(stranger).qualified
        classes[qualified] = classes.get(qualified, 0) + 1
    named = [(name, describe(each).qualified) for name, each in islice(placeholders.items(), STRANGERS)]
    return {"count": len(placeholders), "classes": sorted(classes.items(), key=lambda each: -each[1]), "named": named}


# ---------------------------------------------------------------- JSON


def _as_json(row: _Row) -> list[Any]:
    info = row.info
    more = {
        "layout": info.layout if info.layout != "strided" else None,
        "strides": None if info.is_contiguous else list(info.strides),
        "offset": info.storage_offset or None,
        "record": info.storage_key or None,
        "device": info.location if info.location != "cpu" else None,
        "class": info.class_name,
        **{fact: getattr(info, fact) for fact in ("requires_grad", "is_parameter", "is_conj", "is_neg")},
    }
    values = None if row.values is None else [*map(_number, row.values[:9]), row.values.bins]
    kept = {name: value for name, value in more.items() if value}
    return [row.name, info.dtype_name, info.shape, info.numel, info.nbytes, row.storage, values, kept]


def _difference_as_json(each: Difference) -> list[Any]:
    sides = [None if info is None else [info.dtype_name, info.shape, info.nbytes] for info in (each.before, each.after)]
    change = None if each.change is None else [*map(_number, each.change)]
    return [each.name, each.kind, *sides, change]


def _number(value: float) -> float | None:
    """In six digits; JSON has no NaN and no infinity."""
    if isinstance(value, int):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


# ---------------------------------------------------------------- page


def _page(title: str, facts: dict[str, Any]) -> str:
    """The template, with everything in it."""
    library, script = _text("echarts.min.js"), _text("report.js")
    hashes = " ".join(f"'sha256-{_digest(each)}'" for each in (library, script))
    filled = {
        "title": html.escape(printable(title)),
        "policy": f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'",
        "style": _text("report.css"),
        "library": library,
        # "<" would end the element or begin a comment; ASCII says lone surrogates and line separators in JSON's own way.
        "facts": json.dumps(facts, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        "script": script,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: filled[found[1]], _text("report.html"))


def _text(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
