// The bindings of the ops in drafting_ops.h.
#include "drafting.h"

#include <pybind11/stl.h>

#include <utility>

#include "best_first.h"
#include "bindings/checks.h"
#include "bindings/define.h"
#include "bindings/tables.h"
#include "drafting_ops.h"

namespace py = pybind11;

namespace msn {

namespace {

void lookup_ngram(const Argument& history, const Argument& lengths, int64_t max_ngram,
                  const Argument& tokens, const Argument& matched) {
  expect_dims(history, 2);
  expect_dims(tokens, 2);
  const int64_t batch = history.shape[0];
  expect_dense(history, DType::kInt64, {batch, history.shape[1]}, history);
  expect_dense(lengths, DType::kInt64, {batch}, history);
  expect_range("max_ngram", max_ngram, 1, 1 << 20);
  expect_dense(tokens, DType::kInt64, {batch, tokens.shape[1]}, history);
  expect_dense(matched, DType::kInt64, {batch}, history);
  run(history, LookupNgram{history, lengths, max_ngram, tokens, matched});
}

void fill_tree(const Argument& candidates, const Argument& retrieved, const Argument& history,
               const Argument& lengths, const Argument& depth, const Argument& rank,
               const Argument& seed, const Argument& tokens) {
  expect_dims(candidates, 3);
  expect_dims(retrieved, 2);
  expect_dims(history, 2);
  expect_dims(rank, 1);
  const int64_t batch = history.shape[0], nodes = rank.shape[0];
  expect_nodes(rank, nodes);
  expect_dense(candidates, DType::kInt64, {batch, candidates.shape[1], candidates.shape[2]},
               history);
  expect_dense(retrieved, DType::kInt64, {batch, retrieved.shape[1]}, history);
  expect_dense(history, DType::kInt64, {batch, history.shape[1]}, history);
  expect_dense(lengths, DType::kInt64, {batch}, history);
  expect_tree(depth, DType::kInt32, batch, nodes, history);
  expect_dense(rank, DType::kInt32, {nodes}, history);
  expect_dense(seed, DType::kInt64, {1}, history);
  expect_dense(tokens, DType::kInt64, {batch, nodes}, history);
  run(history, FillTree{candidates, retrieved, history, lengths, depth, rank, seed, tokens});
}

void top_guesses(const Argument& logits, const Argument& guesses, const OptionalArgument& partial,
                 const OptionalArgument& arrived) {
  expect_logits(logits);
  expect_dense(guesses, DType::kInt32, {logits.shape[0], kGuesses}, logits);
  const BlockSpace space = space_in(partial, arrived, logits);
  if (logits.shape[0] == 0) return;
  run(logits, TopGuesses{logits, guesses, space});
}

// Floats and counters that top_guesses needs for these rows on a GPU.
std::pair<int64_t, int64_t> guesses_space_wanted(const Argument& logits) {
  expect_logits(logits);
#ifdef MSN_WITH_CUDA
  if (logits.device == Device::kCUDA) {
    const BlockSpace wanted = guesses_space(logits);
    return {wanted.floats, wanted.counters};
  }
#endif
  return {0, 0};
}

void index_suffixes(const Argument& suffixes, const Argument& history, const Argument& start,
                    const Argument& lengths) {
  expect_dims(history, 2);
  const int64_t batch = history.shape[0];
  expect_range("capacity of history", history.shape[1], 0, INT32_MAX);
  expect_dense(history, DType::kInt64, {batch, history.shape[1]}, history);
  expect_dims(suffixes, 3);
  expect_dense(suffixes, DType::kInt32, {batch, kSuffixes, suffixes.shape[2]}, history);
  expect_dense(start, DType::kInt64, {batch}, history);
  expect_dense(lengths, DType::kInt64, {batch}, history);
  if (suffixes.shape[2] == 0) return;
  run(history, IndexSuffixes{suffixes, history, start, lengths});
}

void remember_guesses(const Argument& adjacency, const Argument& history, const Argument& lengths,
                      const Argument& tokens, const Argument& parents, const Argument& path,
                      const Argument& guesses) {
  expect_dims(tokens, 2);
  expect_dims(history, 2);
  expect_dims(adjacency, 3);
  const int64_t batch = tokens.shape[0], nodes = tokens.shape[1];
  expect_nodes(tokens, nodes);
  expect_dense(tokens, DType::kInt64, {batch, nodes}, tokens);
  expect_dense(adjacency, DType::kInt32, {kOrders, adjacency.shape[1], 1 + kGuesses}, tokens);
  expect_dense(history, DType::kInt64, {batch, history.shape[1]}, tokens);
  expect_dense(lengths, DType::kInt64, {batch}, tokens);
  expect_tree(parents, DType::kInt32, batch, nodes, tokens);
  expect_dense(path, DType::kInt64, {batch, nodes}, tokens);
  expect_dense(guesses, DType::kInt32, {batch, nodes, kGuesses}, tokens);
  if (adjacency.shape[1] == 0) return;
  run(tokens, RememberGuesses{adjacency, history, lengths, tokens, parents, path, guesses});
}

// What keeps guesses as denoised ones takes.
void expect_kept(const Argument& denoised, const Argument& guesses, const Argument& continuation) {
  expect_dims(denoised, 3);
  expect_dims(guesses, 3);
  const int64_t batch = guesses.shape[0], nodes = guesses.shape[1];
  expect_nodes(guesses, nodes);
  expect_dense(guesses, DType::kInt32, {batch, nodes, kGuesses}, guesses);
  expect_dense(denoised, DType::kInt32, {batch, denoised.shape[1], kGuesses}, guesses);
  expect_range("depths of denoised", denoised.shape[1], 0, 1 << 20);
  expect_dense(continuation, DType::kInt64, {batch, nodes}, guesses);
}

void keep_continuation(const Argument& denoised, const Argument& guesses,
                       const Argument& continuation) {
  expect_kept(denoised, guesses, continuation);
  run(guesses, KeepContinuation{denoised, guesses, continuation});
}

// Tails of so many rows among the rows of a draft, of which at least one is none.
void expect_tails(const Argument& ends, int64_t batch, int64_t length, int64_t rows,
                  const Tensor& like) {
  expect_range("length", length, 1, kMaxNodes);
  expect_dims(ends, 2);
  expect_dense(ends, DType::kInt64, {batch, ends.shape[1]}, like);
  if (ends.shape[1] > (rows - 1) / length)
    refuse("ends has shape ", shape_text(ends), ", tails of ", length, " rows; expected at most ",
           (rows - 1) / length, " in a draft of ", rows, " rows");
}

void keep_tail(const Argument& denoised, const Argument& factors, const Argument& tables,
               const Argument& guesses, const Argument& continuation, const Argument& path,
               const Argument& accept_length, const Argument& ends, int64_t length) {
  expect_kept(denoised, guesses, continuation);
  const int64_t batch = guesses.shape[0], rows = guesses.shape[1];
  expect_dense(factors, DType::kFloat64, {batch, kFactors}, guesses);
  expect_dense(tables, DType::kFloat64, {2, kFactors}, guesses);
  expect_dense(path, DType::kInt64, {batch, rows}, guesses);
  expect_dense(accept_length, DType::kInt64, {batch}, guesses);
  expect_tails(ends, batch, length, rows, guesses);
  run(guesses, KeepTail{denoised, factors, tables, guesses, continuation, path, accept_length, ends,
                        length});
}

void append_tails(const Argument& tokens, const Argument& parents, const Argument& probability,
                  const Argument& history, const Argument& lengths, int64_t length, int64_t noise,
                  const Argument& drafted, const Argument& drafted_parents,
                  const Argument& ancestors, const Argument& depth, const Argument& ends) {
  expect_dims(tokens, 2);
  expect_dims(history, 2);
  expect_dims(drafted, 2);
  const int64_t batch = tokens.shape[0], wide = tokens.shape[1], rows = drafted.shape[1];
  expect_dense(tokens, DType::kInt64, {batch, wide}, tokens);
  expect_dense(parents, DType::kInt32, {batch, wide}, tokens);
  expect_dense(probability, DType::kFloat64, {batch, wide}, tokens);
  expect_dense(history, DType::kInt64, {batch, history.shape[1]}, tokens);
  expect_dense(lengths, DType::kInt64, {batch}, tokens);
  expect_range("noise", noise, -1, INT64_MAX);
  expect_nodes(drafted, rows);
  expect_dense(drafted, DType::kInt64, {batch, rows}, tokens);
  expect_dense(drafted_parents, DType::kInt32, {batch, rows}, tokens);
  expect_dense(ancestors, DType::kInt64, {batch, rows, words_for(static_cast<int>(rows))}, tokens);
  expect_dense(depth, DType::kInt32, {batch, rows}, tokens);
  expect_tails(ends, batch, length, rows, tokens);
  expect_range("nodes of drafted", rows - ends.shape[1] * length, 1, wide);
  run(tokens, AppendTails{tokens, parents, probability, history, lengths, length, noise, drafted,
                          drafted_parents, ancestors, depth, ends});
}

}  // namespace

void expect_tables(const Argument& denoised, const Argument& adjacency, const Argument& habits,
                   const Argument& suffixes, const Argument& corpus,
                   const Argument& corpus_suffixes, int64_t batch, const Tensor& like) {
  expect_dims(denoised, 3);
  expect_dims(adjacency, 3);
  expect_dims(habits, 3);
  expect_dims(suffixes, 3);
  expect_dims(corpus, 1);
  expect_dims(corpus_suffixes, 2);
  expect_dense(denoised, DType::kInt32, {batch, denoised.shape[1], kGuesses}, like);
  expect_dense(adjacency, DType::kInt32, {kOrders, adjacency.shape[1], 1 + kGuesses}, like);
  expect_dense(habits, DType::kInt32, {kOrders, habits.shape[1], 1 + kGuesses}, like);
  expect_dense(suffixes, DType::kInt32, {batch, kSuffixes, suffixes.shape[2]}, like);
  expect_range("length of corpus", corpus.shape[0], 0, INT32_MAX);
  expect_dense(corpus, DType::kInt32, {corpus.shape[0]}, like);
  expect_dense(corpus_suffixes, DType::kInt32, {kSuffixes, corpus_suffixes.shape[1]}, like);
}

void expect_growth(int64_t max_depth, double foresight) {
  expect_range("max_depth", max_depth, 0, kMaxNodes);
  if (!(foresight >= 0 && foresight <= 1)) refuse("foresight is ", foresight, "; expected 0 to 1");
}

namespace {

void draft_tree(const Argument& history, const Argument& lengths, const Argument& denoised,
                const Argument& adjacency, const Argument& habits, const Argument& suffixes,
                const Argument& corpus, const Argument& corpus_suffixes, const Argument& factors,
                int64_t max_depth, double foresight, const Argument& tokens,
                const Argument& parents, const Argument& probability, const Argument& sources) {
  expect_dims(history, 2);
  expect_dims(tokens, 2);
  const int64_t batch = history.shape[0], nodes = tokens.shape[1];
  expect_nodes(tokens, nodes);
  expect_growth(max_depth, foresight);
  expect_dense(history, DType::kInt64, {batch, history.shape[1]}, history);
  expect_dense(lengths, DType::kInt64, {batch}, history);
  expect_tables(denoised, adjacency, habits, suffixes, corpus, corpus_suffixes, batch, history);
  if (factors.ndim > 1)
    expect_dense(factors, DType::kFloat64, {batch, kFactors}, history);
  else
    expect_dense(factors, DType::kFloat64, {kFactors}, history);
  expect_dense(tokens, DType::kInt64, {batch, nodes}, history);
  expect_dense(parents, DType::kInt32, {batch, nodes}, history);
  expect_dense(probability, DType::kFloat64, {batch, nodes}, history);
  expect_dense(sources, DType::kInt32, {batch, nodes}, history);
  run(history,
      DraftTree{history, lengths, denoised, adjacency, habits, suffixes, corpus, corpus_suffixes,
                factors, max_depth, foresight, tokens, parents, probability, sources});
}

}  // namespace

void define_drafting(py::module_& m) {
  define(m, "lookup_ngram", &lookup_ngram,
         {"history", "lengths", "max_ngram", "tokens", "matched"});
  define(m, "fill_tree", &fill_tree,
         {"candidates", "retrieved", "history", "lengths", "depth", "rank", "seed", "tokens"});
  define(m, "top_guesses", &top_guesses, {"logits", "guesses", "partial", "arrived"});
  define(m, "guesses_space", &guesses_space_wanted, {"logits"});
  define(m, "index_suffixes", &index_suffixes, {"suffixes", "history", "start", "lengths"});
  define(m, "remember_guesses", &remember_guesses,
         {"adjacency", "history", "lengths", "tokens", "parents", "path", "guesses"});
  define(m, "keep_continuation", &keep_continuation, {"denoised", "guesses", "continuation"});
  define(m, "keep_tail", &keep_tail,
         {"denoised", "factors", "tables", "guesses", "continuation", "path", "accept_length",
          "ends", "length"});
  define(m, "append_tails", &append_tails,
         {"tokens", "parents", "probability", "history", "lengths", "length", "noise", "drafted",
          "drafted_parents", "ancestors", "depth", "ends"});
  define(m, "draft_tree", &draft_tree,
         {"history", "lengths", "denoised", "adjacency", "habits", "suffixes", "corpus",
          "corpus_suffixes", "factors", "max_depth", "foresight", "tokens", "parents",
          "probability", "sources"});

  // The constants that Python shares, from the headers that own them.
  m.attr("RETRIEVAL") = kRetrieval;
  m.attr("GUESSES") = kGuesses;
  m.attr("LEVELS") = kLevels;
  m.attr("ORDERS") = kOrders;
  m.attr("CEILING") = kCeiling;
  py::tuple edges(kLevels - 1), suffixes(kSuffixes);
  for (int i = 0; i < kLevels - 1; ++i) edges[i] = edges_of_levels().at[i];
  for (int i = 0; i < kSuffixes; ++i) suffixes[i] = suffix_length(i);
  m.attr("EDGES") = edges;
  m.attr("SUFFIXES") = suffixes;

  m.attr("DENOISED") = static_cast<int>(kDenoised);
  m.attr("ADJACENCY") = static_cast<int>(kAdjacency);
  m.attr("SUFFIX") = static_cast<int>(kSuffix);
  m.attr("NOISE") = static_cast<int>(kNoise);

  m.attr("FACTORS") = kFactors;
  m.attr("FACTORS_BIAS") = kBiasAt;
  m.attr("FACTORS_DENOISED") = kDenoisedAt;
  m.attr("FACTORS_ADJACENCY") = kAdjacencyAt;
  m.attr("FACTORS_SUFFIX") = kSuffixAt;
}

}  // namespace msn
