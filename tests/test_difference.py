"""differences: names, shapes, dtypes and values of two checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("numpy")

import zipslicer  # noqa: E402
import zipslicer.difference  # noqa: E402
from zipslicer.difference import Difference, differences  # noqa: E402


def base() -> dict[str, Any]:
    return {
        "w": torch.arange(60.0).view(6, 10),
        "turned": torch.arange(60.0).view(6, 10).t(),
        "nan": torch.tensor([math.nan, 1.0, math.inf]),
        "ids": torch.arange(5),
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.empty(2, device="meta"),
        "storage": torch.arange(3).untyped_storage(),
        "none": torch.empty(0, 2),
        "step": 3,
    }


def found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: dict[str, Any], **keywords: Any
) -> dict[str, Difference]:
    monkeypatch.setattr(zipslicer.values, "CHUNK_NBYTES", 64)
    torch.save(base(), tmp_path / "a.pt")
    torch.save(after, tmp_path / "b.pt")
    with zipslicer.load(tmp_path / "a.pt") as one, zipslicer.load(tmp_path / "b.pt") as other:
        return {each.name: each for each in differences(one, other, **keywords)}


def test_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    after = base()
    after["turned"] = after["turned"].contiguous()  # its bytes lie otherwise, and its numbers are the same
    after["step"] = 4  # no tensor
    assert found(tmp_path, monkeypatch, after) == {}


def test_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    after = base()
    after["w"][2, 3] += 2
    after["w"][5, 5] = math.nan
    del after["turned"]
    after["ids"] = after["ids"].int()
    after["new"] = torch.ones(1)
    after["sparse"] = torch.eye(3)
    after["nan"] = torch.tensor([math.nan, 1.5, 0.0])
    after["none"] = torch.empty(2, 0)
    after["storage"] = torch.arange(1, 4).untyped_storage()
    got = found(tmp_path, monkeypatch, after)
    kinds = {name: each.kind for name, each in got.items()}
    assert kinds == {
        "w": "values", "turned": "removed", "nan": "values", "ids": "dtype", "sparse": "kind", "storage": "values",
        "none": "shape", "new": "added",
    }  # fmt: skip
    change = got["w"].change
    assert change is not None
    assert (change.differing, change.numel, change.largest, change.norm) == (2, 60, 2.0, 2.0)
    assert change.relative == pytest.approx(2 / float(base()["w"].norm()))
    assert got["ids"].change is not None
    assert (got["ids"].change.differing, got["ids"].change.numel) == (0, 5)
    assert got["nan"].change is not None
    assert (got["nan"].change.differing, got["nan"].change.largest) == (2, 0.5)
    assert got["turned"].after is None
    assert got["new"].before is None


def test_nothing_is_read_where_it_is_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    after = base()
    after["w"] += 1
    after["ids"] = after["ids"].int()
    got = found(tmp_path, monkeypatch, after, values=False)
    assert {name: (each.kind, each.change) for name, each in got.items()} == {"ids": ("dtype", None)}


def test_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    after = base()
    after["sparse"] = (torch.eye(3) * 2).to_sparse()
    change = found(tmp_path, monkeypatch, after)["sparse"].change
    assert change is not None
    assert (change.differing, change.numel) == (3, 9)  # of six indices and three values


def test_shards_and_a_storage_that_became_a_tensor(tmp_path: Path) -> None:
    torch.save({"s": torch.arange(4, dtype=torch.uint8).untyped_storage()}, tmp_path / "1.bin")
    torch.save({"w": torch.ones(3)}, tmp_path / "2.bin")
    (tmp_path / "a.bin.index.json").write_text('{"weight_map": {"w": "2.bin", "s": "1.bin"}}')
    torch.save({"w": torch.ones(3), "s": torch.tensor([0, 1, 2, 5], dtype=torch.uint8)}, tmp_path / "b.pt")
    with zipslicer.load(tmp_path / "a.bin.index.json") as one, zipslicer.load(tmp_path / "b.pt") as other:
        (got,) = differences(one, other)
    assert (got.name, got.kind) == ("s", "values")
    assert got.change is not None
    assert got.change.differing == 1


def test_terabytes_that_are_four_bytes(tmp_path: Path) -> None:
    for name, value in (("a.pt", 3.0), ("b.pt", 4.0)):
        torch.save({"w": torch.tensor([value]).expand(1 << 40)}, tmp_path / name)
    with zipslicer.load(tmp_path / "a.pt") as one, zipslicer.load(tmp_path / "b.pt") as other:
        (each,) = differences(one, other)
    assert each.change == (1 << 40, 1 << 40, 1.0, float(1 << 20), 1 / 3)


@pytest.mark.parametrize("framework", ["pt", "np"])
def test_elements_that_are_no_numbers(framework: str, tmp_path: Path) -> None:
    for name, value in (("a.pt", 3), ("b.pt", 4)):
        torch.save({"w": torch.tensor([1, value], dtype=torch.uint8).view(torch.bits8)}, tmp_path / name)
    one = zipslicer.load(tmp_path / "a.pt", framework=framework)
    other = zipslicer.load(tmp_path / "b.pt", framework=framework)
    (each,) = differences(one, other)
    assert each.change is not None
    assert (each.change.differing, each.change.numel) == (1, 2)
