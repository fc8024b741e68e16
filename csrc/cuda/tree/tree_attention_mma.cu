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
// Every block leaves its sums in a workspace for the launch after this one
// (tree_attention_merge.cu). A block without company writes the output at once.
//
// Bytes: keys and values of the prefix once for every kRows query rows (more than once from L2),
// and for each split and query row 4 (D_v + 2) written. Not yet run on a GPU.
#include "cuda/tree/attention_softmax.cuh"

namespace msn {

namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kMmaRows = 16, kChunk = 8;  // values in 16 bytes

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
  static constexpr int kBytes = 2 * (2 * kStage + (kSharedQueries ? kRows * kPitch : 0));
  // So many that a block leaves less than half of what it read in the workspace.
  static constexpr int kLeastTiles = 2 * kRows > kKeys ? 2 * kRows / kKeys : 1;
  static_assert(kWarpKeys % kMmaRows == 0 && kWarpKeys <= kWordBits);
  static_assert(kWarps * kMmaRows * (kDim + 2) * 4 <= kBytes,
                "the warps' sums take the place of the tiles");
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

// True if none of 8 values is NaN or infinite. Such a one's exponent is all ones, so that its
// lowest bit added carries into the place of the sign.
template <typename T>
__device__ bool all_finite(const uint4& values) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  constexpr uint32_t kExponent = kHalf ? 0x7c007c00 : 0x7f807f80,
                     kLowest = kHalf ? 0x04000400 : 0x00800080;
  const auto carry = [](uint32_t pair) { return (pair & kExponent) + kLowest; };
  return !((carry(values.x) | carry(values.y) | carry(values.z) | carry(values.w)) & 0x80008000);
}

// `count` rows of `width` values into a tile of kKeys rows; zeros around them. A thread copies the
// same chunk of every kStep-th row.
template <typename T, int kKeys, int kDim, int kPitch>
__device__ __forceinline__ void fetch(const T* rows, int64_t stride, int count, int width,
                                      uint16_t* tile) {
  constexpr int kChunks = kDim / kChunk,
                kStep = kThreads / (kChunks > 8 ? kChunks > 16 ? 32 : 16 : 8);
  static_assert(kChunks * kStep <= kThreads && kKeys % kStep == 0);
  const int row = threadIdx.x / kChunks, column = threadIdx.x % kChunks * kChunk;
  if (row >= kStep) return;
  if (column >= width) count = 0;
  const T* from = rows + row * stride + column;
#pragma unroll
  for (int first = 0; first < kKeys; first += kStep) {
    copy_async(tile + (first + row) * kPitch + column, from, first + row < count);
    from += kStep * stride;
  }
}

// A thread's work: the block's share of the problem, then the thread's place in it.
template <typename T, int kDim, int kRowWarps>
struct Work {
  using S = Shape<kDim, kRowWarps>;

  const AttentionProblem<T>& p;
  uint16_t* stages;  // shared memory: two stages, each a tile of keys and one of values
  // Blocks that read the same keys and values stand next to each other.
  int query_tile, split, kv_head, row;
  RowKeys keys;
  int from, to;    // the block's keys
  int dense_from;  // from here to the end of the prefix every node's window sees every key
  int blocks;      // with the same query rows
  const T *k, *v;  // the row's first
  const uint64_t* ancestors;
  int n_words;

  int warp, lane, group, pair;
  int key_share;  // of a tile's keys, the warp's first
  int first_row;  // of the query tile's rows, the thread's first; the other one is 8 further

  __device__ __forceinline__ Work(const AttentionProblem<T>& problem, uint4* shared,
                                  int most_splits)
      : p(problem), stages(reinterpret_cast<uint16_t*>(shared)) {
    query_tile = blockIdx.x % p.tiles;
    split = blockIdx.x / p.tiles % most_splits;
    kv_head = blockIdx.x / p.tiles / most_splits % p.kv_heads;
    row = blockIdx.x / p.tiles / most_splits / p.kv_heads;
    keys = p.keys_of(row);
    const Split plan = split_keys(p, keys, most_splits, S::kKeys, S::kLeastTiles);
    blocks = plan.blocks;
    from = static_cast<int>(window_start(keys.prefix, p.window)) + split * plan.tiles * S::kKeys;
    to = min(keys.end, from + plan.tiles * S::kKeys);
    dense_from = static_cast<int>(window_start(keys.prefix + p.nodes - 1, p.window));
    k = p.k + row * p.k_row + kv_head * p.k_head + keys.first * p.k_slot;
    v = p.v + row * p.v_row + kv_head * p.v_head + keys.first * p.v_slot;
    ancestors = p.ancestors + row * p.ancestors_row;
    n_words = words_for(p.nodes);

    warp = threadIdx.x / kWarp;
    lane = threadIdx.x % kWarp;
    group = lane / 4;
    pair = lane % 4 * 2;
    key_share = warp / kRowWarps * S::kWarpKeys;
    first_row = query_tile * S::kRows + warp % kRowWarps * kMmaRows + group;
  }

  __device__ __forceinline__ int node_of(int query_row) const { return query_row / p.group; }
  __device__ __forceinline__ int head_of(int query_row) const {
    return kv_head * p.group + query_row % p.group;
  }
  // The warp's keys of a stage, and the values of the same.
  __device__ __forceinline__ uint16_t* keys_at(int stage) const {
    return stages + stage * S::kStage + key_share * S::kPitch;
  }
  __device__ __forceinline__ uint16_t* values_at(int stage) const {
    return keys_at(stage) + S::kKeys * S::kPitch;
  }
  // The warp's queries after the stages, where they do not fit into the registers.
  __device__ __forceinline__ uint16_t* shared_queries() const {
    return stages + 2 * S::kStage + warp % kRowWarps * kMmaRows * S::kPitch;
  }
};

// A thread's part of the two query rows of its group, g and g + 8 of the warp's, as operand.
template <typename S, int kDim>
struct Queries {
  uint32_t at[S::kSharedQueries ? 1 : kDim / 16][4];
};
// Scores of the two rows for the warp's keys; then their weights.
template <typename S>
struct Scores {
  float at[S::kWarpKeys / 8][4];
};
// Starts the copies of the tile of keys and values from `key` on into a stage.
template <typename T, int kDim, int kRowWarps>
__device__ __forceinline__ void fetch_tile(const Work<T, kDim, kRowWarps>& w, int key, int stage) {
  using S = Shape<kDim, kRowWarps>;
  const AttentionProblem<T>& p = w.p;
  uint16_t* at = w.stages + stage * S::kStage;
  const int count = min(S::kKeys, w.keys.end - key);
  fetch<T, S::kKeys, kDim, S::kPitch>(w.k + int64_t{key} * p.k_slot, p.k_slot, count, p.dim, at);
  fetch<T, S::kKeys, kDim, S::kPitch>(w.v + int64_t{key} * p.v_slot, p.v_slot, count, p.v_dim,
                                      at + S::kKeys * S::kPitch);
  commit_copies();
}

template <typename T, int kDim, int kRowWarps, typename S = Shape<kDim, kRowWarps>>
__device__ __forceinline__ void load_queries(const Work<T, kDim, kRowWarps>& w,
                                             const Scaling& scaling, Queries<S, kDim>& query) {
  const AttentionProblem<T>& p = w.p;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int node = w.node_of(w.first_row + 8 * r), head = w.head_of(w.first_row + 8 * r);
    const bool exists = node < p.nodes;
    const T* from = p.q + w.row * p.q_row + head * p.q_head + (exists ? node : 0) * p.q_node;
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d) {
      const int column = d * 8 + w.pair;
      const uint32_t both =
          exists && column < p.dim
              ? scaling.of_queries(*reinterpret_cast<const uint32_t*>(from + column))
              : 0;
      if constexpr (!S::kSharedQueries)
        query.at[d / 2][d % 2 * 2 + r] = both;
      else if (w.key_share == 0)
        *reinterpret_cast<uint32_t*>(w.shared_queries() + (w.group + 8 * r) * S::kPitch + column) =
            both;
    }
  }
}

// Products of the warp's queries and keys.
template <typename T, int kDim, int kRowWarps, typename S = Shape<kDim, kRowWarps>>
__device__ __forceinline__ void compute_scores(const Work<T, kDim, kRowWarps>& w,
                                               Queries<S, kDim>& query, int stage,
                                               Scores<S>& score) {
  const uint16_t* keys = w.keys_at(stage);
#pragma unroll
  for (int d = 0; d < kDim; d += 16) {
    uint32_t (&a)[4] = query.at[S::kSharedQueries ? 0 : d / 16];
    if constexpr (S::kSharedQueries)
      load_matrices(a, w.shared_queries() + w.lane % 16 * S::kPitch + d + w.lane / 16 * 8);
#pragma unroll
    for (int key = 0; key < S::kWarpKeys; key += 16) {
      uint32_t b[4];
      load_matrices(
          b, keys + (key + w.lane / 16 * 8 + w.lane % 8) * S::kPitch + d + w.lane / 8 % 2 * 8);
      multiply_add<T>(score.at[key / 8], a, b[0], b[1]);
      multiply_add<T>(score.at[key / 8 + 1], a, b[2], b[3]);
    }
  }
}

// -inf for the keys of the tile that a row does not see; `seen`: those that it does, as bits.
template <typename T, int kDim, int kRowWarps, typename S = Shape<kDim, kRowWarps>>
__device__ __forceinline__ void mask_scores(const Work<T, kDim, kRowWarps>& w, int tile,
                                            uint64_t (&seen)[2], Scores<S>& score) {
  const int prefix = w.keys.prefix;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int node = w.node_of(w.first_row + 8 * r);
    const uint64_t* words = w.ancestors + node * w.n_words;
    if (node < w.p.nodes && has_bit(words, node)) {  // alive
      const int64_t start =
          w.p.window > 0 ? window_start(prefix + depth_from_bits(words, w.n_words), w.p.window) : 0;
      seen[r] = visible_keys(words, w.n_words, tile + w.key_share, prefix, w.keys.end, start);
    }
#pragma unroll
    for (int n = 0; n < S::kWarpKeys / 8; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (!(seen[r] >> (n * 8 + w.pair + i) & 1)) score.at[n][2 * r + i] = -INFINITY;
  }
}

// Adds the values of a masked tile that are not finite to the sums of the rows that see them, and
// leaves 0 in their places. All threads of the block call it.
template <typename T, int kDim, int kRowWarps>
__device__ __forceinline__ void add_infinite_values(const Work<T, kDim, kRowWarps>& w, int stage,
                                                    const uint64_t (&seen)[2],
                                                    Running<kDim>& running) {
  using S = Shape<kDim, kRowWarps>;
  const uint16_t* values = w.values_at(stage);
  uint16_t* all = w.stages + stage * S::kStage + S::kKeys * S::kPitch;
  bool tainted = false;
  constexpr int kChunks = kDim / kChunk;  // of a row
#pragma unroll
  for (int i = threadIdx.x; i < S::kKeys * kChunks; i += kThreads)
    tainted |= !all_finite<T>(
        *reinterpret_cast<const uint4*>(all + i / kChunks * S::kPitch + i % kChunks * kChunk));
  if (!__syncthreads_or(tainted)) return;
#pragma unroll 1
  for (int key = 0; key < S::kWarpKeys; ++key)
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint16_t value = values[key * S::kPitch + d * 8 + w.pair + i];
        if (finite<T>(value)) continue;
#pragma unroll
        for (int r = 0; r < 2; ++r)
          if (seen[r] >> key & 1) running.sums[d][2 * r + i] += widen<T>(value);
      }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < S::kKeys * kDim; i += kThreads) {
    uint16_t& value = all[i / kDim * S::kPitch + i % kDim];
    if (!finite<T>(value)) value = 0;
  }
  __syncthreads();
}

template <typename T, int kDim, int kRowWarps, typename S = Shape<kDim, kRowWarps>>
__device__ __forceinline__ void accumulate_values(const Work<T, kDim, kRowWarps>& w, int stage,
                                                  const Scores<S>& weight, Running<kDim>& running) {
  const uint16_t* values = w.values_at(stage);
#pragma unroll
  for (int key = 0; key < S::kWarpKeys; key += 16) {
    const float (&low)[4] = weight.at[key / 8], (&high)[4] = weight.at[key / 8 + 1];
    const uint32_t weights[4] = {pack<T>(low[0], low[1]), pack<T>(low[2], low[3]),
                                 pack<T>(high[0], high[1]), pack<T>(high[2], high[3])};
#pragma unroll
    for (int d = 0; d < kDim; d += 16) {
      uint32_t b[4];
      load_matrices_transposed(b, values + (key + w.lane % 16) * S::kPitch + d + w.lane / 16 * 8);
      multiply_add<T>(running.sums[d / 8], weights, b[0], b[1]);
      multiply_add<T>(running.sums[d / 8 + 1], weights, b[2], b[3]);
    }
  }
}

// Adds up what the warps with the same query rows have, each of its share of the keys; a warp keeps
// a part of the columns. All threads of the block call it.
template <typename T, int kDim, int kRowWarps, typename S = Shape<kDim, kRowWarps>>
__device__ __forceinline__ void merge_warps(const Work<T, kDim, kRowWarps>& w,
                                            const Running<kDim>& own,
                                            Running<kDim / S::kKeyWarps>& merged) {
  constexpr int kGroups = kDim / 8, kKept = kGroups / S::kKeyWarps;  // of 8 columns
  // Of each warp, in place of the tiles: [group][lane] four sums, and [row] base and total.
  float4* sums = reinterpret_cast<float4*>(w.stages);
  float2* weights = reinterpret_cast<float2*>(sums + kWarps * kGroups * kWarp);
  __syncthreads();
#pragma unroll
  for (int d = 0; d < kGroups; ++d)
    sums[(w.warp * kGroups + d) * kWarp + w.lane] =
        make_float4(own.sums[d][0], own.sums[d][1], own.sums[d][2], own.sums[d][3]);
#pragma unroll
  for (int r = 0; r < 2; ++r)
    if (w.pair == 0)
      weights[w.warp * kMmaRows + w.group + 8 * r] = make_float2(own.base[r], own.total[r]);
  __syncthreads();

  const int first_warp = w.warp % kRowWarps, first_kept = w.warp / kRowWarps * kKept;
  float share[S::kKeyWarps][2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float2 of[S::kKeyWarps];
    merged.base[r] = -INFINITY;
    merged.total[r] = 0.0f;
#pragma unroll
    for (int i = 0; i < S::kKeyWarps; ++i) {
      of[i] = weights[(i * kRowWarps + first_warp) * kMmaRows + w.group + 8 * r];
      merged.base[r] = fmaxf(merged.base[r], of[i].x);
    }
#pragma unroll
    for (int i = 0; i < S::kKeyWarps; ++i) {
      share[i][r] = exp2_approx(of[i].x - finite_base(merged.base[r]));
      merged.total[r] = fmaf(of[i].y, share[i][r], merged.total[r]);
    }
  }
#pragma unroll
  for (int d = 0; d < kKept; ++d) {
    float (&sum)[4] = merged.sums[d];
    sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
#pragma unroll
    for (int i = 0; i < S::kKeyWarps; ++i) {
      const float4 x =
          sums[((i * kRowWarps + first_warp) * kGroups + first_kept + d) * kWarp + w.lane];
      sum[0] = fmaf(x.x, share[i][0], sum[0]);
      sum[1] = fmaf(x.y, share[i][0], sum[1]);
      sum[2] = fmaf(x.z, share[i][1], sum[2]);
      sum[3] = fmaf(x.w, share[i][1], sum[3]);
    }
  }
}

// Hands over rows whose sums are complete as far as the block's keys go.
template <typename T, int kDim, int kRowWarps, int kColumns>
__device__ __forceinline__ void hand_over(const Work<T, kDim, kRowWarps>& w, const Splits& splits,
                                          int first_column, const Running<kColumns>& running) {
  const Place at{w.row, w.kv_head, w.first_row, first_column + w.pair};
  if (w.blocks == 1)
    write_rows(w.p, at, running);
  else
    leave_rows(w.p, splits, w.split, at, running);
}

template <typename T, int kDim, int kRowWarps>
__global__ void __launch_bounds__(kThreads, kDim <= 64 ? 3 : 2)
    tree_attention_mma_kernel(const __grid_constant__ AttentionProblem<T> p,
                              const __grid_constant__ Splits splits) {
  using S = Shape<kDim, kRowWarps>;
  extern __shared__ uint4 shared[];
  const Work<T, kDim, kRowWarps> w(p, shared, splits.most);
  let_next_launch_start();
  if (w.split >= w.blocks) return;
  if (w.from < w.to) fetch_tile(w, w.from, 0);
  const Scaling scaling(p);
  Queries<S, kDim> query;
  load_queries(w, scaling, query);

  Running<kDim> running{{-INFINITY, -INFINITY}, {}, {}};
  for (int tile = w.from, stage = 0; tile < w.to; tile += S::kKeys, stage ^= 1) {
    await_copies<0>();
    __syncthreads();  // the tile is there, and no thread reads the other stage any more
    if (tile + S::kKeys < w.to) fetch_tile(w, tile + S::kKeys, stage ^ 1);
    Scores<S> score{};
    compute_scores(w, query, stage, score);
    cap_scores(scaling, score.at);
    // The same for all threads of the block.
    const bool masked = tile < w.dense_from || tile + S::kKeys > w.keys.prefix;
    uint64_t seen[2] = {};
    if (masked) mask_scores(w, tile, seen, score);
    update_softmax(scaling.factor, score.at, running);
    if (masked) add_infinite_values(w, stage, seen, running);
    accumulate_values(w, stage, score, running);
  }
#pragma unroll
  for (float& total : running.total) total = quad_sum(total);
  if constexpr (S::kKeyWarps == 1) {
    hand_over(w, splits, 0, running);
  } else {
    constexpr int kKept = kDim / S::kKeyWarps;
    Running<kKept> merged;
    merge_warps(w, running, merged);
    hand_over(w, splits, w.warp / kRowWarps * kKept, merged);
  }
}

// Blocks to cut the keys into, at most, so that every multiprocessor has two.
int most_splits(int device, int64_t tasks, int64_t slots, int keys, int least_tiles) {
  int processors = 0;
  check("tree_attention",
        cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  const int64_t stretch = int64_t{keys} * least_tiles;
  return static_cast<int>(clamp(2 * processors / (tasks > 0 ? tasks : 1), 1,
                                clamp((slots + stretch - 1) / stretch, 1, kMostSplits)));
}

// The grid and the workspace of a launch.
struct Plan {
  int tiles;  // of query rows
  int64_t tasks, query_rows;
  Splits splits;
};

template <int kDim, int kRowWarps>
Plan plan_for(int64_t batch, int64_t kv_heads, int64_t rows, int64_t slots, int device) {
  using S = Shape<kDim, kRowWarps>;
  Plan plan{};
  plan.tiles = static_cast<int>((rows + S::kRows - 1) / S::kRows);
  plan.tasks = batch * kv_heads * plan.tiles;
  plan.query_rows = batch * kv_heads * rows;
  plan.splits.most = most_splits(device, plan.tasks, slots, S::kKeys, S::kLeastTiles);
  plan.splits.tile_keys = S::kKeys;
  plan.splits.least_tiles = S::kLeastTiles;
  plan.splits.columns = kDim;
  return plan;
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
  Splits& splits = plan.splits;
  if (space.floats < splits.floats(plan.query_rows) ||
      reinterpret_cast<uintptr_t>(space.partial) % sizeof(float4))
    splits.most = 1;
  splits.sums = space.partial;
  splits.weights =
      reinterpret_cast<float2*>(splits.sums + plan.query_rows * splits.most * splits.columns);
  p.tiles = plan.tiles;
  const auto kernel = tree_attention_mma_kernel<T, kDim, kRowWarps>;
  if (S::kBytes > 48 * 1024)  // more than a kernel gets unasked
    check("tree_attention",
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes));
  launch("tree_attention", kernel, grid_x("tree_attention", plan.tasks * splits.most), kThreads,
         S::kBytes, stream, p, splits);
  if (splits.most > 1) merge_splits(p, batch, device, splits, stream);
}

}  // namespace

AttentionSpace attention_space(const Tensor& q, const Tensor& k, const Tensor& v) {
  const int64_t rows = q.shape[2] * (q.shape[1] / k.shape[1]),
                dim = q.shape[3] > v.shape[3] ? q.shape[3] : v.shape[3];
  return with_shape(dim, rows, [&](auto padded, auto row_warps) {
    const Plan plan = plan_for<decltype(padded)::value, decltype(row_warps)::value>(
        q.shape[0], k.shape[1], rows, k.shape[2], q.device_index);
    return AttentionSpace{nullptr, plan.splits.floats(plan.query_rows)};
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
