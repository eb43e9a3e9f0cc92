"""Bytes of a tensor, out of whatever chunks have them, are those that the tensor has in row-major order."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import zipslicer
from zipslicer.dcp_source import LONG_RUN, _boxes, _hull, _joined, _pieces, _scatter
from zipslicer.plan import numel, row_major

torch = pytest.importorskip("torch")
if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

import dcp_folders  # noqa: E402

SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)
DTYPES = [torch.uint8, torch.float16, torch.float32, torch.float64, torch.complex128]


@given(SIZES, st.data())
def test_boxes_are_the_range(sizes: tuple[int, ...], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, numel(sizes)))
    end = data.draw(st.integers(start, numel(sizes)))
    found = []
    whole = torch.arange(numel(sizes)).reshape(sizes)
    boxes = list(_boxes(sizes, start, end))
    for starts, counts in boxes:
        found += whole[tuple(slice(a, a + n) for a, n in zip(starts, counts))].reshape(-1).tolist()
    assert found == list(range(start, end))
    assert len(boxes) <= 2 * len(sizes) - 1


@given(SIZES, st.permutations(range(4)), st.sampled_from([1, 2, 4, 8, 16]), st.integers(0, 3), st.booleans())
def test_pieces_move_each_byte_once(
    sizes: tuple[int, ...], order: list[int], itemsize: int, room: int, numpy_is_there: bool
) -> None:
    """From any strided layout to row-major order, with room between the rows of both."""
    dims = [d for d in order if d < len(sizes)]
    strides, run = [0] * len(sizes), itemsize
    for d in reversed(dims):
        strides[d] = run
        run *= sizes[d]
        run += room * itemsize
    whole = (*sizes, itemsize)
    apart = row_major(whole)
    joined = _joined(whole, (*strides, 1), apart)
    length = _hull([(n, a, b) for n, a, b in zip(whole, (*strides, 1), apart)])
    source = memoryview(bytes(i % 251 for i in range(length + 7)))
    target = memoryview(bytearray(numel(whole)))
    with pytest.MonkeyPatch.context() as patch:
        if not numpy_is_there:
            patch.setattr(builtins, "__import__", _without_numpy)
        for at, to, part in _pieces(7, 0, joined):
            _scatter(memoryview(bytearray(source[at : at + _hull(part)])), target, to, part)
    wanted = bytearray()
    for place in torch.cartesian_prod(*[torch.arange(n) for n in sizes]).reshape(-1, len(sizes)).tolist():
        at = 7 + sum(i * stride for i, stride in zip(place, strides))
        wanted += source[at : at + itemsize]
    assert target == wanted


_import = builtins.__import__


def _without_numpy(name: str, *args: Any, **kwargs: Any) -> Any:
    if name == "numpy":
        raise ImportError(name)
    return _import(name, *args, **kwargs)


def test_long_runs_are_read_into_their_place() -> None:
    rows = [(10, 4 * LONG_RUN, LONG_RUN), (LONG_RUN, 1, 1)]
    pieces = list(_pieces(0, 0, rows))
    assert [(at, to) for at, to, _ in pieces] == [(4 * LONG_RUN * i, LONG_RUN * i) for i in range(10)]
    assert all(part == [(LONG_RUN, 1, 1)] for _, _, part in pieces)


def test_runs_that_are_far_apart_are_not_read_through() -> None:
    rows = [(1000, 1 << 20, 64), (64, 1, 1)]
    pieces = list(_pieces(0, 0, rows))
    assert len(pieces) == 1000
    assert sum(_hull(part) for _, _, part in pieces) == 64_000


def cut(draw: Any, sizes: tuple[int, ...]) -> list[dcp_folders.Box]:
    """A tensor in chunks: cut by planes, the parts of which are cut again."""
    boxes: list[dcp_folders.Box] = [((0,) * len(sizes), sizes)]
    for _ in range(draw(st.integers(0, 5))):
        starts, counts = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(sizes) - 1))
        at = draw(st.integers(1, counts[dim])) if counts[dim] else 0
        boxes.append((starts, (*counts[:dim], at, *counts[dim + 1 :])))
        if at < counts[dim]:
            rest = (*counts[:dim], counts[dim] - at, *counts[dim + 1 :])
            boxes.append(((*starts[:dim], starts[dim] + at, *starts[dim + 1 :]), rest))
    return boxes


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=SIZES, dtype=st.sampled_from(DTYPES), data=st.data())
def test_any_chunks_any_slice(tmp_path: Path, sizes: tuple[int, ...], dtype: Any, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(sizes))))
    whole = torch.arange(numel(sizes), dtype=torch.float64).reshape(sizes)
    whole = whole.to(dtype).permute(order).contiguous().permute([order.index(d) for d in range(len(sizes))])
    folder = dcp_folders.chunked(tmp_path / "any", {"w": (whole, cut(data.draw, sizes))}, ranks=3)
    with zipslicer.open(folder) as checkpoint:
        sd = checkpoint.root
        assert dcp_folders.same(sd["w"], whole)
        index = tuple(
            slice(data.draw(st.integers(0, n)), data.draw(st.integers(0, n)), data.draw(st.integers(1, 3)))
            for n in sizes
        )
        assert dcp_folders.same(sd.get_slice("w")[index], whole[index])
        source: Any = checkpoint.tensors._view.table.archive.source
        start = data.draw(st.integers(0, whole.nbytes))
        buffers = [bytearray(data.draw(st.integers(0, whole.nbytes))) for _ in range(2)]
        count = source.preadv(buffers, start)
        wanted = whole.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if whole.numel() else b""
        got = b"".join(buffers)[:count]
        assert got == wanted[start : start + count]
        assert count == min(len(b"".join(buffers)), whole.nbytes - start)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/io")
def test_a_slice_reads_its_own_bytes(tmp_path: Path) -> None:
    whole = torch.randn(512, 8192)  # gaps of a page and less are read through
    halves = [((0, 0), (256, 8192)), ((256, 0), (256, 8192))]
    columns = [((0, 0), (512, 4096)), ((0, 4096), (512, 4096))]
    folder = dcp_folders.chunked(tmp_path / "x", {"rows": (whole, halves), "columns": (whole, columns)})

    def rchar() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    sd = zipslicer.load(folder)
    for name in ("rows", "columns"):
        assert sd.get_slice(name)[0, 0] == whole[0, 0]
        for index in (slice(10, 30), slice(200, 300), (slice(None), slice(0, 4096))):
            before = rchar()
            assert torch.equal(sd.get_slice(name)[index], whole[index])
            assert rchar() - before <= 1.05 * whole[index].nbytes + (256 << 10), (name, index)
