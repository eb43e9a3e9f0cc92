"""A `.metadata` that contradicts itself, or that nobody of torch's wrote, is refused with a word that says why."""

from __future__ import annotations

import dataclasses
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import zipslicer
from zipslicer.backend import choose
from zipslicer.dcp_metadata import Tensor, Value, is_metadata, read_folder
from zipslicer.errors import ArchiveError, CheckpointError, UnsupportedError, ZipSlicerError
from zipslicer.policy import Limits

torch = pytest.importorskip("torch")
if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

import dcp_folders  # noqa: E402
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex  # noqa: E402

HALVES = [((0, 0), (2, 3)), ((2, 0), (2, 3))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return dcp_folders.chunked(tmp_path / "x", {"a": (torch.ones(4, 3), HALVES), "b": (torch.ones(4, 3), HALVES)})


def read(folder: Path, **limits: int) -> Any:
    return read_folder(str(folder / ".metadata"), choose(), dataclasses.replace(Limits(), **limits))


def refused(folder: Path, change: Callable[[Any], Any], match: str, error: type[Exception] = ArchiveError) -> None:
    dcp_folders.rewritten(folder, change)
    with pytest.raises(error, match=match):
        zipslicer.open(folder)


def chunk(said: Any, name: str = "a", number: int = 0) -> Any:
    return said.state_dict_metadata[name].chunks[number]


def place(said: Metadata, name: str = "a", starts: tuple[int, ...] = (0, 0)) -> Any:
    return said.storage_data[MetadataIndex(name, starts)]


def put(value: Any, name: str, content: Any) -> None:
    object.__setattr__(value, name, content)


def test_what_it_says(folder: Path, tmp_path: Path) -> None:
    found = read(folder)
    assert [(each.name, each.path, each.sizes, each.nbytes) for each in found.entries] == [
        ("a", ("a",), (4, 3), 48),
        ("b", ("b",), (4, 3), 48),
    ]
    assert [(each.starts, each.sizes) for each in found.entries[0].chunks] == HALVES
    assert found.windows == sorted(found.windows)
    assert len(found.windows) == 4
    with_values = dcp_folders.written(tmp_path / "y", {"a": {"b": 1}, "l": [torch.ones(1), 2]})
    assert {(type(each), each.path) for each in read(with_values).entries} == {
        (Value, ("a", "b")),
        (Tensor, ("l", 0)),
        (Value, ("l", 1)),
    }


def test_is_metadata() -> None:
    assert is_metadata("x/.metadata")
    assert is_metadata("s3://bucket/x/.metadata")
    assert not is_metadata("x.metadata")
    assert not is_metadata(".metadata/x")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda said: chunk(said).__setattr__("sizes", torch.Size([1, 3])), "not all of the tensor"),
        (lambda said: chunk(said).__setattr__("sizes", torch.Size([5, 3])), "is not within a tensor"),
        (lambda said: chunk(said).__setattr__("sizes", torch.Size([2])), "more or fewer dimensions"),
        (lambda said: said.state_dict_metadata["a"].chunks.pop(), "not all of the tensor"),
        (lambda said: said.storage_data.pop(MetadataIndex("a", (2, 0))), "does not say where"),
        (lambda said: place(said).__setattr__("length", 8), "does not fit into the 8 bytes"),
        (lambda said: place(said).__setattr__("offset", 1), "lies on bytes of"),
        (lambda said: place(said).__setattr__("offset", -1), "a number is missing, or negative"),
        (lambda said: place(said).__setattr__("relative_path", "../secret"), "has '..'"),
        (lambda said: place(said).__setattr__("relative_path", "/etc/passwd"), "is an absolute path"),
        (lambda said: place(said).__setattr__("relative_path", "gone.distcp"), "missing"),
        (lambda said: said.state_dict_metadata.__setitem__("a", 5), "TensorStorageMetadata is missing"),
        (lambda said: said.__setattr__("storage_data", None), "a dict is missing"),
        (lambda said: said.__setattr__("storage_data", {1: 2}), "MetadataIndex is missing"),
        (lambda said: said.__delattr__("storage_data"), "has no 'storage_data'"),
        (lambda said: said.state_dict_metadata["a"].__delattr__("size"), "'size' is missing"),
        (lambda said: said.state_dict_metadata["a"].properties.__setattr__("layout", None), None),
        (lambda said: said.planner_data.__setitem__("a", ()), "gives a value no name"),
        (lambda said: said.planner_data.__setitem__("a", ("b",)), "two values into one place"),
        (lambda said: said.planner_data.__setitem__("a", ("b", "c")), "into"),
        (lambda said: said.planner_data.__setitem__("a", ("l", 1 << 40)), "next to nothing in it"),
        (lambda said: said.planner_data.__setitem__("a", 5), "a list is missing"),
    ],
)  # fmt: skip
def test_contradictions(folder: Path, change: Callable[[Metadata], Any], match: str | None) -> None:
    if match is None:
        dcp_folders.rewritten(folder, change)
        zipslicer.open(folder).close()  # a field that nothing depends on
        return
    refused(folder, change, match)


def test_chunks_that_overlap(tmp_path: Path) -> None:
    whole = torch.ones(4, 4)
    boxes = [((0, 0), (2, 4)), ((1, 0), (2, 4))]
    folder = dcp_folders.chunked(tmp_path / "x", {"a": (whole, boxes)})
    with pytest.raises(ArchiveError, match=r"same elements: those at \(0, 0\) and \(1, 0\)"):
        zipslicer.open(folder)


def test_many_chunks_are_compared_in_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zipslicer.dcp_metadata.COMPARED", 100)
    boxes = [((i, j), (1, 1)) for i in range(8) for j in range(8)]
    folder = dcp_folders.chunked(tmp_path / "grid", {"a": (torch.rand(8, 8), boxes)})
    assert len(read(folder).entries[0].chunks) == 64
    boxes[:2] = [((0, 0), (1, 2))]
    folder = dcp_folders.chunked(tmp_path / "none", {"a": (torch.rand(8, 8), boxes)})
    with pytest.raises(ArchiveError, match="too many chunks"):
        read(folder)
    monkeypatch.undo()
    assert len(read(folder).entries[0].chunks) == 63


def test_what_cannot_be_read_yet(folder: Path) -> None:
    refused(
        folder, lambda said: place(said).__setattr__("transform_descriptors", ["zstd"]), "extension", UnsupportedError
    )
    dcp_folders.rewritten(folder, lambda said: place(said).__setattr__("transform_descriptors", []))
    zipslicer.open(folder).close()
    refused(
        folder,
        lambda said: said.state_dict_metadata["a"].properties.__setattr__("dtype", torch.strided),
        "torch has no tensors of dtype",
        UnsupportedError,
    )


def test_an_index_twice(folder: Path) -> None:
    """A dict of Python cannot say so; a pickle can, whose keys are objects."""

    class Twice(dict[Any, Any]):
        def items(self) -> Any:
            return [*super().items(), *super().items()]

        def __reduce__(self) -> Any:
            return (dict, (), None, None, iter(self.items()))

    said = dcp_folders.metadata(folder)
    said.storage_data = Twice(said.storage_data)
    content = pickle.dumps(said, protocol=4)
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(ArchiveError):
        zipslicer.open(folder)


def test_whatever_bytes_it_has(folder: Path) -> None:
    """An error of ours, or a folder whose tensors come out right or not at all."""
    path, chance = folder / ".metadata", random.Random(1)
    good, opened = path.read_bytes(), 0
    for _ in range(300):
        content, at = bytearray(good), chance.randrange(len(good))
        if chance.random() < 0.7:
            content[at] ^= 1 << chance.randrange(8)
        else:
            del content[at : at + chance.randrange(1, 20)]
        path.write_bytes(content)
        try:
            with zipslicer.open(folder) as checkpoint:
                opened += 1
                for name, tensor in checkpoint.tensors.items():
                    assert tensor.dtype is not torch.float32 or tensor.eq(1).all(), name
        except ZipSlicerError:
            pass
    assert 0 < opened < 100


def test_it_is_no_such_pickle(folder: Path) -> None:
    path = folder / ".metadata"
    for content in (b"", b"\x80\x04N.", pickle.dumps({"a": 1}), pickle.dumps([1]), path.read_bytes()[:-40], b"{}"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            zipslicer.open(folder)
        assert caught.value.path == str(path)


def test_it_runs_nothing(folder: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.mkdir, (tmp_path / "made",))

    dcp_folders.rewritten(folder, lambda said: said.__setattr__("storage_meta", Evil()))
    assert torch.equal(zipslicer.load(folder)["a"], torch.ones(4, 3))
    assert zipslicer.scan(folder).verdict != "safe"
    assert not (tmp_path / "made").exists()
    dcp_folders.metadata(folder)  # as torch reads it
    (tmp_path / "made").rmdir()


def test_limits(folder: Path) -> None:
    with pytest.raises(ArchiveError, match="program_nbytes"):
        read(folder, program_nbytes=100)
    with pytest.raises(CheckpointError):
        read(folder, dimensions=1)


def test_shapes_beyond_any_disk(folder: Path) -> None:
    huge = torch.Size([1 << 40, 1 << 40])
    refused(folder, lambda said: said.state_dict_metadata["a"].__setattr__("size", huge), "no tensor has the shape")


def test_flat_keys_have_a_path_of_their_own(folder: Path) -> None:
    dcp_folders.rewritten(folder, lambda said: said.planner_data.pop("a"))
    assert list(zipslicer.load(folder)) == ["a", "b"]
    dcp_folders.rewritten(folder, lambda said: said.planner_data.__setitem__("a", ("deep", "a")))
    assert torch.equal(zipslicer.load(folder)["deep"]["a"], torch.ones(4, 3))
