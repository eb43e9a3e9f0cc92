"""Measure zipslicer, native and pure, beside the other ways to read a checkpoint: every sample in a fresh process.

    make bench                                      all of it, and docs/performance.md: some 90 minutes
    make bench BENCH_ARGS="--samples 3"             with fewer samples
    python benchmarks/run.py --cases keys,rows --contestants native,pure --results /tmp/few.json

The contestants take turns: one sample of each, then the next round, so that a slow minute of the machine hits all. All
samples land in benchmarks/results.json, of which report.py makes the tables and plots. `--update` measures some cases
again, all contestants of each, and leaves the others of that file as they are; on the same machine only.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import make_files
import report
import system_calls
from cases import CASES, PAIRS, Case
from contestants import ENTRANTS
from sample import reports_pages

HERE = Path(__file__).resolve().parent

Sample = dict[str, Any]  # what one process printed


def started(case: str, contestant: str, seed: int, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(HERE / "sample.py"), case, contestant, "--seed", str(seed), *options]
    environment = {**os.environ, **ENTRANTS[contestant].environment}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def ended(process: subprocess.Popen[str]) -> Sample:
    out, errors = process.communicate(timeout=900)
    if process.returncode:
        sys.exit(f"{' '.join(map(str, process.args))} failed:\n{errors[-3000:]}")
    return json.loads(out.splitlines()[-1])  # the last line: 0.8.1 prints others before


def sample(name: str, contestant: str, seed: int) -> Sample:
    if CASES[name].processes == 1:
        return ended(started(name, contestant, seed))
    both = [started(name, contestant, seed, "--gate") for _ in range(CASES[name].processes)]
    for process in both:
        assert process.stdout is not None
        while (line := process.stdout.readline()) and line != "ready\n":
            pass
    for process in both:  # all at once, and only then is any waited for
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return max((ended(process) for process in both), key=lambda taken: taken["seconds"])


def turns(case: Case, contestant: str, samples: int) -> int:
    if contestant in case.pairs:
        return max(samples, PAIRS) if samples >= 5 else samples
    return min(samples, case.most_samples or samples)


def collect(name: str, contestants: list[str], samples: int) -> dict[str, list[Sample]]:
    """The samples of each contestant of a case."""
    case = CASES[name]
    rows: dict[str, list[Sample]] = {each: [] for each in contestants if each in case.takes_part}
    start = time.monotonic()
    for turn in range(max((turns(case, each, samples) for each in rows), default=0)):
        in_turn = list(rows)
        first = turn % len(in_turn)
        for each in in_turn[first:] + in_turn[:first]:
            if turn < turns(case, each, samples):
                rows[each].append(sample(name, each, seed=turn))
        digests = {each: taken[turn]["digest"] for each, taken in rows.items() if len(taken) > turn}
        if len(set(digests.values())) > 1:
            sys.exit(f"the contestants read different values at {name}: {digests}")
    for each, taken in rows.items():
        median = report.show(statistics.median(one["seconds"] for one in taken))
        print(f"{time.monotonic() - start:6.0f} s  {name:12} {each:24} {median}", file=sys.stderr, flush=True)
    return rows


def machine() -> dict[str, str]:
    facts = {
        "cores": str(len(os.sched_getaffinity(0))),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
    }
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    facts["cpu"] = cpu.group(1) if cpu else platform.machine()
    for package in ("torch", "safetensors", "lightning-fabric"):
        facts[package] = importlib.metadata.version(package)
    huge = re.search(r"\[(\w+)\]", read_or_nothing("/sys/kernel/mm/transparent_hugepage/enabled"))
    facts["huge pages"] = huge.group(1) if huge else "none"
    facts["free pages go to the host"] = "yes" if reports_pages() else "no"
    filesystem = subprocess.run(
        ["findmnt", "-n", "-o", "FSTYPE", "-T", str(make_files.CACHE)], capture_output=True, text=True, check=False
    )
    facts["filesystem"] = filesystem.stdout.strip() or "unknown"
    return facts


def read_or_nothing(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


def choice(text: str | None, all_of_them: dict[str, Any]) -> list[str]:
    chosen = text.split(",") if text else list(all_of_them)
    unknown = [name for name in chosen if name not in all_of_them]
    if unknown:
        sys.exit(f"unknown: {unknown}; there are {list(all_of_them)}")
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=5, help="fresh processes for each cell (default 5)")
    parser.add_argument("--cases", help=f"of {','.join(CASES)}")
    parser.add_argument("--contestants", help=f"of {','.join(ENTRANTS)}")
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="where all samples go")
    parser.add_argument("--update", action="store_true", help="keep what that file has of other cases")
    options = parser.parse_args()
    if options.update and options.contestants:
        sys.exit("--update measures all contestants of a case: what is compared comes from one run")
    cases, names = choice(options.cases, CASES), choice(options.contestants, ENTRANTS)
    make_files.make()
    stored: dict[str, Any] = {"machine": machine(), "cases": {}}
    if options.update and options.results.exists():
        stored = json.loads(options.results.read_text())
        if stored["machine"] != (here := machine()):
            sys.exit(f"{options.results} is of another machine: {stored['machine']}, this is {here}")
    # A case a time is written down: what was measured survives an interruption.
    for case in cases:
        taken = collect(case, names, options.samples)
        stored["cases"][case] = {"date": time.strftime("%Y-%m-%d"), "samples": taken}
        report.write_results(options.results, stored)
    if options.cases is None and (traced := system_calls.trace_all()):
        stored["system calls"] = traced
        report.write_results(options.results, stored)
    print(report.terminal(stored))
    return 0


if __name__ == "__main__":
    sys.exit(main())
