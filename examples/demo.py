"""What zipslicer is for, on a training checkpoint that this script makes with torch.save: time and memory of each step.

    make demo                                   or: python examples/demo.py [--keep checkpoint.pth]

The checkpoint is a language model of 110 million parameters in fp16 with the state of its optimizer beside it. Each
step runs in a fresh process, once with each library; imports are not in the time, and the file is in the page cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

HIDDEN, HEADS, LAYERS, VOCABULARY = 768, 12, 12, 32_000
LAYER = "layers.5."
EMBEDDING = "embedding.weight"
ROWS = slice(1000, 1500)


# ---------------------------------------------------------------- the checkpoint, as a trainer would write it


def make_checkpoint(path: Path) -> None:
    import torch
    from torch import nn

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
            self.layers = nn.ModuleList(
                nn.TransformerEncoderLayer(HIDDEN, HEADS, 4 * HIDDEN, batch_first=True) for _ in range(LAYERS)
            )
            self.norm = nn.LayerNorm(HIDDEN)

    torch.manual_seed(0)
    model = Transformer().half()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for parameter in model.parameters():  # one step of training, with gradients out of the air
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": 1,
        "config": {"hidden": HIDDEN, "heads": HEADS, "layers": LAYERS, "vocabulary": VOCABULARY},
    }
    torch.save(checkpoint, path)


# ---------------------------------------------------------------- the steps, with each library


def count(tree: Any) -> int:
    """The number of tensors anywhere in what torch.load gave."""
    if isinstance(tree, dict):
        return sum(count(value) for value in tree.values())
    if isinstance(tree, (list, tuple)):
        return sum(count(value) for value in tree)
    return int(hasattr(tree, "untyped_storage"))


def own(tree: Any) -> Any:
    """The same tree, with every tensor copied out of the mapped file."""
    if isinstance(tree, dict):
        return {key: own(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [own(value) for value in tree]
    return tree.clone() if hasattr(tree, "untyped_storage") else tree


def with_zipslicer() -> dict[str, Callable[[str], Any]]:
    import torch  # noqa: F401 not in the time of the steps, for nobody

    import zipslicer

    def layer(path: str) -> Any:
        model = zipslicer.load(path)["model"]
        return model.get_tensors([name for name in model if name.startswith(LAYER)])

    return {
        "list": lambda path: len(zipslicer.open(path).tensors),
        "layer": layer,
        "rows": lambda path: zipslicer.load(path)["model"].get_slice(EMBEDDING)[ROWS],
        "all": lambda path: zipslicer.load(path).materialize(),
    }


def with_torch(**options: Any) -> dict[str, Callable[[str], Any]]:
    import torch

    def load(path: str) -> Any:
        return torch.load(path, weights_only=True, **options)

    return {
        "list": lambda path: count(load(path)),
        "layer": lambda path: {
            name: tensor.clone() for name, tensor in load(path)["model"].items() if name.startswith(LAYER)
        },
        "rows": lambda path: load(path)["model"][EMBEDDING][ROWS].clone(),
        "all": lambda path: own(load(path)) if options else load(path),
    }


LIBRARIES: dict[str, Callable[[], dict[str, Callable[[str], Any]]]] = {
    "zipslicer": with_zipslicer,
    "torch.load": with_torch,
    "torch.load(mmap=True)": lambda: with_torch(mmap=True),
}

STEPS = {
    "list": "list every tensor",
    "layer": "read one layer",
    "rows": "read 500 rows of the embedding",
    "all": "read everything",
}


# ---------------------------------------------------------------- measuring one step, in a process of its own


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def run_step(library: str, step: str, path: str) -> dict[str, Any]:
    steps = LIBRARIES[library]()
    with tempfile.TemporaryDirectory() as folder:  # a rehearsal, for what is imported late
        import torch

        small = str(Path(folder) / "small.pth")
        torch.save({"model": {EMBEDDING: torch.zeros(1600, 2), LAYER + "a": torch.zeros(2)}}, small)
        steps[step](small)
    before = resident("VmRSS")
    if before:
        Path("/proc/self/clear_refs").write_text("5")  # the peak (VmHWM) starts anew
    start = time.perf_counter()
    result = steps[step](path)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "growth": resident("VmHWM") - before, "answer": fingerprint(result)}


def fingerprint(result: Any) -> Any:
    """Something to compare: a number, or names and sums."""
    if isinstance(result, int):
        return result
    if hasattr(result, "double"):
        return float(result.double().sum())
    if isinstance(result, dict) and "optimizer" in result:
        return count(result)
    return {name: float(tensor.double().sum()) for name, tensor in result.items()}


# ---------------------------------------------------------------- the whole demonstration


def seconds_as_text(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def bytes_as_text(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB" if nbytes < 1e8 else f"{nbytes / 1e6:,.0f} MB"


def show(path: Path) -> None:
    import zipslicer

    print(f"\nzipslicer {zipslicer.__version__}, backend {zipslicer.backend()}: opening it reads no tensor")
    checkpoint = zipslicer.load(path)
    print(f"  {path.name}: {bytes_as_text(path.stat().st_size)}, with {', '.join(checkpoint)}")
    model = checkpoint["model"]
    for name in list(model)[:4]:
        meta = model.get_meta(name)
        print(f"    model / {name:36} {meta.dtype_name:8} {tuple(meta.shape)!s:14}")
    print(f"    ... and {len(zipslicer.open(path).tensors) - 4} more tensors\n")


def measure(path: Path) -> None:
    width = 24
    print(f"{'time, peak memory':32}" + "".join(f"{library:>{width}}" for library in LIBRARIES))
    for step, title in STEPS.items():
        cells, answers = [], []
        for library in LIBRARIES:
            with path.open("rb", buffering=0) as file:  # into the page cache, for everybody
                while file.read(1 << 24):
                    pass
            command = [sys.executable, __file__, "--step", library, step, str(path)]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            answers.append(found["answer"])
            cells.append(f"{seconds_as_text(found['seconds'])}, {bytes_as_text(found['growth'])}")
        print(f"{title:32}" + "".join(f"{cell:>{width}}" for cell in cells), flush=True)
        if any(answer != answers[0] for answer in answers):
            raise SystemExit(f"the answers differ at {title!r}: {answers}")
    print(
        "\nThe same tensors from all three, in memory of their own; torch.load(mmap=True) therefore clones what it shows."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, metavar="FILE", help="write the checkpoint there and leave it")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)  # these two are for the fresh processes
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make_checkpoint(options.make)
        return 0
    if options.step:
        print(json.dumps(run_step(*options.step)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = options.keep or Path(folder) / "checkpoint.pth"
        start = time.perf_counter()
        print("making a checkpoint with torch.save ...", end=" ", flush=True)
        subprocess.run([sys.executable, __file__, "--make", str(path)], check=True)
        print(f"{time.perf_counter() - start:.0f} s")
        show(path)
        measure(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
