// The likeliest tokens of many rows of logits. The largest value of every block is found first, in
// vector code; the eight best lie in blocks whose largest is no smaller than the eighth of these,
// and only those few are looked at value by value.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "best_first.h"
#include "cpu/drafting/top_guesses_kernel.h"
#include "drafting_ops.h"
#include "tree_ops.h"

namespace msn {

namespace {

template <typename Order, typename Bits, typename Key>
void block_maxima(const Bits* row, int64_t count, Key* out) {
#ifdef MSN_HAVE_AVX512
  static const bool avx512 = !std::strcmp(attention_isa(), "avx512");
  if (avx512) return avx512::block_maxima(Order{}, row, count, out);
#endif
#ifdef MSN_HAVE_AVX2
  static const bool avx2 = !std::strcmp(attention_isa(), "avx2");
  if (avx2) return avx2::block_maxima(Order{}, row, count, out);
#endif
  baseline::block_maxima(Order{}, row, count, out);
}

// The largest keys so far, in order; of equals the first.
template <typename Key>
struct Best {
  Key keys[kGuesses];
  int64_t at[kGuesses];

  Best() {
    std::fill_n(keys, kGuesses, std::numeric_limits<Key>::min());
    std::fill_n(at, kGuesses, -1);
  }
  Key least() const { return keys[kGuesses - 1]; }
  void add(Key key, int64_t index) {
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

template <typename Bits, typename Key, Bits kInfinity, typename Value>
void top_row(Ordered<Bits, Key, kInfinity>, const Bits* row, int64_t vocabulary, Value value,
             int32_t* out) {
  using Order = Ordered<Bits, Key, kInfinity>;
  const int64_t blocks = (vocabulary + kBlock - 1) / kBlock;
  thread_local std::vector<Key> maxima;
  maxima.resize(blocks);
  block_maxima<Order>(row, vocabulary, maxima.data());
  Best<Key> of_blocks, of_row;
  for (int64_t b = 0; b < blocks; ++b) of_blocks.add(maxima[b], b);
  for (int64_t b = 0; b < blocks; ++b) {
    if (maxima[b] < of_blocks.least() || maxima[b] <= of_row.least()) continue;
    const int64_t end = std::min((b + 1) * kBlock, vocabulary);
    for (int64_t i = b * kBlock; i < end; ++i) of_row.add(Order::key(row[i]), i);
  }
  double weights[kGuesses], total = 0;
  const int found = static_cast<int>(std::min<int64_t>(vocabulary, kGuesses));
  const double best = value(row[of_row.at[0]]);
  for (int i = 0; i < found; ++i) total += weights[i] = std::exp(value(row[of_row.at[i]]) - best);
  for (int i = 0; i < kGuesses; ++i)
    out[i] = i < found ? pack_guess(of_row.at[i], level_of(weights[i] / total)) : -1;
}

template <typename Bits, typename Key, Bits kInfinity, typename Value>
void top_rows(Ordered<Bits, Key, kInfinity> order, const Tensor& logits, Value value,
              const Tensor& guesses) {
  const int64_t vocabulary = logits.shape[1];
  // Waking the other threads takes longer than a few rows.
  const bool many = logits.shape[0] > 1 && logits.shape[0] * vocabulary > 1 << 19;
#pragma omp parallel for schedule(static) if (many)
  for (int64_t row = 0; row < logits.shape[0]; ++row)
    top_row(order, logits.as<Bits>() + row * logits.strides[0], vocabulary, value,
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
    case DType::kFloat32: return top_rows(OrderedFloat32{}, logits, float_of, guesses);
    case DType::kFloat64:
      return top_rows(
          OrderedFloat64{}, logits,
          [](uint64_t bits) {
            double value;
            std::memcpy(&value, &bits, sizeof value);
            return value;
          },
          guesses);
    case DType::kFloat16: return top_rows(OrderedFloat16{}, logits, half_of, guesses);
    default:
      return top_rows(
          OrderedBFloat16{}, logits,
          [](uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }, guesses);
  }
}

}  // namespace msn
