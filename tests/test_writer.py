"""save and Writer: what they write is what torch.load and zipslicer read; and the file at a path is the old or the new one."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import conformance  # noqa: E402
import makers  # noqa: E402
import test_conformance as conforming  # noqa: E402
from conformance import CASES, REFUSALS, Case, Inert, Loads  # noqa: E402

import zipslicer  # noqa: E402
from zipslicer.comparison import compare  # noqa: E402
from zipslicer.errors import UnsupportedError  # noqa: E402
from zipslicer.joined import JoinedView  # noqa: E402

MANY_NBYTES = 1 << 30  # of a case's file that nobody copies


class Point:
    def __init__(self, x: int) -> None:
        self.x = x
        self.me: Any = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Point) and self.x == other.x

    __hash__ = None  # type: ignore[assignment]


def saved(obj: Any, path: Path, **keywords: Any) -> Path:
    zipslicer.save(obj, path, **keywords)
    return path


# ---------------------------------------------------------------- what torch.save writes, once more


def is_code(checkpoint: zipslicer.Checkpoint) -> bool:
    """Whether it is TorchScript or a package, which save() refuses."""
    return any(record.endswith(("constants.pkl", "extern_modules")) for record in checkpoint.records)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("case", [case for case in CASES if case.number not in REFUSALS], ids=str)
def test_a_case_goes_through_save(case: Case, tmp_path: Path) -> None:
    outcome = case.make(tmp_path)
    assert isinstance(outcome, Loads)
    if outcome.huge:
        pytest.skip("4 GiB")
    path, copy = conforming.placed(outcome.file, tmp_path), tmp_path / "copy.pt"
    with zipslicer.open(path, **outcome.keywords) as checkpoint:
        if is_code(checkpoint):
            with pytest.raises(UnsupportedError):
                zipslicer.save(checkpoint, copy)
            assert not copy.exists()
            return
        zipslicer.save(checkpoint, copy)
        whole = compare(checkpoint)
        if isinstance(checkpoint._view, JoinedView):  # of which the root alone is saved
            assert list(zipslicer.load(copy)) == list(checkpoint.root)
            return
    inerts = modernized(outcome.tree)
    conforming.check_loads(dataclasses.replace(outcome, file=copy, keywords={}), tmp_path)
    with zipslicer.open(copy) as again:
        again.verify()
        found = compare(again)
        if whole.difference is None and not outcome.keywords:
            assert found.difference is None
        if whole.refused is None and whole.difference is None:
            assert found.refused is None, found.refused
            assert (found.tensors, found.nbytes, found.values) == (whole.tensors, whole.nbytes, whole.values)
    if not inerts and outcome.listed is None:
        zipslicer.save(outcome.tree, copy)
        metas = {name: location for name, location in outcome.locations.items() if location == "meta"}
        here = dataclasses.replace(outcome, file=copy, keywords={}, location="cpu", locations=metas)
        conforming.check_loads(here, tmp_path)


def modernized(tree: Any) -> list[Inert]:
    """What is inert in a tree, which is called from now on as Python 3 calls it: so save() writes it."""
    found, todo, seen = [], [tree], set()
    while todo:
        each = todo.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, Inert):
            found.append(each)
            module, _, name = each.qualified.rpartition(".")
            names = {"__builtin__": "builtins", "exceptions": "builtins", "copy_reg": "copyreg"}
            object.__setattr__(each, "qualified", f"{names.get(module, module)}.{name}")
            todo += [each.args, each.state, each.list_items, each.items, each.kwargs]
        elif isinstance(each, (dict, list, tuple, set)):
            todo += [*each, *each.values()] if isinstance(each, dict) else each
    return found


def rows_to_copy() -> list[Any]:
    rows = conforming.rows_elsewhere()
    return [row for row in rows if row.values[0] is None or is_to_copy(row.values[0])]


def is_to_copy(row: dict[str, Any]) -> bool:
    return row["loader"] in ("load", "placeholder") and row["bytes"] < MANY_NBYTES


@pytest.mark.parametrize("row", rows_to_copy())
def test_a_case_made_elsewhere_goes_through_save(row: dict[str, Any], tmp_path: Path) -> None:
    path, copy = Path(str(conforming.ELSEWHERE)) / row["file"], tmp_path / "copy.pt"
    for index, window in enumerate(row.get("windows") or [None]):
        with zipslicer.open(path, window=window and tuple(window)) as checkpoint:
            if is_code(checkpoint):
                continue
            zipslicer.save(checkpoint, copy)
        inside = row["tensors"]
        if window is not None:
            inside = {p: facts for p, facts in inside.items() if p.startswith(f"{index}:")}
        conforming.open_elsewhere(copy, {**row, "tensors": inside})
        if row["torch_weights_only"]:
            torch.load(copy, weights_only=True, map_location="cpu", mmap=True)


# ---------------------------------------------------------------- tensors of this process


def test_a_dtype_that_would_change_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="all of this process"):
        zipslicer.save({"w": torch.ones(2)}, tmp_path / "a.pth", dtype=torch.float16)
    assert not list(tmp_path.iterdir())
    zipslicer.save({"epoch": 3}, tmp_path / "a.pth", dtype=torch.float16)
    torch.save({"w": torch.ones(2)}, tmp_path / "b.pth")
    sd = zipslicer.load(tmp_path / "b.pth")
    sd["own"] = torch.ones(2)
    zipslicer.save(sd, tmp_path / "c.pth", dtype=torch.float16)
    assert [value.dtype for value in torch.load(tmp_path / "c.pth").values()] == [torch.float16, torch.float32]


def test_a_name_that_says_safetensors(tmp_path: Path) -> None:
    for write in (lambda path: zipslicer.save({"w": torch.ones(1)}, path), zipslicer.Writer):
        with pytest.raises(ValueError, match=r"zipslicer\.convert writes safetensors"):
            write(tmp_path / "a.safetensors")
    torch.save({"w": torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="another format"):
        zipslicer.convert(tmp_path / "a.pth", tmp_path / "a.safetensors", format="torch")
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_tensors_of_any_kind(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    parameter = torch.nn.Parameter(base.clone(), requires_grad=False)
    parameter.note = "mine"
    tree = {
        "base": base,
        "view": base[1:3].t(),
        "flat": base.view(-1),
        "expanded": base[:1].expand(9, 6),
        "parameter": parameter,
        "grad": base.clone().requires_grad_(),
        "sparse": base.to_sparse(),
        "csr": base.to_sparse_csr(),
        "conj": torch.ones(2, dtype=torch.complex64).conj(),
        "quantized": torch.quantize_per_tensor(base, 0.1, 3, torch.qint8),
        "meta": base.to("meta"),
        "u16": base.to(torch.uint16),
        "f8": base.to(torch.float8_e5m2),
        "bf16": base.bfloat16(),
        "bool": base > 3,
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
        "storage": torch.arange(5).untyped_storage(),
    }
    path = saved(tree, tmp_path / "a.pt")
    torch.save(tree, tmp_path / "theirs.pt")
    ours, theirs = torch.load(path, weights_only=True), torch.load(tmp_path / "theirs.pt", weights_only=True)
    assert conformance.differences(theirs, ours, zipslicer.describe) == []
    assert ours["base"].data_ptr() == ours["flat"].data_ptr() == ours["expanded"].data_ptr()
    assert torch.load(path, weights_only=True, mmap=True)["base"].tolist() == base.tolist()
    with zipslicer.open(path) as checkpoint:
        checkpoint.verify()
        assert compare(checkpoint).difference is None


def test_tensors_that_are_not_plain_go_the_way_of_torch(tmp_path: Path) -> None:
    hooked = torch.ones(2, requires_grad=True)
    hooked.register_hook(lambda grad: grad)
    with pytest.warns(UserWarning, match="hooks"):
        zipslicer.save({"w": hooked}, tmp_path / "a.pt")
    with pytest.raises((RuntimeError, NotImplementedError)):
        zipslicer.save({"w": torch._efficientzerotensor((3,))}, tmp_path / "a.pt")
    noted = torch.ones(2)
    noted.note = "x"
    for name, value in {"noted": noted, "grad": torch.ones(2, requires_grad=True) * 2}.items():
        got = torch.load(saved({name: value}, tmp_path / "b.pt"), weights_only=True)[name]
        torch.save({name: value.detach() if name == "grad" else value}, tmp_path / "c.pt")
        assert got.tolist() == torch.load(tmp_path / "c.pt", weights_only=True)[name].tolist()
        assert getattr(got, "note", None) == getattr(value, "note", None)
        assert got.requires_grad == value.requires_grad


# ---------------------------------------------------------------- what is lazy


@pytest.fixture
def source(tmp_path: Path) -> Path:
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.BatchNorm1d(30), torch.nn.Linear(30, 2))
    path = tmp_path / "source.pt"
    torch.save({"model": model.state_dict(), "step": 3, "history": [torch.ones(2), {"lr": 0.1}]}, path)
    return path


def test_nothing_is_read_of_what_is_copied(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import sys, zipslicer
sd = zipslicer.load(sys.argv[1])
zipslicer.save(sd, sys.argv[2])
zipslicer.save(sd["model"].select("*.weight"), sys.argv[3])
with zipslicer.Writer(sys.argv[4]) as w:
    w["model"] = sd["model"]
assert "torch" not in sys.modules and "numpy" not in sys.modules
"""
    outs = [tmp_path / name for name in ("a.pt", "b.pt", "c.pt")]
    subprocess.run([sys.executable, "-c", code, source, *outs], check=True, cwd="/")
    wanted = torch.load(source, weights_only=True)
    got = torch.load(outs[0], weights_only=True)
    assert conformance.differences(wanted, got, zipslicer.describe) == []
    assert got["model"]._metadata == wanted["model"]._metadata
    part = torch.load(outs[1], weights_only=True)
    assert list(part) == ["0.weight", "1.weight", "2.weight"]
    assert part._metadata == wanted["model"]._metadata
    assert conformance.differences(wanted["model"], torch.load(outs[2])["model"], zipslicer.describe) == []


def test_edits_are_written(source: Path, tmp_path: Path) -> None:
    sd = zipslicer.load(source)
    sd["model"].rename(lambda key: f"net.{key}")
    del sd["model"]["net.1.running_mean"]
    sd["model"]["extra"] = torch.full((3,), 7.0)
    sd["history"][1]["lr"] = 0.5
    wanted = sd.materialize()
    sd["other"] = {"copy": sd["history"], "tied": sd["model"]}
    got = torch.load(saved(sd, tmp_path / "a.pt"), weights_only=True)
    wanted["other"] = {"copy": wanted["history"], "tied": wanted["model"]}
    assert conformance.differences(wanted, got, zipslicer.describe) == []
    assert got["other"]["tied"] is got["model"]
    assert got["other"]["copy"] is got["history"]
    assert got["history"][1] == {"lr": 0.5}
    assert got["model"]["extra"].tolist() == [7.0] * 3


def test_a_file_is_saved_onto_itself(source: Path) -> None:
    wanted = torch.load(source, weights_only=True)
    sd = zipslicer.load(source)
    sd["step"] = 4
    zipslicer.save(sd, source)
    wanted["step"] = 4
    assert conformance.differences(wanted, torch.load(source, weights_only=True), zipslicer.describe) == []
    assert torch.equal(sd["model"]["0.weight"], wanted["model"]["0.weight"])  # out of the file that was opened


def test_a_selection_takes_no_more_of_a_storage_than_it_needs(tmp_path: Path) -> None:
    flat = torch.arange(100_000, dtype=torch.int16)
    tree = {"a": flat[10_001:10_011], "b": flat[10_021:10_041:2], "far": flat[90_000:], "none": flat[5:5], "all": flat}
    torch.save(tree, tmp_path / "flat.pt")
    with zipslicer.load(tmp_path / "flat.pt") as sd:
        path = saved(sd.select("a", "b", "none"), tmp_path / "part.pt")
        assert path.stat().st_size < 2000
        got = torch.load(path, weights_only=True)
        assert {key: value.tolist() for key, value in got.items()} == {
            key: tree[key].tolist() for key in ("a", "b", "none")
        }
        assert got["a"].untyped_storage().data_ptr() == got["b"].untyped_storage().data_ptr()
        zipslicer.open(path).verify()
        # What the other mapping needs lies elsewhere.
        both = torch.load(saved([sd.select("a"), {"x": sd.select("far")}], tmp_path / "both.pt"), weights_only=True)
        assert torch.equal(both[1]["x"]["far"], tree["far"])
        assert torch.equal(both[0]["a"], tree["a"])
        whole = torch.load(saved(sd, tmp_path / "whole.pt"), weights_only=True)
        assert whole["a"].untyped_storage().nbytes() == 200_000


def test_checksums_are_passed_on(source: Path, tmp_path: Path) -> None:
    """Damage that was visible before is visible afterwards, and no other."""
    content = bytearray(source.read_bytes())
    content[makers.payload_offset(source, "data/0") + 5] ^= 4
    source.write_bytes(content)
    with pytest.raises(zipslicer.ArchiveError):
        zipslicer.load(saved(zipslicer.load(source), tmp_path / "a.pt"), verify=True)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(1000)}, source)
    finally:
        torch.serialization.set_crc32_options(True)
    assert zipslicer.open(saved(zipslicer.load(source), tmp_path / "a.pt")).verify().unchecked == ()


def test_what_changes_meanwhile_is_an_error(source: Path, tmp_path: Path) -> None:
    sd = zipslicer.load(source)
    with open(source, "r+b") as file:
        file.truncate(source.stat().st_size - 100)
    with pytest.raises(zipslicer.CheckpointError):
        zipslicer.save(sd, tmp_path / "a.pt")
    assert os.listdir(tmp_path) == ["source.pt"]


def test_where_the_kernel_copies_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any) -> int:
        raise OSError(18, "Invalid cross-device link")

    wanted = torch.load(source, weights_only=True)
    monkeypatch.setattr(os, "copy_file_range", refuses, raising=False)
    got = torch.load(saved(zipslicer.load(source), tmp_path / "a.pt"), weights_only=True)
    assert conformance.differences(wanted, got, zipslicer.describe) == []
    zipslicer.open(tmp_path / "a.pt").verify()
    content = source.read_bytes()
    got = torch.load(saved(zipslicer.load(content), tmp_path / "b.pt"), weights_only=True)
    assert conformance.differences(wanted, got, zipslicer.describe) == []
    assert len(zipslicer.open(tmp_path / "b.pt").verify().unchecked) == 0


def test_a_checkpoint_is_edited_without_its_classes(tmp_path: Path) -> None:
    config = argparse.Namespace(lr=0.1, names=["a"], deep=Point(2))
    tree = {"state_dict": {"w": torch.ones(3)}, "config": config, "cls": Point}
    torch.save(tree, tmp_path / "a.pt")
    sd = zipslicer.load(tmp_path / "a.pt")
    sd["config"].names.append("b")  # what a placeholder holds is the user's, as any list is
    sd["epoch"] = 9
    got = torch.load(saved(sd, tmp_path / "b.pt"), weights_only=False)
    assert got["config"] == argparse.Namespace(lr=0.1, names=["a", "b"], deep=Point(2))
    assert (got["cls"], got["epoch"]) == (Point, 9)
    kept = zipslicer.load(tmp_path / "a.pt").materialize()
    again = torch.load(saved(kept, tmp_path / "c.pt"), weights_only=False)
    assert again["config"] == tree["config"]
    module = torch.nn.Linear(2, 3)
    torch.save(module, tmp_path / "m.pt")
    whole = torch.load(saved(zipslicer.open(tmp_path / "m.pt"), tmp_path / "n.pt"), weights_only=False)
    assert torch.equal(whole.weight, module.weight)
    listed = torch.load(saved(zipslicer.open(tmp_path / "m.pt").tensors, tmp_path / "n.pt"), weights_only=True)
    assert list(listed) == ["weight", "bias"]


def test_shards_become_one_file(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3), "tied": torch.zeros(2)}, tmp_path / "1.bin")
    torch.save({"b": torch.full((2,), 5.0)}, tmp_path / "2.bin")
    index = {"weight_map": {"a": "1.bin", "tied": "1.bin", "b": "2.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with zipslicer.load(tmp_path / "pytorch_model.bin.index.json") as sd:
        got = torch.load(saved(sd, tmp_path / "one.bin"), weights_only=True)
    assert {key: value.tolist() for key, value in got.items()} == {"a": [1.0] * 3, "tied": [0.0] * 2, "b": [5.0] * 2}


# ---------------------------------------------------------------- Writer


def test_a_writer(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    embedding = torch.arange(6.0).view(2, 3)
    with zipslicer.Writer(path, metadata=collections.OrderedDict(version=1)) as w:
        w["embedding"] = embedding
        model, optimizer = w.group("model"), w.group("optimizer")
        buffer = torch.empty(4)
        for i in range(3):  # by turns, and out of one buffer
            model[f"w{i}"] = buffer.fill_(i)
            optimizer[i] = {"step": i, "m": torch.full((2,), float(i))}
        w["head"] = embedding.t()  # tied
        model.group("deeper", metadata={"": {"version": 2}})["x"] = 1
        w.write_chunks(
            "long", (torch.full((2, 3), float(i)).half() for i in range(3)), dtype=torch.float16, shape=(6, 3)
        )
        w.write_chunks("none", [], dtype="bfloat16", shape=(0, 4))
        w.write_chunks("raw", [b"\1\0", b"", b"\2\0\3\0"], dtype="int16", shape=[3])
        assert not path.exists()
    got = torch.load(path, weights_only=True)
    assert list(got) == ["embedding", "model", "optimizer", "head", "long", "none", "raw"]
    assert got._metadata == collections.OrderedDict(version=1)
    assert [got["model"][f"w{i}"].tolist() for i in range(3)] == [[0.0] * 4, [1.0] * 4, [2.0] * 4]
    assert got["optimizer"][2]["m"].tolist() == [2.0, 2.0]
    assert got["model"]["deeper"]._metadata == {"": {"version": 2}}
    assert torch.equal(got["head"], embedding.t())
    assert got["head"].data_ptr() == got["embedding"].data_ptr()
    assert got["long"].tolist() == torch.arange(3.0).repeat_interleave(6).view(6, 3).tolist()
    assert (got["none"].shape, got["none"].dtype) == ((0, 4), torch.bfloat16)
    assert got["raw"].tolist() == [1, 2, 3]
    zipslicer.open(path).verify()


def test_selections_one_after_the_other(tmp_path: Path) -> None:
    flat = torch.arange(100_000, dtype=torch.float32)
    torch.save({"a": flat[:10], "b": flat[50_000:50_010]}, tmp_path / "flat.pt")
    with zipslicer.load(tmp_path / "flat.pt") as sd, zipslicer.Writer(tmp_path / "a.pt") as w:
        w["one"] = sd.select("a")
        w["two"] = sd.select("b")
        w["again"] = sd.select("b")
    assert (tmp_path / "a.pt").stat().st_size < 3000
    got = torch.load(tmp_path / "a.pt", weights_only=True)
    assert got["two"]["b"].tolist() == list(range(50_000, 50_010))
    assert got["two"]["b"].data_ptr() == got["again"]["b"].data_ptr()


def test_the_dtype_that_a_file_was_opened_with(source: Path, tmp_path: Path) -> None:
    with zipslicer.load(source, dtype=torch.float64) as sd:
        got = torch.load(saved(sd, tmp_path / "a.pt"), weights_only=True)
        assert conformance.differences(sd.materialize(), got, zipslicer.describe) == []
        half = torch.load(saved(sd, tmp_path / "a.pt", dtype="float16"), weights_only=True)
    assert got["model"]["0.weight"].dtype == torch.float64
    assert half["model"]["0.weight"].dtype == torch.float16
    assert half["model"]["1.num_batches_tracked"].dtype == torch.int64


def test_a_foreign_byte_order_is_cast(tmp_path: Path) -> None:
    content = io.BytesIO()
    torch.save({"w": torch.arange(6, dtype=torch.float32)}, content)
    swap: dict[str, Callable[[bytes], bytes]] = {"data/0": byte_swapped, "byteorder": lambda _: b"big"}
    made = makers.edited(
        content.getvalue(), lambda name, data: next((f(data) for end, f in swap.items() if name.endswith(end)), data)
    )
    got = torch.load(saved(zipslicer.load(made.data), tmp_path / "a.pt", dtype="bfloat16"), weights_only=True)
    assert (got["w"].dtype, got["w"].tolist()) == (torch.bfloat16, [0, 1, 2, 3, 4, 5])


def byte_swapped(data: bytes) -> bytes:
    return b"".join(data[i : i + 4][::-1] for i in range(0, len(data), 4))


def test_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"

    def chunks(w: zipslicer.Writer) -> Any:
        w["within"] = 1
        yield b""

    w = zipslicer.Writer(path)
    with pytest.raises(ValueError, match="another tensor is being written"):
        w.write_chunks("x", chunks(w), dtype="uint8", shape=(0,))
    w.discard()
    with zipslicer.Writer(path) as w:
        w["a"] = 1
        with pytest.raises(KeyError):
            w["a"] = 2  # which did no harm
        w["b"] = 3
    assert torch.load(path) == {"a": 1, "b": 3}


def test_progress(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tqdm = pytest.importorskip("tqdm.auto")
    bars: list[Any] = []

    class Bar(tqdm.tqdm):  # type: ignore[misc,name-defined]
        def __init__(self, *args: Any, **keywords: Any) -> None:
            super().__init__(*args, **keywords, file=io.StringIO())
            bars.append(self)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    with zipslicer.open(source) as checkpoint:
        whole = sum(checkpoint.tensors[name].nbytes for name in checkpoint.tensors)
        saved(checkpoint, tmp_path / "a.pt", progress=True)
        saved(checkpoint.root, tmp_path / "a.pt", progress=True)
        saved(checkpoint.tensors.select("model.0.weight"), tmp_path / "a.pt", progress=True)
    assert [bar.total for bar in bars] == [whole, whole, 4800]
    assert [bar.n for bar in bars] == [bar.total for bar in bars]


def test_update(source: Path, tmp_path: Path) -> None:
    flat = torch.arange(1000)
    torch.save({"a": flat[10:20], "b": flat[15:30], "whole": flat}, tmp_path / "flat.pt")
    with zipslicer.load(source) as sd, zipslicer.load(tmp_path / "flat.pt") as views:
        part = views.select("a", "b")
        part["mine"] = torch.ones(2)
        with zipslicer.Writer(tmp_path / "a.pt", dtype="float16") as w:
            w.update(sd)
            w.group("views").update(part)
            w.group("plain").update({"x": [1], "y": flat[:3].clone()})
    got = torch.load(tmp_path / "a.pt", weights_only=True)
    assert list(got) == ["model", "step", "history", "views", "plain"]
    assert got["model"]["0.weight"].dtype == torch.float16
    assert got["model"]._metadata is not None
    assert got["views"]["a"].tolist() == list(range(10, 20))
    assert got["views"]["a"].untyped_storage().nbytes() == 160
    assert got["views"]["a"].untyped_storage().data_ptr() == got["views"]["b"].untyped_storage().data_ptr()
    assert (got["views"]["mine"].dtype, got["plain"]["y"].tolist()) == (torch.float32, [0, 1, 2])


def written(path: Path, act: Callable[[zipslicer.Writer], None]) -> None:
    with zipslicer.Writer(path) as w:
        w["a"] = torch.ones(1000)
        act(w)


def test_a_writer_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = saved({"old": 1}, tmp_path / "a.pt")

    def short() -> Any:
        yield torch.ones(2)

    def broken() -> Any:
        yield torch.ones(2)
        raise OSError(5, "no more")

    wrong: list[tuple[Any, type[Exception]]] = [
        (lambda w: w.write_chunks("x", short(), dtype=torch.float32, shape=(3,)), ValueError),
        (lambda w: w.write_chunks("x", short(), dtype=torch.float32, shape=(1,)), ValueError),
        (lambda w: w.write_chunks("x", short(), dtype=torch.float64, shape=(1,)), ValueError),
        (lambda w: w.write_chunks("x", short(), dtype="int7", shape=(1,)), ValueError),
        (lambda w: w.write_chunks("x", short(), dtype="int8", shape=(-1,)), ValueError),
        (lambda w: w.write_chunks("x", broken(), dtype=torch.float32, shape=(4,)), OSError),
        (lambda w: w.__setitem__("x", {"y": sys}), TypeError),
        (lambda w: w.__setitem__("a", 1), KeyError),
        (lambda w: w.group("a"), KeyError),
    ]
    for act, error in wrong:
        with pytest.raises(error):
            written(path, act)
        assert os.listdir(tmp_path) == ["a.pt"]
        assert zipslicer.load(path)["old"] == 1
    w = zipslicer.Writer(path)
    with pytest.raises(TypeError):
        w["x"] = {"y": sys}
    with pytest.raises(ValueError, match="given up"):
        w["y"] = 1  # half an item is in it
    with pytest.raises(ValueError, match="given up"):
        w.close()
    with pytest.raises(ValueError, match="finished"):
        w["z"] = 1
    with zipslicer.Writer(path) as w:
        group = w.group("g")
    with pytest.raises(ValueError, match="finished"):
        group["late"] = 1
    w.close()  # a second time
    assert torch.load(path) == {"g": {}}
    w = zipslicer.Writer(path)
    w.discard()
    del w
    assert os.listdir(tmp_path) == ["a.pt"]


def test_arrays_become_tensors_where_asked_for(tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    tree = {"a": array, "t": array.T, "text": np.array(["x"]), "big": array.astype(">f4"), "again": array}
    with zipslicer.load(saved(tree, tmp_path / "a.pt", framework="np"), framework="np") as sd:
        assert [info and info.dtype_name for info in map(sd.get_meta, sd)] == [
            "float16",
            "float16",
            None,
            None,
            "float16",
        ]
        assert sd["a"].tolist() == array.tolist()
        assert sd["t"].tolist() == array.T.tolist()
        assert sd.get_meta("a").storage_key == sd.get_meta("again").storage_key
        sd["new"] = np.ones(3, np.int8)
        again = torch.load(saved(sd, tmp_path / "b.pt"), weights_only=False)
    assert (again["new"].dtype, again["new"].tolist()) == (torch.int8, [1, 1, 1])
    plain = torch.load(saved({"a": array}, tmp_path / "c.pt"), weights_only=False)
    assert type(plain["a"]) is np.ndarray
    with zipslicer.Writer(tmp_path / "d.pt", framework="np") as w:
        w["x"] = array
        w.write_chunks("y", [array[:1], array[1:]], dtype=array.dtype, shape=array.shape)
    got = torch.load(tmp_path / "d.pt", weights_only=True)
    assert torch.equal(got["x"], got["y"])
    with pytest.raises(ValueError, match="framework"):
        zipslicer.save({}, tmp_path / "e.pt", framework="jax")


# ---------------------------------------------------------------- where it goes


def test_file_objects_and_pipes(source: Path, tmp_path: Path) -> None:
    wanted = torch.load(source, weights_only=True)
    buffer = io.BytesIO(b"before")
    buffer.seek(0, io.SEEK_END)
    zipslicer.save(zipslicer.load(source), buffer)
    assert not buffer.closed
    content = buffer.getvalue()
    got = torch.load(io.BytesIO(content[6:]), weights_only=True)
    assert conformance.differences(wanted, got, zipslicer.describe) == []
    with zipslicer.open(content, window=(6, len(content) - 6)) as checkpoint:
        checkpoint.verify()
    if os.path.exists("/dev/stdout"):
        code = "import sys, zipslicer; zipslicer.save(zipslicer.load(sys.argv[1]), '/dev/stdout')"
        done = subprocess.run([sys.executable, "-c", code, source], check=True, capture_output=True, cwd="/")
        got = torch.load(io.BytesIO(done.stdout), weights_only=True)
        assert conformance.differences(wanted, got, zipslicer.describe) == []


def test_the_name_of_the_root_is_that_of_torch(tmp_path: Path) -> None:
    for name in ("model.pth", "a.b.pt", ".hidden", "caf\u00e9.pt", "plain", "trail."):
        archive = zipfile.ZipFile(saved({"w": torch.ones(1)}, tmp_path / name))
        roots = {member.partition("/")[0] for member in archive.namelist()}
        if name in (".hidden", "caf\u00e9.pt"):
            assert roots == {"archive"}
        else:
            torch.save({"w": torch.ones(1)}, tmp_path / name)
            assert roots == {zipfile.ZipFile(tmp_path / name).namelist()[0].partition("/")[0]}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells the peak of a process")
@pytest.mark.skipif("ZIPSLICER_SANITIZED" in os.environ, reason="a sanitizer has memory of its own")
def test_memory_is_that_of_a_chunk(tmp_path: Path) -> None:
    """192 MB go in and come out by chunks, in a process that has 96 MB more than it had."""
    code = """
import os, sys, zipslicer
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) << 10
path, copy = sys.argv[1:]
with zipslicer.Writer(path) as w:
    w.write_chunks("warm", [bytes(1 << 20)], dtype="uint8", shape=(1 << 20,))
before = peak()
def chunks():
    for i in range(192):
        yield bytes([i]) * (1 << 20)
with zipslicer.Writer(path) as w:
    w.write_chunks("w", chunks(), dtype="uint8", shape=(192 << 20,))
del os.copy_file_range
zipslicer.save(zipslicer.load(path), copy)
assert peak() - before < 96 << 20, (before, peak())
"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "a.pt", tmp_path / "b.pt"], check=True, cwd="/")
    assert (tmp_path / "b.pt").stat().st_size > 192 << 20
    zipslicer.open(tmp_path / "b.pt").verify()
