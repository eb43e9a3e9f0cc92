"""Table: the facts of tensors and the names they get, without reading one."""

from __future__ import annotations

import io
from typing import Any

import makers
import pytest
from makers import Pickle

import zipslicer
from zipslicer.errors import TableError
from zipslicer.table import dotted, structural

torch = pytest.importorskip("torch")


def opened(tree: Any) -> zipslicer.Checkpoint:
    file = io.BytesIO()
    torch.save(tree, file)
    return zipslicer.open(file.getvalue())


def one(program: Pickle, key: str = "0") -> Pickle:
    return program.tensor("FloatStorage", key, 1, size=(1,), stride=(1,))


def test_info_has_every_fact() -> None:
    base = torch.arange(24.0).reshape(4, 6)
    info = opened({"w": base[1:, ::2].requires_grad_()}).tensors.get_meta("w")
    assert info is not None
    assert (info.dtype_name, info.dtype, info.itemsize) == ("float32", torch.float32, 4)
    assert (info.shape, info.strides, info.storage_offset) == ((3, 3), (6, 2), 6)
    assert (info.size(), info.size(0), info.stride(), info.stride(1), info.ndim) == ((3, 3), 3, (6, 2), 2, 2)
    assert (info.numel, info.nbytes, info.storage_nbytes) == (9, 36, 96)
    assert (info.requires_grad, info.is_parameter, info.is_contiguous) == (True, False, False)
    assert (info.is_conj, info.is_neg, info.class_name, info.location) == (False, False, None, "cpu")
    assert repr(info) == "TensorInfo(float32, [3, 3], requires_grad, strides=(6, 2))"


def test_infos_are_equal_by_their_facts() -> None:
    same, other = opened({"w": torch.zeros(2)}), opened({"w": torch.ones(2)})
    assert same.tensors.get_meta("w") == other.tensors.get_meta("w")
    assert same.tensors.get_meta("w") != opened({"w": torch.zeros(3)}).tensors.get_meta("w")
    assert same.tensors.get_meta("w") != 3


def test_a_parameter_and_its_tensor() -> None:
    tensors = opened(
        {"p": torch.nn.Parameter(torch.zeros(2)), "frozen": torch.nn.Parameter(torch.zeros(1), False)}
    ).tensors
    p, frozen = tensors.get_meta("p"), tensors.get_meta("frozen")
    assert p is not None
    assert frozen is not None
    assert (p.is_parameter, p.requires_grad) == (True, True)
    assert (frozen.is_parameter, frozen.requires_grad) == (True, False)


def test_tied_tensors_have_one_storage_key() -> None:
    base = torch.zeros(10)
    tensors = opened({"a": base[:5], "b": base, "c": torch.zeros(10)}).tensors
    a, b, c = (tensors.get_meta(key) for key in "abc")
    assert a.storage_key == b.storage_key != c.storage_key  # type: ignore[union-attr]


NAMED = {
    "flat": ({"w": 0, "v": 0}, ["w", "v"]),
    "nested": ({"a": {"b": [0, (0, {"c": 0})]}}, ["a.b.0", "a.b.1.0", "a.b.1.1.c"]),
    "dots": ({"a.b": 0, "a": {"b": 0}}, ["a.b", "a/b"]),
    "dots and slashes": ({"a.b": 0, "a": {"b": 0}, "a/b": 0}, ["a.b", "a/b", "a/b#6"]),
    "numbers and text": ({0: 0, "0": 0}, ["0", "0#4"]),
    "other keys": ({(1, "x"): 0, None: 0, True: 0, 1.5: 0}, ["(1, 'x')", "None", "True", "1.5"]),
    "root list": ([0, 0], ["0", "1"]),
    "root": (0, [""]),
}


def with_tensors(tree: Any) -> Any:
    """The tree with a tensor in place of each zero."""
    if isinstance(tree, dict):
        return {key: with_tensors(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(with_tensors(value) for value in tree)
    return torch.zeros(1)


@pytest.mark.parametrize("name", NAMED)
def test_names(name: str) -> None:
    tree, names = NAMED[name]
    assert [n.partition("#")[0] for n in opened(with_tensors(tree)).tensors] == [n.partition("#")[0] for n in names]
    assert len(opened(with_tensors(tree)).tensors) == len(names)


def test_no_tensor_is_lost_to_another_name() -> None:
    tree = {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}, "a/b": torch.full((1,), 2.0), 0: torch.full((1,), 3.0)}
    tree["0"] = torch.full((1,), 4.0)
    assert sorted(tensor.item() for tensor in opened(tree).tensors.values()) == [0.0, 1.0, 2.0, 3.0, 4.0]


class Model(torch.nn.Module):  # type: ignore[misc,name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.seq = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
        self.register_buffer("scale", torch.ones(1))
        self.other = [torch.zeros(2)]


def test_a_whole_model_lists_like_its_state_dict() -> None:
    model = Model()
    names = set(opened(model).tensors)
    assert set(model.state_dict()) <= names
    assert names - set(model.state_dict()) == {"other.0"}


def test_the_last_of_equal_keys_is_the_one_that_is_listed() -> None:
    program = Pickle().raw(b"}(")
    one(program.text("w"), "0")
    one(program.text("w"), "1")
    data = makers.checkpoint(program.raw(b"u").stop(), {"0": bytes(4), "1": b"\0\0\x80\x3f"}).data
    tensors = zipslicer.open(data).tensors
    assert list(tensors) == ["w"]
    assert tensors["w"].item() == 1.0


def test_a_container_that_is_met_again_is_listed_once() -> None:
    inner: dict[str, Any] = {"w": torch.zeros(1)}
    inner["me"] = inner
    assert list(opened({"a": inner, "b": inner}).tensors) == ["a.w"]


def test_names_together_are_bounded_by_the_file() -> None:
    """One long key at every level of a nest: 100 KB of file would make 40 GB of names."""
    program = one(Pickle().text("k" * 100_000).put(0).raw(b"0")).put(1)
    for _ in range(900):
        program.put(2).raw(b"0}(").get(0).get(2).text("t").get(1).raw(b"u")
    data = makers.checkpoint(program.stop(), {"0": bytes(4)}).data
    with pytest.raises(TableError, match="far longer than the file"):
        zipslicer.open(data).tensors  # noqa: B018
    with pytest.raises(TableError, match="far longer than the file"):
        zipslicer.load(data).flatten()


def test_deep_paths_of_short_keys_are_fine() -> None:
    tree: Any = torch.zeros(1)
    for _ in range(150):
        tree = {"key": tree}
    assert list(opened(tree).tensors) == [".".join(["key"] * 150)]


def parameter(program: Pickle, cls: str, grad: bool) -> Pickle:
    return program.call(
        "torch._utils",
        "_rebuild_parameter",
        lambda p: p.tensor(cls, "0", 1, size=(1,), stride=(1,)),
        lambda p: p.boolean(grad),
        lambda p: p.ordered_dict(),
    )


def test_a_parameter_that_cannot_require_grad_is_the_files_fault() -> None:
    data = makers.checkpoint(
        parameter(Pickle().raw(b"}").text("w"), "LongStorage", True).raw(b"s").stop(), {"0": bytes(8)}
    ).data
    with pytest.raises(TableError, match="cannot require grad") as caught:
        zipslicer.load(data)["w"]
    assert caught.value.key == "w"
    with pytest.raises(TableError, match="cannot require grad"):
        zipslicer.load(data).materialize()
    assert "TableError" in repr(zipslicer.load(data))
    fine = makers.checkpoint(
        parameter(Pickle().raw(b"}").text("w"), "LongStorage", False).raw(b"s").stop(), {"0": bytes(8)}
    ).data
    assert zipslicer.load(fine)["w"].tolist() == [0]


@pytest.mark.parametrize("held", [0, 3, 8, 100])
def test_a_record_of_another_size_than_its_storage(held: int) -> None:
    data = makers.checkpoint(one(Pickle()).stop(), {"0": bytes(held)}).data
    with pytest.raises(TableError, match=f"the record has {held} bytes, its storage 4"):
        zipslicer.load(data)


def test_dotted_and_structural_paths() -> None:
    steps = (("attribute", "_modules"), ("key", "seq"), ("attribute", "weight"), ("part", ("args", 0)), ("index", 3))
    assert dotted(steps) == "seq.weight.args.0.3"
    assert structural(steps) == "@_modules/seq/@weight/#args/0/3"
    assert dotted((("key", "_modules"),)) == "_modules"
