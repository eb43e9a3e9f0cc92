"""zipslicer diff: what differs between two files."""

from __future__ import annotations

import argparse
from typing import Any

from ..checkpoint import open as open_checkpoint
from ..difference import Difference, differences
from ..table import TensorInfo
from .converting import framework
from .terminal import FOUND, GOOD, Say, fitted

__all__ = ["diff"]

SIGNS = {"removed": "-", "added": "+"}


def diff(path: str, options: argparse.Namespace, say: Say) -> tuple[int, dict[str, Any]]:
    with (
        open_checkpoint(path, framework=framework()) as one,
        open_checkpoint(options.other, framework=framework()) as other,
    ):
        before, after = one.tensors, other.tensors
        if options.keys:
            before, after = (
                each.select(*(key for key in options.keys if _is_in(key, each))) for each in (before, after)
            )
        found = []
        for each in differences(before, after, values=not options.no_values):
            say(_line(each))
            found.append(_as_json(each))
        compared = "names, shapes and dtypes" if options.no_values else "all"
        if not found:
            say(f"no difference: {compared} of {len(before):,} tensors")
        else:
            say(f"{len(found):,} differences, of {len(before):,} tensors and {len(after):,}")
    return (FOUND if found else GOOD), {"path": path, "other": options.other, "differences": found}


def _is_in(key: str, tensors: Any) -> bool:
    """A name that only one of the files has is no mistake."""
    return key in tensors or any(sign in key for sign in "*?[")


def _line(each: Difference) -> str:
    return fitted(f"{SIGNS.get(each.kind, '~')} {each.name}", _said(each))


def _said(each: Difference) -> str:
    if each.before is None or each.after is None:
        return _facts(each.before or each.after)
    said = [] if each.kind == "values" else [f"{_facts(each.before)} -> {_facts(each.after)}"]
    change = each.change
    if change is not None and not change.differing:
        said.append(f"all {change.numel:,} values equal")
    elif change is not None:
        said.append(f"{change.differing:,} of {change.numel:,} values differ")
        said.append(f"by {change.largest:.3g} at most, relative norm {change.relative:.3g}")
    return ", ".join(said)


def _facts(info: TensorInfo | None) -> str:
    assert info is not None
    return f"{info.dtype_name} {list(info.shape)}{'' if info.layout == 'strided' else ' ' + info.layout}"


def _as_json(each: Difference) -> dict[str, Any]:
    facts: dict[str, Any] = {"name": each.name, "kind": each.kind}
    for side, info in (("before", each.before), ("after", each.after)):
        facts[side] = (
            None if info is None else {"dtype": info.dtype_name, "shape": list(info.shape), "layout": info.layout}
        )
    facts["change"] = None if each.change is None else each.change._asdict()
    return facts
