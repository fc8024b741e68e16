#include <algorithm>

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
    uint64_t hashes[kContext] = {};
    int tokens = 0;  // before `end`, as many as an n-gram may have
    const int64_t from = begin > 1 ? begin : 1;
    for (int64_t end = std::max<int64_t>(from - kContext, 0) + 1; end < length; ++end) {
      extend_hashes(hashes, row[end - 1], hashes);
      tokens = row[end - 1] < 0 ? 0 : std::min(tokens + 1, kContext);
      if (end < from || row[end] < 0) continue;
      for (int level = 0; level < kSuffixes && suffix_length(level) <= tokens; ++level)
        table[level * slots + slot_of(hashes[suffix_length(level) - 1], slots)] =
            static_cast<int32_t>(end);
    }
  }
}

}  // namespace msn
