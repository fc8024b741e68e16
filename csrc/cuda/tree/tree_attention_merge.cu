// Merges the sums that blocks with the same query rows left (tree_attention_split.cuh): a warp a
// query row. Lane i takes the weights of splits i and 32 + i and reduces them with shuffles; then a
// lane has every 32nd four columns, a load of 16 bytes a split, 16 of them on their way at once.
// Sums are added in the order of the splits, so that the same input gives the same bits.
//
// Where the device can, the launch is set up while the blocks before it still run; what does not
// come from them is read before they are waited for.
//
// Bytes: 4 (D_v + 2) a split and query row read, from L2. Not yet run on a GPU.
#include "cuda/tree/tree_attention_split.cuh"

namespace msn {

namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kLaneColumns = 4;
constexpr int kAtOnce = 16;  // loads

// What each split's sums are multiplied by, two of them for each lane, and the whole row's base and
// total.
struct Shares {
  float of[kMostSplits / kWarp];
  float base, total;
};

__device__ __forceinline__ Shares weigh_splits(const float2* weights, int blocks, int lane) {
  constexpr int kOfLane = kMostSplits / kWarp;
  float2 own[kOfLane];
  Shares shares{{}, -INFINITY, 0.0f};
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    const int split = i * kWarp + lane;
    own[i] = split < blocks ? __ldcg(weights + split) : make_float2(-INFINITY, 0.0f);
    shares.base = fmaxf(shares.base, own[i].x);
  }
  shares.base = warp_max(shares.base);
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    shares.of[i] = exp2_approx(own[i].x - finite_base(shares.base));
    shares.total = fmaf(own[i].y, shares.of[i], shares.total);
  }
  shares.total = warp_sum(shares.total);
  return shares;
}

// The sums of some splits as they come. kParts: of 128 columns, four a lane.
template <int kParts>
struct Step {
  static constexpr int kSplits = kAtOnce / kParts;
  static_assert(kWarp % kSplits == 0);  // so that their shares lie in one register
  float4 of[kSplits][kParts];
};

// Loads the splits from `first` on; zeros where there are no more.
template <int kColumns, int kParts>
__device__ __forceinline__ void load_splits(const float* sums, int first, int blocks, int lane,
                                            Step<kParts>& step) {
#pragma unroll
  for (int i = 0; i < Step<kParts>::kSplits; ++i)
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int column = (part * kWarp + lane) * kLaneColumns;
      step.of[i][part] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (first + i < blocks && column < kColumns)
        step.of[i][part] = __ldcg(
            reinterpret_cast<const float4*>(sums + first * kColumns + column + i * kColumns));
    }
}

template <int kParts>
__device__ __forceinline__ void add_splits(const Step<kParts>& step, int first,
                                           const Shares& shares, float4 (&sum)[kParts]) {
  const float own = first < kWarp ? shares.of[0] : shares.of[1];
#pragma unroll
  for (int i = 0; i < Step<kParts>::kSplits; ++i) {
    const float share = __shfl_sync(kWholeWarp, own, first % kWarp + i);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const float4& x = step.of[i][part];
      sum[part].x = fmaf(x.x, share, sum[part].x);
      sum[part].y = fmaf(x.y, share, sum[part].y);
      sum[part].z = fmaf(x.z, share, sum[part].z);
      sum[part].w = fmaf(x.w, share, sum[part].w);
    }
  }
}

template <typename T, int kColumns>
__global__ void __launch_bounds__(kThreads)
    tree_attention_merge_kernel(const __grid_constant__ AttentionProblem<T> p,
                                const __grid_constant__ Splits splits, int query_rows) {
  constexpr int kParts = (kColumns + kWarp * kLaneColumns - 1) / (kWarp * kLaneColumns);
  const int lane = threadIdx.x % kWarp, count = p.nodes * p.group;
  const int place = static_cast<int>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int row = place / count / p.kv_heads, kv_head = place / count % p.kv_heads;
  const int query_row = place % count, node = query_row / p.group;
  const int head = kv_head * p.group + query_row % p.group;
  int blocks = 1;
  RowEnd end{};
  if (place < query_rows) {
    blocks =
        split_keys(p, p.keys_of(row), splits.most, splits.tile_keys, splits.least_tiles).blocks;
    end = row_end(p, row, node, head);
  }

  await_launch_before();
  if (blocks == 1) return;
  const int64_t first_split = int64_t{place} * splits.most;
  const float* sums = splits.sums + first_split * kColumns;
  Step<kParts> step;
  load_splits<kColumns>(sums, 0, blocks, lane, step);
  const Shares shares = weigh_splits(splits.weights + first_split, blocks, lane);
  float4 sum[kParts] = {};
  add_splits(step, 0, shares, sum);
#pragma unroll 1
  for (int first = step.kSplits; first < blocks; first += step.kSplits) {
    load_splits<kColumns>(sums, first, blocks, lane, step);
    add_splits(step, first, shares, sum);
  }

  const Output output = output_of(end, shares.base, shares.total);
  T* to = output_row(p, row, node, head);
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int column = (part * kWarp + lane) * kLaneColumns;
    if (column < p.v_dim)
      *reinterpret_cast<uint2*>(to + column) =
          make_uint2(pack<T>(output.of(sum[part].x), output.of(sum[part].y)),
                     pack<T>(output.of(sum[part].z), output.of(sum[part].w)));
  }
}

}  // namespace

template <typename T>
void merge_splits(const AttentionProblem<T>& p, int64_t batch, int device, const Splits& splits,
                  void* stream) {
  // Few: where the keys are split there are no more blocks than twice the multiprocessors.
  const int query_rows = static_cast<int>(batch) * p.kv_heads * p.nodes * p.group;
  const unsigned blocks = (query_rows + kWarps - 1) / kWarps;
  const auto launch_columns = [&](auto kernel) {
    launch_early("tree_attention", device, kernel, blocks, kThreads, stream, p, splits, query_rows);
  };
  switch (splits.columns) {
    case 64: return launch_columns(tree_attention_merge_kernel<T, 64>);
    case 96: return launch_columns(tree_attention_merge_kernel<T, 96>);
    case 128: return launch_columns(tree_attention_merge_kernel<T, 128>);
    default: return launch_columns(tree_attention_merge_kernel<T, 256>);
  }
}

template void merge_splits(const AttentionProblem<__half>&, int64_t, int, const Splits&, void*);
template void merge_splits(const AttentionProblem<__nv_bfloat16>&, int64_t, int, const Splits&,
                           void*);

}  // namespace msn
