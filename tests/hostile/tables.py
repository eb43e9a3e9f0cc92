"""Tables: tricks with what a tensor says of itself, by which it would show memory that is not its own."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

from makers import Pickle

from hostile import (
    ARCHIVE,
    DESCRIBED,
    FOUR_FLOATS,
    INERT,
    NUMBERS,
    PROGRAM,
    PWNED,
    RIGHT,
    TABLE,
    UNSUPPORTED,
    Attack,
    attack,
    beside,
    checkpoint,
    program,
    raw,
    trick,
    w,
)

FAR = (4, 5, 1 << 31, 1 << 32, (1 << 62) + 4, (1 << 63) - 1)
NOT_NUMBERS = {
    "float": b"G" + struct.pack(">d", 4.0),
    "bool": b"\x88",
    "None": b"N",
    "text": b"U\x014",
    "2**63": b"\x8a\x09" + (1 << 63).to_bytes(9, "little"),
    "2**64 + 4": b"\x8a\x09" + ((1 << 64) + 4).to_bytes(9, "little"),
    "-1": b"J\xff\xff\xff\xff",
    "-2**63": b"\x8a\x08" + (1 << 63).to_bytes(8, "little"),
}


def bad(tag: object, **bent: Any) -> Attack:
    return attack(tag, beside(w(**bent)), RIGHT, TABLE, PROGRAM)


def refused(tag: object, *errors: str, **bent: Any) -> Attack:
    """What cannot be a tensor is refused where it is built: the file does not open."""
    return attack(tag, beside(w(**bent)), *errors)


def tensor_of(
    offset: bytes = b"K\0",
    sizes: bytes = b"K\4\x85",
    strides: bytes = b"K\1\x85",
    rest: bytes = b"\x89}",
    storage: bytes = b"",
) -> Callable[[Pickle], object]:
    """A call of _rebuild_tensor_v2, each argument of which may be anything."""

    def write(pickle: Pickle) -> object:
        pickle.name("torch._utils", "_rebuild_tensor_v2").mark()
        if storage:
            pickle.raw(storage)
        else:
            pickle.storage("FloatStorage", "0", 4)
        return pickle.raw(offset + sizes + strides + rest + b"tR")

    return write


@trick
def size_beyond_the_storage() -> Iterator[Attack]:
    for size in FAR[1:]:
        yield refused(size, TABLE, size=[size])
    for sizes in ([2, 3], [5, 1], [1 << 31, 1 << 31], [1 << 32, 1 << 32], [4, 1 << 62], [3, 0x5555555555555556]):
        yield refused(sizes, TABLE, size=sizes, stride=[1, 1] if sizes[0] == 5 else [sizes[1], 1])


@trick
def size_that_wraps_to_a_right_one() -> Iterator[Attack]:
    """Products of 2**64 + 4 elements, in unchecked arithmetic 4."""
    for sizes, strides in (
        ([1 << 62, 4], [0, 1]),
        ([1 << 32, 1 << 32], [0, 0]),
        ([(1 << 62) + 1, 4], [4, 1]),
        ([1 << 21, 1 << 21, 1 << 21, 2], [0, 0, 0, 1]),
    ):
        yield refused(sizes, TABLE, size=sizes, stride=strides)


@trick
def stride_beyond_the_storage() -> Iterator[Attack]:
    for stride in (2, 1 << 31, 1 << 62, (1 << 63) - 1, 0x5555555555555556):
        yield refused(stride, TABLE, stride=[stride])
    for strides in ([1 << 63, 1], [(1 << 64) - 1, 1], [-1, 1], [4, -1], [1 << 62, 1 << 62]):
        yield refused(strides, TABLE, PROGRAM, size=[2, 2], stride=strides)


@trick
def offset_beyond_the_storage() -> Iterator[Attack]:
    for offset in (1, 4, 1 << 31, 1 << 62, (1 << 63) - 1, -1, -4, -(1 << 63), 1 << 64, 0x4000000000000001):
        yield refused(offset, TABLE, PROGRAM, storage_offset=offset)


@trick
def empty_tensor_far_away() -> Iterator[Attack]:
    """No element, but an offset or stride that leads out: nothing may be read or pointed to."""
    for offset in (0, 4, 5, 1 << 40):
        yield attack(
            f"offset {offset}",
            beside(w(size=[0], storage_offset=offset)),
            RIGHT,
            TABLE,
            holds={"w": NUMBERS, "x": []},
        )
    yield attack(
        "strides",
        beside(w(size=[0, 4], stride=[1 << 62, 1 << 40])),
        RIGHT,
        TABLE,
        holds={"w": NUMBERS, "x": []},
    )
    yield refused("0 times 2**63", TABLE, PROGRAM, size=[0, 1 << 63], stride=[1, 1])
    yield refused("0 times -1", TABLE, PROGRAM, size=[0, -1], stride=[1, 1])


@trick
def rank_differs() -> Iterator[Attack]:
    for sizes, strides in (([4], []), ([], [1]), ([2, 2], [1]), ([4], [1, 1])):
        yield refused((sizes, strides), TABLE, PROGRAM, size=sizes, stride=strides)
    for rank in (65, 5000):
        yield refused(rank, TABLE, PROGRAM, size=[1] * rank, stride=[1] * rank)


@trick
def geometry_of_other_types() -> Iterator[Attack]:
    for name, opcode in NOT_NUMBERS.items():
        yield attack(f"size {name}", beside(tensor_of(sizes=opcode + b"\x85")), PROGRAM, TABLE)
        yield attack(f"stride {name}", beside(tensor_of(strides=opcode + b"\x85")), PROGRAM, TABLE)
        yield attack(f"offset {name}", beside(tensor_of(offset=opcode)), PROGRAM, TABLE)
    for name, opcode in (
        ("number", b"K\4"),
        ("list", b"](K\4e"),
        ("dict", b"}"),
        ("None", b"N"),
        ("nested", b"K\4\x85\x85"),
    ):
        yield attack(f"sizes {name}", beside(tensor_of(sizes=opcode)), PROGRAM, TABLE, RIGHT)
        yield attack(f"strides {name}", beside(tensor_of(strides=opcode)), PROGRAM, TABLE, RIGHT)


@trick
def number_of_arguments() -> Iterator[Attack]:
    """What claims to be a tensor is an error where it is none, and not a placeholder."""
    for tag, body in (
        ("none", b")R"),
        ("one", b"K\1\x85R"),
        ("text", b"U\1aR"),
        ("three", b"(NK\0)tR"),
        ("ten", b"(" + b"N" * 10 + b"tR"),
    ):
        for version in ("", "_v2", "_v3"):
            call = b"ctorch._utils\n_rebuild_tensor" + version.encode() + b"\n" + body
            yield attack(f"{version} {tag}", beside(raw(call)), PROGRAM)


@trick
def storage_that_is_none() -> Iterator[Attack]:
    for tag, storage in (
        ("None", b"N"),
        ("text", b"U\x010"),
        ("call", b"cos\nmkdir\n)R"),
        ("class", b"ctorch\nFloatStorage\n"),
        ("list", b"]"),
    ):
        yield attack(tag, beside(tensor_of(storage=storage)), PROGRAM)


@trick
def persistent_id_of_a_wrong_shape() -> Iterator[Attack]:
    head, cls = b"(U\7storage", b"ctorch\nFloatStorage\n"
    for tag, body in (
        ("empty", b")Q"),
        ("four", head + cls + b"U\x010U\3cputQ"),
        ("seven", head + cls + b"U\x010U\3cpuK\4NNtQ"),
        ("list", b"](U\7storage" + cls + b"U\x010U\3cpuK\4eQ"),
        ("text", b"U\7storageQ"),
        ("None", b"NQ"),
        ("of another kind", b"(U\6module" + cls + b"U\x010U\3cpuK\4tQ"),
        ("kind of bytes", b"(C\7storage" + cls + b"U\x010U\3cpuK\4tQ"),
        ("class unknown", head + b"cos\nmkdir\nU\x010U\3cpuK\4tQ"),
        ("class that is a dtype", head + b"ctorch\nfloat32\nU\x010U\3cpuK\4tQ"),
        ("class that is text", head + b"U\x0cFloatStorageU\x010U\3cpuK\4tQ"),
        ("key None", head + cls + b"NU\3cpuK\4tQ"),
        ("key bytes", head + cls + b"C\x010U\3cpuK\4tQ"),
        ("key list", head + cls + b"]U\3cpuK\4tQ"),
        ("location None", head + cls + b"U\x010NK\4tQ"),
        ("location call", head + cls + b"U\x010cos\nmkdir\n)RK\4tQ"),
        ("numel None", head + cls + b"U\x010U\3cpuNtQ"),
        ("numel text", head + cls + b"U\x010U\3cpuU\x014tQ"),
        ("numel true", head + cls + b"U\x010U\3cpu\x88tQ"),
        ("numel float", head + cls + b"U\x010U\3cpuG" + struct.pack(">d", 4.0) + b"tQ"),
    ):
        yield attack(tag, beside(tensor_of(storage=body)), PROGRAM, TABLE, RIGHT, ARCHIVE)


@trick
def element_count_lies() -> Iterator[Attack]:
    """CVE-2026-24747: the count of the id is not the size of the record."""
    for numel in (0, 3, 5, 1 << 20, (1 << 63) - 1, 0x4000000000000004, -1, 1 << 63, 1 << 64, (1 << 64) + 4):
        yield attack(numel, checkpoint(program(w=w(numel=numel))), TABLE, PROGRAM, ARCHIVE)


@trick
def record_is_short() -> Iterator[Attack]:
    for nbytes in (0, 1, 15):
        yield attack(nbytes, checkpoint(program(x=w(key="1")), **{"1": FOUR_FLOATS[:nbytes]}), TABLE)


@trick
def record_is_long() -> Iterator[Attack]:
    """More than is described belongs to nobody."""
    for nbytes in (1, 16, 5000):
        yield attack(nbytes, checkpoint(program(w=w(key="1")), **{"1": FOUR_FLOATS + b"\xff" * nbytes}), RIGHT, TABLE)


@trick
def key_is_hostile() -> Iterator[Attack]:
    """A key is looked up whole; it is no path."""
    for key in (
        "../data.pkl", "../byteorder", "../version", "./0", "0/", "/0", "0/../0", "//0", "..", "", "\0", "0\0", "\\0",
        "/etc/passwd", "../../../../etc/passwd", "%30", "\x1b[2J", "\ud800", "0" * 70_000, "00", "+0", " 0", "\u0660", "\uff10",
    ):  # fmt: skip
        yield attack(key[:20].encode("utf-8", "backslashreplace"), beside(w(key=key)), RIGHT, ARCHIVE, PROGRAM)


@trick
def key_without_a_record() -> Iterator[Attack]:
    for key in ("1", "999999999999999999999999"):
        yield attack(key, beside(w(key=key)), RIGHT, ARCHIVE)


@trick
def one_storage_of_two_kinds() -> Iterator[Attack]:
    """torch keeps the first dtype for both."""
    for cls, numel in (
        ("IntStorage", 4),
        ("ByteStorage", 16),
        ("DoubleStorage", 2),
        ("ByteStorage", 4),
        ("UntypedStorage", 16),
    ):
        yield attack(f"{cls} {numel}", beside(w(cls=cls, numel=numel, size=[numel])), PROGRAM, TABLE)
    for numel in (2, 8):
        yield attack(f"count {numel}", beside(w(numel=numel, size=[2])), PROGRAM, TABLE)
    yield attack(
        "location",
        beside(w(location="cuda:0")),
        PROGRAM,
        RIGHT,
        holds={"w": NUMBERS, "x": NUMBERS},
    )


@trick
def dtype_wider_than_its_storage() -> Iterator[Attack]:
    """Version 3 has a dtype of its own on untyped bytes."""
    for dtype, size, offset in (
        ("float64", 4, 0),
        ("complex128", 2, 0),
        ("uint16", 9, 0),
        ("uint8", 17, 0),
        ("uint32", 4, 1),
    ):
        bent = {
            "cls": "UntypedStorage",
            "numel": 16,
            "size": [size],
            "version": 3,
            "dtype": dtype,
            "storage_offset": offset,
            "key": "1",
        }
        yield attack((dtype, size, offset), checkpoint(program(w=w(), x=w(**bent)), **{"1": FOUR_FLOATS}), TABLE)
    for dtype in ("_dtype_of_nobody", "Tensor", "FloatStorage", "os"):
        bent = {"cls": "UntypedStorage", "numel": 16, "version": 3, "dtype": dtype, "key": "1"}
        yield attack(dtype, checkpoint(program(w=w(), x=w(**bent)), **{"1": FOUR_FLOATS}), PROGRAM, TABLE, UNSUPPORTED)


@trick
def storage_offset_in_other_units() -> Iterator[Attack]:
    """0x4000000000000001 elements of four bytes are four bytes, in arithmetic that wraps."""
    for offset in (0x4000000000000001, 0x2000000000000001, 0x7FFFFFFFFFFFFFFF):
        for cls in ("FloatStorage", "DoubleStorage", "HalfStorage", "ComplexDoubleStorage"):
            bent = {"cls": cls, "numel": 1, "key": "1", "size": [1], "storage_offset": offset}
            yield attack((cls, offset), checkpoint(program(w=w(), x=w(**bent)), **{"1": bytes(16)}), TABLE, PROGRAM)


@trick
def bits_that_do_not_fit() -> Iterator[Attack]:
    """Conjugate and negative bits are for complex numbers, requires_grad for real ones."""
    for tag, bent in (
        ("conj of floats", {"metadata": {"conj": True}}),
        ("neg of floats", {"metadata": {"neg": True}}),
        ("unknown", {"metadata": {"evil": True}}),
        ("requires_grad of integers", {"cls": "IntStorage", "key": "1", "requires_grad": True}),
        ("conj of integers", {"cls": "IntStorage", "key": "1", "metadata": {"conj": True}}),
    ):
        data = checkpoint(program(w=w(), x=w(**bent)), **{"1": bytes(16)})
        x = [-1.0, -2.0, -3.0, -4.0] if tag == "neg of floats" else NUMBERS
        yield attack(tag, data, RIGHT, PROGRAM, TABLE, holds={"w": NUMBERS, "x": x})


@trick
def view_of_terabytes() -> Iterator[Attack]:
    """Four bytes of which 2**40 elements are made: may be described, and must not be written out."""
    for size in (1 << 40, (1 << 62) - 1):
        yield attack(size, checkpoint(program(x=w(size=[size], stride=[0]))), DESCRIBED)
    yield attack("overlapping rows", checkpoint(program(x=w(size=[1 << 40, 4], stride=[0, 1]))), DESCRIBED)


@trick
def many_views_of_one_storage() -> Iterator[Attack]:
    """100,000 tensors of four floats each: a storage is read once."""
    one = Pickle()
    w()(one)
    body = Pickle().raw(b"}(")
    for i in range(3000):
        body.text(f"w{i}")
        w()(body)
    yield attack("", checkpoint(body.raw(b"u").stop()), RIGHT, holds={f"w{i}": NUMBERS for i in range(3000)})


@trick
def location_is_hostile() -> Iterator[Attack]:
    """A label: nothing is looked up by it, and no device is asked."""
    for location in ("cuda:99", "meta", "../../x", "os.system", "\x1b[2J", "", "x" * 100_000, "hpu:0", "\ud800"):
        yield attack(
            location[:12].encode("utf-8", "backslashreplace"),
            checkpoint(program(w=w(location=location))),
            RIGHT,
            PROGRAM,
        )


@trick
def parameter_of_nonsense() -> Iterator[Attack]:
    """A parameter of what is no tensor, and one whose state would shadow its methods."""
    for tag, body in (
        ("None", b"(N\x88}tR"),
        ("call", b"(cos\nmkdir\n)R\x88}tR"),
        ("nothing", b")R"),
        ("numbers", b"(K\1K\2K\3tR"),
    ):
        call = b"ctorch._utils\n_rebuild_parameter\n" + body
        yield attack(tag, beside(raw(call)), RIGHT, TABLE)

    def shadowing(pickle: Pickle) -> object:
        pickle.name("torch._utils", "_rebuild_parameter_with_state").mark()
        w()(pickle)
        pickle.boolean(True).ordered_dict().raw(b"}").text("numel").name("os", "system").raw(b"s")
        return pickle.raw(b"tR")

    yield attack("state", beside(shadowing), RIGHT, PROGRAM, holds={"w": NUMBERS, "x": NUMBERS})


@trick
def type_of_nonsense() -> Iterator[Attack]:
    """_rebuild_from_type_v2 calls a function on arguments, and sets attributes on what comes."""

    def typed(
        function: tuple[str, str], cls: tuple[str, str], arguments: Callable[[Pickle], object]
    ) -> Callable[[Pickle], object]:
        def write(pickle: Pickle) -> object:
            pickle.name("torch._tensor", "_rebuild_from_type_v2").mark().name(*function).name(*cls)
            arguments(pickle)
            return pickle.raw(b"}").text("__class__").text("os").raw(b"stR")

        return write

    def right(pickle: Pickle) -> object:
        pickle.mark().storage("FloatStorage", "0", 4).integer(0).integers([4]).integers([1]).boolean(False)
        return pickle.ordered_dict().raw(b"t")

    def pwned(pickle: Pickle) -> object:
        return pickle.text(PWNED).raw(b"\x85")

    rebuild = ("torch._utils", "_rebuild_tensor_v2")
    yield attack("system", beside(typed(("os", "mkdir"), ("torch", "Tensor"), pwned)), RIGHT)
    yield attack("eval", beside(typed(("builtins", "eval"), ("builtins", "object"), pwned)), RIGHT)
    holds = {"w": NUMBERS, "x": NUMBERS}
    yield attack("class", beside(typed(rebuild, ("os", "_wrap_close"), right)), RIGHT, holds=holds)
    yield attack("arguments", beside(typed(rebuild, ("torch", "Tensor"), pwned)), PROGRAM)


def coo(indices: tuple[int, ...], shape: tuple[int, ...], nnz: int = 2, dims: int = 1) -> bytes:
    """A sparse COO tensor of floats, whose indices are these numbers."""

    def write(pickle: Pickle) -> object:
        pickle.name("torch._utils", "_rebuild_sparse_tensor").mark()
        pickle.call("torch.serialization", "_get_layout", lambda p: p.text("torch.sparse_coo")).mark()
        pickle.tensor("LongStorage", "1", len(indices), size=[dims, nnz], stride=[nnz, 1])
        pickle.tensor("FloatStorage", "0", 4, size=[nnz], stride=[1])
        pickle.call("torch", "Size", lambda p: p.integers(shape))
        return pickle.boolean(True).raw(b"ttR")

    return checkpoint(program(w=w(), x=write), **{"1": struct.pack(f"<{len(indices)}q", *indices)})


@trick
def sparse_index_outside() -> Iterator[Attack]:
    """pytorch#184750: to_dense() writes where the index says."""
    for indices, shape in (
        ((0, 9), (3,)),
        ((0, -1), (3,)),
        ((0, 1 << 40), (3,)),
        ((0, -(1 << 63)), (3,)),
        ((0, 3), (3,)),
        ((0, 1), (0,)),
    ):
        yield attack((indices, shape), coo(indices, shape), RIGHT, TABLE)
    yield attack("shape beyond", coo((0, 1), (1 << 62, 1 << 62)), RIGHT, TABLE, PROGRAM)
    yield attack("shape negative", coo((0, 1), (-3,)), RIGHT, TABLE, PROGRAM)
    yield attack("dims", coo((0, 1), (3, 3)), RIGHT, TABLE, PROGRAM)
    yield attack("values short", coo((0, 1, 2, 0, 1, 2), (3,), nnz=6), RIGHT, TABLE, PROGRAM)


def csr(crow: tuple[int, ...], col: tuple[int, ...], shape: tuple[int, ...]) -> bytes:
    def write(pickle: Pickle) -> object:
        pickle.name("torch._utils", "_rebuild_sparse_tensor").mark()
        pickle.call("torch.serialization", "_get_layout", lambda p: p.text("torch.sparse_csr")).mark()
        pickle.tensor("LongStorage", "1", len(crow), size=[len(crow)], stride=[1])
        pickle.tensor("LongStorage", "2", len(col), size=[len(col)], stride=[1])
        pickle.tensor("FloatStorage", "0", 4, size=[len(col)], stride=[1])
        pickle.call("torch", "Size", lambda p: p.integers(shape))
        return pickle.raw(b"ttR")

    return checkpoint(
        program(w=w(), x=write), **{"1": struct.pack(f"<{len(crow)}q", *crow), "2": struct.pack(f"<{len(col)}q", *col)}
    )


@trick
def sparse_rows_lie() -> Iterator[Attack]:
    """torch 2.13 hands out crow = [5, -5], and to_dense() dies of it."""
    for crow, col in (
        ((5, -5), (0, 1)),
        ((0, 2, 1), (0, 1)),
        ((0, 1, 9), (0, 1)),
        ((1, 1, 2), (0, 1)),
        ((0, 1, 2), (0, 7)),
        ((0, 1, 2), (0, -1)),
        ((0, 1), (0, 1)),
        ((0, 2, 2), (1, 1)),
        ((0, 1 << 62, 2), (0, 1)),
    ):
        yield attack((crow, col), csr(crow, col, (2, 2)), RIGHT, TABLE, PROGRAM)


def quantized(sizes: tuple[int, ...], strides: tuple[int, ...], quantizer: bytes) -> bytes:
    def write(pickle: Pickle) -> object:
        pickle.name("torch._utils", "_rebuild_qtensor").mark().storage("QInt8Storage", "1", 16).integer(0)
        pickle.integers(sizes).integers(strides).raw(quantizer).boolean(False)
        return pickle.ordered_dict().raw(b"tR")

    return checkpoint(program(w=w(), x=write), **{"1": bytes(range(16))})


@trick
def quantizer_is_hostile() -> Iterator[Attack]:
    """pytorch#184652: the strides of a quantized tensor were not checked."""
    affine = b"(ctorch\nper_tensor_affine\nG" + struct.pack(">d", 0.5) + b"K\0t"
    for tag, sizes, strides, quantizer in (
        ("sizes", (17,), (1,), affine),
        ("strides", (4, 4), (100, 1), affine),
        ("wraps", (1 << 62, 4), (4, 1), affine),
        ("nothing", (4, 4), (4, 1), b")"),
        ("None", (4, 4), (4, 1), b"N"),
        ("scheme", (4, 4), (4, 1), b"(cos\nsystem\nK\1K\0t"),
        ("scale text", (4, 4), (4, 1), b"(ctorch\nper_tensor_affine\nU\1aK\0t"),
        (
            "zero point",
            (4, 4),
            (4, 1),
            b"(ctorch\nper_tensor_affine\nG" + struct.pack(">d", 0.5) + b"\x8a\x09" + b"\x7f" * 9 + b"t",
        ),
        ("channel without tensors", (4, 4), (4, 1), b"(ctorch\nper_channel_affine\nNNK\0t"),
    ):
        yield attack(tag, quantized(sizes, strides, quantizer), RIGHT, TABLE, PROGRAM, UNSUPPORTED)


@trick
def quantizer_by_channel_is_hostile() -> Iterator[Attack]:
    def scheme(scales: int, zeros: int, axis: int) -> bytes:
        pickle = Pickle().mark().name("torch", "per_channel_affine")
        pickle.tensor("DoubleStorage", "2", 8, size=[scales], stride=[1])
        pickle.tensor("LongStorage", "3", 8, size=[zeros], stride=[1]).integer(axis)
        return pickle.raw(b"t").body()

    for scales, zeros, axis in ((4, 4, 2), (4, 4, -1), (4, 4, 1 << 40), (3, 4, 0), (4, 3, 0), (8, 8, 0), (0, 0, 0)):
        pickle = Pickle().raw(b"}(").text("w")
        w()(pickle)
        pickle.text("x").name("torch._utils", "_rebuild_qtensor").mark().storage("QInt8Storage", "1", 16).integer(0)
        pickle.integers((4, 4)).integers((4, 1)).raw(scheme(scales, zeros, axis)).boolean(False).ordered_dict().raw(
            b"tRu"
        )
        storages = {"1": bytes(16), "2": struct.pack("<8d", *[1.0] * 8), "3": bytes(64)}
        yield attack((scales, zeros, axis), checkpoint(pickle.stop(), **storages), RIGHT, TABLE, PROGRAM, UNSUPPORTED)


@trick
def nested_tensor_outside() -> Iterator[Attack]:
    """pytorch#147356: views outside of the buffer."""

    def nested(sizes: tuple[int, ...], strides: tuple[int, ...], offsets: tuple[int, ...]) -> bytes:
        pickle = Pickle().raw(b"}(").text("w")
        w()(pickle)
        pickle.text("x").name("torch._utils", "_rebuild_nested_tensor").mark()
        w()(pickle)
        pickle.tensor("LongStorage", "1", 2, size=[2, 1], stride=[1, 1])
        pickle.tensor("LongStorage", "2", 2, size=[2, 1], stride=[1, 1])
        pickle.tensor("LongStorage", "3", 2, size=[2], stride=[1]).raw(b"tRu")
        rows = (sizes, strides, offsets)
        return checkpoint(pickle.stop(), **{str(i + 1): struct.pack("<2q", *row) for i, row in enumerate(rows)})

    for sizes, strides, offsets in (
        ((2, 9), (1, 1), (0, 2)),
        ((2, 2), (1, 1), (0, 9)),
        ((2, 2), (1, 9), (0, 2)),
        ((2, -2), (1, 1), (0, 2)),
        ((2, 2), (1, -1), (0, 2)),
        ((2, 2), (1, 1), (0, -2)),
        ((2, 1 << 62), (1, 1 << 62), (0, 0)),
    ):
        yield attack((sizes, strides, offsets), nested(sizes, strides, offsets), RIGHT, TABLE, PROGRAM, UNSUPPORTED)


@trick
def meta_tensor_is_hostile() -> Iterator[Attack]:
    for tag, sizes in (
        ("large", b"\x8a\x06" + b"\0\0\0\0\0\1\x85"),
        ("negative", b"J\xff\xff\xff\xff\x85"),
        ("text", b"U\1a\x85"),
    ):
        body = b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n(ctorch\nfloat32\n" + sizes + b"K\1\x85\x89tR"
        yield attack(tag, beside(raw(body)), RIGHT, DESCRIBED, TABLE, PROGRAM, holds={"w": NUMBERS})


def array(shape: bytes, dtype: bytes, data: bytes, version: bytes = b"K\1") -> bytes:
    """A NumPy array as NumPy pickles it: _reconstruct, and its state by BUILD."""
    body = b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85C\1btR("
    body += version + shape + dtype + b"\x89" + b"B" + struct.pack("<I", len(data)) + data + b"tb"
    return beside(lambda pickle: pickle.raw(body))


def dtype_of(code: str, size: bytes = b"J\xff\xff\xff\xff") -> bytes:
    named = b"cnumpy\ndtype\n(X" + struct.pack("<I", len(code)) + code.encode() + b"\x89\x88tR"
    return named + b"(K\3U\1<NNN" + size + b"J\xff\xff\xff\xffK\0tb"


@trick
def numpy_array_is_hostile() -> Iterator[Attack]:
    """An object array of eight bytes is a pointer of the file's choice."""
    f8, four = dtype_of("f8"), struct.pack("<4d", *range(4))
    for tag, shape, dtype, data in (
        ("objects", b"K\4\x85", dtype_of("O8"), b"\x41" * 32),
        ("void", b"K\4\x85", dtype_of("V1000000000"), b"\x41" * 32),
        ("short", b"K\5\x85", f8, four),
        ("long", b"K\3\x85", f8, four),
        ("wraps", b"(\x8a\x08\0\0\0\0\0\0\0\x40K\4t", f8, four),
        ("negative", b"J\xff\xff\xff\xff\x85", f8, four),
        ("text for a shape", b"U\1a", f8, four),
        ("code", b"K\4\x85", dtype_of("os.system"), four),
        ("structured", b"K\4\x85", dtype_of("f8,O8"), four),
        ("no dtype", b"K\4\x85", b"N", four),
        ("many dimensions", b"(" + b"K\1" * 100 + b"t", f8, four[:8]),
        ("text of a million", b"K\1\x85", dtype_of("U1000000"), four),
    ):
        yield attack(tag, array(shape, dtype, data), RIGHT, PROGRAM, UNSUPPORTED)


@trick
def numpy_scalar_is_hostile() -> Iterator[Attack]:
    for tag, dtype, data in (
        ("object", dtype_of("O8"), b"\x41" * 8),
        ("short", dtype_of("f8"), b"\x41" * 7),
        ("long", dtype_of("f8"), b"\x41" * 9),
        ("empty", dtype_of("f8"), b""),
        ("dtype of text", b"U\2f8", b"\x41" * 8),
    ):
        body = b"cnumpy._core.multiarray\nscalar\n(" + dtype + b"C" + bytes([len(data)]) + data + b"tR"
        yield attack(tag, beside(raw(body)), RIGHT, PROGRAM, UNSUPPORTED)


@trick
def storage_called() -> Iterator[Attack]:
    """A storage class called with a size would take that memory."""
    for module, name in (
        ("torch", "FloatStorage"),
        ("torch.storage", "UntypedStorage"),
        ("torch", "FloatTensor"),
        ("torch", "zeros"),
        ("torch.storage", "TypedStorage"),
    ):
        body = Pickle().call(module, name, lambda pickle: pickle.integer(1 << 40)).body()
        yield attack(f"{module}.{name}", beside(raw(body)), RIGHT, PROGRAM)


@trick
def storage_as_the_root() -> Iterator[Attack]:
    """A storage, and nothing around it: the bytes of its record, or the error of a tensor."""
    yield attack("alone", checkpoint(Pickle().storage("FloatStorage", "0", 4).stop()), RIGHT, holds={})
    yield attack("short", checkpoint(Pickle().storage("FloatStorage", "0", 5).stop()), TABLE, INERT)


@trick
def optimizer_of_integers() -> Iterator[Attack]:
    """Keys that are numbers name tensors too, beyond 64 bits as well as below zero."""
    for tag, key in (
        ("zero", b"K\0"),
        ("negative", b"J\xff\xff\xff\xff"),
        ("large", b"\x8a\x08" + b"\xff" * 7 + b"\x7f"),
        ("None", b"N"),
        ("true", b"\x88"),
    ):
        pickle = Pickle().raw(b"}" + key)
        w()(pickle)
        yield attack(tag, checkpoint(pickle.raw(b"s").stop()), RIGHT, INERT, PROGRAM, holds={})
