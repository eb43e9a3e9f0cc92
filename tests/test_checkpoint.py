"""open() and load(): the doors, their arguments, and what a Checkpoint says."""

from __future__ import annotations

import inspect
import io
import pickle
import warnings
from typing import Any

import makers
import pytest
from makers import Pickle

import zipslicer
from zipslicer.checkpoint import _Terms

torch = pytest.importorskip("torch")


def saved(tree: Any) -> bytes:
    file = io.BytesIO()
    torch.save(tree, file)
    return file.getvalue()


class Model(torch.nn.Module):  # type: ignore[misc,name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 3)
        self.lr = 0.1


def test_load_takes_the_arguments_of_zipslicer_0_8_1() -> None:
    names = list(inspect.signature(zipslicer.load).parameters)
    assert names[:5] == ["source", "map_location", "dtype", "cache_tensors", "debug"]
    sd = zipslicer.load(saved({"w": torch.zeros(2)}), "cpu", torch.float16, True, True)
    assert sd["w"].dtype == torch.float16
    assert sd["w"].untyped_storage().data_ptr() is not None


def test_open_takes_what_load_takes() -> None:
    load, opened = (inspect.signature(f).parameters for f in (zipslicer.load, zipslicer.open))
    assert set(opened) == set(load) - {"debug", "weights_only"}
    assert all(opened[name].default == load[name].default for name in opened)


@pytest.mark.parametrize(
    "tree", [{"w": torch.zeros(1)}, [torch.zeros(1)], (torch.zeros(1), 2)], ids=["dict", "list", "tuple"]
)
def test_a_container_with_tensors_is_lazy(tree: Any) -> None:
    root = zipslicer.load(saved(tree))
    assert isinstance(root, (zipslicer.LazyStateDict, zipslicer.LazySequence))
    assert type(root.materialize()) is type(tree)


@pytest.mark.parametrize("tree", [{"a": 1}, [1, 2], (1,), "text", None, 5, 2.5, True, {1, 2}], ids=repr)
def test_a_root_without_tensors_is_plain(tree: Any) -> None:
    root = zipslicer.load(saved(tree))
    assert type(root) is type(tree)
    assert root == tree


def test_a_root_that_is_a_tensor_is_read() -> None:
    assert zipslicer.load(saved(torch.arange(3))).tolist() == [0, 1, 2]
    checkpoint = zipslicer.open(saved(torch.arange(3)))
    assert list(checkpoint.tensors) == [""]
    assert checkpoint.tensors[""].tolist() == [0, 1, 2]


def test_a_whole_model_is_a_placeholder_with_tensors() -> None:
    model = Model()
    with zipslicer.open(saved(model)) as checkpoint:
        assert set(checkpoint.tensors) == set(model.state_dict())
        assert torch.equal(checkpoint.tensors["linear.weight"], model.linear.weight)
        assert checkpoint.tensors.get_meta("linear.weight").is_parameter  # type: ignore[union-attr]
        root = checkpoint.root
        assert type(root) is zipslicer.Placeholder
        assert root.lr == 0.1
        assert zipslicer.describe(root).name == "Model"
        assert "" in checkpoint.placeholders
        assert checkpoint.tensors is checkpoint.tensors
    assert Model().load_state_dict(zipslicer.open(saved(model)).tensors)


def test_the_checkpoint_says_what_it_is(tmp_path: Any) -> None:
    path = tmp_path / "a.pt"
    base = torch.zeros(4)
    path.write_bytes(saved({"w": base, "v": base[1:]}))
    checkpoint = zipslicer.open(path)
    assert checkpoint.path == str(path)
    assert repr(checkpoint) == f"Checkpoint({str(path)!r}: 2 tensors, 1 storages)"
    root = checkpoint.records[0].partition("/")[0]
    assert {f"{root}/data.pkl", f"{root}/data/0"} <= set(checkpoint.records)
    assert pickle.loads(pickle.dumps(checkpoint)).tensors["v"].tolist() == [0, 0, 0]
    checkpoint.close()
    with pytest.raises(ValueError, match="closed"):
        checkpoint.tensors["w"]


def test_a_root_and_its_tensors_hold_the_same_containers() -> None:
    checkpoint = zipslicer.open(saved({"a": {"w": torch.zeros(1)}}))
    assert checkpoint.root is checkpoint.root
    checkpoint.root["a"]["x"] = 1
    assert list(checkpoint.root["a"]) == ["w", "x"]


def test_weights_only_false_warns_and_changes_nothing() -> None:
    data = saved({"w": torch.zeros(1)})
    with pytest.warns(UserWarning, match="weights_only=False changes nothing") as caught:
        sd = zipslicer.load(data, weights_only=False)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert sd["w"].tolist() == [0]
    with pytest.warns(UserWarning, match="changes nothing"):
        made = zipslicer.load(makers.checkpoint(Pickle().call("os", "getcwd").stop()).data, weights_only=False)
    assert type(made) is zipslicer.Placeholder
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zipslicer.load(data, weights_only=True)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"unknown": "ignore"}, ValueError),
        ({"allow": ["pkg.Config"]}, TypeError),
        ({"limits": {"depth": 3}}, TypeError),
        ({"window": 3}, TypeError),
        ({"window": (0, "3")}, TypeError),
        ({"window": (0, 10**9)}, ValueError),
    ],
    ids=repr,
)
def test_arguments_that_mean_nothing(bad: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(bad))):
        zipslicer.open(saved({"w": torch.zeros(1)}), **bad)


def test_what_is_allowed_is_what_was_said_when_it_was_opened() -> None:
    """Shards are opened when they are touched, with check=False; the caller's mapping may be another by then."""
    allow = {"pkg.Config": dict}
    terms = _Terms("placeholder", allow, zipslicer.Limits(), None, "data.pkl")
    allow.clear()
    assert terms.allow == {"pkg.Config": dict}


def test_what_is_asked_of_a_checkpoint_in_place_of_its_tensors() -> None:
    checkpoint = zipslicer.open(saved({"w": torch.zeros(1)}))
    with pytest.raises(AttributeError, match=r"has no 'keys': \.tensors\.keys has"):
        checkpoint.keys()  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match=r"has no 'nonsense'$"):
        checkpoint.nonsense  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(TypeError, match=r"\.tensors has those"):
        checkpoint["w"]  # type: ignore[index]
    model = zipslicer.load(saved(torch.nn.Linear(2, 2)))
    with pytest.raises(AttributeError, match=r"zipslicer\.open\(\.\.\.\)\.tensors"):
        model.load_into(torch.nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="device"):
        zipslicer.load(saved({}), "pt")


def test_a_window_of_a_larger_file(tmp_path: Any) -> None:
    one, two = saved({"w": torch.zeros(1)}), saved({"w": torch.ones(1)})
    path = tmp_path / "both"
    path.write_bytes(b"head" + one + two)
    first = zipslicer.load(path, window=(4, len(one)))
    second = zipslicer.load(path, window=(4 + len(one), len(two)))
    assert (first["w"].item(), second["w"].item()) == (0, 1)
    assert pickle.loads(pickle.dumps(second))["w"].item() == 1


def test_names_of_records_are_printable_text() -> None:
    written = makers.Zip()
    written.add("a/data.pkl", Pickle().none().stop())
    written.add(b"a/\xff\x1b", b"")
    assert zipslicer.open(written.finish().data).records == ["a/data.pkl", "a/\\xff\x1b"]


def test_no_global_of_a_file_is_imported_or_run(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    (tmp_path / "trap_of_this_test.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    program = Pickle().raw(b"}(").text("a").call("trap_of_this_test", "run").text("b").name("trap_of_this_test", "x")
    program.text("w").tensor("FloatStorage", "0", 1, size=(1,), stride=(1,)).raw(b"u")
    checkpoint = zipslicer.open(makers.checkpoint(program.stop(), {"0": bytes(4)}).data)
    repr(checkpoint.root), checkpoint.placeholders, checkpoint.tensors["w"], checkpoint.root.materialize()
    assert "trap_of_this_test" not in sys.modules


@pytest.mark.parametrize("location", ["cuda:0", "mps", "hpu:3", "privateuse", "../../evil"])
def test_any_device_of_the_file_is_read_to_the_cpu(location: str) -> None:
    program = (
        Pickle().raw(b"}").text("w").tensor("FloatStorage", "0", 1, size=(1,), stride=(1,), location=location).raw(b"s")
    )
    data = makers.checkpoint(program.stop(), {"0": bytes(4)}).data
    for where in ("cpu", None):
        sd = zipslicer.load(data, map_location=where)
        assert sd.get_meta("w").location == location
        assert sd["w"].device.type == sd.materialize()["w"].device.type == "cpu"


def test_a_program_and_a_directory_of_more_than_a_megabyte(tmp_path: Any) -> None:
    """The native backend reads these onto huge pages, and hands out views of them."""
    count = 20_000
    names = [f"a.name.that.is.long.enough.to.fill.a.program.{i:05}.weight" for i in range(count)]
    torch.save({name: torch.tensor([i]) for i, name in enumerate(names)}, tmp_path / "m.pth")
    checkpoint = zipslicer.open(tmp_path / "m.pth")
    archive = checkpoint._view.table.archive
    program = archive.text(archive.find(["data.pkl"])[0])
    assert min(len(program), len(archive.block)) > 1 << 20
    assert type(archive.root) is bytes
    assert archive.names()[0] == "m/data.pkl"
    state_dict = checkpoint.root
    assert list(state_dict) == names
    for i in (0, 7, count - 1):
        assert state_dict[names[i]].tolist() == [i]
    again = pickle.loads(pickle.dumps(state_dict))
    assert again[names[5]].tolist() == [5]
    checkpoint.close()
    with pytest.raises(ValueError, match="closed"):
        state_dict[names[0]]
    assert bytes(program[:2]) == b"\x80\x02"  # as long as anybody has a view of it, closed or not


def test_placeholders_within_placeholders_are_those_of_the_root() -> None:
    """Made once: a nest of them would otherwise be built anew for each of its levels, in quadratic time."""
    program = b"\x80\2}U\1acpkg\nOuter\n)Rcpkg\nInner\n)Rbs."
    with zipslicer.open(makers.checkpoint(program).data) as checkpoint:
        outer = checkpoint.root["a"]
        assert list(checkpoint.placeholders) == ["a", "a.state"]
        assert checkpoint.placeholders["a"] is outer
        assert checkpoint.placeholders["a.state"] is zipslicer.describe(outer).state
