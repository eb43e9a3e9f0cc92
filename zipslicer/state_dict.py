"""LazyStateDict, LazySequence, LazySlice: what the user holds. Listing reads nothing; touching a key reads that tensor.

All containers of one open file share a View, which touches values and holds each container it has made, so that
``sd["a"]["b"] = t`` stays, and a dict that contains itself is itself.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import difflib
import fnmatch
import itertools
import math
import operator
import sys
import types
from collections.abc import (
    Callable,
    Generator,
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    Mapping,
    MutableMapping,
    Sequence,
    ValuesView,
)
from typing import TYPE_CHECKING, Any, Union, cast, overload

from .archive import Archive
from .arrays import array_value
from .backend import FIRST_NODE_KIND, Hot, Kind
from .composites import NESTED, RAGGED, Member
from .errors import CheckpointError, TableError, ZipSlicerError, printable
from .lazy import Lazy, materialize, size_text, summary
from .plan import Geometry
from .plan import index as apply_index
from .policy import DTYPES, NOT_PLAIN, Description, Meaning, Placeholder, construct, public_first
from .program import ARGS, KWARGS, MISSING, PARTIAL, STATE, Builder, Program
from .stream import BUDGET_NBYTES, WHOLE, Wanted, bar_of, nbytes_of, stream
from .table import TOO_LONG, Leaf, TensorInfo, TensorTable, name_room

if TYPE_CHECKING:
    from .module import LoadReport
    from .reader import ReadOptions, RowReader

__all__ = ["LazySequence", "LazySlice", "LazyStateDict", "View"]

OVERLAID = -1  # in place of a position: the value is the user's own
SHOWN = 24  # keys of a repr
GLOB = frozenset("*?[")
AHEAD_COUNT, AHEAD_NBYTES = 16, 1 << 20  # tensors, or bytes, from which on a thread that reads ahead is worth its start
LOOKED_AT, LOOKED_LIKE = 20_000, 200  # keys, and characters of one, in the search for near ones: its cost is quadratic
FEW = 8  # keys, which are all named where one is missing
PLAIN = (dict, list, tuple, set, bytearray)
Patterns = Union[str, Iterable[str]]


class View:
    """One open file, as its containers see it: touches values, and holds the containers it has made."""

    framework = "pt"  # what tensors become
    fast: tuple[Callable[[Hot, int], Any], Hot] | None = None  # see RowReader

    def __init__(
        self, table: TensorTable, options: ReadOptions, recipe: tuple[Callable[..., Any], tuple[Any, ...]] | None
    ) -> None:
        self.table = table
        self.program = table.program
        self.kinds, self.payloads = table.program.kinds, table.program.payloads
        self.options = options
        self.framework = table.framework = options.framework
        # How to open the file again, for pickling: called with the archive's fingerprint last. None where there is no path.
        self.recipe = recipe
        self.held: dict[int, Any] = {}  # containers and placeholders by node
        self._reader: RowReader | None = None
        self._elsewhere: dict[Any, View] = {}

    # ---------------------------------------------------------------- the file; shards.ShardedView has several
    @property
    def path(self) -> str | None:
        return self.table.archive.source.path

    @property
    def identity(self) -> object:
        """What views of the same open file have in common."""
        return self.table

    @property
    def metadata(self) -> Mapping[str, str]:
        """As safetensors has it."""
        return self.table.archive.metadata

    @property
    def window(self) -> tuple[int, int]:
        """(offset, nbytes) of the archive in its file."""
        return self.table.archive.base, self.table.archive.nbytes

    @property
    def root(self) -> Any:
        return self.touch(0)

    def at(self, position: int) -> tuple[View, int]:
        """The view of the one file that a value is in, and its position there."""
        return self, position

    def adopt(self, view: View, position: int) -> int:
        """The position here of a value of another view; OVERLAID if that view is no part of this one."""
        return position if view is self else OVERLAID

    def place(self, position: int) -> Any:
        """What to sort by to read in the order of the bytes on disk."""
        return self.table.file_offset(position)

    def is_tensor(self, position: int) -> bool:
        return self.table.is_tensor(position)

    def is_in(self, position: int, record: str) -> bool:
        """Whether a value is a tensor of a record."""
        info = self.shown_meta(position) if self.table.is_tensor(position) else None
        parts = () if info is None else (info, *info.parts.values())
        folder, suffix = self.table.folder, self.table.suffix
        return any(record.endswith(f"/{folder}/{part.storage_key}{suffix}") for part in parts)

    def name_room(self) -> int:
        return name_room(self.program)

    def tensors(self) -> LazyStateDict:
        """Every tensor, by dotted path."""
        return LazyStateDict._of(self, None, self.table.tensors(0), {}, None)

    def strangers(self) -> dict[str, Any]:
        """What policy does not know, by dotted path."""
        return {name: self.touch(position) for name, position in self.table.strangers().items()}

    def records(self) -> list[str]:
        return self.table.archive.names()

    def archives(self) -> list[Archive]:
        return self.table.archive.parts()

    def counts(self) -> tuple[int, int]:
        """Of tensors and storages."""
        return self.program.tensor_count, self.program.storage_count

    # ---------------------------------------------------------------- values
    @property
    def reader(self) -> RowReader:
        """Made on first touch, because it imports torch, or NumPy."""
        if self._reader is None:
            if self.framework == "np":
                from .numpy_tensors import ArrayReader

                self._reader = ArrayReader(self.table, self.options)
            else:
                from .tensors import TensorReader

                self._reader = TensorReader(self.table, self.options)
            self.fast = self._reader.fast
        return self._reader

    def special(self, meaning: int, name: str, args: Sequence[Any], state: Any) -> Any:
        """program.Special, with torch imported only where a value of torch is asked for."""
        if meaning == Meaning.STRANGER or meaning <= Meaning.LAST_PLAIN:
            return NOT_PLAIN
        if meaning >= Meaning.NUMPY_ARRAY:
            return array_value(meaning, args, state)
        return self.reader.special(meaning, name, args, state)

    def on(self, device: Any) -> View:
        """The same file, whose tensors go to a device. Of containers it has its own: for tensors alone."""
        made = self._elsewhere.get(device)
        if made is None:
            options = dataclasses.replace(self.options, map_location=device)
            made = self._elsewhere.setdefault(device, View(self.table, options, None))
        return made

    def touch(self, position: int, key: Any = None) -> Any:
        """The object of a value. Reads the bytes of one tensor at most; nested containers stay lazy."""
        try:
            kind = self.program.kinds[position]
            if kind == Kind.TENSOR:
                return self.reader.tensor(self.program.payloads[position])
            if kind == Kind.STORAGE:
                return self.reader.storage_value(self.program.payloads[position])
            if kind >= FIRST_NODE_KIND:
                return self._touch_node(position)
            if kind == Kind.GLOBAL:
                return self.program.global_value(self.program.payloads[position], self.special)
            return None if kind == Kind.ABSENT else self.program.scalar(position)
        except ZipSlicerError as error:
            raise error.located(path=self.table.archive.source.path, key=key) from None

    def _touch_node(self, position: int) -> Any:
        leaf = self.table.leaf(position)
        if leaf is not None:
            attributes = None if self.framework == "np" else leaf.attributes  # arrays have none
            return self.reader.leaf(leaf, None if attributes is None else self._plain(attributes))
        node = self.program.payloads[position]
        made = self.held.get(node, MISSING)
        # Two threads may make one container at once; the first to be held is the one that both return.
        return self.held.setdefault(node, self._make(position, node)) if made is MISSING else made

    def _make(self, position: int, node: int) -> Any:
        program = self.program
        if not program.has_tensors(node):
            builder = Builder(program, _no_tensor, self.special)
            made = builder.build(position)
            # A touch of a placeholder within gives that one: to build each level of a nest anew would be quadratic.
            for inner, value in builder.objects.items():
                if type(value) is Placeholder and inner != node:
                    self.held.setdefault(inner, value)
            return made
        if program.allowed(node) is not MISSING if program.kind(node) in (Kind.CALL, Kind.OBJECT) else False:
            return self.reader.builder([position]).build(position)
        if program.is_mapping(node):
            return LazyStateDict._of(self, position)
        if program.kind(node) in (Kind.LIST, Kind.TUPLE):
            return LazySequence(self, position)
        if program.kind(node) not in (Kind.CALL, Kind.OBJECT):  # a set, of objects that hold tensors
            return self.reader.builder([position]).build(position)
        return Placeholder(FileDescription(self, node))

    def _plain(self, position: int) -> Any:
        """A tensor's own attributes, whole; tensors among them are read."""
        node = self.program.payloads[position]
        if self.program.kinds[position] >= FIRST_NODE_KIND and self.program.has_tensors(node):
            return self.reader.builder([position]).build(position)
        return self.program.build(position, _no_tensor, self.special)

    def peek(self, position: int) -> Any:
        """A value to show: a TensorInfo in place of a tensor, and nothing read."""
        info = self.meta(position)
        return self.touch(position) if info is None else info

    def shown_meta(self, position: int) -> TensorInfo | None:
        """As meta, for a repr."""
        try:
            return self.meta(position)
        except ZipSlicerError:
            return None

    def shown(self, position: int) -> Any:
        """The same for a repr, which never fails: the error in place of what the file has wrong."""
        try:
            return self.peek(position)
        except ZipSlicerError as error:
            return error

    def located_meta(self, position: int, key: Any) -> TensorInfo | None:
        """As meta; what is wrong names the key."""
        try:
            return self.meta(position)
        except ZipSlicerError as error:
            raise error.located(path=self.path, key=key) from None

    def meta(self, position: int) -> TensorInfo | None:
        """What the file says of a value that is a tensor or storage; None for any other."""
        if self.program.kinds[position] == Kind.STORAGE:
            return self.table.storage_info(self.program.payloads[position])
        leaf = self.table.leaf(position)
        return None if leaf is None else self.table.info(leaf)

    def own_meta(self, value: Any) -> TensorInfo | None:
        """The facts of a tensor that the user has put in; None for any other value."""
        if self.framework == "np" and "numpy" in sys.modules and isinstance(value, sys.modules["numpy"].ndarray):
            return _info_of_array(value)
        return _info_of(value) if hasattr(value, "untyped_storage") else None

    def changed(self) -> dict[int, Any]:
        """Held values of Python's own types that whoever touched them has changed since, and placeholders that hold such,
        by node.
        """
        below = self.program.with_tensors()
        found: dict[int, Any] = {}
        # One builder, and one set of what was compared: else a nest of n costs n * n, since each level of it may be held.
        fresh = Builder(self.program, _no_tensor, self.special)
        alike: set[tuple[int, int]] = set()
        for node, value in list(self.held.items()):
            is_plain = isinstance(value, PLAIN) or type(value).__module__ == "numpy" or _parts_of(value)
            if is_plain and not below[node]:
                fresh.build_node(node)
                if not _is_same(value, fresh.objects[node], alike):
                    found[node] = value
        return found

    def edited(self) -> dict[int, LazyStateDict]:
        """Held mappings that were assigned to, by node."""
        held = list(self.held.items())
        return {node: value for node, value in held if isinstance(value, LazyStateDict) and value._is_edited}

    def materialized(
        self, positions: list[int], container: LazyStateDict | None = None, bar: Any = None
    ) -> Callable[[int], Any]:
        """What builds plain values out of one read: edits are in them, and sharing is as in the file.

        `container`: the one that is asked, which stands for its node. `bar`: of bytes, to be moved on.
        """
        changed, edited = self.changed(), self.edited()
        if container is not None and container._is_edited and container._position is not None:
            edited[self.program.payloads[container._position]] = container
        edited = {node: edited[node] for node in self._reached(positions, edited)}
        instead: dict[int, list[int]] = {node: [] for node in changed}
        instead.update((node, mapping._filed()) for node, mapping in edited.items())
        builder = self.reader.builder(positions, instead, bar)
        copies: dict[int, Any] = {}
        for node, value in changed.items():
            builder.adopt(node, copy.deepcopy(value, copies))
        for node, mapping in edited.items():
            builder.adopt(node, mapping._empty())
        for node, mapping in edited.items():
            mapping._fill(builder.objects[node], builder.build)
        return builder.build

    def _reached(self, positions: Sequence[int], edited: dict[int, LazyStateDict]) -> Iterator[int]:
        """Which of the edited mappings are below some positions, by way of each other as they are now."""
        program = self.program
        seen: set[int] = set()
        todo: list[Sequence[int]] = [positions] if edited else []
        while todo:
            for position in todo.pop():
                node = program.payloads[position]
                if program.kinds[position] < FIRST_NODE_KIND or node in seen:
                    continue
                seen.add(node)
                if node in edited:
                    yield node
                    todo.append(edited[node]._filed())
                else:
                    todo.append(range(*program.span(node)))

    def close(self) -> None:
        self.table.archive.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """By path, with the edits of nested containers."""
        if self.recipe is None:
            raise TypeError("a checkpoint that was opened from bytes or a file object has no path to be pickled by")
        function, arguments = self.recipe
        edits = {**self.changed(), **self.edited()}
        return function, (*arguments, self.table.archive.fingerprint()), *([edits] if edits else [])

    def __setstate__(self, edits: dict[int, Any]) -> None:
        self.held.update(edits)

    def __deepcopy__(self, memo: dict[int, Any]) -> View:
        """The same open file, with edits of its own."""
        made = memo[id(self)] = View(self.table, self.options, self.recipe)
        made._reader, made.fast = self._reader, self.fast
        for node, value in {**self.changed(), **self.edited()}.items():
            made.held[node] = copy.deepcopy(value, memo)
        return made


def _no_tensor(_kind: int, _payload: int) -> Any:
    raise AssertionError("a part without tensors has one")


class FileDescription(Description):
    """A Description whose parts are touched when they are asked for."""

    def __init__(self, view: View, node: int) -> None:
        self.module, self.name = view.program.called_name(node)
        self.called = True
        self.is_new = view.program.kind(node) == Kind.OBJECT
        self._view = view
        self._start, _ = view.program.span(node)
        self._names = {step[1]: p for p, step in view.table.attributes(node) if step[0] == "attribute"}
        state = self._start + STATE
        if view.program.meaning(node) == Meaning.PARTIAL and view.kinds[state] == Kind.TUPLE:
            self._names = dict(zip(PARTIAL, range(*view.program.span(view.payloads[state]))))
        rebuilt = view.program.rebuilt(node)
        self._args, self._state = rebuilt or (self._start + ARGS, self._start + STATE)
        self._keywords = None if rebuilt is None else view.table.keywords(rebuilt[0])
        self._listed = view.program.appended(node)
        self._node = node

    @property
    def args(self) -> Any:  # type: ignore[override]
        return () if self._keywords is not None else self._view.touch(self._args)

    @property
    def kwargs(self) -> Any:  # type: ignore[override]
        return self._view.touch(self._start + KWARGS if self._keywords is None else self._keywords) or {}

    @property
    def state(self) -> Any:
        return self._view.touch(self._state)

    @property
    def attributes(self) -> Any:  # type: ignore[override]
        return Touched(self._view, self._names)

    @property
    def list_items(self) -> Any:  # type: ignore[override]
        return LazySequence(self._view, None, self._listed)

    @property
    def items(self) -> Any:  # type: ignore[override]
        pairs = self._view.program.pairs(self._node)
        keys = self._view.program.keys(self._node, self._view.special)
        return Touched(self._view, {key: p + 1 for key, p in zip(keys, pairs)})

    def peek_args(self, count: int) -> list[Any]:
        program = self._view.program
        positions = range(*program.span(program.payloads[self._args])) if self._keywords is None else range(0)
        return [self._view.shown(p) for p in positions[:count]]

    def peek_attributes(self, count: int) -> list[tuple[Any, Any]]:
        return [(name, self._view.shown(p)) for name, p in public_first(self._names.items())[:count]]

    def peek_items(self, count: int) -> tuple[list[Any], list[tuple[Any, Any]]]:
        items = self.items._positions if len(self._listed) < count else {}
        listed = [self._view.shown(p) for p in self._listed[:count]]
        return listed, [(k, self._view.shown(p)) for k, p in itertools.islice(items.items(), count - len(listed))]


class Touched(Mapping[Any, Any]):
    """Names to values that are touched when asked for."""

    def __init__(self, view: View, positions: dict[Any, int]) -> None:
        self._view = view
        self._positions = positions

    def __getitem__(self, key: Any) -> Any:
        return self._view.touch(self._positions[key], key)

    def __contains__(self, key: Any) -> bool:
        return key in self._positions

    def __iter__(self) -> Iterator[Any]:
        return iter(self._positions)

    def __len__(self) -> int:
        return len(self._positions)

    def __repr__(self) -> str:
        parts = [f"{summary(k)}: {summary(self._view.shown(p))}" for k, p in list(self._positions.items())[:SHOWN]]
        parts += [f"... {len(self) - SHOWN} more"] if len(self) > SHOWN else []
        return printable(f"{{{', '.join(parts)}}}")


class MissingKeyError(KeyError):
    """A key that is not there. Looks for near ones only when it is printed: code that asks and catches pays nothing."""

    def __init__(self, key: Any, keys: Iterable[Any]) -> None:
        super().__init__(key)
        self._keys = keys

    def __str__(self) -> str:
        key = self.args[0]
        if not isinstance(key, str) or len(key) > LOOKED_LIKE:
            return f"{summary(key)} is not in this checkpoint"
        names = [k for k in itertools.islice(self._keys, LOOKED_AT) if isinstance(k, str) and len(k) <= LOOKED_LIKE]
        said = f"{key!r} is not in this checkpoint"
        for name in names:
            if key.startswith(f"{name}."):
                rest = key.removeprefix(f"{name}.")
                return (
                    f"{said}; if {name!r} holds others, it is [{name!r}][{rest!r}], or in zipslicer.open(...).tensors"
                )
        if near := difflib.get_close_matches(key, names, 3):
            return f"{said}; near it: {', '.join(map(repr, near))}"
        return f"{said}, which has {', '.join(map(repr, names))}" if 0 < len(names) <= FEW else said

    def __reduce__(self) -> tuple[Any, ...]:
        return MissingKeyError, (self.args[0], ())


class LazyStateDict(Lazy, MutableMapping[Any, Any]):
    """A mapping of a checkpoint file whose tensors are read when they are touched.

    Keys are in the file's order and of the file's types. Every touch of a tensor reads it anew, into memory of its own;
    tensors share memory within one call of `materialize` or `get_tensors`, or everywhere with ``cache_tensors=True``.
    Assignments and deletions overlay the file and never change it. It is safe to share among threads, survives fork,
    closes (``with``, or `close`), and pickles by path.

    It is no dict: code that insists on one takes `materialize()`.
    """

    __slots__ = ("__weakref__", "_is_edited", "_overlay", "_own_metadata", "_position", "_slots", "_view")

    _view: View
    _position: int | None  # of the node this was made from; None for a selection
    _slots: dict[Any, int]  # key -> position, or OVERLAID
    _overlay: dict[Any, Any]
    _own_metadata: Any
    _is_edited: bool

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        raise TypeError(
            "zipslicer.load makes a LazyStateDict, and nothing else does; who wants to make one like it, as an optimizer's "
            "load_state_dict does, takes its .materialize()"
        )

    @classmethod
    def _of(
        cls, view: View, position: int | None, slots: dict[Any, int] | None = None, overlay: dict[Any, Any] | None = None,
        metadata: Any = MISSING,
    ) -> LazyStateDict:  # fmt: skip
        self = cls.__new__(cls)
        if slots is None:
            assert position is not None
            node = view.program.payloads[position]
            pairs = view.program.pairs(node)
            slots = dict(zip(view.program.keys(node, view.special), range(pairs.start + 1, pairs.stop + 1, 2)))
        self._view, self._position, self._slots = view, position, slots
        self._overlay = {} if overlay is None else overlay
        self._own_metadata = metadata
        self._is_edited = False
        return self

    # ---------------------------------------------------------------- the mapping
    def __getitem__(self, key: Any) -> Any:
        """The value of a key: a tensor is read, into memory of its own; a nested container is lazy.

        Raises: KeyError; OSError and the errors of zipslicer.errors where the file is at fault, with `.key`.
        """
        try:
            position = self._slots[key]
        except KeyError:
            raise MissingKeyError(key, self._slots) from None
        view = self._view
        if position >= 0 and (fast := view.fast) is not None:  # the hot path: as few steps as there can be
            try:
                made = fast[0](fast[1], position)
            except ZipSlicerError as error:
                raise error.located(path=view.path, key=key) from None
            if made is not None:
                return made
        return self._overlay[key] if position < 0 else view.touch(position, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Overlay the file: nothing is written to it."""
        self._slots[key] = OVERLAID
        self._overlay[key] = value
        self._is_edited = True

    def __delitem__(self, key: Any) -> None:
        if key not in self._slots:
            raise MissingKeyError(key, self._slots)
        del self._slots[key]
        self._overlay.pop(key, None)
        self._is_edited = True

    def __iter__(self) -> Iterator[Any]:
        return iter(self._slots)

    def __reversed__(self) -> Iterator[Any]:
        return iter(reversed(self._slots))

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, key: Any) -> bool:
        return key in self._slots

    def keys(self) -> KeysView[Any]:
        """The keys, in file order; reads nothing."""
        return self._slots.keys()

    def items(self) -> ItemsView[Any, Any]:
        """A view of (key, value). Iteration is in the order of keys, and tensors are read ahead of it as `stream` does."""
        return _Items(self)

    def values(self) -> ValuesView[Any]:
        """A view of the values, which are read ahead as those of `items` are."""
        return _Values(self)

    def _ahead(self) -> Iterator[tuple[Any, Any]]:
        """(key, value) of each. The first is touched alone: many want no more than that one.

        Raises: RuntimeError where a key has come or gone meanwhile, as of a dict.
        """
        order = list(self._slots.items())
        ahead: Iterator[tuple[Any, Any]] = iter(())
        in_it: set[Any] = set()
        try:
            for i, (key, position) in enumerate(order):
                if len(self._slots) != len(order):
                    raise RuntimeError("keys were added or deleted during iteration")
                if i == 1:
                    wanted = self._wanted_ahead(order[1:])
                    in_it = {each.key for each in wanted}
                    ahead = stream(wanted, budget_nbytes=BUDGET_NBYTES) if wanted else ahead
                # No name here for a value: it would live on for as long as the next one is waited for.
                yield key, self._next(ahead, key, position) if key in in_it else self[key]
        finally:
            if isinstance(ahead, Generator):
                ahead.close()

    def _next(self, ahead: Iterator[tuple[Any, Any]], key: Any, position: int) -> Any:
        value = next(ahead)[1]
        return value if self._slots.get(key) == position else self[key]  # assigned to since it was read

    def _wanted_ahead(self, order: Sequence[tuple[Any, int]]) -> list[Wanted]:
        """The tensors among some values; none where a thread would cost more than it saves."""
        wanted = []
        try:
            for key, position in order:
                if position >= 0 and self._view.is_tensor(position) and (made := self._wanted(key, WHOLE)) is not None:
                    wanted.append(made)
        except (ZipSlicerError, OSError):
            pass  # raised where its turn comes, as are all after it touched
        is_worth_it = len(wanted) >= AHEAD_COUNT or sum(each.nbytes for each in wanted) >= AHEAD_NBYTES
        return wanted if is_worth_it else []

    def get(self, key: Any, default: Any = None) -> Any:
        return self[key] if key in self._slots else default

    def clear(self) -> None:
        self._slots.clear()
        self._overlay.clear()
        self._is_edited = True

    def __eq__(self, other: object) -> bool:
        """Whether two have the same keys and the same tensors, by metadata and file; values are not read."""
        if self is other:
            return True
        if not isinstance(other, LazyStateDict):
            return NotImplemented
        if list(self._slots) != list(other._slots) or self._view.identity is not other._view.identity:
            return False
        if self._slots != other._slots:
            return False
        return all(value is other._overlay[key] for key, value in self._overlay.items())

    __hash__ = None  # type: ignore[assignment]

    def copy(self) -> LazyStateDict:
        """A shallow copy: keys and overlay are its own, nested containers and the file are shared."""
        made = LazyStateDict._of(self._view, self._position, dict(self._slots), dict(self._overlay), self._own_metadata)
        made._is_edited = self._is_edited
        return made

    __copy__ = copy

    def __deepcopy__(self, memo: dict[int, Any]) -> LazyStateDict:
        """Keys, overlay and nested containers are its own; the file is shared."""
        view = copy.deepcopy(self._view, memo)
        if id(self) in memo:  # made on the way, as one that the view holds
            return cast("LazyStateDict", memo[id(self)])
        made = memo[id(self)] = self.copy()
        made._view = view
        if self._position is not None and self._is_held():
            view.held[view.program.payloads[self._position]] = made
        made._overlay = copy.deepcopy(self._overlay, memo)
        made._own_metadata = copy.deepcopy(self._own_metadata, memo) if self._own_metadata is not MISSING else MISSING
        return made

    def _is_held(self) -> bool:
        """Whether this is what the view holds for a node of the file, and no copy or selection."""
        view, position = self._view, self._position
        return position is not None and view.held.get(view.program.payloads[position]) is self

    @property
    def _metadata(self) -> Any:
        """What torch's state_dict() keeps beside the tensors: versions of modules, by name; None if there is none."""
        if self._own_metadata is MISSING:
            program = self._view.program
            self._own_metadata = None
            if self._position is not None and program.kinds[self._position] == Kind.ORDERED_DICT:
                state = program.state_position(program.payloads[self._position])
                built = None if state is None else self._view.touch(state)
                self._own_metadata = built.get("_metadata") if isinstance(built, Mapping) else None
        return self._own_metadata

    @_metadata.setter
    def _metadata(self, value: Any) -> None:
        self._own_metadata = value
        self._is_edited = True

    # ---------------------------------------------------------------- facts, without reading
    def get_meta(self, key: Any) -> TensorInfo | None:
        """What the file says of a tensor; None for a value that is no tensor. Reads nothing. Raises: KeyError."""
        position = self._slots.get(key)
        if position is None:
            raise MissingKeyError(key, self._slots)
        if position < 0:
            return self._view.own_meta(self._overlay[key])
        return self._view.located_meta(position, key)

    def _require_meta(self, key: Any) -> TensorInfo:
        info = self.get_meta(key)
        if info is None:
            raise TypeError(f"{key!r} is no tensor")
        return info

    def get_shape(self, key: Any) -> list[int]:
        """As safetensors has it."""
        return list(self._require_meta(key).shape)

    def get_dtype(self, key: Any) -> str:
        """Safetensors' name of the dtype ("F32"), or torch's where that format has none."""
        return _code(self._require_meta(key).dtype_name)

    def metadata(self) -> dict[str, str]:
        """As safetensors has it: {"format": "pt"}, or what a safetensors file or an index of shards says of itself."""
        return dict(self._view.metadata)

    def offset_keys(self) -> list[Any]:
        """The keys of tensors in the order of their bytes in the file, which is the fastest to read in."""
        view = self._view
        own = [key for key, position in self._slots.items() if position < 0]
        filed = [(key, p) for key, p in self._slots.items() if p >= 0 and view.is_tensor(p)]
        return [key for key, p in sorted(filed, key=lambda item: view.place(item[1]))] + own

    @property
    def path(self) -> str | None:
        """The file, or None where it was opened from bytes or a file object."""
        return self._view.path

    # ---------------------------------------------------------------- reading
    def get_tensor(self, key: Any, *, out: Any = None) -> Any:
        """The same as self[key], for a tensor.

        out: a tensor of the same shape (an array, with framework="np"), which is filled and returned: pinned memory, shared
            memory, a buffer that is used again. Bytes go straight into it where its dtype and layout are those in the
            file, and are converted where they are not.

        Raises: ValueError for another shape; and as self[key].
        """
        self._require_meta(key)
        return self[key] if out is None else self.get_slice(key).read((), out=out)

    def get_tensors(self, keys: Iterable[Any]) -> dict[Any, Any]:
        """Several at once, in parallel and in file order; those that share a storage in the file share it here."""
        if isinstance(keys, (str, bytes)):
            raise TypeError(f"get_tensors takes several keys, and {keys!r} is one")
        wanted = list(keys)
        for key in wanted:
            self._require_meta(key)
        filed = [position for key in wanted if (position := self._slots[key]) >= 0]
        built = dict(zip(filed, self._built(filed)))
        return {key: built[p] if (p := self._slots[key]) >= 0 else self._overlay[key] for key in wanted}

    def get_slice(self, key: Any) -> LazySlice:
        """A handle that reads the part that it is indexed with: sd.get_slice("w")[10:20, ::2]. Raises: KeyError, TypeError."""
        self._require_meta(key)
        position = self._slots[key]
        if position < 0:
            return LazySlice(self, key, self._view, None)
        view, position = self._view.at(position)
        leaf = view.table.leaf(position)
        if leaf is None:
            raise TypeError(f"{key!r} is a bare storage; read it whole")
        return LazySlice(self, key, view, leaf)

    def stream(
        self,
        keys: Patterns | None = None,
        *,
        device: Any = None,
        slices: Mapping[Any, Any] | None = None,
        budget_bytes: int = BUDGET_NBYTES,
        progress: bool = False,
    ) -> Generator[tuple[Any, Any], None, None]:
        """(key, tensor) of each tensor, in the order of their bytes in the file, read ahead by a thread of its own.

        Each tensor owns its memory, as on any touch. At most `budget_bytes` are read and not yet taken; a tensor of more
        goes alone. What was taken is not counted: who drops each tensor needs the budget and the largest one. Closing
        the generator, as leaving a `for` by break does in the end, stops the reading. Values that are no tensors are left
        out; tensors in nested containers too, which `open(source).tensors` or `flatten()` list.

        Args:
            keys: names or globs ("layer3.*"), as `select` takes them; all by default.
            device: to where each is moved, in the thread that reads; by default where map_location puts them. A mapping from
                names or globs to devices says it of each: the name itself counts before a glob, an earlier one before a
                later one, and what none is for stays. To a CUDA device bytes go by way of pinned memory, chunk by chunk,
                while the next chunk is read.
            slices: by key a basic index: of these only that part is read.
            budget_bytes: see above.
            progress: show a bar of bytes (needs tqdm).

        Raises:
            KeyError: a key is not there. IndexError, TypeError, ValueError: a slice is none of its tensor's.
            OSError and the errors of zipslicer.errors, from the generator: with `.key`, after all that comes before it.
        """
        if operator.index(budget_bytes) < 1:
            raise ValueError(f"budget_bytes must be at least 1, not {budget_bytes}")
        if device is not None and self._view.framework == "np":
            raise ValueError('arrays are on the CPU: device= needs framework="pt"')
        chosen = self if keys is None else self.select(keys)
        to = _devices(device)
        cut = dict(slices or {})
        wanted = [
            made._replace(device=to(made.key))
            for key in chosen.offset_keys()
            if (made := chosen._wanted(key, cut.pop(key, WHOLE))) is not None
        ]
        if cut:
            key = next(iter(cut))
            if key in chosen._slots:
                raise TypeError(f"{key!r} is no tensor")
            raise MissingKeyError(key, chosen._slots)
        return stream(wanted, budget_nbytes=budget_bytes, progress=progress)

    def load_into(
        self,
        target: Any,
        *,
        strict: bool = True,
        assign: bool = False,
        dtype: Any = None,
        key_map: Callable[[Any], Any] | Mapping[Any, Any] | None = None,
        progress: bool = False,
    ) -> LoadReport:
        """Fill a module, an optimizer or a mapping of tensors, as load_state_dict would; and hold no second copy.

        Bytes are read straight into the memory of a parameter where its dtype and strides are those in the file and it
        is on the CPU; else through a buffer of 16 MiB. Tensors on the meta device are replaced by new ones of their
        dtype. Tied tensors of the target are read once. A module that loads in its own way (an overridden
        `_load_from_state_dict`, pre-hooks, lazy parameters, extra state) does so, out of a lazy mapping.

        What is missing, unexpected or of another shape is told before anything is read; but for modules that load in
        their own way, after that. If a read fails, some tensors of the target hold new values, the others those from
        before, and those that were read together with the one that the error names may hold some of each.

        Args:
            target: a torch.nn.Module, a torch.optim.Optimizer (from its own part of a checkpoint), or a mapping from the
                same keys to tensors.
            strict: refuse keys that are missing or unexpected.
            assign: put new tensors, of the file's dtype, in place of those of the target.
            dtype: with `assign` and for the meta device: what floating-point tensors become.
            key_map: names of the target by those of the file, as a function or a mapping; None leaves a key out.
            progress: show a bar of bytes (needs tqdm).

        Returns:
            A LoadReport (missing_keys, unexpected_keys, mismatches, casts), which begins as torch's own does.

        Raises:
            RuntimeError: as torch words it, for what does not fit. ValueError: an optimizer has other parameter groups.
            OSError and the errors of zipslicer.errors, with `.key`.
        """
        from .module import load_into

        return load_into(self, target, strict=strict, assign=assign, dtype=dtype, key_map=key_map, progress=progress)

    def _wanted(self, key: Any, wanted: Any) -> Wanted | None:
        """What stream is to read of a key; None for what is no tensor."""
        position = self._slots[key]
        if position < 0:
            value = self._overlay[key]
            if self._view.own_meta(value) is None:
                if wanted is not WHOLE:
                    raise TypeError(f"{key!r} is no tensor")
                return None
            return Wanted(key, 0, None, position, None, wanted, value)
        view, position = self._view.at(position)
        leaf = view.table.leaf(position)
        if leaf is None and wanted is not WHOLE:
            raise TypeError(f"{key!r} is a bare storage; read it whole")
        try:
            return Wanted(key, nbytes_of(view, leaf, wanted), view, position, leaf, wanted)
        except ZipSlicerError as error:
            raise error.located(path=self.path, key=key) from None

    def materialize(self, *, progress: bool = False) -> dict[Any, Any]:
        """The plain dict that torch.load would return, all tensors read in parallel; sharing memory as in the file.

        An OrderedDict where the file has one, with its `_metadata`. Edits and nested edits are in it. `progress` shows a
        bar of bytes (needs tqdm); of shards it knows those of the files that it has come to.
        """
        with bar_of(progress) as bar:
            if self._position is not None:
                return cast("dict[Any, Any]", self._built([self._position], bar)[0])
            made = self._empty()
            self._fill(made, dict(zip(filed := self._filed(), self._built(filed, bar))).__getitem__)
            return made

    def prefetch(
        self, *, rank: int = 0, world_size: int = 1, threads: int | None = None, progress: bool = False
    ) -> int:
        """Read this rank's share of the bytes of all tensors to where any process of this machine will find them.

        That is the page cache for a file, and `cache_dir` for a URL. Of `world_size` processes of one machine each reads its
        part, and what they then read themselves comes from there: so each byte is read once.

        Args:
            rank: of this process among those of the machine, torchrun's LOCAL_RANK.
            world_size: how many there are, its LOCAL_WORLD_SIZE.
            threads: as for reading a file.
            progress: show a bar of bytes (needs tqdm).

        Returns: how many bytes this was. Others may still be reading theirs: wait for them (a barrier).

        Raises: ValueError where nothing would keep what is read: bytes, file objects, URLs without cache_dir=; and as reading.
        """
        from .prefetch import prefetch

        places: dict[int, tuple[TensorTable, list[int]]] = {}  # file by file
        for view, position in map(self._view.at, self._filed()):
            places.setdefault(id(view), (view.table, []))[1].append(position)
        with bar_of(progress, 0) as bar:
            return prefetch(places.values(), rank, world_size, threads, bar)

    def _built(self, positions: list[int], bar: Any = None) -> list[Any]:
        """Plain values, out of one read."""
        try:
            build = self._view.materialized(positions, self, bar)
            return [build(position) for position in positions]
        except ZipSlicerError as error:
            raise error.located(path=self.path, key=self._key_of_record(error)) from None

    def _filed(self) -> list[int]:
        """The positions of the values that come from the file, those of containers among the user's own values too."""
        found = [position for position in self._slots.values() if position >= 0]
        return found + [value._position for value in self._overlay.values() if self._is_part(value)]

    def _is_part(self, value: Any) -> bool:
        """Whether a value of the user's own is a container of this file, as the file or the view has it."""
        if isinstance(value, LazySequence):
            return value._view is self._view and value._position is not None
        return isinstance(value, LazyStateDict) and value._view is self._view and value._is_held()

    def _empty(self) -> dict[Any, Any]:
        """A plain mapping of the class that the file has."""
        if self._position is None:
            return collections.OrderedDict() if self._metadata is not None else {}
        program = self._view.program
        node = program.payloads[self._position]
        if self._metadata is not None or program.kind(node) == Kind.ORDERED_DICT:
            return collections.OrderedDict()
        if program.kind(node) == Kind.CALL:
            args = program.build(program.span(node)[0] + ARGS, lambda *_: None, self._view.special)
            made = construct(Meaning.DEFAULTDICT, args)
            return made if isinstance(made, dict) else {}
        return {}

    def _fill(self, made: dict[Any, Any], build: Callable[[int], Any]) -> None:
        for key, position in self._slots.items():
            if position >= 0:
                made[key] = build(position)
            else:
                value = self._overlay[key]
                made[key] = build(value._position) if self._is_part(value) else materialize(value)
        if self._metadata is not None:
            made._metadata = self._metadata  # type: ignore[attr-defined]

    def _key_of_record(self, error: ZipSlicerError) -> Any:
        """Which key an error about a record is about."""
        if error.record is None or error.key is not None or not isinstance(error, CheckpointError):
            return None
        is_in = self._view.is_in
        return next((key for key, p in self._slots.items() if p >= 0 and is_in(p, error.record)), None)

    # ---------------------------------------------------------------- other names for the same tensors
    def select(self, *patterns: Patterns) -> LazyStateDict:
        """Some of the keys, by name or glob ("layer3.*"), in file order; reads nothing.

        A key that equals a pattern is meant before the pattern is tried as a glob. Nested containers are the same
        objects here and there; later assignments to top-level keys show only where they are made.

        Raises: KeyError for a pattern that is no glob and no key.
        """
        wanted: set[Any] = set()
        for pattern in _flat(patterns):
            if pattern in self._slots:
                wanted.add(pattern)
            elif isinstance(pattern, str) and GLOB & set(pattern):
                wanted.update(key for key in self._slots if isinstance(key, str) and fnmatch.fnmatchcase(key, pattern))
            else:
                raise MissingKeyError(pattern, self._slots)
        slots = {key: position for key, position in self._slots.items() if key in wanted}
        overlay = {key: value for key, value in self._overlay.items() if key in wanted}
        return LazyStateDict._of(self._view, None, slots, overlay, self._metadata)

    def _part(self, keys: Iterable[Any]) -> LazyStateDict:
        """Some of the keys, by name."""
        slots = {key: self._slots[key] for key in keys}
        overlay = {key: self._overlay[key] for key, position in slots.items() if position < 0}
        return LazyStateDict._of(self._view, None, slots, overlay, self._metadata)

    def flatten(self, separator: str = ".") -> LazyStateDict:
        """Every tensor of this mapping and of those nested in it, by its path. Other values are left out.

        Reads nothing, except tensors of other checkpoints that were assigned into this one.

        Raises: ValueError if two would get one path; another separator tells them apart.
        """
        slots: dict[Any, int] = {}
        overlay: dict[Any, Any] = {}
        view = self._view
        room = view.name_room()
        seen: set[int] = set()
        todo: list[tuple[str, Any]] = [("", self)]
        while todo:
            prefix, value = todo.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            deeper = []
            home = value._view if isinstance(value, (LazyStateDict, LazySequence)) else view
            for key, position, child in _entries(value):
                name = f"{prefix}{key}"
                if position >= 0:
                    room -= len(name)
                    if room < 0:
                        raise TableError(TOO_LONG, path=self.path)
                    file, place = home.at(position)
                    is_tensor = file.table.is_tensor(place)
                    if is_tensor:
                        # A tensor of a mapping that was put in from elsewhere is read, and the user's own from then on.
                        position = view.adopt(home, position)
                        child = file.touch(place) if position < 0 else None
                    else:
                        child = file.touch(place) if _is_node(file.program, place) else None
                else:
                    is_tensor = view.own_meta(child) is not None
                    position = OVERLAID
                if is_tensor:
                    if name in slots:
                        raise ValueError(f"two tensors would be called {name!r}; another separator tells them apart")
                    slots[name] = position
                    if position < 0:
                        overlay[name] = child
                elif isinstance(child, (LazyStateDict, LazySequence)) or (
                    position < 0 and isinstance(child, (Mapping, list, tuple))
                ):
                    deeper.append((name + separator, child))
            todo.extend(reversed(deeper))
        return LazyStateDict._of(self._view, None, slots, overlay, None)

    def rename(self, names: Callable[[Any], Any] | Mapping[Any, Any]) -> LazyStateDict:
        """Give keys other names, in place; reads nothing. Returns self.

        `names` is a function of the key, or a mapping from old names to new ones.

        Raises: ValueError if two keys would get one name; nothing is renamed then. KeyError for an old name that is none.
        """
        if isinstance(names, Mapping):
            table = names
            for key in table:
                if key not in self._slots:
                    raise MissingKeyError(key, self._slots)
            new = {key: table.get(key, key) for key in self._slots}
        else:
            new = {key: names(key) for key in self._slots}
        if len(set(new.values())) < len(new):
            counts = collections.Counter(new.values())
            twice = next(name for name, count in counts.items() if count > 1)
            raise ValueError(f"two keys would be called {twice!r}")
        self._slots = {new[key]: position for key, position in self._slots.items()}
        self._overlay = {new[key]: value for key, value in self._overlay.items()}
        self._is_edited = True
        return self

    # ---------------------------------------------------------------- lifetime
    def close(self) -> None:
        """Close the file. Keys and metadata stay; tensors that were read are their own."""
        self._view.close()

    def __enter__(self) -> LazyStateDict:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        _refuse_torch_save("LazyStateDict")
        return _restored, (self._view, self._position, self._slots, self._overlay, self._metadata, self._is_edited)

    # ---------------------------------------------------------------- looks
    def _rows(self) -> list[tuple[str, str, str, str]]:
        """(key, dtype, shape, size) to show, of the first keys."""
        rows = []
        for key, position in itertools.islice(self._slots.items(), SHOWN):
            if position < 0:
                value = self._overlay[key]
                value = self._view.own_meta(value) or value
            else:
                value = self._view.shown(position)
            if isinstance(value, TensorInfo):
                facts = value.dtype_name, str(list(value.shape)), size_text(value.nbytes)
            else:
                facts = type(value).__name__, summary(value), ""
            rows.append((summary(key, quoted=False), *facts))
        return [(printable(name), dtype, printable(shape), size) for name, dtype, shape, size in rows]

    def _title(self) -> str:
        total = 0
        for key, position in self._slots.items() if len(self._slots) <= 10_000 else ():
            info = self._view.shown_meta(position) if position >= 0 else self.get_meta(key)
            total += info.nbytes if info is not None else 0
        size = f", {size_text(total)}" if total else ""
        where = f" in {self.path!r}" if self.path else ""
        return f"LazyStateDict: {len(self)} key{'s' * (len(self) != 1)}{size}{where}"

    def __repr__(self) -> str:
        rows = self._rows()
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
        lines = [self._title()]
        lines += ["  " + f"{k:{widths[0]}}  {d:{widths[1]}}  {s:{widths[2]}}  {n:>9}".rstrip() for k, d, s, n in rows]
        if len(self) > len(rows):
            lines.append(f"  ... {len(self) - len(rows)} more")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """For notebooks: a tree that opens and closes."""
        from .notebook import tree

        return tree(self, self._title())


class _Items(ItemsView[Any, Any]):
    _mapping: LazyStateDict

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return self._mapping._ahead()


class _Values(ValuesView[Any]):
    _mapping: LazyStateDict

    def __iter__(self) -> Iterator[Any]:
        return map(operator.itemgetter(1), self._mapping._ahead())


class LazySequence(Lazy, Sequence[Any]):
    """A list or tuple of a checkpoint file, with tensors somewhere in it. Read-only; `materialize` gives the plain one."""

    __slots__ = ("__weakref__", "_places", "_position", "_view")

    def __init__(self, view: View, position: int | None, places: range | None = None) -> None:
        self._view = view
        self._position = position
        if places is None:
            assert position is not None
            places = range(*view.program.span(view.program.payloads[position]))
        self._places = places

    @overload
    def __getitem__(self, place: int) -> Any: ...
    @overload
    def __getitem__(self, place: slice) -> list[Any]: ...
    def __getitem__(self, place: Any) -> Any:
        """An item, touched as in a LazyStateDict; a list of items for a slice."""
        if isinstance(place, slice):
            return [self._view.touch(position) for position in self._places[place]]
        return self._view.touch(self._places[place], place)

    def __len__(self) -> int:
        return len(self._places)

    def get_meta(self, place: int) -> TensorInfo | None:
        """What the file says of the tensor at a place; None for another value."""
        return self._view.meta(self._places[place])

    def materialize(self, *, progress: bool = False) -> Any:
        """The plain list or tuple, all its tensors read in parallel. `progress` shows a bar of bytes (needs tqdm)."""
        try:
            with bar_of(progress) as bar:
                if self._position is not None:
                    return self._view.materialized([self._position], bar=bar)(self._position)
                build = self._view.materialized(list(self._places), bar=bar)
                return [build(position) for position in self._places]
        except ZipSlicerError as error:
            raise error.located(path=self._view.table.archive.source.path) from None

    def __copy__(self) -> LazySequence:
        return LazySequence(self._view, self._position, self._places)

    def __deepcopy__(self, memo: dict[int, Any]) -> LazySequence:
        return LazySequence(copy.deepcopy(self._view, memo), self._position, self._places)

    def close(self) -> None:
        """Close the file."""
        self._view.close()

    def __enter__(self) -> LazySequence:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LazySequence):
            return NotImplemented
        return self._view is other._view and self._places == other._places

    __hash__ = None  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        _refuse_torch_save("LazySequence")
        return LazySequence, (self._view, self._position, self._places)

    def __repr__(self) -> str:
        shown = []
        for position in self._places[:SHOWN]:
            value = self._view.shown(position)
            shown.append(repr(value) if isinstance(value, TensorInfo) else summary(value))
        if len(self) > SHOWN:
            shown.append(f"... {len(self) - SHOWN} more")
        return printable(f"LazySequence([{', '.join(shown)}])")


class LazySlice:
    """A tensor that is read by parts: index it with integers, slices, ... and None, as NumPy's basic indexing has it.

    The result owns its memory. Reads the bytes that are asked for, and little else.
    """

    __slots__ = ("_key", "_leaf", "_owner", "_part", "_view")

    def __init__(
        self, owner: LazyStateDict, key: Any, view: View, leaf: Leaf | None, part: Member | None = None
    ) -> None:
        self._owner = owner
        self._key = key
        self._view = view
        self._leaf = leaf
        self._part = part

    def __getitem__(self, index: Any) -> Any:
        """Raises: IndexError, TypeError (an index that is not basic), ValueError (a step of 0)."""
        return self.read(index)

    def read(self, index: Any, *, out: Any = None) -> Any:
        """The same as self[index]; into `out`, as LazyStateDict.get_tensor takes it, where there is one."""
        if out is not None:
            self._check_shape(index, out)
        try:
            reader = self._view.reader
            if out is not None and self._leaf is not None and self._part is None:
                reader.fill(self._leaf, out, index)
                return out
            if self._leaf is None:
                made = self._owner[self._key][index]
            elif self._part is not None:
                made = reader.slice_member(self._part, index)
            else:
                made = reader.slice(self._leaf, index)
            if out is None:
                return made
            reader.put(made, out)
            return out
        except ZipSlicerError as error:
            raise error.located(path=self._view.path, key=self._key) from None

    def _check_shape(self, index: Any, out: Any) -> None:
        if not hasattr(out, "shape"):
            raise TypeError(f'out is a tensor, or an array with framework="np", not {type(out).__name__}')
        shape = self.shape
        if not (isinstance(index, tuple) and not index):
            shape = apply_index(Geometry(0, shape, (1,) * len(shape)), index).geometry.sizes
        if tuple(out.shape) != tuple(shape):
            raise ValueError(f"what is read has the shape {tuple(shape)}, out has {tuple(out.shape)}")

    def part(self, name: str) -> LazySlice:
        """One of the dense tensors that a sparse, quantized or nested tensor consists of; `info.parts` has their names.

        Raises: KeyError.
        """
        leaf, table = self._leaf, self._view.table
        try:
            known = {} if leaf is None or leaf.composite is None else table.composite(leaf.composite).members
        except ZipSlicerError as error:
            raise error.located(path=self._view.path, key=self._key) from None
        if self._part is not None or name not in self.info.parts:
            raise MissingKeyError(name, self.info.parts)
        return LazySlice(self._owner, self._key, self._view, leaf, known[name])

    @property
    def info(self) -> TensorInfo:
        if self._part is not None:
            return self._view.table.member_info(self._part)
        return self._owner._require_meta(self._key)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def dtype(self) -> Any:
        """As TensorInfo has it."""
        return self.info.dtype

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        """Safetensors' name of the dtype: "F32"."""
        return _code(self.info.dtype_name)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a 0-d tensor")
        return self.shape[0]

    def __repr__(self) -> str:
        return f"LazySlice({self._key!r}, {self.info!r})"


def _restored(
    view: View, position: int | None, slots: dict[Any, int], overlay: dict[Any, Any], metadata: Any, is_edited: bool
) -> LazyStateDict:
    made = LazyStateDict._of(view, position, slots, overlay, metadata)
    made._is_edited = is_edited
    return made


def _devices(device: Any) -> Callable[[Any], Any]:
    """What `stream` takes as a device -> the device of a key."""
    if not isinstance(device, Mapping):
        return lambda _: device

    def of(key: Any) -> Any:
        if key in device:
            return device[key]
        globs = (each for each in device if isinstance(each, str) and isinstance(key, str))
        return next((device[each] for each in globs if fnmatch.fnmatchcase(key, each)), None)

    return of


def _refuse_torch_save(name: str) -> None:
    """torch.save would write a mapping that reads a file which need not be there, and no tensors."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.serialization":
            raise TypeError(f"torch.save of a {name} would write no tensors: save its .materialize() instead")
        frame = frame.f_back


def _is_node(program: Program, position: int) -> bool:
    return program.kinds[position] >= FIRST_NODE_KIND


def _parts_of(value: Any) -> tuple[Any, ...]:
    """What a placeholder without tensors holds; nothing for another value."""
    about = value._zipslicer if type(value) is Placeholder else None
    return (about.args, about.kwargs, about.state, about.list_items, about.items) if type(about) is Description else ()


def _is_same(one: Any, other: Any, alike: set[tuple[int, int]]) -> bool:
    """Whether two values that the same part of a file has made are still alike.

    `alike`: the ids of pairs that are known to be, to which those of a comparison that found nothing are added. They must
    live on for as long as it is used.
    """
    todo = [(one, other)]
    seen: set[tuple[int, int]] = set()
    while todo:
        a, b = todo.pop()
        pair = id(a), id(b)
        if a is b or pair in seen or pair in alike:
            continue
        if type(a) is not type(b):
            return False
        if isinstance(a, (dict, list, tuple)):
            seen.add(pair)
            if len(a) != len(b):
                return False
            todo += zip(a, b)
            if isinstance(a, dict):
                todo += zip(a.values(), b.values())
        elif type(a).__module__ == "numpy" and hasattr(a, "tobytes"):
            if str(a.dtype) != str(b.dtype) or a.shape != b.shape or a.tobytes() != b.tobytes():
                return False
        elif isinstance(a, (set, frozenset)):
            if len(a) != len(b) or {k for k in a if not isinstance(k, Placeholder)} - b:
                return False
        elif type(a) is Placeholder:
            seen.add(pair)
            todo += zip(_parts_of(a), _parts_of(b))
        elif a != b and not (isinstance(a, float) and math.isnan(a) and math.isnan(b)):
            return False
    alike |= seen
    return True


def _entries(value: Any) -> Iterator[tuple[Any, int, Any]]:
    """(key, position, None) of what is in the file and (key, OVERLAID, value) of what is not, of any container."""
    if isinstance(value, LazyStateDict):
        for key, position in value._slots.items():
            yield key, position, value._overlay.get(key)
    elif isinstance(value, LazySequence):
        for i, position in enumerate(value._places):
            yield i, position, None
    elif isinstance(value, Mapping):
        for key, child in value.items():
            yield key, OVERLAID, child
    else:
        for i, child in enumerate(value):
            yield i, OVERLAID, child


def _flat(patterns: Sequence[Patterns]) -> Iterator[Any]:
    for pattern in patterns:
        if isinstance(pattern, str) or not isinstance(pattern, Iterable):
            yield pattern
        else:
            yield from pattern


def _info_of(tensor: Any) -> TensorInfo:
    """The facts of a tensor that the user has put in."""
    strided = str(tensor.layout) == "torch.strided" and not tensor.is_nested
    return TensorInfo(
        dtype_name=str(tensor.dtype).removeprefix("torch."),
        shape=_ragged(tensor) if tensor.is_nested else tuple(tensor.shape),
        strides=tuple(tensor.stride()) if strided else (),
        storage_offset=tensor.storage_offset() if strided else 0,
        numel=tensor.numel(),
        nbytes=tensor.numel() * tensor.element_size(),
        itemsize=tensor.element_size(),
        storage_key="",
        storage_nbytes=tensor.untyped_storage().nbytes() if strided else 0,
        location=str(tensor.device),
        requires_grad=tensor.requires_grad,
        is_parameter=type(tensor).__name__ == "Parameter",
        is_contiguous=tensor.is_contiguous() if strided else False,
        is_conj=tensor.is_conj(),
        is_neg=tensor.is_neg(),
        class_name=None,
        layout=NESTED if tensor.is_nested else str(tensor.layout).removeprefix("torch."),
    )


def _info_of_array(made: Any) -> TensorInfo:
    """The same of an array."""
    return TensorInfo(
        dtype_name=str(made.dtype), shape=made.shape, strides=tuple(n // (made.itemsize or 1) for n in made.strides),
        storage_offset=0, numel=made.size, nbytes=made.nbytes, itemsize=made.itemsize, storage_key="",
        storage_nbytes=made.nbytes, location="cpu", requires_grad=False, is_parameter=False,
        is_contiguous=made.flags.c_contiguous, is_conj=False, is_neg=False, class_name=None, framework="np",
    )  # fmt: skip


def _ragged(tensor: Any) -> tuple[int, ...]:
    """The shape of a nested tensor, whose first size is the one that all components have."""
    return (tensor.size(0), *(RAGGED,) * (tensor.dim() - 1))


def _code(dtype_name: str) -> str:
    return next((d.code for d in DTYPES if d.name == dtype_name and d.code), dtype_name)
