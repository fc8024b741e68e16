#include "best_first.h"
#include "cpu/check.h"
#include "drafting_ops.h"

namespace msn {

void IndexSuffixes::on_cpu() const {
  const int64_t batch = history.shape[0], capacity = history.shape[1], slots = suffixes.shape[2];
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = lengths.as<int64_t>()[b], begin = start.as<int64_t>()[b];
    check_range("lengths", b, length, 0, capacity);
    check_range("start", b, begin, 0, capacity);
    const int64_t* row = history.as<int64_t>() + b * capacity;
    int32_t* table = suffixes.as<int32_t>() + b * kSuffixes * slots;
    for (int64_t end = begin > 1 ? begin : 1; end < length; ++end) {
      if (row[end] < 0) continue;
      uint64_t hash = 0;
      for (int n = 1, level = 0; n <= end && level < kSuffixes && row[end - n] >= 0; ++n) {
        hash = extend_hash(hash, row[end - n]);
        if (n != suffix_length(level)) continue;
        table[level * slots + static_cast<int64_t>(hash % static_cast<uint64_t>(slots))] =
            static_cast<int32_t>(end);
        ++level;
      }
    }
  }
}

}  // namespace msn
