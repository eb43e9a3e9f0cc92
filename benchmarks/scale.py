"""How long many ranks on many nodes take to load one checkpoint: a simulator, and runs that it is held to.

    python benchmarks/scale.py                          the runs, and docs/scale.md with what came of them
    python benchmarks/scale.py simulate --nodes 64 --ranks 8 --gb 140 --storage 10e9 --link 3e9 ...

A run is real: a server on loopback that has a bandwidth, a latency, a pace for each connection and a rate of requests, and
processes that open a checkpoint there and read their parts of it. The two numbers that are of this machine (what opening
costs, and how fast one process takes bytes in) come from runs without limits; all other runs are predicted, and compared.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import heapq
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PART = 8 << 20  # bytes of a request, as zipslicer.remote has it
REQUESTS = 16  # of a process at a time
ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "scale.md"
BEGIN, END = "<!-- made by benchmarks/scale.py -->", "<!-- until here -->"
LAYERS, LAYER_NBYTES = 24, 16 << 20


@dataclasses.dataclass(frozen=True)
class System:
    """What stands between the bytes and the ranks. Bytes a second, seconds, requests a second; 0 for no limit.

    Attributes:
        nodes, ranks: how many nodes, and ranks on each.
        nbytes: that each rank reads.
        storage: bandwidth of the storage, all together.
        link: of the network of each node.
        connection: of each connection.
        latency: until the first byte of an answer.
        rate: requests that the storage answers in a second.
        opening: seconds that a rank takes before it asks for its tensors, the latency of its two requests not counted, which
            are made side by side.
        intake: bytes a second that one rank takes in; `cores` of a node can do so at a time.
    """

    nodes: int = 1
    ranks: int = 1
    nbytes: int = 0
    storage: float = 0
    link: float = 0
    connection: float = 0
    latency: float = 0
    rate: float = 0
    opening: float = 0
    intake: float = 0
    cores: int = 0


def simulate(system: System) -> float:
    """Seconds until the last rank has its bytes.

    Ranks are alike, so that each limit is shared evenly by those who are held up by it: what is simulated is the course of
    their requests. A rank keeps up to REQUESTS of them under way; each waits for its turn at the storage (`rate`), for its
    first byte (`latency`), and then moves at the least of its shares.
    """
    total = system.nodes * system.ranks
    sizes = [PART] * (system.nbytes // PART) + ([system.nbytes % PART] if system.nbytes % PART else [])
    begin = system.opening + system.latency
    turn, gap = begin, 1 / system.rate if system.rate else 0.0
    if system.rate:
        turn = system.opening + 2 * total * gap + system.latency
    # Ranks in step: the k-th request of all of them is one bundle of `total` transfers, which share whatever is shared.
    waiting = list(reversed(sizes))
    starting: list[tuple[float, int]] = []  # (when the first byte comes, bytes)
    moving: list[
        tuple[float, float]
    ] = []  # (bytes that are left of each bundle's transfer, how fast it is beside others)
    now, begun = begin, 0

    def ask() -> None:
        nonlocal turn
        while waiting and len(starting) + len(moving) < REQUESTS:
            turn = max(turn, now) + total * gap
            heapq.heappush(starting, (max(now, turn) + system.latency, waiting.pop()))

    ask()
    while starting or moving:
        paces = [pace * weight for pace, (_, weight) in zip(_paces(system, len(moving)), moving)]
        done = min((left / pace for pace, (left, _) in zip(paces, moving) if pace), default=float("inf"))
        first = starting[0][0] - now if starting else float("inf")
        step = min(done, max(first, 0.0))
        now += step
        moving = [(left - step * pace, weight) for pace, (left, weight) in zip(paces, moving)]
        moving = [each for each in moving if each[0] > 1]
        while starting and starting[0][0] <= now + 1e-12:
            # No two connections are quite as fast: else all end at once, over and over, and all wait for first bytes.
            begun += 1
            moving.append((heapq.heappop(starting)[1], 0.9 + 0.2 * (begun * 0.618034 % 1)))
        ask()
    return now


def _paces(system: System, moving: int) -> list[float]:
    """Bytes a second of each transfer of a rank, in the order that they were begun.

    Outside, all transfers share alike. A rank takes in what it asked for first, and of the next ones what it has time for.
    """
    if not moving:
        return []
    limits = [
        system.storage / (system.nodes * system.ranks * moving),
        system.link / (system.ranks * moving),
        system.connection,
    ]
    fair = min((limit for limit in limits if limit > 0), default=float("inf"))
    room = min(system.intake, system.intake * system.cores / system.ranks)
    paces = []
    for _ in range(moving):
        paces.append(min(fair, room))
        room -= paces[-1]
    return paces


# ---------------------------------------------------------------- a server with limits


class Limited:
    """One object, by ranges, no faster than a System says."""

    def __init__(self, path: Path, system: System) -> None:
        self._content = path.read_bytes()
        self._system = system
        self._free = self._turn = 0.0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                await self._answer(head, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, head: str, writer: asyncio.StreamWriter) -> None:
        system, size = self._system, len(self._content)
        found = re.search(r"(?im)^range: bytes=(\d*)-(\d*)", head)
        start, end = 0, size
        if found and found[1]:
            start, end = int(found[1]), min(int(found[2]) + 1 if found[2] else size, size)
        elif found:
            start = size - int(found[2])
        if system.rate:
            self._turn = max(self._turn, time.monotonic()) + 1 / system.rate
            await asyncio.sleep(self._turn - time.monotonic())
        await asyncio.sleep(system.latency)
        status = "206 Partial Content" if found else "200 OK"
        writer.write(
            f"HTTP/1.1 {status}\r\nContent-Length: {end - start}\r\nContent-Range: bytes {start}-{end - 1}/{size}\r\n"
            'ETag: "1"\r\nAccept-Ranges: bytes\r\n\r\n'.encode()
        )
        if head.startswith("HEAD"):
            return
        own = time.monotonic()
        piece = 128 << 10
        for at in range(start, end, piece):
            part = self._content[at : min(at + piece, end)]
            if system.storage:
                self._free = max(self._free, time.monotonic() - 0.005) + len(part) / system.storage
            if system.connection:
                own += len(part) / system.connection
            pause = max(self._free if system.storage else 0.0, own if system.connection else 0.0) - time.monotonic()
            if pause > 0.001:
                await asyncio.sleep(pause)
            writer.write(part)
            await writer.drain()


def server(path: Path, system: System, port: Any) -> None:
    async def run() -> None:
        made = await asyncio.start_server(Limited(path, system).serve, "127.0.0.1", 0, limit=1 << 20)
        port.put(made.sockets[0].getsockname()[1])
        await made.serve_forever()

    asyncio.run(run())


# ---------------------------------------------------------------- runs


def rank(url: str, number: int, count: int) -> None:
    """One process: opens the checkpoint when it is told to, reads every `count`-th layer, and says how long both took."""
    import torch

    import zipslicer

    torch.zeros(1)
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.perf_counter()
    with zipslicer.load(url) as sd:
        opened = time.perf_counter() - started
        names = [name for name in sd if int(name) % count == number]
        made = sd.get_tensors(names)
    seconds = time.perf_counter() - started
    assert all(int(tensor[0]) == int(name) for name, tensor in made.items())
    print(
        json.dumps({"seconds": seconds, "opened": opened, "nbytes": sum(t.nbytes for t in made.values())}), flush=True
    )


def run(path: Path, system: System) -> dict[str, float]:
    """Until the last rank has its part."""
    context = multiprocessing.get_context("spawn")
    port: Any = context.Queue()
    serving = context.Process(target=server, args=(path, system, port), daemon=True)
    serving.start()
    url = f"http://127.0.0.1:{port.get()}/model.pth"
    command = [sys.executable, __file__, "rank", url]
    ranks = [
        subprocess.Popen(
            [*command, str(number), str(system.ranks)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for number in range(system.ranks)
    ]
    try:
        for each in ranks:
            assert each.stdout is not None
            assert each.stdout.readline() == "ready\n"
        started = time.perf_counter()
        for each in ranks:
            assert each.stdin is not None
            each.stdin.write("\n")
            each.stdin.flush()
        said = [json.loads(each.stdout.readline()) for each in ranks if each.stdout is not None]
        seconds = time.perf_counter() - started
    finally:
        for each in ranks:
            each.kill()
            each.wait()
        serving.kill()
        serving.join()
    return {"seconds": seconds, "opened": max(one["opened"] for one in said), "nbytes": said[0]["nbytes"]}


MB = 1e6
HELD_OUT = [
    System(ranks=1, storage=150 * MB),
    System(ranks=2, storage=150 * MB),
    System(ranks=4, storage=100 * MB),
    System(ranks=2, storage=250 * MB, latency=0.05),
    System(ranks=1, connection=10 * MB),
    System(ranks=2, connection=10 * MB, latency=0.1),
    System(ranks=4, connection=8 * MB, storage=200 * MB),
    System(ranks=1, latency=0.5),
    System(ranks=2, rate=10),
    System(ranks=4, rate=20, latency=0.05),
    System(ranks=4, rate=15, storage=120 * MB),
    System(ranks=1, latency=0.2, connection=25 * MB, storage=300 * MB),
    # These were chosen when the simulator was finished.
    System(ranks=3, storage=180 * MB, latency=0.03),
    System(ranks=1, connection=15 * MB, latency=0.3),
    System(ranks=3, rate=25, connection=12 * MB),
    System(ranks=2, latency=0.4, storage=350 * MB),
]


def fitted(path: Path, samples: int) -> tuple[float, float]:
    """(opening, intake) of this machine: without limits, for one rank."""
    runs = [run(path, System(ranks=1)) for _ in range(samples + 1)][1:]
    opening = statistics.median(one["opened"] for one in runs)
    intake = statistics.median(one["nbytes"] / (one["seconds"] - one["opened"]) for one in runs)
    return opening, intake


def compared(path: Path, samples: int) -> list[str]:
    opening, intake = fitted(path, samples)
    cores = os.cpu_count() or 1
    lines = [
        (
            f"Fitted on {samples} runs of one process without limits: opening {1000 * opening:.0f} ms, "
            f"intake {intake / 1e6:.0f} MB/s."
        ),
        "",
        "| ranks | storage | a connection | latency | requests | measured | simulated | off by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    worst = 0.0
    for system in HELD_OUT:
        found = [run(path, system) for _ in range(samples)]
        seconds = statistics.median(one["seconds"] for one in found)
        full = dataclasses.replace(system, nbytes=int(found[0]["nbytes"]), opening=opening, intake=intake, cores=cores)
        wanted = simulate(full)
        off = wanted / seconds - 1
        worst = max(worst, abs(off))
        cells = [
            str(system.ranks), *(f"{x / 1e6:.0f} MB/s" if x else "-" for x in (system.storage, system.connection)),
            f"{1000 * system.latency:.0f} ms" if system.latency else "-", f"{system.rate:.0f}/s" if system.rate else "-",
            f"{seconds:.2f} s", f"{wanted:.2f} s", f"{100 * off:+.0f} %",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr)
    lines += ["", f"The worst of these is off by {100 * worst:.0f} %."]
    return lines


def predicted() -> list[str]:
    """A model of 140 GB in bfloat16 on nodes of eight ranks, sharded over all of them."""
    lines = [
        "| nodes x ranks | a rank reads | storage 10 GB/s | 100 GB/s | 100 GB/s, 1,000 requests/s |",
        "|---|---|---|---|---|",
    ]
    for nodes in (1, 2, 8, 32, 128):
        nbytes = int(140e9 / nodes / 8)
        base = System(
            nodes=nodes,
            ranks=8,
            nbytes=nbytes,
            link=12.5e9,
            connection=80e6,
            latency=0.03,
            opening=0.05,
            intake=1e9,
            cores=8,
        )
        seconds = [
            simulate(dataclasses.replace(base, storage=storage, rate=rate))
            for storage, rate in ((10e9, 0), (100e9, 0), (100e9, 1000))
        ]
        lines.append(f"| {nodes} x 8 | {nbytes / 1e9:.2f} GB | {' | '.join(f'{each:.1f} s' for each in seconds)} |")
    return lines


def write(samples: int) -> None:
    import torch
    from run import machine

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        torch.save({str(i): torch.full((LAYER_NBYTES // 4,), float(i)) for i in range(LAYERS)}, path)
        facts = machine()
        about = (
            f"{facts['cores']} cores of {facts['cpu']}, {facts['system']}, Python {facts['python']}, torch {facts['torch']}, "
            f"{time.strftime('%Y-%m-%d')}; {path.stat().st_size / 1e6:.0f} MB, medians of {samples} runs."
        )
        made = [
            BEGIN,
            "",
            about,
            "",
            *compared(path, samples),
            "",
            "And what it says of machines that are not here:",
            "",
        ]
        made += [*predicted(), "", END]
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    PAGE.write_text(before + "\n".join(made) + after, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Load times of many ranks: simulated, and measured.")
    commands = parser.add_subparsers(dest="command")
    one = commands.add_parser("rank")
    one.add_argument("url")
    one.add_argument("number", type=int)
    one.add_argument("count", type=int)
    model = commands.add_parser("simulate")
    model.add_argument("--nodes", type=int, default=1)
    model.add_argument("--ranks", type=int, default=8, help="of each node")
    model.add_argument("--gb", type=float, default=140, help="of the checkpoint, sharded over all ranks")
    for name, default, what in (
        ("storage", 0, "bytes/s of the storage"),
        ("link", 0, "bytes/s of the network of a node"),
        ("connection", 0, "bytes/s of a connection"),
        ("latency", 0, "seconds until the first byte"),
        ("rate", 0, "requests/s"),
        ("opening", 0.05, "seconds before a rank asks for tensors"),
        ("intake", 1e9, "bytes/s that a rank takes in"),
    ):
        model.add_argument(f"--{name}", type=float, default=default, help=what)
    parser.add_argument("--samples", type=int, default=3)
    options = parser.parse_args()
    if options.command == "rank":
        rank(options.url, options.number, options.count)
    elif options.command == "simulate":
        limits = {field: getattr(options, field) for field in ("storage", "link", "connection", "latency", "rate")}
        nbytes = int(options.gb * 1e9 / options.nodes / options.ranks)
        system = System(
            options.nodes,
            options.ranks,
            nbytes,
            **limits,
            opening=options.opening,
            intake=options.intake,
            cores=options.ranks,
        )
        print(f"{simulate(system):.1f} s")
    else:
        write(options.samples)


if __name__ == "__main__":
    main()
