"""Distributed: any checkpoint as a source of torch.distributed.checkpoint, of which each rank reads its own bytes.

Side door, imported by who wants it (it imports torch.distributed, which `import zipslicer` must not). The engine is torch's:
its planner says which part of which tensor a rank needs, for every mesh and placement it knows, and what is here reads
those parts out of an open file. Nothing of the file is unpickled: torch's own readers of such files use weights_only=False.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader as _StorageReader
from torch.futures import Future

from .checkpoint import open as open_checkpoint
from .errors import UnsupportedError, some
from .policy import Placeholder
from .source import without_secrets
from .state_dict import LazySequence, LazyStateDict

__all__ = ["Loaded", "StorageReader", "load_sharded"]

MANY = 1 << 16  # elements of a part for each rank, from which on a tensor that several want is read by all of them
BATCH_NBYTES = 64 << 20  # of small tensors that are handed on together


class StorageReader(_StorageReader):
    """For ``torch.distributed.checkpoint.load(state_dict, storage_reader=StorageReader(path))``.

    Each rank opens the file, which reads its listing, and then the parts of tensors that it has itself: straight into their
    memory where dtype and strides are those of the file. Keys are the dotted paths in the file, as torch flattens a state
    dict. Values that are no tensors come, too, if zipslicer builds them.

    Args:
        source: a path, a URL, or a mapping that `load` gave: selected, renamed, edited.
        group: ranks that are near to each other, as those of one node, all of which load the same from the same file: what
            several of them want is read once. Each reads its part of that, and the others get it from there.
        **options: of zipslicer.open, for a path or URL.
    """

    def __init__(self, source: Any, *, group: dist.ProcessGroup | None = None, **options: Any) -> None:
        super().__init__()
        self._options = options
        self._group = group
        self._file: _File | None = None
        self._source: Any = None
        self.checkpoint_id: Any = None
        self._take(source)

    def _take(self, source: Any) -> None:
        if isinstance(source, LazyStateDict):
            if source._view.framework != "pt":
                raise ValueError('tensors of torch are filled; open the file with framework="pt"')
            if self._options:
                raise TypeError("options are of a path: this checkpoint is open already")
        self._source = source
        self.checkpoint_id = source.path if isinstance(source, LazyStateDict) else _shown(source)

    # ---------------------------------------------------------------- what torch calls, in that order
    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is a file. A folder is torch's own."""
        return os.path.isfile(checkpoint_id)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Another file, if one is named; what was open is closed."""
        self._close()
        if checkpoint_id is not None:
            self._take(checkpoint_id)

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Every value of the file; no tensor is read.

        Raises: OSError, CheckpointError, as zipslicer.open does; ValueError where two have one name.
        """
        self._close()
        self._file = _File(self._source, self._options)
        return self._file.metadata(StorageMeta(checkpoint_id=self.checkpoint_id, load_id=uuid.uuid4().hex))

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any) -> None:
        """Nothing: every rank reads for itself."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what the plan of this rank names, in the order of the file, and close it.

        Raises: OSError, CheckpointError, as reading does; UnsupportedError for a value of a class that was not built;
        RuntimeError where another rank of the group could not read.
        """
        file = self._file
        assert file is not None, "read_metadata comes before read_data"
        try:
            if self._group is None:
                for item, part, target in self._resolved(file, plan, planner):
                    file.read(part, target)
                    planner.commit_tensor(item, target)
            else:
                self._read_together(self._group, file, plan, planner)
        finally:
            self._close()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _resolved(
        self, file: _File, plan: LoadPlan, planner: LoadPlanner
    ) -> Iterator[tuple[ReadItem, _Part, torch.Tensor]]:
        """The tensors of a plan, and what of the file goes into them; other values are loaded on the way."""
        for item in file.in_order(plan.items):
            name = item.storage_index.fqn
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, file.pickled(name))
                continue
            target = planner.resolve_tensor(item).detach()
            yield item, _Part(name, tuple(item.storage_offsets), tuple(item.lengths), str(target.dtype)), target

    def _read_together(self, group: dist.ProcessGroup, file: _File, plan: LoadPlan, planner: LoadPlanner) -> None:
        wanted: list[tuple[ReadItem, _Part, torch.Tensor]] = []
        error: Exception | None = None
        try:
            wanted += self._resolved(file, plan, planner)
        except Exception as caught:  # the other ranks must hear of it before they wait for this one
            error = caught
        _Together(group, file).read({part: target for _, part, target in wanted}, error)
        for item, _, target in wanted:
            planner.commit_tensor(item, target)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class _File:
    """An open source, as torch.distributed.checkpoint sees it."""

    def __init__(self, source: Any, options: dict[str, Any]) -> None:
        self._stack = contextlib.ExitStack()
        if isinstance(source, LazyStateDict):
            self._root, self._tensors = source, source.flatten()
            return
        opened = self._stack.enter_context(open_checkpoint(source, **options))
        root = opened.root
        self._root = root if isinstance(root, LazyStateDict) else opened.tensors
        self._tensors = self._root.flatten()

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self._tensors.offset_keys())}

    def metadata(self, storage: StorageMeta) -> Metadata:
        try:
            self._values, paths = flatten_state_dict(_skeleton(self._root))
        except RecursionError:
            raise UnsupportedError("values are nested too deep for torch.distributed.checkpoint") from None
        facts = {name: _facts_of(value) for name, value in self._values.items()}
        return Metadata(state_dict_metadata=facts, planner_data=paths, storage_meta=storage)

    def in_order(self, items: list[ReadItem]) -> list[ReadItem]:
        """As they lie in the file, for which those of one tensor need not be neighbours."""
        return sorted(items, key=lambda item: self.place(item.storage_index.fqn))

    def place(self, name: str) -> int:
        """Of a tensor among all, by where their bytes lie."""
        return self._places.get(name, -1)

    def read(self, part: _Part, target: Any) -> None:
        """A part of a tensor, into its place."""
        index = tuple(slice(start, start + size) for start, size in zip(part.starts, part.sizes))
        self._tensors.get_slice(part.name).read(index, out=target)

    def pickled(self, name: str) -> io.BytesIO:
        """What is no dense tensor, as a pickle of ours: the planner unpickles it, and looks at nothing."""
        value = self._values[name]
        if isinstance(value, _Later):
            value = value.mapping[value.key]
        if isinstance(value, Placeholder):
            raise UnsupportedError(f"the value is {value!r}, of a class that zipslicer does not build", key=name)
        content = io.BytesIO()
        try:
            torch.save(value, content)
        except TypeError as error:  # a placeholder somewhere in it
            raise UnsupportedError(str(error), key=name) from None
        content.seek(0)
        return content

    def close(self) -> None:
        self._stack.close()


class _Part(NamedTuple):
    """A box of a tensor of the file, and the dtype that it becomes."""

    name: str
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: str

    def rows(self, first: int, last: int) -> _Part:
        """Some of its first dimension."""
        return self._replace(starts=(self.starts[0] + first, *self.starts[1:]), sizes=(last - first, *self.sizes[1:]))


class _Shared(NamedTuple):
    """What several ranks want: who reads which rows of it. Of one without dimensions, and of a small one, all is one part."""

    target: torch.Tensor | None  # None where this rank does not want it
    ranks: list[int]
    parts: list[tuple[int, int, int]]  # (rank, first row, last row)


class _Together:
    """Ranks of a group that read what several of them want once, and hand it on.

    All ranks take part, with what they want, if that is nothing. Everything is planned by each rank alone, out of what all
    have told: so the plans are the same. Then all read, and then all hand on: what goes wrong in reading is known to all
    before anybody waits for what will not come.
    """

    def __init__(self, group: dist.ProcessGroup, file: _File) -> None:
        self._group, self._file = group, file
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)

    def read(self, targets: dict[_Part, torch.Tensor], error: Exception | None = None) -> None:
        """Fill the targets, unless there is an `error` already, which is raised once all ranks know of it.

        Raises: as reading does; RuntimeError where another rank could not.
        """
        shared: list[_Shared] = []
        said = self._told(list(targets))
        if error is None:
            try:
                shared = self._plan(said, targets)
            except Exception as caught:
                error = caught
        others = self._told(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        failed = [(rank, text) for rank, text in enumerate(others) if text is not None]
        if failed:
            raise RuntimeError(f"rank {failed[0][0]} of the group could not read its part: {failed[0][1]}")
        self._hand_on(shared)

    def _told(self, value: Any) -> list[Any]:
        """What each rank says, by rank."""
        found: list[Any] = [None] * self._size
        dist.all_gather_object(found, value, group=self._group)
        return found

    def _plan(self, said: list[list[_Part]], targets: dict[_Part, torch.Tensor]) -> list[_Shared]:
        """Read what this rank is to read; -> what is to be handed on, in an order that all ranks have."""
        holders: dict[_Part, list[int]] = {}
        for rank, parts in enumerate(said):
            for part in parts:
                holders.setdefault(part, []).append(rank)
        busy = [0] * self._size  # elements that each rank reads
        shared = []
        for part in sorted(holders, key=lambda part: (self._file.place(part.name), part)):
            ranks, target = holders[part], targets.get(part)
            if len(ranks) == 1:
                if target is not None:
                    self._file.read(part, target)
                continue
            count = math.prod(part.sizes)
            rows = part.sizes[0] if part.sizes else 1
            if count < len(ranks) * MANY or rows < len(ranks):
                cut = [(min(ranks, key=lambda rank: busy[rank]), 0, rows)]
            else:
                ends = [rows * i // len(ranks) for i in range(len(ranks) + 1)]
                cut = [(rank, first, last) for rank, first, last in zip(ranks, ends, ends[1:])]
            for rank, first, last in cut:
                busy[rank] += count * (last - first) // max(rows, 1)
                if rank == self._rank and target is not None:
                    mine = part.rows(first, last) if part.sizes else part
                    self._file.read(mine, target[first:last] if part.sizes else target)
            if count:
                shared.append(_Shared(target, ranks, cut))
        return shared

    def _hand_on(self, shared: list[_Shared]) -> None:
        """Each part from who has read it to who wants it; small ones that all want go together."""
        together: dict[int, list[torch.Tensor]] = {}
        for target, ranks, parts in shared:
            for owner, first, last in parts:
                if len(ranks) == self._size and len(parts) == 1 and target is not None:
                    together.setdefault(owner, []).append(target)
                elif len(ranks) == self._size and target is not None:
                    self._broadcast(owner, [target[first:last]])
                elif target is not None:
                    self._send(owner, ranks, target[first:last] if target.dim() else target)
        for owner in sorted(together):
            batch: list[torch.Tensor] = []
            nbytes = 0
            for target in together[owner]:
                if batch and (batch[0].device != target.device or nbytes > BATCH_NBYTES):
                    self._broadcast(owner, batch)
                    batch, nbytes = [], 0
                batch.append(target)
                nbytes += target.nbytes
            self._broadcast(owner, batch)

    def _broadcast(self, owner: int, targets: list[torch.Tensor]) -> None:
        if len(targets) == 1 and targets[0].is_contiguous():
            dist.broadcast(_bytes_of(targets[0]), dist.get_global_rank(self._group, owner), group=self._group)
            return
        if owner == self._rank:
            packed = torch.cat([_bytes_of(target) for target in targets])
        else:
            packed = torch.empty(sum(each.nbytes for each in targets), dtype=torch.uint8, device=targets[0].device)
        dist.broadcast(packed, dist.get_global_rank(self._group, owner), group=self._group)
        if owner != self._rank:
            for target, content in zip(targets, torch.split(packed, [each.nbytes for each in targets])):
                _put(content, target)

    def _send(self, owner: int, ranks: list[int], target: torch.Tensor) -> None:
        """To some ranks of the group."""
        if owner == self._rank:
            content = _bytes_of(target)
            peers = [dist.get_global_rank(self._group, rank) for rank in ranks if rank != owner]
            waiting = [dist.isend(content, peer, group=self._group) for peer in peers]
        else:
            content = torch.empty(target.nbytes, dtype=torch.uint8, device=target.device)
            waiting = [dist.irecv(content, dist.get_global_rank(self._group, owner), group=self._group)]
        for each in waiting:
            if each is not None:
                each.wait()
        if owner != self._rank:
            _put(content, target)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Of a contiguous one, its own."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _put(content: torch.Tensor, target: torch.Tensor) -> None:
    if content.storage_offset() % target.element_size():
        content = content.clone()  # a view of another dtype must be aligned
    target.copy_(content.view(target.dtype).reshape(target.shape))


class _Later:
    """A tensor of several parts, which is read whole if it is asked for."""

    def __init__(self, mapping: Any, key: Any) -> None:
        self.mapping = mapping
        self.key = key


def _skeleton(value: Any) -> Any:
    """Containers and plain values as they are, with tensors that have no memory."""
    if isinstance(value, LazyStateDict):
        return {key: _child(value, key) for key in value}
    if isinstance(value, LazySequence):
        return [_child(value, place) for place in range(len(value))]
    return value


def _child(container: Any, key: Any) -> Any:
    info = container.get_meta(key)
    if info is None:
        return _skeleton(container[key])
    if info.layout != "strided":
        return _Later(container, key)
    return torch.empty(info.shape, dtype=info.dtype, device="meta")


def _facts_of(value: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    """One chunk, which is all of the tensor: the planner cuts it by what it needs."""
    if not isinstance(value, torch.Tensor):
        return BytesStorageMetadata()
    chunk = ChunkStorageMetadata(torch.Size([0] * value.dim()), value.size())
    return TensorStorageMetadata(TensorProperties(dtype=value.dtype), value.size(), [chunk])


def _shown(source: Any) -> Any:
    return without_secrets(source) if isinstance(source, str) else source


class Loaded(NamedTuple):
    """What load_sharded found, before it read anything. Lists of names.

    missing_keys: that the model has and the file has not.
    unexpected_keys: that the file has and the model has not.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]


def load_sharded(
    model: torch.nn.Module,
    source: Any,
    *,
    strict: bool = True,
    group: dist.ProcessGroup | None = None,
    **options: Any,
) -> Loaded:
    """Fill a model of FSDP2, tensor parallelism or any DTensors with its own parts of a checkpoint, without collectives.

    Each rank reads what its shards need and nothing more; ranks do not wait for each other, but for those of `group`, if
    there is one. Parameters must have memory
    (`model.to_empty(device=...)` after a start on the meta device), and keep it: they are filled in place.

    Args:
        model: whose `state_dict()` has the names that the file has.
        source: as StorageReader takes it.
        group: as StorageReader takes it: what is the same on all its ranks (a replicated model) is read once.
        **options: as StorageReader takes them.
        strict: raise where names or shapes differ, before anything is read. False fills what is in both.

    Raises:
        RuntimeError: keys are missing or unexpected (strict); ValueError: a shape differs. Nothing was read then.
        OSError, CheckpointError: as reading does.
    """
    reader = StorageReader(source, group=group, **options)
    wanted = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    try:
        metadata = reader.read_metadata()
        has = metadata.state_dict_metadata
        found = Loaded([name for name in wanted if name not in has], [name for name in has if name not in wanted])
        if strict and (found.missing_keys or found.unexpected_keys):
            raise RuntimeError(
                f"{len(found.missing_keys)} keys of the model are not in the file ({some(found.missing_keys) or 'none'}), and "
                f"{len(found.unexpected_keys)} of the file not in the model ({some(found.unexpected_keys) or 'none'})"
            )
        # What torch.distributed.checkpoint.load does with no_dist=True, less its warning that it does so.
        planner = DefaultLoadPlanner(allow_partial_load=True)
        planner.set_up_planner(cast("dict[str, Any]", wanted), metadata, is_coordinator=True)
        reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()
    finally:
        reader.reset()
    return found
