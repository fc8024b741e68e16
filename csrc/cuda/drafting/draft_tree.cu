// The most valuable nodes of the tree of everything that is guessed: one block a row, which makes
// one node after the other. What waits to become a node lies sorted in shared memory, one thread a
// place, and no more of it than there are nodes to come. To make a node is to take the first one
// and to merge what may follow it into the rest: the lanes of a warp look its contexts up, each its
// own table, one thread a listed token finds the token's score, and then each thread counts how
// many come before its own. Sums and products are those of the specification, in its order;
// compiled without fused multiply-add. A length outside [1, C] counts as the nearest one inside.
// Factors out of range give some tree. Bytes per row: reads about 1 KB a node (3 + 8 slots of the
// tables, at most 76 tokens of the text, up to 41 factors; with a corpus up to 8 slots and 60
// tokens of it more), writes 24 N. A node waits for two loads one behind the other (a head, then
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

struct Tables {
  const int64_t *history, *lengths;
  const int32_t *denoised, *contexts, *heads, *corpus, *corpus_heads;
  const double* factors;
  int64_t capacity, depths, slots, head_slots, corpus_length, corpus_slots;
};

struct Tree {
  int64_t* tokens;
  int32_t* parents;
  double* probability;
  int32_t* sources;
};

// look_up by a warp, a lane a table: the contexts of each order, then the n-grams of each level.
__device__ void look_up_together(const Sources& from, const int64_t* context, int count,
                                 Known& known) {
  const int lane = threadIdx.x, level = lane - kOrders;
  const int n = level < 0 ? lane + 1 : level < kSuffixes ? suffix_length(level) : kContext + 1;
  uint64_t hash = 0;
  bool tokens = true;
  for (int i = 0; i < n && n <= count; ++i) {
    hash = extend_hash(hash, context[i]);
    tokens &= context[i] >= 0;
  }
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

__global__ void __launch_bounds__(kMaxNodes, 1)
    draft_tree_kernel(Tables tables, int nodes, int max_depth, double foresight, Tree tree) {
  __shared__ Candidate waiting[kMaxNodes];           // the most valuable first
  __shared__ int64_t contexts[kMaxNodes][kContext];  // of every node, newest first
  __shared__ int64_t token[kListed];
  __shared__ int32_t row_depth[kMaxNodes], listed_by[kListed], source[kListed];
  __shared__ unsigned counted[2];  // bits of the listed tokens that count, at their first places
  __shared__ double factor[kListed], score[kListed], value[kListed];
  __shared__ Known known;
  const int64_t row = blockIdx.x, first = row * nodes,
                length = clamp(tables.lengths[row], 1, tables.capacity);
  const int thread = threadIdx.x;
  const Sources from{tables.denoised + row * tables.depths * kGuesses,
                     tables.depths,
                     tables.contexts,
                     tables.slots,
                     tables.heads + row * kSuffixes * tables.head_slots,
                     tables.head_slots,
                     tables.history + row * tables.capacity,
                     length,
                     tables.corpus,
                     tables.corpus_length,
                     tables.corpus_heads,
                     tables.corpus_slots,
                     tables.factors};
  if (thread == 0) waiting[0] = {1.0, 1.0, from.history[length - 1], -1, 0};  // the root
  if (thread < kContext && thread < length) contexts[0][thread] = from.history[length - 1 - thread];
  __syncthreads();

  int node = 0;
  for (int size = 1; node < nodes && size > 0; ++node) {
    const Candidate best = waiting[0];
    const int depth = node ? row_depth[best.parent] + 1 : 0;
    const bool expands = depth < max_depth;
    if (thread == 0) {
      tree.tokens[first + node] = best.token;
      tree.parents[first + node] = best.parent;
      tree.probability[first + node] = best.probability;
      tree.sources[first + node] = best.source;
      row_depth[node] = depth;
    }
    if (node > 0 && thread < kContext)
      contexts[node][thread] = thread ? contexts[best.parent][thread - 1] : best.token;
    if (thread < kWarp && expands) {
      __syncwarp();
      const int64_t count = length + depth < kContext ? length + depth : kContext;
      look_up_together(from, contexts[node], static_cast<int>(count), known);
    }
    __syncthreads();

    if (thread < kListed) {
      const Listed listed = expands ? listed_at(from, known, depth, thread) : Listed{-1, 0, 0};
      token[thread] = listed.token;
      factor[thread] = from.factors[listed.factor];
      listed_by[thread] = listed.source;
    }
    __syncthreads();

    // A token counts at the first place that lists it; source 0: none there.
    if (thread < 2 * kWarp) {
      int32_t sources = 0;
      if (thread < kListed && token[thread] >= 0) {
        double product = bias_of(from, known);
        bool counts = true;
        for (int at = 0; at < kListed; ++at) {
          if (token[at] != token[thread]) continue;
          counts &= at >= thread;
          product *= factor[at];
          sources |= listed_by[at];
        }
        if (!counts) sources = 0;
        score[thread] = product;
      }
      const unsigned here = __ballot_sync(kWholeWarp, sources != 0);
      if (thread % kWarp == 0) counted[thread / kWarp] = here;
      if (thread < kListed) source[thread] = sources;
    }
    __syncthreads();

    // From here on a loop over the listed tokens is one over those that count, in their order.
    const uint64_t all = counted[0] | uint64_t{counted[1]} << kWarp;
    double total = 1.0;
    int likeliest = all ? lowest_bit(all) : 0;
    for (uint64_t rest = all; rest; rest &= rest - 1) {
      const int at = lowest_bit(rest);
      if (score[at] > score[likeliest]) likeliest = at;
      total += score[at];
    }
    const double ahead = best.probability * foresight;
    const bool noise = expands && all == 0 && ahead > 0;
    const uint64_t found = noise ? 1 : all;

    Candidate mine{-1.0, 0.0, -1, node, 0};
    if (thread < kListed && found >> thread & 1) {
      mine.source = noise ? kNoise : source[thread];
      mine.token = noise ? noise_token(from, depth + 1, node) : token[thread];
      const double share = noise ? 0.0 : score[thread] / total;
      // Against NaN, of factors out of range, which has no place in an order.
      mine.probability = fmax(best.probability * (kCeiling < share ? kCeiling : share), 0.0);
      mine.value = mine.probability;
      if (thread == likeliest) mine.value += ahead;
      value[thread] = mine.value;
    }
    __syncthreads();

    // Of equals come first those that wait already, whose parents are earlier nodes; then as
    // listed.
    Candidate other{};
    int my_place = kMaxNodes, other_place = kMaxNodes;
    if (thread + 1 < size) {
      other = waiting[thread + 1];
      other_place = thread;
      for (uint64_t rest = found; rest; rest &= rest - 1)
        other_place += value[lowest_bit(rest)] > other.value;
    }
    if (mine.source) {
      int low = 1, high = size;
      while (low < high) {
        const int middle = (low + high) / 2;
        if (waiting[middle].value >= mine.value)
          low = middle + 1;
        else
          high = middle;
      }
      my_place = low - 1;
      for (uint64_t rest = found; rest; rest &= rest - 1) {
        const int at = lowest_bit(rest);
        my_place += value[at] > mine.value || (value[at] == mine.value && at < thread);
      }
    }
    __syncthreads();

    const int left = nodes - 1 - node;
    if (my_place < left) waiting[my_place] = mine;
    if (other_place < left) waiting[other_place] = other;
    const int grown = size - 1 + popcount(found);
    size = grown < left ? grown : left;
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
  const Tables tables{history.as<int64_t>(),
                      lengths.as<int64_t>(),
                      denoised.as<int32_t>(),
                      contexts.as<int32_t>(),
                      heads.as<int32_t>(),
                      corpus.as<int32_t>(),
                      corpus_heads.as<int32_t>(),
                      factors.as<double>(),
                      capacity,
                      denoised.shape[1],
                      contexts.shape[1],
                      heads.shape[2],
                      corpus.shape[0],
                      corpus_heads.shape[1]};
  const Tree tree{tokens.as<int64_t>(), parents.as<int32_t>(), probability.as<double>(),
                  sources.as<int32_t>()};
  launch("draft_tree", draft_tree_kernel, grid_x("draft_tree", batch),
         whole_warps(nodes > kListed ? nodes : kListed), 0, stream, tables, nodes,
         static_cast<int>(max_depth), foresight, tree);
}

}  // namespace msn
