"""zipslicer show: a tensor's facts, its numbers, and how they are distributed."""

from __future__ import annotations

import argparse
from typing import Any

from ..checkpoint import open as open_checkpoint
from ..table import TensorInfo
from ..values import Values, slice_of, values_of
from .converting import framework
from .terminal import GOOD, Say, size, wrapped

__all__ = ["show"]

FIRST = 8  # elements
BAR = 40  # columns of the fullest bin


def show(path: str, options: argparse.Namespace, say: Say) -> tuple[int, dict[str, Any]]:
    found = []
    with open_checkpoint(path, framework=framework()) as checkpoint:
        for name in checkpoint.tensors.select(*options.keys):
            info = checkpoint.tensors.get_meta(name)
            assert info is not None
            parts = _parts(checkpoint.tensors, name, info)
            say(f"{name}\n{wrapped(_facts(info))}")
            result: dict[str, Any] = {"name": name, "dtype": info.dtype_name, "shape": list(info.shape), "values": {}}
            for title, each in parts.items():
                values = values_of(each)
                result["values"][title] = values._asdict()
                head = f"{title}: {each.info.dtype_name} {list(each.info.shape)}\n" if info.parts else ""
                say(head + _numbers(values, each))
            found.append(result)
    return GOOD, {"path": path, "tensors": found}


def _parts(tensors: Any, name: str, info: TensorInfo) -> dict[str, Any]:
    """What numbers are looked at, by title: of a tensor of several parts, those of each."""
    part = slice_of(tensors, name, info)
    if part is None:
        return {}
    return {f"{name} ({each})": part.part(each) for each in info.parts} or {name: part}


def _facts(info: TensorInfo) -> str:
    shown = [f"{info.dtype_name} {list(info.shape)}, {info.numel:,} elements, {size(info.nbytes)}"]
    if info.layout != "strided":
        shown.append(info.layout)
    elif not info.is_contiguous:
        shown.append(f"strides {list(info.strides)}")
    if info.storage_key:
        shown.append(f"storage {info.storage_key!r} of {size(info.storage_nbytes)} from element {info.storage_offset}")
    shown += [fact for fact in ("requires_grad", "is_parameter", "is_conj", "is_neg") if getattr(info, fact)]
    if info.location != "cpu":
        shown.append(f"saved from {info.location}")
    if info.class_name:
        shown.append(f"class {info.class_name}")
    return ", ".join(shown)


def _numbers(values: Values, part: Any) -> str:
    if not values.numel:
        return "  no elements"
    index = (slice(0, FIRST),) if len(part.shape) == 1 else (*(0 for _ in part.shape[:-1]), slice(0, FIRST))
    first = part[index if part.shape else ()].reshape(-1).tolist()
    shown = ", ".join(f"{each:.6g}" if isinstance(each, float) else str(each) for each in first)
    numbers = zip(("min", "max", "mean", "deviation", "norm"), values[4:9])
    lines = [wrapped(f"begins {shown}"), wrapped(", ".join(f"{name} {number:.6g}" for name, number in numbers))]
    odd = [
        f"{n:,} {what}"
        for n, what in ((values.zeros, "zeros"), (values.nans, "NaN"), (values.infinities, "infinite"))
        if n
    ]
    if odd:
        lines.append(f"  of {values.numel:,} elements {', '.join(odd)}")
    return "\n".join(lines + _histogram(values))


def _histogram(values: Values) -> list[str]:
    """Bars, two bins to a line; each that is not empty has one sign at least."""
    if not values.bins:
        return []
    bins = [sum(values.bins[i : i + 2]) for i in range(0, len(values.bins), 2)]
    step, most = (values.most - values.least) / len(bins), max(bins)
    bars = ["#" * max(round(count / most * BAR), bool(count)) for count in bins]
    starts = (f"{values.least + number * step:>12.5g}" for number in range(len(bins)))
    return [f"  {start} {bar:{BAR}} {count:,}".rstrip() for start, bar, count in zip(starts, bars, bins)]
