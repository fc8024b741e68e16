// The places and the tokens of noise in a training sample, one value at a time. Inline for host and
// device, like tree.h; msn_ext/ops/reference says the same in Python.
#pragma once
#include <cstdint>

#include "random.h"

namespace msn {

constexpr int64_t kNoLabel = -100;     // torch's ignore_index: not part of a response
constexpr int64_t kMaxSegment = 64;    // tokens of noise in a row
constexpr int64_t kMaxSegments = 256;  // of one sample
constexpr int kAttempts = 64;          // to draw a token that may be noise

// One sample: tokens [begin, end) of a row.
struct Sample {
  const int64_t *tokens, *labels;
  int64_t begin, end;
};

struct NoiseOptions {
  int64_t seed = 0, length = 4, segments = 1;
  double random = 0;  // share of tokens drawn from the vocabulary; the others from the text before
  int64_t vocabulary = 0;
  bool apart = true;  // segments do not overlap; else their starts differ
};

// The first token of a sample has nothing before it, and is never noise.
MSN_HD bool in_response(const Sample& in, int64_t at) {
  return at > in.begin && at < in.end && in.labels[at] != kNoLabel;
}

// Tokens of a segment that starts here, at most `length`; it ends with the response.
MSN_HD int64_t segment_size(const Sample& in, int64_t at, int64_t length) {
  int64_t size = 0;
  while (size < length && in_response(in, at + size)) ++size;
  return size;
}

// True if a segment may start here: it is whole, or this is all of a response that is too short.
MSN_HD bool may_start(const Sample& in, int64_t at, int64_t length) {
  const int64_t size = segment_size(in, at, length);
  return size == length || (size > 0 && !in_response(in, at - 1));
}

// True if a segment that starts at `at` may not stand beside one of `size` tokens that starts at
// `other`.
MSN_HD bool clashes(const Sample& in, int64_t at, int64_t other, int64_t size,
                    const NoiseOptions& options) {
  if (!options.apart) return at == other;
  return at < other + size && other < at + segment_size(in, at, options.length);
}

// A token's part of the sum that identifies a sample, whatever batch it comes in.
MSN_HD uint64_t identity_of(int64_t token, int64_t place) {
  return splitmix64(static_cast<uint64_t>(token) ^ splitmix64(static_cast<uint64_t>(place)));
}

MSN_HD bool contains(const int64_t* sorted, int64_t count, int64_t value) {
  int64_t low = 0;
  while (low < count) {
    const int64_t middle = low + (count - low) / 2;
    if (sorted[middle] == value) return true;
    if (sorted[middle] < value)
      low = middle + 1;
    else
      count = middle;
  }
  return false;
}

// The noise of one place: uniform over the clean tokens before it (Eq. 4) or over the vocabulary,
// but none of `keep`; the token itself where it is one of these.
MSN_HD int64_t draw_token(const Sample& in, int64_t at, int64_t key, int64_t segment, int64_t place,
                          const NoiseOptions& options, const int64_t* keep, int64_t kept) {
  if (contains(keep, kept, in.tokens[at])) return in.tokens[at];
  const int64_t coin = counter_bits(key, segment, 1 + place, -1) >> 10;
  const bool random = static_cast<double>(coin) < options.random * 9007199254740992.0;  // 2^53
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    const int64_t bits = counter_bits(key, segment, 1 + place, attempt);
    const int64_t token =
        random ? bits % options.vocabulary : in.tokens[in.begin + bits % (at - in.begin)];
    if (!contains(keep, kept, token)) return token;
  }
  return in.tokens[at];
}

}  // namespace msn
