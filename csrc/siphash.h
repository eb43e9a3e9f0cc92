// SipHash: a keyed hash for tables whose keys come out of a file. With a key that the file's author cannot know, no
// file can make all its names collide; with std::hash it can (60,000 names took six seconds).
#pragma once

#include <chrono>
#include <cstdint>
#include <exception>
#include <random>

#include "bytes.h"

namespace zipslicer {

struct SipKey {
  std::uint64_t low;
  std::uint64_t high;
};

// Drawn at the first call, the same for the life of the process. Safe for concurrent use.
inline const SipKey& process_sip_key() {
  static const SipKey key = [] {
    const auto draw = [] {
      try {
        std::random_device random;
        return static_cast<std::uint64_t>(random()) << 32 | random();
      } catch (const std::exception&) {  // no source of randomness: a clock is better than a constant
        return static_cast<std::uint64_t>(std::chrono::high_resolution_clock::now().time_since_epoch().count());
      }
    };
    return SipKey{draw(), draw()};
  }();
  return key;
}

// SipHash-1-3 (one round a word, three at the end) of bytes whose words pass through `fold` first. Words are
// those of Span::word, and the length goes in last: the hash never leaves the process.
template <typename Fold>
std::uint64_t siphash(Span bytes, const SipKey& key, Fold fold) {
  std::uint64_t v0 = key.low ^ 0x736f6d6570736575, v1 = key.high ^ 0x646f72616e646f6d;
  std::uint64_t v2 = key.low ^ 0x6c7967656e657261, v3 = key.high ^ 0x7465646279746573;
  const auto rotate = [](std::uint64_t x, int n) { return x << n | x >> (64 - n); };
  const auto round = [&] {
    v0 += v1, v1 = rotate(v1, 13), v1 ^= v0, v0 = rotate(v0, 32);
    v2 += v3, v3 = rotate(v3, 16), v3 ^= v2;
    v0 += v3, v3 = rotate(v3, 21), v3 ^= v0;
    v2 += v1, v1 = rotate(v1, 17), v1 ^= v2, v2 = rotate(v2, 32);
  };
  const auto absorb = [&](std::uint64_t word) { v3 ^= word, round(), v0 ^= word; };
  for (std::size_t at = 0; at < bytes.size; at += 8) {
    absorb(fold(bytes.word(at)));
  }
  absorb(bytes.size);
  v2 ^= 0xff;
  round(), round(), round();
  return v0 ^ v1 ^ v2 ^ v3;
}

inline std::uint64_t siphash(Span bytes, const SipKey& key) {
  return siphash(bytes, key, [](std::uint64_t word) { return word; });
}

}  // namespace zipslicer
