// Extent. The order is that of a read: Reader, Plan (which calls), Run (their work), the three entrances, the memory.
#include "extent.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

#ifndef _WIN32
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#endif

namespace zipslicer {
namespace {

constexpr std::size_t kThreadsFrom = std::size_t{4} << 20;  // bytes; below, starting a thread costs more than it gives
constexpr int kMaxThreads = 64;  // more do not read faster, and a caller's typing error must not fork-bomb
// A gap of at most a page is read along: to copy it costs what a call of its own would cost, and more does not pay.
constexpr std::uint64_t kNear = 4096;
constexpr std::uint64_t kHeaderRoom = 8 << 10;  // of local header read along; torch pads them to 4 KiB at most
constexpr std::size_t kMaxScratch = 256 << 10;  // headers of one call, and gaps beside them; stays in the cache
// Of calls that wait for a disk so many are announced to the system at once, which then fetches them side by side. Only
// small ones: what is large keeps a disk busy by itself.
constexpr std::size_t kAnnounced = 64;
constexpr std::uint64_t kAnnouncedTo = 1 << 20;  // bytes
constexpr auto kPollInterval = std::chrono::milliseconds(100);

#if defined(__GNUC__)
std::int64_t load_relaxed(const std::int64_t& value) { return __atomic_load_n(&value, __ATOMIC_RELAXED); }
void store_relaxed(std::int64_t& value, std::int64_t now) { __atomic_store_n(&value, now, __ATOMIC_RELAXED); }
#else  // MSVC: an aligned volatile access of eight bytes is one
std::int64_t load_relaxed(const std::int64_t& value) { return const_cast<const volatile std::int64_t&>(value); }
void store_relaxed(std::int64_t& value, std::int64_t now) { const_cast<volatile std::int64_t&>(value) = now; }
#endif

// Fills all parts from offset on, and leaves them used up. Throws Error(changed) at the first byte that is missing.
void fill(Reader& reader, iovec* parts, int count, std::uint64_t offset) {
  for (;;) {
    while (count > 0 && parts->iov_len == 0) {
      ++parts, --count;
    }
    if (count == 0) {
      return;
    }
    std::size_t got = reader.preadv(parts, count, offset);
    if (got == 0) {
      throw Error(Blame::changed, offset, "the file ends here: it is shorter than when it was opened");
    }
    offset += got;
    while (count > 0 && got >= parts->iov_len) {
      got -= parts->iov_len;
      ++parts, --count;
    }
    if (count > 0) {
      parts->iov_base = static_cast<unsigned char*>(parts->iov_base) + got;
      parts->iov_len -= got;
    }
  }
}

void fill(Reader& reader, void* to, std::size_t nbytes, std::uint64_t offset) {
  iovec part{to, nbytes};
  fill(reader, &part, 1, offset);
}

// ---- local headers ----

std::uint64_t header_of(const Entry& entry) { return static_cast<std::uint64_t>(entry.header_offset); }

// Where the payload is, as far as anybody knows. Another thread may prove it at any time, so ask once and hold on to
// the answer.
struct Payload {
  explicit Payload(const Entry& entry) {
    const std::int64_t value = load_relaxed(entry.payload_offset);
    proved = value >= 0;
    offset = static_cast<std::uint64_t>(proved ? value : ~value);
  }

  std::uint64_t offset;
  bool proved;
};

// Bytes of header that a first read takes along: up to the predicted payload, if that is near.
std::size_t header_room(const Entry& entry, std::uint64_t predicted) {
  return static_cast<std::size_t>(std::min(predicted - header_of(entry), kHeaderRoom));
}

// Checks the local header, of which `head` holds a first part, writes the payload's offset down, and returns it.
std::uint64_t prove(Reader& reader, const Archive& archive, std::size_t record, Span head) {
  Entry& entry = archive.entries[record];
  std::vector<unsigned char> whole;
  const std::uint64_t room = static_cast<std::uint64_t>(entry.limit) - header_of(entry);
  const auto wanted = static_cast<std::size_t>(std::min(local_header_nbytes(head, entry), room));
  if (wanted > head.size) {
    whole.resize(wanted);
    fill(reader, whole.data(), wanted, header_of(entry));
    head = Span(whole.data(), whole.size());
  }
  const std::uint64_t payload = parse_local_header(head, archive.block, entry);
  store_relaxed(entry.payload_offset, static_cast<std::int64_t>(payload));
  return payload;
}

// REQUIRES of all functions here: what parse_directory writes. A caller that passes anything else gets an exception.
const Entry& checked_entry(const Archive& archive, std::size_t record) {
  if (record >= archive.count) {
    throw std::out_of_range("no record " + std::to_string(static_cast<std::int64_t>(record)) + ": the directory has " +
                            std::to_string(archive.count));
  }
  const Entry& entry = archive.entries[record];
  if (entry.header_offset < 0 || entry.limit < entry.header_offset || entry.stored_nbytes < 0 ||
      Payload(entry).offset < header_of(entry)) {
    throw std::invalid_argument("entries were not made by parse_directory");
  }
  return entry;
}

const Entry& checked_range(const Archive& archive, std::size_t record, std::int64_t start, std::int64_t nbytes) {
  const Entry& entry = checked_entry(archive, record);
  if (start < 0 || nbytes < 0 || start > entry.stored_nbytes || nbytes > entry.stored_nbytes - start) {
    throw std::invalid_argument("bytes " + std::to_string(start) + " to " + std::to_string(start) + " + " +
                                std::to_string(nbytes) + " of a record of " + std::to_string(entry.stored_nbytes));
  }
  return entry;
}

// ---- Plan ----

constexpr std::size_t kNoRecord = ~std::size_t{0};

// A part of a call: bytes that somebody wants, or (without a place to go to) the local header of `record`, which will
// show whether its payload is where it was predicted to be.
struct Part {
  std::uint64_t offset;
  Destination to;
  std::size_t record = kNoRecord;
  std::uint64_t predicted = 0;

  [[nodiscard]] bool is_header() const { return record != kNoRecord; }
  [[nodiscard]] std::uint64_t end() const { return offset + to.nbytes; }
};

// Bytes of scratch that a part of a call takes together with the gap before it. All gaps between wanted bytes share one
// page, which then stays in the innermost cache.
std::size_t aside(const Part& part, std::size_t gap, bool after_header) {
  return part.is_header() ? gap + part.to.nbytes : after_header ? gap : 0;
}

// Parts [first, last) of the plan, which one preadv reads, with the gaps between them.
struct Call {
  std::size_t first;
  std::size_t last;
};

// Which calls read what is wanted. Parts come in file order.
class Plan {
 public:
  // `total`: all bytes that will be added, in so many `parts`.
  Plan(std::uint64_t total, std::size_t parts) : total_(total) { parts_.reserve(parts); }

  void add_header(const Entry& entry, std::size_t record, std::uint64_t predicted) {
    add({header_of(entry), {nullptr, header_room(entry, predicted)}, record, predicted});
  }

  // Cut where the memory, not the file, is at a multiple of a huge page: no two threads then fault in the same one.
  void add(std::uint64_t offset, Destination to) {
    while (to.nbytes > kChunk) {
      const std::size_t cut = kChunk - reinterpret_cast<std::uintptr_t>(to.data) % kHugePage;
      add(Part{offset, {to.data, cut}});
      offset += cut;
      to = {to.data + cut, to.nbytes - cut};
    }
    if (to.nbytes != 0) {  // nothing is asked of the file, not even that it reaches to there
      add(Part{offset, to});
    }
  }

  [[nodiscard]] std::uint64_t total() const { return total_; }
  [[nodiscard]] const std::vector<Call>& calls() const { return calls_; }
  // Calls [task, next task) are done by one thread: those that begin in one huge page, which two threads would both
  // fault in, and clear twice.
  [[nodiscard]] std::size_t tasks() const { return tasks_.size(); }
  [[nodiscard]] std::size_t task(std::size_t i) const { return i < tasks_.size() ? tasks_[i] : calls_.size(); }
  [[nodiscard]] const Part* begin(const Call& call) const { return parts_.data() + call.first; }
  [[nodiscard]] const Part* end(const Call& call) const { return parts_.data() + call.last; }
  [[nodiscard]] std::size_t most_scratch() const { return most_scratch_; }
  [[nodiscard]] int most_iovecs() const { return most_iovecs_; }

 private:
  void add(const Part& part) {
    if (!join(part)) {
      const std::uintptr_t page = reinterpret_cast<std::uintptr_t>(part.to.data) / kHugePage;
      if (part.is_header() || tasks_.empty() || page != page_) {
        tasks_.push_back(calls_.size());
        page_ = page;
      }
      calls_.push_back({parts_.size(), parts_.size()});
      wanted_ = scratch_ = 0;
      iovecs_ = 0;
      count(part, 0, false);
    }
    parts_.push_back(part);
    ++calls_.back().last;
  }

  bool join(const Part& part) {
    if (calls_.empty() || part.offset < parts_.back().end()) {
      return false;  // the first, or one that overlaps what the call has read already
    }
    const std::uint64_t gap = part.offset - parts_.back().end();
    if (gap > kNear || iovecs_ + 2 > kMaxParts || (!part.is_header() && wanted_ + part.to.nbytes > kChunk) ||
        scratch_ + aside(part, static_cast<std::size_t>(gap), parts_.back().is_header()) > kMaxScratch) {
      return false;
    }
    count(part, static_cast<std::size_t>(gap), parts_.back().is_header());
    return true;
  }

  void count(const Part& part, std::size_t gap, bool after_header) {
    wanted_ += part.is_header() ? 0 : part.to.nbytes;
    scratch_ += aside(part, gap, after_header);
    iovecs_ += gap != 0 ? 2 : 1;
    most_scratch_ = std::max(most_scratch_, scratch_);
    most_iovecs_ = std::max(most_iovecs_, iovecs_);
  }

  std::uint64_t total_;
  std::vector<Part> parts_;
  std::vector<Call> calls_;
  std::vector<std::size_t> tasks_;
  std::uintptr_t page_ = 0;  // in which the last task's memory begins
  // Of the last call:
  std::size_t wanted_ = 0;
  std::size_t scratch_ = 0;
  int iovecs_ = 0;
  // Of any call:
  std::size_t most_scratch_ = 0;
  int most_iovecs_ = 0;
};

// ---- Run ----

// Does the calls of a plan. Of several failures the first in file order is the one that is thrown, whichever thread met
// it first: calls start in file order, and a call that was started is ended.
class Run {
 public:
  // `archive` may be null if the plan holds no headers.
  Run(Reader& reader, const Archive* archive, const Plan& plan, const Poll& poll)
      : reader_(reader), archive_(archive), plan_(plan), poll_(poll) {}

  void run(int threads) {
    // All memory is taken here, before a thread starts: one that throws for lack of it may find none to throw with, and
    // glibc then ends the process.
    const std::size_t count = thread_count(threads);
    std::vector<std::thread> workers;
    std::vector<std::unique_ptr<Room>> rooms;
    workers.reserve(count);
    rooms.reserve(count);
    rooms.push_back(std::make_unique<Room>(plan_));
    try {
      while (rooms.size() < count) {
        rooms.push_back(std::make_unique<Room>(plan_));
        workers.emplace_back([this, room = rooms.back().get()] { work(*room, Poll()); });
      }
    } catch (const std::exception&) {
      // The system gives no more threads, or no more memory: fewer do the same work.
    }
    work(*rooms.front(), poll_);
    for (std::thread& worker : workers) {
      worker.join();
    }
    if (failure_) {
      std::rethrow_exception(failure_);
    }
  }

  // Records whose payload was not where the directory let us think: what was read of them is something else.
  [[nodiscard]] const std::vector<std::size_t>& mistaken() const { return mistaken_; }

 private:
  // A local header within the scratch of a call.
  struct Head {
    const Part* part;
    std::size_t start;
  };

  // What one thread needs for call after call.
  struct Room {
    explicit Room(const Plan& plan)
        : scratch(new unsigned char[plan.most_scratch() + 1]),
          iovecs(new iovec[static_cast<std::size_t>(plan.most_iovecs())]) {
      heads.reserve(static_cast<std::size_t>(plan.most_iovecs()));  // of each of which one may be a header
    }

    std::unique_ptr<unsigned char[]> scratch;  // uninitialised, unlike a vector
    unsigned char gap[kNear];
    std::unique_ptr<iovec[]> iovecs;
    std::vector<Head> heads;
  };

  [[nodiscard]] std::size_t thread_count(int threads) const {
    if (!reader_.parallel() || plan_.total() < kThreadsFrom) {
      return 1;
    }
    return std::min(static_cast<std::size_t>(std::clamp(threads, 1, kMaxThreads)), plan_.tasks());
  }

  void work(Room& room, const Poll& poll) {
    std::uint64_t offset = 0;
    try {
      auto polled = std::chrono::steady_clock::now();
      for (std::size_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < plan_.tasks();) {
        for (std::size_t i = plan_.task(task); i != plan_.task(task + 1); ++i) {
          if (stopped_.load(std::memory_order_relaxed)) {
            return;
          }
          offset = plan_.begin(plan_.calls()[i])->offset;
          if (i % kAnnounced == 0) {
            announce(i);
          }
          read(plan_.calls()[i], room);
          if (poll && std::chrono::steady_clock::now() - polled > kPollInterval) {
            poll();
            polled = std::chrono::steady_clock::now();
          }
        }
      }
    } catch (const Error& error) {
      fail(error.offset);
    } catch (...) {
      fail(offset);
    }
  }

  // Tells the system of the calls after this one, if the disk will be waited for.
  void announce(std::size_t i) const {
    const std::size_t end = std::min(i + kAnnounced, plan_.calls().size());
    if (i + 1 >= end || !reader_.waits(plan_.begin(plan_.calls()[i])->offset)) {
      return;
    }
    for (++i; i < end; ++i) {
      const std::uint64_t offset = plan_.begin(plan_.calls()[i])->offset;
      const std::uint64_t nbytes = (plan_.end(plan_.calls()[i]) - 1)->end() - offset;
      if (nbytes <= kAnnouncedTo) {
        reader_.advise(offset, nbytes);
      }
    }
  }

  void fail(std::uint64_t offset) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!failure_ || offset < failure_offset_) {
      failure_ = std::current_exception();
      failure_offset_ = offset;
    }
    stopped_.store(true, std::memory_order_relaxed);
  }

  void read(const Call& call, Room& room) {
    const int count = lay_out(call, room);
    fill(reader_, room.iovecs.get(), count, plan_.begin(call)->offset);
    for (const Head& head : room.heads) {
      check(head, room);
    }
  }

  // Writes the iovecs of a call: what is wanted goes where it is wanted; headers, and gaps before and after them, go
  // into the scratch in one stretch, other gaps into one page. Returns how many iovecs there are.
  int lay_out(const Call& call, Room& room) const {
    room.heads.clear();
    std::size_t scratch = 0;
    int count = 0;
    bool in_scratch = false;
    std::uint64_t at = plan_.begin(call)->offset;
    for (const Part* part = plan_.begin(call); part != plan_.end(call); ++part) {
      const auto gap = static_cast<std::size_t>(part->offset - at);
      const std::size_t kept = aside(*part, gap, in_scratch);
      if (kept == 0 && gap != 0) {
        room.iovecs[static_cast<std::size_t>(count++)] = {room.gap, gap};
      } else if (kept != 0) {
        if (in_scratch) {
          room.iovecs[static_cast<std::size_t>(count - 1)].iov_len += kept;
        } else {
          room.iovecs[static_cast<std::size_t>(count++)] = {room.scratch.get() + scratch, kept};
        }
        in_scratch = true;
        scratch += kept;
      }
      if (part->is_header()) {
        room.heads.push_back({part, scratch - part->to.nbytes});
      } else {
        room.iovecs[static_cast<std::size_t>(count++)] = {part->to.data, part->to.nbytes};
        in_scratch = false;
      }
      at = part->end();
    }
    return count;
  }

  void check(const Head& head, const Room& room) {
    const Span bytes(room.scratch.get() + head.start, head.part->to.nbytes);
    if (prove(reader_, *archive_, head.part->record, bytes) != head.part->predicted) {
      const std::lock_guard<std::mutex> lock(mutex_);
      mistaken_.push_back(head.part->record);
    }
  }

  Reader& reader_;
  const Archive* archive_;
  const Plan& plan_;
  const Poll& poll_;
  std::atomic<std::size_t> next_{0};
  std::atomic<bool> stopped_{false};
  std::mutex mutex_;  // guards what follows
  std::exception_ptr failure_;
  std::uint64_t failure_offset_ = 0;
  std::vector<std::size_t> mistaken_;
};

// For extents and for what is wanted of records.
template <typename T>
void sort_by_offset(std::vector<T>& many) {
  const auto earlier = [](const T& a, const T& b) { return a.offset < b.offset; };
  if (!std::is_sorted(many.begin(), many.end(), earlier)) {
    std::sort(many.begin(), many.end(), earlier);
  }
}

template <typename T>
std::uint64_t total_nbytes(const std::vector<T>& many) {
  std::uint64_t total = 0;
  for (const T& one : many) {
    total += one.to.nbytes;
  }
  return total;
}

// ---- many records ----

// A job, looked up.
struct Wanted {
  std::uint64_t offset;  // of its bytes, if the payload is where we think
  Destination to;
  std::size_t record;
  Payload payload;
};

Destination checked_place(const std::vector<Destination>& buffers, const Job& job) {
  if (job.buffer < 0 || static_cast<std::size_t>(job.buffer) >= buffers.size()) {
    throw std::out_of_range("no buffer " + std::to_string(job.buffer) + ": there are " +
                            std::to_string(buffers.size()));
  }
  const Destination& buffer = buffers[static_cast<std::size_t>(job.buffer)];
  const auto place = static_cast<std::uint64_t>(job.place), nbytes = static_cast<std::uint64_t>(job.nbytes);
  if (job.place < 0 || place > buffer.nbytes || nbytes > buffer.nbytes - place) {
    throw std::invalid_argument(std::to_string(job.nbytes) + " bytes at place " + std::to_string(job.place) +
                                " of a buffer of " + std::to_string(buffer.nbytes));
  }
  return {buffer.data + place, static_cast<std::size_t>(nbytes)};
}

std::vector<Wanted> look_up(const Archive& archive, const std::vector<Job>& jobs,
                            const std::vector<Destination>& buffers) {
  std::vector<Wanted> wanted;
  wanted.reserve(jobs.size());
  for (const Job& job : jobs) {
    const auto record = static_cast<std::size_t>(job.record);
    const Entry& entry = checked_range(archive, record, job.start, job.nbytes);
    const Payload payload(entry);
    wanted.push_back(
        {payload.offset + static_cast<std::uint64_t>(job.start), checked_place(buffers, job), record, payload});
  }
  sort_by_offset(wanted);
  return wanted;
}

// Predictions stay between a header and its record's limit, so all jobs of a record are neighbours in `wanted`, and the
// first of them brings the header along.
std::vector<std::size_t> read_wanted(Reader& reader, const Archive& archive, const std::vector<Wanted>& wanted,
                                     int threads, const Poll& poll) {
  Plan plan(total_nbytes(wanted), 2 * wanted.size());
  std::size_t asked = kNoRecord;
  for (const Wanted& one : wanted) {
    if (!one.payload.proved && one.record != asked) {
      plan.add_header(archive.entries[one.record], one.record, one.payload.offset);
      asked = one.record;
    }
    plan.add(one.offset, one.to);
  }
  Run run(reader, &archive, plan, poll);
  run.run(threads);
  return run.mistaken();
}

std::vector<Job> jobs_of(const std::vector<Job>& jobs, std::vector<std::size_t> records) {
  std::sort(records.begin(), records.end());
  std::vector<Job> chosen;
  for (const Job& job : jobs) {
    if (std::binary_search(records.begin(), records.end(), static_cast<std::size_t>(job.record))) {
      chosen.push_back(job);
    }
  }
  return chosen;
}

[[noreturn]] void fail_changed() { throw Error(Blame::changed, kNoOffset, "the file was changed after it was opened"); }

// Does a read, then asks whether it was of the file that was opened. A file rewritten under us is no archive that lies.
template <typename Read>
void with_stamp(const Reader& reader, Read read) {
  try {
    read();
  } catch (const Error& error) {
    if (error.blame == Blame::archive && reader.changed()) {
      fail_changed();
    }
    throw;
  }
  if (reader.changed()) {
    fail_changed();
  }
}

// Calls add(start) for each run, in the row-major order of `dims`. REQUIRES: no count is 0.
template <typename Add>
void each_start(std::int64_t start, const std::vector<Steps>& dims, Add add) {
  std::vector<std::int64_t> at(dims.size(), 0);
  auto now = static_cast<std::uint64_t>(start);  // unsigned: steps that overflow lead out of the record, no more
  for (;;) {
    add(static_cast<std::int64_t>(now));
    std::size_t i = dims.size();
    for (; i != 0; --i) {
      const auto stride = static_cast<std::uint64_t>(dims[i - 1].stride);
      now += stride;
      if (++at[i - 1] < dims[i - 1].count) {
        break;
      }
      now -= stride * static_cast<std::uint64_t>(at[i - 1]);
      at[i - 1] = 0;
    }
    if (i == 0) {
      return;
    }
  }
}

// ---- one record ----

// A record that nobody has read: header and payload in one call where they are near and the prediction is right.
void read_unproved(Reader& reader, const Archive& archive, std::size_t record, std::uint64_t predicted,
                   std::uint64_t start, Destination to) {
  const Entry& entry = archive.entries[record];
  const std::uint64_t header = header_of(entry);
  unsigned char scratch[kHeaderRoom];
  const std::size_t room = header_room(entry, predicted);
  // For no bytes there is nothing to read up to: then a file may end before them.
  const bool near = to.nbytes != 0 && predicted - header <= kHeaderRoom && start <= kHeaderRoom - (predicted - header);
  if (near) {
    iovec parts[] = {{scratch, room + static_cast<std::size_t>(start)}, {to.data, to.nbytes}};
    fill(reader, parts, 2, header);
  } else {
    fill(reader, scratch, room, header);
  }
  const std::uint64_t payload = prove(reader, archive, record, Span(scratch, room));
  if (!near || payload != predicted) {
    fill(reader, to.data, to.nbytes, payload + start);
  }
}

}  // namespace

void check_range(const Archive& archive, std::size_t record, std::int64_t start, std::int64_t nbytes) {
  checked_range(archive, record, start, nbytes);
}

void read_extents(Reader& reader, std::vector<Extent> extents, int threads, const Poll& poll) {
  sort_by_offset(extents);
  Plan plan(total_nbytes(extents), extents.size());
  for (const Extent& extent : extents) {
    plan.add(extent.offset, extent.to);
  }
  Run(reader, nullptr, plan, poll).run(threads);
}

void read_record(Reader& reader, const Archive& archive, std::size_t record, std::int64_t start, Destination to,
                 const Poll& poll) {
  if (to.nbytes > kChunk) {  // worth cutting, so that Ctrl-C is heard
    const Job job{static_cast<std::int64_t>(record), start, static_cast<std::int64_t>(to.nbytes), 0, 0};
    read_records(reader, archive, {job}, {to}, 1, poll);
    return;
  }
  const Payload payload(checked_range(archive, record, start, static_cast<std::int64_t>(to.nbytes)));
  const auto from = static_cast<std::uint64_t>(start);
  with_stamp(reader, [&] {
    if (payload.proved) {
      fill(reader, to.data, to.nbytes, payload.offset + from);
    } else {
      read_unproved(reader, archive, record, payload.offset, from, to);
    }
  });
}

void read_records(Reader& reader, const Archive& archive, const std::vector<Job>& jobs,
                  const std::vector<Destination>& buffers, int threads, const Poll& poll) {
  const std::vector<Wanted> wanted = look_up(archive, jobs, buffers);
  with_stamp(reader, [&] {
    const std::vector<std::size_t> mistaken = read_wanted(reader, archive, wanted, threads, poll);
    if (!mistaken.empty()) {
      read_wanted(reader, archive, look_up(archive, jobs_of(jobs, mistaken), buffers), threads, poll);
    }
  });
}

void read_runs(Reader& reader, const Archive& archive, std::size_t record, std::int64_t start, std::int64_t nbytes,
               const std::vector<Steps>& dims, Destination to, int threads, const Poll& poll) {
  std::uint64_t runs = 1;
  for (const Steps& dim : dims) {
    if (dim.count < 0 || (dim.count != 0 && runs > SIZE_MAX / static_cast<std::uint64_t>(dim.count))) {
      throw std::invalid_argument("too many runs");
    }
    runs *= static_cast<std::uint64_t>(dim.count);
  }
  if (nbytes < 1 || runs != to.nbytes / static_cast<std::uint64_t>(nbytes) ||
      to.nbytes % static_cast<std::uint64_t>(nbytes) != 0) {
    throw std::invalid_argument("a buffer of " + std::to_string(to.nbytes) + " bytes is not for " +
                                std::to_string(runs) + " runs of " + std::to_string(nbytes));
  }
  if (runs == 0) {
    return;
  }
  if (!Payload(checked_entry(archive, record)).proved) {
    read_record(reader, archive, record, 0, {to.data, 0}, poll);
  }
  // Not as jobs: to look up each and to plan for its header took a third of the time of reading columns.
  const std::uint64_t payload = Payload(archive.entries[record]).offset;
  std::vector<Extent> extents;
  extents.reserve(runs);
  each_start(start, dims, [&](std::int64_t run) {
    checked_range(archive, record, run, nbytes);  // whoever passes steps that lead out of the record
    const std::size_t place = extents.size() * static_cast<std::size_t>(nbytes);
    extents.push_back({payload + static_cast<std::uint64_t>(run), {to.data + place, static_cast<std::size_t>(nbytes)}});
  });
  with_stamp(reader, [&] { read_extents(reader, std::move(extents), threads, poll); });
}

// ---- POSIX ----

#ifndef _WIN32
namespace {

bool is_large(const iovec& part) { return part.iov_len > kCachedCall; }

[[noreturn]] void fail_system() { throw std::system_error(errno, std::generic_category()); }

#ifdef __APPLE__
const timespec& mtime_of(const struct stat& status) { return status.st_mtimespec; }
#else
const timespec& mtime_of(const struct stat& status) { return status.st_mtim; }
#endif

}  // namespace

iovec PosixReader::next(const iovec& part, std::uint64_t offset, bool& direct) const {
  const std::size_t before = static_cast<std::size_t>(-offset % kDirectPage);
  const bool fits = part.iov_len >= before + kDirectFrom &&
                    (reinterpret_cast<std::uintptr_t>(part.iov_base) - offset) % kDirectPage == 0;
  direct = fits && before == 0;
  return {part.iov_base, direct ? part.iov_len / kDirectPage * kDirectPage : fits ? before : part.iov_len};
}

std::size_t PosixReader::preadv(const iovec* parts, int count, std::uint64_t offset) {
  // A large part comes by itself, be it read past the page cache or in steps.
  count = is_large(*parts) ? 1 : static_cast<int>(std::find_if(parts, parts + count, is_large) - parts);
  for (;;) {
    const int direct_fd = direct_fd_.load(std::memory_order_relaxed);
    bool direct = false;
    const iovec part = direct_fd >= 0 && count == 1 ? next(*parts, offset, direct) : *parts;
    const std::size_t nbytes = direct ? part.iov_len : std::min(part.iov_len, kCachedCall);
    const ssize_t got = count == 1
                            ? ::pread(direct ? direct_fd : fd_, part.iov_base, nbytes, static_cast<off_t>(offset))
                            : ::preadv(fd_, parts, count, static_cast<off_t>(offset));
    if (got >= 0) {
      return static_cast<std::size_t>(got);
    }
    if (errno == EINTR) {
      continue;
    }
    if (!direct) {
      fail_system();
    }
    direct_fd_.store(-1, std::memory_order_relaxed);  // refused, as by a disk that wants another alignment
  }
}

bool PosixReader::waits(std::uint64_t offset) const {
#ifdef RWF_NOWAIT
  char one;
  const iovec part{&one, 1};
  return ::preadv2(fd_, &part, 1, static_cast<off_t>(offset), RWF_NOWAIT) < 0 && errno == EAGAIN;
#else
  static_cast<void>(offset);
  return false;
#endif
}

void PosixReader::advise(std::uint64_t offset, std::uint64_t nbytes) const {
#ifdef POSIX_FADV_WILLNEED
  ::posix_fadvise(fd_, static_cast<off_t>(offset), static_cast<off_t>(nbytes), POSIX_FADV_WILLNEED);
#else
  static_cast<void>(offset), static_cast<void>(nbytes);
#endif
}

bool PosixReader::changed() const {
  if (stamp_ == nullptr) {
    return false;
  }
  struct stat status;
  if (::fstat(fd_, &status) != 0) {
    fail_system();
  }
  const timespec& mtime = mtime_of(status);
  return status.st_size != stamp_->nbytes || static_cast<std::int64_t>(status.st_ino) != stamp_->inode ||
         mtime.tv_sec * std::int64_t{1000000000} + mtime.tv_nsec != stamp_->mtime_ns;
}

namespace {

// read_unproved without waiting, where header and payload are near and the prediction is right.
bool read_unproved_cached(const PosixReader& reader, const Archive& archive, std::size_t record,
                          std::uint64_t predicted, std::uint64_t start, Destination to) {
  Entry& entry = archive.entries[record];
  const std::uint64_t header = header_of(entry);
  if (predicted - header > kHeaderRoom || start > kHeaderRoom - (predicted - header)) {
    return false;
  }
  unsigned char scratch[kHeaderRoom];
  const iovec parts[] = {{scratch, static_cast<std::size_t>(predicted - header + start)}, {to.data, to.nbytes}};
  if (!reader.read_cached(parts, 2, header)) {
    return false;
  }
  const Span head(scratch, static_cast<std::size_t>(predicted - header));
  try {
    if (local_header_nbytes(head, entry) != head.size || parse_local_header(head, archive.block, entry) != predicted) {
      return false;
    }
  } catch (const Error&) {  // told by the read that waits, which looks first whether the file was changed
    return false;
  }
  store_relaxed(entry.payload_offset, static_cast<std::int64_t>(predicted));
  return true;
}

}  // namespace

bool read_record_cached(const PosixReader& reader, const Archive& archive, std::size_t record, std::int64_t start,
                        Destination to) {
  const Payload payload(archive.entries[record]);
  const auto from = static_cast<std::uint64_t>(start);
  const iovec part{to.data, to.nbytes};
  const bool came = payload.proved ? reader.read_cached(&part, 1, payload.offset + from)
                                   : read_unproved_cached(reader, archive, record, payload.offset, from, to);
  if (came && reader.changed()) {
    fail_changed();
  }
  return came;
}

bool PosixReader::read_cached(const iovec* parts, int count, std::uint64_t offset) const {
#ifdef RWF_NOWAIT
  std::size_t wanted = 0;
  for (int i = 0; i < count; ++i) {
    wanted += parts[i].iov_len;
  }
  return ::preadv2(fd_, parts, count, static_cast<off_t>(offset), RWF_NOWAIT) == static_cast<ssize_t>(wanted);
#else
  static_cast<void>(parts), static_cast<void>(count), static_cast<void>(offset);
  return false;
#endif
}
#endif

// ---- memory ----

#if defined(_WIN32)
Memory::Memory(std::size_t nbytes) : data_(static_cast<unsigned char*>(std::malloc(nbytes))), nbytes_(nbytes) {
  if (data_ == nullptr) {
    throw std::bad_alloc();
  }
}

Memory::~Memory() { std::free(data_); }
#else
namespace {

// Every mapping takes one of the 65,530 that vm.max_map_count allows a process, and at the limit even malloc fails. So
// from half of them on memory comes from malloc, whose neighbours the kernel merges, on small pages.
constexpr int kMaxMappings = 32000;
std::atomic<int> mappings{0};

unsigned char* map(std::size_t nbytes) {
  void* const mapped = ::mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return mapped == MAP_FAILED ? nullptr : static_cast<unsigned char*>(mapped);
}

// Bytes from here to the next multiple of a huge page.
std::size_t to_huge_page(const unsigned char* begin) { return -reinterpret_cast<std::uintptr_t>(begin) % kHugePage; }

// Fresh anonymous pages that begin at a multiple of a huge page, or null. Over-mapped and trimmed where the kernel
// places them on any page: before 6.7, and later for odd sizes.
void* map_aligned(std::size_t nbytes) {
  unsigned char* begin = map(nbytes);
  std::size_t before = 0;
  if (begin != nullptr && to_huge_page(begin) != 0) {
    ::munmap(begin, nbytes);
    begin = map(nbytes + kHugePage);
    before = to_huge_page(begin);
    if (begin != nullptr) {
      if (before != 0) {
        ::munmap(begin, before);
      }
      ::munmap(begin + before + nbytes, kHugePage - before);
    }
  }
  if (begin == nullptr) {
    return nullptr;
  }
#ifdef MADV_HUGEPAGE
  ::madvise(begin + before, nbytes, MADV_HUGEPAGE);  // where it fails, small pages are right, and slower
#endif
  return begin + before;
}

}  // namespace

Memory::Memory(std::size_t nbytes) : nbytes_(nbytes) {
  // Rounded to small pages, so that nothing is held but what is used: what follows the last whole huge page cannot
  // become one. Where that is nearly a whole one, it may: at most one byte in twenty is held and not used.
  std::size_t mapped = rounded_up(nbytes, static_cast<std::size_t>(::sysconf(_SC_PAGESIZE)));
  if (const std::size_t whole = rounded_up(nbytes, kHugePage); whole - nbytes <= nbytes / 20) {
    mapped = whole;
  }
  if (nbytes <= mapped && mapped < SIZE_MAX / 2 && mappings.load(std::memory_order_relaxed) < kMaxMappings) {
    data_ = static_cast<unsigned char*>(map_aligned(mapped));
  }
  if (data_ != nullptr) {
    mappings.fetch_add(1, std::memory_order_relaxed);
    mapped_ = mapped;
    return;
  }
  data_ = static_cast<unsigned char*>(std::malloc(nbytes));
  if (data_ == nullptr) {
    throw std::bad_alloc();
  }
}

Memory::~Memory() {
  if (mapped_ != 0) {
    ::munmap(data_, mapped_);
    mappings.fetch_sub(1, std::memory_order_relaxed);
  } else {
    std::free(data_);
  }
}
#endif

}  // namespace zipslicer
