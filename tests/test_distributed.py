"""torch.distributed.checkpoint on files of torch.save: ranks in processes of their own, over gloo."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this torch has no torch.distributed with gloo", allow_module_level=True)
pytest.importorskip("torch.distributed.fsdp", reason="FSDP2")

import dcp_folders  # noqa: E402
import distributed_ranks  # noqa: E402
from torch.distributed.checkpoint.api import CheckpointException  # noqa: E402

import zipslicer  # noqa: E402
from zipslicer.distributed import StorageReader, load_sharded  # noqa: E402
from zipslicer.errors import ArchiveError, UnsupportedError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # that is how it is meant

CHECKS = [check.__name__ for check in distributed_ranks.ALL]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    distributed_ranks.write(folder)
    return folder


@pytest.fixture(scope="module", params=[2, 4])
def ranks(folder: Path, request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What each rank has found."""
    if not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("FSDP2 of this torch computes on GPUs only")
    command = [sys.executable, distributed_ranks.__file__, str(request.param), str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=500, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"found-{request.param}-{rank}.json").read_text()) for rank in range(request.param)]


@pytest.mark.parametrize("check", CHECKS)
def test_ranks(check: str, ranks: list[dict[str, Any]]) -> None:
    assert [rank[check] for rank in ranks] == [True] * len(ranks)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/io")
def test_each_rank_reads_its_share(ranks: list[dict[str, Any]]) -> None:
    for counted in (each for rank in ranks for each in rank["counted"]):
        assert counted["share"] <= counted["read"] <= 1.1 * counted["share"]
        assert counted["grown"] <= counted["share"] + (128 << 20)


# ---------------------------------------------------------------- one process


def load(state: dict[str, Any], path: Any, **options: Any) -> None:
    dcp_folders.load_alone(state, storage_reader=StorageReader(path, **options))


def test_values_that_are_no_tensors(tmp_path: Path) -> None:
    made = {
        "w": torch.arange(6.0),
        "list": [torch.ones(2), {"deep": torch.zeros(1)}, 4],
        "plain": [1, "two", {"three": 3.0}],
        "numbers": {0: torch.tensor(7), "x": None},
        "sparse": torch.eye(3).to_sparse(),
        "size": torch.Size([3]),
    }
    torch.save(made, tmp_path / "a.pth")
    state: dict[str, Any] = {
        "w": torch.zeros(6),
        "list": [torch.zeros(2), {"deep": torch.ones(1)}, 0],
        "plain": [0, "", {"three": 0.0}],
        "numbers": {0: torch.tensor(0), "x": 5},
        "sparse": None,
        "size": None,
    }
    load(state, tmp_path / "a.pth")
    assert torch.equal(state["w"], made["w"])
    assert torch.equal(state["list"][0], torch.ones(2))
    assert torch.equal(state["list"][1]["deep"], torch.zeros(1))
    assert state["list"][2] == 4
    assert state["plain"] == made["plain"]
    assert torch.equal(state["numbers"][0], torch.tensor(7))
    assert state["numbers"]["x"] is None
    assert torch.equal(state["sparse"].to_dense(), torch.eye(3))
    assert state["size"] == torch.Size([3])


def test_what_torch_load_would_refuse(tmp_path: Path) -> None:
    """Tensors beside a class that is not built come; that value itself does not, and nothing of it is run."""
    torch.save(
        {"w": torch.ones(3), "args": argparse.Namespace(lr=3), "deep": [argparse.Namespace()]}, tmp_path / "a.pth"
    )
    state: dict[str, Any] = {"w": torch.zeros(3)}
    load(state, tmp_path / "a.pth")
    assert torch.equal(state["w"], torch.ones(3))
    for name in ("args", "deep"):
        with pytest.raises(CheckpointException) as caught:
            load({name: None}, tmp_path / "a.pth")
        (failure,) = caught.value.failures.values()
        assert isinstance(failure[0], UnsupportedError)
        assert "argparse.Namespace" in str(failure[0])


def test_other_files(tmp_path: Path) -> None:
    wanted = {"a": torch.randn(4, 3), "b": torch.arange(5)}
    torch.save(wanted, tmp_path / "new.pth")
    torch.save(wanted, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    files = [tmp_path / "new.pth", tmp_path / "old.pth"]
    files += [Path(zipslicer.convert(tmp_path / "new.pth", tmp_path / "s.pth", max_shard_size="50B").files[-1])]
    for path in files:
        state = {"a": torch.zeros(4, 3), "b": torch.zeros(5, dtype=torch.int64)}
        load(state, path)
        assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    module = torch.nn.Linear(3, 2)
    torch.save(module, tmp_path / "module.pth")
    other = torch.nn.Linear(3, 2)
    assert load_sharded(other, tmp_path / "module.pth") == ([], [])
    assert torch.equal(other.weight, module.weight)


def test_a_reader_can_be_used_again(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "one.pth")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    reader = StorageReader(tmp_path / "one.pth")
    state = {"a": torch.empty(2)}
    dcp_folders.load_alone(state, storage_reader=reader)
    assert torch.equal(state["a"], torch.ones(2))
    dcp_folders.load_alone(state, storage_reader=reader, checkpoint_id=tmp_path / "other.pth")
    assert torch.equal(state["a"], torch.zeros(2))
    assert StorageReader.validate_checkpoint_id(tmp_path / "one.pth")
    assert not StorageReader.validate_checkpoint_id(tmp_path)


def test_errors_of_load_sharded_come_before_reading(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    before = module.weight.detach().clone()
    torch.save({"weight": torch.ones(2, 3)}, tmp_path / "less.pth")
    torch.save({"weight": torch.ones(2, 3), "bias": torch.ones(2), "more": 3}, tmp_path / "more.pth")
    torch.save({"weight": torch.ones(2, 4), "bias": torch.ones(2)}, tmp_path / "shape.pth")
    for name, said in (("less", "1 keys of the model are not in the file .bias."), ("more", "1 of the file .*more")):
        with pytest.raises(RuntimeError, match=said):
            load_sharded(module, tmp_path / f"{name}.pth")
    with pytest.raises(ValueError, match="Size mismatch"):
        load_sharded(module, tmp_path / "shape.pth")
    assert torch.equal(module.weight, before)
    assert load_sharded(module, tmp_path / "less.pth", strict=False) == (["bias"], [])
    assert torch.equal(module.weight, torch.ones(2, 3))
    (tmp_path / "no.pth").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ArchiveError):
        load_sharded(module, tmp_path / "no.pth")
    with pytest.raises(TypeError, match="open already"):
        StorageReader(zipslicer.load(tmp_path / "less.pth"), threads=2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_a_rank_with_a_gpu(tmp_path: Path) -> None:
    """One, over nccl: parameters that are DTensors on the device, filled by each of the ways."""
    from torch import distributed as dist
    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.fsdp import fully_shard

    saved = {f"{i}.weight": torch.arange(i, i + 2_000_000.0).reshape(1000, 2000) for i in range(3)}
    torch.save(saved, tmp_path / "m.pth")
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        with torch.device("meta"):
            model = torch.nn.Sequential(*(torch.nn.Linear(2000, 1000, bias=False) for _ in range(3)))
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
        model.to_empty(device="cuda")

        def check() -> None:
            for key, value in model.state_dict().items():
                assert value.to_local().is_cuda
                assert value.to_local().cpu().equal(saved[key]), key
            with torch.no_grad():
                for value in model.parameters():
                    value.to_local().zero_()

        assert load_sharded(model, tmp_path / "m.pth") == ([], [])
        check()
        for group in (None, dist.group.WORLD):
            load(model.state_dict(), storage_reader=StorageReader(tmp_path / "m.pth", group=group))
            check()
    finally:
        dist.destroy_process_group()
