// Where the nodes of a tree stand: one block a row, one thread a node. A length outside [1, C]
// counts as the nearest one inside. Bytes per row: reads 4 N + 32, writes 8 N + 16.
#include "cuda/common.cuh"
#include "tree.h"
#include "tree_ops.h"

namespace msn {

namespace {

__global__ void __launch_bounds__(kMaxNodes)
    place_tree_kernel(int64_t* tokens, int64_t token_stride, const int64_t* history,
                      int64_t capacity, const int64_t* lengths, const int64_t* offsets,
                      const int64_t* last_position, const int32_t* depth, int64_t depth_stride,
                      int nodes, int64_t vocabulary, int64_t* positions, int64_t* prefix) {
  const int64_t row = blockIdx.x, length = clamp(lengths[row], 1, capacity);
  const int node = threadIdx.x;
  if (node >= nodes) return;
  if (node == 0) {
    const int64_t root = history[row * capacity + length - 1];
    tokens[row * token_stride] = root < vocabulary ? root : vocabulary - 1;
    prefix[row] = length - 1 + offsets[row];
  }
  const int32_t below = depth[row * depth_stride + node];
  const int64_t position = length - 1 + (below < 0 ? 0 : below), last = last_position[row];
  positions[row * nodes + node] = position < last ? position : last;
}

}  // namespace

void PlaceTree::on_cuda(void* stream) const {
  const int64_t batch = tokens.shape[0], capacity = history.shape[1];
  const int nodes = static_cast<int>(tokens.shape[1]);
  if (batch == 0) return;
  if (capacity == 0)
    throw std::invalid_argument("history has room for 0 tokens; expected at least 1");
  const DeviceGuard guard("place_tree", history);
  launch("place_tree", place_tree_kernel, grid_x("place_tree", batch), whole_warps(nodes), 0,
         stream, tokens.as<int64_t>(), tokens.strides[0], history.as<int64_t>(), capacity,
         lengths.as<int64_t>(), offsets.as<int64_t>(), last_position.as<int64_t>(),
         depth.as<int32_t>(), depth.ndim == 2 ? nodes : 0, nodes, vocabulary,
         positions.as<int64_t>(), prefix.as<int64_t>());
}

}  // namespace msn
