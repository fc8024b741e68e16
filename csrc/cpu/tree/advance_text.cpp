#include <algorithm>

#include "cpu/check.h"
#include "tree_ops.h"

namespace msn {

void AdvanceText::on_cpu() const {
  const int64_t batch = targets.shape[0], nodes = targets.shape[1], capacity = history.shape[1];
  const int64_t* first_end = ends.as<int64_t>();
  for (int64_t b = 0; b < batch; ++b) {
    int64_t& length = lengths.as<int64_t>()[b];
    int64_t& left = remaining.as<int64_t>()[b];
    check_range("lengths", b, length, 0, capacity);
    check_range("accept_length", b, accept_length.as<int64_t>()[b], 0, nodes);
    int64_t* tokens = gained.as<int64_t>() + b * nodes;
    for (int64_t i = 0; i < nodes; ++i) {
      const int64_t node = path.as<int64_t>()[b * nodes + i];
      check_range("path", b, node, -1, nodes - 1);
      tokens[i] = targets.as<int64_t>()[b * nodes + std::max<int64_t>(node, 0)];
    }
    int64_t count = std::min(accept_length.as<int64_t>()[b], std::max<int64_t>(left, 0));
    bool ended = false, invalid = false;
    for (int64_t i = 0; i < count && !ended; ++i) {
      ended =
          std::find(first_end, first_end + ends.shape[0], tokens[i]) != first_end + ends.shape[0];
      invalid |= tokens[i] < 0 || tokens[i] >= vocabulary;
      if (ended) count = i + 1;
    }
    check_range("lengths", b, length, 0, capacity - count);
    std::copy_n(tokens, count, history.as<int64_t>() + b * capacity + length);
    length += count;
    left = ended ? 0 : left - count;
    status.as<int64_t>()[b] = count;
    status.as<int64_t>()[batch + b] = left;
    status.as<int64_t>()[2 * batch + b] = invalid;
  }
}

}  // namespace msn
