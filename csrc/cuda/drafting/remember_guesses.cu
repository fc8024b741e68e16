// The model's guesses after every node of a draft, noted under the node's last tokens: one
// block for each order of context, one thread a node. Orders share no slot, so their blocks share
// nothing. A block takes the rows of the batch one after the other, for later rows overwrite
// earlier ones. In a row every slot has one writer: of the nodes that share it the one of the
// highest priority, which is the place on the accepted path, or the index off it. A malformed
// parent counts as padding, a path entry that is no node is skipped, and a length outside [1, C]
// counts as the nearest one inside. Bytes per row and order: reads 20 N, up to 3 tokens of the text
// and 32 a node, writes up to 36 a node.
#include "best_first.h"
#include "cuda/common.cuh"
#include "drafting_ops.h"

namespace msn {

namespace {

struct Draft {
  const int64_t *history, *lengths, *tokens, *path;
  const int32_t *parents, *guesses;
  int64_t batch, capacity, parents_stride;
  int nodes;
};

__global__ void __launch_bounds__(kMaxNodes)
    remember_guesses_kernel(Draft draft, int32_t* adjacency, int64_t slots) {
  __shared__ int64_t row_tokens[kMaxNodes], slot[kMaxNodes], context[kMaxNodes][kOrders];
  __shared__ int32_t row_parents[kMaxNodes], priority[kMaxNodes];
  const int node = threadIdx.x, order = blockIdx.x, nodes = draft.nodes;
  int32_t* table = adjacency + order * slots * (1 + kGuesses);
  for (int64_t row = 0; row < draft.batch; ++row) {
    const int64_t first = row * nodes;
    if (node < nodes) {
      row_tokens[node] = draft.tokens[first + node];
      row_parents[node] = draft.parents[row * draft.parents_stride + node];
      priority[node] = node;
    }
    __syncthreads();

    uint64_t hash = 0;
    slot[node] = -1;
    if (node < nodes) {
      const int64_t accepted = draft.path[first + node];
      if (accepted >= 0 && accepted < nodes) atomicMax(priority + accepted, nodes + node);
      const bool live = node == 0 || depth_below(row_parents, node, 0) > 0;
      const int64_t length = clamp(draft.lengths[row], 1, draft.capacity);
      const int count =
          context_of(row_tokens, row_parents, node, draft.history + row * draft.capacity, length,
                     order + 1, context[node]);
      if (live && count > order) {
        hash = hash_of(context[node], order + 1);
        slot[node] = slot_of(hash, slots);
      }
    }
    __syncthreads();

    bool writes = slot[node] >= 0;
    for (int other = 0; writes && other < nodes; ++other)
      writes = slot[other] != slot[node] || priority[other] <= priority[node];
    if (writes) {
      int32_t* entry = table + slot[node] * (1 + kGuesses);
      entry[0] = hash_check(hash);
      for (int i = 0; i < kGuesses; ++i)
        entry[1 + i] = draft.guesses[(first + node) * kGuesses + i];
    }
    __syncthreads();
  }
}

}  // namespace

void RememberGuesses::on_cuda(void* stream) const {
  const int64_t batch = tokens.shape[0], capacity = history.shape[1], slots = adjacency.shape[1];
  const int nodes = static_cast<int>(tokens.shape[1]);
  if (batch == 0 || slots == 0) return;
  if (capacity == 0)
    throw std::invalid_argument("history has room for 0 tokens; expected at least 1");
  const DeviceGuard guard("remember_guesses", tokens);
  Draft draft{};
  draft.history = history.as<int64_t>();
  draft.lengths = lengths.as<int64_t>();
  draft.tokens = tokens.as<int64_t>();
  draft.path = path.as<int64_t>();
  draft.parents = parents.as<int32_t>();
  draft.guesses = guesses.as<int32_t>();
  draft.batch = batch;
  draft.capacity = capacity;
  draft.parents_stride = parents.ndim == 2 ? nodes : 0;
  draft.nodes = nodes;
  launch("remember_guesses", remember_guesses_kernel, kOrders, whole_warps(nodes), 0, stream, draft,
         adjacency.as<int32_t>(), slots);
}

}  // namespace msn
