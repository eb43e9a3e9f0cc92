"""Published checkpoints, opened without the packages that wrote them, against a slow reader of another hand."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import conformance  # noqa: E402
import real_checkpoints  # noqa: E402
from real_checkpoints import FILES, NotFetchedError  # noqa: E402

import zipslicer  # noqa: E402

THEIR_PACKAGES = ("admet_ai", "chemprop", "lightning", "silero_vad", "torchmetrics")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where files are kept: ZIPSLICER_REAL, from one run to the next; else only for this run."""
    kept = os.environ.get("ZIPSLICER_REAL")
    return Path(kept) if kept else tmp_path_factory.mktemp("real")


@pytest.fixture(params=list(FILES))
def member(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def path(member: str, folder: Path) -> Path:
    try:
        return real_checkpoints.fetch(member, folder)
    except NotFetchedError as error:
        if os.environ.get("ZIPSLICER_REQUIRE_REAL") == "1":
            raise
        pytest.skip(str(error))


def test_every_tensor(member: str, path: Path) -> None:
    for package in THEIR_PACKAGES:
        assert importlib.util.find_spec(package) is None
    root, slow = real_checkpoints.read_slowly(path)
    assert len(slow) == FILES[member][1].tensors
    wanted = {tensor.identity: (tensor, content) for tensor, content in slow}
    found = set()
    with zipslicer.open(path) as checkpoint:
        for name in checkpoint.tensors:
            info = checkpoint.tensors.get_meta(name)
            assert info is not None
            identity = (info.storage_key, info.dtype_name, info.storage_offset, info.shape, info.strides)
            found.add(identity)
            tensor, content = wanted[identity]
            assert info.location == tensor.storage.location
            got = checkpoint.tensors[name]
            assert str(got.dtype) == f"torch.{tensor.dtype_name}"
            assert (tuple(got.shape), got.stride()) == (tensor.shape, tensor.stride)
            assert conformance.logical_bytes(got) == content, name
        assert found == set(wanted)
        assert checkpoint.placeholders
        if isinstance(root, dict):
            names = {f"state_dict.{key}": tensor for key, tensor in root["state_dict"].items()}
            assert names.keys() <= set(checkpoint.tensors)
            for name, tensor in names.items():
                info = checkpoint.tensors.get_meta(name)
                assert info is not None
                assert (info.storage_key, info.storage_offset) == (tensor.storage.key, tensor.storage_offset)
                assert info.shape == tensor.shape


def test_load_and_materialize(member: str, path: Path) -> None:
    """What is no tensor comes out too, and what is read in one go is what is read one by one."""
    root, slow = real_checkpoints.read_slowly(path)
    loaded = zipslicer.load(path)
    if not isinstance(root, dict):
        assert isinstance(loaded, zipslicer.Placeholder)
        return
    assert list(loaded) == list(root)
    whole = loaded.materialize()
    contents = {tensor.identity: content for tensor, content in slow}
    assert list(whole["state_dict"]) == list(root["state_dict"])
    for key, tensor in root["state_dict"].items():
        assert conformance.logical_bytes(whole["state_dict"][key]) == contents[tensor.identity]
    for key, value in root.items():
        if isinstance(value, (int, float, str)):
            assert whole[key] == value
