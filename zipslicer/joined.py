"""Joined: the views of several programs of one file in, one view over all of them out.

A TorchScript archive has its constants in a pickle of their own, a package has as many pickles as its author liked. Each
is a part: an ordinary view, with a prefix for the names of its tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from .archive import Archive
from .errors import TableError, UnsupportedError
from .shards import OF_ONE_FILE, NoTensors, SeveralViews
from .state_dict import OVERLAID, LazyStateDict, View
from .table import TOO_LONG

__all__ = ["JoinedView", "join"]


class JoinedView(SeveralViews):
    """The parts of one file, as the containers see them. Position p of part i is the position p * parts + i here.

    The root is that of the first part; with `keys`, a mapping from each key to the root of a part, by its number, or to
    the value of this key in the first part, for None.
    """

    def __init__(self, prefixes: Sequence[str], views: Sequence[View], keys: Mapping[str, int | None] | None) -> None:
        self.prefixes = tuple(prefixes)
        self.views = tuple(views)
        self.framework = self.views[0].framework
        self.keys = keys
        self.tables = tuple(view.table for view in views)
        self.kinds = cast("bytes", NoTensors())
        self._root: LazyStateDict | None = None

    def __getattr__(self, name: str) -> Any:
        if name in OF_ONE_FILE:
            raise UnsupportedError(
                "this takes one pickle, and the file has several; record= opens one of them", path=self.path
            )
        raise AttributeError(name)

    def at(self, position: int) -> tuple[View, int]:
        place, part = divmod(position, len(self.views))
        return self.views[part], place

    def adopt(self, view: View, position: int) -> int:
        if view is self:
            return position
        part = next((i for i, each in enumerate(self.views) if each is view), None)
        return OVERLAID if part is None else self._number(part, position)

    def _number(self, part: int, position: int) -> int:
        return position * len(self.views) + part

    # ---------------------------------------------------------------- what the containers ask
    @property
    def path(self) -> str | None:
        return self.views[0].path

    @property
    def identity(self) -> object:
        return self.tables

    @property
    def metadata(self) -> Mapping[str, str]:
        return self.views[0].metadata

    @property
    def window(self) -> tuple[int, int]:
        return self.views[0].window

    @property
    def root(self) -> Any:
        if self.keys is None:
            return self.views[0].root
        if self._root is None:
            own = LazyStateDict._of(self.views[0], 0)._slots if None in self.keys.values() else {}
            slots: dict[Any, int] = {
                key: self._number(0, own[key]) if part is None else self._number(part, 0)
                for key, part in self.keys.items()
            }
            self._root = LazyStateDict._of(self, None, slots, {}, None)
        return self._root

    def is_in(self, position: int, record: str) -> bool:
        view, place = self.at(position)
        return view.is_in(place, record)

    def place(self, position: int) -> Any:
        view, place = self.at(position)
        return view.place(place)

    def name_room(self) -> int:
        return sum(view.name_room() for view in self.views)

    def materialized(
        self, positions: list[int], container: LazyStateDict | None = None, bar: Any = None
    ) -> Callable[[int], Any]:
        """Part after part: each is one read in parallel, and shares memory as it does alone."""
        del container
        wanted: dict[int, list[int]] = {}
        for position in positions:
            wanted.setdefault(position % len(self.views), []).append(position // len(self.views))
        built = {part: self.views[part].materialized(places, bar=bar) for part, places in wanted.items()}
        return lambda position: built[position % len(self.views)](position // len(self.views))

    # ---------------------------------------------------------------- what a Checkpoint asks
    def tensors(self) -> LazyStateDict:
        slots: dict[Any, int] = {}
        room = self.name_room()
        for part, view in enumerate(self.views):
            for name, position in view.table.tensors(0).items():
                name = self._name(part, name, slots)
                room -= len(name)
                if room < 0:  # a long prefix is before each name of its part
                    raise TableError(TOO_LONG, path=self.path)
                slots[name] = self._number(part, position)
        return LazyStateDict._of(self, None, slots, {}, None)

    def _name(self, part: int, name: str, taken: Mapping[str, Any]) -> str:
        """A name with the prefix of its part, which loses its last sign where it stands alone."""
        prefix = self.prefixes[part]
        made = prefix + name if name else prefix[:-1]
        if made in taken:
            made = f"{prefix[:-1]}/{name}"
        while made in taken:
            made += f"#{part}"
        return made

    def strangers(self) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for part, view in enumerate(self.views):
            for name, stranger in view.strangers().items():
                made[self._name(part, name, made)] = stranger
        return made

    def records(self) -> list[str]:
        return self.views[0].records()

    def archives(self) -> list[Archive]:
        return list(dict.fromkeys(table.archive for table in self.tables))

    def counts(self) -> tuple[int, int]:
        counts = [view.counts() for view in self.views]
        return sum(tensors for tensors, _ in counts), sum(storages for _, storages in counts)

    # ---------------------------------------------------------------- lifetime
    def close(self) -> None:
        for view in self.views:
            view.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """By path: each part by itself."""
        return JoinedView, (self.prefixes, self.views, self.keys)

    def __deepcopy__(self, memo: dict[int, Any]) -> JoinedView:
        """The same open file, with edits of its own."""
        made = memo[id(self)] = JoinedView(self.prefixes, copy.deepcopy(self.views, memo), self.keys)
        made.tables = self.tables
        return made


def join(prefixes: Sequence[str], views: Sequence[View], keys: Mapping[str, int | None] | None) -> View:
    """One view over all; the first one itself where the others have nothing to list."""
    if keys is None:
        kept = [i for i, view in enumerate(views) if not i or any(view.counts()) or view.table.strangers()]
        prefixes, views = [prefixes[i] for i in kept], [views[i] for i in kept]
        if prefixes == [""]:
            return views[0]
    return JoinedView(prefixes, views, keys)
