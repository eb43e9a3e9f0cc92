"""Arrays: NumPy's own pickles, built without running NumPy's loaders; what holds objects stays a placeholder."""

from __future__ import annotations

import pickle
from typing import Any

import makers
import pytest
from makers import Pickle

import zipslicer
from zipslicer.arrays import array_value
from zipslicer.policy import NOT_PLAIN, Meaning

np = pytest.importorskip("numpy")

ARRAYS = [
    np.arange(6, dtype=np.int16).reshape(2, 3),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.arange(5, dtype=">i4"),
    np.array(3.5),
    np.zeros((0, 4), dtype=np.complex64),
    np.array([True, False]),
    np.array(["a", "bcd"]),
    np.array([b"a", b"bcd"]),
    np.array(["2020-01-02", "NaT"], dtype="M8[D]"),
    np.array([1, 2], dtype="m8[25us]"),
    np.array([(1, 2.5, b"x")], dtype=[("a", "<i4"), ("b", "<f8"), ("c", "S3")]),
    np.arange(4, dtype=np.float16)[::2],
    np.float64(1.5),
    np.int8(-3),
    np.bool_(True),
    np.str_("text"),
    np.datetime64("2020-01-02T03:04", "m"),
    np.complex128(1 + 2j),
    np.dtype("<f4"),
    np.dtype(">u2"),
    np.dtype("M8[ns]"),
    np.dtype([("a", "<i4"), ("b", "<f8")]),
]


def built(value: Any, protocol: int = 2) -> Any:
    return zipslicer.load(makers.checkpoint(pickle.dumps([value], protocol)).data)[0]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("value", ARRAYS, ids=repr)
def test_arrays_are_what_pickle_makes(value: Any, protocol: int) -> None:
    made, wanted = built(value, protocol), pickle.loads(pickle.dumps(value, protocol))
    assert type(made) is type(wanted)
    if isinstance(value, np.dtype):
        assert made == wanted
        return
    # NumPy gives up a foreign byte order on the way through protocols 2 to 4; the values are the same.
    assert (made.dtype.newbyteorder("="), made.shape) == (wanted.dtype.newbyteorder("="), wanted.shape)
    assert repr(made.tolist()) == repr(wanted.tolist())
    if isinstance(value, np.ndarray):
        assert made.flags.writeable
        assert made.flags.f_contiguous == wanted.flags.f_contiguous


def test_an_array_owns_its_memory() -> None:
    data = makers.checkpoint(pickle.dumps({"a": np.zeros(3)})).data
    one, other = zipslicer.load(data)["a"], zipslicer.load(data)["a"]
    one[:] = 1
    assert other.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "value",
    [np.array([{}, None], dtype=object), np.array([(1, [])], dtype=[("a", "i4"), ("b", "O")]), np.dtype(object)],
    ids=["array", "structure", "dtype"],
)
def test_objects_stay_placeholders(value: Any) -> None:
    made = built(value)
    assert type(made) is zipslicer.Placeholder
    assert "numpy" in repr(made)


EIGHT = np.dtype("f8")


@pytest.mark.parametrize(
    ("meaning", "args", "state"),
    [
        (Meaning.NUMPY_DTYPE, ("O8", False, True), None),
        (Meaning.NUMPY_DTYPE, ("f8,f8", False, True), None),
        (Meaning.NUMPY_DTYPE, ("S999999999", False, True), None),
        (Meaning.NUMPY_DTYPE, (), None),
        (Meaning.NUMPY_DTYPE, ("f8", False, True), (3, "?", None, None, None, -1, -1, 0)),
        (Meaning.NUMPY_DTYPE, ("f8", False, True), (3, "<", ("f4", (2,)), None, None, -1, -1, 0)),
        (Meaning.NUMPY_DTYPE, ("V8", False, True), (3, "|", None, ("a",), {"a": (EIGHT, 1)}, 8, 1, 0)),
        (Meaning.NUMPY_DTYPE, ("V8", False, True), (3, "|", None, ("a",), {"a": (EIGHT, -1)}, 8, 1, 0)),
        (Meaning.NUMPY_DTYPE, ("V8", False, True), (3, "|", None, ("a", "a"), {"a": (EIGHT, 0)}, 8, 1, 0)),
        (Meaning.NUMPY_DTYPE, ("V8", False, True), (3, "|", None, ("a",), {}, 8, 1, 0)),
        (Meaning.NUMPY_DTYPE, ("M8", False, True), (4, "<", None, None, None, -1, -1, 0, ({}, (b"eon", 1, 1, 1)))),
        (Meaning.NUMPY_DTYPE, ("M8", False, True), (4, "<", None, None, None, -1, -1, 0, ({}, (b"D", 1 << 40, 1, 1)))),
        (Meaning.NUMPY_SCALAR, (EIGHT, b"short"), None),
        (Meaning.NUMPY_SCALAR, (EIGHT,), None),
        (Meaning.NUMPY_SCALAR, ("f8", bytes(8)), None),
        (Meaning.NUMPY_BUFFER, (bytes(8), EIGHT, (2,), "C"), None),
        (Meaning.NUMPY_BUFFER, (bytes(8), EIGHT, (-1,), "C"), None),
        (Meaning.NUMPY_BUFFER, (bytes(8), EIGHT, (1,), "K"), None),
        (Meaning.NUMPY_BUFFER, (bytes(8), EIGHT, (1,), np.arange(3)), None),
        (Meaning.NUMPY_DTYPE, ("f8", False, True), (3, np.arange(3), None, None, None, -1, -1, 0)),
        (Meaning.NUMPY_BUFFER, (b"", EIGHT, (0, 1 << 62, 1 << 62), "C"), None),
        (Meaning.NUMPY_BUFFER, (b"", np.dtype("S0"), (1 << 40,), "C"), None),
        (Meaning.NUMPY_BUFFER, (bytes(8), EIGHT, (1,) * 33, "C"), None),
        (Meaning.NUMPY_ARRAY, (np.ndarray, (0,), b"b"), (1, (1,), EIGHT, False, bytes(8))),
        (Meaning.NUMPY_NDARRAY, (), None),
    ],
)
def test_what_numpy_does_not_write_is_not_made(meaning: int, args: tuple[Any, ...], state: Any) -> None:
    assert array_value(meaning, args, state) is NOT_PLAIN


def test_a_file_that_lies_about_an_array_gives_a_placeholder() -> None:
    program = Pickle(4).call(
        "numpy._core.multiarray",
        "scalar",
        lambda p: p.call(
            "numpy", "dtype", lambda q: q.text("f8"), lambda q: q.boolean(False), lambda q: q.boolean(True)
        ),
        lambda p: p.raw(b"C\x04abcd"),
    )
    assert type(zipslicer.load(makers.checkpoint(program.stop()).data)) is zipslicer.Placeholder
