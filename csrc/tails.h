// The rules of tails, one value at a time: chains of `length` noise rows each, which stand behind
// the `nodes` nodes of a draft, below the nodes where the accepted path likely ends. Inline for
// host and device, like tree.h.
#pragma once
#include "tree.h"

namespace msn {

// The node above a noise row; -1: none.
MSN_HD int32_t above_in_tail(const int64_t* ends, int nodes, int length, int row) {
  const int at = row - nodes;
  return at % length ? row - 1 : static_cast<int32_t>(ends[at / length]);
}

// The token of the noise row `at`, counted from the first one: `noise`, or with -1 one of the text,
// which has `size` tokens.
MSN_HD int64_t tail_token(int64_t noise, const int64_t* history, int64_t size, int at) {
  return noise >= 0 ? noise : history[(at + 1) * int64_t{7919} % size];
}

// The first tail below a node; -1: none.
MSN_HD int tail_below(const int64_t* ends, int tails, int64_t node) {
  for (int tail = 0; node >= 0 && tail < tails; ++tail)
    if (ends[tail] == node) return tail;
  return -1;
}

// The row of a draft of `rows` rows whose guesses are kept for a depth: one of the tail, else (-1)
// one of the continuation; -1: none.
MSN_HD int64_t kept_row(const int64_t* continuation, int rows, int tails, int length, int tail,
                        int depth) {
  if (tail < 0) return depth < rows ? continuation[depth] : -1;
  return depth < length ? rows - (tails - tail) * length + depth : -1;
}

}  // namespace msn
