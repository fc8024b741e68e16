// The part of top_guesses.cpp that reads all logits, for one instruction set each.
#pragma once
#include <cstdint>

#include "cpu/drafting/best_guesses.h"

namespace msn {

constexpr int64_t kBlock = 128;  // values of a row that are looked at together

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
