// The ops that find guesses and put them into a draft tree; see tree_ops.h.
#pragma once
#include "tensor.h"

namespace msn {

struct LookupNgram {
  Tensor history, lengths;
  int64_t max_ngram = 0;
  Tensor tokens, matched;

  void on_cpu() const;
  void on_cuda(void* stream) const;
};

struct FillTree {
  Tensor candidates, retrieved, history, lengths, depth, rank, seed, tokens;

  void on_cpu() const;
  void on_cuda(void* stream) const;
};

struct TopGuesses {
  Tensor logits, guesses;

  void on_cpu() const;
  void on_cuda(void* stream) const;
};

struct IndexSuffixes {
  Tensor heads, history, start, lengths;

  void on_cpu() const;
  void on_cuda(void* stream) const;
};

struct RememberGuesses {
  Tensor contexts, history, lengths, tokens, parents, path, guesses;

  void on_cpu() const;
  void on_cuda(void* stream) const;
};

struct DraftTree {
  Tensor history, lengths, denoised, contexts, heads, corpus, corpus_heads, factors;
  int64_t max_depth = 0;
  double foresight = 0.0;
  Tensor tokens, parents, probability, sources;

  void on_cpu() const;
  void on_cuda(void* stream) const;
};

}  // namespace msn
