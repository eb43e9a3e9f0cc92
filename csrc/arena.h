// Arena: memory for one scan, taken in large pieces and given back all at once; Column: a vector that lives in it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <list>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "extent.h"

namespace zipslicer {

class Arena {
 public:
  // `nbytes` of input: a large input gets huge pages, since first touches of small ones took longer than the scan
  // itself.
  explicit Arena(std::size_t nbytes) : large_(nbytes >= kLarge) {}
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Memory of any content for any plain type, good until the arena goes. Throws std::bad_alloc.
  void* take(std::size_t nbytes) {
    if (!large_) {  // pieces of their own, so that a sanitizer sees where each ends
      pieces_.emplace_back(new unsigned char[nbytes]);
      return pieces_.back().get();
    }
    if (nbytes > left_) {
      const Memory& block = blocks_.emplace_back(std::max(nbytes, kBlock));
      next_ = block.data();
      left_ = block.nbytes();
    }
    unsigned char* const taken = next_;
    const std::size_t used = std::min(left_, (nbytes + kAlign - 1) / kAlign * kAlign);
    next_ += used;
    left_ -= used;
    return taken;
  }

 private:
  static constexpr std::size_t kLarge = std::size_t{64} << 10;
  static constexpr std::size_t kBlock = 4 * kHugePage;  // what of it is never touched costs nothing
  static constexpr std::size_t kAlign = 16;

  bool large_;
  unsigned char* next_ = nullptr;
  std::size_t left_ = 0;
  std::list<Memory> blocks_;
  std::vector<std::unique_ptr<unsigned char[]>> pieces_;
};

// What std::vector is, for plain values in an arena.
template <typename T>
class Column {
  static_assert(std::is_trivially_copyable_v<T> && std::is_trivially_destructible_v<T> && alignof(T) <= 16);

 public:
  explicit Column(Arena& arena, std::size_t expected = 0) : arena_(&arena) { expect(expected); }
  Column(const Column&) = delete;
  Column& operator=(const Column&) = delete;
  Column(Column&& other) noexcept : arena_(other.arena_) { swap(other); }
  Column& operator=(Column&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Column() = default;

  [[nodiscard]] std::size_t size() const { return static_cast<std::size_t>(end_ - begin_); }
  [[nodiscard]] bool empty() const { return begin_ == end_; }
  [[nodiscard]] const T* data() const { return begin_; }
  [[nodiscard]] T* begin() { return begin_; }
  [[nodiscard]] T* end() { return end_; }
  [[nodiscard]] const T* begin() const { return begin_; }
  [[nodiscard]] const T* end() const { return end_; }
  // REQUIRES: i < size().
  [[nodiscard]] T& operator[](std::size_t i) { return begin_[i]; }
  [[nodiscard]] const T& operator[](std::size_t i) const { return begin_[i]; }
  [[nodiscard]] T& back() { return end_[-1]; }

  void push(const T& value) {
    if (end_ == limit_) {
      const T kept = value;  // which may lie in the memory that is left behind
      grow(1);
      *end_++ = kept;
    } else {
      *end_++ = value;
    }
  }

  // Room for n more at the end, of any content.
  T* extend(std::size_t n) {
    expect(n);
    T* const room = end_;
    end_ += n;
    return room;
  }

  // Room for n more: that so many come is then no reason to move.
  void expect(std::size_t n) {
    if (n > static_cast<std::size_t>(limit_ - end_)) {
      grow(n);
    }
  }

  // REQUIRES: the values are not of this column.
  void append(const T* values, std::size_t n) {
    if (n != 0) {
      std::memcpy(extend(n), values, n * sizeof(T));
    }
  }

  // REQUIRES: n <= size().
  void shrink(std::size_t n) { end_ = begin_ + n; }

 private:
  // Room for n more, and for as many again as there are.
  void grow(std::size_t n) {
    const std::size_t before = size();
    if (n > SIZE_MAX / sizeof(T) / 4 - before) {
      throw std::bad_alloc();
    }
    const std::size_t room = std::max(before + n, 2 * before);
    T* const moved = static_cast<T*>(arena_->take(room * sizeof(T)));
    if (before != 0) {
      std::memcpy(moved, begin_, before * sizeof(T));
    }
    begin_ = moved;
    end_ = moved + before;
    limit_ = moved + room;
  }

  void swap(Column& other) noexcept {
    std::swap(arena_, other.arena_);
    std::swap(begin_, other.begin_);
    std::swap(end_, other.end_);
    std::swap(limit_, other.limit_);
  }

  Arena* arena_;
  T* begin_ = nullptr;
  T* end_ = nullptr;
  T* limit_ = nullptr;
};

}  // namespace zipslicer
