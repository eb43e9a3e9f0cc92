"""Pickling: values in, the opcodes of a pickle out; the mirror of program.py.

A value is an object of Python or torch, or a position in the graph of an open file. What comes out of a graph goes back
into opcodes without ever being an object: tensors are not read, and what policy does not know is written as the file has
it. Objects are taken apart as pickle does it, by `__reduce_ex__`; persistent ids are those of torch.save.

The pickle is of protocol 2, that torch.load(weights_only=True) takes, unless a name in it needs protocol 4. There is no
recursion: what is being written is a stack of generators, each of which yields its parts.
"""

from __future__ import annotations

import _compat_pickle
import contextlib
import copyreg
import functools
import itertools
import struct
import sys
import types
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

from .backend import FIRST_NODE_KIND, Kind
from .errors import UnsupportedError
from .plan import row_major
from .policy import DTYPES, Description, Placeholder, describe
from .program import ARGS, CALLABLE, KWARGS, STATE, Program
from .state_dict import FileDescription, LazySequence, LazySlice, LazyStateDict, Touched, View
from .table import Row

__all__ = ["At", "Kept", "Pickler", "Storages"]

BATCH = 1000  # values between MARK and APPENDS or SETITEMS, as pickle has it: whoever reads holds so many on a stack
DEEPEST = 100_000  # values inside each other; an object that makes new ones of its like for ever comes to it
PROTOCOL, PROTOCOL_4 = 2, 4
NAMES_NBYTES = 1 << 16  # of a module or name; ours and other readers refuse more

MARK, STOP, POP, REDUCE, BUILD, NEWOBJ, NEWOBJ_EX = b"(", b".", b"0", b"R", b"b", b"\x81", b"\x92"
TUPLE, EMPTY_TUPLE, EMPTY_LIST, EMPTY_DICT = b"t", b")", b"]", b"}"
APPEND, APPENDS, SETITEM, SETITEMS = b"a", b"e", b"s", b"u"
SHORT_TUPLES = {1: b"\x85", 2: b"\x86", 3: b"\x87"}
STACK_GLOBAL, BINPERSID = b"\x93", b"Q"

Parts = Generator[Any, None, None]


class At(NamedTuple):
    """A value of an open file: what stands at a position of its graph."""

    view: View
    position: int


class Kept(NamedTuple):
    """What is written of a storage: in the record `key`, which has `nbytes`, its bytes from `start` on.

    `dtype`: what its elements have been cast to, an index into DTYPES; None where they are as they were.
    """

    key: str
    start: int
    nbytes: int
    dtype: int | None = None


class Storages(Protocol):
    """Writes storages, each once, and says what they are called."""

    def live(self, storage: Any) -> tuple[str, str]:
        """A torch.UntypedStorage -> (key, location)."""
        ...

    def filed(self, view: View, storage: int, start: int, nbytes: int, row: Row | None) -> Kept:
        """A storage of an open file, of which bytes [start, start + nbytes) are needed here, for a tensor or for itself."""
        ...

    def array(self, array: Any) -> Kept | None:
        """A NumPy array that is to become a tensor; None for one that stays an array."""
        ...


class Pickler:
    """Collects the opcodes of one pickle, whose root may come part by part.

    Objects that are met twice within one call of `write` are written once. Between calls they are not remembered: they may
    have been changed.

    Args:
        storages: what writes them.
        parent: of a mapping within another, which is filled at the same time.
    """

    def __init__(self, storages: Storages, parent: Pickler | None = None) -> None:
        self._storages = storages
        self._out = bytearray()
        self._children: list[tuple[int, Pickler]] = []  # where in the opcodes those of another one stand
        self._names: dict[Any, int] = {}  # the memo's slots of strings and globals, by what they are
        self._memo: dict[Any, tuple[int, Any]] = {}  # of objects by id, each with what must live for that; and of nodes
        # The numbers of slots: each once, in all of the pickle.
        self._counter: Iterator[int] = itertools.count() if parent is None else parent._counter
        self._dtypes: dict[str, int] = {} if parent is None else parent._dtypes  # of the classes of storages, by key
        self._slots = 0
        self._protocol = PROTOCOL
        # What is being written and has no slot yet -> how many slots there were when it was begun.
        self._open: dict[Any, int] = {}
        self._edits: dict[int, tuple[View, dict[int, Any]]] = {}

    def write(self, value: Any) -> None:
        """The opcodes of a value, with all that is in it.

        Raises: TypeError, AttributeError: it cannot be pickled. UnsupportedError, and what reading raises.
        """
        stack: list[Parts] = []
        try:
            parts = self._begin(value)
            if parts is not None:
                stack.append(parts)
            while stack:
                child = next(stack[-1], stack)
                if child is stack:
                    stack.pop()
                    continue
                parts = self._begin(child)
                if parts is not None:
                    stack.append(parts)
                    if len(stack) > DEEPEST:
                        raise UnsupportedError(f"values are nested more than {DEEPEST} deep")
        finally:
            self._memo.clear()
            self._open.clear()
            self._edits.clear()

    def child(self) -> Pickler:
        """What fills a value that stands here."""
        made = Pickler(self._storages, self)
        self._children.append((len(self._out), made))
        return made

    def open_dict(self, metadata: Any = None) -> None:
        """A dict, whose items follow until `close_dict`. With `metadata`, that of a state dict."""
        if metadata is None:
            self._out += EMPTY_DICT
        else:
            self._name("collections", "OrderedDict")
            self._out += EMPTY_TUPLE + REDUCE
            self.write({"_metadata": metadata})
            self._out += BUILD
        self._out += MARK

    def close_dict(self) -> None:
        self._out += SETITEMS

    def row(self, dtype: int, kept: Kept, sizes: Sequence[int]) -> None:
        """A contiguous tensor that fills a storage."""
        typed = DTYPES[dtype].storage is not None
        self._rebuild(typed)
        self._row_arguments(dtype, kept, 0, sizes, row_major(sizes), "cpu", 0, typed)
        self._out += REDUCE

    def finish(self) -> bytes:
        """The whole pickle."""
        pickler_protocols: list[int] = []
        opcodes = b"".join(self._joined(pickler_protocols))
        return b"\x80" + bytes([max(pickler_protocols)]) + opcodes + STOP

    def _joined(self, protocols: list[int]) -> Iterator[bytes]:
        protocols.append(self._protocol)
        start = 0
        for at, child in self._children:
            yield bytes(self._out[start:at])
            yield from child._joined(protocols)
            start = at
        yield bytes(self._out[start:])

    # ---------------------------------------------------------------- the memo
    def _put(self) -> int:
        slot = next(self._counter)
        self._slots += 1
        self._out += b"q" + bytes([slot]) if slot < 256 else b"r" + struct.pack("<I", slot)
        return slot

    def _remember(self, key: Any, kept: Any) -> None:
        self._memo[key] = self._put(), kept

    def _get(self, slot: int) -> None:
        self._out += b"h" + bytes([slot]) if slot < 256 else b"j" + struct.pack("<I", slot)

    def _got(self, key: Any) -> bool:
        """Fetch what was written before, if it was."""
        found = self._memo.get(key)
        if found is not None:
            self._get(found[0])
        return found is not None

    def _entered(self, key: Any) -> int | None:
        """Begin what gets its slot only after its parts: a tuple, or what is made by a call.

        A way back to it by way of a list or dict ends there, since these have their slots before their parts. One that
        meets nothing new on its way would go on for ever.
        """
        before = self._open.get(key)
        if before == self._slots:
            raise UnsupportedError("a value holds itself by way of the arguments it is made of")
        self._open[key] = self._slots
        return before

    def _left(self, key: Any, before: int | None) -> None:
        if before is None:
            self._open.pop(key, None)
        else:
            self._open[key] = before

    # ---------------------------------------------------------------- scalars
    def _begin(self, value: Any) -> Parts | None:
        """Write a value at once, or begin to."""
        if type(value) is At:
            return self._filed(*value.view.at(value.position))
        scalar = _SCALARS.get(type(value))
        if scalar is not None:
            scalar(self, value)
            return None
        if self._got(id(value)):
            return None
        return self._object(value)

    def _none(self, _value: None) -> None:
        self._out += b"N"

    def _bool(self, value: bool) -> None:
        self._out += b"\x88" if value else b"\x89"

    def _int(self, value: int) -> None:
        if 0 <= value < 1 << 8:
            self._out += b"K" + bytes([value])
        elif 0 <= value < 1 << 16:
            self._out += b"M" + struct.pack("<H", value)
        elif -(1 << 31) <= value < 1 << 31:
            self._out += b"J" + struct.pack("<i", value)
        else:
            text = value.to_bytes((value.bit_length() >> 3) + 1, "little", signed=True)
            self._out += (
                b"\x8a" + bytes([len(text)]) if len(text) < 256 else b"\x8b" + struct.pack("<I", len(text))
            ) + text

    def _float(self, value: float) -> None:
        self._out += b"G" + struct.pack(">d", value)

    def _str(self, value: str) -> None:
        slot = self._names.get(value)
        if slot is not None:
            self._get(slot)
            return
        self._text(value)
        self._names[value] = self._put()

    def _text(self, value: str) -> None:
        """A string that is not met again."""
        text = value.encode("utf-8", "surrogatepass")
        if len(text) >= 1 << 32:
            self._protocol = PROTOCOL_4
            self._out += b"\x8d" + struct.pack("<Q", len(text)) + text
        else:
            self._out += b"X" + struct.pack("<I", len(text)) + text

    def _bytes(self, value: bytes) -> None:
        """As protocol 2 has them, in which weights_only=True takes them; also empty ones, which as bytes() it would not."""
        self._name("_codecs", "encode")
        self._text(value.decode("latin-1"))
        self._str("latin1")
        self._out += SHORT_TUPLES[2] + REDUCE

    def _name(self, module: str, name: str) -> None:
        """A global, by its name in Python 3.

        Readers of protocol 2 take what they know for a name of Python 2, and look for no dots: what would suffer from
        that is written for protocol 4, in which such readers do neither.
        """
        slot = self._names.get((module, name))
        if slot is not None:
            self._get(slot)
            return
        is_old = module in _compat_pickle.IMPORT_MAPPING or (module, name) in _compat_pickle.NAME_MAPPING
        if is_old or "." in name or "\n" in module + name:
            self._protocol = PROTOCOL_4
        texts = module.encode("utf-8", "surrogatepass"), name.encode("utf-8", "surrogatepass")
        if max(map(len, texts)) > NAMES_NBYTES:
            raise UnsupportedError(f"a global has a name of more than {NAMES_NBYTES} bytes")
        if "." in name or "\n" in module + name:
            self._text(module)
            self._text(name)
            self._out += STACK_GLOBAL
        else:
            self._out += b"c%s\n%s\n" % texts
        self._names[module, name] = self._put()

    def _tuple_of(self, count: int) -> None:
        """Close what was begun by `_mark_for` with as many values."""
        self._out += SHORT_TUPLES.get(count, TUPLE) if count else EMPTY_TUPLE

    def _mark_for(self, count: int) -> None:
        if count > max(SHORT_TUPLES):
            self._out += MARK

    def _ints(self, values: Sequence[int]) -> None:
        self._mark_for(len(values))
        for value in values:
            self._int(value)
        self._tuple_of(len(values))

    # ---------------------------------------------------------------- objects
    def _object(self, value: Any) -> Parts | None:
        cls = type(value)
        if cls is tuple:
            return self._tuple(id(value), value, value)
        if cls is list:
            return self._list(value)
        if cls is dict:
            return self._dict(value)
        if cls in (set, frozenset):
            return self._set(value, cls.__name__)
        if cls is bytearray:
            return self._reduced(value, (bytearray, (bytes(value),)))
        if isinstance(value, type):
            self._class(value)
            return None
        if isinstance(value, (LazyStateDict, LazySequence, Touched, Placeholder)):
            return self._ours(value)
        if isinstance(value, LazySlice):
            raise TypeError("a LazySlice is not saved: index it, and save what it gives")
        if _is_storage(value):
            self._storage(value)
            return None
        if cls.__module__ == "torch" and cls.__name__ == "Tensor" and _is_plain(value):
            self._plain_tensor(value)
            return None
        if _is_array(value) and (kept := self._storages.array(value)) is not None:
            self.row(DTYPES_BY_NAME[str(value.dtype)], kept, value.shape)
            self._remember(id(value), value)
            return None
        if isinstance(value, types.FunctionType):
            self._global(value, value.__qualname__)
            return None
        reduce = copyreg.dispatch_table.get(cls)
        found = value.__reduce_ex__(PROTOCOL) if reduce is None else reduce(value)
        if isinstance(found, str):
            self._global(value, found)
            return None
        if not (isinstance(found, tuple) and 2 <= len(found) <= 6):
            raise TypeError(f"{cls.__qualname__}.__reduce_ex__ gave no tuple of 2 to 6 values")
        return self._reduced(value, found)

    def _class(self, value: type) -> None:
        for single in (None, ..., NotImplemented):
            if value is type(single):  # whose classes have no name that can be imported
                self._name("builtins", "type")
                if single is None:
                    self._out += b"N"
                else:
                    self._name("builtins", repr(single))
                self._out += SHORT_TUPLES[1] + REDUCE
                return
        self._global(value, value.__qualname__)

    def _global(self, value: Any, name: str) -> None:
        """A class, function or constant, by where it can be found. Raises: AttributeError, for whoever could not find it."""
        module = getattr(value, "__module__", None) or _home_of(value, name)
        with contextlib.suppress(ImportError):
            __import__(module)
        if _found(module, name) is not value:
            raise AttributeError(f"{value!r} cannot be saved: nobody would find it as {module}.{name}")
        self._name(module, name)

    def _tuple(self, key: Any, values: Iterable[Any], kept: Any) -> Parts:
        before = self._entered(key)
        parts = list(values)
        if not parts:
            self._left(key, before)
            self._out += EMPTY_TUPLE
            return
        self._mark_for(len(parts))
        yield from parts
        self._left(key, before)
        if (found := self._memo.get(key)) is not None:  # it was in itself, and that one is finished
            self._out += b"1" if len(parts) > max(SHORT_TUPLES) else POP * len(parts)
            self._get(found[0])
            return
        self._tuple_of(len(parts))
        self._remember(key, kept)

    def _list(self, value: list[Any]) -> Parts:
        self._out += EMPTY_LIST
        self._remember(id(value), value)
        yield from self._appended(value)

    def _dict(self, value: Mapping[Any, Any]) -> Parts:
        self._out += EMPTY_DICT
        self._remember(id(value), value)
        yield from self._items(value.items())

    def _appended(self, values: Iterable[Any]) -> Parts:
        rest = iter(values)
        while batch := list(itertools.islice(rest, BATCH)):
            if len(batch) == 1:
                yield batch[0]
                self._out += APPEND
            else:
                self._out += MARK
                yield from batch
                self._out += APPENDS

    def _items(self, pairs: Iterable[tuple[Any, Any]]) -> Parts:
        rest = iter(pairs)
        while batch := list(itertools.islice(rest, BATCH)):
            if len(batch) == 1:
                yield batch[0][0]
                yield batch[0][1]
                self._out += SETITEM
            else:
                self._out += MARK
                yield from itertools.chain.from_iterable(batch)
                self._out += SETITEMS

    def _set(self, value: Any, name: str) -> Parts:
        before = self._entered(id(value))
        self._name("builtins", name)
        yield from self._unremembered(value)
        self._out += SHORT_TUPLES[1] + REDUCE
        self._left(id(value), before)
        self._remember(id(value), value)

    def _unremembered(self, values: Iterable[Any]) -> Parts:
        """A list that nothing else refers to."""
        self._out += EMPTY_LIST
        yield from self._appended(values)

    def _reduced(self, value: Any, found: tuple[Any, ...]) -> Parts:
        """What `__reduce_ex__` gave of an object."""
        function, args = found[:2]
        state, listed, items, setter = [*found[2:], None, None, None, None][:4]
        key = id(value)
        before = self._entered(key)
        name = getattr(function, "__name__", "")
        if name == "__newobj__":
            yield args[0]
            yield from self._arguments(args[1:])
            made = NEWOBJ
        elif name == "__newobj_ex__":
            self._protocol = PROTOCOL_4
            yield args[0]
            yield from self._arguments(args[1])
            yield args[2]
            made = NEWOBJ_EX
        else:
            yield function
            yield from self._arguments(args)
            made = REDUCE
        self._left(key, before)
        if (again := self._memo.get(key)) is not None:  # it was in its own arguments, by way of a list or the like
            self._out += made + POP
            self._get(again[0])
            return
        self._out += made
        self._remember(key, value)
        if listed is not None:
            yield from self._appended(listed)
        if items is not None:
            yield from self._items(items)
        if state is None:
            return
        if setter is None:
            yield state
            self._out += BUILD
        else:
            yield setter
            self._get(self._memo[key][0])
            yield state
            self._out += SHORT_TUPLES[2] + REDUCE + POP

    def _arguments(self, args: Sequence[Any]) -> Parts:
        """A tuple that nothing else refers to. It is not held: there may be a tensor's bytes in it."""
        self._mark_for(len(args))
        yield from args
        self._tuple_of(len(args))

    # ---------------------------------------------------------------- torch
    def _storage(self, value: Any) -> None:
        """A storage of torch, which becomes a persistent id."""
        dtype = getattr(value, "dtype", None)  # which a TypedStorage has
        untyped = value if dtype is None else value._untyped_storage
        key, location = self._storages.live(untyped)
        index = None if dtype is None else DTYPES_BY_NAME.get(str(dtype).removeprefix("torch."))
        self._persistent(index, key, location, untyped.nbytes())

    def _plain_tensor(self, value: Any) -> None:
        """As its `__reduce_ex__` would have it, for a fifth of the time: state dicts have them by the thousand."""
        untyped = value.untyped_storage()
        key, location = self._storages.live(untyped)
        dtype = DTYPES_BY_NAME[str(value.dtype)[len("torch.") :]]
        typed = DTYPES[dtype].storage is not None
        flags = value.requires_grad | value.is_conj() << 1 | value.is_neg() << 2
        self._rebuild(typed)
        self._row_arguments(
            dtype,
            Kept(key, 0, untyped.nbytes()),
            value.storage_offset(),
            value.shape,
            value.stride(),
            location,
            flags,
            typed,
        )
        self._out += REDUCE
        self._remember(id(value), value)

    def _persistent(self, dtype: int | None, key: str, location: str, nbytes: int) -> None:
        """('storage', class, key, location, elements). `dtype` None is an untyped storage, whose elements are bytes."""
        name = None if dtype is None else DTYPES[dtype].storage
        given = DTYPES_BY_NAME["uint8"] if name is None or dtype is None else dtype
        if self._dtypes.setdefault(key, given) != given:
            raise ValueError(
                "two tensors see the same memory as different dtypes, which no file can say: clone one of them"
            )
        self._out += MARK
        self._str("storage")
        self._name("torch" if name else "torch.storage", name or "UntypedStorage")
        self._text(key)
        self._str(location)
        self._int(nbytes // DTYPES[dtype].itemsize if name and dtype is not None else nbytes)
        self._out += TUPLE + BINPERSID

    def _rebuild(self, typed: bool) -> None:
        self._name("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3")

    def _row_arguments(
        self, dtype: int, kept: Kept, storage_offset: int, sizes: Sequence[int], strides: Sequence[int], location: str,
        flags: int, typed: bool,
    ) -> None:  # fmt: skip
        """Of _rebuild_tensor_v2, or v3 for an untyped storage. `flags` are those of a Row."""
        self._out += MARK
        self._persistent(dtype if typed else None, kept.key, location, kept.nbytes)
        self._int(storage_offset)
        self._ints(sizes)
        self._ints(strides)
        self._bool(bool(flags & 1))
        self._name("collections", "OrderedDict")
        self._out += EMPTY_TUPLE + REDUCE
        if not typed:
            self._name("torch", DTYPES[dtype].name)
        if flags & 6:
            self._out += EMPTY_DICT
            for bit, name in ((2, "conj"), (4, "neg")):
                if flags & bit:
                    self._str(name)
                    self._bool(True)
                    self._out += SETITEM
        self._out += TUPLE

    # ---------------------------------------------------------------- what is ours
    def _ours(self, value: Any) -> Parts | None:
        if isinstance(value, Touched):
            return self._mapping(value, {}, ((key, value._positions[key]) for key in value), value._view)
        if isinstance(value, LazySequence):
            if value._position is not None:
                return self._begin(At(value._view, value._position))
            return self._sequence(value)
        if isinstance(value, LazyStateDict):
            if value._position is not None and not value._is_edited:
                return self._filed(*value._view.at(value._position))
            return self._state_dict(value)
        about = describe(value)
        if isinstance(about, FileDescription):
            return self._node(about._view, about._node)
        return self._placeholder(value, about)

    def _sequence(self, value: LazySequence) -> Parts:
        self._out += EMPTY_LIST
        self._remember(id(value), value)
        yield from self._appended(At(value._view, position) for position in value._places)

    def _state_dict(self, value: LazyStateDict) -> Parts:
        """A mapping that is not as the file has it: a selection, an edited one."""
        empty = value._empty()
        node = None
        if value._position is not None and value._is_held():
            node = id(value._view.program), value._view.program.payloads[value._position]
        if value._metadata is not None:
            empty._metadata = value._metadata  # type: ignore[attr-defined]
        pairs = ((k, value._overlay[k] if p < 0 else At(value._view, p)) for k, p in list(value._slots.items()))
        return self._filled(value, empty, pairs, node)

    def _mapping(self, value: Any, empty: dict[Any, Any], places: Iterable[tuple[Any, int]], view: View) -> Parts:
        return self._filled(value, empty, ((key, At(view, place)) for key, place in places), None)

    def _filled(self, value: Any, empty: dict[Any, Any], pairs: Iterator[tuple[Any, Any]], node: Any) -> Parts:
        """A mapping of the class of an empty one, and with its attributes."""
        state = None
        if type(empty) is dict:
            self._out += EMPTY_DICT
        else:
            found = empty.__reduce_ex__(PROTOCOL)
            assert isinstance(found, tuple)
            yield found[0]
            yield from self._arguments(found[1])
            self._out += REDUCE
            state = found[2] if len(found) > 2 else None
        self._remember(id(value), value)
        if node is not None:
            self._memo[node] = self._memo[id(value)]
        yield from self._items(pairs)
        if state is not None:
            yield state
            self._out += BUILD

    def _placeholder(self, value: Placeholder, about: Description) -> Parts | None:
        """One that was built: as it is now, since its dicts and lists may have been changed."""
        program, node = about.origin or (None, 0)
        protocol = PROTOCOL_4 if program is None else program.protocol
        if not about.called:
            self._name(*_modern(about.module, about.name, protocol))
            return None
        if program is not None and (program.rebuilt(node) or program.kinds[program.span(node)[0]] != Kind.GLOBAL):
            # What it says of itself is not all that the file says of it: of two calls, one after the other, say.
            if program.has_tensors(node):
                raise UnsupportedError(
                    "a placeholder of this kind, with tensors in it, is saved from the open file only"
                )
            return self._node(cast("View", _Apart(program)), node)
        return self._called(value, about, protocol)

    def _called(self, value: Placeholder, about: Description, protocol: int) -> Parts:
        before = self._entered(id(value))
        self._name(*_modern(about.module, about.name, protocol))
        yield from self._arguments(about.args)
        if about.kwargs:
            yield about.kwargs
        self._made(id(value), value, before, is_new=about.is_new, has_keywords=bool(about.kwargs))
        yield from self._appended(about.list_items)
        yield from self._items(about.items.items())
        if about.state is not None:
            yield about.state
            self._out += BUILD

    def _made(self, key: Any, kept: Any, before: int | None, *, is_new: bool, has_keywords: bool) -> None:
        """Call what is on the stack, and remember what comes of it."""
        if has_keywords:
            self._protocol = PROTOCOL_4
        self._out += NEWOBJ_EX if has_keywords else NEWOBJ if is_new else REDUCE
        self._left(key, before)
        self._remember(key, kept)

    # ---------------------------------------------------------------- graphs of open files
    def _filed(self, view: View, position: int) -> Parts | None:
        kind, payload = view.kinds[position], view.payloads[position]
        if kind >= FIRST_NODE_KIND:
            return self._node(view, payload)
        program = view.program
        if kind == Kind.TENSOR:
            key = id(program), "tensor", payload
            if not self._got(key):
                self._tensor(view, payload)
                self._remember(key, view)
        elif kind == Kind.STORAGE:
            self._filed_storage(view, payload)
        elif kind == Kind.GLOBAL:
            self._name(*_modern(*program.globals[payload], program.protocol))
        elif kind == Kind.BYTEARRAY:
            blob = program.blobs[payload]
            return None if self._got(id(blob)) else self._bytearray(blob)
        elif kind != Kind.ABSENT:
            scalar = program.scalar(position)
            _SCALARS[type(scalar)](self, scalar)
        return None

    def _bytearray(self, blob: bytes) -> Parts:
        """One of a graph, which is shared where its bytes are."""
        self._name("builtins", "bytearray")
        yield from self._arguments((blob,))
        self._out += REDUCE
        self._remember(id(blob), blob)

    def _tensor(self, view: View, number: int) -> None:
        facts = self._facts(view, number)
        self._rebuild(facts[-1])
        self._row_arguments(*facts)
        self._out += REDUCE

    def _facts(self, view: View, number: int) -> tuple[int, Kept, int, Sequence[int], Sequence[int], str, int, bool]:
        """What _row_arguments takes, of a row."""
        table = view.table
        row = table.row(number)
        geometry = table.geometry(row)
        start, nbytes = row.storage_offset * row.itemsize, row.extent * row.itemsize
        kept = self._storages.filed(view, row.storage, start, nbytes, row)
        if kept.dtype is None:
            # As the file has it: rows of different dtypes are on one storage only where that is untyped.
            dtype = DTYPES_BY_NAME[table.dtype(row.dtype).name]
            typed = dtype == table.storage_dtype(row.storage) and kept.nbytes % row.itemsize == 0
        else:
            dtype, typed = kept.dtype, True
        typed = typed and DTYPES[dtype].storage is not None
        offset = geometry.storage_offset - kept.start // row.itemsize if row.extent else 0
        location = table.program.locations[row.storage]
        return dtype, kept, offset, geometry.sizes, geometry.strides, location, row.flags, typed

    def _filed_storage(self, view: View, storage: int) -> None:
        table = view.table
        kept = self._storages.filed(view, storage, 0, table.storage_nbytes(storage), None)
        dtype = table.storage_dtype(storage)
        typed = dtype < len(DTYPES) and kept.nbytes % DTYPES[dtype].itemsize == 0
        self._persistent(dtype if typed else None, kept.key, table.program.locations[storage], kept.nbytes)

    def _node(self, view: View, node: int) -> Parts | None:
        """A container or call of a graph; or what the user has made of it since."""
        program = view.program
        key = id(program), node
        if self._got(key):
            return None
        edits = self._edits.get(id(view))
        if edits is None:
            edits = self._edits[id(view)] = view, {**view.changed(), **view.edited()}
        if node in edits[1]:
            return self._begin(edits[1][node])
        kind = program.kind(node)
        start, end = program.span(node)
        children = [At(view, position) for position in range(start, end)]
        if kind == Kind.TUPLE:
            return self._tuple(key, children, view)
        if kind == Kind.LIST:
            return self._filed_list(key, view, children)
        if kind in (Kind.SET, Kind.FROZENSET):
            return self._filed_set(key, view, children, "set" if kind == Kind.SET else "frozenset")
        if kind in (Kind.DICT, Kind.ORDERED_DICT):
            return self._filed_dict(key, view, node, children)
        if kind == Kind.TYPED:
            return self._filed_typed(key, view, start)
        return self._filed_call(key, view, node, start)

    def _filed_list(self, key: Any, view: View, children: list[At]) -> Parts:
        self._out += EMPTY_LIST
        self._remember(key, view)
        yield from self._appended(children)

    def _filed_set(self, key: Any, view: View, children: list[At], name: str) -> Parts:
        before = self._entered(key)
        self._name("builtins", name)
        yield from self._unremembered(children)
        self._out += SHORT_TUPLES[1] + REDUCE
        self._left(key, before)
        self._remember(key, view)

    def _filed_dict(self, key: Any, view: View, node: int, children: list[At]) -> Parts:
        if view.program.kind(node) == Kind.DICT:
            self._out += EMPTY_DICT
        else:
            self._name("collections", "OrderedDict")
            self._out += EMPTY_TUPLE + REDUCE
        self._remember(key, view)
        count = len(children) - len(children) % 2
        yield from self._items(zip(children[:count:2], children[1:count:2]))
        if count < len(children):
            yield children[-1]
            self._out += BUILD

    def _filed_typed(self, key: Any, view: View, start: int) -> Parts:
        """_rebuild_from_type_v2(function, class, arguments, state) of a dense tensor."""
        facts = self._facts(view, view.payloads[start])
        before = self._entered(key)
        self._name("torch._tensor", "_rebuild_from_type_v2")
        self._out += MARK
        self._rebuild(facts[-1])
        yield At(view, start + 1)
        self._row_arguments(*facts)
        yield At(view, start + 2)
        self._out += TUPLE + REDUCE
        self._left(key, before)
        self._remember(key, view)

    def _filed_call(self, key: Any, view: View, node: int, start: int) -> Parts:
        program = view.program
        before = self._entered(key)
        yield At(view, start + CALLABLE)
        yield At(view, start + ARGS)
        has_keywords = program.kinds[start + KWARGS] != Kind.ABSENT
        if has_keywords:
            yield At(view, start + KWARGS)
        self._made(key, view, before, is_new=program.kind(node) == Kind.OBJECT, has_keywords=has_keywords)
        yield from self._appended(At(view, position) for position in program.appended(node))
        yield from self._items((At(view, p), At(view, p + 1)) for p in program.pairs(node))
        if program.kinds[start + STATE] != Kind.ABSENT:
            yield At(view, start + STATE)
            self._out += BUILD


_SCALARS: dict[type, Callable[[Pickler, Any], None]] = {
    type(None): Pickler._none,
    bool: Pickler._bool,
    int: Pickler._int,
    float: Pickler._float,
    str: Pickler._str,
    bytes: Pickler._bytes,
}

DTYPES_BY_NAME = {dtype.name: index for index, dtype in enumerate(DTYPES)}


class _Apart:
    """A program without tensors, as the file that it is of: what is built of it may have outlived that."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.kinds, self.payloads = program.kinds, program.payloads

    def at(self, position: int) -> tuple[_Apart, int]:
        return self, position

    def changed(self) -> dict[int, Any]:
        return {}

    def edited(self) -> dict[int, Any]:
        return {}


def _modern(module: str, name: str, protocol: int) -> tuple[str, str]:
    """A global of a file, as Python 3 calls it: protocols before 3 have the names of Python 2."""
    if protocol < 3:
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
    return module, name


def _home_of(value: Any, name: str) -> str:
    """The module of a constant that does not say it. That of a memory format is the one that torch.save finds."""
    for module in ("torch._utils", *list(sys.modules)):
        if module != "__main__" and _found(module, name) is value:
            return module
    return "__main__"


def _found(module: str, name: str) -> Any:
    """What is at a dotted name in a module that was imported."""
    try:
        return functools.reduce(getattr, name.split("."), sys.modules[module])
    except (AttributeError, KeyError):
        return None


def _is_storage(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, (torch.storage.TypedStorage, torch.UntypedStorage))


def _is_plain(tensor: Any) -> bool:
    """Whether a torch.Tensor is dense, has bytes of its own here, and nothing else to be saved."""
    torch = sys.modules["torch"]
    return (
        tensor.layout is torch.strided
        and tensor.device.type in ("cpu", "cuda")
        and str(tensor.dtype)[len("torch.") :] in DTYPES_BY_NAME
        and not (tensor.is_quantized or tensor.is_nested or tensor.__dict__ or tensor._backward_hooks)
        and not (tensor._is_zerotensor() or (hasattr(tensor, "has_names") and tensor.has_names()))
    )


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)
