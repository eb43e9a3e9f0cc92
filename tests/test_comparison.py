"""Comparison: what is equal, what is not and where, and what torch.load refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import zipslicer  # noqa: E402
from zipslicer.cli import main  # noqa: E402
from zipslicer.comparison import Compared, compare  # noqa: E402


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tree: dict[Any, Any] = {
        "model": {"w": torch.arange(12.0).view(3, 4).t(), "half": torch.ones(5).half(), "none": torch.empty(0)},
        "sparse": torch.eye(3).to_sparse(),
        "history": [0.5, {"eval": torch.ones(3, dtype=torch.complex64).conj()}, math.nan],
        "step": 7,
        "size": torch.Size([1, 2]),
        math.nan: 1,
    }
    tree["itself"] = tree["model"]
    torch.save(tree, tmp_path / "m.pth")
    return tmp_path / "m.pth"


def compared(path: Path) -> Compared:
    with zipslicer.open(path) as checkpoint:
        return compare(checkpoint)


def test_equal(path: Path) -> None:
    found = compared(path)
    assert (found.difference, found.refused) == (None, None)
    assert (found.tensors, found.values) == (5, 5)
    assert found.nbytes == 48 + 10 + 48 + 12 + 24


@pytest.mark.parametrize(
    ("bend", "words"),
    [
        (
            lambda root: root["model"]["w"].untyped_storage().__setitem__(5, 1),
            "root['model']['w']: the elements differ, first in byte 5",
        ),
        (lambda root: root["model"].pop("half"), "root['model']: keys differ"),
        (lambda root: root["model"].update(half=torch.ones(5)), "dtype differ"),
        (lambda root: root["model"].update(half=torch.ones(2, 5).half()), "shape differ"),
        (lambda root: root.update(step=8), "root['step']: value differ"),
        (lambda root: root.update(step=7.0), "root['step']: type differ"),
        (lambda root: root["history"].append(1), "root['history']: length differ"),
        (lambda root: root["history"].__setitem__(2, 1.0), "root['history'][2]: value differ"),
    ],
)
def test_differences(path: Path, monkeypatch: pytest.MonkeyPatch, bend: Callable[[Any], Any], words: str) -> None:
    root = torch.load(path, weights_only=True)
    bend(root)
    monkeypatch.setattr(torch, "load", lambda *_, **__: root)
    found = compared(path)
    assert found.difference is not None
    assert words in found.difference


def test_nested_tensors_and_bare_storages(tmp_path: Path) -> None:
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.zeros(1, 3)])
    tree = {"n": nested, "untyped": torch.arange(3).untyped_storage(), "typed": torch.ones(2)._typed_storage()}
    torch.save(tree, tmp_path / "m.pth")
    found = compared(tmp_path / "m.pth")
    assert (found.difference, found.refused, found.tensors, found.values) == (None, None, 1, 2)


def test_what_torch_refuses(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 3), tmp_path / "module.pth")
    found = compared(tmp_path / "module.pth")
    assert found.refused is not None
    assert found.refused.startswith("UnpicklingError")
    assert (found.tensors, found.difference) == (0, None)


def test_a_stream(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "m.pth", _use_new_zipfile_serialization=False)
    assert compared(tmp_path / "m.pth").tensors == 1


def test_the_command(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(path)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"GOOD  {path}\n")
    assert "torch.load: equal: 5 tensors" in said
    assert main(["check", "--no-torch", str(path)]) == 0
    assert "torch.load" not in capsys.readouterr().out
    assert main(["check", str(path), str(path.with_name("none.pth"))]) == 4


def test_the_command_tells_of_damage(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with zipslicer.open(path) as checkpoint:
        table = checkpoint._view.table
        start, _ = table.archive.extent(table.record(table.row(0).storage))
    broken = bytearray(path.read_bytes())
    broken[start] ^= 1
    path.write_bytes(broken)
    assert main(["check", str(path)]) == 1
    said = capsys.readouterr().out
    assert said.startswith(f"DAMAGED  {path}\n")
    assert "CRC-32" in said
    assert main(["check", "--json", str(path)]) == 1
    (found,) = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "damaged"
    assert len(found["damaged"]) == 1
    path.write_bytes(broken[:-1])
    assert main(["check", str(path)]) == 3
    assert capsys.readouterr().out.startswith(f"REFUSED  {path}\n")


def test_the_command_tells_of_a_difference(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "load", lambda *_, **__: {})
    assert main(["check", str(path)]) == 1
    assert capsys.readouterr().out.startswith(f"DIFFERENT  {path}\n")
