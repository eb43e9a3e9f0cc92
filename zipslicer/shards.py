"""Shards: an index of files, or a folder that has one, in; one view over all of the files out.

The index says which file has which key. A file is opened once, when it is checked or when one of its keys is first
touched, and stays open. Nothing is trusted that the index says: names stay below its folder, and keys are compared.
"""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import os
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any, Union, cast

from .archive import Archive
from .backend import FIRST_NODE_KIND, Backend, Kind
from .dcp_metadata import METADATA, OF_ONE_RANK
from .errors import ArchiveError, UnsupportedError, ZipSlicerError, some
from .opening import open_source
from .policy import Limits
from .source import CLOSED_CHECKPOINT, beside, is_outside, is_url, read_at, without_secrets
from .state_dict import OVERLAID, LazyStateDict, View

__all__ = ["INDEX_NBYTES", "Index", "NoTensors", "ShardedView", "locate", "parse_json", "read_index"]

INDEX_NBYTES = 64 << 20  # the largest on the hubs have some 10 MB; as Python objects they take ten or twenty times that
INDEX_NAMES = ("*.index.json", "*.index.*.json")  # pytorch_model.bin.index.json, pytorch_model.bin.index.fp16.json
SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".safetensors")
# What trainers put beside a model.
BESIDE = re.compile(r"(training_args|optimizer|scheduler|sampler|scaler|rng_state)(_\d+)?\.(bin|pt|pth)")
PARTS = re.compile(r"consolidated\.\d+\.pth")
OF_ONE_FILE = ("table", "program", "payloads", "options", "_reader")


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
    """What an index file says, checked as far as it can be without opening another file.

    Attributes:
        path: of the index itself.
        keys: to the file of each, relative to the folder of the index, in the order of the index.
        metadata: what else it says of itself, as text.
    """

    path: str
    keys: Mapping[str, str]
    metadata: Mapping[str, str]

    @property
    def files(self) -> list[str]:
        """All files, in the order of their names, which is that of the model."""
        return sorted(set(self.keys.values()))

    def path_of(self, file: str) -> str:
        return beside(self.path, file)

    @property
    def shown(self) -> str:
        """The path for people."""
        return without_secrets(self.path)


def locate(source: Any, is_folder: bool = False) -> tuple[Any, bool]:
    """A source as the caller has it -> (what to open, whether that is an index).

    A path that ends in .json is an index. A folder is the one index in it, or else the one checkpoint, or else the
    `.metadata` of torch.distributed.checkpoint; whether a path is one is looked at only where that was said: to open it
    tells as well. Of a URL nobody can tell, and one that ends in "/" is the last of these.

    Raises:
        IsADirectoryError: there is none in it.
        ValueError: there are several.
        UnsupportedError: there are the parts of a tensor-parallel checkpoint, or of a save without collectives.
    """
    if not isinstance(source, (str, os.PathLike)):
        return source, False
    path = os.fspath(source)
    if is_url(path) and path.endswith("/"):
        return path + METADATA, False
    is_json = isinstance(path, str) and path.lower().endswith(".json")
    if not is_json and not is_folder:
        return source, False
    if not os.path.isdir(path):
        return source, is_json
    with os.scandir(path) as entries:
        names = sorted(entry.name for entry in entries if not entry.is_dir())
    indexes = [name for name in names if any(fnmatch.fnmatch(name.lower(), pattern) for pattern in INDEX_NAMES)]
    if len(indexes) == 1:
        return os.path.join(path, indexes[0]), True
    parts = [name for name in names if PARTS.fullmatch(name)]
    if len(parts) > 1 and not indexes:
        raise UnsupportedError(
            f"{parts[0]} and the {len(parts) - 1} like it are tensor-parallel parts of one model: each has a slice of every "
            "tensor, and how they join is known to the model's code only. Open one part by its path, or convert the "
            "model with its own script (for Llama: convert_llama_weights_to_hf.py of transformers)",
            path=path,
        )
    files = [name for name in names if name.lower().endswith(SUFFIXES) and not BESIDE.fullmatch(name)]
    if OF_ONE_RANK in names and METADATA not in names:
        raise UnsupportedError(
            "each rank has written its own metadata here (use_collectives=False), and only torch.distributed.checkpoint.load, "
            "on as many ranks, puts them together",
            path=path,
        )
    candidates = indexes + files + [name for name in names if name == METADATA]
    if not candidates:
        raise IsADirectoryError(21, "is a folder, and has neither a checkpoint nor an index of shards in it", path)
    if len(candidates) > 1:
        raise ValueError(
            f"the folder {path!r} has {len(candidates)} candidates ({some(candidates, 10)}); open one of them by its path"
        )
    return os.path.join(path, candidates[0]), False


def read_index(path: str, backend: Backend, limits: Limits, storage_options: Mapping[str, Any] | None = None) -> Index:
    """An index file: {"metadata": {...}, "weight_map": {key: file}}, or the bare map.

    Raises: OSError; ArchiveError where it is no such thing, or names a file outside its folder.
    """
    try:
        return _parse(path, _read(path, backend, limits, storage_options))
    except ZipSlicerError as error:
        raise error.located(path=without_secrets(path)) from None


def _read(path: str, backend: Backend, limits: Limits, storage_options: Mapping[str, Any] | None) -> bytes:
    source = open_source(path, limits, storage_options)
    try:
        limit = min(INDEX_NBYTES, limits.directory_nbytes)
        if source.size > limit:
            raise ArchiveError(f"an index of {source.size} bytes; the limit is {limit}")
        return read_at(backend, source, 0, source.size)
    finally:
        source.close()


def _parse(path: str, content: bytes) -> Index:
    if content.startswith(b"version https://git-lfs"):
        raise ArchiveError("this is a Git LFS pointer, not the file it points to; run `git lfs pull`")
    parsed = parse_json(content)
    keys = parsed.get("weight_map", parsed) if isinstance(parsed, dict) else None
    if not isinstance(keys, dict) or not keys:
        raise ArchiveError('this is no index of shards: it has no "weight_map" from keys to files')
    for key, file in keys.items():
        if not isinstance(file, str):
            what = "a file name" if "weight_map" in parsed else 'a file name, and there is no "weight_map"'
            raise ArchiveError(f"no index of shards: the value is not {what}", key=key)
    for file in dict.fromkeys(keys.values()):
        wrong = is_outside(file)
        if wrong:
            raise ArchiveError(f"the index names the file {file[:200]!r}, which {wrong}")
    facts = parsed.get("metadata") if "weight_map" in parsed else None
    said = facts.items() if isinstance(facts, dict) else ()
    return Index(path, keys, {"format": "pt", **{k: str(v) for k, v in said if isinstance(v, (str, int, float))}})


def parse_json(content: bytes) -> Any:
    """A JSON text in which no object has a key twice. Raises: ArchiveError."""
    import json  # here and below: who opens one file need not wait for it

    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        if isinstance(error, ArchiveError):
            raise
        raise ArchiveError(f"this is no JSON text: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ArchiveError(
                    f"the JSON text has {key[:200]!r} twice in one object, which readers take differently"
                )
            seen.add(key)
    return made


# (file, key, position in the file's own view, or None where only the key is known as yet)
Place = tuple[str, Any, Union[int, None]]


class NoTensors:
    """The kinds of all places: none is a tensor that could be read past `touch`."""

    def __getitem__(self, position: int) -> int:
        return Kind.NONE


@dataclasses.dataclass(frozen=True)
class Shard:
    """One open file: its view, and the positions of its keys."""

    view: View
    slots: Mapping[Any, int]


class SeveralViews(View):
    """What the views of several files, and of several programs of one file, have in common: each position is one of theirs."""

    def touch(self, position: int, key: Any = None) -> Any:
        view, place = self.at(position)
        return view.touch(place, key)

    def meta(self, position: int) -> Any:
        view, place = self.at(position)
        return view.meta(place)

    def is_tensor(self, position: int) -> bool:
        view, place = self.at(position)
        return view.is_tensor(place)


class ShardedView(SeveralViews):
    """The files of one index, as the containers see them. A position is that of a place: a file, and a value in it.

    Safe for concurrent use: of two threads that open one file at once, the second closes what it has opened.
    """

    def __init__(self, index: Index, open_file: Callable[[str], View], framework: str = "pt") -> None:
        self.index = index
        self._open_file = open_file
        self.framework = framework
        self._shards: dict[str, Shard] = {}
        self._files = {file: number for number, file in enumerate(index.files)}
        self._places: dict[int, Place] = {i: (file, key, None) for i, (key, file) in enumerate(index.keys.items())}
        self.kinds = cast("bytes", NoTensors())
        self._root: LazyStateDict | None = None
        self._closed = threading.Event()

    def __getattr__(self, name: str) -> Any:
        """What only the view of one file has: some side doors ask for it, and should say what they cannot do."""
        if name in OF_ONE_FILE:
            raise UnsupportedError(
                "this takes one file, and there are several; open one of them", path=self.index.shown
            )
        raise AttributeError(name)

    # ---------------------------------------------------------------- the files
    def shard(self, file: str) -> Shard:
        """A file of the index, opened when it is first asked for.

        Raises: ArchiveError where it is missing, or has no mapping at its root.
        """
        made = self._shards.get(file)
        if made is not None:
            return made
        if self._closed.is_set():
            raise ValueError(CLOSED_CHECKPOINT)
        path = self.index.path_of(file)
        try:
            view = self._open_file(path)
        except FileNotFoundError:
            missing = f"a file is missing that the index {self.index.shown!r} names"
            raise ArchiveError(missing, path=without_secrets(path)) from None
        try:
            if not _has_mapping(view):
                raise ArchiveError(
                    "a shard of a checkpoint must have a mapping at its root", path=without_secrets(path)
                )
            made = Shard(view, LazyStateDict._of(view, 0)._slots)
        except BaseException:
            view.close()
            raise
        kept = self._shards.setdefault(file, made)
        if kept is not made:
            view.close()
        if self._closed.is_set():  # meanwhile, by another thread
            kept.view.close()
        return kept

    def check(self, threads: int) -> None:
        """Open all files and compare their keys with those of the index. Raises: ArchiveError."""
        paths = {file: self.index.path_of(file) for file in self._files}
        # What is behind a URL is known when it is opened.
        missing = [file for file, path in paths.items() if not (is_url(path) or os.path.exists(path))]
        if missing:
            raise ArchiveError(
                f"{len(missing)} of the {len(self._files)} files that the index names are missing: {some(missing)}",
                path=self.index.shown,
            )
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(min(threads, len(self._files))) as pool:
            list(pool.map(self.shard, self._files))
        wanted: dict[str, set[Any]] = {file: set() for file in self._files}
        for key, file in self.index.keys.items():
            wanted[file].add(key)
        for file in self._files:
            has = self._shards[file].slots
            lacks = [key for key in wanted[file] if key not in has]
            if lacks:
                raise ArchiveError(
                    f"the index puts {len(lacks)} keys into this file that it has not: {some(sorted(lacks))}",
                    path=without_secrets(self.index.path_of(file)),
                    key=min(lacks),
                )
            more = [key for key in has if key not in wanted[file]]
            if more:
                raise ArchiveError(
                    f"this file has {len(more)} keys that the index does not give to it: {some(more)}; "
                    "check=False leaves them out",
                    path=without_secrets(self.index.path_of(file)),
                    key=more[0],
                )

    def at(self, position: int) -> tuple[View, int]:
        file, key, place = self._places[position]
        shard = self.shard(file)
        if place is None:
            place = shard.slots.get(key)
            if place is None:
                raise ArchiveError(
                    "the index puts this key into a file that lacks it",
                    path=without_secrets(self.index.path_of(file)),
                    key=key,
                )
        return shard.view, place

    def adopt(self, view: View, position: int) -> int:
        if view is self:
            return position
        file = next((file for file, shard in list(self._shards.items()) if shard.view is view), None)
        if file is None:
            return OVERLAID
        # A number of its own for each value of each file, so that no thread waits for another.
        number = len(self.index.keys) + self._files[file] + position * len(self._files)
        self._places[number] = (file, None, position)
        return number

    # ---------------------------------------------------------------- what the containers ask
    @property
    def path(self) -> str | None:
        return self.index.shown

    @property
    def identity(self) -> object:
        return self.index

    @property
    def metadata(self) -> Mapping[str, str]:
        return self.index.metadata

    @property
    def root(self) -> LazyStateDict:
        if self._root is None:
            slots: dict[Any, int] = dict(zip(self.index.keys, range(len(self.index.keys))))
            self._root = LazyStateDict._of(self, None, slots, {}, None)
        return self._root

    def shown(self, position: int) -> Any:
        try:
            return super().shown(position)
        except (OSError, ValueError) as error:  # of a file that is opened to show it
            return error

    def shown_meta(self, position: int) -> Any:
        try:
            return super().shown_meta(position)
        except (OSError, ValueError):
            return None

    def is_in(self, position: int, record: str) -> bool:
        del position, record
        return False  # `materialized` has said already which key it is

    def place(self, position: int) -> Any:
        view, place = self.at(position)
        return self._files[self._places[position][0]], view.place(place)

    def name_room(self) -> int:
        return sum(shard.view.name_room() for shard in self._all())

    def materialized(
        self, positions: list[int], container: LazyStateDict | None = None, bar: Any = None
    ) -> Callable[[int], Any]:
        """File after file: each is one read in parallel, in its own order, and shares memory as it does alone."""
        del container
        wanted: dict[str, dict[int, int]] = {}
        for position in positions:
            wanted.setdefault(self._places[position][0], {})[position] = self.at(position)[1]
        made: dict[int, Any] = {}
        for file in sorted(wanted):
            view, places = self._shards[file].view, wanted[file]
            try:
                build = view.materialized(list(places.values()), bar=bar)
                made.update((position, build(place)) for position, place in places.items())
            except ZipSlicerError as error:
                record = error.record
                of = [p for p, place in places.items() if record is not None and view.is_in(place, record)]
                raise error.located(path=view.path, key=self._places[of[0]][1] if of else None) from None
        return made.__getitem__

    # ---------------------------------------------------------------- what a Checkpoint asks
    def _all(self) -> list[Shard]:
        return [self.shard(file) for file in self._files]

    def tensors(self) -> LazyStateDict:
        slots: dict[Any, int] = {}
        for file, shard in zip(self._files, self._all()):
            for name, position in shard.view.table.tensors(0).items():
                slots[f"{file}/{name}" if name in slots else name] = self.adopt(shard.view, position)
        return LazyStateDict._of(self, None, slots, {}, None)

    def strangers(self) -> dict[str, Any]:
        return {name: stranger for shard in self._all() for name, stranger in shard.view.strangers().items()}

    def records(self) -> list[str]:
        return [f"{file}/{name}" for file, shard in zip(self._files, self._all()) for name in shard.view.records()]

    def archives(self) -> list[Archive]:
        return [archive for shard in self._all() for archive in shard.view.archives()]

    def counts(self) -> tuple[int, int]:
        counts = [shard.view.counts() for shard in self._all()]
        return sum(tensors for tensors, _ in counts), sum(storages for _, storages in counts)

    # ---------------------------------------------------------------- lifetime
    def close(self) -> None:
        self._closed.set()
        for shard in list(self._shards.values()):
            shard.view.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """By path: the index as it was read, and the files that are open, which must be the same ones there."""
        views = {file: shard.view for file, shard in self._shards.items()}
        return ShardedView, (self.index, self._open_file, self.framework), (views, self._places)

    def __setstate__(self, state: tuple[dict[str, View], dict[int, Place]]) -> None:  # type: ignore[override]
        views, self._places = state
        self._shards = {file: Shard(view, LazyStateDict._of(view, 0)._slots) for file, view in views.items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedView:
        """The same open files, with edits of its own."""
        made = memo[id(self)] = ShardedView(self.index, self._open_file, self.framework)
        views = {file: copy.deepcopy(shard.view, memo) for file, shard in zip(self._files, self._all())}
        made.__setstate__((views, dict(self._places)))
        return made


def _has_mapping(view: View) -> bool:
    root = view.program.payloads[0] if view.program.kinds[0] >= FIRST_NODE_KIND else None
    return root is not None and view.program.is_mapping(root)
