"""One LazyStateDict, many threads and processes: no wrong byte, and closing it harms nobody."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

SCRIPT = Path(__file__).with_name("concurrency.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_no_wrong_byte(tmp_path: Path) -> None:
    reads = os.environ.get("ZIPSLICER_CONCURRENT_READS") or "40000"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), str(tmp_path), reads], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"
    found = json.loads(done.stdout)
    assert found == dict.fromkeys(("threads", "fork", "spawn", "pool", "after", "closing"), 0)
