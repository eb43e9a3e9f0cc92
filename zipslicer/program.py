"""Program: a record that holds a pickle in, a node graph in columns out; objects are built from it on touch.

The backend's machine has made the graph and checked it; here it gets its names (kinds, children, rows), and `build`
turns a part of it into Python objects: bottom up, by a stack of our own, with every node built once, so that neither
depth nor sharing in a file costs more than its bytes.
"""

from __future__ import annotations

import collections
import struct
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .archive import Archive
from .backend import (
    FIRST_NODE_KIND,
    NODE_FIELDS,
    STORAGE_FIELDS,
    TENSOR_FIELDS,
    Graph,
    Kind,
    NodeField,
    StorageField,
    Text,
)
from .errors import ArchiveError, ProgramError, UnsupportedError, ZipSlicerError
from .policy import (
    COMPOSITES,
    NOT_PLAIN,
    Description,
    Limits,
    Meaning,
    Placeholder,
    actions,
    construct,
    machine_limits,
    meaning_of,
)

__all__ = ["MISSING", "Builder", "Program", "Special", "known_actions", "run_program"]

MISSING: Any = object()  # no such object yet, or no such part
SMALL_COPY = 256  # items or bytes: "latin1" is an argument of thousands of calls
FREE_COPIES = 1 << 16  # of one larger value, that calls may take more than once; an honest file has one for each call
MAX_MADE_KEYS = 4096  # Python hashes complex numbers and ranges without a secret: thousands can be made to collide
CALLABLE, ARGS, KWARGS, STATE, PARTS = range(5)  # the children of a CALL or OBJECT, before its items

Leaf = Callable[[int, int], Any]  # (kind, payload) of a TENSOR or STORAGE -> the object that stands for it
Special = Callable[[int, str, Sequence[Any], Any], Any]  # (meaning, name, args, state) -> a value, or NOT_PLAIN


class Program:
    """A graph, and the questions asked of it. A position is the place of a value; a node id that of a container."""

    def __init__(self, graph: Graph, allow: Mapping[str, Any], protocol: int = 2) -> None:
        self.protocol = protocol  # of the pickle; before 3 its globals have the names of Python 2
        self.kinds = graph.kinds
        self.payloads = memoryview(graph.payloads).cast("q")
        self.nodes = memoryview(graph.nodes).cast("q")
        self.strings = graph.strings
        self.blobs = graph.blobs
        self.longs = graph.longs
        self.globals = graph.globals
        self.storages = memoryview(graph.storages).cast("q")
        self._keys = graph.storage_keys
        self.locations = graph.locations
        self.tensors = graph.tensors  # unpacked a row at a time, see table.TensorTable
        self.dims = memoryview(graph.dims).cast("q")
        self.node_count = len(self.nodes) // NODE_FIELDS
        self.tensor_count = len(graph.tensors) // (8 * TENSOR_FIELDS)
        self.storage_count = len(self.storages) // STORAGE_FIELDS
        self._allow = allow
        self._names: dict[int, tuple[str, str]] = {}
        self._with_tensors: bytearray | None = None
        self._meanings = [meaning_of(module, name) for module, name in graph.globals]
        if Meaning.FIRST in self._meanings:
            self._see_through()

    def _see_through(self) -> None:
        """Put first arguments in place of the calls that return them, wherever these stand."""
        kinds, payloads = bytearray(self.kinds), array("q", self.payloads)
        stands_for: dict[int, int] = {}  # node -> the position of its first argument
        called: set[int] = set()
        for node in range(self.node_count):
            start, end = self.span(node)
            if self.kind(node) in (Kind.CALL, Kind.OBJECT):
                called.add(start)  # what is called stays a global or a call
            if self.meaning(node) == Meaning.FIRST and kinds[start + STATE] == Kind.ABSENT and end - start == PARTS:
                first, last = self.span(payloads[start + ARGS])
                if first < last:
                    stands_for[node] = first
        for node in stands_for:
            chain = []
            # A call is made after its arguments, so that no chain closes.
            while kinds[target := stands_for[node]] == Kind.CALL and payloads[target] in stands_for:
                chain.append(node)
                node = payloads[target]
            stands_for.update(dict.fromkeys(chain, target))
        for position, kind in enumerate(self.kinds):
            if kind == Kind.CALL and payloads[position] in stands_for and position not in called:
                target = stands_for[payloads[position]]
                kinds[position], payloads[position] = kinds[target], payloads[target]
        self.kinds, self.payloads = bytes(kinds), memoryview(payloads)

    def storage_key(self, storage: int) -> str:
        """What a storage is called in the archive: "0" for data/0."""
        end = StorageField.KEY_END
        start = self.storages[(storage - 1) * STORAGE_FIELDS + end] if storage else 0
        return self._keys[start : self.storages[storage * STORAGE_FIELDS + end]].decode("utf-8", "surrogatepass")

    def storage_keys(self) -> tuple[bytes, list[int]]:
        """The keys of all storages, one after the other, and where each ends."""
        return self._keys, self.storages[StorageField.KEY_END :: STORAGE_FIELDS].tolist()

    def span(self, node: int) -> tuple[int, int]:
        """The positions [start, end) of a node's children."""
        start = self.nodes[node * NODE_FIELDS + NodeField.START]
        return start, start + self.nodes[node * NODE_FIELDS + NodeField.COUNT]

    def kind(self, node: int) -> int:
        return self.nodes[node * NODE_FIELDS + NodeField.KIND]

    def pairs(self, node: int) -> range:
        """The positions of a mapping's keys; each value is at the next position. A CALL's are after its list items."""
        start, end = self.span(node)
        if self.kind(node) in (Kind.CALL, Kind.OBJECT):
            start += PARTS + self.nodes[node * NODE_FIELDS + NodeField.APPENDS]
        return range(start, end - (end - start) % 2, 2)

    def state_position(self, node: int) -> int | None:
        """Where what BUILD gave to an ORDERED_DICT, CALL or OBJECT is; None where there was no BUILD."""
        start, end = self.span(node)
        if self.kind(node) == Kind.ORDERED_DICT:
            return end - 1 if (end - start) % 2 else None
        return start + STATE if self.kinds[start + STATE] != Kind.ABSENT else None

    def appended(self, node: int) -> range:
        """The positions of the list items of a CALL or OBJECT."""
        start, _ = self.span(node)
        return range(start + PARTS, start + PARTS + self.nodes[node * NODE_FIELDS + NodeField.APPENDS])

    def meaning(self, node: int) -> int:
        """What the callable of a CALL means to us; STRANGER for an OBJECT, which policy never builds."""
        start, _ = self.span(node)
        if self.kind(node) != Kind.CALL or self.kinds[start] != Kind.GLOBAL:
            return Meaning.STRANGER
        meaning = self._meanings[self.payloads[start]]
        if meaning != Meaning.TYPED:
            return meaning
        # The machine has taken those whose function makes a dense tensor. Ours are those of composites.py.
        function, _ = self.span(self.payloads[start + ARGS])
        return meaning if self.global_meaning(function) in COMPOSITES else Meaning.STRANGER

    def global_meaning(self, position: int) -> int:
        """What a global that stands as a value means to us; STRANGER for any other value."""
        return self._meanings[self.payloads[position]] if self.kinds[position] == Kind.GLOBAL else Meaning.STRANGER

    def rebuilt(self, node: int) -> tuple[int, int] | None:
        """For a tensor of a class of its own, made by _rebuild_from_type_v2(function, class, arguments, state): the
        positions of arguments and state. None for any other node, and where policy knows the function.
        """
        start, end = self.span(node)
        if self.kind(node) != Kind.CALL or self.global_meaning(start) != Meaning.TYPED or end - start != PARTS:
            return None
        first, _ = self.span(self.payloads[start + ARGS])
        if self.kinds[first + 1] != Kind.GLOBAL or self.kinds[first + 2] != Kind.TUPLE:
            return None
        if self.kinds[start + STATE] != Kind.ABSENT:
            return None
        return None if self.global_meaning(first) in COMPOSITES else (first + 2, first + 3)

    def is_mapping(self, node: int) -> bool:
        """Whether a node is a dict of some class that we know."""
        kind = self.kind(node)
        return kind in (Kind.DICT, Kind.ORDERED_DICT) or (
            kind == Kind.CALL and self.meaning(node) == Meaning.DEFAULTDICT
        )

    def has_tensors(self, node: int) -> bool:
        """Whether a tensor or storage is below a node."""
        start, end = self.span(node)
        # A flat state dict answers for itself, and a file that is one needs no look at each of its values.
        return self.kinds.find(Kind.TENSOR, start, end) >= 0 or bool(self.with_tensors()[node])

    def with_tensors(self) -> bytearray:
        """For each node 1 if a tensor or storage is below it. Found once, from the tensors up."""
        if self._with_tensors is None:
            parents: dict[int, list[int]] = collections.defaultdict(list)
            found = bytearray(self.node_count)
            todo: list[int] = []
            for node in range(self.node_count):
                start, end = self.span(node)
                for position in range(start, end):
                    kind = self.kinds[position]
                    if kind == Kind.TENSOR or kind == Kind.STORAGE:
                        if not found[node]:
                            found[node] = 1
                            todo.append(node)
                    elif kind >= FIRST_NODE_KIND:
                        parents[self.payloads[position]].append(node)
            if any(meaning in COMPOSITES for meaning in self._meanings):
                # Some of them have no dense part: a meta tensor, or one that was saved as a NumPy array.
                for node in range(self.node_count):
                    if not found[node] and self.meaning(node) in (*COMPOSITES, Meaning.TYPED):
                        found[node] = 1
                        todo.append(node)
            while todo:
                for parent in parents[todo.pop()]:
                    if not found[parent]:
                        found[parent] = 1
                        todo.append(parent)
            self._with_tensors = found
        return self._with_tensors

    def scalar(self, position: int) -> Any:
        """The value at a position that is no node, no tensor and no storage."""
        kind, payload = self.kinds[position], self.payloads[position]
        if kind == Kind.STR:
            return self.strings[payload]
        if kind == Kind.INT:
            return payload
        if kind == Kind.NONE:
            return None
        if kind == Kind.TRUE or kind == Kind.FALSE:
            return kind == Kind.TRUE
        if kind == Kind.FLOAT:
            return struct.unpack("d", struct.pack("q", payload))[0]
        if kind == Kind.LONG:
            return self.longs[payload]
        if kind == Kind.BYTES:
            return self.blobs[payload]
        if kind == Kind.BYTEARRAY:
            return bytearray(self.blobs[payload])
        raise AssertionError(f"no scalar: kind {kind}")

    def global_value(self, index: int, special: Special) -> Any:
        """A global that stands as a value: a dtype or the like, what the user allowed, else a placeholder."""
        module, name = self.globals[index]
        allowed = self._allow.get(f"{module}.{name}", MISSING)
        if allowed is not MISSING:
            return allowed
        made = special(self._meanings[index], name, (), None)
        return Placeholder(Description(module, name, origin=(self, -1))) if made is NOT_PLAIN else made

    def keys(self, node: int, special: Special) -> list[Any]:
        """The keys of a mapping node, in file order."""
        positions = self.pairs(node)
        kinds = self.kinds[positions.start : positions.stop : 2]
        if kinds.count(Kind.STR) == len(kinds):  # nearly always, and then a matter of slices
            numbers = self.payloads[positions.start : positions.stop : 2].tolist()
            if numbers and numbers[-1] - numbers[0] == len(numbers) - 1:
                return self.strings[numbers[0] : numbers[0] + len(numbers)]
            return [self.strings[n] for n in numbers]
        keys = [self.build(position, _no_leaf, special) for position in positions]
        check_keys(keys)
        return keys

    def build(self, root: int, leaf: Leaf, special: Special) -> Any:
        """The objects from the value at a position on. Sharing and cycles of the file are those of the result.

        Raises: ProgramError, for a dict key that cannot be hashed.
        """
        return Builder(self, leaf, special).build(root)

    def allowed(self, node: int) -> Any:
        """The user's own class for the callable of a CALL or OBJECT, or MISSING."""
        start, _ = self.span(node)
        if not self._allow or self.kinds[start] != Kind.GLOBAL:
            return MISSING
        module, name = self.globals[self.payloads[start]]
        return self._allow.get(f"{module}.{name}", MISSING)

    def called_name(self, node: int) -> tuple[str, str]:
        """The (module, name) that a CALL or OBJECT calls; of the innermost one where the result of a call is called, and
        the class of a tensor that is rebuilt.
        """
        chain = []
        while node not in self._names:
            chain.append(node)
            start, _ = self.span(node)
            rebuilt = self.rebuilt(node)
            if rebuilt is not None:
                self._names[node] = self.globals[self.payloads[rebuilt[0] - 1]]
                break
            if self.kinds[start] == Kind.GLOBAL:
                self._names[node] = self.globals[self.payloads[start]]
                break
            node = self.payloads[start]
        found = self._names[node]
        self._names.update(dict.fromkeys(chain, found))  # so that no chain is followed for each of its links
        return found


def check_keys(keys: Sequence[Any]) -> None:
    """The machine has checked keys by kind; what a call has made of its arguments is known here only.

    Raises: ProgramError for what cannot be hashed, and for too many of what could be made to collide.
    """
    strange = [key for key in keys if type(key) is not str and type(key) is not int]
    try:
        for key in strange:
            hash(key)
    except TypeError:
        raise ProgramError("a dict key or an item of a set cannot be hashed") from None
    if len(strange) > MAX_MADE_KEYS:
        kinds = (complex, range, slice, frozenset, tuple)
        made = [key for key in strange if isinstance(key, kinds) or type(key).__module__ == "numpy"]
        if len(made) > MAX_MADE_KEYS:
            raise ProgramError("too many dict keys or items of a set are numbers or sequences that a call has made")


def _no_leaf(_kind: int, _payload: int) -> Any:
    raise ProgramError("a tensor is a dict key")


class Builder:
    """Builds values; what is built twice is one object. Holds objects by node, and the fills that wait for a cycle to close."""

    def __init__(self, program: Program, leaf: Leaf, special: Special) -> None:
        self.program = program
        self.leaf = leaf
        self.special = special
        self.objects: dict[int, Any] = {}
        self.leaves: dict[tuple[int, int], Any] = {}
        self.seen: set[int] = set()
        self.waiting: list[int] = []
        self.copied: dict[int, int] = {}  # items or bytes that calls have copied, by id of the value they took

    def adopt(self, node: int, made: Any) -> None:
        """Let an object stand for a node, whatever the file has there."""
        self.objects[node] = made
        self.seen.add(node)

    def build(self, position: int) -> Any:
        """The object of the value at a position, with all that is below it."""
        if self.program.kinds[position] >= FIRST_NODE_KIND:
            self.build_node(self.program.payloads[position])
        return self.value(position)

    def build_node(self, root: int) -> None:
        """Let the object of a node stand, with all that is below it."""
        program, kinds, payloads = self.program, self.program.kinds, self.program.payloads
        seen, count = self.seen, program.node_count
        todo = [root]  # a node: go into it; node + count: its arguments stand, now make it; ~node: fill it
        while todo:
            node = todo.pop()
            if node < 0:
                self.finish(~node)
                continue
            made_now = node >= count
            if made_now:
                node -= count
                self.objects[node] = self.call(node)
            elif node in seen:
                continue
            else:
                seen.add(node)
                self.begin(node)
                todo.append(~node)
            start, end = program.span(node)
            if made_now:
                start += STATE
            elif node not in self.objects and self.is_made_of_arguments(node):
                # As pickle does it: the object stands before its state and items, which may point back to it.
                todo.append(node + count)
                end = start + STATE
            todo += [payloads[p] for p in range(start, end) if kinds[p] >= FIRST_NODE_KIND and payloads[p] not in seen]
        waiting, self.waiting = self.waiting, []
        for node in waiting:
            self.fill(node)

    def value(self, position: int) -> Any:
        """The object of a value, or MISSING where it closes a cycle and does not stand yet."""
        kind = self.program.kinds[position]
        payload = self.program.payloads[position]
        if kind >= FIRST_NODE_KIND:
            return self.objects.get(payload, MISSING)
        if kind == Kind.TENSOR or kind == Kind.STORAGE:
            made = self.leaves.get((kind, payload), MISSING)
            if made is MISSING:
                made = self.leaves[kind, payload] = self.leaf(kind, payload)
            return made
        if kind == Kind.GLOBAL:
            made = self.leaves.get((kind, payload), MISSING)
            if made is MISSING:
                made = self.leaves[kind, payload] = self.program.global_value(payload, self.special)
            return made
        if kind == Kind.BYTEARRAY:  # mutable, and so shared where the file shares it
            source = self.program.blobs[payload]
            made = self.leaves.get((kind, id(source)), MISSING)
            if made is MISSING:
                made = self.leaves[kind, id(source)] = self.program.scalar(position)
            return made
        return None if kind == Kind.ABSENT else self.program.scalar(position)

    def values(self, start: int, end: int) -> list[Any]:
        return [self.value(position) for position in range(start, end)]

    def begin(self, node: int) -> None:
        """What can be filled later stands at once, so that cycles have something to point to."""
        kind = self.program.kind(node)
        if kind == Kind.LIST:
            self.objects[node] = []
        elif kind == Kind.DICT:
            self.objects[node] = {}
        elif kind == Kind.ORDERED_DICT:
            self.objects[node] = collections.OrderedDict()
        elif kind == Kind.SET:
            self.objects[node] = set()
        elif kind in (Kind.CALL, Kind.OBJECT) and not self.is_known(node):
            is_new = kind == Kind.OBJECT
            self.objects[node] = self.placeholder(node, is_new=is_new)

    def is_known(self, node: int) -> bool:
        return self.program.meaning(node) != Meaning.STRANGER or self.program.allowed(node) is not MISSING

    def is_made_of_arguments(self, node: int) -> bool:
        """Whether a known CALL or OBJECT is made of its arguments alone, and given its state afterwards."""
        if self.program.kind(node) not in (Kind.CALL, Kind.OBJECT):
            return False
        return self.program.meaning(node) <= Meaning.LAST_PLAIN or self.program.allowed(node) is not MISSING

    def finish(self, node: int) -> None:
        """All below stands, except what closes a cycle: now make what could not be made before, then fill."""
        program = self.program
        kind = program.kind(node)
        start, end = program.span(node)
        if node not in self.objects:
            if kind == Kind.TUPLE or kind == Kind.FROZENSET:
                values = self.values(start, end)
                if any(value is MISSING for value in values):
                    raise UnsupportedError("a value holds itself by way of the arguments it is made of")
                if kind == Kind.FROZENSET:
                    check_keys(values)
                self.objects[node] = (tuple if kind == Kind.TUPLE else frozenset)(values)
                return
            if kind == Kind.TYPED:
                self.objects[node] = self.special(Meaning.TYPED, "", self.values(start, end), None)
                return
            self.objects[node] = self.call(node)
        self.fill(node)

    def call(self, node: int) -> Any:
        program = self.program
        start, _ = program.span(node)
        args = self.value(start + ARGS)
        kwargs = self.value(start + KWARGS) if program.kinds[start + KWARGS] != Kind.ABSENT else {}
        cls = program.allowed(node)
        if cls is not MISSING:
            return cls(*args, **kwargs) if program.kind(node) == Kind.CALL else cls.__new__(cls, *args, **kwargs)
        meaning, state = program.meaning(node), None
        name = program.called_name(node)[1]
        if meaning <= Meaning.LAST_PLAIN:
            made = construct(meaning, args)
        else:
            if program.kinds[start + STATE] != Kind.ABSENT:
                state = self.value(start + STATE)
            made = self.special(meaning, name, args, state)
        if made is NOT_PLAIN:
            return self.placeholder(node)
        self.count_copies(args)
        if meaning >= Meaning.NUMPY_ARRAY and type(state) is tuple:
            self.count_copies(state)
        return made

    def placeholder(self, node: int, *, is_new: bool = False) -> Placeholder:
        name = self.program.called_name(node)
        return Placeholder(Description(*name, called=True, is_new=is_new, origin=(self.program, node)))

    def count_copies(self, taken: Sequence[Any]) -> None:
        """A few bytes can call set() on one list of millions, over and over. Raises: ProgramError."""
        for value in taken:
            if isinstance(value, (str, bytes, bytearray, list, tuple, dict)) and len(value) > SMALL_COPY:
                before = self.copied.get(id(value), 0)
                self.copied[id(value)] = before + len(value)
                if before and before + len(value) > FREE_COPIES:
                    raise ProgramError("one large value is taken by call after call: the file would fill the memory")

    def fill(self, node: int) -> None:
        """Put the items of a mutable object into it; if one of them does not stand yet, wait for the end."""
        program = self.program
        kind = program.kind(node)
        start, end = program.span(node)
        values = self.values(start, end)
        if any(value is MISSING for value in values):
            self.waiting.append(node)
            return
        made = self.objects[node]
        if kind == Kind.LIST:
            made[:] = values
        elif kind == Kind.SET:
            check_keys(values)
            made.update(values)
        elif kind == Kind.DICT or kind == Kind.ORDERED_DICT:
            count = len(values) - len(values) % 2
            self.set_items(made, values[:count:2], values[1:count:2])
            if count < len(values):
                _set_metadata(made, values[-1])
        elif type(made) is Placeholder:
            self.describe(node, made, values)
        elif kind in (Kind.CALL, Kind.OBJECT):
            self.fill_known(node, made, values)

    def set_items(self, made: Any, keys: list[Any], values: list[Any]) -> None:
        check_keys(keys)
        for key, value in zip(keys, values):
            made[key] = value

    def describe(self, node: int, made: Placeholder, values: list[Any]) -> None:
        about = made._zipslicer
        appends = len(self.program.appended(node))
        rebuilt = self.program.rebuilt(node)
        if rebuilt is not None:
            _, _, args, about.state = values[ARGS]
            if len(args) == 1 and isinstance(args[0], dict):
                about.kwargs = dict(args[0])
            else:
                about.args = args
            about.attributes = {**about.kwargs, **attributes_of(about.state)}
            return
        about.args = values[ARGS]
        about.kwargs = {} if self.absent(node, KWARGS) else values[KWARGS]
        about.list_items = values[PARTS : PARTS + appends]
        rest = values[PARTS + appends :]
        self.set_items(about.items, rest[::2], rest[1::2])
        if not self.absent(node, STATE):
            about.state = values[STATE]
            about.attributes = attributes_of(about.state)
            if self.program.meaning(node) == Meaning.PARTIAL and type(about.state) is tuple:
                about.attributes = dict(zip(PARTIAL, about.state))

    def absent(self, node: int, part: int) -> bool:
        return self.program.kinds[self.program.span(node)[0] + part] == Kind.ABSENT

    def fill_known(self, node: int, made: Any, values: list[Any]) -> None:
        """Items and state of a defaultdict or Counter, or of an object of a class that the user allowed."""
        appends = len(self.program.appended(node))
        listed = values[PARTS : PARTS + appends]
        rest = values[PARTS + appends :]
        if self.program.allowed(node) is not MISSING:
            if not self.absent(node, STATE):
                _give_state(made, values[STATE])
            if listed:
                made.extend(listed)
        elif listed or (rest and not isinstance(made, dict)):
            raise ProgramError(f"items are put into a {type(made).__name__}")
        self.set_items(made, rest[::2], rest[1::2])


PARTIAL = ("func", "args", "keywords")  # what functools.partial calls the first three items of its state


def attributes_of(state: Any) -> dict[Any, Any]:
    """The attributes that a state would have given to an object: a dict, or (a dict or None, a dict of slots)."""
    if isinstance(state, dict):
        return dict(state)
    if type(state) is tuple and len(state) == 2 and all(part is None or isinstance(part, dict) for part in state):
        return {**(state[0] or {}), **(state[1] or {})}
    return {}


def _set_metadata(made: collections.OrderedDict[Any, Any], state: Any) -> None:
    """state_dict() writes one attribute; any other could shadow a method of the dict."""
    if isinstance(state, dict) and "_metadata" in state:
        made._metadata = state["_metadata"]  # type: ignore[attr-defined]


def _give_state(made: Any, state: Any) -> None:
    """BUILD, for a class that the user allowed: as pickle does it."""
    if hasattr(made, "__setstate__"):
        made.__setstate__(state)
        return
    attributes, slots = state if type(state) is tuple and len(state) == 2 else (state, None)
    if attributes:
        # Into __dict__, where a name such as __class__ is only a name.
        made.__dict__.update(attributes)
    for name, value in (slots or {}).items():
        setattr(made, name, value)


def known_actions(unknown: str, allow: Mapping[str, Any]) -> Mapping[tuple[str, str], int]:
    """What the machine is told of globals; with unknown="error" it must know those that the user allows."""
    known = actions()
    if allow and unknown == "error":
        known = {**{(module, last): 0 for module, _, last in (name.rpartition(".") for name in allow)}, **known}
    return known


def run_program(
    archive: Archive,
    limits: Limits,
    *,
    record: str = "data.pkl",
    number: int | None = None,
    unknown: str = "placeholder",
    allow: Mapping[str, Any],
) -> Program:
    """Read a record that holds a pickle and scan it; `number` is the record's, where that is known.

    Raises: ArchiveError, ProgramError, TableError, UnsupportedError; UnsafeError with unknown="error".
    """
    found = archive.find([record])[0] if number is None else number
    if found < 0:
        why = ": torch.save did not finish it" if record == "data.pkl" else ""
        raise ArchiveError(f"the archive has no record {record!r}{why}", path=archive.source.path)
    text = archive.text(found, limits.program_nbytes)
    known = known_actions(unknown, allow)
    try:
        columns = archive.backend.scan_pickle(text, known, machine_limits(limits, unknown == "error"))
    except ZipSlicerError as error:
        raise error.located(path=archive.source.path, record=archive.name(found)) from None
    return Program(Graph(*columns), allow, protocol_of(text))


def protocol_of(text: Text) -> int:
    """Of a pickle, by its first opcode; protocols 0 and 1 have none that says it."""
    return text[1] if len(text) > 1 and text[0] == 0x80 else 0
