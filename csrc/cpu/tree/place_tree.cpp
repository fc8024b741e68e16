#include <algorithm>

#include "cpu/check.h"
#include "tree_ops.h"

namespace msn {

void PlaceTree::on_cpu() const {
  const int64_t batch = tokens.shape[0], nodes = tokens.shape[1], capacity = history.shape[1];
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = lengths.as<int64_t>()[b], last = last_position.as<int64_t>()[b];
    check_range("lengths", b, length, 1, capacity);
    const int64_t root = history.as<int64_t>()[b * capacity + length - 1];
    tokens.as<int64_t>()[b * tokens.strides[0]] = std::min(root, vocabulary - 1);
    prefix.as<int64_t>()[b] = length - 1 + offsets.as<int64_t>()[b];
    const int32_t* row_depth = depth.as<int32_t>() + (depth.ndim == 2 ? b * nodes : 0);
    for (int64_t n = 0; n < nodes; ++n)
      positions.as<int64_t>()[b * nodes + n] =
          std::min<int64_t>(length - 1 + std::max(row_depth[n], 0), last);
  }
}

}  // namespace msn
