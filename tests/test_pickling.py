"""Pickling: what comes out of the opcodes is what went in, as Python's own pickle has it."""

from __future__ import annotations

import collections
import datetime as dt
import enum
import functools
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch")

import makers  # noqa: E402

import zipslicer  # noqa: E402
from zipslicer.errors import UnsupportedError  # noqa: E402


def saved(obj: Any, path: Path) -> Path:
    zipslicer.save(obj, path)
    return path


class Point:
    def __init__(self, x: int) -> None:
        self.x = x
        self.me: Any = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Point) and self.x == other.x

    __hash__ = None  # type: ignore[assignment]


class Slotted:
    __slots__ = ("a", "b")

    a: int
    b: list[int]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slotted) and (self.a, self.b) == (other.a, other.b)

    __hash__ = None  # type: ignore[assignment]


class Keyworded:
    def __new__(cls, *, size: int) -> Keyworded:
        made = super().__new__(cls)
        made.size = size
        return made

    size: int

    def __getnewargs_ex__(self) -> tuple[Any, Any]:
        return (), {"size": self.size}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Keyworded) and self.size == other.size

    __hash__ = None  # type: ignore[assignment]


class Words(dict[str, int]):
    pass


class Lines(list[str]):
    pass


class Outer:
    class Inner:
        def __eq__(self, other: object) -> bool:
            return isinstance(other, Outer.Inner)

        __hash__ = None  # type: ignore[assignment]

    class Colour(enum.Enum):
        RED = 1


class Pair(NamedTuple):
    left: int
    right: list[int]


def slotted() -> Slotted:
    made = Slotted()
    made.a, made.b = 1, [2]
    return made


def lines() -> Lines:
    made = Lines(["a", "b"])
    made.extra = 5  # type: ignore[attr-defined]
    return made


OBJECTS: dict[str, Any] = {
    "scalars": [None, True, False],
    "integers": [0, 255, 256, 65535, 65536, -1, 1 << 31, -(1 << 31), 1 << 63, -(1 << 63), 1 << 3000, -(1 << 3000)],
    "floats": [0.0, -0.0, 1.5, float("inf"), 1e-300],
    "texts": ["", "a", "\ud800", "\U0001f600", "n\nl", "x" * 70_000],
    "bytes": [b"", b"\0\xff", bytearray(), bytearray(b"\x80"), b"y" * 70_000],
    "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), ((), ((),))],
    "long": list(range(2500)),
    "mapping": {i: str(i) for i in range(2001)},
    "sets": [set(), {1, "a", (2,)}, frozenset(), frozenset({None})],
    "complex": 1 + 2j,
    "range": range(1, 10, 2),
    "slice": [slice(1, None, 2)],
    "none": [type(None), type(...), ..., NotImplemented],
    "classes": [dict, Point, Outer.Inner, collections.OrderedDict],
    "functions": [len, os.path.join, slotted],
    "ordered": collections.OrderedDict(b=1, a=2),
    "defaultdict": collections.defaultdict(list, a=[1]),
    "counter": collections.Counter("aab"),
    "deque": [collections.deque([1, 2], 5)],
    "moments": [dt.datetime(2026, 1, 2, 3, tzinfo=dt.timezone.utc), dt.timedelta(1)],
    "path": [Path("a/b")],
    "pair": Pair(1, [2]),
    "enum": Outer.Colour.RED,
    "objects": [Point(3), slotted(), Keyworded(size=4), Words(a=1), Outer.Inner(), lines()],
    "torch": [torch.float8_e4m3fn, torch.device("cuda", 1), torch.Size([2, 3]), torch.strided, torch.per_tensor_affine],
    "memory format": [torch.channels_last],
}


@pytest.mark.parametrize("name", OBJECTS)
def test_objects_as_pickle_has_them(name: str, tmp_path: Path) -> None:
    wanted = OBJECTS[name]
    got = torch.load(saved(wanted, tmp_path / "a.pt"), weights_only=False)
    assert type(got) is type(wanted)
    assert got == wanted
    assert repr(got) == repr(wanted) or name in ("sets", "objects", "functions")
    assert getattr(got, "__dict__", None) == getattr(wanted, "__dict__", None)


def test_a_partial(tmp_path: Path) -> None:
    got = torch.load(saved(functools.partial(int, base=2), tmp_path / "a.pt"), weights_only=False)
    assert got("101") == 5


def test_sharing_and_cycles(tmp_path: Path) -> None:
    shared, point = [1], Point(1)
    point.me = point
    knot: list[Any] = []
    knot.append((knot, (knot,), {"a": knot}))
    tree = {"a": shared, "b": shared, "point": point, "knot": knot}
    tree["me"] = tree
    got = torch.load(saved(tree, tmp_path / "a.pt"), weights_only=False)
    assert got["a"] is got["b"]
    assert got["me"] is got
    assert got["point"].me is got["point"]
    assert got["knot"][0][0] is got["knot"]
    assert got["knot"][0][1][0] is got["knot"]


def test_nesting_takes_no_stack(tmp_path: Path) -> None:
    deep: Any = torch.ones(1)
    for _ in range(5000):
        deep = [(deep,)]
    got = torch.load(saved(deep, tmp_path / "a.pt"), weights_only=False)
    for _ in range(5000):
        ((got,),) = got
    assert torch.equal(got, torch.ones(1))


class Endless:
    def __reduce__(self) -> Any:
        return Endless, (Endless(),)


class InItself:
    def __reduce__(self) -> Any:
        return list, ((self,),)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    path = saved({"old": 1}, tmp_path / "a.pt")
    before = path.read_bytes()
    view = torch.zeros(4)
    cases: list[tuple[Any, type[Exception]]] = [
        (lambda: 1, AttributeError),
        (sys, TypeError),
        (Endless(), UnsupportedError),
        (InItself(), UnsupportedError),
        ([view, view.view(torch.int32)], ValueError),
        (torch.empty(3, device="meta").untyped_storage(), UnsupportedError),
    ]
    for value, error in cases:
        with pytest.raises(error):
            zipslicer.save({"x": torch.ones(3), "value": value}, path)
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["a.pt"]
    with pytest.raises(TypeError, match="LazySlice"):
        zipslicer.save(zipslicer.load(saved({"w": view}, tmp_path / "b.pt")).get_slice("w"), path)


def test_names_that_need_protocol_4(tmp_path: Path) -> None:
    """A name with dots; and a module of today that is called as one of Python 2 was."""
    program = makers.Pickle(4).raw(b"(").text("commands").text("Run").raw(b"\x93").text("a").text("B.C").raw(b"\x93t")
    made = makers.checkpoint(program.stop())
    with zipslicer.open(made.data) as checkpoint:
        zipslicer.save(checkpoint, tmp_path / "a.pt")
        names = [zipslicer.describe(each).qualified for each in zipslicer.load(tmp_path / "a.pt")]
        assert names == [zipslicer.describe(each).qualified for each in checkpoint.root] == ["commands.Run", "a.B.C"]
    assert makers.record_of((tmp_path / "a.pt").read_bytes(), "data.pkl")[:2] == b"\x80\x04"
