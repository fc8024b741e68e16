#include "cpu/fused/rows.h"

namespace msn {

void ResidualNorm::on_cpu() const {
  with_type(h.dtype, [&](auto number) {
    using T = decltype(number);
    using F = Sum<T>;
    const int64_t size = h.shape[1];
    for (int64_t row = 0; row < h.shape[0]; ++row) {
      T* residual = h.as<T>() + row * size;
      T* to = out.as<T>() + row * size;
      const auto value = [&](int64_t i) { return widen(residual[i]); };
      if (x.data) {
        const T* branch = x.as<T>() + row * size;
        const auto scaling =
            scaling_of<F>(x_norm, size, [&](int64_t i) { return widen(branch[i]); });
        for (int64_t i = 0; i < size; ++i) {
          const F added = normed<T>(x_norm, scaling, widen(branch[i]), i);
          narrow(value(i) + static_cast<F>(scale) * added, residual + i);
        }
      }
      const auto scaling = scaling_of<F>(norm, size, value);
      for (int64_t i = 0; i < size; ++i) narrow(normed<T>(norm, scaling, value(i), i), to + i);
    }
  });
}

}  // namespace msn
