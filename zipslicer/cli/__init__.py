"""The command line. Prints, never computes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .. import __version__, backend

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `zipslicer`."""
    parser = argparse.ArgumentParser(prog="zipslicer", description="Open PyTorch checkpoints without loading them.")
    parser.add_argument("--version", action="version", version=f"{__version__} ({backend()})")
    parser.parse_args(argv)
    parser.print_help()
    return 0
