"""NumPy tensors: what framework="np" gives, bit for bit, of files that no torch has written; and that torch is not needed."""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
import pickle
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import makers
import pytest
from makers import Pickle

import zipslicer
from zipslicer.backend import COMPLEX, DIFFERENTIABLE
from zipslicer.errors import ArchiveError, TableError, UnsupportedError
from zipslicer.plan import may_overlap
from zipslicer.policy import DTYPES, Dtype

np = pytest.importorskip("numpy")
hypothesis = pytest.importorskip("hypothesis")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

NUMEL = 24  # elements of a storage
GEOMETRIES: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {
    "contiguous": (0, (4, 6), (6, 1)),
    "view": (6, (2, 6), (6, 1)),
    "transposed": (0, (6, 4), (1, 6)),
    "stepped": (1, (2, 3), (12, 2)),
    "expanded": (0, (5, 4, 6), (0, 6, 1)),
    "unfolded": (2, (5, 4), (2, 1)),
    "scalar": (5, (), ()),
    "one": (3, (1, 1), (7, 1 << 62)),
    "empty": (0, (0, 3), (3, 1)),
}
CARRIED = {
    "complex32": np.dtype([("real", "f2"), ("imag", "f2")]),
    "qint8": np.dtype("i1"),
    "qint32": np.dtype("i4"),
    "bits16": np.dtype("u2"),
    **dict.fromkeys(
        ("float4_e2m1fn_x2", "bits8", "bits1x8", "bits2x4", "bits4x2", "quint8", "quint4x2", "quint2x4"), np.dtype("u1")
    ),
}
INDEXES: tuple[Any, ...] = ((), ..., -1, slice(None, None, -2), (None, slice(1, 3)), (slice(None), slice(1, None, 2)))


def numpy_dtype(dtype: Dtype) -> Any:
    """What a dtype must come out as, named by hand. Skips where it takes ml_dtypes."""
    if dtype.name in CARRIED:
        return CARRIED[dtype.name]
    if dtype.name == "bcomplex32":
        half = pytest.importorskip("ml_dtypes").bfloat16
        return np.dtype([("real", half), ("imag", half)])
    if dtype.name == "bfloat16" or dtype.name.startswith("float8"):
        return np.dtype(getattr(pytest.importorskip("ml_dtypes"), dtype.name))
    return np.dtype(dtype.name)


def content(dtype: Dtype, numel: int = NUMEL) -> bytes:
    """Bytes that count up, so that no two places look alike."""
    if dtype.name == "bool":
        return bytes(i % 3 == 0 for i in range(numel))
    return bytes((7 + i) % 251 for i in range(numel * dtype.itemsize))


def swapped(data: bytes, unit: int) -> bytes:
    return b"".join(data[i : i + unit][::-1] for i in range(0, len(data), unit))


def elements(data: bytes, itemsize: int, geometry: tuple[int, tuple[int, ...], tuple[int, ...]]) -> bytes:
    """The elements of a view in row-major order, one after the other, by arithmetic alone."""
    offset, sizes, strides = geometry
    places = (offset + sum(i * s for i, s in zip(at, strides)) for at in itertools.product(*map(range, sizes)))
    return b"".join(data[place * itemsize : (place + 1) * itemsize] for place in places)


def program(dtype: Dtype, version: int = 3, key: str = "0", numel: int = NUMEL) -> bytes:
    """A state dict of all geometries on one storage."""
    cls, count = ("UntypedStorage", numel * dtype.itemsize) if version == 3 else (dtype.storage, numel)
    assert cls is not None
    made = Pickle().raw(b"}(")
    for name, (offset, sizes, strides) in GEOMETRIES.items():
        made.text(name).tensor(
            cls, key, count, size=sizes, stride=strides, storage_offset=offset, version=version, dtype=dtype.name
        )
    return made.raw(b"u").stop()


def loaded(data: bytes, **keywords: Any) -> Any:
    return zipslicer.load(data, framework="np", **keywords)


def one(
    name: str, data: bytes, size: tuple[int, ...], stride: tuple[int, ...], order: bytes = b"little", **keywords: Any
) -> Any:
    """A checkpoint of one tensor, "w", of a dtype by name; what loads it is in keywords."""
    about = {k: keywords.pop(k) for k in ("requires_grad", "metadata", "storage_offset") if k in keywords}

    def write(p: Pickle) -> Pickle:
        return p.tensor("UntypedStorage", "0", len(data), size=size, stride=stride, version=3, dtype=name, **about)

    return loaded(makers.checkpoint(Pickle().dict({"w": write}).stop(), {"0": data}, byteorder=order).data, **keywords)


def checked(sd: Any, dtype: Dtype, data: bytes) -> None:
    """Every geometry, on every way to it, against arithmetic."""
    wanted = numpy_dtype(dtype)
    whole = sd.materialize()
    some = sd.get_tensors(list(GEOMETRIES))
    for name, geometry in GEOMETRIES.items():
        bits = elements(data, dtype.itemsize, geometry)
        for made in (sd[name], sd.get_tensor(name), whole[name], some[name]):
            assert (type(made), made.dtype, made.shape) == (np.ndarray, wanted, geometry[1]), name
            assert made.tobytes() == bits, name
        full = np.frombuffer(bits, wanted).reshape(geometry[1])
        for index in INDEXES:
            try:
                part = full[index]
            except IndexError:
                with pytest.raises(IndexError):
                    sd.get_slice(name)[index]
                continue
            got = sd.get_slice(name)[index]
            assert (type(got), got.dtype, got.shape) == (np.ndarray, wanted, part.shape), (name, index)
            assert got.tobytes() == part.tobytes(), (name, index)
        info = sd.get_meta(name)
        assert (info.dtype, info.shape, info.dtype_name, info.framework) == (wanted, geometry[1], dtype.name, "np")
        assert sd.get_slice(name).dtype == wanted


# --- bits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [b"little", b"big"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_every_dtype_and_geometry(dtype: Dtype, order: bytes) -> None:
    data = content(dtype)
    stored = data if order.decode() == sys.byteorder else swapped(data, dtype.unit)
    file = makers.checkpoint(program(dtype), {"0": stored}, byteorder=order).data
    checked(loaded(file), dtype, data)
    checked(loaded(file, cache_tensors=True), dtype, data)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.storage and not d.name.startswith("q")], ids=lambda d: d.name)
def test_every_dtype_with_a_storage_of_its_own(dtype: Dtype) -> None:
    data = content(dtype)
    file = makers.checkpoint(program(dtype, 2), {"0": data}).data
    checked(loaded(file), dtype, data)
    checked(loaded(makers.rezipped(makers.records_of(file), method=8).data), dtype, data)


def test_a_stream_of_before_zip() -> None:
    data = struct.pack("<6f", *range(6))
    text = Pickle().dict({"w": lambda p: p.tensor("FloatStorage", "0", 6, size=(2, 3), stride=(1, 2), view="")}).stop()
    sd = loaded(makers.stream(text, {"0": (6, data)}))
    assert sd["w"].tolist() == [[0, 2, 4], [1, 3, 5]]
    assert sd.get_slice("w")[:, 1].tolist() == [2, 3]


def test_conj_and_neg_are_carried_out() -> None:
    numbers = np.array([1 + 2j, -3 + 0.5j, 0 - 1j], np.complex64)
    for conj, neg in itertools.product([False, True], repeat=2):
        wanted = np.conjugate(numbers) if conj else numbers
        wanted = -wanted if neg else wanted
        for size, stride, shaped in (((3,), (1,), wanted), ((2, 3), (0, 1), np.stack([wanted, wanted]))):
            for cached in (False, True):
                sd = one(
                    "complex64",
                    numbers.tobytes(),
                    size,
                    stride,
                    metadata={"conj": conj, "neg": neg},
                    cache_tensors=cached,
                )
                for made in (sd["w"], sd.materialize()["w"], sd.get_slice("w")[:]):
                    assert made.tobytes() == shaped.tobytes()
                assert sd.get_slice("w")[::-1].tobytes() == shaped[::-1].tobytes()
                assert (sd.get_meta("w").is_conj, sd.get_meta("w").is_neg) == (conj, neg)
    scalar = one("complex128", struct.pack("=2d", 1, 2), (), (), metadata={"conj": True, "neg": False})["w"]
    assert (type(scalar), scalar.shape, scalar.item()) == (np.ndarray, (), 1 - 2j)


@pytest.mark.parametrize("dtype", ["complex32", "bcomplex32"])
def test_conj_and_neg_of_half_complex_numbers(dtype: str) -> None:
    half = np.float16 if dtype == "complex32" else pytest.importorskip("ml_dtypes").bfloat16
    data = np.array([1, 2, -3, 4], half).tobytes()
    sd = one(dtype, data, (2,), (1,), metadata={"conj": True, "neg": False})
    assert (sd["w"]["real"].tolist(), sd["w"]["imag"].tolist()) == ([1, -3], [-2, -4])
    sd = one(dtype, data, (2,), (1,), metadata={"conj": True, "neg": True})
    assert (sd["w"]["real"].tolist(), sd["w"]["imag"].tolist()) == ([-1, 3], [2, 4])


@pytest.mark.parametrize("dtype", ["bool", "bits8", "float4_e2m1fn_x2"])
def test_what_is_no_number_is_not_negated(dtype: str) -> None:
    sd = one(dtype, b"\0\1", (2,), (1,), metadata={"conj": False, "neg": True})
    with pytest.raises(UnsupportedError, match=f"negated.*{dtype}"):
        sd["w"]


def test_a_storage_under_two_element_sizes_in_the_other_byte_order() -> None:
    """No whole form of it is right for both: each is read by itself."""
    data = bytes(range(16))
    order = b"big" if sys.byteorder == "little" else b"little"

    def write(dtype: str, count: int) -> Any:
        return lambda p: p.tensor("UntypedStorage", "0", 16, size=(count,), stride=(1,), version=3, dtype=dtype)

    text = Pickle().dict({"wide": write("int64", 2), "narrow": write("int16", 8)}).stop()
    sd = loaded(makers.checkpoint(text, {"0": data}, byteorder=order).data)
    for made in (sd, sd.materialize()):
        assert made["wide"].tobytes() == swapped(data, 8)
        assert made["narrow"].tobytes() == swapped(data, 2)


# --- memory -------------------------------------------------------------------------------------------------------------


def memory_of(made: Any) -> Any:
    """What lies under an array, all the way down."""
    while isinstance(made, np.ndarray) and made.base is not None:
        made = made.base
    return made


def test_an_array_owns_its_hull_and_no_more() -> None:
    dtype = DTYPES[6]
    sd = loaded(makers.checkpoint(program(dtype), {"0": content(dtype)}).data)
    for name, (_, sizes, strides) in GEOMETRIES.items():
        hull = sum((n - 1) * s for n, s in zip(sizes, strides)) + 1 if 0 not in sizes else 0
        under = memory_of(sd[name])
        assert (under.nbytes if isinstance(under, np.ndarray) else memoryview(under).nbytes) == hull * dtype.itemsize


def test_arrays_are_writable_unless_two_indices_name_one_element() -> None:
    dtype = DTYPES[6]
    file = makers.checkpoint(program(dtype), {"0": content(dtype)}).data
    for keywords in ({}, {"cache_tensors": True}, {"dtype": "f8"}):
        sd = loaded(file, **keywords)
        for values in (sd, sd.materialize()):
            writable = {name: values[name].flags.writeable for name in GEOMETRIES}
            assert [name for name, yes in writable.items() if not yes] == ["expanded", "unfolded"]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), max_size=4))
def test_what_is_said_not_to_overlap_does_not(dims: list[tuple[int, int]]) -> None:
    sizes, strides = [n for n, _ in dims], [s for _, s in dims]
    places = [sum(i * s for i, s in zip(at, strides)) for at in itertools.product(*map(range, sizes))]
    if not may_overlap(sizes, strides):
        assert len(set(places)) == len(places)
    elif sorted(strides, reverse=True) == strides and len(sizes) == 1:
        assert len(set(places)) < len(places)


def test_every_touch_is_an_independent_copy() -> None:
    sd = one("int32", struct.pack("=4i", *range(4)), (4,), (1,))
    first, second = sd["w"], sd["w"]
    first[:] = 9
    assert (second.tolist(), sd["w"].tolist()) == ([0, 1, 2, 3], [0, 1, 2, 3])
    part = sd.get_slice("w")[1:3]
    part += 1
    assert sd["w"].tolist() == [0, 1, 2, 3]


def test_arrays_outlive_the_checkpoint() -> None:
    with one("int32", struct.pack("=4i", *range(4)), (4,), (1,)) as sd:
        made, part = sd["w"], sd.get_slice("w")[1:]
    with pytest.raises(ValueError, match="closed"):
        sd["w"]
    assert (made.tolist(), part.tolist()) == ([0, 1, 2, 3], [1, 2, 3])


def shares(values: Any, one: str, other: str) -> bool:
    return bool(np.shares_memory(values[one], values[other]))


def test_sharing_is_that_of_torch_tensors() -> None:
    """Within one call, or everywhere with cache_tensors; touches share nothing."""
    dtype = DTYPES[6]
    file = makers.checkpoint(program(dtype), {"0": content(dtype)}).data
    sd = loaded(file)
    for values in (sd.materialize(), sd.get_tensors(["contiguous", "transposed", "view"])):
        assert shares(values, "contiguous", "transposed")
        values["transposed"][0, 0] = 77
        assert values["contiguous"][0, 0] == 77
    assert not shares(sd, "contiguous", "transposed")
    cached = loaded(file, cache_tensors=True)
    assert shares(cached, "contiguous", "transposed")
    assert np.shares_memory(cached["contiguous"], cached.materialize()["view"])


# --- what is read -------------------------------------------------------------------------------------------------------


class Recording(io.BytesIO):
    """A file object that counts what is read from it."""

    count = 0

    def readinto(self, buffer: Any) -> int:
        got = super().readinto(buffer)
        self.count += got
        return got


def test_a_slice_reads_its_own_bytes() -> None:
    data = np.arange(1 << 20, dtype=np.int64).tobytes()
    text = Pickle().dict({"w": lambda p: p.tensor("LongStorage", "0", 1 << 20, size=(1024, 1024), stride=(1024, 1))})
    file = Recording(makers.checkpoint(text.stop(), {"0": data}).data)
    part = zipslicer.load(file, framework="np").get_slice("w")
    part[0, 0]
    whole = np.arange(1 << 20).reshape(1024, 1024)
    for index, nbytes in (
        (slice(100, 110), 10 * 1024 * 8),
        ((5, 7), 8),
        ((slice(None, None, 64), 0), 16 * 8),
        (slice(3, 3), 0),
        ((slice(-1, -3, -1), ...), 2 * 1024 * 8),
    ):
        file.count = 0
        assert part[index].tolist() == whole[index].tolist()
        assert file.count == nbytes
    file.count = 0
    assert (part[10:20, 100:612] == whole[10:20, 100:612]).all()
    assert file.count <= 1.05 * 10 * 512 * 8 + 9 * 4096


def test_a_slice_owns_no_more_than_it_shows() -> None:
    data = np.arange(10_000, dtype=np.int64).tobytes()
    part = one("int64", data, (1000, 10), (10, 1)).get_slice("w")
    for index in (slice(0, 10), (slice(None), 5), (slice(None, None, 100), slice(None, None, -7)), 3):
        got = part[index]
        under = memory_of(got)
        assert (under.nbytes if isinstance(under, np.ndarray) else memoryview(under).nbytes) == got.nbytes


@pytest.mark.parametrize("method", [0, 8])
@pytest.mark.parametrize("order", [b"little", b"big"])
def test_runs_that_are_far_apart(order: bytes, method: int) -> None:
    whole = np.arange(1 << 18, dtype=np.int32).reshape(64, 64, 64)
    data = whole.tobytes() if order.decode() == sys.byteorder else swapped(whole.tobytes(), 4)
    text = Pickle().dict({"w": lambda p: p.tensor("IntStorage", "0", 1 << 18, size=(64, 64, 64), stride=(4096, 64, 1))})
    file = makers.checkpoint(text.stop(), {"0": data}, byteorder=order).data
    part = loaded(makers.rezipped(makers.records_of(file), method=method).data).get_slice("w")
    for index in ((slice(None), 3), (slice(None, None, 9), slice(1, 3)), (slice(None), slice(None), 5)):
        assert (part[index] == whole[index]).all()


def test_an_expanded_tensor_costs_its_hull_only() -> None:
    sd = one("int32", struct.pack("=4i", *range(4)), (1 << 40, 4), (0, 1))
    assert sd["w"].shape == (1 << 40, 4)
    assert sd["w"][1 << 39].tolist() == [0, 1, 2, 3]
    assert sd.get_slice("w")[5:-5].shape == ((1 << 40) - 10, 4)
    assert one("float32", bytes(16), (1 << 40, 4), (0, 1), dtype="f8")["w"].dtype == np.float64


def test_what_numpy_cannot_count_is_an_error_of_that_key() -> None:
    sd = one("int64", bytes(8), (1 << 61,), (0,))
    for touch in (lambda: sd["w"], lambda: sd.get_slice("w")[1:], sd.materialize):
        with pytest.raises(UnsupportedError, match="NumPy has no array of the shape"):
            touch()
    assert sd.get_slice("w")[5].item() == 0
    with pytest.raises(UnsupportedError) as caught:
        sd["w"]
    assert caught.value.key == "w"


def test_large_arrays_are_read_on_threads() -> None:
    data = np.arange(3 << 20, dtype=np.int32).tobytes()
    for threads in (1, 4):
        sd = one("int32", data, (3 << 20,), (1,), threads=threads)
        assert sd["w"].tobytes() == data
        assert sd.materialize()["w"].tobytes() == data
        assert sd["w"].flags.writeable


def test_threads_share_a_state_dict() -> None:
    dtype = DTYPES[6]
    sd = loaded(makers.checkpoint(program(dtype), {"0": content(dtype)}).data, cache_tensors=True)
    wanted = {name: elements(content(dtype), 4, geometry) for name, geometry in GEOMETRIES.items()}
    wrong: list[str] = []

    def work() -> None:
        for _ in range(50):
            wrong.extend(name for name in GEOMETRIES if sd[name].tobytes() != wanted[name])

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@st.composite
def tensors(draw: Any) -> Any:
    """(offset, sizes, strides) on a storage of 5000 elements, in which every place has its own number."""
    sizes = draw(st.lists(st.integers(0, 6), max_size=4))
    return draw(st.integers(0, 50)), tuple(sizes), tuple(draw(st.integers(0, 200)) for _ in sizes)


@st.composite
def indices(draw: Any, ndim: int) -> Any:
    ends = st.none() | st.integers(-8, 8)
    each = st.integers(-6, 5) | st.builds(slice, ends, ends, st.none() | st.integers(-4, 4).filter(bool))
    items: list[Any] = draw(st.lists(each, max_size=ndim + 1))
    for extra in draw(st.lists(st.sampled_from([None, Ellipsis]), max_size=2)):
        items.insert(draw(st.integers(0, len(items))), extra)
    return items[0] if len(items) == 1 and draw(st.booleans()) else tuple(items)


@given(st.data())
def test_slices_are_numpys(data: Any) -> None:
    offset, sizes, strides = data.draw(tensors())
    memory = np.arange(5000, dtype=np.int32)
    full = np.lib.stride_tricks.as_strided(memory[offset:], sizes, [4 * s for s in strides])
    sd = one("int32", memory.tobytes(), sizes, strides, storage_offset=offset)
    assert sd["w"].tolist() == full.tolist()
    for _ in range(3):
        index = data.draw(indices(len(sizes)))
        try:
            wanted = full[index]
        except IndexError:
            with pytest.raises(IndexError):
                sd.get_slice("w")[index]
            continue
        got = sd.get_slice("w")[index]
        assert (got.shape, got.tolist()) == (wanted.shape, wanted.tolist())


def test_an_index_that_is_not_basic_is_refused() -> None:
    part = one("int32", bytes(16), (4,), (1,)).get_slice("w")
    for index in ([0, 1], np.array([0, 1]), True, 1.5):
        with pytest.raises(TypeError):
            part[index]


def test_damage_is_the_same_error() -> None:
    text = Pickle().dict({"w": lambda p: p.tensor("FloatStorage", "0", 4, size=(4,), stride=(1,))}).stop()
    sd = loaded(makers.checkpoint(text, {}).data)
    with pytest.raises(ArchiveError) as caught:
        sd["w"]
    assert (caught.value.key, caught.value.record) == ("w", "archive/data/0")
    with pytest.raises(TableError):
        loaded(makers.checkpoint(text, {"0": bytes(15)}).data)["w"]


# --- arguments ----------------------------------------------------------------------------------------------------------


def test_dtype_casts_floating_point_arrays() -> None:
    def write(name: str, key: str, nbytes: int, count: int) -> Any:
        return lambda p: p.tensor("UntypedStorage", key, nbytes, size=(count,), stride=(1,), version=3, dtype=name)

    text = Pickle().dict(
        {
            "f": write("float32", "f", 12, 3), "i": write("int64", "i", 8, 1), "c": write("complex64", "c", 8, 1),
            "x": write("float4_e2m1fn_x2", "x", 1, 1), "n": lambda p: p.dict({"d": write("float64", "d", 8, 1)}),
        }
    )  # fmt: skip
    records = {"f": struct.pack("=3f", 1, 2, 1e30), "i": bytes(8), "c": bytes(8), "x": b"\x21", "d": bytes(8)}
    file = makers.checkpoint(text.stop(), records).data
    for asked in (np.float16, "float16", np.dtype(">f2")):
        sd = loaded(file, dtype=asked)
        for values in (sd, sd.materialize()):
            kinds = [values["f"].dtype, values["i"].dtype, values["c"].dtype, values["x"].dtype, values["n"]["d"].dtype]
            assert kinds == [np.dtype(asked), np.int64, np.complex64, np.uint8, np.dtype(asked)]
        assert sd["f"].tolist() == [1, 2, math.inf]
        assert sd.get_slice("f")[::-1].tolist() == [math.inf, 2, 1]
        assert (sd.get_meta("f").dtype, sd.get_slice("f")[1].dtype) == (np.float32, np.dtype(asked))


def test_dtype_may_be_one_of_ml_dtypes() -> None:
    kind = pytest.importorskip("ml_dtypes").bfloat16
    for asked in (kind, "bfloat16", np.dtype(kind)):
        sd = one("float32", struct.pack("=2f", 1, -2), (2,), (1,), dtype=asked)
        assert (sd["w"].dtype, sd["w"].tolist()) == (kind, [1, -2])
    back = one("bfloat16", np.array([1, -2], kind).tobytes(), (2,), (1,), dtype=np.float32)
    assert (back["w"].dtype, back["w"].tolist()) == (np.float32, [1, -2])


class Imitation:
    """A dtype of torch, as far as can be told without torch."""

    __module__ = "torch"
    is_floating_point = True


@pytest.mark.parametrize(
    ("keywords", "error", "says"),
    [
        ({"framework": "tf"}, ValueError, "framework"),
        ({"framework": "numpy"}, ValueError, "framework"),
        ({"framework": None}, ValueError, "framework"),
        ({"map_location": "cuda"}, ValueError, "map_location"),
        ({"map_location": "meta"}, ValueError, "map_location"),
        ({"map_location": {}}, ValueError, "map_location"),
        ({"map_location": 0}, ValueError, "map_location"),
        ({"map_location": lambda storage, location: storage}, ValueError, "map_location"),
        ({"dtype": Imitation()}, ValueError, "NumPy dtype"),
        ({"dtype": np.int8}, TypeError, "floating-point"),
        ({"dtype": np.complex64}, TypeError, "floating-point"),
        ({"dtype": "S3"}, TypeError, "floating-point"),
        ({"threads": 0}, ValueError, "threads"),
    ],
)
def test_arguments_that_make_no_sense(keywords: dict[str, Any], error: type[Exception], says: str) -> None:
    file = makers.checkpoint(Pickle().raw(b"}").stop()).data
    for call in (zipslicer.load, zipslicer.open):
        with pytest.raises(error, match=says):
            call(file, **{"framework": "np", **keywords})


def test_the_cpu_is_where_arrays_are() -> None:
    for where in ("cpu", None):
        assert one("int8", b"\1", (1,), (1,), map_location=where)["w"].tolist() == [1]


def test_open_takes_it_too() -> None:
    text = Pickle().tensor("FloatStorage", "0", 1, size=(1,), stride=(1,)).stop()
    file = makers.checkpoint(text, {"0": struct.pack("=f", 2.5)}).data
    ckpt = zipslicer.open(file, framework="np")
    assert (ckpt.root.tolist(), ckpt.tensors[""].tolist()) == ([2.5], [2.5])
    assert loaded(file).tolist() == [2.5]


# --- what stands around tensors -----------------------------------------------------------------------------------------


def float_tensor(p: Pickle) -> Pickle:
    return p.tensor("FloatStorage", "0", 2, size=(2,), stride=(1,))


TWO = {"0": struct.pack("=2f", 1, 2)}


def parameter(p: Pickle, *state: Any) -> Pickle:
    name = "_rebuild_parameter_with_state" if state else "_rebuild_parameter"
    return p.call("torch._utils", name, float_tensor, lambda p: p.boolean(True), lambda p: p.ordered_dict(), *state)


def typed(p: Pickle) -> Pickle:
    """A tensor with an attribute, which is a tensor."""
    return p.call(
        "torch._tensor", "_rebuild_from_type_v2",
        lambda p: p.name("torch._utils", "_rebuild_tensor_v2"), lambda p: p.name("torch", "Tensor"),
        lambda p: p.mark().storage("FloatStorage", "0", 2).integer(0).integers((2,)).integers((1,)).boolean(False)
        .ordered_dict().raw(b"t"),
        lambda p: p.dict({"scale": lambda p: p.tensor("FloatStorage", "gone", 2, size=(2,), stride=(1,))}),
    )  # fmt: skip


def test_what_is_wrapped_around_a_tensor_is_in_its_facts() -> None:
    def state(p: Pickle) -> Pickle:
        return p.dict({"note": lambda p: p.text("x")})

    text = Pickle().dict({"p": parameter, "s": lambda p: parameter(p, state)})
    sd = loaded(makers.checkpoint(text.stop(), TWO).data)
    for values in (sd, sd.materialize()):
        for key in ("p", "s"):
            assert (type(values[key]), values[key].tolist()) == (np.ndarray, [1, 2])
    assert (sd.get_meta("p").is_parameter, sd.get_meta("p").requires_grad) == (True, True)
    assert sd.get_slice("s")[1:].tolist() == [2]


def test_attributes_of_a_tensor_are_listed_and_not_read() -> None:
    file = makers.checkpoint(Pickle().dict({"w": typed}).stop(), TWO).data
    assert loaded(file)["w"].tolist() == [1, 2]  # that of the attribute is missing
    assert list(zipslicer.open(file, framework="np").tensors) == ["w", "w.scale"]


def test_storages_are_bytes() -> None:
    text = Pickle().dict(
        {"s": lambda p: p.storage("FloatStorage", "0", 2), "u": lambda p: p.storage("UntypedStorage", "e", 0)}
    )
    sd = loaded(makers.checkpoint(text.stop(), {**TWO, "e": b""}).data)
    for values in (sd, sd.materialize()):
        assert (values["s"].dtype, values["s"].tobytes()) == (np.uint8, TWO["0"])
        assert (values["u"].dtype, values["u"].shape) == (np.uint8, (0,))
    assert sd.get_meta("s").dtype == np.uint8
    order = b"big" if sys.byteorder == "little" else b"little"
    turned = loaded(makers.checkpoint(text.stop(), {"0": swapped(TWO["0"], 4), "e": b""}, byteorder=order).data)
    assert turned["s"].tobytes() == turned.materialize()["s"].tobytes() == TWO["0"]


def test_values_of_torch_that_are_no_tensors() -> None:
    text = Pickle().dict(
        {
            "size": lambda p: p.call("torch", "Size", lambda p: p.integers((2, 3))),
            "device": lambda p: p.call("torch", "device", lambda p: p.text("cuda"), lambda p: p.integer(1)),
            "cpu": lambda p: p.call("torch", "device", lambda p: p.text("cpu")),
            "odd": lambda p: p.call("torch", "device", lambda p: p.text("cpu\n; rm")),
            "dtype": lambda p: p.name("torch", "half"),
            "bits": lambda p: p.name("torch", "bits8"),
            "layout": lambda p: p.call("torch.serialization", "_get_layout", lambda p: p.text("torch.strided")),
            "scheme": lambda p: p.name("torch", "per_tensor_affine"),
        }
    )
    made = loaded(makers.checkpoint(text.stop()).data)
    assert type(made) is dict
    assert (type(made["size"]), made["size"]) == (tuple, (2, 3))
    assert (made["device"], made["cpu"], made["dtype"]) == ("cuda:1", "cpu", np.float16)
    for name in ("odd", "bits", "layout", "scheme"):
        assert type(made[name]) is zipslicer.Placeholder
    assert repr(made["bits"]) == "<placeholder torch.bits8>"


def test_a_dtype_of_ml_dtypes_stands_as_a_value_and_may_be_edited_beside() -> None:
    kind = pytest.importorskip("ml_dtypes").bfloat16
    text = Pickle().dict(
        {"w": float_tensor, "config": lambda p: p.dict({"dtype": lambda p: p.name("torch", "bfloat16")})}
    )
    sd = loaded(makers.checkpoint(text.stop(), TWO).data)
    assert sd["config"] == {"dtype": np.dtype(kind)}
    sd["config"]["lr"] = 0.1
    assert sd.materialize()["config"] == {"dtype": np.dtype(kind), "lr": 0.1}


def test_pickled_arrays_are_arrays_still() -> None:
    state = pickle.dumps({"a": np.arange(3)}, 2)
    assert loaded(makers.checkpoint(state).data)["a"].tolist() == [0, 1, 2]


def test_nested_containers() -> None:
    def listed(p: Pickle) -> Pickle:
        return float_tensor(p.raw(b"](")).integer(3).raw(b"e")

    text = Pickle().dict({"a": lambda p: p.dict({"b": listed}), "n": lambda p: p.integer(1)})
    sd = loaded(makers.checkpoint(text.stop(), TWO).data)
    assert (sd["a"]["b"][0].tolist(), sd["a"]["b"][1], sd["n"]) == ([1, 2], 3, 1)
    assert sd["a"]["b"].materialize()[0].tolist() == [1, 2]
    assert list(sd.flatten()) == ["a.b.0"]
    assert sd.flatten()["a.b.0"].tolist() == [1, 2]
    assert sd.select("a").materialize()["a"]["b"][1] == 3


# --- composites ---------------------------------------------------------------------------------------------------------


def longs(key: str, *sizes: int) -> Any:
    strides = tuple(math.prod(sizes[i + 1 :]) for i in range(len(sizes)))
    return lambda p: p.tensor("LongStorage", key, math.prod(sizes), size=sizes, stride=strides)


def sparse(p: Pickle) -> Pickle:
    return p.call(
        "torch._utils", "_rebuild_sparse_tensor",
        lambda p: p.call("torch.serialization", "_get_layout", lambda p: p.text("torch.sparse_coo")),
        lambda p: longs("i", 1, 2)(p.mark()).raw(b"") and float_tensor(p).integers((5,)).raw(b"t"),
    )  # fmt: skip


def quantized(p: Pickle) -> Pickle:
    return p.call(
        "torch._utils", "_rebuild_qtensor", lambda p: p.storage("QInt8Storage", "q", 4), lambda p: p.integer(0),
        lambda p: p.integers((2, 2)), lambda p: p.integers((2, 1)),
        lambda p: p.mark().name("torch", "per_tensor_affine").real(0.5).integer(1).raw(b"t"),
        lambda p: p.boolean(False), lambda p: p.ordered_dict(),
    )  # fmt: skip


def meta(p: Pickle) -> Pickle:
    return p.call(
        "torch._utils", "_rebuild_meta_tensor_no_storage", lambda p: p.name("torch", "float32"),
        lambda p: p.integers((2,)), lambda p: p.integers((1,)), lambda p: p.boolean(False),
    )  # fmt: skip


def from_cpu(p: Pickle) -> Pickle:
    return p.call(
        "torch._utils", "_rebuild_device_tensor_from_cpu_tensor", float_tensor, lambda p: p.name("torch", "float16"),
        lambda p: p.text("xla:0"), lambda p: p.boolean(False),
    )  # fmt: skip


def from_numpy(p: Pickle) -> Pickle:
    array = pickle.dumps(np.arange(6.0).reshape(2, 3), 2)[2:-1]
    return p.call(
        "torch._utils", "_rebuild_device_tensor_from_numpy", lambda p: p.raw(array), lambda p: p.name("torch", "float32"),
        lambda p: p.text("xla:0"), lambda p: p.boolean(False),
    )  # fmt: skip


def per_channel(p: Pickle) -> Pickle:
    def scales(p: Pickle) -> Pickle:
        return p.tensor("DoubleStorage", "d", 2, size=(2,), stride=(1,))

    def params(p: Pickle) -> Pickle:
        scales(p.mark().name("torch", "per_channel_affine"))
        longs("i", 2)(p)
        return p.integer(0).raw(b"t")

    return p.call(
        "torch._utils", "_rebuild_qtensor", lambda p: p.storage("QInt8Storage", "q", 4), lambda p: p.integer(0),
        lambda p: p.integers((2, 2)), lambda p: p.integers((2, 1)), params,
        lambda p: p.boolean(False), lambda p: p.ordered_dict(),
    )  # fmt: skip


PARTS = {**TWO, "d": struct.pack("=2d", 0.5, 0.25), "i": struct.pack("=2q", 1, 3), "q": bytes([1, 2, 3, 255])}


@pytest.mark.parametrize(
    ("write", "says", "parts"),
    [
        (sparse, "no sparse_coo tensors.*'indices', 'values'", {"indices": [[1, 3]], "values": [1, 2]}),
        (quantized, "no quantized tensors.*'int_repr'", {"int_repr": [[1, 2], [3, -1]]}),
        (
            per_channel,
            "no quantized tensors.*'scales'",
            {"int_repr": [[1, 2], [3, -1]], "scales": [0.5, 0.25], "zero_points": [1, 3]},
        ),
        (meta, "get_meta", {}),
    ],
    ids=["sparse", "quantized", "per_channel", "meta"],
)
def test_what_is_no_array_is_refused_and_had_by_its_parts(write: Any, says: str, parts: dict[str, Any]) -> None:
    sd = loaded(makers.checkpoint(Pickle().dict({"w": write, "v": float_tensor}).stop(), PARTS).data)
    for touch in (lambda: sd["w"], lambda: sd.get_slice("w")[0], sd.materialize, lambda: sd.get_tensors(["w"])):
        with pytest.raises(UnsupportedError, match=says):
            touch()
    with pytest.raises(UnsupportedError) as caught:
        sd["w"]
    assert caught.value.key == "w"
    assert list(sd.get_meta("w").parts) == list(parts)
    for name, values in parts.items():
        assert sd.get_slice("w").part(name)[...].tolist() == values
        assert sd.get_slice("w").part(name)[::-1].tolist() == values[::-1]
    assert sd["v"].tolist() == sd.select("v").materialize()["v"].tolist() == [1, 2]


def test_scales_are_not_cast() -> None:
    file = makers.checkpoint(Pickle().dict({"w": per_channel, "v": float_tensor}).stop(), PARTS).data
    sd = loaded(file, dtype=np.float16)
    assert (sd.get_slice("w").part("scales")[:].dtype, sd["v"].dtype) == (np.float64, np.float16)


def test_tensors_of_other_devices_are_arrays() -> None:
    sd = loaded(makers.checkpoint(Pickle().dict({"c": from_cpu, "n": from_numpy}).stop(), PARTS).data)
    for values in (sd, sd.materialize(), sd.get_tensors(["c", "n"])):
        assert (values["c"].dtype, values["c"].tolist()) == (np.float16, [1, 2])
        assert (values["n"].dtype, values["n"].tolist()) == (np.float32, [[0, 1, 2], [3, 4, 5]])
    assert (sd.get_slice("c")[::-1].tolist(), sd.get_slice("c")[1].shape) == ([2, 1], ())
    assert (sd.get_slice("n")[::-1, 1].tolist(), type(sd.get_slice("n")[1, 2])) == ([4, 1], np.ndarray)
    with pytest.raises(TypeError):
        sd.get_slice("n")[[0]]
    cast = loaded(makers.checkpoint(Pickle().dict({"c": from_cpu}).stop(), PARTS).data, dtype=np.float64)
    assert (cast["c"].dtype, cast.materialize()["c"].dtype) == (np.float64, np.float64)


# --- edits, copies, several files ---------------------------------------------------------------------------------------


def test_arrays_that_were_put_in_are_tensors_here() -> None:
    sd = one("float32", struct.pack("=2f", 1, 2), (2,), (1,))
    sd["own"], sd["text"] = np.arange(6, dtype=np.int16).reshape(2, 3).T, "t"
    info = sd.get_meta("own")
    assert (info.dtype_name, info.dtype, info.shape, info.strides, info.nbytes) == (
        "int16",
        np.int16,
        (3, 2),
        (1, 3),
        12,
    )
    assert sd.get_dtype("own") == "I16"
    assert "int16" in repr(sd)
    assert list(sd.flatten()) == ["w", "own"]
    assert sd.get_slice("own")[1].tolist() == [1, 4]
    assert sd.get_tensors(["own", "w"])["own"] is sd["own"]
    assert list(sd.materialize()) == ["w", "own", "text"]
    assert copy.deepcopy(sd)["own"] is not sd["own"]


def test_pickling_keeps_the_framework(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(makers.checkpoint(Pickle().dict({"w": float_tensor}).stop(), TWO).data)
    sd = pickle.loads(pickle.dumps(zipslicer.load(path, framework="np", dtype=np.float16)))
    assert (type(sd["w"]), sd["w"].dtype, sd["w"].tolist()) == (np.ndarray, np.float16, [1, 2])
    info = pickle.loads(pickle.dumps(sd.get_meta("w")))
    assert (info, info.dtype) == (sd.get_meta("w"), np.float32)


def test_shards(tmp_path: Path) -> None:
    for file, key in (("a.bin", "x"), ("b.bin", "y")):
        text = Pickle().dict({key: float_tensor}).stop()
        (tmp_path / file).write_bytes(makers.checkpoint(text, TWO).data)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.bin", "y": "b.bin"}}))
    sd = zipslicer.load(tmp_path, framework="np")
    sd["z"] = np.zeros(3)
    for values in (sd, pickle.loads(pickle.dumps(sd)), copy.deepcopy(sd), sd.materialize()):
        assert [values[key].tolist() for key in "xyz"] == [[1, 2], [1, 2], [0, 0, 0]]
    assert sd.get_meta("y").dtype == np.float32
    assert pickle.loads(pickle.dumps(sd)).get_meta("z").shape == (3,)
    assert list(sd.flatten()) == ["x", "y", "z"]


def test_safetensors(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.numpy").save_file
    wanted = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "i": np.arange(3)}
    save_file(wanted, tmp_path / "a.safetensors")
    sd = zipslicer.load(tmp_path / "a.safetensors", framework="np")
    assert {key: made.tolist() for key, made in sd.materialize().items()} == {k: v.tolist() for k, v in wanted.items()}
    assert sd.get_slice("w")[1, ::2].tolist() == [3, 5]


# --- what need not be installed -----------------------------------------------------------------------------------------

REFUSE = """
import sys
class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ({error})("import of " + name)
sys.meta_path.insert(0, Refused())
"""


def without(absent: set[str], code: str, file: bytes, error: str = "ImportError") -> str:
    """What a fresh interpreter prints in which some packages cannot be imported."""
    text = REFUSE.format(absent=absent, error=error) + "import zipslicer\nfile = sys.stdin.buffer.read()\n" + code
    done = subprocess.run([sys.executable, "-c", text], input=file, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def everything() -> bytes:
    def viewed(name: str) -> Any:
        offset, sizes, strides = GEOMETRIES[name]
        return lambda p: p.tensor("FloatStorage", "g", NUMEL, size=sizes, stride=strides, storage_offset=offset)

    def values(p: Pickle) -> Pickle:
        return p.dict(
            {
                "size": lambda p: p.call("torch", "Size", lambda p: p.integers((2,))),
                "dtype": lambda p: p.name("torch", "float32"),
                "device": lambda p: p.call("torch", "device", lambda p: p.text("cpu")),
                "t": float_tensor,
            }
        )

    parts = {"p": parameter, "w": float_tensor, "c": from_cpu, "n": from_numpy}
    parts["s"] = lambda p: p.storage("FloatStorage", "0", 2)
    more = {"more": values, "plain": lambda p: p.dict({"dtype": lambda p: p.name("torch", "bfloat16")})}
    text = Pickle().dict({**{name: viewed(name) for name in GEOMETRIES}, **parts, **more})
    return makers.checkpoint(text.stop(), {**PARTS, "g": content(DTYPES[6])}).data


WALK = """
for keywords in ({}, {"cache_tensors": True}, {"dtype": "f2"}):
    ckpt = zipslicer.open(file, framework="np", **keywords)
    sd = ckpt.root
    repr(sd), repr(ckpt), sd._repr_html_(), sd.offset_keys(), ckpt.placeholders, ckpt.records
    for key in ckpt.tensors:
        info = ckpt.tensors.get_meta(key)
        ckpt.tensors[key], info.dtype, repr(info), ckpt.tensors.get_dtype(key)
    for key in sd:
        sd[key]
        if sd.get_meta(key) and key != "s":
            sd.get_slice(key)[...]
    sd.materialize(), sd.flatten().materialize(), sd.select("w*").materialize(), sd.get_tensors(["w", "p"])
    sd["more"].materialize(), sd["more"]["size"], sd["more"]["dtype"], sd["plain"]
assert "torch" not in sys.modules
print("done")
"""


def test_torch_is_never_imported() -> None:
    """Not even tried: an error that nobody expects would pass through whoever did."""
    assert without({"torch"}, WALK, everything(), "SystemExit").split() == ["done"]


def test_ml_dtypes_is_needed_for_its_dtypes_only_and_when_they_are_touched() -> None:
    assert without({"torch", "ml_dtypes"}, WALK, everything()).split() == ["done"]

    def write(name: str, key: str) -> Any:
        return lambda p: p.tensor("UntypedStorage", key, 4, size=(1,), stride=(1,), version=3, dtype=name)

    text = Pickle().dict({"f": write("float32", "f"), "b": write("bfloat16", "b"), "e": write("float8_e5m2", "b")})
    code = """
import io
class Recording(io.BytesIO):
    count = 0
    def readinto(self, buffer):
        self.count += len(buffer)
        return super().readinto(buffer)
file = Recording(file)
sd = zipslicer.load(file, framework="np")
repr(sd), sd.get_meta("b"), list(sd), sd.get_dtype("b")
before = file.count
try:
    sd.materialize()
except ImportError:
    assert file.count == before, "bytes are read for what cannot be made"
print(sd["f"].tolist(), sd.get_slice("f")[:].tolist())
for touch in (lambda: sd["b"], lambda: sd["e"], lambda: sd.get_slice("e")[:], lambda: sd.get_meta("b").dtype, sd.materialize):
    try:
        touch()
    except ImportError as error:
        print(error)
"""
    file = makers.checkpoint(text.stop(), {"f": struct.pack("=f", 2.5), "b": bytes(4)}).data
    first, *errors = without({"torch", "ml_dtypes"}, code, file).splitlines()
    assert first == "[2.5] [2.5]"
    assert len(errors) == 5
    assert all(error.endswith("the ml_dtypes package has: pip install ml_dtypes") for error in errors)


def test_without_numpy_a_touch_says_what_to_install() -> None:
    code = """
sd = zipslicer.load(file, framework="np")
repr(sd), sd.get_meta("w").shape
for touch in (lambda: sd["w"], lambda: sd.get_meta("w").dtype, lambda: zipslicer.load(file, framework="np", dtype="f2")):
    try:
        touch()
    except ImportError as error:
        print(error)
"""
    file = makers.checkpoint(Pickle().dict({"w": float_tensor}).stop(), TWO).data
    assert without({"torch", "numpy"}, code, file).splitlines() == ['framework="np" needs NumPy: pip install numpy'] * 3


def test_without_torch_a_touch_says_what_to_install() -> None:
    code = """
sd = zipslicer.load(file)
try:
    sd["w"]
except ImportError as error:
    print(error)
"""
    file = makers.checkpoint(Pickle().dict({"w": float_tensor}).stop(), TWO).data
    said = without({"torch"}, code, file, "lambda text: ModuleNotFoundError(text, name='torch')")
    assert said.strip() == 'tensors need torch (pip install torch); framework="np" makes NumPy arrays'


def test_listing_imports_no_numpy() -> None:
    code = """
c = zipslicer.open(file, framework="np")
repr(c.root), c.tensors.offset_keys(), [c.tensors.get_meta(k) for k in c.tensors]
assert not {"numpy", "torch", "ml_dtypes"} & set(sys.modules)
print("done")
"""
    file = makers.checkpoint(Pickle().dict({"w": float_tensor, "p": parameter}).stop(), TWO).data
    assert without({"torch"}, code, file).split() == ["done"]


def test_the_traits_that_cast_are_those_of_numbers() -> None:
    """Every dtype that a cast touches is one that NumPy or ml_dtypes computes with."""
    floating = {d.name for d in DTYPES if d.traits & DIFFERENTIABLE and not d.traits & COMPLEX} - set(CARRIED)
    assert floating == {d.name for d in DTYPES if "float" in d.name and d.name not in CARRIED}
