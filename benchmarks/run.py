"""Compare zipslicer, native and pure, with the other ways to read a checkpoint: every sample in a fresh process.

    make bench                                      what the README shows: every case, some 45 minutes
    make bench BENCH_ARGS="--update-readme"         and put the table into the README
    make bench BENCH_ARGS="--cases keys,rows --contestants native,pure --samples 3"

The contestants take turns: one sample of each, then the next round, so that a slow minute of the machine hits all.
The table holds medians. All samples, with the best and the memory, land in benchmarks/results.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import contestants
import make_files

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- make bench: begin -->", "<!-- make bench: end -->"

MB = 1e6
TITLES = {
    "keys": "open, list 10,000 keys",
    "one": "one small tensor, random",
    "whole": "2.3 GB, whole",
    "some": "103 MB of it",
    "rows": "2 MB: rows of a 131 MB tensor",
    "small": "10,000 small tensors ³",
    "columns": "half of the columns of it",
}
OURS = ("native", "pure")
READS_PTH = ("torch.load", "torch.load(mmap)", "fabric _lazy_load", "zipslicer 0.8.1")
PEERS = (*READS_PTH, "safetensors mmap", "safetensors pread")
NAMES = {
    "native": "**zipslicer, native**",
    "pure": "**zipslicer, pure Python**",
    "torch.load": "torch.load",
    "torch.load(mmap)": "torch.load(mmap=True), clone",
    "safetensors mmap": "safetensors, mmap, clone ¹",
    "safetensors pread": "safetensors, pread ¹",
    "fabric _lazy_load": "lightning-fabric _lazy_load",
    "zipslicer 0.8.1": "zipslicer 0.8.1",
    contestants.RAW: "raw C++ read of these bytes ⁴",
}

Samples = dict[str, dict[str, list[dict[str, Any]]]]  # case -> contestant -> what each process printed


# ---------------------------------------------------------------- collecting


def sample(case: str, contestant: str, seed: int) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "contestants.py"), case, contestant, "--seed", str(seed)]
    done = subprocess.run(
        command, env=contestants.environment(contestant), capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode:
        sys.exit(f"{contestant} failed at {case}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # the last line: 0.8.1 prints others before it


def collect(cases: list[str], names: list[str], samples: int, samples_whole: int) -> Samples:
    def is_in(case: str, name: str) -> bool:
        if name == contestants.RAW:
            return case == "whole"
        return case != "one" or contestants.CONTESTANTS[name].lazy

    takes_part = {case: [name for name in names if is_in(case, name)] for case in cases}
    collected: Samples = {case: {name: [] for name in takes_part[case]} for case in cases}
    start = time.monotonic()
    for turn in range(max(samples, samples_whole)):
        for case in cases:
            if turn >= (samples_whole if case == "whole" else samples):
                continue
            in_turn = takes_part[case]
            first = turn % len(in_turn)
            for name in in_turn[first:] + in_turn[:first]:
                taken = sample(case, name, seed=turn)
                collected[case][name].append(taken)
                clock = time.monotonic() - start
                print(f"{clock:6.0f} s  {case:6} {name:18} {show(taken['seconds'])}", file=sys.stderr)
            digests = {name: found for name in in_turn if (found := collected[case][name][-1]["digest"]) is not None}
            if len(set(digests.values())) > 1:
                sys.exit(f"the contestants read different values at {case}: {digests}")
    return collected


# ---------------------------------------------------------------- condensing


class Result(NamedTuple):
    """One cell: the median and the best of the samples, and the memory of the median process."""

    seconds: float
    best: float
    kept: int
    growth: int

    @property
    def excess(self) -> int:
        """Bytes of peak memory beyond what the user keeps."""
        return self.growth - self.kept


Results = dict[str, dict[str, Result]]


def condense(collected: Samples) -> Results:
    return {
        case: {
            name: Result(
                seconds=statistics.median(taken["seconds"] for taken in rows),
                best=min(taken["seconds"] for taken in rows),
                kept=rows[0].get("kept", 0),
                growth=int(statistics.median(taken.get("growth", 0) for taken in rows)),
            )
            for name, rows in by_name.items()
        }
        for case, by_name in collected.items()
    }


def show(seconds: float) -> str:
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= unit or unit == 1e-6:
            value = seconds / unit
            return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {name}"
    raise AssertionError


def machine() -> dict[str, str]:
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "cores": str(len(os.sched_getaffinity(0))),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
    }
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    facts["cpu"] = cpu.group(1) if cpu else platform.machine()
    for package in ("torch", "safetensors", "lightning-fabric", "zipslicer"):
        facts[package] = importlib.metadata.version(package)
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    facts["huge pages"] = re.search(r"\[(\w+)\]", huge.read_text()).group(1) if huge.exists() else "none"  # type: ignore[union-attr]
    return facts


def table(results: Results, facts: dict[str, str], counts: tuple[int, int]) -> str:
    """The Markdown that the README shows: a row a contestant, a column a case, each with its ratio to native."""
    cases = [case for case in TITLES if case in results]
    memory = [case for case in ("whole", "some") if case in results]
    names = [name for name in NAMES if any(name in by_name for by_name in results.values())]
    head = [""] + [TITLES[case] for case in cases] + (["peak memory ÷ bytes kept ²"] if memory else [])
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for name in names:
        cells = [NAMES[name]]
        for case in cases:
            mine, native = results[case].get(name), results[case].get("native")
            text = show(mine.seconds) if mine else "-"
            if mine and native and name != "native":
                ratio = mine.seconds / native.seconds
                text += f" ({ratio:.{0 if ratio >= 100 else 1}f}x)"
            cells.append(f"**{text}**" if name == "native" else text)
        if memory:
            of = [results[case][name] for case in memory if name in results[case]]
            cells.append(" / ".join(f"{result.growth / result.kept:.2f}" for result in of))
        lines.append(cells)
    conditions = (
        f"Medians of {counts[0]} fresh processes ({counts[1]} for the whole file), contestants in turn, warm page "
        f"cache, all tensors in memory of their own, all but the small reads with opening included; in brackets the "
        f"ratio to native. {facts['cores']} cores of {facts['cpu']}, {facts['system']}, Python {facts['python']}, "
        f"torch {facts['torch']} (CPU), safetensors {facts['safetensors']}, lightning-fabric "
        f"{facts['lightning-fabric']}; {facts['date']}. Made by `make bench`."
    )
    notes = [
        conditions,
        "¹ on a converted copy of the file; the conversion is not timed.",
        "² whole file / 103 MB of it; pages of a mapped file count.",
        "³ of torch.load(mmap=True) and safetensors' mmap as views of the file, without the clone.",
        "⁴ by threads with `pread` into huge pages (benchmarks/raw_read.cc): no file is opened, no tensor made.",
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n" + "<br>\n".join(notes) + "\n"


# ---------------------------------------------------------------- what we promise


def promises(results: Results) -> list[tuple[bool, str]]:
    """Each promise of the README that these results can answer: whether it was kept, and the numbers."""
    verdicts: list[tuple[bool, str]] = []

    def seconds(case: str, name: str) -> float:
        found = results.get(case, {}).get(name)
        return found.seconds if found else float("nan")

    def at_most(case: str, share: float, peers: tuple[str, ...], words: str, who: str = "native") -> None:
        ours = seconds(case, who)
        theirs = [(seconds(case, peer), peer) for peer in peers if not math.isnan(seconds(case, peer))]
        if theirs and not math.isnan(ours):
            fastest, peer = min(theirs)
            numbers = f"{show(ours)}, limit {show(fastest * share)} ({peer} {show(fastest)})"
            verdicts.append((ours <= fastest * share, f"{words}: {numbers}"))

    both = ("safetensors mmap", "safetensors pread")
    at_most("keys", 1 / 2, both, "native opens and lists in at most half of safetensors' time")
    at_most("one", 1.0, ("safetensors pread",), "native reads a small tensor no slower than safetensors pread")
    at_most("whole", 1 / 2.5, PEERS, "native reads the whole file 2.5 times as fast as any peer")
    at_most("rows", 1.0, ("safetensors mmap",), "native reads rows no slower than safetensors mmap")
    at_most("rows", 1 / 8, READS_PTH, "native reads rows 8 times as fast as any peer that reads .pth")
    at_most(
        "small",
        1 / 2,
        ("safetensors mmap",),
        "native reads 10,000 in at most half the time of safetensors mmap's views",
    )
    at_most("small", 1.0, ("safetensors pread",), "native reads 10,000 faster than safetensors pread")
    at_most("columns", 1.0, PEERS, "native reads columns faster than any peer")
    at_most("whole", 1 / 0.85, (contestants.RAW,), "native reads the whole file at 85 % of a raw read or more")
    for case in results:
        at_most(case, 1.0, ("fabric _lazy_load", "zipslicer 0.8.1"), f"pure beats fabric and 0.8.1 at {case}", "pure")
    for case in ("whole", "some"):
        for who in OURS:
            found = results.get(case, {}).get(who)
            if found:
                limit = max(0.05 * found.kept, 16 * 2**20)
                words = f"{who} keeps its peak memory within 5 % or 16 MB of the bytes kept at {case}"
                verdicts.append(
                    (found.excess <= limit, f"{words}: {found.excess / MB:+.1f} MB, limit {limit / MB:.1f} MB")
                )
    return verdicts


def update_readme(text: str) -> None:
    readme = README.read_text()
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        sys.exit(f"{README} lacks the lines {BEGIN} and {END}, between which the table goes")
    README.write_text(f"{before}{BEGIN}\n{text}{END}{after}")


def choice(text: str | None, all_of_them: dict[str, Any]) -> list[str]:
    chosen = text.split(",") if text else list(all_of_them)
    unknown = [name for name in chosen if name not in all_of_them]
    if unknown:
        sys.exit(f"unknown: {unknown}; there are {list(all_of_them)}")
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=9, help="fresh processes for each cell (default 9)")
    parser.add_argument("--samples-whole", type=int, default=5, help="the same for the whole file (default 5)")
    parser.add_argument("--cases", help=f"of {','.join(TITLES)}")
    parser.add_argument("--contestants", help=f"of {','.join(NAMES)}")
    parser.add_argument("--results", type=Path, default=HERE / "results.json", help="where all samples go")
    parser.add_argument("--from-results", action="store_true", help="measure nothing, show that file again")
    parser.add_argument("--update-readme", action="store_true", help="put the table into README.md")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a promise was not kept")
    options = parser.parse_args()

    if options.from_results:
        stored = json.loads(options.results.read_text())
        facts, counts, collected = stored["machine"], tuple(stored["counts"]), stored["samples"]
    else:
        make_files.make()
        facts, counts = machine(), (options.samples, min(options.samples, options.samples_whole))
        collected = collect(choice(options.cases, TITLES), choice(options.contestants, NAMES), *counts)
        stored = {"command": "make bench", "machine": facts, "counts": counts, "samples": collected}
        options.results.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n")

    results = condense(collected)
    text = table(results, facts, counts)
    print(text)
    verdicts = promises(results)
    for kept, words in verdicts:
        print(f"{'kept  ' if kept else 'BROKEN'}  {words}")
    if options.update_readme:
        update_readme(text)
    return int(options.check and not all(kept for kept, _ in verdicts))


if __name__ == "__main__":
    sys.exit(main())
