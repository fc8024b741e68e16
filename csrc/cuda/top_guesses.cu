// The eight likeliest tokens of every row of logits: one block a row. Every thread keeps the best
// eight of its share in registers; then eight times the block's maximum of the threads' best is
// taken from the thread that has it. A value and its place are one number, largest first and the
// lowest place of equals. Eight threads turn the eight into levels, summed in one order.
// Bytes per row: reads the V logits once, writes 32.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../best_first.h"
#include "common.cuh"

namespace msn::cuda {

namespace {

// One block has to hide the latency of a whole row, as in lookup_ngram.
constexpr int kThreads = 1024;
constexpr int kInFlight = 8;  // loads of a thread
constexpr int64_t kNone = INT64_MIN;

__device__ uint32_t float_bits(float x) { return __float_as_uint(x); }
__device__ uint32_t float_bits(__half x) { return __float_as_uint(__half2float(x)); }
__device__ uint32_t float_bits(__nv_bfloat16 x) { return __float_as_uint(__bfloat162float(x)); }

// Above: the value as an integer of the same order (both zeros 0, every NaN the largest). Below: the place.
__device__ int64_t key_of(uint32_t bits, int at) {
  const int32_t magnitude = static_cast<int32_t>(bits & 0x7fffffffu);
  const int32_t order = magnitude > 0x7f800000 ? INT32_MAX : bits >> 31 ? -magnitude : magnitude;
  return order * (int64_t{1} << 32) + (INT32_MAX - at);
}
__device__ int key_place(int64_t key) { return INT32_MAX - static_cast<int>(key & 0xffffffff); }
__device__ double key_value(int64_t key) {
  const int32_t order = static_cast<int32_t>(key >> 32);
  return __uint_as_float(order < 0 ? 0x80000000u | static_cast<uint32_t>(-order) : static_cast<uint32_t>(order));
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    top_guesses_kernel(const T* logits, int64_t stride, int vocabulary, int32_t* guesses) {
  __shared__ int64_t scratch[kWarp], winners[kGuesses];
  __shared__ double weights[kGuesses];
  const T* row = logits + blockIdx.x * stride;
  const int thread = threadIdx.x;

  int64_t best[kGuesses];
#pragma unroll
  for (int i = 0; i < kGuesses; ++i) best[i] = kNone;
  for (int from = thread; from < vocabulary; from += kInFlight * kThreads) {
    int64_t key[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int at = from + j * kThreads;
      key[j] = at < vocabulary ? key_of(float_bits(row[at]), at) : kNone;
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      if (key[j] <= best[kGuesses - 1]) continue;
      best[kGuesses - 1] = key[j];
#pragma unroll
      for (int i = kGuesses - 1; i > 0; --i) {
        const int64_t low = best[i], high = best[i - 1];
        best[i] = low < high ? low : high;
        best[i - 1] = low < high ? high : low;
      }
    }
  }

  for (int rank = 0; rank < kGuesses; ++rank) {
    const int64_t winner = block_max(best[0], scratch);
    if (thread == 0) winners[rank] = winner;
    if (best[0] != winner) continue;
#pragma unroll
    for (int i = 0; i < kGuesses - 1; ++i) best[i] = best[i + 1];
    best[kGuesses - 1] = kNone;
  }
  __syncthreads();
  const int64_t mine = thread < kGuesses ? winners[thread] : kNone;
  if (thread < kGuesses) weights[thread] = mine != kNone ? exp(key_value(mine) - key_value(winners[0])) : 0.0;
  __syncthreads();
  if (thread < kGuesses) {
    double total = 0;
    for (int i = 0; i < kGuesses; ++i) total += weights[i];
    guesses[int64_t{blockIdx.x} * kGuesses + thread] =
        mine != kNone ? pack_guess(key_place(mine), level_of(weights[thread] / total)) : -1;
  }
}

}  // namespace

void top_guesses(const Tensor& logits, const Tensor& guesses, void* stream) {
  if (logits.shape[0] == 0) return;
  const DeviceGuard guard("top_guesses", logits);
  const auto run_as = [&](auto element) {
    using T = decltype(element);
    launch("top_guesses", top_guesses_kernel<T>, grid_x("top_guesses", logits.shape[0]), kThreads, 0, stream,
           logits.as<T>(), logits.strides[0], static_cast<int>(logits.shape[1]), guesses.as<int32_t>());
  };
  switch (logits.dtype) {
    case DType::kFloat32: return run_as(float{});
    case DType::kFloat16: return run_as(__half{});
    case DType::kBFloat16: return run_as(__nv_bfloat16{});
    default:
      throw std::invalid_argument(
          "logits has dtype float64; expected float16, bfloat16 or float32 (float64 is CPU only)");
  }
}

}  // namespace msn::cuda
