"""Module: load_into against Module.load_state_dict, the report, and whose memory is written to."""

from __future__ import annotations

import copy
import types
import warnings
from typing import TYPE_CHECKING, Any

import pytest

import zipslicer
from zipslicer.errors import ChangedError, ZipSlicerError

torch = pytest.importorskip("torch")
nn: Any = torch.nn

if TYPE_CHECKING:
    from pathlib import Path


class Extra(nn.Linear):  # type: ignore[misc]
    """A module with state that is no tensor."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.told: Any = None

    def get_extra_state(self) -> Any:
        return {"version": 3, "table": [1, 2]}

    def set_extra_state(self, state: Any) -> None:
        self.told = state


class Renaming(nn.Linear):  # type: ignore[misc]
    """A module that loads old names, as many in the field do."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        old = prefix + "w"
        if old in state_dict:
            state_dict[prefix + "weight"] = state_dict.pop(old)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Tied(nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("kept", torch.arange(3))
        self.register_buffer("gone", torch.arange(3), persistent=False)


def network() -> Any:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
        nn.BatchNorm2d(4),
        nn.Sequential(nn.Linear(4, 4), Extra(4, 4)),
        Tied(),
        nn.MultiheadAttention(4, 2),
    )


def randomized(module: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for each in module.state_dict().values():
            if isinstance(each, torch.Tensor) and each.is_floating_point():
                each.copy_(torch.rand(each.shape, generator=generator))
            elif isinstance(each, torch.Tensor):
                each.fill_(5)
    return module


def same(one: Any, other: Any) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a if isinstance(a[k], torch.Tensor))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.save(randomized(network()).state_dict(), tmp_path / "m.pth")
    return tmp_path / "m.pth"


# ---------------------------------------------------------------- what is loaded


def test_it_loads_what_load_state_dict_loads(path: Path) -> None:
    ours, theirs = network(), network()
    pointers = {name: each.data_ptr() for name, each in ours.named_parameters()}
    versions = {name: each._version for name, each in ours.named_parameters()}
    theirs.load_state_dict(torch.load(path))
    with zipslicer.load(path) as sd:
        report = sd.load_into(ours)
    assert report == ([], [], [], [])
    assert same(ours, theirs)
    assert ours[2][1].told == {"version": 3, "table": [1, 2]}
    for name, each in ours.named_parameters():
        assert each.data_ptr() == pointers[name]
        assert each._version > versions[name]
    assert ours[3].head.weight is ours[3].embed.weight


def test_autograd_sees_that_a_parameter_was_written_to(path: Path) -> None:
    module = network()
    out = (module[2][0](torch.ones(1, 4, requires_grad=True)) ** 2).sum()
    with zipslicer.load(path) as sd:
        sd.load_into(module)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_straight_reads_take_no_memory_of_their_own(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zipslicer.reader import RowReader
    from zipslicer.tensors import TensorReader

    module = nn.Linear(4, 4)
    torch.save(randomized(nn.Linear(4, 4)).state_dict(), path)
    with zipslicer.load(path) as sd:
        sd["weight"]

        def refused(*_: Any, **__: Any) -> None:
            raise AssertionError("a tensor was made")

        for kind in (RowReader, TensorReader):
            for name in ("_buffers", "tensor"):
                if name in kind.__dict__:
                    monkeypatch.setattr(kind, name, refused)
        sd.load_into(module)
    assert module.weight.equal(torch.load(path)["weight"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_are_converted_on_the_way(path: Path, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zipslicer.module.CHUNK_NBYTES", 40)
    ours, theirs = network().to(dtype), network().to(dtype)
    theirs.load_state_dict(torch.load(path))
    with zipslicer.load(path) as sd:
        report = sd.load_into(ours)
    assert same(ours, theirs)
    assert ("2.0.weight", "float32", str(dtype).removeprefix("torch.")) in report.casts


def test_strides_and_views_of_any_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zipslicer.module.CHUNK_NBYTES", 24)
    whole = torch.arange(60.0)
    saved = {
        "plain": whole.reshape(3, 4, 5),
        "turned": whole.reshape(3, 4, 5).permute(2, 0, 1),
        "stepped": whole[::2].reshape(5, 6),
        "expanded": whole[:4].expand(3, 4),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3.0),
        "conj": torch.arange(4).to(torch.complex64).mul(1j).conj(),
    }
    torch.save(saved, tmp_path / "m.pth")
    targets = {
        "contiguous": {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in saved.items()},
        "like": {key: torch.zeros_like(value) for key, value in saved.items()},
        "turned": {
            key: torch.zeros(tuple(reversed(value.shape)), dtype=value.dtype).permute(
                tuple(reversed(range(value.dim())))
            )
            for key, value in saved.items()
        },
    }
    for target in targets.values():
        with zipslicer.load(tmp_path / "m.pth") as sd:
            sd.load_into(target)
        for key, value in saved.items():
            assert torch.equal(target[key], value), key


def test_a_view_of_something_larger_is_filled_alone(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2, 3)}, tmp_path / "m.pth")
    whole = torch.zeros(4, 5)
    with zipslicer.load(tmp_path / "m.pth") as sd:
        sd.load_into({"w": whole[1:3, 1:4]})
    assert whole.sum() == 6
    assert whole[1:3, 1:4].sum() == 6


def test_memory_that_was_given_away_is_not_written_to(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1000)}, tmp_path / "m.pth")
    target = torch.zeros(1000)
    target.untyped_storage().resize_(0)
    with zipslicer.load(tmp_path / "m.pth") as sd, pytest.raises(RuntimeError, match="was resized"):
        sd.load_into({"w": target})


def test_a_module_on_the_meta_device_gets_tensors(path: Path) -> None:
    with torch.device("meta"):
        module = network()
    module.half()
    with zipslicer.load(path) as sd:
        sd.load_into(module)
    assert not any(each.is_meta for each in [*module.parameters(), module[3].kept])
    assert module[2][0].weight.dtype == torch.float16
    assert module[2][0].weight.equal(torch.load(path)["2.0.weight"].half())
    assert module[3].head.weight is module[3].embed.weight
    assert isinstance(module[3].head.weight, nn.Parameter)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, "bfloat16"])
def test_assign_puts_new_tensors(path: Path, dtype: Any) -> None:
    module = network().half()
    module[2][0].weight.requires_grad_(False)
    before = module[2][0].weight
    with zipslicer.load(path) as sd:
        sd.load_into(module, assign=True, dtype=dtype)
    after = module[2][0].weight
    assert after is not before
    assert (after.dtype, after.requires_grad) == (torch.bfloat16 if dtype else torch.float32, False)
    assert after.equal(torch.load(path)["2.0.weight"].to(after.dtype))
    assert module[3].head.weight is module[3].embed.weight


@pytest.mark.parametrize(("bad", "error"), [(torch.int8, TypeError), ("int8", ValueError), ("x", ValueError)])
def test_a_dtype_that_is_none(path: Path, bad: Any, error: type[Exception]) -> None:
    with zipslicer.load(path) as sd, pytest.raises(error, match="dtype"):
        sd.load_into({}, strict=False, dtype=bad)


@pytest.mark.parametrize(
    ("names", "prefix"),
    [
        (("module.weight", "module.bias"), "module."),
        (("module.weight", "module.bias", "step"), "module."),
        (("other.weight", "bias"), "other."),
        (("x.weight", "y.bias"), None),
        (("weights", "biases"), None),
    ],
)
def test_a_prefix_of_all_names_is_told(tmp_path: Path, names: tuple[str, ...], prefix: str | None) -> None:
    torch.save(dict.fromkeys(names, torch.ones(2, 2)), tmp_path / "m.pth")
    module = nn.Linear(2, 2)
    module.bias = nn.Parameter(torch.zeros(2, 2))
    with zipslicer.load(tmp_path / "m.pth") as sd, pytest.raises(RuntimeError, match="Missing key") as caught:
        sd.load_into(module)
    hint = f"key_map=lambda key: key.removeprefix({prefix!r})"
    assert (hint in str(caught.value)) if prefix else ("removeprefix" not in str(caught.value))


def test_key_map_and_edits(tmp_path: Path) -> None:
    torch.save({"module.weight": torch.ones(2, 2), "module.bias": torch.ones(2), "step": 3}, tmp_path / "m.pth")
    module = nn.Linear(2, 2)
    with zipslicer.load(tmp_path / "m.pth") as sd:
        sd.load_into(module, key_map=lambda key: key.removeprefix("module.") if key != "step" else None)
        assert module.weight.sum() == 4
        assert list(sd) == ["module.weight", "module.bias", "step"]
        del sd["step"]
        sd["module.bias"] = torch.full((2,), 7.0)
        sd.load_into(module, key_map={"module.weight": "weight", "module.bias": "bias"})
    assert module.bias.tolist() == [7, 7]


# ---------------------------------------------------------------- modules that load in their own way


def test_overrides_and_hooks_are_honoured(tmp_path: Path) -> None:
    saved = {"0.w": torch.ones(2, 2), "0.bias": torch.ones(2), "1.old": torch.ones(2, 2), "1.bias": torch.zeros(2)}
    torch.save(saved, tmp_path / "m.pth")

    def make() -> tuple[Any, list[Any]]:
        module, told = nn.Sequential(Renaming(2, 2), nn.Linear(2, 2)), []

        def before(_: Any, state_dict: Any, prefix: str, *__: Any) -> None:
            state_dict[prefix + "weight"] = state_dict.pop(prefix + "old")

        module[1].register_load_state_dict_pre_hook(before)
        for each in (module, module[0], module[1]):
            each.register_load_state_dict_post_hook(lambda m, keys: told.append((type(m).__name__, tuple(keys))))
        return module, told

    (ours, heard), (theirs, expected) = make(), make()
    theirs.load_state_dict(torch.load(tmp_path / "m.pth"))
    with zipslicer.load(tmp_path / "m.pth") as sd:
        sd.load_into(ours)
    assert same(ours, theirs)
    assert heard == expected


class Adapting(nn.Module):  # type: ignore[misc]
    """A module that loads by itself, with others in it that do not, and one that does."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1))
        self.inner = nn.Sequential(nn.Linear(2, 2), Extra(2, 2), None)
        self.old = Renaming(2, 2)
        self.none = None
        self.register_module("absent", None)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        state_dict[prefix + "scale"] = state_dict.pop(prefix + "log_scale").exp()
        super()._load_from_state_dict(state_dict, prefix, *rest)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_module_that_loads_by_itself_holds_others(tmp_path: Path, device: str) -> None:
    made = randomized(nn.Sequential(Adapting(), nn.Linear(2, 2)))
    saved = made.state_dict()
    saved["0.log_scale"] = saved.pop("0.scale").log()
    saved["0.old.w"] = saved.pop("0.old.weight")
    torch.save(saved, tmp_path / "a.pt")
    with torch.device(device):
        target = nn.Sequential(Adapting(), nn.Linear(2, 2))
    report = zipslicer.load(tmp_path / "a.pt").load_into(target, strict=False)
    assert report.missing_keys == []
    assert target[0].inner[1].told == {"version": 3, "table": [1, 2]}
    for key, value in target.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.allclose(value, made.state_dict()[key]), key


def test_rows_longer_than_a_chunk_are_cut(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zipslicer.module.CHUNK_NBYTES", 16)
    target = network().to(torch.float64)
    zipslicer.load(path).load_into(target)
    reference = network()
    reference.load_state_dict(torch.load(path))
    for key, value in reference.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(target.state_dict()[key], value.to(target.state_dict()[key].dtype)), key


def test_of_many_that_do_not_fit_some_are_named(tmp_path: Path) -> None:
    torch.save({f"w{i}": torch.zeros(2) for i in range(20)}, tmp_path / "a.pt")
    with pytest.raises(RuntimeError, match="and 12 more that do not fit"):
        zipslicer.load(tmp_path / "a.pt").load_into({f"w{i}": torch.zeros(3) for i in range(20)})


def test_a_mapping_that_takes_no_items_gets_no_new_tensors(path: Path) -> None:
    key = next(iter(zipslicer.load(path)))
    with pytest.raises(TypeError, match="cannot be put into a mappingproxy"):
        zipslicer.load(path).load_into(types.MappingProxyType({key: torch.zeros(1, device="meta")}), strict=False)


def test_lazy_modules(tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "m.pth")
    module = nn.LazyLinear(2)
    with zipslicer.load(tmp_path / "m.pth") as sd:
        sd.load_into(module)
    assert module.weight.equal(torch.load(tmp_path / "m.pth")["weight"])


def test_batch_norm_of_before_its_counter(tmp_path: Path) -> None:
    state = nn.BatchNorm1d(2).state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1
    torch.save(state, tmp_path / "m.pth")
    module = nn.BatchNorm1d(2)
    with zipslicer.load(tmp_path / "m.pth") as sd:
        assert sd.load_into(module) == ([], [], [], [])


# ---------------------------------------------------------------- optimizers


def stepped(make: Any, dtype: Any = torch.float32, steps: int = 2) -> tuple[Any, Any]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)
    optimizer = make(module)
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.ones(2, 3, dtype=dtype)).sum().backward()
        optimizer.step()
    return module, optimizer


def alike(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return type(one) is type(other) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(alike(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(alike, one, other))
    return bool(one == other)


OPTIMIZERS = {
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.1, amsgrad=True),
    "adamw in groups": lambda m: torch.optim.AdamW(
        [{"params": m[0].parameters(), "lr": 0.5}, {"params": m[1].parameters()}]
    ),
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "lr as tensor": lambda m: torch.optim.Adam(m.parameters(), lr=torch.tensor(0.1)),
    "named": lambda m: torch.optim.Adam(m.named_parameters(), lr=0.1),
    "adagrad": lambda m: torch.optim.Adagrad(m.parameters()),
}


@pytest.mark.parametrize("steps", [0, 1], ids=["fresh", "stepped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_as_torch_loads_it(tmp_path: Path, name: str, dtype: Any, steps: int) -> None:
    _, saved = stepped(OPTIMIZERS[name], steps=3)
    torch.save({"optimizer": saved.state_dict(), "epoch": 1}, tmp_path / "m.pth")
    (_, ours), (_, theirs) = (stepped(OPTIMIZERS[name], dtype, steps) for _ in range(2))
    pointers = {id(v): v.data_ptr() for state in ours.state.values() for v in state.values() if torch.is_tensor(v)}
    theirs.load_state_dict(torch.load(tmp_path / "m.pth", weights_only=True)["optimizer"])
    with zipslicer.load(tmp_path / "m.pth") as sd:
        sd["optimizer"].load_into(ours)
    assert alike(ours.state_dict(), theirs.state_dict())
    kept = [v for state in ours.state.values() for v in state.values() if id(v) in pointers]
    assert all(v.data_ptr() == pointers[id(v)] for v in kept)
    assert bool(kept) == bool(pointers)
    ours.step()


def test_an_optimizer_that_does_not_fit(tmp_path: Path) -> None:
    _, saved = stepped(OPTIMIZERS["adam"])
    torch.save(saved.state_dict(), tmp_path / "m.pth")
    _, other = stepped(OPTIMIZERS["adamw in groups"])
    with zipslicer.load(tmp_path / "m.pth") as sd, pytest.raises(ValueError, match="parameter groups"):
        sd.load_into(other)


def test_hooks_of_an_optimizer(tmp_path: Path) -> None:
    _, saved = stepped(OPTIMIZERS["adam"])
    torch.save(saved.state_dict(), tmp_path / "m.pth")
    told: list[str] = []
    _, ours = stepped(OPTIMIZERS["adam"])
    ours.register_load_state_dict_post_hook(lambda _: told.append("after"))
    with zipslicer.load(tmp_path / "m.pth") as sd:
        sd.load_into(ours)
        ours.register_load_state_dict_pre_hook(lambda *_: told.append("before"))
        sd.load_into(ours)
    assert told == ["after", "before", "after"]


# ---------------------------------------------------------------- what does not fit


def test_what_is_wrong_is_told_before_anything_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(3, 3))
    torch.save({"0.weight": torch.ones(4, 4), "0.bias": torch.ones(5), "1.weight": 3, "more": torch.ones(1)}, path)
    before = copy.deepcopy(module.state_dict())
    with zipslicer.load(path) as sd:
        with pytest.raises(RuntimeError) as caught:
            sd.load_into(module)
        for told in (
            'Missing key(s) in state_dict: "1.bias"',
            'Unexpected key(s) in state_dict: "more"',
            "0.bias: the file has the shape (5,), the target (4,)",
            "1.weight: the file has no tensor",
        ):
            assert told in str(caught.value)
        assert all(value.equal(before[key]) for key, value in module.state_dict().items())
        with pytest.raises(RuntimeError, match=r"0\.bias"):
            sd.load_into(module, strict=False)  # a shape is never let pass, as in torch
        del sd["0.bias"], sd["1.weight"]
        report = sd.load_into(module, strict=False)
    assert (report.missing_keys, report.unexpected_keys) == (["0.bias", "1.weight", "1.bias"], ["more"])
    assert module[0].weight.sum() == 16


def test_integers_that_are_narrowed_are_warned_of(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(3)}, tmp_path / "m.pth")
    target = {"w": torch.zeros(3, dtype=torch.int16)}
    with zipslicer.load(tmp_path / "m.pth") as sd:
        with pytest.warns(UserWarning, match="narrowed from torch.int64 to torch.int16"):
            sd.load_into(target)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sd.load_into({"w": torch.zeros(3)})
    assert target["w"].tolist() == [0, 1, 2]


def test_other_targets(path: Path) -> None:
    with zipslicer.load(path) as sd:
        with pytest.raises(TypeError, match="not list"):
            sd.load_into([])
        with pytest.raises(RuntimeError, match="Unexpected"):
            sd.load_into({})
    with zipslicer.load(path, framework="np") as sd, pytest.raises(ValueError, match="framework"):
        sd.load_into(nn.Linear(1, 1))


def test_a_mapping_of_meta_tensors_is_filled_with_real_ones(path: Path) -> None:
    target = {key: value.to("meta") for key, value in torch.load(path).items() if isinstance(value, torch.Tensor)}
    with zipslicer.load(path) as sd:
        sd.load_into(target, strict=False)
        for key, value in target.items():
            assert value.equal(sd[key])


def test_damage_names_its_key(path: Path) -> None:
    torch.save({"a": torch.arange(10.0), "b": torch.arange(10.0)}, path)
    target = {"a": torch.zeros(10), "b": torch.zeros(10)}
    with zipslicer.load(path) as sd:
        archive = sd._view.table.archive
        offset = archive.field(archive.find(["data/1"])[0], 0)
    content = bytearray(path.read_bytes())
    content[offset + 30] ^= 1
    path.write_bytes(content)
    with zipslicer.load(path) as sd:
        with pytest.raises(ZipSlicerError) as caught:
            sd.load_into(target)
        assert caught.value.key == "b"
    sd = zipslicer.load(path)
    path.write_bytes(content[:-200])
    with pytest.raises(ChangedError):
        sd.load_into(target)


def test_from_compressed_and_foreign_files(tmp_path: Path) -> None:
    import zipfile

    torch.save({"w": torch.arange(1000.0)}, tmp_path / "m.pth")
    with (
        zipfile.ZipFile(tmp_path / "m.pth") as stored,
        zipfile.ZipFile(tmp_path / "z.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    target = {"w": torch.zeros(1000)}
    with zipslicer.load(tmp_path / "z.pth") as sd:
        sd.load_into(target)
    assert target["w"].equal(torch.arange(1000.0))


def test_progress(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    with zipslicer.load(path) as sd:
        sd.load_into(network(), progress=True)
    assert "100%" in capsys.readouterr().err
