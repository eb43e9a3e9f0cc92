"""The examples that need nothing but torch run; .ci/run runs the others."""

from __future__ import annotations

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
