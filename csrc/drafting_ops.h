// The ops that find guesses and put them into a draft tree; see tree_ops.h.
#pragma once
#include "best_first.h"
#include "block_space.h"
#include "drafting.h"
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

  // Of row 0, without its length.
  FillSources first_row() const {
    FillSources from{};
    from.candidates = candidates.as<int64_t>();
    from.depths = candidates.shape[1];
    from.ranks = candidates.shape[2];
    from.retrieved = retrieved.as<int64_t>();
    from.retrieved_length = retrieved.shape[1];
    from.history = history.as<int64_t>();
    return from;
  }
  void on_cpu() const;
  void on_cuda(void* stream) const;
};

struct TopGuesses {
  Tensor logits, guesses;
  BlockSpace space;  // CUDA only

  void on_cpu() const;
  void on_cuda(void* stream) const;
};
// The sizes that TopGuesses::on_cuda needs for these rows of logits.
BlockSpace guesses_space(const Tensor& logits);

// The k largest of each row of float32 logits [R, V], ascending by token: values and tokens int64
// [R, k]. False, and nothing of that, where others are so near that a division might make them
// equal, or one is not finite, or too small or large for that.
struct TopLogits {
  Tensor logits, values, tokens;

  bool on_cpu() const;
};

struct IndexSuffixes {
  Tensor suffixes, history, start, lengths;

  void on_cpu() const;
  void on_cuda(void* stream) const;
};

struct RememberGuesses {
  Tensor adjacency, history, lengths, tokens, parents, path, guesses;

  void on_cpu() const;
  void on_cuda(void* stream) const;
};

struct KeepContinuation {
  Tensor denoised, guesses, continuation;

  void on_cpu() const;
  void on_cuda(void* stream) const;
};

struct KeepTail {
  Tensor denoised, factors, tables, guesses, continuation, path, accept_length, ends;
  int64_t length = 0;

  void on_cpu() const;
  void on_cuda(void* stream) const;
};

struct AppendTails {
  Tensor tokens, parents, probability, history, lengths;
  int64_t length = 0, noise = 0;
  Tensor drafted, drafted_parents, ancestors, depth, ends;

  void on_cpu() const;
  void on_cuda(void* stream) const;
};

struct DraftTree {
  Tensor history, lengths, denoised, adjacency, habits, suffixes, corpus, corpus_suffixes, factors;
  int64_t max_depth = 0;
  double foresight = 0.0;
  Tensor tokens, parents, probability, sources;

  // Of row 0, without its length.
  Sources first_row() const {
    Sources from{};
    from.denoised = denoised.as<int32_t>();
    from.depths = denoised.shape[1];
    from.adjacency = adjacency.as<int32_t>();
    from.adjacency_slots = adjacency.shape[1];
    from.habits = habits.as<int32_t>();
    from.habit_slots = habits.shape[1];
    from.suffixes = suffixes.as<int32_t>();
    from.suffix_slots = suffixes.shape[2];
    from.history = history.as<int64_t>();
    from.corpus = corpus.as<int32_t>();
    from.corpus_length = corpus.shape[0];
    from.corpus_suffixes = corpus_suffixes.as<int32_t>();
    from.corpus_slots = corpus_suffixes.shape[1];
    from.factors = factors.as<double>();
    from.next_factors = factors.ndim > 1 ? kFactors : 0;
    return from;
  }
  void on_cpu() const;
  void on_cuda(void* stream) const;
};

}  // namespace msn
