#include <algorithm>

#include "best_first.h"
#include "cpu/check.h"
#include "drafting_ops.h"

namespace msn {

void RememberGuesses::on_cpu() const {
  const int64_t batch = tokens.shape[0], capacity = history.shape[1], slots = adjacency.shape[1];
  const int nodes = static_cast<int>(tokens.shape[1]);
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t* row_parents = parents.as<int32_t>() + (parents.ndim == 2 ? b * nodes : 0);
    const int64_t length = lengths.as<int64_t>()[b];
    check_parents(row_parents, nodes);
    check_range("lengths", b, length, 1, capacity);
    const int64_t* row_tokens = tokens.as<int64_t>() + b * nodes;
    const int64_t* row_path = path.as<int64_t>() + b * nodes;
    const auto remember = [&](int node) {
      uint64_t ancestors[kMaxWords];
      if (ancestors_of(row_parents, node, ancestors, words_for(nodes)) < 0) return;  // padding
      int64_t context[kOrders];
      const int count = context_of(row_tokens, row_parents, node,
                                   history.as<int64_t>() + b * capacity, length, kOrders, context);
      for (int order = 0; order < count; ++order) {
        const uint64_t hash = hash_of(context, order + 1);
        const int64_t slot = order * slots + slot_of(hash, slots);
        int32_t* entry = adjacency.as<int32_t>() + slot * (1 + kGuesses);
        entry[0] = hash_check(hash);
        std::copy_n(guesses.as<int32_t>() + (b * nodes + node) * kGuesses, kGuesses, entry + 1);
      }
    };
    // What lies on the accepted path comes last, and so stays where others have the same context.
    for (int node = 0; node < nodes; ++node)
      if (std::find(row_path, row_path + nodes, node) == row_path + nodes) remember(node);
    for (int i = 0; i < nodes; ++i)
      if (row_path[i] >= 0 && row_path[i] < nodes) remember(static_cast<int>(row_path[i]));
  }
}

}  // namespace msn
