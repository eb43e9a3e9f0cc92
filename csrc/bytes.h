// Bytes: where hostile input is met. Every bounds check and every little-endian read of csrc/ is in this file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

namespace zipslicer {

// Who is to blame; module.cc raises the class of zipslicer.errors of the same name.
enum class Blame : std::uint8_t { archive, program, table, changed, unsupported, unsafe };

constexpr std::uint64_t kNoOffset = ~std::uint64_t{0};  // of an error that is about no byte in particular

// The one exception of csrc/ that is about a file. `offset` counts as the function that throws says.
class Error : public std::runtime_error {
 public:
  Error(Blame who, std::uint64_t where, const std::string& what)
      : std::runtime_error(what), blame(who), offset(where) {}

  Blame blame;
  std::uint64_t offset;
  std::string global_name;  // of an unsafe error only
};

// A view of bytes that somebody else keeps alive.
struct Span {
  const unsigned char* data = nullptr;
  std::size_t size = 0;

  Span() = default;
  Span(const void* begin, std::size_t n) : data(static_cast<const unsigned char*>(begin)), size(n) {}

  // REQUIRES: start + n <= size. For ranges that were checked before; a Cursor checks by itself.
  [[nodiscard]] Span part(std::size_t start, std::size_t n) const { return {data + start, n}; }
  [[nodiscard]] std::string_view text() const { return {reinterpret_cast<const char*>(data), size}; }

  // Eight bytes from start on, in the host's order; the last eight if fewer are left, and zeros after them if there are
  // not that many at all. For hashing and comparing by words. REQUIRES: start < size.
  [[nodiscard]] std::uint64_t word(std::size_t start) const {
    std::uint64_t value = 0;
    if (size >= sizeof value) {
      std::memcpy(&value, data + (size - start >= sizeof value ? start : size - sizeof value), sizeof value);
    } else {
      std::memcpy(&value, data + start, size - start);
    }
    return value;
  }
};

// Reads little-endian values one after the other. Past the end it throws Error(blame, origin + position of `mark`).
class Cursor {
 public:
  Cursor(Span bytes, Blame who, std::uint64_t origin = 0) : bytes_(bytes), blame_(who), origin_(origin) {}

  [[nodiscard]] std::size_t position() const { return at_; }
  [[nodiscard]] std::size_t left() const { return bytes_.size - at_; }
  [[nodiscard]] bool at_end() const { return at_ == bytes_.size; }

  // From now on errors name this position: the first byte of the opcode or header that is being read.
  void mark() { mark_ = at_; }
  [[nodiscard]] std::uint64_t marked() const { return origin_ + mark_; }

  [[noreturn]] void fail(const std::string& what) const { throw Error(blame_, marked(), what); }

  Span take(std::uint64_t n) {
    if (n > left()) {
      truncated(n);
    }
    const Span taken = bytes_.part(at_, static_cast<std::size_t>(n));
    at_ += static_cast<std::size_t>(n);
    return taken;
  }

  // Up to the next '\n', which is passed over too; false, and nowhere moved, if none comes within `limit` bytes.
  bool line(std::uint64_t limit, Span* found) {
    const Span rest = bytes_.part(at_, left());
    const std::size_t end =
        rest.text().substr(0, limit < left() ? static_cast<std::size_t>(limit) + 1 : left()).find('\n');
    if (end == std::string_view::npos) {
      return false;
    }
    *found = take(end);
    ++at_;
    return true;
  }

  std::uint8_t u8() { return *take(1).data; }
  std::uint16_t u16() { return little<std::uint16_t>(take(2).data); }
  std::uint32_t u32() { return little<std::uint32_t>(take(4).data); }
  std::uint64_t u64() { return little<std::uint64_t>(take(8).data); }

 private:
  // Apart, so that take() is small enough to be inlined.
  [[noreturn]] void truncated(std::uint64_t n) const {
    fail("truncated: " + std::to_string(n) + " bytes are declared and " + std::to_string(left()) + " are left");
  }

  // Assembled byte by byte: right on any host, and one load on a little-endian one.
  template <typename T>
  static T little(const unsigned char* p) {
    T value = 0;
    for (std::size_t i = 0; i < sizeof(T); ++i) {
      value = static_cast<T>(value | static_cast<T>(static_cast<T>(p[i]) << (8 * i)));
    }
    return value;
  }

  Span bytes_;
  Blame blame_;
  std::uint64_t origin_;
  std::size_t at_ = 0;
  std::size_t mark_ = 0;
};

}  // namespace zipslicer
