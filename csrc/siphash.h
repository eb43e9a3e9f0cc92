// SipHash: bytes in, a hash out that nobody outside this process can predict. For every table keyed by a file's strings.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>

#include "bytes.h"

namespace zipslicer {

// Drawn once a process. std::hash is fixed and public: 60,000 names chosen to collide in it cost 5.9 s (measured).
struct HashKey {
  std::uint64_t first;
  std::uint64_t second;
};

inline const HashKey& hash_key() {
  static const HashKey key = [] {
    std::random_device device;
    const auto word = [&device] { return (static_cast<std::uint64_t>(device()) << 32) | device(); };
    return HashKey{word(), word()};
  }();
  return key;
}

// SipHash-1-3 (Aumasson and Bernstein), as CPython and Rust hash their strings. The value never leaves the process, so
// that words are read in the host's byte order.
inline std::uint64_t hash_of(Span bytes, const HashKey& key = hash_key()) {
  std::uint64_t v0 = key.first ^ 0x736f6d6570736575U;
  std::uint64_t v1 = key.second ^ 0x646f72616e646f6dU;
  std::uint64_t v2 = key.first ^ 0x6c7967656e657261U;
  std::uint64_t v3 = key.second ^ 0x7465646279746573U;
  const auto turn = [](std::uint64_t x, int bits) { return (x << bits) | (x >> (64 - bits)); };
  const auto round = [&] {
    v0 += v1;
    v1 = turn(v1, 13) ^ v0;
    v0 = turn(v0, 32);
    v2 += v3;
    v3 = turn(v3, 16) ^ v2;
    v0 += v3;
    v3 = turn(v3, 21) ^ v0;
    v2 += v1;
    v1 = turn(v1, 17) ^ v2;
    v2 = turn(v2, 32);
  };
  const auto absorb = [&](std::uint64_t word) {
    v3 ^= word;
    round();
    v0 ^= word;
  };

  std::size_t at = 0;
  for (; bytes.size - at >= 8; at += 8) {
    std::uint64_t word = 0;
    std::memcpy(&word, bytes.data + at, 8);
    absorb(word);
  }
  std::uint64_t rest = static_cast<std::uint64_t>(bytes.size) << 56;
  for (std::size_t i = 0; at + i < bytes.size; ++i) {
    rest |= static_cast<std::uint64_t>(bytes.data[at + i]) << (8 * i);
  }
  absorb(rest);
  v2 ^= 0xff;
  round();
  round();
  round();
  return v0 ^ v1 ^ v2 ^ v3;
}

}  // namespace zipslicer
