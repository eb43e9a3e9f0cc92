// HashIndex: numbers by hash, for tables whose keys come out of a file. Hash with siphash.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace zipslicer {

// Open addressing. The caller keeps what the numbers stand for, and compares it.
class HashIndex {
 public:
  static constexpr std::size_t kNotFound = ~std::size_t{0};

  explicit HashIndex(std::size_t expected = 0) {
    std::size_t slots = 16;
    while (slots / 2 < expected) {
      slots *= 2;
    }
    slots_.resize(slots);
  }

  // The number that was added with this hash and for which same(number) is true.
  template <typename Same>
  [[nodiscard]] std::size_t find(std::uint64_t hash, Same same) const {
    for (std::size_t at = home(hash);; at = next(at)) {
      const Slot& slot = slots_[at];
      if (slot.number == kNotFound || (slot.hash == hash && same(slot.number))) {
        return slot.number;
      }
    }
  }

  void add(std::uint64_t hash, std::size_t number) {
    if (2 * (count_ + 1) > slots_.size()) {  // at most half full, so that every search ends soon
      const std::vector<Slot> old = std::exchange(slots_, std::vector<Slot>(2 * slots_.size()));
      for (const Slot& slot : old) {
        if (slot.number != kNotFound) {
          put(slot);
        }
      }
    }
    put({hash, number});
    ++count_;
  }

 private:
  struct Slot {
    std::uint64_t hash = 0;
    std::size_t number = kNotFound;  // or free
  };

  [[nodiscard]] std::size_t home(std::uint64_t hash) const {
    return static_cast<std::size_t>(hash) & (slots_.size() - 1);
  }
  [[nodiscard]] std::size_t next(std::size_t at) const { return (at + 1) & (slots_.size() - 1); }

  void put(const Slot& slot) {
    std::size_t at = home(slot.hash);
    while (slots_[at].number != kNotFound) {
      at = next(at);
    }
    slots_[at] = slot;
  }

  std::vector<Slot> slots_;  // a power of two of them
  std::size_t count_ = 0;
};

}  // namespace zipslicer
