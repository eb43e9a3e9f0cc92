"""Tensors: the values, the memory they own, the bytes that are read for them, and the places they go to."""

from __future__ import annotations

import contextlib
import ctypes
import io
import mmap
import os
import select
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest

import zipslicer

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")
hypothesis = pytest.importorskip("hypothesis")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402


def saved(tree: Any) -> bytes:
    file = io.BytesIO()
    torch.save(tree, file)
    return file.getvalue()


def loaded(tree: Any, **keywords: Any) -> Any:
    return zipslicer.load(saved(tree), **keywords)


class Recording(io.BytesIO):
    """A file object that counts what is read from it."""

    count = 0

    def readinto(self, buffer: Any) -> int:
        got = super().readinto(buffer)
        self.count += got
        return got


DTYPES = [
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64,
    torch.bfloat16, torch.bool, torch.complex64, torch.complex128, torch.uint16, torch.uint32, torch.uint64,
    torch.float8_e5m2, torch.float8_e4m3fn,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype: Any) -> None:
    wanted = torch.arange(48, dtype=torch.uint8).view(dtype) if dtype != torch.bool else torch.arange(4) % 2 == 0
    sd = loaded({"w": wanted, "empty": torch.empty(0, 3, dtype=dtype), "scalar": wanted[0].clone()})
    for key, tensor in (("w", wanted), ("empty", torch.empty(0, 3, dtype=dtype)), ("scalar", wanted[0])):
        got = sd[key]
        assert (got.dtype, got.shape) == (dtype, tensor.shape)
        assert got.reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()


# --- slices -------------------------------------------------------------------------------------------------------------


@st.composite
def tensors(draw: Any) -> Any:
    """Dense, transposed, expanded, stepped, offset: what a state dict can hold."""
    sizes = draw(st.lists(st.integers(0, 6), max_size=4))
    made = torch.arange(5000, dtype=torch.int32)[draw(st.integers(0, 50)) :]
    kind = draw(st.sampled_from(["dense", "permuted", "stepped", "expanded", "any"]))
    numel = int(np.prod(sizes)) if sizes else 1
    if kind == "any":
        return made.as_strided(sizes, [draw(st.integers(0, 12)) for _ in sizes])
    made = made[:numel].reshape(sizes)
    if kind == "permuted" and sizes:
        return made.permute(draw(st.permutations(range(len(sizes)))))
    if kind == "stepped" and sizes:
        return made[tuple(slice(draw(st.integers(0, 2)), None, draw(st.integers(1, 3))) for _ in sizes)]
    if kind == "expanded":
        return made.unsqueeze(0).expand(draw(st.integers(1, 4)), *sizes)
    return made


@st.composite
def indices(draw: Any, ndim: int) -> Any:
    ends = st.none() | st.integers(-8, 8)
    one = st.integers(-6, 5) | st.builds(slice, ends, ends, st.none() | st.integers(-4, 4).filter(bool))
    items: list[Any] = draw(st.lists(one, max_size=ndim + 1))
    for extra in draw(st.lists(st.sampled_from([None, Ellipsis]), max_size=2)):
        items.insert(draw(st.integers(0, len(items))), extra)
    return items[0] if len(items) == 1 and draw(st.booleans()) else tuple(items)


@given(st.data())
def test_slices_are_numpys(data: Any) -> None:
    tensor = data.draw(tensors())
    sd = loaded({"w": tensor})
    for _ in range(3):
        wanted = data.draw(indices(tensor.ndim))
        try:
            expected = tensor.numpy()[wanted]
        except IndexError:
            with pytest.raises(IndexError):
                sd.get_slice("w")[wanted]
            continue
        got = sd.get_slice("w")[wanted]
        assert tuple(got.shape) == expected.shape
        assert got.numpy().tolist() == expected.tolist()


@given(tensors())
def test_a_touched_tensor_keeps_its_geometry_and_owns_its_hull(tensor: Any) -> None:
    got = loaded({"w": tensor})["w"]
    assert (got.shape, got.stride()) == (tensor.shape, tensor.stride())
    assert got.tolist() == tensor.tolist()
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride())) + 1 if tensor.numel() else 0
    assert got.storage_offset() == 0
    assert got.untyped_storage().nbytes() == last * 4


def test_a_slice_reads_its_own_bytes() -> None:
    file = Recording(saved({"w": torch.arange(1 << 20).view(1024, 1024), "v": torch.zeros(1 << 20)}))
    part = zipslicer.load(file).get_slice("w")
    part[0, 0]
    file.count = 0
    assert part[100:110].tolist() == torch.arange(100 * 1024, 110 * 1024).view(10, 1024).tolist()
    assert file.count == 10 * 1024 * 8
    file.count = 0
    assert part[5, 7].item() == 5 * 1024 + 7
    assert file.count == 8
    file.count = 0
    assert part[::64, 0].tolist() == list(range(0, 1 << 20, 64 * 1024))
    assert file.count == 16 * 8
    file.count = 0
    assert part[10:20, 100:612].shape == (10, 512)
    assert file.count <= 1.05 * 10 * 512 * 8 + 9 * 4096
    file.count = 0
    assert part[3:3].shape == (0, 1024)
    assert file.count == 0
    file.count = 0
    assert part[-1:-3:-1, ...].flip(0).tolist() == torch.arange(1022 * 1024, 1 << 20).view(2, 1024).tolist()
    assert file.count == 2 * 1024 * 8


def test_a_column_is_read_through_within_bounds() -> None:
    file = Recording(saved({"w": torch.arange(1 << 20).view(1 << 15, 32)}))
    part = zipslicer.load(file).get_slice("w")
    file.count = 0
    assert part[:, 3].tolist() == list(range(3, 1 << 20, 32))
    assert file.count <= 8 << 20


def test_an_expanded_tensor_costs_its_hull_only() -> None:
    file = Recording(saved({"w": torch.arange(10.0).expand(1000, 10)}))
    sd = zipslicer.load(file)
    file.count = 0
    assert sd.get_slice("w")[5:900].shape == (895, 10)
    assert file.count < 1000


def test_a_slice_owns_no_more_than_it_shows() -> None:
    part = loaded({"w": torch.arange(100_000).view(1000, 100)}).get_slice("w")
    for wanted in (slice(0, 10), (slice(None), 5), (slice(None, None, 100), slice(None, None, -7)), 3):
        got = part[wanted]
        assert got.untyped_storage().nbytes() == got.numel() * 8


def test_slices_of_special_tensors() -> None:
    conj = torch.arange(6).to(torch.complex64).mul(1j).view(2, 3).conj()
    sd = loaded({"conj": conj, "p": torch.nn.Parameter(torch.arange(3.0)), "bf": torch.arange(4).bfloat16()})
    assert sd.get_slice("conj")[1:].tolist() == conj[1:].tolist()
    assert sd.get_slice("conj")[1:].is_conj()
    assert sd.get_slice("p")[:2].requires_grad
    assert sd.get_slice("bf")[::2].tolist() == [0.0, 2.0]


def test_a_deflated_record_is_sliced_too() -> None:
    import makers

    data = makers.edited(saved({"w": torch.arange(10_000).view(100, 100)}), lambda _, content: content, method=8).data
    assert len(data) < 60_000
    sd = zipslicer.load(data)
    assert sd.get_slice("w")[5:7, ::-50].tolist() == [[599, 549], [699, 649]]
    assert torch.equal(sd["w"], torch.arange(10_000).view(100, 100))


# --- memory and sharing ------------------------------------------------------------------------------------------------


def test_every_touch_is_an_independent_copy() -> None:
    sd = loaded({"w": torch.zeros(4), "tied": torch.zeros(4)})
    one, other = sd["w"], sd["w"]
    one.fill_(1)
    assert other.tolist() == [0, 0, 0, 0]
    assert one.data_ptr() != other.data_ptr()


@pytest.fixture
def tied() -> dict[str, Any]:
    base = torch.arange(100.0)
    return {
        "base": base,
        "view": base[10:20],
        "same": base,
        "nested": {"t": base.view(10, 10).t()},
        "own": torch.ones(3),
    }


def groups(tree: dict[str, Any]) -> list[bool]:
    """Which of the tensors share the first one's storage."""
    flat = [tree["base"], tree["view"], tree["same"], tree["own"]]
    flat += [tree["nested"]["t"]] if "nested" in tree else []
    return [tensor.untyped_storage().data_ptr() == flat[0].untyped_storage().data_ptr() for tensor in flat]


def test_materialize_shares_as_torch_load_does(tied: dict[str, Any]) -> None:
    made = loaded(tied).materialize()
    assert groups(made) == groups(tied)
    assert made["view"].storage_offset() == 10
    assert made["base"].untyped_storage().nbytes() == 400
    made["base"][10] = -1
    assert made["view"][0] == made["nested"]["t"][0, 1] == -1


def test_get_tensors_shares_within_one_call(tied: dict[str, Any]) -> None:
    sd = loaded(tied)
    made = sd.get_tensors(["own", "view", "base", "same"])
    assert list(made) == ["own", "view", "base", "same"]
    assert groups(made) == [True, True, True, False]
    assert sd.get_tensors(["base"])["base"].data_ptr() != made["base"].data_ptr()


def test_cache_tensors_shares_everywhere(tied: dict[str, Any]) -> None:
    sd = loaded(tied, cache_tensors=True)
    made = {key: sd[key] for key in ("base", "view", "same", "own")} | {"nested": {"t": sd["nested"]["t"]}}
    assert groups(made) == groups(tied)
    assert groups(sd.materialize()) == groups(tied)
    assert sd["base"].untyped_storage().data_ptr() == sd.get_tensors(["view"])["view"].untyped_storage().data_ptr()


def test_touches_do_not_share(tied: dict[str, Any]) -> None:
    sd = loaded(tied)
    assert groups({key: sd[key] for key in ("base", "view", "same", "own")}) == [True, False, False, False]
    assert sd["view"].untyped_storage().nbytes() == 40


def test_saving_a_touched_tensor_writes_its_own_bytes(tied: dict[str, Any]) -> None:
    assert len(saved(loaded({**tied, "base": torch.zeros(1 << 20), "v": torch.zeros(1 << 20)[:3]})["v"])) < 4096


def test_large_tensors_are_writable_and_right() -> None:
    wanted = torch.arange(3 << 20, dtype=torch.int32)
    sd = loaded({"w": wanted, "odd": wanted[1:-1]})
    for threads in (1, 4):
        got = loaded({"w": wanted, "odd": wanted[1:-1]}, threads=threads)
        assert torch.equal(got["w"], wanted)
        assert torch.equal(got["odd"], wanted[1:-1])
    sd["w"].add_(1)


# --- map_location and dtype --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where", ["cpu", None, torch.device("cpu"), {}, {"cuda:0": "cpu"}, lambda storage, location: None]
)
def test_map_location_of_the_cpu(where: Any) -> None:
    sd = loaded({"w": torch.arange(3.0)}, map_location=where)
    assert sd["w"].device.type == "cpu"
    assert sd["w"].tolist() == sd.materialize()["w"].tolist() == sd.get_slice("w")[:].tolist() == [0, 1, 2]


@pytest.mark.parametrize("where", ["meta", torch.device("meta"), {"cpu": "meta"}])
def test_map_location_meta(where: Any) -> None:
    base = torch.zeros(100)
    sd = loaded({"w": base.view(10, 10).t(), "p": torch.nn.Parameter(torch.zeros(2))}, map_location=where)
    for got in (sd["w"], sd.materialize()["w"]):
        assert (got.device.type, got.shape, got.stride()) == ("meta", (10, 10), (1, 10))
    assert sd.get_slice("w")[2:4].shape == (2, 10)
    assert sd.get_slice("w")[2:4].device.type == "meta"
    assert type(sd["p"]) is torch.nn.Parameter


def test_map_location_meta_reads_nothing() -> None:
    file = Recording(saved({"w": torch.zeros(1000)}))
    sd = zipslicer.load(file, map_location="meta")
    sd["w"]
    file.count = 0
    assert sd["w"].shape == (1000,)
    assert sd.materialize()["w"].shape == (1000,)
    assert file.count == 0


def test_map_location_callable_sees_storages_and_locations() -> None:
    seen = []

    def where(storage: Any, location: str) -> Any:
        seen.append((storage.nbytes(), location))
        return storage

    sd = loaded({"w": torch.arange(3.0), "v": torch.arange(2)}, map_location=where)
    assert (sd["w"].tolist(), sd["v"].tolist()) == ([0, 1, 2], [0, 1])
    assert seen == [(12, "cpu"), (16, "cpu")]


@pytest.mark.parametrize("bad", [3.5, [], True, object()])
def test_map_location_of_another_type(bad: Any) -> None:
    with pytest.raises(TypeError, match="map_location"):
        loaded({"w": torch.zeros(1)}, map_location=bad)["w"]


def test_dtype_casts_floating_point_when_it_is_read() -> None:
    tree = {
        "f": torch.arange(3.0),
        "i": torch.arange(3),
        "c": torch.zeros(2, dtype=torch.complex64),
        "n": {"d": [torch.ones(1)]},
    }
    sd = loaded(tree, dtype=torch.bfloat16)
    assert sd.get_meta("f").dtype_name == "float32"
    for made in (sd, sd.materialize()):
        kinds = [made["f"].dtype, made["i"].dtype, made["c"].dtype, made["n"]["d"][0].dtype]
        assert kinds == [torch.bfloat16, torch.int64, torch.complex64, torch.bfloat16]
    assert sd.get_slice("f")[1:].dtype == torch.bfloat16
    assert sd["f"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["bfloat16", "torch.bfloat16"])
def test_dtype_by_its_name(name: str) -> None:
    sd = loaded({"f": torch.arange(3.0), "i": torch.arange(3)}, dtype=name)
    for made in (sd, sd.materialize(), dict(sd.stream()), {key: sd.get_slice(key)[...] for key in sd}):
        assert (made["f"].dtype, made["i"].dtype) == (torch.bfloat16, torch.int64)


@pytest.mark.parametrize("bad", [torch.int8, torch.complex64, float])
def test_dtype_of_another_kind(bad: Any) -> None:
    with pytest.raises(TypeError, match="floating-point"):
        loaded({"w": torch.zeros(1)}, dtype=bad)["w"]


@pytest.mark.parametrize("bad", ["int8", "complex64", "float4_e2m1fn_x2", "half a float", ""])
def test_dtype_by_another_name(bad: str) -> None:
    with pytest.raises(ValueError, match="dtype"):
        loaded({"w": torch.zeros(1)}, dtype=bad)


# --- what is set around us ---------------------------------------------------------------------------------------------


def touches(sd: Any) -> list[Any]:
    return [sd["w"], sd["p"], sd["view"], sd.get_slice("w")[1:], sd.get_slice("view")[::-1], *sd.materialize().values()]


TREE = {"w": torch.arange(6.0).view(2, 3), "p": torch.nn.Parameter(torch.ones(2)), "view": torch.arange(9)[2:8:2]}
SETTINGS: dict[str, Any] = {
    "default device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_torch_have_no_influence(name: str) -> None:
    data = saved(TREE)
    sd = zipslicer.load(data)
    with SETTINGS[name]():
        made = touches(sd) + touches(zipslicer.load(data))
    plain = touches(loaded(TREE)) * 2
    for got, wanted in zip(made, plain, strict=True):
        assert got.device.type == "cpu"
        assert not got.is_inference()
        assert (type(got), got.dtype, got.requires_grad) == (type(wanted), wanted.dtype, wanted.requires_grad)
        assert got.tolist() == wanted.tolist()


def test_a_torch_that_lacks_a_dtype_reads_the_others_no_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of an older one. What has the dtype says so, tensor by tensor."""
    from zipslicer import tensors

    complete = tensors._maker

    def lacking(torch: Any) -> Any:
        maker = complete(torch)
        return maker._replace(dtypes=[None if dtype is torch.float8_e5m2 else dtype for dtype in maker.dtypes])

    monkeypatch.setattr(tensors, "_maker", lacking)
    sd = loaded({"a": torch.arange(5)})
    assert sd["a"].tolist() == [0, 1, 2, 3, 4]
    assert sd._view.reader.fast is not None
    sd = loaded({"a": torch.arange(5), "b": torch.zeros(3, dtype=torch.float8_e5m2)})
    assert sd["a"].tolist() == [0, 1, 2, 3, 4]
    assert sd.get_meta("b").shape == (3,)
    assert sd._view.reader.fast is None
    with pytest.raises(NotImplementedError, match="has no dtype float8_e5m2"):
        sd["b"]


def test_default_dtype_has_no_influence() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert [got.dtype for got in touches(loaded({**TREE}))][:2] == [torch.float32, torch.float32]
    finally:
        torch.set_default_dtype(before)


def test_warnings_about_storages_stay_away() -> None:
    """filterwarnings=error: a storage that stands as a value makes none."""
    sd = loaded({"s": torch.arange(4, dtype=torch.uint8).untyped_storage()})
    assert list(sd["s"]) == [0, 1, 2, 3]


# --- threads and processes ---------------------------------------------------------------------------------------------


def test_threads_share_a_state_dict(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({str(i): torch.full((100 + i,), i) for i in range(50)} | {"nested": {"w": torch.zeros(3)}}, path)
    sd = zipslicer.load(path)
    wrong: list[Any] = []

    def work(seed: int) -> None:
        for i in range(100):
            key = (seed * 31 + i * 7) % 50
            if sd[str(key)].tolist() != [key] * (100 + key) or sd["nested"]["w"].tolist() != [0, 0, 0]:
                wrong.append(key)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_threads_make_one_container() -> None:
    for _ in range(20):
        sd = loaded({"nested": {"w": torch.zeros(3)}})
        barrier = threading.Barrier(4)
        found: list[Any] = []

        def work(sd: Any = sd, barrier: Any = barrier, found: Any = found) -> None:
            barrier.wait()
            found.append(sd["nested"])

        workers = [threading.Thread(target=work) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert all(nested is found[0] for nested in found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_dataloader_read_the_same_file(tmp_path: Path, method: str) -> None:
    from concurrency import Rows  # where a spawned process finds it, whatever folder the tests are run in

    path = tmp_path / "a.pt"
    torch.save(
        {"w": torch.arange(200.0).view(20, 10), **{f"b{i}": torch.full((10,), 1000.0 * i) for i in range(20)}}, path
    )
    sd = zipslicer.load(path)
    sd["b0"]
    loader = torch.utils.data.DataLoader(Rows(sd), batch_size=5, num_workers=2, multiprocessing_context=method)
    got = torch.cat(list(loader))
    assert torch.equal(got, torch.arange(200.0).view(20, 10) + torch.arange(20.0).mul(1000).view(20, 1))


# ---------------------------------------------------------------- small tensors, which torch makes and the backend fills


def test_a_small_tensor_is_as_any_other_of_torch(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(6.0).reshape(2, 3), "t": torch.arange(6.0).reshape(2, 3).t()}, tmp_path / "m.pth")
    with zipslicer.load(tmp_path / "m.pth") as sd:
        for _ in range(2):  # the first touch finds the records
            w, t = sd["w"], sd["t"]
            assert type(w) is torch.Tensor
            assert w.equal(torch.arange(6.0).reshape(2, 3))
            assert t.stride() == (1, 3)
            assert t.equal(torch.arange(6.0).reshape(2, 3).t())
            assert w.untyped_storage().nbytes() == 24
            assert (w.is_leaf, w.requires_grad, w._is_view()) == (True, False, False)
        w.resize_(4, 4)  # of memory that torch has taken, so that torch may take more


@pytest.mark.parametrize("mode", ["default device", "deterministic", "inference", "no_grad"])
def test_a_mode_of_torch_changes_no_value(tmp_path: Path, mode: str) -> None:
    torch.save({"w": torch.arange(6.0), "v": torch.arange(3)}, tmp_path / "m.pth")
    modes: dict[str, Any] = {
        "default device": torch.device("meta"),
        "deterministic": contextlib.nullcontext(),
        "inference": torch.inference_mode(),
        "no_grad": torch.no_grad(),
    }
    with zipslicer.load(tmp_path / "m.pth") as sd:
        sd["w"]
        torch.use_deterministic_algorithms(mode == "deterministic")
        try:
            with modes[mode]:
                made = sd["w"]
                assert (type(made), made.device.type, made.is_inference()) == (torch.Tensor, "cpu", False)
        finally:
            torch.use_deterministic_algorithms(False)
        assert made.equal(torch.arange(6.0))


def test_no_memory_is_written_to_that_a_fake_tensor_does_not_have(tmp_path: Path) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    torch.save({"w": torch.arange(6.0)}, tmp_path / "m.pth")
    with zipslicer.load(tmp_path / "m.pth") as sd:
        sd["w"]
        with FakeTensorMode(), contextlib.suppress(RuntimeError):  # torch's own, of what is no fake one
            sd["w"]
        assert sd["w"].tolist() == [0, 1, 2, 3, 4, 5]


# --- mmap=True and direct=True ----------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A file with large and small tensors, of which some are neither contiguous nor alone on their storage."""
    large = torch.arange(900_000, dtype=torch.float32).reshape(300, 3000)
    made = {
        "large": large,
        "turned": torch.arange(700_000).reshape(700, 1000).t(),
        "part": large[10:20],
        "small": torch.arange(5.0),
        "parameter": torch.nn.Parameter(torch.ones(3, 2)),
        "empty": torch.zeros(0, 2),
        "conj": torch.ones(3, dtype=torch.complex64).conj(),
        "sparse": torch.eye(4).to_sparse(),
        "half": torch.arange(2_000_000, dtype=torch.float16),
    }
    torch.save(made, tmp_path / "tree.pth")
    return tmp_path / "tree.pth", made


def is_mapped(tensor: Any, path: Path) -> bool:
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, _, end = line.split()[0].partition("-")
        if int(start, 16) <= address < int(end, 16):
            return line.endswith(str(path))
    return False


def same(one: Any, other: Any) -> bool:
    return (
        bool(one.is_sparse == other.is_sparse and torch.equal(one, other) and one.stride() == other.stride())
        if (not one.is_sparse)
        else torch.equal(one.to_dense(), other.to_dense())
    )


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc")
def test_mmap_shows_the_file(tree: tuple[Path, dict[str, Any]]) -> None:
    path, expected = tree
    before = path.read_bytes()
    sd = zipslicer.load(path, mmap=True)
    plain = sd.materialize()
    for key, value in expected.items():
        touched = sd[key]
        assert same(touched, value)
        assert same(plain[key], value)
        if not value.is_sparse and value.numel():
            assert is_mapped(touched, path), key
            assert is_mapped(plain[key], path)
            hull = 1 + sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True))
            assert touched.untyped_storage().nbytes() == hull * value.itemsize
    assert plain["part"].untyped_storage().data_ptr() == plain["large"].untyped_storage().data_ptr()
    for index in (slice(5, 9), (slice(None), slice(0, 7)), (..., slice(None, None, 50)), (3, 4)):
        part = sd.get_slice("large")[index]
        assert part.equal(expected["large"][index])
        assert is_mapped(part, path)
    assert sd.get_slice("large")[::-1].equal(expected["large"].flip(0))
    assert [key for key, _ in sd.stream()] == sd.offset_keys()
    large = sd["large"]
    large += 1  # a page of its own for who writes
    assert path.read_bytes() == before
    sd.close()
    assert large[0, 0] == 1
    with pytest.raises(ValueError, match="closed"):
        sd["large"]


def test_mmap_reads_what_it_cannot_show(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(1000), "v": torch.arange(7.0)}, tmp_path / "m.pth")
    with zipfile.ZipFile(tmp_path / "m.pth") as before, zipfile.ZipFile(tmp_path / "odd.pth", "w") as after:
        for name in before.namelist():  # by hand: no record is aligned, and one is deflated
            method = zipfile.ZIP_DEFLATED if name.endswith("/0") else zipfile.ZIP_STORED
            after.writestr("x" + name, before.read(name), method)
    for dtype in (None, torch.float64):
        with zipslicer.load(tmp_path / "odd.pth", mmap=True, dtype=dtype) as sd:
            assert sd["w"].equal(torch.arange(1000))
            assert sd["v"].equal(torch.arange(7.0, dtype=dtype))
            assert sd.get_slice("w")[::3].equal(torch.arange(1000)[::3])
            assert sd.materialize()["v"].equal(torch.arange(7.0, dtype=dtype))


def test_mmap_of_a_file_that_was_cut_short(tree: tuple[Path, dict[str, Any]]) -> None:
    """As far as can be told before a page is touched."""
    path, _ = tree
    with zipslicer.load(path, mmap=True) as sd:
        os.truncate(path, path.stat().st_size // 2)
        for key in ("large", "small"):
            with pytest.raises(zipslicer.ZipSlicerError, match=r"changed|shorter"):
                sd[key]


def test_mmap_as_arrays(tree: tuple[Path, dict[str, Any]]) -> None:
    pytest.importorskip("numpy")
    path, expected = tree
    keys = ["large", "turned", "part", "small", "half"]
    with zipslicer.load(path, mmap=True, framework="np") as sd:
        plain = sd.select(keys).materialize()
        for key in keys:
            assert (sd[key] == expected[key].numpy()).all()
            assert (plain[key] == expected[key].numpy()).all()
        assert (sd.get_slice("large")[:, 3:5] == expected["large"][:, 3:5].numpy()).all()


def test_mmap_wants_a_file(tree: tuple[Path, dict[str, Any]]) -> None:
    path, expected = tree
    with pytest.raises(ValueError, match="a file on disk"):
        zipslicer.load(path.read_bytes(), mmap=True)
    with path.open("rb") as file, zipslicer.load(file, mmap=True) as sd:
        assert sd["large"].equal(expected["large"])
    with pytest.raises(ValueError, match="only one"):
        zipslicer.load(path, mmap=True, direct=True)


def is_cached(path: Path, offset: int) -> bool:
    """By mincore, which reads nothing ahead, as a read that does not wait does."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as pages:
        found = (ctypes.c_ubyte * 1)()
        start = ctypes.addressof(ctypes.c_char.from_buffer(pages)) + offset // mmap.PAGESIZE * mmap.PAGESIZE
        assert not ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(1), found)
        return bool(found[0] & 1)


def test_direct(tree: tuple[Path, dict[str, Any]]) -> None:
    path, expected = tree
    with zipslicer.load(path, direct=True) as sd:
        plain = sd.materialize()
        for key, value in expected.items():
            assert same(sd[key], value)
            assert same(plain[key], value)
            if not value.is_sparse:
                assert sd[key].untyped_storage().nbytes() <= value.untyped_storage().nbytes()
        assert sd.get_slice("large")[5:9].equal(expected["large"][5:9])
        assert dict(sd.stream())["half"].equal(expected["half"])


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no direct reads here")
def test_direct_reads_past_the_page_cache(tree: tuple[Path, dict[str, Any]]) -> None:
    path, expected = tree
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with zipslicer.load(path, direct=True) as sd:
        if not isinstance(sd._view.table.archive.source.handle, tuple):
            pytest.skip("this file system has no direct reads")
        record = sd._view.table.record(sd._view.table.row(0).storage)
        offset = sd._view.table.archive.extent(record)[0] + (2 << 20)
        if is_cached(path, offset):
            pytest.skip("the system keeps these pages")
        assert sd["large"].equal(expected["large"])
        assert not is_cached(path, offset)
    with zipslicer.load(path) as sd:
        assert sd["large"].equal(expected["large"])
    assert is_cached(path, offset)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no page cache to be emptied here")
def test_scattered_tensors_of_a_cold_file(tmp_path: Path) -> None:
    """Those to come are announced; what is announced is no more than that, and what is read is right."""
    path, between = tmp_path / "m.pth", torch.zeros(5000)
    tree: dict[str, Any] = {}
    for i in range(150):
        tree |= {f"w{i}": torch.full((9,), float(i)), f"b{i}": between + i}
    torch.save(tree, path)
    keys = [f"w{i}" for i in range(150)]
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with zipslicer.load(path) as sd:
        assert all(tensor.equal(torch.full((9,), float(key[1:]))) for key, tensor in sd.get_tensors(keys).items())


@pytest.mark.parametrize("at", ["open", "read"])
def test_direct_falls_back(tree: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    path, expected = tree
    if at == "open":
        monkeypatch.setattr("os.O_DIRECT", getattr(os, "O_DIRECTORY", 0), raising=False)  # which a file is not
    with zipslicer.load(path, direct=True) as sd:
        source = sd._view.table.archive.source
        if at == "open":
            assert isinstance(source.handle, int) or not hasattr(os, "preadv")
        elif isinstance(source.handle, tuple):  # the second descriptor reads nothing
            refusing = select.epoll()
            source.handle = (source.handle[0], refusing.fileno())
        assert sd["large"].equal(expected["large"])


# --- out= -------------------------------------------------------------------------------------------------------------


INDICES = [
    (),
    3,
    slice(2, 9),
    (slice(None), slice(0, 40)),
    (slice(None, None, 7), 5),
    (..., slice(None, None, -1)),
    (None, 4),
]


FILLS = [(key, index) for key in ("large", "turned", "part") for index in INDICES]
FILLS += [
    ("parameter", index) for index in ((), 1, slice(1, 9), (slice(None), slice(0, 1)), (..., slice(None, None, -1)))
]
FILLS += [("half", index) for index in ((), 3, slice(2, 9), (..., slice(None, None, -1)), (None, slice(None, None, 7)))]


@pytest.mark.parametrize(("key", "index"), FILLS, ids=str)
@pytest.mark.parametrize("kind", ["same", "cast", "strided"])
def test_out_is_filled(tree: tuple[Path, dict[str, Any]], key: str, index: Any, kind: str) -> None:
    path, expected = tree
    value = expected[key].detach()
    wanted = torch.from_numpy(np.array(value.numpy()[index]))
    out = torch.zeros(wanted.shape, dtype=torch.float64 if kind == "cast" else value.dtype)
    if kind == "strided":
        out = torch.zeros((*wanted.shape, 2), dtype=value.dtype)[..., 1]
    version = out._version
    with zipslicer.load(path) as sd:
        assert sd.get_slice(key).read(index, out=out) is out
        assert out.equal(wanted.to(out.dtype))
        assert out._version > version
        if index == ():
            out.zero_()
            assert sd.get_tensor(key, out=out) is out
            assert out.equal(wanted.to(out.dtype))


def test_out_is_read_straight_into(tree: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    path, expected = tree
    out = torch.zeros(300, 3000)
    with zipslicer.load(path) as sd:
        assert isinstance(sd["small"], torch.Tensor)
        monkeypatch.setattr(sd._view.reader, "slice", lambda *_: pytest.fail("a tensor was made"))
        sd.get_tensor("large", out=out)
        sd.get_slice("large").read((slice(None), slice(10, 250)), out=out.new_empty(300, 240))
        turned = torch.zeros(700, 1000, dtype=torch.int64).t()
        sd.get_tensor("turned", out=turned)
    assert out.equal(expected["large"])
    assert turned.equal(expected["turned"])


def test_out_of_another_shape_or_kind(tree: tuple[Path, dict[str, Any]]) -> None:
    path, expected = tree
    with zipslicer.load(path) as sd:
        for index, shape in (((), (3000, 300)), (0, (2999,)), ((..., 0), (1, 300))):
            with pytest.raises(ValueError, match="out has"):
                sd.get_slice("large").read(index, out=torch.zeros(shape))
        dense = torch.zeros(4, 4)
        assert sd.get_tensor("conj", out=torch.zeros(3, dtype=torch.complex64)).equal(expected["conj"])
        assert sd.get_tensor("empty", out=torch.zeros(0, 2)).numel() == 0
        sd["own"] = torch.eye(4)
        assert sd.get_tensor("own", out=dense) is dense
        assert dense.equal(torch.eye(4))
        assert sd.get_slice("sparse").part("values").read(slice(1, 3), out=torch.zeros(2)).equal(torch.ones(2))
        with pytest.raises(KeyError):
            sd.get_tensor("none", out=dense)
        with pytest.raises(TypeError):
            sd.get_slice("large").read([0], out=dense)
        with pytest.raises(TypeError, match="out is a tensor"):
            sd.get_tensor("large", out=[0.0])


def test_out_keeps_what_is_between_its_elements() -> None:
    """Elements that many indices share, with gaps: as many bytes as the hull has, and not the same."""
    value = torch.arange(9.0).as_strided((3, 3), (0, 4))
    memory = torch.full((9,), -1.0)
    with loaded({"w": value}) as sd:
        out = torch.full((3, 3), -1.0)
        assert sd.get_tensor("w", out=out).equal(value)
        with pytest.raises(RuntimeError, match="single memory location"):
            sd.get_tensor("w", out=memory.as_strided((3, 3), (0, 4)))
    assert memory[1:4].tolist() == [-1, -1, -1]


def test_out_without_memory() -> None:
    out = torch.zeros(1000)
    out.untyped_storage().resize_(0)
    with loaded({"w": torch.ones(1000)}) as sd, pytest.raises(ValueError, match="too small"):
        sd.get_tensor("w", out=out)


def test_out_as_arrays(tree: tuple[Path, dict[str, Any]]) -> None:
    path, expected = tree
    with zipslicer.load(path, framework="np") as sd:
        for index in INDICES:
            wanted = expected["large"].numpy()[index]
            shape = wanted.shape
            for out in (np.zeros(shape, np.float32), np.zeros(shape, np.float64), np.zeros((*shape, 2))[..., 0]):
                assert sd.get_slice("large").read(index, out=out) is out
                assert (out == wanted).all()
        out = np.zeros((1000, 700), np.int64)
        assert (sd.get_tensor("turned", out=out) == expected["turned"].numpy()).all()
