// The tokens of a draft tree: one block a row, one thread a node, nothing shared between threads.
// A length outside [1, C] counts as the nearest one inside, so that no read leaves the history.
// Bytes per row: reads 8 N (depth, rank) and one token a node, writes 8 N.
#include "cuda/common.cuh"
#include "drafting.h"
#include "drafting_ops.h"

namespace msn {

namespace {

__global__ void __launch_bounds__(kMaxNodes)
    fill_tree_kernel(FillSources first_row, const int64_t* lengths, int64_t capacity,
                     const int32_t* depth, int64_t depth_stride, const int32_t* rank, int nodes,
                     const int64_t* seed, int64_t* tokens) {
  const int64_t row = blockIdx.x;
  const int node = threadIdx.x;
  if (node >= nodes) return;
  const FillSources from =
      sources_of_row(first_row, row, capacity, clamp(lengths[row], 1, capacity));
  tokens[row * nodes + node] =
      fill_node(from, node, depth[row * depth_stride + node], rank[node], seed[0], row);
}

}  // namespace

void FillTree::on_cuda(void* stream) const {
  const int64_t batch = history.shape[0], capacity = history.shape[1];
  const int nodes = static_cast<int>(rank.shape[0]);
  if (batch == 0) return;
  if (capacity == 0)
    throw std::invalid_argument("history has room for 0 tokens; expected at least 1");
  const DeviceGuard guard("fill_tree", history);
  launch("fill_tree", fill_tree_kernel, grid_x("fill_tree", batch), whole_warps(nodes), 0, stream,
         first_row(), lengths.as<int64_t>(), capacity, depth.as<int32_t>(),
         depth.ndim == 2 ? nodes : 0, rank.as<int32_t>(), nodes, seed.as<int64_t>(),
         tokens.as<int64_t>());
}

}  // namespace msn
