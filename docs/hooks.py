"""What mkdocs does not do by itself: pages out of the files above docs/, the command line's own help, the API by its names.

The Markdown is written to be read in the repository as well, so that links are those of the repository; here they become
those of the site.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
ABOVE = {"README.md": "index.md", **{name: name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")}}
AS_THEY_ARE = ("LICENSE", "benchmarks/results.json")


def on_files(files: Any, config: Any) -> Any:
    """Add what is no file in docs/."""
    for source, target in ABOVE.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](").replace("](README.md", "](index.md")
        files.append(File.generated(config, target, content=text))
    for source in AS_THEY_ARE:
        files.append(File.generated(config, source, content=(ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, "cli.md", content=command_line()))
    files.remove(files.get_file_from_path("api.md"))  # which is for reading in the repository, where nothing draws it
    files.append(File.generated(config, "api.md", content=api()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links to what is above docs/ lead to its copy in the site."""
    del config, files
    if page.file.src_uri in ABOVE.values():
        return markdown
    return markdown.replace("](../", "](")


def command_line() -> str:
    """The help of every command, as a terminal of 80 columns shows it."""
    os.environ["COLUMNS"] = "80"
    from zipslicer.cli import _parser

    parser = _parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    parts = ["# Command line", f"```text\n{parser.format_help().strip()}\n```"]
    for name, command in commands.choices.items():
        parts += [f"## zipslicer {name}", f"```text\n{command.format_help().strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def api() -> str:
    """Every public name, by its own docstring."""
    import zipslicer

    text = (ROOT / "zipslicer" / "__init__.py").read_text(encoding="utf-8")
    homes = {
        name.strip(): module
        for module, names in re.findall(r"^ *from \.(\w+) import \(?([^()\n]+|\n(?:.+\n)+?)\)?$", text, re.MULTILINE)
        for name in names.replace("\n", " ").split(",")
        if name.strip()
    }
    parts = ["# API", "Every name that `import zipslicer` gives. [usage.md](usage.md) shows them at work."]
    for name in sorted(zipslicer.__all__, key=str.lower):
        if name.startswith("_"):
            continue
        parts.append(f"::: zipslicer.{homes[name]}.{name}")
    return "\n\n".join(parts) + "\n"
