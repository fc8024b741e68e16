// What the CUDA kernels of fused_ops.h share: whole vectors of numbers, and norms and sums of a
// row, in one order.
#pragma once
#include "cuda/numbers.cuh"
#include "fused.h"
#include "fused_ops.h"

namespace msn {

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
__device__ void to_float(const Pack<T, kLanes>& pack, F (&numbers)[kLanes]) {
  for (int j = 0; j < kLanes; ++j) numbers[j] = to_float(pack.at[j]);
}
// Returns them as they were rounded.
template <typename T, typename F, int kLanes>
__device__ Pack<T, kLanes> store(const F (&numbers)[kLanes], T* to) {
  Pack<T, kLanes> pack;
  for (int j = 0; j < kLanes; ++j) from_float(numbers[j], &pack.at[j]);
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
      x[j] = (x[j] - scaling.mean) * scaling.factor *
             (to_float(weights.at[j]) + static_cast<F>(offset));
    if (!bias) return;
    const auto biases = load<kLanes>(bias + i);
    for (int j = 0; j < kLanes; ++j) x[j] += to_float(biases.at[j]);
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
