"""The command line. Prints, never computes: what it says comes from `zipslicer.scan`, `verify`, `comparison`.

    zipslicer check FILE...     read everything, both ways, and say whether it is whole
    zipslicer scan FILE...      what plain pickle would run

Exit status: 0 nothing was found, 1 something was (damage, a difference, a stranger), 2 wrong use, 3 a file is refused,
4 the system cannot read one. Of several files the highest counts. 130 says that Ctrl-C ended it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .. import __version__, backend
from ..errors import ZipSlicerError, printable

__all__ = ["main"]

GOOD, FOUND, WRONG_USE, REFUSED, UNREADABLE = range(5)
INTERRUPTED = 130  # as shells say it: 128 and the number of the signal
SHOWN = 20  # damaged records, or globals of one kind, of a file


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `zipslicer`."""
    parser = argparse.ArgumentParser(
        prog="zipslicer",
        description="Open PyTorch checkpoints without loading them.",
        epilog="Exit status: 0 nothing was found, 1 something was, 2 wrong use, 3 a file is refused, 4 it cannot be read.",
    )
    parser.add_argument("--version", action="version", version=f"{__version__} ({backend()})")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    check = _command(commands, "check", _check, "read everything, both ways, and say whether it is whole")
    check.add_argument("--no-torch", action="store_true", help="do not compare with torch.load")
    check.add_argument("--threads", type=int, help="for reading and for checksums")
    check.add_argument("--progress", action="store_true", help="show a bar of bytes (needs tqdm)")
    _command(commands, "scan", _scan, "say what the file names, and what plain pickle would run")
    options = parser.parse_args(argv)
    if not hasattr(options, "act"):
        parser.print_help()
        return GOOD
    try:
        return _run(options)
    except KeyboardInterrupt:
        print("zipslicer: interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(options: argparse.Namespace) -> int:
    results, status = [], GOOD
    for path in options.files:
        found, result = _of_file(path, options)
        status = max(status, found)
        results.append(result)
    if options.json:
        print(json.dumps(results, indent=2))
    return status


def _command(commands: Any, name: str, act: Callable[..., Any], what: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=what, description=what)
    parser.add_argument("files", nargs="+", metavar="FILE", help="a checkpoint, a folder or an index of shards")
    parser.add_argument("--json", action="store_true", help="one list with an object for each file, and nothing else")
    parser.set_defaults(act=act)
    return parser


def _of_file(path: str, options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Act on a file -> (exit status, what --json shows)."""
    say = _silent if options.json else _say
    try:
        found: tuple[int, dict[str, Any]] = options.act(path, options, say)
        return found
    except ZipSlicerError as error:
        say(f"REFUSED  {path}\n  {type(error).__name__}: {error}")
        return REFUSED, {"path": path, "verdict": "refused", "error": f"{type(error).__name__}: {error}"}
    except OSError as error:
        print(f"zipslicer: {printable(path)}: {error.strerror or error}", file=sys.stderr)
        return UNREADABLE, {"path": path, "verdict": "unreadable", "error": str(error)}
    except ValueError as error:  # a folder of several checkpoints, no threads: what the caller asked for is at fault
        print(f"zipslicer: {printable(str(error))}", file=sys.stderr)
        return WRONG_USE, {"path": path, "verdict": "unreadable", "error": str(error)}


def _say(text: str) -> None:
    print("\n".join(map(printable, text.split("\n"))))


def _silent(text: str) -> None:
    del text


# ---------------------------------------------------------------- check


def _check(path: str, options: argparse.Namespace, say: Callable[[str], None]) -> tuple[int, dict[str, Any]]:
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
            lines.append(f"  torch.load: {compared['says']}")
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


# ---------------------------------------------------------------- scan


def _scan(path: str, options: argparse.Namespace, say: Callable[[str], None]) -> tuple[int, dict[str, Any]]:
    from ..scan import scan

    del options
    found = scan(path)
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
