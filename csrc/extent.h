// Extent: positioned reads into memory the caller owns, and that memory. Read this beside _pure/extent.py.
//
// An extent is a stretch of the file and the memory it goes to. Extents are sorted by offset, neighbours that are near
// become one preadv, large ones are cut into chunks, and the calls are handed to threads that live for one large read:
// there is no pool, and no read knows of another, so fork and free threading need no care. Knows no Python.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#ifdef _WIN32
struct iovec {
  void* iov_base;
  std::size_t iov_len;
};
#else
#include <sys/uio.h>
#endif

#include "bytes.h"
#include "directory.h"

namespace zipslicer {

// What fstat said when the file was opened: backend.py calls it the stamp.
struct Stamp {
  std::int64_t nbytes;
  std::int64_t mtime_ns;
  std::int64_t inode;
};

// Where bytes come from.
class Reader {
 public:
  Reader() = default;
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;
  virtual ~Reader() = default;

  // Fills the parts in order from the byte at offset; returns how many bytes came, 0 only at the end of the file.
  // REQUIRES: count <= kMaxParts, and no more than kMaxNbytes together.
  virtual std::size_t preadv(const iovec* parts, int count, std::uint64_t offset) = 0;

  // Whether preadv may be called by several threads at once.
  [[nodiscard]] virtual bool parallel() const { return false; }

  // Whether a read at offset would have to wait for a disk. What cannot tell says no.
  [[nodiscard]] virtual bool waits(std::uint64_t /*offset*/) const { return false; }

  // Lets the system fetch bytes that will be read soon.
  virtual void advise(std::uint64_t /*offset*/, std::uint64_t /*nbytes*/) const {}

  // Whether this is no longer the file that was opened. A source that cannot tell says no.
  [[nodiscard]] virtual bool changed() const { return false; }
};

constexpr int kMaxParts = 1024;                 // IOV_MAX of Linux and macOS
constexpr std::size_t kMaxNbytes = 0x7ffff000;  // what Linux reads in one call; macOS refuses more than 2**31 - 1
constexpr std::size_t kDirectPage = 4096;       // backend.DIRECT_NBYTES
constexpr std::size_t kDirectFrom = std::size_t{1} << 20;  // backend.DIRECT_FROM
constexpr std::size_t kHugePage = std::size_t{2} << 20;
// What a thread takes of a long read. Larger ones are no faster; from a disk they are slower: threads that are 8 MiB
// apart look to the kernel like two sequential readers.
constexpr std::size_t kChunk = kHugePage;
// And what one call of it asks of the page cache: the kernel reads ahead best for small steps.
constexpr std::size_t kCachedCall = std::size_t{512} << 10;

#ifndef _WIN32
// A POSIX file descriptor, which stays the caller's. Safe for concurrent use. Throws std::system_error.
class PosixReader final : public Reader {
 public:
  // `direct_fd` of the same file, open with O_DIRECT, or -1: then a single part of kDirectFrom and more is read by it,
  // past the page cache, if its memory is congruent with the offset.
  PosixReader(int fd, int direct_fd, const Stamp* stamp) : fd_(fd), direct_fd_(direct_fd), stamp_(stamp) {}

  std::size_t preadv(const iovec* parts, int count, std::uint64_t offset) override;
  [[nodiscard]] bool parallel() const override { return true; }
  [[nodiscard]] bool waits(std::uint64_t offset) const override;
  void advise(std::uint64_t offset, std::uint64_t nbytes) const override;
  [[nodiscard]] bool changed() const override;

  // Fills the parts from the page cache without ever waiting for a disk. False if that cannot be done; then they hold
  // anything.
  bool read_cached(const iovec* parts, int count, std::uint64_t offset) const;

 private:
  // What of a part comes next: whole pages to be read past the page cache, or what is before or after those.
  [[nodiscard]] iovec next(const iovec& part, std::uint64_t offset, bool& direct) const;

  int fd_;
  std::atomic<int> direct_fd_;
  const Stamp* stamp_;
};
#endif

// Called by the thread that called us about every tenth of a second; what it throws ends the read.
using Poll = std::function<void()>;

// Memory to be filled. REQUIRES: it lives as long as the read.
struct Destination {
  unsigned char* data;
  std::size_t nbytes;
};

struct Extent {
  std::uint64_t offset;
  Destination to;
};

// The directory as parse_directory left it. `entries` may be shared among threads: payload_offset is loaded and stored
// atomically, and nothing else is written.
struct Archive {
  Span block;
  Entry* entries;
  std::size_t count;
};

// One row of jobs: backend.Job.
struct Job {
  std::int64_t record;
  std::int64_t start;
  std::int64_t nbytes;
  std::int64_t buffer;
  std::int64_t place;
};

// Fills every extent, whole. Throws Error(changed) where the file ends first, what the reader throws, and what poll
// throws.
void read_extents(Reader& reader, std::vector<Extent> extents, int threads, const Poll& poll);

// Throws std::out_of_range or std::invalid_argument if the record has no bytes [start, start + nbytes).
void check_range(const Archive& archive, std::size_t record, std::int64_t start, std::int64_t nbytes);

// `to.nbytes` bytes from byte `start` of a record's payload on. Proves the local header first if nobody did.
// Throws as read_extents and check_range, and Error(archive), or Error(changed) if the reader has changed.
void read_record(Reader& reader, const Archive& archive, std::size_t record, std::int64_t start, Destination to,
                 const Poll& poll);

#ifndef _WIN32
// The same of a record that is in the page cache, and whose header is as predicted. False, and anything in `to`, if it
// is not: never waits for a disk. Throws Error(changed). REQUIRES: check_range passed.
bool read_record_cached(const PosixReader& reader, const Archive& archive, std::size_t record, std::int64_t start,
                        Destination to);
#endif

// The same for many. Throws as read_record.
void read_records(Reader& reader, const Archive& archive, const std::vector<Job>& jobs,
                  const std::vector<Destination>& buffers, int threads, const Poll& poll);

// A dimension around runs: so many, so many bytes apart.
struct Steps {
  std::int64_t count;
  std::int64_t stride;
};

// Runs of `nbytes` bytes of a record, the first from byte `start` of its payload on, in the row-major order of `dims`;
// they fill `to`, one after the other. Throws as read_record.
void read_runs(Reader& reader, const Archive& archive, std::size_t record, std::int64_t start, std::int64_t nbytes,
               const std::vector<Steps>& dims, Destination to, int threads, const Poll& poll);

constexpr std::size_t rounded_up(std::size_t nbytes, std::size_t to) { return (nbytes + to - 1) / to * to; }

// Writable memory for large tensors, of any content: on huge pages and aligned to them where the system has any, since
// page faults and not reading are what a warm load waits for.
class Memory {
 public:
  explicit Memory(std::size_t nbytes);  // throws std::bad_alloc
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory();

  [[nodiscard]] unsigned char* data() const { return data_; }
  [[nodiscard]] std::size_t nbytes() const { return nbytes_; }

 private:
  unsigned char* data_ = nullptr;
  std::size_t nbytes_;
  [[maybe_unused]] std::size_t mapped_ = 0;  // bytes to unmap; 0: the memory came from malloc
};

}  // namespace zipslicer
