#include <algorithm>

#include "cpu/check.h"
#include "drafting.h"
#include "drafting_ops.h"

namespace msn {

void LookupNgram::on_cpu() const {
  const int64_t batch = history.shape[0], capacity = history.shape[1], wanted = tokens.shape[1];
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t* row = history.as<int64_t>() + b * capacity;
    const int64_t length = lengths.as<int64_t>()[b];
    check_range("lengths", b, length, 1, capacity);
    int64_t best = 0;
    for (int64_t end = length - 1; end > 0; --end) {  // the most recent first
      const int size = match_length(row, length, end, max_ngram);
      best = std::max(best, match_key(size, end));
      if (size == max_ngram) break;
    }
    matched.as<int64_t>()[b] = match_size(best);
    for (int64_t i = 0; i < wanted; ++i) {
      const int64_t at = match_end(best) + i;
      tokens.as<int64_t>()[b * wanted + i] = best && at < length ? row[at] : -1;
    }
  }
}

}  // namespace msn
