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
#include "cuda/tree/attention_tiles.cuh"
#include "cuda/tree/tree_attention_wgmma.cuh"

namespace msn {

namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;

// Sizes that follow from the head size and from how many of the four warps stand side by side on
// query rows.
template <int kHeadDim, int kWarpsOfRows>
struct Shape {
  static constexpr int kDim = kHeadDim, kRowWarps = kWarpsOfRows, kBlocks = 2;
  static constexpr int kRows = kRowWarps * kMmaRows;
  static constexpr int kKeyWarps = kWarps / kRowWarps;
  static constexpr int kKeys = kDim > 128 ? 32 : 64;  // of a tile
  static constexpr int kWarpKeys = kKeys / kKeyWarps;
  static constexpr int kPitch =
      kDim + kChunk;  // 8 rows of a matrix then lie in 8 different groups of banks
  static constexpr int kStage = 2 * kKeys * kPitch;   // keys and values
  static constexpr bool kSharedQueries = kDim > 128;  // where they do not fit into the registers
  static constexpr int kBytes = 2 * (2 * kStage + (kSharedQueries ? kRows * kPitch : 0));
  static constexpr int kLeastTiles = 2 * kRows > kKeys ? 2 * kRows / kKeys : 1;
  static_assert(kWarpKeys % kMmaRows == 0 && kWarpKeys <= kWordBits);
  static_assert(kWarps * kMmaRows * (kDim + 2) * 4 <= kBytes,
                "the warps' sums take the place of the tiles");
};

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

// The work on keys and values in shared memory, in two stages, each a tile of both.
template <typename T, int kDim, int kRowWarps>
struct Work : TileWork<T, Shape<kDim, kRowWarps>> {
  using S = Shape<kDim, kRowWarps>;

  uint16_t* stages;
  const T *k, *v;  // the row's first

  __device__ __forceinline__ Work(const AttentionProblem<T>& p, uint4* shared, int most_splits)
      : TileWork<T, S>(p, most_splits),
        stages(reinterpret_cast<uint16_t*>(shared)),
        k(p.k + this->row * p.k_row + this->kv_head * p.k_head + this->keys.first * p.k_slot),
        v(p.v + this->row * p.v_row + this->kv_head * p.v_head + this->keys.first * p.v_slot) {}

  // The warp's keys of a stage, and the values of the same.
  __device__ __forceinline__ uint16_t* keys_at(int stage) const {
    return stages + stage * S::kStage + this->key_share * S::kPitch;
  }
  __device__ __forceinline__ uint16_t* values_at(int stage) const {
    return keys_at(stage) + S::kKeys * S::kPitch;
  }
  // The warp's queries after the stages, where they do not fit into the registers.
  __device__ __forceinline__ uint16_t* shared_queries() const {
    return stages + 2 * S::kStage + this->warp % kRowWarps * kMmaRows * S::kPitch;
  }
};

// A thread's part of the two query rows of its group, g and g + 8 of the warp's, as operand.
template <typename S, int kDim>
struct Queries {
  uint32_t at[S::kSharedQueries ? 1 : kDim / 16][4];
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
__device__ __forceinline__ void keep_queries(const Work<T, kDim, kRowWarps>& w,
                                             const Scaling& scaling, Queries<S, kDim>& query) {
  load_queries(w, scaling, [&](int r, int d, uint32_t both) {
    if constexpr (!S::kSharedQueries)
      query.at[d / 2][d % 2 * 2 + r] = both;
    else if (w.key_share == 0)
      *reinterpret_cast<uint32_t*>(w.shared_queries() + (w.group + 8 * r) * S::kPitch + d * 8 +
                                   w.pair) = both;
  });
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
    uint32_t weights[4];
    pack_weights<T>(weight, key / 16, weights);
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
  keep_queries(w, scaling, query);

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
  const Plan plan = plan_in<T, S>(p, batch, device, space);
  p.tiles = plan.tiles;
  const auto kernel = tree_attention_mma_kernel<T, kDim, kRowWarps>;
  if (S::kBytes > 48 * 1024)  // more than a kernel gets unasked
    check("tree_attention",
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes));
  launch("tree_attention", kernel, grid_x("tree_attention", plan.tasks * plan.splits.most),
         kThreads, S::kBytes, stream, p, plan.splits);
  if (plan.splits.most > 1) merge_splits(p, batch, device, plan.splits, stream);
}

}  // namespace

AttentionSpace attention_space(const Tensor& q, const Tensor& k, const Tensor& v) {
  const int64_t batch = q.shape[0], kv_heads = k.shape[1], slots = k.shape[2],
                rows = q.shape[2] * (q.shape[1] / kv_heads),
                dim = q.shape[3] > v.shape[3] ? q.shape[3] : v.shape[3];
  int64_t floats = with_shape(dim, rows, [&](auto padded, auto row_warps) {
    return plan_for<Shape<decltype(padded)::value, decltype(row_warps)::value>>(
               batch, kv_heads, rows, slots, q.device_index)
        .floats();
  });
  if (wgmma_takes(dim, rows, q.device_index)) {
    const int64_t other = wgmma_floats(batch, kv_heads, rows, slots, dim, q.device_index);
    floats = other > floats ? other : floats;
  }
  return {nullptr, floats};
}

template <typename T>
void tree_attention_mma(const AttentionProblem<T>& p, int64_t batch, int device,
                        const AttentionSpace& space, void* stream) {
  const int64_t dim = p.dim > p.v_dim ? p.dim : p.v_dim, rows = int64_t{1} * p.nodes * p.group;
  if (wgmma_takes(dim, rows, device) && tree_attention_wgmma(p, batch, device, space, stream))
    return;
  with_shape(dim, rows, [&](auto padded, auto row_warps) {
    launch_shape<T, decltype(padded)::value, decltype(row_warps)::value>(p, batch, device, space,
                                                                         stream);
  });
}

template void tree_attention_mma(const AttentionProblem<__half>&, int64_t, int,
                                 const AttentionSpace&, void*);
template void tree_attention_mma(const AttentionProblem<__nv_bfloat16>&, int64_t, int,
                                 const AttentionSpace&, void*);

}  // namespace msn
