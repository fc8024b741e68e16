// Arg-max, guesses and the accepted path, one after the other.
#include "best_first.h"
#include "drafting_ops.h"
#include "tree_ops.h"

namespace msn {

void VerifyLogits::on_cpu() const {
  TopGuesses{logits, guesses}.on_cpu();
  for (int64_t i = 0; i < logits.shape[0]; ++i)
    targets.as<int64_t>()[i] = guess_token(guesses.as<int32_t>()[i * kGuesses]);
  VerifyTree{tokens, targets, parents, accept_length, path, bonus, continuation}.on_cpu();
}

}  // namespace msn
