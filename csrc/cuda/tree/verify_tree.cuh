// The accepted path of a row, found by one block, one thread a node. Every thread walks up from its
// node over shared memory and says how deep it is accepted; the block's maximum is the end of the
// path. A second maximum finds the deepest node below that end, the continuation. Two threads of
// different warps then spell the two paths out, and the block writes them, -1 after them. At most
// 255 steps a walk.
#pragma once
#include "cuda/common.cuh"
#include "tree.h"

namespace msn {

struct VerifyShared {
  int64_t tokens[kMaxNodes], targets[kMaxNodes], path[kMaxNodes], continuation[kMaxNodes];
  int32_t parents[kMaxNodes];
  int64_t scratch[kWarp];
};

// The places of one row's results.
struct VerifiedRow {
  int64_t *accept_length, *path, *bonus, *continuation;
};

// `target(node)` reads a target. All threads call it, kMaxNodes of them or more.
template <typename Target>
__device__ void verify_row(const int64_t* tokens, const Target& target, const int32_t* parents,
                           int nodes, const VerifiedRow& to, VerifyShared& shared) {
  const int node = threadIdx.x;
  if (node < nodes) {
    shared.tokens[node] = tokens[node];
    shared.targets[node] = target(node);
    shared.parents[node] = parents[node];
    shared.path[node] = shared.continuation[node] = -1;
  }
  __syncthreads();

  const int accepted =
      node < nodes ? accepted_depth(shared.parents, shared.tokens, shared.targets, node) : -1;
  const int64_t best =
      block_max(node < nodes ? path_key(accepted, node) : INT64_MIN, shared.scratch);
  const int end = key_node(best), length = key_depth(best) + 1;

  // A node above or beside `end` stands for `end` itself: nothing lies below.
  const bool below = node > end && node < nodes;
  const int64_t deepest =
      block_max(below ? path_key(depth_below(shared.parents, node, end), node) : path_key(0, end),
                shared.scratch);

  if (node == 0) write_path(shared.parents, end, length, shared.path);
  if (node == kWarp)
    write_path(shared.parents, key_node(deepest), key_depth(deepest), shared.continuation);
  __syncthreads();
  if (node < nodes) {
    to.path[node] = shared.path[node];
    to.continuation[node] = shared.continuation[node];
  }
  if (node == 0) {
    *to.accept_length = length;
    *to.bonus = shared.targets[end];
  }
}

}  // namespace msn
