"""Strategies: pickles and archives as no writer would make them, of which about a third is bad on purpose.

A program is built from values, so that most of it means something: a value is the bytes that push it on the stack. What
is drawn without a thought for meaning (memo slots that were never written, tuples as keys, strange states) is what two
implementations are most likely to see differently. `damaged` then spoils bytes anywhere.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from typing import Any

import makers
from hypothesis import strategies as st
from makers import Pickle, Written, Zip

Draw = Callable[[st.SearchStrategy[Any]], Any]

# --- pickles ----------------------------------------------------------------------------------------------------------

STORAGES = ("FloatStorage", "IntStorage", "ByteStorage", "ComplexFloatStorage", "BoolStorage", "UntypedStorage")
DTYPES = ("float32", "uint16", "complex64", "float8_e4m3fn", "int64")
NAMES = (
    *(("torch", storage) for storage in STORAGES[:-1]),
    *(("torch", dtype) for dtype in DTYPES),
    ("torch.storage", "UntypedStorage"),
    ("torch.cuda", "FloatStorage"),
    ("torch", "Size"),
    ("torch", "Tensor"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch._tensor", "_rebuild_from_type_v2"),
    ("collections", "OrderedDict"),
    ("builtins", "set"),
    ("__builtin__", "set"),
    ("os", "system"),
    ("ünïcode", "näme.of.parts"),
    ("", ""),
)

INTEGERS = st.one_of(
    st.integers(-2, 6),
    st.sampled_from([255, 256, 65535, 65536, (1 << 31) - 1, 1 << 31, -(1 << 31), 1 << 32, (1 << 62), (1 << 63) - 1]),
    st.sampled_from([1 << 63, -(1 << 63), -(1 << 63) - 1, 1 << 64, -(1 << 70), 1 << 500]),
)
SMALL = st.integers(0, 4)
TEXTS = st.one_of(st.sampled_from(["", "a", "storage", "cpu", "0", "conj"]), st.text(max_size=8))
RAW = st.one_of(st.binary(max_size=8), TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")))
SLOTS = st.sampled_from([0, 1, 2, 3, 255, 256, (1 << 31) - 1, (1 << 32) - 1])


def piece(write: Callable[[Pickle], Any]) -> bytes:
    """What a method of the assembler writes."""
    pickle = Pickle()
    write(pickle)
    return pickle.body()


def sized(opcode: bytes, width: str, content: bytes) -> bytes:
    return opcode + struct.pack(width, len(content)) + content


def text_integers(draw: Draw) -> bytes:
    digits = draw(
        st.sampled_from([b"00", b"01", b"0", b"-7", b"123456789012345678901", b"", b"x", b"+1", b" 1", b"1_0"])
    )
    return bytes(draw(st.sampled_from([b"I" + digits, b"L" + digits, b"L" + digits + b"L"])) + b"\n")


@st.composite
def atoms(draw: Draw) -> bytes:
    """A value without parts."""
    raw, integer, text = draw(RAW), draw(INTEGERS), draw(TEXTS)
    module, name = draw(st.sampled_from(NAMES))
    digits = integer.to_bytes(integer.bit_length() // 8 + draw(st.integers(1, 3)), "little", signed=True)
    short = text[:8]
    written: list[Callable[[], bytes]] = [
        lambda: draw(st.sampled_from([b"N", b"\x88", b"\x89", b")", b"]", b"}", b"\x8f"])),
        lambda: piece(lambda p: p.integer(integer)) if integer.bit_length() < 2000 else b"N",
        lambda: sized(b"\x8a", "<B", digits),
        lambda: sized(b"\x8b", "<i", digits),
        lambda: text_integers(draw),
        lambda: piece(lambda p: p.real(draw(st.floats()))),
        lambda: piece(lambda p: p.text(text)),
        lambda: sized(b"X", "<I", raw),
        lambda: sized(b"\x8c", "<B", raw),
        lambda: sized(b"\x8d", "<Q", raw),
        lambda: sized(b"C", "<B", raw),
        lambda: sized(b"B", "<I", raw),
        lambda: sized(b"\x8e", "<Q", raw),
        lambda: sized(b"\x96", "<Q", raw),
        lambda: sized(b"U", "<B", raw),
        lambda: sized(b"T", "<i", raw),
        lambda: piece(lambda p: p.name(module, name)),
        lambda: piece(lambda p: p.text(module).text(name).raw(b"\x93")),
        lambda: piece(lambda p: p.get(draw(SLOTS))),
        lambda: b"g%d\n" % draw(SLOTS),
        lambda: piece(lambda p: p.storage(draw(st.sampled_from(STORAGES)), short, draw(SMALL), draw(TEXTS))),
        lambda: piece(lambda p: p.ordered_dict()),
    ]
    return bytes(draw(st.sampled_from(written))())


@st.composite
def tensors(draw: Draw) -> bytes:
    """A rebuild call. Half of them lie in their storage by construction; the others take any numbers."""
    fits = draw(st.booleans())
    numbers = SMALL if fits else INTEGERS
    size = draw(st.lists(numbers, max_size=3))
    stride = [draw(numbers) for _ in size]
    offset = draw(numbers)
    reach = offset + sum(max(n - 1, 0) * step for n, step in zip(size, stride, strict=True)) + 1
    numel = reach * 8 if fits else draw(INTEGERS)
    version = draw(st.sampled_from([1, 2, 2, 2, 3]))
    return piece(
        lambda p: p.tensor(
            "UntypedStorage" if version == 3 and draw(st.booleans()) else draw(st.sampled_from(STORAGES)),
            # A key of its own for each size, or one for many: both happen.
            draw(st.sampled_from(["0", f"{numel}"])),
            numel,
            size=size,
            stride=stride,
            storage_offset=offset,
            version=version,
            dtype=draw(st.sampled_from(DTYPES)),
            requires_grad=draw(st.booleans()),
            metadata=draw(st.one_of(st.none(), st.dictionaries(st.sampled_from(["conj", "neg", "x"]), st.booleans()))),
        )
    )


@st.composite
def composites(draw: Draw, values: st.SearchStrategy[bytes]) -> bytes:
    """A value with parts."""
    parts = draw(st.lists(values, max_size=4))
    first, second, third = (draw(values) for _ in range(3))
    all_of = b"".join(parts)
    pairs = b"".join(draw(atoms()) + part for part in parts)
    module, name = draw(st.sampled_from(NAMES))
    callee = piece(lambda p: p.name(module, name))
    slot = draw(SLOTS)
    written = (
        b"(" + all_of + b"t",
        first + b"\x85",
        first + second + b"\x86",
        first + second + third + b"\x87",
        b"](" + all_of + b"e",
        b"]" + first + b"a",
        b"(" + all_of + b"l",
        b"}(" + pairs + b"u",
        b"}" + draw(atoms()) + second + b"s",
        b"(" + pairs + b"d",
        b"}" + first + second + b"s",
        b"\x8f(" + all_of + b"\x90",
        b"(" + all_of + b"\x91",
        callee + b"(" + all_of + b"tR",
        callee + first + b"R",
        callee + b"(" + all_of + b"t\x81",
        callee + b")" + b"}(" + pairs + b"u" + b"\x92",
        callee + b")R" + first + b"b",
        callee + b")\x81(" + all_of + b"e",
        callee + b")\x81(" + pairs + b"u",
        piece(lambda p: p.ordered_dict()) + b"(" + pairs + b"u" + b"}(" + pairs + b"ub",
        piece(lambda p: p.name("collections", "OrderedDict")) + b"(](" + first + second + b"\x86etR",
        piece(lambda p: p.name("torch._tensor", "_rebuild_from_type_v2")) + b"(" + all_of + b"tR",
        # A container that holds itself: memo first, then its own items.
        b"]" + piece(lambda p: p.put(slot)) + b"(" + all_of + piece(lambda p: p.get(slot)) + b"e",
        b"}" + piece(lambda p: p.put(slot)) + b"(" + pairs + b"K\1" + piece(lambda p: p.get(slot)) + b"u",
        first + second + b"0",
        first + b"(" + all_of + b"1",
        first + b"2\x86",
        b"(" + all_of + b"tQ",
        first + draw(st.sampled_from([b"R", b"b", b"s", b"a", b"t", b"e", b"u", b"Q", b"0", b"1", b"d", b"\x93"])),
    )
    return bytes(draw(st.sampled_from(written)))


@st.composite
def remembered(draw: Draw, values: st.SearchStrategy[bytes]) -> bytes:
    """A value, perhaps put into the memo."""
    value = draw(values)
    slot = draw(SLOTS)
    puts = (b"", b"", piece(lambda p: p.put(slot)), b"\x94", b"p%d\n" % slot)
    return bytes(value + draw(st.sampled_from(puts)))


VALUES = st.recursive(
    remembered(st.one_of(atoms(), tensors())), lambda values: remembered(composites(values)), max_leaves=12
)

MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "cut", "insert", "copy", "wide", "end"]), st.integers(0), st.integers(0, 255)
    ),
    min_size=1,
    max_size=3,
)
WIDE = (
    b"\xff\xff\xff\xff",
    b"\xff" * 8,
    b"\0\0\0\x80",
    b"\xff\xff\xff\x7f",
    b"\xff" * 7 + b"\x7f",
    b"\0" * 7 + b"\x80",
)


def spoil(content: bytes, mutations: list[tuple[str, int, int]]) -> bytes:
    """Apply the mutations in turn."""
    made = bytearray(content)
    for how, where, value in mutations:
        at = where % (len(made) + 1)
        if how == "flip" and at < len(made):
            made[at] ^= 1 << value % 8
        elif how == "set" and at < len(made):
            made[at] = value
        elif how == "cut":
            del made[at : at + value % 16 + 1]
        elif how == "insert":
            made[at:at] = bytes([value])
        elif how == "copy":
            made[at:at] = made[value : value + 8]
        elif how == "wide":
            wide = WIDE[value % len(WIDE)]
            made[at : at + len(wide)] = wide
        elif how == "end":
            del made[at:]
    return bytes(made)


def damaged(contents: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """A third spoiled, the rest left as it was drawn."""
    whole = st.one_of(contents, contents)
    return st.one_of(whole, whole, st.builds(spoil, contents, MUTATIONS))


@st.composite
def programs(draw: Draw) -> bytes:
    """A whole pickle."""
    head = draw(st.sampled_from([b"\x80\2", b"\x80\2", b"\x80\4", b"\x80\6", b""]))
    body = draw(VALUES)
    if draw(st.booleans()):
        body = b"(" + body + draw(VALUES) + b"t"
    if draw(st.integers(0, 9)) == 0:
        body = b"\x95" + struct.pack("<Q", len(body) + draw(st.integers(-1, 2))) + body
    return bytes(head + body + draw(st.sampled_from([b".", b".", b".", b"", b".junk"])))


OPCODES = st.one_of(
    st.sampled_from([bytes([byte]) for byte in b"0(.)12NQR]}abdelstu\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94"]),
    atoms(),
    st.binary(min_size=1, max_size=1),
)
OPCODE_SOUP = st.lists(OPCODES, max_size=30).map(b"".join)

LIMITS = st.one_of(
    st.just((1000, 64, 1 << 16, 1 << 16, 4096)),
    st.tuples(st.integers(0, 6), st.integers(0, 3), st.integers(0, 24), st.integers(0, 8), st.integers(0, 2)),
).flatmap(lambda limits: st.booleans().map(lambda refuse: (*limits, refuse)))


# --- archives ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Drawn:
    """An archive that was drawn: its bytes, perhaps spoiled, and what was written before that."""

    data: bytes
    written: Written


RECORD_NAMES = ("data.pkl", "data/0", "data/1", "data/2", "byteorder", "version", "Data/0", "dätä", "data/", "")
EXTRAS = st.one_of(
    st.just(b""),
    st.just(b""),
    st.integers(0, 70).map(makers.torch_padding),
    st.builds(makers.extra_field, st.sampled_from([1, 0x5455, 0xFFFF]), st.binary(max_size=28)),
    st.binary(max_size=5),
)
FIELD_VALUES = st.sampled_from([0, 1, 7, 8, 12, 0x800, 0xFFFE, 0xFFFF])


def bends(layout: makers.Layout) -> st.SearchStrategy[dict[str, Any]]:
    """Mostly nothing; now and then one field of a header has another value."""
    fields = [name for name in layout.fields if name != "signature"]
    bent = st.dictionaries(st.sampled_from(fields), FIELD_VALUES, min_size=1, max_size=2)
    return st.one_of(*[st.just({})] * 14, bent, st.just({"signature": b"PK\0\0"}))


@st.composite
def archives(draw: Draw, spoiled: bool = True) -> Drawn:
    """An archive by the writer of makers.py; each kind of oddity is rare, so that most archives are right."""
    odd = draw(st.integers(0, 2)) == 0 if spoiled else False
    prefix = draw(
        st.sampled_from(["archive/", "archive/", "a b.c/", "é/", "x/y/", "", "/", "./"] if odd else ["archive/", "é/"])
    )
    names = draw(st.lists(st.sampled_from(RECORD_NAMES), min_size=0 if odd else 1, max_size=6, unique=not odd))
    archive = Zip(before=draw(st.binary(max_size=3)) if odd else b"")
    for name in names:
        data = draw(st.binary(max_size=40)) * draw(st.sampled_from([0, 1, 1, 1, 200]))
        method = draw(st.sampled_from([0, 0, 0, 8, *([12, 99] if odd else [])]))
        keywords: dict[str, Any] = {}
        if odd:
            keywords = {
                "flags": draw(st.sampled_from([0, 0, 0, 1, 8, 0x800, 0x2000])),
                "central_extra": draw(EXTRAS),
                "comment": draw(st.sampled_from([b"", b"", b"note"])),
                "local": draw(bends(makers.LOCAL)),
                "central": draw(bends(makers.CENTRAL)),
                "local_name": draw(st.sampled_from([None] * 8 + [b"archive/data/0", b"x"])),
            }
        archive.add(
            draw(st.sampled_from([prefix] * 12 + ["other/"])) + name if odd else prefix + name,
            data,
            method=method,
            descriptor=draw(st.sampled_from([0, 0, 12, 16, 16, 24])),
            zip64=draw(st.sampled_from([False, False, False, True])),
            local_extra=draw(EXTRAS),
            **keywords,
        )
        if odd and draw(st.integers(0, 9)) == 0:
            archive.raw(draw(st.binary(max_size=20)))
    ends: dict[str, Any] = {}
    if odd:
        ends = {
            "tail": draw(st.sampled_from([b"", b"", b"\0" * 40, b"PK\5\6", b"PK\5\6" + bytes(18)])),
            "end": draw(bends(makers.END)),
            "end64": draw(bends(makers.END64)),
            "locator": draw(bends(makers.LOCATOR)),
        }
    written = archive.finish(
        comment=draw(st.sampled_from([b"", b"", b"", b"note", b"PK\5\6"])),
        zip64=draw(st.booleans()),
        order=draw(st.permutations(range(len(names)))),
        **ends,
    )
    data = written.data
    if spoiled and draw(st.integers(0, 3)) == 0:
        mutations = draw(MUTATIONS)
        split = draw(st.sampled_from([0, written.directory_offset, written.end_offset]))
        data = data[:split] + spoil(data[split:], mutations)
    return Drawn(data, written)
