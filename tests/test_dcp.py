"""A folder of torch.distributed.checkpoint opens as any checkpoint does, with what torch would read from it."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import zipslicer
from zipslicer.errors import ArchiveError, ChangedError, TableError, UnsupportedError

torch = pytest.importorskip("torch")
pytest.importorskip("torch.distributed.checkpoint")
if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

import dcp_folders  # noqa: E402
from dcp_folders import same  # noqa: E402
from range_server import serving  # noqa: E402


class Settings:
    """Of a class that zipslicer does not know."""

    def __init__(self) -> None:
        self.rate = 0.5


def values() -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "model": {
            "up": torch.randn(40, 24),
            "down": torch.randn(24, 40, dtype=torch.bfloat16).t(),
            "empty": torch.zeros(0, 3),
            "steps": torch.tensor(7),
            "flag": torch.tensor([True, False]),
            "wave": torch.randn(3, 2, dtype=torch.complex64),
        },
        "optimizer": {
            "state": {0: {"exp_avg": torch.randn(5), "step": torch.tensor(3.0)}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0, 1]}],
        },
        "epoch": 3,
        "none": None,
        "name": "a\nb",
        "long": 1 << 80,
        "mixed": [torch.ones(2), 5, "x"],
        "pair": (torch.arange(4), "in a tuple"),
        "bytes": b"\0\1",
        "sizes": torch.Size([2, 3]),
        "random": [(1, 2), {"deep": {"deeper": [1, 2]}}],
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dcp_folders.written(tmp_path_factory.mktemp("dcp") / "step-100", values())


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "step-100"))


def wanted(folder: Path) -> Any:
    """With tuples that hold tensors as zipslicer has them: it gives back what was saved."""
    return dcp_folders.read_by_torch(folder)


# ---------------------------------------------------------------- what comes out


@pytest.mark.parametrize("check", [True, False])
def test_it_is_what_torch_reads(folder: Path, check: bool) -> None:
    sd = zipslicer.load(folder, check=check)
    assert same(sd.materialize(), wanted(folder))
    assert list(sd) == list(wanted(folder))
    assert sd["epoch"] == 3
    assert torch.equal(sd["model"]["down"], values()["model"]["down"])
    assert sd["optimizer"]["state"]["0"]["step"] == 3
    assert sd["pair"][1] == "in a tuple"
    assert sd["mixed"][1] == 5
    assert sd["random"][1]["deep"] == {"deeper": [1, 2]}


@pytest.mark.parametrize("how", [str, lambda folder: folder / ".metadata", lambda folder: f"{folder}/"])
def test_a_folder_or_its_metadata_is_opened(folder: Path, how: Any) -> None:
    with zipslicer.open(how(folder)) as checkpoint:
        assert checkpoint.path == str(folder)
        assert checkpoint.tensors["model.steps"] == 7


def test_a_relative_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert zipslicer.load(".")["epoch"] == 3
    assert zipslicer.load(".metadata")["epoch"] == 3


def test_a_listing_reads_no_tensor(folder: Path) -> None:
    with zipslicer.open(folder, check=False) as checkpoint:
        for file in folder.glob("*.distcp"):
            file.write_bytes(b"")  # of which only what is no tensor was read
        info = checkpoint.tensors.get_meta("model.up")
        assert info is not None
        assert (info.dtype_name, info.shape, info.nbytes, info.is_contiguous) == ("float32", (40, 24), 3840, True)
        assert "model.down" in checkpoint.tensors
        assert "optimizer.state.0.exp_avg" in checkpoint.tensors


def test_numpy(folder: Path) -> None:
    pytest.importorskip("numpy")
    sd = zipslicer.load(folder, framework="np")
    assert (sd["model"]["up"] == values()["model"]["up"].numpy()).all()
    assert sd.materialize()["epoch"] == 3


def test_slices_streams_and_copies(folder: Path) -> None:
    whole = zipslicer.open(folder).tensors
    assert torch.equal(whole.get_slice("model.down")[3:30:7, ::-2], values()["model"]["down"][3:30:7].flip(1)[:, ::2])
    assert {name: tensor.sum() for name, tensor in whole.stream("model.*")}.keys() == {
        f"model.{name}" for name in values()["model"]
    }
    again = pickle.loads(pickle.dumps(whole))
    assert torch.equal(again["model.up"], whole["model.up"])
    assert torch.equal(copy.deepcopy(whole)["model.up"], whole["model.up"])
    model = torch.nn.Linear(24, 40)
    zipslicer.open(folder).tensors.select("model.up").rename(lambda _: "weight").load_into(model, strict=False)
    assert torch.equal(model.weight, values()["model"]["up"])


def test_chunks_of_ranks(tmp_path: Path) -> None:
    torch.manual_seed(2)
    wide, cube = torch.randn(7, 9), torch.randn(4, 6, 5).permute(2, 0, 1)
    tensors: dict[str, tuple[Any, list[dcp_folders.Box]]] = {
        "rows": (wide, [((0, 0), (3, 9)), ((3, 0), (3, 9)), ((6, 0), (1, 9))]),
        "columns": (wide, [((0, 0), (7, 4)), ((0, 4), (7, 5))]),
        "both": (wide, [((0, 0), (4, 5)), ((0, 5), (4, 4)), ((4, 0), (3, 5)), ((4, 5), (3, 4))]),
        "cube": (cube, [((0, 0, 0), (5, 2, 6)), ((0, 2, 0), (5, 2, 6))]),
        "whole": (wide.half(), [((0, 0), (7, 9))]),
        "empty": (torch.zeros(0), []),
        "none": (wide[:2], [((0, 0), (2, 9)), ((2, 0), (0, 9))]),
    }
    sd = zipslicer.load(dcp_folders.chunked(tmp_path / "ranks", tensors, ranks=3))
    for name, (tensor, _) in tensors.items():
        assert torch.equal(sd[name], tensor)
        assert sd[name].is_contiguous()
    assert torch.equal(sd.get_slice("both")[2:6, 3:8], wide[2:6, 3:8])
    assert torch.equal(sd.get_slice("cube")[..., 1], cube[..., 1])
    assert same(sd.materialize(), {name: tensor for name, (tensor, _) in tensors.items()})


def test_strangers_are_placeholders(tmp_path: Path) -> None:
    folder = dcp_folders.written(tmp_path / "x", {"w": torch.ones(2), "settings": Settings()})
    with zipslicer.open(folder) as checkpoint:
        assert checkpoint.root["settings"].rate == 0.5
        assert list(checkpoint.placeholders) == ["settings"]
        assert torch.equal(checkpoint.root["w"], torch.ones(2))
    name = f"{Settings.__module__}.Settings"
    assert type(zipslicer.load(folder, allow={name: Settings})["settings"]) is Settings
    with pytest.raises(zipslicer.UnsafeError, match="Settings"):
        zipslicer.open(folder, unknown="error")


def test_keys_of_values_do_not_collide_with_tensors(tmp_path: Path) -> None:
    given = {"a": (torch.ones(3), 1), "a/0": torch.zeros(3), "a/0'": torch.full((3,), 2.0)}
    sd = zipslicer.load(dcp_folders.written(tmp_path / "x", given))
    assert torch.equal(sd["a"][0], torch.ones(3))
    assert torch.equal(sd["a/0"], torch.zeros(3))
    assert torch.equal(sd["a/0'"], given["a/0'"])


def test_what_is_not_flattened(tmp_path: Path) -> None:
    """A planner of its own may note no paths."""
    folder = dcp_folders.written(tmp_path / "x", {"a": {"b": torch.ones(2)}})
    dcp_folders.rewritten(folder, lambda said: setattr(said, "planner_data", None))
    assert list(zipslicer.load(folder)) == ["a.b"]


def test_verify(folder: Path) -> None:
    with zipslicer.open(folder) as checkpoint:
        found = checkpoint.verify()
        assert found.nbytes > 3840
    (path,) = folder.glob("*.distcp")
    content = bytearray(path.read_bytes())
    at = content.index(values()["model"]["up"].numpy().tobytes()[:64])
    content[at] ^= 1
    path.write_bytes(content)
    with zipslicer.open(folder) as checkpoint, pytest.raises(ArchiveError, match="CRC-32"):
        checkpoint.verify()


def test_scan(folder: Path, tmp_path: Path) -> None:
    assert zipslicer.scan(folder).verdict == "safe"
    strange = dcp_folders.written(tmp_path / "x", {"settings": Settings()})
    found = zipslicer.scan(strange)
    assert found.verdict == "unknown"
    assert [each.name for each in found.findings if each.kind == "unknown"] == [f"{Settings.__module__}.Settings"]
    evil = (strange / ".metadata").read_bytes()[:-1] + b"0cos\nsystem\n(X\x04\x00\x00\x00truetR."
    (strange / ".metadata").write_bytes(evil)
    assert zipslicer.scan(strange).verdict in ("dangerous", "refused")
    assert any(each.name == "os.system" for each in zipslicer.scan(strange).findings)


# ---------------------------------------------------------------- what goes wrong


def test_files_are_missing_or_short(folder: Path) -> None:
    (file,) = folder.glob("*.distcp")
    content = file.read_bytes()
    lazily = zipslicer.load(folder, check=False)
    file.write_bytes(content[:-100])
    with pytest.raises(ArchiveError, match="names bytes up to"):
        zipslicer.open(folder)
    file.unlink()
    with pytest.raises(ArchiveError, match="missing"):
        zipslicer.open(folder)
    lazily.close()


def test_a_file_that_is_replaced(folder: Path) -> None:
    (file,) = folder.glob("*.distcp")
    sd = zipslicer.load(folder)
    assert torch.equal(sd["model"]["up"], values()["model"]["up"])
    with file.open("r+b") as changed:
        changed.truncate(100)
    with pytest.raises(ChangedError):
        sd["model"]["up"]
    pickled = pickle.dumps(sd)
    dcp_folders.rewritten(folder, lambda said: said.planner_data.popitem())
    with pytest.raises((ChangedError, ArchiveError)):
        pickle.loads(pickled)


def test_after_close(folder: Path) -> None:
    sd = zipslicer.load(folder)
    sd.close()
    with pytest.raises(ValueError, match="closed"):
        sd["model"]["up"]


def test_chunks_that_are_something_else(tmp_path: Path) -> None:
    def swap(said: Any) -> None:
        one, other = said.storage_data
        said.storage_data[one], said.storage_data[other] = said.storage_data[other], said.storage_data[one]

    def open_with(content: dict[str, Any]) -> Any:
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        return zipslicer.load(dcp_folders.rewritten(dcp_folders.written(path, content), swap))

    sd = open_with({"a": torch.zeros(4), "b": torch.zeros(2, 2)})
    with pytest.raises(TableError, match=r"\(2, 2\), and the metadata says float32 and \(4,\)") as caught:
        sd["a"]
    assert caught.value.key == "a"
    with pytest.raises(TableError, match="int32"):
        open_with({"a": torch.zeros(4), "b": torch.zeros(4, dtype=torch.int32)})["a"]
    with pytest.raises((UnsupportedError, ArchiveError)):
        open_with({"a": torch.zeros(400), "b": "no tensor"})["a"]


def test_options_of_one_file(folder: Path) -> None:
    for options in ({"mmap": True}, {"window": (0, 10)}, {"record": "x.pkl"}):
        with pytest.raises(ValueError, match="folder of several"):
            zipslicer.open(folder, **options)


def test_other_folders(tmp_path: Path, folder: Path) -> None:
    (folder / "model.pth").write_bytes(b"")
    with pytest.raises(ValueError, match="2 candidates"):
        zipslicer.open(folder)
    (folder / ".metadata").rename(folder / "__0.metadata")
    with pytest.raises(UnsupportedError, match="use_collectives=False"):
        zipslicer.open(folder)
    with pytest.raises(FileNotFoundError):
        zipslicer.open(tmp_path / ".metadata")


def test_more_files_than_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zipslicer.dcp_source.MOST_FILES", 3)
    tensors = {str(i): (torch.full((4, 2), float(i)), [((0, 0), (2, 2)), ((2, 0), (2, 2))]) for i in range(8)}
    folder = dcp_folders.chunked(tmp_path / "many", tensors, ranks=16)
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    sd = zipslicer.load(folder)
    for _ in range(2):
        assert all(torch.equal(sd[name], tensor) for name, (tensor, _) in tensors.items())
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/fd")) - before <= 4
    shutil.copy(folder / "__1_0.distcp", folder / "copy")
    os.replace(folder / "copy", folder / "__1_0.distcp")
    with pytest.raises(ChangedError):
        [sd[name] for name in tensors]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_reads(folder: Path) -> None:
    sd = zipslicer.load(folder)
    first = sd["model"]["up"]
    child = os.fork()
    if not child:
        os._exit(0 if torch.equal(sd["model"]["up"], first) else 1)
    assert os.waitpid(child, 0)[1] == 0


# ---------------------------------------------------------------- by URL


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    pytest.importorskip("fsspec")
    pytest.importorskip("aiohttp")
    torch.manual_seed(4)
    big, wide = torch.randn(1500, 1024), torch.randn(512, 1600)
    tensors = {
        "big": (big, [((0, 0), (700, 1024)), ((700, 0), (800, 1024))]),
        "wide": (wide, [((0, 0), (512, 1000)), ((0, 1000), (512, 600))]),
    }
    folder = dcp_folders.chunked(tmp_path / "served", tensors)
    with serving() as server:
        server.objects.update({f"/run/{path.name}": path.read_bytes() for path in folder.iterdir()})
        yield server, {"big": big, "wide": wide}


@pytest.mark.parametrize("end", ["/", "/.metadata"])
def test_by_url(served: tuple[Any, dict[str, Any]], end: str) -> None:
    server, tensors = served
    sd = zipslicer.load(f"{server.url}/run{end}")
    assert list(sd) == ["big", "wide"]
    server.log.clear()
    assert torch.equal(sd["big"], tensors["big"])
    # A chunk's own directory and pickle come first: 68 KiB of each.
    assert server.nbytes <= 1.05 * tensors["big"].nbytes + (2 * 68 << 10)
    server.log.clear()
    assert torch.equal(sd["big"], tensors["big"])
    assert server.nbytes <= 1.05 * tensors["big"].nbytes
    server.log.clear()
    assert torch.equal(sd.get_slice("wide")[100:140], tensors["wide"][100:140])
    assert server.nbytes <= 1.05 * tensors["wide"][100:140].nbytes + (2 * 68 << 10)
    assert same(sd.materialize(), tensors)
    again = pickle.loads(pickle.dumps(sd))
    assert torch.equal(again["wide"], tensors["wide"])


def test_an_object_is_missing(served: tuple[Any, dict[str, Any]]) -> None:
    server, _ = served
    del server.objects["/run/__1_0.distcp"]
    with pytest.raises(ArchiveError, match="missing"):
        zipslicer.load(f"{server.url}/run/")
