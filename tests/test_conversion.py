"""conversion: the same tensors in another format, dtype or number of files."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")

import conformance  # noqa: E402
import test_conformance as conforming  # noqa: E402
from conformance import CASES, REFUSALS, Case, Loads  # noqa: E402

import zipslicer  # noqa: E402
from zipslicer import convert  # noqa: E402
from zipslicer.conversion import _nbytes, _shards  # noqa: E402
from zipslicer.errors import ArchiveError, UnsupportedError  # noqa: E402


@pytest.fixture
def tree() -> dict[str, Any]:
    base = torch.arange(240.0).view(12, 20)
    return {
        "model": {
            "w": base,
            "tied": base,
            "head": base.view(12, 20),
            "part": base[2:5],
            "turned": base.t(),
            "half": torch.randn(7).half(),
            "ids": torch.arange(5),
            "scalar": torch.tensor(True),
            "none": torch.empty(0, 3),
            "conj": torch.tensor([1 + 2j, 3j]).conj(),
        },
        "step": 3,
        "args": {"lr": 0.1},
    }


@pytest.fixture
def source(tree: dict[str, Any], tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    torch.save(tree, tmp_path / "in" / "source.pt")
    return tmp_path / "in" / "source.pt"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_to_safetensors(source: Path, tree: dict[str, Any], out: Path) -> None:
    found = convert(source, out / "a.safetensors", verify=True)
    assert found.files == [str(out / "a.safetensors")]
    assert found.tied == {"model.tied": "model.w", "model.head": "model.w"}
    assert found.untied == ["model.part", "model.turned"]
    assert found.left_out == ["step", "args"]
    got = safetensors.load_file(out / "a.safetensors")
    assert sorted(got) == sorted(f"model.{name}" for name in tree["model"] if name not in ("tied", "head"))
    for name, tensor in got.items():
        wanted = tree["model"][name.removeprefix("model.")]
        assert (tensor.dtype, tensor.shape) == (wanted.dtype, wanted.shape), name
        assert torch.equal(tensor, wanted.resolve_conj()), name
    assert (found.tensors, found.nbytes) == (8, sum(tensor.nbytes for tensor in got.values()))
    with safetensors.safe_open(out / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", **found.tied}
    content = (out / "a.safetensors").read_bytes()
    count = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + count])
    assert count % 8 == 0
    for name, tensor in got.items():  # each is aligned
        assert entries[name]["data_offsets"][0] % tensor.element_size() == 0


def test_what_is_left_out(source: Path, out: Path) -> None:
    tree = {"a": [torch.ones(1), {"b": 2, "c": torch.ones(1)}, 5], "d": {"e": None}, "w": torch.ones(1)}
    torch.save({**tree, "again": tree["a"]}, source)
    assert convert(source, out / "a.safetensors").left_out == ["d", "a.2", "a.1.b"]
    assert convert(source, out / "a.safetensors", keys="w").left_out == []


def test_there_and_back(source: Path, tree: dict[str, Any], out: Path) -> None:
    convert(source, out / "a.safetensors", keys="model.*")
    found = convert(out / "a.safetensors", out / "b.pth", verify=True)
    assert (found.tensors, found.left_out) == (8, [])
    got = torch.load(out / "b.pth", weights_only=True, mmap=True)
    assert {name: value.tolist() for name, value in got.items()} == {
        name: value.tolist() for name, value in safetensors.load_file(out / "a.safetensors").items()
    }
    # From archive to archive the root stays what it was.
    convert(source, out / "c.pth", verify=True)
    again = torch.load(out / "c.pth", weights_only=True)
    assert conformance.differences(torch.load(source, weights_only=True), again, zipslicer.describe) == []


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, "float64"])
def test_dtypes(source: Path, tree: dict[str, Any], out: Path, name: str, dtype: Any) -> None:
    wanted = dtype if isinstance(dtype, torch.dtype) else torch.float64
    convert(source, out / name, dtype=dtype, verify=True)
    with zipslicer.open(out / name) as checkpoint:
        for key in checkpoint.tensors:
            given = tree["model"][key.removeprefix("model.")]
            cast = given.to(wanted) if given.is_floating_point() else given.resolve_conj()
            got = checkpoint.tensors[key]
            assert got.dtype == cast.dtype, key
            assert torch.equal(got.resolve_conj(), cast), key
    if name == "a.pth":
        got = torch.load(out / name, weights_only=True)["model"]
        assert got["w"].data_ptr() == got["turned"].data_ptr() == got["tied"].data_ptr()
        assert got["part"].storage_offset() == 40
    with pytest.raises(ValueError, match="floating-point"):
        convert(source, out / name, dtype=torch.int8)
    if name == "a.safetensors":
        with (
            zipslicer.open(source, dtype=torch.float64) as checkpoint,
            pytest.raises(ValueError, match="rounded twice"),
        ):
            convert(checkpoint, out / name)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards(out: Path, tmp_path: Path, suffix: str) -> None:
    tree = {f"layer{i}.w": torch.full((100,), float(i)) for i in range(10)}
    tree["tied"] = tree["layer9.w"]
    torch.save(tree, tmp_path / "in.pt")
    found = convert(tmp_path / "in.pt", out / f"model.{suffix}", max_shard_size="1.2KB", verify=True)
    names = [f"model-{i:05}-of-00004.{suffix}" for i in range(1, 5)]
    assert sorted(os.listdir(out)) == sorted([*names, f"model.{suffix}.index.json"])
    assert [os.path.basename(file) for file in found.files] == [*names, f"model.{suffix}.index.json"]
    index = json.loads(Path(found.files[-1]).read_text())
    tied = suffix == "safetensors"
    assert index["metadata"] == {"total_size": 4000 if tied else 4400}
    assert index["weight_map"]["layer9.w"] == names[3]
    with zipslicer.load(found.files[-1]) as sd:
        assert list(sd) == [name for name in tree if not (tied and name == "tied")]
        assert all(torch.equal(sd[name], tree[name]) for name in sd)
        back = convert(sd, out / "one.pth", verify=True)
    assert all(torch.equal(value, tree[name]) for name, value in torch.load(out / "one.pth").items())
    assert back.files == [str(out / "one.pth")]
    small = convert(tmp_path / "in.pt", out / f"small.{suffix}", max_shard_size=10**6)
    assert small.files == [str(out / f"small.{suffix}")]


def test_sizes_and_shares() -> None:
    assert [_nbytes(size) for size in (5, "5", "5B", "5 kB", "1.5GB", "2MiB", "1gib")] == [
        5, 5, 5, 5000, 1_500_000_000, 2 << 20, 1 << 30,
    ]  # fmt: skip
    for wrong in (0, -1, "x", "", "5 XB", "GB"):
        with pytest.raises(ValueError, match="max_shard_size"):
            _nbytes(wrong)
    sizes = [("a", 3), ("b", 3), ("huge", 100), ("c", 6), ("d", 1)]
    assert _shards(sizes, 6) == [["a", "b"], ["huge"], ["c"], ["d"]]
    assert _shards(sizes, None) == [["a", "b", "huge", "c", "d"]]
    assert _shards([], 5) == [[]]


def test_names(source: Path, out: Path) -> None:
    found = convert(
        source,
        out / "a.safetensors",
        keys=["model.w", "model.h*"],
        key_map=lambda key: key.removeprefix("model."),
        verify=True,
    )
    assert (found.tied, found.left_out) == ({"head": "w"}, [])
    assert sorted(safetensors.load_file(out / "a.safetensors")) == ["half", "w"]
    convert(source, out / "a.pth", key_map={"model.w": "weight", "model.conj": None})
    got = torch.load(out / "a.pth", weights_only=True)
    assert "weight" in got
    assert "model.conj" not in got
    with pytest.raises(ValueError, match="two keys"):
        convert(source, out / "b.pth", key_map=lambda key: "same")
    with pytest.raises(KeyError):
        convert(source, out / "b.pth", keys="none")
    torch.save({1: torch.ones(1)}, source)
    convert(zipslicer.load(source), out / "c.safetensors")
    assert list(safetensors.load_file(out / "c.safetensors")) == ["1"]
    assert sorted(os.listdir(out)) == ["a.pth", "a.safetensors", "c.safetensors"]


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_several_become_one(out: Path, tmp_path: Path, suffix: str) -> None:
    one, other = torch.ones(300), torch.zeros(5, 5)
    torch.save({"a": one, "tied": one}, tmp_path / "1.pt")
    torch.save({"b": other, "view": other[1:3].t()}, tmp_path / "2.pt")
    with zipslicer.load(tmp_path / "2.pt") as second:
        found = convert([tmp_path / "1.pt", second.rename({"b": "c"})], out / f"all.{suffix}", verify=True)
    tied = suffix == "safetensors"
    assert found.tensors == 4 - tied
    with zipslicer.load(out / f"all.{suffix}") as sd:
        assert sorted(sd) == ["a", "c", *(() if tied else ("tied",)), "view"]
        assert torch.equal(sd["view"], other[1:3].t())
    if not tied:
        got = torch.load(out / "all.pth", weights_only=True)
        assert got["a"].data_ptr() == got["tied"].data_ptr()
        assert got["view"].untyped_storage().data_ptr() == got["c"].data_ptr()
    with pytest.raises(ValueError, match="two of the checkpoints have a tensor 'a'"):
        convert([tmp_path / "1.pt", tmp_path / "1.pt"], out / f"double.{suffix}")
    many = convert([tmp_path / "1.pt", tmp_path / "2.pt"], out / f"s.{suffix}", max_shard_size=1000, verify=True)
    assert len(many.files) == 3
    with zipslicer.load(many.files[-1]) as sd:
        assert torch.equal(sd["b"], other)


@pytest.mark.parametrize("case", [case for case in CASES if case.number not in REFUSALS], ids=str)
def test_a_case_goes_to_safetensors_or_is_refused(case: Case, tmp_path: Path, out: Path) -> None:
    outcome = case.make(tmp_path)
    assert isinstance(outcome, Loads)
    if outcome.huge:
        pytest.skip("4 GiB")
    path, copy = conforming.placed(outcome.file, tmp_path), out / "a.safetensors"
    with zipslicer.open(path, **outcome.keywords) as checkpoint:
        infos = {name: checkpoint.tensors.get_meta(name) for name in checkpoint.tensors}
        if case.number == "40g":
            with pytest.raises(UnsupportedError, match="over and over"):
                convert(checkpoint, copy)
            return
        good = [name for name in infos if is_plain(checkpoint, name)]
        if len(good) < len(infos):
            with pytest.raises(UnsupportedError, match="safetensors has no") as caught:
                convert(checkpoint, copy)
            assert caught.value.key in infos
            assert os.listdir(out) == []
        found = convert(checkpoint, copy, keys=good, verify=True)
        infos = {name: infos[name] for name in good}
        got = safetensors.load_file(copy)
        assert {*got, *found.tied} == set(infos)
        for name in infos:
            wanted = checkpoint.tensors[name].detach()
            tensor = got[found.tied.get(name, name)]
            assert (tensor.dtype, tensor.shape) == (wanted.dtype, wanted.shape), name
            assert conformance.logical_bytes(tensor) == conformance.logical_bytes(
                wanted.resolve_conj().resolve_neg()
            ), name


def is_plain(checkpoint: Any, name: str) -> bool:
    """Whether safetensors.torch saves such a tensor."""
    tensor = checkpoint.tensors[name]
    if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
        return False
    if tensor.is_meta or tensor.is_nested or tensor.is_quantized:
        return False
    try:
        safetensors.save({"x": tensor.detach().clone().contiguous()})
    except (KeyError, ValueError):  # a dtype that it does not know
        return False
    return True


def test_torch_is_needed_for_no_copy(source: Path, out: Path) -> None:
    code = """
import sys, zipslicer
zipslicer.convert(sys.argv[1], sys.argv[2], keys=["model.w", "model.half", "model.ids"])
zipslicer.convert(sys.argv[1], sys.argv[3])
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, source, out / "a.safetensors", out / "b.pth"], check=True, cwd="/")
    assert len(safetensors.load_file(out / "a.safetensors")) == 3


def test_numpy_will_do(source: Path, tree: dict[str, Any], out: Path) -> None:
    pytest.importorskip("ml_dtypes")
    convert(
        source, out / "a.safetensors", framework="np", verify=True, dtype="bfloat16", keys=["model.w", "model.turned"]
    )
    got = safetensors.load_file(out / "a.safetensors")
    assert torch.equal(got["model.turned"], tree["model"]["turned"].bfloat16())


def test_what_is_written_wrong_is_found(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def copies_wrongly(self: Any, file: Any, offset: int, nbytes: int) -> int:
        self.write([b"x" * nbytes])
        return nbytes

    monkeypatch.setattr(zipslicer.replacement.Replacement, "copy", copies_wrongly)
    with pytest.raises(ArchiveError, match="is not what was read"):
        convert(source, out / "a.safetensors", verify=True)
    with pytest.raises(ArchiveError):
        convert(source, out / "a.pth", verify=True)


CONVERTS = """
import sys, zipslicer
source, target = sys.argv[1:]
zipslicer.convert(source, target)
print("go", flush=True)
while True:
    zipslicer.convert(source, target)
"""


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="SIGKILL")
def test_killed_at_any_moment_the_file_is_whole(tmp_path: Path, out: Path) -> None:
    sources = []
    for value in (1.0, 2.0):
        sources.append(tmp_path / f"{value}.pt")
        torch.save({f"w{i}": torch.full((50_000,), value) for i in range(20)}, sources[-1])
    target = out / "a.safetensors"
    convert(sources[0], target)
    moments, killed = random.Random(7), 0
    for turn in range(50):
        process = subprocess.Popen(
            [sys.executable, "-c", CONVERTS, sources[turn % 2], target], stdout=subprocess.PIPE, cwd="/"
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"go\n"
        time.sleep(moments.random() * 0.03)
        process.kill()
        process.communicate()
        got = safetensors.load_file(target)
        assert len(got) == 20
        assert len({float(tensor[0]) for tensor in got.values()}) == 1
        assert all(tensor.eq(tensor[0]).all() for tensor in got.values())
        killed += len(os.listdir(out)) > 1
        for each in out.iterdir():
            if each != target:
                each.unlink()
    assert killed > 10
