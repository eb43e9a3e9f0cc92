"""Checkpoints that torch.save makes on the spot, each compared with torch.load in full."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    import torch
else:
    torch = pytest.importorskip("torch")

from test_checkpoint_readonly import SEED, compare

import zipslicer

NO_STORAGE = {"bits", "int1", "int2", "int3", "int4", "int5", "int6", "int7"}  # dtypes that torch names and cannot fill


def dtypes() -> list[torch.dtype]:
    found = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    names = {str(dtype).removeprefix("torch."): dtype for dtype in found}
    return [
        dtype
        for name, dtype in sorted(names.items())
        if not name.startswith(("q", "bits")) and name.removeprefix("u") not in NO_STORAGE
    ]


def noise(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A tensor of random bits, not-a-numbers and all."""
    if dtype is torch.bool:
        return torch.randint(2, shape).bool()
    return torch.randint(256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8).view(dtype)


@pytest.fixture(autouse=True)
def seed() -> int:
    chosen = int(os.environ.get(SEED) or 1337)
    torch.manual_seed(chosen)
    random.seed(chosen)
    return chosen


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint.pth"


def two_layers(linear: type[torch.nn.Linear] = torch.nn.Linear) -> torch.nn.ModuleList:
    return torch.nn.ModuleList([linear(1000, 2000), linear(2000, 2000)])


def test_basic(path: Path) -> None:
    torch.save({"w": torch.randn(10, 20, 3), "a longer name": torch.randn(10, 20, 3).bfloat16()}, path)
    assert compare(path).tensors == 2


def test_various_dtypes(path: Path) -> None:
    tensors = {}
    for dtype in dtypes():
        name = ".".join(str(random.randrange(1 << 16)) for _ in range(6))
        tensors[name] = noise(dtype, *(random.randint(1, 16) for _ in range(3)))
    assert len(tensors) >= 20
    torch.save(tensors, path)
    assert compare(path).tensors == len(tensors)
    lazy = zipslicer.load(path)
    assert {lazy.get_meta(name).dtype for name in lazy} == set(dtypes())


def test_nn_sdict(path: Path) -> None:
    network = two_layers()
    torch.save(network.state_dict(), path)
    assert compare(path).tensors == 4
    lazy = zipslicer.load(path)
    assert lazy._metadata == network.state_dict()._metadata  # type: ignore[attr-defined]  # torch hangs it on an OrderedDict
    assert two_layers().load_state_dict(lazy) == ([], [])


def test_nn_sdict_w_extra_state(path: Path) -> None:
    class WithExtraState(torch.nn.Linear):
        def get_extra_state(self) -> dict[str, Any]:
            return {"a": random.randrange(1 << 63, 1 << 64), "b": "this is not a tensor", "c": [1, 2, 3]}

    network = two_layers(WithExtraState)
    saved = network.state_dict()
    torch.save(saved, path)
    found = compare(path)
    assert (found.tensors, found.values) == (4, 2 * 5)
    lazy = zipslicer.load(path)
    assert lazy["1._extra_state"] == saved["1._extra_state"]
    assert lazy.get_meta("1._extra_state") is None


def test_nn_pickle(path: Path) -> None:
    """A pickled module, which the ancestor refused and torch.load refuses: nothing of it is built, its tensors are read."""
    network = two_layers()
    torch.save(network, path)
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(path, weights_only=True)

    module = zipslicer.load(path)
    assert isinstance(module, zipslicer.Placeholder)
    described = zipslicer.describe(module)
    assert (described.module, described.name) == ("torch.nn.modules.container", "ModuleList")

    tensors = zipslicer.open(path).tensors
    assert list(tensors) == list(network.state_dict())
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensors[name], tensor)
    assert compare(path, unsafe=True).tensors == 4
