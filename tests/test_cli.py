"""The command line, as a user starts it."""

from __future__ import annotations

import subprocess
import sys

import pytest

import zipslicer
from zipslicer.cli import main


def test_version_names_the_backend(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"{zipslicer.__version__} ({zipslicer.backend()})\n"


def test_help_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "usage: zipslicer" in capsys.readouterr().out


def test_an_unknown_option_is_an_error_of_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--none"])
    assert caught.value.code == 2
    assert "--none" in capsys.readouterr().err


def test_it_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "zipslicer", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{zipslicer.__version__} ({zipslicer.backend()})\n")
