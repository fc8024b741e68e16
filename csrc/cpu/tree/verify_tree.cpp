#include <algorithm>

#include "cpu/check.h"
#include "tree.h"
#include "tree_ops.h"

namespace msn {

void VerifyTree::on_cpu() const {
  const int64_t batch = tokens.shape[0];
  const int nodes = static_cast<int>(tokens.shape[1]);
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t* row_parents = parents.as<int32_t>() + (parents.ndim == 2 ? b * nodes : 0);
    const int64_t* row_tokens = tokens.as<int64_t>() + b * nodes;
    const int64_t* row_targets = targets.as<int64_t>() + b * nodes;
    check_parents(row_parents, nodes);

    int64_t best = path_key(0, 0);
    for (int i = 1; i < nodes; ++i)
      best = std::max(best, path_key(accepted_depth(row_parents, row_tokens, row_targets, i), i));
    const int end = key_node(best), length = key_depth(best) + 1;

    int64_t deepest = path_key(0, end);
    for (int i = end + 1; i < nodes; ++i)
      deepest = std::max(deepest, path_key(depth_below(row_parents, i, end), i));
    // A node that is not below the end has depth 0, so it can win only with a smaller index, never
    // here: all of them come after `end`.

    int64_t* row_path = path.as<int64_t>() + b * nodes;
    int64_t* row_continuation = continuation.as<int64_t>() + b * nodes;
    std::fill(row_path, row_path + nodes, -1);
    std::fill(row_continuation, row_continuation + nodes, -1);
    write_path(row_parents, end, length, row_path);
    write_path(row_parents, key_node(deepest), key_depth(deepest), row_continuation);
    accept_length.as<int64_t>()[b] = length;
    bonus.as<int64_t>()[b] = row_targets[end];
  }
}

}  // namespace msn
