// From logits to the accepted path in one launch: a block a node finds the node's eight likeliest
// tokens (top_guesses.cuh), the first of which is its target; the last of a row's blocks to arrive
// verifies the row (verify_tree.cuh) and leaves the row's counter at 0 for the next launch. Bytes
// per node: reads the V logits once, writes 40 and 16 for the path; per row reads 20 N more.
#include "cuda/drafting/top_guesses.cuh"
#include "cuda/tree/verify_tree.cuh"
#include "tree_ops.h"

namespace msn {

namespace {

template <typename T>
__global__ void __launch_bounds__(kTopThreads)
    verify_logits_kernel(const T* logits, int64_t stride, int vocabulary, bool wide,
                         const int64_t* tokens, const int32_t* parents, int64_t parents_stride,
                         int nodes, int32_t* guesses, int64_t* targets, VerifiedRow to,
                         int* arrived) {
  __shared__ TopShared top;
  __shared__ VerifyShared verify;
  const int64_t at = blockIdx.x, row = at / nodes, first = row * nodes;
  const int32_t guess = top_of_row(logits + at * stride, vocabulary, wide, top);
  if (threadIdx.x < kGuesses) guesses[at * kGuesses + threadIdx.x] = guess;
  bool last = false;
  if (threadIdx.x == 0) {
    targets[at] = guess_token(guess);
    __threadfence();
    last = atomicAdd(arrived + row, 1) == nodes - 1;
  }
  if (!__syncthreads_or(last)) return;
  __threadfence();
  if (threadIdx.x == 0) arrived[row] = 0;
  // Past L1, where an older value may lie.
  const auto target = [&](int node) -> int64_t {
    return __ldcg(reinterpret_cast<const long long*>(targets) + first + node);
  };
  verify_row(tokens + first, target, parents + row * parents_stride, nodes,
             {to.accept_length + row, to.path + first, to.bonus + row, to.continuation + first},
             verify);
}

}  // namespace

void VerifyLogits::on_cuda(void* stream) const {
  const int64_t batch = tokens.shape[0], nodes = tokens.shape[1];
  if (batch == 0) return;
  const DeviceGuard guard("verify_logits", tokens);
  const VerifiedRow to{accept_length.as<int64_t>(), path.as<int64_t>(), bonus.as<int64_t>(),
                       continuation.as<int64_t>()};
  with_logits(logits, [&](auto element) {
    using T = decltype(element);
    launch("verify_logits", verify_logits_kernel<T>, grid_x("verify_logits", batch * nodes),
           kTopThreads, 0, stream, logits.as<T>(), logits.strides[0],
           static_cast<int>(logits.shape[1]), whole_rows(logits, 16), tokens.as<int64_t>(),
           parents.as<int32_t>(), parents.ndim == 2 ? nodes : 0, static_cast<int>(nodes),
           guesses.as<int32_t>(), targets.as<int64_t>(), to, arrived.as<int>());
  });
}

}  // namespace msn
