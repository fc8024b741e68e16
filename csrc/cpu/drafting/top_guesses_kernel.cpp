#include "cpu/drafting/top_guesses_kernel.h"

#include <algorithm>

#include "cpu/vectors.h"

namespace msn::MSN_ISA {

namespace {

// Ordered::key of many.
template <typename Bits, typename Key, Bits kInfinity>
Vec<Key> keys(Ordered<Bits, Key, kInfinity>, const Bits* from) {
  constexpr Key most = std::numeric_limits<Key>::max();
  const Vec<Key> bits = load(reinterpret_cast<const Key*>(from));
  const Vec<Key> sign = bits >> (8 * sizeof(Key) - 1), magnitude = bits & most;
  const Vec<Key> value = (magnitude ^ sign) - sign;
  return magnitude > static_cast<Key>(kInfinity) ? Vec<Key>{} + most : value;
}

template <typename Key>
Key largest_lane(Vec<Key> v) {
#if defined(__clang__)  // has no shuffle by a vector
  Key largest = v[0];
  for (int i = 1; i < Vector<Key>::size; ++i) largest = std::max<Key>(largest, v[i]);
  return largest;
#else
  Vec<Key> places;
  for (int i = 0; i < Vector<Key>::size; ++i) places[i] = static_cast<Key>(i);
#pragma GCC unroll 8
  for (int half = Vector<Key>::size / 2; half > 0; half /= 2) {
    const Vec<Key> other = __builtin_shuffle(v, places ^ static_cast<Key>(half));
    v = other > v ? other : v;
  }
  return v[0];
#endif
}

template <typename Order, typename Bits, typename Key>
void maxima(const Bits* row, int64_t count, Key* out) {
  constexpr int kLanes = Vector<Key>::size;
  constexpr Key least = std::numeric_limits<Key>::min();
  int64_t begin = 0;
  for (; begin + kBlock <= count; begin += kBlock) {
    Vec<Key> largest = Vec<Key>{} + least;
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      const Vec<Key> some = keys(Order{}, row + begin + i);
      largest = some > largest ? some : largest;
    }
    *out++ = largest_lane<Key>(largest);
  }
  if (begin == count) return;
  *out = least;
  for (int64_t i = begin; i < count; ++i) *out = std::max(*out, Order::key(row[i]));
}

}  // namespace

void block_maxima(OrderedFloat64, const uint64_t* row, int64_t count, int64_t* out) {
  maxima<OrderedFloat64>(row, count, out);
}
void block_maxima(OrderedFloat32, const uint32_t* row, int64_t count, int32_t* out) {
  maxima<OrderedFloat32>(row, count, out);
}
void block_maxima(OrderedFloat16, const uint16_t* row, int64_t count, int16_t* out) {
  maxima<OrderedFloat16>(row, count, out);
}
void block_maxima(OrderedBFloat16, const uint16_t* row, int64_t count, int16_t* out) {
  maxima<OrderedBFloat16>(row, count, out);
}

}  // namespace msn::MSN_ISA
