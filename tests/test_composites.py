"""Composites: sparse, quantized, nested and meta tensors, with nothing read before a touch; and hostile ones."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import warnings
from typing import TYPE_CHECKING, Any

import pytest

torch = pytest.importorskip("torch")

import conformance  # noqa: E402
import makers  # noqa: E402
from makers import Pickle  # noqa: E402

import zipslicer  # noqa: E402
from zipslicer.errors import TableError, UnsafeError, UnsupportedError  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def saved(tree: Any) -> bytes:
    file = io.BytesIO()
    torch.save(tree, file)
    return file.getvalue()


@pytest.fixture(autouse=True)
def no_deprecations() -> Iterator[None]:
    """torch warns of its quantized tensors whenever one is made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def tree() -> dict[str, Any]:
    """One of each kind."""
    x = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    scales, zeros = torch.tensor([0.1, 0.2]).double(), torch.tensor([1, 2])
    return {
        **conformance.sparse_matrices(),
        "tensor": torch.quantize_per_tensor(x, 0.5, 3, torch.qint8),
        "channel": torch.quantize_per_channel(x, scales, zeros, 0, torch.qint8),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.zeros(3)]),
        "meta": torch.empty(3, 4, device="meta"),
    }


class Counting(io.BytesIO):
    """Counts the bytes that are read."""

    taken = 0

    def readinto(self, buffer: Any) -> int:
        n = super().readinto(buffer)
        self.taken += n
        return n

    def read(self, size: int | None = -1) -> bytes:
        found = super().read(size)
        self.taken += len(found)
        return found


def test_facts_are_had_without_reading() -> None:
    file = Counting(saved(tree()))
    ckpt = zipslicer.open(file)
    before = file.taken
    infos: dict[str, Any] = {name: ckpt.tensors.get_meta(name) for name in ckpt.tensors}
    repr(ckpt.root), repr(ckpt.tensors), ckpt.tensors.offset_keys(), ckpt.placeholders
    assert file.taken == before
    assert list(infos) == list(tree())
    csr = infos["csr"]
    assert (csr.layout, csr.shape, csr.dtype_name, csr.strides) == ("sparse_csr", (4, 4), "float32", ())
    assert {name: part.shape for name, part in csr.parts.items()} == {"compressed": (5,), "plain": (6,), "values": (6,)}
    assert csr.nbytes == 5 * 8 + 6 * 8 + 6 * 4
    assert repr(csr) == "TensorInfo(float32, [4, 4], layout=sparse_csr)"
    assert (infos["nested"].layout, infos["nested"].shape, infos["nested"].numel) == ("nested", (2, -1), 5)
    assert (infos["tensor"].layout, infos["tensor"].dtype, infos["tensor"].nbytes) == ("strided", torch.qint8, 4)
    assert (infos["meta"].location, infos["meta"].nbytes, infos["meta"].is_contiguous) == ("meta", 48, True)


def test_torch_is_not_needed_for_facts() -> None:
    code = (
        "import sys, zipslicer; c = zipslicer.open(sys.stdin.buffer.read())\n"
        "[repr(c.tensors.get_meta(k)) for k in c.tensors]; c.tensors.offset_keys()\n"
        "assert len(c.tensors) == 9 and 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], input=saved(tree()), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_a_file_of_meta_tensors_only_is_lazy_all_the_same() -> None:
    sd = zipslicer.load(saved({"a": {"m": torch.empty(2, device="meta")}, "n": [1]}))
    assert isinstance(sd["a"], zipslicer.LazyStateDict)
    assert sd["a"].get_shape("m") == [2]
    assert sd["a"]["m"].is_meta
    assert sd["n"] == [1]
    assert list(sd.flatten()) == ["a.m"]
    assert sd.materialize()["a"]["m"].is_meta


def test_parts_are_read_alone() -> None:
    big = torch.sparse_coo_tensor(torch.arange(10_000)[None], torch.arange(10_000.0), (10_000,), check_invariants=True)
    file = Counting(saved({"big": big}))
    sd = zipslicer.load(file)
    values = sd.get_slice("big").part("values")
    assert (values.shape, values.get_dtype()) == ((10_000,), "F32")
    before = file.taken
    assert values[5000:5002].tolist() == [5000.0, 5001.0]
    assert file.taken - before < 1000
    with pytest.raises(KeyError, match="near it: 'values'"):
        sd.get_slice("big").part("value")
    with pytest.raises(KeyError):
        values.part("values")


def test_what_is_one_dense_tensor_underneath_is_sliced() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    call = conformance._Rebuilt("_rebuild_device_tensor_from_cpu_tensor", x, torch.float16, "xla:0", True)
    array = conformance._Rebuilt("_rebuild_device_tensor_from_numpy", x.numpy(), torch.float32, "xla:0", False)
    sd = zipslicer.load(saved({**tree(), "xla": call, "numpy": array}))
    part = sd.get_slice("tensor")[1:, ::-1]
    assert (part.qscheme(), part.q_scale(), part.q_zero_point()) == (torch.per_tensor_affine, 0.5, 3)
    assert part.dequantize().tolist() == [[4.0, 3.0]]
    assert (sd.get_slice("meta")[1].shape, sd.get_slice("meta")[1].is_meta) == ((4,), True)
    assert sd.get_slice("numpy")[::-1, 1].tolist() == [4.0, 1.0]
    half = sd.get_slice("xla")[1, :2]
    assert (half.tolist(), half.dtype, half.requires_grad, half.is_leaf) == ([3.0, 4.0], torch.float16, True, True)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
def test_a_slice_keeps_the_scales_of_its_channels(axis: int, kind: Any) -> None:
    x = torch.arange(12.0).reshape(3, 4)
    scales, zeros = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=kind)[: x.shape[axis]], torch.tensor([1, 2, 3, 4])
    zeros = zeros[: x.shape[axis]] if kind is torch.float64 else zeros[: x.shape[axis]].float()
    whole = torch.quantize_per_channel(x, scales, zeros, axis, torch.quint8)
    sliced = zipslicer.load(saved({"q": whole})).get_slice("q")
    values = whole.dequantize().numpy()
    for index in (
        (),
        -1,
        (slice(None), 2),
        (slice(None, None, -2), slice(1, 3)),
        (None, slice(1, 2)),
        (1, 1),
        slice(2, 2),
    ):
        wanted = values[index]
        if kind is torch.float32 and index in (-1, (slice(None), 2), (1, 1)) and index != ((slice(None), 2), -1)[axis]:
            with pytest.raises(UnsupportedError, match="by a slice"):
                sliced[index]
            continue
        part = sliced[index]
        if part.numel():
            assert part.dequantize().tolist() == wanted.tolist(), index
        assert tuple(part.shape) == wanted.shape


@pytest.mark.parametrize("name", ["coo", "csr", "nested"])
def test_what_is_not_says_what_can_be(name: str) -> None:
    sliced = zipslicer.load(saved(tree())).get_slice(name)
    with pytest.raises(TypeError, match=r"not sliced.*part\(name\)"):
        sliced[0]


def test_dtype_casts_values_and_nothing_else() -> None:
    sd = zipslicer.load(saved(tree()), dtype=torch.float16)
    for found in (sd, sd.materialize()):
        assert found["coo"].dtype == found["csr"].dtype == found["nested"].dtype == torch.float16
        assert found["coo"]._indices().dtype == torch.int64
        assert found["channel"].dtype == torch.qint8
        assert torch.equal(found["channel"].q_per_channel_scales(), tree()["channel"].q_per_channel_scales())
        assert found["meta"].dtype == torch.float16
    assert sd.get_meta("coo").dtype_name == "float32"


def test_map_location_meta() -> None:
    sd = zipslicer.load(saved(tree()), map_location="meta")
    for name in ("coo", "csr", "bsc", "meta"):
        assert sd[name].is_meta
        assert sd[name].shape == tree()[name].shape
    for name in ("tensor", "channel", "nested"):
        with pytest.raises(UnsupportedError, match="meta device") as caught:
            sd[name]
        assert caught.value.key == name


def test_map_location_finds_a_device_without_storages_by_its_name() -> None:
    call = conformance._Rebuilt("_rebuild_device_tensor_from_cpu_tensor", torch.ones(2), torch.float32, "xla:0", False)
    sd = zipslicer.load(saved({"a": call}), map_location={"xla:0": "meta"})
    assert sd["a"].is_meta
    assert sd.materialize()["a"].is_meta


def test_cached_tensors_share_their_parts() -> None:
    sd = zipslicer.load(saved(tree()), cache_tensors=True)
    assert sd["csr"].values().data_ptr() == sd["csr"].values().data_ptr()
    assert sd["tensor"].data_ptr() == sd["tensor"].data_ptr()
    first = sd["channel"]
    assert first.data_ptr() == sd["channel"].data_ptr()


def test_a_touch_owns_its_parts_only() -> None:
    values = torch.arange(1000.0)
    coo = torch.sparse_coo_tensor(torch.tensor([[0, 1]]), values[500:502], (2,), check_invariants=True)
    quantized = torch.quantize_per_tensor(values, 4.0, 0, torch.qint8)[10:12]
    sd = zipslicer.load(saved({"coo": coo, "q": quantized}))
    assert sd["coo"]._values().untyped_storage().nbytes() == 8
    assert sd["q"].untyped_storage().nbytes() == 2
    plain = sd.materialize()
    assert plain["coo"]._values().untyped_storage().nbytes() == 4000
    assert plain["q"].untyped_storage().nbytes() == 1000
    assert sd.get_tensors(["coo"])["coo"].to_dense().tolist() == [500.0, 501.0]


@pytest.mark.parametrize("setting", [torch.inference_mode, lambda: torch.device("meta"), torch.no_grad])
def test_settings_of_torch_have_no_influence(setting: Callable[[], Any]) -> None:
    sd = zipslicer.load(saved(tree()))
    with setting():
        found = {name: sd[name] for name in sd}
    for name, tensor in found.items():
        assert not tensor.is_inference()
        assert tensor.is_meta == (name == "meta")


def test_they_are_known_to_unknown_error() -> None:
    assert len(zipslicer.load(saved(tree()), unknown="error").materialize()) == 9
    jagged = makers.checkpoint(Pickle().name("torch.nested._internal.nested_tensor", "_rebuild_njt").stop()).data
    with pytest.raises(UnsafeError):
        zipslicer.load(jagged, unknown="error")


def test_a_csr_that_required_grad_does_so_as_a_leaf() -> None:
    csr = conformance.sparse_matrices()["csr"].requires_grad_()
    sd = zipslicer.load(saved({"csr": csr}))
    for made in (sd["csr"], sd.materialize()["csr"]):
        assert (made.requires_grad, made.is_leaf, made.layout) == (True, True, torch.sparse_csr)
    assert sd.get_meta("csr").requires_grad


# --- calls made by hand -----------------------------------------------------------------------------------------------

Write = Any  # (Pickle) -> object


def ints(values: list[int], key: str = "i", shape: tuple[int, ...] | None = None, cls: str = "Long") -> Write:
    size = (len(values),) if shape is None else shape
    strides = [1]
    for n in reversed(size[1:]):
        strides.insert(0, strides[0] * n)
    return lambda p: p.tensor(f"{cls}Storage", key, len(values), size=size, stride=strides[: len(size)])


def floats(count: int, key: str = "v", shape: tuple[int, ...] | None = None, stride: Any = None) -> Write:
    size = (count,) if shape is None else shape
    if stride is None:
        return lambda p: ints([0] * count, key, size, "Float")(p)
    return lambda p: p.tensor("FloatStorage", key, count, size=size, stride=stride)


def sequence(*items: Write) -> Write:
    def write(p: Pickle) -> object:
        p.mark()
        for item in items:
            item(p)
        return p.raw(b"t")

    return write


def number(value: int) -> Write:
    return lambda p: p.integer(value)


def real(value: float) -> Write:
    return lambda p: p.real(value)


def sizes(*values: int) -> Write:
    return lambda p: p.integers(values)


def yes(p: Pickle) -> object:
    return p.boolean(True)


def no(p: Pickle) -> object:
    return p.boolean(False)


def named(module: str, name: str) -> Write:
    return lambda p: p.name(module, name)


def layout(name: str) -> Write:
    return lambda p: p.call("torch.serialization", "_get_layout", lambda p: p.text(name))


def opened(function: str, *args: Write, **storages: bytes) -> Any:
    """{"t": torch._utils.function(*args), "w": a tensor}"""
    program = Pickle().dict({"t": lambda p: p.call("torch._utils", function, *args), "w": floats(1, "w")})
    return zipslicer.load(makers.checkpoint(program.stop(), {"w": bytes(4), **storages}).data)


def longs(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


def sparse(kind: str, *data: Write, **storages: bytes) -> Any:
    return opened("_rebuild_sparse_tensor", layout(f"torch.{kind}"), sequence(*data), **storages)


ONE, TWO, ROW = sizes(1), sizes(2), sizes(1, 2)
VALUE, VALUES = floats(1), floats(4)


def coo(index: int = 0, size: Write = TWO, values: Write = VALUE, coalesced: Write = yes, **more: bytes) -> Any:
    return sparse(
        "sparse_coo", ints([0], "i", (1, 1)), values, size, coalesced, i=longs(index), **{"v": bytes(4), **more}
    )


def csr(compressed: list[int], plain: list[int], size: Write = ROW, values: Write = None, kind: str = "csr") -> Any:
    values = floats(len(plain)) if values is None else values
    return sparse(
        f"sparse_{kind}", ints(compressed, "c"), ints(plain, "i"), values, size,
        c=longs(*compressed), i=longs(*plain), v=bytes(4 * len(plain)),
    )  # fmt: skip


def quantized(
    *, size: Write = TWO, stride: Write = ONE, offset: int = 0, numel: int = 2, cls: str = "QInt8",
    params: Write = None, grad: Write = no, **storages: Any,
) -> Any:  # fmt: skip
    per_tensor = sequence(named("torch", "per_tensor_affine"), real(0.5), number(0))
    return opened(
        "_rebuild_qtensor", lambda p: p.storage(f"{cls}Storage", "q", numel), number(offset), size, stride,
        per_tensor if params is None else params, grad, Pickle.ordered_dict, q=bytes(numel * (4 if cls == "QInt32" else 1)),
        **storages,
    )  # fmt: skip


def channels(scales: Write, zeros: Write, axis: int = 0, **storages: Any) -> Any:
    params = sequence(named("torch", "per_channel_affine"), scales, zeros, number(axis))
    return quantized(params=params, **storages)


def nested(sizes_: list[int], strides: list[int], offsets: list[int], values: Write = VALUES, **more: Any) -> Any:
    shape = more.get("shape", (len(offsets), 1))
    return opened(
        "_rebuild_nested_tensor", values, ints(sizes_, "s", shape), ints(strides, "t", shape), ints(offsets, "o"),
        v=bytes(16), s=longs(*sizes_), t=longs(*strides), o=longs(*offsets),
    )  # fmt: skip


def meta(size: Write, stride: Write, dtype: str = "float32", grad: Write = no) -> Any:
    return opened("_rebuild_meta_tensor_no_storage", named("torch", dtype), size, stride, grad)


def doubles(count: int, key: str) -> Write:
    return ints([0] * count, key, None, "Double")


def test_what_is_right_is_read() -> None:
    """The same makers with nothing wrong."""
    assert coo()["t"].to_dense().tolist() == [0.0, 0.0]
    old = sparse("sparse_coo", ints([0], "i", (1, 1)), floats(1), sizes(2), i=longs(0), v=bytes(4))
    assert old["t"].to_dense().tolist() == [0.0, 0.0]
    assert csr([0, 1], [1])["t"].to_dense().shape == (1, 2)
    assert quantized()["t"].dequantize().tolist() == [0.0, 0.0]
    assert quantized(cls="QUInt4x2", size=sizes(4), params=None)["t"].shape == (4,)
    assert channels(doubles(2, "a"), ints([0, 0], "b"), a=bytes(16), b=bytes(16))["t"].q_per_channel_axis() == 0
    listed = channels(lambda p: p.raw(b"](").real(0.5).real(1.0).raw(b"e"), lambda p: p.raw(b"]K\1aK\0a"))
    assert listed["t"].q_per_channel_zero_points().tolist() == [1, 0]
    assert listed["t"].q_per_channel_scales().dtype == torch.float64
    assert [each.tolist() for each in nested([1, 3], [1, 1], [0, 1])["t"].unbind()] == [[0.0], [0.0] * 3]
    assert meta(sizes(1 << 60), sizes(1))["t"].shape == (1 << 60,)
    assert coo(size=sizes(1 << 62))["t"].shape == (1 << 62,)


MALFORMED: dict[str, Callable[[], Any]] = {
    "index past the end": lambda: coo(2),
    "index below zero": lambda: coo(-1),
    "size of negative numbers": lambda: coo(size=sizes(-1)),
    "size beyond 64 bits": lambda: coo(size=sizes(1 << 62, 4)),
    "size of too many dimensions": lambda: coo(size=sizes(*[1] * 65)),
    "size that is no sequence": lambda: coo(size=number(3)),
    "size of text": lambda: coo(size=sequence(lambda p: p.text("x"))),
    "size of other dimensions": lambda: coo(size=sizes(1, 1, 1)),
    "values of another count": lambda: coo(values=floats(2), v=bytes(8)),
    "coalesced of a number": lambda: coo(coalesced=number(1)),
    "coalesced that is not": lambda: sparse(
        "sparse_coo", ints([1, 0], "i", (1, 2)), floats(2), sizes(2), yes, i=longs(1, 0), v=bytes(8)
    ),
    "indices of floats": lambda: sparse("sparse_coo", floats(1, "i", (1, 1)), floats(1), sizes(2), yes, i=bytes(4), v=bytes(4)),
    "a terabyte of indices": lambda: sparse(
        "sparse_coo", lambda p: p.tensor("LongStorage", "i", 1, size=(1, 1 << 40), stride=(0, 0)),
        floats(1, "v", (1 << 40,), (0,)), sizes(2), no, i=longs(0), v=bytes(4),
    ),
    "compressed that falls": lambda: csr([0, -1], [1]),
    "compressed beyond its values": lambda: csr([0, 9], [1]),
    "compressed of another count": lambda: csr([0, 1, 1, 1], [1]),
    "plain past the end": lambda: csr([0, 1], [7]),
    "blocks of nothing": lambda: csr([0, 1], [0], sizes(2, 2), floats(1, "v", (1, 0, 2)), "bsr"),
    "blocks without dimensions": lambda: csr([0, 1], [0], sizes(2, 2), None, "bsc"),
    "quantized beyond its storage": lambda: quantized(size=sizes(3)),
    "quantized by stride": lambda: quantized(stride=sizes(2)),
    "quantized by offset": lambda: quantized(offset=1),
    "quantized by negative offset": lambda: quantized(offset=-1),
    "quantized of other dimensions": lambda: quantized(stride=sizes(1, 1)),
    "quantized of packed elements": lambda: quantized(cls="QUInt4x2", size=sizes(5)),
    "a view of packed elements": lambda: quantized(cls="QUInt4x2", size=sizes(2), offset=3),
    "quantized floats": lambda: quantized(cls="Char"),
    "quantized with grad": lambda: quantized(grad=yes),
    "quantized by text": lambda: quantized(params=sequence(named("torch", "per_tensor_affine"), number(1), number(0))),
    "quantized by a stranger": lambda: quantized(params=sequence(named("os", "system"), real(1.0), number(0))),
    "scales of another count": lambda: channels(doubles(3, "a"), ints([0, 0], "b"), a=bytes(24), b=bytes(16)),
    "zero points of another count": lambda: channels(doubles(2, "a"), ints([0], "b"), a=bytes(16), b=bytes(8)),
    "scales of integers": lambda: channels(ints([1, 1], "a"), ints([0, 0], "b"), a=bytes(16), b=bytes(16)),
    "scales of text": lambda: channels(lambda p: p.raw(b"](").text("x").text("y").raw(b"e"), ints([0, 0], "b"), b=bytes(16)),
    "an axis past the end": lambda: channels(doubles(2, "a"), ints([0, 0], "b"), 1, a=bytes(16), b=bytes(16)),
    "an axis below zero": lambda: channels(doubles(2, "a"), ints([0, 0], "b"), -1, a=bytes(16), b=bytes(16)),
    "nested beyond its values": lambda: nested([1, 4], [1, 1], [0, 1]),
    "nested by offset": lambda: nested([1, 1], [1, 1], [0, 1 << 40]),
    "nested by stride": lambda: nested([1, 2], [1, 1 << 62], [0, 0]),
    "nested by negative size": lambda: nested([1, -1], [1, 1], [0, 1]),
    "nested by negative offset": lambda: nested([1, 1], [1, 1], [0, -1]),
    "nested beyond 64 bits": lambda: nested([1 << 62] * 2, [0, 0], [0], shape=(1, 2)),
    "nested of other counts": lambda: nested([1, 1], [1, 1], [0, 1, 2], shape=(2, 1)),
    "nested without rows": lambda: nested([1, 1], [1, 1], [0, 1], shape=(2,)),
    "nested of strided values": lambda: nested([1, 1], [1, 1], [0, 1], floats(4, "v", (2,), (2,))),
    "meta of negative size": lambda: meta(sizes(-1), sizes(1)),
    "meta of negative stride": lambda: meta(sizes(1), sizes(-1)),
    "meta beyond 64 bits": lambda: meta(sizes(1 << 62, 4), sizes(4, 1)),
    "meta of too many bytes": lambda: meta(sizes(1 << 62), sizes(1)),
    "meta of no dtype": lambda: meta(sizes(1), sizes(1), "Size"),
    "meta of integers with grad": lambda: meta(sizes(1), sizes(1), "int64", yes),
    "meta of other dimensions": lambda: meta(sizes(1), sizes(1, 1)),
    "a device of a number": lambda: opened(
        "_rebuild_device_tensor_from_cpu_tensor", floats(1), named("torch", "float32"), number(0), no, v=bytes(4)
    ),
    "an array that is none": lambda: opened(
        "_rebuild_device_tensor_from_numpy", sizes(1, 2), named("torch", "float32"), lambda p: p.text("xla:0"), no
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_wrong_is_an_error_of_its_key(name: str) -> None:
    sd = MALFORMED[name]()
    assert sd["w"].tolist() == [0.0]
    assert "Error" in repr(sd) or sd.get_meta("t") is not None
    with pytest.raises(TableError) as caught:
        sd["t"]
    assert caught.value.key == "t"
    with pytest.raises(TableError):
        sd.materialize()
    assert sd["w"].tolist() == [0.0]


FORMLESS: dict[str, Callable[[], Any]] = {
    "layout that is none": lambda: sparse("sparse_xyz", floats(1), v=bytes(4)),
    "dense layout": lambda: sparse("strided", floats(1), v=bytes(4)),
    "nested layout": lambda: sparse("nested", *[floats(1)] * 5, v=bytes(4)),
    "too few": lambda: opened("_rebuild_sparse_tensor", layout("torch.sparse_coo")),
    "too many": lambda: opened("_rebuild_meta_tensor_no_storage", *[no] * 5),
    "nothing": lambda: opened("_rebuild_nested_tensor"),
    "members that are no tensors": lambda: sparse("sparse_coo", no, no, sizes(1), no),
    "storage that is none": lambda: opened("_rebuild_qtensor", *[no] * 4, sequence(no, no, no), no, no),
    "parameters of a number": lambda: quantized(params=number(1)),
}


@pytest.mark.parametrize("name", FORMLESS)
def test_what_torch_does_not_write_is_inert(name: str) -> None:
    sd = FORMLESS[name]()
    assert isinstance(sd["t"], zipslicer.Placeholder)
    assert isinstance(sd.materialize()["t"], zipslicer.Placeholder)
    assert sd.get_meta("t") is None
    assert sd["w"].tolist() == [0.0]


# --- odd places -------------------------------------------------------------------------------------------------------


def meta_call(p: Pickle) -> object:
    return p.call("torch._utils", "_rebuild_meta_tensor_no_storage", named("torch", "float32"), ONE, ONE, no)


def from_type(function: Write, cls: Write, args: Write, state: Write) -> Write:
    return lambda p: p.call("torch._tensor", "_rebuild_from_type_v2", function, cls, args, state)


META = named("torch._utils", "_rebuild_meta_tensor_no_storage")


def test_a_composite_of_a_foreign_class_is_the_tensor_it_is_based_on() -> None:
    args = sequence(named("torch", "float32"), ONE, ONE, no)
    write = from_type(META, named("pkg", "Sub"), args, lambda p: p.dict({"note": number(7)}))
    checkpoint = zipslicer.open(makers.checkpoint(Pickle().dict({"a": write}).stop()).data)
    info = checkpoint.tensors.get_meta("a")
    assert info is not None
    assert (info.class_name, info.location) == ("pkg.Sub", "meta")
    for made in (checkpoint.tensors["a"], checkpoint.root.materialize()["a"]):
        assert (type(made), made.note, made.is_meta) == (torch.Tensor, 7, True)
    assert checkpoint.placeholders == {}


def test_a_state_may_lead_back_to_what_holds_the_tensor() -> None:
    args = sequence(named("torch", "float32"), ONE, ONE, no)
    for function in (META, named("pkg", "rebuild")):
        program = Pickle().raw(b"}").put(1).text("a")
        from_type(function, named("pkg", "Sub"), args, lambda p: p.raw(b"}").text("all").get(1).raw(b"s"))(program)
        made = zipslicer.load(makers.checkpoint(program.raw(b"s").stop()).data)
        tree = made.materialize() if isinstance(made, zipslicer.LazyStateDict) else made
        assert set(tree) == {"a"}


@pytest.mark.parametrize("function", [META, named("pkg", "rebuild")])
def test_arguments_that_are_no_tuple_leave_the_call_as_it_is(function: Write) -> None:
    write = from_type(function, named("pkg", "Sub"), number(3), lambda p: p.dict({"w": floats(1, "w")}))
    checkpoint = zipslicer.open(makers.checkpoint(Pickle().dict({"a": write}).stop(), {"w": bytes(4)}).data)
    assert zipslicer.describe(checkpoint.root["a"]).name == "_rebuild_from_type_v2"
    assert "placeholder" in repr(checkpoint.root["a"])
    assert list(checkpoint.tensors) == ["a.args.3.w"]
    assert list(checkpoint.placeholders) == ["a"]


def test_a_set_of_objects_that_hold_tensors() -> None:
    program = Pickle(4).raw(b"(").name("pkg", "Node").raw(b")\x81")
    floats(1, "w")(program.raw(b"}").text("w"))
    data = makers.checkpoint(program.raw(b"sb\x91").stop(), {"w": bytes(4)}).data
    (node,) = zipslicer.load(data)
    assert node.w.tolist() == [0.0]
    (tensor,) = zipslicer.load(makers.checkpoint(meta_call_in_a_set()).data)
    assert tensor.is_meta


def meta_call_in_a_set() -> bytes:
    program = Pickle(4).raw(b"(")
    meta_call(program)
    return program.raw(b"\x91").stop()


def test_facts_of_tensors_that_were_put_in() -> None:
    sd = zipslicer.load(saved({"w": torch.ones(1)}))
    sd["nested"], sd["csr"] = tree()["nested"], tree()["csr"]
    assert (sd.get_meta("nested").layout, sd.get_meta("nested").shape) == ("nested", (2, -1))
    assert (sd.get_meta("csr").layout, sd.get_meta("csr").shape) == ("sparse_csr", (4, 4))
    assert "csr" in repr(sd)
