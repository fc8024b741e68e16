// Memory in which the blocks of one launch on a GPU leave sums for each other.
#pragma once
#include <cstdint>

namespace msn {

struct BlockSpace {
  float* partial = nullptr;
  int* arrived = nullptr;  // 0 before and after
  int64_t floats = 0, counters = 0;
};

}  // namespace msn
