// What the CPU kernels of fused_ops.h share. They are compiled once, for any processor: on a CPU
// the packed forward pass is the fast one (cpu/layers).
#pragma once
#define MSN_ISA portable
#include "cpu/vectors.h"
#include "fused.h"
#include "fused_ops.h"

namespace msn {

using portable::BFloat16;
using portable::Half;
using portable::narrow;
using portable::widen;

// What sums of T are made in.
template <typename T>
using Sum = decltype(widen(T{}));

// Calls f(T{}) with the type of a dtype.
template <typename F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat64: return f(double{});
    case DType::kFloat32: return f(float{});
    case DType::kFloat16: return f(Half{});
    default: return f(BFloat16{});
  }
}

// Of `count` numbers, of which number i is value(i).
template <typename F, typename Value>
Scaling<F> scaling_of(const RowNorm& norm, int64_t count, Value value) {
  Scaling<F> scaling;
  if (norm.kind == Norm::kNone) return scaling;
  double sum = 0, squares = 0;
  if (norm.kind == Norm::kLayer)
    for (int64_t i = 0; i < count; ++i) sum += value(i);
  scaling.mean = static_cast<F>(sum / static_cast<double>(count));
  for (int64_t i = 0; i < count; ++i) {
    const double from_mean = value(i) - scaling.mean;
    squares += from_mean * from_mean;
  }
  scaling.factor = static_cast<F>(factor_of(squares / static_cast<double>(count), norm.eps));
  return scaling;
}

// Number i of a row that has this scaling.
template <typename T, typename F>
F normed(const RowNorm& norm, const Scaling<F>& scaling, F x, int64_t i) {
  if (norm.kind == Norm::kNone) return x;
  x = (x - scaling.mean) * scaling.factor;
  x *= widen(norm.weight.as<T>()[i]) + static_cast<F>(norm.offset);
  return norm.bias.data ? x + widen(norm.bias.as<T>()[i]) : x;
}

}  // namespace msn
