// Attention of the draft tree's nodes on tensor cores, the prefix split over blocks
// (flash-decoding).
//
// A query row is a node and one of the query heads that share a key-value head, so that keys and
// values are read once for all of them. A block takes kRows query rows and a stretch of the row's
// keys, tile by tile: while it computes on one tile, the next is on its way (cp.async, two stages).
// A warp takes 16 query rows and, where there are fewer rows than warps, a share of each tile's
// keys. Its scores stay in registers: they are the weights' operand of the second product. The
// softmax is kept online, in float32 and to base 2.
//
// Tiles inside the prefix and every row's window have no mask. In the others a row's keys are 64
// bits that tree.h gives. There a value may be NaN or infinite that some row must not see, and 0 x
// NaN is NaN: such values, which are rare, are added apart from the product, to the rows that see
// them.
//
// Every block leaves its sums in a workspace; the last one to arrive of those with the same query
// rows adds them up, in their order whatever came first, and leaves its counter at 0 for the next
// launch. A block without company writes the output at once.
//
// Bytes: keys and values of the prefix once for every kRows query rows (more than once from L2),
// and for each split and query row 4 (D_v + 2) written and read. Not yet run on a GPU.
#include <type_traits>

#include "cuda/tree/mma.cuh"
#include "cuda/tree/tree_attention.cuh"
#include "tree_ops.h"

namespace msn {

namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kMmaRows = 16, kChunk = 8;  // values in 16 bytes
constexpr float kLog2E = 1.4426950408889634f;

template <int kValue>
using Int = std::integral_constant<int, kValue>;

// Sizes that follow from the head size and from how many of the four warps stand side by side on
// query rows.
template <int kDim, int kRowWarps>
struct Shape {
  static constexpr int kRows = kRowWarps * kMmaRows;
  static constexpr int kKeyWarps = kWarps / kRowWarps;
  static constexpr int kKeys = kDim > 128 ? 32 : 64;  // of a tile
  static constexpr int kWarpKeys = kKeys / kKeyWarps;
  static constexpr int kPitch =
      kDim + kChunk;  // 8 rows of a matrix then lie in 8 different groups of banks
  static constexpr int kStage = 2 * kKeys * kPitch;   // keys and values
  static constexpr bool kSharedQueries = kDim > 128;  // where they do not fit into the registers
  static constexpr int kQueries = 2 * kStage;         // where they begin
  static constexpr int kBytes = 2 * (2 * kStage + (kSharedQueries ? kRows * kPitch : 0));
  // So many that a block leaves less than half of what it read in the workspace.
  static constexpr int kLeastTiles = 2 * kRows > kKeys ? 2 * kRows / kKeys : 1;
  static_assert(kWarpKeys % kMmaRows == 0 && kWarpKeys <= kWordBits);
  static_assert(kWarps * kMmaRows * (kDim + 2) * 4 <= kBytes,
                "the sums take the place of the tiles");
};

template <typename T>
__device__ float widen(uint16_t bits) {
  T value;
  static_assert(sizeof value == sizeof bits);
  memcpy(&value, &bits, sizeof value);
  return to_float(value);
}

template <typename T>
__device__ bool finite(uint16_t bits) {
  constexpr uint16_t kExponent = std::is_same_v<T, __half> ? 0x7c00 : 0x7f80;
  return (bits & kExponent) != kExponent;
}

__device__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kWholeWarp, x, 2));
}
__device__ float quad_sum(float x) {
  x += __shfl_xor_sync(kWholeWarp, x, 1);
  return x + __shfl_xor_sync(kWholeWarp, x, 2);
}

// `count` rows of `width` values into a tile of kKeys rows; zeros around them.
template <typename T, int kKeys, int kDim, int kPitch>
__device__ void fetch(const T* rows, int64_t stride, int count, int width, uint16_t* tile) {
  constexpr int kChunks = kDim / kChunk;
#pragma unroll 2
  for (int i = threadIdx.x; i < kKeys * kChunks; i += kThreads) {
    const int row = i / kChunks, column = i % kChunks * kChunk;
    const bool wanted = row < count && column < width;
    copy_async(tile + row * kPitch + column, wanted ? rows + row * stride + column : rows, wanted);
  }
}

// The score that weights are relative to, given the largest one.
__device__ float base_of(float largest) {
  return largest == -INFINITY ? 0.0f : largest;
}  // not -inf - -inf

template <typename T, int kDim, int kRowWarps>
__global__ void __launch_bounds__(kThreads, kDim <= 64 ? 3 : 2)
    tree_attention_mma_kernel(const __grid_constant__ AttentionProblem<T> p, float* partial,
                              int* arrived, int most_splits) {
  using S = Shape<kDim, kRowWarps>;
  extern __shared__ uint4 shared[];
  uint16_t* stages = reinterpret_cast<uint16_t*>(shared);

  // Blocks that read the same keys and values stand next to each other.
  const int tile_rows = blockIdx.x % p.tiles, split = blockIdx.x / p.tiles % most_splits;
  const int kv_head = blockIdx.x / p.tiles / most_splits % p.kv_heads;
  const int row = blockIdx.x / p.tiles / most_splits / p.kv_heads;
  const RowKeys keys = p.keys_of(row);
  const int begin =
      static_cast<int>(window_start(keys.prefix, p.window));  // no live node sees what is before
  const Split plan((keys.end - begin + S::kKeys - 1) / S::kKeys, most_splits, S::kLeastTiles);
  if (split >= plan.blocks) return;
  const int from = begin + split * plan.tiles * S::kKeys;
  const int to = min(keys.end, from + plan.tiles * S::kKeys);
  // From here to the end of the prefix every node's window sees every key.
  const int dense_from = static_cast<int>(window_start(keys.prefix + p.nodes - 1, p.window));

  const T* k = p.k + row * p.k_row + kv_head * p.k_head + keys.first * p.k_slot;
  const T* v = p.v + row * p.v_row + kv_head * p.v_head + keys.first * p.v_slot;
  const auto fetch_tile = [&](int tile_from, int stage) {
    uint16_t* at = stages + stage * S::kStage;
    const int count = min(S::kKeys, keys.end - tile_from);
    fetch<T, S::kKeys, kDim, S::kPitch>(k + int64_t{tile_from} * p.k_slot, p.k_slot, count, p.dim,
                                        at);
    fetch<T, S::kKeys, kDim, S::kPitch>(v + int64_t{tile_from} * p.v_slot, p.v_slot, count, p.v_dim,
                                        at + S::kKeys * S::kPitch);
    commit_copies();
  };
  if (from < to) fetch_tile(from, 0);

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, group = lane / 4,
            pair = lane % 4 * 2;
  const int key_share = warp / kRowWarps * S::kWarpKeys;
  const int first_row = tile_rows * S::kRows + warp % kRowWarps * kMmaRows + group;
  const int n_words = words_for(p.nodes);
  const uint64_t* ancestors = p.ancestors + row * p.ancestors_row;

  // This lane's two query rows, g and g + 8 of the warp's, as operand.
  uint32_t query[S::kSharedQueries ? 1 : kDim / 16][4];
  uint16_t* queries = stages + S::kQueries + warp % kRowWarps * kMmaRows * S::kPitch;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int node = (first_row + 8 * r) / p.group,
              head = kv_head * p.group + (first_row + 8 * r) % p.group;
    const bool exists = node < p.nodes;
    const T* from_row = p.q + row * p.q_row + head * p.q_head + (exists ? node : 0) * p.q_node;
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d) {
      const int column = d * 8 + pair;
      const uint32_t both =
          exists && column < p.dim ? *reinterpret_cast<const uint32_t*>(from_row + column) : 0;
      if constexpr (!S::kSharedQueries)
        query[d / 2][d % 2 * 2 + r] = both;
      else if (key_share == 0)
        *reinterpret_cast<uint32_t*>(queries + (group + 8 * r) * S::kPitch + column) = both;
    }
  }

  const float scale = static_cast<float>(p.scale), softcap = static_cast<float>(p.softcap);
  float largest[2] = {-INFINITY, -INFINITY}, total[2] = {}, sums[kDim / 8][4] = {};
  for (int tile = from, stage = 0; tile < to; tile += S::kKeys, stage ^= 1) {
    await_copies<0>();
    __syncthreads();  // the tile is there, and no thread reads the other stage any more
    if (tile + S::kKeys < to) fetch_tile(tile + S::kKeys, stage ^ 1);
    const uint16_t* tile_keys = stages + stage * S::kStage + key_share * S::kPitch;
    const uint16_t* tile_values = tile_keys + S::kKeys * S::kPitch;

    float score[S::kWarpKeys / 8][4] = {};
#pragma unroll
    for (int d = 0; d < kDim; d += 16) {
      uint32_t (&a)[4] = query[S::kSharedQueries ? 0 : d / 16];
      if constexpr (S::kSharedQueries)
        load_matrices(a, queries + lane % 16 * S::kPitch + d + lane / 16 * 8);
#pragma unroll
      for (int key = 0; key < S::kWarpKeys; key += 16) {
        uint32_t b[4];
        load_matrices(
            b, tile_keys + (key + lane / 16 * 8 + lane % 8) * S::kPitch + d + lane / 8 % 2 * 8);
        multiply_add<T>(score[key / 8], a, b[0], b[1]);
        multiply_add<T>(score[key / 8 + 1], a, b[2], b[3]);
      }
    }

#pragma unroll
    for (int n = 0; n < S::kWarpKeys / 8; ++n)
#pragma unroll
      for (float& s : score[n]) {
        s *= scale;
        s = (softcap > 0.0f ? softcap * tanhf(s / softcap) : s) * kLog2E;
      }

    const bool masked = tile < dense_from || tile + S::kKeys > keys.prefix;
    uint64_t seen[2] = {};
    if (masked) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int node = (first_row + 8 * r) / p.group;
        const uint64_t* words = ancestors + node * n_words;
        const int depth = node < p.nodes ? depth_from_bits(words, n_words) : -1;
        if (depth >= 0)
          seen[r] = visible_keys(words, n_words, tile + key_share, keys.prefix, keys.end,
                                 window_start(keys.prefix + depth, p.window));
#pragma unroll
        for (int n = 0; n < S::kWarpKeys / 8; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            if (!(seen[r] >> (n * 8 + pair + i) & 1)) score[n][2 * r + i] = -INFINITY;
      }
    }

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float most = largest[r];
#pragma unroll
      for (int n = 0; n < S::kWarpKeys / 8; ++n)
        most = fmaxf(most, fmaxf(score[n][2 * r], score[n][2 * r + 1]));
      most = quad_max(most);
      const float base = base_of(most), fade = exp2f(largest[r] - base);
      largest[r] = most;
      total[r] *= fade;
#pragma unroll
      for (int n = 0; n < S::kWarpKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          total[r] += score[n][2 * r + i] = exp2f(score[n][2 * r + i] - base);
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d) {
        sums[d][2 * r] *= fade;
        sums[d][2 * r + 1] *= fade;
      }
    }

    // Of each query row, g and g + 8: what it sees of the values that are not finite; these then
    // count as 0.
    if (masked) {  // the same for all threads of the block
      uint16_t* all = stages + stage * S::kStage + S::kKeys * S::kPitch;
      bool tainted = false;
#pragma unroll 1
      for (int i = threadIdx.x; i < S::kKeys * kDim; i += kThreads)
        tainted |= !finite<T>(all[i / kDim * S::kPitch + i % kDim]);
      if (__syncthreads_or(tainted)) {
#pragma unroll 1
        for (int key = 0; key < S::kWarpKeys; ++key)
#pragma unroll
          for (int d = 0; d < kDim / 8; ++d)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const uint16_t value = tile_values[key * S::kPitch + d * 8 + pair + i];
              if (finite<T>(value)) continue;
#pragma unroll
              for (int r = 0; r < 2; ++r)
                if (seen[r] >> key & 1) sums[d][2 * r + i] += widen<T>(value);
            }
        __syncthreads();
#pragma unroll 1
        for (int i = threadIdx.x; i < S::kKeys * kDim; i += kThreads) {
          uint16_t& value = all[i / kDim * S::kPitch + i % kDim];
          if (!finite<T>(value)) value = 0;
        }
        __syncthreads();
      }
    }

#pragma unroll
    for (int key = 0; key < S::kWarpKeys; key += 16) {
      const float (&low)[4] = score[key / 8], (&high)[4] = score[key / 8 + 1];
      const uint32_t weights[4] = {pack<T>(low[0], low[1]), pack<T>(low[2], low[3]),
                                   pack<T>(high[0], high[1]), pack<T>(high[2], high[3])};
#pragma unroll
      for (int d = 0; d < kDim; d += 16) {
        uint32_t b[4];
        load_matrices_transposed(b,
                                 tile_values + (key + lane % 16) * S::kPitch + d + lane / 16 * 8);
        multiply_add<T>(sums[d / 8], weights, b[0], b[1]);
        multiply_add<T>(sums[d / 8 + 1], weights, b[2], b[3]);
      }
    }
  }

  // All warps' sums into shared memory, where the tiles were: per warp and row the sums, then
  // largest and total.
  constexpr int kSums = kDim + 2;
  float* left = reinterpret_cast<float*>(shared);
  __syncthreads();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float* to_row = left + (warp * kMmaRows + group + 8 * r) * kSums;
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d) {
      to_row[d * 8 + pair] = sums[d][2 * r];
      to_row[d * 8 + pair + 1] = sums[d][2 * r + 1];
    }
    const float weight = quad_sum(total[r]);
    if (pair == 0) {
      to_row[kDim] = largest[r];
      to_row[kDim + 1] = weight;
    }
  }
  __syncthreads();

  // The `count` sums of a row, kRows rows apart: a lane every 32nd column, and the row's largest
  // and total.
  const auto merged = [lane](const auto& read, int r, int count, float (&sum)[kDim / kWarp],
                             float& most, float& weight) {
    const auto at = [&](int i, int column) {
      return read((int64_t{i} * S::kRows + r) * kSums + column);
    };
    most = -INFINITY;
    for (int i = 0; i < count; ++i) most = fmaxf(most, at(i, kDim));
    weight = 0.0f;
#pragma unroll
    for (float& x : sum) x = 0.0f;
    for (int i = 0; i < count; ++i) {
      const float share = exp2f(at(i, kDim) - base_of(most));
      weight = fmaf(at(i, kDim + 1), share, weight);
#pragma unroll
      for (int c = 0; c < kDim / kWarp; ++c) sum[c] = fmaf(at(i, c * kWarp + lane), share, sum[c]);
    }
  };
  const auto write = [&](int r, const float (&sum)[kDim / kWarp], float most, float weight) {
    const int node = (tile_rows * S::kRows + r) / p.group,
              head = kv_head * p.group + (tile_rows * S::kRows + r) % p.group;
    if (node >= p.nodes) return;
    float share = 1.0f;
    if (p.sinks) {
      const float sink = to_float(p.sinks[head]) * kLog2E, base = base_of(fmaxf(most, sink));
      share = exp2f(most - base);
      weight = weight * share + exp2f(sink - base);
    }
    const bool dead = depth_from_bits(ancestors + node * n_words, n_words) < 0;
    T* out = p.out + ((int64_t{row} * p.nodes + node) * p.kv_heads * p.group + head) * p.v_dim;
#pragma unroll
    for (int c = 0; c < kDim / kWarp; ++c)
      if (c * kWarp + lane < p.v_dim)
        from_float(dead || weight == 0.0f ? 0.0f : sum[c] * share / weight, out + c * kWarp + lane);
  };

  float sum[kDim / kWarp], most, weight;
  const int64_t task = (int64_t{row} * p.kv_heads + kv_head) * p.tiles + tile_rows;
  float* mine = partial + (task * most_splits + split) * S::kRows * kSums;
  for (int r = warp; r < S::kRows; r += kWarps) {
    merged([left](int64_t i) { return left[i]; }, r, S::kKeyWarps, sum, most, weight);
    if (plan.blocks == 1) {
      write(r, sum, most, weight);
      continue;
    }
#pragma unroll
    for (int c = 0; c < kDim / kWarp; ++c) mine[r * kSums + c * kWarp + lane] = sum[c];
    if (lane == 0) {
      mine[r * kSums + kDim] = most;
      mine[r * kSums + kDim + 1] = weight;
    }
  }
  if (plan.blocks == 1) return;

  __threadfence();
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) last = atomicAdd(arrived + task, 1) == plan.blocks - 1;
  if (!__syncthreads_or(last)) return;
  __threadfence();
  if (threadIdx.x == 0) arrived[task] = 0;
  const float* all = partial + task * most_splits * S::kRows * kSums;
  for (int r = warp; r < S::kRows; r += kWarps) {
    // Past L1, where an older value of another block may lie.
    merged([all](int64_t i) { return __ldcg(all + i); }, r, plan.blocks, sum, most, weight);
    write(r, sum, most, weight);
  }
}

// Blocks to cut the keys into, at most, so that every multiprocessor has two.
int most_splits(const char* op, int device, int64_t tasks, int64_t slots, int keys,
                int least_tiles) {
  int processors = 0;
  check(op, cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  const int64_t stretch = int64_t{keys} * least_tiles;
  return static_cast<int>(clamp(2 * processors / (tasks > 0 ? tasks : 1), 1,
                                clamp((slots + stretch - 1) / stretch, 1, 64)));
}

struct Plan {
  int tiles, splits;
  int64_t tasks, floats;
};

template <int kDim, int kRowWarps>
Plan plan_for(int64_t batch, int64_t kv_heads, int64_t rows, int64_t slots, int device) {
  using S = Shape<kDim, kRowWarps>;
  const int tiles = static_cast<int>((rows + S::kRows - 1) / S::kRows);
  const int64_t tasks = batch * kv_heads * tiles;
  const int splits = most_splits("tree_attention", device, tasks, slots, S::kKeys, S::kLeastTiles);
  return {tiles, splits, tasks, splits == 1 ? 0 : tasks * splits * S::kRows * (kDim + 2)};
}

// Calls `f` with the two sizes of the kernel for these heads and query rows, as integral constants.
template <typename F>
auto with_shape(int64_t dim, int64_t rows, const F& f) {
  const auto pick = [&](auto padded, auto few) {
    return rows <= decltype(few)::value * kMmaRows ? f(padded, few) : f(padded, Int<4>{});
  };
  if (dim <= 64) return pick(Int<64>{}, Int<1>{});
  if (dim <= 96) return pick(Int<96>{}, Int<1>{});
  if (dim <= 128) return pick(Int<128>{}, Int<1>{});
  return pick(Int<256>{}, Int<2>{});
}

template <typename T, int kDim, int kRowWarps>
void launch_shape(AttentionProblem<T> p, int64_t batch, int device, const AttentionSpace& space,
                  void* stream) {
  using S = Shape<kDim, kRowWarps>;
  Plan plan =
      plan_for<kDim, kRowWarps>(batch, p.kv_heads, int64_t{1} * p.nodes * p.group, p.slots, device);
  if (space.floats < plan.floats || space.counters < plan.tasks) plan.splits = 1;
  p.tiles = plan.tiles;
  const auto kernel = tree_attention_mma_kernel<T, kDim, kRowWarps>;
  if (S::kBytes > 48 * 1024)  // more than a kernel gets unasked
    check("tree_attention",
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes));
  launch("tree_attention", kernel, grid_x("tree_attention", plan.tasks * plan.splits), kThreads,
         S::kBytes, stream, p, space.partial, space.arrived, plan.splits);
}

}  // namespace

AttentionSpace attention_space(const Tensor& q, const Tensor& k, const Tensor& v) {
  const int64_t rows = q.shape[2] * (q.shape[1] / k.shape[1]),
                dim = q.shape[3] > v.shape[3] ? q.shape[3] : v.shape[3];
  return with_shape(dim, rows, [&](auto padded, auto row_warps) {
    const Plan plan = plan_for<decltype(padded)::value, decltype(row_warps)::value>(
        q.shape[0], k.shape[1], rows, k.shape[2], q.device_index);
    return AttentionSpace{nullptr, nullptr, plan.floats, plan.splits == 1 ? 0 : plan.tasks};
  });
}

template <typename T>
void tree_attention_mma(const AttentionProblem<T>& p, int64_t batch, int device,
                        const AttentionSpace& space, void* stream) {
  with_shape(p.dim > p.v_dim ? p.dim : p.v_dim, int64_t{1} * p.nodes * p.group,
             [&](auto padded, auto row_warps) {
               launch_shape<T, decltype(padded)::value, decltype(row_warps)::value>(
                   p, batch, device, space, stream);
             });
}

template void tree_attention_mma(const AttentionProblem<__half>&, int64_t, int,
                                 const AttentionSpace&, void*);
template void tree_attention_mma(const AttentionProblem<__nv_bfloat16>&, int64_t, int,
                                 const AttentionSpace&, void*);

}  // namespace msn
