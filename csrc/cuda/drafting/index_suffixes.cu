// The last places of the n-grams before every new place of the text: a warp a length of n-grams, a
// lane a place, so that no thread hashes more than 16 tokens; a long row has several blocks, a step
// of decoding a row one that has anything to do. Of places that share a slot the last one stays, by
// an atomic maximum: what is asked for as long as `suffixes` holds nothing but places before the
// new ones, of earlier calls; a larger value stays where the specification overwrites it. A start
// or length outside [0, C] counts as the nearest one inside. Per new place: reads 8 bytes (the
// tokens before it hit L1), hashes 52 tokens, changes 4 bytes in each of 8 slots.
#include "best_first.h"
#include "cuda/common.cuh"
#include "drafting_ops.h"

namespace msn {

namespace {

constexpr int kThreads = kSuffixes * kWarp;
constexpr int64_t kPlaces = 4096;  // of a row, for each block that it gets
constexpr int64_t kMostBlocks = 32;

__global__ void __launch_bounds__(kThreads)
    index_suffixes_kernel(int32_t* suffixes, int64_t slots, const int64_t* history,
                          int64_t capacity, const int64_t* start, const int64_t* lengths) {
  const int64_t row = blockIdx.x;
  const int level = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, size = suffix_length(level);
  const int64_t* text = history + row * capacity;
  int32_t* table = suffixes + (row * kSuffixes + level) * slots;
  const int64_t length = clamp(lengths[row], 0, capacity), begin = clamp(start[row], 1, capacity);
  for (int64_t end = begin + blockIdx.y * kWarp + lane; end < length; end += gridDim.y * kWarp) {
    if (size > end) continue;
    uint64_t hash = 0;
    bool tokens = text[end] >= 0;
    for (int n = size; n > 0; --n) {
      hash = extend_hash(hash, text[end - n]);
      tokens &= text[end - n] >= 0;
    }
    if (!tokens) continue;
    atomicMax(table + slot_of(hash, slots), static_cast<int32_t>(end));
  }
}

}  // namespace

void IndexSuffixes::on_cuda(void* stream) const {
  const int64_t batch = history.shape[0];
  if (batch == 0 || suffixes.shape[2] == 0) return;
  const DeviceGuard guard("index_suffixes", history);
  const int64_t blocks = clamp(history.shape[1] / kPlaces, 1, kMostBlocks);
  const dim3 grid(grid_x("index_suffixes", batch), static_cast<unsigned>(blocks));
  launch("index_suffixes", index_suffixes_kernel, grid, kThreads, 0, stream, suffixes.as<int32_t>(),
         suffixes.shape[2], history.as<int64_t>(), history.shape[1], start.as<int64_t>(),
         lengths.as<int64_t>());
}

}  // namespace msn
