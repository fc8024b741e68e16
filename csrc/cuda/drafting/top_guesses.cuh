// The eight likeliest tokens of a row of logits, found by one block, and what became of them as
// guesses.
//
// Every thread keeps the best eight of its share in registers; then eight times the block's maximum
// of the threads' best is taken from the thread that has it. A value and its place are one number,
// largest first and the lowest place of equals. Eight threads turn the eight into levels, summed in
// one order. Rows of whole 16 bytes are read so many at a time, others value by value.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "best_first.h"
#include "cuda/common.cuh"

namespace msn {

constexpr int kTopThreads =
    1024;  // one block has to hide the latency of a whole row, as in lookup_ngram
constexpr int64_t kNoKey = INT64_MIN;

__device__ inline uint32_t float_bits(float x) { return __float_as_uint(x); }
__device__ inline uint32_t float_bits(__half x) { return __float_as_uint(__half2float(x)); }
__device__ inline uint32_t float_bits(__nv_bfloat16 x) {
  return __float_as_uint(__bfloat162float(x));
}

// The value as an integer of the same order (both zeros 0, every NaN the largest).
__device__ inline int32_t order_of(uint32_t bits) {
  const int32_t magnitude = static_cast<int32_t>(bits & 0x7fffffffu);
  return magnitude > 0x7f800000 ? INT32_MAX : bits >> 31 ? -magnitude : magnitude;
}
// Above: the order. Below: the place.
__device__ inline int64_t key_of(int32_t order, int at) {
  return order * (int64_t{1} << 32) + (INT32_MAX - at);
}
__device__ inline int key_place(int64_t key) {
  return INT32_MAX - static_cast<int>(key & 0xffffffff);
}
__device__ inline double key_value(int64_t key) {
  const int32_t order = static_cast<int32_t>(key >> 32);
  return __uint_as_float(order < 0 ? 0x80000000u | static_cast<uint32_t>(-order)
                                   : static_cast<uint32_t>(order));
}

// A thread's best so far, largest first.
struct TopKeys {
  int64_t best[kGuesses];

  __device__ TopKeys() {
#pragma unroll
    for (int64_t& key : best) key = kNoKey;
  }
  __device__ void offer(uint32_t bits, int at) {
    const int32_t order = order_of(bits);
    if (order <= static_cast<int32_t>(best[kGuesses - 1] >> 32))
      return;  // of equals the first stays
    best[kGuesses - 1] = key_of(order, at);
#pragma unroll
    for (int i = kGuesses - 1; i > 0; --i) {
      const int64_t low = best[i], high = best[i - 1];
      best[i] = low < high ? low : high;
      best[i - 1] = low < high ? high : low;
    }
  }
  __device__ void drop_first() {
#pragma unroll
    for (int i = 0; i < kGuesses - 1; ++i) best[i] = best[i + 1];
    best[kGuesses - 1] = kNoKey;
  }
};

struct TopShared {
  int64_t scratch[kWarp], winners[kGuesses];
  double weights[kGuesses];
};

// The guess that thread i < kGuesses is to write, -1 where there are fewer tokens. All kTopThreads
// call it.
template <typename T>
__device__ int32_t top_of_row(const T* row, int vocabulary, bool wide, TopShared& shared) {
  const int thread = threadIdx.x;
  TopKeys keys;
  if (wide) {
    constexpr int kValues = 16 / sizeof(T), kInFlight = 4;
    for (int from = thread * kValues; from < vocabulary;
         from += kInFlight * kTopThreads * kValues) {
      uint4 raw[kInFlight];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        const int at = from + j * kTopThreads * kValues;
        if (at < vocabulary) raw[j] = *reinterpret_cast<const uint4*>(row + at);
      }
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        const int at = from + j * kTopThreads * kValues;
        const T* values = reinterpret_cast<const T*>(&raw[j]);
        if (at < vocabulary)
#pragma unroll
          for (int i = 0; i < kValues; ++i) keys.offer(float_bits(values[i]), at + i);
      }
    }
  } else {
    constexpr int kInFlight = 8;
    for (int from = thread; from < vocabulary; from += kInFlight * kTopThreads) {
      uint32_t bits[kInFlight];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        const int at = from + j * kTopThreads;
        bits[j] = at < vocabulary ? float_bits(row[at]) : 0;
      }
#pragma unroll
      for (int j = 0; j < kInFlight; ++j)
        if (from + j * kTopThreads < vocabulary) keys.offer(bits[j], from + j * kTopThreads);
    }
  }

  for (int rank = 0; rank < kGuesses; ++rank) {
    const int64_t winner = block_max(keys.best[0], shared.scratch);
    if (thread == 0) shared.winners[rank] = winner;
    if (keys.best[0] == winner) keys.drop_first();
  }
  __syncthreads();
  const int64_t mine = thread < kGuesses ? shared.winners[thread] : kNoKey;
  if (thread < kGuesses)
    shared.weights[thread] =
        mine != kNoKey ? exp(key_value(mine) - key_value(shared.winners[0])) : 0.0;
  __syncthreads();
  if (mine == kNoKey) return -1;
  double total = 0;
  for (int i = 0; i < kGuesses; ++i) total += shared.weights[i];
  return pack_guess(key_place(mine), level_of(shared.weights[thread] / total));
}

// Calls `f` with a value of the logits' type.
template <typename F>
void with_logits(const Tensor& logits, const F& f) {
  switch (logits.dtype) {
    case DType::kFloat32: return f(float{});
    case DType::kFloat16: return f(__half{});
    case DType::kBFloat16: return f(__nv_bfloat16{});
    default:
      throw std::invalid_argument(
          "logits has dtype float64; expected float16, bfloat16 or float32 (float64 is CPU only)");
  }
}

}  // namespace msn
