// The guesses of the tail at the end of the accepted path, or those at the rejected continuation,
// and the factors of the next draft: one block a row, one thread a number. An accept length outside
// [1, N] or a node outside [0, N) counts as none. Bytes per row: reads and writes 32 a depth and
// 2,784 of factors; reads 8 a tail, and 8 a depth where there is none.
#include "best_first.h"
#include "cuda/common.cuh"
#include "drafting_ops.h"
#include "tails.h"

namespace msn {

namespace {

constexpr int kThreads = 256;

struct Pass {
  const int32_t* guesses;
  const int64_t *continuation, *path, *accept_length, *ends;
  int rows, tails, length;
};

__global__ void __launch_bounds__(kThreads)
    keep_tail_kernel(Pass pass, const double* tables, int depths, int32_t* denoised,
                     double* factors) {
  const int64_t b = blockIdx.x, first = b * pass.rows;
  const int64_t count = pass.accept_length[b];
  const int64_t last = count >= 1 && count <= pass.rows ? pass.path[first + count - 1] : -1;
  const int tail = tail_below(pass.ends + b * pass.tails, pass.tails, last);
  for (int i = threadIdx.x; i < depths * kGuesses; i += kThreads) {
    const int64_t row =
        kept_row(pass.continuation + first, pass.rows, pass.tails, pass.length, tail, i / kGuesses);
    denoised[b * depths * kGuesses + i] =
        row >= 0 && row < pass.rows ? pass.guesses[(first + row) * kGuesses + i % kGuesses] : -1;
  }
  for (int i = threadIdx.x; i < kFactors; i += kThreads)
    factors[b * kFactors + i] = tables[tail < 0 ? i : kFactors + i];
}

}  // namespace

void KeepTail::on_cuda(void* stream) const {
  const int64_t batch = guesses.shape[0];
  if (batch == 0) return;
  const DeviceGuard guard("keep_tail", guesses);
  const Pass pass{guesses.as<int32_t>(),
                  continuation.as<int64_t>(),
                  path.as<int64_t>(),
                  accept_length.as<int64_t>(),
                  ends.as<int64_t>(),
                  static_cast<int>(guesses.shape[1]),
                  static_cast<int>(ends.shape[1]),
                  static_cast<int>(length)};
  launch("keep_tail", keep_tail_kernel, grid_x("keep_tail", batch), kThreads, 0, stream, pass,
         tables.as<double>(), static_cast<int>(denoised.shape[1]), denoised.as<int32_t>(),
         factors.as<double>());
}

}  // namespace msn
