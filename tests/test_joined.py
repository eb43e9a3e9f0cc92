"""One view over the parts of a file: it answers as the view of one program does."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import pytest

torch = pytest.importorskip("torch")

from makers import Pickle  # noqa: E402
from test_exports import FOUR_FLOATS, floats, package, script  # noqa: E402

import zipslicer  # noqa: E402
from zipslicer.errors import TableError, UnsupportedError  # noqa: E402
from zipslicer.joined import JoinedView  # noqa: E402

if TYPE_CHECKING:
    from pathlib import Path


def two_pickles() -> bytes:
    def pickled(*names: str) -> bytes:
        program = Pickle(3).raw(b"}(")
        for name in names:
            program.text(name).tensor("FloatStorage", 0, 4, size=[4], stride=[1])
        return program.text("n").integer(len(names)).raw(b"u").stop()

    return package({"a.pkl": pickled("w", "v"), "b.pkl": pickled("w")}, {"0": FOUR_FLOATS})


@pytest.fixture
def checkpoint() -> Any:
    return zipslicer.open(two_pickles())


def test_tensors_of_all_parts(checkpoint: Any) -> None:
    assert isinstance(checkpoint._view, JoinedView)
    assert list(checkpoint.tensors) == ["a.pkl:w", "a.pkl:v", "b.pkl:w"]
    assert repr(checkpoint.tensors).startswith("LazyStateDict: 3 keys, 48 B")
    assert "3 tensors, 2 storages" in repr(checkpoint)
    assert checkpoint.placeholders == {}
    assert len(checkpoint.records) == 4
    assert checkpoint.window[0] == 0
    assert checkpoint.tensors.offset_keys()[0] in checkpoint.tensors
    assert checkpoint.tensors.metadata() == {"format": "pt"}


def test_one_read_shares_memory_within_a_part(checkpoint: Any) -> None:
    made = checkpoint.tensors.get_tensors(["b.pkl:w", "a.pkl:w", "a.pkl:v"])
    assert list(made) == ["b.pkl:w", "a.pkl:w", "a.pkl:v"]
    assert made["a.pkl:w"].data_ptr() == made["a.pkl:v"].data_ptr() != made["b.pkl:w"].data_ptr()
    with pytest.raises(TypeError):
        checkpoint.tensors.get_slice("a.pkl:w")[[0]]


def test_the_root_maps_each_part_to_its_own(checkpoint: Any) -> None:
    root = checkpoint.root
    assert list(root) == ["a.pkl", "b.pkl"]
    assert root["a.pkl"] is root["a.pkl"]
    assert root["b.pkl"]["n"] == 1
    assert root.get_meta("a.pkl") is None
    assert list(root.flatten()) == ["a.pkl.w", "a.pkl.v", "b.pkl.w"]
    assert root.flatten()["b.pkl.w"].tolist() == [0, 1, 2, 3]


def test_edits_of_a_part_are_in_what_is_materialized(checkpoint: Any) -> None:
    root = checkpoint.root
    root["a.pkl"]["w"] = torch.ones(1)
    assert root.materialize()["a.pkl"]["w"].tolist() == [1]
    assert checkpoint.tensors["a.pkl:w"].tolist() == [0, 1, 2, 3]
    other = copy.deepcopy(root)
    other["b.pkl"]["w"] = 5
    assert root["b.pkl"]["w"].tolist() == [0, 1, 2, 3]
    assert other["a.pkl"]["w"].tolist() == [1]


def test_equality_is_that_of_file_and_keys(checkpoint: Any) -> None:
    assert checkpoint.tensors == checkpoint.tensors.copy() == copy.deepcopy(checkpoint.tensors)
    assert checkpoint.tensors != zipslicer.open(two_pickles()).tensors
    assert checkpoint.tensors != checkpoint.root["a.pkl"]


def test_it_pickles_by_path_with_its_edits(tmp_path: Path) -> None:
    path = tmp_path / "p.pt"
    path.write_bytes(two_pickles())
    root = zipslicer.load(path)
    root["a.pkl"]["n"] = 9
    again = pickle.loads(pickle.dumps(root))
    assert again["a.pkl"]["n"] == 9
    assert again["b.pkl"]["w"].tolist() == [0, 1, 2, 3]
    with pytest.raises(TypeError):
        pickle.dumps(zipslicer.load(two_pickles()))


def test_closing_closes_all_parts(tmp_path: Path) -> None:
    path = tmp_path / "p.pt"
    path.write_bytes(two_pickles())
    with zipslicer.open(path) as checkpoint:
        tensors = checkpoint.tensors
    for name in tensors:
        with pytest.raises((ValueError, OSError)):
            tensors[name]


def test_what_takes_one_program_says_so(checkpoint: Any) -> None:
    with pytest.raises(UnsupportedError, match="record="):
        checkpoint._view.table  # noqa: B018
    with pytest.raises(AttributeError):
        checkpoint._view.unheard_of  # noqa: B018


def test_parts_without_anything_to_list_leave_the_first_one_alone() -> None:
    content = script(Pickle().dict({"w": floats("0")}), Pickle().raw(b")"), {"data/0": FOUR_FLOATS})
    assert type(zipslicer.open(content)._view) is not JoinedView


def test_a_long_path_before_thousands_of_names_does_not_fill_the_memory() -> None:
    program = Pickle(3).raw(b"](").tensor("FloatStorage", 0, 4, size=[4], stride=[1]).put(0).raw(b"h\0" * 30_000 + b"e")
    checkpoint = zipslicer.open(package({"a" * 60_000 + ".pkl": program.stop()}, {"0": FOUR_FLOATS}))
    with pytest.raises(TableError, match="names"):
        checkpoint.tensors  # noqa: B018
    assert len(checkpoint.root) == 30_001
