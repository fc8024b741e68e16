// The largest values of a row of logits, found one by one, and the guesses that they are. Inlined
// wherever it is used: files of different instruction sets share it.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

#include "best_first.h"

#define MSN_INLINE [[gnu::always_inline]] inline

namespace msn {

// Values as integers of the same order: sign and magnitude turned into two's complement, NaN above
// all. Bits: unsigned storage. Key: signed, as wide. kInfinity: the bits of infinity.
template <typename Bits, typename Key, Bits kInfinity>
struct Ordered {
  MSN_INLINE static Key key(Bits bits) {
    constexpr Bits magnitudes = std::numeric_limits<Bits>::max() >> 1;
    const Key magnitude = static_cast<Key>(bits & magnitudes);
    const Key value = static_cast<Key>(static_cast<Key>(bits) < 0 ? -magnitude : magnitude);
    return magnitude > static_cast<Key>(kInfinity) ? std::numeric_limits<Key>::max() : value;
  }
  // A value of this key.
  MSN_INLINE static Bits bits(Key key) {
    constexpr Bits sign = std::numeric_limits<Bits>::max() / 2 + 1;
    const Bits same = static_cast<Bits>(key);
    return key < 0 ? static_cast<Bits>(sign - same) : same;
  }
};
using OrderedFloat64 = Ordered<uint64_t, int64_t, 0x7ff0000000000000ull>;
using OrderedFloat32 = Ordered<uint32_t, int32_t, 0x7f800000u>;
using OrderedFloat16 = Ordered<uint16_t, int16_t, 0x7c00>;
using OrderedBFloat16 = Ordered<uint16_t, int16_t, 0x7f80>;

// The largest keys so far, in order; of equals the first.
template <typename Key>
struct Best {
  Key keys[kGuesses];
  int64_t at[kGuesses];  // -1: none yet

  MSN_INLINE void clear() {
    for (int i = 0; i < kGuesses; ++i) {
      keys[i] = std::numeric_limits<Key>::min();
      at[i] = -1;
    }
  }
  MSN_INLINE Key least() const { return keys[kGuesses - 1]; }
  MSN_INLINE void add(Key key, int64_t index) {
    if (key <= least()) return;
    int place = kGuesses - 1;
    for (; place > 0 && keys[place - 1] < key; --place) {
      keys[place] = keys[place - 1];
      at[place] = at[place - 1];
    }
    keys[place] = key;
    at[place] = index;
  }
};

// Writes them as guesses [kGuesses]; `value` gives a double for a key.
template <typename Key, typename Value>
MSN_INLINE void write_guesses(const Best<Key>& best, Value value, int32_t* out) {
  double weights[kGuesses], total = 0;
  const double most = value(best.keys[0]);
  for (int i = 0; i < kGuesses; ++i)
    if (best.at[i] >= 0) total += weights[i] = std::exp(value(best.keys[i]) - most);
  for (int i = 0; i < kGuesses; ++i)
    out[i] = best.at[i] >= 0 ? pack_guess(best.at[i], level_of(weights[i] / total)) : -1;
}

}  // namespace msn
