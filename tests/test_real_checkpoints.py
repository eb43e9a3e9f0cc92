"""Published checkpoints, opened without the packages that wrote them, against a slow reader of another hand."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os
import pickle
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import conformance  # noqa: E402
from real_checkpoints import FILES, FOLDER, WHEELS, RealFile, find, place  # noqa: E402
from slow_reader import Reading, Recorded, SlowTensor, read_slowly  # noqa: E402

import zipslicer  # noqa: E402

# What is still to come, by container; strict, so that whoever brings it is told to take the row out.
LATER: dict[str, str] = {}


REFUSED = [file for file in FILES.values() if not file.weights_only]


def _files(files: Iterable[RealFile]) -> list[Any]:
    def marks(file: RealFile) -> list[pytest.MarkDecorator]:
        return [pytest.mark.xfail(strict=True, reason=LATER[file.container])] if file.container in LATER else []

    return [pytest.param(file, id=file.member, marks=marks(file)) for file in files]


every_file = pytest.mark.parametrize("file", _files(FILES.values()))
every_pickle = pytest.mark.parametrize(
    "file", _files(file for file in FILES.values() if file.container != "torchscript")
)


@pytest.fixture
def path(file: RealFile) -> Path:
    if not place(FOLDER, file.member).exists() and os.environ.get("ZIPSLICER_REQUIRE_REAL") != "1":
        pytest.skip("published checkpoints are not here: `make real` fetches them")
    return find(file.member, FOLDER)


@functools.cache
def reading_of(path: Path) -> Reading:
    return read_slowly(path)


@every_file
def test_every_tensor(file: RealFile, path: Path) -> None:
    """By name, one by one: what is known of it before it is read, its elements, and a part of it."""
    slow = reading_of(path)
    assert len(set(map(id, slow.tensors.values()))) == file.tensors
    with zipslicer.open(path) as checkpoint:
        assert list(checkpoint.tensors) == list(slow.tensors)
        for name, tensor in slow.tensors.items():
            check_info(tensor, checkpoint.tensors.get_meta(name), name)
            got = checkpoint.tensors[name]
            check_tensor(tensor, slow.logical_bytes(name), got, name)
            if tensor.shape and tensor.shape[0]:
                step = tensor.stride[0]
                last = dataclasses.replace(
                    tensor,
                    shape=(1, *tensor.shape[1:]),
                    storage_offset=tensor.storage_offset + (tensor.shape[0] - 1) * step,
                )
                part = checkpoint.tensors.get_slice(name)[-1:]
                assert tuple(part.shape) == last.shape, name
                assert conformance.logical_bytes(part) == last.logical_bytes(slow.payload(name)), name


def check_info(tensor: SlowTensor, info: Any, name: str) -> None:
    storage = tensor.storage
    assert (info.dtype_name, info.location) == (storage.dtype_name, storage.location), name
    assert (info.storage_key, info.storage_nbytes) == (storage.key, storage.nbytes), name
    assert (info.shape, info.strides, info.storage_offset) == (tensor.shape, tensor.stride, tensor.storage_offset), name
    assert info.nbytes == math.prod(tensor.shape) * storage.itemsize, name
    assert (info.requires_grad, info.is_parameter) == (tensor.requires_grad, tensor.parameter), name


def check_tensor(tensor: SlowTensor, content: bytes, got: Any, name: str) -> None:
    assert type(got) is (torch.nn.Parameter if tensor.parameter else torch.Tensor), name
    assert str(got.dtype) == f"torch.{tensor.storage.dtype_name}", name
    assert (tuple(got.shape), got.stride()) == (tensor.shape, tensor.stride), name
    assert got.requires_grad == tensor.requires_grad, name
    assert got.device.type == "cpu", name
    assert conformance.logical_bytes(got) == content, name


@every_file
def test_storages(file: RealFile, path: Path) -> None:
    """What is read in one go shares memory where the file does, and nowhere else; each storage is there whole."""
    slow = reading_of(path)
    with zipslicer.open(path) as checkpoint:
        made = checkpoint.tensors.materialize()
    assert list(made) == list(slow.tensors)
    keys: dict[int, Any] = {}
    storages: dict[Any, int] = {}
    for name, tensor in slow.tensors.items():
        got = made[name]
        check_tensor(tensor, slow.logical_bytes(name), got, name)
        assert got.storage_offset() == tensor.storage_offset, name
        storage = got.untyped_storage()
        assert conformance.storage_bytes(storage) == slow.payload(name), name
        if storage.nbytes():
            key = (slow.folders[name], tensor.storage.key)
            assert keys.setdefault(storage._cdata, key) == key, name
            assert storages.setdefault(key, storage._cdata) == storage._cdata, name


@every_pickle
def test_whole(file: RealFile, path: Path) -> None:
    """What is no tensor comes out too, equal or inert, to the last attribute."""
    with zipslicer.open(path) as checkpoint:
        root = checkpoint.root
        whole = root if isinstance(root, zipslicer.Placeholder) else root.materialize()
        made = check_same(reading_of(path), whole)
        assert {zipslicer.describe(each).qualified for each in checkpoint.placeholders.values()} == made


def check_same(slow: Reading, whole: Any) -> set[str]:
    """-> the names of all that would have been called, and was not."""
    contents = {id(tensor): slow.logical_bytes(name) for name, tensor in slow.tensors.items()}
    twins: dict[int, Any] = {}
    called: set[str] = set()
    todo: list[tuple[Any, Any, str]] = [(slow.root, whole, "root")]
    while todo:
        a, b, at = todo.pop()
        if isinstance(a, (dict, list, Recorded, SlowTensor)):
            if id(a) in twins:
                assert twins[id(a)] is b, at
                continue
            twins[id(a)] = b
        if isinstance(a, SlowTensor):
            check_tensor(a, contents[id(a)], b, at)
        elif isinstance(a, Recorded) and (a.module, a.name) == ("torch", "device"):
            assert b == torch.device(*a.args), at
        elif isinstance(a, Recorded):
            about = zipslicer.describe(b)
            assert (about.qualified, about.called) == (f"{a.module}.{a.name}", True), at
            called.add(about.qualified)
            todo += [
                (a.args, about.args, f"{at}.args"),
                (a.kwargs, about.kwargs, f"{at}.kwargs"),
                (a.state, about.state, f"{at}.state"),
                (a.list_items, list(about.list_items), f"{at}.list_items"),
                (a.items, dict(about.items), f"{at}.items"),
            ]
            if isinstance(a.state, dict):
                todo += [(value, about.attributes[name], f"{at}.{name}") for name, value in a.state.items()]
        elif isinstance(a, type):
            check_global(a, b, at)
        else:
            assert type(b) is type(a), at
            if isinstance(a, dict):
                assert list(a) == list(b), at
                todo += [(a[key], b[key], f"{at}.{key}") for key in a]
                if hasattr(a, "__dict__"):
                    todo.append((vars(a), vars(b), f"{at}.__dict__"))  # _metadata
            elif isinstance(a, (list, tuple)):
                assert len(a) == len(b), at
                todo += [(x, y, f"{at}.{i}") for i, (x, y) in enumerate(zip(a, b, strict=True))]
            else:
                assert repr(a) == repr(b), at  # NaN too
    return called


def check_global(a: type, b: Any, at: str) -> None:
    """A global that stands as a value."""
    if not issubclass(a, Recorded):
        assert b is a, at
    elif a.module == "torch" and isinstance(getattr(torch, a.name, None), torch.dtype):
        assert b is getattr(torch, a.name), at
    else:
        about = zipslicer.describe(b)
        assert (about.qualified, about.called) == (f"{a.module}.{a.name}", False), at


@pytest.mark.parametrize("file", list(FILES.values()), ids=list(FILES))
def test_without_their_packages(file: RealFile, path: Path) -> None:
    """Neither the wheels are installed here, nor anything else that the files name and that is not part of Python."""
    packages = {wheel.project.replace("-", "_") for wheel in WHEELS}
    packages |= {module.partition(".")[0] for module, _ in reading_of(path).globals}
    packages -= sys.stdlib_module_names | {"torch", "__torch__", "__builtin__"}
    assert [name for name in packages if importlib.util.find_spec(name) is not None] == []


@pytest.mark.filterwarnings("ignore:'torch.load' received a zip file that looks like a TorchScript archive:UserWarning")
@pytest.mark.parametrize("file", REFUSED, ids=[file.member for file in REFUSED])
def test_torch_refuses_it(file: RealFile, path: Path) -> None:
    error = RuntimeError if file.container == "torchscript" else pickle.UnpicklingError
    with pytest.raises(error):
        torch.load(path, map_location="cpu", weights_only=True)


@pytest.mark.parametrize("file", _files([file for file in FILES.values() if file.weights_only]))
def test_beside_torch(file: RealFile, path: Path) -> None:
    """What torch.load(weights_only=True) takes comes out as it has it."""
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    assert conformance.differences(theirs, zipslicer.load(path).materialize(), zipslicer.describe) == []


def test_nineteen_files_of_which_torch_refuses_twelve() -> None:
    assert (len(FILES), len(REFUSED)) == (19, 12)
