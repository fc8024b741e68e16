// The tokens after the longest earlier match of the text's end: one block a row, threads side by
// side over the places where a match may end, the most recent first, then the block's maximum of
// (length, place). A thread stops at a match that no earlier place can beat.
// A length outside [0, C] counts as the nearest one inside. Bytes per row: reads 8 bytes a token
// once (the longer compares hit L1), writes 8 bytes a token wanted. The work is at most
// C * max_ngram compares; in text it is close to C.
#include "cuda/common.cuh"
#include "drafting.h"
#include "drafting_ops.h"

namespace msn {

namespace {

// One block has to hide the latency of a whole row: as many threads as a block can have.
constexpr int kThreads = 1024;

__global__ void __launch_bounds__(kThreads)
    lookup_ngram_kernel(const int64_t* history, int64_t capacity, const int64_t* lengths,
                        int64_t max_ngram, int64_t wanted, int64_t* tokens, int64_t* matched) {
  __shared__ int64_t scratch[kWarp];
  const int64_t row = blockIdx.x;
  const int64_t* text = history + row * capacity;
  const int64_t length = clamp(lengths[row], 0, capacity);
  int64_t best = 0;
  for (int64_t end = length - 1 - threadIdx.x; end > 0; end -= kThreads) {
    const int size = match_length(text, length, end, max_ngram);
    const int64_t key = match_key(size, end);
    best = key > best ? key : best;
    if (size == (end < max_ngram ? end : max_ngram)) break;
  }
  best = block_max(best, scratch);
  if (threadIdx.x == 0) matched[row] = match_size(best);
  for (int64_t i = threadIdx.x; i < wanted; i += kThreads) {
    const int64_t at = match_end(best) + i;
    tokens[row * wanted + i] = best && at < length ? text[at] : -1;
  }
}

}  // namespace

void LookupNgram::on_cuda(void* stream) const {
  const int64_t batch = history.shape[0];
  if (batch == 0) return;
  const DeviceGuard guard("lookup_ngram", history);
  launch("lookup_ngram", lookup_ngram_kernel, grid_x("lookup_ngram", batch), kThreads, 0, stream,
         history.as<int64_t>(), history.shape[1], lengths.as<int64_t>(), max_ngram, tokens.shape[1],
         tokens.as<int64_t>(), matched.as<int64_t>());
}

}  // namespace msn
