"""Strategies: pickles and archives as no writer would make them, of which about a third is bad on purpose.

A program is built from values: a value is the bytes that push it on the stack. Sound ones mean something, all of them;
wild ones are drawn without a thought for meaning (memo slots that were never written, lists as keys, strange states),
which is where two implementations are most likely to part. `damaged` then spoils bytes anywhere.
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


def rarely(times: int) -> st.SearchStrategy[bool]:
    """True once in so many times. Integers and one_of would lean to their ends, and merge what is equal."""
    return st.sampled_from([False] * (times - 1) + [True])


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
        lambda: piece(lambda p: p.storage("ByteStorage", draw(INTEGERS), draw(SMALL), short)),
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

    def one() -> bytes:
        return bytes(draw(values))

    def all_of() -> bytes:
        return b"".join(draw(st.lists(values, max_size=4)))

    def pairs() -> bytes:
        return b"".join(draw(atoms()) + part for part in draw(st.lists(values, max_size=4)))

    module, name = draw(st.sampled_from(NAMES))
    callee = piece(lambda p: p.name(module, name))
    slot = draw(SLOTS)
    written = (
        lambda: b"(" + all_of() + b"t",
        lambda: one() + b"\x85",
        lambda: one() + one() + b"\x86",
        lambda: one() + one() + one() + b"\x87",
        lambda: b"](" + all_of() + b"e",
        lambda: b"]" + one() + b"a",
        lambda: b"(" + all_of() + b"l",
        lambda: b"}(" + pairs() + b"u",
        lambda: b"}" + draw(atoms()) + one() + b"s",
        lambda: b"(" + pairs() + b"d",
        lambda: b"}" + one() + one() + b"s",
        lambda: b"\x8f(" + all_of() + b"\x90",
        lambda: b"(" + all_of() + b"\x91",
        lambda: callee + b"(" + all_of() + b"tR",
        lambda: callee + one() + b"R",
        lambda: callee + b"(" + all_of() + b"t\x81",
        lambda: callee + b")" + b"}(" + pairs() + b"u" + b"\x92",
        lambda: callee + b")R" + one() + b"b",
        lambda: callee + b")\x81(" + all_of() + b"e",
        lambda: callee + b")\x81(" + pairs() + b"u",
        lambda: piece(lambda p: p.ordered_dict()) + b"(" + pairs() + b"u" + b"}(" + pairs() + b"ub",
        lambda: piece(lambda p: p.name("collections", "OrderedDict")) + b"(](" + one() + one() + b"\x86etR",
        lambda: piece(lambda p: p.name("torch._tensor", "_rebuild_from_type_v2")) + b"(" + all_of() + b"tR",
        # A container that holds itself: memo first, then its own items.
        lambda: b"]" + piece(lambda p: p.put(slot)) + b"(" + all_of() + piece(lambda p: p.get(slot)) + b"e",
        lambda: b"}" + piece(lambda p: p.put(slot)) + b"(" + pairs() + b"K\1" + piece(lambda p: p.get(slot)) + b"u",
        lambda: one() + one() + b"0",
        lambda: one() + b"(" + all_of() + b"1",
        lambda: one() + b"2\x86",
        lambda: b"(" + all_of() + b"tQ",
        lambda: (
            one() + draw(st.sampled_from([b"R", b"b", b"s", b"a", b"t", b"e", b"u", b"Q", b"0", b"1", b"d", b"\x93"]))
        ),
    )
    return bytes(draw(st.sampled_from(written))())


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


@st.composite
def damaged(draw: Draw, contents: st.SearchStrategy[bytes]) -> bytes:
    """A third spoiled, the rest left as it was drawn."""
    content = draw(contents)
    return spoil(content, draw(MUTATIONS)) if draw(rarely(3)) else content


# The sound ones. Four values stand in the memo before the first of them is read.

SHARED = ([b"]", b"}", b"X\1\0\0\0s", b"K\1K\2\x86"], [0, 1, 255, 256])
PRELUDE = b"".join(
    value + piece(lambda p, slot=slot: p.put(slot)) + b"0"  # type: ignore[misc]
    for value, slot in zip(*SHARED, strict=True)
)
CALLABLES = (
    ("os", "system"),
    ("builtins", "set"),
    ("torch", "Size"),
    ("torch", "Tensor"),
    ("torch._utils", "_rebuild_parameter"),
    ("ünïcode", "näme.of.parts"),
)
CALLEES = st.sampled_from(CALLABLES).map(lambda names: piece(lambda p: p.name(*names)))
INT64S = st.one_of(st.integers(-2, 300), st.integers(-(1 << 63), (1 << 63) - 1))
WORDS = st.one_of(st.sampled_from(["", "a", "b"]), st.text(max_size=8))
ENCODED = WORDS.map(lambda text: text.encode("utf-8", "surrogatepass"))
SOUND_STORAGES = ("FloatStorage", "IntStorage", "ByteStorage", "ComplexFloatStorage", "UntypedStorage")


@st.composite
def keys(draw: Draw) -> bytes:
    """What can be a dict key."""
    word, number = draw(WORDS), draw(INT64S)
    written = (
        lambda: piece(lambda p: p.text(word)),
        lambda: piece(lambda p: p.integer(number)),
        lambda: sized(b"C", "<B", word.encode("utf-8", "surrogatepass")),
        lambda: piece(lambda p: p.real(draw(st.floats()))),
        lambda: piece(lambda p: p.text(word).integer(number).raw(b"\x86")),
        lambda: b"N",
        lambda: draw(CALLEES),
        lambda: draw(CALLEES) + b")R",
    )
    return bytes(draw(st.sampled_from(written))())


@st.composite
def sound_atoms(draw: Draw) -> bytes:
    encoded, number = draw(ENCODED), draw(st.one_of(INT64S, st.sampled_from([1 << 63, -(1 << 70), 1 << 500])))
    digits = number.to_bytes(number.bit_length() // 8 + draw(st.integers(1, 3)), "little", signed=True)
    cls = draw(st.sampled_from(SOUND_STORAGES))
    numel = draw(SMALL)
    written = (
        lambda: draw(st.sampled_from([b"N", b"\x88", b"\x89", b")", b"]", b"}", b"\x8f", b"I00\n", b"I01\n"])),
        lambda: draw(keys()),
        lambda: sized(b"\x8a", "<B", digits),
        lambda: sized(b"\x8b", "<i", digits),
        lambda: b"I%d\n" % number,
        lambda: b"L%dL\n" % number,
        lambda: sized(draw(st.sampled_from([b"\x8c", b"C", b"U"])), "<B", encoded),
        lambda: sized(draw(st.sampled_from([b"X", b"B"])), "<I", encoded),
        lambda: sized(draw(st.sampled_from([b"\x8d", b"\x8e", b"\x96"])), "<Q", encoded),
        lambda: sized(b"T", "<i", draw(st.binary(max_size=8))),
        lambda: piece(lambda p: p.get(draw(st.sampled_from(SHARED[1])))),
        lambda: piece(lambda p: p.storage(cls, f"{cls}{numel}", numel, draw(WORDS))),
        lambda: piece(lambda p: p.storage("ByteStorage", numel, numel, draw(WORDS))),
    )
    return bytes(draw(st.sampled_from(written))())


@st.composite
def sound_tensors(draw: Draw) -> bytes:
    """A tensor that lies in its storage, whose key tells class and size."""
    cls = draw(st.sampled_from(SOUND_STORAGES))
    version = draw(st.sampled_from([3] if cls == "UntypedStorage" else [1, 2, 2, 2]))
    dtype = draw(st.sampled_from(DTYPES))
    size = draw(st.lists(SMALL, max_size=3))
    stride = [draw(SMALL) for _ in size]
    offset = draw(SMALL)
    reach = offset + sum(max(n - 1, 0) * step for n, step in zip(size, stride, strict=True)) + 1
    numel = reach * 8 + draw(SMALL)
    is_complex = cls == "ComplexFloatStorage" or (version == 3 and dtype == "complex64")
    differentiable = is_complex or cls == "FloatStorage" or (version == 3 and dtype not in ("uint16", "int64"))
    bits = {"neg": draw(st.booleans()), **({"conj": draw(st.booleans())} if is_complex else {})}
    return piece(
        lambda p: p.tensor(
            cls,
            f"{cls}{numel}",
            numel,
            size=size,
            stride=stride,
            storage_offset=offset,
            version=version,
            dtype=dtype,
            requires_grad=differentiable and draw(st.booleans()),
            metadata=draw(st.sampled_from([None, bits])) if version > 1 else None,
        )
    )


@st.composite
def sound_composites(draw: Draw, values: st.SearchStrategy[bytes]) -> bytes:
    """A value with parts, each of a kind that may stand there."""

    def one() -> bytes:
        return bytes(draw(values))

    def all_of() -> bytes:
        return b"".join(draw(st.lists(values, max_size=4)))

    def pairs() -> bytes:
        return b"".join(draw(keys()) + part for part in draw(st.lists(values, max_size=4)))

    def typed() -> bytes:
        """A tensor with a class and attributes of its own: its function and arguments as values."""
        tensor = draw(sound_tensors())
        function = tensor.index(b"\n", tensor.index(b"\n") + 1) + 1
        return bytes(retyped + b"(" + tensor[:function] + callee + tensor[function:-1] + one() + b"tR")

    callee = draw(CALLEES)
    ordered = piece(lambda p: p.ordered_dict())
    retyped = piece(lambda p: p.name("torch._tensor", "_rebuild_from_type_v2"))
    written = (
        lambda: b"(" + all_of() + b"t",
        lambda: one() + b"\x85",
        lambda: one() + one() + b"\x86",
        lambda: one() + one() + one() + b"\x87",
        lambda: b"](" + all_of() + b"e",
        lambda: b"]" + one() + b"a",
        lambda: b"(" + all_of() + b"l",
        lambda: b"}(" + pairs() + b"u",
        lambda: b"}" + draw(keys()) + one() + b"s",
        lambda: b"(" + pairs() + b"d",
        lambda: b"\x8f(" + b"".join(draw(st.lists(keys(), max_size=4))) + b"\x90",
        lambda: b"(" + b"".join(draw(st.lists(keys(), max_size=4))) + b"\x91",
        lambda: callee + b"(" + all_of() + b"tR",
        lambda: callee + b"(" + all_of() + b"tR" + one() + b"b",
        lambda: callee + b"(" + all_of() + b"t\x81(" + pairs() + b"u",
        lambda: callee + b")}(" + pairs() + b"u\x92(" + all_of() + b"e" + one() + b"b",
        lambda: callee + b")R)R",
        lambda: ordered + b"(" + pairs() + b"u" + b"}(" + pairs() + b"ub",
        lambda: piece(lambda p: p.name("collections", "OrderedDict")) + b"(](](" + draw(keys()) + one() + b"eetR",
        typed,
        lambda: retyped + b"(" + callee + callee + one() + one() + b"tR",
        # Containers that hold themselves: in the memo before their own items.
        lambda: b"]r\0\1\1\0(" + all_of() + b"j\0\1\1\0e",
        lambda: b"}r\0\1\1\0(" + pairs() + b"K\1j\0\1\1\0u",
        lambda: b"(]r\0\1\1\0j\0\1\1\0\x85" + b"t",
        lambda: one() + one() + b"0",
        lambda: one() + b"(" + all_of() + b"1",
        lambda: one() + b"2\x86",
    )
    return bytes(draw(st.sampled_from(written))())


SOUND_VALUES = st.recursive(
    st.one_of(sound_atoms(), sound_tensors()).map(lambda value: value + b"\x94"),
    sound_composites,
    max_leaves=12,
)


@st.composite
def programs(draw: Draw) -> bytes:
    """A whole pickle: four in five sound, one wild."""
    if not draw(rarely(5)):
        body = draw(SOUND_VALUES)
        if draw(st.booleans()):
            body += draw(SOUND_VALUES) + b"\x86"
        body = draw(st.sampled_from([b"\x80\2", b"\x80\5"])) + PRELUDE + body + b"."
        return bytes(body)
    body = draw(VALUES)
    if draw(st.booleans()):
        body = b"(" + body + draw(VALUES) + b"t"
    if draw(rarely(10)):
        body = b"\x95" + struct.pack("<Q", len(body) + draw(st.integers(-1, 2))) + body
    head = draw(st.sampled_from([b"\x80\2", b"\x80\2", b"\x80\4", b"\x80\6", b""]))
    return bytes(head + body + draw(st.sampled_from([b".", b".", b".", b"", b".junk"])))


PIDS = {  # what a persistent id of an archive becomes in the other formats; b"tQ" ends each that is drawn
    1: (b"NtQ", b"NtQ", b"NtQ", b"(X\1\0\0\0vK\1K\2ttQ", b"(K\7K\0K\1ttQ", b"(X\1\0\0\0vK\0J\xff\xff\xff\xffttQ"),
    2: (b"t0K\7Q", b"t0X\1\0\0\0kQ", b"t0(ccollections\nOrderedDict\nNNtQ", b"tQ"),
}
MODULE = b"(X\6\0\0\0moduleca\nB\nNNtQ"


@st.composite
def programs_of(draw: Draw, dialect: int) -> bytes:
    """A program whose persistent ids are mostly those of a format: 0 archive, 1 stream, 2 tar."""
    parts = draw(programs()).split(b"tQ")
    program = parts[0]
    for part in parts[1:]:
        program += (draw(st.sampled_from(PIDS[dialect])) if dialect else b"tQ") + part
    if dialect == 1 and draw(rarely(4)):
        program = program[:2] + MODULE + b"0" + program[2:]
    return bytes(program)


OPCODES = st.one_of(
    st.sampled_from([bytes([byte]) for byte in b"0(.)12NQR]}abdelstu\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94"]),
    atoms(),
    st.binary(min_size=1, max_size=1),
)
OPCODE_SOUP = st.lists(OPCODES, max_size=30).map(b"".join)

FULL = (1000, 64, 1 << 16, 1 << 16, 4096)


@st.composite
def machine_limits(draw: Draw) -> tuple[Any, ...]:
    """Mostly the usual ones, else some that a small program passes."""
    small = st.tuples(st.integers(0, 6), st.integers(0, 3), st.integers(0, 24), st.integers(0, 8), st.integers(0, 2))
    return (*(draw(small) if draw(rarely(6)) else FULL), draw(rarely(10)), draw(st.sampled_from([0, 0, 1, 2])))


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
    odd = spoiled and draw(rarely(3))
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
        if odd and draw(rarely(10)):
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
    if spoiled and draw(rarely(4)):
        mutations = draw(MUTATIONS)
        split = draw(st.sampled_from([0, written.directory_offset, written.end_offset]))
        data = data[:split] + spoil(data[split:], mutations)
    return Drawn(data, written)
