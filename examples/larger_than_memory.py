"""Write, edit, convert and read a checkpoint in less memory than it has bytes.

    python examples/larger_than_memory.py [--megabytes 512] [--folder FOLDER]

Needs torch. The files go to a temporary folder, or to the one that is named; the peak of the process's memory is shown at
the end, beside the size of the checkpoint.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import zipslicer

if TYPE_CHECKING:
    from collections.abc import Iterator

WIDTH, LAYERS = 1024, 32


def rows_of(layer: int, rows: int) -> Iterator[torch.Tensor]:
    """A matrix of rows x WIDTH, 4096 rows at a time: as a simulation, a merge or a dequantizer would make it."""
    generator = torch.Generator().manual_seed(layer)
    for start in range(0, rows, 4096):
        yield torch.randn(min(4096, rows - start), WIDTH, generator=generator).bfloat16()


def resident() -> int:
    """The peak of this process's memory in bytes; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), 0)


def run(folder: Path, megabytes: int) -> None:
    source, edited, converted = folder / "model.ckpt", folder / "edited.ckpt", folder / "model.safetensors"
    rows = megabytes * 1_000_000 // (LAYERS * WIDTH * 2)
    before = resident()

    with zipslicer.Writer(source) as w:
        w["step"] = 1000
        model = w.group("model")
        for layer in range(LAYERS):
            model.write_chunks(f"layer{layer}.weight", rows_of(layer, rows), dtype=torch.bfloat16, shape=(rows, WIDTH))
    print(f"wrote     {source.stat().st_size / 1e6:.0f} MB, a chunk at a time")

    with zipslicer.load(source) as sd:
        sd["step"] = 1001
        sd["model"].rename(lambda name: f"backbone.{name}")
        del sd["model"]["backbone.layer3.weight"]
        zipslicer.save(sd, edited)
    print(f"edited    {edited.stat().st_size / 1e6:.0f} MB, without reading a tensor")

    found = zipslicer.convert(edited, converted, dtype="float16", verify=True)
    print(f"converted {found.tensors} tensors to float16, and compared them; left out: {', '.join(found.left_out)}")

    with zipslicer.load(source) as sd:
        some = sd["model"].get_slice("layer2.weight")[rows // 2 : rows // 2 + 2, :4]
        total = sum(float(tensor.float().norm()) for _, tensor in sd["model"].stream(budget_bytes=64 << 20))
    print(f"read      two rows: {some.tolist()}")
    print(f"streamed  all of it: the norms add up to {total:.1f}")
    if before:
        print(f"memory    grew by {(resident() - before) / 1e6:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.folder is not None:
        run(options.folder, options.megabytes)
        return
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), options.megabytes)


if __name__ == "__main__":
    main()
