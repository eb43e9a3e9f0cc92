"""timed: every way of reading a file, in processes of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import zipslicer.timing  # noqa: E402
from zipslicer.cli import main  # noqa: E402
from zipslicer.timing import CASES, timed  # noqa: E402


@pytest.fixture
def path(tmp_path: Path) -> str:
    torch.save({"a": {"w": torch.ones(1000, 100)}, "b": [torch.zeros(5)]}, tmp_path / "a.pt")
    return str(tmp_path / "a.pt")


def test_all_ways(path: str) -> None:
    heard: list[str] = []
    found = list(timed(path, 1, heard.append))
    assert [(each.case, each.contestant) for each in found] == [
        (c, name) for c, names in CASES.items() for name in names
    ]
    assert all(each.error is None and len(each.seconds) == 1 and 0 < each.median < 60 for each in found)
    assert heard == [f"{each.case}: {each.contestant}" for each in found]
    assert {each.contestant: each.growth > 300_000 for each in found if each.case == "read"}["torch.load"]


def test_what_cannot_be_done_is_told(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipslicer.timing, "_free_memory", lambda: 1000.0)
    errors = {(each.case, each.contestant): each.error for each in timed(path, 1)}
    assert "larger than the memory" in str(errors["read", "zipslicer"])
    assert "larger than the memory" in str(errors["list", "torch.load"])
    assert errors["stream", "zipslicer"] is None
    for case in ("list", "read"):
        monkeypatch.delitem(CASES, case)
    broken = tmp_path / "b.pt"
    broken.write_bytes(b"PK\3\4 no archive")
    assert all("Error" in str(each.error) for each in timed(str(broken), 1))
    with pytest.raises(FileNotFoundError):
        list(timed(str(tmp_path / "none"), 1))


def test_the_command(path: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(CASES, "read")
    monkeypatch.delitem(CASES, "stream")
    assert main(["bench", path, "--samples", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[1].startswith("open and list  zipslicer ")
    assert "1.00x" in lines[1]
    assert max(map(len, lines)) <= 80
    monkeypatch.setitem(CASES, "list", {"torch.load": ("import none_of_that", "")})
    assert main(["bench", path, "--samples", "1", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert "none_of_that" in found["timed"][0]["error"]
    assert main(["bench", path + "x"]) == 4
    with pytest.raises(SystemExit):
        main(["bench", path, "--samples", "0"])
