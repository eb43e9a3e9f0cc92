"""Folders of torch.distributed.checkpoint: written by torch on one rank, or put together chunk by chunk."""

from __future__ import annotations

import inspect
import io
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

# Of one process; older torches ask nobody, and warn.
ALONE: dict[str, Any] = {"no_dist": True} if "no_dist" in inspect.signature(save).parameters else {}

Box = tuple[tuple[int, ...], tuple[int, ...]]  # where a chunk starts, and its sizes


def written(folder: Path, values: dict[str, Any], **options: Any) -> Path:
    """By torch, on one rank."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(values, storage_writer=FileSystemWriter(folder, **options), **ALONE)
    return folder


def load_alone(state: dict[str, Any], **options: Any) -> None:
    """torch.distributed.checkpoint.load, on one rank."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is .*unavailable or uninitialized")
        load(state, **options, **ALONE)


def read_by_torch(folder: Path) -> Any:
    """All of it, as a torch.save file would have it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_to_torch_save(folder, folder / "whole.pth")
    whole = torch.load(folder / "whole.pth", weights_only=False)
    (folder / "whole.pth").unlink()
    return whole


def metadata(folder: Path) -> Metadata:
    return FileSystemReader(folder).read_metadata()


def rewritten(folder: Path, change: Callable[[Metadata], Any]) -> Path:
    """With something else in its metadata."""
    said = metadata(folder)
    change(said)
    (folder / ".metadata").write_bytes(pickle.dumps(said, protocol=4))
    return folder


def chunked(folder: Path, tensors: Mapping[str, tuple[torch.Tensor, Sequence[Box]]], ranks: int = 2) -> Path:
    """Tensors as ranks would save them that have these boxes of each, a file for each rank."""
    folder.mkdir(exist_ok=True)
    files = [bytearray() for _ in range(ranks)]
    facts: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    turn = 0
    for name, (tensor, boxes) in tensors.items():
        chunks = []
        for starts, sizes in boxes:
            chunks.append(ChunkStorageMetadata(torch.Size(starts), torch.Size(sizes)))
            part = tensor[tuple(slice(a, a + n) for a, n in zip(starts, sizes))]
            turn += 1
            file = turn % ranks
            content = saved(part)
            index = MetadataIndex(name, starts)
            places[index] = _StorageInfo(f"__{file}_0.distcp", len(files[file]), len(content))
            files[file] += content
        facts[name] = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), tensor.size(), chunks)
    for rank, whole in enumerate(files):
        (folder / f"__{rank}_0.distcp").write_bytes(whole)
    said = Metadata(facts, {name: (name,) for name in tensors}, places)
    said.version = "1.0.0"  # older torches have no such field, and write none
    (folder / ".metadata").write_bytes(pickle.dumps(said, protocol=4))
    return folder


def saved(part: torch.Tensor) -> bytes:
    """As a rank saves its chunk: with a storage of its own, dense, and its dimensions in the order that they lie in."""
    content = io.BytesIO()
    torch.save(part.clone(), content)
    return content.getvalue()


def same(one: Any, other: Any) -> bool:
    """Equal types and values, down to the last tensor, in one order."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
