// Random bits by counter: the same on every backend, whatever runs in parallel.
#pragma once
#include <cstdint>

#include "host_device.h"

namespace msn {

// SplitMix64 (Steele, Lea, Flood 2014): the finaliser over a Weyl sequence.
MSN_HD uint64_t splitmix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// 63 random bits for a counter.
MSN_HD int64_t counter_bits(int64_t seed, int64_t row, int64_t position, int64_t node) {
  uint64_t x = splitmix64(static_cast<uint64_t>(seed) ^ splitmix64(static_cast<uint64_t>(row)));
  x = splitmix64(x ^ static_cast<uint64_t>(position));
  return static_cast<int64_t>(splitmix64(x ^ static_cast<uint64_t>(node)) >> 1);
}

}  // namespace msn
