// What the machine can do: the bytes of a file into memory, by positioned reads alone. `contestants.py` builds it,
// loads it and calls it in a process that it has prepared as for every contestant; nothing else of it is a library.
//
//     c++ -O2 -shared -fPIC -pthread -o libraw_read.so raw_read.cc
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kChunk = std::size_t{8} << 20;

}  // namespace

extern "C" {

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

// The first `nbytes` bytes of a file into memory, on so many threads. Returns 0, or -1 where a read failed.
int raw_read(const char* path, unsigned char* to, std::size_t nbytes, int threads) {
  const int fd = open(path, O_RDONLY);
  if (fd < 0) {
    return -1;
  }
  std::atomic<std::size_t> next{0};
  std::atomic<bool> failed{false};
  const auto work = [&] {
    for (std::size_t start; (start = next.fetch_add(kChunk)) < nbytes;) {
      const std::size_t end = std::min(start + kChunk, nbytes);
      while (start < end) {
        const ssize_t got = pread(fd, to + start, end - start, static_cast<off_t>(start));
        if (got <= 0) {
          failed = true;
          return;
        }
        start += static_cast<std::size_t>(got);
      }
    }
  };
  std::vector<std::thread> workers;
  for (int i = 1; i < threads; ++i) {
    workers.emplace_back(work);
  }
  work();
  for (std::thread& worker : workers) {
    worker.join();
  }
  close(fd);
  return failed ? -1 : 0;
}

}  // extern "C"
