#include "cpu/check.h"
#include "cpu/fused/rows.h"

namespace msn {

namespace {

// A head's numbers, normed and turned: the first 2 * half in pairs.
template <typename T, typename F>
void turn(const RowNorm& norm, const Scaling<F>& scaling, const T* head, int64_t begin,
          int64_t size, const F* cosines, const F* sines, int64_t half, T* to) {
  const auto value = [&](int64_t i) { return normed<T>(norm, scaling, widen(head[i]), begin + i); };
  for (int64_t i = 0; i < half; ++i) {
    const F a = value(i), b = value(i + half);
    narrow(a * cosines[i] - b * sines[i], to + i);
    narrow(b * cosines[i] + a * sines[i], to + i + half);
  }
  for (int64_t i = 2 * half; i < size; ++i) narrow(value(i), to + i);
}

// The heads of one row; `to(head)` is where one goes.
template <typename T, typename F, typename To>
void turn_heads(const RowNorm& norm, bool each, const T* row, int64_t heads, int64_t stride,
                int64_t size, const F* cosines, const F* sines, int64_t half, To to) {
  const auto value = [&](int64_t i) { return widen(row[i / size * stride + i % size]); };
  Scaling<F> scaling;
  if (!each) scaling = scaling_of<F>(norm, heads * size, value);
  for (int64_t head = 0; head < heads; ++head) {
    if (each)
      scaling = scaling_of<F>(norm, size, [&](int64_t i) { return value(head * size + i); });
    turn(norm, scaling, row + head * stride, each ? 0 : head * size, size, cosines, sines, half,
         to(head));
  }
}

template <typename T>
T* row_of(const Tensor& t, int64_t i, int64_t j) {
  return t.as<T>() + i * t.strides[0] + j * t.strides[1];
}

}  // namespace

void RotaryCache::on_cpu() const {
  const int64_t batch = q.shape[0], nodes = q.shape[1], heads = q.shape[2], size = q.shape[3];
  const int64_t kv_heads = k.shape[2], half = cosines.data ? cosines.shape[1] : 0;
  for (int64_t b = 0; b < batch; ++b) {
    check_range("prefix", b, prefix.as<int64_t>()[b], 0, keys.shape[2] - nodes);
    for (int64_t n = 0; half && n < nodes; ++n)
      check_range("positions", b, positions.as<int64_t>()[b * nodes + n], 0, cosines.shape[0] - 1);
  }
  with_type(q.dtype, [&](auto number) {
    using T = decltype(number);
    using F = Sum<T>;
    for (int64_t row = 0; row < batch * nodes; ++row) {
      const int64_t b = row / nodes, n = row % nodes, slot = prefix.as<int64_t>()[b] + n;
      const int64_t at = half ? positions.as<int64_t>()[row] * half : 0;
      const F *cos = cosines.as<F>() + at, *sin = sines.as<F>() + at;
      const auto cached = [&](const Tensor& cache) {
        return [&cache, b, slot](int64_t head) {
          return row_of<T>(cache, b, head) + slot * cache.strides[2];
        };
      };
      turn_heads(q_norm, norm_each_head, row_of<T>(q, b, n), heads, q.strides[2], size, cos, sin,
                 half, [&](int64_t head) { return out.as<T>() + (row * heads + head) * size; });
      turn_heads(k_norm, norm_each_head, row_of<T>(k, b, n), kv_heads, k.strides[2], size, cos, sin,
                 half, cached(keys));
      turn_heads(RowNorm{}, true, row_of<T>(v, b, n), kv_heads, v.strides[2], size, cos, sin, 0,
                 cached(values));
    }
  });
}

}  // namespace msn
