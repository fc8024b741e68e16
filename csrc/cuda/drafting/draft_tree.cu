// The most valuable nodes of the tree of everything that is guessed: one block a row, which makes
// one node after the other. What waits to become a node lies sorted in shared memory, one thread a
// place, and no more of it than there are nodes to come. To make a node is to take the first one
// and to merge what may follow it into the rest: the lanes of a warp look its contexts up, each its
// own table, one thread a listed token finds the token's score, and then each thread counts how
// many come before its own. Sums and products are those of the specification, in its order;
// compiled without fused multiply-add. A length outside [1, C] counts as the nearest one inside.
// Factors out of range give some tree. Bytes per row: reads about 1 KB a node (3 + 8 slots of the
// tables, at most 76 tokens of the text, up to 41 factors; with a corpus up to 8 slots and 60
// tokens of it more), writes 24 N. A node waits for two loads, one after the other (a place, then
// the text there), four with a corpus.
#include "best_first.h"
#include "cuda/common.cuh"
#include "drafting_ops.h"

namespace msn {

namespace {

struct Candidate {
  double value;        // what the best come first by
  double probability;  // of the whole path
  int64_t token;
  int32_t parent, source;
};

struct Tree {
  int64_t* tokens;
  int32_t* parents;
  double* probability;
  int32_t* sources;
};

struct Shared {
  Candidate waiting[kMaxNodes];           // the most valuable first
  int64_t contexts[kMaxNodes][kContext];  // of every node, newest first
  int64_t token[kListed];
  int32_t depth[kMaxNodes], listed_by[kListed], source[kListed];
  unsigned counted[2];  // bits of the listed tokens that count, at their first places
  double factor[kListed], score[kListed], value[kListed];
  Known known;
};

// look_up by a warp, a lane a table: the contexts of each order, then the n-grams of each level.
__device__ void look_up_together(const Sources& from, const int64_t* context, int count,
                                 Known& known) {
  const int lane = threadIdx.x, level = lane - kOrders;
  const int n = level < 0 ? lane + 1 : level < kSuffixes ? suffix_length(level) : kContext + 1;
  const uint64_t hash = n <= count ? hash_of(context, n) : 0;
  bool tokens = true;
  for (int i = 0; i < n && n <= count; ++i) tokens &= context[i] >= 0;
  const int32_t* guesses = nullptr;
  int64_t next = -1;
  if (n <= count) {
    if (level < 0)
      guesses = remembered(from, hash, n);
    else
      next = following(from, context, hash, tokens, level);
  }
  const unsigned orders = __ballot_sync(kWholeWarp, guesses != nullptr);
  const unsigned levels = __ballot_sync(kWholeWarp, next >= 0) >> kOrders;
  // A longer n-gram has the same token.
  bool repeated = false;
  for (int longer = 1; longer < kSuffixes; ++longer) {
    const int64_t other = __shfl_sync(kWholeWarp, next, lane + longer);
    repeated |= level + longer < kSuffixes && other == next;
  }
  if (repeated) next = -1;
  const unsigned different = __ballot_sync(kWholeWarp, next >= 0) >> kOrders;
  if (level < 0) {
    known.guesses[lane] = guesses;
  } else if (level < kSuffixes) {
    known.next[level] = next;
    known.rank[level] = popcount(different >> (level + 1));
  }
  if (lane == 0) {
    known.highest = kWarp - __clz(orders);
    known.longest = kWarp - __clz(levels);
  }
}

// Makes `best` a node: writes it out, and its depth and context for the nodes after it.
__device__ __forceinline__ void make_node(const Candidate& best, int64_t first, int node, int depth,
                                          const Tree& tree, Shared& shared) {
  const int thread = threadIdx.x;
  if (thread == 0) {
    tree.tokens[first + node] = best.token;
    tree.parents[first + node] = best.parent;
    tree.probability[first + node] = best.probability;
    tree.sources[first + node] = best.source;
    shared.depth[node] = depth;
  }
  if (node > 0 && thread < kContext)
    shared.contexts[node][thread] = thread ? shared.contexts[best.parent][thread - 1] : best.token;
}

// The listed tokens after a node, with the factor and the source of each; none where it does not
// expand.
__device__ __forceinline__ void list_tokens(const Sources& from, int depth, bool expands,
                                            Shared& shared) {
  const int thread = threadIdx.x;
  if (thread >= kListed) return;
  const Listed listed = expands ? listed_at(from, shared.known, depth, thread) : Listed{-1, 0, 0};
  shared.token[thread] = listed.token;
  shared.factor[thread] = from.factors[listed.factor];
  shared.listed_by[thread] = listed.source;
}

// The score of each listed token, the product of its factors. A token counts at the first place
// that lists it; source 0: none there.
__device__ __forceinline__ void score_tokens(const Sources& from, Shared& shared) {
  const int thread = threadIdx.x;
  if (thread >= 2 * kWarp) return;
  int32_t sources = 0;
  if (thread < kListed && shared.token[thread] >= 0) {
    double product = bias_of(from, shared.known);
    bool counts = true;
    for (int at = 0; at < kListed; ++at) {
      if (shared.token[at] != shared.token[thread]) continue;
      counts &= at >= thread;
      product *= shared.factor[at];
      sources |= shared.listed_by[at];
    }
    if (!counts) sources = 0;
    shared.score[thread] = product;
  }
  const unsigned here = __ballot_sync(kWholeWarp, sources != 0);
  if (thread % kWarp == 0) shared.counted[thread / kWarp] = here;
  if (thread < kListed) shared.source[thread] = sources;
}

// This thread's candidate after `node`, whose path has probability `above`; source 0: none.
// `found`: the listed tokens that become candidates, as bits; the first one where there is noise
// alone.
__device__ __forceinline__ Candidate weigh_candidate(const Sources& from, int node, int depth,
                                                     bool expands, double above, double foresight,
                                                     uint64_t& found, Shared& shared) {
  const int thread = threadIdx.x;
  const uint64_t all = shared.counted[0] | uint64_t{shared.counted[1]} << kWarp;
  double total = 1.0;
  int likeliest = all ? lowest_bit(all) : 0;
  for (uint64_t rest = all; rest; rest &= rest - 1) {
    const int at = lowest_bit(rest);
    if (shared.score[at] > shared.score[likeliest]) likeliest = at;
    total += shared.score[at];
  }
  const double ahead = above * foresight;
  const bool noise = expands && all == 0 && ahead > 0;
  found = noise ? 1 : all;

  Candidate mine{-1.0, 0.0, -1, node, 0};
  if (thread < kListed && found >> thread & 1) {
    mine.source = noise ? kNoise : shared.source[thread];
    mine.token = noise ? noise_token(from, depth + 1, node) : shared.token[thread];
    const double share = noise ? 0.0 : shared.score[thread] / total;
    // Against NaN, of factors out of range, which has no place in an order.
    mine.probability = fmax(above * (kCeiling < share ? kCeiling : share), 0.0);
    mine.value = mine.probability;
    if (thread == likeliest) mine.value += ahead;
    shared.value[thread] = mine.value;
  }
  return mine;
}

// Merges the candidates that were found into the `size` that wait, without the first of these,
// which is `node` now; keeps as many as there are nodes to come, and returns how many. Of equals
// those that wait already come first, whose parents are earlier nodes; then as listed.
__device__ __forceinline__ int merge_candidates(const Candidate& mine, uint64_t found, int size,
                                                int node, int nodes, Shared& shared) {
  const int thread = threadIdx.x;
  Candidate other{};
  int my_place = kMaxNodes, other_place = kMaxNodes;
  if (thread + 1 < size) {
    other = shared.waiting[thread + 1];
    other_place = thread;
    for (uint64_t rest = found; rest; rest &= rest - 1)
      other_place += shared.value[lowest_bit(rest)] > other.value;
  }
  if (mine.source) {
    int low = 1, high = size;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (shared.waiting[middle].value >= mine.value)
        low = middle + 1;
      else
        high = middle;
    }
    my_place = low - 1;
    for (uint64_t rest = found; rest; rest &= rest - 1) {
      const int at = lowest_bit(rest);
      my_place += shared.value[at] > mine.value || (shared.value[at] == mine.value && at < thread);
    }
  }
  __syncthreads();
  const int left = nodes - 1 - node;
  if (my_place < left) shared.waiting[my_place] = mine;
  if (other_place < left) shared.waiting[other_place] = other;
  const int grown = size - 1 + popcount(found);
  return grown < left ? grown : left;
}

__global__ void __launch_bounds__(kMaxNodes, 1)
    draft_tree_kernel(Sources first_row, const int64_t* lengths, int64_t capacity, int nodes,
                      int max_depth, double foresight, Tree tree) {
  __shared__ Shared shared;
  const int64_t row = blockIdx.x, first = row * nodes, length = clamp(lengths[row], 1, capacity);
  const int thread = threadIdx.x;
  const Sources from = sources_of_row(first_row, row, capacity, length);
  if (thread == 0) shared.waiting[0] = {1.0, 1.0, from.history[length - 1], -1, 0};  // the root
  if (thread < kContext && thread < length)
    shared.contexts[0][thread] = from.history[length - 1 - thread];
  __syncthreads();

  int node = 0;
  for (int size = 1; node < nodes && size > 0; ++node) {
    const Candidate best = shared.waiting[0];
    const int depth = node ? shared.depth[best.parent] + 1 : 0;
    const bool expands = depth < max_depth;
    make_node(best, first, node, depth, tree, shared);
    if (thread < kWarp && expands) {
      __syncwarp();
      const int64_t count = length + depth < kContext ? length + depth : kContext;
      look_up_together(from, shared.contexts[node], static_cast<int>(count), shared.known);
    }
    __syncthreads();
    list_tokens(from, depth, expands, shared);
    __syncthreads();
    score_tokens(from, shared);
    __syncthreads();
    uint64_t found;
    const Candidate mine =
        weigh_candidate(from, node, depth, expands, best.probability, foresight, found, shared);
    __syncthreads();
    size = merge_candidates(mine, found, size, node, nodes, shared);
    __syncthreads();
  }

  for (node += thread; node < nodes; node += blockDim.x) {  // nothing left to guess
    tree.tokens[first + node] = from.history[length - 1];
    tree.parents[first + node] = -1;
    tree.probability[first + node] = 0.0;
    tree.sources[first + node] = 0;
  }
}

}  // namespace

void DraftTree::on_cuda(void* stream) const {
  const int64_t batch = history.shape[0], capacity = history.shape[1];
  const int nodes = static_cast<int>(tokens.shape[1]);
  if (batch == 0) return;
  if (capacity == 0)
    throw std::invalid_argument("history has room for 0 tokens; expected at least 1");
  const DeviceGuard guard("draft_tree", history);
  const Sources row_0 = first_row();
  const Tree tree{tokens.as<int64_t>(), parents.as<int32_t>(), probability.as<double>(),
                  sources.as<int32_t>()};
  launch("draft_tree", draft_tree_kernel, grid_x("draft_tree", batch),
         whole_warps(nodes > kListed ? nodes : kListed), 0, stream, row_0, lengths.as<int64_t>(),
         capacity, nodes, static_cast<int>(max_depth), foresight, tree);
}

}  // namespace msn
