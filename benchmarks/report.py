"""Make the tables and plots of docs/performance.md, and the part of README.md between its marks, out of results.json.

    python benchmarks/report.py [--results FILE] [--check]

Nothing is measured here: run.py has done that. `--check` exits with 1 if a promise was not kept.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cases import CASES
from contestants import (
    ENTRANTS,
    ONE_THREAD,
    OURS,
    PEERS,
    RAW,
    RAW_ONE_THREAD,
    READS_PTH,
    STREAM_BUDGET,
    WHOLE_THEN_SLICE,
)
from make_files import HIDDEN, VOCABULARY

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results.json"
README = ROOT / "README.md"
DOCUMENT = ROOT / "docs" / "performance.md"
PLOTS = ROOT / "docs" / "performance"
BEGIN, END = "<!-- make bench: begin -->", "<!-- make bench: end -->"

MB = 1e6


def show(seconds: float) -> str:
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= unit or unit == 1e-6:
            value = seconds / unit
            return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {name}"
    raise AssertionError


def write_results(path: Path, stored: dict[str, Any]) -> None:
    """JSON, a line a sample: what was measured again shows in a diff."""
    text = json.dumps(stored, indent=1, ensure_ascii=False)
    path.write_text(
        re.sub(r"\{\s+(\"seconds\"[^{}]*?\{[^{}]*\}[^{}]*)\}", lambda found: one_line(found[0]), text) + "\n"
    )


def one_line(text: str) -> str:
    return re.sub(r"\s*\n\s*", " ", text).replace("{ ", "{").replace(" }", "}")


# ---------------------------------------------------------------- condensing


class Result(NamedTuple):
    """One cell: the median and the best of the samples, and what else the median process has used."""

    seconds: float
    best: float
    samples: int
    kept: int  # bytes of the tensors
    growth: int  # bytes of the peak of the resident set; the median of the samples
    usage: dict[str, float]

    @property
    def excess(self) -> int:
        """Bytes of peak memory beyond what the user keeps."""
        return self.growth - self.kept


Results = dict[str, dict[str, Result]]


def condense(stored: dict[str, Any]) -> Results:
    return {
        case: {name: condensed(taken) for name, taken in measured["samples"].items() if taken}
        for case, measured in stored["cases"].items()
        if case in CASES
    }


def condensed(taken: list[dict[str, Any]]) -> Result:
    by_time = sorted(taken, key=lambda each: each["seconds"])
    return Result(
        seconds=statistics.median(each["seconds"] for each in taken),
        best=by_time[0]["seconds"],
        samples=len(taken),
        kept=taken[0].get("kept", 0),
        growth=int(statistics.median(each.get("growth", 0) for each in taken)),
        usage=by_time[len(by_time) // 2]["usage"],
    )


# ---------------------------------------------------------------- tables


def grid(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    lines = [rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def cell(result: Result | None, native: Result | None, *, best: bool = False) -> str:
    if result is None:
        return "-"
    text = show(result.seconds)
    if best:
        text += f" (best {show(result.best)})"
    if native is None or result is native:
        return f"**{text}**"
    ratio = result.seconds / native.seconds
    return f"{text}, {ratio:.{0 if ratio >= 99.5 else 1 if ratio >= 9.95 else 2}f}x"


def times(results: Results, cases: Iterable[str], extra: Sequence[tuple[str, Any]] = ()) -> str:
    """A row a contestant, a column a case, each with its ratio to native; `extra`: (title, cell of a name) columns."""
    shown = [case for case in cases if case in results]
    names = [name for name in ENTRANTS if any(name in results[case] for case in shown)]
    rows = [["", *(CASES[case].title for case in shown), *(title for title, _ in extra)]]
    for name in names:
        cells = [cell(results[case].get(name), results[case].get("native")) for case in shown]
        rows.append([ENTRANTS[name].title, *cells, *(of(name) for _, of in extra)])
    return grid(rows)


def peak_over_kept(results: Results, cases: Sequence[str]) -> Any:
    """A cell: peak memory through the bytes that the user keeps, for each case."""

    def of(name: str) -> str:
        found = [results[case][name] for case in cases if name in results.get(case, {})]
        return " / ".join(f"{result.growth / result.kept:.2f}" for result in found) or "-"

    return of


def growth(results: Results, case: str) -> Any:
    def of(name: str) -> str:
        result = results.get(case, {}).get(name)
        return f"{result.growth / MB:,.0f} MB" if result else "-"

    return of


def used(results: Results, case: str) -> str:
    """getrusage and /proc/self/io of the median process."""
    rows = [["", "user", "system", "minor faults", "read calls", "by read calls", "from disk"]]
    for name in ENTRANTS:
        if name in results.get(case, {}):
            of = results[case][name].usage
            rows.append(
                [
                    ENTRANTS[name].title,
                    show(of["user"]) if of["user"] else "0",
                    show(of["system"]) if of["system"] else "0",
                    f"{of['minor faults']:,.0f}",
                    f"{of['read calls']:,.0f}",
                    f"{of['bytes by read calls'] / MB:,.1f} MB",
                    f"{of['bytes from disk'] / MB:,.1f} MB",
                ]
            )
    return grid(rows)


def calls(traced: dict[str, dict[str, Any]]) -> str:
    rows = [["", "positioned reads", "bytes read", "payload", "read once", "again", "never"]]
    for case, by_name in traced.items():
        for name, found in by_name.items():
            payload = found["payload bytes"]
            shares = [f"{found[what] / payload:.4%}" for what in ("read once", "read again", "never read")]
            numbers = [f"{found['calls']:,}", f"{found['bytes read']:,}", f"{payload:,}"]
            rows.append([f"{CASES[case].title}, {name}", *numbers, *shares])
    return grid(rows)


# ---------------------------------------------------------------- what is promised


class Promise(NamedTuple):
    """Whether it was kept: `ours` is at most `limit`. `floor`: what the raw read of the same bytes takes, if known."""

    words: str
    ours: float
    limit: float
    show: Any
    against: str
    floor: float = 0.0

    @property
    def kept(self) -> bool:
        return self.ours <= self.limit

    @property
    def verdict(self) -> str:
        if self.kept:
            return "yes"
        return "**no**" + (f", nor by the raw read: {show(self.floor)}" if self.floor > self.limit else "")

    @property
    def numbers(self) -> str:
        return f"{self.show(self.ours)}, limit {self.show(self.limit)}" + (f" ({self.against})" if self.against else "")


def promises(results: Results) -> list[Promise]:
    """Those that these results can answer."""
    found: list[Promise] = []

    def seconds(case: str, name: str) -> float:
        result = results.get(case, {}).get(name)
        return result.seconds if result else math.nan

    def at_most(case: str, share: float, peers: Sequence[str], words: str, who: str = "native") -> None:
        theirs = [(seconds(case, peer), peer) for peer in peers if not math.isnan(seconds(case, peer))]
        ours = seconds(case, who)
        if theirs and not math.isnan(ours):
            fastest, peer = min(theirs)
            raw = results[case].get(RAW_ONE_THREAD if who == ONE_THREAD else RAW)
            floor = raw.seconds if raw else 0.0
            found.append(Promise(words, ours, fastest * share, show, f"{peer}: {show(fastest)}", floor))

    def memory(case: str, limit: float, words: str, who: str = "native", keeps: bool = True) -> None:
        if result := results.get(case, {}).get(who):
            ours = result.excess if keeps else result.growth
            found.append(Promise(words, ours, limit, lambda nbytes: f"{nbytes / MB:,.1f} MB", ""))

    both = ("safetensors mmap", "safetensors pread")
    at_most("keys", 1 / 2, both, "open and list 10,000 keys in at most half of safetensors' time")
    at_most("one", 1.0, ("safetensors pread",), "a small tensor no slower than safetensors' pread")
    at_most(
        "small", 1 / 2, ("safetensors mmap",), "10,000 small ones in at most half the time of safetensors' mapped views"
    )
    at_most("small", 1.0, ("safetensors pread",), "10,000 small ones faster than safetensors' pread")
    if not math.isnan(seconds("small_100000", "native")):
        ours, tenth = seconds("small_100000", "native"), seconds("small", "native")
        found.append(Promise("100,000 linearly: within a quarter of ten times 10,000", ours, 12.5 * tenth, show, ""))
    at_most("whole", 1 / 3, ("torch.load(mmap)",), "2.3 GB at least 3 times as fast as torch.load(mmap=True) and clone")
    at_most("whole", 1 / 0.85, (RAW,), "2.3 GB at 85 % of a raw read or more")
    at_most("whole", 1 / 2.8, ("torch.load",), "on one thread 2.3 GB 2.8 times as fast as torch.load", ONE_THREAD)
    at_most("some", 1 / 2, PEERS, "103 MB of it in at most half the time of any peer")
    at_most("rows", 1.0, both, "rows, opening included, faster than safetensors")
    at_most("rows", 1 / 8, READS_PTH, "rows 8 times as fast as any peer that reads .pth")
    wholes = (WHOLE_THEN_SLICE, "safetensors pread", "fabric _lazy_load", "zipslicer 0.8.1")
    at_most("columns", 1 / 2, wholes, "columns in at most half the time of reading the matrix and slicing it")
    at_most("load_into", 1.15, (RAW,), "into a model in at most 1.15 times a raw read into the same memory")
    memory("load_into", 128 * 2**20, "into a model with at most 128 MiB of more memory", keeps=False)
    largest = 2 * VOCABULARY * HIDDEN  # the embedding, in fp16
    limit = STREAM_BUDGET + largest + 32 * 2**20
    memory("stream", limit, "a stream's memory within its budget, the largest tensor and 32 MiB", keeps=False)
    at_most("cold", 1.0, PEERS, "2.3 GB from disk no slower than any peer")
    at_most("cold", 1.1, (RAW,), "2.3 GB from disk within 10 % of a raw read")
    at_most(
        "whole", 1.0, ("torch.load(mmap)",), "pure: 2.3 GB at least as fast as torch.load(mmap=True) and clone", "pure"
    )
    for case in results:
        title = CASES[case].title.rstrip(" ³")
        at_most(case, 1.0, ("fabric _lazy_load", "zipslicer 0.8.1"), f"pure ahead of fabric and 0.8.1: {title}", "pure")
    for case in ("whole", "some"):
        for who in OURS:
            if result := results.get(case, {}).get(who):
                words = f"{who}: peak memory within 5 % or 16 MB of the bytes kept: {CASES[case].title}"
                memory(case, max(0.05 * result.kept, 16 * 2**20), words, who)
    return found


def terminal(stored: dict[str, Any]) -> str:
    results = condense(stored)
    lines = []
    for case, by_name in results.items():
        lines.append(CASES[case].title)
        lines += [f"    {name:36} {cell(result, by_name.get('native'), best=True)}" for name, result in by_name.items()]
    lines += [f"{'kept  ' if each.kept else 'BROKEN'}  {each.words}: {each.numbers}" for each in promises(results)]
    return "\n".join(lines)


# ---------------------------------------------------------------- the documents


def conditions(stored: dict[str, Any], results: Results) -> str:
    facts = stored["machine"]
    counts = sorted({result.samples for case in results.values() for result in case.values()})
    dates = sorted({measured["date"] for measured in stored["cases"].values()})
    when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    return (
        f"{facts['cores']} cores of {facts['cpu']}, {facts['system']}, {facts['filesystem']}, transparent huge pages "
        f"`{facts['huge pages']}`, free pages reported to a host: {facts['free pages go to the host']}; "
        f"Python {facts['python']}, torch {facts['torch']}, safetensors "
        f"{facts['safetensors']}, lightning-fabric {facts['lightning-fabric']}; {when}. "
        f"Medians of {counts[0]} to {counts[-1]} fresh processes, contestants in turn."
    )


NOTES = (
    "¹ on a converted copy of the file; the conversion is not timed.",
    "² by threads with `pread` into huge pages (benchmarks/raw_read.cc): what the machine can do, by no library.",
    "³ of torch.load(mmap=True) and safetensors' mmap as views of the file, without the clone.",
    "⁴ whole file / 103 MB of it; pages of a mapped file count.",
)


def readme_part(stored: dict[str, Any], results: Results) -> str:
    memory = ("peak memory ÷ bytes kept ⁴", peak_over_kept(results, ("whole", "some")))
    libraries = {
        case: {name: result for name, result in by_name.items() if name in (*OURS, *PEERS)}
        for case, by_name in results.items()
    }
    table = times(libraries, ("keys", "one", "whole", "some", "rows", "small"), [memory])
    notes = [note for note in NOTES if note[0] in table]
    return (
        "![Time to open and list, to read small tensors, a part, rows, all, and into a model, beside the other ways]"
        "(docs/performance/summary.svg)\n\n"
        f"{table}\n{conditions(stored, results)} Warm page cache, all tensors in memory of their own, all but the "
        "small reads with opening included; after the comma the ratio to native. Made by `make bench`; "
        "[docs/performance.md](docs/performance.md) has all cases, cold ones too, and how they are measured.<br>\n"
        + "<br>\n".join(notes)
        + "\n"
    )


def document(stored: dict[str, Any], results: Results) -> str:
    verdicts = promises(results)
    kept = [each for each in verdicts if each.kept]
    broken = [each for each in verdicts if not each.kept]
    promise_rows = [["promise", "measured", ""]] + [[each.words, each.numbers, each.verdict] for each in verdicts]
    traced = stored.get("system calls", {})
    parts = [
        "# Performance\n",
        MADE,
        f"{conditions(stored, results)}\n",
        "![Summary](performance/summary.svg)\n",
        "## How it is measured\n",
        METHOD,
        "## Promises\n",
        f"{len(kept)} of {len(verdicts)} are kept in this run"
        + (f"; not kept: {'; '.join(each.words for each in broken)}.\n" if broken else ".\n"),
        grid(promise_rows),
        "## Opening, and small tensors\n",
        times(results, ("keys", "one", "small", "small_100000")),
        "![Time to open and list, over the number of tensors](performance/tensors.svg)\n",
        "## Large reads\n",
        times(
            results,
            ("whole", "some", "rows", "columns"),
            [("peak memory ÷ bytes kept ⁴", peak_over_kept(results, ("whole", "some")))],
        ),
        COLUMNS,
        "![Time to read one matrix of 8.4 MB, over the size of the file](performance/file_size.svg)\n",
        "![Time to read, over the bytes asked](performance/bytes_asked.svg)\n",
        "## One after the other, into a model, and two at once\n",
        times(
            results,
            ("stream", "load_into", "two"),
            [
                ("stream: more memory", growth(results, "stream")),
                ("into a model: more memory", growth(results, "load_into")),
            ],
        ),
        STREAM,
        "## Cold\n",
        times(results, ("cold", "cold_some")),
        COLD,
        "## What the system counts\n",
        USAGE,
        f"2.3 GB, whole, warm:\n\n{used(results, 'whole')}",
        f"The same, cold:\n\n{used(results, 'cold')}",
        f"Into a model:\n\n{used(results, 'load_into')}",
    ]
    if traced:
        parts += [CALLS, calls(traced)]
    parts += ["## Devices\n", DEVICES, "<br>\n".join(NOTES) + "\n"]
    return "\n".join(parts)


MADE = """\
Made by `make bench`, as are the plots; do not edit. All samples: [benchmarks/results.json](../benchmarks/results.json).
Beside it: [writing and the command line](performance/writing.md), [several ranks](performance/ranks.md), and
[how it scales](scale.md) past one machine.
"""

METHOD = """\
Every sample is a process of its own (benchmarks/sample.py). Before its clock starts it has imported torch and the
contestant and read a tiny file with it; it has read the file of the case once, so that it lies in the page cache; it has
touched memory and given it back, since a virtual machine otherwise fetches pages from its host inside the clock. After the
clock the tensors must lie in memory of their own and not in the mapped file, and their bytes are hashed: a run in which
two contestants read different values ends with an error. The contestants take turns, so that a slow minute hits all of
them. Every contestant does the work in the best way that its own interface has (benchmarks/contestants.py).

Memory is the growth of the peak of the resident set; pages of a mapped file are in it, because they are in any limit of
memory. Where a limit of memory does not count clean pages, the two mapped contestants need half of what is shown.

A kernel that reports its free pages to a host gives them away within seconds, and whoever gets them next waits for the host
to bring them back: the same sample then differs by a half. Where `page_reporting_order` can be set
(`echo 11 > /sys/module/page_reporting/parameters/page_reporting_order`, until the next boot), set it: times become steady,
and the hour and a half that `make bench` takes becomes one. The machine's line above says how it was here. The host of a
virtual machine has other guests all the same: medians of interleaved processes are compared, and single numbers of two
runs are not.
"""

COLUMNS = """\
Half of the columns are 32,000 runs of 2 KB, each 2 KB after the last. zipslicer reads them in a few dozen calls that drop
what is between into one page, which costs about as much as the raw read of these bytes. A slice of a mapped view moves
half as many bytes and needs no call at all: it is about as fast on one thread. Reading the matrix and slicing it is what
all others do.
"""

STREAM = """\
A stream reads ahead on threads within its budget (256 MiB here), into memory of its own for each tensor; what the taker
has dropped is used again. The mapped contestants copy out of the page cache into memory that malloc keeps, on all cores.
"""

COLD = """\
Before the clock the file is thrown out of the page cache with `posix_fadvise`, and `mincore` must find none of it there. The
disk of a virtual machine is somebody else's network, and its host may have the file in memory: times differ by a factor
of two from one process to the next, and only large differences mean something. `direct=True` reads past the page cache.
"""

USAGE = """\
`getrusage` and `/proc/self/io` of the median process of each. A read into huge pages takes one page fault for 2 MiB, a
mapped file one for each 4 KiB or little more; a mapped file is not read by calls, so it has no bytes there.
"""

CALLS = """\
`strace` of all positioned reads of the file (benchmarks/system_calls.py): each byte of a payload is read once, whether
tensors come one by one or all together; but for those among the last 64 KiB of the file, which opening reads to find the
directory. What is read beyond is the directory, the pickle, and local headers with the padding after them.
"""

DEVICES = """\
Copies to a GPU go through a ring of pinned buffers, on a stream of their own. A GPU was at hand for minutes only: one run of
benchmarks/gpu.py, with one process for each contestant, which was cut short before safetensors had its turn. NVIDIA H100
80GB, 16 cores, torch 2.11; 8.1 GB in the page cache onto the GPU: native 0.50 s, and 0.38 s for the second time in a
process; pure 0.79 s; torch.load(mmap=True, map_location=device) 1.30 s, torch.load(map_location=device) 5.75 s. Of 10,000
tensors of 4 KB: native 0.62 s, torch.load(mmap=True) 1.45 s; what brings small ones there has been changed since, and
not been measured again.
"""


def update_readme(text: str) -> None:
    readme = README.read_text()
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        sys.exit(f"{README} lacks the lines {BEGIN} and {END}, between which the table goes")
    README.write_text(f"{before}{BEGIN}\n{text}{END}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a promise was not kept")
    options = parser.parse_args()
    import plots  # matplotlib, for this alone

    stored = json.loads(options.results.read_text())
    results = condense(stored)
    plots.draw(results, PLOTS)
    DOCUMENT.write_text(document(stored, results))
    update_readme(readme_part(stored, results))
    return int(options.check and not all(each.kept for each in promises(results)))


if __name__ == "__main__":
    sys.exit(main())
