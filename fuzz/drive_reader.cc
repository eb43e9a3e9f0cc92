// Drives the reader of csrc/ on many threads, where neither Python nor torch runs: for ThreadSanitizer,
// AddressSanitizer and LeakSanitizer. Writes an archive, and reads all of it at random, in every way there is, on every
// thread at once.
//
//     drive_reader FILE [ROUNDS]
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "../csrc/directory.h"
#include "../csrc/extent.h"

using namespace zipslicer;

namespace {

constexpr std::size_t kRecords = 300;
constexpr int kThreads = 8;

void require(bool holds, const char* what) {
  if (!holds) {
    std::fprintf(stderr, "wrong: %s\n", what);
    std::abort();
  }
}

// The byte at each place of each record.
unsigned char byte_at(std::size_t record, std::size_t place) {
  return static_cast<unsigned char>(record * 131 + place * 7 + place / 251);
}

// A few are large enough for threads, most are small.
std::size_t nbytes_of(std::size_t record) { return record % 100 == 7 ? 9'000'001 : record * 37 % 5000; }

template <typename T>
void put(std::string& to, T value) {
  for (std::size_t i = 0; i < sizeof(T); ++i) {
    to.push_back(static_cast<char>(value >> (8 * i)));
  }
}

std::string header(const char* signature, std::size_t record, const std::string& name, std::uint32_t offset) {
  const bool central = signature[2] == 1;
  std::string made(signature, 4);
  if (central) {
    put<std::uint16_t>(made, 45);
  }
  for (const std::uint16_t field : {20, 0, 0, 0, 33}) {
    put(made, field);
  }
  put<std::uint32_t>(made, 0);
  put<std::uint32_t>(made, static_cast<std::uint32_t>(nbytes_of(record)));
  put<std::uint32_t>(made, static_cast<std::uint32_t>(nbytes_of(record)));
  put<std::uint16_t>(made, static_cast<std::uint16_t>(name.size()));
  put<std::uint16_t>(made, 0);
  if (central) {
    put<std::uint16_t>(made, 0);
    put<std::uint32_t>(made, 0);
    put<std::uint32_t>(made, 0);
    put<std::uint32_t>(made, offset);
  }
  return made + name;
}

// An archive of stored records; returns its directory.
std::string write_archive(const char* path, std::uint64_t* directory_offset) {
  std::string file, directory;
  for (std::size_t record = 0; record < kRecords; ++record) {
    const std::string name = "archive/data/" + std::to_string(record);
    directory += header("PK\1\2", record, name, static_cast<std::uint32_t>(file.size()));
    file += header("PK\3\4", record, name, 0);
    for (std::size_t place = 0; place < nbytes_of(record); ++place) {
      file.push_back(static_cast<char>(byte_at(record, place)));
    }
  }
  *directory_offset = file.size();
  const int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
  file += directory;
  for (std::size_t done = 0; done < file.size();) {
    const ssize_t put = write(fd, file.data() + done, file.size() - done);
    require(put > 0, "cannot write the file");
    done += static_cast<std::size_t>(put);
  }
  close(fd);
  return directory;
}

struct Driver {
  Archive archive;
  PosixReader& reader;
  std::atomic<std::size_t> reads{0};

  void check(std::size_t record, std::size_t start, const unsigned char* got, std::size_t nbytes) {
    for (std::size_t i = 0; i < nbytes; ++i) {
      require(got[i] == byte_at(record, start + i), "a byte");
    }
    ++reads;
  }

  void one(std::size_t record, std::minstd_rand& dice) {
    const std::size_t size = nbytes_of(record);
    const std::size_t start = size == 0 ? 0 : dice() % size;
    const std::size_t nbytes = std::min<std::size_t>(size - start, dice() % 9000);
    std::vector<unsigned char> to(nbytes + 1);
    const Destination place{to.data(), nbytes};
    const auto from = static_cast<std::int64_t>(start);
    check_range(archive, record, from, static_cast<std::int64_t>(nbytes));
    if (dice() % 2 == 0 || !read_record_cached(reader, archive, record, from, place)) {
      read_record(reader, archive, record, from, place, Poll());
    }
    check(record, start, to.data(), nbytes);
  }

  void many(std::minstd_rand& dice) {
    std::vector<Job> jobs;
    std::size_t total = 0;
    for (std::size_t record = dice() % 20; record < kRecords; record += 1 + dice() % 40) {
      const auto nbytes = static_cast<std::int64_t>(nbytes_of(record));
      jobs.push_back({static_cast<std::int64_t>(record), 0, nbytes, 0, static_cast<std::int64_t>(total)});
      total += static_cast<std::size_t>(nbytes);
    }
    const Memory memory(total);
    read_records(reader, archive, jobs, {{memory.data(), total}}, 3, [] {});
    for (const Job& job : jobs) {
      check(static_cast<std::size_t>(job.record), 0, memory.data() + job.place, static_cast<std::size_t>(job.nbytes));
    }
  }

  void runs(std::minstd_rand& dice) {
    const std::size_t record = 7 + 100 * (dice() % 3);
    const Memory memory(2000 * 100);
    read_runs(reader, archive, record, 50, 100, {{2000, 4000}}, {memory.data(), memory.nbytes()}, 3, Poll());
    for (std::size_t row = 0; row < 2000; ++row) {
      check(record, 50 + 4000 * row, memory.data() + 100 * row, 100);
    }
  }

  void work(unsigned seed, int rounds) {
    std::minstd_rand dice(seed);
    for (int i = 0; i < rounds; ++i) {
      for (int j = 0; j < 200; ++j) {
        one(dice() % kRecords, dice);
      }
      many(dice);
      runs(dice);
    }
  }
};

void drive(const char* path, int rounds) {
  std::uint64_t offset = 0;
  const std::string directory = write_archive(path, &offset);
  const Span block(directory.data(), directory.size());
  std::vector<Entry> entries(kRecords);
  parse_directory(block, kRecords, offset, 0, entries.data());
  const int fd = open(path, O_RDONLY);
  struct stat status = {};
  require(fd >= 0 && fstat(fd, &status) == 0, "cannot open the file");
  PosixReader reader(fd, -1, nullptr);
  Driver driver{{block, entries.data(), entries.size()}, reader};
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < kThreads; ++i) {
    threads.emplace_back([&driver, i, rounds] { driver.work(i + 1, rounds); });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  // The file is cut while it is read: every thread gets its error, none a wrong byte.
  require(ftruncate(open(path, O_WRONLY), static_cast<off_t>(offset / 2)) == 0, "cannot cut the file");
  std::atomic<int> errors{0};
  threads.clear();
  for (unsigned i = 0; i < kThreads; ++i) {
    threads.emplace_back([&driver, &errors] {
      std::minstd_rand dice(9);
      try {
        driver.many(dice);
      } catch (const Error& error) {
        require(error.blame == Blame::changed, "the blame");
        ++errors;
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  require(errors == kThreads, "an error for each thread");
  close(fd);
  std::printf("%zu reads on %d threads, none of them wrong\n", driver.reads.load(), kThreads);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: drive_reader FILE [ROUNDS]\n");
    return 2;
  }
  drive(argv[1], argc > 2 ? std::atoi(argv[2]) : 3);
  return 0;
}
