// The likeliest tokens of many rows of logits, read once. Rows are compared as integers of the same
// order (sign and magnitude turned into two's complement, NaN above all), which compilers turn into
// vector code without licence to reorder floating-point arithmetic. Few blocks of a row hold
// anything above the smallest of the best so far, and only these are looked at value by value.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "best_first.h"
#include "drafting_ops.h"

namespace msn {

namespace {

// Bits: unsigned storage. Key: signed, at least as wide. kInfinity: the bits of infinity.
template <typename Bits, typename Key, Bits kInfinity>
struct Ordered {
  static Key key(Bits bits) {
    constexpr Bits sign = Bits{1} << (sizeof(Bits) * 8 - 1);
    const Key magnitude = static_cast<Key>(bits & static_cast<Bits>(~sign));
    const Key value = bits & sign ? -magnitude : magnitude;
    return magnitude > static_cast<Key>(kInfinity) ? std::numeric_limits<Key>::max() : value;
  }
};

template <typename Bits, typename Key, Bits kInfinity, typename Value>
void top_row(const Bits* row, int64_t vocabulary, Value value, int32_t* out) {
  using Order = Ordered<Bits, Key, kInfinity>;
  constexpr int64_t kBlock = 256;
  constexpr Key kNone = std::numeric_limits<Key>::min();
  Key keys[kGuesses];
  int64_t at[kGuesses];
  std::fill_n(keys, kGuesses, kNone);
  std::fill_n(at, kGuesses, -1);
  for (int64_t begin = 0; begin < vocabulary; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, vocabulary);
    const Key least = keys[kGuesses - 1];
    int above = 0;
    for (int64_t i = begin; i < end; ++i) above |= Order::key(row[i]) > least;
    if (!above) continue;
    for (int64_t i = begin; i < end; ++i) {
      const Key key = Order::key(row[i]);
      if (key <= keys[kGuesses - 1]) continue;  // of equals the first stays
      int place = kGuesses - 1;
      for (; place > 0 && keys[place - 1] < key; --place) {
        keys[place] = keys[place - 1];
        at[place] = at[place - 1];
      }
      keys[place] = key;
      at[place] = i;
    }
  }
  double weights[kGuesses], total = 0;
  const int found = static_cast<int>(std::min<int64_t>(vocabulary, kGuesses));
  const double best = value(row[at[0]]);
  for (int i = 0; i < found; ++i) total += weights[i] = std::exp(value(row[at[i]]) - best);
  for (int i = 0; i < kGuesses; ++i)
    out[i] = i < found ? pack_guess(at[i], level_of(weights[i] / total)) : -1;
}

template <typename Bits, typename Key, Bits kInfinity, typename Value>
void top_rows(const Tensor& logits, Value value, const Tensor& guesses) {
  const int64_t vocabulary = logits.shape[1];
#pragma omp parallel for schedule(static) if (logits.shape[0] > 1)
  for (int64_t row = 0; row < logits.shape[0]; ++row)
    top_row<Bits, Key, kInfinity>(logits.as<Bits>() + row * logits.strides[0], vocabulary, value,
                                  guesses.as<int32_t>() + row * kGuesses);
}

double float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

double half_of(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  double value = exponent == 31 ? (fraction ? NAN : INFINITY)
                                : std::ldexp(exponent ? 1024 + fraction : fraction,
                                             (exponent ? exponent : 1) - 25);
  return bits & 0x8000 ? -value : value;
}

}  // namespace

void TopGuesses::on_cpu() const {
  switch (logits.dtype) {
    case DType::kFloat32:
      return top_rows<uint32_t, int32_t, 0x7f800000u>(logits, float_of, guesses);
    case DType::kFloat64:
      return top_rows<uint64_t, int64_t, 0x7ff0000000000000ull>(
          logits,
          [](uint64_t bits) {
            double value;
            std::memcpy(&value, &bits, sizeof value);
            return value;
          },
          guesses);
    case DType::kFloat16: return top_rows<uint16_t, int32_t, 0x7c00>(logits, half_of, guesses);
    default:
      return top_rows<uint16_t, int32_t, 0x7f80>(
          logits, [](uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); },
          guesses);
  }
}

}  // namespace msn
