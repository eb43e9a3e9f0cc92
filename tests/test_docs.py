"""Docs: the examples of README.md, usage.md and recipes.md run, and give what their comments say; all names are there."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

import zipslicer

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"  # (->|raises) (.*)$")


def run(block: str, names: dict[str, Any]) -> None:
    """Run a block, statement by statement; an expression may end in `# -> its repr` or in `# raises Error`."""
    lines = block.splitlines()
    for statement in ast.parse(block).body:
        source = ast.unparse(statement)
        said = COMMENT.search(lines[(statement.end_lineno or 1) - 1])
        if not isinstance(statement, ast.Expr) or not said:
            exec(source, names)
        elif said[1] == "->":
            assert repr(eval(source, names)) == said[2].strip(), source
        else:
            raised = _raised_by(source, names)
            assert said[2] in [cls.__name__ for cls in type(raised).__mro__], source


def missing(block: str) -> list[str]:
    """The packages that a block imports and that are not installed."""
    named = [node.module or "" for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    tops = {name.partition(".")[0] for name in named}
    return [top for top in tops if importlib.util.find_spec(top) is None]


def _raised_by(source: str, names: dict[str, Any]) -> BaseException | None:
    try:
        eval(source, names)
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("page", ["README.md", "docs/usage.md", "docs/recipes.md", "docs/migration.md"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # what recipes import
def test_examples(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    layers = {f"layer{i}.0.weight": torch.ones(4, 4) for i in range(1, 5)}
    torch.save({**layers, "lm_head.weight": torch.ones(2000, 4)}, "model.pth")
    torch.save(torch.nn.Linear(2, 2), "whole_model.pt")
    torch.save({"state_dict": layers, "epoch": 3}, "training.ckpt")
    names: dict[str, Any] = {}
    blocks = BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
    assert blocks
    with contextlib.redirect_stdout(None):
        for block in blocks:
            if not missing(block):
                run(block, names)


def public_names() -> list[str]:
    names = [name for name in zipslicer.__all__ if not name.startswith("_")]
    for cls in (zipslicer.Checkpoint, zipslicer.LazyStateDict, zipslicer.LazySequence, zipslicer.LazySlice):
        names += [name for name, made in vars(cls).items() if not name.startswith("_") and _is_documented(made)]
    return sorted(set(names))


def _is_documented(made: Any) -> bool:
    return bool(callable(made) or isinstance(made, property))


@pytest.mark.parametrize("name", public_names())
def test_usage_has(name: str) -> None:
    assert re.search(rf"\b{name}\b", (ROOT / "docs" / "usage.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    """A link within the repository leads to a file, and one within the page to a heading."""
    text = page.read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif "://" not in target:
            assert (page.parent / target.partition("#")[0]).exists(), target
