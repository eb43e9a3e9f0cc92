"""A model on several ranks, filled from one file of torch.save: docs/performance/ranks.md out of one run.

    python benchmarks/ranks.py [--samples 3] [--layers 46]

For each sample a fresh group of processes over gloo makes a model, reads the file once, so that it lies in the page
cache, and waits for all; then the clock starts, and it stops when the last rank has its part. Every rank looks whether its
part is right. What a rank reads is the growth of rchar in /proc/self/io (mapped pages are not in it), its memory that of the
peak of its resident set.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from report import ROOT, grid, show
from run import machine
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn

PAGE = ROOT / "docs" / "performance" / "ranks.md"
ROWS, COLUMNS = 5000, 2500  # of a layer: 50 MB
WORLDS = (2, 4)
PATIENCE = 45  # seconds
ABOUT = """A model in {layers} layers, {size:.1f} GB, on ranks of one machine (gloo): sharded by FSDP2, or all of it on each
rank; and its file of torch.save in the page cache. Bytes read are those of the rank that reads most, by its share, and those of
all ranks together, by the file; what is mapped is not counted, nor what comes from another rank. Memory is the growth of the
peak of that rank, over the model that it has before."""


def by_reader(model: Any, path: str) -> None:
    from torch.distributed.checkpoint.state_dict_loader import load

    from zipslicer.distributed import StorageReader

    load(model.state_dict(), storage_reader=StorageReader(path))


def by_load_sharded(model: Any, path: str) -> None:
    from zipslicer.distributed import load_sharded

    load_sharded(model, path)


def by_group(model: Any, path: str) -> None:
    from torch.distributed.checkpoint.state_dict_loader import load

    from zipslicer.distributed import StorageReader

    load(model.state_dict(), storage_reader=StorageReader(path, group=dist.group.WORLD))


def by_broadcast(model: Any, path: str) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    state = torch.load(path, mmap=True, weights_only=True) if dist.get_rank() == 0 else {}
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def by_stock_reader(model: Any, path: str) -> None:
    from torch.distributed.checkpoint.format_utils import BroadcastingTorchSaveReader, DynamicMetaLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import load

    load(
        model.state_dict(),
        storage_reader=BroadcastingTorchSaveReader(),
        planner=DynamicMetaLoadPlanner(),
        checkpoint_id=path,
    )


BROADCAST = "torch.load(mmap=True) on rank 0, set_model_state_dict(broadcast_from_rank0=True)"
SHARDED = {
    "dcp.load, zipslicer's StorageReader": by_reader,
    "zipslicer.distributed.load_sharded": by_load_sharded,
    BROADCAST: by_broadcast,
    "dcp.load, BroadcastingTorchSaveReader": by_stock_reader,
}
REPLICATED = {
    "dcp.load, zipslicer's StorageReader(group=...)": by_group,
    "dcp.load, zipslicer's StorageReader": by_reader,
    "dcp.load, BroadcastingTorchSaveReader": by_stock_reader,
}
CONTESTANTS = {"sharded": SHARDED, "replicated": REPLICATED}


def chars() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def peak() -> int:
    """Bytes."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) << 10


def rank(number: int, world: int, path: str, kind: str, contestant: str, layers: int, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=number, world_size=world)
    torch.set_num_threads(1)
    with torch.device("meta"):
        model = torch.nn.Sequential(*(torch.nn.Linear(COLUMNS, ROWS, bias=False) for _ in range(layers)))
    if kind == "sharded":
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for value in model.parameters():
            _local(value).zero_()  # memory that is there
    if number == 0:
        with Path(path).open("rb", buffering=0) as file:
            while file.read(16 << 20):
                pass
    dist.barrier()
    read, memory, started = chars(), peak(), time.perf_counter()
    CONTESTANTS[kind][contestant](model, path)
    read, grown = chars() - read, peak() - memory
    dist.barrier()
    seconds = time.perf_counter() - started
    share = 0
    for name, value in model.state_dict().items():
        local = _local(value)
        share += local.nbytes
        assert (local == int(name.split(".")[0])).all(), f"{name} is wrong"
    found = {"seconds": seconds, "read": read, "grown": grown, "share": share}
    (Path(out) / f"{number}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _local(value: Any) -> Any:
    return value.to_local() if hasattr(value, "to_local") else value


def sample(world: int, path: Path, kind: str, contestant: str, layers: int) -> list[dict[str, float]] | None:
    """What each rank has found; None where it did not end."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, __file__, "--group", str(world), str(path), kind, contestant, str(layers), out]
        group = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            status = group.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group.pid, signal.SIGKILL)  # the ranks, too, which would wait for each other for ever
            group.wait()
        if status:
            raise SystemExit(f"{contestant}: exit status {status}")
        return [json.loads((Path(out) / f"{number}.json").read_text()) for number in range(world)]


def rows_of(world: int, path: Path, kind: str, samples: int, layers: int) -> list[list[str]]:
    taken: dict[str, list[Any]] = {name: [] for name in CONTESTANTS[kind]}
    for _ in range(samples):
        for name, found in taken.items():
            if None not in found:
                found.append(sample(world, path, kind, name, layers))
                print(world, kind, name, found[-1], file=sys.stderr)
    rows, first = [], None
    for name, found in taken.items():
        if None in found:
            rows.append([name, f"does not end in {PATIENCE} s", "-", "-", "-"])
            continue
        seconds = statistics.median(max(rank["seconds"] for rank in group) for group in found)
        first = first or seconds
        read = max(rank["read"] / rank["share"] for group in found for rank in group)
        every = max(sum(rank["read"] for rank in group) for group in found) / path.stat().st_size
        over = max(rank["grown"] for group in found for rank in group)
        rows.append(
            [name, f"{show(seconds)}, {seconds / first:.2f}x", f"{read:.2f}", f"{every:.2f}", f"{over / 1e6:.0f} MB"]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--layers", type=int, default=46)
    parser.add_argument("--group", nargs=6)
    options = parser.parse_args()
    if options.group:
        world, path, kind, contestant, layers, out = options.group
        spawn(rank, (int(world), path, kind, contestant, int(layers), out), int(world))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        torch.save({f"{n}.weight": torch.full((ROWS, COLUMNS), float(n)) for n in range(options.layers)}, path)
        nbytes = path.stat().st_size
        facts = machine()
        about = [
            f"{facts['cores']} cores of {facts['cpu']}, {facts['system']}",
            f"Python {facts['python']}, torch {facts['torch']}",
            f"{time.strftime('%Y-%m-%d')}. {options.samples} fresh groups of processes each, in turn; medians.",
        ]
        parts = [
            "# One file, several ranks",
            "Made by `python benchmarks/ranks.py`; do not edit. How: see that file.",
            "; ".join(about),
            ABOUT.format(layers=options.layers, size=nbytes / 1e9),
        ]
        for world in WORLDS:
            for kind in CONTESTANTS:
                head = [f"{world} ranks, {kind}", "until the last one has its part", "read, by its share"]
                head += ["read by all, by the file", "memory"]
                parts.append(grid([head, *rows_of(world, path, kind, options.samples, options.layers)]).rstrip())
    PAGE.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
