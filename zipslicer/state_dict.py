"""LazyStateDict, LazySequence, LazySlice: what the user holds. Listing reads nothing; touching a key reads that tensor.

All containers of one open file share a View, which touches values and holds each container it has made, so that
``sd["a"]["b"] = t`` stays, and a dict that contains itself is itself.
"""

from __future__ import annotations

import collections
import copy
import difflib
import fnmatch
import html
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, Union, cast, overload

from .arrays import array_value
from .backend import FIRST_NODE_KIND, Kind
from .errors import CheckpointError, ZipSlicerError
from .policy import NOT_PLAIN, Description, Meaning, Placeholder
from .program import ARGS, KWARGS, MISSING, STATE
from .table import Leaf, TensorInfo, TensorTable

if TYPE_CHECKING:
    from .tensors import ReadOptions, TensorReader

__all__ = ["LazySequence", "LazySlice", "LazyStateDict", "View"]

OVERLAID = -1  # in place of a position: the value is the user's own
SHOWN = 24  # keys of a repr
GLOB = frozenset("*?[")
Patterns = Union[str, Iterable[str]]


class View:
    """One open file, as its containers see it: touches values, and holds the containers it has made."""

    def __init__(
        self, table: TensorTable, options: ReadOptions, recipe: tuple[Callable[..., Any], tuple[Any, ...]] | None
    ) -> None:
        self.table = table
        self.program = table.program
        self.kinds, self.payloads = table.program.kinds, table.program.payloads
        self.options = options
        self.recipe = recipe  # how to open the file again, for pickling; None where there is no path
        self.held: dict[int, Any] = {}  # containers and placeholders by node
        self.is_edited = False
        self._reader: TensorReader | None = None

    @property
    def reader(self) -> TensorReader:
        """Made on first touch, because it imports torch."""
        if self._reader is None:
            from .tensors import TensorReader

            self._reader = TensorReader(self.table, self.options)
        return self._reader

    def special(self, meaning: int, name: str, args: Sequence[Any], state: Any) -> Any:
        """program.Special, with torch imported only where a value of torch is asked for."""
        if meaning == Meaning.STRANGER or meaning <= Meaning.LAST_PLAIN:
            return NOT_PLAIN
        if meaning >= Meaning.NUMPY_ARRAY:
            return array_value(meaning, args, state)
        return self.reader.special(meaning, name, args, state)

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
            attributes = None if leaf.attributes is None else self._plain(leaf.attributes)
            return self.reader.leaf(leaf, attributes)
        node = self.program.payloads[position]
        made = self.held.get(node, MISSING)
        # Two threads may make one container at once; the first to be held is the one that both return.
        return self.held.setdefault(node, self._make(position, node)) if made is MISSING else made

    def _make(self, position: int, node: int) -> Any:
        program = self.program
        if not program.with_tensors()[node]:
            return program.build(position, _no_tensor, self.special)
        if program.allowed(node) is not MISSING if program.kind(node) in (Kind.CALL, Kind.OBJECT) else False:
            return self.reader.builder([position]).build(position)
        if program.is_mapping(node):
            return LazyStateDict._of(self, position)
        if program.kind(node) in (Kind.LIST, Kind.TUPLE):
            return LazySequence(self, position)
        return Placeholder(FileDescription(self, node))

    def _plain(self, position: int) -> Any:
        """A tensor's own attributes, whole; tensors among them are read."""
        node = self.program.payloads[position]
        if self.program.kinds[position] >= FIRST_NODE_KIND and self.program.with_tensors()[node]:
            return self.reader.builder([position]).build(position)
        return self.program.build(position, _no_tensor, self.special)

    def peek(self, position: int) -> Any:
        """A value to show: a TensorInfo in place of a tensor, and nothing read."""
        if self.program.kinds[position] == Kind.STORAGE:
            return self.table.storage_info(self.program.payloads[position])
        leaf = self.table.leaf(position)
        return self.touch(position) if leaf is None else self.table.info(leaf)

    def close(self) -> None:
        self.table.archive.close()

    def __reduce__(self) -> tuple[Any, ...]:
        if self.recipe is None:
            raise TypeError("a checkpoint that was opened from bytes or a file object has no path to be pickled by")
        return self.recipe


def _no_tensor(_kind: int, _payload: int) -> Any:
    raise AssertionError("a part without tensors has one")


class FileDescription(Description):
    """A Description whose parts are touched when they are asked for."""

    def __init__(self, view: View, node: int) -> None:
        self.module, self.name = view.program.called_name(node)
        self.called = True
        self._view = view
        self._start, _ = view.program.span(node)
        self._names = {step[1]: p for p, step in view.table._attributes(self._start + STATE) if step[0] == "attribute"}
        self._listed = view.program.appended(node)
        self._node = node

    @property
    def args(self) -> Any:  # type: ignore[override]
        return self._view.touch(self._start + ARGS)

    @property
    def kwargs(self) -> Any:  # type: ignore[override]
        return self._view.touch(self._start + KWARGS) or {}

    @property
    def state(self) -> Any:
        return self._view.touch(self._start + STATE)

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
        positions = range(*program.span(program.payloads[self._start + ARGS]))
        return [self._view.peek(p) for p in positions[:count]]

    def peek_attributes(self, count: int) -> list[tuple[Any, Any]]:
        return [(name, self._view.peek(p)) for name, p in list(self._names.items())[:count]]

    def __repr__(self) -> str:
        return f"Description({self.qualified!r})"


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
        return f"{{{', '.join(f'{k!r}: {self._view.peek(p)!r}' for k, p in self._positions.items())}}}"


class MissingKeyError(KeyError):
    """A key that is not there. Looks for near ones only when it is printed: code that asks and catches pays nothing."""

    def __init__(self, key: Any, keys: Iterable[Any]) -> None:
        super().__init__(key)
        self._keys = keys

    def __str__(self) -> str:
        key = self.args[0]
        names = [k for k in self._keys if isinstance(k, str)]
        near = difflib.get_close_matches(key, names, 3) if isinstance(key, str) else []
        return f"{key!r} is not in this checkpoint" + (f"; near it: {', '.join(map(repr, near))}" if near else "")

    def __reduce__(self) -> tuple[Any, ...]:
        return MissingKeyError, (self.args[0], ())


class LazyStateDict(MutableMapping[Any, Any]):
    """A mapping of a checkpoint file whose tensors are read when they are touched.

    Keys are in the file's order and of the file's types. Every touch of a tensor reads it anew, into memory of its own;
    tensors share memory within one call of `materialize` or `get_tensors`, or everywhere with ``cache_tensors=True``.
    Assignments and deletions overlay the file and never change it. It is safe to share among threads, survives fork,
    closes (``with``, or `close`), and pickles by path.

    It is no dict: code that insists on one takes `materialize()`.
    """

    __slots__ = ("__weakref__", "_overlay", "_own_metadata", "_position", "_slots", "_view")

    _view: View
    _position: int | None  # of the node this was made from; None for a selection
    _slots: dict[Any, int]  # key -> position, or OVERLAID
    _overlay: dict[Any, Any]
    _own_metadata: Any

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        raise TypeError(
            "a LazyStateDict comes from zipslicer.load(path); for a plain dict of its tensors call .materialize()"
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
        if position >= 0 and view.kinds[position] == Kind.TENSOR:  # the hot path: as few steps as there can be
            try:
                return (view._reader or view.reader).tensor(view.payloads[position])
            except ZipSlicerError as error:
                raise error.located(path=view.table.archive.source.path, key=key) from None
        return self._overlay[key] if position < 0 else view.touch(position, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Overlay the file: nothing is written to it."""
        self._slots[key] = OVERLAID
        self._overlay[key] = value
        self._view.is_edited = True

    def __delitem__(self, key: Any) -> None:
        if key not in self._slots:
            raise MissingKeyError(key, self._slots)
        del self._slots[key]
        self._overlay.pop(key, None)
        self._view.is_edited = True

    def __iter__(self) -> Iterator[Any]:
        return iter(self._slots)

    def __reversed__(self) -> Iterator[Any]:
        return iter(reversed(self._slots))

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, key: Any) -> bool:
        return key in self._slots

    def keys(self) -> Any:
        """The keys, in file order; reads nothing."""
        return self._slots.keys()

    def get(self, key: Any, default: Any = None) -> Any:
        return self[key] if key in self._slots else default

    def clear(self) -> None:
        self._slots.clear()
        self._overlay.clear()
        self._view.is_edited = True

    def __eq__(self, other: object) -> bool:
        """Whether two have the same keys and the same tensors, by metadata and file; values are not read."""
        if self is other:
            return True
        if not isinstance(other, LazyStateDict):
            return NotImplemented
        if list(self._slots) != list(other._slots) or self._view.table is not other._view.table:
            return False
        if self._slots != other._slots:
            return False
        return all(value is other._overlay[key] for key, value in self._overlay.items())

    __hash__ = None  # type: ignore[assignment]

    def copy(self) -> LazyStateDict:
        """A shallow copy: keys and overlay are its own, nested containers and the file are shared."""
        return LazyStateDict._of(self._view, self._position, dict(self._slots), dict(self._overlay), self._own_metadata)

    __copy__ = copy

    def __deepcopy__(self, memo: dict[int, Any]) -> LazyStateDict:
        made = self.copy()
        made._overlay = copy.deepcopy(self._overlay, memo)
        return made

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

    # ---------------------------------------------------------------- facts, without reading
    def get_meta(self, key: Any) -> TensorInfo | None:
        """What the file says of a tensor; None for a value that is no tensor. Reads nothing. Raises: KeyError."""
        position = self._slots.get(key)
        if position is None:
            raise MissingKeyError(key, self._slots)
        if position < 0:
            value = self._overlay[key]
            return _info_of(value) if hasattr(value, "untyped_storage") else None
        if self._view.program.kinds[position] == Kind.STORAGE:
            return self._view.table.storage_info(self._view.program.payloads[position])
        leaf = self._view.table.leaf(position)
        return None if leaf is None else self._view.table.info(leaf)

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
        """As safetensors has it: the framework that wrote the file."""
        return {"format": "pt"}

    def offset_keys(self) -> list[Any]:
        """The keys of tensors in the order of their bytes in the file, which is the fastest to read in."""
        table = self._view.table
        own = [key for key, position in self._slots.items() if position < 0]
        filed = [(key, p) for key, p in self._slots.items() if p >= 0 and table.is_tensor(p)]
        return [key for key, p in sorted(filed, key=lambda item: table.file_offset(item[1]))] + own

    @property
    def path(self) -> str | None:
        """The file, or None where it was opened from bytes or a file object."""
        return self._view.table.archive.source.path

    # ---------------------------------------------------------------- reading
    def get_tensor(self, key: Any) -> Any:
        """The same as self[key], for a tensor."""
        self._require_meta(key)
        return self[key]

    def get_tensors(self, keys: Iterable[Any]) -> dict[Any, Any]:
        """Several at once, in parallel and in file order; those that share a storage in the file share it here."""
        wanted = list(keys)
        for key in wanted:
            self._require_meta(key)
        return self._materialized(wanted)

    def get_slice(self, key: Any) -> LazySlice:
        """A handle that reads the part that it is indexed with: sd.get_slice("w")[10:20, ::2]. Raises: KeyError, TypeError."""
        self._require_meta(key)
        position = self._slots[key]
        if position < 0:
            return LazySlice(self, key, None)
        leaf = self._view.table.leaf(position)
        if leaf is None:
            raise TypeError(f"{key!r} is a bare storage; read it whole")
        return LazySlice(self, key, leaf)

    def materialize(self) -> dict[Any, Any]:
        """The plain dict that torch.load would return, all tensors read in parallel; sharing memory as in the file.

        An OrderedDict where the file has one, with its `_metadata`. Edits and nested edits are in it.
        """
        position = self._position
        if position is not None and not self._view.is_edited:
            return cast("dict[Any, Any]", self._built([position])[0])
        made: dict[Any, Any] = self._materialized(list(self._slots))
        if position is not None and self._view.program.kinds[position] == Kind.ORDERED_DICT:
            made = collections.OrderedDict(made)
        if self._metadata is not None:
            made = collections.OrderedDict(made)
            made._metadata = self._metadata  # type: ignore[attr-defined]
        return made

    def _built(self, positions: list[int]) -> list[Any]:
        try:
            builder = self._view.reader.builder(positions)
            return [builder.build(position) for position in positions]
        except ZipSlicerError as error:
            raise error.located(path=self.path, key=self._key_of_record(error)) from None

    def _key_of_record(self, error: ZipSlicerError) -> Any:
        """Which key an error about a record is about."""
        table = self._view.table
        if error.record is None or not isinstance(error, CheckpointError):
            return None
        for key, position in self._slots.items():
            info = None if position < 0 or not table.is_tensor(position) else self.get_meta(key)
            if info is not None and error.record.endswith(f"/data/{info.storage_key}"):
                return key
        return None

    def _materialized(self, keys: list[Any]) -> dict[Any, Any]:
        """Plain values of some keys, out of one read."""
        program, held = self._view.program, self._view.held
        positions = [p for p in (self._slots[key] for key in keys) if p >= 0]
        # A nested container that the user may have edited gives its own account of itself.
        lazy = {p for p in positions if isinstance(held.get(_node(program, p)), (LazyStateDict, LazySequence))}
        plain = [p for p in positions if p not in lazy]
        built = dict(zip(plain, self._built(plain))) if plain else {}
        made = {}
        for key in keys:
            position = self._slots[key]
            if position < 0:
                made[key] = _materialize(self._overlay[key])
            elif position in lazy:
                made[key] = held[program.payloads[position]].materialize()
            else:
                made[key] = built[position]
        return made

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

    def flatten(self, separator: str = ".") -> LazyStateDict:
        """Every tensor of this mapping and of those nested in it, by its path; reads nothing. Other values are left out."""
        slots: dict[Any, int] = {}
        overlay: dict[Any, Any] = {}
        table = self._view.table
        seen: set[int] = set()
        todo: list[tuple[str, Any]] = [("", self)]
        while todo:
            prefix, value = todo.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            deeper: list[tuple[str, Any]] = []
            for key, position, child in _entries(value):
                name = f"{prefix}{key}"
                if position >= 0 and table.is_tensor(position):
                    slots[name] = position
                elif position >= 0:
                    touched = (
                        self._view.touch(position) if self._view.program.kinds[position] >= FIRST_NODE_KIND else None
                    )
                    if isinstance(touched, (LazyStateDict, LazySequence)):
                        deeper.append((name + separator, touched))
                elif hasattr(child, "untyped_storage"):
                    slots[name] = OVERLAID
                    overlay[name] = child
                elif isinstance(child, (Mapping, list, tuple, LazySequence)):
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
        self._view.is_edited = True
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
        return _restored, (self._view, self._position, self._slots, self._overlay, self._metadata)

    # ---------------------------------------------------------------- looks
    def _rows(self) -> list[tuple[str, str, str, str]]:
        """(key, dtype, shape, size) to show, of the first keys."""
        rows = []
        for key in list(self._slots)[:SHOWN]:
            name = key if isinstance(key, str) else repr(key)
            info = self.get_meta(key)
            if info is not None:
                rows.append((name, info.dtype_name, str(list(info.shape)), _size(info.nbytes)))
                continue
            position = self._slots[key]
            value = self._overlay[key] if position < 0 else self._view.peek(position)
            rows.append((name, type(value).__name__, _summary(value), ""))
        return [(_printable(name), dtype, _printable(shape), size) for name, dtype, shape, size in rows]

    def _title(self) -> str:
        total = 0
        for key in self._slots:
            info = self.get_meta(key) if len(self._slots) <= 10_000 else None
            total += info.nbytes if info is not None else 0
        size = f", {_size(total)}" if total else ""
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
        """For notebooks: the same table."""
        head = "".join(f"<th style='text-align:left'>{name}</th>" for name in ("key", "dtype", "shape", "size"))
        body = "".join(
            "<tr>" + "".join(f"<td style='text-align:left'>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self._rows()
        )
        more = f"<p>... {len(self) - SHOWN} more</p>" if len(self) > SHOWN else ""
        return f"<p>{html.escape(_printable(self._title()))}</p><table><tr>{head}</tr>{body}</table>{more}"


class LazySequence(Sequence[Any]):
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
        leaf = self._view.table.leaf(self._places[place])
        return None if leaf is None else self._view.table.info(leaf)

    def materialize(self) -> Any:
        """The plain list or tuple, all its tensors read in parallel."""
        if self._position is not None and not self._view.is_edited:
            return self._view.reader.builder([self._position]).build(self._position)
        values = [_materialize(value) for value in self]
        return tuple(values) if self._is_tuple() else values

    def _is_tuple(self) -> bool:
        return self._position is not None and self._view.program.kinds[self._position] == Kind.TUPLE

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
            value = self._view.peek(position)
            shown.append(repr(value) if isinstance(value, TensorInfo) else _summary(value))
        if len(self) > SHOWN:
            shown.append(f"... {len(self) - SHOWN} more")
        return _printable(f"LazySequence([{', '.join(shown)}])")


class LazySlice:
    """A tensor that is read by parts: index it with integers, slices, ... and None, as NumPy's basic indexing has it.

    The result owns its memory. Reads the bytes that are asked for, and little else.
    """

    __slots__ = ("_key", "_leaf", "_owner")

    def __init__(self, owner: LazyStateDict, key: Any, leaf: Leaf | None) -> None:
        self._owner = owner
        self._key = key
        self._leaf = leaf

    def __getitem__(self, index: Any) -> Any:
        """Raises: IndexError, TypeError (an index that is not basic), ValueError (a step of 0)."""
        if self._leaf is None:
            return self._owner[self._key][index]
        try:
            return self._owner._view.reader.slice(self._leaf, index)
        except ZipSlicerError as error:
            raise error.located(path=self._owner.path, key=self._key) from None

    @property
    def info(self) -> TensorInfo:
        return self._owner._require_meta(self._key)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def dtype(self) -> Any:
        """The torch.dtype. Imports torch."""
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
    view: View, position: int | None, slots: dict[Any, int], overlay: dict[Any, Any], metadata: Any
) -> LazyStateDict:
    if overlay:
        view.is_edited = True
    return LazyStateDict._of(view, position, slots, overlay, metadata)


def _refuse_torch_save(name: str) -> None:
    """torch.save would write a mapping that reads a file which need not be there, and no tensors."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.serialization":
            raise TypeError(f"torch.save of a {name} would write no tensors: save its .materialize() instead")
        frame = frame.f_back  # type: ignore[assignment]


def _node(program: Any, position: int) -> int:
    return program.payloads[position] if program.kinds[position] >= FIRST_NODE_KIND else -1


def _materialize(value: Any) -> Any:
    return value.materialize() if isinstance(value, (LazyStateDict, LazySequence)) else value


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
    strided = str(tensor.layout) == "torch.strided"
    return TensorInfo(
        dtype_name=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
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
    )


def _code(dtype_name: str) -> str:
    from .policy import DTYPES

    return next((d.code for d in DTYPES if d.name == dtype_name and d.code), dtype_name)


def _size(nbytes: int) -> str:
    size = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _summary(value: Any) -> str:
    """A value in one short line."""
    if isinstance(value, (LazyStateDict, LazySequence, Mapping, list, tuple, set, frozenset)):
        return f"{type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
