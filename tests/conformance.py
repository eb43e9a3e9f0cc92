"""Conformance: what torch.save can write, what others make of it, and what nobody should; each with what must come out.

A case is a function of a folder. It returns `Loads`, a file beside the very objects that must come out of it, or
`Refused`, a file for which `REFUSALS` names the error, the moment and the byte. What is expected is computed from the
objects in memory, never by a loader. The numbers are those of docs/format.md; `LATER` says which are not here yet.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import datetime as dt
import enum
import functools
import io
import json
import math
import pathlib
import struct
import sys
import types
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import makers
import torch
from makers import Pickle, Zip

from zipslicer.errors import ArchiveError, ProgramError, TableError, UnsupportedError, ZipSlicerError
from zipslicer.table import dotted

LATER: Mapping[str, str] = {}

TRAP = "zipslicer_trap"  # a module that files name and nobody may import; the tests lay out one that tells
PWNED = "ZS_PWNED"  # the folder that hostile files try to make


@dataclasses.dataclass(frozen=True)
class Loads:
    """A file that must load.

    Attributes:
        file: its bytes, or its path where the case wrote it itself.
        tree: the root that must come out, with `Inert` for what must stay a placeholder.
        keywords: for zipslicer.open.
        location: what every storage must be tagged with; `locations`: by name, where it is another.
        huge: keys too large to read; `sampled` says which bytes must lie where.
        listed: the tensors by name, where these names are not those in the tree, or there are more.
    """

    file: bytes | Path
    tree: Any
    keywords: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    location: str = "cpu"
    locations: Mapping[str, str] = dataclasses.field(default_factory=dict)
    huge: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    listed: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Refused:
    """A file that must be refused, as its row of REFUSALS says; `intact`: tensors that must load all the same."""

    file: bytes | Path
    intact: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Inert:
    """What a placeholder must say of itself; `new`: made by NEWOBJ, so that its arguments are its items."""

    qualified: str
    args: tuple[Any, ...] = ()
    state: Any = None
    list_items: tuple[Any, ...] = ()
    items: Mapping[Any, Any] = dataclasses.field(default_factory=dict)
    kwargs: Mapping[Any, Any] = dataclasses.field(default_factory=dict)
    called: bool = True
    new: bool = False


Outcome = Loads | Refused
Maker = Callable[[Path], Outcome]


@dataclasses.dataclass(frozen=True)
class Case:
    number: str
    name: str
    make: Maker

    def __str__(self) -> str:
        return f"{self.number}-{self.name}"


CASES: list[Case] = []


def case(number: str) -> Callable[[Maker], Maker]:
    """Put a function into CASES, under its own name."""

    def add(make: Maker) -> Maker:
        CASES.append(Case(number, make.__name__, make))
        return make

    return add


# --- where an error points --------------------------------------------------------------------------------------------

Landmark = Callable[[bytes], int | None]


def nowhere(file: bytes) -> None:
    """What is missing has no place."""


def end_of_file(file: bytes) -> int:
    return len(file)


def last_end_record(file: bytes) -> int:
    return file.rindex(b"PK\5\6")


def end_of_program(file: bytes) -> int:
    return len(makers.record_of(file, "/data.pkl"))


def program_byte(at: int) -> Landmark:
    return lambda file: at


def opcode(name: str, which: int = 0) -> Landmark:
    return lambda file: makers.opcode_offset(makers.record_of(file, "/data.pkl"), name, which)


def first_text_opcode(file: bytes) -> int:
    texts = ("UNICODE", "STRING", "FLOAT", "PERSID")
    return makers.first_opcode_offset(makers.record_of(file, "/data.pkl"), texts)


def local_header(suffix: str) -> Landmark:
    def find(file: bytes) -> int:
        with zipfile.ZipFile(io.BytesIO(file)) as opened:
            return next(info.header_offset for info in opened.infolist() if info.filename.endswith(suffix))

    return find


def payload(suffix: str) -> Landmark:
    def find(file: bytes) -> int:
        at = local_header(suffix)(file)
        assert at is not None
        name_nbytes, extra_nbytes = struct.unpack_from("<2H", file, at + 26)
        return int(at + makers.LOCAL.nbytes + name_nbytes + extra_nbytes)

    return find


def last_central_header(file: bytes) -> int:
    return file.rindex(b"PK\1\2")


@dataclasses.dataclass(frozen=True)
class Refusal:
    """How a file is refused: by which error, at which byte, and when: "open", or the key whose touch raises.

    Offsets of ProgramError, TableError and UnsupportedError count from the first byte of data.pkl, those of
    ArchiveError from the first byte of the file.
    """

    error: type[ZipSlicerError]
    at: Landmark
    when: str = "open"


REFUSALS: Mapping[str, Refusal] = {
    "13c": Refusal(ArchiveError, last_end_record),
    "14": Refusal(ArchiveError, last_end_record),
    "16e": Refusal(UnsupportedError, first_text_opcode),
    "39a": Refusal(ArchiveError, nowhere, when="b"),
    "39b": Refusal(TableError, nowhere, when="b"),
    "39c": Refusal(ArchiveError, end_of_file),
    "39d": Refusal(ArchiveError, nowhere, when="w"),
    "39e": Refusal(ArchiveError, local_header("/data/2"), when="h"),
    "39f": Refusal(ArchiveError, nowhere),
    "39g": Refusal(ProgramError, end_of_program),
    "40b": Refusal(TableError, opcode("REDUCE", 1)),
    "40c": Refusal(TableError, opcode("REDUCE", 1)),
    "40d": Refusal(TableError, opcode("REDUCE", 1)),
    "40e": Refusal(TableError, opcode("REDUCE", 1)),
    "40f": Refusal(TableError, opcode("REDUCE", 1)),
    "40h": Refusal(ProgramError, opcode("BINPERSID")),
    "40i": Refusal(ArchiveError, last_central_header),
    "40j": Refusal(ArchiveError, last_central_header),
    "40k": Refusal(ProgramError, opcode("BINPERSID", 1)),
    "40l": Refusal(ArchiveError, nowhere, when="w"),
    "40q": Refusal(ProgramError, program_byte(2)),
    "40r": Refusal(ProgramError, program_byte(2)),
    "40s": Refusal(ArchiveError, local_header("/data/0")),
    "40t": Refusal(ProgramError, opcode("BINPERSID")),
    "40u": Refusal(ArchiveError, local_header("/data/0"), when="w"),
    "40v": Refusal(ArchiveError, last_end_record),
}


# --- what a tensor is, and what an object holds -----------------------------------------------------------------------


def parts_of(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The dense tensors that a sparse, quantized or nested tensor consists of; none for a dense one."""
    tensor = tensor.detach()
    if tensor.layout == torch.sparse_coo:
        return {"indices": tensor._indices(), "values": tensor._values()}
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return {"compressed": tensor.crow_indices(), "plain": tensor.col_indices(), "values": tensor.values()}
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return {"compressed": tensor.ccol_indices(), "plain": tensor.row_indices(), "values": tensor.values()}
    if tensor.is_nested:
        return {
            "values": tensor.values(),
            "sizes": tensor._nested_tensor_size(),
            "strides": tensor._nested_tensor_strides(),
            "offsets": tensor._nested_tensor_storage_offsets(),
        }
    if not tensor.is_quantized:
        return {}
    parts = {"int_repr": tensor.int_repr()}  # a copy
    if tensor.qscheme() != torch.per_tensor_affine:
        parts["scales"] = tensor.q_per_channel_scales()
        parts["zero_points"] = tensor.q_per_channel_zero_points()
    return parts


def whole_facts(tensor: torch.Tensor) -> dict[str, Any]:
    """What such a tensor says of itself, beside its parts."""
    facts: dict[str, Any] = {
        "type": type(tensor),
        "dtype": tensor.dtype,
        "layout": tensor.layout,
        "requires_grad": tensor.requires_grad,
    }
    if not tensor.is_nested:
        facts["shape"] = tuple(tensor.shape)
    if tensor.layout == torch.sparse_coo:
        facts["coalesced"] = tensor.is_coalesced()
    if tensor.is_quantized:
        facts["qscheme"] = tensor.qscheme()
        facts["strides"] = tensor.stride()
        if tensor.qscheme() == torch.per_tensor_affine:
            facts["quantizer"] = tensor.q_scale(), tensor.q_zero_point()
        else:
            facts["axis"] = tensor.q_per_channel_axis()
    return facts


def logical_bytes(tensor: torch.Tensor) -> bytes:
    """The elements in order, contiguous, conjugated and negated as the tensor says; for dtypes without kernels too."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if not tensor.numel() or tensor.is_meta:
        return b""
    itemsize = tensor.element_size()
    storage = tensor.untyped_storage()
    raw = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))
    elements = raw.as_strided(
        (*tensor.shape, itemsize),
        (*(step * itemsize for step in tensor.stride()), 1),
        tensor.storage_offset() * itemsize,
    )
    return bytes(elements.contiguous().numpy().tobytes())


def hull_nbytes(tensor: torch.Tensor) -> int:
    """From a tensor's first byte to its last: what an independent copy of it needs to own."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def is_storage(value: object) -> bool:
    return isinstance(value, (torch.UntypedStorage, torch.storage.TypedStorage))


def storage_bytes(value: Any) -> bytes:
    untyped = value if isinstance(value, torch.UntypedStorage) else value._untyped_storage
    raw = torch.empty(0, dtype=torch.uint8).set_(untyped, 0, (untyped.nbytes(),), (1,))
    return bytes(raw.numpy().tobytes())


Steps = tuple[tuple[str, Any], ...]


def tensors_in(tree: object) -> dict[Steps, Any]:
    """Every tensor and storage of a tree by its steps, in its order; a container is entered once, also a cyclic one."""
    found: dict[Steps, Any] = {}
    entered: set[int] = set()

    def children(value: object) -> Iterator[tuple[tuple[str, Any], object]]:
        if isinstance(value, dict):
            yield from ((("key", key), child) for key, child in value.items())
        elif isinstance(value, (list, tuple)):
            yield from ((("index", index), child) for index, child in enumerate(value))
        elif isinstance(value, Inert):
            if value.new:
                yield from ((("index", index), child) for index, child in enumerate(value.args))
            # Of what is no tensor here: its parts are its own.
            elif value.qualified == "torch._utils._rebuild_parameter":
                yield ("part", ()), value.args[0]
            else:
                yield ("part", "args"), value.args
            if value.kwargs:  # what the state has again is listed once
                yield from ((("attribute", name), child) for name, child in value.kwargs.items())
            elif isinstance(value.state, dict):
                yield from ((("attribute", name), child) for name, child in value.state.items())
            elif is_slots(value.state):
                yield from ((("attribute", name), child) for name, child in value.state[1].items())
            elif value.qualified == "functools.partial":  # its state is (function, arguments, keywords, attributes)
                yield ("part", "args"), value.state[1]
                yield ("part", "keywords"), value.state[2]
            elif value.state is not None:
                yield ("part", "state"), value.state
            yield from ((("index", index), child) for index, child in enumerate(value.list_items))
            yield from ((("key", key), child) for key, child in value.items.items())

    def walk(steps: Steps, value: object) -> None:
        if isinstance(value, torch.Tensor) or is_storage(value):
            found[steps] = value
        elif id(value) not in entered:
            entered.add(id(value))
            for step, child in children(value):
                walk((*steps, step), child)

    walk((), tree)
    return found


def is_slots(state: object) -> bool:
    """(dict or None, dict): the state of an object with __slots__."""
    if not isinstance(state, tuple) or len(state) != 2:
        return False
    return isinstance(state[1], dict) and (state[0] is None or isinstance(state[0], dict))


def differences(wanted: Any, got: Any, describe: Callable[[Any], Any]) -> list[str]:
    """Where a tree that came out is not the tree that went in: types, values, tensors, sharing and cycles."""
    comparison = _Comparison(describe)
    comparison.walk("root", wanted, got)
    return comparison.wrong


class _Comparison:
    def __init__(self, describe: Callable[[Any], Any]) -> None:
        self.describe = describe
        self.wrong: list[str] = []
        self.twins: dict[int, int] = {}  # id of a wanted object -> of the one that stands for it
        self.storages: dict[int, int] = {}  # address of a wanted storage -> of the one that stands for it
        self.keep: list[Any] = []  # so that no id or address is given out twice

    def note(self, path: str, what: str) -> None:
        if len(self.wrong) < 20:
            self.wrong.append(f"{path}: {what}"[:400])

    def walk(self, path: str, a: Any, b: Any) -> None:
        if isinstance(a, (dict, list, tuple, set, bytearray, torch.Tensor, Inert)):
            self.keep += (a, b)
            if id(a) in self.twins:
                # Equal tuples may be one object here and two in the file; what can change may not.
                if not isinstance(a, tuple) and self.twins[id(a)] != id(b):
                    self.note(path, "is a second object; it was saved as one")
                return
            self.twins[id(a)] = id(b)
        if isinstance(a, Inert):
            self.inert(path, a, b)
        elif type(a) is not type(b):
            self.note(path, f"{type(b)}, not {type(a)}")
        elif isinstance(a, torch.Tensor):
            self.tensor(path, a, b)
        elif is_storage(a):
            if storage_bytes(a) != storage_bytes(b) or getattr(a, "dtype", None) != getattr(b, "dtype", None):
                self.note(path, "another storage")
        elif isinstance(a, dict):
            self.mapping(path, a, b)
        elif isinstance(a, (list, tuple)):
            if len(a) != len(b):
                self.note(path, f"{len(b)} items, not {len(a)}")
            else:
                for index, (x, y) in enumerate(zip(a, b, strict=True)):
                    self.walk(f"{path}.{index}", x, y)
        elif not is_same(a, b):
            self.note(path, f"{b!r}, not {a!r}")

    def mapping(self, path: str, a: Any, b: Any) -> None:
        if list(a) != list(b):
            self.note(path, f"other keys: {list(b)[:10]}, not {list(a)[:10]}")
            return
        if isinstance(a, collections.defaultdict) and a.default_factory is not b.default_factory:
            self.note(path, f"default factory {b.default_factory}, not {a.default_factory}")
        for key in a:
            self.walk(f"{path}.{key}", a[key], b[key])
        self.attributes(path, a, b)

    def tensor(self, path: str, a: torch.Tensor, b: torch.Tensor) -> None:
        if parts_of(a):
            self.composite(path, a, b)
            return
        wanted, got = facts_of(a), facts_of(b)
        if wanted != got:
            self.note(
                path,
                ", ".join(f"{name} is {got[name]}, not {wanted[name]}" for name in wanted if wanted[name] != got[name]),
            )
            return
        if not b.is_leaf:
            self.note(path, "is no leaf")
        if a.numel() < 1 << 30 and logical_bytes(a) != logical_bytes(b):
            self.note(path, "other elements")
        one, other = a.untyped_storage(), b.untyped_storage()
        if one.nbytes() and not a.is_meta:  # an empty storage has no bytes to share
            self.keep += (one, other)
            known = one.data_ptr() in self.storages
            if self.storages.setdefault(one.data_ptr(), other.data_ptr()) != other.data_ptr():
                self.note(path, "does not share its storage with the tensors it was saved with")
            if not known and list(self.storages.values()).count(other.data_ptr()) > 1:
                self.note(path, "shares its storage with a tensor of another one")
        self.attributes(path, a, b)

    def composite(self, path: str, a: torch.Tensor, b: torch.Tensor) -> None:
        if whole_facts(a) != whole_facts(b) or not b.is_leaf:
            self.note(path, f"is {whole_facts(b)}, not {whole_facts(a)}, or is no leaf")
            return
        if a.is_quantized and a.untyped_storage().nbytes() != b.untyped_storage().nbytes():
            self.note(path, "a storage of another size")
        for name, (one, other) in zip_parts(a, b).items():
            if name != "int_repr":
                self.tensor(f"{path}#{name}", one, other)
            elif logical_bytes(one) != logical_bytes(other):
                self.note(path, "other elements")
        self.attributes(path, a, b)

    def attributes(self, path: str, a: Any, b: Any) -> None:
        given, got = getattr(a, "__dict__", None), getattr(b, "__dict__", None)
        if given or got:
            self.walk(f"{path}.__dict__", given or {}, got or {})

    def inert(self, path: str, a: Inert, b: Any) -> None:
        try:
            about = self.describe(b)
        except TypeError:
            self.note(path, f"{type(b)}, not a placeholder")
            return
        if (about.qualified, about.called) != (a.qualified, a.called):
            self.note(path, f"a placeholder of {about.qualified}, called: {about.called}; not of {a.qualified}")
            return
        self.walk(f"{path}.args", a.args, tuple(about.args))
        self.walk(f"{path}.kwargs", dict(a.kwargs), dict(about.kwargs))
        self.walk(f"{path}.list_items", list(a.list_items), list(about.list_items))
        self.walk(f"{path}.items", dict(a.items), dict(about.items))
        self.walk(f"{path}.state", a.state, about.state)


def zip_parts(a: torch.Tensor, b: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    one, other = parts_of(a), parts_of(b)
    assert list(one) == list(other)
    return {name: (one[name], other[name]) for name in one}


def facts_of(tensor: torch.Tensor) -> dict[str, Any]:
    """What a tensor says of itself, as materialize() must rebuild it."""
    return {
        "dtype": tensor.dtype,
        "shape": tuple(tensor.shape),
        "stride": tensor.stride(),
        "storage_offset": tensor.storage_offset(),
        "storage nbytes": tensor.untyped_storage().nbytes(),
        "requires_grad": tensor.requires_grad,
        "conj": tensor.is_conj(),
        "neg": tensor.is_neg(),
        "device": tensor.device.type,
    }


def native(value: Any) -> Any:
    """A NumPy value in this host's byte order, into which NumPy's own unpickling turns it."""
    return value if value.dtype.hasobject else value.astype(value.dtype.newbyteorder("="))


def is_same(a: Any, b: Any) -> bool:
    """Equal plain values of one type; NaN is NaN here, and 0.0 is not -0.0."""
    if type(a).__module__ == "numpy" and hasattr(a, "tobytes"):
        a, b = native(a), native(b)
        return bool((a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()))
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b) or (math.isnan(a) and math.isnan(b))
    return bool(a == b)


PATH: tuple[str, ...] = ("a", "b") if sys.version_info < (3, 14) else ("a/b",)  # what is pickled of a path

# --- what goes in -----------------------------------------------------------------------------------------------------

TYPED = (
    *("float64", "float32", "float16", "bfloat16", "complex64", "complex128"),
    *("int64", "int32", "int16", "int8", "uint8"),
)
NEWEST = ("float8_e8m0fnu", "float4_e2m1fn_x2", "bcomplex32")  # that the oldest torch does not have
UNTYPED = (
    *("uint16", "uint32", "uint64", "complex32", "float8_e5m2", "float8_e4m3fn", "float8_e5m2fnuz", "float8_e4m3fnuz"),
    *(name for name in NEWEST if hasattr(torch, name)),
    *("bits8", "bits16", "bits1x8", "bits2x4", "bits4x2"),
)


def count(n: int, dtype: torch.dtype = torch.float32, first: int = 0) -> torch.Tensor:
    return torch.arange(first, first + n).to(dtype)


def pattern(n: int, dtype: torch.dtype, first: int = 1) -> torch.Tensor:
    """Counted bytes under any dtype, also one that cannot count."""
    itemsize = torch.empty(0, dtype=dtype).element_size()
    return torch.arange(first, first + n * itemsize).to(torch.uint8).view(dtype)


def small_model() -> collections.OrderedDict[str, Any]:
    return collections.OrderedDict(w=count(24).reshape(4, 6), b=count(5, torch.int64), h=count(3, torch.bfloat16))


def saved(tree: object, protocol: int = 2, **config: Any) -> bytes:
    """torch.save into memory."""
    target = io.BytesIO()
    with contextlib.ExitStack() as stack:
        if config:
            import pytest

            settings = pytest.importorskip("torch.utils.serialization", reason="an older torch").config
            changes = {f"save.{name}": value for name, value in config.items()}
            stack.enter_context(settings.patch(changes))
        torch.save(tree, target, pickle_protocol=protocol)
    return target.getvalue()


# --- cases 1 to 8: what torch.save writes -----------------------------------------------------------------------------


@case("1")
def typed_dtypes(folder: Path) -> Outcome:
    tree = {name: count(6, getattr(torch, name), first=1).reshape(2, 3) for name in TYPED}
    tree["bool"] = torch.tensor([True, False, True])
    path = folder / "typed.pt"
    torch.save(tree, path)
    return Loads(path, tree)


@case("2")
def state_dict_with_metadata(folder: Path) -> Outcome:
    tree = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).state_dict()
    assert "_metadata" in vars(tree)
    return Loads(saved(tree), tree)


@case("3")
def odd_prefix_and_renamed(folder: Path) -> Outcome:
    tree = small_model()
    torch.save(tree, folder / "od d.v1.2.pt")
    return Loads((folder / "od d.v1.2.pt").rename(folder / "other.bin"), tree)


def _aligned(alignment: int) -> Outcome:
    tree = small_model()
    file = saved(tree, storage_alignment=alignment)
    for index in range(3):
        assert payload(f"/data/{index}")(file) % alignment == 0  # type: ignore[operator]
    return Loads(file, tree)


@case("4a")
def alignment_of_a_page(folder: Path) -> Outcome:
    return _aligned(4096)


@case("4b")
def no_alignment(folder: Path) -> Outcome:
    return _aligned(1)


@case("4c")
def alignment_of_48(folder: Path) -> Outcome:
    return _aligned(48)


@case("5")
def no_checksums(folder: Path) -> Outcome:
    tree = small_model()
    torch.serialization.set_crc32_options(False)
    try:
        return Loads(saved(tree), tree)
    finally:
        torch.serialization.set_crc32_options(True)


@case("6")
def empty_and_scalar(folder: Path) -> Outcome:
    empty = torch.empty(0)
    tree = {
        "scalar": torch.tensor(3.5),
        "empty": empty,
        "empty_view": empty[:0],
        "empty_rows": torch.empty(0, 3),
        "one": torch.ones(1, 1, 1, 1),
        "no_columns": torch.empty(2, 0, dtype=torch.int16),
    }
    return Loads(saved(tree), tree)


@case("7")
def beyond_4_gib(folder: Path) -> Outcome:
    """One storage of 4 GiB and 5 bytes between two small ones: a hole in the file, and real ZIP64 fields."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    sizes = {"head": 100, "big": (1 << 32) + 5, "tail": 77}
    path = folder / "big.pt"
    with FakeTensorMode():
        fakes = {name: torch.empty(n, dtype=torch.uint8) for name, n in sizes.items()}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(fakes, path)
    small = {name: (torch.arange(sizes[name]) % 251).to(torch.uint8) + 3 for name in ("head", "tail")}
    with path.open("r+b") as file:
        for name, key in (("head", 0), ("tail", 2)):
            file.seek(makers.payload_offset(path, f"/data/{key}"))
            file.write(small[name].numpy().tobytes())
        file.seek(makers.payload_offset(path, "/data/1") + (1 << 32))
        file.write(b"\1\2\3\4\5")
    tree = {"head": small["head"], "tail": small["tail"]}
    samples = {0: 0, 1 << 31: 0, (1 << 32) - 1: 0, 1 << 32: 1, (1 << 32) + 4: 5}
    return Loads(path, tree, huge={"big": {"shape": (sizes["big"],), "elements": samples}})


@case("8")
def forced_zip64(folder: Path) -> Outcome:
    tree = small_model()
    return Loads(Zip().add_all(makers.records_of(saved(tree)), zip64=True).finish(zip64=True).data, tree)


# --- cases 9 to 15: what others make of it ----------------------------------------------------------------------------


@case("9")
def more_records_than_16_bits_count(folder: Path) -> Outcome:
    tree = small_model()
    archive = Zip().add_all(makers.records_of(saved(tree)))
    archive.add_all((f"archive/x/{i}", b"") for i in range(65_600))
    return Loads(archive.finish().data, tree)


@case("10a")
def rezipped_in_reverse(folder: Path) -> Outcome:
    tree = small_model()
    return Loads(makers.rezipped_by_python(makers.records_of(saved(tree))[::-1]), tree)


@case("10b")
def rezipped_deflated(folder: Path) -> Outcome:
    tree = small_model()
    return Loads(makers.rezipped_by_python(makers.records_of(saved(tree)), method=zipfile.ZIP_DEFLATED), tree)


@case("11a")
def info_zip(folder: Path) -> Outcome:
    """Folders as records, and a time stamp that is longer in the local header than in the directory."""
    tree = small_model()
    stamp = struct.pack("<BL", 3, 1)
    extras: dict[str, Any] = {
        "local_extra": makers.extra_field(0x5455, stamp + struct.pack("<L", 1)),
        "central_extra": makers.extra_field(0x5455, stamp),
    }
    archive = Zip()
    for name in ("archive/", "archive/data/"):
        archive.add(name, **extras)
    return Loads(archive.add_all(makers.records_of(saved(tree)), **extras).finish().data, tree)


@case("11b")
def updated_by_info_zip(folder: Path) -> Outcome:
    """Descriptors gone, padding kept: whoever computes offsets from the alignment reads the wrong bytes."""
    tree = small_model()
    archive = Zip()
    for name, local_extra, data in makers.local_records(saved(tree)):
        archive.add(name, data, flags=makers.UTF8_FLAG, local_extra=local_extra)
    archive.add("archive/note.txt", b"not written by torch")
    return Loads(archive.finish().data, tree)


@case("12a")
def streamed(folder: Path) -> Outcome:
    tree = small_model()
    return Loads(makers.rezipped_by_python(makers.records_of(saved(tree)), stream=True), tree)


@case("12b")
def streamed_with_wide_descriptors(folder: Path) -> Outcome:
    """24-byte descriptors that nothing in the directory announces."""
    tree = small_model()
    return Loads(makers.rezipped_by_python(makers.records_of(saved(tree)), stream=True, force_zip64=True), tree)


@case("13a")
def zeros_after_the_end(folder: Path) -> Outcome:
    tree = small_model()
    return Loads(saved(tree) + bytes(1000), tree)


@case("13b")
def comment(folder: Path) -> Outcome:
    tree = small_model()
    return Loads(makers.rezipped(makers.records_of(saved(tree))).data[:-2] + b"\x0b\0hello world", tree)


@case("13c")
def bytes_before(folder: Path) -> Outcome:
    return Refused(b"#!stub\n" * 9 + saved(small_model()))


@case("13d")
def bytes_before_and_a_window(folder: Path) -> Outcome:
    tree = small_model()
    file = saved(tree)
    return Loads(b"#!stub\n" * 9 + file, tree, {"window": (63, len(file))})


def _two_archives() -> tuple[bytes, bytes, dict[str, Any], dict[str, Any]]:
    one, other = {"x": count(7)}, {"y": count(90, torch.float16)}
    return saved(one), saved(other), one, other


@case("14")
def two_archives_as_one(folder: Path) -> Outcome:
    first, second, _, _ = _two_archives()
    return Refused(first + second)


@case("14a")
def window_on_the_first(folder: Path) -> Outcome:
    first, second, tree, _ = _two_archives()
    return Loads(first + second, tree, {"window": (0, len(first))})


@case("14b")
def window_on_the_second(folder: Path) -> Outcome:
    first, second, _, tree = _two_archives()
    return Loads(first + second, tree, {"window": (len(first), len(second))})


@case("15")
def skipped_data(folder: Path) -> Outcome:
    path = folder / "hole.pt"
    with torch.serialization.skip_data():
        torch.save({"w": count(10)}, path)
    return Loads(path, {"w": torch.zeros(10)})


# --- cases 16 to 18: pickles ------------------------------------------------------------------------------------------


def _values() -> dict[str, Any]:
    one = bytearray(b"one object, and met twice")
    return dict(small_model(), s={1, 2}, f=1.5, t=(1, "x"), by=b"\0\xff", big=1 << 40, twice=[one, one])


def _protocol(protocol: int) -> Outcome:
    tree = _values()
    return Loads(saved(tree, protocol), tree)


@case("16a")
def protocol_3(folder: Path) -> Outcome:
    return _protocol(3)


@case("16b")
def protocol_4(folder: Path) -> Outcome:
    return _protocol(4)


@case("16c")
def protocol_5(folder: Path) -> Outcome:
    return _protocol(5)


@case("16d")
def protocol_1(folder: Path) -> Outcome:
    return _protocol(1)


@case("16e")
def protocol_0(folder: Path) -> Outcome:
    return Refused(saved(_values(), 0))


@case("17")
def containers_and_memo(folder: Path) -> Outcome:
    tree: dict[str, Any] = {f"k{i}": count(2, first=i) for i in range(300)}
    tree["ints"] = [0, 255, 256, 65535, 65536, -1, 2**31 - 1, 2**31, -(2**31), 2**63, -(2**63), -(2**70), 1 << 2100]
    tree["floats"] = [1.5, float("nan"), float("inf"), -0.0]
    tree["texts"] = ["", "x" * 300, "é€😀", "\ud800"]
    tree["long"] = list(range(2500))
    tree["tuples"] = [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)]
    tree["nested"] = [None, True, False, {}, [], {1: {2: [count(1)]}}]
    return Loads(saved(tree), tree)


@case("18")
def recursive(folder: Path) -> Outcome:
    loop: list[Any] = [count(3)]
    loop.append(loop)
    tree: dict[str, Any] = {"a": loop}
    tree["self"] = tree
    short: tuple[Any, ...] = ([],)
    short[0].append(short)
    long: tuple[Any, ...] = ([], 1, 2, 3, count(2))
    long[0].append(long)
    tree.update(short=short, long=long)
    return Loads(saved(tree), tree)


# --- cases 19 to 24, 29: tensors --------------------------------------------------------------------------------------


@case("19")
def untyped_dtypes(folder: Path) -> Outcome:
    tree = {name: pattern(6, getattr(torch, name)) for name in UNTYPED if hasattr(torch, name)}
    tree["view"] = pattern(12, torch.uint16)[3:9:2]
    return Loads(saved(tree), tree)


@case("20")
def untyped_dtypes_that_require_grad(folder: Path) -> Outcome:
    """torch.save writes them, and no mode of torch.load reads them back."""
    tree = {
        "leaf": pattern(6, torch.float8_e4m3fn).requires_grad_(),
        "parameter": torch.nn.Parameter(pattern(6, torch.float8_e5m2)),
    }
    return Loads(saved(tree), tree)


@case("21")
def aliases(folder: Path) -> Outcome:
    w = count(24).reshape(4, 6)
    tree = collections.OrderedDict(
        w=w,
        tied=w,
        view=w[1:3],
        t=w.t(),
        flat=w.view(-1)[5:],
        expanded=torch.ones(1).expand(1000),
        slice=count(1000)[10:13],
        step=count(20)[::3],
        odd_stride=count(12).as_strided((3, 1, 4), (4, 0, 1)),  # of one item, so that any stride is as good
        parameter=torch.nn.Parameter(w[0]),
    )
    return Loads(saved(tree), tree)


@case("22")
def one_storage_under_three_dtypes(folder: Path) -> Outcome:
    y = pattern(8, torch.uint16)
    tree = {
        "a": y,
        "b": y.view(torch.float8_e5m2),
        "c": y.view(torch.uint8),
        "untyped": y.untyped_storage(),
        "typed": count(3)._typed_storage(),  # type: ignore[no-untyped-call]
    }
    return Loads(saved(tree), tree)


@case("23")
def parameters_buffers_attributes(folder: Path) -> Outcome:
    tagged = torch.nn.Parameter(count(4))
    tagged.tag = "x"  # type: ignore[attr-defined]
    noted = count(2)
    noted.note = {"a": 1}  # type: ignore[attr-defined]
    tree = {
        "p": torch.nn.Parameter(count(3)),
        "frozen": torch.nn.Parameter(count(2), requires_grad=False),
        "tagged": tagged,
        "buffer": torch.nn.Buffer(count(5)),
        "noted": noted,
        "grad": count(2).requires_grad_(),
    }
    return Loads(saved(tree), tree)


@case("24")
def conjugated_and_negated(folder: Path) -> Outcome:
    z = torch.complex(count(4), count(4, first=7))
    y = torch.complex(count(4), count(4, first=3))
    tree = {"z": z, "conj": z.conj(), "neg": y.conj().imag, "real": y.real}
    assert tree["conj"].is_conj()
    assert tree["neg"].is_neg()
    return Loads(saved(tree), tree)


@case("29")
def saved_on_a_gpu(folder: Path) -> Outcome:
    tree = small_model()
    here, there = (b"X" + struct.pack("<I", len(tag)) + tag for tag in (b"cpu", b"cuda:1"))

    def move(name: str, data: bytes) -> bytes:
        return data.replace(here, there) if name.endswith("/data.pkl") else data

    return Loads(makers.edited(saved(tree), move).data, tree, location="cuda:1")


# --- cases 30 to 32: values -------------------------------------------------------------------------------------------


@case("30")
def python_and_torch_values(folder: Path) -> Outcome:
    tree = {
        "w": count(2),
        "set": {1, 2},
        "counter": collections.Counter("aab"),
        "complex": 1 + 2j,
        "bytes": b"ab\xff",
        "bytearray": bytearray(b"xy"),
        "size": torch.Size([1, 2]),
        "dtype": torch.float32,
        "device": torch.device("cuda", 1),
        "layout": torch.sparse_csr,
        "qscheme": torch.per_tensor_affine,
        "ordered": collections.OrderedDict(a=1),
        "generator": torch.Generator().get_state(),
    }
    return Loads(saved(tree), tree)


@case("30b")
def empty_bytes_frozenset_range(folder: Path) -> Outcome:
    tree = {"w": count(2), "bytes": b"", "frozenset": frozenset({1}), "range": range(3)}
    return Loads(saved(tree), tree)


def _numpy_values() -> dict[str, Any]:
    import numpy as np

    return {
        "w": count(2),
        "array": np.arange(6).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "float": np.float64(1.5),
        "int": np.int64(3),
        "bool": np.bool_(True),
        "text": np.str_("x"),
        "zero_dim": np.array(2.0),
        "date": np.datetime64("2024-01-01"),
        "structured": np.array([(1, 2.0), (3, 4.0)], dtype=[("a", "i4"), ("b", "f4")]),
        "big_endian": np.arange(3, dtype=">i4"),
    }


@case("31a")
def numpy_values(folder: Path) -> Outcome:
    tree = _numpy_values()
    return Loads(saved(tree), tree)


@case("31b")
def numpy_values_of_numpy_1(folder: Path) -> Outcome:
    tree = _numpy_values()

    def age(name: str, data: bytes) -> bytes:
        return data.replace(b"numpy._core", b"numpy.core") if name.endswith("/data.pkl") else data

    return Loads(makers.edited(saved(tree), age).data, tree)


@case("31c")
def numpy_values_in_protocol_5(folder: Path) -> Outcome:
    tree = _numpy_values()
    return Loads(saved(tree, 5), tree)


class _Foreign:
    """Classes of a module that the writer had and the reader has not."""

    class Color(enum.Enum):
        RED = 1

    @dataclasses.dataclass
    class Config:
        lr: float = 0.1
        w: object = None

    class Slotted:
        __slots__ = ("a", "b")

        def __init__(self, a: object, b: object) -> None:
            self.a = a
            self.b = b

    class TupleState:
        def __init__(self, value: object) -> None:
            self.value = value

        def __getstate__(self) -> tuple[object, int]:
            return (self.value, 7)

        def __setstate__(self, state: tuple[object, int]) -> None:
            self.value = state[0]

    class ListSubclass(list):  # type: ignore[type-arg]
        pass

    class DictSubclass(dict):  # type: ignore[type-arg]
        pass

    class Point(NamedTuple):
        x: object
        y: object

    @staticmethod
    def function(*args: object, **kwargs: object) -> object:
        return args, kwargs

    names: ClassVar[tuple[str, ...]] = (
        "Color",
        "Config",
        "Slotted",
        "TupleState",
        "ListSubclass",
        "DictSubclass",
        "Point",
        "function",
    )


@contextlib.contextmanager
def foreign_module(*more: type) -> Iterator[None]:
    """While it lasts, the classes above, and these, are importable from TRAP, so that pickle writes that name."""
    module = types.ModuleType(TRAP)
    for cls in more:
        setattr(module, cls.__qualname__, cls)
    for name in _Foreign.names:
        thing = getattr(_Foreign, name)
        thing.__module__, thing.__qualname__ = TRAP, name
        setattr(module, name, thing)
    sys.modules[TRAP] = module
    try:
        yield
    finally:
        del sys.modules[TRAP]


@case("32")
def foreign_objects(folder: Path) -> Outcome:
    t = [count(n) for n in range(1, 12)]
    when = dt.datetime(2024, 1, 2)
    tree = {
        "namespace": argparse.Namespace(lr=0.1, w=t[0]),
        "enum": _Foreign.Color.RED,
        "dataclass": _Foreign.Config(w=t[1]),
        "slots": _Foreign.Slotted(1, t[2]),
        "tuple_state": _Foreign.TupleState(t[3]),
        "list": _Foreign.ListSubclass([t[4]]),
        "dict": _Foreign.DictSubclass(a=t[5]),
        "point": _Foreign.Point(1, t[6]),
        "defaultdict": collections.defaultdict(list, {"a": [t[7]]}),
        "partial": functools.partial(_Foreign.function, t[8], k=2),
        "datetime": when,
        "path": pathlib.PurePosixPath("a/b"),
        "simple": types.SimpleNamespace(q=t[9]),
        "deque": collections.deque([1, 2], 3),
        "exception": ValueError("x"),
        "w": t[10],
    }
    with foreign_module():
        file = saved(tree)
    function = Inert(f"{TRAP}.function", called=False)
    expected = {
        **tree,
        "namespace": Inert("argparse.Namespace", state={"lr": 0.1, "w": t[0]}),
        "enum": Inert(f"{TRAP}.Color", (1,)),
        "dataclass": Inert(f"{TRAP}.Config", state={"lr": 0.1, "w": t[1]}),
        "slots": Inert(f"{TRAP}.Slotted", state=(None, {"a": 1, "b": t[2]})),
        "tuple_state": Inert(f"{TRAP}.TupleState", state=(t[3], 7)),
        "list": Inert(f"{TRAP}.ListSubclass", list_items=(t[4],)),
        "dict": Inert(f"{TRAP}.DictSubclass", items={"a": t[5]}),
        "point": Inert(f"{TRAP}.Point", (1, t[6]), new=True),
        "partial": Inert("functools.partial", (function,), state=(function, (t[8],), {"k": 2}, None)),
        "datetime": Inert("datetime.datetime", (when.__reduce_ex__(2)[1][0],)),
        "path": Inert(f"{pathlib.PurePosixPath.__module__}.PurePosixPath", PATH),
        "simple": Inert("types.SimpleNamespace", state={"q": t[9]}),
        "deque": Inert("collections.deque", ((), 3), list_items=(1, 2)),
        "exception": Inert("exceptions.ValueError", ("x",)),  # as Python 2 called the module, and protocol 2 still does
    }
    return Loads(file, expected)


# --- cases 25 to 28, 35: tensors that are not one dense row -----------------------------------------------------------


def sparse_matrices() -> dict[str, torch.Tensor]:
    dense = torch.tensor([[1.0, 0, 2, 0], [0, 0, 0, 3], [4, 0, 0, 0], [0, 5, 0, 6]])
    return {
        "coo": dense.to_sparse(),
        "csr": dense.to_sparse_csr(),
        "csc": dense.to_sparse_csc(),
        "bsr": dense.to_sparse_bsr((2, 2)),
        "bsc": dense.to_sparse_bsc((2, 2)),
    }


@case("25")
def sparse_tensors(folder: Path) -> Outcome:
    coo = functools.partial(torch.sparse_coo_tensor, check_invariants=True)
    twice = torch.tensor([[0, 0]])
    noted = sparse_matrices()["coo"]
    noted.note = "x"  # type: ignore[attr-defined]
    values = count(3)
    tree = {
        **sparse_matrices(),
        "uncoalesced": coo(twice, count(2, first=1), (3,)),
        "hybrid": coo(twice, torch.ones(2, 5), (3, 5)),
        "empty": coo(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(0), (1 << 62,)),
        "values": values,
        "shares": coo(torch.tensor([[2, 1, 0]]), values, (3,)),
        "int32": torch.sparse_csr_tensor(
            torch.tensor([0, 1], dtype=torch.int32),
            torch.tensor([1], dtype=torch.int32),
            count(1),
            (1, 2),
            check_invariants=True,
        ),
        "parameter": torch.nn.Parameter(sparse_matrices()["coo"]),
        "noted": noted,
        "list": [sparse_matrices()["csr"]],
    }
    return Loads(saved(tree), tree)


def quantized(x: torch.Tensor, *terms: Any) -> torch.Tensor:
    """torch.quantize_per_tensor or _per_channel, without its word that they will be gone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (torch.quantize_per_tensor if len(terms) == 3 else torch.quantize_per_channel)(x, *terms)


@case("26")
def quantized_tensors(folder: Path) -> Outcome:
    x = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    scales, zeros = torch.tensor([0.1, 0.2]), torch.tensor([1, 2])
    i8 = quantized(x, 0.1, 3, torch.qint8)
    noted = quantized(x, 0.1, 3, torch.qint8)
    noted.note = 1  # type: ignore[attr-defined]
    tree = {
        "i8": i8,
        "view": i8[1:],
        "transposed": i8.t(),
        "u8": quantized(x, 0.5, 3, torch.quint8),
        "i32": quantized(x, 0.1, 0, torch.qint32),
        "scalar": quantized(torch.tensor(1.0), 0.1, 0, torch.qint8),
        "channels": quantized(x, scales.double(), zeros, 0, torch.qint8),
        "float": quantized(x, scales, zeros.float(), 1, torch.quint8),
        "packed": quantized(torch.rand(2, 6), scales, zeros.float(), 0, torch.quint4x2),
        "frozen": torch.nn.Parameter(i8, requires_grad=False),
        "noted": noted,
    }
    return Loads(saved(tree), tree)


@case("27a")
def nested_tensors(folder: Path) -> Outcome:
    tree = {
        "ragged": torch.nested.nested_tensor([count(2), count(3)]),
        "two": torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]).transpose(1, 2),
        "scalars": torch.nested.nested_tensor([torch.tensor(1.0), torch.tensor(2.0)]),
        "parameter": torch.nn.Parameter(torch.nested.nested_tensor([count(2), count(3)])),
    }
    return Loads(saved(tree), tree)


NJT = "torch.nested._internal.nested_tensor"


def _typed_call(
    p: Pickle,
    function: tuple[str, str],
    cls: tuple[str, str],
    args: Callable[[Pickle], object],
    state: Callable[[Pickle], object],
) -> Pickle:
    """_rebuild_from_type_v2(function, class, args, state)."""
    return p.call(
        "torch._tensor", "_rebuild_from_type_v2", lambda p: p.name(*function), lambda p: p.name(*cls), args, state
    )


@case("27b")
def jagged_tensors(folder: Path) -> Outcome:
    """As torch writes them: the parts stand in the arguments, and again in the state."""
    values, offsets = count(5), torch.tensor([0, 2, 5])

    def arguments(p: Pickle) -> object:
        p.raw(b"}(").text("values").tensor("FloatStorage", "0", 5, size=(5,), stride=(1,)).put(0)
        p.text("offsets").tensor("LongStorage", "1", 3, size=(3,), stride=(1,)).put(1)
        return p.text("lengths").none().raw(b"u\x85")

    def state(p: Pickle) -> object:
        return p.raw(b"}(").text("_values").get(0).text("_offsets").get(1).text("_ragged_idx").integer(1).raw(b"u")

    program = Pickle().raw(b"}").text("n")
    _typed_call(program, (NJT, "_rebuild_njt"), (NJT, "NestedTensor"), arguments, state)
    storages = {"0": values.numpy().tobytes(), "1": offsets.numpy().tobytes()}
    expected = Inert(
        f"{NJT}.NestedTensor",
        kwargs={"values": values, "offsets": offsets, "lengths": None},
        state={"_values": values, "_offsets": offsets, "_ragged_idx": 1},
    )
    assert [dotted(steps) for steps in tensors_in({"n": expected})] == ["n.values", "n.offsets"]
    return Loads(makers.checkpoint(program.raw(b"s").stop(), storages).data, {"n": expected})


@case("28")
def meta_tensors(folder: Path) -> Outcome:
    tree = {
        "m": torch.empty(4, 5, dtype=torch.bfloat16, device="meta"),
        "huge": torch.empty(1 << 40, 1 << 20, device="meta").t(),
        "grad": torch.nn.Parameter(torch.empty(2, device="meta")),
        "inner": {"only": torch.empty(0, 3, device="meta", dtype=torch.int8)},
        "r": count(2),
    }
    locations = {"m": "meta", "huge": "meta", "grad": "meta", "inner.only": "meta"}
    return Loads(saved(tree), tree, locations=locations)


class _Rebuilt:
    """Pickled as a call of a function of torch's."""

    def __init__(self, function: str, *args: object) -> None:
        self._call = getattr(torch._utils, function), args

    def __reduce__(self) -> Any:
        return self._call


@case("35")
def tensors_of_devices_without_storages(folder: Path) -> Outcome:
    a, b = count(3), count(4).reshape(2, 2)
    from_cpu, from_numpy = "_rebuild_device_tensor_from_cpu_tensor", "_rebuild_device_tensor_from_numpy"
    tree = {
        "a": _Rebuilt(from_cpu, a, torch.float32, "xla:0", False),
        "again": a,
        "half": _Rebuilt(from_cpu, b, torch.float16, "mtia:0", True),
        "b": _Rebuilt(from_numpy, b.numpy(), torch.float32, "xla:1", True),
        "fortran": _Rebuilt(from_numpy, b.t().numpy(), torch.bfloat16, "xla:1", False),
        "big": _Rebuilt(from_numpy, b.numpy().astype(">f4"), torch.float32, "xla:1", False),
    }

    def age(name: str, data: bytes) -> bytes:
        """As an older torch called it."""
        return data.replace(from_numpy.encode(), b"_rebuild_xla_tensor") if name.endswith("/data.pkl") else data

    expected = {
        "a": a,
        "again": a.view(-1),
        "half": b.half().requires_grad_(),
        "b": b.clone().requires_grad_(),
        "fortran": b.t().to(torch.bfloat16),
        "big": b.clone(),
    }
    locations = {"a": "xla:0", "half": "mtia:0", "b": "xla:1", "fortran": "xla:1", "big": "xla:1"}
    return Loads(makers.edited(saved(tree), age).data, expected, locations=locations)


# --- cases 33 and 34: classes of modules and tensors ------------------------------------------------------------------


def inert_module(module: torch.nn.Module) -> Inert:
    """A pickled module: its class, and its __dict__ as state."""
    state = dict(vars(module))
    state["_modules"] = {name: inert_module(child) for name, child in module._modules.items() if child is not None}
    cls = type(module)
    return Inert(f"{cls.__module__}.{cls.__qualname__}", state=state, new=True)


@case("33")
def whole_module(folder: Path) -> Outcome:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2), torch.nn.ReLU())
    model[0].weight.tied = True  # type: ignore[union-attr]
    model.register_buffer("scratch", count(2), persistent=False)
    expected = {"model": inert_module(model)}
    names = {f"model.{name}" for name in (*model.state_dict(), "scratch")}
    assert {dotted(steps) for steps in tensors_in(expected)} == names
    return Loads(saved({"model": model}), expected)


@case("34a")
def plain_subclass(folder: Path) -> Outcome:
    class Plain(torch.Tensor):
        pass

    Plain.__module__, Plain.__qualname__ = TRAP, "Plain"
    dense = count(3).as_subclass(Plain)
    dense.extra = "x"  # type: ignore[attr-defined]
    with foreign_module(Plain):
        file = saved({"dense": dense})
    base = dense.as_subclass(torch.Tensor)
    base.extra = "x"  # type: ignore[attr-defined]
    return Loads(file, {"dense": base})


def _wrapper_arguments(cls: tuple[str, str]) -> tuple[Callable[[Pickle], object], tuple[Any, ...]]:
    """(class, dtype, size, stride, storage_offset, layout, device, requires_grad): as written, and as read."""

    def write(p: Pickle) -> object:
        p.mark().name(*cls).name("torch", "float32").integers([2, 2]).integers([2, 1]).integer(0)
        p.call("torch.serialization", "_get_layout", lambda p: p.text("torch.strided"))
        return p.call("torch", "device", lambda p: p.text("cpu")).boolean(False).raw(b"t")

    inert = Inert(".".join(cls), called=False)
    return write, (inert, torch.float32, (2, 2), (2, 1), 0, torch.strided, torch.device("cpu"), False)


@case("34b")
def wrapper_subclass(folder: Path) -> Outcome:
    """As torchao has them; also in a Parameter."""
    cls, inner = (TRAP, "Quantized"), count(4, torch.int8)
    write, args = _wrapper_arguments(cls)

    def tensor(p: Pickle) -> object:
        items: dict[str, Callable[[Pickle], object]] = {
            "int_data": lambda p: p.tensor("CharStorage", "0", 4, size=(4,), stride=(1,)),
            "block_size": lambda p: p.integers([1, 2]),
        }
        return _typed_call(p, ("torch._utils", "_rebuild_wrapper_subclass"), cls, write, lambda p: p.dict(items))

    def parameter(p: Pickle) -> object:
        return p.call("torch._utils", "_rebuild_parameter", tensor, lambda p: p.boolean(False), Pickle.ordered_dict)

    data = makers.checkpoint(Pickle().dict({"w": tensor, "p": parameter}).stop(), {"0": inner.numpy().tobytes()}).data

    def expected() -> Inert:
        return Inert(".".join(cls), args, state={"int_data": inner.view(-1), "block_size": (1, 2)})

    in_parameter = Inert("torch._utils._rebuild_parameter", (expected(), False, collections.OrderedDict()))
    return Loads(data, {"w": expected(), "p": in_parameter})


@case("34c")
def dtensor_of_one_rank(folder: Path) -> Outcome:
    cls, local = ("torch.distributed.tensor", "DTensor"), count(4).reshape(2, 2)
    write, args = _wrapper_arguments(cls)
    spec = ("torch.distributed.tensor._dtensor_spec", "DTensorSpec")

    def state(p: Pickle) -> object:
        p.none().raw(b"}(").text("_local_tensor").tensor("FloatStorage", "0", 4, size=(2, 2), stride=(2, 1))
        return p.text("_spec").name(*spec).raw(b")\x81}").text("placements").raw(b")sbu\x86")

    program = Pickle().raw(b"}").text("w")
    _typed_call(program, ("torch._utils", "_rebuild_wrapper_subclass"), cls, write, state)
    data = makers.checkpoint(program.raw(b"s").stop(), {"0": local.numpy().tobytes()}).data
    inert_spec = Inert(".".join(spec), state={"placements": ()}, new=True)
    expected = Inert(".".join(cls), args, state=(None, {"_local_tensor": local, "_spec": inert_spec}))
    return Loads(data, {"w": expected})


# --- case 36: byte order ----------------------------------------------------------------------------------------------


@case("36a")
def big_endian(folder: Path) -> Outcome:
    """torch swaps by the class of the storage, which is that of bytes for the newer dtypes: it gets those wrong."""
    c32 = pattern(6, torch.complex32)
    tree = {
        "f32": count(4),
        "f64": count(3, torch.float64),
        "i64": count(4, torch.int64),
        "bf16": count(3, torch.bfloat16),
        "bool": torch.tensor([True, False]),
        "c64": torch.complex(count(2), count(2, first=5)),
        "u16": pattern(6, torch.uint16),
        "u32": pattern(6, torch.uint32),
        "u64": pattern(6, torch.uint64),
        "c32": c32,
        "bits16": pattern(3, torch.bits16),
        "f8": pattern(6, torch.float8_e5m2),
        "view": c32[2:],
        "sparse": sparse_matrices()["coo"],
        "qint32": quantized(count(4), 1.0, 7, torch.qint32),
        "channels": quantized(
            count(4).reshape(2, 2), count(2, torch.float64, first=1), count(2, torch.int64), 0, torch.qint8
        ),
        "nested": torch.nested.nested_tensor([count(2), count(3)]),
        "typed": count(3, torch.int16)._typed_storage(),  # type: ignore[no-untyped-call]
        "untyped": count(3).untyped_storage(),
    }
    units = [4, 8, 8, 2, 1, 4, 2, 4, 8, 2, 2, 1, 8, 4, 4, 1, 8, 8, 4, 8, 8, 8, 2, 1]  # of each storage, in order

    def turn(name: str, data: bytes) -> bytes:
        if name.endswith("/byteorder"):
            return b"big"
        key = name.rpartition("/data/")[2]
        unit = units[int(key)] if key.isdigit() else 1
        return b"".join(data[at : at + unit][::-1] for at in range(0, len(data), unit))

    file = saved(tree)
    assert sum("/data/" in name for name, _ in makers.records_of(file)) == len(units)
    return Loads(makers.edited(file, turn).data, tree)


@case("36b")
def no_byteorder(folder: Path) -> Outcome:
    tree = small_model()

    def drop(name: str, data: bytes) -> bytes | None:
        return None if name.endswith("/byteorder") else data

    return Loads(makers.edited(saved(tree), drop).data, tree)


# --- case 37: before ZIP ---


def saved_as_stream(tree: object) -> bytes:
    target = io.BytesIO()
    torch.save(tree, target, _use_new_zipfile_serialization=False)
    return target.getvalue()


@case("37a")
def stream(folder: Path) -> Outcome:
    w = count(12).reshape(3, 4)
    tree = collections.OrderedDict(
        w=w,
        row=w[1],
        half=count(3, torch.float16),
        none=torch.empty(0),
        parameter=torch.nn.Parameter(count(2)),
        conj=torch.complex(count(2), count(2)).conj(),
    )
    return Loads(saved_as_stream(tree), tree)


@case("37b")
def stream_with_a_view_of_a_storage(folder: Path) -> Outcome:
    """Elements 2 to 5 of storage 100 are storage 101, and the tensor begins at its second one."""
    root = count(6)
    program = Pickle().dict(
        {
            "root": lambda p: p.tensor("FloatStorage", "100", 6, size=[6], stride=[1], view=""),
            "view": lambda p: p.tensor(
                "FloatStorage", "100", 6, size=[2], stride=[1], storage_offset=1, view=("101", 2, 3)
            ),
        }
    )
    file = makers.stream(program.stop(), {"100": (6, root.numpy().tobytes())})
    return Loads(file, {"root": root, "view": root[3:5]})


@case("37c")
def stream_of_a_module(folder: Path) -> Outcome:
    """Its class comes by ('module', class, source file, source), which is the class and no more."""

    def write(pickle: Pickle) -> None:
        pickle.mark().text("module").name(TRAP, "Net").text(f"{TRAP}.py").text("raise SystemExit").raw(b"tQ)\x81}(")
        pickle.text("w").tensor("FloatStorage", "0", 2, size=[2], stride=[1], view="").raw(b"ub")

    program = Pickle().dict({"net": write}).stop()
    file = makers.stream(program, {"0": (2, count(2).numpy().tobytes())})
    return Loads(file, {"net": Inert(f"{TRAP}.Net", state={"w": count(2)}, new=True)})


@case("37d")
def two_streams_in_one_file(folder: Path) -> Outcome:
    first, second = saved_as_stream({"x": count(3)}), saved_as_stream({"y": count(4)})
    return Loads(first + second, {"y": count(4)}, {"window": (len(first), len(second))})


@case("37e")
def tar(folder: Path) -> Outcome:
    root, tail = count(6), count(2, torch.int64, first=7)
    storages = [(1, "FloatStorage", 6, root.numpy().tobytes()), (2, "LongStorage", 2, tail.numpy().tobytes())]
    tensors = [(11, 1, [2, 3], [3, 1], 0), (12, 2, [2], [1], 0), (13, 3, [2], [1], 1)]
    program = Pickle().dict(
        {
            "a": lambda p: p.text("11").raw(b"Q"),
            "b": lambda p: p.integer(12).raw(b"Q"),
            "view": lambda p: p.text("13").raw(b"Q"),
            "again": lambda p: p.text("11").raw(b"Q"),
        }
    )
    file = makers.tar(makers.tar_members(storages, [(3, 1, 2, 3)], tensors, program.stop()))
    a = root.reshape(2, 3)
    return Loads(file, {"a": a, "b": tail, "view": root[3:5], "again": a})


@case("37f")
def stream_of_new_dtypes(folder: Path) -> Outcome:
    """Untyped storages in a stream: torch.save writes them, and no torch.load reads them."""
    tree = {"u": pattern(6, torch.uint16), "f8": pattern(6, torch.float8_e5m2), "w": count(3)}
    return Loads(saved_as_stream(tree), tree)


# --- case 38: other archives of torch ---------------------------------------------------------------------------------


def script_module(write: Callable[[Pickle], object]) -> Pickle:
    """What TorchScript's pickler writes of a module with one dict of attributes."""
    pickle = Pickle().name("__torch__", "M").raw(b")\x81")
    write(pickle)
    return pickle.raw(b"b")


def script_archive(main: Pickle, constants: Pickle, storages: Mapping[str, bytes]) -> bytes:
    archive = Zip().add_all([(f"m/{name}", data) for name, data in storages.items()])
    archive.add("m/data.pkl", main.stop())
    archive.add("m/code/__torch__.py", b"raise SystemExit", method=makers.DEFLATED)
    archive.add_all([("m/constants.pkl", constants.stop()), ("m/version", b"3\n"), ("m/byteorder", b"little")])
    return archive.finish().data


@case("38a")
def script_module_with_lists(folder: Path) -> Outcome:
    """Lists and dicts have their types around them, in calls that return their first argument."""
    w = count(6)

    def tensor(p: Pickle) -> Pickle:
        return p.tensor("FloatStorage", "0", 6, size=[6], stride=[1])

    def parts(p: Pickle) -> None:
        p.call("torch.jit._pickle", "restore_type_tag", lambda p: tensor(p.raw(b"]")).raw(b"a"), lambda p: p.text("T"))

    def numbers(p: Pickle) -> None:
        p.call("torch.jit._pickle", "build_intlist", lambda p: p.raw(b"](").integer(1).integer(2).raw(b"e"))

    main = script_module(lambda p: p.dict({"w": tensor, "parts": parts, "numbers": numbers}))
    file = script_archive(main, Pickle().raw(b")"), {"data/0": w.numpy().tobytes()})
    return Loads(file, Inert("__torch__.M", state={"w": w, "parts": [w[:]], "numbers": [1, 2]}, new=True))


@case("38b")
def script_constants(folder: Path) -> Outcome:
    constant = count(2)
    constants = Pickle().raw(b"(").tensor("FloatStorage", "0", 2, size=[2], stride=[1]).raw(b"t")
    main = script_module(lambda p: p.dict({"training": lambda p: p.boolean(True)}))
    file = script_archive(main, constants, {"constants/0": constant.numpy().tobytes()})
    return Loads(file, Inert("__torch__.M", state={"training": True}, new=True), listed={"constants.0": constant})


@case("38c")
def exported_program(folder: Path) -> Outcome:
    """Two names of one raw record, one of them a part of it; a buffer; and a constant."""
    w = torch.nn.Parameter(count(6).reshape(2, 3))
    tied = torch.nn.Parameter(w.detach())  # a second object, as torch.export.load makes it
    tree = {"w": w, "tied": tied, "part": w.detach()[1], "buffer": count(5, torch.int64)}
    constant = count(2, torch.bfloat16)

    def payload(path_name: str, dtype: int, tensor: torch.Tensor) -> dict[str, Any]:
        meta = {
            "dtype": dtype,
            "sizes": [{"as_int": n} for n in tensor.shape],
            "strides": [{"as_int": n} for n in tensor.stride()],
            "storage_offset": {"as_int": tensor.storage_offset()},
            "requires_grad": tensor.requires_grad,
            "device": {"type": "cpu", "index": None},
            "layout": 7,
        }
        is_param = isinstance(tensor, torch.nn.Parameter)
        return {"path_name": path_name, "is_param": is_param, "use_pickle": False, "tensor_meta": meta}

    weights = {
        name: payload(f"weight_{int(name == 'buffer')}", 5 if name == "buffer" else 7, tree[name]) for name in tree
    }
    archive = Zip().add_all(
        [
            ("m/data/weights/weight_0", w.detach().numpy().tobytes()),
            ("m/data/weights/weight_1", tree["buffer"].numpy().tobytes()),
            ("m/data/weights/model_weights_config.json", json.dumps({"config": weights}).encode()),
            ("m/data/constants/tensor_0", logical_bytes(constant)),
            (
                "m/data/constants/model_constants_config.json",
                json.dumps({"config": {"c": payload("tensor_0", 13, constant)}}).encode(),
            ),
            ("m/models/model.json", b"no JSON, and never read"),
            ("m/data/sample_inputs/model.pt", b"never read"),
            ("m/archive_format", b"pt2"),
            ("m/byteorder", b"little"),
        ]
    )
    return Loads(archive.finish().data, tree, listed={**tree, "constants.c": constant})


@case("38d")
def package(folder: Path) -> Outcome:
    """Keys of storages are integers, and their records lie in a folder of the package's own."""
    tree = {"a": count(3), "b": count(2, torch.int64)}
    program = Pickle(3).dict(
        {
            "a": lambda p: p.tensor("FloatStorage", 0, 3, size=[3], stride=[1]),
            "b": lambda p: p.tensor("LongStorage", 1, 2, size=[2], stride=[1]),
        }
    )
    archive = Zip().add_all([(f"p/.data/{i}.storage", t.numpy().tobytes()) for i, t in enumerate(tree.values())])
    archive.add_all([("p/model/w.pkl", program.stop()), ("p/code.py", b"raise SystemExit")])
    archive.add_all([("p/.data/extern_modules", b"torch\n"), ("p/byteorder", b"little")])
    return Loads(archive.finish().data, tree, listed={f"model/w.pkl:{name}": t for name, t in tree.items()})


# --- case 39: damage --------------------------------------------------------------------------------------------------


@case("39a")
def missing_record(folder: Path) -> Outcome:
    tree = small_model()

    def drop(name: str, data: bytes) -> bytes | None:
        return None if name.endswith("/data/1") else data

    return Refused(makers.edited(saved(tree), drop).data, {key: tree[key] for key in "wh"})


@case("39b")
def short_record(folder: Path) -> Outcome:
    tree = small_model()

    def cut(name: str, data: bytes) -> bytes:
        return data[:-8] if name.endswith("/data/1") else data

    return Refused(makers.edited(saved(tree), cut).data, {key: tree[key] for key in "wh"})


@case("39c")
def truncated_file(folder: Path) -> Outcome:
    file = saved(small_model())
    return Refused(file[: len(file) // 2])


@case("39d")
def damaged_deflate_data(folder: Path) -> Outcome:
    """torch.load returns uninitialised memory here."""
    tree = {"v": count(8), "w": count(64)}
    archive = Zip()
    for name, data in makers.records_of(saved(tree)):
        stored = b"\xff" * 100 if name.endswith("/data/1") else None
        archive.add(name, data, method=makers.DEFLATED, stored=stored)
    return Refused(archive.finish().data, {"v": tree["v"]})


@case("39e")
def damaged_local_header(folder: Path) -> Outcome:
    tree = small_model()
    archive = Zip()
    for name, data in makers.records_of(saved(tree)):
        archive.add(name, data, local={"signature": b"PK\3\5"} if name.endswith("/data/2") else None)
    return Refused(archive.finish().data, {key: tree[key] for key in "wb"})


@case("39f")
def unknown_byteorder(folder: Path) -> Outcome:
    def spoil(name: str, data: bytes) -> bytes:
        return b"middle" if name.endswith("/byteorder") else data

    return Refused(makers.edited(saved(small_model()), spoil).data)


@case("39g")
def no_stop(folder: Path) -> Outcome:
    def cut(name: str, data: bytes) -> bytes:
        return data[:-1] if name.endswith("/data.pkl") else data

    return Refused(makers.edited(saved(small_model()), cut).data)


# --- case 40: malice --------------------------------------------------------------------------------------------------

FOUR_FLOATS = struct.pack("<4f", 1, 2, 3, 4)


def _tensor_w(**geometry: Any) -> Callable[[Pickle], object]:
    """A tensor on the four floats of storage 0."""
    return lambda p: p.tensor("FloatStorage", "0", 4, **geometry)


def _four_floats(write: Callable[[Pickle], object]) -> bytes:
    return makers.checkpoint(Pickle().dict({"w": write}).stop(), {"0": FOUR_FLOATS}).data


@case("40a")
def call_of_os_mkdir(folder: Path) -> Outcome:
    program = Pickle().call("os", "mkdir", lambda p: p.text(PWNED)).stop()
    return Loads(makers.checkpoint(program).data, Inert("os.mkdir", (PWNED,)))


@case("40b")
def size_beyond_the_storage(folder: Path) -> Outcome:
    return Refused(_four_floats(_tensor_w(size=[8], stride=[1])))


@case("40c")
def stride_beyond_the_storage(folder: Path) -> Outcome:
    return Refused(_four_floats(_tensor_w(size=[4], stride=[1000])))


@case("40d")
def offset_beyond_the_storage(folder: Path) -> Outcome:
    return Refused(_four_floats(_tensor_w(size=[2], stride=[1], storage_offset=100)))


@case("40e")
def negative_stride(folder: Path) -> Outcome:
    return Refused(_four_floats(_tensor_w(size=[4], stride=[-1], storage_offset=3)))


@case("40f")
def element_count_beyond_64_bits(folder: Path) -> Outcome:
    return Refused(_four_floats(_tensor_w(size=[1 << 62, 4], stride=[4, 1])))


@case("40g")
def terabytes_on_four_bytes(folder: Path) -> Outcome:
    """A right view, and a large one: it may be had, and must not be written out."""
    storage = torch.tensor([1.0, 2.0, 3.0, 4.0])
    return Loads(_four_floats(_tensor_w(size=[1 << 40], stride=[0])), {"w": storage[0].expand(1 << 40)})


@case("40h")
def negative_element_count(folder: Path) -> Outcome:
    program = Pickle().dict({"w": lambda p: p.tensor("FloatStorage", "0", -4, size=[4], stride=[1])}).stop()
    return Refused(makers.checkpoint(program, {"0": FOUR_FLOATS}).data)


def _with_a_second_record(rename: Callable[[str], str]) -> bytes:
    records = makers.records_of(saved({"w": count(4)}))
    again = [(rename(name), b"\xff" * len(data)) for name, data in records if name.endswith("/data/0")]
    return makers.rezipped(records + again).data


@case("40i")
def one_name_twice(folder: Path) -> Outcome:
    return Refused(_with_a_second_record(lambda name: name))


@case("40j")
def one_name_twice_but_for_case(folder: Path) -> Outcome:
    return Refused(_with_a_second_record(lambda name: name.replace("/data/", "/DATA/")))


@case("40k")
def one_storage_of_two_types(folder: Path) -> Outcome:
    program = Pickle().dict(
        {
            "a": _tensor_w(size=[4], stride=[1]),
            "b": lambda p: p.tensor("IntStorage", "0", 4, size=[4], stride=[1]),
        }
    )
    return Refused(makers.checkpoint(program.stop(), {"0": FOUR_FLOATS}).data)


@case("40l")
def key_that_climbs(folder: Path) -> Outcome:
    program = Pickle().dict({"w": lambda p: p.tensor("ByteStorage", "../version", 2, size=[2], stride=[1])}).stop()
    return Refused(makers.checkpoint(program).data)


@case("40m")
def call_of_a_storage_class(folder: Path) -> Outcome:
    program = Pickle().call("torch.storage", "UntypedStorage", lambda p: p.integer(64)).stop()
    return Loads(makers.checkpoint(program).data, Inert("torch.storage.UntypedStorage", (64,)))


@case("40n")
def call_of_a_tensor_class(folder: Path) -> Outcome:
    program = Pickle().call("torch", "FloatTensor", lambda p: p.integer(1 << 20)).stop()
    return Loads(makers.checkpoint(program).data, Inert("torch.FloatTensor", (1 << 20,)))


@case("40o")
def call_of_bytearray_with_a_size(folder: Path) -> Outcome:
    program = Pickle().call("__builtin__", "bytearray", lambda p: p.integer(1 << 20)).stop()
    return Loads(makers.checkpoint(program).data, Inert("__builtin__.bytearray", (1 << 20,)))


@case("40p")
def memo_slot_of_two_billion(folder: Path) -> Outcome:
    program = Pickle().raw(b"}").put((1 << 31) - 1).stop()
    return Loads(makers.checkpoint(program).data, {})


@case("40q")
def text_longer_than_the_pickle(folder: Path) -> Outcome:
    return Refused(makers.checkpoint(Pickle().raw(b"X\xff\xff\xff\x7fabc").stop()).data)


@case("40r")
def call_on_an_empty_stack(folder: Path) -> Outcome:
    return Refused(makers.checkpoint(Pickle().reduce().stop()).data)


@case("40s")
def overlapping_records(folder: Path) -> Outcome:
    """Two names for one local header, which has the first name."""
    archive = Zip()
    first: makers.Record | None = None
    for name, data in makers.records_of(saved({"w": count(64), "v": count(64, first=9)})):
        bend = {"header_offset": first.header_offset} if first is not None and name.endswith("/data/1") else None
        record = archive.add(name, data, central=bend)
        first = record if name.endswith("/data/0") else first
    return Refused(archive.finish().data)


@case("40t")
def persistent_id_of_another_kind(folder: Path) -> Outcome:
    program = Pickle().mark().text("module").name("os", "mkdir").none().none().raw(b"tQ").stop()
    return Refused(makers.checkpoint(program).data)


@case("40u")
def local_header_of_another_name(folder: Path) -> Outcome:
    archive = Zip()
    archive.add("archive/data.pkl", Pickle().dict({"w": _tensor_w(size=[4], stride=[1])}).stop())
    archive.add("archive/data/0", FOUR_FLOATS, local_name=b"archive/data/X")
    archive.add("archive/version", b"3\n")
    return Refused(archive.finish().data)


@case("40v")
def two_archives_of_one_layout(folder: Path) -> Outcome:
    """torch.load reads the first, zipfile and whoever scans with it the second."""
    return Refused(saved({"x": torch.full((4,), 1.0)}) + saved({"x": torch.full((4,), 2.0)}))
