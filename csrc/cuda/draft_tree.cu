// The most valuable nodes of the tree of everything that is guessed: one block a row, which makes one
// node after the other. What waits to become a node lies sorted in shared memory, one thread a place,
// and no more of it than there are nodes to come. To make a node is to take the first one and to merge
// what may follow it into the rest: one thread looks its context up, one thread a listed token finds
// the token's score, and then each thread counts how many come before its own.
// Sums and products are those of the specification, in its order; compiled without fused multiply-add.
// A length outside [1, C] counts as the nearest one inside. Factors out of range give some tree.
// Bytes per row: reads about 1 KB a node (3 + 8 slots of the tables, at most 76 tokens of the text, up
// to 41 factors; with a corpus up to 8 slots and 60 tokens of it more), writes 24 N. The nodes' look-ups,
// one after the other, are most of the time.
#include "../best_first.h"
#include "common.cuh"

namespace msn::cuda {

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

__global__ void __launch_bounds__(kMaxNodes, 1)
    draft_tree_kernel(Tables tables, int nodes, int max_depth, double foresight, Tree tree) {
  __shared__ Candidate waiting[kMaxNodes];  // the most valuable first
  __shared__ int64_t row_tokens[kMaxNodes], context[kContext], token[kListed];
  __shared__ int32_t row_parents[kMaxNodes], row_depth[kMaxNodes], listed_by[kListed], source[kListed];
  __shared__ double factor[kListed], score[kListed], value[kListed];
  __shared__ Known known;
  const int64_t row = blockIdx.x, first = row * nodes, length = clamp(tables.lengths[row], 1, tables.capacity);
  const int thread = threadIdx.x;
  const Sources from{tables.denoised + row * tables.depths * kGuesses, tables.depths,
                     tables.contexts, tables.slots,
                     tables.heads + row * kSuffixes * tables.head_slots, tables.head_slots,
                     tables.history + row * tables.capacity, length,
                     tables.corpus, tables.corpus_length,
                     tables.corpus_heads, tables.corpus_slots, tables.factors};
  if (thread == 0) waiting[0] = {1.0, 1.0, from.history[length - 1], -1, 0};  // the root
  __syncthreads();

  int node = 0;
  for (int size = 1; node < nodes && size > 0; ++node) {
    const Candidate best = waiting[0];
    const int depth = node ? row_depth[best.parent] + 1 : 0;
    const bool expands = depth < max_depth;
    if (thread == 0) {
      tree.tokens[first + node] = row_tokens[node] = best.token;
      tree.parents[first + node] = row_parents[node] = best.parent;
      tree.probability[first + node] = best.probability;
      tree.sources[first + node] = best.source;
      row_depth[node] = depth;
      if (expands) {
        const int count = context_of(row_tokens, row_parents, node, from.history, length, kContext, context);
        look_up(from, context, count, known);
      }
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
    if (thread < kListed) {
      bool counts = token[thread] >= 0;
      for (int at = 0; counts && at < thread; ++at) counts = token[at] != token[thread];
      double product = counts ? bias_of(from, known) : 0.0;
      int32_t sources = 0;
      for (int at = thread; counts && at < kListed; ++at) {
        if (token[at] != token[thread]) continue;
        product *= factor[at];
        sources |= listed_by[at];
      }
      score[thread] = product;
      source[thread] = sources;
    }
    __syncthreads();

    double total = 1.0;
    int found = 0, likeliest = 0;
    for (int at = 0; at < kListed; ++at) {
      if (!source[at]) continue;
      if (found++ == 0 || score[at] > score[likeliest]) likeliest = at;
      total += score[at];
    }
    const double ahead = best.probability * foresight;
    const bool noise = expands && found == 0 && ahead > 0;
    found += noise;

    Candidate mine{-1.0, 0.0, -1, node, 0};
    if (thread < kListed) {
      mine.source = source[thread];
      mine.token = token[thread];
      if (noise && thread == 0) {
        mine.source = kNoise;
        mine.token = noise_token(from, depth + 1, node);
      }
      if (mine.source) {
        const double share = score[thread] / total;
        // Against NaN, of factors out of range, which has no place in an order.
        mine.probability = fmax(best.probability * (kCeiling < share ? kCeiling : share), 0.0);
        mine.value = mine.probability;
        if (thread == likeliest) mine.value += ahead;
      }
      value[thread] = mine.value;
    }
    __syncthreads();

    // Of equals come first those that wait already, whose parents are earlier nodes; then as listed.
    Candidate other{};
    int my_place = kMaxNodes, other_place = kMaxNodes;
    if (thread + 1 < size) {
      other = waiting[thread + 1];
      other_place = thread;
      for (int at = 0; at < kListed; ++at) other_place += value[at] > other.value;
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
      for (int at = 0; at < kListed; ++at)
        my_place += value[at] > mine.value || (value[at] == mine.value && at < thread);
    }
    __syncthreads();

    const int left = nodes - 1 - node;
    if (my_place < left) waiting[my_place] = mine;
    if (other_place < left) waiting[other_place] = other;
    size = size - 1 + found < left ? size - 1 + found : left;
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

void draft_tree(const Tensor& history, const Tensor& lengths, const Tensor& denoised, const Tensor& contexts,
                const Tensor& heads, const Tensor& corpus, const Tensor& corpus_heads, const Tensor& factors,
                int64_t max_depth, double foresight, const Tensor& tokens, const Tensor& parents,
                const Tensor& probability, const Tensor& sources, void* stream) {
  const int64_t batch = history.shape[0], capacity = history.shape[1];
  const int nodes = static_cast<int>(tokens.shape[1]);
  if (batch == 0) return;
  if (capacity == 0) throw std::invalid_argument("history has room for 0 tokens; expected at least 1");
  const DeviceGuard guard("draft_tree", history);
  const Tables tables{history.as<int64_t>(),  lengths.as<int64_t>(), denoised.as<int32_t>(),
                      contexts.as<int32_t>(), heads.as<int32_t>(),   corpus.as<int32_t>(),
                      corpus_heads.as<int32_t>(), factors.as<double>(), capacity,
                      denoised.shape[1],      contexts.shape[1],     heads.shape[2],
                      corpus.shape[0],        corpus_heads.shape[1]};
  const Tree tree{tokens.as<int64_t>(), parents.as<int32_t>(), probability.as<double>(), sources.as<int32_t>()};
  launch("draft_tree", draft_tree_kernel, grid_x("draft_tree", batch), whole_warps(nodes > kListed ? nodes : kListed),
         0, stream, tables, nodes, static_cast<int>(max_depth), foresight, tree);
}

}  // namespace msn::cuda
