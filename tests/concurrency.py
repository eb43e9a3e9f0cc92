"""Concurrency: many threads and processes read one LazyStateDict at random, and every byte is compared.

    python concurrency.py FOLDER READS [--processes N] [--threads N]

Prints how many reads were made and how many were wrong, as JSON.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import random
import threading
from pathlib import Path
from typing import Any

import torch

import zipslicer

ROWS, COLUMNS = 3000, 16
SMALL = 200


class Rows(torch.utils.data.Dataset[Any]):
    """What a DataLoader's workers read through one open file."""

    def __init__(self, sd: Any) -> None:
        self.part = sd
        self.count = 20

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Any:
        return self.part.get_slice("w")[i].clone() + self.part[f"b{i}"]


def save(path: Path) -> None:
    """Every element says where it is, so that a wrong one is known without the file."""
    tree = {f"s{i}": torch.arange(i, i + 9) for i in range(SMALL)}
    tree["large"] = torch.arange(ROWS * COLUMNS, dtype=torch.int64).view(ROWS, COLUMNS)
    torch.save(tree, path)


def read(sd: Any, dice: random.Random) -> bool:
    """One read of a random kind; whether it was right."""
    kind = dice.random()
    if kind < 0.6:
        i = dice.randrange(SMALL)
        return bool(sd[f"s{i}"].tolist() == list(range(i, i + 9)))
    row = dice.randrange(ROWS - 3)
    part = sd.get_slice("large")
    if kind < 0.9:
        got = part[row : row + 2]
        return bool(got.flatten().tolist() == list(range(row * COLUMNS, (row + 2) * COLUMNS)))
    column = dice.randrange(COLUMNS)
    got = part[row : row + 3, column]
    return bool(got.tolist() == [(row + i) * COLUMNS + column for i in range(3)])


def many(sd: Any, seed: int, reads: int) -> int:
    """How many were wrong."""
    dice = random.Random(seed)
    return sum(not read(sd, dice) for _ in range(reads))


def on_threads(sd: Any, threads: int, reads: int, seed: int = 0) -> int:
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(lambda i: many(sd, seed + i, reads // threads), range(threads)))


def of_a_process(sd: Any, seed: int, threads: int, reads: int, wrong: Any) -> None:
    torch.set_num_threads(1)
    found = on_threads(sd, threads, reads, seed)
    with wrong.get_lock():
        wrong.value += found + 1_000_000_000  # of those who came to their end


def on_processes(sd: Any, method: str, processes: int, threads: int, reads: int) -> int:
    context: Any = multiprocessing.get_context(method)
    wrong = context.Value("q", 0)
    started = [
        context.Process(target=of_a_process, args=(sd, 1000 * i, threads, reads // processes, wrong))
        for i in range(processes)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    ended, found = divmod(wrong.value, 1_000_000_000)
    assert ended == processes, f"{processes - ended} processes died"
    return int(found)


def in_a_pool(sd: Any, processes: int, reads: int) -> int:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        return sum(pool.map(many, [sd] * 20, range(20), [reads // 20] * 20))


def closing(path: Path, rounds: int) -> int:
    """Close while others read: they get what they wanted, or are told so."""
    wrong = 0

    def work(sd: Any, seed: int, found: list[bool]) -> None:
        dice = random.Random(seed)
        try:
            while True:
                found.append(read(sd, dice))
        except (ValueError, OSError):
            return

    for i in range(rounds):
        sd, found = zipslicer.load(path), list[bool]()
        workers = [threading.Thread(target=work, args=(sd, 31 * i + j, found)) for j in range(8)]
        for worker in workers:
            worker.start()
        while len(found) < 20:
            pass
        # Another file takes the number of the descriptor, if it is free too early.
        sd.close()
        others = [os.open("/dev/zero", os.O_RDONLY) for _ in range(3)]
        for worker in workers:
            worker.join()
        for other in others:
            os.close(other)
        wrong += found.count(False)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("reads", type=int)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--threads", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = options.folder / "m.pth"
    save(path)
    part = options.reads // 5
    with zipslicer.load(path) as sd:
        wrong = {
            "threads": on_threads(sd, options.threads, part),
            "fork": on_processes(sd, "fork", options.processes, 4, part),
            "spawn": on_processes(sd, "spawn", options.processes, 4, part),
            "pool": in_a_pool(sd, 2, part),
            "after": on_threads(sd, options.threads, part, 77),
        }
    wrong["closing"] = closing(path, max(3, options.reads // 20_000))
    print(json.dumps(wrong))


if __name__ == "__main__":
    main()
