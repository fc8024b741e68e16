// From logits to the accepted path in one launch: the blocks of a row of logits find the eight
// likeliest tokens of its parts (top_guesses.cuh). Of a row's blocks the last to arrive merges
// them, the first is the node's target; of all blocks of a tree the last to arrive verifies it
// (verify_tree.cuh), from what the parts left, so that it waits for no merge. Each leaves its
// counter at 0 for the next launch. Bytes per node: reads the V logits once, writes 40 and 16 for
// the path, and 64 a part to the workspace, which come back; per row reads 20 N more.
#include "cuda/drafting/top_guesses.cuh"
#include "cuda/tree/verify_tree.cuh"
#include "tree_ops.h"

namespace msn {

namespace {

struct Trees {
  const int64_t* tokens;
  const int32_t* parents;
  int64_t parents_stride;
  int nodes;
  int64_t* targets;
  VerifiedRow to;  // of tree 0
  int* arrived;    // [trees]

  __device__ VerifiedRow verified(int64_t tree) const {
    return {to.accept_length + tree, to.path + tree * nodes, to.bonus + tree,
            to.continuation + tree * nodes};
  }
};

// The first tokens of all nodes of a tree, out of their parts; a few lanes a node.
template <typename T>
__device__ void gather_targets(const TopRows<T>& rows, int64_t first, int nodes, int64_t* targets) {
  int lanes = 1;
  while (lanes < rows.parts && lanes < kWarp) lanes *= 2;
  const int lane = threadIdx.x % lanes;
  for (int from = 0; from < nodes; from += kTopThreads / lanes) {
    const int node = from + static_cast<int>(threadIdx.x) / lanes;
    int64_t key = kNoKey;
    if (node < nodes)
      for (int part = lane; part < rows.parts; part += lanes)
        key = larger(key, rows.key(first + node, part * kGuesses));
    for (int distance = lanes / 2; distance > 0; distance /= 2)
      key = larger(key, __shfl_xor_sync(kWholeWarp, key, distance));
    if (node < nodes && lane == 0) targets[node] = key_place(key);
  }
  __syncthreads();
}

template <typename T>
__global__ void __launch_bounds__(kTopThreads, kTopBlocks)
    verify_logits_kernel(const __grid_constant__ TopRows<T> rows,
                         const __grid_constant__ Trees trees) {
  __shared__ TopShared shared;
  __shared__ VerifyShared verify;
  static_assert(kTopThreads >= kMaxNodes);
  const int64_t row = blockIdx.x / rows.parts,
                tree = blockIdx.x / static_cast<unsigned>(rows.parts * trees.nodes);
  const int part = static_cast<int>(blockIdx.x % rows.parts);
  top_of_part(rows.part(row, part), shared);

  if (threadIdx.x < kGuesses)
    rows.keys_of(row)[part * kGuesses + threadIdx.x] = shared.winners[threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    const int of_row = atomicAdd(rows.arrived + row, 1),
              of_tree = atomicAdd(trees.arrived + tree, 1);
    __threadfence();
    shared.last_of_row = of_row == rows.parts - 1;
    shared.last_of_tree = of_tree == trees.nodes * rows.parts - 1;
    if (shared.last_of_row) rows.arrived[row] = 0;
    if (shared.last_of_tree) trees.arrived[tree] = 0;
  }
  __syncthreads();
  // The last of a tree need not be the last of its row: another one may have come between the two
  // counts.
  const auto gather = [&] { gather_targets(rows, tree * trees.nodes, trees.nodes, verify.path); };
  if (shared.last_of_row) {
    const LeftKeys left(rows, row);  // on their way while the targets are gathered
    if (shared.last_of_tree) gather();
    merge_parts(left, shared);
    if (threadIdx.x < kWarp) write_guesses<T>(rows.guesses + row * kGuesses, shared);
    if (threadIdx.x == 0) trees.targets[row] = key_place(shared.winners[0]);
  } else if (shared.last_of_tree) {
    gather();
  }
  if (!shared.last_of_tree) return;
  const int64_t first = tree * trees.nodes;
  verify_row(
      trees.tokens + first, [&](int node) { return verify.path[node]; },
      trees.parents + tree * trees.parents_stride, trees.nodes, trees.verified(tree), verify);
}

}  // namespace

void VerifyLogits::on_cuda(void* stream) const {
  const int64_t batch = tokens.shape[0], nodes = tokens.shape[1];
  if (batch == 0) return;
  const DeviceGuard guard("verify_logits", tokens);
  const VerifiedRow to{accept_length.as<int64_t>(), path.as<int64_t>(), bonus.as<int64_t>(),
                       continuation.as<int64_t>()};
  const Trees trees{tokens.as<int64_t>(),          parents.as<int32_t>(),
                    parents.ndim == 2 ? nodes : 0, static_cast<int>(nodes),
                    targets.as<int64_t>(),         to,
                    space.arrived + batch * nodes};
  with_logits(logits, [&](auto element) {
    using T = decltype(element);
    const TopRows<T> rows = plan_rows<T>("verify_logits", logits, guesses, space, batch);
    launch("verify_logits", verify_logits_kernel<T>,
           grid_x("verify_logits", batch * nodes * rows.parts), kTopThreads, 0, stream, rows,
           trees);
  });
}

}  // namespace msn
