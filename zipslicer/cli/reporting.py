"""zipslicer report: a page about a file, to be looked at in a browser."""

from __future__ import annotations

import argparse
from typing import Any

from .converting import framework
from .terminal import FOUND, GOOD, Say, size

__all__ = ["report"]


def report(path: str, options: argparse.Namespace, say: Say) -> tuple[int, dict[str, Any]]:
    from ..report import write_report

    found = write_report(
        path,
        options.output,
        other=options.diff,
        values=not options.no_values,
        threads=options.threads,
        progress=options.progress,
        framework=framework(),
    )
    kinds: dict[str, int] = {}
    for flag in found.flags:
        kinds[flag.kind] = kinds.get(flag.kind, 0) + 1
    say(f"wrote {options.output}: {found.tensors:,} tensors, {size(found.nbytes)}, pickle {found.verdict}")
    if kinds:
        say(f"  odd: {', '.join(f'{count:,} {kind}' for kind, count in kinds.items())}")
    if found.differences is not None:
        say(f"  {found.differences:,} differences to {options.diff}")
    facts = {**found._asdict(), "flags": [flag._asdict() for flag in found.flags]}
    return (FOUND if "unreadable" in kinds else GOOD), {"path": path, "output": options.output, **facts}
