"""A disk may fail at any call: what comes then is right, or an exception, and no call is repeated for ever."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from makers import unmeasured

pytest.importorskip("torch")

SCRIPT = Path(__file__).with_name("faulty_reads.py")
COMPILER = shutil.which(os.environ.get("CC") or "cc")
pytestmark = [
    pytest.mark.skipif(
        COMPILER is None or not sys.platform.startswith("linux"), reason="no C compiler for the shim, or no LD_PRELOAD"
    ),
    pytest.mark.skipif(
        "ZIPSLICER_SANITIZED" in os.environ, reason="a sanitizer is preloaded, and has memory of its own"
    ),
]
# What may come of a fault. EINTR and a short read are no errors: the call is made again.
ALLOWED = {
    "short": {"right"},
    "EINTR": {"right"},
    "EIO": {"OSError", "right"},  # right: of a call that only asks whether the disk will be waited for
    "EAGAIN": {"BlockingIOError", "right"},
    "ended": {"ChangedError", "right"},
}


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert COMPILER is not None
    library = tmp_path_factory.mktemp("shim") / "faulty_reads.so"
    source = Path(__file__).with_name("faulty_reads.c")
    subprocess.run([COMPILER, "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


def found(shim: Path, folder: Path, *options: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        env={**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"
    faults: dict[str, Any] = json.loads(done.stdout)
    assert set(faults) == set(ALLOWED)
    return faults


def test_every_call(shim: Path, tmp_path: Path) -> None:
    for fault, result in found(shim, tmp_path).items():
        assert set(result["outcomes"]) <= ALLOWED[fault], fault
        assert result["faults"] >= 40, fault


def test_random_calls(shim: Path, tmp_path: Path) -> None:
    calls = os.environ.get("ZIPSLICER_FAULTY_CALLS") or "20000"
    for fault, result in found(shim, tmp_path, "--random", calls).items():
        assert set(result["outcomes"]) <= ALLOWED[fault], fault
        assert result["faults"] >= int(calls) // len(ALLOWED) // 64, fault


def test_where_memory_ends(tmp_path: Path) -> None:
    """A MemoryError leaves nothing half-built: the same call is right when there is memory again."""
    script = Path(__file__).with_name("starved.py")
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=unmeasured())
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"
    outcomes = json.loads(done.stdout)
    assert set(outcomes) == {"right", "MemoryError"}
