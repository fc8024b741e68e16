// The eight likeliest tokens of every row of logits: one block a row (top_guesses.cuh).
// Bytes per row: reads the V logits once, writes 32.
#include "cuda/drafting/top_guesses.cuh"
#include "drafting_ops.h"

namespace msn {

namespace {

template <typename T>
__global__ void __launch_bounds__(kTopThreads)
    top_guesses_kernel(const T* logits, int64_t stride, int vocabulary, bool wide,
                       int32_t* guesses) {
  __shared__ TopShared shared;
  const int32_t guess = top_of_row(logits + blockIdx.x * stride, vocabulary, wide, shared);
  if (threadIdx.x < kGuesses) guesses[int64_t{blockIdx.x} * kGuesses + threadIdx.x] = guess;
}

}  // namespace

void TopGuesses::on_cuda(void* stream) const {
  if (logits.shape[0] == 0) return;
  const DeviceGuard guard("top_guesses", logits);
  with_logits(logits, [&](auto element) {
    using T = decltype(element);
    launch("top_guesses", top_guesses_kernel<T>, grid_x("top_guesses", logits.shape[0]),
           kTopThreads, 0, stream, logits.as<T>(), logits.strides[0],
           static_cast<int>(logits.shape[1]), whole_rows(logits, 16), guesses.as<int32_t>());
  });
}

}  // namespace msn
