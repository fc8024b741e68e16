// Numbers of a model's types as those that sums are made in, and sums and maxima over a warp.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "cuda/common.cuh"

namespace msn {

// Sums are float32, of float64 float64.
template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ inline double to_float(double x) { return x; }  // the one that is more
__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void from_float(double x, double* to) { *to = x; }
__device__ inline void from_float(float x, float* to) { *to = x; }
__device__ inline void from_float(float x, __half* to) { *to = __float2half(x); }
__device__ inline void from_float(float x, __nv_bfloat16* to) { *to = __float2bfloat16(x); }

template <typename S>
__device__ S warp_max(S x) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    x = fmax(x, __shfl_xor_sync(kWholeWarp, x, distance));
  return x;
}
template <typename S>
__device__ S warp_sum(S x) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    x += __shfl_xor_sync(kWholeWarp, x, distance);
  return x;
}

}  // namespace msn
