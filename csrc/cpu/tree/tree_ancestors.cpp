#include "cpu/check.h"
#include "tree.h"
#include "tree_ops.h"

namespace msn {

void TreeAncestors::on_cpu() const {
  const int nodes = static_cast<int>(parents.shape[parents.ndim - 1]);
  const int64_t batch = parents.ndim == 2 ? parents.shape[0] : 1;
  const int n_words = words_for(nodes);
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t* row = parents.as<int32_t>() + b * nodes;
    check_parents(row, nodes);
    for (int i = 0; i < nodes; ++i)
      depth.as<int32_t>()[b * nodes + i] =
          ancestors_of(row, i, ancestors.as<uint64_t>() + (b * nodes + i) * n_words, n_words);
  }
}

}  // namespace msn
