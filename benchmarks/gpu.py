"""A checkpoint onto a GPU: docs/performance/gpu.md out of one run.

    python benchmarks/gpu.py [--samples 3] [--layers 20] [--folder FOLDER]

For each sample and each contestant there is a fresh process, which starts CUDA, brings a small file onto the GPU, so that
no import is timed, and reads the large one, so that it lies in the page cache. Then it does each piece of work twice: the
second time pinned memory and the blocks of torch's allocator are there. The clock stops when the GPU has it all. All
contestants must come to the same bytes. Linux only; the GPU needs 25 GB, the folder 17 GB.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from make_files import many, tiny
from report import ROOT, grid, show
from run import machine
from safetensors.torch import save_file
from sample import forget_peak, proc_bytes, read_once

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Tensors = dict[str, torch.Tensor]

PAGE = ROOT / "docs" / "performance" / "gpu.md"
GPU = torch.device("cuda", 0)
HIDDEN, INNER = 4096, 11008
SHAPES = {
    **{f"self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"},
    "mlp.gate_proj.weight": (INNER, HIDDEN),
    "mlp.up_proj.weight": (INNER, HIDDEN),
    "mlp.down_proj.weight": (HIDDEN, INNER),
    "input_layernorm.weight": (HIDDEN,),
    "post_attention_layernorm.weight": (HIDDEN,),
}  # of a layer of Llama 7B, 405 MB
SOME = ("model.layers.3.", "model.layers.11.")
ABOUT = """Time until tensors of a file that lies in the page cache are on the GPU. `model` has {layers} layers of a Llama
of 7 billion parameters, in bfloat16, {size:.1f} GB; `many` has 10,000 matrices of 4 KB. In each cell: the first time in a
process, and the second time, when pinned memory and the blocks of torch's allocator are there; the ratio is that of the
first times. Memory is the growth of the resident set's peak on the CPU's side, of the first column's work.
The last row is no library: memory that was pinned and filled before the clock started, copied tensor by tensor."""


# ---------------------------------------------------------------- contestants


class Zipslicer:
    suffix = ".pth"

    def __init__(self) -> None:
        import zipslicer

        self.library = zipslicer

    def whole(self, path: str) -> Tensors:
        with self.library.load(path, map_location=GPU) as state_dict:
            return state_dict.materialize()

    def some(self, path: str, keys: list[str]) -> Tensors:
        with self.library.load(path, map_location=GPU) as state_dict:
            return state_dict.get_tensors(keys)

    def into(self, path: str, target: Tensors) -> None:
        with self.library.load(path) as state_dict:
            state_dict.load_into(target)


class Stream(Zipslicer):
    def whole(self, path: str) -> Tensors:
        with self.library.load(path) as state_dict:
            return dict(state_dict.stream(device=GPU))

    def some(self, path: str, keys: list[str]) -> Tensors:
        with self.library.load(path) as state_dict:
            return dict(state_dict.stream(keys, device=GPU))


class Patched:
    """What runs on torch.load, with zipslicer in its place."""

    suffix = ".pth"

    def __init__(self) -> None:
        import zipslicer

        self.load = zipslicer.torch_load

    def whole(self, path: str) -> Tensors:
        return self.load(path, map_location=GPU)

    def some(self, path: str, keys: list[str]) -> Tensors:
        state_dict = self.load(path, map_location="cpu")
        return {key: state_dict[key].to(GPU) for key in keys}

    def into(self, path: str, target: Tensors) -> None:
        copy(self.load(path, map_location=GPU).items(), target)


class TorchLoad(Patched):
    is_mapped = False

    def __init__(self) -> None:
        self.load = functools.partial(torch.load, weights_only=True, mmap=self.is_mapped)

    def into(self, path: str, target: Tensors) -> None:
        copy(self.load(path, map_location="cpu").items(), target)


class TorchLoadMmap(TorchLoad):
    is_mapped = True


class Safetensors:
    suffix = ".safetensors"

    def __init__(self) -> None:
        import safetensors.torch

        self.library = safetensors

    def whole(self, path: str) -> Tensors:
        return self.library.torch.load_file(path, device="cuda:0")

    def some(self, path: str, keys: list[str]) -> Tensors:
        with self.library.safe_open(path, "pt", device="cuda:0") as file:
            return {key: file.get_tensor(key) for key in keys}

    def into(self, path: str, target: Tensors) -> None:
        with self.library.safe_open(path, "pt") as file:
            copy(((key, file.get_tensor(key)) for key in file.keys()), target)  # noqa: SIM118 it is no mapping


class Pinned:
    """No library, and no file within the time."""

    suffix = ".pth"

    def __init__(self) -> None:
        self.held: dict[str, Tensors] = {}

    def prepare(self, path: str) -> None:
        self.held[path] = {key: value.pin_memory() for key, value in torch.load(path, weights_only=True).items()}

    def whole(self, path: str) -> Tensors:
        return self.some(path, list(self.held[path]))

    def some(self, path: str, keys: list[str]) -> Tensors:
        return {key: self.held[path][key].to(GPU, non_blocking=True) for key in keys}

    def into(self, path: str, target: Tensors) -> None:
        for key, value in target.items():
            value.copy_(self.held[path][key], non_blocking=True)


def copy(items: Iterable[tuple[str, torch.Tensor]], target: Tensors) -> None:
    for key, value in items:
        target[key].copy_(value)


CONTESTANTS: dict[str, tuple[Callable[[], Any], str]] = {
    "zipslicer, native": (Zipslicer, "native"),
    "zipslicer, native, stream()": (Stream, "native"),
    "zipslicer, pure": (Zipslicer, "pure"),
    "zipslicer.torch_load": (Patched, "native"),
    "torch.load": (TorchLoad, ""),
    "torch.load(mmap=True)": (TorchLoadMmap, ""),
    "safetensors": (Safetensors, ""),
    "pinned memory, copied": (Pinned, ""),
}
CASES = {"model, all of it": "model", "into a model that is there": "model", "two layers": "model", "many": "many"}


# ---------------------------------------------------------------- one process


def work_of(case: str, contestant: Any, path: str) -> tuple[Callable[[], Any], Tensors]:
    """What is timed; and what it fills, if that is there before."""
    if not case.startswith("into"):
        if case != "two layers":
            return lambda: contestant.whole(path), {}
        keys = [f"{layer}{name}" for layer in SOME for name in SHAPES]
        return lambda: contestant.some(path, keys), {}
    layers = {key.split(".")[2] for key in torch.load(path, weights_only=True, mmap=True)}
    target = {
        f"model.layers.{layer}.{name}": torch.zeros(shape, dtype=torch.bfloat16, device=GPU)
        for layer in sorted(layers, key=int)
        for name, shape in SHAPES.items()
    }
    return lambda: contestant.into(path, target), target


def digest(tensors: Tensors) -> int:
    """CRC-32 over names, shapes, and two sums over all bytes, one of them weighted, taken on the GPU."""
    crc = 0
    for name, tensor in sorted(tensors.items()):
        if tensor.device != GPU:
            raise RuntimeError(f"{name} is on {tensor.device}")
        flat = tensor.view(-1).view(torch.int16)
        weights = torch.arange(1, len(flat) + 1, device=GPU) % 65_521
        sums = flat.sum(dtype=torch.int64).item(), (weights * flat).sum().item()
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)} {sums}".encode(), crc)
    return crc


def child(name: str, folder: Path) -> None:
    made, backend = CONTESTANTS[name]
    contestant = made()
    if backend:
        import zipslicer

        assert zipslicer.backend() == backend
    torch.zeros(1, device=GPU)
    suffix = contestant.suffix
    if hasattr(contestant, "prepare"):
        for file in ("tiny", "model", "many"):
            contestant.prepare(f"{folder / file}{suffix}")
    contestant.whole(f"{folder / 'tiny'}{suffix}")
    found: dict[str, Any] = {}
    for case, file in CASES.items():
        path = f"{folder / file}{suffix}"
        read_once(path)
        work, into = work_of(case, contestant, path)
        seconds = []
        for turn in range(2):
            gc.collect()
            torch.cuda.synchronize()
            resident = proc_bytes("/proc/self/status", "VmRSS")
            forget_peak()
            start = time.perf_counter()
            tensors = work()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            if turn == 0:
                grown = proc_bytes("/proc/self/status", "VmHWM") - resident
                crc = digest(into or tensors)
                torch.cuda.empty_cache()  # of what the digest took
            for value in into.values():
                value.zero_()
            del tensors
        found[case] = {"first": seconds[0], "again": seconds[1], "grown": grown, "digest": crc}
        del work, into
        gc.collect()
        torch.cuda.empty_cache()
    print(json.dumps(found))


# ---------------------------------------------------------------- the parent


def make(folder: Path, layers: int) -> None:
    files: dict[str, Callable[[], Tensors]] = {"tiny": tiny, "many": many, "model": lambda: model(layers)}
    for name, build in files.items():
        if not (folder / f"{name}.safetensors").exists():
            tensors = build()
            torch.save(tensors, folder / f"{name}.pth")
            save_file(tensors, str(folder / f"{name}.safetensors"))


def model(layers: int) -> Tensors:
    generator = torch.Generator(GPU).manual_seed(1)
    return {
        f"model.layers.{layer}.{name}": torch.randn(shape, generator=generator, device=GPU).bfloat16().cpu()
        for layer in range(layers)
        for name, shape in SHAPES.items()
    }


def sample(name: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", name, "--folder", str(folder)]
    environment = {**os.environ, "ZIPSLICER_BACKEND": CONTESTANTS[name][1] or "auto"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(taken: dict[str, list[dict[str, Any]]]) -> str:
    rows = [["", *CASES, "memory"]]
    base: dict[str, float] = {}
    for name, samples in taken.items():
        cells = []
        for case in CASES:
            first, again = (statistics.median(one[case][which] for one in samples) for which in ("first", "again"))
            ratio = first / base.setdefault(case, first)
            cells.append(f"{show(first)}, {ratio:.{1 if ratio >= 9.95 else 2}f}x; {show(again)}")
        grown = max(one[next(iter(CASES))]["grown"] for one in samples)
        rows.append([name, *cells, f"{grown / 1e6:,.0f} MB"])
    return grid(rows).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--samples", type=int, default=3, help="fresh processes for each contestant")
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="keep the files here")
    parser.add_argument("--only", action="append", choices=CONTESTANTS, help="these contestants, and no page")
    parser.add_argument("--child", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device")
    if options.child:
        child(options.child, options.folder)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        make(folder, options.layers)
        taken: dict[str, list[Any]] = {name: [] for name in options.only or CONTESTANTS}
        for turn, (name, found) in itertools.product(range(options.samples), taken.items()):
            found.append(sample(name, folder))
            seconds = ", ".join(f"{show(one['first'])} {show(one['again'])}" for one in found[-1].values())
            print(turn, name, seconds, f"{found[-1]['model, all of it']['grown'] / 1e6:.0f} MB", file=sys.stderr)
        for case in CASES:
            digests = {one[case]["digest"] for found in taken.values() for one in found}
            if len(digests) > 1:
                raise SystemExit(f"the contestants came to different bytes at {case}")
        nbytes = (folder / "model.pth").stat().st_size
    shown = table(taken)
    if options.only:
        print(shown)
        return
    facts = machine()
    about = [
        f"{torch.cuda.get_device_name(GPU)}, {facts['cores']} cores of {facts['cpu']}, {facts['system']}",
        f"Python {facts['python']}, torch {facts['torch']}, safetensors {facts['safetensors']}",
        f"{time.strftime('%Y-%m-%d')}. {options.samples} fresh processes each, in turn; medians.",
    ]
    parts = [
        "# Onto a GPU",
        "Made by `python benchmarks/gpu.py`; do not edit. How: see that file.",
        "; ".join(about),
        ABOUT.format(layers=options.layers, size=nbytes / 1e9),
        shown,
    ]
    PAGE.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
