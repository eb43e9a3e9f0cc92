"""Drop-ins: torch_load gives what torch.load gives, and patch_torch_load puts it there and takes it away again."""

from __future__ import annotations

import argparse
import collections
import inspect
import io
import pickle
import threading
import types
from pathlib import Path
from typing import Any

import pytest

import zipslicer

torch = pytest.importorskip("torch")


def saved(tree: Any, path: Path, **keywords: Any) -> Path:
    torch.save(tree, path, **keywords)
    return path


def same(wanted: Any, got: Any) -> bool:
    """Equal in classes, keys, order, values, dtypes, strides and storages' sizes, all the way down."""
    if type(wanted) is not type(got):
        return False
    if isinstance(wanted, torch.Tensor):
        facts = [
            (t.dtype, t.shape, t.stride(), t.storage_offset(), t.requires_grad, t.untyped_storage().nbytes(), t.device)
            for t in (wanted, got)
        ]
        return facts[0] == facts[1] and torch.equal(wanted, got)
    if isinstance(wanted, dict):
        attributes = getattr(wanted, "__dict__", {}) == getattr(got, "__dict__", {})
        return attributes and list(wanted) == list(got) and all(same(wanted[key], got[key]) for key in wanted)
    if isinstance(wanted, (list, tuple)):
        return len(wanted) == len(got) and all(map(same, wanted, got))
    return bool(wanted == got)


class Stranger:
    """Known to torch only where it was declared to it."""

    def __init__(self) -> None:
        self.weight = torch.ones(2)


# ---------------------------------------------------------------- torch_load


def test_signature_is_that_of_torch() -> None:
    ours, theirs = (inspect.signature(f).parameters for f in (zipslicer.torch_load, torch.load))
    assert list(ours) == list(theirs)
    assert [p.kind for p in ours.values()] == [p.kind for p in theirs.values()]
    assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]


def trees() -> dict[str, Any]:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    weight = torch.arange(12.0).reshape(3, 4)
    return {
        "state dict": model.state_dict(),
        "training": {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "epoch": 3,
            "name": "a",
            "x": None,
        },
        "views": {"a": weight, "tied": weight, "row": weight[1], "turned": weight.t(), "step": weight[:, ::2]},
        "parameters": {"p": torch.nn.Parameter(weight), "frozen": torch.nn.Parameter(weight, requires_grad=False)},
        "list": [weight, (torch.tensor(1), "text"), {}],
        "tensor": weight.to(torch.bfloat16),
        "plain": {"epoch": 3, "lr": [0.1, 0.2]},
        "default": collections.defaultdict(dict, {"a": {"w": weight}}),
        "leaf": {"w": torch.ones(2, requires_grad=True), "c": torch.ones(2, dtype=torch.complex64)},
    }


@pytest.mark.parametrize("name", trees())
def test_gives_what_torch_load_gives(name: str, tmp_path: Path) -> None:
    path = saved(trees()[name], tmp_path / "a.pt")
    wanted = torch.load(path, weights_only=False)
    assert same(wanted, zipslicer.torch_load(path))
    assert same(wanted, zipslicer.torch_load(path, "cpu", weights_only=False, mmap=True))
    with path.open("rb") as file:
        assert same(wanted, zipslicer.torch_load(file, encoding="utf-8"))


def test_tied_tensors_are_tied(tmp_path: Path) -> None:
    weight = torch.arange(6.0)
    got = zipslicer.torch_load(saved({"a": weight, "b": weight, "tail": weight[4:]}, tmp_path / "a.pt"))
    got["a"][5] = -1
    assert got["b"][5] == -1
    assert got["tail"][1] == -1


def test_the_result_owns_its_memory(tmp_path: Path) -> None:
    path = saved({"w": torch.arange(4.0)}, tmp_path / "a.pt")
    got = zipslicer.torch_load(path, mmap=True)
    path.write_bytes(b"")
    assert got["w"].tolist() == [0, 1, 2, 3]


def test_a_file_object_is_read_from_where_it_stands(tmp_path: Path) -> None:
    file = io.BytesIO(b"header" + saved({"w": torch.ones(3)}, tmp_path / "a.pt").read_bytes())
    file.seek(6)
    assert zipslicer.torch_load(file)["w"].tolist() == [1, 1, 1]
    assert file.tell() == 6


def with_location(path: Path, tree: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file as a machine with another device writes it."""
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, "location_tag", lambda _storage: "cuda:0")
        return saved(tree, path)


def test_without_its_device_a_tensor_is_on_the_cpu_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    path = with_location(tmp_path / "a.pt", {"w": torch.ones(3), "v": torch.ones(2)}, monkeypatch)
    with pytest.raises(RuntimeError):
        torch.load(path)
    with pytest.warns(UserWarning, match="cuda:0"):
        got = zipslicer.torch_load(path)
    assert got["w"].device.type == "cpu"
    for asked in ("cuda", {"cuda:0": "cuda:0"}, {"other": "cpu"}, lambda storage, location: None):  # in so many words
        with pytest.raises(RuntimeError):
            torch.load(path, map_location=asked)
        with pytest.raises(RuntimeError):
            zipslicer.torch_load(path, map_location=asked)


def test_map_location_is_that_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.arange(6.0)
    path = with_location(tmp_path / "a.pt", {"w": weight, "tail": weight[2:]}, monkeypatch)
    seen: list[tuple[int, str]] = []

    def called(storage: Any, location: str) -> Any:
        seen.append((storage.nbytes(), location))
        return storage

    for asked in ("cpu", torch.device("cpu"), {"cuda:0": "cpu"}, called):
        assert same(torch.load(path, map_location=asked), zipslicer.torch_load(path, map_location=asked))
    assert seen == [(24, "cuda:0")] * 2
    assert zipslicer.torch_load(path, "meta")["w"].device.type == "meta"


def test_a_device_that_is_here_is_chosen_as_torch_chooses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    weight = torch.arange(1_000_000.0)
    path = with_location(tmp_path / "a.pt", {"w": weight, "tail": weight[2:], "n": torch.ones(2)}, monkeypatch)
    asked: list[Any] = [None, "cuda", "cuda:0", torch.device("cuda"), {}, {"cuda:0": "cpu"}, {"cuda:0": "cuda"}]
    for where in [*asked, lambda storage, _: storage.cuda()]:
        assert same(torch.load(path, map_location=where), zipslicer.torch_load(path, map_location=where)), where
    for where in ("cuda:99", {"cuda:0": "cuda:99"}, {"cuda:0": "nowhere"}):
        with pytest.raises(RuntimeError):
            torch.load(path, map_location=where)
        with pytest.raises(RuntimeError):
            zipslicer.torch_load(path, map_location=where)


def test_what_torch_refuses_is_an_error_that_its_callers_catch(tmp_path: Path) -> None:
    path = saved({"w": torch.ones(2), "hp": argparse.Namespace(lr=0.1)}, tmp_path / "a.pt")
    for weights_only in (True, False, None):
        with pytest.raises(pickle.UnpicklingError, match=r"argparse\.Namespace") as raised:
            zipslicer.torch_load(path, weights_only=weights_only)
        assert isinstance(raised.value, zipslicer.UnsafeError)
        assert isinstance(raised.value, RuntimeError)
        assert raised.value.global_name == "argparse.Namespace"
        again = pickle.loads(pickle.dumps(raised.value))
        assert str(again) == str(raised.value)
        assert isinstance(again, pickle.UnpicklingError)


def test_a_known_name_without_a_value_of_its_own_is_refused_too(tmp_path: Path) -> None:
    import functools

    path = saved({"w": torch.ones(2), "f": [functools.partial(int)]}, tmp_path / "a.pt")
    with pytest.raises(zipslicer.UnsafeError, match=r"functools\.partial"):
        zipslicer.torch_load(path)


def test_declared_classes_are_built(tmp_path: Path) -> None:
    path = saved({"hp": argparse.Namespace(lr=0.1)}, tmp_path / "a.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        assert zipslicer.torch_load(path)["hp"] == argparse.Namespace(lr=0.1)
    with torch.serialization.safe_globals([(types.SimpleNamespace, "argparse.Namespace")]):
        assert zipslicer.torch_load(path)["hp"] == types.SimpleNamespace(lr=0.1)
    with pytest.raises(zipslicer.UnsafeError):
        zipslicer.torch_load(path)


def test_a_declaration_does_not_change_what_a_known_name_means(tmp_path: Path) -> None:
    path = saved(collections.OrderedDict(w=torch.ones(2)), tmp_path / "a.pt")
    with torch.serialization.safe_globals(
        [(print, "collections.OrderedDict"), (print, "torch._utils._rebuild_tensor_v2")]
    ):
        assert zipslicer.torch_load(path)["w"].tolist() == [1, 1]


def test_damage_is_an_error_that_its_callers_catch(tmp_path: Path) -> None:
    whole = saved({"w": torch.ones(2000)}, tmp_path / "a.pt").read_bytes()
    for content in (whole[:-100], whole[:100], b"version https://git-lfs.github.com/spec/v1\n", b"\0" * 400, b""):
        path = tmp_path / "broken.pt"
        path.write_bytes(content)
        with pytest.raises(zipslicer.ZipSlicerError) as raised:
            zipslicer.torch_load(path)
        assert isinstance(raised.value, pickle.UnpicklingError)
        assert isinstance(raised.value, RuntimeError)
    with pytest.raises(FileNotFoundError):
        zipslicer.torch_load(tmp_path / "none.pt")
    with pytest.raises(IsADirectoryError):
        zipslicer.torch_load(tmp_path)


def test_what_is_left_to_torch_says_so(tmp_path: Path) -> None:
    path = saved({"w": torch.ones(2)}, tmp_path / "a.pt")
    script = tmp_path / "script.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), script)
    legacy = io.BytesIO()
    torch.save({"w": torch.ones(2)}, legacy, _use_new_zipfile_serialization=False)
    legacy.seek(0)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((path, "cpu", pickle), {"weights_only": False}),
        ((path,), {"encoding": "latin1"}),
        ((path,), {"fix_imports": False}),
        ((script,), {}),
        ((legacy,), {}),
        (("a.safetensors",), {}),
    ]
    for args, kwargs in calls:
        with pytest.raises(zipslicer.UnsupportedError):
            zipslicer.torch_load(*args, **kwargs)
    assert legacy.tell() == 0


# ---------------------------------------------------------------- patch_torch_load


def test_patch_is_there_within_the_block_and_gone_after_it(tmp_path: Path) -> None:
    path = saved({"w": torch.ones(2)}, tmp_path / "a.pt")
    before = torch.load
    with zipslicer.patch_torch_load():
        assert torch.load is torch.serialization.load is not before
        assert inspect.signature(torch.load) == inspect.signature(before)
        assert torch.load(path)["w"].tolist() == [1, 1]
        assert torch.load(f=path, map_location="cpu", weights_only=True, mmap=True)["w"].tolist() == [1, 1]
    assert torch.load is torch.serialization.load is before
    with pytest.raises(KeyError), zipslicer.patch_torch_load():
        raise KeyError
    assert torch.load is torch.serialization.load is before


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_patch_is_what_reads(tmp_path: Path) -> None:
    """Protocol 5 tells the two apart: torch's weights_only refuses it."""
    path = saved({"w": torch.ones(2)}, tmp_path / "a.pt", pickle_protocol=5)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    with zipslicer.patch_torch_load():
        assert torch.load(path, weights_only=True)["w"].tolist() == [1, 1]

    @zipslicer.patch_torch_load()
    def decorated() -> Any:
        return torch.serialization.load(path)

    for _ in range(2):
        assert decorated()["w"].tolist() == [1, 1]
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


def test_patches_nest_and_the_inner_one_decides(tmp_path: Path) -> None:
    path = saved({"w": torch.ones(1 << 16)}, tmp_path / "a.pt")
    before = torch.load
    with zipslicer.patch_torch_load():
        outer = torch.load
        with zipslicer.patch_torch_load(lazy=True):
            assert torch.load is outer
            assert type(torch.load(path)["w"]) is not torch.Tensor
        assert torch.load is outer
        assert type(torch.load(path)["w"]) is torch.Tensor
    assert torch.load is before


def test_overlapping_patches_of_threads_leave_nothing_behind(tmp_path: Path) -> None:
    path = saved({"w": torch.ones(2)}, tmp_path / "a.pt", pickle_protocol=5)
    before = torch.load
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))
    failures: list[BaseException] = []

    def first() -> None:
        with zipslicer.patch_torch_load():
            first_is_in.set()
            assert second_is_in.wait(30)
        first_is_out.set()

    def second() -> None:
        try:
            assert first_is_in.wait(30)
            with zipslicer.patch_torch_load():
                second_is_in.set()
                assert first_is_out.wait(30)
                torch.load(path, weights_only=True)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert torch.load is torch.serialization.load is before


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_what_another_has_put_over_it_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved({"w": torch.ones(2)}, tmp_path / "a.pt", pickle_protocol=5)
    monkeypatch.setattr(torch, "load", torch.load)  # to be set back after the test
    with zipslicer.patch_torch_load():
        ours = torch.load

        def theirs(*args: Any, **kwargs: Any) -> Any:
            return ours(*args, **kwargs)

        torch.load = theirs
        assert torch.load(path)["w"].tolist() == [1, 1]
    assert torch.load is theirs
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)  # ours is torch's own again


def test_fallback_is_torch_with_the_arguments_as_they_are(tmp_path: Path) -> None:
    path = saved({"hp": Stranger()}, tmp_path / "a.pt")
    legacy = io.BytesIO(b"before")
    legacy.seek(0, io.SEEK_END)
    torch.save({"w": torch.ones(2)}, legacy, _use_new_zipfile_serialization=False)
    legacy.seek(len(b"before"))
    with zipslicer.patch_torch_load():
        with pytest.warns(UserWarning, match="Stranger"), pytest.raises(pickle.UnpicklingError, match="Weights only"):
            torch.load(path, weights_only=True)
        with pytest.warns(UserWarning, match="Stranger"):
            assert type(torch.load(path, weights_only=False)["hp"]) is Stranger
        with pytest.warns(UserWarning, match="file object"):
            assert torch.load(legacy, weights_only=True)["w"].tolist() == [1, 1]
    with zipslicer.patch_torch_load(fallback=False):
        with pytest.raises(zipslicer.UnsafeError):
            torch.load(path, weights_only=False)
        with pytest.raises(zipslicer.UnsupportedError):
            torch.load(legacy)


def test_damage_is_not_handed_on(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(b"joined" + saved({"w": torch.ones(2)}, path).read_bytes())
    with zipslicer.patch_torch_load(), pytest.raises(zipslicer.ArchiveError):
        torch.load(path)


def test_fake_tensors_are_left_to_torch(tmp_path: Path) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    path = saved({"w": torch.ones(2)}, tmp_path / "a.pt")
    with zipslicer.patch_torch_load(), FakeTensorMode(), pytest.warns(UserWarning, match="FakeTensorMode"):
        assert type(torch.load(path)["w"]).__name__ == "FakeTensor"
