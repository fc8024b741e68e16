#include <algorithm>

#include "best_first.h"
#include "cpu/check.h"
#include "drafting_ops.h"

namespace msn {

void KeepContinuation::on_cpu() const {
  const int64_t batch = guesses.shape[0], nodes = guesses.shape[1], depths = denoised.shape[1];
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t d = 0; d < depths; ++d) {
      const int64_t node = d < nodes ? continuation.as<int64_t>()[b * nodes + d] : -1;
      check_range("continuation", b, node, -1, nodes - 1);
      int32_t* to = denoised.as<int32_t>() + (b * depths + d) * kGuesses;
      if (node < 0)
        std::fill_n(to, kGuesses, -1);
      else
        std::copy_n(guesses.as<int32_t>() + (b * nodes + node) * kGuesses, kGuesses, to);
    }
}

}  // namespace msn
