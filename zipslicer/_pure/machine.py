"""Machine: the bytes of a pickle in, a graph in columns out. No object of the file's making is ever built.

Read this beside csrc/machine.cc, of which it is the specification. The stack holds plain Python values for what is
plain (None, bool, int, float, str, bytes, bytearray, tuple, list) and the small classes below for the rest; a tuple or
list here is a node of the graph, never something a user sees. Only `_flatten`, at the end, turns them into columns.

Every opcode that torch.save or Python's pickler writes is here; those that only protocol 0, the extension registry or
out-of-band buffers need are refused by name. Nothing recurses: a pickle is as deep as it likes until the limit.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from ..errors import ProgramError, TableError, UnsafeError, UnsupportedError

# Twins of the constants in backend.py, which this module may not import: a backend knows only the errors.
NONE, FALSE, TRUE, INT, LONG, FLOAT, STR, BYTES, BYTEARRAY, GLOBAL, STORAGE, TENSOR, ABSENT = range(13)
TUPLE, LIST, SET, FROZENSET, DICT, ORDERED_DICT, CALL, OBJECT, TYPED = range(16, 25)
V_ORDERED_DICT, V_STORAGE, V_DTYPE, V_TENSOR, V_TENSOR_V2, V_TENSOR_V3, V_TYPED, V_SIZE = range(1, 9)
UNTYPED = 255
DIFFERENTIABLE, COMPLEX = 1, 2
ZIP, STREAM, TAR = range(3)  # dialects of persistent ids

INT64_MAX = (1 << 63) - 1
INT64_MIN = -(1 << 63)
MAX_KEY_TUPLE = 64  # items of a tuple that is a dict key; hashing it costs that much at every look-up

REFUSED = {
    ord("F"): "FLOAT",
    ord("S"): "STRING",
    ord("V"): "UNICODE",
    ord("P"): "PERSID",
    ord("i"): "INST",
    ord("o"): "OBJ",
    0x82: "EXT1",
    0x83: "EXT2",
    0x84: "EXT4",
    0x97: "NEXT_BUFFER",
    0x98: "READONLY_BUFFER",
}


class Global:
    """A name the pickle gave. `action` is what policy says of it, 0 for a stranger."""

    __slots__ = ("action", "module", "name", "verb")

    def __init__(self, module: str, name: str, action: int) -> None:
        self.module = module
        self.name = name
        self.action = action
        self.verb = action & 0xFF


class Storage:
    """A persistent id: one record's worth of bytes, and what its elements are."""

    __slots__ = ("dtype", "itemsize", "key", "location", "nbytes", "offset", "root", "start", "traits")

    def __init__(
        self,
        key: str,
        location: str,
        action: int,
        nbytes: int,
        offset: int,
        root: Storage | None = None,
        start: int = 0,
    ) -> None:
        self.key = key
        self.location = location
        self.dtype = action >> 8 & 0xFF
        self.itemsize = action >> 16 & 0xFF
        self.traits = action >> 24
        self.nbytes = nbytes
        self.offset = offset
        self.root = root  # of a view (streams before torch 0.4): the storage that it is a part of
        self.start = start  # of a view: in elements of its root


class Tensor:
    """One dense row, already proved to lie inside its storage."""

    __slots__ = ("dims", "dtype", "extent", "flags", "itemsize", "ndim", "offset", "storage", "storage_offset")

    def __init__(
        self,
        storage: Storage,
        dtype: int,
        itemsize: int,
        storage_offset: int,
        ndim: int,
        dims: list[int],
        flags: int,
        offset: int,
        extent: int,
    ) -> None:
        self.storage = storage
        self.dtype = dtype
        self.itemsize = itemsize
        self.storage_offset = storage_offset
        self.ndim = ndim
        self.dims = dims
        self.flags = flags
        self.offset = offset
        self.extent = extent


class Dict:
    """DICT or ORDERED_DICT: keys and values in turn; `state` holds what BUILD gave, at most once."""

    __slots__ = ("items", "kind", "state")

    def __init__(self, kind: int, items: list[Any]) -> None:
        self.kind = kind
        self.items = items
        self.state: list[Any] = []


class Set:
    """SET or FROZENSET."""

    __slots__ = ("items", "kind")

    def __init__(self, kind: int, items: list[Any]) -> None:
        self.kind = kind
        self.items = items


class Typed:
    """A tensor with a Python type and attributes of its own (_rebuild_from_type_v2)."""

    __slots__ = ("parts",)

    def __init__(self, tensor: Tensor, cls: Any, state: Any) -> None:
        self.parts = [tensor, cls, state]


class Call:
    """CALL or OBJECT: what a callable would have made of its arguments, and what was then put into it."""

    __slots__ = ("appends", "args", "callable", "items", "kind", "kwargs", "state")

    def __init__(self, kind: int, callable_: Any, args: Any, kwargs: Any = None) -> None:
        self.kind = kind
        self.callable = callable_
        self.args = args
        self.kwargs = kwargs
        self.state: list[Any] = []
        self.appends: list[Any] = []
        self.items: list[Any] = []


class Machine:
    """The parts of the machine that do not sit in the opcode loop: calls, persistent ids, keys."""

    def __init__(self, actions: Mapping[tuple[str, str], int], limits: Sequence[int], program_nbytes: int) -> None:
        self.actions = actions
        self.depth, self.dimensions, self.text_nbytes, self.long_nbytes, self.tuple_keys, refuse, self.dialect = limits
        self.refuse_unknown = bool(refuse)
        self.globals: dict[tuple[str, str], Global] = {}
        self.storages: dict[str, Storage] = {}
        self.tuple_keys_seen = 0
        self.pairs_left = program_nbytes  # that OrderedDict may still copy: an honest pickle writes each for one dict

    def name(self, module: Any, name: Any, at: int) -> Global:
        if type(module) is not str or type(name) is not str:
            raise ProgramError("a global's module and name must be strings", offset=at)
        found = self.globals.get((module, name))
        if found is None:
            action = self.actions.get((module, name))
            if action is None and self.refuse_unknown:
                dotted = f"{module}.{name}"
                raise UnsafeError(
                    f"the file names {dotted}, which policy does not know; nothing of it was run. Leave out "
                    "unknown='error' to read the file with an inert placeholder in its place",
                    offset=at,
                    global_name=dotted,
                )
            found = self.globals[module, name] = Global(module, name, action or 0)
        return found

    def persistent(self, pid: Any, at: int) -> Any:
        """('storage', class, key, location, numel), and nothing else. torch.package counts its keys in integers.

        A stream has a sixth part, for views, and ('module', class, source file, source), of which the class is all that
        counts.
        """
        if self.dialect == TAR:
            return self.tar_key(pid, at)
        kind = pid[0] if type(pid) is tuple and pid and type(pid[0]) is str else type(pid).__name__
        count = 6 if self.dialect == STREAM else 5
        if count == 6 and kind == "module" and type(pid) is tuple and len(pid) == 4 and type(pid[1]) in (Global, Call):
            return pid[1]
        if type(pid) is not tuple or len(pid) != count or kind != "storage":
            view = ", view" if count == 6 else ""
            raise ProgramError(
                f"a persistent id must be ('storage', class, key, location, numel{view}), not {kind!r}", offset=at
            )
        _, cls, key, location, numel = pid[:5]
        if type(cls) is not Global or cls.verb != V_STORAGE:
            raise ProgramError("a persistent id names a class that is no storage class", offset=at)
        if type(key) is int and 0 <= key <= INT64_MAX:
            key = str(key)
        if type(key) is not str or type(location) is not str:
            raise ProgramError(
                "a persistent id's key must be a string or an integer from 0 to 2**63 - 1, its location a string",
                offset=at,
            )
        if type(numel) is not int or not 0 <= numel <= INT64_MAX:
            raise ProgramError("a persistent id's element count must be an integer from 0 to 2**63 - 1", offset=at)
        action = cls.action
        nbytes = numel * (action >> 16 & 0xFF)
        if nbytes > INT64_MAX:
            raise ProgramError("a storage's size in bytes passes 2**63 - 1", offset=at)
        found = self.note(Storage(key, location, action, nbytes, at))
        return found if count == 5 or pid[5] is None else self.view(found, numel, pid[5], at)

    def tar_key(self, pid: Any, at: int) -> Any:
        """What a tar file has for tensors and storages: their keys in two other members, or (class, source file, source)."""
        if type(pid) is tuple and len(pid) == 3 and type(pid[0]) in (Global, Call):
            return pid[0]
        key = str(pid) if type(pid) is int and 0 <= pid <= INT64_MAX else pid
        if type(key) is not str:
            raise ProgramError("a persistent id must be the key of a tensor or storage", offset=at)
        return self.note(Storage(key, "", 0, 0, at))

    def view(self, root: Storage, numel: int, metadata: Any, at: int) -> Storage:
        """(key, offset, size) in elements: a part of a storage, without bytes of its own."""
        if type(metadata) is not tuple or len(metadata) != 3:
            raise ProgramError("a view of a storage must be (key, offset, size)", offset=at)
        key, start, size = metadata
        if type(key) is int and 0 <= key <= INT64_MAX:
            key = str(key)
        numbers = (type(n) is int and INT64_MIN <= n <= INT64_MAX for n in (start, size))
        if type(key) is not str or not all(numbers):
            raise ProgramError("a view of a storage must be (key, offset, size)", offset=at)
        if start < 0 or size < 0 or start + size > numel:
            raise TableError("a view reaches outside its storage", offset=at)
        action = root.dtype << 8 | root.itemsize << 16 | root.traits << 24
        return self.note(Storage(key, root.location, action, size * root.itemsize, at, root, start))

    def note(self, given: Storage) -> Storage:
        """The storage with this key: noted now, or checked against what was noted before."""
        found = self.storages.setdefault(given.key, given)
        if found.root is not given.root or found.start != given.start:
            raise ProgramError(
                f"storage {given.key!r} is a view in one persistent id, and something else in another",
                offset=given.offset,
            )
        if found.nbytes != given.nbytes:
            raise ProgramError(
                f"storage {given.key!r} has {found.nbytes} bytes in one persistent id, {given.nbytes} in another",
                offset=given.offset,
            )
        if found.dtype != given.dtype and not (found.itemsize == 1 and self.byte_like(found.dtype, given.dtype)):
            raise ProgramError(f"storage {given.key!r} has two element types", offset=given.offset)
        return found

    def byte_like(self, dtype: int, other: int) -> bool:
        """Bytes without a type and bytes as uint8 are the one pair of classes that torch.save mixes under one key."""
        uint8 = self.actions.get(("torch", "ByteStorage"), 0) >> 8 & 0xFF
        return {dtype, other} == {UNTYPED, uint8}

    def reduce(self, callable_: Any, args: Any, at: int) -> Any:
        if type(args) is not tuple:
            raise ProgramError("REDUCE takes a tuple of arguments", offset=at)
        if type(callable_) is Global:
            verb = callable_.verb
            if V_TENSOR <= verb <= V_TENSOR_V3:
                return self.tensor(verb, args, at)
            if verb == V_ORDERED_DICT:
                return self.ordered_dict(args, at)
            if verb == V_TYPED:
                return self.typed(callable_, args, at)
        elif type(callable_) is not Call:
            raise ProgramError("REDUCE calls something that is no global", offset=at)
        return Call(CALL, callable_, args)

    def ordered_dict(self, args: tuple[Any, ...], at: int) -> Dict:
        """() as Python 3 writes it, or ([[key, value], ...],) as Python 2 did."""
        items: list[Any] = []
        if args:
            if len(args) != 1 or type(args[0]) not in (list, tuple):
                raise ProgramError("OrderedDict takes nothing, or one list of pairs", offset=at)
            for pair in args[0]:
                if type(pair) not in (list, tuple) or len(pair) != 2:
                    raise ProgramError("OrderedDict takes nothing, or one list of pairs", offset=at)
                self.pairs_left -= 1
                if self.pairs_left < 0:
                    raise ProgramError("OrderedDict takes the same pairs over and over", offset=at)
                self.check_key(pair[0], at)
                items += pair
        return Dict(ORDERED_DICT, items)

    def typed(self, callable_: Global, args: tuple[Any, ...], at: int) -> Any:
        if len(args) != 4:
            raise ProgramError(f"{callable_.name} takes 4 arguments, not {len(args)}", offset=at)
        function, cls, arguments, state = args
        if type(function) is Global and V_TENSOR <= function.verb <= V_TENSOR_V3:
            if type(arguments) is not tuple:
                raise ProgramError(f"{callable_.name} takes a tuple of arguments", offset=at)
            return Typed(self.tensor(function.verb, arguments, at), cls, state)
        return Call(CALL, callable_, args)

    def tensor(self, verb: int, args: tuple[Any, ...], at: int) -> Tensor:
        """Check a rebuild call: first that every argument is of its type, then that the tensor lies in its storage."""
        count = len(args)
        fewest = 4 if verb == V_TENSOR else 6 if verb == V_TENSOR_V2 else 7
        if not fewest <= count <= fewest + (verb != V_TENSOR):
            raise ProgramError(f"a tensor is rebuilt with {count} arguments", offset=at)
        storage, storage_offset, size, stride = args[:4]
        if type(storage) is not Storage or self.dialect == TAR:
            raise ProgramError("a tensor is rebuilt on something that is no storage", offset=at)
        if type(storage_offset) is not int or not INT64_MIN <= storage_offset <= INT64_MAX:
            raise ProgramError("a tensor's storage_offset must be a 64-bit integer", offset=at)
        sizes = self.integers(size, at)
        strides = self.integers(stride, at)
        if len(sizes) != len(strides):
            raise ProgramError(f"a tensor has {len(sizes)} sizes and {len(strides)} strides", offset=at)
        dtype, itemsize, traits = storage.dtype, storage.itemsize, storage.traits
        if verb == V_TENSOR_V3:
            given = args[6]
            if type(given) is not Global or given.verb != V_DTYPE:
                raise ProgramError("a tensor's dtype is no dtype of torch", offset=at)
            if itemsize != 1 or storage.root is not None:
                raise ProgramError("a tensor with a dtype of its own needs an untyped storage, a whole one", offset=at)
            dtype, itemsize, traits = given.action >> 8 & 0xFF, given.action >> 16 & 0xFF, given.action >> 24
        flags = 0
        if verb != V_TENSOR:
            if type(args[4]) is not bool:
                raise ProgramError("a tensor's requires_grad must be a boolean", offset=at)
            flags = int(args[4])
            if flags and not traits & DIFFERENTIABLE:
                raise ProgramError("a tensor of this dtype cannot require grad", offset=at)
            if count > fewest:
                flags |= self.metadata(args[-1], traits, at)
        extent = self.check_geometry(storage, itemsize, storage_offset, sizes, strides, at)
        start = storage_offset + storage.start  # in the storage that has the bytes
        if start > INT64_MAX:
            raise TableError("a tensor's extent passes 2**63 - 1 elements", offset=at)
        return Tensor(storage.root or storage, dtype, itemsize, start, len(sizes), sizes + strides, flags, at, extent)

    def integers(self, value: Any, at: int) -> list[int]:
        """A size or stride: a tuple, a list, or torch.Size(tuple)."""
        if (
            type(value) is Call
            and type(value.callable) is Global
            and value.callable.verb == V_SIZE
            and len(value.args) == 1
        ):
            value = value.args[0]
        if type(value) is not tuple and type(value) is not list:
            raise ProgramError("a tensor's size and stride must be tuples", offset=at)
        if len(value) > self.dimensions:
            raise ProgramError(f"a tensor has {len(value)} dimensions; the limit is {self.dimensions}", offset=at)
        for each in value:
            if type(each) is not int or not INT64_MIN <= each <= INT64_MAX:
                raise ProgramError("a tensor's sizes and strides must be 64-bit integers", offset=at)
        return list(value)

    def metadata(self, value: Any, traits: int, at: int) -> int:
        """{'conj': True, 'neg': True}: the math bits; the bytes are stored as if neither were set."""
        if value is None:
            return 0
        if type(value) is not Dict:
            raise ProgramError("a tensor's metadata must be a dict", offset=at)
        flags = 0
        for key, bit in zip(value.items[::2], value.items[1::2]):
            if type(key) is not str or key not in ("conj", "neg") or type(bit) is not bool:
                raise ProgramError("a tensor's metadata may say conj and neg, and no more", offset=at)
            mask = 2 if key == "conj" else 4
            flags = flags | mask if bit else flags & ~mask
        if flags & 2 and not traits & COMPLEX:
            raise ProgramError("only a complex tensor can be conjugated", offset=at)
        return flags

    @staticmethod
    def check_geometry(
        storage: Storage, itemsize: int, storage_offset: int, sizes: list[int], strides: list[int], at: int
    ) -> int:
        """Refuse a tensor that leaves its storage -> its extent in elements."""
        if storage_offset < 0 or any(n < 0 for n in sizes) or any(n < 0 for n in strides):
            raise TableError("a tensor has a negative storage_offset, size or stride", offset=at)
        numel, last, empty = 1, storage_offset, False
        for n, step in zip(sizes, strides):
            if n == 0:
                empty = True
                continue
            numel *= n
            last += (n - 1) * step
        # Compared once at the end, in integers that cannot wrap. The C++ side stops at the first step that would.
        if numel > INT64_MAX or last > INT64_MAX:
            raise TableError("a tensor's extent passes 2**63 - 1 elements", offset=at)
        if empty:
            return 0
        if (last + 1) * itemsize > storage.nbytes:
            raise TableError(
                f"a tensor reaches to byte {(last + 1) * itemsize} of storage {storage.key!r}, which has {storage.nbytes}",
                offset=at,
            )
        return last - storage_offset + 1

    def check_key(self, key: Any, at: int) -> None:
        """What may be a dict key: whatever hashes in bounded time and cannot be made to collide at will."""
        kind = type(key)
        if kind is str or key is None or kind in (bool, float, bytes, Global, Call):
            return
        if kind is int:
            if not INT64_MIN <= key <= INT64_MAX:
                raise ProgramError("an integer beyond 64 bits is a dict key", offset=at)
            return
        if kind is tuple:
            self.tuple_keys_seen += 1
            if len(key) > MAX_KEY_TUPLE or self.tuple_keys_seen > self.tuple_keys:
                raise ProgramError("too many or too long tuples are dict keys", offset=at)
            for each in key:
                inner = type(each)
                small = inner is int and INT64_MIN <= each <= INT64_MAX
                if not (small or each is None or inner in (str, bool, float, bytes, Global, Call)):
                    raise ProgramError("a tuple that is a dict key may hold plain values only", offset=at)
            return
        raise ProgramError("a value that cannot be hashed is a dict key", offset=at)

    def set_items(self, target: Any, pairs: list[Any], at: int) -> None:
        if len(pairs) % 2:
            raise ProgramError("a key without a value", offset=at)
        if type(target) is not Dict and type(target) is not Call:
            raise ProgramError("SETITEMS on something that is no dict", offset=at)
        for key in pairs[::2]:
            if type(key) is not str:
                self.check_key(key, at)
        target.items += pairs

    def append(self, target: Any, values: list[Any], at: int) -> None:
        if type(target) is list:
            target += values
        elif type(target) is Call:
            target.appends += values
        else:
            raise ProgramError("APPENDS on something that is no list", offset=at)

    def set_of(self, kind: int, values: list[Any], at: int) -> Set:
        for each in values:
            self.check_key(each, at)
        return Set(kind, values)

    def build(self, target: Any, state: Any, at: int) -> None:
        buildable = type(target) is Call or (type(target) is Dict and target.kind == ORDERED_DICT)
        if not buildable:
            raise ProgramError("BUILD on something that takes no state", offset=at)
        if target.state:
            raise ProgramError("BUILD a second time on one object", offset=at)
        target.state.append(state)

    def new_object(self, cls: Any, args: Any, kwargs: Any, at: int) -> Call:
        if type(cls) is not Global and type(cls) is not Call:
            raise ProgramError("NEWOBJ of something that is no global", offset=at)
        if type(args) is not tuple:
            raise ProgramError("NEWOBJ takes a tuple of arguments", offset=at)
        if kwargs is not None and type(kwargs) is not Dict:
            raise ProgramError("NEWOBJ_EX takes a dict of keyword arguments", offset=at)
        return Call(OBJECT, cls, args, kwargs)

    def line(self, program: bytes, start: int, at: int) -> bytes:
        end = program.find(b"\n", start, start + self.text_nbytes + 1)
        if end < 0:
            raise ProgramError(f"no line end within {self.text_nbytes} bytes", offset=at)
        return program[start:end]


def decimal(text: bytes, at: int) -> int:
    digits = text[1:] if text[:1] == b"-" else text
    if not digits.isdigit() or len(text) > 4300:  # 4300: Python's own guard against quadratic conversion
        raise ProgramError("a text integer is malformed or over 4300 digits", offset=at)
    return int(text)


def text_of(raw: bytes, at: int) -> str:
    try:
        return raw.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        raise ProgramError("a string is not UTF-8", offset=at) from None


def native_text(raw: bytes) -> str:
    """A byte string of Python 2: UTF-8 if it is, Latin-1 otherwise, which takes anything."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def scan_pickle(program: bytes, actions: Mapping[tuple[str, str], int], limits: Sequence[int]) -> tuple[Any, ...]:
    """See backend.Backend.scan_pickle."""
    machine = Machine(actions, limits, len(program))
    root, stop = _run(program, machine)
    rest = machine.storages.values() if machine.dialect == STREAM else ()
    return (*_flatten(root, machine.depth, stop, rest, machine.globals.values()), stop + 1)


def _run(program: bytes, machine: Machine) -> tuple[Any, int]:
    """The opcode loop -> (root, offset of STOP). MARK starts a new stack, so that nothing can reach below it."""
    end = len(program)
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks under each open MARK
    memo: dict[int, Any] = {}
    u16, i32, u32, u64, f64 = (struct.Struct(f).unpack_from for f in ("<H", "<i", "<I", "<Q", ">d"))
    reduce, persistent, set_items = machine.reduce, machine.persistent, machine.set_items
    at = pos = 0

    def take(start: int, count: int) -> bytes:
        if count > end - start:
            raise ProgramError(f"truncated: {count} bytes are declared and {end - start} are left", offset=at)
        return program[start : start + count]

    # Ordered by how often torch.save writes each: a chain of comparisons is the fastest dispatch CPython has.
    try:
        while True:
            at = pos
            op = program[pos]
            pos += 1
            if op == 0x71:  # q BINPUT
                memo[program[pos]] = stack[-1]
                pos += 1
            elif op == 0x72:  # r LONG_BINPUT
                memo[u32(program, pos)[0]] = stack[-1]
                pos += 4
            elif op == 0x4B:  # K BININT1
                stack.append(program[pos])
                pos += 1
            elif op == 0x68:  # h BINGET
                stack.append(memo[program[pos]])
                pos += 1
            elif op == 0x28:  # ( MARK
                below.append(stack)
                stack = []
            elif op == 0x74:  # t TUPLE
                made = tuple(stack)
                stack = below.pop()
                stack.append(made)
            elif op == 0x86:  # TUPLE2
                last = stack.pop()
                stack[-1] = (stack[-1], last)
            elif op == 0x58:  # X BINUNICODE
                size = u32(program, pos)[0]
                pos += 4
                if size > end - pos:
                    take(pos, size)
                stack.append(text_of(program[pos : pos + size], at))
                pos += size
            elif op == 0x52:  # R REDUCE
                last = stack.pop()
                stack[-1] = reduce(stack[-1], last, at)
            elif op == 0x51:  # Q BINPERSID
                stack[-1] = persistent(stack[-1], at)
            elif op == 0x89:  # NEWFALSE
                stack.append(False)
            elif op == 0x29:  # ) EMPTY_TUPLE
                stack.append(())
            elif op == 0x6A:  # j LONG_BINGET
                stack.append(memo[u32(program, pos)[0]])
                pos += 4
            elif op == 0x85:  # TUPLE1
                stack[-1] = (stack[-1],)
            elif op == 0x4D:  # M BININT2
                stack.append(u16(program, pos)[0])
                pos += 2
            elif op == 0x4A:  # J BININT
                stack.append(i32(program, pos)[0])
                pos += 4
            elif op == 0x94:  # MEMOIZE
                memo[len(memo)] = stack[-1]
            elif op == 0x8C:  # SHORT_BINUNICODE
                size = program[pos]
                pos += 1
                stack.append(text_of(take(pos, size), at))
                pos += size
            elif op == 0x87:  # TUPLE3
                last = stack.pop()
                middle = stack.pop()
                stack[-1] = (stack[-1], middle, last)
            elif op == 0x88:  # NEWTRUE
                stack.append(True)
            elif op == 0x4E:  # N NONE
                stack.append(None)
            elif op == 0x47:  # G BINFLOAT
                stack.append(f64(program, pos)[0])
                pos += 8
            elif op == 0x7D:  # } EMPTY_DICT
                stack.append(Dict(DICT, []))
            elif op == 0x5D:  # ] EMPTY_LIST
                stack.append([])
            elif op == 0x75:  # u SETITEMS
                values = stack
                stack = below.pop()
                set_items(stack[-1], values, at)
            elif op == 0x73:  # s SETITEM
                last = stack.pop()
                middle = stack.pop()
                set_items(stack[-1], [middle, last], at)
            elif op == 0x65:  # e APPENDS
                values = stack
                stack = below.pop()
                machine.append(stack[-1], values, at)
            elif op == 0x61:  # a APPEND
                last = stack.pop()
                machine.append(stack[-1], [last], at)
            elif op == 0x63:  # c GLOBAL
                module = machine.line(program, pos, at)
                pos += len(module) + 1
                name = machine.line(program, pos, at)
                pos += len(name) + 1
                stack.append(machine.name(text_of(module, at), text_of(name, at), at))
            elif op == 0x93:  # STACK_GLOBAL
                last = stack.pop()
                stack[-1] = machine.name(stack[-1], last, at)
            elif op == 0x62:  # b BUILD
                last = stack.pop()
                machine.build(stack[-1], last, at)
            elif op == 0x81:  # NEWOBJ
                last = stack.pop()
                stack[-1] = machine.new_object(stack[-1], last, None, at)
            elif op == 0x92:  # NEWOBJ_EX
                last = stack.pop()
                middle = stack.pop()
                stack[-1] = machine.new_object(stack[-1], middle, last, at)
            elif op == 0x8A:  # LONG1
                size = program[pos]
                pos += 1
                stack.append(int.from_bytes(take(pos, size), "little", signed=True))
                pos += size
            elif op == 0x8B:  # LONG4
                size = i32(program, pos)[0]
                pos += 4
                if not 0 <= size <= machine.long_nbytes:
                    raise ProgramError(f"an integer of {size} bytes; the limit is {machine.long_nbytes}", offset=at)
                stack.append(int.from_bytes(take(pos, size), "little", signed=True))
                pos += size
            elif op == 0x43 or op == 0x42 or op == 0x8E:  # SHORT_BINBYTES BINBYTES BINBYTES8
                size, width = _size(program, pos, op, 0x43, 0x42)
                pos += width
                stack.append(take(pos, size))
                pos += size
            elif op == 0x8D:  # BINUNICODE8
                size = u64(program, pos)[0]
                pos += 8
                stack.append(text_of(take(pos, size), at))
                pos += size
            elif op == 0x96:  # BYTEARRAY8
                size = u64(program, pos)[0]
                pos += 8
                stack.append(bytearray(take(pos, size)))
                pos += size
            elif op == 0x55:  # U SHORT_BINSTRING
                size = program[pos]
                pos += 1
                stack.append(native_text(take(pos, size)))
                pos += size
            elif op == 0x54:  # T BINSTRING
                size = i32(program, pos)[0]
                pos += 4
                if size < 0:
                    raise ProgramError("a string of negative length", offset=at)
                stack.append(native_text(take(pos, size)))
                pos += size
            elif op == 0x8F:  # EMPTY_SET
                stack.append(Set(SET, []))
            elif op == 0x90:  # ADDITEMS
                values = stack
                stack = below.pop()
                target = stack[-1]
                if type(target) is not Set or target.kind != SET:
                    raise ProgramError("ADDITEMS on something that is no set", offset=at)
                target.items += machine.set_of(SET, values, at).items
            elif op == 0x91:  # FROZENSET
                values = stack
                stack = below.pop()
                stack.append(machine.set_of(FROZENSET, values, at))
            elif op == 0x6C:  # l LIST
                values = stack
                stack = below.pop()
                stack.append(values)
            elif op == 0x64:  # d DICT
                values = stack
                stack = below.pop()
                made_dict = Dict(DICT, [])
                set_items(made_dict, values, at)
                stack.append(made_dict)
            elif op == 0x49:  # I INT, or protocol 1's booleans
                text = machine.line(program, pos, at)
                pos += len(text) + 1
                stack.append({b"00": False, b"01": True}[text] if text in (b"00", b"01") else decimal(text, at))
            elif op == 0x4C:  # L LONG
                text = machine.line(program, pos, at)
                pos += len(text) + 1
                stack.append(decimal(text[:-1] if text[-1:] == b"L" else text, at))
            elif op == 0x67:  # g GET
                text = machine.line(program, pos, at)
                pos += len(text) + 1
                stack.append(memo[decimal(text, at)])
            elif op == 0x70:  # p PUT
                text = machine.line(program, pos, at)
                pos += len(text) + 1
                slot = decimal(text, at)
                if not 0 <= slot <= 0xFFFFFFFF:
                    raise ProgramError("a memo slot outside 32 bits", offset=at)
                memo[slot] = stack[-1]
            elif op == 0x30:  # 0 POP: a value, or a MARK with nothing above it
                if stack:
                    stack.pop()
                else:
                    stack = below.pop()
            elif op == 0x31:  # 1 POP_MARK
                stack = below.pop()
            elif op == 0x32:  # 2 DUP
                stack.append(stack[-1])
            elif op == 0x95:  # FRAME: pickle's own read-ahead hint, of no meaning here
                size = u64(program, pos)[0]
                pos += 8
                if size > end - pos:
                    take(pos, size)
            elif op == 0x80:  # PROTO
                protocol = program[pos]
                pos += 1
                if protocol > 5:
                    raise UnsupportedError(f"pickle protocol {protocol}; the newest known is 5", offset=at)
            elif op == 0x2E:  # . STOP
                root = stack.pop()
                if stack or below:
                    raise ProgramError("STOP with values or marks left on the stack", offset=at)
                return root, at
            elif op in REFUSED:
                raise UnsupportedError(
                    f"opcode {REFUSED[op]} is not written by torch.save in protocols 2 to 5; save the file again with one "
                    "of these",
                    offset=at,
                )
            else:
                raise ProgramError(f"byte 0x{op:02x} is no pickle opcode", offset=at)
    except IndexError:
        raise ProgramError(
            "the pickle ends without STOP" if at == end else "stack underflow or truncated opcode", offset=at
        ) from None
    except KeyError:
        raise ProgramError("a memo slot is read that was never written", offset=at) from None
    except struct.error:
        raise ProgramError("truncated opcode", offset=at) from None


def _size(program: bytes, pos: int, op: int, one: int, four: int) -> tuple[int, int]:
    """The length operand of an opcode that comes with 1, 4 or 8 bytes of it -> (length, its own width)."""
    width = 1 if op == one else 4 if op == four else 8
    if pos + width > len(program):
        raise IndexError
    return int.from_bytes(program[pos : pos + width], "little"), width


def _flatten(
    root: Any, depth_limit: int, stop: int, rest: Iterable[Storage], named: Iterable[Global]
) -> tuple[Any, ...]:
    """Number what the root reaches, breadth first, into the columns of backend.Graph; then the rest of the storages,
    and of the globals that were named.

    In a stream storages lie one after the other, so that where one is depends on all before it.
    """
    pool = [root]  # the values; grows while it is scanned
    kinds = bytearray()
    payloads = array("q")
    nodes = array("q")
    strings: list[str] = []
    blobs: list[bytes] = []
    longs: list[int] = []
    names: list[tuple[str, str]] = []
    storages = array("q")
    storage_keys = bytearray()
    locations: list[str] = []
    tensors = array("q")
    dims = array("q")
    ids: dict[int, int] = {}  # id(object) -> its number; the pool keeps every object alive meanwhile
    depths = [0]  # of the node that each run of children belongs to
    bits = struct.Struct("d")
    kind_add, payload_add = kinds.append, payloads.append
    run_ends: list[int] = [1]  # where in the pool each run ends
    run = 0

    def storage_id(storage: Storage) -> int:
        number = ids.get(id(storage))
        if number is None:
            number = ids[id(storage)] = len(locations)
            storage_keys.extend(storage.key.encode("utf-8", "surrogatepass"))
            storages.extend((storage.dtype, storage.nbytes, storage.offset, len(storage_keys)))
            locations.append(storage.location)
        return number

    for position, value in enumerate(pool):  # a list that grows under a for loop is scanned to its new end
        while position >= run_ends[run]:
            run += 1
        kind = type(value)
        if kind is Tensor:
            kind_add(TENSOR)
            number = ids.get(id(value))
            if number is None:
                number = ids[id(value)] = len(tensors) // 9
                tensors.extend(
                    (
                        storage_id(value.storage),
                        value.dtype,
                        value.itemsize,
                        value.storage_offset,
                        len(dims),
                        value.ndim,
                        value.flags,
                        value.offset,
                        value.extent,
                    )
                )
                dims.extend(value.dims)
            payload_add(number)
        elif kind is str:
            kind_add(STR)
            payload_add(len(strings))
            strings.append(value)
        elif kind is int:
            if INT64_MIN <= value <= INT64_MAX:
                kind_add(INT)
                payload_add(value)
            else:
                kind_add(LONG)
                payload_add(len(longs))
                longs.append(value)
        elif kind is bool:
            kind_add(TRUE if value else FALSE)
            payload_add(0)
        elif value is None:
            kind_add(NONE)
            payload_add(0)
        elif kind is float:
            kind_add(FLOAT)
            payload_add(int.from_bytes(bits.pack(value), _BYTE_ORDER, signed=True))
        elif kind is bytes or kind is bytearray:
            kind_add(BYTES if kind is bytes else BYTEARRAY)
            payload_add(len(blobs))
            number = ids.setdefault(id(value), len(blobs))  # met again, it is not copied again
            blobs.append(bytes(value) if number == len(blobs) else blobs[number])
        elif kind is Global:
            kind_add(GLOBAL)
            number = ids.get(id(value))
            if number is None:
                number = ids[id(value)] = len(names)
                names.append((value.module, value.name))
            payload_add(number)
        elif kind is Storage:
            if value.root is not None:
                raise UnsupportedError("a view of a storage stands as a value", offset=value.offset)
            kind_add(STORAGE)
            payload_add(storage_id(value))
        elif value is _NOTHING:
            kind_add(ABSENT)
            payload_add(0)
        else:
            node_kind, children, appends = _node(value)
            kind_add(node_kind)
            number = ids.get(id(value))
            if number is None:
                number = ids[id(value)] = len(nodes) // 5
                depth = depths[run]
                if depth > depth_limit:
                    raise ProgramError(f"values are nested deeper than {depth_limit}", offset=stop)
                nodes.extend((node_kind, len(pool), len(children), appends, depth))
                pool += children
                run_ends.append(len(pool))
                depths.append(depth + 1)
            payload_add(number)
    for storage in rest:
        if storage.root is None:
            storage_id(storage)
    names += [(name.module, name.name) for name in named if id(name) not in ids]
    return (
        bytes(kinds),
        payloads.tobytes(),
        nodes.tobytes(),
        strings,
        blobs,
        longs,
        names,
        storages.tobytes(),
        bytes(storage_keys),
        locations,
        tensors.tobytes(),
        dims.tobytes(),
    )


_NOTHING = object()  # ABSENT, as a value
# Of this host, as array and struct use it.
_BYTE_ORDER: Literal["little", "big"] = "little" if array("H", [1]).tobytes()[0] else "big"


def _node(value: Any) -> tuple[int, Sequence[Any], int]:
    """A container -> (kind, children, appends)."""
    kind = type(value)
    if kind is tuple:
        return TUPLE, value, 0
    if kind is list:
        return LIST, value, 0
    if kind is Dict:
        return value.kind, value.items + value.state, 0
    if kind is Set:
        return value.kind, value.items, 0
    if kind is Typed:
        return TYPED, value.parts, 0
    state = value.state[0] if value.state else _NOTHING
    kwargs = _NOTHING if value.kwargs is None else value.kwargs
    parts = [value.callable, value.args, kwargs, state, *value.appends, *value.items]
    return value.kind, parts, len(value.appends)
