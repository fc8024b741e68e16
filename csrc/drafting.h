// The rules by which guesses are found in a text and put into a tree of fixed shape, one value at a
// time: suffix matching and the fill rule. Inline for host and device, like tree.h.
#pragma once
#include <cstdint>

#include "random.h"
#include "tree.h"

namespace msn {

// Rank of a node that takes its token from the retrieved continuation; ranks >= 0 are places in
// the top-k of the denoised logits at the node's depth.
constexpr int32_t kRetrieval = -1;

// Length (<= max_ngram) of the longest common suffix of history[:end] and history[:length].
MSN_HD int match_length(const int64_t* history, int64_t length, int64_t end, int64_t max_ngram) {
  int64_t k = 0;
  const int64_t limit = end < max_ngram ? end : max_ngram;
  while (k < limit && history[end - 1 - k] == history[length - 1 - k]) ++k;
  return static_cast<int>(k);
}

// "Longest match wins, most recent breaks ties", as one number to maximise; 0: no match.
MSN_HD int64_t match_key(int matched, int64_t end) {
  return matched ? (static_cast<int64_t>(matched) << 40) | end : 0;
}
MSN_HD int64_t match_end(int64_t key) { return key & ((int64_t{1} << 40) - 1); }
MSN_HD int64_t match_size(int64_t key) { return key >> 40; }

struct FillSources {
  const int64_t* candidates;  // [depths, ranks] of this row; -1: none
  int64_t depths, ranks;
  const int64_t* retrieved;  // [retrieved_length] of this row; -1: none
  int64_t retrieved_length;
  const int64_t* history;  // [length] of this row
  int64_t length;
};

// The sources of a row, given those of row 0 of a batch whose histories have room for `capacity`.
MSN_HD FillSources sources_of_row(FillSources from, int64_t row, int64_t capacity, int64_t length) {
  from.candidates += row * from.depths * from.ranks;
  from.retrieved += row * from.retrieved_length;
  from.history += row * capacity;
  from.length = length;
  return from;
}

// The token of one node: its candidate, else noise from the tokens so far. The root repeats the
// last token; so does padding, which is not read.
MSN_HD int64_t fill_node(const FillSources& from, int node, int32_t depth, int32_t rank,
                         int64_t seed, int64_t row) {
  if (node == 0 || depth <= 0) return from.history[from.length - 1];
  int64_t token = -1;
  if (rank == kRetrieval) {
    if (depth <= from.retrieved_length) token = from.retrieved[depth - 1];
  } else if (depth <= from.depths && rank >= 0 && rank < from.ranks) {
    token = from.candidates[(depth - 1) * from.ranks + rank];
  }
  if (token >= 0) return token;
  return from.history[counter_bits(seed, row, from.length + depth, node) % from.length];
}

}  // namespace msn
