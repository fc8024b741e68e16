#include <algorithm>

#include "cpu/check.h"
#include "drafting_ops.h"
#include "tails.h"

namespace msn {

namespace {

// The nodes where the path ends most likely, the likeliest first.
void find_ends(const int32_t* parents, const double* probability, int nodes, int tails,
               int64_t* ends) {
  double chance[kMaxNodes];
  std::copy_n(probability, nodes, chance);
  for (int node = 0; node < nodes; ++node)
    if (parents[node] >= 0) chance[parents[node]] -= probability[node];
  for (int tail = 0; tail < tails; ++tail) {
    int best = -1;
    for (int node = 0; node < nodes; ++node)
      if (chance[node] > (best < 0 ? 0 : chance[best])) best = node;
    ends[tail] = best;
    if (best >= 0) chance[best] = 0;
  }
}

}  // namespace

void AppendTails::on_cpu() const {
  const int64_t batch = tokens.shape[0], wide = tokens.shape[1], capacity = history.shape[1];
  const int rows = static_cast<int>(drafted.shape[1]), tails = static_cast<int>(ends.shape[1]);
  const int each = static_cast<int>(length), nodes = rows - tails * each, words = words_for(rows);
  int32_t above[kMaxNodes];
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t size = lengths.as<int64_t>()[b];
    check_range("lengths", b, size, 1, capacity);
    const int32_t* parent = parents.as<int32_t>() + b * wide;
    check_parents(parent, nodes);
    int64_t* end = ends.as<int64_t>() + b * tails;
    find_ends(parent, probability.as<double>() + b * wide, nodes, tails, end);

    int64_t* token = drafted.as<int64_t>() + b * rows;
    std::copy_n(tokens.as<int64_t>() + b * wide, nodes, token);
    std::copy_n(parent, nodes, above);
    for (int row = nodes; row < rows; ++row) {
      token[row] = tail_token(noise, history.as<int64_t>() + b * capacity, size, row - nodes);
      above[row] = above_in_tail(end, nodes, each, row);
    }
    int32_t* hidden = drafted_parents.as<int32_t>() + b * rows;
    std::fill_n(std::copy_n(parent, nodes, hidden), rows - nodes, -1);
    for (int row = 0; row < rows; ++row)
      depth.as<int32_t>()[b * rows + row] =
          ancestors_of(above, row, ancestors.as<uint64_t>() + (b * rows + row) * words, words);
  }
}

}  // namespace msn
