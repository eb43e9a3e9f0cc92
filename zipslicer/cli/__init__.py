# PYTHON_ARGCOMPLETE_OK
"""The command line. Prints, never computes: what it says comes from the modules of the library.

    zipslicer ls FILE [GLOB...]     the tensors of a file
    zipslicer show FILE NAME        one of them: its facts, its numbers, their distribution
    zipslicer check FILE...         read everything, both ways, and say whether it is whole
    zipslicer scan FILE...          what plain pickle would run
    zipslicer diff A B              what differs between two files
    zipslicer convert SRC DST       another format, dtype, or number of files
    zipslicer extract FILE DST KEY...   some of the tensors, in a file of their own
    zipslicer merge SRC... DST      the tensors of several files, in one
    zipslicer report FILE           a page about it, to be looked at in a browser
    zipslicer bench FILE            how long it takes to read, beside torch.load

Exit status: 0 nothing was found, 1 something was (damage, a difference, a stranger), 2 wrong use, 3 a file is refused,
4 the system cannot read or write one. Of several files the highest counts. 130 says that Ctrl-C ended it.

One parser of the standard library, so that a list of 10,000 tensors is there in less time than it takes to import what
draws coloured tables. Each command is a module, imported when it is called.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Any

from .. import __version__, backend
from ..errors import ZipSlicerError, printable
from .terminal import GOOD, INTERRUPTED, REFUSED, UNREADABLE, WRONG_USE, say, silent

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `zipslicer`; -> exit status."""
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:  # set by the shell that wants a word completed: see docs/usage.md
        import argcomplete

        argcomplete.autocomplete(parser)
    options = parser.parse_args(argv)
    if not hasattr(options, "act"):
        parser.print_help()
        return GOOD
    try:
        if getattr(options, "progress", False) is None:
            options.progress = sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None
        return _run(options)
    except KeyboardInterrupt:
        print("zipslicer: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever reads has enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return GOOD


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zipslicer",
        description="Open PyTorch checkpoints without loading them.",
        epilog="Exit status: 0 nothing was found, 1 something was, 2 wrong use, 3 a file is refused, 4 it cannot be read.",
    )
    parser.add_argument("--version", action="version", version=f"{__version__} ({backend()})")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    ls = _command(commands, "ls", "listing.ls", "list the tensors of a file")
    ls.add_argument("files", nargs=1, metavar="FILE", help="a checkpoint, a folder or an index of shards")
    ls.add_argument("keys", nargs="*", metavar="GLOB", help="only tensors of these names: 'layer3.*'")
    ls.add_argument("--sort", choices=("file", "name", "size", "dtype"), default="file", help="size: largest first")
    ls.add_argument("--tree", action="store_true", help="modules with their tensors and bytes, in place of a list")
    ls.add_argument("--depth", type=int, metavar="N", help="of the tree")
    _json(ls)

    show = _command(commands, "show", "showing.show", "show a tensor: its facts, its numbers, their distribution")
    show.add_argument("files", nargs=1, metavar="FILE", help="a checkpoint, a folder or an index of shards")
    show.add_argument("keys", nargs="+", metavar="NAME", help="of tensors; or globs")
    _json(show)

    check = _command(commands, "check", "checking.check", "read everything, both ways, and say whether it is whole")
    _files(check)
    check.add_argument("--no-torch", action="store_true", help="do not compare with torch.load")
    check.add_argument("--threads", type=int, help="for reading and for checksums")
    _progress(check)
    _json(check)

    scan = _command(commands, "scan", "checking.scan", "say what the file names, and what plain pickle would run")
    _files(scan)
    _json(scan)

    diff = _command(commands, "diff", "differing.diff", "compare two files: names, shapes, dtypes, values")
    diff.add_argument("files", nargs=1, metavar="A", help="a checkpoint, a folder or an index of shards")
    diff.add_argument("other", metavar="B", help="the one to compare it with")
    diff.add_argument("keys", nargs="*", metavar="GLOB", help="only tensors of these names")
    diff.add_argument("--no-values", action="store_true", help="names, shapes and dtypes only: nothing is read")
    _json(diff)

    convert = _command(commands, "convert", "converting.convert", "write another format, dtype, or number of files")
    convert.add_argument("files", nargs=1, metavar="SRC", help="a checkpoint, a folder or an index of shards")
    convert.add_argument("dst", metavar="DST", help="name.safetensors, name/ for a DCP folder, or name.pth")
    convert.add_argument("--keys", action="append", metavar="GLOB", help="only tensors of these names")
    _writing(convert)

    extract = _command(commands, "extract", "converting.convert", "write some tensors to a file of their own")
    extract.add_argument("files", nargs=1, metavar="FILE", help="a checkpoint, a folder or an index of shards")
    extract.add_argument("dst", metavar="DST", help="name.safetensors, name/ for a DCP folder, or name.pth")
    extract.add_argument("keys", nargs="+", metavar="GLOB", help="names of tensors: 'layer3.*'")
    _writing(extract)

    merge = _command(commands, "merge", "converting.merge", "write the tensors of several files to one")
    merge.add_argument("sources", nargs="+", metavar="SRC", help="checkpoints, folders or indexes of shards")
    merge.add_argument("dst", metavar="DST", help="name.safetensors, name/ for a DCP folder, or name.pth")
    merge.set_defaults(files=["the files"], keys=None)
    _writing(merge)

    report = _command(commands, "report", "reporting.report", "write a page about a file: a map, tables, what is odd")
    report.add_argument("files", nargs=1, metavar="FILE", help="a checkpoint, a folder or an index of shards")
    report.add_argument("-o", "--output", default="report.html", metavar="PAGE", help="default: report.html")
    report.add_argument("--diff", metavar="OTHER", help="a second file: the page says how it differs")
    report.add_argument("--no-values", action="store_true", help="names, shapes and dtypes only: nothing is read")
    report.add_argument("--threads", type=int, help="that look at values")
    _progress(report)
    _json(report)

    bench = _command(commands, "bench", "timings.bench", "time this file on this machine, beside torch.load")
    bench.add_argument("files", nargs=1, metavar="FILE", help="one file")
    bench.add_argument("--samples", type=_count, default=3, metavar="N", help="fresh processes of each (default 3)")
    _json(bench)
    return parser


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return count


def _command(commands: Any, name: str, act: str, what: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
    parser.set_defaults(act=act)
    return parser


def _files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="a checkpoint, a folder or an index of shards")


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one list with an object for each file, and nothing else")


def _writing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", help="cast floating-point tensors: bfloat16")
    parser.add_argument("--format", choices=("safetensors", "torch", "dcp"), help="whatever DST is called")
    parser.add_argument("--strip", metavar="PREFIX", help="take it off the names that have it")
    parser.add_argument("--max-shard-size", metavar="SIZE", help="several files with an index: 5GB")
    parser.add_argument("--verify", action="store_true", help="read all once more, and compare")
    _progress(parser)
    _json(parser)


def _progress(parser: argparse.ArgumentParser) -> None:
    help_ = "a bar of bytes (needs tqdm); on a terminal there is one anyway"
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, help=help_)


def _run(options: argparse.Namespace) -> int:
    results, status = [], GOOD
    for path in options.files:
        found, result = _of_file(path, options)
        status = max(status, found)
        results.append(result)
    if options.json:
        import json

        print(json.dumps(results, indent=2))
    return status


def _of_file(path: str, options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Act on a file -> (exit status, what --json shows)."""
    speak = silent if options.json else say
    module, _, name = options.act.partition(".")
    try:
        found: tuple[int, dict[str, Any]] = getattr(importlib.import_module(f".{module}", __name__), name)(
            path, options, speak
        )
        return found
    except ZipSlicerError as error:
        speak(f"REFUSED  {path}\n  {type(error).__name__}: {error}")
        return REFUSED, {"path": path, "verdict": "refused", "error": f"{type(error).__name__}: {error}"}
    except BrokenPipeError:
        raise
    except OSError as error:
        named = error.filename if isinstance(error.filename, str) else path
        return _failed(path, UNREADABLE, f"{named}: {error.strerror or error}")
    except (ValueError, KeyError, ImportError) as error:  # what the caller asked for is at fault, or what is installed
        return _failed(path, WRONG_USE, str(error))


def _failed(path: str, status: int, why: str) -> tuple[int, dict[str, Any]]:
    print(f"zipslicer: {printable(why)}", file=sys.stderr)
    return status, {"path": path, "verdict": "unreadable", "error": why}
