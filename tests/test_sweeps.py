"""No byte of a checkpoint can be bent so that other numbers come out in silence, where the file has checksums."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import makers
import pytest

torch = pytest.importorskip("torch")

SCRIPT = Path(__file__).with_name("sweeps.py")
ERRORS = {"ArchiveError", "ProgramError", "TableError", "UnsupportedError"}


def tree() -> dict[str, Any]:
    """Small ones of several dtypes, one of them strided, one shared; and what is no tensor."""
    base = torch.arange(40, dtype=torch.float32)
    return {
        "w": base.view(5, 8),
        "t": base[::3],
        "h": torch.arange(6).half(),
        "n": torch.tensor(True),
        "step": 7,
        "p": torch.nn.Parameter(torch.ones(3)),
    }


def saved(path: Path, **options: Any) -> bytes:
    torch.save(tree(), path, **options)
    return path.read_bytes()


def trained(path: Path) -> bytes:
    """A model and its optimizer after a step: as much of a training checkpoint as 8 KB hold."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 1}, path)
    return path.read_bytes()


FILES: dict[str, Callable[[Path], bytes]] = {
    "torch": saved,
    "a training checkpoint": trained,
    "deflated": lambda path: makers.rezipped(makers.records_of(saved(path)), method=makers.DEFLATED).data,
    "zip64": lambda path: makers.rezipped(makers.records_of(saved(path)), zip64=True).data,
    "streamed": lambda path: makers.rezipped(makers.records_of(saved(path)), descriptor=16).data,
    "by Python": lambda path: makers.rezipped_by_python(makers.records_of(saved(path))),
}


def swept(path: Path, *options: str) -> dict[str, dict[str, int]]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(path), *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"
    found: dict[str, dict[str, int]] = json.loads(done.stdout)
    assert found
    return found


@pytest.mark.parametrize("name", FILES)
def test_every_byte_of_an_archive(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    path.write_bytes(FILES[name](path))
    assert path.stat().st_size < 8192
    found = swept(path)
    assert set(found["structure"]) <= ERRORS | {"right"}
    assert {"ArchiveError", "right"} <= set(found["structure"])
    assert set(found["payloads"]) <= {"ArchiveError"}
    assert set(found["cuts"]) <= {"ArchiveError"}


@pytest.mark.parametrize("name", ["stream"])
def test_every_byte_of_what_has_no_checksums(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    saved(path, _use_new_zipfile_serialization=False)
    found = swept(path)
    assert set(found["structure"]) <= ERRORS | {"right", "wrong"}
    assert set(found["payloads"]) == {"right"}
    assert set(found["cuts"]) <= ERRORS


def test_a_larger_archive(tmp_path: Path) -> None:
    """Every byte of the structure, and of the payloads as many as there is time for."""
    torch.manual_seed(3)
    path = tmp_path / "m.pth"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 9)).state_dict(), path)
    found = swept(path, "--payload-bytes", "500", "--cuts", "500")
    assert set(found["structure"]) <= ERRORS | {"right"}
    assert set(found["payloads"]) == {"ArchiveError"}
    assert set(found["cuts"]) <= {"ArchiveError"}
