// Arg-max, guesses and the accepted path, one after the other.
#include "../best_first.h"
#include "../ops.h"

namespace msn::cpu {

void verify_logits(const Tensor& logits, const Tensor& tokens, const Tensor& parents,
                   const Tensor& guesses, const Tensor& targets, const Tensor& accept_length,
                   const Tensor& path, const Tensor& bonus, const Tensor& continuation,
                   const Tensor&) {
  top_guesses(logits, guesses);
  for (int64_t i = 0; i < logits.shape[0]; ++i)
    targets.as<int64_t>()[i] = guess_token(guesses.as<int32_t>()[i * kGuesses]);
  verify_tree(tokens, targets, parents, accept_length, path, bonus, continuation);
}

}  // namespace msn::cpu
