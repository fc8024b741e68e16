#include <algorithm>
#include <vector>

#include "best_first.h"
#include "cpu/check.h"
#include "drafting_ops.h"

namespace msn {

namespace {

struct Candidate {
  double value;        // what the best come first by
  double probability;  // of the whole path
  int parent, at;      // `at`: the first slot that lists the token
  int64_t token;
  int32_t source;
  // Whether another one comes first: for std::push_heap, whose top is the largest.
  bool operator<(const Candidate& other) const {
    if (value != other.value) return value < other.value;
    return parent != other.parent ? parent > other.parent : at > other.at;
  }
};

// What may follow `parent`: every listed token once, its score the product of its factors; noise
// where none is listed.
void expand(const Sources& from, const Known& known, int parent, int depth, double above,
            double foresight, std::vector<Candidate>& waiting) {
  Candidate found[kListed];
  int count = 0;
  const double bias = bias_of(from, known);
  for (int at = 0; at < kListed; ++at) {
    const Listed listed = listed_at(from, known, depth, at);
    if (listed.token < 0) continue;
    Candidate* candidate = std::find_if(
        found, found + count, [&](const Candidate& c) { return c.token == listed.token; });
    if (candidate == found + count) found[count++] = {0, bias, parent, at, listed.token, 0};
    candidate->probability *= from.factors[listed.factor];
    candidate->source |= listed.source;
  }
  double total = 1.0;
  for (int i = 0; i < count; ++i) total += found[i].probability;
  if (count == 0 && above * foresight > 0)
    found[count++] = {0, 0, parent, 0, noise_token(from, depth + 1, parent), kNoise};
  int best = 0;
  for (int i = 1; i < count; ++i) best = found[i].probability > found[best].probability ? i : best;
  for (int i = 0; i < count; ++i) {
    found[i].value = found[i].probability =
        above * std::min(found[i].probability / total, kCeiling);
    if (i == best) found[i].value += above * foresight;
    waiting.push_back(found[i]);
    std::push_heap(waiting.begin(), waiting.end());
  }
}

}  // namespace

void DraftTree::on_cpu() const {
  const int64_t batch = history.shape[0], capacity = history.shape[1];
  const int nodes = static_cast<int>(tokens.shape[1]);
  const double* factor = factors.as<double>();
  const int64_t count = factors.ndim > 1 ? batch * kFactors : kFactors;
  for (int64_t i = 0; i < count; ++i)
    if (!(factor[i] >= 1e-9 && factor[i] <= 1e9))
      throw std::invalid_argument("factors[" + std::to_string(i) + "] is " +
                                  std::to_string(factor[i]) + "; expected 1e-9 to 1e9");
  std::vector<Candidate> waiting;
  std::vector<int> depth(nodes);
  std::vector<uint64_t> hashes(static_cast<size_t>(nodes) * kContext);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = lengths.as<int64_t>()[b];
    check_range("lengths", b, length, 1, capacity);
    const Sources from = sources_of_row(first_row(), b, capacity, length);
    int64_t* token = tokens.as<int64_t>() + b * nodes;
    int32_t* parent = parents.as<int32_t>() + b * nodes;
    double* chance = probability.as<double>() + b * nodes;
    int32_t* source = sources.as<int32_t>() + b * nodes;
    waiting.assign(1, {1.0, 1.0, -1, 0, from.history[length - 1], 0});  // the root
    int node = 0;
    for (; node < nodes && !waiting.empty(); ++node) {
      std::pop_heap(waiting.begin(), waiting.end());
      const Candidate best = waiting.back();
      waiting.pop_back();
      token[node] = best.token;
      parent[node] = best.parent;
      chance[node] = best.probability;
      source[node] = best.source;
      depth[node] = node ? depth[best.parent] + 1 : 0;
      if (depth[node] >= max_depth) continue;
      uint64_t* hash = hashes.data() + node * kContext;
      if (node)
        extend_hashes(hashes.data() + best.parent * kContext, best.token, hash);
      else
        for (int64_t at = std::max<int64_t>(length - kContext, 0); at < length; ++at)
          extend_hashes(hash, from.history[at], hash);
      int64_t context[kContext];
      const int count = context_of(token, parent, node, from.history, length, kContext, context);
      Known known;
      look_up(from, context, hash, count, known);
      expand(from, known, node, depth[node], best.probability, foresight, waiting);
    }
    for (; node < nodes; ++node) {  // nothing left to guess
      token[node] = from.history[length - 1];
      parent[node] = -1;
      chance[node] = 0;
      source[node] = 0;
    }
  }
}

}  // namespace msn
