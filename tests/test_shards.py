"""Shards: an index or a folder opens as one mapping, and only if what it says of its files is so."""

from __future__ import annotations

import argparse
import copy
import json
import os
import pickle
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import zipslicer
from zipslicer import ArchiveError, ChangedError, UnsafeError, UnsupportedError
from zipslicer.backend import choose
from zipslicer.policy import Limits
from zipslicer.shards import locate, read_index

if TYPE_CHECKING:
    import torch
else:
    torch = pytest.importorskip("torch")

FIRST, SECOND = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
INDEX = "pytorch_model.bin.index.json"


def parts() -> tuple[dict[str, Any], dict[str, Any]]:
    torch.manual_seed(3)
    embed = torch.randn(50, 8)
    first = {"embed.weight": embed, "h.0.weight": torch.randn(8, 8).t(), "tied.weight": embed}
    second = {"h.1.weight": torch.randn(8, 8), "h.1.bias": torch.arange(8), "norm": torch.randn(8).half()}
    return first, second


def write(folder: Path, parts: dict[str, dict[str, Any]], index: str = INDEX, **more: Any) -> Path:
    """Files and their index, as save_pretrained writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, tensors in parts.items():
        (folder / file).parent.mkdir(exist_ok=True)
        torch.save(tensors, folder / file)
    weight_map = {key: file for file, tensors in parts.items() for key in tensors}
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 123}, "weight_map": weight_map, **more}))
    return folder / index


@pytest.fixture
def index(tmp_path: Path) -> Path:
    first, second = parts()
    return write(tmp_path / "model", {FIRST: first, SECOND: second})


def whole() -> dict[str, Any]:
    first, second = parts()
    return {**first, **second}


def assert_equal(made: Any, expected: dict[str, Any]) -> None:
    assert list(made) == list(expected)
    for key, tensor in expected.items():
        assert torch.equal(made[key], tensor), key
        assert made[key].dtype == tensor.dtype
        assert made[key].stride() == tensor.stride()


# ---------------------------------------------------------------- one mapping


@pytest.mark.parametrize("check", [True, False])
def test_an_index_is_one_mapping(index: Path, check: bool) -> None:
    sd = zipslicer.load(index, check=check)
    assert type(sd) is zipslicer.LazyStateDict
    assert_equal(sd, whole())
    assert_equal(sd.materialize(), whole())
    assert type(sd.materialize()) is dict
    assert_equal(dict(sd.items()), whole())


def test_a_folder_with_one_index_is_that(index: Path) -> None:
    assert_equal(zipslicer.load(str(index.parent)), whole())
    assert zipslicer.load(index.parent).path == str(index)


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin.index.fp16.json",
        "diffusion_pytorch_model.bin.index.json",
        "diffusion_pytorch_model.fp16.bin.index.json",
        "diffusion_pytorch_model.bin.index.fp16.json",
        "MODEL.INDEX.JSON",
    ],
)
def test_variants_of_the_index_are_found(tmp_path: Path, name: str) -> None:
    first, second = parts()
    write(tmp_path, {"a.fp16-00001-of-00002.bin": first, "a.fp16-00002-of-00002.bin": second}, name)
    (tmp_path / "config.json").write_text("{}")
    assert_equal(zipslicer.load(tmp_path), whole())


def test_an_index_may_be_the_bare_map_and_files_may_lie_in_folders(tmp_path: Path) -> None:
    first, second = parts()
    path = write(tmp_path, {"a/1.bin": first, "b/2.bin": second})
    path.write_text(json.dumps(json.loads(path.read_text())["weight_map"]))
    assert_equal(zipslicer.load(path), whole())
    assert zipslicer.load(path).metadata() == {"format": "pt"}


def test_keys_are_in_the_order_of_the_index_and_offsets_in_that_of_the_files(index: Path) -> None:
    said = json.loads(index.read_text())
    said["weight_map"] = dict(sorted(said["weight_map"].items(), reverse=True))
    index.write_text(json.dumps(said))
    sd = zipslicer.load(index)
    assert list(sd) == sorted(whole(), reverse=True)
    assert sd.offset_keys()[0] in ("embed.weight", "tied.weight")
    assert sd.offset_keys()[2:] == ["h.0.weight", "h.1.weight", "h.1.bias", "norm"]


def test_facts_need_no_tensor(index: Path) -> None:
    sd = zipslicer.load(index)
    assert sd.get_meta("h.1.bias").dtype_name == "int64"
    assert sd.get_shape("embed.weight") == [50, 8]
    assert sd.get_dtype("norm") == "F16"
    assert sd.metadata() == {"format": "pt", "total_size": "123"}
    assert sd.path == str(index)
    assert "embed.weight" in repr(sd)
    assert str(index) in repr(sd)
    with pytest.raises(KeyError, match=r"h\.1\.bias"):
        sd["h.1.bais"]


def test_slices_and_several_at_once(index: Path) -> None:
    sd = zipslicer.load(index)
    assert torch.equal(sd.get_slice("embed.weight")[3:40:7, ::2], whole()["embed.weight"][3:40:7, ::2])
    assert sd.get_slice("norm").get_dtype() == "F16"
    some = sd.get_tensors(["norm", "embed.weight", "tied.weight"])
    assert list(some) == ["norm", "embed.weight", "tied.weight"]
    assert some["embed.weight"].data_ptr() == some["tied.weight"].data_ptr()


def test_tied_weights_of_a_file_stay_tied(index: Path) -> None:
    plain = zipslicer.load(index).materialize()
    assert plain["embed.weight"].data_ptr() == plain["tied.weight"].data_ptr()
    assert plain["embed.weight"].untyped_storage().nbytes() == 50 * 8 * 4


def test_options_are_those_of_every_file(index: Path) -> None:
    sd = zipslicer.load(index, dtype=torch.float64, cache_tensors=True, threads=1)
    assert {str(t.dtype) for t in sd.values()} == {"torch.float64", "torch.int64"}
    assert sd["h.1.bias"].data_ptr() == sd["h.1.bias"].data_ptr()
    assert sd["embed.weight"].shape == sd["tied.weight"].shape
    assert zipslicer.load(index, map_location="meta")["norm"].device.type == "meta"


def test_other_names_for_the_same_tensors(index: Path) -> None:
    sd = zipslicer.load(index)
    assert_equal(sd.select("h.*"), {k: v for k, v in whole().items() if k.startswith("h.")})
    assert_equal(sd.copy().rename(lambda key: "m." + key), {"m." + k: v for k, v in whole().items()})
    assert_equal(sd.flatten(), whole())
    assert sd.copy() == sd
    assert sd.select("h.*") != sd


def test_edits_overlay_the_files(index: Path) -> None:
    sd = zipslicer.load(index)
    sd["norm"] = torch.zeros(2)
    del sd["tied.weight"]
    sd.rename({"h.1.bias": "b"})
    expected = {k if k != "h.1.bias" else "b": v for k, v in whole().items() if k != "tied.weight"}
    expected["norm"] = torch.zeros(2)
    assert_equal(sd.materialize(), expected)
    assert_equal(pickle.loads(pickle.dumps(sd)), expected)
    assert_equal(copy.deepcopy(sd), expected)
    assert_equal(zipslicer.load(index), whole())


def test_a_model_takes_it(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 5))
    state = model.state_dict()
    split = [{k: v for k, v in state.items() if k[0] == n} for n in "01"]
    path = write(tmp_path, {"1.bin": split[0], "2.bin": split[1]})
    other = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 5))
    other.load_state_dict(zipslicer.load(path))
    assert_equal(other.state_dict(), dict(state))


# ---------------------------------------------------------------- values that nest


@pytest.fixture
def nested(tmp_path: Path) -> Path:
    first = {"opt": {"m": torch.ones(2), "l": [torch.zeros(3), {"x": torch.full((1,), 7.0)}], "lr": 0.1}, "epoch": 3}
    return write(tmp_path / "nested", {"1.bin": first, "2.bin": {"w": torch.ones(4)}})


def test_nested_containers_are_lazy_and_held(nested: Path) -> None:
    sd = zipslicer.load(nested)
    assert sd["epoch"] == 3
    assert sd["opt"] is sd["opt"]
    assert sd["opt"]["l"][1]["x"].item() == 7
    sd["opt"]["m"] = torch.full((2,), 5.0)
    assert sd.materialize()["opt"]["m"].tolist() == [5, 5]
    assert pickle.loads(pickle.dumps(sd))["opt"]["m"].tolist() == [5, 5]
    other = copy.deepcopy(sd)
    other["opt"]["m"] = torch.zeros(1)
    assert sd["opt"]["m"].tolist() == [5, 5]
    assert zipslicer.load(nested)["opt"]["m"].tolist() == [1, 1]


@pytest.mark.parametrize("check", [True, False])
def test_flatten_finds_tensors_below(nested: Path, check: bool) -> None:
    flat = zipslicer.load(nested, check=check).flatten()
    assert list(flat) == ["w", "opt.m", "opt.l.0", "opt.l.1.x"]
    assert flat["opt.l.1.x"].item() == 7
    assert flat.get_slice("opt.l.0")[1:].tolist() == [0, 0]
    assert list(pickle.loads(pickle.dumps(flat)).materialize()) == list(flat)
    assert [t.sum().item() for t in flat.materialize().values()] == [4, 2, 0, 7]


def test_flatten_reads_what_another_file_has_put_in(index: Path, nested: Path) -> None:
    sd = zipslicer.load(index)
    sd["other"] = zipslicer.load(nested)
    flat = sd.flatten()
    assert flat["other.opt.l.1.x"].item() == 7
    assert torch.equal(flat["norm"], whole()["norm"])


def test_open_gives_a_checkpoint(nested: Path) -> None:
    with zipslicer.open(nested) as ckpt:
        assert ckpt.path == str(nested)
        assert list(ckpt.tensors) == ["opt.m", "opt.l.0", "opt.l.1.x", "w"]
        assert ckpt.tensors["opt.l.1.x"].item() == 7
        assert ckpt.root["epoch"] == 3
        assert ckpt.placeholders == {}
        assert "1.bin/1/data/0" in ckpt.records
        assert repr(ckpt).endswith("4 tensors, 4 storages)")
    with pytest.raises(ValueError, match="closed"):
        ckpt.tensors["w"]


@pytest.mark.parametrize("name", ["table", "program", "reader"])
def test_what_takes_one_file_is_unsupported(index: Path, name: str) -> None:
    with pytest.raises(UnsupportedError, match="there are several"):
        getattr(zipslicer.load(index)._view, name)


# ---------------------------------------------------------------- when files are opened, and closed


def opened(folder: Path) -> set[str]:
    """The files of a folder that this process has open."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue
        if path.parent == folder:
            found.add(path.name)
    return found


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="no /proc")
def test_a_file_is_opened_on_first_touch_and_closed_with_the_rest(index: Path) -> None:
    sd = zipslicer.load(index, check=False)
    assert len(sd) == 6
    assert "norm" in sd
    assert opened(index.parent) == set()
    sd.get_meta("norm")
    assert opened(index.parent) == {SECOND}
    assert sd["embed.weight"].shape == (50, 8)
    assert opened(index.parent) == {FIRST, SECOND}
    sd.close()
    assert opened(index.parent) == set()
    with zipslicer.load(index) as sd:
        assert opened(index.parent) == {FIRST, SECOND}
    assert opened(index.parent) == set()
    (index.parent / SECOND).write_bytes(b"")
    with pytest.raises(ArchiveError):
        zipslicer.load(index)
    assert opened(index.parent) == set()


@pytest.mark.parametrize("check", [True, False])
def test_a_closed_one_says_so_and_still_lists(index: Path, check: bool) -> None:
    sd = zipslicer.load(index, check=check)
    sd.close()
    sd.close()
    assert list(sd) == list(whole())
    assert "6 keys" in repr(sd)
    for key in sd:
        with pytest.raises(ValueError, match="closed"):
            sd[key]


def test_it_pickles_by_path_and_knows_its_files(index: Path) -> None:
    for check in (True, False):
        sd = zipslicer.load(index, check=check)
        again = pickle.loads(pickle.dumps(sd))
        assert_equal(again, whole())
        assert again.path == sd.path
    sd = pickle.dumps(zipslicer.load(index))
    first, _ = parts()
    torch.save({**first, "more": torch.zeros(1)}, index.parent / FIRST)
    with pytest.raises(ChangedError):
        pickle.loads(sd)


def test_threads_share_it(index: Path) -> None:
    sd = zipslicer.load(index, check=False)
    expected = whole()
    wrong: list[str] = []

    def work() -> None:
        for _ in range(20):
            wrong.extend(key for key, tensor in expected.items() if not torch.equal(sd[key], tensor))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


# ---------------------------------------------------------------- what is wrong is said before a tensor is read


def test_missing_files_are_an_error_before_reading(index: Path) -> None:
    (index.parent / SECOND).unlink()
    with pytest.raises(ArchiveError, match=f"1 of the 2 files .* missing: {SECOND}") as caught:
        zipslicer.load(index)
    assert caught.value.path == str(index)
    sd = zipslicer.load(index, check=False)
    assert torch.equal(sd["embed.weight"], whole()["embed.weight"])
    with pytest.raises(ArchiveError, match="missing") as caught:
        sd["norm"]
    assert caught.value.path == str(index.parent / SECOND)
    assert "norm" in repr(sd)


def edit(index: Path, change: Any) -> None:
    said = json.loads(index.read_text())
    change(said["weight_map"])
    index.write_text(json.dumps(said))


@pytest.mark.parametrize(
    ("change", "says", "key"),
    [
        (lambda m: m.update(ghost=FIRST), "1 keys into this file that it has not: ghost", "ghost"),
        (lambda m: m.pop("norm"), "1 keys that the index does not give to it: norm", "norm"),
        (lambda m: m.update(norm=FIRST), "that it has not: norm", "norm"),
    ],
)
def test_keys_must_agree_both_ways(index: Path, change: Any, says: str, key: str) -> None:
    edit(index, change)
    with pytest.raises(ArchiveError, match=says) as caught:
        zipslicer.load(index)
    assert caught.value.key == key
    assert Path(str(caught.value.path)).parent == index.parent
    assert zipslicer.load(index, check=False)["h.1.bias"].sum() == 28


def test_a_key_that_the_file_lacks_is_an_error_on_touch_without_check(index: Path) -> None:
    edit(index, lambda m: m.update(ghost=FIRST))
    sd = zipslicer.load(index, check=False)
    for ask in (sd.get_meta, sd.get_slice, sd.__getitem__, lambda key: sd.materialize()):
        with pytest.raises(ArchiveError, match="lacks it") as caught:
            ask("ghost")
        assert caught.value.key == "ghost"


@pytest.mark.parametrize(
    "name",
    [
        "../secret.bin", "a/../../secret.bin", "/etc/passwd", "..", ".", "", "a//b.bin", "./a.bin", "a\\b.bin", "..\\a.bin",
        "C:\\a.bin", "C:a.bin", "//server/share/a.bin", "\\\\server\\a.bin", "a.bin:stream", "a\0.bin", "\ud800.bin",
    ],
)  # fmt: skip
@pytest.mark.parametrize("check", [True, False])
def test_names_stay_below_the_folder(index: Path, name: str, check: bool) -> None:
    torch.save({"norm": torch.ones(1)}, index.parent.parent / "secret.bin")
    edit(index, lambda m: m.update(norm=name))
    with pytest.raises(ArchiveError, match="the index names the file") as caught:
        zipslicer.load(index, check=check)
    assert caught.value.path == str(index)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no JSON"),
        (b"\xff\xfe{}", "no JSON"),
        (b"<!DOCTYPE html>", "no JSON"),
        (b"[1]", "no index"),
        (b"3", "no index"),
        (b"{}", "no index"),
        (b'{"weight_map": {}}', "no index"),
        (b'{"weight_map": ["a"]}', "no index"),
        (b'{"weight_map": {"a": 3}}', "not a file name"),
        (b'{"weight_map": {"a": "x.bin", "b": null}}', "not a file name"),
        (b'{"model_type": "gpt2", "n": 3}', 'there is no "weight_map"'),
        (b'{"weight_map": {"a": "x.bin", "a": "y.bin"}}', "'a' twice"),
        (b'{"weight_map": {"a": "x.bin"}, "weight_map": {}}', "'weight_map' twice"),
        (b'{"metadata": {"a": 1, "a": 2}, "weight_map": {"a": "x.bin"}}', "'a' twice"),
        (b"[" * 100_000, "no JSON"),
        (b'{"a":' * 100_000, "no JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "no JSON|not a file name"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "git lfs pull"),
    ],
)
def test_what_is_no_index_is_said(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / INDEX
    path.write_bytes(content)
    for source in (path, tmp_path):
        with pytest.raises(ArchiveError, match=says) as caught:
            zipslicer.load(source)
        assert caught.value.path == str(path)


def test_a_huge_index_is_refused_before_it_is_read(index: Path) -> None:
    with pytest.raises(ArchiveError, match="the limit is 100"):
        read_index(str(index), choose(), Limits(directory_nbytes=100))
    with index.open("ab") as file:
        file.truncate(1 << 40)
    with pytest.raises(ArchiveError, match="the limit is"):
        zipslicer.load(index)


def test_missing_indexes_are_the_systems_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        zipslicer.load(tmp_path / "none.index.json")


def test_a_window_of_an_index_is_a_mistake(index: Path) -> None:
    with pytest.raises(ValueError, match="window"):
        zipslicer.load(index, window=(0, 100))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<html>", "web page"),
        (b'{"weight_map": {}}', "must be called"),
        (b"", "empty"),
    ],
)
def test_a_damaged_file_is_named(index: Path, content: bytes, says: str) -> None:
    (index.parent / SECOND).write_bytes(content)
    with pytest.raises(ArchiveError, match=says) as caught:
        zipslicer.load(index)
    assert caught.value.path == str(index.parent / SECOND)


@pytest.mark.parametrize("root", [[torch.ones(1)], 3, "w"])
def test_a_file_without_a_mapping_is_no_shard(index: Path, root: Any) -> None:
    torch.save(root, index.parent / SECOND)
    with pytest.raises(ArchiveError, match="mapping at its root"):
        zipslicer.load(index)


def test_keys_that_are_no_strings_are_in_no_index(index: Path) -> None:
    second: dict[Any, Any] = dict(parts()[1])
    second[7] = torch.ones(1)
    torch.save(second, index.parent / SECOND)
    with pytest.raises(ArchiveError, match="does not give to it: 7"):
        zipslicer.load(index)


def test_damage_of_a_tensor_names_its_key_and_file(index: Path) -> None:
    target = index.parent / FIRST
    content = bytearray(target.read_bytes())
    at = content.index(b"PK\x03\x04", content.index(b"/data/0"))  # the header after the first storage's
    content[at : at + 4] = b"XXXX"
    target.write_bytes(content)
    sd = zipslicer.load(index)
    with pytest.raises(ArchiveError) as caught:
        sd.materialize()
    assert caught.value.key == "h.0.weight"
    assert caught.value.path == str(target)
    assert torch.equal(sd["norm"], whole()["norm"])


def test_policy_holds_for_every_file(index: Path) -> None:
    torch.save({**parts()[1], "norm": argparse.Namespace(lr=1)}, index.parent / SECOND)
    assert zipslicer.open(index).placeholders["norm"].lr == 1
    with pytest.raises(UnsafeError):
        zipslicer.load(index, unknown="error")
    real = zipslicer.load(index, allow={"argparse.Namespace": argparse.Namespace})
    assert real["norm"] == argparse.Namespace(lr=1)


# ---------------------------------------------------------------- folders


def test_a_folder_with_one_checkpoint_is_that(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    for beside in (
        "training_args.bin",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "rng_state_3.pth",
        "scaler.pt",
        "optimizer_1.bin",
    ):
        torch.save({}, tmp_path / beside)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "sub.bin").mkdir()
    sd = zipslicer.load(tmp_path)
    assert list(sd) == ["a"]
    assert sd.path == str(tmp_path / "pytorch_model.bin")


def test_a_folder_with_several_lists_them(tmp_path: Path) -> None:
    for name in ("b.pt", "a.pth"):
        torch.save({}, tmp_path / name)
    with pytest.raises(ValueError, match=r"2 candidates \(a\.pth, b\.pt\)"):
        zipslicer.load(tmp_path)
    for name in ("x.bin.index.json", "y.safetensors.index.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=r"4 candidates \(x\.bin\.index\.json, y\.safetensors\.index\.json, a\.pth"):
        zipslicer.load(tmp_path)


def test_a_folder_without_any_is_said(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("")
    with pytest.raises(IsADirectoryError, match="neither a checkpoint nor an index"):
        zipslicer.load(tmp_path)


def test_tensor_parallel_parts_are_refused_with_advice(tmp_path: Path) -> None:
    for n in range(2):
        torch.save({"w": torch.ones(1)}, tmp_path / f"consolidated.0{n}.pth")
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(UnsupportedError, match="tensor-parallel parts"):
        zipslicer.load(tmp_path)
    assert list(zipslicer.load(tmp_path / "consolidated.00.pth")) == ["w"]
    (tmp_path / "consolidated.01.pth").unlink()
    assert list(zipslicer.load(tmp_path)) == ["w"]


def test_a_cache_of_symlinks_opens_as_it_is_named(tmp_path: Path) -> None:
    """The Hugging Face cache: names are links to blobs that are called by their hash."""
    first, second = parts()
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    write(blobs, {"hash1": first, "hash2": second})
    said = dict.fromkeys(first, FIRST) | dict.fromkeys(second, SECOND)
    (blobs / "hash3").write_text(json.dumps({"weight_map": said}))
    for name, blob in ((FIRST, "hash1"), (SECOND, "hash2"), (INDEX, "hash3")):
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    for source in (snapshot, snapshot / INDEX):
        sd = zipslicer.load(source)
        assert sd.path == str(snapshot / INDEX)
        assert_equal(sd, whole())
    (blobs / "hash2").unlink()
    with pytest.raises(ArchiveError, match="missing"):
        zipslicer.load(snapshot)


def test_what_is_no_folder_and_no_index_goes_on_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    assert locate(path) == (path, False)
    assert locate(b"x") == (b"x", False)


def test_an_archive_may_be_called_anything_but_json(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "a.json")
    with pytest.raises(ArchiveError, match="no JSON"):
        zipslicer.load(tmp_path / "a.json")
