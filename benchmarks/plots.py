"""Draw docs/performance/*.svg: the summary, and how time grows with tensors, file size and bytes asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
from cases import CASES
from contestants import LIBRARIES, RAW
from make_files import CACHE, LAYERS, MANY, OTHER_COUNTS, OTHER_LAYERS

if TYPE_CHECKING:
    from pathlib import Path

# Text stays text, and one picture gives one file: no dates, no random ids.
mpl.rcParams.update(
    {
        "svg.fonttype": "none",
        "svg.hashsalt": "zipslicer",
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
)

SHORT = {
    "native": "zipslicer",
    "pure": "zipslicer, pure",
    "torch.load(mmap)": "torch.load(mmap)",
    "fabric _lazy_load": "fabric _lazy_load",
}
COLORS = {
    "native": "#c0392b",
    "pure": "#e59866",
    "torch.load": "#1a5276",
    "torch.load(mmap)": "#5499c7",
    "safetensors mmap": "#1e8449",
    "safetensors pread": "#82c79b",
    "fabric _lazy_load": "#7d3c98",
    "zipslicer 0.8.1": "#7f8c8d",
    RAW: "#000000",
}
SUMMARY = ("keys", "small", "some", "rows", "whole", "load_into")


def draw(results: Any, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    summary(results, folder / "summary.svg")
    tensors = {count: f"keys_{count}" for count in OTHER_COUNTS} | {MANY: "keys"}
    curves(results, tensors, "tensors in the file", "open, and list the keys", folder / "tensors.svg")
    sizes = {
        file_size("model" if count == LAYERS else f"layers_{count}"): f"matrix_{count}"
        for count in (*OTHER_LAYERS, LAYERS)
    }
    curves(results, sizes, "size of the file, MB", "open, and read one matrix of 8.4 MB", folder / "file_size.svg")
    asked = {52 * count: f"layers_{count}" for count in (*OTHER_LAYERS, LAYERS)}
    curves(results, asked, "bytes asked of 2.3 GB, MB", "open, and read some layers", folder / "bytes_asked.svg")


def file_size(name: str) -> float:
    return (CACHE / f"{name}.pth").stat().st_size / 1e6


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)


def summary(results: Any, path: Path) -> None:
    """Bars: a panel a case, a bar a contestant, and its time at its end."""
    from report import show

    shown = [case for case in SUMMARY if case in results]
    if not shown:
        return
    names = [name for name in (*LIBRARIES, RAW) if any(name in results[case] for case in shown)]
    figure, panels = plt.subplots(-(-len(shown) // 3), 3, figsize=(11, 2.3 * -(-len(shown) // 3)), squeeze=False)
    for panel in panels.flat[len(shown) :]:
        panel.set_visible(False)
    for at, (panel, case) in enumerate(zip(panels.flat, shown, strict=False)):
        times = [results[case][name].seconds if name in results[case] else 0 for name in names]
        # The slowest would push the others together: bars end at ten times ours, with an arrow.
        most = min(max(times), 10 * results[case]["native"].seconds)
        panel.barh(range(len(names)), [min(time, most) for time in times], color=[COLORS[name] for name in names])
        for row, time in enumerate(times):
            if time:
                beyond = " →" if time > most else ""
                panel.text(min(time, most), row, f" {show(time)}{beyond}", va="center", fontsize=8)
        panel.set_title(CASES[case].title.rstrip(" ³"), fontsize=9, loc="left")
        panel.set_yticks(
            range(len(names)), [SHORT.get(name, name) for name in names] if at % 3 == 0 else [""] * len(names)
        )
        panel.set_xticks([])
        panel.set_xlim(0, most * 1.3)
        panel.spines["bottom"].set_visible(False)
        panel.invert_yaxis()
    figure.tight_layout()
    save(figure, path)


def curves(results: Any, points: dict[Any, str], label: str, title: str, path: Path) -> None:
    """A line a contestant, both axes logarithmic; the band is from the best sample to the median."""
    shown = {x: results[case] for x, case in sorted(points.items()) if case in results}
    if not shown:
        return
    figure, axes = plt.subplots(figsize=(6.5, 3.4))
    # A point is no line: who takes part in one of the cases alone is in the tables.
    names = [name for name in LIBRARIES if sum(name in by_name for by_name in shown.values()) > 1]
    for name in names:
        xs = [x for x, by_name in shown.items() if name in by_name]
        found = [shown[x][name] for x in xs]
        medians, bests = [1e3 * result.seconds for result in found], [1e3 * result.best for result in found]
        look: dict[str, Any] = {"color": COLORS[name], "lw": 2.2 if name == "native" else 1.2, "ms": 3}
        axes.plot(xs, medians, "o-", label=SHORT.get(name, name), **look)
        axes.fill_between(xs, bests, medians, color=COLORS[name], alpha=0.15, lw=0)
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel="ms")
    axes.set_title(title, fontsize=9, loc="left")
    axes.grid(which="major", alpha=0.3)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)
