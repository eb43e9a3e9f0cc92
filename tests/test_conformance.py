"""Every case of conformance.py on the backend of this run, and every case of a folder of files made elsewhere."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

torch = pytest.importorskip("torch")

import conformance  # noqa: E402
import makers  # noqa: E402
from conformance import CASES, LATER, PWNED, REFUSALS, TRAP, Case, Loads, Refused  # noqa: E402
from makers import Pickle  # noqa: E402

import zipslicer  # noqa: E402
from zipslicer.errors import ArchiveError, UnsupportedError, ZipSlicerError  # noqa: E402
from zipslicer.table import dotted  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No folder is made, and the module that files name is not imported, though it lies on the path."""
    trap = tmp_path / "trap"
    trap.mkdir()
    (trap / f"{TRAP}.py").write_text(f"import os\nos.mkdir({PWNED!r})\n")
    monkeypatch.syspath_prepend(trap)
    monkeypatch.chdir(tmp_path)
    yield
    assert TRAP not in sys.modules
    assert not (tmp_path / PWNED).exists()


def placed(file: bytes | Path, folder: Path) -> Path:
    """The path of a case's file; bytes are written to one first."""
    if isinstance(file, Path):
        return file
    path = folder / "case.pt"
    path.write_bytes(file)
    return path


def names_of(tree: Any) -> dict[str, Any]:
    """The tensors of a tree by the names they have in `ckpt.tensors`."""
    return {dotted(steps): tensor for steps, tensor in conformance.tensors_in(tree).items()}


def materialized(loaded: Any) -> Any:
    return loaded.materialize() if hasattr(loaded, "materialize") else loaded


def check_touch(wanted: Any, got: Any, name: str) -> None:
    """One tensor had by its name: the same elements and shape, in memory that shows nothing of its neighbours."""
    assert type(got) is type(wanted), name
    if conformance.parts_of(wanted):
        assert conformance.whole_facts(got) == conformance.whole_facts(wanted), name
        for part, (one, other) in conformance.zip_parts(wanted, got).items():
            check_touch(one, other, f"{name}#{part}")
        if wanted.is_quantized:
            assert got.untyped_storage().nbytes() <= conformance.hull_nbytes(wanted), name
        return
    facts, own = conformance.facts_of(wanted), conformance.facts_of(got)
    for fact in ("storage_offset", "storage nbytes"):
        del facts[fact], own[fact]
    assert own == facts, name
    assert got.storage_offset() == 0, name
    assert got.untyped_storage().nbytes() == conformance.hull_nbytes(wanted), name
    if wanted.numel() < 1 << 30:
        assert conformance.logical_bytes(got) == conformance.logical_bytes(wanted), name


def check_meta(wanted: Any, info: Any, location: str, name: str) -> None:
    """What is known of a tensor without reading it."""
    assert f"torch.{info.dtype_name}" == str(wanted.dtype), name
    assert info.dtype is wanted.dtype, name
    assert info.location == location, name
    assert info.requires_grad == wanted.requires_grad, name
    parts = conformance.parts_of(wanted)
    assert list(info.parts) == list(parts), name
    if not wanted.is_nested:
        assert info.shape == tuple(wanted.shape), name
        assert info.layout == str(wanted.layout).removeprefix("torch."), name
    for part, tensor in parts.items():
        if part != "int_repr":  # what torch gives is a copy
            check_meta(tensor, info.parts[part], location, f"{name}#{part}")
    if parts:
        assert info.nbytes == sum(part.nbytes for part in info.parts.values()), name
        return
    assert info.strides == wanted.stride(), name
    assert info.storage_offset == wanted.storage_offset(), name
    assert info.storage_nbytes == wanted.untyped_storage().nbytes(), name
    assert info.nbytes == wanted.numel() * wanted.element_size(), name


def check_tensors(checkpoint: Any, case: Loads) -> None:
    wanted = names_of(case.tree) if case.listed is None else dict(case.listed)
    names = list(checkpoint.tensors)
    assert [name for name in names if name not in case.huge] == list(wanted)
    assert case.huge.keys() <= set(names)
    dense = {name: tensor for name, tensor in wanted.items() if isinstance(tensor, torch.Tensor)}
    for name, tensor in dense.items():
        location = case.locations.get(name, case.location)
        check_meta(tensor, checkpoint.tensors.get_meta(name), location, name)
        check_touch(tensor, checkpoint.tensors[name], name)
        for part, whole in conformance.parts_of(tensor).items():
            got = checkpoint.tensors.get_slice(name).part(part)[...]
            assert conformance.logical_bytes(got) == conformance.logical_bytes(whole), f"{name}#{part}"
    groups: dict[str, Any] = {}
    for name, tensor in dense.items():
        key = checkpoint.tensors.get_meta(name).storage_key
        if key and tensor.untyped_storage().nbytes():
            address = tensor.untyped_storage().data_ptr()
            assert groups.setdefault(key, address) == address, name
    assert len(set(groups.values())) == len(groups)
    for name in wanted.keys() - dense.keys():
        storage = conformance.storage_bytes(wanted[name])
        assert checkpoint.tensors.get_meta(name).storage_nbytes == len(storage)
        assert conformance.storage_bytes(checkpoint.tensors[name]) == storage
    for name, what in case.huge.items():
        assert checkpoint.tensors.get_meta(name).shape == what["shape"]
        part = checkpoint.tensors.get_slice(name)
        for at, element in what["elements"].items():
            assert part[at : at + 1].tolist() == [element]


def check_loads(case: Loads, folder: Path) -> None:
    path = placed(case.file, folder)
    with zipslicer.open(path, **case.keywords) as checkpoint:
        check_tensors(checkpoint, case)
        if not case.huge:
            tree = materialized(checkpoint.root)
            if isinstance(tree, zipslicer.Placeholder):  # what is in it is lazy
                tree = checkpoint._view.materialized([0])(0)
            assert conformance.differences(case.tree, tree, zipslicer.describe) == []
    if not case.huge and not isinstance(case.tree, conformance.Inert):
        tree = materialized(zipslicer.load(path, **case.keywords))
        assert conformance.differences(case.tree, tree, zipslicer.describe) == []


def refused(number: str, act: Callable[[], Any], file: bytes, key: str | None = None) -> None:
    """Whatever `act` does raises what the table says; `key`: of the tensor that was asked for."""
    wanted = REFUSALS[number]
    with pytest.raises(ZipSlicerError) as caught:
        act()
    error = caught.value
    assert type(error) is wanted.error, error
    assert error.offset == wanted.at(file), error
    assert error.path is not None, error
    assert key is None or error.key == key, error
    if not isinstance(error, ArchiveError) and wanted.when == "open":
        assert str(error.record).endswith("/data.pkl"), "its offset counts from there"
    assert str(error), error
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.offset) == (type(error), str(error), error.offset)


def check_refused(number: str, case: Refused, folder: Path) -> None:
    path = placed(case.file, folder)
    file = path.read_bytes()
    when = REFUSALS[number].when
    if when == "open":
        refused(number, lambda: zipslicer.open(path), file)
        refused(number, lambda: zipslicer.load(path), file)
        return
    with zipslicer.open(path) as checkpoint:
        for name, tensor in case.intact.items():
            check_touch(tensor, checkpoint.tensors[name], name)
        for _ in range(2):  # what failed once is not remembered as good
            refused(number, lambda: checkpoint.tensors[when], file, when)
        refused(number, lambda: checkpoint.tensors.get_slice(when)[:1], file, when)
        refused(number, lambda: materialized(checkpoint.root), file)
    refused(number, lambda: zipslicer.load(path)[when], file, when)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case: Case, tmp_path: Path) -> None:
    outcome = case.make(tmp_path)
    if isinstance(outcome, Loads):
        assert case.number not in REFUSALS
        check_loads(outcome, tmp_path)
    else:
        check_refused(case.number, outcome, tmp_path)


def check_on_a_gpu(wanted: Any, got: Any, name: str) -> None:
    """The tensor that is on the CPU otherwise, but on the device, its parts and all."""
    if wanted.is_meta or not got.is_cuda:
        assert got.device == wanted.device, name
        return
    if parts := conformance.parts_of(wanted):
        assert conformance.whole_facts(got) == conformance.whole_facts(wanted), name
        assert list(conformance.parts_of(got)) == list(parts), name
        for part, (one, other) in conformance.zip_parts(wanted, got).items():
            check_on_a_gpu(one, other, f"{name}#{part}")
        return
    facts, own = conformance.facts_of(wanted), conformance.facts_of(got)
    assert {**own, "device": "cpu"} == facts, name
    moved = torch.empty(0, dtype=got.dtype)
    moved.set_(got.untyped_storage().cpu(), got.storage_offset(), got.size(), got.stride())
    for flag in ("conj", "neg"):
        if facts[flag]:
            torch._C._set_tensor_metadata(moved, {flag: True})
    assert conformance.logical_bytes(moved) == conformance.logical_bytes(wanted), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("small_to", [0, 1 << 60], ids=["by the lane", "small"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case_on_a_gpu(case: Case, small_to: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = case.make(tmp_path)
    if isinstance(outcome, Refused) or outcome.huge or isinstance(outcome.tree, conformance.Inert):
        pytest.skip("nothing to be placed")
    for limit in ("SMALL_TO", "LANE_FROM"):
        monkeypatch.setattr(f"zipslicer.tensors.{limit}", small_to)
    path = placed(outcome.file, tmp_path)
    here = conformance.tensors_in(materialized(zipslicer.load(path, **outcome.keywords)))
    there = zipslicer.load(path, map_location="cuda", **outcome.keywords)
    moved = conformance.tensors_in(materialized(there))
    assert list(moved) == list(here)
    theirs: dict[Any, Any] = {}
    if not any(isinstance(tensor, torch.Tensor) and tensor.is_nested for tensor in here.values()):
        # At a nested tensor torch.load(map_location="cuda") dies of a segmentation fault (2.11).
        with contextlib.suppress(Exception):  # what torch does not load, or not onto a GPU, is held against the CPU's
            theirs = conformance.tensors_in(torch.load(path, map_location="cuda", weights_only=True))
    for steps, wanted in here.items():
        if not isinstance(wanted, torch.Tensor):
            assert conformance.storage_bytes(moved[steps].cpu()) == conformance.storage_bytes(wanted)
            continue
        check_on_a_gpu(wanted, moved[steps], dotted(steps))
        if steps in theirs:
            assert moved[steps].device == theirs[steps].device, dotted(steps)
        else:
            assert moved[steps].is_cuda or wanted.is_meta, dotted(steps)
    owners = [steps for steps, tensor in moved.items() if getattr(tensor, "is_cuda", False) and steps in theirs]
    assert groups_of(moved, owners) == groups_of(theirs, owners)


def groups_of(tensors: dict[Any, Any], chosen: list[Any]) -> list[list[int]]:
    """Which tensors lie in one storage."""
    groups: dict[int, list[int]] = {}
    for i, steps in enumerate(chosen):
        tensor = tensors[steps]
        if isinstance(tensor, torch.Tensor) and not conformance.parts_of(tensor) and tensor.untyped_storage().nbytes():
            groups.setdefault(tensor.untyped_storage().data_ptr(), []).append(i)
    return list(groups.values())


def test_every_refusal_has_a_case() -> None:
    numbers = [case.number for case in CASES]
    assert len(set(numbers)) == len(numbers)
    assert set(REFUSALS) <= set(numbers)
    assert not set(LATER) & set(numbers)


BOMBS = ("40g", "40m", "40n", "40o", "40p", "40q")

MEGABYTE = b"x" * (1 << 20)
REPEATED = {  # each is met 4000 times by the memo, for two bytes a time
    "text": Pickle().text(MEGABYTE.decode()).body(),
    "bytes": b"B" + struct.pack("<I", len(MEGABYTE)) + MEGABYTE,
    "bytearray": b"\x96" + struct.pack("<Q", len(MEGABYTE)) + MEGABYTE,
    "integer": b"\x8b" + struct.pack("<i", 60_000) + b"\x7f" * 60_000,
}

OPEN_ALL = """
import resource, sys
import zipslicer
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
for path in sys.argv[1:]:
    try:
        with zipslicer.open(path) as checkpoint:
            repr(checkpoint), repr(checkpoint.tensors), repr(checkpoint.placeholders)
            root = checkpoint.root
            if isinstance(root, zipslicer.Placeholder):
                repr(root)
    except zipslicer.CheckpointError as error:
        str(error)
assert "torch" not in sys.modules
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux keeps RLIMIT_AS")
@pytest.mark.skipif("ZIPSLICER_SANITIZED" in os.environ, reason="a sanitizer has memory of its own")
def test_bombs_take_no_memory(tmp_path: Path) -> None:
    """Files that ask for gigabytes are opened in a process that has one."""
    paths = []
    for name, value in REPEATED.items():
        program = Pickle(5).raw(value).put(0).raw(b"0").mark().raw(b"h\0" * 4000).raw(b"t").stop()
        (tmp_path / name).mkdir()
        paths.append(placed(makers.checkpoint(program).data, tmp_path / name))
    for case in CASES:
        if case.number in BOMBS:
            (tmp_path / case.number).mkdir()
            paths.append(placed(case.make(tmp_path).file, tmp_path / case.number))
    assert len(paths) == len(BOMBS) + len(REPEATED)
    command = [sys.executable, "-c", OPEN_ALL, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


# --- files that were made elsewhere -----------------------------------------------------------------------------------

ELSEWHERE = os.environ.get("ZIPSLICER_CONFORMANCE")
IN_SCOPE = range(1, 41)
# Beside what their rows name, these hold tensors of their own making: lengths of a nested tensor, the ranks of a mesh;
# or two names of one tensor.
HOLD_MORE = ((27, "b"), (34, "c"), (38, "a"))


def rows_elsewhere() -> list[Any]:
    """The cases of the folder's expected.json, one parameter each."""
    if not ELSEWHERE:
        reason = "ZIPSLICER_CONFORMANCE names no folder with an expected.json"
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason), id="none")]
    rows = json.loads((Path(ELSEWHERE) / "expected.json").read_text())["cases"]
    chosen = [row for row in rows if row["id"] in IN_SCOPE]
    return [pytest.param(row, id=f"{row['id']}{row['variant']}-{row['name']}") for row in chosen]


def steps_of(path: str) -> conformance.Steps:
    """A path of expected.json -> steps: "a/b" keys or indexes, "@name" an attribute, "#name" a part.

    "@state" of a state that is a tuple is the part that zipslicer calls so, as no attribute has that name.
    """
    steps: list[tuple[str, Any]] = []
    for level in path.split("/") if path else []:
        name, *parts = level.split("#")
        if name == "@state":
            steps.append(("part", "state"))
        elif name or not parts:  # "" is a key: that of the outermost module in _metadata
            steps.append(("attribute", name[1:]) if name.startswith("@") else ("key", name))
        steps += [("part", part) for part in parts]
    return tuple(steps)


def name_elsewhere(path: str) -> str:
    """A path of expected.json -> the tensor's name in `ckpt.tensors`."""
    return dotted(steps_of(path))


def value_at(tree: Any, path: str) -> Any:
    """What stands at a path of a tree that was materialized."""
    for kind, name in steps_of(path):
        if isinstance(tree, zipslicer.Placeholder):
            about = zipslicer.describe(tree)
            if kind == "attribute":
                tree = about.attributes[name]
            elif kind == "key":
                tree = about.items[name] if name in about.items else [*about.args, *about.list_items][int(name)]
            else:
                raise AssertionError(f"no rule for {path}")
        elif kind == "attribute":
            tree = getattr(tree, name)
        elif isinstance(tree, (dict, zipslicer.LazyStateDict)):  # lazy where the root is a placeholder
            tree = tree[name] if name in tree else tree[int(name)]
        else:
            tree = tree[int(name)]
    return tree


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def check_whole_elsewhere(facts: dict[str, Any], got: Any, name: str) -> None:
    """A sparse, quantized, nested or meta tensor against its row; its parts have rows of their own."""
    kind = facts["kind"]
    whole = conformance.whole_facts(got)
    assert whole.get("shape") == (None if kind == "nested" else tuple(facts["shape"])), name
    assert kind.startswith("sparse") == (whole["layout"] != torch.strided), name
    if kind.startswith("sparse"):
        assert str(whole["layout"]) == f"torch.{kind}", name
        assert whole.get("coalesced") == facts.get("coalesced"), name
    else:
        assert str(whole["dtype"]) == f"torch.{facts['dtype']}", name
    assert (got.is_quantized, got.is_nested, got.is_meta) == (kind == "quantized", kind == "nested", kind == "meta"), (
        name
    )
    if kind == "quantized":
        assert str(whole["qscheme"]) == f"torch.{facts['qscheme']}", name
        assert whole.get("axis") == facts.get("axis"), name
        if "scale" in facts:
            assert whole["quantizer"] == (facts["scale"], facts["zero_point"]), name
    if kind == "meta":
        assert list(got.stride()) == facts["stride"], name


def check_part_elsewhere(facts: dict[str, Any], part: Any, name: str) -> None:
    """A part of one against its row, read without the others."""
    info, got = part.info, part[...]
    assert [list(info.shape), list(info.strides)] == [facts["shape"], facts["stride"]], name
    assert [info.storage_offset, info.storage_nbytes] == [facts["offset"], facts["storage_nbytes"]], name
    assert [info.dtype_name, info.requires_grad] == [facts["dtype"], facts["requires_grad"]], name
    assert digest(conformance.logical_bytes(got)) == facts["sha256"], name


def part_of(row: dict[str, Any], path: str) -> tuple[str, str] | None:
    """The paths of a composite tensor and of its part, for a path that is one; "#args" of a placeholder is none."""
    whole, _, part = path.partition("#")
    return (whole, part) if part and "sha256" not in row["tensors"].get(whole, {"sha256": ""}) else None


def check_elsewhere(facts: dict[str, Any], tensors: Any, name: str) -> None:
    """One tensor against its row of expected.json."""
    info = tensors.get_meta(name)
    if facts["kind"] not in ("dense", "storage"):
        layout = facts["kind"] if facts["kind"].startswith(("sparse", "nested")) else "strided"
        assert info.layout == layout, name
        assert list(info.shape) == facts.get("shape", list(info.shape)), name
        assert info.dtype_name == facts.get("dtype", info.dtype_name), name
        check_whole_elsewhere(facts, tensors[name], name)
        return
    assert list(info.shape) == facts["shape"], name
    if "stride" not in facts:  # of other archives than torch.save's only the elements are told
        assert digest(conformance.logical_bytes(tensors[name])) == facts["sha256"], name
        assert info.dtype_name == facts["dtype"], name
        return
    assert list(info.strides) == facts["stride"], name
    assert info.storage_offset == facts.get("offset", info.storage_offset), name  # views of views: not told
    assert info.requires_grad == facts["requires_grad"], name
    assert info.storage_nbytes == facts.get("storage_nbytes", info.storage_nbytes), name
    assert info.dtype_name == facts["dtype"], name
    if facts["sha256"] is None:
        part = tensors.get_slice(name)
        for at in (0, facts["shape"][0] // 2, facts["shape"][0] - 1):
            assert part[at : at + 1].tolist() == [facts["fill"]], name
        return
    got = tensors[name]
    if facts["kind"] == "storage":
        assert digest(conformance.storage_bytes(got)) == facts["sha256"], name
        return
    assert digest(conformance.logical_bytes(got)) == facts["sha256"], name
    assert (list(got.shape), list(got.stride())) == (facts["shape"], facts["stride"]), name
    assert str(got.dtype) == f"torch.{facts['dtype']}", name
    assert (type(got) is torch.nn.Parameter) == facts["parameter"], name
    assert got.requires_grad == facts["requires_grad"], name
    bits = [bit for bit, on in (("conj", got.is_conj()), ("neg", got.is_neg())) if on]
    assert bits == facts.get("bits", []), name


def check_tree_elsewhere(row: dict[str, Any], tree: Any, names: dict[str, str]) -> None:
    """Alias groups, Python attributes, plain values and NumPy values of what was materialized."""
    groups: dict[int, int] = {}
    kept = []  # so that no address is given out twice
    for path, facts in row["tensors"].items():
        composite = part_of(row, path)
        if composite is not None and composite[1] != "int_repr":
            got = conformance.parts_of(value_at(tree, composite[0]))[composite[1]]
            assert [got.storage_offset(), got.untyped_storage().nbytes()] == [facts["offset"], facts["storage_nbytes"]]
        if path.partition("#")[0] != path or "@state" in path:
            continue
        if facts["kind"] not in ("dense", "storage"):
            check_whole_elsewhere(facts, value_at(tree, path), path)
            continue
        if row["id"] == 38 and path.startswith("constants/"):  # beside the root
            continue
        got = value_at(tree, path.partition(":")[2] or path if row["id"] == 38 or row.get("windows") else path)
        if not isinstance(got, torch.Tensor):
            continue
        kept.append(got)
        assert got.storage_offset() == facts.get("offset", got.storage_offset()), path
        nbytes = got.untyped_storage().nbytes()
        assert nbytes == facts.get("storage_nbytes", nbytes), path
        assert sorted(getattr(got, "__dict__", {})) == facts.get("attrs", []), path
        if nbytes and "alias" in facts:
            address = got.untyped_storage().data_ptr()
            assert groups.setdefault(facts["alias"], address) == address, path
    assert len(set(groups.values())) == len(groups)
    for path, (kind, shown) in row.get("values", {}).items():
        got = value_at(tree, path)
        assert type(got).__name__ == kind, path
        assert repr(sorted(got) if isinstance(got, (set, frozenset)) else got) == shown, path
    for path, facts in row.get("arrays", {}).items():
        got = value_at(tree, path)
        if facts["sha256"] is None:
            continue  # an array of objects may be a placeholder
        assert (str(got.dtype), list(got.shape)) == (facts["dtype"], facts["shape"]), path
        assert digest(got.tobytes()) == facts["sha256"], path


def open_elsewhere(path: Path, row: dict[str, Any], **keywords: Any) -> None:
    """Everything that is in one archive of a case's file."""
    dtypes = {facts["dtype"] for facts in row["tensors"].values() if "dtype" in facts}
    if lacking := {dtype for dtype in dtypes if not hasattr(torch, dtype)}:
        with zipslicer.open(path, **keywords) as checkpoint, pytest.raises(NotImplementedError, match="has no dtype"):
            checkpoint.tensors.materialize()
        pytest.skip(f"this torch has no {', '.join(sorted(lacking))}")
    parts = {p: found for p in row["tensors"] if (found := part_of(row, p))}
    whole = [p for p in row["tensors"] if p not in parts]
    names = {p: name_elsewhere(p.partition(":")[2] if row.get("windows") else p) for p in whole}
    names.update((p, p) for p in whole if ".pkl:" in p)
    with zipslicer.open(path, **keywords) as checkpoint:
        for p, name in names.items():
            check_elsewhere(row["tensors"][p], checkpoint.tensors, name)
            info = checkpoint.tensors.get_meta(name)
            assert info is not None
            is_meta = row["tensors"][p]["kind"] == "meta"
            assert info.location == ("meta" if is_meta else row.get("location", "cpu"))
        for p, (base, part) in parts.items():
            check_part_elsewhere(row["tensors"][p], checkpoint.tensors.get_slice(names[base]).part(part), p)
        if (row["id"], row["variant"]) in HOLD_MORE:
            assert set(names.values()) < set(checkpoint.tensors)
        elif row["loader"] in ("load", "placeholder"):
            assert set(names.values()) == set(checkpoint.tensors)
        if not any("fill" in facts for facts in row["tensors"].values()):
            check_tree_elsewhere(row, materialized(checkpoint.root), names)


def touch_all(path: Path) -> None:
    """Open, and touch every key."""
    with zipslicer.open(path) as checkpoint:
        for name in checkpoint.tensors:
            checkpoint.tensors[name]


@pytest.mark.parametrize("row", rows_elsewhere())
def test_case_made_elsewhere(row: dict[str, Any]) -> None:
    path = Path(str(ELSEWHERE)) / row["file"]
    if row.get("windows"):
        if row["id"] != 37:  # a stream ends where it ends; the next one begins there
            with pytest.raises(ZipSlicerError):
                touch_all(path)
        for index, window in enumerate(row["windows"]):
            inside = {p: facts for p, facts in row["tensors"].items() if p.startswith(f"{index}:")}
            open_elsewhere(path, {**row, "tensors": inside}, window=tuple(window))
    elif row["loader"] in ("load", "placeholder"):
        open_elsewhere(path, row)
    elif row["loader"] == "refuse":
        with pytest.raises(ZipSlicerError) as caught:
            touch_all(path)
        # The one file that is right, and that we cannot read, is the one of protocol 0.
        assert isinstance(caught.value, UnsupportedError) == (row["name"] == "protocol_0")
        if row["tensors"] and caught.value.key is not None:  # opened, and refused on touch
            with zipslicer.open(path) as checkpoint:
                for p, facts in row["tensors"].items():
                    check_elsewhere(facts, checkpoint.tensors, name_elsewhere(p))
    elif row.get("prefix_bytes"):
        with pytest.raises(ZipSlicerError):
            touch_all(path)
        open_elsewhere(path, row, window=(row["prefix_bytes"], row["bytes"] - row["prefix_bytes"]))
    else:
        assert row["loader"] in ("load_or_refuse", "inert_or_refuse")
        # Ours to choose, and we have chosen: what can be read without running anything is read.
        open_elsewhere(path, row)
