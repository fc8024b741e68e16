// Ancestor bits and depth of every node: one block a row, one thread a node, each walking up its
// own path (at most 255 steps). The words are gathered in shared memory, because a walk sets them
// one bit at a time, and leave in one coalesced copy.
// Bytes per row: reads 4 N, writes 8 N W + 4 N.
#include "cuda/common.cuh"
#include "tree.h"
#include "tree_ops.h"

namespace msn {

namespace {

__global__ void __launch_bounds__(kMaxNodes)
    tree_ancestors_kernel(const int32_t* parents, int nodes, uint64_t* ancestors, int32_t* depth) {
  __shared__ int32_t row_parents[kMaxNodes];
  __shared__ uint64_t words[kMaxNodes * kMaxWords];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * nodes;
  const int node = threadIdx.x, n_words = words_for(nodes);
  if (node < nodes) row_parents[node] = parents[first + node];
  __syncthreads();
  if (node < nodes)
    depth[first + node] = ancestors_of(row_parents, node, words + node * n_words, n_words);
  __syncthreads();
  for (int w = threadIdx.x; w < nodes * n_words; w += blockDim.x)
    ancestors[first * n_words + w] = words[w];
}

}  // namespace

void TreeAncestors::on_cuda(void* stream) const {
  const int nodes = static_cast<int>(parents.shape[parents.ndim - 1]);
  const int64_t batch = parents.ndim == 2 ? parents.shape[0] : 1;
  if (batch == 0) return;
  const DeviceGuard guard("tree_ancestors", parents);
  launch("tree_ancestors", tree_ancestors_kernel, grid_x("tree_ancestors", batch),
         whole_warps(nodes), 0, stream, parents.as<int32_t>(), nodes, ancestors.as<uint64_t>(),
         depth.as<int32_t>());
}

}  // namespace msn
