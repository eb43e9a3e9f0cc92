"""Make the pictures in docs/pictures: every command in a terminal of 80 columns, and the report in a browser.

    .venv/bin/python docs/pictures.py      needs tmux, chromium and chromedriver

The commands run in a real terminal (tmux), and what it then shows becomes an SVG; the report is what Chromium shows of it.
"""

from __future__ import annotations

import html
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

PICTURES = Path(__file__).parent / "pictures"
COLUMNS, LINES = 80, 400
WALK = {  # picture -> commands
    "ls": ["zipslicer ls gpt.pth 'h.0.*'", "zipslicer ls gpt.pth --depth 1"],
    "show": ["zipslicer show gpt.pth h.5.mlp.up.weight"],
    "diff": ["zipslicer diff gpt.pth tuned.pth"],
    "check": ["zipslicer check gpt.pth", "zipslicer scan gpt.pth whole.pt"],
    "convert": [
        "zipslicer convert gpt.pth gpt.safetensors --dtype bfloat16 --verify",
        "zipslicer extract gpt.pth head.pth 'h.11.*' 'ln_f.*'",
        "zipslicer merge head.pth extra.pth merged.pth",
        "zipslicer convert gpt.pth sharded.safetensors --max-shard-size 20MB",
        "zipslicer ls nothing.pth",
    ],
    "bench": ["zipslicer bench gpt.pth", "zipslicer report gpt.pth -o report.html --diff tuned.pth"],
}


class Config:
    """Of a model that was pickled whole."""


def write_checkpoints() -> None:
    """gpt.pth, tuned.pth: a small transformer, in which some things are odd, and what became of it."""
    torch.manual_seed(0)
    made = {"wte.weight": torch.randn(8000, 256) * 0.02, "wpe.weight": torch.randn(512, 256) * 0.01}
    for layer in range(12):
        for name, shape in {
            "ln_1.weight": (256,), "ln_1.bias": (256,), "attn.qkv.weight": (768, 256), "attn.qkv.bias": (768,),
            "attn.out.weight": (256, 256), "ln_2.weight": (256,), "mlp.up.weight": (1024, 256), "mlp.down.weight": (256, 1024),
        }.items():  # fmt: skip
            made[f"h.{layer}.{name}"] = torch.randn(shape) * 0.02 + (1.0 if "ln" in name and "weight" in name else 0.0)
    made["ln_f.weight"] = torch.ones(256)
    made["lm_head.weight"] = made["wte.weight"]
    made["h.5.mlp.up.weight"][17, 3] = 1.5
    made["h.8.attn.out.weight"] *= 4
    made["h.10.attn.qkv.bias"][5] = float("nan")
    torch.save(made, "gpt.pth")
    tuned = {name: tensor.clone() for name, tensor in made.items()}
    for name in tuned:
        if "attn.qkv.weight" in name:
            tuned[name] += torch.randn(768, 256) * 0.0005
    tuned["wpe.weight"] = torch.cat([tuned["wpe.weight"], torch.zeros(512, 256)])
    tuned["ln_f.weight"] = tuned["ln_f.weight"].bfloat16()
    tuned["lora.weight"] = torch.randn(16, 256)
    del tuned["h.11.ln_1.bias"]
    torch.save(tuned, "tuned.pth")
    torch.save({"extra.weight": torch.ones(4, 4)}, "extra.pth")
    torch.save({"model": torch.nn.Linear(2, 2), "config": Config()}, "whole.pt")


def terminal(name: str, commands: list[str]) -> list[str]:
    """What a terminal shows when they were typed."""
    socket = f"zipslicer-{os.getpid()}-{name}"

    def tmux(*arguments: str) -> str:
        return subprocess.run(["tmux", "-L", socket, *arguments], check=True, capture_output=True, text=True).stdout

    shell = ["env", "PS1=$ ", "bash", "--norc", "--noprofile"]
    tmux("-f", os.devnull, "new-session", "-d", "-x", str(COLUMNS), "-y", str(LINES), shlex.join(shell))
    try:
        while not tmux("capture-pane", "-p").strip():
            time.sleep(0.1)
        for number, command in enumerate(commands):
            tmux("send-keys", "-l", command)
            tmux("send-keys", "Enter")
            marker = Path(f"done-{number}")
            tmux("send-keys", "-l", f"touch {marker}; clear -x")  # typed ahead, and wiped from the picture below
            tmux("send-keys", "Enter")
            while not marker.exists():
                time.sleep(0.1)
            marker.unlink()
        time.sleep(0.3)
        shown = tmux("capture-pane", "-pJ", "-S", "-").splitlines()  # J: a line that was too long is one
    finally:
        tmux("kill-server")
    lines = [line.rstrip() for line in shown if "touch done-" not in line]
    while lines and lines[-1] in ("", "$"):
        lines.pop()
    return lines


def draw(lines: list[str], path: Path) -> None:
    """Lines of a terminal, as an SVG."""
    width, step = 8.4, 19
    rows = []
    for number, line in enumerate(lines):
        bold = ' class="typed"' if line.startswith("$ ") else ""
        rows.append(
            f'<text x="18" y="{(number + 1) * step + 12}"{bold} xml:space="preserve">{html.escape(line)}</text>'
        )
    size = f'width="{COLUMNS * width + 36:.0f}" height="{len(lines) * step + 30}"'
    style = "text{font:14px ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;fill:#d6dde5}.typed{fill:#6fd3c7}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
        f'<style>{style}</style><rect width="100%" height="100%" rx="8" fill="#171c22"/>',
        *rows,
        "</svg>\n",
    ]
    path.write_text("\n".join(parts), encoding="utf-8")


def photograph(page: Path, path: Path) -> None:
    """What a browser shows of a page, whole."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        browser.set_window_size(1360, 1000)
        browser.get(page.as_uri())
        height = browser.execute_script("return document.documentElement.scrollHeight")
        browser.set_window_size(1360, height + 160)
        time.sleep(1)
        browser.find_element("tag name", "body").screenshot(str(path))
    finally:
        browser.quit()


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_checkpoints()
        for name, commands in WALK.items():
            lines = terminal(name, commands)
            too_long = [line for line in lines if len(line) > COLUMNS]
            if too_long:
                sys.exit(f"wider than {COLUMNS} columns: {too_long[0]!r}")
            draw(lines, PICTURES / f"{name}.svg")
            print("\n".join(lines), end="\n\n")
        photograph(Path("report.html").resolve(), PICTURES / "report.png")
        os.chdir("/")


if __name__ == "__main__":
    main()
