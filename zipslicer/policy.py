"""Policy: every global a pickle may name and what it means; the inert Placeholder; the Limits.

A global is a pair of strings, looked up here by exact match and nowhere else. Nothing is imported, resolved or called by
a name out of a file: `construct` makes the few plain Python values below from arguments it has checked, by its own hand.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from .backend import COMPLEX, DIFFERENTIABLE, UNTYPED, Dialect, Verb
from .backend import Limits as MachineLimits
from .errors import printable

__all__ = [
    "COMPOSITES",
    "DTYPES",
    "LEVELS",
    "NOT_PLAIN",
    "Limits",
    "Meaning",
    "Placeholder",
    "actions",
    "construct",
    "describe",
    "dtype_index",
    "dtype_named",
    "dtype_of",
    "floating_index",
    "is_floating",
    "machine_limits",
    "meaning_of",
    "public_first",
]


class Dtype(NamedTuple):
    """A torch dtype, without torch."""

    name: str  # torch.<name>
    itemsize: int  # bytes an element
    unit: int  # bytes that a foreign byte order reverses: half an element for complex numbers
    storage: str | None  # torch.<storage>, the class of its persistent ids; None where they are untyped (v3)
    code: str | None  # its name in safetensors
    traits: int


_F, _C = DIFFERENTIABLE, DIFFERENTIABLE | COMPLEX

# The order is part of nothing on disk: an index lives as long as one open file.
DTYPES: Final[tuple[Dtype, ...]] = (
    Dtype("uint8", 1, 1, "ByteStorage", "U8", 0),
    Dtype("int8", 1, 1, "CharStorage", "I8", 0),
    Dtype("int16", 2, 2, "ShortStorage", "I16", 0),
    Dtype("int32", 4, 4, "IntStorage", "I32", 0),
    Dtype("int64", 8, 8, "LongStorage", "I64", 0),
    Dtype("float16", 2, 2, "HalfStorage", "F16", _F),
    Dtype("float32", 4, 4, "FloatStorage", "F32", _F),
    Dtype("float64", 8, 8, "DoubleStorage", "F64", _F),
    Dtype("bfloat16", 2, 2, "BFloat16Storage", "BF16", _F),
    Dtype("bool", 1, 1, "BoolStorage", "BOOL", 0),
    Dtype("complex64", 8, 4, "ComplexFloatStorage", "C64", _C),
    Dtype("complex128", 16, 8, "ComplexDoubleStorage", None, _C),
    Dtype("qint8", 1, 1, "QInt8Storage", None, 0),
    Dtype("quint8", 1, 1, "QUInt8Storage", None, 0),
    Dtype("qint32", 4, 4, "QInt32Storage", None, 0),
    Dtype("quint4x2", 1, 1, "QUInt4x2Storage", None, 0),
    Dtype("quint2x4", 1, 1, "QUInt2x4Storage", None, 0),
    Dtype("uint16", 2, 2, None, "U16", 0),
    Dtype("uint32", 4, 4, None, "U32", 0),
    Dtype("uint64", 8, 8, None, "U64", 0),
    Dtype("complex32", 4, 2, None, None, _C),
    Dtype("bcomplex32", 4, 2, None, None, _C),
    Dtype("float8_e5m2", 1, 1, None, "F8_E5M2", _F),
    Dtype("float8_e4m3fn", 1, 1, None, "F8_E4M3", _F),
    Dtype("float8_e5m2fnuz", 1, 1, None, "F8_E5M2FNUZ", _F),
    Dtype("float8_e4m3fnuz", 1, 1, None, "F8_E4M3FNUZ", _F),
    Dtype("float8_e8m0fnu", 1, 1, None, "F8_E8M0", _F),
    Dtype("float4_e2m1fn_x2", 1, 1, None, "F4", _F),
    Dtype("bits8", 1, 1, None, None, 0),
    Dtype("bits16", 2, 2, None, None, 0),
    Dtype("bits1x8", 1, 1, None, None, 0),
    Dtype("bits2x4", 1, 1, None, None, 0),
    Dtype("bits4x2", 1, 1, None, None, 0),
)

_ALIASES = {
    "half": "float16",
    "float": "float32",
    "double": "float64",
    "short": "int16",
    "int": "int32",
    "long": "int64",
}


class Meaning:
    """What a global that the machine leaves alone means to us."""

    STRANGER: Final = 0
    SET: Final = 1
    FROZENSET: Final = 2
    BYTES: Final = 3
    BYTEARRAY: Final = 4
    COMPLEX_NUMBER: Final = 5
    ENCODE: Final = 6
    COUNTER: Final = 7
    DEFAULTDICT: Final = 8
    RANGE: Final = 9
    SLICE: Final = 10
    FACTORY: Final = 11  # a builtin type that stands as the factory of a defaultdict
    PARTIAL: Final = 12
    LAST_PLAIN: Final = 12  # up to here construct() makes the value; from here on tensors.py does, with torch or NumPy
    FIRST: Final = 13  # returns its first argument: Program puts that in place of the call
    SPARSE: Final = 14  # these are the tensors of composites.py
    QUANTIZED: Final = 15
    NESTED: Final = 16
    META: Final = 17
    FROM_CPU: Final = 18
    FROM_NUMPY: Final = 19
    SIZE: Final = 20
    DEVICE: Final = 21
    DTYPE: Final = 22
    LAYOUT: Final = 23
    QSCHEME: Final = 24
    MEMORY_FORMAT: Final = 25
    PARAMETER: Final = 26
    PARAMETER_WITH_STATE: Final = 27
    TYPED: Final = 28  # a tensor with a class and attributes of its own
    NUMPY_ARRAY: Final = 30
    NUMPY_NDARRAY: Final = 31
    NUMPY_DTYPE: Final = 32
    NUMPY_SCALAR: Final = 33
    NUMPY_BUFFER: Final = 34


COMPOSITES: Final = range(Meaning.SPARSE, Meaning.FROM_NUMPY + 1)  # tensors of more or less than one dense row

_PLAIN: dict[str, dict[str, int]] = {
    "builtins": {
        "set": Meaning.SET,
        "frozenset": Meaning.FROZENSET,
        "bytes": Meaning.BYTES,
        "bytearray": Meaning.BYTEARRAY,
        "complex": Meaning.COMPLEX_NUMBER,
        "range": Meaning.RANGE,
        "slice": Meaning.SLICE,
        "list": Meaning.FACTORY,
        "dict": Meaning.FACTORY,
        "int": Meaning.FACTORY,
        "float": Meaning.FACTORY,
        "str": Meaning.FACTORY,
        "bool": Meaning.FACTORY,
    },
    "_codecs": {"encode": Meaning.ENCODE},
    "collections": {"Counter": Meaning.COUNTER, "defaultdict": Meaning.DEFAULTDICT},
    "functools": {"partial": Meaning.PARTIAL},
    "torch": {
        "Size": Meaning.SIZE,
        "device": Meaning.DEVICE,
        "per_tensor_affine": Meaning.QSCHEME,
        "per_channel_affine": Meaning.QSCHEME,
        "per_tensor_symmetric": Meaning.QSCHEME,
        "per_channel_symmetric": Meaning.QSCHEME,
        "per_channel_affine_float_qparams": Meaning.QSCHEME,
    },
    "torch.serialization": {"_get_layout": Meaning.LAYOUT},
    "torch._utils": {
        "torch.contiguous_format": Meaning.MEMORY_FORMAT,
        "torch.channels_last": Meaning.MEMORY_FORMAT,
        "torch.channels_last_3d": Meaning.MEMORY_FORMAT,
        "torch.preserve_format": Meaning.MEMORY_FORMAT,
        "_rebuild_parameter": Meaning.PARAMETER,
        "_rebuild_parameter_with_state": Meaning.PARAMETER_WITH_STATE,
        "_rebuild_sparse_tensor": Meaning.SPARSE,
        "_rebuild_qtensor": Meaning.QUANTIZED,
        "_rebuild_nested_tensor": Meaning.NESTED,
        "_rebuild_meta_tensor_no_storage": Meaning.META,
        "_rebuild_device_tensor_from_cpu_tensor": Meaning.FROM_CPU,
        "_rebuild_device_tensor_from_numpy": Meaning.FROM_NUMPY,
        "_rebuild_xla_tensor": Meaning.FROM_NUMPY,
    },
    # What TorchScript's pickler puts around lists and dicts, to tell their types.
    "torch.jit._pickle": {
        "build_intlist": Meaning.FIRST,
        "build_doublelist": Meaning.FIRST,
        "build_boollist": Meaning.FIRST,
        "build_tensorlist": Meaning.FIRST,
        "build_tensor_from_id": Meaning.FIRST,
        "restore_type_tag": Meaning.FIRST,
    },
    "torch._tensor": {"_rebuild_from_type_v2": Meaning.TYPED, "_rebuild_from_type": Meaning.TYPED},
    "torch.tensor": {"_rebuild_from_type": Meaning.TYPED},
    "numpy": {"ndarray": Meaning.NUMPY_NDARRAY, "dtype": Meaning.NUMPY_DTYPE},
    # NumPy 2 moved its core to numpy._core; a file has the names of the NumPy that wrote it.
    "numpy._core.multiarray": {"_reconstruct": Meaning.NUMPY_ARRAY, "scalar": Meaning.NUMPY_SCALAR},
    "numpy.core.multiarray": {"_reconstruct": Meaning.NUMPY_ARRAY, "scalar": Meaning.NUMPY_SCALAR},
    "numpy._core.numeric": {"_frombuffer": Meaning.NUMPY_BUFFER},
    "numpy.core.numeric": {"_frombuffer": Meaning.NUMPY_BUFFER},
}

# Protocols 0 to 2 write the names that Python 2 knew.
_PYTHON2_MODULES = {"builtins": ("__builtin__",)}
_PYTHON2_NAMES = {"range": "xrange", "int": "long", "str": "unicode"}

_MACHINE: dict[tuple[str, str], int] = {
    ("collections", "OrderedDict"): Verb.ORDERED_DICT,
    ("torch._utils", "_rebuild_tensor"): Verb.TENSOR,
    ("torch._utils", "_rebuild_tensor_v2"): Verb.TENSOR_V2,
    ("torch._utils", "_rebuild_tensor_v3"): Verb.TENSOR_V3,
    ("torch._tensor", "_rebuild_from_type_v2"): Verb.TYPED,
    ("torch._tensor", "_rebuild_from_type"): Verb.TYPED,
    ("torch.tensor", "_rebuild_from_type"): Verb.TYPED,
    ("torch", "Size"): Verb.SIZE,
}


def _tables() -> tuple[dict[tuple[str, str], int], dict[tuple[str, str], int]]:
    """-> (actions for the machine, meanings for us), each by (module, name)."""
    meanings: dict[tuple[str, str], int] = {}
    for module, names in _PLAIN.items():
        for name, meaning in names.items():
            meanings[module, name] = meaning
            for old in _PYTHON2_MODULES.get(module, ()):
                meanings[old, name] = meaning
                if name in _PYTHON2_NAMES:
                    meanings[old, _PYTHON2_NAMES[name]] = meaning
    acts = dict.fromkeys(meanings, int(Verb.NONE))
    acts.update(_MACHINE)
    for index, dtype in enumerate(DTYPES):
        facts = index << 8 | dtype.itemsize << 16 | dtype.traits << 24
        for spelling in (dtype.name, *(short for short, name in _ALIASES.items() if name == dtype.name)):
            acts["torch", spelling] = Verb.DTYPE | facts
            meanings["torch", spelling] = Meaning.DTYPE
        if dtype.storage:
            acts["torch", dtype.storage] = Verb.STORAGE | facts
            acts["torch.cuda", dtype.storage] = Verb.STORAGE | facts  # as old files have it
    acts["torch.storage", "UntypedStorage"] = Verb.STORAGE | UNTYPED << 8 | 1 << 16
    # Known names that have no meaning of their own here: as a value each is an inert placeholder.
    for known in (("torch", "Tensor"), ("torch.nn.parameter", "Parameter"), ("torch.nn.parameter", "Buffer")):
        acts[known] = int(Verb.NONE)
    return acts, meanings


_ACTIONS, _MEANINGS = _tables()


def actions() -> Mapping[tuple[str, str], int]:
    """What the pickle machine is told of globals; see backend.Actions."""
    return _ACTIONS


def meaning_of(module: str, name: str) -> int:
    """A Meaning; STRANGER for what is not in the table."""
    return _MEANINGS.get((module, name), Meaning.STRANGER)


def dtype_index(name: str) -> int | None:
    """The place in DTYPES of a global that is a dtype: of "torch.float32", "torch.half"; None for any other."""
    module, _, spelling = name.rpartition(".")
    action = _ACTIONS.get((module, spelling), 0)
    return action >> 8 & 0xFF if action & 0xFF == Verb.DTYPE else None


def dtype_named(name: str) -> int:
    """The place in DTYPES of a dtype: of "float32"."""
    return next(i for i, dtype in enumerate(DTYPES) if dtype.name == name)


def dtype_of(dtype: Any) -> int:
    """The same of a dtype of torch or NumPy, or of its name. Raises: ValueError."""
    name = _dtype_name(dtype)
    if all(name != known.name for known in DTYPES):
        raise ValueError(f"torch has no storages of dtype {dtype!r}")
    return dtype_named(name)


def _dtype_name(dtype: Any) -> str:
    name = dtype if isinstance(dtype, str) else getattr(dtype, "name", None) or str(dtype)
    return str(name).removeprefix("torch.")


def is_floating(dtype: int) -> bool:
    """Whether a dtype of DTYPES can be cast, and cast to. float4 has two elements in what torch counts as one: it cannot."""
    name, traits = DTYPES[dtype].name, DTYPES[dtype].traits
    return bool(traits & DIFFERENTIABLE) and not traits & COMPLEX and name != "float4_e2m1fn_x2"


def floating_index(dtype: Any) -> int:
    """The place in DTYPES of such a one, however it is given. Raises: ValueError."""
    name = _dtype_name(dtype)
    names = {each.name: index for index, each in enumerate(DTYPES) if is_floating(index)}
    if name not in names:
        raise ValueError(f"tensors are cast to a floating-point dtype ({', '.join(names)}), and {dtype!r} is none")
    return names[name]


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a file may ask of us before a tensor is touched. Raise one where a real file needs it.

    Attributes:
        program_nbytes: of a record that holds a pickle. 1 GiB is 8 million tensors.
        inflated_nbytes: of such a record when it is deflated; torch.save never compresses.
        inflated_ratio: inflated bytes for each byte in the file; a pickle compresses about 20 to 1. A gzip stream may have
            the larger of the two.
        directory_nbytes: of the central directory. 1 GiB is 16 million records.
        depth: of nesting. Python's own pickler cannot write much more, and whoever prints or compares the result recurses.
        dimensions: of a tensor; torch itself stops at 64.
        text_nbytes: of a line (a global's module or name).
        long_nbytes: of an integer beyond 64 bits.
        tuple_keys: dict keys that are tuples. Python hashes tuples without a secret, so that thousands can be made to collide.
    """

    program_nbytes: int = 1 << 30
    inflated_nbytes: int = 64 << 20
    inflated_ratio: int = 100
    directory_nbytes: int = 1 << 30
    depth: int = 1000
    dimensions: int = 64
    text_nbytes: int = 1 << 16
    long_nbytes: int = 1 << 16
    tuple_keys: int = 4096


def machine_limits(limits: Limits, refuse_unknown: bool, dialect: int = Dialect.ZIP) -> MachineLimits:
    return MachineLimits(
        limits.depth,
        limits.dimensions,
        limits.text_nbytes,
        limits.long_nbytes,
        limits.tuple_keys,
        refuse_unknown,
        dialect,
    )


# What people ask for of a mapping or a module, for which they take a placeholder that is the root of a file.
_OF_A_MAPPING = frozenset({
    "keys", "values", "items", "get", "get_meta", "get_slice", "get_tensor", "load_into", "materialize", "select", "stream",
    "parameters", "state_dict",
})  # fmt: skip


class Placeholder:
    """Stands for what the file names and zipslicer does not build: inert, and readable.

    Attributes of the pickled object are attributes here (``hp.lr``), list items and dict items are items (``hp["lr"]``).
    What zipslicer itself knows of it comes from `describe(placeholder)`, so that no name in a file can hide it or be
    hidden by it. A placeholder is never called, never equal to anything but itself, and never pickled: a round trip
    would put the original global back into a file.
    """

    __slots__ = ("__weakref__", "_zipslicer")

    _zipslicer: Description

    def __init__(self, description: Description) -> None:
        object.__setattr__(self, "_zipslicer", description)

    def __getattr__(self, name: str) -> Any:
        # Reached only where ordinary look-up found nothing, so never for a dunder that object has.
        about = object.__getattribute__(self, "_zipslicer")
        if not (name.startswith("__") and name.endswith("__")):
            attributes = about.attributes
            if name in attributes:
                return attributes[name]
            if not name.startswith("_"):
                found = _held(about, name, about.items)
                if found is not NOT_PLAIN:
                    return found
        hint = "; its tensors are in zipslicer.open(...).tensors" if name in _OF_A_MAPPING else ""
        raise AttributeError(f"placeholder of {_quoted(about.qualified)} has no attribute {name!r} in the file{hint}")

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("a placeholder cannot be changed")

    def __getitem__(self, key: Any) -> Any:
        about = self._zipslicer
        if type(key) is int and about.list_items and key not in about.items:
            return about.list_items[key]
        if key not in about.items:
            found = _held(about, key, about.attributes if type(key) is str else {})
            if found is not NOT_PLAIN:
                return found
            if type(key) is int and about.is_new and -len(about.args) <= key < len(about.args):
                return about.args[key]
        return about.items[key]

    __iter__ = None  # __getitem__ alone would make it iterable by index

    def __dir__(self) -> list[str]:
        about = self._zipslicer
        names = [*about.attributes, *about.items]
        for level in LEVELS:
            held = about.attributes.get(level)
            names += held if isinstance(held, Mapping) else ()
        content = _content(about)
        names += content if type(content) is dict else ()
        return sorted({name for name in names if isinstance(name, str) and name.isidentifier()})

    def __repr__(self) -> str:
        about = self._zipslicer
        if not about.called:
            return f"<placeholder {_quoted(about.qualified)}>"
        args = about.peek_args(4)
        shown = [_moment(about, a) if i == 0 else _short(a) for i, a in enumerate(args)]
        content = _content(about)
        if type(content) in (dict, list):  # and its own attributes are of no interest
            inside = content.items() if type(content) is dict else enumerate(content)
            shown += [f"{_short_key(k)}={_short(_bare(v))}" for k, v in itertools.islice(inside, 8)]
            more = len(content) - len(shown)
        else:
            shown += [f"{_short_key(k)}={_short(v)}" for k, v in about.peek_attributes(8)]
            more = len(about.args) + len(about.attributes) - len(shown)
            listed, items = about.peek_items(8)
            if listed:
                shown.append(f"[{', '.join(_short(v) for v in listed)}]")
            if items:
                shown.append(f"{{{', '.join(f'{_short(k)}: {_short(v)}' for k, v in items)}}}")
            more += len(about.list_items) + len(about.items) - len(listed) - len(items)
        if more > 0:
            shown.append(f"... {more} more")
        return f"<placeholder {_quoted(about.qualified)}({', '.join(shown)})>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"a placeholder is not pickled: it stands for {_quoted(self._zipslicer.qualified)}, which was not built"
        )

    def __copy__(self) -> Placeholder:
        return self

    def __deepcopy__(self, memo: Any) -> Placeholder:
        return self


@dataclasses.dataclass(repr=False)
class Description:
    """What a file says of one placeholder.

    Attributes:
        module, name: the global, as the file spells it.
        called: False for a global that stands as a value, True for what would have been made by calling it.
        is_new: made by the class's __new__ alone: of a tuple subclass, the arguments are then the items.
        args, kwargs: what it would have been called with.
        state: what BUILD would have given it, or None.
        attributes: the state as attributes, where it is a dict, or a dict and a dict of slots.
        list_items, items: what would have been appended to it and set in it.
        origin: for zipslicer.save: the program it is of, and the node in it.
    """

    module: str
    name: str
    called: bool = False
    is_new: bool = False
    args: tuple[Any, ...] = ()
    kwargs: dict[Any, Any] = dataclasses.field(default_factory=dict)
    state: Any = None
    attributes: dict[Any, Any] = dataclasses.field(default_factory=dict)
    list_items: list[Any] = dataclasses.field(default_factory=list)
    items: dict[Any, Any] = dataclasses.field(default_factory=dict)
    origin: Any = dataclasses.field(default=None, compare=False)

    @property
    def qualified(self) -> str:
        """``module.name``."""
        return f"{self.module}.{self.name}"

    def __repr__(self) -> str:
        # Within bounds, whatever the file says; the parts are there to be looked at one by one.
        return f"Description({_quoted(self.qualified)!r})"

    def peek_args(self, count: int) -> list[Any]:
        """The first arguments, to show: nothing is read for it."""
        return list(self.args[:count])

    def peek_attributes(self, count: int) -> list[tuple[Any, Any]]:
        """The first attributes, to show: nothing is read for it."""
        return list(public_first(self.attributes.items())[:count])

    def peek_items(self, count: int) -> tuple[list[Any], list[tuple[Any, Any]]]:
        """The first of list_items and of items, to show: nothing is read for it."""
        listed = list(self.list_items[:count])
        return listed, list(itertools.islice(self.items.items(), count - len(listed)))


def public_first(named: Iterable[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """The first attributes of an object, its inner ones last: those of a module would hide all others in a repr."""
    return sorted(itertools.islice(named, 64), key=lambda pair: type(pair[0]) is str and pair[0].startswith("_"))


# Where objects keep what they give out as their own attributes or items.
LEVELS: Final = ("_parameters", "_buffers", "_modules")  # of a torch.nn.Module
CONTENTS: Final = (("omegaconf.dictconfig", "DictConfig"), ("omegaconf.listconfig", "ListConfig"))


def _held(about: Description, key: Any, own: Mapping[Any, Any]) -> Any:
    """What an object holds under a name, as the libraries have it that wrote it; NOT_PLAIN for nothing.

    Items of an AttributeDict are its attributes, and may be asked for either way; parts of a module, and values of an
    omegaconf config, are those of their owner.
    """
    if key in own:
        return own[key]
    for level in LEVELS:
        held = about.attributes.get(level)
        if isinstance(held, Mapping) and str(key) in held:
            return held[str(key)]
    content = _content(about)
    if (type(content) is dict and key in content) or (
        type(content) is list and type(key) is int and -len(content) <= key < len(content)
    ):
        return _bare(content[key])
    return NOT_PLAIN


def _content(about: Description) -> Any:
    return about.attributes.get("_content") if (about.module, about.name) in CONTENTS else None


def _bare(value: Any) -> Any:
    """The value of a node of omegaconf."""
    if type(value) is Placeholder and value._zipslicer.module == "omegaconf.nodes":
        return value._zipslicer.attributes.get("_val", value)
    return value


def _moment(about: Description, packed: Any) -> str:
    """The first argument to show: a date or time as one reads it, where it is packed into bytes."""
    cls = {"datetime": dt.datetime, "date": dt.date, "time": dt.time}.get(about.name)
    if about.module != "datetime" or cls is None or type(packed) not in (str, bytes):
        return _short(packed)
    try:
        return _quoted(cls(packed if isinstance(packed, bytes) else packed.encode("latin-1")).isoformat())
    except (TypeError, ValueError, OverflowError):
        return _short(packed)


def describe(placeholder: Placeholder) -> Description:
    """What the file says of a placeholder: its global, arguments, state and items."""
    if type(placeholder) is not Placeholder:
        raise TypeError(f"describe() takes a Placeholder, not {type(placeholder).__name__}")
    return placeholder._zipslicer


def _quoted(text: str, limit: int = 120) -> str:
    """Text out of a file, for a terminal: printable, bounded."""
    text = printable(text[:limit])
    return text if len(text) <= limit else text[:limit]


def _short_key(key: Any) -> str:
    return _quoted(key, 40) if type(key) is str else _short(key)


def _short(value: Any) -> str:
    """A value in a few characters, without descending into it or calling any code of its own."""
    if type(value) in (str, bytes):
        return _quoted(repr(value[:40]))
    if value is None or type(value) in (bool, int, float):
        return _quoted(repr(value), 40) if not isinstance(value, int) or abs(value) < 1 << 128 else "<large int>"
    if type(value) is Placeholder:
        return f"<{_quoted(value._zipslicer.qualified, 60)}>"
    if type(value) in (tuple, list) and len(value) <= 6 and all(_is_number(v) for v in value):
        return _quoted(repr(value))
    if type(value).__name__ == "TensorInfo":
        return _quoted(f"<{value.dtype_name} {list(value.shape)}>")
    if type(value).__module__ == "torch" and type(value).__name__ in ("dtype", "device", "layout", "qscheme"):
        return _quoted(repr(value))
    return f"<{type(value).__name__}>"


def _is_number(value: Any) -> bool:
    return value is None or type(value) in (bool, float) or (type(value) is int and abs(value) < 1 << 64)


NOT_PLAIN: Final = object()  # construct(): not one of the calls that are ever written; a placeholder will stand for it

_FACTORIES: dict[str, Callable[..., Any]] = {
    "list": list, "dict": dict, "int": int, "long": int, "float": float, "str": str, "unicode": str, "bool": bool, "set": set
}  # fmt: skip
_ENCODINGS = ("latin1", "latin-1", "utf-8", "utf8", "ascii")


def construct(meaning: int, args: Sequence[Any]) -> Any:
    """A plain Python value from a call in the file, or NOT_PLAIN.

    Only what Python's own pickler writes is taken: no size is ever an argument (bytearray(1 << 40)), and no codec but
    the three that carry bytes.
    """
    count = len(args)
    if meaning == Meaning.SET or meaning == Meaning.FROZENSET:
        if count == 1 and type(args[0]) in (list, tuple):
            return _hashed(set if meaning == Meaning.SET else frozenset, args[0])
        return (set() if meaning == Meaning.SET else frozenset()) if not count else NOT_PLAIN
    if meaning == Meaning.ENCODE:
        if count == 2 and type(args[0]) is str and type(args[1]) is str and args[1] in _ENCODINGS:
            try:
                return args[0].encode(args[1])
            except UnicodeEncodeError:
                return NOT_PLAIN
        return NOT_PLAIN
    if meaning == Meaning.BYTES or meaning == Meaning.BYTEARRAY:
        made = bytes if meaning == Meaning.BYTES else bytearray
        if not count:
            return made()
        if count == 1 and type(args[0]) in (bytes, bytearray):
            return made(args[0])
        if count == 2 and type(args[0]) is str and type(args[1]) is str and args[1] in _ENCODINGS:
            try:
                return made(args[0].encode(args[1]))
            except UnicodeEncodeError:
                return NOT_PLAIN
        return NOT_PLAIN
    if meaning == Meaning.COMPLEX_NUMBER:
        return complex(*args) if count == 2 and all(type(a) is float for a in args) else NOT_PLAIN
    if meaning == Meaning.COUNTER:
        if not count:
            return collections.Counter()
        return (
            collections.Counter(args[0])
            if count == 1 and isinstance(args[0], dict) and all(type(v) is int for v in args[0].values())
            else NOT_PLAIN
        )
    if meaning == Meaning.DEFAULTDICT:
        if not count:
            return collections.defaultdict()
        factory = args[0] if count == 1 else NOT_PLAIN
        if factory is None:
            return collections.defaultdict()
        about = describe(factory) if type(factory) is Placeholder else None
        if about and not about.called and meaning_of(about.module, about.name) in (Meaning.FACTORY, Meaning.SET):
            return collections.defaultdict(_FACTORIES[about.name])
        return NOT_PLAIN
    if meaning == Meaning.RANGE:
        return range(*args) if count == 3 and all(type(a) is int for a in args) and args[2] else NOT_PLAIN
    if meaning == Meaning.SLICE:
        return slice(*args) if count == 3 and all(a is None or type(a) is int for a in args) else NOT_PLAIN
    return NOT_PLAIN


def _hashed(made: Callable[[Any], Any], values: Any) -> Any:
    """A set of plain scalars; anything else could be made to collide, or cannot be hashed."""
    small = all(
        v is None or type(v) in (bool, float, str, bytes, Placeholder) or (type(v) is int and abs(v) < 1 << 63)
        for v in values
    )
    return made(values) if small else NOT_PLAIN
