// The eight likeliest tokens of every row of logits (top_guesses.cuh).
// Bytes per row: reads the V logits once, writes 32; where the row is cut into parts, 64 more a
// part go to the workspace and come back.
#include "cuda/drafting/top_guesses.cuh"
#include "drafting_ops.h"

namespace msn {

namespace {

template <typename T>
__global__ void __launch_bounds__(kTopThreads, kTopBlocks)
    top_guesses_kernel(const __grid_constant__ TopRows<T> rows) {
  __shared__ TopShared shared;
  const int64_t row = blockIdx.x / rows.parts;
  const int part = static_cast<int>(blockIdx.x % rows.parts);
  top_of_part(rows.part(row, part), shared);
  if (rows.parts > 1) {
    if (threadIdx.x < kGuesses)
      rows.keys_of(row)[part * kGuesses + threadIdx.x] = shared.winners[threadIdx.x];
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      shared.last_of_row = atomicAdd(rows.arrived + row, 1) == rows.parts - 1;
      __threadfence();
      if (shared.last_of_row) rows.arrived[row] = 0;
    }
    __syncthreads();
    if (!shared.last_of_row) return;
    merge_parts(LeftKeys(rows, row), shared);
  }
  if (threadIdx.x < kWarp) write_guesses<T>(rows.guesses + row * kGuesses, shared);
}

}  // namespace

BlockSpace guesses_space(const Tensor& logits) {
  if (logits.shape[0] == 0) return {};
  return space_for(logits, plan_parts("top_guesses", logits));
}

void TopGuesses::on_cuda(void* stream) const {
  if (logits.shape[0] == 0) return;
  const DeviceGuard guard("top_guesses", logits);
  with_logits(logits, [&](auto element) {
    using T = decltype(element);
    const TopRows<T> rows = plan_rows<T>("top_guesses", logits, guesses, space);
    launch("top_guesses", top_guesses_kernel<T>,
           grid_x("top_guesses", logits.shape[0] * rows.parts), kTopThreads, 0, stream, rows);
  });
}

}  // namespace msn
