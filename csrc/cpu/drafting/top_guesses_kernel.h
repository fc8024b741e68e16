// The part of top_guesses.cpp that reads all logits, for one instruction set each.
#pragma once
#include <cstdint>
#include <limits>

#include "tensor.h"

namespace msn {

constexpr int64_t kBlock = 128;  // values of a row that are looked at together

// Values as integers of the same order: sign and magnitude turned into two's complement, NaN above
// all. Bits: unsigned storage. Key: signed, as wide. kInfinity: the bits of infinity.
template <typename Bits, typename Key, Bits kInfinity>
struct Ordered {
  static Key key(Bits bits) {
    constexpr Bits magnitudes = std::numeric_limits<Bits>::max() >> 1;
    const Key magnitude = static_cast<Key>(bits & magnitudes);
    const Key value = static_cast<Key>(static_cast<Key>(bits) < 0 ? -magnitude : magnitude);
    return magnitude > static_cast<Key>(kInfinity) ? std::numeric_limits<Key>::max() : value;
  }
};
using OrderedFloat64 = Ordered<uint64_t, int64_t, 0x7ff0000000000000ull>;
using OrderedFloat32 = Ordered<uint32_t, int32_t, 0x7f800000u>;
using OrderedFloat16 = Ordered<uint16_t, int16_t, 0x7c00>;
using OrderedBFloat16 = Ordered<uint16_t, int16_t, 0x7f80>;

// The largest key of each block of a row of `count` values.
#define MSN_BLOCK_MAXIMA                                                           \
  void block_maxima(OrderedFloat64, const uint64_t*, int64_t count, int64_t* out); \
  void block_maxima(OrderedFloat32, const uint32_t*, int64_t count, int32_t* out); \
  void block_maxima(OrderedFloat16, const uint16_t*, int64_t count, int16_t* out); \
  void block_maxima(OrderedBFloat16, const uint16_t*, int64_t count, int16_t* out);
namespace baseline {
MSN_BLOCK_MAXIMA
}
namespace avx2 {
MSN_BLOCK_MAXIMA
}
namespace avx512 {
MSN_BLOCK_MAXIMA
}
#undef MSN_BLOCK_MAXIMA

}  // namespace msn
