// One thread for 16 bytes of a row where rows lie so, else for a number; a grid of (row, part of
// the row). Bytes per number: reads both halves and writes one, 3 (2 without `up`).
#include <algorithm>

#include "cuda/fused/rows.cuh"

namespace msn {

namespace {

constexpr int kThreads = 256;

template <typename T>
struct Problem {
  const T *gate, *up;  // up may be null
  int64_t gate_row, up_row, size;
  T* out;
  Activation activation;
};

template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads) gated_activation_kernel(const Problem<T> p) {
  const int64_t row = blockIdx.x, first = (int64_t{blockIdx.y} * kThreads + threadIdx.x) * kLanes;
  const T* const gates = p.gate + row * p.gate_row;
  const T* const ups = p.up ? p.up + row * p.up_row : nullptr;
  for (int64_t i = first; i < p.size; i += int64_t{gridDim.y} * kThreads * kLanes) {
    Sum<T> numbers[kLanes], factors[kLanes];
    to_float(load<kLanes>(gates + i), numbers);
    to_float(load<kLanes>(ups ? ups + i : gates + i), factors);
    for (int j = 0; j < kLanes; ++j) {
      numbers[j] = activated(p.activation, numbers[j]);
      if (ups) numbers[j] *= factors[j];
    }
    store(numbers, p.out + row * p.size + i);
  }
}

}  // namespace

void GatedActivation::on_cuda(void* stream) const {
  const DeviceGuard guard("gated_activation", gate);
  with_type(gate.dtype, [&](auto number) {
    using T = decltype(number);
    const Problem<T> problem{gate.as<T>(),  up.as<T>(),  gate.strides[0], up.strides[0],
                             gate.shape[1], out.as<T>(), activation};
    const bool wide =
        whole_rows(gate, 16) && whole_rows(out, 16) && (!up.data || whole_rows(up, 16));
    const auto kernel = wide ? gated_activation_kernel<T, kWide<T>> : gated_activation_kernel<T, 1>;
    const int64_t packs = gate.shape[1] / (wide ? kWide<T> : 1);
    const dim3 grid(grid_x("gated_activation", gate.shape[0]),
                    std::min<int64_t>((packs + kThreads - 1) / kThreads, 65535));
    launch("gated_activation", kernel, grid, kThreads, 0, stream, problem);
  });
}

}  // namespace msn
