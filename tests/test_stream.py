"""Stream: the order, what is read ahead and what is not, slices, errors, and how it ends."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

import pytest

import zipslicer
from zipslicer import stream as streams
from zipslicer.errors import ZipSlicerError

torch = pytest.importorskip("torch")

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tied = torch.arange(30.0)
    tree = {
        "b": torch.arange(12.0).reshape(3, 4),
        "a": torch.arange(12.0).reshape(3, 4).t(),
        "tied": tied,
        "half": tied[10:20],
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "sparse": torch.eye(3).to_sparse(),
        "step": 3,
        "nested": {"w": torch.ones(2)},
    }
    torch.save(tree, tmp_path / "m.pth")
    return tmp_path / "m.pth"


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "zipslicer-stream"]


class Slow:
    """Stands for a view: counts what is read, and lets it be watched."""

    path = None

    def __init__(self) -> None:
        self.read: list[Any] = []
        self.alive: list[weakref.ref[Any]] = []

    def touch(self, position: int, key: Any) -> Any:
        del key
        self.read.append(position)
        made = torch.full((100,), float(position))
        self.alive.append(weakref.ref(made))
        return made


def wanted(view: Any, count: int, nbytes: int = 400) -> list[streams.Wanted]:
    return [streams.Wanted(f"t{i}", nbytes, view, i, None) for i in range(count)]


def settle(view: Slow) -> int:
    """How many were read, once no more are."""
    before = -1
    while before != len(view.read):
        before = len(view.read)
        time.sleep(0.05)
    return before


def test_every_tensor_comes_in_the_order_of_the_file(path: Path) -> None:
    with zipslicer.load(path) as sd:
        got = list(sd.stream())
        assert [key for key, _ in got] == sd.offset_keys()
        assert {key for key, _ in got} == set(sd) - {"step", "nested"}
        for key, tensor in got:
            alone = sd[key]
            assert type(tensor) is type(alone)
            assert tensor.stride() == alone.stride() if key != "sparse" else True
            assert torch.equal(tensor.to_dense(), alone.to_dense()) if key == "sparse" else torch.equal(tensor, alone)
            assert tensor.requires_grad == alone.requires_grad
        values = dict(got)
        assert values["half"].untyped_storage().nbytes() == 40
        assert values["half"].untyped_storage().data_ptr() != values["tied"].untyped_storage().data_ptr()
        values["a"].zero_()
        assert sd["a"].any()


def test_names_globs_and_edits(path: Path) -> None:
    with zipslicer.load(path) as sd:
        assert [key for key, _ in sd.stream("b")] == ["b"]
        assert {key for key, _ in sd.stream(["*e*", "a"])} == {"tied", "empty", "parameter", "sparse", "a"}
        own = torch.zeros(3)
        sd["own"], sd["word"] = own, "x"
        got = dict(sd.stream())
        assert got["own"] is own
        assert "word" not in got
        with pytest.raises(KeyError):
            sd.stream("missing")
        with pytest.raises(ValueError, match="budget_bytes"):
            sd.stream(budget_bytes=0)


def test_slices_are_read_in_place_of_the_whole(path: Path) -> None:
    with zipslicer.load(path) as sd:
        sd["own"] = torch.arange(4)
        cuts = {"b": (slice(1, 3), 2), "tied": slice(None, None, -7), "own": slice(2), "parameter": 1}
        got = dict(sd.stream(slices=cuts))
        assert got["b"].equal(sd["b"][1:3, 2])
        assert got["tied"].equal(sd["tied"].flip(0)[::7])
        assert got["own"].tolist() == [0, 1]
        assert got["parameter"].item() == 1
        assert got["a"].equal(sd["a"])
        with pytest.raises(IndexError):
            sd.stream(slices={"b": 9})
        with pytest.raises(TypeError, match="no tensor"):
            sd.stream(slices={"step": 0})
        with pytest.raises(KeyError):
            sd.stream(["a"], slices={"b": 0})


def test_a_device_and_the_places_of_the_file(path: Path) -> None:
    with zipslicer.load(path) as sd:
        assert {tensor.device.type for _, tensor in sd.stream(["a", "b"], device="meta")} == {"meta"}
    with zipslicer.load(path, dtype=torch.float16) as sd:
        assert dict(sd.stream("b"))["b"].dtype == torch.float16
    with zipslicer.load(path, cache_tensors=True) as sd:
        got = dict(sd.stream(["tied", "half"]))
        assert got["half"].untyped_storage().data_ptr() == got["tied"].untyped_storage().data_ptr()


def test_shards_are_one_stream(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2), "y": torch.zeros(2)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"z": torch.arange(3)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    files = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    index = f'{{"weight_map": {{"z": "{files[1]}", "x": "{files[0]}", "y": "{files[0]}"}}}}'
    (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    with zipslicer.load(tmp_path) as sd:
        assert [(key, tensor.tolist()) for key, tensor in sd.stream()] == [
            ("x", [1, 1]),
            ("y", [0, 0]),
            ("z", [0, 1, 2]),
        ]


def test_arrays(path: Path) -> None:
    np = pytest.importorskip("numpy")
    with zipslicer.load(path, framework="np") as sd:
        got = dict(sd.stream(["b", "half", "scalar"], slices={"half": slice(2)}))
        assert isinstance(got["b"], np.ndarray)
        assert got["b"].tolist() == sd["b"].tolist()
        assert got["half"].tolist() == [10, 11]
        with pytest.raises(ValueError, match="device"):
            sd.stream(device="cpu")


# ---------------------------------------------------------------- the budget


def test_no_more_than_the_budget_is_read_ahead() -> None:
    view = Slow()
    stream = streams.stream(wanted(view, 20), budget_nbytes=1000)
    assert not view.read  # nothing before somebody asks
    next(stream)
    assert settle(view) == 3  # one taken, two that fit
    next(stream)
    assert settle(view) == 4
    assert len(list(stream)) == 18
    assert not readers()


def test_one_that_is_larger_than_the_budget_goes_alone() -> None:
    view = Slow()
    sizes = [400, 5000, 400, 400]
    each = [streams.Wanted(i, nbytes, view, i, None) for i, nbytes in enumerate(sizes)]
    stream = streams.stream(each, budget_nbytes=1000)
    next(stream)
    assert settle(view) == 2
    next(stream)
    assert settle(view) == 4
    stream.close()


def test_nothing_that_was_taken_and_dropped_lives_on() -> None:
    view = Slow()
    for number, (_, tensor) in enumerate(streams.stream(wanted(view, 12, 1000), budget_nbytes=1000)):
        settle(view)
        gc.collect()
        assert sum(ref() is not None for ref in view.alive) <= 2, number  # this one, and the one read ahead
        del tensor


def test_who_keeps_everything_never_waits() -> None:
    assert len(list(streams.stream(wanted(Slow(), 50), budget_nbytes=1))) == 50


# ---------------------------------------------------------------- how it ends


def test_closing_early_stops_the_reading() -> None:
    view = Slow()
    for _ in streams.stream(wanted(view, 1000), budget_nbytes=2000):
        break
    gc.collect()
    assert not readers()
    assert len(view.read) < 10


def test_a_stream_that_nobody_asks_starts_nothing(path: Path) -> None:
    with zipslicer.load(path) as sd:
        stream = sd.stream()
        assert not readers()
        stream.close()


def test_an_error_names_its_key_and_comes_after_what_is_before_it(path: Path) -> None:
    with zipslicer.load(path) as sd:
        order = sd.offset_keys()
        table = sd._view.table
        victim = next(key for key in order if key == "tied")
        record = table.record(table.row(sd._view.program.payloads[sd._slots[victim]]).storage)
        offset = table.archive.field(record, 0)
    content = bytearray(path.read_bytes())
    content[offset + 30] ^= 1  # the name in its local header
    path.write_bytes(content)
    with zipslicer.load(path) as sd:
        got: list[Any] = []
        with pytest.raises(ZipSlicerError) as caught:
            got.extend(key for key, _ in sd.stream())
        assert got == order[: order.index(victim)]
        assert caught.value.key == victim
    assert not readers()


def test_a_closed_file(path: Path) -> None:
    sd = zipslicer.load(path)
    stream = sd.stream()
    sd.close()
    with pytest.raises(ValueError, match="closed"):
        list(stream)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python 3.12 and later, of threads
def test_a_fork_in_the_middle_is_told(path: Path) -> None:
    view = Slow()
    stream = streams.stream(wanted(view, 1000), budget_nbytes=400)
    next(stream)
    settle(view)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for _ in stream:
                pass
        except RuntimeError:
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(list(stream)) == 999


def test_two_streams_and_touches_at_once(path: Path) -> None:
    with zipslicer.load(path) as sd:
        one, other = sd.stream(), sd.stream(budget_bytes=1)
        for (key, a), (same, b) in zip(one, other, strict=True):
            assert key == same
            assert torch.equal(a.to_dense(), b.to_dense()) if key == "sparse" else torch.equal(a, b)
            assert sd[key] is not None


def test_large_ones_are_read_in_portions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zipslicer.reader.PORTION_NBYTES", 1 << 20)
    torch.save({"w": torch.arange(700_000), "v": torch.arange(10)}, tmp_path / "m.pth")
    with zipslicer.load(tmp_path / "m.pth") as sd:
        got = dict(sd.stream())
        assert got["w"].equal(torch.arange(700_000))
        assert got["v"].equal(torch.arange(10))


def test_progress(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    with zipslicer.load(path) as sd:
        list(sd.stream(progress=True))
        assert "100%" in capsys.readouterr().err
        list(sd.stream())
        assert not capsys.readouterr().err
        monkeypatch.setitem(__import__("sys").modules, "tqdm.auto", None)
        with pytest.raises(ImportError, match="pip install tqdm"):
            sd.stream(progress=True)


# --- items() and values() ---------------------------------------------------------------------------------------------


@pytest.fixture
def many(tmp_path: Path) -> Path:
    tensors = {f"t{i}": torch.full((i,), float(i)) for i in range(40)}
    torch.save(tensors | {"step": 3, "inner": {"x": torch.ones(1)}}, tmp_path / "many.pth")
    return tmp_path / "many.pth"


def test_items_are_read_ahead_in_the_order_of_keys(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead: list[str] = []

    def watched(wanted: list[streams.Wanted], **options: Any) -> Any:
        ahead.extend(each.key for each in wanted)
        return streams.stream(wanted, **options)

    monkeypatch.setattr("zipslicer.state_dict.stream", watched)
    with zipslicer.load(many) as sd:
        sd["own"] = own = torch.zeros(2)
        seen = list(sd.items())
        assert ahead == [f"t{i}" for i in range(1, 40)]
        assert [key for key, _ in seen] == list(sd)
        for key, value in seen[:40]:
            assert value.equal(torch.full((int(key[1:]),), float(key[1:])))
        assert seen[40:42] == [("step", 3), ("inner", sd["inner"])]
        assert seen[42][1] is own
        assert [float(value.sum()) for value in sd.values() if hasattr(value, "sum")][:4] == [0, 1, 4, 9]
        assert len(sd.items()) == len(sd.values()) == 43
        assert ("step", 3) in sd.items()
    assert not readers()


def test_the_first_item_alone_is_touched_alone(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zipslicer.state_dict.stream", lambda *_, **__: pytest.fail("nobody wants the second"))
    with zipslicer.load(many) as sd:
        assert next(iter(sd.items()))[0] == "t0"


def test_a_few_small_items_need_no_thread(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zipslicer.state_dict.stream", lambda *_, **__: pytest.fail("not worth it"))
    with zipslicer.load(path) as sd:
        assert list(dict(sd.items())) == list(sd)


def test_what_is_assigned_during_iteration_is_what_comes(many: Path) -> None:
    with zipslicer.load(many) as sd:
        for key, value in sd.items():
            if hasattr(value, "half"):
                sd[key] = value.half()  # as of any dict, this key and later ones
                sd["t39"] = sd["t20"]
            last = value
        assert all(sd[f"t{i}"].dtype == torch.float16 for i in range(39))
        assert len(sd["inner"]) == len(last) == 1
        seen = dict(sd.items())
        assert seen["t39"].equal(sd["t20"])


def test_keys_that_come_or_go_during_iteration_are_refused(many: Path) -> None:
    with zipslicer.load(many) as sd:
        items = iter(sd.items())
        assert next(items)[0] == "t0"
        del sd["t5"]
        with pytest.raises(RuntimeError, match="during iteration"):
            next(items)
        assert not readers()


def test_an_item_that_cannot_be_read_is_told_at_its_turn(many: Path) -> None:
    content = bytearray(many.read_bytes())
    at = content.index(b"many/data/30", content.index(b"many/data/3") + 5)
    content[at : at + 4] = b"MANY"  # the name in a local header
    many.write_bytes(content)
    with zipslicer.load(many) as sd:
        items = iter(sd.items())
        assert [next(items)[0] for _ in range(30)] == [f"t{i}" for i in range(30)]
        with pytest.raises(ZipSlicerError) as caught:
            next(items)
        assert caught.value.key == "t30"


def test_materialize_shows_progress(many: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    with zipslicer.load(many) as sd:
        assert sd.materialize(progress=True)["t7"].equal(torch.full((7,), 7.0))
        assert "100%" in capsys.readouterr().err
        sd.select("t1*").materialize(progress=True)
        assert "100%" in capsys.readouterr().err
        sd.materialize()
        assert not capsys.readouterr().err


# --- devices ----------------------------------------------------------------------------------------------------------


def test_a_map_of_devices(path: Path) -> None:
    with zipslicer.load(path) as sd:
        where = {"b": "cpu", "par*": "meta", "*a*": "meta", "[b]": "meta"}
        found = {key: value.device.type for key, value in sd.stream(device=where)}
    assert found == {
        "b": "cpu", "a": "meta", "tied": "cpu", "half": "meta", "empty": "cpu", "scalar": "meta", "parameter": "meta",
        "sparse": "meta",
    }  # fmt: skip


def test_a_stream_by_the_lane(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the CPU in the part of a device that has one; what is handed over is waited for by who takes it."""
    from test_staging import LateLane

    waited = []

    class Lane(LateLane):
        def handover(self) -> Any:
            def wait(target: Any) -> None:
                waited.append((threading.current_thread(), target.data_ptr()))

            return wait

    lane = Lane()
    monkeypatch.setattr("zipslicer.tensors.lane_of", lambda *_: lane)
    for module in ("tensors", "stream"):
        monkeypatch.setattr(f"zipslicer.{module}.LANE_FROM", 0)
    monkeypatch.setattr("zipslicer.tensors._Place.where", lambda *_: torch.device("cpu"))
    elsewhere = zipslicer.load(path, map_location={"cpu": "cpu"})  # a map, so that the CPU is a place to go to
    monkeypatch.setattr("zipslicer.state_dict.View.on", lambda *_: elsewhere._view)
    expected = torch.load(path)
    with zipslicer.load(path) as sd:
        seen = {}
        for key, value in sd.stream(["b", "a", "tied", "parameter"], device=torch.device("cpu")):
            assert waited[-1] == (threading.current_thread(), value.data_ptr())
            seen[key] = value
    assert len(waited) == len(seen) == 4
    for key, value in seen.items():
        assert value.equal(expected[key])
        assert value.stride() == expected[key].stride()
    assert isinstance(seen["parameter"], torch.nn.Parameter)
    assert lane.done == len(lane.waiting) > 0


LARGE = 3 << 20  # bytes: memory that is mapped for one tensor


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Twelve tensors of 3 MiB, each full of its number."""
    torch.save({f"t{i:02}": torch.full((LARGE // 4,), i, dtype=torch.int32) for i in range(12)}, tmp_path / "l.pth")
    return tmp_path / "l.pth"


@pytest.mark.parametrize("options", [{}, {"direct": True}], ids=["cached", "direct"])
def test_the_memory_of_a_dropped_tensor_is_used_again(large: Path, options: dict[str, Any]) -> None:
    with zipslicer.load(large, **options) as sd:
        places = []
        for key, tensor in sd.stream(budget_bytes=8 * LARGE):  # in the order of the file: "10" may stand before "2"
            assert tensor.untyped_storage().nbytes() == LARGE
            assert (tensor == int(key[1:])).all()
            places.append(tensor.data_ptr() >> 21)  # a direct read's lies anywhere in its first page
            del tensor
            gc.collect()
    assert len(set(places)) < len(places)


@pytest.mark.parametrize("options", [{}, {"direct": True}], ids=["cached", "direct"])
def test_what_shows_the_memory_of_a_dropped_tensor_keeps_it(large: Path, options: dict[str, Any]) -> None:
    ways = (
        lambda tensor: tensor[5:7],
        lambda tensor: tensor.view(torch.uint8).view(-1, 4)[::1000],
        lambda tensor: tensor.numpy()[-2:],
        lambda tensor: memoryview(tensor.numpy())[3:9],
        lambda tensor: torch.from_dlpack(tensor)[:1],
        lambda tensor: tensor.untyped_storage(),
        lambda tensor: torch.nn.Parameter(tensor, requires_grad=False),
    )
    with zipslicer.load(large, **options) as sd:
        kept = []
        for key, tensor in sd.stream(budget_bytes=8 * LARGE):
            i = int(key[1:])
            kept.append((i, ways[i % len(ways)](tensor)))
            del tensor
            gc.collect()
    for i, each in kept:
        if isinstance(each, torch.UntypedStorage):
            assert each[0] == i
        else:
            shown = torch.frombuffer(each, dtype=torch.int32) if isinstance(each, memoryview) else torch.as_tensor(each)
            assert set(shown.contiguous().view(-1).view(torch.int32).tolist()) == {i}


def buffer(nbytes: int) -> bytearray:
    return bytearray(nbytes)


def test_a_recycler_keeps_no_more_than_it_may() -> None:
    recycler = streams._Recycler(most=2 * LARGE)
    allocate = recycler.allocate_by(buffer)
    assert isinstance(allocate(100), bytearray)  # small: not its business
    lent = [allocate(LARGE) for _ in range(5)]
    assert recycler._nbytes() == 0
    lent.clear()
    gc.collect()
    assert recycler._nbytes() == 2 * LARGE
    recycler.shrink(LARGE)
    assert recycler._nbytes() == LARGE
    larger = allocate(LARGE + 1)  # does not fit what is there
    assert recycler._nbytes() == LARGE
    smaller = allocate(LARGE - 100)
    assert (len(smaller), len(larger), recycler._nbytes()) == (LARGE - 100, LARGE + 1, 0)
    recycler.close()
    del smaller, larger
    gc.collect()
    assert recycler._nbytes() == 0


def recyclers() -> list[weakref.ref[Any]]:
    return [weakref.ref(each) for each in gc.get_objects() if type(each) is streams._Recycler]


def test_a_recycler_lives_no_longer_than_its_stream(large: Path) -> None:
    with zipslicer.load(large) as sd:
        before = recyclers()
        generator = sd.stream()
        _, first = next(generator)
        ours = set(recyclers()) - set(before)
        assert len(ours) == 1
        generator.close()
        del generator
        assert ours.pop()() is None  # by its count, without the collector
    assert (first == 0).all()
