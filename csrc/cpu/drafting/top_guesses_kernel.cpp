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
    Key lanes[kLanes];
    store(lanes, largest);
    *out = lanes[0];
    for (Key lane : lanes) *out = std::max(*out, lane);
    ++out;
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
