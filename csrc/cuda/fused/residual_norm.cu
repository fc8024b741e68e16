// One block a row, 16 bytes a thread at a time where rows lie so. A thread reads again only what it
// wrote or read itself, which is in L1 then, so that rows may be of any length; barriers stand in
// the sums alone. Bytes per row of S numbers: reads h and x, writes h and the result, 4 S numbers
// (2 S without x); the weights are read by every row, from L2.
#include "cuda/fused/rows.cuh"

namespace msn {

namespace {

constexpr int kThreads = 512;

template <typename T>
struct Problem {
  T *h, *out;
  const T* x;  // may be null
  int64_t size;
  double scale;
  NormOf<T> x_norm, norm;
};

// Of a row; `first` is this thread's sum of moments.
template <int kLanes, typename T, typename F>
__device__ Scaling<F> scaling_of(const NormOf<T>& norm, const T* row, int64_t size, F first,
                                 F (&scratch)[kWarp]) {
  Scaling<F> scaling;
  if (norm.kind == Norm::kNone) return scaling;
  F squares = block_sum(first, scratch);
  if (norm.kind == Norm::kLayer) {
    scaling.mean = squares * norm.share;
    squares = 0;
    each_pack<kLanes>(size, [&](int64_t i) {
      const auto pack = load<kLanes>(row + i);
      for (const T& number : pack.at) {
        const F from_mean = to_float(number) - scaling.mean;
        squares += from_mean * from_mean;
      }
    });
    squares = block_sum(squares, scratch);
  }
  scaling.factor = factor_of(squares * norm.share, norm.eps);
  return scaling;
}

// What a norm's first sum is of.
template <typename F>
__device__ F moment(Norm::Kind kind, F x) {
  return kind == Norm::kLayer ? x : x * x;
}

template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads) residual_norm_kernel(const Problem<T> p) {
  using F = Sum<T>;
  __shared__ F scratch[kWarp];
  T* const h = p.h + blockIdx.x * p.size;
  T* const out = p.out + blockIdx.x * p.size;
  const T* const x = p.x ? p.x + blockIdx.x * p.size : nullptr;
  Scaling<F> of_x;
  if (x && p.x_norm.kind != Norm::kNone) {
    F first = 0;
    each_pack<kLanes>(p.size, [&](int64_t i) {
      const auto pack = load<kLanes>(x + i);
      for (const T& number : pack.at) first += moment(p.x_norm.kind, to_float(number));
    });
    of_x = scaling_of<kLanes>(p.x_norm, x, p.size, first, scratch);
  }
  F first = 0;
  each_pack<kLanes>(p.size, [&](int64_t i) {
    F sums[kLanes];
    to_float(load<kLanes>(h + i), sums);
    if (x) {
      F branch[kLanes];
      to_float(load<kLanes>(x + i), branch);
      p.x_norm(of_x, branch, i);
      for (int j = 0; j < kLanes; ++j) sums[j] += static_cast<F>(p.scale) * branch[j];
      to_float(store(sums, h + i), sums);
    }
    for (const F sum : sums) first += moment(p.norm.kind, sum);
  });
  const Scaling<F> of_h = scaling_of<kLanes>(p.norm, h, p.size, first, scratch);
  each_pack<kLanes>(p.size, [&](int64_t i) {
    F numbers[kLanes];
    to_float(load<kLanes>(h + i), numbers);
    p.norm(of_h, numbers, i);
    store(numbers, out + i);
  });
}

}  // namespace

void ResidualNorm::on_cuda(void* stream) const {
  const DeviceGuard guard("residual_norm", h);
  with_type(h.dtype, [&](auto number) {
    using T = decltype(number);
    const Problem<T> problem{h.as<T>(),
                             out.as<T>(),
                             x.as<T>(),
                             h.shape[1],
                             scale,
                             NormOf<T>(x_norm, h.shape[1]),
                             NormOf<T>(norm, h.shape[1])};
    bool wide = whole_rows(h, 16);
    for (const Tensor* t : {&out, &x, &x_norm.weight, &x_norm.bias, &norm.weight, &norm.bias})
      wide &= !t->data || whole_rows(*t, 16);
    const auto kernel = wide ? residual_norm_kernel<T, kWide<T>> : residual_norm_kernel<T, 1>;
    const int64_t packs = h.shape[1] / (wide ? kWide<T> : 1);
    const int threads = packs < kThreads ? whole_warps(static_cast<int>(packs)) : kThreads;
    launch("residual_norm", kernel, grid_x("residual_norm", h.shape[0]), threads, 0, stream,
           problem);
  });
}

}  // namespace msn
