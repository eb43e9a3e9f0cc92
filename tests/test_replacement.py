"""Replacement: the file at a path is the old one or the new one, whatever happens."""

from __future__ import annotations

import os
import random
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

import zipslicer
from zipslicer.replacement import Output, Replacement


def replaced(path: Path | str, content: bytes = b"new") -> None:
    output = Replacement(path)
    output.write([content[:1], b"", content[1:]])
    assert output.offset == len(content)
    output.commit()


def test_it_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    output = Replacement(path)
    output.write([b"12", bytearray(b"345"), memoryview(b"6")])
    assert not path.exists()
    (beside,) = tmp_path.iterdir()
    assert beside.name.startswith(".a.")
    output.commit()
    assert [each.name for each in tmp_path.iterdir()] == ["a"]
    assert path.read_bytes() == b"123456"
    output.discard()  # too late
    assert path.exists()


def test_more_buffers_than_one_call_takes(tmp_path: Path) -> None:
    output = Replacement(tmp_path / "a")
    output.write([bytes([i % 251]) * (i % 7) for i in range(3000)])
    output.commit()
    assert (tmp_path / "a").read_bytes() == b"".join(bytes([i % 251]) * (i % 7) for i in range(3000))


def test_given_up(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    output = Replacement(path)
    output.write([b"new"])
    output.discard()
    del output
    forgotten = Replacement(path)
    del forgotten
    assert [each.name for each in tmp_path.iterdir()] == ["a"]
    assert path.read_bytes() == b"old"


@pytest.mark.skipif(os.name != "posix", reason="permissions and links of POSIX")
def test_permissions_and_links_stay(tmp_path: Path) -> None:
    path, link = tmp_path / "a", tmp_path / "link"
    path.write_bytes(b"old")
    path.chmod(0o640)
    link.symlink_to("a")
    replaced(link)
    assert link.is_symlink()
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    mask = os.umask(0o027)
    try:
        replaced(tmp_path / "fresh")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "fresh").stat().st_mode) == 0o640
    hanging = tmp_path / "hanging"
    hanging.symlink_to("target")
    replaced(hanging)
    assert (tmp_path / "target").read_bytes() == b"new"


def test_places_where_no_file_can_be(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        Replacement(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Replacement(tmp_path / "none" / "a")
    with pytest.raises(TypeError):
        Replacement(b"a")  # type: ignore[arg-type]
    replaced(tmp_path / ("x" * 250))  # whose temporary name must be shorter


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a pipe of POSIX")
def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with subprocess.Popen(["cat", fifo], stdout=subprocess.PIPE) as reader:
        replaced(fifo, b"x" * 100_000)
        assert reader.communicate()[0] == b"x" * 100_000
    assert stat.S_ISFIFO(fifo.stat().st_mode)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
def test_a_forked_child_takes_nothing_away(tmp_path: Path) -> None:
    output = Replacement(tmp_path / "a")
    child = os.fork()
    if not child:
        output.discard()
        os._exit(0)
    os.waitpid(child, 0)
    output.write([b"new"])
    output.commit()
    assert (tmp_path / "a").read_bytes() == b"new"


class Slow:
    """A file object that takes three bytes at a time, and says so; or takes all, and does not."""

    def __init__(self, says: bool) -> None:
        self.content = b""
        self.says = says

    def write(self, view: memoryview) -> int | None:
        self.content += bytes(view[:3] if self.says else view)
        return min(3, len(view)) if self.says else None


@pytest.mark.parametrize("says", [True, False])
def test_file_objects(says: bool) -> None:
    file = Slow(says)
    output = Output(file)
    output.write([b"0123456789", b"", b"a"])
    output.commit()
    assert (file.content, output.offset) == (b"0123456789a", 11)


SAVES = """
import sys, zipslicer
path, turn = sys.argv[1], int(sys.argv[2])
zipslicer.save(zipslicer.load(path), path)
print("go", flush=True)
while True:
    turn += 1
    if turn % 2:  # a copy of the file onto itself, by the kernel; and one that is written
        source = zipslicer.load(path)
        source["turn"] = turn
        zipslicer.save(source, path)
    else:
        with zipslicer.Writer(path) as w:
            w["turn"] = turn
            w.write_chunks("w", (bytes([turn % 256]) * 4096 for _ in range(256)), dtype="uint8", shape=(1 << 20,))
"""


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="SIGKILL")
def test_killed_at_any_moment_the_file_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with zipslicer.Writer(path) as w:
        w["turn"] = 0
        w.write_chunks("w", [bytes(1 << 20)], dtype="uint8", shape=(1 << 20,))
    moments = random.Random(6)
    turn = killed = 0
    for _ in range(50):
        process = subprocess.Popen([sys.executable, "-c", SAVES, path, str(turn)], stdout=subprocess.PIPE, cwd="/")
        assert process.stdout is not None
        assert process.stdout.readline() == b"go\n"
        time.sleep(moments.random() * 0.04)
        process.kill()
        process.communicate()
        with zipslicer.open(path, verify=True) as checkpoint:
            assert checkpoint.root["turn"] >= turn
            turn = checkpoint.root["turn"]
            assert checkpoint.root.get_meta("w").nbytes == 1 << 20
        killed += len(list(tmp_path.iterdir())) > 1  # in the middle of one
        for each in tmp_path.iterdir():
            if each != path:
                each.unlink()
    assert turn
    assert killed > 10
