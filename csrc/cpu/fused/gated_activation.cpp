#include "cpu/fused/rows.h"

namespace msn {

void GatedActivation::on_cpu() const {
  with_type(gate.dtype, [&](auto number) {
    using T = decltype(number);
    const int64_t size = gate.shape[1];
    for (int64_t row = 0; row < gate.shape[0]; ++row) {
      const T* gates = gate.as<T>() + row * gate.strides[0];
      const T* ups = up.data ? up.as<T>() + row * up.strides[0] : nullptr;
      T* to = out.as<T>() + row * size;
      for (int64_t i = 0; i < size; ++i) {
        const Sum<T> value = activated(activation, widen(gates[i]));
        narrow(ups ? value * widen(ups[i]) : value, to + i);
      }
    }
  });
}

}  // namespace msn
