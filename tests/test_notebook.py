"""The tree that a notebook shows of a mapping."""

from __future__ import annotations

import html.parser
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import makers  # noqa: E402

import zipslicer  # noqa: E402
from zipslicer.notebook import LEAVES  # noqa: E402


class Tree(html.parser.HTMLParser):
    """Text by the summaries above it; and that each tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.deepest = 0
        self.texts: list[str] = []
        self.opened = 0
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert tag in ("div", "p", "details", "summary", "b", "span")
        assert [name for name, _ in attrs] in ([], ["style"], ["open"])
        self.open.append(tag)
        self.opened += ("open", None) in attrs
        self.deepest = max(self.deepest, self.open.count("details"))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        assert "style" not in self.open
        self.texts.append(data)


def shown(value: Any, tmp_path: Path) -> Tree:
    zipslicer.save(value, tmp_path / "a.pt")  # which takes no stack for what is deep
    with zipslicer.load(tmp_path / "a.pt") as sd:
        return Tree(sd._repr_html_())


def test_keys_with_dots_and_what_is_nested(tmp_path: Path) -> None:
    tree = {
        "layer.0.weight": torch.ones(3, 4),
        "layer.0.bias": torch.ones(3),
        "layer": 5,
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "groups": [{"lr": 0.1}]},
        "list": [torch.ones(2), {"x": torch.ones(1)}],
        "sparse": torch.eye(2).to_sparse(),
    }
    made = shown(tree, tmp_path)
    text = "|".join(made.texts)
    for words in (
        "layer| |2 tensors, 60 B|0| |2 tensors, 60 B|weight |float32 [3, 4] · 48 B|bias |float32 [3] · 12 B",
        "layer |int · 5",
        "optimizer| |1 tensors, 4 B|state| |1 tensors, 4 B|0| |1 tensors, 4 B|step |float32 [] · 4 B",
        "groups |list · list of 1",
        "list| |2 tensors, 12 B|0 |float32 [2] · 8 B|1| |1 tensors, 4 B|x |float32 [1] · 4 B",
        "sparse |float32 [2, 2] sparse_coo",
    ):
        assert words in text
    assert made.opened == 3
    with zipslicer.load(tmp_path / "a.pt") as sd:
        assert "optimizer" not in "".join(Tree(sd["optimizer"]["state"]._repr_html_()).texts)


def test_it_is_bounded_and_does_not_recurse_as_the_file_says(tmp_path: Path) -> None:
    deep: Any = {"x": torch.ones(1)}
    for _ in range(900):
        deep = {"d.d.d": deep}
    made = shown({"." * 5000: torch.ones(1), "deep": deep, "a" * 10**6: torch.ones(1)}, tmp_path)
    assert made.deepest <= 20
    assert sum(map(len, made.texts)) < 5000
    many = shown({f"{i}.w": torch.ones(1) for i in range(3000)}, tmp_path)
    assert "more than 2,000 lines" in "".join(many.texts)
    assert len(many.texts) < 10 * LEAVES
    loop: dict[str, Any] = {"w": torch.ones(1)}
    loop["me"] = loop
    assert shown(loop, tmp_path).deepest <= 20


def test_names_that_are_and_hold(tmp_path: Path) -> None:
    one = torch.ones(1)
    text = "|".join(shown({"a": one, "a.b": one, "c.d": one, "c": {"e": one}, 1: one, "1": one}, tmp_path).texts)
    for name in ("a ", "b ", "d ", "e ", "1 "):
        assert f"{name}|float32 [1]" in text


def test_what_is_the_users_own_and_what_is_wrong(tmp_path: Path) -> None:
    """A sparse tensor whose values are fewer than its indices say: told from the file, before it is read."""
    values = torch.sparse_coo_tensor([[0, 1]], [1.0, 2.0], (3,), check_invariants=True)
    zipslicer.save({"w": values}, tmp_path / "a.pt")
    bent = makers.edited(
        (tmp_path / "a.pt").read_bytes(), lambda name, data: bend(data) if name.endswith(".pkl") else data
    )
    with zipslicer.load(bent.data) as sd:
        sd["own"] = "<b>"
        text = sd._repr_html_()
    assert "TableError" in "".join(Tree(text).texts)
    assert "&lt;b&gt;" in text


def bend(program: bytes) -> bytes:
    """The size (3,) of the whole becomes (-3,)."""
    at = program.rindex(b"K\x03\x85")
    return program[:at] + b"J\xfd\xff\xff\xff\x85" + program[at + 3 :]
