"""Staging: casts by chunks, and copies to a device that begin before the next chunk is read.

No device is needed for most of it: a lane whose copies happen as late as they may stands in for one, so that a buffer
that is used again too early shows in the numbers. What needs a GPU is skipped where there is none.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

import zipslicer
from zipslicer import staging
from zipslicer.staging import Ring, cast, memory_of, send

torch = pytest.importorskip("torch")

if TYPE_CHECKING:
    from pathlib import Path


class Mark:
    def __init__(self, lane: LateLane, count: int) -> None:
        self._lane, self._count = lane, count

    def query(self) -> bool:
        return self._lane.done >= self._count

    def synchronize(self) -> None:
        self._lane.run(self._count)


class LateLane:
    """Copies when it has to, and never before."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Any, Any]] = []
        self.done = self.begun = self.ended = self.buffers = 0
        self._lock = threading.Lock()

    def buffer(self, nbytes: int) -> Any:
        self.buffers += 1
        return torch.empty(nbytes, dtype=torch.uint8)

    def begin(self) -> None:
        self.begun += 1

    def copy(self, target: Any, source: Any) -> None:
        with self._lock:
            self.waiting.append((target, source))

    def mark(self) -> Mark:
        with self._lock:
            return Mark(self, len(self.waiting))

    def end(self, target: Any) -> None:
        del target
        self.run(len(self.waiting))
        self.ended += 1

    def handover(self) -> Callable[[Any], None]:
        return lambda _: None

    def run(self, count: int) -> None:
        with self._lock:
            while self.done < count:
                target, source = self.waiting[self.done]
                with torch.no_grad():
                    target.copy_(source)
                self.done += 1


def reader_of(tensor: Any) -> Any:
    content = bytes(memory_of(tensor, tensor.nbytes))

    def read(start: int, memory: memoryview) -> None:
        memory[:] = content[start : start + len(memory)]

    return read


@pytest.mark.parametrize("count", [1, 15, 16, 17, 100])
def test_cast_goes_by_chunks(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(staging, "CHUNK_NBYTES", 64)
    given = torch.arange(float(count))
    made = torch.empty(count, dtype=torch.float16)
    cast(torch, reader_of(given), given.nbytes, given.dtype, made)
    assert made.equal(given.half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("slots", [1, 2, 5])
def test_a_buffer_is_not_used_again_before_its_copy_is_done(slots: int, dtype: Any) -> None:
    lane, ring = LateLane(), Ring(64, slots)
    given = torch.arange(1000.0)
    made = torch.empty(1000, dtype=dtype)
    send(lane, ring, reader_of(given), given.nbytes, given.dtype, made)
    assert made.equal(given.to(dtype))
    assert lane.buffers == slots
    assert (lane.begun, lane.ended) == (1, 1)


def test_copies_run_while_the_next_chunk_is_read() -> None:
    lane, ring = LateLane(), Ring(64, 3)
    waiting = []
    given = torch.arange(64.0)
    read = reader_of(given)

    def watched(start: int, memory: memoryview) -> None:
        waiting.append(len(lane.waiting) - lane.done)
        read(start, memory)

    send(lane, ring, watched, given.nbytes, given.dtype, torch.empty(64))
    assert waiting == [0, 1, 2, 2]  # of three buffers one is read into


def test_threads_share_a_ring() -> None:
    ring = Ring(64, 2)
    made = [torch.empty(500) for _ in range(6)]
    lanes = [LateLane() for _ in made]

    def work(i: int) -> None:
        given = torch.arange(500.0) + i
        send(lanes[i], ring, reader_of(given), given.nbytes, given.dtype, made[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(made))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(tensor.equal(torch.arange(500.0) + i) for i, tensor in enumerate(made))
    assert sum(lane.buffers for lane in lanes) == 2


def test_a_read_that_fails_gives_its_buffer_back() -> None:
    lane, ring = LateLane(), Ring(64, 1)

    def fails(start: int, memory: memoryview) -> None:
        raise OSError(5, "a broken disk")

    for _ in range(3):
        with pytest.raises(OSError, match="broken"):
            send(lane, ring, fails, 100, torch.float32, torch.empty(25))
    given = torch.arange(25.0)
    made = torch.empty(25)
    send(lane, ring, reader_of(given), given.nbytes, given.dtype, made)
    assert made.equal(given)
    assert lane.ended == 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_a_ring_of_its_own() -> None:
    parents = staging.ring_of()
    pid = os.fork()
    if pid == 0:  # pragma: no cover
        os._exit(int(staging.ring_of() is parents))
    assert os.waitpid(pid, 0)[1] == 0
    assert staging.ring_of() is parents


# --- through the whole house ------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tied = torch.arange(5000.0)
    tree = {
        "w": torch.arange(6000.0).reshape(60, 100),
        "turned": torch.arange(6000.0).reshape(60, 100).t(),
        "tied": tied,
        "part": tied[100:200],
        "parameter": torch.nn.Parameter(torch.ones(40, 40)),
        "conj": torch.ones(3, dtype=torch.complex64).conj(),
        "expanded": torch.ones(1, 4).expand(3, 4),
        "ints": torch.arange(7),
        "empty": torch.empty(0),
    }
    torch.save(tree, tmp_path / "m.pth")
    return tmp_path / "m.pth"


@pytest.fixture
def lane(monkeypatch: pytest.MonkeyPatch) -> LateLane:
    """The CPU in the part of a device with a lane, for whatever is opened."""
    made, ring = LateLane(), Ring(256, 2)
    monkeypatch.setattr("zipslicer.tensors.lane_of", lambda *_: made)
    monkeypatch.setattr("zipslicer.tensors.ring_of", lambda: ring)
    for limit in ("tensors.SMALL_TO", "tensors.LANE_FROM", "stream.LANE_FROM"):
        monkeypatch.setattr(f"zipslicer.{limit}", 0)
    return made


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_tensors_come_by_the_lane(path: Path, lane: LateLane, monkeypatch: pytest.MonkeyPatch, dtype: Any) -> None:
    monkeypatch.setattr("zipslicer.tensors._Place.where", lambda *_: torch.device("cpu"))
    expected = torch.load(path)
    with zipslicer.load(path, map_location={"cpu": "cpu"}, dtype=dtype) as sd:
        plain = sd.materialize()
        copies = lane.done
        assert copies
        for key, value in expected.items():
            wanted = value.to(dtype) if dtype is not None and value.is_floating_point() else value
            for made in (sd[key], plain[key]):
                assert made.equal(wanted), key
                assert made.stride() == value.stride()
                assert made.requires_grad == value.requires_grad
        assert lane.done > copies
        assert plain["part"].untyped_storage().data_ptr() == plain["tied"].untyped_storage().data_ptr()
    assert lane.done == len(lane.waiting)


def test_load_into_goes_by_the_lane(path: Path, lane: LateLane) -> None:
    expected = torch.load(path)
    target = {"w": torch.zeros(60, 100, dtype=torch.float64), "tied": torch.zeros(5000, dtype=torch.float16)}
    with zipslicer.load(path) as sd:
        sd.load_into(target, strict=False)
    assert lane.done
    assert target["w"].equal(expected["w"].double())
    assert target["tied"].equal(expected["tied"].half())


@pytest.mark.parametrize("where", ["cpu", lambda storage, _: storage, lambda *_: None], ids=["cpu", "same", "none"])
def test_a_cast_keeps_what_is_tied(path: Path, where: Any) -> None:
    with zipslicer.load(path, map_location=where, dtype=torch.float16) as sd:
        plain = sd.materialize()
        assert plain["part"].equal(torch.arange(5000.0).half()[100:200])
        assert plain["part"].untyped_storage().data_ptr() == plain["tied"].untyped_storage().data_ptr()
        assert plain["tied"].untyped_storage().nbytes() == 10_000


@pytest.mark.parametrize("at", [slice(None), slice(3, 5)])
def test_a_cast_of_a_large_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: slice) -> None:
    monkeypatch.setattr(staging, "CHUNK_NBYTES", 1 << 20)
    monkeypatch.setattr("zipslicer.tensors.CHUNK_NBYTES", 1 << 20)
    large = torch.arange(1_500_000.0).reshape(10, -1)
    torch.save({"w": large, "t": large.t()}, tmp_path / "m.pth")
    with zipslicer.load(tmp_path / "m.pth", dtype=torch.float64) as sd:
        assert sd["w"][at].equal(large[at].double())
        assert sd["t"].equal(large.t().double())
        assert sd["t"].stride() == large.t().stride()
    with zipslicer.load(tmp_path / "m.pth") as sd:
        out = torch.zeros_like(large[at], dtype=torch.float64)
        version = out._version
        assert sd.get_slice("w").read(at, out=out) is out
        assert out.equal(large[at].double())
        assert out._version > version


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def repr_of(where: Any) -> str:
    return "callable" if callable(where) else repr(where)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    for limit in ("tensors.SMALL_TO", "tensors.LANE_FROM", "stream.LANE_FROM"):
        monkeypatch.setattr(f"zipslicer.{limit}", 0)
    yield torch.device("cuda", 0)
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize(
    "where", ["cuda", "cuda:0", 0, torch.device("cuda"), {"cpu": "cuda"}, lambda s, _: s.cuda()], ids=repr_of
)
def test_cuda(path: Path, cuda: Any, where: Any, dtype: Any) -> None:
    expected = torch.load(path)
    with zipslicer.load(path, map_location=where, dtype=dtype) as sd:
        plain = sd.materialize()
        for key, value in expected.items():
            wanted = value.to(dtype) if dtype is not None and value.is_floating_point() else value
            for made in (sd[key], plain[key], sd.get_slice(key)[...]):
                assert made.device == cuda
                assert made.cpu().equal(wanted), key
                assert made.requires_grad == value.requires_grad
        assert plain["part"].untyped_storage().data_ptr() == plain["tied"].untyped_storage().data_ptr()


@pytest.mark.parametrize("device", [None, "cuda"])
def test_cuda_small_tensors(tmp_path: Path, device: str | None) -> None:
    """Without the lane, which they are too small for; many together, and some among large ones."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    state = {f"{i}": torch.full((i % 7 + 1, 3), float(i)) for i in range(1000)}
    state |= {f"large{i}": torch.full((1 << 18,), float(i)) for i in range(3)}
    torch.save(state, tmp_path / "m.pth")
    with zipslicer.load(tmp_path / "m.pth", map_location=None if device else "cuda") as sd:
        target = {key: torch.zeros_like(value, device="cuda") for key, value in state.items()}
        with zipslicer.load(tmp_path / "m.pth") as plain:
            plain.load_into(target)
        for found in (dict(sd.stream(device=device)), sd.materialize() if device is None else target):
            assert all(found[key].is_cuda and found[key].cpu().equal(value) for key, value in state.items())
            assert len({value.untyped_storage().data_ptr() for value in found.values()}) == len(state)


def test_cuda_load_into(path: Path, cuda: Any) -> None:
    target = {"w": torch.zeros(60, 100, device=cuda), "tied": torch.zeros(5000, dtype=torch.float16, device=cuda)}
    target["turned"] = torch.zeros(60, 100, device=cuda).t()
    target["expanded"] = torch.zeros(3, 4, device=cuda)
    with zipslicer.load(path) as sd:
        sd.load_into(target, strict=False)
        part = torch.zeros(2, 50, device=cuda)
        assert sd.get_slice("w").read((slice(3, 5), slice(50, None)), out=part) is part
    expected = torch.load(path)
    for key in ("w", "turned", "expanded"):
        assert target[key].cpu().equal(expected[key]), key
    assert target["tied"].cpu().equal(expected["tied"].half())
    assert part.cpu().equal(expected["w"][3:5, 50:])


def test_cuda_pinned_memory_is_read_into(path: Path, cuda: Any) -> None:
    out = torch.empty(60, 100, pin_memory=True)
    with zipslicer.load(path) as sd:
        assert sd.get_tensor("w", out=out) is out
    assert out.to(cuda).cpu().equal(torch.load(path)["w"])


def test_cuda_stream(path: Path, cuda: Any) -> None:
    expected = torch.load(path)
    side = torch.cuda.Stream(cuda)
    with zipslicer.load(path) as sd, torch.cuda.stream(side):
        for key, value in sd.stream(device={"t*": "cpu", "*": cuda}):
            assert value.device.type == ("cpu" if key.startswith("t") else "cuda")
            assert value.cpu().equal(expected[key]), key


def test_cuda_buffers_are_used_again_while_the_device_is_busy(tmp_path: Path, cuda: Any) -> None:
    """More than the ring holds, behind work that keeps the device from copying for a while; by several threads."""
    count = 2 * staging.SLOTS * staging.SLOT_NBYTES // 4 // 8
    state = {f"w{i}": torch.arange(i, i + count, dtype=torch.int32) for i in range(8)}
    torch.save(state, tmp_path / "m.pth")
    wrong: list[str] = []
    square = torch.randn(4096, 4096, device=cuda)

    def work(dtype: Any) -> None:
        for _ in range(20):
            square @ square
        with zipslicer.load(tmp_path / "m.pth") as sd:
            for key, value in sd.stream(device=cuda):
                wanted = torch.arange(int(key[1:]), int(key[1:]) + count, dtype=torch.int32, device=cuda)
                if not value.to(dtype).equal(wanted.to(dtype)):
                    wrong.append(f"{key} by stream")
        for key, value in zipslicer.load(tmp_path / "m.pth", map_location=cuda).materialize().items():
            if value[0].item() != int(key[1:]) or value.diff().ne(1).any():
                wrong.append(key)

    threads = [threading.Thread(target=work, args=(dtype,)) for dtype in (torch.int32, torch.int64, torch.float64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_cuda_a_failing_read_leaves_the_lane_as_it_was(tmp_path: Path, cuda: Any) -> None:
    count = 2 * staging.SLOT_NBYTES // 4
    for name in ("whole", "cut"):
        torch.save({"w": torch.arange(count)}, tmp_path / f"{name}.pth")
    for _ in range(staging.SLOTS + 1):
        with zipslicer.load(tmp_path / "cut.pth", map_location=cuda) as sd:
            os.truncate(tmp_path / "cut.pth", os.path.getsize(tmp_path / "cut.pth") - 100)
            with pytest.raises(zipslicer.ZipSlicerError):
                sd["w"]
        torch.save({"w": torch.arange(count)}, tmp_path / "cut.pth")
    with zipslicer.load(tmp_path / "whole.pth", map_location=cuda) as sd:
        assert sd["w"].equal(torch.arange(count, device=cuda))


def test_cuda_is_written_as_torch_writes_it(tmp_path: Path, cuda: Any) -> None:
    weight = torch.arange(5000.0, device=cuda)
    tree = {"w": weight, "part": weight[10:20], "turned": weight.view(50, 100).t(), "p": torch.nn.Parameter(weight)}
    torch.save(tree, tmp_path / "theirs.pth")
    zipslicer.save(tree, tmp_path / "ours.pth")
    for name in ("theirs", "ours"):
        with zipslicer.load(tmp_path / f"{name}.pth") as sd:
            assert sd.get_meta("w").location == "cuda:0"
            assert sd["w"].device.type == "cpu"
            assert sd["turned"].equal(weight.view(50, 100).t().cpu())
    got = torch.load(tmp_path / "ours.pth")
    assert got["w"].device == cuda
    assert all(got[key].equal(value) for key, value in tree.items())
    assert got["part"].untyped_storage().data_ptr() == got["w"].untyped_storage().data_ptr()
