// Directory: the bytes at the end of an archive in, one row a record out; and the proof of a local header. No I/O.
//
//   local header, payload [, descriptor] ...      parse_local_header    (on touch of a record, never at open)
//   central directory                             parse_directory
//   [ZIP64 end record, its locator,] end record   find_directory
//
// All functions are pure and safe for concurrent use. All offsets are of the file. Read this beside _pure/directory.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "bytes.h"

namespace zipslicer {

// One archive record: backend.Entry. The seam knows it as ten native int64.
struct Entry {
  std::int64_t header_offset;   // of the local header
  std::int64_t payload_offset;  // >= 0: proved by the local header. < 0: ~offset, predicted from the directory alone
  std::int64_t stored_nbytes;   // in the file
  std::int64_t nbytes;          // of the record itself
  std::int64_t limit;           // the next record's header, or the directory
  std::int64_t crc;
  std::int64_t method;
  std::int64_t flags;
  std::int64_t name_start;  // within the directory block
  std::int64_t name_nbytes;
};
static_assert(sizeof(Entry) == 10 * sizeof(std::int64_t));

// Of `flags`, above the 16 that ZIP has: before the payload stands no local header but, as eight little-endian bytes,
// the count of its elements, which must be `crc`. So it is in the stream format of torch before 1.6.
constexpr std::int64_t kCounted = 1 << 16;
constexpr std::uint64_t kCountNbytes = 8;

constexpr std::uint64_t kLocalNbytes = 30;    // of a local header before its name
constexpr std::uint64_t kCentralNbytes = 46;  // of a central header before its name

struct Directory {
  std::uint64_t offset;
  std::uint64_t nbytes;
  std::uint64_t count;
};

// The last bytes of an archive that begins at `base` -> its central directory. Throws Error(archive).
// REQUIRES: tail is the whole archive, or at least the 65,633 bytes of three end records and the longest comment.
Directory find_directory(Span tail, std::uint64_t tail_offset, std::uint64_t base);

// The central directory at `offset` -> one row a record, in its order. Returns how many bytes of each name are the
// archive root with its slash. Throws Error(archive).
// REQUIRES: entries has room for min(count, block.size / kCentralNbytes) rows; offset, base < 2**63.
std::size_t parse_directory(Span block, std::uint64_t count, std::uint64_t offset, std::uint64_t base, Entry* entries);

// For each name the index of the record that is called prefix + name, byte for byte; -1 where there is none.
// Throws std::out_of_range for entries that are not of `block`.
std::vector<std::int64_t> find_records(Span block, const Entry* entries, std::size_t count, Span prefix,
                                       const std::vector<Span>& names);

// How long a local header says it is, of which `head` holds a first part; kLocalNbytes if it does not say.
std::uint64_t local_header_nbytes(Span head, const Entry& entry);

// The first bytes of a record -> offset of its payload; proves that local header and directory agree.
// Throws Error(archive), also if `head` ends before the header does; std::out_of_range for an entry that is not of
// `block`.
std::uint64_t parse_local_header(Span head, Span block, const Entry& entry);

}  // namespace zipslicer
