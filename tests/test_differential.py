"""Native against pure: the same result, or the same class of error at the same byte, whatever the bytes are."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import itertools
import os
import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import makers
import pytest

pytest.importorskip("hypothesis")

import strategies
from hypothesis import event, example, given
from hypothesis import strategies as st

from zipslicer import _pure, policy
from zipslicer._pure import extent as pure_extent
from zipslicer.backend import COUNTED, ENTRY_FIELDS, JOB_FIELDS, Entry, Hot, Kind, Maker
from zipslicer.errors import ChangedError, ZipSlicerError
from zipslicer.source import Memory


@pytest.fixture(scope="module")
def native() -> Any:
    if importlib.util.find_spec("zipslicer._native") is None:
        if os.environ.get("ZIPSLICER_REQUIRE_NATIVE") == "1":
            pytest.fail("ZIPSLICER_REQUIRE_NATIVE=1, and zipslicer._native was not built")
        pytest.skip("zipslicer._native was not built: there is nothing to compare the pure backend with")
    return importlib.import_module("zipslicer._native")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file that every example writes anew."""
    return tmp_path_factory.mktemp("differential") / "archive"


def outcome(act: Callable[..., Any], *arguments: Any) -> tuple[Any, ...]:
    """What came, or what was raised and where. An error that no caller is told of is a failure."""
    try:
        return ("came", plain(act(*arguments)))
    except ZipSlicerError as error:
        return (type(error), error.offset, getattr(error, "global_name", None))
    except OSError as error:
        return (type(error), error.errno)


def plain(value: Any) -> Any:
    """Buffers as bytes, so that one may be a bytearray and the other a memoryview."""
    if isinstance(value, (bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, list):
        return [plain(each) for each in value]
    return tuple(map(plain, value)) if isinstance(value, tuple) else value


def compare(native: Any, function: str, *arguments: Any) -> tuple[Any, ...]:
    """Call one function of both backends, and pass on what both gave. A bytearray is copied for each."""
    ours, theirs = (
        outcome(getattr(backend, function), *(bytearray(a) if isinstance(a, bytearray) else a for a in arguments))
        for backend in (_pure, native)
    )
    assert theirs == ours, f"{function}: native (left) is not what pure is (right)"
    return ours


def told(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """Count what was compared, for --hypothesis-show-statistics."""
    event(result[0] if result[0] == "came" else result[0].__name__)
    return result


def test_the_same_functions(native: Any) -> None:
    assert native.name == "native"
    assert _pure.name == "pure"
    for function in _pure.__all__:
        assert hasattr(native, function)


# --- scan_pickle ------------------------------------------------------------------------------------------------------


FULL_LIMITS = (*strategies.FULL, False, 0)


def scan(native: Any, program: bytes, limits: Sequence[int]) -> tuple[Any, ...]:
    return compare(native, "scan_pickle", program, policy.actions(), limits)


@given(limits=strategies.machine_limits(), data=st.data())
def test_programs(native: Any, limits: Sequence[int], data: st.DataObject) -> None:
    program = data.draw(strategies.damaged(strategies.programs_of(limits[-1])))
    event(f"dialect {limits[-1]}")
    told(scan(native, program, limits))


@given(program=strategies.OPCODE_SOUP, limits=strategies.machine_limits())
@example(program=b"\x95" + b"\xff" * 8, limits=FULL_LIMITS)
@example(program=b"\x8b\xff\xff\xff\xff.", limits=FULL_LIMITS)
@example(program=b"]2\x85" * 2000 + b".", limits=FULL_LIMITS)
@example(program=b"".join([b"]" * 1001, b"a" * 1000, b"."]), limits=FULL_LIMITS)
def test_opcodes(native: Any, program: bytes, limits: Sequence[int]) -> None:
    told(scan(native, program, limits))


def test_each_opcode(native: Any) -> None:
    """Every byte as an opcode: on nothing, a value, a pair, a mark; with an operand, and cut short."""
    for before in (
        b"",
        b"N",
        b"NN",
        b"NNN",
        b"(",
        b"(N",
        b"]N",
        b"}NN",
        b"](",
        b"}(",
        b"X\1\0\0\0a",
        b"c\n\n)",
        b"c\n\n}",
    ):
        for after in (b"", b".", b"\0", b"\1a.", b"\1\0\0\0.", b"\0" * 8 + b".", b"1\n.", b"1\n1\n.", b"\xff" * 9):
            for opcode in range(256):
                scan(native, before + bytes([opcode]) + after, FULL_LIMITS)


# --- find_directory, parse_directory, find_records, parse_local_header ---------------------------------------------------

BASES = st.sampled_from([0, 0, 7, 1 << 33, 1 << 62])


@given(drawn=strategies.archives(), base=BASES, data=st.data())
def test_directories(native: Any, drawn: strategies.Drawn, base: int, data: st.DataObject) -> None:
    """Every function that takes bytes, one after the other, each on what the one before gave."""
    content = drawn.data
    start = data.draw(st.sampled_from([0, 0, 0, min(len(content), drawn.written.directory_offset)]))
    found = told(compare(native, "find_directory", content[start:], base + start, base))
    if found[0] != "came":
        return
    offset, nbytes, count = found[1]
    block = content[offset - base : offset - base + nbytes]
    if data.draw(strategies.rarely(5)):
        block = strategies.spoil(block, data.draw(strategies.MUTATIONS))
        count = max(0, count + data.draw(st.integers(-1, 1)))
    parsed = told(compare(native, "parse_directory", block, count, offset, base))
    if parsed[0] != "came":
        return
    entries, prefix_nbytes = parsed[1]
    names = [*strategies.RECORD_NAMES, "none", "\ud800", data.draw(st.text(max_size=3))]
    encoded = [name.encode("utf-8", "surrogatepass") for name in names]
    ends = list(itertools.accumulate(map(len, encoded)))
    some = list(memoryview(entries).cast("q")[Entry.NAME_START :: ENTRY_FIELDS])[:1]
    for prefix in (b"", *(bytes(block[start : start + prefix_nbytes]) for start in some)):
        compare(native, "find_records", block, bytearray(entries), prefix, b"".join(encoded), ends)
    rows = memoryview(entries).cast("q")
    for record in range(count):
        at = rows[record * ENTRY_FIELDS + Entry.HEADER_OFFSET] - base
        head = content[at : data.draw(st.sampled_from([at, at + 29, at + 50, len(content), len(content)]))]
        told(compare(native, "parse_local_header", head, block, bytearray(entries), record))


NOISE = st.sampled_from([b"PK\5\6", b"PK\6\6", b"PK\6\7", b"\0" * 9, b"\xff\xff", b"\1"])


@given(tail=st.lists(NOISE, max_size=30).map(b"".join), base=st.sampled_from([0, 3]))
def test_end_records_in_noise(native: Any, tail: bytes, base: int) -> None:
    told(compare(native, "find_directory", tail, base, base))


# --- reads ------------------------------------------------------------------------------------------------------------


class Dribble:
    """A source without a descriptor that gives a few bytes at a time."""

    def __init__(self, content: bytes, most: int) -> None:
        self.content = content
        self.most = most

    def preadv(self, buffers: Sequence[Any], offset: int, /) -> int:
        done = 0
        for buffer in buffers:
            part = self.content[offset + done : offset + min(done + len(buffer), self.most)]
            memoryview(buffer)[: len(part)] = part
            done += len(part)
            if len(part) < len(buffer):
                break
        return done


@contextlib.contextmanager
def opened(content: bytes, path: Path, most: int) -> Iterator[tuple[Any, bytes]]:
    """(handle, right stamp) of the content: a descriptor if `most` is 0, else a Dribble."""
    if most:
        yield Dribble(content, most), b""
        return
    path.write_bytes(content)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        facts = os.fstat(descriptor)
        yield descriptor, array("q", (facts.st_size, facts.st_mtime_ns, facts.st_ino)).tobytes()
    finally:
        os.close(descriptor)


MOST = st.sampled_from([0, 0, 1, 7, 1 << 20]) if hasattr(os, "preadv") else st.sampled_from([1, 7, 1 << 20])


@given(size=st.integers(0, 300), offset=st.integers(0, 320), nbytes=st.integers(0, 64), most=MOST)
def test_bytes(native: Any, path: Path, size: int, offset: int, nbytes: int, most: int) -> None:
    content = (bytes(range(256)) * 2)[:size]
    with opened(content, path, most) as (handle, _):
        result = told(outcome(lambda backend: backend.read_bytes(handle, offset, nbytes), _pure))
        assert outcome(lambda backend: backend.read_bytes(handle, offset, nbytes), native) == result
    if result[0] == "came":
        assert result[1] == content[offset : offset + nbytes]
    else:
        assert nbytes
        assert offset + nbytes > size


def test_large_jobs_on_threads(native: Any, path: Path) -> None:
    """Chunks, threads and huge pages: 40 MiB of one proved record, in three jobs that overlap, from the last to the first."""
    content = os.urandom(1 << 20) * 40
    entries = bytearray(array("q", (0, 0, len(content), len(content), len(content), 0, 0, 0, 0, 0)).tobytes())
    offsets = [30 << 20, 9 << 20, 5]
    sizes = [10 << 20, 22 << 20, (10 << 20) + 3]
    wanted = [content[offset : offset + size] for offset, size in zip(offsets, sizes, strict=True)]
    jobs = array("q")
    for buffer, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        jobs.extend((0, offset, size, buffer, 0))
    with opened(content, path, 0 if hasattr(os, "preadv") else 1 << 20) as (handle, stamp):
        for backend in (_pure, native):
            for threads in (1, 2, 5):
                buffers = [backend.allocate(size) for size in sizes]
                backend.read_records(handle, stamp, b"", entries, jobs.tobytes(), buffers, threads)
                assert [bytes(buffer) for buffer in buffers] == wanted


@pytest.mark.parametrize("nbytes", [0, 1, 4095, (2 << 20) - 1, 2 << 20, (2 << 20) + 1, 5 << 20])
def test_allocate(native: Any, nbytes: int) -> None:
    for backend in (_pure, native):
        view = memoryview(backend.allocate(nbytes)).cast("B")
        assert len(view) == nbytes
        assert not view.readonly
        if nbytes:
            view[0] = view[-1] = 7


@given(drawn=strategies.archives(), most=MOST, stale=strategies.rarely(8), threads=st.integers(1, 2), data=st.data())
def test_records(
    native: Any, path: Path, drawn: strategies.Drawn, most: int, stale: bool, threads: int, data: st.DataObject
) -> None:
    """One by one and many at once; what a read has proved of a record is used by the next one."""
    content = drawn.data
    try:
        offset, nbytes, count = _pure.find_directory(content, 0, 0)
        block = content[offset : offset + nbytes]
        entries, _ = _pure.parse_directory(block, count, offset, 0)
    except ZipSlicerError:
        return
    rows = memoryview(entries).cast("q")
    wanted = []
    for _ in range(data.draw(st.integers(0, 5))):
        record = data.draw(st.integers(0, count - 1))
        stored = rows[record * ENTRY_FIELDS + Entry.STORED_NBYTES]
        start = data.draw(st.integers(0, stored))
        wanted.append((record, start, data.draw(st.integers(0, stored - start))))
    del rows
    jobs = array("q")
    for place, (record, start, size) in enumerate(wanted):
        jobs.extend((record, start, size, place, 3))
    assert len(jobs) == JOB_FIELDS * len(wanted)
    if data.draw(strategies.rarely(10)):
        content = content[: data.draw(st.integers(0, len(content)))]  # cut after the directory was read
    with opened(content, path, most) as (handle, stamp):
        stamp = bytes(len(stamp)) if stale else stamp

        def read_each(backend: Any) -> list[Any]:
            table = bytearray(entries)
            found = [outcome(backend.read_record, handle, stamp, block, table, *job) for job in wanted]
            return [*found, bytes(table)]

        def read_all(backend: Any) -> tuple[bytes, ...]:
            table = bytearray(entries)
            buffers = [bytearray(size + 5) for _, _, size in wanted]
            backend.read_records(handle, stamp, block, table, jobs.tobytes(), buffers, threads)
            return (*map(bytes, buffers), bytes(table))

        one_by_one = read_each(_pure)
        assert read_each(native) == one_by_one
        at_once = told(outcome(read_all, _pure))
        assert outcome(read_all, native) == at_once
    proved = memoryview(one_by_one[-1]).cast("q")[Entry.PAYLOAD_OFFSET :: ENTRY_FIELDS].tolist()
    for (record, start, size), result in zip(wanted, one_by_one, strict=False):
        if result[0] == "came":
            assert result[1] == content[proved[record] + start : proved[record] + start + size]
    if at_once[0] == "came":
        assert [buffer[3:-2] for buffer in at_once[1][:-1]] == [result[1] for result in one_by_one[:-1]]


@pytest.mark.parametrize("start", [0, 1, 4000, 5000, 8100, 8999])
@pytest.mark.parametrize("nbytes", [0, 1])
def test_a_record_that_was_cut_behind_its_header(native: Any, path: Path, start: int, nbytes: int) -> None:
    """No bytes of it can be had, as there is nothing to read; where one is missing is told alike, near its header or not."""
    archive = makers.Zip()
    record = archive.add("archive/data/0", bytes(9000))
    content = archive.finish().data
    offset, size, count = _pure.find_directory(content, 0, 0)
    block = content[offset : offset + size]
    entries, _ = _pure.parse_directory(block, count, offset, 0)
    job = array("q", (0, start, nbytes, 0, 0)).tobytes()
    found = []
    with opened(content[: record.payload_offset], path, 0) as (handle, stamp):
        for backend in (_pure, native):
            one = outcome(backend.read_record, handle, stamp, block, bytearray(entries), 0, start, nbytes)
            buffer = bytearray(nbytes)
            several = outcome(backend.read_records, handle, stamp, block, bytearray(entries), job, [buffer], 1)
            found.append((one, several))
    assert found[0] == found[1]
    assert found[0][0] == (("came", b"") if nbytes == 0 else (ChangedError, found[0][0][1], None))
    assert (found[0][1][0] == "came") == (nbytes == 0)


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    wrong=strategies.rarely(4),
    most=MOST,
    threads=st.integers(1, 2),
    data=st.data(),
)
def test_counted_records(
    native: Any, path: Path, sizes: list[int], wrong: bool, most: int, threads: int, data: st.DataObject
) -> None:
    """Records of a stream: eight bytes of count, then the payload, one after the other."""
    content, entries = b"head", array("q")
    for size in sizes:
        count = data.draw(st.sampled_from([size, size + 1, -1, 1 << 62])) if wrong else size
        at = len(content) + 8
        content += struct.pack("<q", count) + bytes(range(size))
        entries.extend((at - 8, ~at, size, size, at + size, size, 0, COUNTED, 0, 0))
    wanted = []
    for _ in range(data.draw(st.integers(0, 4))):
        record = data.draw(st.integers(0, len(sizes) - 1))
        start = data.draw(st.integers(0, sizes[record]))
        wanted.append((record, start, data.draw(st.integers(0, sizes[record] - start))))
    rows = array("q", [n for place, job in enumerate(wanted) for n in (*job, place, 0)]).tobytes()
    if not wrong and data.draw(strategies.rarely(6)):  # of two kinds of failure, which comes first is not promised
        content = content[: data.draw(st.integers(0, len(content)))]
    with opened(content, path, most) as (handle, stamp):

        def read_each(backend: Any) -> list[Any]:
            table = bytearray(entries.tobytes())
            found = [outcome(backend.read_record, handle, stamp, b"", table, *job) for job in wanted]
            return [*found, bytes(table)]

        def read_all(backend: Any) -> tuple[bytes, ...]:
            table = bytearray(entries.tobytes())
            buffers = [bytearray(size) for _, _, size in wanted]
            backend.read_records(handle, stamp, b"", table, rows, buffers, threads)
            return (*map(bytes, buffers), bytes(table))

        one_by_one = read_each(_pure)
        assert read_each(native) == one_by_one
        at_once = told(outcome(read_all, _pure))
        assert outcome(read_all, native) == at_once
    for (_, start, size), result in zip(wanted, one_by_one, strict=False):
        if result[0] == "came":
            assert result[1] == bytes(range(start, start + size))
    head = data.draw(st.binary(max_size=9))
    compare(native, "parse_local_header", head, b"", bytearray(entries.tobytes()), 0)


@given(st.data())
def test_read_tensor(native: Any, data: st.DataObject) -> None:
    content = makers.checkpoint(b"N.", {"0": bytes(range(64)), "1": bytes(range(64, 80))}).data
    offset, nbytes, count = _pure.find_directory(content, 0, 0)
    block = content[offset : offset + nbytes]
    entries, _ = _pure.parse_directory(block, count, offset, 0)
    records = _pure.find_records(block, entries, b"archive/data/", b"01", [1, 2])
    assert min(records) >= 0
    direct = array("q", [*records, -1])
    storage = data.draw(st.sampled_from([0, 0, 1, 2]))
    itemsize = data.draw(st.sampled_from([1, 2, 4, 8]))
    start = data.draw(st.integers(0, 3))
    extent = data.draw(st.integers(0, max(0, (16 if storage else 64) // itemsize - start)))
    dims = array("q", data.draw(st.lists(st.integers(0, 9), min_size=4, max_size=4)))
    ndim = data.draw(st.integers(0, 2))
    flags = data.draw(st.sampled_from([0, 0, 0, 1, 2, 4]))
    row = array("q", (storage, 3, itemsize, start, 0, ndim, flags, 0, extent)).tobytes()
    limit = data.draw(st.sampled_from([1, 16, 4096]))
    kinds, payloads = bytes([Kind.DICT, Kind.TENSOR]), memoryview(array("q", [0, 0]))
    columns = (kinds, payloads, row, memoryview(dims), direct)
    hot = Hot(Memory(content), block, entries, *columns, limit, None, bool)
    value = data.draw(st.sampled_from([-1, 0, 1, 1]))  # of these row 0 is meant by all but the dict
    result = compare(native, "read_tensor", hot, value)
    if value == 0 or storage == 2 or flags or not 0 < extent * itemsize < limit:
        assert result == ("came", None)
    else:
        first = 64 * storage + start * itemsize
        expected = bytes(range(first, first + extent * itemsize))
        assert result == ("came", (expected, 3, tuple(dims[:ndim]), tuple(dims[ndim : 2 * ndim])))


@given(
    rows=st.lists(
        st.tuples(
            st.integers(0, 3), st.integers(0, 2), st.integers(0, 4), st.sampled_from([0, 0, 0, 1]), st.integers(0, 5)
        ),
        max_size=6,
    ),
    whole=st.booleans(),
    limit=st.sampled_from([5, 4096]),
    data=st.data(),
)
def test_read_tensors(
    native: Any, rows: list[tuple[int, int, int, int, int]], whole: bool, limit: int, data: st.DataObject
) -> None:
    """Of each row what read_tensor gives; with `whole`, of those that have a storage to themselves."""
    contents = {str(i): bytes(range(16 * i, 16 * i + n)) for i, n in enumerate((0, 3, 4))}
    content = makers.checkpoint(b"N.", contents).data
    offset, nbytes, count = _pure.find_directory(content, 0, 0)
    block = content[offset : offset + nbytes]
    entries, _ = _pure.parse_directory(block, count, offset, 0)
    direct = array("q", [*_pure.find_records(block, entries, b"archive/data/", b"012", [1, 2, 3]), -1])
    sizes = [*map(len, contents.values()), 0]
    # (storage, dtype, itemsize, storage_offset, dims, ndim, flags, offset, extent), of bytes that are there
    table = [
        (storage, dtype, 1, min(start, sizes[storage]), 0, 1, flags, 0, max(0, min(extent, sizes[storage] - start)))
        for storage, dtype, start, flags, extent in rows
    ]
    numbers = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=8)) if rows else []
    packed = array("q", [field for row in table for field in row]).tobytes()
    columns = (b"", memoryview(array("q")), packed, memoryview(array("q", [7, 1])), direct)
    hot = Hot(Memory(content), block, entries, *columns, limit, None, bool)
    found = compare(native, "read_tensors", hot, numbers, whole, data.draw(st.integers(1, 2)))
    storages = [table[number][0] for number in numbers]
    expected = []
    for number in numbers:
        storage, _, _, start, *_, extent = table[number]
        is_alone = storages.count(storage) == 1 and not start and extent == sizes[storage]
        each = _pure.read_tensor(hot, ~number)
        expected.append(None if each is None or (whole and not is_alone) else (bytes(each[0]), *each[1:]))
    assert found == ("came", expected)


@given(
    dims=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 300)), max_size=3),
    nbytes=st.integers(1, 40),
    start=st.integers(0, 50),
    proved=st.booleans(),
    threads=st.integers(1, 2),
    most=MOST,
)
@example(dims=[(700, 5)], nbytes=2, start=0, proved=True, threads=1, most=0)  # more than one preadv takes
@example(dims=[(2, 9), (3, 4)], nbytes=4, start=0, proved=False, threads=1, most=0)
@example(dims=[(300, 20_000)], nbytes=20_000, start=5, proved=True, threads=2, most=0)  # worth threads, all one stretch
def test_runs(
    native: Any,
    path: Path,
    dims: list[tuple[int, int]],
    nbytes: int,
    start: int,
    proved: bool,
    threads: int,
    most: int,
) -> None:
    starts = [start]
    for n, stride in dims:
        starts = [first + i * stride for first in starts for i in range(n)]
    payload = bytes(i * 7 % 251 for i in range(251)) * ((max(starts, default=0) + nbytes) // 251 + 1)
    content = makers.checkpoint(b"N.", {"0": payload}).data
    offset, block_nbytes, count = _pure.find_directory(content, 0, 0)
    block = content[offset : offset + block_nbytes]
    entries, _ = _pure.parse_directory(block, count, offset, 0)
    (record,) = _pure.find_records(block, entries, b"archive/data/", b"0", [1])
    with opened(content, path, most) as (handle, stamp):
        if proved:
            _pure.read_record(handle, stamp, block, entries, record, 0, 0)
        flat = [number for dim in dims for number in dim]
        arguments = (record, start, nbytes, flat)
        for backend in (_pure, native):
            buffer, table = bytearray(len(starts) * nbytes), bytearray(entries)
            backend.read_runs(handle, stamp, block, table, *arguments, buffer, threads)
            assert bytes(buffer) == b"".join(payload[first : first + nbytes] for first in starts)
        with pytest.raises(ValueError, match="is not for"):
            native.read_runs(handle, stamp, block, entries, *arguments, bytearray(len(starts) * nbytes + 1), 1)
        with pytest.raises(ValueError, match="is not for"):
            _pure.read_runs(handle, stamp, block, entries, *arguments, bytearray(len(starts) * nbytes + 1), 1)


class Stuck:
    """A handle that reads what it says, whatever was asked for."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def preadv(self, _buffers: Any, _offset: int) -> Any:
        return self.answer


ROWS = bytes(8 * ENTRY_FIELDS)
NOT_ALIGNED = memoryview(bytearray(8 * ENTRY_FIELDS + 8))[1:-7]
JOB = array("q", (0, 0, 1, 0, 0)).tobytes()


@pytest.mark.parametrize(
    ("function", "arguments", "error"),
    [
        ("allocate", (-1,), ValueError),
        ("allocate", (1 << 62,), MemoryError),
        ("allocate", ("1",), TypeError),
        ("read_bytes", (b"no handle", 0, 1), AttributeError),
        ("read_bytes", (Stuck(1), -1, 1), ValueError),
        ("read_bytes", (Stuck(1), 0, -1), ValueError),
        ("read_bytes", (Stuck(7), 0, 1), RuntimeError),
        ("read_bytes", (Stuck(-1), 0, 1), RuntimeError),
        ("read_bytes", (Stuck("x"), 0, 1), TypeError),
        ("read_bytes", (Stuck(0), 0, 1), ChangedError),
        ("read_bytes", (-1, 0, 1), OSError),
        ("read_bytes", (1 << 40, 0, 1), OSError),
        ("read_bytes", ((1 << 40, 1), 0, 1), OSError),
        ("read_record", (Stuck(1), b"", b"", bytearray(), 0, 0, 1), IndexError),
        ("read_record", (Stuck(1), b"", b"", bytearray(ROWS), -1, 0, 1), IndexError),
        ("read_record", (Stuck(1), b"", b"", bytearray(ROWS), 0, 0, 1), ValueError),  # reaches past the record
        ("read_record", (Stuck(1), b"", b"", ROWS, 0, 0, 1), BufferError),  # nobody could write into it
        ("read_record", (Stuck(1), b"", b"", bytearray(7), 0, 0, 1), ValueError),
        ("read_record", (Stuck(1), b"", b"", NOT_ALIGNED, 0, 0, 1), ValueError),
        ("read_record", (Stuck(1), b"", "text", bytearray(ROWS), 0, 0, 1), TypeError),
        ("read_record", (Stuck(1), b"", b"", None, 0, 0, 1), TypeError),
        ("read_record", (Stuck(1), b"12", b"", bytearray(ROWS), 0, 0, 0), ValueError),
        ("read_record", (Stuck(1), b""), TypeError),
        ("read_tensor", (None, 0), TypeError),
        ("read_tensor", ((1, 2), 0), TypeError),
        ("read_tensors", (None, [], False, 1), TypeError),
        ("read_records", (Stuck(1), b"", b"", bytearray(ROWS), b"1", [], 1), ValueError),
        ("read_records", (Stuck(1), b"", b"", bytearray(ROWS), JOB, [], 1), ValueError),
        ("read_records", (Stuck(1), b"", b"", bytearray(ROWS), JOB, [b"0"], 1), BufferError),
        ("read_records", (Stuck(1), b"", b"", bytearray(ROWS), JOB, [bytearray()], 1), ValueError),
        ("read_runs", (Stuck(1), b"", b"", bytearray(ROWS), 0, 0, 1, [1], bytearray(1), 1), ValueError),
        ("find_directory", ("text", 0, 0), TypeError),
        ("find_directory", (b"", -1, 0), TypeError),
        ("parse_directory", (b"", -1, 0, 0), TypeError),
        ("parse_directory", (b"", 0, -1, 0), TypeError),
        ("find_records", (b"", bytearray(), b"", b"a", [2]), ValueError),
        ("find_records", (b"", bytearray(), b"", b"ab", [2, 1]), ValueError),
        ("find_records", (b"", bytearray(), b"", b"a", ["1"]), TypeError),
        ("parse_local_header", (b"", b"", bytearray(), 0), IndexError),
        ("scan_pickle", ("text", {}, [1] * 5), TypeError),
        ("scan_pickle", (b"N.", {}, [1]), ValueError),
    ],
)
def test_a_wrong_argument_is_an_error_and_no_crash(
    native: Any, function: str, arguments: tuple[Any, ...], error: type[Exception]
) -> None:
    with pytest.raises(error):
        getattr(native, function)(*arguments)


def test_no_entries_may_lie_anywhere(native: Any) -> None:
    """As those of a stream before its program has run, in an empty bytearray of Python 3.13."""
    for at in range(8):
        nowhere = memoryview(bytearray(64))[at:at]
        assert (
            native.find_records(b"", nowhere, b"", b"a", [1])
            == _pure.find_records(b"", bytearray(), b"", b"a", [1])
            == [-1]
        )


@pytest.mark.parametrize("start", [0, 3, 200_000])
def test_a_record_that_another_thread_proves_meanwhile(monkeypatch: pytest.MonkeyPatch, start: int) -> None:
    """Whoever finds a guess holds on to it: at a second look the truth may stand in its place."""
    payload = bytes(range(256)) * 1000
    content = makers.checkpoint(b"N.", {"0": payload}).data
    offset, nbytes, count = _pure.find_directory(content, 0, 0)
    block = content[offset : offset + nbytes]
    entries, _ = _pure.parse_directory(block, count, offset, 0)
    (record,) = _pure.find_records(block, entries, b"archive/data/", b"0", [1])
    preadv = pure_extent._preadv

    def after_another_thread(handle: Any) -> Any:
        monkeypatch.setattr(pure_extent, "_preadv", preadv)
        _pure.read_record(handle, b"", block, entries, record, 0, 0)
        return preadv(handle)

    monkeypatch.setattr(pure_extent, "_preadv", after_another_thread)
    found = _pure.read_record(Memory(content), b"", block, entries, record, start, 50)
    assert bytes(found) == payload[start : start + 50]


class Made:
    """What a maker of the tests makes: memory with an address."""

    def __init__(self, nbytes: int) -> None:
        self.memory = (ctypes.c_ubyte * nbytes)()


@given(st.data())
def test_read_tensor_into_what_a_maker_makes(native: Any, data: st.DataObject) -> None:
    content = makers.checkpoint(b"N.", {"0": bytes(range(64))}).data
    offset, nbytes, count = _pure.find_directory(content, 0, 0)
    block = content[offset : offset + nbytes]
    entries, _ = _pure.parse_directory(block, count, offset, 0)
    direct = array("q", _pure.find_records(block, entries, b"archive/data/", b"0", [1]))
    sizes, strides = data.draw(
        st.sampled_from([((), ()), ((4,), (1,)), ((2, 3), (3, 1)), ((2, 2), (1, 4)), ((5,), (0,))])
    )
    extent = 1 + sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True))
    told = extent + data.draw(st.sampled_from([0, 0, 0, 1, -1, 7]))
    row = array("q", (0, 1, 4, 2, 0, len(sizes), 0, 0, told)).tobytes()
    is_off = data.draw(st.sampled_from([False, False, False, True]))
    gives = data.draw(st.sampled_from("mmmonf"))
    dtype = data.draw(st.sampled_from([4, 4, 4, None]))

    def make(its_sizes: Any, its_strides: Any, *, dtype: Any, device: Any) -> Any:
        assert (its_sizes, its_strides, dtype, device) == (sizes, strides, 4, "here")
        if gives == "f":
            raise MemoryError
        return Made(extent * dtype) if gives != "o" else object()

    def address(made: Made) -> int:
        return 0 if gives == "n" else ctypes.addressof(made.memory)

    maker = Maker(make, ("dtype", "device"), "here", [None, dtype], Made, address)
    columns = (bytes([Kind.TENSOR]), array("q", [0]), row, memoryview(array("q", [*sizes, *strides])), direct)
    hot = Hot(Memory(content), block, entries, *columns, 4096, maker, lambda: is_off)

    def read(backend: Any) -> Any:
        try:
            made = backend.read_tensor(hot, 0)
        except (ValueError, MemoryError) as error:
            return type(error)
        return made if made is None else bytes(made.memory)

    result = read(_pure)
    assert read(native) == result
    if told <= 0 or is_off:
        assert result is None
    elif told != extent:
        assert result is ValueError
    elif dtype is None or gives in "on":
        assert result is None
    else:
        assert result == (bytes(range(8, 8 + 4 * extent)) if gives == "m" else MemoryError)


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="reads through a descriptor at a position")
def test_cut_after_opening(native: Any, path: Path) -> None:
    """Cut at every length once the directory is known: whatever is then read has changed, and at one byte for both."""
    content = makers.checkpoint(b"N.", {"0": b"abcdefgh", "1": b"ijkl"}).data
    offset, nbytes, count = _pure.find_directory(content, 0, 0)
    block = content[offset : offset + nbytes]
    entries, _ = _pure.parse_directory(block, count, offset, 0)
    with opened(content, path, 0) as (handle, stamp):
        for length in reversed(range(len(content))):
            os.truncate(path, length)
            for record in range(count):
                arguments = (handle, stamp, block, entries, record, 0, 2)
                result = compare(native, "read_record", *arguments)
                assert result[0] is ChangedError
                job = array("q", (record, 0, 2, 0, 0)).tobytes()
                results = [
                    outcome(backend.read_records, handle, stamp, block, bytearray(entries), job, [bytearray(2)], 1)
                    for backend in (_pure, native)
                ]
                assert results == [result, result], (length, record)
