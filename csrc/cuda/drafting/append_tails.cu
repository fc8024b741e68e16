// The first nodes of a draft, and tails below the nodes where the accepted path ends most likely:
// one block a row of the batch, one thread a row of the draft. A thread takes the probabilities of
// its node's children off the node's, in their order, and counts the nodes that are likelier ends;
// all threads look at one node at a time, in shared memory. Then each walks up its own path, as in
// tree_ancestors.cu. There is no product in the sums, so they are the CPU's. A length outside
// [1, C] counts as the nearest one inside, a malformed parent as -1.
// Bytes per row: reads 20 a node, writes 16 + 8 W a row of the draft and 8 a tail.
#include "cuda/common.cuh"
#include "drafting_ops.h"
#include "tails.h"

namespace msn {

namespace {

struct Drawn {  // what is given
  const int64_t* tokens;
  const int32_t* parents;
  const double* probability;
  const int64_t *history, *lengths;
  int64_t wide, capacity, noise;
};

struct Appended {
  int64_t* tokens;
  int32_t* parents;
  uint64_t* ancestors;
  int32_t* depth;
  int64_t* ends;
  int nodes, tails, length;
};

__global__ void __launch_bounds__(kMaxNodes) append_tails_kernel(Drawn from, Appended to) {
  __shared__ int32_t above[kMaxNodes];
  __shared__ double probability[kMaxNodes], chance[kMaxNodes];
  __shared__ int64_t ends[kMaxNodes];
  __shared__ uint64_t words[kMaxNodes * kMaxWords];
  const int64_t b = blockIdx.x;
  const int row = threadIdx.x, nodes = to.nodes, rows = nodes + to.tails * to.length;
  const int n_words = words_for(rows);
  const bool is_node = row < nodes, is_noise = !is_node && row < rows;

  int64_t token = 0;
  if (is_node) {
    token = from.tokens[b * from.wide + row];
    above[row] = parent_of(from.parents + b * from.wide, row);
    probability[row] = from.probability[b * from.wide + row];
  } else if (is_noise) {
    const int64_t size = clamp(from.lengths[b], 1, from.capacity);
    token = tail_token(from.noise, from.history + b * from.capacity, size, row - nodes);
  }
  if (row < to.tails) ends[row] = -1;
  __syncthreads();
  if (to.tails > 0) {
    double mine = is_node ? probability[row] : 0;
    for (int node = 1; node < nodes; ++node)
      if (above[node] == row) mine -= probability[node];
    chance[row] = mine;
    __syncthreads();
    int before = 0;
    for (int node = 0; node < nodes; ++node)
      before += chance[node] > mine || (chance[node] == mine && node < row);
    if (mine > 0 && before < to.tails) ends[before] = row;
    __syncthreads();
    if (is_noise) above[row] = above_in_tail(ends, nodes, to.length, row);
    __syncthreads();
  }

  if (row < rows) {
    to.tokens[b * rows + row] = token;
    to.parents[b * rows + row] = is_node ? above[row] : -1;
    to.depth[b * rows + row] = ancestors_of(above, row, words + row * n_words, n_words);
  }
  if (row < to.tails) to.ends[b * to.tails + row] = ends[row];
  __syncthreads();
  for (int w = row; w < rows * n_words; w += blockDim.x)
    to.ancestors[b * rows * n_words + w] = words[w];
}

}  // namespace

void AppendTails::on_cuda(void* stream) const {
  const int64_t batch = tokens.shape[0];
  if (batch == 0) return;
  if (history.shape[1] == 0)
    throw std::invalid_argument("history has room for 0 tokens; expected at least 1");
  const DeviceGuard guard("append_tails", tokens);
  const int rows = static_cast<int>(drafted.shape[1]), tails = static_cast<int>(ends.shape[1]);
  const int each = static_cast<int>(length);
  const Drawn from{
      tokens.as<int64_t>(),  parents.as<int32_t>(), probability.as<double>(), history.as<int64_t>(),
      lengths.as<int64_t>(), tokens.shape[1],       history.shape[1],         noise};
  const Appended to{drafted.as<int64_t>(),
                    drafted_parents.as<int32_t>(),
                    ancestors.as<uint64_t>(),
                    depth.as<int32_t>(),
                    ends.as<int64_t>(),
                    rows - tails * each,
                    tails,
                    each};
  launch("append_tails", append_tails_kernel, grid_x("append_tails", batch), whole_warps(rows), 0,
         stream, from, to);
}

}  // namespace msn
