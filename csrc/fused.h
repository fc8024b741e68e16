// What one number becomes in the ops of fused_ops.h, the same on every device.
#pragma once
#include <cmath>

#include "host_device.h"
#include "layers_ops.h"

namespace msn {

template <typename F>
MSN_HD F activated(Activation kind, F x) {
  using std::erfc;
  using std::exp;
  using std::tanh;
  switch (kind) {
    case Activation::kSilu: return x / (1 + exp(-x));
    case Activation::kGelu: return F(0.5) * x * erfc(-x * F(0.70710678118654752440));
    case Activation::kGeluTanh:  // sqrt(2 / pi)
      return F(0.5) * x * (1 + tanh(F(0.79788456080286535588) * (x + F(0.044715) * x * x * x)));
    default: return x < 0 ? F(0) : x;
  }
}

// Of a row: what a norm takes off its numbers, and multiplies them by.
template <typename F>
struct Scaling {
  F mean = 0, factor = 1;
};

// Of the mean of the squares.
template <typename F>
MSN_HD F factor_of(F mean_square, double eps) {
#ifdef __CUDA_ARCH__
  return rsqrt(mean_square + static_cast<F>(eps));
#else
  return 1 / std::sqrt(mean_square + static_cast<F>(eps));
#endif
}

}  // namespace msn
