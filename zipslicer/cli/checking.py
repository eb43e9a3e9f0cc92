"""zipslicer check, zipslicer scan: what is wrong with files, and what is strange in them."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import ZipSlicerError
from .terminal import FOUND, GOOD, REFUSED, Say, wrapped

__all__ = ["check", "scan"]

SHOWN = 20  # damaged records, or globals of one kind, of a file


def check(path: str, options: argparse.Namespace, say: Say) -> tuple[int, dict[str, Any]]:
    from ..checkpoint import open as open_checkpoint

    with open_checkpoint(path, threads=options.threads) as checkpoint:
        facts = checkpoint.verify(threads=options.threads, progress=options.progress, strict=False)
        result: dict[str, Any] = {
            "path": path,
            "records": facts.records,
            "bytes": facts.nbytes,
            "unchecked": list(facts.unchecked),
            "damaged": [str(error) for error in facts.damaged],
        }
        lines = [f"  checksums: {facts.records:,} records of {facts.nbytes:,} bytes are as they were written"]
        if facts.unchecked:
            lines.append(f"  no checksum: {len(facts.unchecked):,} records, such as {facts.unchecked[0]!r}")
        lines += [f"  DAMAGED: {error}" for error in facts.damaged[:SHOWN]]
        bad = bool(facts.damaged)
        if not bad:
            read = _read(checkpoint)
            result.update(read)
            lines += [f"  read: {read['tensors']:,} tensors"] + [
                f"  UNREADABLE: {text}" for text in read["errors"][:SHOWN]
            ]
            bad = bool(read["errors"])
        if not bad and not options.no_torch:
            compared = _compared(checkpoint)
            result["torch.load"] = compared
            lines.append(wrapped(f"torch.load: {compared['says']}"))
            bad = compared["differs"]
    result["verdict"] = "damaged" if result["damaged"] or result.get("errors") else "different" if bad else "good"
    say("\n".join([f"{result['verdict'].upper()}  {path}", *lines]))
    return (FOUND if bad else GOOD), result


def _read(checkpoint: Any) -> dict[str, Any]:
    """Every tensor once, none of which is kept."""
    tensors = checkpoint.tensors
    errors = [error for error in (_error_of(tensors, name) for name in tensors) if error]
    return {"tensors": len(tensors) - len(errors), "errors": errors}


def _error_of(tensors: Any, name: str) -> str:
    try:
        tensors[name]
    except ZipSlicerError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _compared(checkpoint: Any) -> dict[str, Any]:
    try:
        from ..comparison import compare

        found = compare(checkpoint)
    except ImportError:
        return {"says": "not compared: torch is not installed", "differs": False}
    if found.refused is not None:
        return {"says": f"not compared: it refuses the file: {found.refused}", "differs": False}
    if found.difference is not None:
        return {"says": f"DIFFERENT: {found.difference}", "differs": True}
    said = f"equal: {found.tensors:,} tensors of {found.nbytes:,} bytes, bit by bit, and {found.values:,} other values"
    return {"says": said, "differs": False}


def scan(path: str, options: argparse.Namespace, say: Say) -> tuple[int, dict[str, Any]]:
    from ..scan import scan as scan_file

    del options
    found = scan_file(path)
    lines = [f"{found.verdict.upper()}  {path}"]
    if found.error is not None:
        lines.append(f"  {type(found.error).__name__}: {found.error}")
    for kind in ("dangerous", "unknown", "known"):
        named = [finding for finding in found.findings if finding.kind == kind]
        lines += [f"  {kind}: {finding.name}" for finding in named[:SHOWN]]
        if len(named) > SHOWN:
            lines.append(f"  {kind}: and {len(named) - SHOWN:,} more (see --json)")
    if found.programs:
        lines.append(f"  TorchScript: {len(found.programs):,} records of code, which torch.jit.load runs")
    say("\n".join(lines))
    return {"safe": GOOD, "refused": REFUSED}.get(found.verdict, FOUND), found.to_dict()
