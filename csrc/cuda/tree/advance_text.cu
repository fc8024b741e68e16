// The gained tokens of each row put after its text: one block a row, one thread a node. The first
// end of text is found by a maximum over the block. Rows and paths that lie outside are taken as
// their borders. Bytes per row: reads 16 N + 24 and the ends of text, writes 8 N, 8 per gained
// token and 40.
#include "cuda/common.cuh"
#include "tree.h"
#include "tree_ops.h"

namespace msn {

namespace {

struct Text {
  int64_t *history, *lengths, *remaining;
  int64_t capacity;
};

__global__ void __launch_bounds__(kMaxNodes)
    advance_text_kernel(Text text, const int64_t* targets, const int64_t* path,
                        const int64_t* accept_length, int nodes, const int64_t* ends, int end_count,
                        int64_t vocabulary, int64_t* gained, int64_t* status) {
  __shared__ int64_t scratch[kWarp];
  const int64_t row = blockIdx.x, first = row * nodes, batch = gridDim.x;
  const int at = threadIdx.x;
  const int64_t length = clamp(text.lengths[row], 0, text.capacity), left = text.remaining[row];
  const int64_t room = clamp(text.capacity - length, 0, nodes);
  int64_t count = clamp(accept_length[row], 0, left < 0 ? 0 : left < room ? left : room);

  int64_t token = 0;
  bool ends_here = false;
  if (at < nodes) {
    token = targets[first + clamp(path[first + at], 0, nodes - 1)];
    gained[first + at] = token;
    for (int i = 0; i < end_count; ++i) ends_here |= token == ends[i];
  }
  const int64_t end = -block_max(at < count && ends_here ? -at : -kMaxNodes, scratch);
  const bool ended = end < count;
  if (ended) count = end + 1;
  if (at < count) text.history[row * text.capacity + length + at] = token;
  const bool invalid = __syncthreads_or(at < count && (token < 0 || token >= vocabulary));
  if (at == 0) {
    const int64_t rest = ended ? 0 : left - count;
    text.lengths[row] = length + count;
    text.remaining[row] = rest;
    status[row] = count;
    status[batch + row] = rest;
    status[2 * batch + row] = invalid;
  }
}

}  // namespace

void AdvanceText::on_cuda(void* stream) const {
  const int64_t batch = targets.shape[0];
  const int nodes = static_cast<int>(targets.shape[1]);
  if (batch == 0) return;
  const DeviceGuard guard("advance_text", history);
  const Text text{history.as<int64_t>(), lengths.as<int64_t>(), remaining.as<int64_t>(),
                  history.shape[1]};
  launch("advance_text", advance_text_kernel, grid_x("advance_text", batch), whole_warps(nodes), 0,
         stream, text, targets.as<int64_t>(), path.as<int64_t>(), accept_length.as<int64_t>(),
         nodes, ends.as<int64_t>(), static_cast<int>(ends.shape[0]), vocabulary,
         gained.as<int64_t>(), status.as<int64_t>());
}

}  // namespace msn
