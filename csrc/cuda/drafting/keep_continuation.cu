// The guesses at the rejected continuation of every row: one block a row, one thread a number. A
// node outside [0, N) counts as none. Bytes per row: reads 8 + 32 a depth, writes 32 a depth.
#include "best_first.h"
#include "cuda/common.cuh"
#include "drafting_ops.h"

namespace msn {

namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    keep_continuation_kernel(const int32_t* guesses, const int64_t* continuation, int nodes,
                             int depths, int32_t* denoised) {
  const int64_t row = blockIdx.x;
  for (int i = threadIdx.x; i < depths * kGuesses; i += kThreads) {
    const int at = i / kGuesses;
    const int64_t node = at < nodes ? continuation[row * nodes + at] : -1;
    denoised[row * depths * kGuesses + i] =
        node >= 0 && node < nodes ? guesses[(row * nodes + node) * kGuesses + i % kGuesses] : -1;
  }
}

}  // namespace

void KeepContinuation::on_cuda(void* stream) const {
  const int64_t batch = guesses.shape[0];
  const int nodes = static_cast<int>(guesses.shape[1]);
  const int depths = static_cast<int>(denoised.shape[1]);
  if (batch == 0 || depths == 0) return;
  const DeviceGuard guard("keep_continuation", denoised);
  launch("keep_continuation", keep_continuation_kernel, grid_x("keep_continuation", batch),
         kThreads, 0, stream, guesses.as<int32_t>(), continuation.as<int64_t>(), nodes, depths,
         denoised.as<int32_t>());
}

}  // namespace msn
