"""What is converted to a folder, torch.distributed.checkpoint reads; and whatever happens meanwhile, the folder is whole."""

from __future__ import annotations

import collections
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import zipslicer
from zipslicer import convert
from zipslicer.dcp_writer import items_of, write_folder
from zipslicer.errors import ArchiveError, UnsupportedError

torch = pytest.importorskip("torch")
if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

import conformance  # noqa: E402
import dcp_folders  # noqa: E402
from conformance import CASES, REFUSALS, Case, Loads  # noqa: E402
from dcp_folders import read_by_torch, same  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def values() -> dict[str, Any]:
    torch.manual_seed(5)
    embed = torch.randn(30, 8)
    return {
        "model": {"embed": embed, "head": embed, "part": embed[3:9, ::2], "t": torch.randn(6, 4).half().t()},
        "optimizer": {"state": {"0": {"exp_avg": torch.randn(30, 8)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "epoch": 4,
        "mixed": [torch.arange(3), "x", {"deep": torch.ones(1)}],
        "sizes": [1, 2, 3],
        "flag": torch.tensor(True),
        "empty": torch.zeros(0, 4),
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.save(values(), tmp_path / "a.pth")
    return tmp_path / "a.pth"


def test_torch_reads_it(source: Path, tmp_path: Path) -> None:
    found = convert(source, f"{tmp_path}/out/", verify=True)
    assert found.files == [f"{tmp_path}/out/__0_0.distcp", f"{tmp_path}/out/.metadata"]
    assert found.tensors == 9
    assert found.untied == ["model.head", "model.part"]
    assert same(read_by_torch(tmp_path / "out"), values())
    assert same(zipslicer.load(tmp_path / "out").materialize(), values())
    assert zipslicer.scan(tmp_path / "out").verdict == "safe"


def test_dcp_load_fills_a_state_dict(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", format="dcp")
    state = values()
    for tensor in (state["model"]["t"], state["optimizer"]["state"]["0"]["exp_avg"], state["mixed"][0]):
        tensor.zero_()
    state["epoch"] = 0
    dcp_folders.load_alone(state, checkpoint_id=tmp_path / "out")
    assert same(state, values())


def test_what_torch_writes_itself_is_written_alike(tmp_path: Path) -> None:
    folder = dcp_folders.written(tmp_path / "torch", values())
    convert(folder, tmp_path / "ours", format="dcp")
    one, other = (dcp_folders.metadata(each) for each in (folder, tmp_path / "ours"))
    assert one.state_dict_metadata == other.state_dict_metadata
    assert one.planner_data == other.planner_data
    assert set(one.storage_data) == set(other.storage_data)
    assert getattr(one, "version", other.version) == other.version  # of which older torches know nothing


def test_back_again(source: Path, tmp_path: Path) -> None:
    convert(source, f"{tmp_path}/out/")
    convert(tmp_path / "out", tmp_path / "b.pth", verify=True)
    assert same(torch.load(tmp_path / "b.pth"), values())
    found = convert(tmp_path / "out", tmp_path / "c.safetensors", verify=True)
    assert found.left_out == ["epoch", "sizes", "optimizer.param_groups", "mixed.1"]


def test_dtypes_keys_and_several_files(source: Path, tmp_path: Path) -> None:
    found = convert(source, f"{tmp_path}/out/", dtype="bfloat16", max_shard_size=500, verify=True)
    assert len(found.files) > 3
    read = read_by_torch(tmp_path / "out")
    assert read["model"]["embed"].dtype == torch.bfloat16
    assert torch.equal(read["mixed"][0], torch.arange(3))
    found = convert(source, f"{tmp_path}/out/", keys="model.*", key_map=lambda name: name[6:], verify=True)
    assert list(read_by_torch(tmp_path / "out")) == ["embed", "head", "part", "t"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        os.path.basename(file) for file in found.files
    )
    edited = zipslicer.load(source)
    edited["model"]["new"] = torch.full((2,), 3.0)
    edited["list"] = [torch.ones(2), {"a": torch.zeros(1)}, 5]
    del edited["optimizer"]
    zipslicer.save(edited, tmp_path / "edited.pth")
    convert(tmp_path / "edited.pth", f"{tmp_path}/out/", verify=True)
    assert same(read_by_torch(tmp_path / "out"), torch.load(tmp_path / "edited.pth"))


def test_items_of_edited_mappings(source: Path) -> None:
    edited = zipslicer.load(source)
    edited["list"] = [torch.ones(2), {"a": torch.zeros(1, dtype=torch.int8)}, 5, []]
    edited["plain"] = {"x": {}, "y": {"z": torch.ones(1)}}
    items = {item.name: item for item in items_of(edited, None)}
    assert items["list.0"].part is not None
    assert items["list.1.a"].part is not None
    assert items["list.2"].value == 5
    assert items["list.3"].value == []
    assert items["plain.x"].value == {}
    assert items["plain.y.z"].part is not None
    assert items["list.1.a"].path == ("list", 1, "a")


def test_numpy(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("numpy")
    convert(source, f"{tmp_path}/out/", framework="np", verify=True)
    assert same(read_by_torch(tmp_path / "out"), values())


def test_names_that_become_one(tmp_path: Path) -> None:
    torch.save({"a": {1: torch.ones(1), "1": torch.zeros(1)}}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"two values are called 'a\.1'"):
        convert(tmp_path / "a.pth", f"{tmp_path}/out/")
    assert not (tmp_path / "out").exists()


def test_tensors_that_are_not_dense_and_strangers_are_values(tmp_path: Path) -> None:
    sparse = torch.eye(4).to_sparse()
    torch.save(
        {"s": sparse, "p": torch.nn.Parameter(torch.ones(2)), "o": collections.Counter("aab")}, tmp_path / "a.pth"
    )
    convert(tmp_path / "a.pth", f"{tmp_path}/out/", verify=True)
    read = zipslicer.load(tmp_path / "out")
    assert torch.equal(read["s"].to_dense(), torch.eye(4))
    assert torch.equal(read["p"], torch.ones(2))
    assert read["o"] == collections.Counter("aab")
    whole = read_by_torch(tmp_path / "out")
    assert torch.equal(whole["s"].to_dense(), torch.eye(4))
    assert type(whole["p"]) is torch.Tensor


def test_a_root_that_is_no_mapping(tmp_path: Path) -> None:
    torch.save([torch.ones(2), {"a": torch.zeros(1)}], tmp_path / "a.pth")
    convert(tmp_path / "a.pth", f"{tmp_path}/out/", verify=True)
    assert list(read_by_torch(tmp_path / "out")) == ["0", "1.a"]


@pytest.mark.parametrize("case", [case for case in CASES if case.number not in REFUSALS], ids=str)
def test_whatever_opens_comes_back(case: Case, tmp_path: Path) -> None:
    outcome = case.make(tmp_path)
    assert isinstance(outcome, Loads)
    if outcome.huge:
        pytest.skip("gigabytes, of which nothing else is written")
    source = outcome.file if isinstance(outcome.file, Path) else tmp_path / "source"
    if isinstance(outcome.file, bytes):
        source.write_bytes(outcome.file)
    with zipslicer.open(source, **outcome.keywords) as before:
        if case.number == "40g":
            with pytest.raises(UnsupportedError, match="over and over"):
                convert(before, f"{tmp_path}/out/")
            return
        if case.name == "recursive":
            with pytest.raises(ValueError, match="holds itself"):
                convert(before, f"{tmp_path}/out/")
            return
        convert(before, f"{tmp_path}/out/", verify=True)
        with zipslicer.open(tmp_path / "out") as after:
            names = after.tensors
            for name, tensor in before.tensors.items():
                if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
                    continue
                if name not in names:  # a constant of an exported program, which its root does not have
                    assert name.startswith("constants.")
                    continue
                one, other = (conformance.parts_of(each) or {"": each} for each in (tensor, names[name]))
                assert list(one) == list(other), name
                for part in one:
                    assert conformance.logical_bytes(one[part]) == conformance.logical_bytes(other[part]), (name, part)


# ---------------------------------------------------------------- whatever happens


def test_an_error_leaves_what_was_there(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match="no such folder"):
        convert(source, tmp_path / "not" / "there", format="dcp")
    monkeypatch.setattr("zipslicer.dcp_writer._metadata", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(source, folder, format="dcp")
    assert not folder.exists()
    monkeypatch.undo()
    convert(source, folder, format="dcp")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr("zipslicer.dcp_writer._metadata", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(source, folder, format="dcp", dtype="float16")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    monkeypatch.undo()
    (folder / "notes.txt").write_text("mine")
    convert(source, folder, format="dcp", dtype="float16")
    assert sorted(path.name for path in folder.iterdir()) == [".metadata", "__0_1.distcp", "notes.txt"]


def test_verify_notices_what_the_disk_did(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_and_damage(items: Any, path: str, *rest: Any) -> list[str]:
        files = writing(items, path, *rest)
        content = bytearray(Path(files[0]).read_bytes())
        content[content.index(values()["model"]["embed"].numpy().tobytes()[:32])] ^= 1
        Path(files[0]).write_bytes(content)
        return files

    writing = write_folder
    monkeypatch.setattr("zipslicer.conversion.write_folder", write_and_damage)
    with pytest.raises(ArchiveError, match="CRC-32"):
        convert(source, f"{tmp_path}/out/", verify=True)


def test_a_format_that_there_is_not(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="safetensors, torch, dcp"):
        convert(source, tmp_path / "x", format="gguf")


def test_a_file_of_a_folder_is_not_overwritten(source: Path, tmp_path: Path) -> None:
    convert(source, f"{tmp_path}/out/")
    before = (tmp_path / "out" / ".metadata").read_bytes()
    with pytest.raises(ValueError, match="name the folder"):
        convert(source, tmp_path / "out" / ".metadata")
    assert (tmp_path / "out" / ".metadata").read_bytes() == before


CONVERTS = """
import sys, zipslicer
source, target = sys.argv[1:]
zipslicer.convert(source, target, format="dcp")
print("go", flush=True)
while True:
    zipslicer.convert(source, target, format="dcp")
"""


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="SIGKILL")
def test_killed_at_any_moment_the_folder_is_whole(tmp_path: Path) -> None:
    sources = []
    for value in (1.0, 2.0):
        sources.append(tmp_path / f"{value}.pt")
        torch.save({f"w{i}": torch.full((50_000,), value) for i in range(20)}, sources[-1])
    target = tmp_path / "out"
    convert(sources[0], target, format="dcp")
    moments, in_the_middle = random.Random(7), 0
    for turn in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", CONVERTS, sources[turn % 2], target], stdout=subprocess.PIPE, cwd="/"
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"go\n"
        time.sleep(moments.random() * 0.05)
        process.kill()
        process.communicate()
        got = zipslicer.load(target).materialize()
        assert len(got) == 20
        assert len({float(tensor[0]) for tensor in got.values()}) == 1
        assert all(tensor.eq(tensor[0]).all() for tensor in got.values())
        in_the_middle += len(list(target.iterdir())) > 2
    assert in_the_middle
