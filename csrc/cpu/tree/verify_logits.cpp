// Arg-max, guesses and the accepted path, one after the other.
#include "best_first.h"
#include "drafting_ops.h"
#include "tree_ops.h"

namespace msn {

void VerifyLogits::on_cpu() const {
  TopGuesses{logits, guesses, {}}.on_cpu();
  from_guesses_on_cpu();
}

void VerifyLogits::from_guesses_on_cpu() const {
  const int64_t rows = tokens.shape[0] * tokens.shape[1];
  for (int64_t i = 0; i < rows; ++i)
    targets.as<int64_t>()[i] = guess_token(guesses.as<int32_t>()[i * kGuesses]);
  VerifyTree{tokens, targets, parents, accept_length, path, bonus, continuation}.on_cpu();
}

}  // namespace msn
