// Rows times a matrix of few rows, as an adapter has: read row by row, since panels of outputs
// would be padding for the most part, and a few sums at once for the instructions' latency.
#pragma once
#include "cpu/layers/functions.h"
#include "cpu/layers/kernels.h"

namespace msn::MSN_ISA {

// Two vectors of a row of the matrix; of bfloat16 the even numbers, then the odd ones.
template <typename T>
void expand_two(const T* from, Vec<T>& first, Vec<T>& second) {
  first = load(from);
  second = load(from + Vector<T>::size);
}
inline void expand_two(const BFloat16* from, Vec<float>& even, Vec<float>& odd) {
  typedef int32_t Pairs __attribute__((vector_size(kVectorBytes)));
  Pairs pairs;
  std::memcpy(&pairs, from, sizeof pairs);
  even = bit_cast<Vec<float>>(pairs << 16);
  odd = bit_cast<Vec<float>>(pairs & static_cast<int32_t>(0xffff0000));
}

// S: how the matrix is stored.
template <typename S>
void narrow_linear(const NarrowLinear& stage, Scratch& scratch) {
  using T = decltype(widen(S{}));
  constexpr int kLanes = Vector<T>::size, kStep = 2 * kLanes, kAtOnce = 4;
  constexpr bool kPairs = sizeof(S) < sizeof(T);
  static_assert(kNarrowStep % kStep == 0);
  const int64_t size = stage.weights.inputs, outputs = stage.weights.outputs;
  const int64_t stride = narrow_stride(size);
  // All of it at once: its rows are too short for the hardware to see where they go.
  const char* data = static_cast<const char*>(stage.weights.data);
  for (int64_t at = 0; at < outputs * stride * static_cast<int64_t>(sizeof(S)); at += 64)
    __builtin_prefetch(data + at, 0, 2);
  T* x = reinterpret_cast<T*>(scratch.get(2 * stride * sizeof(T)));
  T* ordered = kPairs ? x + stride : x;  // as expand_two orders the matrix
  for (int64_t r = 0; r < stage.rows; ++r) {
    const T* from = static_cast<const T*>(stage.x) + stage.pick[r] * stage.x_stride;
    if (stage.norm.kind != Norm::kNone)
      normalise(stage.norm, from, size, x);
    else
      std::memcpy(x, from, size * sizeof(T));
    for (int64_t i = size; i < stride; ++i) x[i] = 0;
    if constexpr (kPairs)
      for (int64_t k = 0; k < stride; k += kStep)
        for (int i = 0; i < kLanes; ++i) {
          ordered[k + i] = x[k + 2 * i];
          ordered[k + kLanes + i] = x[k + 2 * i + 1];
        }
    T* out = static_cast<T*>(stage.out) + r * outputs;
    for (int64_t o = 0; o < outputs; o += kAtOnce) {
      const S* row[kAtOnce];
      Vec<T> sum[kAtOnce][2] = {};
      for (int i = 0; i < kAtOnce; ++i) {  // the last row again, where there are no more
        const int64_t at = o + i < outputs ? o + i : outputs - 1;
        row[i] = static_cast<const S*>(stage.weights.data) + at * stride;
      }
      for (int64_t k = 0; k < stride; k += kStep) {
        const Vec<T> first = load(ordered + k), second = load(ordered + k + kLanes);
#pragma GCC unroll 4
        for (int i = 0; i < kAtOnce; ++i) {
          Vec<T> w[2];
          expand_two(row[i] + k, w[0], w[1]);
          sum[i][0] = fused(w[0], first, sum[i][0]);
          sum[i][1] = fused(w[1], second, sum[i][1]);
        }
      }
      for (int i = 0; i < kAtOnce && o + i < outputs; ++i)
        out[o + i] = sum_of<T>(sum[i][0] + sum[i][1]);
    }
  }
}

}  // namespace msn::MSN_ISA
