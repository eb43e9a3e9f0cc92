"""Deferred: under patch_torch_load(lazy=True) a tensor is read when it is used, and nothing else is different."""

from __future__ import annotations

import copy
import io
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest

import zipslicer

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")


from zipslicer.deferred import Deferral, DeferredTensor  # noqa: E402
from zipslicer.tensors import TensorReader  # noqa: E402

N = 1 << 15  # float32 elements: 128 KiB


def lazily(tree: Any, folder: Path) -> Any:
    path = folder / "a.pt"
    torch.save(tree, path)
    with zipslicer.patch_torch_load(lazy=True, fallback=False):
        return torch.load(path, weights_only=True)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows that are read, in order, one by one or many together."""
    done: list[int] = []
    read, shared = Deferral.read, TensorReader.shared

    def one(self: Deferral, number: int) -> Any:
        done.append(number)
        return read(self, number)

    def many(self: TensorReader, numbers: Any, storages: Any = (), bar: Any = None) -> Any:
        done.extend(numbers)
        return shared(self, numbers, storages, bar)

    monkeypatch.setattr(Deferral, "read", one)
    monkeypatch.setattr(TensorReader, "shared", many)
    return done


def test_facts_are_known_and_nothing_is_read(tmp_path: Path, reads: list[int]) -> None:
    wanted = torch.arange(2.0 * N).reshape(2, N).t()
    w = lazily({"w": wanted}, tmp_path)["w"]
    assert type(w) is DeferredTensor
    assert isinstance(w, torch.Tensor)
    assert (w.dtype, w.shape, w.stride(), w.device) == (wanted.dtype, wanted.shape, wanted.stride(), wanted.device)
    assert (w.numel(), w.element_size(), w.nbytes, w.ndim, w.dim(), len(w)) == (2 * N, 4, 8 * N, 2, 2, N)
    assert not any((w.is_contiguous(), w.requires_grad, w.is_meta, w.is_sparse))
    assert (w.is_complex(), w.is_floating_point(), w.grad) == (False, True, None)
    assert torch.is_floating_point(w)
    assert w.is_leaf
    assert reads == []


def test_containers_and_metadata_are_those_of_torch_load(tmp_path: Path) -> None:
    model = torch.nn.Linear(256, 256)
    got = lazily({"model": model.state_dict(), "steps": [torch.tensor(3), "x"]}, tmp_path)
    assert type(got["model"]).__name__ == "OrderedDict"
    assert got["model"]._metadata == {"": {"version": 1}}
    assert type(got["model"]["weight"]) is DeferredTensor
    assert type(got["model"]["bias"]) is torch.Tensor  # small: read at once
    assert got["steps"] == [torch.tensor(3), "x"]


@pytest.mark.parametrize(
    "use",
    [
        lambda w: w + 1,
        lambda w: torch.cat([w, w]),
        lambda w: w[...],
        lambda w: w[3:9],
        lambda w: w.to(torch.float16),
        lambda w: w.float(),
        lambda w: w.cpu(),
        lambda w: w.contiguous(),
        lambda w: w.clone(),
        lambda w: w.narrow(0, 1, 5),
        lambda w: w.view(torch.int32),
        lambda w: torch.empty(N).copy_(w),
        lambda w: torch.stack((w, torch.ones(N)), dim=0),
        lambda w: torch.from_numpy(w.numpy()),
        lambda w: torch.tensor(np.asarray(w)),
        lambda w: torch.tensor(w.tolist()),
        lambda w: torch.nn.functional.relu(w),
        lambda w: torch.equal(w, torch.arange(float(N))),
        lambda w: w.sum().item(),
        lambda w: torch.where(w > 3, w, 0.0),
        lambda w: torch.nn.utils.parameters_to_vector([w]),
        copy.deepcopy,
        lambda w: pickle.loads(pickle.dumps(w)),
        repr,
    ],
)
def test_a_use_gives_what_the_tensor_gives(use: Any, tmp_path: Path) -> None:
    wanted = torch.arange(float(N))
    state = lazily({"w": wanted}, tmp_path)
    expected, got = use(wanted), use(state["w"])
    if isinstance(expected, torch.Tensor):
        assert type(got) is torch.Tensor
        assert torch.equal(expected, got)
    else:
        assert expected == got
    assert type(state["w"]) is DeferredTensor  # was not held


def test_each_use_reads_and_holds_nothing(tmp_path: Path, reads: list[int]) -> None:
    state = lazily({"a": torch.ones(N), "b": torch.ones(N)}, tmp_path)
    merged: dict[str, Any] = {}
    merged.update(state)
    merged = {**merged, "c": 1}
    assert reads == []
    into = torch.empty(N)
    for key in ("a", "b"):
        into.copy_(merged[key])
    assert reads == [0, 1]


def test_load_state_dict_reads_one_after_the_other(tmp_path: Path, reads: list[int]) -> None:
    source, target = (torch.nn.Linear(256, 256) for _ in range(2))
    state = lazily(source.state_dict(), tmp_path)
    del reads[:]
    target.load_state_dict(state)
    assert reads == [0]
    assert torch.equal(source.weight, target.weight)
    assert type(state["weight"]) is DeferredTensor


def test_load_state_dict_with_assign_gives_parameters(tmp_path: Path) -> None:
    source = torch.nn.Linear(256, 256)
    with torch.device("meta"):
        target = torch.nn.Linear(256, 256)
    target.load_state_dict(lazily(source.state_dict(), tmp_path), assign=True)
    assert torch.equal(source.weight, target.weight)
    assert isinstance(target.weight, torch.nn.Parameter)
    assert target.weight.requires_grad
    assert DeferredTensor not in map(type, target.parameters())
    target(torch.ones(1, 256)).sum().backward()
    assert target.weight.grad is not None


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda w: w.zero_(), 0),
        (lambda w: w.__setitem__(0, 5), 5),
        (lambda w: w.__iadd__(7), 7),
        (lambda w: torch.add(w, 3, out=w), 3),
        (lambda w: w.data.fill_(2), 2),
        (lambda w: w.detach().fill_(2), 2),
        (lambda w: torch.nn.init.ones_(w), 1),
        (lambda w: setattr(w, "data", torch.full((N,), 4.0)), 4),
        (lambda w: torch._foreach_add_([w], 6), 6),
    ],
)
def test_a_change_stays(change: Any, wanted: float, tmp_path: Path) -> None:
    state = lazily({"w": torch.arange(float(N))}, tmp_path)
    held = state["w"]
    change(state["w"])
    assert held[0] == wanted
    assert held is state["w"]
    assert type(held) is torch.Tensor


def test_an_address_is_that_of_memory_that_stays(tmp_path: Path) -> None:
    state = lazily({"a": torch.ones(N), "b": torch.zeros(N)}, tmp_path)
    addresses = {key: value.data_ptr() for key, value in state.items()}
    assert len(set(addresses.values())) == 2
    assert {key: value.untyped_storage().data_ptr() for key, value in state.items()} == addresses


def test_what_is_tied_in_the_file_is_tied_when_it_is_changed(tmp_path: Path) -> None:
    weight = torch.arange(float(N))
    state = lazily({"a": weight, "b": weight, "tail": weight[5:], "other": torch.ones(N)}, tmp_path)
    state["a"].zero_()
    assert state["b"].sum() == 0
    assert state["tail"].sum() == 0
    assert state["tail"].storage_offset() == 5
    assert type(state["other"]) is DeferredTensor


def test_parameters_and_attributes_are_there_at_once(tmp_path: Path) -> None:
    marked = torch.ones(N)
    marked.note = "text"
    got = lazily(
        {"p": torch.nn.Parameter(torch.ones(N)), "marked": marked, "leaf": torch.ones(N).requires_grad_()}, tmp_path
    )
    assert type(got["p"]) is torch.nn.Parameter
    assert got["marked"].note == "text"
    assert got["leaf"].requires_grad


def test_a_file_that_was_cut_is_an_error_of_its_use(tmp_path: Path) -> None:
    state = lazily({"a": torch.ones(N)}, tmp_path)
    os.truncate(tmp_path / "a.pt", 1000)
    assert state["a"].shape == (N,)
    with pytest.raises(zipslicer.ChangedError, match=r"a\.pt"):
        state["a"] + 1
    with pytest.raises(zipslicer.ChangedError, match=r"a\.pt"):
        state["a"].zero_()


def test_a_file_that_was_removed_is_still_read(tmp_path: Path) -> None:
    state = lazily({"a": torch.ones(N)}, tmp_path)
    (tmp_path / "a.pt").unlink()
    assert state["a"].sum() == N


def test_torch_save_writes_the_tensors(tmp_path: Path) -> None:
    weight = torch.arange(float(N))
    state = lazily({"a": weight, "b": torch.ones(N)}, tmp_path)
    file = io.BytesIO()
    torch.save(state, file)
    again = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert torch.equal(again["a"], weight)
    assert torch.equal(again["b"], torch.ones(N))


def test_safetensors_writes_the_tensors(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    from safetensors.torch import load_file, save_file

    save_file(lazily({"a": torch.ones(N), "b": torch.zeros(N)}, tmp_path), tmp_path / "a.safetensors")
    again = load_file(tmp_path / "a.safetensors")
    assert again["a"].sum() == N
    assert again["b"].sum() == 0


def test_threads_may_use_one(tmp_path: Path) -> None:
    w = lazily({"w": torch.ones(N)}, tmp_path)["w"]
    found: list[float] = []

    def use() -> None:
        found.extend(w.sum().item() for _ in range(20))

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [N] * 80


def test_another_place_or_byte_order_is_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(N)}, path)
    with zipslicer.patch_torch_load(lazy=True):
        got = torch.load(path, map_location=lambda storage, _location: storage)
        assert type(got["w"]) is torch.Tensor
        assert torch.load(path, map_location="meta")["w"].is_meta


def test_a_file_object_is_read_at_once(tmp_path: Path) -> None:
    """Its owner may close it."""
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(N)}, path)
    with zipslicer.patch_torch_load(lazy=True), path.open("rb") as file:
        state = torch.load(file)
    assert type(state["w"]) is torch.Tensor
    assert state["w"].sum() == N


def test_in_inference_mode(tmp_path: Path) -> None:
    with torch.inference_mode():
        state = lazily({"w": torch.ones(N), "v": torch.ones(N)}, tmp_path)
        assert state["w"].sum() == N
        assert torch.empty(N).copy_(state["v"]).sum() == N
        state["w"].zero_()
    assert state["w"].sum() == 0
    assert (state["v"] + 1).sum() == 2 * N


def test_autograd_sees_plain_tensors(tmp_path: Path) -> None:
    state = lazily({"w": torch.ones(N)}, tmp_path)
    scale = torch.tensor(2.0, requires_grad=True)
    (state["w"] * scale).sum().backward()
    assert scale.grad == N
    with torch.no_grad():
        assert (state["w"] * 2).sum() == 2 * N


def test_a_call_from_below_python_reads_too(tmp_path: Path) -> None:
    state = lazily({"w": torch.arange(float(N))}, tmp_path)
    with torch._C.DisableTorchFunctionSubclass():
        assert torch.add(state["w"], 1)[0] == 1
        with pytest.raises(RuntimeError, match="clone"):
            torch.zero_(state["w"])
