"""The examples that need nothing but torch run; .ci/run runs the others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

EXAMPLE = Path(__file__).parent.parent / "examples" / "larger_than_memory.py"


def test_larger_than_memory(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE), "--megabytes", "8", "--folder", str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd="/")
    assert [line.split()[0] for line in done.stdout.splitlines()[:5]] == [
        "wrote",
        "edited",
        "converted",
        "read",
        "streamed",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["edited.ckpt", "model.ckpt", "model.safetensors"]


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_workers() -> None:
    example = EXAMPLE.with_name("workers.py")
    command = [sys.executable, str(example), "--rows", "3000"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd="/")
    said = done.stdout.splitlines()
    assert int(said[0].rpartition(" ")[2].replace(",", "")) < 2000
    assert said[1:3] == ["DataLoader, 2 workers by fork: right", "DataLoader, 2 workers by spawn: right"]
    may_lack = [] if os.environ.get("ZIPSLICER_REQUIRE_INTEGRATIONS") == "1" else ["Ray is not installed"]
    assert said[3] in ("Ray: right", *may_lack)
