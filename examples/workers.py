"""One checkpoint, many processes: workers of a DataLoader, and of Ray where it is installed.

    python examples/workers.py [--rows 100000] [--workers 2]

An open checkpoint pickles by its path (or URL) and a checksum of its directory: what travels is some hundred bytes, each
worker opens the file again and reads what it is asked for, and no tensor is copied into a queue or an object store. Forked
workers share the descriptor that is open already.
"""

from __future__ import annotations

import argparse
import importlib.util
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch

import zipslicer

WIDTH = 64


class Rows(torch.utils.data.Dataset[Any]):
    """Rows of a matrix that need not fit in memory, with their labels."""

    def __init__(self, path: Path) -> None:
        self.checkpoint = zipslicer.load(path)
        self.labels = self.checkpoint["labels"]  # small: read once, here

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.checkpoint.get_slice("features")[row], self.labels[row]

    def __getitems__(self, rows: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """A batch at once: where its rows follow each other, they are one read."""
        if rows == list(range(rows[0], rows[-1] + 1)):
            return list(zip(self.checkpoint.get_slice("features")[rows[0] : rows[-1] + 1], self.labels[rows]))
        return [self[row] for row in rows]


def by_data_loader(path: Path, workers: int, context: str) -> float:
    loader = torch.utils.data.DataLoader(
        Rows(path), batch_size=256, num_workers=workers, multiprocessing_context=context
    )
    return sum(float(features.sum(dtype=torch.float64)) for features, _ in loader)


def by_ray(path: Path, workers: int) -> float:
    import ray

    ray.init(num_cpus=workers, include_dashboard=False, logging_level="error")

    @ray.remote
    def total(checkpoint: zipslicer.LazyStateDict, start: int, end: int) -> float:
        return float(checkpoint.get_slice("features")[start:end].sum(dtype=torch.float64))

    checkpoint = zipslicer.load(path)
    rows = checkpoint.get_meta("features").shape[0]
    step = -(-rows // workers)
    try:
        return sum(ray.get([total.remote(checkpoint, start, start + step) for start in range(0, rows, step)]))
    finally:
        ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.pth"
        features = torch.randint(-8, 8, (options.rows, WIDTH)).float()  # whose sums are exact, in any order
        torch.save({"features": features, "labels": torch.arange(options.rows)}, path)
        wanted = float(features.sum(dtype=torch.float64))
        print(f"a checkpoint of {path.stat().st_size:,} bytes travels as {len(pickle.dumps(zipslicer.load(path))):,}")
        for context in ("fork", "spawn"):
            found = by_data_loader(path, options.workers, context)
            print(f"DataLoader, {options.workers} workers by {context}: {'right' if found == wanted else 'WRONG'}")
        if importlib.util.find_spec("ray") is None:
            print("Ray is not installed")
        else:
            print(f"Ray: {'right' if by_ray(path, options.workers) == wanted else 'WRONG'}")


if __name__ == "__main__":
    main()
