// The likeliest tokens of many rows of logits: guesses, and what top-k keeps. The largest value of
// every block is found first, in vector code; the eight best lie in blocks whose largest is no
// smaller than the eighth of these, and only those few are looked at value by value.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

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

template <typename Bits, typename Key, Bits kInfinity, typename Value>
void top_row(Ordered<Bits, Key, kInfinity>, const Bits* row, int64_t vocabulary, Value value,
             int32_t* out) {
  using Order = Ordered<Bits, Key, kInfinity>;
  const int64_t blocks = (vocabulary + kBlock - 1) / kBlock;
  thread_local std::vector<Key> maxima;
  maxima.resize(blocks);
  block_maxima<Order>(row, vocabulary, maxima.data());
  Best<Key> of_blocks, of_row;
  of_blocks.clear();
  of_row.clear();
  for (int64_t b = 0; b < blocks; ++b) of_blocks.add(maxima[b], b);
  for (int64_t b = 0; b < blocks; ++b) {
    if (maxima[b] < of_blocks.least() || maxima[b] <= of_row.least()) continue;
    const int64_t end = std::min((b + 1) * kBlock, vocabulary);
    for (int64_t i = b * kBlock; i < end; ++i) of_row.add(Order::key(row[i]), i);
  }
  write_guesses(of_row, [&](Key key) { return value(Order::bits(key)); }, out);
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

// So many values of a float32 apart, two logits may be one once they were divided.
constexpr int64_t kNear = 64;

// What TopLogits says, of one row.
bool top_of_row(const uint32_t* row, int64_t vocabulary, int64_t k, float* values,
                int64_t* tokens) {
  using Order = OrderedFloat32;
  const int64_t blocks = (vocabulary + kBlock - 1) / kBlock;
  thread_local std::vector<int32_t> maxima, ordered;
  thread_local std::vector<std::pair<int32_t, int64_t>> found;  // by token
  maxima.resize(blocks);
  block_maxima<Order>(row, vocabulary, maxima.data());
  int64_t bound = std::numeric_limits<int32_t>::min();  // no value of the largest is below it
  if (k <= blocks) {
    ordered = maxima;
    std::nth_element(ordered.begin(), ordered.begin() + (k - 1), ordered.end(), std::greater<>());
    bound = ordered[k - 1] - kNear;
  }
  found.clear();
  for (int64_t b = 0; b < blocks; ++b) {
    if (maxima[b] < bound) continue;
    const int64_t end = std::min((b + 1) * kBlock, vocabulary);
    for (int64_t i = b * kBlock; i < end; ++i) {
      const int32_t key = Order::key(row[i]);
      if (key >= bound) found.emplace_back(key, i);
    }
  }
  ordered.clear();
  for (const auto& [key, token] : found) ordered.push_back(key);
  std::nth_element(ordered.begin(), ordered.begin() + (k - 1), ordered.end(), std::greater<>());
  const int64_t least = ordered[k - 1];
  int64_t count = 0;
  for (const auto& [key, token] : found) {
    if (key < least - kNear) continue;
    const double value = float_of(Order::bits(key));
    if (count == k || !(std::fabs(value) < 1e30 && std::fabs(value) > 1e-30)) return false;
    values[count] = static_cast<float>(value);
    tokens[count++] = token;
  }
  return true;
}

}  // namespace

bool TopLogits::on_cpu() const {
  const int64_t k = tokens.shape[1];
  for (int64_t row = 0; row < logits.shape[0]; ++row)
    if (!top_of_row(logits.as<uint32_t>() + row * logits.strides[0], logits.shape[1], k,
                    values.as<float>() + row * k, tokens.as<int64_t>() + row * k))
      return false;
  return true;
}

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
