"""Plan: indexes and the bytes they need, by arithmetic alone; NumPy says what is right."""

from __future__ import annotations

from typing import Any

import pytest

np = pytest.importorskip("numpy")
hypothesis = pytest.importorskip("hypothesis")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from zipslicer.plan import FAR_APART, LONG_RUN, SLAB, Geometry, blocks, hull, index, is_contiguous, numel, pieces  # noqa: E402

ITEMSIZE = 4


@st.composite
def geometries(draw: Any) -> Geometry:
    """Dense, transposed, expanded, stepped and overlapping ones."""
    sizes = tuple(draw(st.lists(st.integers(0, 6), max_size=4)))
    strides = tuple(draw(st.integers(0, 9)) for _ in sizes)
    if draw(st.booleans()):
        run, dense = 1, []
        for n in reversed(sizes):
            dense.append(run)
            run *= max(n, 1)
        strides = tuple(draw(st.permutations(list(reversed(dense)))))
    return Geometry(draw(st.integers(0, 5)), sizes, strides)


@st.composite
def indices(draw: Any, ndim: int) -> Any:
    ends = st.none() | st.integers(-8, 8)
    steps = st.none() | st.integers(-4, 4).filter(bool)
    one = st.integers(-6, 5) | st.builds(slice, ends, ends, steps)
    items = draw(st.lists(one, max_size=ndim + 1))
    for extra in draw(st.lists(st.sampled_from([None, Ellipsis]), max_size=3)):
        items.insert(draw(st.integers(0, len(items))), extra)
    return items[0] if len(items) == 1 and draw(st.booleans()) else tuple(items)


def array_of(geometry: Geometry) -> Any:
    """An array with this geometry, each element its own place in the storage."""
    end = geometry.storage_offset + hull(geometry)
    storage = np.arange(max(end, geometry.storage_offset + 1), dtype=np.int32)
    strides = [stride * ITEMSIZE for stride in geometry.strides]
    return np.lib.stride_tricks.as_strided(storage[geometry.storage_offset :], geometry.sizes, strides)


def places(geometry: Geometry) -> Any:
    """The storage places of all elements, in the result's own order."""
    made = np.full(geometry.sizes, geometry.storage_offset, dtype=np.int64)
    for dim, (n, stride) in enumerate(zip(geometry.sizes, geometry.strides)):
        shape = [1] * len(geometry.sizes)
        shape[dim] = n
        made = made + (np.arange(n) * stride).reshape(shape)
    return made


@given(st.data())
def test_index_is_numpys_basic_indexing(data: Any) -> None:
    geometry = data.draw(geometries())
    wanted = data.draw(indices(len(geometry.sizes)))
    array = array_of(geometry)
    try:
        expected = array[wanted]
    except IndexError:
        with pytest.raises(IndexError):
            index(geometry, wanted)
        return
    sliced = index(geometry, wanted)
    got = np.flip(places(sliced.geometry), sliced.flips) if sliced.flips else places(sliced.geometry)
    assert got.shape == expected.shape
    assert got.tolist() == expected.tolist()
    assert all(stride >= 0 for stride in sliced.geometry.strides)


@given(geometries())
def test_hull_reaches_from_the_first_element_to_the_last(geometry: Geometry) -> None:
    found = places(geometry)
    assert numel(geometry.sizes) == found.size
    assert hull(geometry) == (found.max() - found.min() + 1 if found.size else 0)
    assert not found.size or found.min() == geometry.storage_offset


@given(geometries())
def test_is_contiguous_as_torch_has_it(geometry: Geometry) -> None:
    torch = pytest.importorskip("torch")
    meta = torch.empty_strided(geometry.sizes, geometry.strides, device="meta")
    assert is_contiguous(geometry.sizes, geometry.strides) == meta.is_contiguous()


def read(geometry: Geometry, itemsize: int) -> tuple[Any, int, int]:
    """Do what the pieces say on a storage of places -> (the result, bytes read, pieces)."""
    made = np.full(geometry.sizes, -1, dtype=np.int64)
    nbytes = count = 0
    for piece in pieces(geometry, itemsize):
        target = made
        for dim, start, length in piece.part:
            target = target[(slice(None),) * dim + (slice(start, start + length),)]
        if piece.run_numel:
            flat = np.concatenate([np.arange(start, start + piece.run_numel) for start in piece.starts])
            target[...] = flat.reshape(piece.geometry.sizes)
            nbytes += len(flat) * itemsize
        else:
            target[...] = places(piece.geometry)
            nbytes += hull(piece.geometry) * itemsize
        count += 1
    return made, nbytes, count


@given(geometries().filter(lambda g: numel(g.sizes)), st.sampled_from([1, 4, 16]))
def test_pieces_make_the_whole(geometry: Geometry, itemsize: int) -> None:
    made, _, _ = read(geometry, itemsize)
    assert made.tolist() == places(geometry).tolist()


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(5, (300, 300), (4096, 1)),  # long runs
        Geometry(0, (500, 1), (100_000, 1)),  # short runs, far apart
        Geometry(0, (1000, 1000), (3000, 3)),  # short runs, near: read through, in slabs
        Geometry(0, (2000, 2000), (1, 2000)),  # transposed and dense
        Geometry(0, (200, 3, 700), (90_000, 25_000, 7)),  # of both kinds
        Geometry(0, (70_000, 200), (1000, 1)),  # more runs than one read may name
    ],
)
def test_pieces_of_large_slices(geometry: Geometry) -> None:
    made, nbytes, _ = read(geometry, ITEMSIZE)
    assert np.array_equal(made, places(geometry))
    runs = numel(geometry.sizes) * ITEMSIZE
    assert nbytes <= hull(geometry) * ITEMSIZE
    assert nbytes >= runs
    for piece in pieces(geometry, ITEMSIZE):
        assert piece.run_numel or hull(piece.geometry) * ITEMSIZE <= max(SLAB, runs + runs // 20 + 4096)


def test_long_runs_are_read_alone() -> None:
    geometry = Geometry(0, (100, LONG_RUN), (100 * LONG_RUN, 1))
    assert read(geometry, ITEMSIZE)[1] == 100 * LONG_RUN * ITEMSIZE


def test_runs_far_apart_are_read_alone() -> None:
    geometry = Geometry(0, (100, 1), (FAR_APART + 1, 1))
    assert read(geometry, ITEMSIZE)[1] == 100 * ITEMSIZE


@pytest.mark.parametrize("wanted", [True, [0], np.array([0]), "a", 1.5, (0, [1]), b"x"])
def test_other_indexing_is_a_type_error(wanted: Any) -> None:
    with pytest.raises(TypeError, match="basic indexing"):
        index(Geometry(0, (3, 3), (3, 1)), wanted)


def test_an_index_may_be_anything_with_an_index_method() -> None:
    assert index(Geometry(0, (3, 3), (3, 1)), np.int64(2)).geometry == Geometry(6, (3,), (1,))


@pytest.mark.parametrize("wanted", [3, -4, (0, 0, 0), (..., ...), (0, 3)])
def test_index_errors(wanted: Any) -> None:
    with pytest.raises(IndexError):
        index(Geometry(0, (3, 3), (3, 1)), wanted)


def test_a_step_of_zero_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="zero"):
        index(Geometry(0, (3,), (1,)), slice(None, None, 0))


@given(st.lists(st.integers(0, 7), max_size=4), st.integers(1, 200))
def test_blocks_are_the_whole_in_order(shape: list[int], nbytes: int) -> None:
    array = np.arange(numel(shape), dtype=np.int32).reshape(shape)
    parts = [array[block] for block in blocks(shape, ITEMSIZE, nbytes)]
    joined = np.concatenate([part.ravel() for part in parts]) if parts else np.empty(0, np.int32)
    assert joined.tolist() == array.ravel().tolist()
    assert all(part.nbytes <= max(nbytes, ITEMSIZE) for part in parts)
    if array.size:
        assert len(parts) <= 1 + 2 * array.nbytes * max(shape, default=1) // nbytes
