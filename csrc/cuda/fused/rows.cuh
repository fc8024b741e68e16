// What the CUDA kernels of fused_ops.h share: numbers of a model as those that sums are made in,
// whole vectors of them, and sums over a block or a warp, in one order.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/common.cuh"
#include "fused.h"
#include "fused_ops.h"

namespace msn {

__device__ inline double widen(double x) { return x; }
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void narrow(double x, double* to) { *to = x; }
__device__ inline void narrow(float x, float* to) { *to = x; }
__device__ inline void narrow(float x, __half* to) { *to = __float2half(x); }
__device__ inline void narrow(float x, __nv_bfloat16* to) { *to = __float2bfloat16(x); }

// What sums of T are made in.
template <typename T>
struct SumOf {
  using Type = float;
};
template <>
struct SumOf<double> {
  using Type = double;
};
template <typename T>
using Sum = typename SumOf<T>::Type;

// Numbers that are read at once.
template <typename T, int kLanes>
struct alignas(kLanes * sizeof(T)) Pack {
  T at[kLanes];
};
template <int kLanes, typename T>
__device__ Pack<T, kLanes> load(const T* from) {
  return *reinterpret_cast<const Pack<T, kLanes>*>(from);
}
template <typename T, typename F, int kLanes>
__device__ void widen(const Pack<T, kLanes>& pack, F (&numbers)[kLanes]) {
  for (int j = 0; j < kLanes; ++j) numbers[j] = widen(pack.at[j]);
}
// Returns them as they were rounded.
template <typename T, typename F, int kLanes>
__device__ Pack<T, kLanes> store(const F (&numbers)[kLanes], T* to) {
  Pack<T, kLanes> pack;
  for (int j = 0; j < kLanes; ++j) narrow(numbers[j], &pack.at[j]);
  *reinterpret_cast<Pack<T, kLanes>*>(to) = pack;
  return pack;
}
template <typename T>
constexpr int kWide = 16 / sizeof(T);  // lanes of 16 bytes

// Calls f(first number) for the packs of a row that are this thread's.
template <int kLanes, typename F>
__device__ void each_pack(int64_t size, F f) {
  for (int64_t i = int64_t{threadIdx.x} * kLanes; i < size; i += int64_t{blockDim.x} * kLanes) f(i);
}

template <typename F>
__device__ F warp_sum(F value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(kWholeWarp, value, distance);
  return value;
}

// Of a block of whole warps, in every thread. The last barrier lets `scratch` be used again.
template <typename F>
__device__ F block_sum(F value, F (&scratch)[kWarp]) {
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = 0;
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) value += scratch[warp];
  __syncthreads();
  return value;
}

template <typename T>
struct NormOf {
  Norm::Kind kind;
  const T *weight, *bias;  // bias may be null
  double eps, offset;
  Sum<T> share;  // of one number in a mean

  NormOf(const RowNorm& norm, int64_t size)
      : kind(norm.kind),
        weight(norm.weight.as<T>()),
        bias(norm.bias.as<T>()),
        eps(norm.eps),
        offset(norm.offset),
        share(static_cast<Sum<T>>(1.0 / static_cast<double>(size))) {}

  // Numbers i, i + 1, .. of a row.
  template <int kLanes, typename F>
  __device__ void operator()(const Scaling<F>& scaling, F (&x)[kLanes], int64_t i) const {
    if (kind == Norm::kNone) return;
    const auto weights = load<kLanes>(weight + i);
    for (int j = 0; j < kLanes; ++j)
      x[j] =
          (x[j] - scaling.mean) * scaling.factor * (widen(weights.at[j]) + static_cast<F>(offset));
    if (!bias) return;
    const auto biases = load<kLanes>(bias + i);
    for (int j = 0; j < kLanes; ++j) x[j] += widen(biases.at[j]);
  }
};

// Calls f(T{}) with the type of a dtype.
template <typename F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat64: return f(double{});
    case DType::kFloat32: return f(float{});
    case DType::kFloat16: return f(__half{});
    default: return f(__nv_bfloat16{});
  }
}

}  // namespace msn
