"""The ranks of a machine read each byte once together, and then find it near."""

from __future__ import annotations

import io
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import zipslicer
from zipslicer.prefetch import CELL, _cells, _merged, _share

torch = pytest.importorskip("torch")

from range_server import serving  # noqa: E402


@pytest.fixture
def wanted() -> dict[str, Any]:
    torch.manual_seed(3)
    return {f"w{i}": torch.randn(700, 2048) for i in range(7)} | {"few": torch.arange(3)}


@pytest.fixture
def path(wanted: dict[str, Any], tmp_path: Path) -> Path:
    torch.save(wanted, tmp_path / "a.pth")
    return tmp_path / "a.pth"


def shares(sd: Any, world_size: int) -> list[list[tuple[int, int]]]:
    cells = list(_cells([(sd._view.table, list(sd._filed()))]))
    return [
        [extent for cell in _share(cells, rank, world_size) for extent in cell.wanted] for rank in range(world_size)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 100])
def test_shares_are_all_and_do_not_overlap(path: Path, wanted: dict[str, Any], world_size: int) -> None:
    sd = zipslicer.load(path)
    parts = shares(sd, world_size)
    extents = sorted(extent for part in parts for extent in part)
    assert all(one[0] + one[1] <= other[0] for one, other in itertools.pairwise(extents))
    total = sum(tensor.nbytes for tensor in wanted.values())
    assert total <= sum(nbytes for _, nbytes in extents) <= total + 100 * (len(wanted) + 1)
    assert max(sum(nbytes for _, nbytes in part) for part in parts) <= total / world_size + 2 * CELL
    assert {offset // CELL for offset, _ in parts[0]}.isdisjoint(
        offset // CELL for part in parts[1:] for offset, _ in part
    )


def test_what_is_selected_is_read(path: Path, wanted: dict[str, Any]) -> None:
    sd = zipslicer.load(path)
    some = sd.select("w3").prefetch()
    assert wanted["w3"].nbytes <= some <= wanted["w3"].nbytes + 200
    assert sd.select("few").prefetch(rank=1, world_size=2) + sd.select("few").prefetch(rank=0, world_size=2) < 200
    assert zipslicer.open(path).tensors.prefetch(progress=False, threads=1) > 40_000_000
    del sd["few"]
    sd["few"] = torch.ones(3)
    assert sd.prefetch() > 40_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/io")
def test_each_byte_is_read_once(path: Path, wanted: dict[str, Any]) -> None:
    def rchar() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    sd = zipslicer.load(path)
    sd.prefetch(rank=0, world_size=9)  # what is imported first
    before = rchar()
    counts = [sd.prefetch(rank=rank, world_size=3) for rank in range(3)]
    read = rchar() - before
    assert sum(counts) <= read <= 1.01 * sum(counts)
    assert sum(counts) <= 1.01 * path.stat().st_size


def test_shards_deflated_records_and_ties(tmp_path: Path, wanted: dict[str, Any]) -> None:
    import zipfile

    tied = {"a": wanted["w0"], "b": wanted["w0"], "c": wanted["w0"][3:5]}
    torch.save(tied, tmp_path / "1.bin")
    assert zipslicer.load(tmp_path / "1.bin").prefetch() <= wanted["w0"].nbytes + 200
    torch.save({"w": wanted["w1"]}, tmp_path / "2.bin")
    index = {"weight_map": {**dict.fromkeys(tied, "1.bin"), "w": "2.bin"}}
    (tmp_path / "x.index.json").write_text(json.dumps(index))
    sd = zipslicer.load(tmp_path / "x.index.json")
    assert sum(sd.prefetch(rank=rank, world_size=2) for rank in range(2)) >= 2 * wanted["w1"].nbytes
    with zipfile.ZipFile(tmp_path / "1.bin") as source, zipfile.ZipFile(tmp_path / "3.bin", "w", 8) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert 0 < zipslicer.load(tmp_path / "3.bin").prefetch() <= (tmp_path / "3.bin").stat().st_size


def test_what_keeps_nothing(path: Path) -> None:
    for source in (path.read_bytes(), io.BytesIO(path.read_bytes())):
        with pytest.raises(ValueError, match="nothing would keep"):
            zipslicer.load(source).prefetch()
    sd = zipslicer.load(path)
    for rank, world_size in ((1, 1), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="there is no rank"):
            sd.prefetch(rank=rank, world_size=world_size)


def test_an_empty_mapping(path: Path) -> None:
    assert zipslicer.load(path).select("nothing*").prefetch() == 0


def test_extents_that_touch_are_one() -> None:
    assert _merged(iter([(5, 5), (0, 5), (20, 1), (7, 1), (21, 4)])) == [(0, 10), (20, 5)]


def test_by_url_with_a_cache(path: Path, wanted: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    pytest.importorskip("aiohttp")
    with serving() as server:
        server.objects["/a.pth"] = path.read_bytes()
        url = f"{server.url}/a.pth"
        with pytest.raises(ValueError, match="cache_dir"):
            zipslicer.load(url).prefetch()
        ranks = [zipslicer.load(url, cache_dir=tmp_path / "cache") for _ in range(3)]
        server.log.clear()
        for rank, sd in enumerate(ranks):
            sd.prefetch(rank=rank, world_size=3)
        assert server.nbytes <= 1.01 * path.stat().st_size
        server.log.clear()
        assert all(torch.equal(ranks[0][name], tensor) for name, tensor in wanted.items())
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in ranks[1].materialize().items())
        assert server.nbytes <= 1 << 20  # of the end, where a part of the grid is cut short
