"""Reader: how things are to be read, by how many threads, and in which portions; and what it asks of who makes values of it."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest

from zipslicer import reader
from zipslicer.backend import JOB_FIELDS
from zipslicer.reader import ReadOptions, cpu_quota, default_threads

# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"threads": 0}, ValueError, "at least 1, not 0"),
        ({"framework": "tf"}, ValueError, "framework"),
        ({"mmap": True, "direct": True}, ValueError, "only one"),
        ({"dtype": "float17"}, ValueError, "float17"),
        ({"dtype": "int8"}, ValueError, "int8"),
        ({"dtype": float}, TypeError, "dtype"),
        ({"map_location": True}, TypeError, "map_location"),
        ({"map_location": 1.5}, TypeError, "map_location"),
        ({"framework": "np", "map_location": "cuda"}, ValueError, "map_location"),
    ],
    ids=repr,
)
def test_what_can_be_told_is_told_at_once(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        ReadOptions(**options)


def test_options_may_hold_secrets_which_are_not_shown() -> None:
    options = ReadOptions(storage_options={"key": "hunter2"})
    assert "hunter2" not in repr(options)


@pytest.mark.parametrize("bad", ["4", 1.5])
def test_threads_are_a_whole_number(bad: Any) -> None:
    with pytest.raises(TypeError, match="integer"):
        ReadOptions(threads=bad)


# ---------------------------------------------------------------- how many threads


def test_default_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZIPSLICER_THREADS", raising=False)
    assert 1 <= default_threads() <= 8
    monkeypatch.setenv("ZIPSLICER_THREADS", "3")
    assert default_threads() == 3
    for bad in ("0", "-1", "many"):
        monkeypatch.setenv("ZIPSLICER_THREADS", bad)
        with pytest.raises(ValueError, match="ZIPSLICER_THREADS"):
            default_threads()


@pytest.mark.parametrize(
    ("cgroup", "files", "quota"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "150000 100000\n", "a/cpu.max": "max 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000\n"}, 3),
        ("0::/../../elsewhere\n", {"cpu.max": "50000 100000\n"}, 0.5),
        (
            "4:memory:/m\n3:cpu,cpuacct:/a\n",
            {"cpu/a/cpu.cfs_quota_us": "200000\n", "cpu/a/cpu.cfs_period_us": "100000\n"},
            2,
        ),
        ("3:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, math.inf),
        ("0::/\n", {}, math.inf),
        ("nonsense\n::\n", {"cpu.max": "what\n"}, math.inf),
        (None, {}, math.inf),
    ],
)
def test_the_quota_of_control_groups(tmp_path: Path, cgroup: Any, files: dict[str, str], quota: float) -> None:
    if cgroup is not None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(cgroup)
    for name, content in files.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    assert cpu_quota(str(tmp_path)) == quota


@pytest.mark.parametrize(("quota", "threads"), [(0.2, 1), (1.5, 2), (1, 1), (math.inf, 5), (100, 5)])
def test_threads_go_by_affinity_and_quota(monkeypatch: pytest.MonkeyPatch, quota: float, threads: int) -> None:
    monkeypatch.delenv("ZIPSLICER_THREADS", raising=False)
    monkeypatch.setattr("zipslicer.reader.cpu_quota", lambda: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(5)), raising=False)
    assert default_threads() == threads


# ---------------------------------------------------------------- portions


def test_portions_cut_large_jobs_and_lose_no_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "PORTION_NBYTES", 100)
    jobs = [(0, 0, 30, 0, 0), (1, 5, 250, 1, 0), (2, 0, 20, 2, 7), (3, 0, 0, 3, 0)]
    portions = list(reader._portions([field for job in jobs for field in job]))
    sizes, covered = [], set()
    for portion in portions:
        rows = [portion[at : at + JOB_FIELDS] for at in range(0, len(portion), JOB_FIELDS)]
        sizes.append(sum(nbytes for _, _, nbytes, _, _ in rows))
        for record, start, nbytes, buffer, place in rows:
            covered |= {(record, start + i, buffer, place + i) for i in range(nbytes)}
    assert sizes == [100, 100, 100, 0]
    assert covered == {(record, start + i, to, at + i) for record, start, nbytes, to, at in jobs for i in range(nbytes)}
