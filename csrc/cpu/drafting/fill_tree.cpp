#include "cpu/check.h"
#include "drafting.h"
#include "drafting_ops.h"

namespace msn {

void FillTree::on_cpu() const {
  const int64_t batch = history.shape[0], capacity = history.shape[1];
  const int nodes = static_cast<int>(rank.shape[0]);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = lengths.as<int64_t>()[b];
    check_range("lengths", b, length, 1, capacity);
    const FillSources from = sources_of_row(first_row(), b, capacity, length);
    const int32_t* row_depth = depth.as<int32_t>() + (depth.ndim == 2 ? b * nodes : 0);
    for (int i = 0; i < nodes; ++i)
      tokens.as<int64_t>()[b * nodes + i] =
          fill_node(from, i, row_depth[i], rank.as<int32_t>()[i], seed.as<int64_t>()[0], b);
  }
}

}  // namespace msn
