"""What the ranks of test_distributed.py do: `python distributed_ranks.py WORLD_SIZE FOLDER`; each prints what it found."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys, load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, zeros
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.multiprocessing.spawn import spawn

import zipslicer
import zipslicer.distributed
from zipslicer.distributed import StorageReader, load_sharded

WIDE = 1537  # of which neither 2 nor 4 ranks have the same


class Block(torch.nn.Module):
    def __init__(self, wide: int) -> None:
        super().__init__()
        self.up = torch.nn.Linear(7, wide)
        self.down = torch.nn.Linear(wide, 5, bias=False)
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x: Any) -> Any:
        return self.down(self.up(x).relu())


def model(wide: int, seed: int) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    made = torch.nn.Sequential(torch.nn.Linear(3, 7), Block(wide), torch.nn.Linear(5, 3))
    with torch.no_grad():
        for buffer in made.buffers():
            buffer.fill_(seed)
    return made


def stepped(wide: int, seed: int) -> tuple[torch.nn.Sequential, torch.optim.Adam]:
    made = model(wide, seed)
    optimizer = torch.optim.Adam(made.parameters(), lr=0.01)
    made(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    return made, optimizer


def full(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return list(one) == list(other) and all(torch.equal(full(one[name]), full(other[name])) for name in one)


def sharded(made: torch.nn.Sequential) -> torch.nn.Sequential:
    fully_shard(made[1])
    fully_shard(made)
    return made


def write(folder: Path) -> None:
    """By one process, before there are ranks."""
    made, optimizer = stepped(WIDE, 1)
    plain_model, plain_optimizer = get_state_dict(made, optimizer)
    torch.save({"model": plain_model, "optimizer": plain_optimizer, "epoch": 3, "name": "x"}, folder / "all.pth")
    torch.save(made.state_dict(), folder / "model.pth")
    torch.manual_seed(2)
    tensors = {
        "even": torch.randn(8, 12),
        "uneven": torch.randn(7, 5),
        "deep": torch.randn(5, 3, 6),
        "few": torch.randn(3),
    }
    torch.save(tensors, folder / "tensors.pth")
    torch.save({"w": torch.ones(1000, 2500), "epoch": 3}, folder / "values.pth")
    torch.save({f"layer{i}": torch.full((1000, 2500), float(i)) for i in range(16)}, folder / "large.pth")


def fsdp(folder: Path) -> bool:
    wanted = torch.load(folder / "model.pth")
    made = sharded(model(WIDE, 5))
    state = made.state_dict()
    load(state, storage_reader=StorageReader(folder / "model.pth"))
    good = same(made.state_dict(), wanted)
    other = sharded(model(WIDE, 6))
    report = load_sharded(other, folder / "model.pth")
    return good and report == ([], []) and same(other.state_dict(), wanted)


def on_the_meta_device(folder: Path) -> bool:
    with torch.device("meta"):
        made = sharded(model(WIDE, 5))
    made.to_empty(device="cpu")
    load_sharded(made, folder / "model.pth")
    return same(made.state_dict(), torch.load(folder / "model.pth"))


def everything(folder: Path) -> bool:
    """Model, optimizer and plain values of one file."""
    wanted = torch.load(folder / "all.pth", weights_only=True)
    made = sharded(model(WIDE, 7))
    optimizer = torch.optim.Adam(made.parameters(), lr=0.5)
    own_model, own_optimizer = get_state_dict(made, optimizer)
    state: dict[str, Any] = {"model": own_model, "optimizer": own_optimizer, "epoch": 0, "name": ""}
    load(state, storage_reader=StorageReader(folder / "all.pth"))
    set_state_dict(made, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    after_model, after_optimizer = cast("tuple[Any, Any]", get_state_dict(made, optimizer))
    good = same(after_model, wanted["model"]) and (state["epoch"], state["name"]) == (3, "x")
    for name, values in wanted["optimizer"]["state"].items():
        good &= same(after_optimizer["state"][name], values)
    return bool(good and after_optimizer["param_groups"][0]["lr"] == 0.01)


def placements(folder: Path) -> bool:
    world = dist.get_world_size()
    wanted = torch.load(folder / "tensors.pth")
    meshes: list[tuple[Any, list[Any]]] = [(init_device_mesh("cpu", (world,)), [[Shard(0)], [Shard(1)], [Replicate()]])]
    if world == 4:
        meshes.append(
            (
                init_device_mesh("cpu", (2, 2)),
                [
                    [Shard(0), Shard(1)],
                    [Shard(1), Shard(0)],
                    [Shard(0), Shard(0)],
                    [Replicate(), Shard(1)],
                    [Shard(0), Replicate()],
                ],
            )
        )
    good = True
    for mesh, kinds in meshes:
        for kind in kinds:
            shapes = {
                name: t.shape for name, t in wanted.items() if all(not k.is_shard() or k.dim < t.dim() for k in kind)
            }
            state: dict[str, Any] = {
                name: zeros(shape, device_mesh=mesh, placements=kind) for name, shape in shapes.items()
            }
            load(state, storage_reader=StorageReader(folder / "tensors.pth"))
            for name, value in state.items():
                right = distribute_tensor(wanted[name], mesh, kind)
                good &= torch.equal(value.to_local(), right.to_local())
    return good


def tensor_parallel(folder: Path) -> bool:
    """A plan of torch.distributed.tensor.parallel: columns of one matrix and rows of the next, which no rank has even."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    wanted, good = torch.load(folder / "model.pth"), True
    ways: list[Any] = [load_sharded, by_reader]
    for seed, how in enumerate(ways):
        made = model(WIDE, 10 + seed)
        parallelize_module(made[1], mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        how(made, folder / "model.pth")
        good &= same(made.state_dict(), wanted)
        good &= isinstance(made.state_dict()["1.up.weight"], DTensor)
    return good


def by_reader(made: torch.nn.Module, path: Path) -> None:
    load(made.state_dict(), storage_reader=StorageReader(path))


def folders(folder: Path) -> bool:
    """What ranks save, whoever opens the folder has whole; and other ranks read their parts of it."""
    world, good = dist.get_world_size(), True
    made = sharded(model(WIDE, 12))
    load_sharded(made, folder / "model.pth")
    optimizer = torch.optim.Adam(made.parameters(), lr=0.01)
    made(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    own_model, own_optimizer = cast("tuple[Any, Any]", get_state_dict(made, optimizer))
    mesh = init_device_mesh("cpu", (world // 2, 2))
    wide = torch.arange(7 * 9.0).reshape(7, 9)
    tensors = {
        "columns": distribute_tensor(wide, mesh, [Replicate(), Shard(1)]),
        "both": distribute_tensor(wide, mesh, [Shard(0), Shard(1)]),
    }
    where = folder / f"dcp-{world}"
    save({"model": own_model, "optimizer": own_optimizer, "epoch": 3, **tensors}, checkpoint_id=where)
    with zipslicer.load(where) as sd:
        good &= all(torch.equal(sd["model"][name], full(value)) for name, value in own_model.items())
        state = sd["optimizer"]["state"]
        good &= all(
            torch.equal(state[name][kind], full(value))
            for name, values in own_optimizer["state"].items()
            for kind, value in values.items()
        )
        good &= sd["epoch"] == 3 and all(torch.equal(sd[name], wide) for name in tensors)
        other = sharded(model(WIDE, 13))
        load_sharded(other, sd["model"])
        good &= same(other.state_dict(), {name: full(value) for name, value in own_model.items()})
    turned = {"both": zeros(7, 9, device_mesh=mesh, placements=[Shard(1), Shard(0)])}
    load(turned, storage_reader=StorageReader(where))
    return bool(good and torch.equal(full(turned["both"]), wide))


def partly(folder: Path) -> bool:
    """allow_partial_load, other dtypes, a mapping that was renamed, and keys without a state dict."""
    state = {"even": torch.zeros(8, 12, dtype=torch.float64), "more": torch.ones(2)}
    planner = DefaultLoadPlanner(allow_partial_load=True)
    load(state, storage_reader=StorageReader(folder / "tensors.pth"), planner=planner)
    wanted = torch.load(folder / "tensors.pth")
    good = torch.equal(state["even"], wanted["even"].double()) and torch.equal(state["more"], torch.ones(2))
    with zipslicer.load(folder / "tensors.pth") as sd:
        renamed = {"pre.few": torch.zeros(3)}
        load(renamed, storage_reader=StorageReader(sd.rename(lambda key: f"pre.{key}")))
    good &= torch.equal(renamed["pre.few"], wanted["few"])
    found = _load_state_dict_from_keys({"epoch", "model"}, storage_reader=StorageReader(folder / "all.pth"))
    good &= found["epoch"] == 3 and same(found["model"], torch.load(folder / "model.pth"))
    return good


def together(folder: Path) -> bool:
    """What several ranks want is read once, and is what each of them would have read."""
    world, good = dist.get_world_size(), True
    group = dist.new_group(list(range(world)))
    wanted = torch.load(folder / "tensors.pth")
    wide = {name: torch.zeros(t.shape, dtype=torch.float64) for name, t in wanted.items()}
    load(wide, storage_reader=StorageReader(folder / "tensors.pth", group=group))
    good &= all(torch.equal(wide[name], t.double()) for name, t in wanted.items())
    turned = {"uneven": torch.zeros(5, 7).t(), "few": torch.zeros(6)[::2]}
    load(turned, storage_reader=StorageReader(folder / "tensors.pth", group=group))
    good &= all(torch.equal(turned[name], wanted[name]) for name in turned)
    made, other = model(WIDE, 8), sharded(model(WIDE, 9))
    load_sharded(made, folder / "model.pth", group=group)
    load_sharded(other, folder / "model.pth", group=group)  # of which no two ranks have the same
    state = torch.load(folder / "model.pth")
    good &= same(made.state_dict(), state) and same(other.state_dict(), state)
    kinds: list[tuple[Any, list[Any]]] = [(init_device_mesh("cpu", (world,)), [Replicate()])]
    if world == 4:
        mesh = init_device_mesh("cpu", (2, 2))
        kinds += [(mesh, [Replicate(), Shard(1)]), (mesh, [Shard(0), Replicate()])]
    for mesh, placements in kinds:
        large = {f"layer{i}": zeros(1000, 2500, device_mesh=mesh, placements=placements) for i in range(16)}
        before = chars() if sys.platform == "linux" else 0
        load(large, storage_reader=StorageReader(folder / "large.pth", group=group))
        good &= all((tensor.to_local() == int(name[5:])).all() for name, tensor in large.items())
        if sys.platform == "linux":
            read: list[Any] = [None] * world
            dist.all_gather_object(read, chars() - before)
            good &= 160_000_000 <= sum(read) <= 1.05 * 160_000_000
            good &= max(read) <= 1.1 * 160_000_000 / world
    return bool(good)


def together_or_not_at_all(folder: Path) -> bool:
    """A rank that cannot read a tensor, or load another value, says so, and no other one waits for it."""

    def refuse(*_: Any) -> None:
        raise OSError(5, "no such luck")

    good = True
    for name in ("read", "pickled"):
        state: dict[str, Any] = {"w": torch.zeros(1000, 2500), "epoch": 0}
        reader = StorageReader(folder / "values.pth", group=dist.group.WORLD)
        usual = getattr(zipslicer.distributed._File, name)
        if dist.get_rank() == 1:
            setattr(zipslicer.distributed._File, name, refuse)
        try:
            load(state, storage_reader=reader)
            good = False
        except CheckpointException as caught:
            good &= len(caught.failures) == dist.get_world_size() and "no such luck" in str(caught.failures)
        finally:
            setattr(zipslicer.distributed._File, name, usual)
    load(state, storage_reader=reader)
    return good and state["epoch"] == 3 and bool((state["w"] == 1).all())


ALL = (
    fsdp,
    on_the_meta_device,
    everything,
    placements,
    tensor_parallel,
    folders,
    partly,
    together,
    together_or_not_at_all,
)


def counted(folder: Path) -> list[dict[str, int]]:
    """Bytes that this rank reads of a file of 160 MB, and what its memory grows by, beside its share; by rows, by columns."""
    world = dist.get_world_size()
    kinds: list[tuple[Any, list[Any]]] = [(init_device_mesh("cpu", (world,)), [Shard(dim)]) for dim in (0, 1)]
    if world == 4:
        kinds.append((init_device_mesh("cpu", (2, 2)), [Shard(0), Shard(1)]))
    found = []
    for mesh, placements in kinds:
        state = {f"layer{i}": zeros(1000, 2500, device_mesh=mesh, placements=placements) for i in range(16)}
        share = sum(tensor.to_local().nbytes for tensor in state.values())
        dist.barrier()
        before, memory = chars(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        load(state, storage_reader=StorageReader(folder / "large.pth"))
        read, grown = chars() - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
        assert all((tensor.to_local() == int(name[5:])).all() for name, tensor in state.items())
        found.append({"share": share, "read": read, "grown": grown << 10})
    return found


def chars() -> int:
    """Bytes that this process has read."""
    return int(Path("/proc/self/io").read_text().split()[1])


def rank(number: int, world: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous-{world}", rank=number, world_size=world)
    torch.set_num_threads(1)
    found: dict[str, Any] = {each.__name__: each(folder) for each in ALL}
    if sys.platform == "linux":
        found["counted"] = counted(folder)
    (folder / f"found-{world}-{number}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    WORLD, FOLDER = int(sys.argv[1]), Path(sys.argv[2])
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    spawn(rank, (WORLD, FOLDER), WORLD)  # type: ignore[no-untyped-call]
