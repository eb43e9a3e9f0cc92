"""The command line, as a user starts it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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


def test_a_folder_of_several_checkpoints_is_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.pth", "b.pth"):
        (tmp_path / name).write_bytes(b"")
    for command in ("check", "scan"):
        assert main([command, str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("zipslicer: the folder ")
        assert "a.pth, b.pth" in said


def test_ctrl_c_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["zipslicer.scan"], "scan", interrupted)  # the function has the name of its module
    assert main(["scan", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "zipslicer: interrupted\n"
