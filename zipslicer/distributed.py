"""Distributed: any checkpoint as a source of torch.distributed.checkpoint, of which each rank reads its own bytes.

Side door, imported by who wants it (it imports torch.distributed, which `import zipslicer` must not). The engine is torch's:
its planner says which part of which tensor a rank needs, for every mesh and placement it knows, and what is here reads
those parts out of an open file. Nothing of the file is unpickled: torch's own readers of such files use weights_only=False.
"""

from __future__ import annotations

import contextlib
import io
import os
import uuid
from typing import Any, NamedTuple, cast

import torch
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


class StorageReader(_StorageReader):
    """For ``torch.distributed.checkpoint.load(state_dict, storage_reader=StorageReader(path))``.

    Each rank opens the file, which reads its listing, and then the parts of tensors that it has itself: straight into their
    memory where dtype and strides are those of the file. Keys are the dotted paths in the file, as torch flattens a state
    dict. Values that are no tensors come, too, if zipslicer builds them.

    Args:
        source: a path, a URL, or a mapping that `load` gave: selected, renamed, edited.
        **options: of zipslicer.open, for a path or URL.
    """

    def __init__(self, source: Any, **options: Any) -> None:
        super().__init__()
        self._options = options
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

        Raises: OSError, CheckpointError, as reading does; UnsupportedError for a value of a class that was not built.
        """
        file = self._file
        assert file is not None, "read_metadata comes before read_data"
        try:
            for item in file.in_order(plan.items):
                if item.type == LoadItemType.BYTE_IO:
                    planner.load_bytes(item, file.pickled(item.storage_index.fqn))
                    continue
                target = planner.resolve_tensor(item).detach()
                file.read(item, target)
                planner.commit_tensor(item, target)
        finally:
            self._close()
        done: Future[None] = Future()
        done.set_result(None)
        return done

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

    def metadata(self, storage: StorageMeta) -> Metadata:
        try:
            self._values, paths = flatten_state_dict(_skeleton(self._root))
        except RecursionError:
            raise UnsupportedError("values are nested too deep for torch.distributed.checkpoint") from None
        facts = {name: _facts_of(value) for name, value in self._values.items()}
        return Metadata(state_dict_metadata=facts, planner_data=paths, storage_meta=storage)

    def in_order(self, items: list[ReadItem]) -> list[ReadItem]:
        """As they lie in the file, for which those of one tensor need not be neighbours."""
        places = {name: place for place, name in enumerate(self._tensors.offset_keys())}
        return sorted(items, key=lambda item: places.get(item.storage_index.fqn, -1))

    def read(self, item: ReadItem, target: Any) -> None:
        """The part of a tensor that an item names, into its place."""
        starts, sizes = item.storage_offsets, item.lengths
        index = tuple(slice(start, start + size) for start, size in zip(starts, sizes))
        self._tensors.get_slice(item.storage_index.fqn).read(index, out=target)

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


def load_sharded(model: torch.nn.Module, source: Any, *, strict: bool = True, **options: Any) -> Loaded:
    """Fill a model of FSDP2, tensor parallelism or any DTensors with its own parts of a checkpoint, without collectives.

    Each rank reads what its shards need and nothing more; ranks do not wait for each other. Parameters must have memory
    (`model.to_empty(device=...)` after a start on the meta device), and keep it: they are filled in place.

    Args:
        model: whose `state_dict()` has the names that the file has.
        source: as StorageReader takes it.
        **options: as StorageReader takes them.
        strict: raise where names or shapes differ, before anything is read. False fills what is in both.

    Raises:
        RuntimeError: keys are missing or unexpected (strict); ValueError: a shape differs. Nothing was read then.
        OSError, CheckpointError: as reading does.
    """
    reader = StorageReader(source, **options)
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
