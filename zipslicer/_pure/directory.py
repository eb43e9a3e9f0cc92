"""Directory: the bytes at the end of an archive in, one row a record out; and the proof of a local header. No I/O.

Read this beside csrc/directory.cc. The order of the bytes is the order of the functions:

    local header, payload [, descriptor] ...      parse_local_header    (on touch of a record, never at open)
    central directory                             parse_directory
    [ZIP64 end record, its locator,] end record   find_directory

Names are bytes and are compared as bytes. Where two readers could see two archives in one file, it is refused: that is
how a scanner is shown one model and a loader another. Clauses are those of APPNOTE.TXT 6.3.10.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence

from ..errors import ArchiveError

END = struct.Struct("<4s4H2LH")  # 4.3.16
END64 = struct.Struct("<4sQ2H2L4Q")  # 4.3.14
LOCATOR = struct.Struct("<4sLQL")  # 4.3.15
CENTRAL = struct.Struct("<4s6H3L5H2L")  # 4.3.12
LOCAL = struct.Struct("<4s5H3L2H")  # 4.3.7
EXTRA = struct.Struct("<2H")  # 4.5.1

M16, M32 = 0xFFFF, 0xFFFFFFFF  # "see the ZIP64 field", 4.4.1.4
INT64_MAX = (1 << 63) - 1
FLAG_DESCRIPTOR = 1 << 3  # sizes and CRC follow the payload; the local ones are 0
FLAGS_REFUSED = 1 << 0 | 1 << 6 | 1 << 13  # encrypted, strongly encrypted, masked headers
STORED = 0
ENTRY_FIELDS = 10
COUNTED = 1 << 16  # backend.Entry.COUNTED
COUNT = struct.Struct("<q")


def find_directory(tail: bytes, tail_offset: int, base: int) -> tuple[int, int, int]:
    """See backend.Backend.find_directory."""
    found = []  # (position, offset, nbytes, count, gap)
    at = tail.find(b"PK\x05\x06")
    while at >= 0:
        if at + END.size <= len(tail) and at + END.size + END.unpack_from(tail, at)[7] <= len(tail):
            found.append(at)
        at = tail.find(b"PK\x05\x06", at + 1)
    if not found:
        raise ArchiveError(
            "no end of central directory: the file is truncated, or it is no ZIP archive",
            offset=tail_offset + len(tail),
        )
    last = _end_record(tail, found[-1], tail_offset, base)
    offset, nbytes, count, gap = last
    if gap != 0:
        raise ArchiveError(
            f"{gap} bytes too many before the end of the central directory: something was put before the archive, or "
            "several archives were joined; window=(offset, nbytes) names the one to read",
            offset=tail_offset + found[-1],
        )
    for at in found[:-1]:
        try:
            other = _end_record(tail, at, tail_offset, base)
        except ArchiveError:
            continue  # payload or comment that looks like an end record, and is none
        if other[3] == 0 and other != last:
            raise ArchiveError("two end records name two different directories", offset=tail_offset + at)
    if count == 0:
        raise ArchiveError("the archive is empty", offset=offset)
    if count * CENTRAL.size > nbytes:
        raise ArchiveError(f"{count} records cannot be named in a directory of {nbytes} bytes", offset=offset)
    return offset, nbytes, count


def _end_record(tail: bytes, at: int, tail_offset: int, base: int) -> tuple[int, int, int, int]:
    """The end record at a position of the tail, with its ZIP64 twin -> (offset, nbytes, count, gap)."""
    where = tail_offset + at
    _, disk, cd_disk, here, count, nbytes, offset, _ = END.unpack_from(tail, at)
    start, offset64 = where, 0
    if at >= LOCATOR.size and tail[at - LOCATOR.size : at - LOCATOR.size + 4] == b"PK\x06\x07":
        if at < LOCATOR.size + END64.size:
            raise ArchiveError("a ZIP64 locator without its end record", offset=where - LOCATOR.size)
        start = where - LOCATOR.size - END64.size
        _, disk64, offset64, disks = LOCATOR.unpack_from(tail, at - LOCATOR.size)
        signature, size, _, _, number, cd_disk64, here64, count64, nbytes64, cd_offset64 = END64.unpack_from(
            tail, at - LOCATOR.size - END64.size
        )
        if signature != b"PK\x06\x06" or size != END64.size - 12:
            raise ArchiveError("a ZIP64 locator without its end record", offset=where - LOCATOR.size)
        if disk64 or number or cd_disk64 or disks > 1:
            raise ArchiveError("the archive is one part of several", offset=start)
        for small, large, saturated in (
            (here, here64, M16),
            (count, count64, M16),
            (nbytes, nbytes64, M32),
            (offset, cd_offset64, M32),
        ):
            if small != saturated and small != large:
                raise ArchiveError("the two end records disagree", offset=start)
        here, count, nbytes, offset = here64, count64, nbytes64, cd_offset64
        disk = 0 if disk == M16 else disk
        cd_disk = 0 if cd_disk == M16 else cd_disk
    elif nbytes == M32 or offset == M32:
        raise ArchiveError("the end record sends to a ZIP64 one that is not there", offset=where)
    if disk or cd_disk or here != count:
        raise ArchiveError("the archive is one part of several", offset=where)
    gap = start - (base + offset + nbytes)
    if gap < 0 or max(offset, nbytes, count) > INT64_MAX:
        raise ArchiveError("the central directory does not lie before its end record", offset=where)
    if gap == 0 and start != where and base + offset64 != start:
        # The locator must lead to the record that stands before it, and nowhere else: CVE-2025-8291. (With a gap it
        # cannot, and the gap is what there is to say.)
        raise ArchiveError(
            "the ZIP64 locator does not lead to the ZIP64 end record before it", offset=where - LOCATOR.size
        )
    return base + offset, nbytes, count, gap


def parse_directory(block: bytes, count: int, offset: int, base: int) -> tuple[bytearray, int]:
    """See backend.Backend.parse_directory."""
    rows: list[list[int]] = []
    wide: list[bool] = []  # has a ZIP64 extra field, so its descriptor, if any, has 24 bytes
    seen: set[bytes] = set()
    prefix = b""
    at = 0
    unpack = CENTRAL.unpack_from
    for _ in range(count):
        if len(block) - at < CENTRAL.size:
            raise ArchiveError("the central directory ends inside a header", offset=offset + at)
        signature, _, _, flags, method, _, _, crc, stored, nbytes, n_name, n_extra, n_comment, disk, _, _, header = (
            unpack(block, at)
        )
        where = offset + at
        if signature != b"PK\x01\x02":
            raise ArchiveError("a central header has a wrong signature", offset=where)
        name_start = at + CENTRAL.size
        following = name_start + n_name + n_extra + n_comment
        if following > len(block):
            raise ArchiveError("the central directory ends inside a header", offset=where)
        name = block[name_start : name_start + n_name]
        zip64 = False
        if n_extra:
            extra = block[name_start + n_name : name_start + n_name + n_extra]
            nbytes, stored, header, zip64 = _zip64(extra, nbytes, stored, header, where)
        elif nbytes == M32 or stored == M32 or header == M32:
            raise ArchiveError("a size or offset sends to a ZIP64 field that is not there", offset=where)
        if disk:
            raise ArchiveError("a record lies on another disk", offset=where)
        if flags & FLAGS_REFUSED:
            raise ArchiveError(f"record {name!r} is encrypted", offset=where)
        if method == STORED and stored != nbytes:
            raise ArchiveError(f"record {name!r} is stored, and has two sizes", offset=where)
        if not at:
            prefix = name[: name.find(b"/") + 1]
            if prefix in (b"", b"/", b"./", b"../"):
                raise ArchiveError(f"the first record, {name!r}, is in no folder: torch.save makes one", offset=where)
        if not name.startswith(prefix):
            raise ArchiveError(f"record {name!r} lies outside the archive's folder {prefix!r}", offset=where)
        if b"\0" in name:
            raise ArchiveError(f"record {name!r} has a NUL in its name", offset=where)
        folded = name.lower()  # ASCII only, on bytes
        if folded in seen:
            # torch looks names up without case and takes any of two: neither can be trusted.
            raise ArchiveError(f"two records are called {name!r}, or differ in case only", offset=where)
        seen.add(folded)
        rows.append([base + header, 0, stored, nbytes, 0, crc, method, flags, name_start, n_name])
        wide.append(zip64)
        at = following
    if at != len(block):
        raise ArchiveError(f"{len(block) - at} bytes are left over in the central directory", offset=offset + at)
    _set_limits(rows, wide, offset)
    entries = array("q")
    for row in rows:
        entries.extend(row)
    return bytearray(entries.tobytes()), len(prefix)


def find_records(block: bytes, entries: bytearray, prefix: bytes, names: bytes, ends: Sequence[int]) -> list[int]:
    """See backend.Backend.find_records."""
    rows = memoryview(entries).cast("q")
    starts, sizes = rows[8::ENTRY_FIELDS].tolist(), rows[9::ENTRY_FIELDS].tolist()
    index = {block[start : start + n]: i for i, (start, n) in enumerate(zip(starts, sizes))}
    return [index.get(prefix + names[start:end], -1) for start, end in zip([0, *ends], ends)]


def _zip64(extra: bytes, nbytes: int, stored: int, header: int, where: int) -> tuple[int, int, int, bool]:
    """Extra fields of a central header -> (nbytes, stored, header, has a ZIP64 field). 4.5.3: only what is saturated."""
    field: bytes | None = None
    at = 0
    while at < len(extra):
        if len(extra) - at < EXTRA.size:
            raise ArchiveError("an extra field is cut short", offset=where)
        ident, size = EXTRA.unpack_from(extra, at)
        at += EXTRA.size
        if size > len(extra) - at:
            raise ArchiveError("an extra field is cut short", offset=where)
        if ident == 1:
            if field is not None:
                raise ArchiveError("two ZIP64 extra fields in one header", offset=where)
            field = extra[at : at + size]
        at += size
    values = [nbytes, stored, header]
    wanted = [i for i, value in enumerate(values) if value == M32]
    if len(field or b"") != 8 * len(wanted):
        raise ArchiveError("a ZIP64 extra field does not fit the sizes and offset that send to it", offset=where)
    for place, i in enumerate(wanted):
        assert field is not None
        values[i] = int.from_bytes(field[8 * place : 8 * place + 8], "little")
        if values[i] > INT64_MAX:
            raise ArchiveError("a size or offset passes 2**63 - 1", offset=where)
    return values[0], values[1], values[2], field is not None


def _set_limits(rows: list[list[int]], wide: list[bool], directory: int) -> None:
    """Each record ends before the next one's header, the last one before the directory; then predict the payloads."""
    order = sorted(range(len(rows)), key=lambda i: rows[i][0])
    limit = directory
    for i in reversed(order):
        row = rows[i]
        header, stored, name_nbytes = row[0], row[2], row[9]
        least = header + LOCAL.size + name_nbytes
        if header > INT64_MAX or least + stored > limit:
            raise ArchiveError("a record overlaps the next one or the central directory", offset=header)
        row[4] = limit
        # Seen from the end: what stands after a payload is known from the directory, what stands before is not
        # (writers pad there). Right for every writer but one; parse_local_header has the last word.
        descriptor = 0 if not row[7] & FLAG_DESCRIPTOR else 24 if wide[i] else 16
        row[1] = ~max(limit - descriptor - stored, least)
        limit = header


def parse_local_header(head: bytes, block: bytes, entries: bytearray, record: int) -> int:
    """See backend.Backend.parse_local_header."""
    row = memoryview(entries).cast("q")[record * ENTRY_FIELDS : (record + 1) * ENTRY_FIELDS]
    header, _, stored, nbytes, limit, crc, method, entry_flags, name_start, name_nbytes = row
    if entry_flags & COUNTED:
        return _parse_count(head, header, crc)
    if len(head) < LOCAL.size:
        raise ArchiveError("a local header is cut short", offset=header)
    signature, _, flags, local_method, _, _, local_crc, local_stored, local_nbytes, n_name, n_extra = LOCAL.unpack_from(
        head
    )
    name = block[name_start : name_start + name_nbytes]
    if signature != b"PK\x03\x04":
        raise ArchiveError(f"the local header of {name!r} has a wrong signature", offset=header)
    head_nbytes = LOCAL.size + n_name + n_extra
    if len(head) < head_nbytes:
        raise ArchiveError("a local header is cut short", offset=header)
    local_name = head[LOCAL.size : LOCAL.size + n_name]
    if local_name != name:
        raise ArchiveError(f"the local header names {bytes(local_name)!r}, the directory names {name!r}", offset=header)
    if local_method != method:
        raise ArchiveError(
            f"the local header of {name!r} and the directory name two compression methods", offset=header
        )
    if flags & FLAGS_REFUSED:
        raise ArchiveError(f"the local header of {name!r} says it is encrypted", offset=header)
    if not flags & FLAG_DESCRIPTOR:
        extra = head[LOCAL.size + n_name : head_nbytes]
        if M32 in (local_stored, local_nbytes):
            local_nbytes, local_stored = _local_zip64(extra, local_nbytes, local_stored)
        if (local_crc, local_stored, local_nbytes) != (crc, stored, nbytes):
            raise ArchiveError(f"the local header of {name!r} and the directory disagree in size or CRC", offset=header)
    if header + head_nbytes + stored > limit:
        raise ArchiveError(f"record {name!r} overlaps the next one or the central directory", offset=header)
    return int(header + head_nbytes)


def _parse_count(head: bytes, header: int, expected: int) -> int:
    if len(head) < COUNT.size:
        raise ArchiveError("the element count of a storage is cut short", offset=header)
    (count,) = COUNT.unpack_from(head)
    if count != expected:
        raise ArchiveError(
            f"a storage of {count} elements stands where the pickle has one of {expected}", offset=header
        )
    return header + COUNT.size


def _local_zip64(extra: bytes, nbytes: int, stored: int) -> tuple[int, int]:
    """Sizes out of the first ZIP64 field of a local header; what is not there stays saturated, and so disagrees."""
    at = 0
    while len(extra) - at >= EXTRA.size:
        ident, size = EXTRA.unpack_from(extra, at)
        at += EXTRA.size
        if size > len(extra) - at:
            break
        if ident == 1:
            field = extra[at : at + size]
            if nbytes == M32 and len(field) >= 8:
                nbytes, field = int.from_bytes(field[:8], "little"), field[8:]
            if stored == M32 and len(field) >= 8:
                stored = int.from_bytes(field[:8], "little")
            break
        at += size
    return nbytes, stored
