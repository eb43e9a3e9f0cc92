"""A file that breaks raises; it never kills the process, and never gives numbers that were not in it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

SCRIPT = Path(__file__).with_name("faults.py")
ERRORS = {"ArchiveError", "ChangedError", "ProgramError", "TableError", "UnsupportedError", "OSError"}


def outcomes(fault: str, folder: Path) -> list[str]:
    """Let it happen in a process of its own, whose death is a failure."""
    command = [sys.executable, "-W", "error::ResourceWarning", str(SCRIPT), fault, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"
    found: list[str] = json.loads(done.stdout)
    assert found
    return found


def test_truncated(tmp_path: Path) -> None:
    found = outcomes("truncated", tmp_path)
    assert len(found) >= 200
    assert set(found) <= ERRORS - {"ChangedError"}, "a file that was cut before it was opened is damaged, not changed"


def test_every_byte_flipped(tmp_path: Path) -> None:
    """A flipped byte may be padding, or a number in a tensor, for which nothing vouches at reading; else it is an error."""
    found = outcomes("flipped", tmp_path)
    assert set(found) <= ERRORS | {"right", "wrong"}
    assert {"right", "ArchiveError", "ProgramError"} <= set(found)
    assert found.count("wrong") < len(found) / 4


@pytest.mark.parametrize("fault", ["replaced", "deleted"])
def test_another_file_under_the_name(fault: str, tmp_path: Path) -> None:
    """The descriptor still leads to the file that was opened, or the change is seen."""
    assert set(outcomes(fault, tmp_path)) <= {"right", "ChangedError"}


@pytest.mark.parametrize("fault", ["shrunk", "grown", "rewritten"])
def test_changed_in_place(fault: str, tmp_path: Path) -> None:
    assert set(outcomes(fault, tmp_path)) == {"ChangedError"}


def test_cut_and_made_whole_while_it_is_read(tmp_path: Path) -> None:
    found = outcomes("raced", tmp_path)
    assert set(found) <= {"right", "ChangedError"}
    assert found[-1] == "right"
