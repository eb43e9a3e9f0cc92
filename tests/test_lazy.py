"""Lazy: what is lazy is known for it, and any value has a short line of text."""

from __future__ import annotations

import collections
import io
from typing import Any

import pytest
from makers import FRAMEWORK, Pickle, checkpoint

import zipslicer
from zipslicer.lazy import WIDTH, Lazy, materialize, size_text, summary
from zipslicer.state_dict import LazySequence, LazyStateDict

LONG = "x" * 1000


@pytest.fixture
def nested() -> Any:
    """A mapping of a mapping and of a list, with a tensor in each."""

    def tensor(p: Pickle) -> object:
        return p.tensor("ByteStorage", "0", 2, size=[2], stride=[1])

    def in_a_list(p: Pickle) -> object:
        tensor(p.raw(b"]("))
        return p.raw(b"e")

    program = Pickle().dict({"more": lambda p: p.dict({"a": tensor}), "list": in_a_list})
    return zipslicer.load(io.BytesIO(checkpoint(program.stop(), {"0": b"\1\2"}).data), framework=FRAMEWORK)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1234, "1.23 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (1_250_000_000, "1.25 GB"),
        (5 * 10**15, "5e+03 TB"),
    ],
)
def test_sizes_have_three_digits(nbytes: int, text: str) -> None:
    assert size_text(nbytes) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({1: 2}, "dict of 1"),
        (collections.OrderedDict(), "OrderedDict of 0"),
        ([1, 2], "list of 2"),
        (frozenset({1}), "frozenset of 1"),
        ((1, "a", None), "(1, 'a', None)"),
        (tuple(range(9)), "tuple of 9"),
        ((1, LONG), "tuple of 2"),
        ((1 << 64,), "tuple of 1"),
        (b"ab", "b'ab'"),
        (3.5, "3.5"),
    ],
)
def test_a_value_is_one_short_line(value: Any, text: str) -> None:
    assert summary(value) == text


@pytest.mark.parametrize(
    "value", [LONG, LONG.encode(), bytearray(LONG.encode()), 10**4000], ids=lambda value: type(value).__name__
)
def test_a_long_value_is_cut(value: Any) -> None:
    assert len(summary(value)) == WIDTH
    assert summary(value).endswith("...")
    assert summary("a name", quoted=False) == "a name"
    assert len(summary(LONG, quoted=False)) == WIDTH


def test_python_prints_no_number_of_more_digits_and_says_so() -> None:
    assert summary(10**5000) == "<large int>"


def test_containers_of_a_file_are_lazy(nested: Any) -> None:
    assert type(nested) is LazyStateDict
    assert type(nested["list"]) is LazySequence
    assert isinstance(nested, Lazy)
    assert isinstance(nested["list"], Lazy)
    assert not isinstance({}, Lazy)
    assert summary(nested) == "LazyStateDict of 2"
    assert summary(nested["list"]) == "LazySequence of 1"
    (tensor,) = materialize(nested["list"])
    assert tensor.tolist() == [1, 2]
    assert type(materialize(nested)) is dict
    assert materialize("anything else") == "anything else"
