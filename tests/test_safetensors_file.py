"""Safetensors: a file of that format, alone or as a shard, is what the same tensors in a checkpoint are."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import zipslicer
from zipslicer import ArchiveError, ChangedError, UnsupportedError
from zipslicer.policy import DTYPES

if TYPE_CHECKING:
    import torch
else:
    torch = pytest.importorskip("torch")

safetensors_torch = pytest.importorskip("safetensors.torch")


def tensors() -> dict[str, Any]:
    torch.manual_seed(5)
    return {
        "weight": torch.randn(40, 6),
        "half": torch.randn(3, 5, 2).half(),
        "brain": torch.randn(7).bfloat16(),
        "ids": torch.arange(9),
        "mask": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "é中": torch.ones(1, dtype=torch.uint8),
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "model.safetensors"
    safetensors_torch.save_file(tensors(), made, metadata={"format": "pt", "by": "test"})
    return made


def write(path: Path, header: Any, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_it_opens_like_a_checkpoint(path: Path) -> None:
    sd = zipslicer.load(path)
    assert type(sd) is zipslicer.LazyStateDict
    with safetensors_torch.safe_open(path, "pt") as file:
        assert set(sd) == set(file.keys())
        assert list(sd) == file.offset_keys() == sd.offset_keys()
        assert sd.metadata() == file.metadata()
        for key in sd:
            part = file.get_slice(key)
            assert (sd.get_shape(key), sd.get_dtype(key)) == (part.get_shape(), part.get_dtype())
    for made in (sd, sd.materialize(), sd.get_tensors(tensors())):
        for key, tensor in tensors().items():
            assert torch.equal(made[key], tensor)
            assert made[key].dtype == tensor.dtype
            assert made[key].untyped_storage().nbytes() == tensor.nbytes


def test_slices_read_a_part(path: Path) -> None:
    part = zipslicer.load(path).get_slice("weight")
    assert torch.equal(part[3:30:4, ::-1], tensors()["weight"][3:30:4].flip(1))
    assert torch.equal(part[7], tensors()["weight"][7])


def test_other_names_edits_and_pickling(path: Path) -> None:
    sd = zipslicer.load(path, dtype=torch.float64).select("h*", "weight").rename(str.upper)
    sd["NEW"] = torch.ones(2)
    again = pickle.loads(pickle.dumps(sd))
    assert sorted(again) == ["HALF", "NEW", "WEIGHT"]
    assert torch.equal(again["HALF"], tensors()["half"].double())
    assert sd.metadata()["by"] == "test"


def test_a_checkpoint_of_it(path: Path) -> None:
    with zipslicer.open(path) as ckpt:
        assert sorted(ckpt.tensors) == sorted(tensors())
        assert ckpt.path == str(path)
        assert ckpt.placeholders == {}
        assert sorted(ckpt.records) == sorted(tensors())
    with pytest.raises(ValueError, match="closed"):
        ckpt.tensors["weight"]


def test_every_dtype_that_both_have(tmp_path: Path) -> None:
    header, data, expected = {}, b"", {}
    for dtype in DTYPES:
        if dtype.code is not None and hasattr(torch, dtype.name):
            content = bytes(range(1, 1 + 6 * dtype.itemsize)) if dtype.name != "bool" else b"\1\0" * 3
            # safetensors counts 4-bit numbers one by one, torch in pairs
            shape = [2, 6] if dtype.code == "F4" else [2, 3]
            header[dtype.name] = {
                "dtype": dtype.code,
                "shape": shape,
                "data_offsets": [len(data), len(data) + len(content)],
            }
            data += content
            expected[dtype.name] = content
    sd = zipslicer.load(write(tmp_path / "a", header, data))
    assert len(sd) > 15
    for name, content in expected.items():
        assert sd[name].dtype == getattr(torch, name)
        assert list(sd[name].shape) == [2, 3]
        assert bytes(sd[name].untyped_storage().tolist()) == content


def test_what_is_torch_has_no_dtype_for_is_unsupported(tmp_path: Path) -> None:
    path = write(tmp_path / "a", {"w": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}, bytes(3))
    with pytest.raises(UnsupportedError, match="F6_E2M3") as caught:
        zipslicer.load(path)
    assert caught.value.key == "w"


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(7)),  # cut short
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(9)),  # bytes of nobody
        ({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, bytes(8)),  # shape and size disagree
        ({"w": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 8]}}, bytes(8)),
        ({"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, bytes(8)),
        (b'{"w": 3}', b""),
        (b'{"w" nonsense', b""),
        (b'{"a": ' * 1000, b""),
    ],
)
def test_damage_is_said(tmp_path: Path, header: Any, data: bytes) -> None:
    path = write(tmp_path / "a.safetensors", header, data)
    with pytest.raises(ArchiveError) as caught:
        zipslicer.load(path)
    assert caught.value.path == str(path)


@pytest.mark.parametrize("shape", [[0, 1 << 40, 1 << 40], [0, 1 << 63], [1] * 65])
def test_shapes_beyond_torch_are_refused(tmp_path: Path, shape: list[int]) -> None:
    nbytes = 0 if 0 in shape else 4
    path = write(tmp_path / "a", {"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, nbytes]}}, bytes(nbytes))
    with pytest.raises(ArchiveError):
        zipslicer.load(path)


def test_a_header_beyond_the_limit_is_refused(path: Path) -> None:
    with pytest.raises(ArchiveError, match="directory_nbytes"):
        zipslicer.load(path, limits=zipslicer.Limits(directory_nbytes=100))


def test_a_file_that_changes_is_noticed(path: Path) -> None:
    sd = zipslicer.load(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 200)
    with pytest.raises(ChangedError):
        sd.materialize()


def test_it_is_opened_from_wherever_its_bytes_are(path: Path, tmp_path: Path) -> None:
    text = path.read_bytes()
    packed = path.with_suffix(".gz")
    packed.write_bytes(gzip.compress(text))
    behind = tmp_path / "behind"
    behind.write_bytes(b"something else" + text)
    with zipslicer.load(path) as sd, behind.open("rb") as file:
        wanted = sd.materialize()
        file.seek(len(b"something else"))
        for source in (text, packed, io.BytesIO(text), file):
            with zipslicer.load(source) as other:
                assert list(other) == list(sd)
                assert other.metadata() == sd.metadata()
                assert all(torch.equal(other[name], wanted[name]) for name in other)


def test_bytes_that_lie_about_their_size_are_refused(path: Path) -> None:
    for text in (path.read_bytes() + b"x", path.read_bytes()[:-1]):
        with pytest.raises(ArchiveError, match="no safetensors file"):
            zipslicer.load(text)


def test_without_the_package_the_error_says_what_to_install(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        zipslicer.load(path)


def test_an_index_of_them_is_one_mapping(tmp_path: Path) -> None:
    weight_map = {}
    for i, key in enumerate(tensors()):
        file = f"model-0000{i % 2 + 1}-of-00002.safetensors"
        weight_map[key] = file
    for file in set(weight_map.values()):
        safetensors_torch.save_file({k: t for k, t in tensors().items() if weight_map[k] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    sd = zipslicer.load(tmp_path)
    assert list(sd) == list(weight_map)
    for made in (sd, sd.materialize(), pickle.loads(pickle.dumps(sd))):
        assert all(torch.equal(made[key], tensor) for key, tensor in tensors().items())


def test_files_of_both_formats_may_be_shards_of_one(tmp_path: Path) -> None:
    safetensors_torch.save_file({"a": torch.ones(2)}, tmp_path / "1.safetensors")
    torch.save({"b": torch.zeros(2)}, tmp_path / "2.bin")
    (tmp_path / "x.index.json").write_text(json.dumps({"a": "1.safetensors", "b": "2.bin"}))
    assert {key: t.tolist() for key, t in zipslicer.load(tmp_path).items()} == {"a": [1, 1], "b": [0, 0]}


def test_an_empty_one(tmp_path: Path) -> None:
    assert zipslicer.load(write(tmp_path / "a", {}, b"")) == {}
