#include <algorithm>

#include "best_first.h"
#include "cpu/check.h"
#include "drafting_ops.h"
#include "tails.h"

namespace msn {

void KeepTail::on_cpu() const {
  const int64_t batch = guesses.shape[0], depths = denoised.shape[1];
  const int rows = static_cast<int>(guesses.shape[1]), tails = static_cast<int>(ends.shape[1]);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t count = accept_length.as<int64_t>()[b];
    check_range("accept_length", b, count, 0, rows);
    const int64_t last = count ? path.as<int64_t>()[b * rows + count - 1] : -1;
    const int tail = tail_below(ends.as<int64_t>() + b * tails, tails, last);
    std::copy_n(tables.as<double>() + (tail < 0 ? 0 : kFactors), kFactors,
                factors.as<double>() + b * kFactors);
    for (int64_t d = 0; d < depths; ++d) {
      const int64_t row = kept_row(continuation.as<int64_t>() + b * rows, rows, tails,
                                   static_cast<int>(length), tail, static_cast<int>(d));
      check_range("continuation", b, row, -1, rows - 1);
      int32_t* to = denoised.as<int32_t>() + (b * depths + d) * kGuesses;
      if (row < 0)
        std::fill_n(to, kGuesses, -1);
      else
        std::copy_n(guesses.as<int32_t>() + (b * rows + row) * kGuesses, kGuesses, to);
    }
  }
}

}  // namespace msn
