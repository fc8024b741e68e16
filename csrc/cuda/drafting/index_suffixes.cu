// The last places of the n-grams before every new place of the text: one block a row, one thread a
// place, which hashes the 16 tokens before it. Of places that share a slot the last one stays, by
// an atomic maximum: what is asked for as long as `suffixes` holds nothing but places before the
// new ones, of earlier calls; a larger value stays where the specification overwrites it. A start
// or length outside [0, C] counts as the nearest one inside. Bytes per new place: reads 8 (the
// tokens before it hit L1), changes 4 in each of 8 slots.
#include "best_first.h"
#include "cuda/common.cuh"
#include "drafting_ops.h"

namespace msn {

namespace {

// A prompt is indexed by one block: as many threads as a block can have.
constexpr int kThreads = 1024;

__global__ void __launch_bounds__(kThreads)
    index_suffixes_kernel(int32_t* suffixes, int64_t slots, const int64_t* history,
                          int64_t capacity, const int64_t* start, const int64_t* lengths) {
  const int64_t row = blockIdx.x;
  const int64_t* text = history + row * capacity;
  int32_t* table = suffixes + row * kSuffixes * slots;
  const int64_t length = clamp(lengths[row], 0, capacity), begin = clamp(start[row], 1, capacity);
  for (int64_t end = begin + threadIdx.x; end < length; end += kThreads) {
    uint64_t hash = 0;
    int n = 1;
    bool tokens = text[end] >= 0;
#pragma unroll
    for (int level = 0; level < kSuffixes; ++level) {
      if (suffix_length(level) > end) break;
      for (; n <= suffix_length(level); ++n) {
        hash = extend_hash(hash, text[end - n]);
        tokens &= text[end - n] >= 0;
      }
      if (!tokens) break;
      const int64_t slot =
          level * slots + static_cast<int64_t>(hash % static_cast<uint64_t>(slots));
      atomicMax(table + slot, static_cast<int32_t>(end));
    }
  }
}

}  // namespace

void IndexSuffixes::on_cuda(void* stream) const {
  const int64_t batch = history.shape[0];
  if (batch == 0 || suffixes.shape[2] == 0) return;
  const DeviceGuard guard("index_suffixes", history);
  launch("index_suffixes", index_suffixes_kernel, grid_x("index_suffixes", batch), kThreads, 0,
         stream, suffixes.as<int32_t>(), suffixes.shape[2], history.as<int64_t>(), history.shape[1],
         start.as<int64_t>(), lengths.as<int64_t>());
}

}  // namespace msn
