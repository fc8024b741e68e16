// What the attention kernels on tensor cores share: a block takes some query rows and a stretch of
// their keys, tile by tile; each of its warps 16 of the rows and some or all of a tile's keys.
//
// A kernel's shape S is a struct of constants:
//   kDim         head size, padded
//   kRows        query rows of a block
//   kRowWarps    warps side by side on query rows
//   kKeys        keys of a tile
//   kWarpKeys    those of them that a warp takes
//   kBlocks      blocks that a multiprocessor holds
//   kLeastTiles  so many that a block leaves less than half of what it read in the workspace
#pragma once
#include "cuda/tree/attention_softmax.cuh"

namespace msn {

constexpr int kMmaRows = 16, kChunk = 8;  // values in 16 bytes

template <int kValue>
using Int = std::integral_constant<int, kValue>;

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

// A thread's work: the block's share of the problem, then the thread's place in it.
template <typename T, typename S>
struct TileWork {
  const AttentionProblem<T>& p;
  // Blocks that read the same keys and values stand next to each other.
  int query_tile, split, kv_head, row;
  RowKeys keys;
  int from, to;    // the block's keys
  int dense_from;  // from here to the end of the prefix every node's window sees every key
  int blocks;      // with the same query rows
  const uint64_t* ancestors;
  int n_words;

  int warp, lane, group, pair;
  int key_share;  // of a tile's keys, the warp's first
  int first_row;  // of the query tile's rows, the thread's first; the other one is 8 further

  __device__ __forceinline__ TileWork(const AttentionProblem<T>& problem, int most_splits)
      : p(problem) {
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
    ancestors = p.ancestors + row * p.ancestors_row;
    n_words = words_for(p.nodes);

    warp = threadIdx.x / kWarp;
    lane = threadIdx.x % kWarp;
    group = lane / 4;
    pair = lane % 4 * 2;
    key_share = warp / S::kRowWarps * S::kWarpKeys;
    first_row = query_tile * S::kRows + warp % S::kRowWarps * kMmaRows + group;
  }

  __device__ __forceinline__ int node_of(int query_row) const { return query_row / p.group; }
  __device__ __forceinline__ int head_of(int query_row) const {
    return kv_head * p.group + query_row % p.group;
  }
};

// Scores of the thread's two rows, g and g + 8 of the warp's, for the warp's keys; then their
// weights.
template <typename S>
struct Scores {
  float at[S::kWarpKeys / 8][4];
};

// Calls store(r, d, values) for each two values that the thread takes of its rows' queries as
// operand: columns 8 d + pair and the next one of row r.
template <typename T, typename S, typename Store>
__device__ __forceinline__ void load_queries(const TileWork<T, S>& w, const Scaling& scaling,
                                             const Store& store) {
  const AttentionProblem<T>& p = w.p;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int node = w.node_of(w.first_row + 8 * r), head = w.head_of(w.first_row + 8 * r);
    const bool exists = node < p.nodes;
    const T* from = p.q + w.row * p.q_row + head * p.q_head + (exists ? node : 0) * p.q_node;
#pragma unroll
    for (int d = 0; d < S::kDim / 8; ++d) {
      const int column = d * 8 + w.pair;
      store(r, d,
            exists && column < p.dim
                ? scaling.of_queries(*reinterpret_cast<const uint32_t*>(from + column))
                : 0u);
    }
  }
}

// -inf for the keys of the tile that a row does not see; `seen`: those that it does, as bits.
template <typename T, typename S>
__device__ __forceinline__ void mask_scores(const TileWork<T, S>& w, int tile, uint64_t (&seen)[2],
                                            Scores<S>& score) {
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

// The weights of keys 16 j to 16 j + 15 as operand of a product.
template <typename T, typename S>
__device__ __forceinline__ void pack_weights(const Scores<S>& weight, int j,
                                             uint32_t (&packed)[4]) {
  const float (&low)[4] = weight.at[2 * j], (&high)[4] = weight.at[2 * j + 1];
  packed[0] = pack<T>(low[0], low[1]);
  packed[1] = pack<T>(low[2], low[3]);
  packed[2] = pack<T>(high[0], high[1]);
  packed[3] = pack<T>(high[2], high[3]);
}

// Hands over rows whose sums are complete as far as the block's keys go.
template <typename T, typename S, int kColumns>
__device__ __forceinline__ void hand_over(const TileWork<T, S>& w, const Splits& splits,
                                          int first_column, const Running<kColumns>& running) {
  const Place at{w.row, w.kv_head, w.first_row, first_column + w.pair};
  if (w.blocks == 1)
    write_rows(w.p, at, running);
  else
    leave_rows(w.p, splits, w.split, at, running);
}

// The grid and the workspace of a launch.
struct Plan {
  int tiles;  // of query rows
  int64_t tasks, query_rows;
  Splits splits;

  int64_t floats() const { return splits.floats(query_rows); }
};

// Keys are cut into so many blocks, at most, that every multiprocessor has all that it holds.
template <typename S>
Plan plan_for(int64_t batch, int64_t kv_heads, int64_t rows, int64_t slots, int device) {
  Plan plan{};
  plan.tiles = static_cast<int>((rows + S::kRows - 1) / S::kRows);
  plan.tasks = batch * kv_heads * plan.tiles;
  plan.query_rows = batch * kv_heads * rows;
  int processors = 0;
  check("tree_attention",
        cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  const int64_t stretch = int64_t{S::kKeys} * S::kLeastTiles;
  plan.splits.most =
      static_cast<int>(clamp(S::kBlocks * processors / (plan.tasks > 0 ? plan.tasks : 1), 1,
                             clamp((slots + stretch - 1) / stretch, 1, kMostSplits)));
  plan.splits.tile_keys = S::kKeys;
  plan.splits.least_tiles = S::kLeastTiles;
  plan.splits.columns = S::kDim;
  return plan;
}

// The plan for a launch with this workspace.
template <typename T, typename S>
Plan plan_in(const AttentionProblem<T>& p, int64_t batch, int device, const AttentionSpace& space) {
  Plan plan = plan_for<S>(batch, p.kv_heads, int64_t{1} * p.nodes * p.group, p.slots, device);
  Splits& splits = plan.splits;
  if (space.floats < plan.floats() || reinterpret_cast<uintptr_t>(space.partial) % sizeof(float4))
    splits.most = 1;
  splits.sums = space.partial;
  splits.weights =
      reinterpret_cast<float2*>(splits.sums + plan.query_rows * splits.most * splits.columns);
  return plan;
}

}  // namespace msn
