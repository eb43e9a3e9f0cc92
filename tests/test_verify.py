"""Checksums: what was written is told from what was not, whatever lies between, on any number of threads."""

from __future__ import annotations

import json
import random
import zlib
from pathlib import Path
from typing import Any

import makers
import pytest
from makers import DEFLATED, FRAMEWORK, Pickle, Zip

import zipslicer
from zipslicer import verify
from zipslicer.errors import ArchiveError, ChangedError, UnsupportedError

RANDOM = random.Random(9)
SIZES = (0, 1, 15, 16, 4096, verify.PIECE - 1, verify.PIECE, verify.PIECE + 1, 3 * verify.PIECE + 77)


def archive(**keywords: Any) -> Zip:
    """Records of all sizes; `keywords` are of each."""
    made = Zip()
    program = Pickle().raw(b"}(")
    for i, nbytes in enumerate(SIZES):
        program.text(f"w{i}").tensor("ByteStorage", str(i), nbytes, size=[nbytes], stride=[1])
    program.raw(b"u")
    made.add("archive/data.pkl", program.stop(), **keywords)
    for i, nbytes in enumerate(SIZES):
        made.add(f"archive/data/{i}", RANDOM.randbytes(nbytes), **keywords)
    return made.add_all([("archive/version", b"3\n")], **keywords)


def written(folder: Path, data: bytes) -> Path:
    path = folder / "m.pth"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("method", [makers.STORED, DEFLATED])
def test_a_good_file(tmp_path: Path, method: int, threads: int) -> None:
    path = written(tmp_path, archive(method=method).finish().data)
    with zipslicer.open(path, framework=FRAMEWORK) as checkpoint:
        found = checkpoint.verify(threads=threads)
    assert (found.records, found.unchecked, found.damaged) == (len(SIZES) + 2, (), ())
    assert found.nbytes == sum(len(data) for _, data in makers.records_of(path.read_bytes()))


def test_a_flipped_bit_in_every_record(tmp_path: Path) -> None:
    made = archive().finish()
    for record in made.records:
        if record.stored_nbytes == 0 or record.name.endswith("data.pkl"):
            continue
        broken = bytearray(made.data)
        broken[record.payload_offset + RANDOM.randrange(record.stored_nbytes)] ^= 1 << RANDOM.randrange(8)
        path = written(tmp_path, bytes(broken))
        with zipslicer.open(path, framework=FRAMEWORK) as checkpoint:
            with pytest.raises(ArchiveError, match="CRC-32") as caught:
                checkpoint.verify(threads=2)
            assert (caught.value.record, caught.value.offset) == (record.name, record.header_offset)
            assert caught.value.path == str(path)
            found = checkpoint.verify(strict=False)
            assert [error.record for error in found.damaged] == [record.name]
            assert found.records == len(made.records) - 1
        with pytest.raises(ArchiveError, match="CRC-32"):
            zipslicer.load(path, framework=FRAMEWORK, verify=True)


def test_all_that_is_damaged_is_told(tmp_path: Path) -> None:
    made = archive().finish()
    broken = bytearray(made.data)
    large = [record for record in made.records if record.stored_nbytes > 4000 and "/data/" in record.name]
    for record in large:
        broken[record.payload_offset + 9] ^= 1
    header = made.record("archive/data/2").header_offset
    broken[header + 30] ^= 1  # of the name
    with zipslicer.open(written(tmp_path, bytes(broken)), framework=FRAMEWORK) as checkpoint:
        found = checkpoint.verify(strict=False)
        assert {error.record for error in found.damaged} == {record.name for record in large} | {"archive/data/2"}
        with pytest.raises(ArchiveError, match=f"{len(large) + 1} records are damaged"):
            checkpoint.verify()


def test_checksums_that_were_not_computed(tmp_path: Path) -> None:
    """torch.serialization.set_crc32_options(False) writes zeros; an empty record has that checksum by right."""
    path = written(tmp_path, archive(crc=0).finish().data)
    with zipslicer.open(path, framework=FRAMEWORK, verify=True) as checkpoint:
        found = checkpoint.verify()
    assert found.records == 1
    assert len(found.unchecked) == len(SIZES) + 1
    assert "archive/data/1" in found.unchecked


def test_torch_without_checksums(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.arange(9)}, tmp_path / "off.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    torch.save({"w": torch.arange(9)}, tmp_path / "on.pth")
    with zipslicer.open(tmp_path / "off.pth") as off, zipslicer.open(tmp_path / "on.pth") as on:
        assert "off/data/0" in off.verify().unchecked
        assert on.verify().unchecked == ()


@pytest.mark.parametrize(
    "stored", [b"", b"\x07", makers.deflated(b"ab"), makers.deflated(b"abcd"), makers.deflated(b"abc") + b"x"]
)
def test_deflated_data_that_is_damaged(tmp_path: Path, stored: bytes) -> None:
    made = Zip()
    made.add("archive/data.pkl", b"\x80\2}.")
    made.add("archive/data/0", b"abc", method=DEFLATED, stored=stored)
    with zipslicer.open(written(tmp_path, made.finish().data), framework=FRAMEWORK) as checkpoint:
        with pytest.raises(ArchiveError) as caught:
            checkpoint.verify()
        assert caught.value.record == "archive/data/0"


def test_a_bomb_is_not_inflated_to_its_end(tmp_path: Path) -> None:
    made = Zip()
    made.add("archive/data.pkl", b"\x80\2}.")
    bomb = makers.deflated(bytes(50 << 20))
    made.add("archive/data/0", b"", method=DEFLATED, stored=bomb, local={"nbytes": 5000}, central={"nbytes": 5000})
    with (
        zipslicer.open(written(tmp_path, made.finish().data), framework=FRAMEWORK) as checkpoint,
        pytest.raises(ArchiveError, match="5000 bytes"),
    ):
        checkpoint.verify()


def test_deflated_data_that_ends_at_a_piece(tmp_path: Path) -> None:
    """The last bytes are given when the input is long used up."""
    made = Zip()
    made.add("archive/data.pkl", b"\x80\2}.")
    for i, nbytes in enumerate((verify.PIECE, 2 * verify.PIECE, verify.PIECE + 258, verify.PIECE - 1)):
        made.add(f"archive/data/{i}", bytes(nbytes), method=DEFLATED)
    with zipslicer.open(written(tmp_path, made.finish().data), framework=FRAMEWORK) as checkpoint:
        assert checkpoint.verify().records == 5


def test_a_foreign_compression(tmp_path: Path) -> None:
    made = Zip()
    made.add("archive/data.pkl", b"\x80\2}.")
    made.add("archive/data/0", b"abc", method=12)
    with (
        zipslicer.open(written(tmp_path, made.finish().data), framework=FRAMEWORK) as checkpoint,
        pytest.raises(UnsupportedError, match="bzip2"),
    ):
        checkpoint.verify()


def test_formats_without_checksums(tmp_path: Path) -> None:
    program = Pickle().dict({"w": lambda p: p.tensor("FloatStorage", "0", 1, size=[1], stride=[1], view="")}).stop()
    path = written(tmp_path, makers.stream(program, {"0": (1, bytes(4))}))
    with zipslicer.open(path, framework=FRAMEWORK, verify=True) as checkpoint:
        found = checkpoint.verify()
    assert (found.records, found.unchecked) == (0, ("data/0",))


def test_shards(tmp_path: Path) -> None:
    for name in ("a", "b"):
        program = Pickle().dict({name: lambda p: p.tensor("FloatStorage", "0", 4, size=[4], stride=[1])}).stop()
        (tmp_path / f"{name}.bin").write_bytes(makers.checkpoint(program, {"0": bytes(16)}).data)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "a.bin", "b": "b.bin"}}))
    with zipslicer.open(index, framework=FRAMEWORK) as checkpoint:
        assert checkpoint.verify().records == 8
    broken = bytearray((tmp_path / "b.bin").read_bytes())
    broken[broken.index(b"little")] ^= 32
    broken = bytearray((tmp_path / "b.bin").read_bytes())
    broken[broken.index(b"3\n")] ^= 1
    (tmp_path / "b.bin").write_bytes(broken)
    with pytest.raises(ArchiveError, match="CRC-32") as caught:
        zipslicer.open(index, framework=FRAMEWORK, verify=True)
    assert caught.value.path == str(tmp_path / "b.bin")


def test_a_file_that_changes_meanwhile(tmp_path: Path) -> None:
    path = written(tmp_path, archive().finish().data)
    with zipslicer.open(path, framework=FRAMEWORK) as checkpoint:
        with path.open("ab") as file:
            file.write(b"more")
        with pytest.raises(ChangedError):
            checkpoint.verify()


def test_a_closed_file(tmp_path: Path) -> None:
    checkpoint = zipslicer.open(written(tmp_path, archive().finish().data), framework=FRAMEWORK)
    checkpoint.close()
    with pytest.raises(ValueError, match="closed"):
        checkpoint.verify()


@pytest.mark.parametrize("first", [0, 1, 7, 1000])
@pytest.mark.parametrize("second", [0, 1, 31, 4097])
def test_combined(first: int, second: int) -> None:
    """zlib itself is asked."""
    one, other = RANDOM.randbytes(first), RANDOM.randbytes(second)
    assert verify.combined(zlib.crc32(one), zlib.crc32(other), second) == zlib.crc32(one + other)


def test_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tqdm = pytest.importorskip("tqdm.auto")
    seen = []
    monkeypatch.setattr(tqdm.tqdm, "update", lambda self, n: seen.append(n))
    path = written(tmp_path, archive().finish().data)
    with zipslicer.open(path, framework=FRAMEWORK) as checkpoint:
        found = checkpoint.verify(progress=True)
    assert sum(seen) == found.nbytes
