"""Peak memory of loaders that call torch.load, with and without zipslicer in its place: the tables of docs/recipes.md.

    pip install ".[torch]" transformers accelerate
    python benchmarks/dropins.py [--only merge] [--folder FOLDER]

Makes a random Llama of 84 million parameters (336 MB) as four .bin shards in a temporary folder. Each line is a fresh
process, whose RssAnon and RssFile its parent reads from /proc every millisecond; the figures are the most that was seen,
less what there was before the load (imports, and the tensors that are loaded into). All ways must give equal weights.
Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SHARDS = 4
INDEX = "pytorch_model.bin.index.json"
MB = 1 << 20
WAYS = ("torch.load", "patched", "patched, lazy")


def config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16, vocab_size=16_000
    )  # fmt: skip


def model() -> Any:
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(config())


def make(folder: Path) -> None:
    """A folder as save_pretrained used to write it, and the same weights as one file."""
    import torch

    state = model().state_dict()
    torch.save(state, folder / "whole.pth")
    names = list(state)
    size = -(-len(names) // SHARDS)
    weight_map = {}
    for i in range(SHARDS):
        shard = f"pytorch_model-{i + 1:05d}-of-{SHARDS:05d}.bin"
        part = {name: state[name] for name in names[i * size : (i + 1) * size]}
        torch.save(part, folder / shard)
        weight_map.update(dict.fromkeys(part, shard))
    total = sum(t.numel() * t.element_size() for t in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    config().save_pretrained(folder)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.bin"))


# ---------------------------------------------------------------- loaders: what there is before, then what is measured


def transformers_as_saved(folder: Path) -> Callable[[], Any]:
    """With a first use of each weight: the library maps the files, and a page that is not used is not there."""
    from transformers import LlamaForCausalLM

    def load() -> Any:
        state = LlamaForCausalLM.from_pretrained(folder, use_safetensors=False, dtype="float32").state_dict()
        for tensor in state.values():
            tensor.sum()
        return state

    return load


def transformers_cast(folder: Path) -> Callable[[], Any]:
    from transformers import LlamaForCausalLM

    return lambda: LlamaForCausalLM.from_pretrained(folder, use_safetensors=False, dtype="bfloat16").state_dict()


def accelerate_into_model(folder: Path) -> Callable[[], Any]:
    from accelerate import load_checkpoint_in_model

    made = model()

    def load() -> Any:
        load_checkpoint_in_model(made, str(folder))
        return made.state_dict()

    return load


def accelerate_in_place_of(folder: Path) -> Callable[[], Any]:
    """With a device_map the tensors of a file take the places of those of the model."""
    from accelerate import load_checkpoint_in_model

    made = model()

    def load() -> Any:
        load_checkpoint_in_model(made, str(folder), device_map={"": "cpu"})
        return made.state_dict()

    return load


def accelerate_cast(folder: Path) -> Callable[[], Any]:
    import torch
    from accelerate import init_empty_weights, load_checkpoint_in_model

    with init_empty_weights():
        made = model().to(torch.bfloat16)

    def load() -> Any:
        load_checkpoint_in_model(made, str(folder), device_map={"": "cpu"}, dtype=torch.bfloat16)
        return made.state_dict()

    return load


def accelerate_offload(folder: Path) -> Callable[[], Any]:
    """Weights go to files, one by one: nothing needs to be held."""
    from accelerate import init_empty_weights, load_checkpoint_in_model

    with init_empty_weights():
        made = model()
    there = folder / f"offload-{os.getpid()}"

    def load() -> Any:
        load_checkpoint_in_model(made, str(folder), device_map={"": "disk"}, offload_folder=str(there))
        return {path.name: zlib.crc32(path.read_bytes()) for path in sorted(there.glob("*.dat"))}

    return load


def destination() -> dict[str, Any]:
    """Parameters that stand already and are copied into, as a serving engine has them."""
    return {name: tensor.clone() for name, tensor in model().state_dict().items()}


def iterator(folder: Path) -> Callable[[], Any]:
    """As vLLM's pt_weights_iterator: a shard is loaded, its tensors are handed on one by one."""
    import torch

    into = destination()

    def weights() -> Iterator[tuple[str, Any]]:
        for shard in shards(folder):
            state = torch.load(shard, map_location="cpu", weights_only=True)
            yield from state.items()
            del state

    def load() -> Any:
        for name, tensor in weights():
            into[name].copy_(tensor)
        return into

    return load


def merge(folder: Path) -> Callable[[], Any]:
    """All shards in one dict first, then into the parameters."""
    import torch

    into = destination()

    def load() -> Any:
        merged: dict[str, Any] = {}
        for shard in shards(folder):
            merged.update(torch.load(shard, map_location="cpu", weights_only=True))
        for name, tensor in into.items():
            tensor.copy_(merged[name])
        return into

    return load


def load_state_dict(folder: Path) -> Callable[[], Any]:
    import torch

    made = model()

    def load() -> Any:
        made.load_state_dict(torch.load(folder / "whole.pth", weights_only=True))
        return made.state_dict()

    return load


LOADERS: dict[str, Callable[[Path], Callable[[], Any]]] = {
    made.__name__: made
    for made in (
        transformers_as_saved, transformers_cast, accelerate_into_model, accelerate_in_place_of, accelerate_cast,
        accelerate_offload, iterator, merge, load_state_dict,
    )
}  # fmt: skip


# ---------------------------------------------------------------- one process: prepare, say so, wait, load


def child(name: str, way: str, folder: Path) -> None:
    import torch

    import zipslicer

    torch.set_num_threads(1)
    load = LOADERS[name](folder)
    patch: Any = contextlib.nullcontext()
    if way != "torch.load":
        patch = zipslicer.patch_torch_load(lazy=way.endswith("lazy"), fallback=False)
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    with patch:
        made = load()
    seconds = time.perf_counter() - start
    print(f"loaded {seconds:.3f}", flush=True)
    sys.stdin.readline()
    print("equal", fingerprint(made), flush=True)


def fingerprint(made: dict[str, Any]) -> int:
    import torch

    crc = 0
    for name in sorted(made):
        value = made[name]
        data = value.detach().contiguous().view(torch.uint8).numpy() if hasattr(value, "numel") else str(value).encode()
        crc = zlib.crc32(data, zlib.crc32(name.encode(), crc))
    return crc


# ---------------------------------------------------------------- the parent: sample


def rss(pid: int) -> tuple[int, int]:
    """(RssAnon, RssFile) in bytes."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("Rss"):
            name, _, value = line.partition(":")
            found[name] = int(value.split()[0]) << 10
    return found["RssAnon"], found["RssFile"]


def measure(name: str, way: str, folder: Path) -> tuple[list[int], float, int]:
    """-> (peaks of anonymous, of file, of both), seconds, fingerprint."""
    command = [sys.executable, __file__, "--child", name, way, str(folder)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        _expect(process, "ready")
        before = rss(process.pid)
        peaks = [0, 0, 0]
        process.stdin.write("go\n")
        process.stdin.flush()
        os.set_blocking(process.stdout.fileno(), False)
        line = ""
        while not line.endswith("\n"):
            if process.poll() is not None:
                raise SystemExit(f"{name}, {way}: the process ended")
            anonymous, mapped = (now - then for now, then in zip(rss(process.pid), before))
            peaks = [max(pair) for pair in zip(peaks, (anonymous, mapped, anonymous + mapped))]
            line += process.stdout.readline() or ""
            time.sleep(0.001)
        os.set_blocking(process.stdout.fileno(), True)
        seconds = float(line.split()[1])
        process.stdin.write("on\n")
        process.stdin.flush()
        return peaks, seconds, int(_expect(process, "equal").split()[1])


def _expect(process: Any, word: str) -> str:
    line = str(process.stdout.readline())
    if not line.startswith(word):
        raise SystemExit(f"{process.args}: {line!r}")
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", action="append", choices=LOADERS, help="these loaders, and no others")
    parser.add_argument("--folder", type=Path, help="keep the files here")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], arguments.child[1], Path(arguments.child[2]))
        return
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / INDEX).exists():
            # In a process of its own, so that this one stays small.
            subprocess.run(
                [sys.executable, "-c", f"import dropins, pathlib; dropins.make(pathlib.Path({str(folder)!r}))"],
                check=True,
                cwd=Path(__file__).parent,
            )
        print("| loader | torch.load is | RssAnon, MB | RssFile, MB | both, MB | s |\n|---|---|---|---|---|---|")
        for name in arguments.only or LOADERS:
            fingerprints = set()
            for way in WAYS:
                peaks, seconds, crc = measure(name, way, folder)
                fingerprints.add(crc)
                cells = " | ".join(f"{peak / MB:.0f}" for peak in peaks)
                print(f"| {name} | {way} | {cells} | {seconds:.2f} |", flush=True)
            if len(fingerprints) > 1:
                raise SystemExit(f"{name}: the weights differ")


if __name__ == "__main__":
    main()
