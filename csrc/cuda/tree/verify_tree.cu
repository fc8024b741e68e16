// The accepted path of each row: one block a row (verify_tree.cuh).
// Bytes per row: reads 16 N + 4 N, writes 16 N + 16.
#include "cuda/tree/verify_tree.cuh"
#include "tree_ops.h"

namespace msn {

namespace {

__global__ void __launch_bounds__(kMaxNodes)
    verify_tree_kernel(const int64_t* tokens, const int64_t* targets, const int32_t* parents,
                       int64_t parents_stride, int nodes, VerifiedRow to) {
  __shared__ VerifyShared shared;
  const int64_t row = blockIdx.x, first = row * nodes;
  verify_row(
      tokens + first, [&](int node) { return targets[first + node]; },
      parents + row * parents_stride, nodes,
      {to.accept_length + row, to.path + first, to.bonus + row, to.continuation + first}, shared);
}

}  // namespace

void VerifyTree::on_cuda(void* stream) const {
  const int64_t batch = tokens.shape[0], nodes = tokens.shape[1];
  if (batch == 0) return;
  const DeviceGuard guard("verify_tree", tokens);
  const VerifiedRow to{accept_length.as<int64_t>(), path.as<int64_t>(), bonus.as<int64_t>(),
                       continuation.as<int64_t>()};
  launch("verify_tree", verify_tree_kernel, grid_x("verify_tree", batch), kMaxNodes, 0, stream,
         tokens.as<int64_t>(), targets.as<int64_t>(), parents.as<int32_t>(),
         parents.ndim == 2 ? nodes : 0, static_cast<int>(nodes), to);
}

}  // namespace msn
