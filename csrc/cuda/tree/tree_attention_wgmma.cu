// Attention of the draft tree's nodes on sm_90a, for more query rows than 16: the plan of
// tree_attention_mma.cu (attention_tiles.cuh has what they share) with products of warp groups and
// bulk copies.
//
// A block takes 64 query rows for each of its one or two warp groups and a stretch of the rows'
// keys in tiles of 64. The copy engine brings tile after tile, two or three ahead, out of two
// tensor maps that the launch describes (they travel as parameters, so a captured graph has them as
// it has pointers); one thread asks for them. A barrier a stage tells that a tile is there, another
// one that all warps are done with it. Queries and weights are operands from registers, keys and
// values from shared memory.
//
// Against `mma.sync`: 128 rows a block halve what comes from L2; no thread spends instructions on
// copies or on loading operands from shared memory; and a tile's values are read from shared memory
// once for 64 rows instead of 16.
//
// Tiles come whole where other kernels stop at the row's last key: what lies behind it in the cache
// is hidden like every key that a row does not see.
//
// Bytes: keys and values of the prefix once for every kRows query rows (more than once from L2),
// and for each split and query row 4 (D_v + 2) written. Not yet run on a GPU.
#include <cstdlib>
#include <cstring>

#include "cuda/tree/attention_tiles.cuh"
#include "cuda/tree/tree_attention_wgmma.cuh"
#include "cuda/tree/wgmma.cuh"

namespace msn {

constexpr int kGroupWarps = 4;
constexpr int kBox = 64, kBoxBytes = kBox * kBox * 2;  // keys, and values of each, of a copy
constexpr int kPattern = 1024;                         // what boxes are aligned to
constexpr int kMostStages = 4;

template <int kHeadDim, int kGroups>
struct GroupShape {
  static constexpr int kDim = kHeadDim;
  static constexpr int kRowWarps = kGroups * kGroupWarps, kRows = kRowWarps * kMmaRows;
  static constexpr int kKeys = kBox, kWarpKeys = kKeys;
  static constexpr int kLeastTiles = 2 * kRows / kKeys;
  static constexpr int kBlocks = kGroups == 1 ? 2 : 1;

  static constexpr int kThreads = kRowWarps * kWarp;
  static constexpr int kBoxes = (kDim + kBox - 1) / kBox;                   // side by side
  static constexpr int kMatrix = kBoxes * kBoxBytes, kStage = 2 * kMatrix;  // bytes
  static constexpr int kRoom = (192 << 10) / kBlocks / kStage;  // stages; a processor has 228 KB
  static constexpr int kStages = kRoom < kMostStages ? kRoom : kMostStages;
  static constexpr int kAhead = kStages - kGroups;  // tiles; a group may lag behind the first one
  static constexpr int kBytes = kPattern + kStages * (kStage + 2 * 8);
  static_assert(kKeys <= kWordBits);
};

namespace {

// Shared memory: stages, each the boxes of the keys and those of the values, then their barriers.
template <typename S>
struct Stages {
  char* first;

  __device__ __forceinline__ explicit Stages(uint4* shared)
      : first(reinterpret_cast<char*>(shared) + (0u - shared_address(shared)) % kPattern) {}
  __device__ __forceinline__ char* keys(int stage) const { return first + stage * S::kStage; }
  __device__ __forceinline__ char* values(int stage) const { return keys(stage) + S::kMatrix; }
  __device__ __forceinline__ uint64_t* full(int stage) const {
    return reinterpret_cast<uint64_t*>(keys(S::kStages)) + stage;
  }
  __device__ __forceinline__ uint64_t* empty(int stage) const { return full(S::kStages + stage); }
};

// The stage of a tile, and how often the stages have gone round: the parity of their barriers.
template <typename S>
struct Turn {
  int stage = 0, parity = 0;

  __device__ __forceinline__ void next() {
    if (++stage == S::kStages) stage = 0, parity ^= 1;
  }
};

// A thread's part of the two query rows of its group, g and g + 8 of the warp's, as operand.
template <typename S>
struct Queries {
  uint32_t at[S::kDim / 16][4];
};

// The copies of a row's tiles, in order; one thread asks for them.
template <typename T, typename S>
struct Fetch {
  const TileWork<T, S>& w;
  const Stages<S>& stages;
  const CUtensorMap *k, *v;
  int tile;
  Turn<S> turn{};

  // Of the next tile, if there is one and as soon as all warps are done with what its stage held.
  __device__ __forceinline__ void next() {
    if (tile >= w.to) return;
    uint64_t* full = stages.full(turn.stage);
    await_phase(stages.empty(turn.stage), turn.parity ^ 1);
    arrive_and_expect(full, S::kStage);
    const int slot = static_cast<int>(w.keys.first) + tile;
#pragma unroll
    for (int box = 0; box < S::kBoxes; ++box)
      copy_tile(stages.keys(turn.stage) + box * kBoxBytes, k, box * kBox, slot, w.kv_head, w.row,
                full);
#pragma unroll
    for (int box = 0; box < S::kBoxes; ++box)
      copy_tile(stages.values(turn.stage) + box * kBoxBytes, v, box * kBox, slot, w.kv_head, w.row,
                full);
    tile += S::kKeys;
    turn.next();
  }
};

template <typename T, typename S>
__device__ __forceinline__ void compute_scores(const Queries<S>& query, const char* keys,
                                               Scores<S>& score) {
  const uint64_t columns = matrix_descriptor(keys, 16, kPattern);
  hold(score.at);
  open_products();
#pragma unroll
  for (int d = 0; d < S::kDim; d += 16)
    multiply_add_async<T, false>(score.at, query.at[d / 16],
                                 moved_by(columns, d / kBox * kBoxBytes + d % kBox * 2), d > 0);
  commit_products();
  await_products<0>();
  hold(score.at);
}

// Adds the values of a masked tile that are not finite to the sums of the rows that see them, and
// leaves 0 in their places. All threads of the block call it.
template <typename T, typename S>
__device__ __forceinline__ void add_infinite_values(const TileWork<T, S>& w, char* values,
                                                    const uint64_t (&seen)[2],
                                                    Running<S::kDim>& running) {
  uint16_t* all = reinterpret_cast<uint16_t*>(values);
  bool tainted = false;
#pragma unroll
  for (int i = threadIdx.x; i < S::kMatrix / 16; i += S::kThreads)
    tainted |= !all_finite<T>(reinterpret_cast<const uint4*>(values)[i]);
  if (!__syncthreads_or(tainted)) return;
#pragma unroll 1
  for (int key = 0; key < S::kKeys; ++key)
#pragma unroll
    for (int d = 0; d < S::kDim / 8; ++d)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        // As copy_tile swaps chunks.
        const uint16_t value =
            all[d / 8 * kBoxBytes / 2 + key * kBox + (d ^ key) % 8 * kChunk + w.pair + i];
        if (finite<T>(value)) continue;
#pragma unroll
        for (int r = 0; r < 2; ++r)
          if (seen[r] >> key & 1) running.sums[d][2 * r + i] += widen<T>(value);
      }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < S::kMatrix / 2; i += S::kThreads)
    if (!finite<T>(all[i])) all[i] = 0;
  publish_shared();
  __syncthreads();
}

template <typename T, typename S>
__device__ __forceinline__ void accumulate_values(const Scores<S>& weight, const char* values,
                                                  Running<S::kDim>& running) {
  const uint64_t rows = matrix_descriptor(values, kBoxBytes, kPattern);
  uint32_t weights[S::kKeys / 16][4];
#pragma unroll
  for (int j = 0; j < S::kKeys / 16; ++j) pack_weights<T>(weight, j, weights[j]);
  hold(running.sums);
  open_products();
#pragma unroll
  for (int j = 0; j < S::kKeys / 16; ++j)
    multiply_add_async<T, true>(running.sums, weights[j], moved_by(rows, j * 16 * kBox * 2), true);
  commit_products();
  await_products<0>();
  hold(running.sums);
}

template <typename T, int kDim, int kGroups>
__global__ void __launch_bounds__(GroupShape<kDim, kGroups>::kThreads,
                                  GroupShape<kDim, kGroups>::kBlocks)
    tree_attention_wgmma_kernel(const __grid_constant__ AttentionProblem<T> p,
                                const __grid_constant__ Splits splits,
                                const __grid_constant__ CUtensorMap k,
                                const __grid_constant__ CUtensorMap v) {
#ifdef MSN_HAVE_WGMMA
  using S = GroupShape<kDim, kGroups>;
  extern __shared__ uint4 shared[];
  const TileWork<T, S> w(p, splits.most);
  let_next_launch_start();
  if (w.split >= w.blocks) return;
  const Stages<S> stages(shared);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < S::kStages; ++stage) {
      init_barrier(stages.full(stage), 1);
      init_barrier(stages.empty(stage), S::kRowWarps);
    }
    publish_shared();
  }
  __syncthreads();
  Fetch<T, S> fetch{w, stages, &k, &v, w.from};
  if (threadIdx.x == 0)
#pragma unroll 1
    for (int i = 0; i < S::kAhead; ++i) fetch.next();

  Queries<S> query;
  const Scaling scaling(p);
  load_queries(w, scaling,
               [&](int r, int d, uint32_t both) { query.at[d / 2][d % 2 * 2 + r] = both; });
  Running<kDim> running{{-INFINITY, -INFINITY}, {}, {}};
  Turn<S> turn;
  for (int tile = w.from; tile < w.to; tile += S::kKeys, turn.next()) {
    if (threadIdx.x == 0) fetch.next();
    __syncwarp();  // which asks before the others wait
    await_phase(stages.full(turn.stage), turn.parity);
    __syncwarp();  // products want whole warps
    Scores<S> score{};
    compute_scores<T>(query, stages.keys(turn.stage), score);
    cap_scores(scaling, score.at);
    // The same for all threads of the block.
    const bool masked = tile < w.dense_from || tile + S::kKeys > w.keys.prefix;
    uint64_t seen[2] = {};
    if (masked) mask_scores(w, tile, seen, score);
    update_softmax(scaling.factor, score.at, running);
    if (masked) add_infinite_values(w, stages.values(turn.stage), seen, running);
    accumulate_values<T>(score, stages.values(turn.stage), running);
    if (w.lane == 0) arrive(stages.empty(turn.stage));
  }
#pragma unroll
  for (float& total : running.total) total = quad_sum(total);
  hand_over(w, splits, 0, running);
#else
  __trap();
#endif
}

// Calls `f` with the two sizes of the kernel for these heads and query rows, as integral constants.
template <typename F>
auto with_group_shape(int64_t dim, int64_t rows, const F& f) {
  const auto pick = [&](auto padded) {
    return rows <= kGroupWarps * kMmaRows ? f(padded, Int<1>{}) : f(padded, Int<2>{});
  };
  if (dim <= 64) return pick(Int<64>{});
  if (dim <= 96) return pick(Int<96>{});
  return pick(Int<128>{});
}

template <typename T, int kDim, int kGroups>
bool launch_groups(AttentionProblem<T> p, int64_t batch, int device, const AttentionSpace& space,
                   void* stream) {
  using S = GroupShape<kDim, kGroups>;
  const auto kernel = tree_attention_wgmma_kernel<T, kDim, kGroups>;
  // First: in a thread that comes to the device with this call, it makes the context current that
  // the driver describes tiles in.
  check("tree_attention",
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes));
  CUtensorMap k, v;
  if (!describe_tiles(&k, p.k, batch, p.kv_heads, p.slots, p.dim, p.k_row, p.k_head, p.k_slot) ||
      !describe_tiles(&v, p.v, batch, p.kv_heads, p.slots, p.v_dim, p.v_row, p.v_head, p.v_slot))
    return false;
  const Plan plan = plan_in<T, S>(p, batch, device, space);
  p.tiles = plan.tiles;
  launch("tree_attention", kernel, grid_x("tree_attention", plan.tasks * plan.splits.most),
         S::kThreads, S::kBytes, stream, p, plan.splits, k, v);
  if (plan.splits.most > 1) merge_splits(p, batch, device, plan.splits, stream);
  return true;
}

}  // namespace

bool wgmma_takes(int64_t dim, int64_t rows, int device) {
#ifdef MSN_SM90A
  static const bool wanted = [] {
    const char* value = std::getenv("MSN_WGMMA");
    return !value || std::strcmp(value, "off") != 0;
  }();
  int major = 0, minor = 0;
  check("tree_attention",
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  check("tree_attention",
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return wanted && major == 9 && minor == 0 && dim <= 128 && rows > kMmaRows;
#else
  return false;
#endif
}

int64_t wgmma_floats(int64_t batch, int64_t kv_heads, int64_t rows, int64_t slots, int64_t dim,
                     int device) {
  return with_group_shape(dim, rows, [&](auto padded, auto groups) {
    return plan_for<GroupShape<decltype(padded)::value, decltype(groups)::value>>(
               batch, kv_heads, rows, slots, device)
        .floats();
  });
}

template <typename T>
bool tree_attention_wgmma(const AttentionProblem<T>& p, int64_t batch, int device,
                          const AttentionSpace& space, void* stream) {
  return with_group_shape(
      p.dim > p.v_dim ? p.dim : p.v_dim, int64_t{1} * p.nodes * p.group,
      [&](auto padded, auto groups) {
        return launch_groups<T, decltype(padded)::value, decltype(groups)::value>(p, batch, device,
                                                                                  space, stream);
      });
}

template bool tree_attention_wgmma(const AttentionProblem<__half>&, int64_t, int,
                                   const AttentionSpace&, void*);
template bool tree_attention_wgmma(const AttentionProblem<__nv_bfloat16>&, int64_t, int,
                                   const AttentionSpace&, void*);

}  // namespace msn
