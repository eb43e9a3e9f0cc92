"""LazyStateDict, LazySequence, LazySlice: what a user holds, and that holding it reads nothing."""

from __future__ import annotations

import collections
import copy
import io
import json
import pickle
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import makers
import pytest
from makers import Pickle

import zipslicer
from zipslicer.errors import ArchiveError, ChangedError, TableError
from zipslicer.program import Builder

torch = pytest.importorskip("torch")


def saved(tree: Any) -> bytes:
    file = io.BytesIO()
    torch.save(tree, file)
    return file.getvalue()


def loaded(tree: Any, **keywords: Any) -> Any:
    return zipslicer.load(saved(tree), **keywords)


def equal(one: Any, other: Any) -> bool:
    """Whether two trees are of the same classes, with equal tensors."""
    if isinstance(one, torch.Tensor):
        return type(one) is type(other) and one.dtype == other.dtype and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other))
    return bool(one == other)


class NoReading(io.BytesIO):
    """A file object that refuses to be read once it is told to."""

    closed_to_reads = False

    def readinto(self, buffer: Any) -> int:
        assert not self.closed_to_reads, "something was read"
        return super().readinto(buffer)


def unread(tree: Any) -> Any:
    """Opened, and not to be read from any more."""
    file = NoReading(saved(tree))
    sd = zipslicer.load(file)
    file.closed_to_reads = True
    return sd


TREE = {
    "w": torch.arange(6.0).view(2, 3),
    "model": collections.OrderedDict(a=torch.ones(2), b=torch.zeros(3, dtype=torch.int8)),
    "list": [torch.zeros(1), {"deep": (torch.ones(1), 5)}],
    "step": 7,
    "config": {"lr": 0.1, "betas": [0.9, 0.99]},
    3: torch.full((2,), 3.0),
}


@pytest.fixture
def sd() -> Any:
    return loaded(TREE)


@pytest.fixture
def path(tmp_path: Any) -> Any:
    made = tmp_path / "a.pt"
    made.write_bytes(saved(TREE))
    return made


# --- a mapping ----------------------------------------------------------------------------------------------------------


def test_it_is_a_mutable_mapping_and_no_dict(sd: Any) -> None:
    assert isinstance(sd, MutableMapping)
    assert not isinstance(sd, dict)
    with pytest.raises(TypeError, match=r"zipslicer\.load"):
        zipslicer.LazyStateDict({})
    with pytest.raises(TypeError):
        hash(sd)


def test_keys_keep_the_files_order_and_types(sd: Any) -> None:
    assert list(sd) == list(sd.keys()) == list(TREE)
    assert list(reversed(sd)) == list(reversed(TREE))
    assert len(sd) == 6


def test_listing_reads_nothing() -> None:
    sd = unread(TREE)
    assert "w" in sd
    assert 3 in sd
    assert "none" not in sd
    assert (len(sd), list(sd)) == (6, list(TREE))
    assert sd.get_meta("w").shape == (2, 3)
    assert sd.get_meta("step") is sd.get_meta("model") is None
    assert sd.get("none", 5) == 5
    assert sd["step"] == 7
    assert sd["config"] == TREE["config"]
    assert sd["model"].get_meta("b").dtype_name == "int8"
    assert sd["list"][1]["deep"][1] == 5
    sd.select("w", "m*").rename(str.upper).flatten()
    sd.flatten().rename(str).select("*")
    sd.offset_keys()
    repr(sd), sd._repr_html_(), repr(sd["list"]), repr(sd.get_slice("w"))
    assert sd == sd.copy()
    copy.deepcopy(sd)
    del sd["w"]
    sd["x"] = 1


def test_touching_reads() -> None:
    """So that the test above can fail."""
    with pytest.raises(AssertionError, match="something was read"):
        unread(TREE)["w"]


def test_values_and_items(sd: Any) -> None:
    assert [key for key, _ in sd.items()] == list(TREE)
    assert equal(dict(sd.items())["w"], TREE["w"])
    assert isinstance(list(sd.values())[1], zipslicer.LazyStateDict)


def test_a_missing_key_names_near_ones(sd: Any) -> None:
    with pytest.raises(KeyError, match=r"'modle' is not in this checkpoint; near it: 'model'") as caught:
        sd["modle"]
    assert caught.value.args == ("modle",)
    assert str(pickle.loads(pickle.dumps(caught.value))) == "'modle' is not in this checkpoint"
    for act in (sd.get_meta, sd.get_slice, sd.get_tensor, sd.get_shape, sd.__delitem__, sd.pop, sd.select):
        with pytest.raises(KeyError, match="near it: 'model'"):
            act("modle")
    with pytest.raises(KeyError, match="is not in this checkpoint"):
        sd[None]


def test_looking_for_near_keys_costs_little() -> None:
    """The search is quadratic in the length of a key: long ones are left out of it."""
    sd = loaded({"k" * 1_000_000 + str(i): torch.zeros(1) for i in range(5)})
    with pytest.raises(KeyError) as caught:
        sd["k" * 1_000_000]
    assert len(str(caught.value)) < 200
    with pytest.raises(KeyError) as caught:
        sd["kk"]
    assert str(caught.value) == "'kk' is not in this checkpoint"


# --- overlay ------------------------------------------------------------------------------------------------------------


def test_assignments_and_deletions_overlay_the_file(path: Any) -> None:
    before = path.read_bytes()
    sd = zipslicer.load(path)
    sd["w"] = torch.zeros(1)
    sd["new"] = "text"
    del sd["step"]
    assert sd.pop("config") == TREE["config"]
    assert sd.setdefault("model", 5) is sd["model"]
    assert sd.setdefault("other", 5) == 5
    sd.update({"other": 6})
    assert list(sd) == ["w", "model", "list", 3, "new", "other"]
    assert (sd["w"].shape, sd["other"]) == ((1,), 6)
    assert sd.get_meta("w").shape == (1,)
    assert sd.get_slice("w")[0].item() == 0
    assert path.read_bytes() == before
    assert list(zipslicer.load(path)) == list(TREE)
    sd.clear()
    assert list(sd) == []
    assert sd.materialize() == {}


def test_nested_containers_are_lazy_and_held(sd: Any) -> None:
    assert isinstance(sd["model"], zipslicer.LazyStateDict)
    assert isinstance(sd["list"], zipslicer.LazySequence)
    assert isinstance(sd["list"], Sequence)
    sd["model"]["new"] = torch.ones(1)
    sd["list"][1]["new"] = 5
    assert sd["model"] is sd["model"]
    assert list(sd["model"]) == ["a", "b", "new"]
    assert sd["list"][1]["new"] == 5


def test_containers_without_tensors_are_plain_and_held(sd: Any) -> None:
    assert type(sd["config"]) is dict
    assert json.dumps(sd["config"]) == json.dumps(TREE["config"])
    sd["config"]["lr"] = 0.5
    assert sd["config"]["lr"] == 0.5


def test_a_dict_that_contains_itself_is_itself() -> None:
    tree: dict[str, Any] = {"w": torch.zeros(1)}
    tree["me"] = [tree]
    sd = loaded(tree)
    assert sd["me"][0] is sd
    made = sd.materialize()
    assert made["me"][0] is made
    sd["x"] = 1
    made = sd.materialize()
    assert made["me"][0] is made
    assert made["x"] == 1
    assert "LazyStateDict" in repr(sd)


def test_sequences(sd: Any) -> None:
    lazy = loaded([torch.zeros(1), (torch.ones(2), "x"), 3])
    assert (len(lazy), lazy[-1], lazy[1][1]) == (3, 3, "x")
    assert [type(value) for value in lazy[1:]] == [zipslicer.LazySequence, int]
    assert lazy.get_meta(0).shape == (1,)
    assert lazy.get_meta(2) is None
    assert 3 in lazy[2:]
    with pytest.raises(IndexError):
        lazy[3]
    with pytest.raises(TypeError):
        lazy[0] = 1
    assert repr(lazy) == "LazySequence([TensorInfo(float32, [1]), LazySequence of 2, 3])"
    assert equal(lazy.materialize(), [torch.zeros(1), (torch.ones(2), "x"), 3])
    assert lazy == lazy  # noqa: PLR0124
    assert lazy != loaded([torch.zeros(1)])


# --- metadata of a state dict ------------------------------------------------------------------------------------------


def test_metadata_is_kept() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    state = model.state_dict()
    sd = loaded(state)
    assert sd._metadata == state._metadata
    assert sd.select("0.*")._metadata == state._metadata
    for made in (sd.materialize(), sd.copy().materialize(), sd.select("*").materialize()):
        assert type(made) is collections.OrderedDict
        assert made._metadata == state._metadata  # type: ignore[attr-defined]
    assert "_metadata" not in sd
    assert loaded(TREE)._metadata is None


def test_metadata_can_be_set(sd: Any) -> None:
    sd._metadata = {"": {"version": 1}}
    assert sd.materialize()._metadata == {"": {"version": 1}}


def test_a_model_takes_it_as_a_state_dict() -> None:
    torch.manual_seed(0)
    model, other = (torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)) for _ in range(2))
    assert not equal(model.state_dict(), other.state_dict())
    assert other.load_state_dict(loaded(model.state_dict())).missing_keys == []
    assert equal(model.state_dict(), other.state_dict())


def test_an_optimizer_takes_what_was_materialized() -> None:
    def trained() -> tuple[Any, Any]:
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        return model, optimizer

    model, optimizer = trained()
    sd = loaded({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3})
    assert sd["optimizer"]["state"][0]["exp_avg"].shape == (2, 3)
    _, other = trained()
    other.load_state_dict(sd["optimizer"].materialize())
    assert equal(other.state_dict(), optimizer.state_dict())


# --- the names of safetensors' safe_open ---------------------------------------------------------------------------------


def test_names_of_safe_open(sd: Any) -> None:
    with sd as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_shape("w") == [2, 3]
        assert file.get_dtype("w") == "F32"
        assert equal(file.get_tensor("w"), TREE["w"])
        part = file.get_slice("w")
        assert (part.get_shape(), part.get_dtype()) == ([2, 3], "F32")
        assert (part.shape, part.dtype, len(part)) == ((2, 3), torch.float32, 2)
        assert equal(part[1:, :2], TREE["w"][1:, :2])
        for act in (file.get_tensor, file.get_slice, file.get_shape, file.get_dtype):
            with pytest.raises(TypeError, match="is no tensor"):
                act("step")


def test_offset_keys_are_in_the_order_of_the_bytes() -> None:
    program = Pickle().raw(b"}(")
    for key in ("b", "c", "a"):
        program.text(key).tensor("FloatStorage", key, 1, size=(1,), stride=(1,))
    program.text("n").integer(5).raw(b"u")
    sd = zipslicer.load(makers.checkpoint(program.stop(), dict.fromkeys("abc", bytes(4))).data)
    assert list(sd) == ["b", "c", "a", "n"]
    assert sd.offset_keys() == ["a", "b", "c"]
    sd["own"] = torch.zeros(1)
    assert sd.offset_keys() == ["a", "b", "c", "own"]


def test_codes_without_a_safetensors_name() -> None:
    assert loaded({"w": torch.zeros(1, dtype=torch.complex128)}).get_dtype("w") == "complex128"


def test_a_slice_of_a_scalar() -> None:
    part = loaded({"w": torch.tensor(5.0)}).get_slice("w")
    assert part[()].item() == part[...].item() == 5
    with pytest.raises(TypeError, match="0-d"):
        len(part)
    with pytest.raises(IndexError):
        part[0]


# --- select, flatten, rename -------------------------------------------------------------------------------------------


def test_select_by_name_and_glob() -> None:
    sd = loaded({f"layer{i}.{name}": torch.full((1,), float(i)) for i in range(12) for name in ("w", "b")})
    assert list(sd.select("layer1.*")) == ["layer1.w", "layer1.b"]
    assert list(sd.select("layer?.w", "layer11.b")) == [f"layer{i}.w" for i in range(10)] + ["layer11.b"]
    assert list(sd.select(["layer3.w"], {"layer2.w"})) == ["layer2.w", "layer3.w"]
    assert list(sd.select("layer[01].b")) == ["layer0.b", "layer1.b"]
    assert list(sd.select("none*")) == []
    assert sd.select("layer3.*")["layer3.b"].item() == 3
    assert equal(sd.select("layer3.*").materialize(), {key: torch.full((1,), 3.0) for key in ("layer3.w", "layer3.b")})


def test_a_key_is_meant_before_a_glob() -> None:
    sd = loaded({"a*": torch.zeros(1), "ab": torch.ones(1), "a[1]": torch.ones(1)})
    assert list(sd.select("a*")) == ["a*"]
    assert list(sd.select("a[1]")) == ["a[1]"]
    assert list(sd.select("a?")) == ["a*", "ab"]


def test_select_is_a_view(sd: Any) -> None:
    part = sd.select("w", "model", 3)
    assert list(part) == ["w", "model", 3]
    assert part["model"] is sd["model"]
    part["w"] = 1
    assert sd["w"].shape == (2, 3)
    with pytest.raises(KeyError):
        part["step"]
    with pytest.raises(KeyError, match="'modle'"):
        sd.select("w", "modle")


def test_select_sees_the_overlay(sd: Any) -> None:
    sd["wx"] = torch.ones(1)
    assert equal(sd.select("w*").materialize(), {"w": TREE["w"], "wx": torch.ones(1)})


def test_flatten(sd: Any) -> None:
    flat = sd.flatten()
    assert list(flat) == ["w", "3", "model.a", "model.b", "list.0", "list.1.deep.0"]
    assert flat["model.a"].tolist() == [1, 1]
    assert list(sd.flatten("/"))[-1] == "list/1/deep/0"
    sd["own"] = {"t": torch.ones(2), "n": 5, "l": [torch.zeros(1)]}
    sd["model"]["more"] = torch.ones(3)
    flat = sd.flatten()
    assert [key for key in flat if key.startswith(("own", "model"))] == [
        "model.a",
        "model.b",
        "model.more",
        "own.t",
        "own.l.0",
    ]
    assert flat.get_meta("own.t").shape == (2,)
    assert flat.materialize()["model.more"].shape == (3,)


def test_flatten_takes_a_foreign_tensor_for_what_it_is() -> None:
    one = loaded({"a": torch.zeros(1), "b": torch.zeros(2)})
    one["other"] = loaded({"x": torch.ones(3), "deep": {"y": torch.full((2,), 7.0)}})
    assert {key: tensor.tolist() for key, tensor in one.flatten().items()} == {
        "a": [0],
        "b": [0, 0],
        "other.x": [1, 1, 1],
        "other.deep.y": [7, 7],
    }


def test_flatten_loses_no_tensor() -> None:
    sd = loaded({"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}})
    with pytest.raises(ValueError, match=r"'a\.b'.*separator"):
        sd.flatten()
    assert list(sd.flatten("/")) == ["a.b", "a/b"]


def test_rename_is_in_place(sd: Any) -> None:
    sd["own"] = 5
    assert sd.rename(lambda key: f"x.{key}") is sd
    assert list(sd) == [f"x.{key}" for key in [*TREE, "own"]]
    assert equal(sd["x.w"], TREE["w"])
    assert sd["x.own"] == 5
    sd.rename({"x.w": "w", "x.own": "own"})
    assert next(iter(sd)) == "w"
    made = sd.materialize()
    assert list(made) == list(sd)
    assert equal(made["w"], TREE["w"])


def test_a_collision_renames_nothing(sd: Any) -> None:
    for names in (lambda key: "same", {"w": "step"}, {"w": "x", "step": "x"}):
        with pytest.raises(ValueError, match="two keys would be called"):
            sd.rename(names)
    with pytest.raises(KeyError, match="'none'"):
        sd.rename({"w": "x", "none": "y"})
    assert list(sd) == list(TREE)


def test_names_may_be_swapped(sd: Any) -> None:
    sd.rename({"w": "step", "step": "w"})
    assert sd["w"] == 7
    assert equal(sd["step"], TREE["w"])


# --- materialize -------------------------------------------------------------------------------------------------------


def test_materialize_is_what_torch_load_returns(sd: Any) -> None:
    assert equal(sd.materialize(), torch.load(io.BytesIO(saved(TREE)), weights_only=True))


def test_edits_are_in_it_wherever_they_were_made(sd: Any) -> None:
    sd["model"]["new"] = torch.ones(1)
    del sd["model"]["a"]
    sd["list"][1]["deep2"] = 5
    sd["config"]["lr"] = 0.5
    sd["config"]["betas"].append(1)
    made = sd.materialize()
    assert list(made["model"]) == ["b", "new"]
    assert type(made["model"]) is collections.OrderedDict
    assert equal(made["list"], [torch.zeros(1), {"deep": (torch.ones(1), 5), "deep2": 5}])
    assert made["config"] == {"lr": 0.5, "betas": [0.9, 0.99, 1]}
    made["config"]["lr"] = 1
    assert sd["config"]["lr"] == 0.5
    assert list(sd["model"].materialize()) == ["b", "new"]
    assert list(sd["list"].materialize()[1]) == ["deep", "deep2"]
    assert list(sd.select("model").materialize()["model"]) == ["b", "new"]


def test_tied_weights_stay_tied_after_an_edit() -> None:
    base = torch.arange(4.0)
    sd = loaded({"a": {"w": base}, "b": [{"w": base}], "c": base[1:]})
    sd["a"], sd["b"][0]
    sd["b"][0]["x"] = 1
    sd["new"] = 2
    made = sd.materialize()
    addresses = {t.untyped_storage().data_ptr() for t in (made["a"]["w"], made["b"][0]["w"], made["c"])}
    assert len(addresses) == 1
    assert made["b"][0]["x"] == 1


def test_what_was_deleted_is_not_read() -> None:
    program = Pickle().raw(b"}(")
    for key in ("good", "bad"):
        program.text(key).raw(b"}").text("w").tensor("FloatStorage", key, 1, size=(1,), stride=(1,)).raw(b"s")
    sd = zipslicer.load(makers.checkpoint(program.raw(b"u").stop(), {"good": bytes(4)}).data)
    with pytest.raises(ArchiveError, match="no such record"):
        sd.materialize()
    del sd["bad"]["w"]
    made = sd.materialize()
    assert list(made) == ["good", "bad"]
    assert made["bad"] == {}


def test_a_container_of_the_file_can_be_put_elsewhere(sd: Any) -> None:
    sd["again"] = sd["model"]
    sd["items"] = sd["list"]
    sd["flat"] = sd.flatten()
    made = sd.materialize()
    assert made["again"] is made["model"]
    assert made["items"] is made["list"]
    assert equal(made["flat"]["w"], TREE["w"])


def test_a_defaultdict_stays_one() -> None:
    sd = loaded(collections.defaultdict(list, w=torch.zeros(1)))
    assert type(sd.materialize()) is collections.defaultdict
    sd["x"] = 1
    made = sd.materialize()
    assert type(made) is collections.defaultdict
    assert made["none"] == []


def test_a_missing_key_says_where_it_may_be() -> None:
    nested = loaded({"state_dict": {"a.weight": torch.ones(2)}, "epoch": 3})
    with pytest.raises(KeyError, match=r"\['state_dict'\]\['a.weight'\], or in zipslicer.open") as caught:
        nested["state_dict.a.weight"]
    assert nested["state_dict"]["a.weight"].tolist() == [1, 1]
    with pytest.raises(KeyError, match="which has 'state_dict', 'epoch'"):
        nested["layers"]
    assert "near" not in str(caught.value)
    many = loaded({f"{i}": torch.ones(1) for i in range(20)})
    with pytest.raises(KeyError, match=r"'layers' is not in this checkpoint$"):
        many["layers"]


def test_get_tensors(sd: Any) -> None:
    made = sd.get_tensors([3, "w"])
    assert list(made) == [3, "w"]
    assert equal(made["w"], TREE["w"])
    sd["own"] = torch.ones(1)
    assert sd.get_tensors(["own"])["own"] is sd["own"]
    with pytest.raises(TypeError, match="is no tensor"):
        sd.get_tensors(["w", "step"])
    with pytest.raises(KeyError):
        sd.get_tensors(["none"])
    with pytest.raises(TypeError, match="'w' is one"):
        sd.get_tensors("w")


# --- errors have keys -----------------------------------------------------------------------------------------------------


def test_damage_of_one_record_is_an_error_of_its_key() -> None:
    written = makers.Zip()
    program = Pickle().raw(b"}(")
    for key in ("good", "bad"):
        program.text(key).tensor("FloatStorage", key, 1, size=(1,), stride=(1,))
    written.add("a/data.pkl", program.raw(b"u").stop())
    written.add("a/data/good", bytes(4))
    written.add("a/data/bad", bytes(4), local={"signature": b"XXXX"})
    sd = zipslicer.load(written.finish().data)
    for act in (
        lambda: sd["bad"],
        lambda: sd.get_slice("bad")[0],
        lambda: sd.get_tensor("bad"),
        lambda: sd.get_tensors(["good", "bad"]),
        sd.materialize,
    ):
        with pytest.raises(ArchiveError) as caught:
            act()
        assert caught.value.key == "bad"
    assert sd["good"].tolist() == [0]


# --- lifetime -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["path", "bytes", "file"])
def test_closed_is_closed(path: Any, source: str) -> None:
    given = {"path": path, "bytes": saved(TREE), "file": io.BytesIO(saved(TREE))}[source]
    with zipslicer.load(given) as sd:
        kept, part, nested, listed = sd["w"], sd.get_slice("w"), sd["model"], sd["list"]
    for act in (
        lambda: sd["w"],
        lambda: part[0],
        lambda: nested["a"],
        lambda: listed[0],
        sd.materialize,
        listed.materialize,
    ):
        with pytest.raises(ValueError, match="closed"):
            act()
    assert equal(kept, TREE["w"])
    assert list(sd) == list(TREE)
    assert sd.get_meta("w").shape == (2, 3)
    assert "w" in repr(sd)
    sd.close()


def test_nothing_stays_open_when_nothing_refers_to_it(path: Any) -> None:
    import gc
    import os

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc here")

    def count() -> int:
        gc.collect()
        return sum(str(path) == os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))

    sd = zipslicer.load(path)
    nested = sd["model"]
    assert count() == 1
    del sd
    assert count() == 1
    del nested
    assert count() == 0
    with pytest.raises(zipslicer.UnsafeError):
        zipslicer.open(_with_stranger(path), unknown="error")
    assert count() == 0


def _with_stranger(path: Any) -> Any:
    path.write_bytes(makers.checkpoint(Pickle().name("os", "system").stop()).data)
    return path


# --- pickle and copy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_it_pickles_by_path(path: Any, protocol: int) -> None:
    sd = zipslicer.load(path, dtype=torch.float16)
    text = pickle.dumps(sd, protocol)
    assert len(text) < 3000
    again = pickle.loads(text)
    assert list(again) == list(TREE)
    assert again["w"].dtype == torch.float16
    assert equal(again.materialize(), sd.materialize())


def test_edits_are_pickled_wherever_they_were_made(path: Any) -> None:
    sd = zipslicer.load(path)
    sd["own"] = torch.ones(2)
    del sd["step"]
    sd["model"]["x"] = 5
    sd["list"][1]["y"] = 6
    sd["config"]["lr"] = 0.5
    sd._metadata = {"v": 1}
    again = pickle.loads(pickle.dumps(sd))
    assert equal(again.materialize(), sd.materialize())
    assert again["model"]["x"] == 5
    assert again["list"][1]["y"] == 6
    assert again["config"]["lr"] == 0.5
    assert again._metadata == {"v": 1}
    assert again["own"].tolist() == [1, 1]


def test_parts_pickle_too(path: Any) -> None:
    sd = zipslicer.load(path)
    sd["w2"] = torch.ones(1)
    for part in (sd["model"], sd["list"], sd.select("w*"), sd.flatten(), sd["list"][1], sd.copy()):
        assert equal(pickle.loads(pickle.dumps(part)).materialize(), part.materialize())
    together = pickle.loads(pickle.dumps((sd, sd["model"], sd.select("model"))))
    assert together[0]["model"] is together[2]["model"]


def test_renamed_keys_are_pickled(path: Any) -> None:
    sd = zipslicer.load(path).rename(lambda key: f"x.{key}")
    assert list(pickle.loads(pickle.dumps(sd))) == list(sd)


@pytest.mark.parametrize("given", [bytes, io.BytesIO])
def test_without_a_path_pickling_is_refused(given: Any) -> None:
    sd = zipslicer.load(given(saved(TREE)))
    for part in (sd, sd["model"], sd["list"], sd.select("w")):
        with pytest.raises(TypeError, match="no path to be pickled by"):
            pickle.dumps(part)


def test_another_file_at_the_path_is_noticed(path: Any) -> None:
    text = pickle.dumps(zipslicer.load(path))
    path.write_bytes(saved({"other": torch.zeros(1)}))
    with pytest.raises(ChangedError):
        pickle.loads(text)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        pickle.loads(text)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda sd: sd.copy()])
def test_copies_have_keys_of_their_own(sd: Any, again: Any) -> None:
    sd["own"] = [1]
    made = again(sd)
    assert made == sd or again is copy.deepcopy
    made["x"] = 1
    del made["w"]
    made.rename({"step": "steps"})
    assert list(sd) == [*TREE, "own"]
    assert list(made) == ["model", "list", "steps", "config", 3, "own", "x"]
    assert equal(made["model"]["a"], TREE["model"]["a"])
    assert (made["own"] is sd["own"]) == (again is not copy.deepcopy)


def test_a_deep_copy_has_nested_containers_of_its_own(sd: Any) -> None:
    sd["model"]["x"] = [1]
    sd["config"]["lr"] = 0.5
    made = copy.deepcopy(sd)
    assert (made["model"]["x"], made["config"]["lr"]) == ([1], 0.5)
    made["model"]["x"].append(2)
    made["model"]["y"] = 1
    made["list"][1]["z"] = 1
    made["config"]["lr"] = 1
    assert list(sd["model"]) == ["a", "b", "x"]
    assert sd["model"]["x"] == [1]
    assert list(sd["list"][1]) == ["deep"]
    assert sd["config"]["lr"] == 0.5
    assert equal(copy.deepcopy(sd["list"]).materialize(), sd["list"].materialize())
    assert len({id(part) for part in copy.deepcopy([sd["model"], sd["model"]])}) == 1


def test_equality_is_of_keys_and_metadata() -> None:
    sd = unread(TREE)
    assert sd == sd.copy()
    assert sd.select("*") != sd
    assert sd != dict.fromkeys(TREE)
    assert sd != 5
    other = sd.copy()
    other["x"] = 1
    assert sd != other
    del other["x"]
    assert sd == other
    other["w"] = 1
    assert sd != other


def test_torch_save_is_refused(path: Any) -> None:
    sd = zipslicer.load(path)
    for part in (sd, sd["list"], {"state": sd}, [sd["model"]]):
        with pytest.raises(TypeError, match="would write no tensors"):
            torch.save(part, io.BytesIO())
    assert equal(torch.load(io.BytesIO(saved(sd.materialize()))), sd.materialize())


# --- looks --------------------------------------------------------------------------------------------------------------


def test_repr_lists_keys(path: Any) -> None:
    assert repr(zipslicer.load(path)) == (
        f"LazyStateDict: 6 keys, 32 B in {str(path)!r}\n"
        "  w       float32        [2, 3]                   24 B\n"
        "  model   LazyStateDict  LazyStateDict of 2\n"
        "  list    LazySequence   LazySequence of 2\n"
        "  step    int            7\n"
        "  config  dict           dict of 2\n"
        "  3       float32        [2]                       8 B"
    )


def test_repr_of_many_keys_is_short() -> None:
    sd = loaded({f"k{i}": torch.zeros(1) for i in range(1000)})
    assert repr(sd).count("\n") == 25
    assert repr(sd).endswith("... 976 more")
    assert sd._repr_html_().count("<div>") == 1000
    assert repr(loaded([torch.zeros(1)] * 100)).endswith("... 76 more])")


EVIL = "\x1b[31mred\x1b[0m\r\n\x00\u202e<script>alert(1)</script>"


def test_no_key_reaches_the_terminal_or_the_page() -> None:
    sd = loaded({EVIL: torch.zeros(1), "t": EVIL, "n": {EVIL: [torch.zeros(1), EVIL]}, (EVIL, 1): torch.zeros(1)})
    sd["own" + EVIL] = EVIL
    for text in (repr(sd), repr(sd["n"]), repr(sd["n"][EVIL]), repr(sd.get_slice(EVIL)), sd._repr_html_()):
        assert all(line.isprintable() for line in text.split("\n"))
    assert "<script>" not in sd._repr_html_()


@pytest.mark.parametrize(
    "value",
    [
        "x" * 10_000_000,
        b"x" * 10_000_000,
        1 << 100_000,
        ("y" * 1_000_000,) * 5,
        (1 << 100_000,),
        range(1 << 100_000),
        [0] * 10**6,
    ],
    ids=["text", "bytes", "integer", "tuple", "large tuple", "range", "list"],
)
def test_a_repr_is_bounded(value: Any) -> None:
    sd = loaded({"w": torch.zeros(1), "v": value})
    assert len(repr(sd)) < 500
    assert len(sd._repr_html_()) < 2000
    assert len(repr(loaded([torch.zeros(1), value]))) < 500


def test_a_repr_of_long_keys_is_bounded() -> None:
    sd = loaded({"k" * 1_000_000 + str(i): torch.zeros(1) for i in range(5)} | {("k" * 1_000_000, 1): torch.zeros(1)})
    assert len(repr(sd)) < 2000
    assert len(sd._repr_html_()) < 5000


def test_a_repr_shows_what_is_wrong_and_goes_on() -> None:
    program = (
        Pickle().raw(b"}(").text("bad").raw(b"}").call("builtins", "set", lambda p: p.raw(b"]")).integer(1).raw(b"s")
    )
    program.text("w").tensor("FloatStorage", "0", 1, size=(1,), stride=(1,)).raw(b"u")
    sd = zipslicer.load(makers.checkpoint(program.stop(), {"0": bytes(4)}).data)
    assert "ProgramError" in repr(sd)
    assert "float32" in repr(sd)
    with pytest.raises(zipslicer.ProgramError):
        sd["bad"]


def test_attributes_of_a_placeholder_print_within_bounds() -> None:
    program = Pickle().call("pkg", "A").raw(b"}(").text("w").tensor("FloatStorage", "0", 1, size=(1,), stride=(1,))
    for i in range(1000):
        program.text(f"k{i}").text("v" * 1000)
    made = zipslicer.load(makers.checkpoint(program.raw(b"ub").stop(), {"0": bytes(4)}).data)
    attributes = zipslicer.describe(made).attributes
    assert isinstance(attributes, Mapping)
    assert len(attributes) == 1001
    assert len(repr(attributes)) < 5000
    assert "k5" in attributes
    assert attributes["w"].tolist() == [0]


def test_storages_as_values() -> None:
    storage = torch.arange(4, dtype=torch.uint8).untyped_storage()
    sd = loaded({"s": storage, "l": [storage, torch.zeros(1)]})
    assert sd.get_meta("s").nbytes == sd["l"].get_meta(0).nbytes == 4
    assert list(sd["s"]) == list(sd.get_tensor("s")) == [0, 1, 2, 3]
    with pytest.raises(TypeError, match="bare storage"):
        sd.get_slice("s")
    made = sd.materialize()
    assert made["s"].data_ptr() == made["l"][0].data_ptr()


def test_a_tensor_with_attributes() -> None:
    tensor = torch.nn.Parameter(torch.zeros(2))
    tensor.tag, tensor.more = "x", [torch.ones(1)]
    for got in (loaded({"w": tensor})["w"], loaded({"w": tensor}).materialize()["w"]):
        assert type(got) is torch.nn.Parameter
        assert got.tag == "x"
        assert got.more[0].item() == 1


def test_too_short_a_storage_is_an_error_of_its_key() -> None:
    program = Pickle().raw(b"}").text("w").tensor("FloatStorage", "0", 4, size=(4,), stride=(1,)).raw(b"s")
    sd = zipslicer.load(makers.checkpoint(program.stop(), {"0": bytes(8)}).data)
    with pytest.raises(TableError) as caught:
        sd["w"]
    assert caught.value.key == "w"


def test_a_nest_of_placeholders_is_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each level of it is held, and holds all below: what is built to compare them with is built once."""
    depth = 200
    nest = Pickle()
    for _ in range(depth):
        nest.call("pkg", "Stranger")
    nest.none()
    nest.raw(b"b" * depth)  # BUILD: each is the state of the one before
    made_of = makers.checkpoint(nest.stop()).data
    made: list[int] = []
    describe = Builder.describe
    with zipslicer.open(made_of) as opened:
        value = opened.root
        for _ in range(depth):
            assert isinstance(value, zipslicer.Placeholder)
            value = zipslicer.describe(value).state
        assert len(opened.placeholders) == depth

        def counted(self: Any, node: int, *rest: Any) -> None:
            made.append(node)
            describe(self, node, *rest)

        monkeypatch.setattr(Builder, "describe", counted)
        assert opened._view.changed() == {}
    assert len(made) <= depth
