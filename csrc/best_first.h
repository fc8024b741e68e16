// The rules of best-first drafting, one value at a time: the tokens that its tables know after a
// context, and the factors of each. Inline for host and device, like tree.h; msn_ext/ops/reference
// says the same in Python. Sums and products are float64 and in a fixed order, and these files are
// compiled without fused multiply-add, so every backend builds the same tree.
#pragma once
#include "random.h"
#include "tree.h"

namespace msn {

constexpr int kGuesses = 8;   // of the model, kept of every row of logits
constexpr int kLevels = 12;   // of probability
constexpr int kOrders = 3;    // contexts of 1, 2 and 3 tokens
constexpr int kSuffixes = 8;  // n-grams that are indexed; the longest has kContext tokens
constexpr int kContext = 16;
constexpr int64_t kMaxVocabulary = int64_t{1} << 27;  // so that a guess fits its 32 bits
constexpr double kCeiling = 0.99;  // of a child's probability: it always comes after its parent

enum Source : int32_t { kDenoised = 1, kAdjacency = 2, kSuffix = 4, kNoise = 8 };

// The factors: where each table begins, with its dimensions.
constexpr int kBiasAt = 0;  // [highest order known here, longest suffix known here + 1 or 0]
constexpr int kDenoisedAt =
    kBiasAt + (kOrders + 1) * (kSuffixes + 1);  // [depth <= 2, any order known, level]
constexpr int kAdjacencyAt =
    kDenoisedAt + 3 * 2 * kLevels;  // [order, highest order known here, level]; where the order is
                                    // above the highest, habits guess
constexpr int kSuffixAt =
    kAdjacencyAt + kOrders * (kOrders + 1) * kLevels;  // [n-gram, rank <= 2, highest order]
constexpr int kFactors = kSuffixAt + kSuffixes * 3 * (kOrders + 1);

// Tokens that may be listed after a context, each in a slot of its own: the denoised guesses, the
// remembered ones of every order, the suffixes from the longest to the shortest.
constexpr int kListed = kGuesses * (1 + kOrders) + kSuffixes;

// 1, 2, 3, 4, 6, 8, 12, 16: a byte each, since an array would lie on a GPU thread's stack.
MSN_HD int suffix_length(int index) {
  return static_cast<int>(0x100c080604030201ull >> (8 * index) & 0xff);
}

// The probability at which each level but the lowest begins.
struct Edges {
  double at[kLevels - 1];
};
MSN_HD constexpr Edges edges_of_levels() {
  return {{0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.96, 0.985}};
}

// A guess is a token and its level of probability among the kGuesses, in one number; -1: none.
MSN_HD int32_t pack_guess(int64_t token, int level) {
  return static_cast<int32_t>(token * 16 + level);
}
MSN_HD int64_t guess_token(int32_t guess) { return guess >> 4; }
MSN_HD int guess_level(int32_t guess) { return guess & 15; }
MSN_HD int level_of(double probability) {
  constexpr Edges edges = edges_of_levels();
  int level = 0;
  for (int i = 0; i < kLevels - 1; ++i) level += probability >= edges.at[i];
  return level;
}

// The hash of an n-gram and one more token after it; that of no tokens is 0.
MSN_HD uint64_t extend_hash(uint64_t hash, int64_t token) {
  return splitmix64(hash ^ static_cast<uint64_t>(token));
}
// The hash of a context's n newest tokens.
MSN_HD uint64_t hash_of(const int64_t* context, int n) {
  uint64_t hash = 0;
  while (n > 0) hash = extend_hash(hash, context[--n]);
  return hash;
}
// The hashes of the 1, 2, .. kContext newest tokens, after one more: each extends one of those
// before it, and none waits for another.
MSN_HD void extend_hashes(const uint64_t* before, int64_t token, uint64_t* hashes) {
  for (int n = kContext - 1; n > 0; --n) hashes[n] = extend_hash(before[n - 1], token);
  hashes[0] = extend_hash(0, token);
}
// The slot of a hash. Most tables have a power of two of them, which no division is needed for.
MSN_HD int64_t slot_of(uint64_t hash, int64_t slots) {
  const uint64_t all = static_cast<uint64_t>(slots), last = all - 1;
  return static_cast<int64_t>(all & last ? hash % all : hash & last);
}
// Tells contexts in one slot of a table apart; 0 is an empty slot.
MSN_HD int32_t hash_check(uint64_t hash) {
  return static_cast<int32_t>(static_cast<uint32_t>(hash >> 32) | 1u);
}

// The tokens up to and including `node`, newest first: its path, then the text, of which the root
// is the end. Returns how many there are, at most `most`.
MSN_HD int context_of(const int64_t* tokens, const int32_t* parents, int node,
                      const int64_t* history, int64_t length, int most, int64_t* context) {
  int count = 0;
  for (; node > 0 && count < most; node = parent_of(parents, node)) context[count++] = tokens[node];
  for (int64_t at = length - 1; at >= 0 && count < most; --at) context[count++] = history[at];
  return count;
}

// Everything that drafting may read about one row. All rows share the adjacency table, the habits,
// the corpus and its suffixes.
struct Sources {
  const int32_t* denoised;  // [depths, kGuesses]
  int64_t depths;
  const int32_t* adjacency;  // [kOrders, adjacency_slots, 1 + kGuesses]
  int64_t adjacency_slots;
  const int32_t* habits;  // [kOrders, habit_slots, 1 + kGuesses]
  int64_t habit_slots;
  const int32_t* suffixes;  // [kSuffixes, suffix_slots]
  int64_t suffix_slots;
  const int64_t* history;  // [length]
  int64_t length;
  const int32_t* corpus;  // [corpus_length]; -1 between texts
  int64_t corpus_length;
  const int32_t* corpus_suffixes;  // [kSuffixes, corpus_slots]
  int64_t corpus_slots;
  const double* factors;  // [kFactors]
  int64_t next_factors;   // from a row's factors to those of the next; 0: all have the same
};

// The sources of a row, given those of row 0 of a batch whose histories have room for `capacity`.
MSN_HD Sources sources_of_row(Sources from, int64_t row, int64_t capacity, int64_t length) {
  from.denoised += row * from.depths * kGuesses;
  from.suffixes += row * kSuffixes * from.suffix_slots;
  from.factors += row * from.next_factors;
  from.history += row * capacity;
  from.length = length;
  return from;
}

// The entries of the tables for one context.
struct Known {
  const int32_t* guesses[kOrders];  // remembered, else by habit; null: nothing
  int highest;                      // order that is remembered, + 1; 0: none
  int64_t next[kSuffixes];          // token after the n-gram's last place, in the text, else in the
                                    // corpus; -1: none, or a longer one has it
  int rank[kSuffixes];              // among the different tokens, from the longest n-gram on
  int longest;                      // n-gram that is known, + 1; 0: none
};

// The place after the last occurrence in a text of a context's n newest tokens, which have this
// hash, by the text's `suffixes` of this n; inside the text whatever these hold. 0: none.
template <typename Token>
MSN_HD int64_t last_place(const Token* text, int64_t length, const int32_t* suffixes, int64_t slots,
                          uint64_t hash, const int64_t* context, int n) {
  if (slots <= 0) return 0;
  const int64_t end = suffixes[slot_of(hash, slots)];
  if (end < n || end >= length) return 0;
  bool same = true;
  for (int i = 0; i < n; ++i)
    same &= text[end - 1 - i] == context[i];  // all of them: loads that do not wait for each other
  return same ? end : 0;
}

// The guesses that a table [kOrders, slots, 1 + kGuesses] has after a context's n newest tokens,
// which have this hash; null: none.
MSN_HD const int32_t* guesses_in(const int32_t* table, int64_t slots, uint64_t hash, int n) {
  if (slots <= 0) return nullptr;
  const int32_t* row = table + ((n - 1) * slots + slot_of(hash, slots)) * (1 + kGuesses);
  return row[0] == hash_check(hash) ? row + 1 : nullptr;
}

// The token after the last place of a context's n-gram of this level and hash, in the text, else
// in the corpus, which n-grams of `tokens` alone are looked up in; -1: none.
MSN_HD int64_t following(const Sources& from, const int64_t* context, uint64_t hash, bool tokens,
                         int level) {
  const int n = suffix_length(level);
  int64_t end = last_place(from.history, from.length, from.suffixes + level * from.suffix_slots,
                           from.suffix_slots, hash, context, n);
  if (end > 0) return from.history[end];
  if (!tokens) return -1;
  const int32_t* suffixes = from.corpus_suffixes + level * from.corpus_slots;
  end = last_place(from.corpus, from.corpus_length, suffixes, from.corpus_slots, hash, context, n);
  return end > 0 ? from.corpus[end] : -1;
}

// `hashes`: of the context's newest tokens, as extend_hashes has them.
MSN_HD void look_up(const Sources& from, const int64_t* context, const uint64_t* hashes, int count,
                    Known& known) {
  known.highest = known.longest = 0;
  for (int order = 0; order < kOrders; ++order) known.guesses[order] = nullptr;
  bool tokens = true;  // and not what stands between the texts of a corpus
  for (int n = 1, level = 0; level < kSuffixes; ++n) {
    const uint64_t hash = hashes[n - 1];
    if (n <= count) {
      tokens &= context[n - 1] >= 0;
      if (n <= kOrders) {
        known.guesses[n - 1] = guesses_in(from.adjacency, from.adjacency_slots, hash, n);
        if (known.guesses[n - 1])
          known.highest = n;
        else
          known.guesses[n - 1] = guesses_in(from.habits, from.habit_slots, hash, n);
      }
    }
    if (n != suffix_length(level)) continue;
    known.next[level] = n <= count ? following(from, context, hash, tokens, level) : -1;
    if (known.next[level] >= 0) known.longest = level + 1;
    ++level;
  }
  int different = 0;
  for (int level = kSuffixes - 1; level >= 0; --level) {
    for (int longer = level + 1; longer < kSuffixes; ++longer)
      if (known.next[longer] == known.next[level]) known.next[level] = -1;
    known.rank[level] = different;
    different += known.next[level] >= 0;
  }
}

// Places of factors. `highest`, `longest`: what is known here, as in Known.
MSN_HD int bias_at(int highest, int longest) {
  return kBiasAt + highest * (kSuffixes + 1) + longest;
}
MSN_HD int denoised_at(int depth, int highest, int level) {
  return kDenoisedAt + ((depth < 2 ? depth : 2) * 2 + (highest > 0)) * kLevels + level;
}
MSN_HD int adjacency_at(int order, int highest, int level) {
  return kAdjacencyAt + (order * (kOrders + 1) + highest) * kLevels + level;
}
MSN_HD int suffix_at(int ngram, int rank, int highest) {
  return kSuffixAt + (ngram * 3 + (rank < 2 ? rank : 2)) * (kOrders + 1) + highest;
}

// One of the listed tokens: its factor and where it comes from. Token -1: none here.
struct Listed {
  int64_t token;
  int factor;
  int32_t source;
};

MSN_HD Listed listed_at(const Sources& from, const Known& known, int depth, int at) {
  if (at < kGuesses) {
    if (depth >= from.depths) return {-1, 0, 0};
    const int32_t guess = from.denoised[depth * kGuesses + at];
    if (guess < 0) return {-1, 0, 0};
    const int factor = denoised_at(depth, known.highest, guess_level(guess));
    return {guess_token(guess), factor, kDenoised};
  }
  at -= kGuesses;
  if (at < kGuesses * kOrders) {
    const int order = at / kGuesses;
    const int32_t guess = known.guesses[order] ? known.guesses[order][at % kGuesses] : -1;
    if (guess < 0) return {-1, 0, 0};
    const int factor = adjacency_at(order, known.highest, guess_level(guess));
    return {guess_token(guess), factor, kAdjacency};
  }
  const int level = kSuffixes - 1 - (at - kGuesses * kOrders);
  if (known.next[level] < 0) return {-1, 0, 0};
  return {known.next[level], suffix_at(level, known.rank[level], known.highest), kSuffix};
}

MSN_HD double bias_of(const Sources& from, const Known& known) {
  return from.factors[bias_at(known.highest, known.longest)];
}

// The token after `parent` at `depth` where nothing is listed: one of the text, by counter.
MSN_HD int64_t noise_token(const Sources& from, int depth, int parent) {
  return from.history[counter_bits(0, 0, from.length + depth, parent) % from.length];
}

}  // namespace msn
