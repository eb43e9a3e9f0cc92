// What the machine can do: bytes of a file into memory, by positioned reads alone. `contestants.py` builds it, loads it
// and calls it in a process that was prepared as for every contestant; nothing else of it is a library.
//
//     c++ -O2 -shared -fPIC -pthread -o libraw_read.so raw_read.cc
#include <fcntl.h>
#include <limits.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kChunk = kHugePage;  // larger ones are no faster

// Calls work(i) for all i below count, on so many threads, until one returns false. Returns 0, or -1 where one did.
template <typename Work>
int on_threads(std::size_t count, int threads, Work work) {
  std::atomic<std::size_t> next{0};
  std::atomic<bool> failed{false};
  const auto take_turns = [&] {
    for (std::size_t i; !failed && (i = next.fetch_add(1)) < count;) {
      if (!work(i)) {
        failed = true;
      }
    }
  };
  std::vector<std::thread> workers;
  for (int i = 1; i < threads; ++i) {
    workers.emplace_back(take_turns);
  }
  take_turns();
  for (std::thread& worker : workers) {
    worker.join();
  }
  return failed ? -1 : 0;
}

}  // namespace

extern "C" {

struct Extent {
  std::uint64_t offset;
  unsigned char* to;
  std::size_t nbytes;
};

// Fresh memory of at least `nbytes`, on huge pages where there are any; null if there is none. It is never given back:
// the process ends after its sample.
unsigned char* raw_allocate(std::size_t nbytes) {
  const std::size_t whole = (nbytes + kHugePage - 1) / kHugePage * kHugePage;
  void* const mapped = mmap(nullptr, whole + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) {
    return nullptr;
  }
  const auto start = (reinterpret_cast<std::uintptr_t>(mapped) + kHugePage - 1) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(start), whole, MADV_HUGEPAGE);
  return reinterpret_cast<unsigned char*>(start);
}

// Extents of a file, each into its memory, cut into chunks, on so many threads. Returns 0, or -1 where a read failed.
int raw_read(const char* path, const Extent* extents, std::size_t count, int threads) {
  const int fd = open(path, O_RDONLY);
  if (fd < 0) {
    return -1;
  }
  std::vector<Extent> chunks;
  for (std::size_t i = 0; i < count; ++i) {
    for (Extent left = extents[i]; left.nbytes != 0;) {
      const std::size_t nbytes = std::min(left.nbytes, kChunk);
      chunks.push_back({left.offset, left.to, nbytes});
      left = {left.offset + nbytes, left.to + nbytes, left.nbytes - nbytes};
    }
  }
  const int result = on_threads(chunks.size(), threads, [&](std::size_t i) {
    for (Extent left = chunks[i]; left.nbytes != 0;) {
      const ssize_t got = pread(fd, left.to, left.nbytes, static_cast<off_t>(left.offset));
      if (got <= 0) {
        return false;
      }
      const auto nbytes = static_cast<std::size_t>(got);
      left = {left.offset + nbytes, left.to + nbytes, left.nbytes - nbytes};
    }
    return true;
  });
  close(fd);
  return result;
}

// The first `nbytes` of each of `count` rows of `stride` bytes, densely into `to`. What is between them is read into
// one page that nobody looks at: a call for many rows costs less than a call for each. REQUIRES: no gap exceeds a page.
int raw_read_columns(const char* path, std::uint64_t offset, std::size_t nbytes, std::size_t stride, std::size_t count,
                     unsigned char* to, int threads) {
  const int fd = open(path, O_RDONLY);
  if (fd < 0) {
    return -1;
  }
  const std::size_t of_a_call = IOV_MAX / 2;
  const std::size_t of_a_turn = std::max(of_a_call, kHugePage / nbytes / of_a_call * of_a_call);
  const int result = on_threads((count + of_a_turn - 1) / of_a_turn, threads, [&](std::size_t i) {
    unsigned char aside[4096];
    iovec parts[IOV_MAX];
    const std::size_t end = std::min((i + 1) * of_a_turn, count);
    for (std::size_t row = i * of_a_turn; row < end; row += of_a_call) {
      const std::size_t rows = std::min(of_a_call, end - row);
      for (std::size_t j = 0; j < rows; ++j) {
        parts[2 * j] = {to + (row + j) * nbytes, nbytes};
        parts[2 * j + 1] = {aside, stride - nbytes};
      }
      const auto wanted = static_cast<ssize_t>(rows * stride);
      if (preadv(fd, parts, static_cast<int>(2 * rows), static_cast<off_t>(offset + row * stride)) != wanted) {
        return false;
      }
    }
    return true;
  });
  close(fd);
  return result;
}

}  // extern "C"
