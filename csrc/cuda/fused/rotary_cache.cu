// A grid of (row, one of queries, keys and values), a warp for a head at a time. A lane owns the
// pairs of numbers that turn together, and norms them itself, so that nothing is shared but sums: a
// head's in its warp, or those of all heads in the block. Loops over a head have few rounds, and
// spill where they are unrolled. A row whose slots are not all in the
// cache is not written, and a position outside the tables is the nearest one inside. Bytes per row:
// reads and writes q, k and v once; weights and a row of the tables come from L1 and L2.
#include "cuda/fused/rows.cuh"

namespace msn {

namespace {

constexpr int kThreads = 512, kWarps = kThreads / kWarp;

// Queries, keys or values: where they come from, and where they go.
template <typename T>
struct Part {
  const T* from;
  int64_t from_row, from_node, from_head;  // strides
  T* to;
  int64_t to_row, to_head, to_slot;
  int heads;
  bool cached;  // `to` is a cache, and the prefix stands before the nodes
  NormOf<T> norm;
};

template <typename T>
struct Problem {
  Part<T> parts[3];
  const int64_t *prefix, *positions;
  const Sum<T>*cosines, *sines;
  int nodes, size, half;
  int64_t known, slots;
  bool norm_each_head;
};

// Of `count` numbers, of which number i is value(i); a lane of `lanes` reads every one of its own.
template <typename F, typename T, typename Value, typename Total>
__device__ Scaling<F> scaling_of(const NormOf<T>& norm, int count, int lane, int lanes, Value value,
                                 Total total) {
  Scaling<F> scaling;
  if (norm.kind == Norm::kNone) return scaling;
  if (norm.kind == Norm::kLayer) {
    F sum = 0;
#pragma unroll 1
    for (int i = lane; i < count; i += lanes) sum += value(i);
    scaling.mean = total(sum) * norm.share;
  }
  F squares = 0;
#pragma unroll 1
  for (int i = lane; i < count; i += lanes) {
    const F from_mean = value(i) - scaling.mean;
    squares += from_mean * from_mean;
  }
  scaling.factor = factor_of(total(squares) * norm.share, norm.eps);
  return scaling;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    rotary_cache_kernel(const __grid_constant__ Problem<T> p) {
  using F = Sum<T>;
  __shared__ F scratch[kWarp];
  const Part<T>& part = p.parts[blockIdx.y];
  const int row = blockIdx.x / p.nodes, node = blockIdx.x % p.nodes;
  const int lane = threadIdx.x % kWarp;
  int64_t slot = node;
  if (part.cached) {
    const int64_t before = p.prefix[row];
    if (before < 0 || before > p.slots - p.nodes) return;  // the whole block
    slot += before;
  }
  const T* const from = part.from + row * part.from_row + node * part.from_node;
  T* const to = part.to + row * part.to_row + slot * part.to_slot;
  const int half = blockIdx.y < 2 ? p.half : 0;  // values do not turn
  const int64_t position = half ? clamp(p.positions[blockIdx.x], 0, p.known - 1) * half : 0;
  Scaling<F> scaling;
  if (!p.norm_each_head)
    scaling = scaling_of<F>(
        part.norm, part.heads * p.size, threadIdx.x, kThreads,
        [&](int i) { return to_float(from[i / p.size * part.from_head + i % p.size]); },
        [&](F sum) { return block_sum(sum, scratch); });
  for (int head = threadIdx.x / kWarp; head < part.heads; head += kWarps) {
    const T* const numbers = from + head * part.from_head;
    T* const target = to + head * part.to_head;
    if (p.norm_each_head)
      scaling = scaling_of<F>(
          part.norm, p.size, lane, kWarp, [&](int i) { return to_float(numbers[i]); },
          [&](F sum) { return warp_sum(sum); });
    const int begin = p.norm_each_head ? 0 : head * p.size;  // in the weights
    const auto value = [&](int i) {
      F number[] = {to_float(numbers[i])};
      part.norm(scaling, number, begin + i);
      return number[0];
    };
#pragma unroll 1
    for (int i = lane; i < half; i += kWarp) {
      const F a = value(i), b = value(i + half);
      const F cosine = p.cosines[position + i], sine = p.sines[position + i];
      from_float(a * cosine - b * sine, target + i);
      from_float(b * cosine + a * sine, target + i + half);
    }
#pragma unroll 1
    for (int i = 2 * half + lane; i < p.size; i += kWarp) from_float(value(i), target + i);
  }
}

template <typename T>
Part<T> to_cache(const Tensor& from, const Tensor& to, const NormOf<T>& norm) {
  const int heads = static_cast<int>(from.shape[2]);
  return {from.as<T>(),  from.strides[0], from.strides[1], from.strides[2], to.as<T>(),
          to.strides[0], to.strides[1],   to.strides[2],   heads,           true,
          norm};
}

}  // namespace

void RotaryCache::on_cuda(void* stream) const {
  const DeviceGuard guard("rotary_cache", q);
  with_type(q.dtype, [&](auto number) {
    using T = decltype(number);
    const int nodes = static_cast<int>(q.shape[1]), heads = static_cast<int>(q.shape[2]);
    const int size = static_cast<int>(q.shape[3]);
    const auto norm_of = [&](const RowNorm& norm, int64_t its_heads) {
      return NormOf<T>(norm, norm_each_head ? size : its_heads * size);
    };
    const Part<T> queries{q.as<T>(),   q.strides[0],   q.strides[1],          q.strides[2],
                          out.as<T>(), out.strides[0], out.strides[2],        out.strides[1],
                          heads,       false,          norm_of(q_norm, heads)};
    const Problem<T> problem{{queries, to_cache<T>(k, keys, norm_of(k_norm, k.shape[2])),
                              to_cache<T>(v, values, norm_of({}, 1))},
                             prefix.as<int64_t>(),
                             positions.as<int64_t>(),
                             cosines.as<Sum<T>>(),
                             sines.as<Sum<T>>(),
                             nodes,
                             size,
                             cosines.data ? static_cast<int>(cosines.shape[1]) : 0,
                             cosines.data ? cosines.shape[0] : 0,
                             keys.shape[2],
                             norm_each_head};
    const dim3 grid(grid_x("rotary_cache", q.shape[0] * nodes), 3);
    launch("rotary_cache", rotary_cache_kernel<T>, grid, kThreads, 0, stream, problem);
  });
}

}  // namespace msn
