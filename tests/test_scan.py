"""Scan: what a file names, wherever it hides it, and never a verdict for a file that is not opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import makers
import pytest
from makers import Pickle, Zip

import zipslicer
from zipslicer.cli import main
from zipslicer.errors import ArchiveError, ProgramError, TableError, UnsupportedError, ZipSlicerError

FLOATS = bytes(16)


def tensor(pickle: Pickle) -> Pickle:
    return pickle.tensor("FloatStorage", "0", 4, size=[4], stride=[1])


def checkpoint(pickle: bytes) -> bytes:
    return makers.checkpoint(pickle, {"0": FLOATS}).data


GOOD = Pickle().dict({"w": tensor}).stop()


def scanned(folder: Path, data: bytes, name: str = "m.pth") -> zipslicer.Scan:
    path = folder / name
    path.write_bytes(data)
    return zipslicer.scan(path)


def names(found: zipslicer.Scan, kind: str) -> list[str]:
    return [finding.name for finding in found.findings if finding.kind == kind]


def test_what_torch_writes_is_safe(tmp_path: Path) -> None:
    found = scanned(tmp_path, checkpoint(GOOD))
    assert (found.verdict, found.error, found.programs) == ("safe", None, ())
    assert names(found, "known") == ["collections.OrderedDict", "torch.FloatStorage", "torch._utils._rebuild_tensor_v2"]
    assert found.findings[0].where == ("archive/data.pkl",)


@pytest.mark.parametrize(
    ("module", "name", "verdict"),
    [
        ("os", "system", "dangerous"),
        ("os", "path.join", "dangerous"),
        ("builtins", "eval", "dangerous"),
        ("builtins", "getattr", "dangerous"),
        ("__builtin__", "execfile", "dangerous"),
        ("asyncio.unix_events", "_UnixSubprocessTransport._start", "dangerous"),
        ("torch.storage", "_load_from_bytes", "dangerous"),
        ("numpy", "load", "dangerous"),
        ("argparse", "Namespace", "unknown"),
        ("builtins", "object", "unknown"),
        ("pathlib", "PosixPath", "unknown"),
        ("osmium", "system", "unknown"),
        ("collections", "Counter", "safe"),
    ],
)
def test_kinds(tmp_path: Path, module: str, name: str, verdict: str) -> None:
    found = scanned(tmp_path, checkpoint(Pickle().dict({"w": tensor, "x": lambda p: p.name(module, name)}).stop()))
    assert found.verdict == verdict
    assert f"{module}.{name}" in names(found, {"safe": "known"}.get(verdict, verdict))


@pytest.mark.parametrize(
    "body",
    [
        b"cos\nsystem\n(U\2idtR0",  # called, and dropped
        b"cos\nsystem\n0",
        b"(cos\nsystem\n1",
        b"cos\nsystem\nq\x010",  # only in the memo
        b"\x8c\2os\x8c\6system\x930",
        b"}(U\1acos\nsystem\nU\1aNu0",  # a value that another one replaced
    ],
)
def test_what_is_dropped_is_named(tmp_path: Path, body: bytes) -> None:
    """It would have run all the same."""
    found = scanned(tmp_path, checkpoint(b"\x80\4" + body + GOOD[2:]))
    assert (found.verdict, names(found, "dangerous")) == ("dangerous", ["os.system"])


def test_every_pickle_of_an_archive(tmp_path: Path) -> None:
    archive = Zip().add_all([("archive/data.pkl", GOOD), ("archive/data/0", FLOATS)])
    archive.add("archive/extra.pkl", Pickle().name("os", "system").stop())
    archive.add("archive/sub/more.pickle", Pickle().name("pty", "spawn").stop())
    archive.add("archive/code/__torch__.py", b"def forward(self): pass\n")
    found = scanned(tmp_path, archive.finish().data)
    assert names(found, "dangerous") == ["os.system", "pty.spawn"]
    assert [finding.where for finding in found.findings[:2]] == [("archive/extra.pkl",), ("archive/sub/more.pickle",)]
    assert found.programs == ("archive/code/__torch__.py",)


def test_a_checkpoint_within_an_archive(tmp_path: Path) -> None:
    inner = checkpoint(Pickle().name("os", "system").stop())
    archive = Zip().add_all([("archive/data.pkl", GOOD), ("archive/data/0", FLOATS), ("archive/inner.pt", inner)])
    found = scanned(tmp_path, archive.finish().data)
    assert names(found, "dangerous") == ["os.system"]
    assert found.findings[0].where == ("archive/inner.pt/archive/data.pkl",)


def test_all_pickles_of_a_stream(tmp_path: Path) -> None:
    """What the writer's system was is a pickle, too."""
    program = Pickle().dict({"w": lambda p: p.tensor("FloatStorage", "0", 4, size=[4], stride=[1], view="")}).stop()
    data = makers.stream(program, {"0": (4, FLOATS)})
    assert scanned(tmp_path, data).verdict == "safe"
    evil = Pickle().call("os", "system", lambda p: p.text("id")).stop()
    found = scanned(tmp_path, data.replace(Pickle().raw(b"}").stop(), evil, 1))
    assert (found.verdict, names(found, "dangerous")) == ("dangerous", ["os.system"])


@pytest.mark.parametrize("name", ["x.pkl", "x.joblib", "x.bin"])
def test_plain_pickles(tmp_path: Path, name: str) -> None:
    good, evil = Pickle().raw(b"]").stop(), Pickle().name("os", "system").stop()
    assert scanned(tmp_path, good, name).verdict == "safe"
    found = scanned(tmp_path, good + evil, name)
    assert (found.verdict, names(found, "dangerous")) == ("dangerous", ["os.system"])
    assert scanned(tmp_path, b"cos\nsystem\n.", name).verdict == "dangerous"
    assert scanned(tmp_path, evil + b"\xff\xff", name).verdict == "dangerous"


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", ArchiveError),
        (b"no pickle at all", ArchiveError),
        (checkpoint(GOOD)[:-1], ArchiveError),
        (checkpoint(GOOD) * 2, ArchiveError),
        (checkpoint(GOOD[:-1]), ProgramError),
        (checkpoint(Pickle().tensor("FloatStorage", "0", 4, size=[9], stride=[1]).stop()), TableError),
    ],
)
def test_what_is_not_opened_gets_no_verdict(tmp_path: Path, data: bytes, error: type[ZipSlicerError]) -> None:
    found = scanned(tmp_path, data)
    assert found.verdict == "refused"
    assert type(found.error) is error
    assert found.error.path == str(tmp_path / "m.pth")


def test_shards(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(
        checkpoint(Pickle().dict({"w": tensor, "x": lambda p: p.name("os", "system")}).stop())
    )
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "a.bin", "x": "a.bin"}}))
    for path in (index, tmp_path):
        found = zipslicer.scan(path)
        assert (found.verdict, found.findings[0].where) == ("dangerous", ("a.bin/archive/data.pkl",))


def test_what_the_system_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        zipslicer.scan(tmp_path / "none.pth")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, evil, cut = tmp_path / "good.pth", tmp_path / "evil.pth", tmp_path / "cut.pth"
    good.write_bytes(checkpoint(GOOD))
    evil.write_bytes(checkpoint(Pickle().name("os", "sys\x1b[2Jtem").stop()))
    cut.write_bytes(b"PK\3\4")
    assert main(["scan", str(good)]) == 0
    assert capsys.readouterr().out.startswith(f"SAFE  {good}\n  known: collections.OrderedDict\n")
    assert main(["scan", str(good), str(evil)]) == 1
    assert "  dangerous: os.sys\\x1b[2Jtem\n" in capsys.readouterr().out
    assert main(["scan", str(evil), str(cut)]) == 3
    assert "REFUSED" in capsys.readouterr().out
    assert main(["scan", str(tmp_path / "none.pth"), str(good)]) == 4
    assert "No such file" in capsys.readouterr().err


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = tmp_path / "evil.pth"
    evil.write_bytes(checkpoint(Pickle().name("os", "system").stop()))
    assert main(["scan", "--json", str(evil), str(tmp_path / "none.pth")]) == 4
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert [one["verdict"] for one in found] == ["dangerous", "unreadable"]
    assert found[0]["globals"] == [{"name": "os.system", "kind": "dangerous", "where": ["archive/data.pkl"]}]


def test_a_chain_of_too_many_pickles(tmp_path: Path) -> None:
    found = scanned(tmp_path, b"\x80\2N." * 20_000, "x.pkl")
    assert (found.verdict, type(found.error)) == ("refused", UnsupportedError)
