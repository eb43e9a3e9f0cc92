"""Program: from columns to objects. Cycles and sharing are those that pickle itself would make."""

from __future__ import annotations

import collections
import pickle
import sys
from typing import Any

import makers
import pytest
from makers import Pickle

import zipslicer
from zipslicer.errors import ArchiveError, ProgramError, UnsupportedError

hypothesis = pytest.importorskip("hypothesis")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402


def rebuilt(value: Any, protocol: int = 2) -> Any:
    return zipslicer.load(makers.checkpoint(pickle.dumps(value, protocol)).data)


keys = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 63) - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
)
leaves = (
    keys
    | st.integers()
    | st.complex_numbers(allow_nan=False)
    | st.frozensets(st.integers(0, 99))
    | st.binary().map(bytearray)
)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(keys | st.tuples(keys), inner)
        | st.dictionaries(st.text(), inner).map(collections.OrderedDict)
        | st.dictionaries(st.text(), inner).map(lambda d: collections.defaultdict(dict, d))
        | st.sets(st.text())
    ),
    max_leaves=20,
)


@given(trees, st.sampled_from([2, 3, 4, 5]))
def test_plain_trees_are_what_pickle_makes(tree: Any, protocol: int) -> None:
    made = rebuilt([tree], protocol)[0]
    assert made == tree
    assert repr(made) == repr(pickle.loads(pickle.dumps(tree, protocol)))


def test_sharing_is_kept() -> None:
    inner = [1]
    made = rebuilt({"a": inner, "b": (inner, inner), "c": {"d": inner}})
    assert made["a"] is made["b"][0] is made["b"][1] is made["c"]["d"]


def test_a_list_that_holds_itself() -> None:
    tree: list[Any] = [1]
    tree.append(tree)
    made = rebuilt(tree)
    assert made[1] is made


def test_a_dict_that_holds_itself_by_way_of_a_tuple() -> None:
    tree: dict[str, Any] = {}
    tree["me"] = (tree, [tree])
    made = rebuilt(tree)
    assert made["me"][0] is made["me"][1][0] is made


def test_a_tuple_that_holds_itself_by_way_of_a_list() -> None:
    tree: tuple[Any, ...] = ([],)
    tree[0].append(tree)
    made = rebuilt(tree)
    assert made[0][0] is made


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_defaultdict_that_holds_itself(protocol: int) -> None:
    tree: Any = collections.defaultdict(list)
    tree["me"] = (tree, {"deeper": tree})
    made = rebuilt(tree, protocol)
    assert type(made) is collections.defaultdict
    assert made["me"][0] is made["me"][1]["deeper"] is made


def test_a_call_in_its_own_arguments_is_refused_and_shows_no_sentinel() -> None:
    program = Pickle().raw(b"]").put(0).raw(b"0")
    program.call("builtins", "set", lambda p: p.get(0)).put(1).raw(b"0")
    program.get(0).get(1).raw(b"\x85a0").get(1)  # the list that set() was given gets a tuple of the set
    with pytest.raises(UnsupportedError, match="holds itself"):
        zipslicer.load(makers.checkpoint(program.stop()).data)


def test_depth_costs_no_recursion() -> None:
    """Deeper than Python's own stack: built, walked, and printed within bounds."""
    depth = sys.getrecursionlimit() * 3
    inner: Any = 0
    program = Pickle().raw(b"]" * depth + b"a" * (depth - 1))
    inner = zipslicer.load(makers.checkpoint(program.stop()).data, limits=zipslicer.Limits(depth=depth))
    count = 0
    while inner:
        inner, count = inner[0], count + 1
    assert count == depth - 1


def test_a_chain_of_calls_is_one_placeholder_by_its_innermost_name() -> None:
    program = Pickle().name("pkg", "f").raw(b")R" * 900)
    made = zipslicer.load(makers.checkpoint(program.stop()).data)
    about = zipslicer.describe(made)
    assert about.qualified == "pkg.f"


def test_of_equal_keys_the_last_value_counts() -> None:
    program = Pickle().raw(b"}(").text("a").integer(1).text("b").integer(2).text("a").integer(3)
    made = zipslicer.load(makers.checkpoint(program.raw(b"u").stop()).data)
    assert list(made.items()) == [("a", 3), ("b", 2)]


def test_metadata_is_the_only_attribute_of_an_ordered_dict() -> None:
    program = Pickle().ordered_dict().raw(b"}(").text("_metadata").integer(1).text("items").integer(2).raw(b"ub")
    made = zipslicer.load(makers.checkpoint(program.stop()).data)
    assert vars(made) == {"_metadata": 1}


def test_the_record_of_the_program_is_named() -> None:
    with pytest.raises(zipslicer.ProgramError) as caught:
        zipslicer.load(makers.checkpoint(b"\x80\x02\xff.").data)
    assert (caught.value.record, caught.value.offset) == ("archive/data.pkl", 2)


def test_a_byteorder_of_nobody_is_refused() -> None:
    with pytest.raises(ArchiveError, match="byteorder"):
        zipslicer.load(makers.checkpoint(Pickle().none().stop(), byteorder=b"middle").data)


def test_a_storage_whose_key_is_a_number_is_the_one_with_that_text() -> None:
    """torch.package writes integers; what is no number of a record is refused."""
    program = Pickle().mark().storage("ByteStorage", 7, 3).storage("ByteStorage", "7", 3).raw(b"t").stop()
    made = zipslicer.load(makers.checkpoint(program, {"7": b"abc"}).data, framework=makers.FRAMEWORK)
    assert [bytes(storage) for storage in made] == [b"abc", b"abc"]
    for key in (-1, 1 << 63):
        with pytest.raises(ProgramError):
            zipslicer.load(makers.checkpoint(Pickle().storage("ByteStorage", key, 3).stop(), {"7": b"abc"}).data)
