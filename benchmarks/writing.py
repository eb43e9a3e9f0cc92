"""Writing, converting and listing in the shell, beside the other ways: docs/performance/writing.md out of one run.

    python benchmarks/writing.py [--samples 5] [--cases NAME,...]

Each sample is a fresh process; the contestants of a case take turns. Before the clock of one that writes, its packages are
imported, the source has been read once, what was written before is deleted and the disk idle (sync), and memory has been
touched as in sample.py. The clock stops when the file is on the disk (fsync). Then every tensor of the file is compared with
the source. Of a command of the shell the whole process is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from make_files import CACHE, make
from report import ROOT, grid, show
from run import machine
from safetensors.torch import load_file, safe_open, save_file
from sample import read_once, touch_memory

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = ROOT / "docs" / "performance" / "writing.md"
MODEL, TWIN, MANY = (str(CACHE / name) for name in ("model.pth", "model.safetensors", "many.pth"))
LAYERS = "model.layers.1*"

# ---------------------------------------------------------------- contestants: (before the clock, what is timed)


def synced(path: str) -> None:
    with Path(path).open("rb") as file:
        os.fsync(file.fileno())


def convert(**options: Any) -> Callable[[str, str, Any], None]:
    def run(source: str, target: str, _ready: Any) -> None:
        import zipslicer

        zipslicer.convert(source, target, **options)

    return run


def select(source: str, target: str, _ready: Any) -> None:
    import zipslicer

    zipslicer.save(zipslicer.load(source).select(LAYERS), target)


def save(_source: str, target: str, ready: Any) -> None:
    import zipslicer

    zipslicer.save(ready, target)


def torch_to_safetensors(**options: Any) -> Callable[[str, str, Any], None]:
    def run(source: str, target: str, _ready: Any) -> None:
        save_file(torch.load(source, weights_only=True, **options), target)
        synced(target)

    return run


def safetensors_to_torch(source: str, target: str, _ready: Any) -> None:
    torch.save(load_file(source), target)
    synced(target)


def torch_select(source: str, target: str, _ready: Any) -> None:
    loaded = torch.load(source, weights_only=True, mmap=True)
    torch.save({name: tensor.clone() for name, tensor in loaded.items() if name.startswith(LAYERS[:-1])}, target)
    synced(target)


def torch_save(_source: str, target: str, ready: Any) -> None:
    torch.save(ready, target)
    synced(target)


def torch_cast(source: str, target: str, _ready: Any) -> None:
    loaded = torch.load(source, weights_only=True, mmap=True)
    save_file({name: tensor.to(torch.float16) for name, tensor in loaded.items()}, target)
    synced(target)


NATIVE, PURE = "zipslicer, native", "zipslicer, pure Python"

# Case -> (what it is, source, suffix of the target, contestants).
CASES: dict[str, tuple[str, str, str, dict[str, Callable[[str, str, Any], None]]]] = {
    "to_safetensors": (
        "2.3 GB of torch.save to safetensors", MODEL, ".safetensors",
        {
            NATIVE: convert(), PURE: convert(),
            "torch.load, save_file, fsync": torch_to_safetensors(),
            "torch.load(mmap=True), save_file, fsync": torch_to_safetensors(mmap=True),
        },
    ),
    "to_archive": (
        "and back", TWIN, ".pth",
        {NATIVE: convert(), PURE: convert(), "load_file, torch.save, fsync": safetensors_to_torch},
    ),
    "select": (
        "11 of its 40 layers to a file of torch.save", MODEL, ".pth",
        {NATIVE: select, PURE: select, "torch.load(mmap=True), clone, torch.save, fsync": torch_select},
    ),
    "save": (
        "2.3 GB of tensors in memory to a file of torch.save", MODEL, ".pth",
        {NATIVE: save, PURE: save, "torch.save, fsync": torch_save},
    ),
    "cast": (
        "2.3 GB of bfloat16 and float16 to float16 in safetensors", MODEL, ".safetensors",
        {
            NATIVE: convert(dtype="float16"), PURE: convert(dtype="float16"),
            "torch.load(mmap=True), to, save_file, fsync": torch_cast,
        },
    ),
}  # fmt: skip

LIST = """
import sys, torch
for name, tensor in torch.load(sys.argv[1], weights_only=True{}).items():
    print(name, tensor.dtype, list(tensor.shape))
"""
COMMANDS: dict[str, list[str]] = {
    NATIVE: [str(Path(sys.executable).with_name("zipslicer")), "ls", MANY],
    PURE: [str(Path(sys.executable).with_name("zipslicer")), "ls", MANY],
    "python, torch.load": [sys.executable, "-c", LIST.format(""), MANY],
    "python, torch.load(mmap=True)": [sys.executable, "-c", LIST.format(", mmap=True"), MANY],
}

# ---------------------------------------------------------------- a sample


def peak() -> int:
    """Of the resident set, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) << 10


def sampled(case: str, contestant: str, check: bool) -> dict[str, float]:
    """In a process of its own."""
    _, source, suffix, contestants = CASES[case]
    target = str(CACHE / f"written{suffix}")
    Path(target).unlink(missing_ok=True)
    if contestant in (NATIVE, PURE):
        import zipslicer

        assert contestant == (NATIVE if zipslicer.backend() == "native" else PURE)
        assert callable(zipslicer.convert)  # which imports it
        assert callable(zipslicer.save)
    ready = torch.load(source, weights_only=True) if case == "save" else None
    read_once(source)
    touch_memory(3 << 30)
    os.sync()
    Path("/proc/self/clear_refs").write_text("5")
    before, start = peak(), time.perf_counter()
    contestants[contestant](source, target, ready)
    seconds, growth = time.perf_counter() - start, peak() - before
    if check:
        compare(case, source, target)
    Path(target).unlink()
    return {"seconds": seconds, "growth": growth}


def compare(case: str, source: str, target: str) -> None:
    """Every tensor that was written, with the one it comes from."""
    wanted = load_file(source) if source.endswith(".safetensors") else torch.load(source, weights_only=True, mmap=True)
    if case == "select":
        wanted = {name: tensor for name, tensor in wanted.items() if name.startswith(LAYERS[:-1])}
    if target.endswith(".safetensors"):
        with safe_open(target, "pt") as file:
            got = {name: file.get_tensor(name) for name in file.offset_keys()}
    else:
        got = torch.load(target, weights_only=True, mmap=True)
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        cast = tensor.to(torch.float16) if case == "cast" else tensor
        assert got[name].dtype == cast.dtype, name
        assert torch.equal(got[name], cast), name


def environment(contestant: str) -> dict[str, str]:
    return {**os.environ, "ZIPSLICER_BACKEND": "pure" if contestant == PURE else "native"}


def started(case: str, contestant: str, check: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", case, contestant, *(["--check"] if check else [])]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment(contestant))
    return dict(json.loads(done.stdout))


def listed(contestant: str) -> dict[str, float]:
    """The whole of a command."""
    start = time.perf_counter()
    done = subprocess.run(COMMANDS[contestant], check=True, capture_output=True, env=environment(contestant))
    seconds = time.perf_counter() - start
    assert done.stdout.count(b"\n") >= 10_000
    return {"seconds": seconds, "growth": 0.0}


# ---------------------------------------------------------------- the page


def row(samples: list[dict[str, float]], best: float) -> tuple[str, str, str]:
    seconds = [sample["seconds"] for sample in samples]
    middle = statistics.median(seconds)
    grown = statistics.median(sample["growth"] for sample in samples)
    return (
        f"{show(middle)}, {middle / best:.2f}x",
        f"{show(min(seconds))} to {show(max(seconds))}",
        f"{grown / 1e6:.0f} MB",
    )


TITLE = """# Writing, converting, listing in the shell

Made by `python benchmarks/writing.py`; do not edit. How: see that file."""

TERMS = """A file is written when it is on the disk. zipslicer's appears at its path only then, by a rename; the others write
to the path itself, and what was there before is lost if they fail. Memory is what the resident set has grown by."""


def page(found: dict[str, dict[str, list[dict[str, float]]]], samples: int) -> str:
    facts = machine()
    about = [
        f"{facts['cores']} cores of {facts['cpu']}, {facts['system']}, {facts['filesystem']}",
        f"Python {facts['python']}, torch {facts['torch']}, safetensors {facts['safetensors']}",
        f"{time.strftime('%Y-%m-%d')}. {samples} fresh processes each, in turn; medians.",
    ]
    parts = [TITLE, "; ".join(about), TERMS]
    for case, by_name in found.items():
        title = "list 10,000 tensors, from the shell" if case == "ls" else CASES[case][0]
        best = statistics.median(sample["seconds"] for sample in by_name[NATIVE])
        rows = [[title, "median", "range", "memory"]]
        for name, taken in by_name.items():
            cells = row(taken, best)
            rows.append([name, *cells[:2], "-" if case == "ls" else cells[2]])
        parts.append(grid(rows).strip())
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--cases", default=",".join([*CASES, "ls"]))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        json.dump(sampled(*options.one, options.check), sys.stdout)
        return 0
    make()
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for case in options.cases.split(","):
        names = COMMANDS if case == "ls" else CASES[case][3]
        found[case] = {name: [] for name in names}
        for number in range(options.samples):
            for name in names:
                found[case][name].append(listed(name) if case == "ls" else started(case, name, check=not number))
                print(case, name, found[case][name][-1], flush=True)
    PAGE.write_text(page(found, options.samples))
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
