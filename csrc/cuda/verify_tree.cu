// The accepted path of each row: one block a row, one thread a node. Every thread walks up from
// its node over shared memory and says how deep it is accepted; the block's maximum is the end of
// the path. A second maximum finds the deepest node below that end, the continuation. Two threads
// of different warps then spell the two paths out, and the block writes them, -1 behind them.
// Bytes per row: reads 16 N + 4 N, writes 16 N + 16. One launch, at most 255 steps a walk.
#include "../tree.h"
#include "common.cuh"

namespace msn::cuda {

namespace {

__global__ void __launch_bounds__(kMaxNodes)
    verify_tree_kernel(const int64_t* tokens, const int64_t* targets, const int32_t* parents, int64_t parents_stride,
                       int nodes, int64_t* accept_length, int64_t* path, int64_t* bonus, int64_t* continuation) {
  __shared__ int64_t row_tokens[kMaxNodes], row_targets[kMaxNodes];
  __shared__ int64_t row_path[kMaxNodes], row_continuation[kMaxNodes];
  __shared__ int32_t row_parents[kMaxNodes];
  __shared__ int64_t scratch[kWarp];
  const int64_t row = blockIdx.x, first = row * nodes;
  const int node = threadIdx.x;
  if (node < nodes) {
    row_tokens[node] = tokens[first + node];
    row_targets[node] = targets[first + node];
    row_parents[node] = parents[row * parents_stride + node];
  }
  row_path[node] = row_continuation[node] = -1;
  __syncthreads();

  const int accepted = node < nodes ? accepted_depth(row_parents, row_tokens, row_targets, node) : -1;
  const int64_t best = block_max(path_key(accepted, node), scratch);
  const int end = key_node(best), length = key_depth(best) + 1;

  // A node above or beside `end` stands for `end` itself: nothing lies below.
  const bool below = node > end && node < nodes;
  const int64_t deepest =
      block_max(below ? path_key(depth_below(row_parents, node, end), node) : path_key(0, end), scratch);

  if (node == 0) write_path(row_parents, end, length, row_path);
  if (node == kWarp) write_path(row_parents, key_node(deepest), key_depth(deepest), row_continuation);
  __syncthreads();
  if (node < nodes) {
    path[first + node] = row_path[node];
    continuation[first + node] = row_continuation[node];
  }
  if (node == 0) {
    accept_length[row] = length;
    bonus[row] = row_targets[end];
  }
}

}  // namespace

void verify_tree(const Tensor& tokens, const Tensor& targets, const Tensor& parents, const Tensor& accept_length,
                 const Tensor& path, const Tensor& bonus, const Tensor& continuation, void* stream) {
  const int64_t batch = tokens.shape[0], nodes = tokens.shape[1];
  if (batch == 0) return;
  const DeviceGuard guard("verify_tree", tokens);
  launch("verify_tree", verify_tree_kernel, grid_x("verify_tree", batch), kMaxNodes, 0, stream, tokens.as<int64_t>(),
         targets.as<int64_t>(), parents.as<int32_t>(), parents.ndim == 2 ? nodes : 0, static_cast<int>(nodes),
         accept_length.as<int64_t>(), path.as<int64_t>(), bonus.as<int64_t>(), continuation.as<int64_t>());
}

}  // namespace msn::cuda
