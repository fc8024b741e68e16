// Attention of the draft tree's nodes over the prefix and their own ancestors, and the choice of
// its kernel: tensor cores (tree_attention_mma.cu) for 16-bit rows of whole 16 bytes, CUDA cores,
// below, for all others.
//
// One block per (row of the batch, key-value head, tile of 16 query rows); a query row is a node
// and one of the query heads that share the key-value head, so keys and values are read once for
// the whole group and never repeated in memory. The block walks over tiles of 32 keys, staged in
// shared memory as float: prefix slots [offset, length) from the first that the root's window
// reaches, then the tree's slots. Each of 4 warps owns 4 query rows: a lane a key for the scores,
// a lane every 32nd value for the sums, with the softmax kept online in float32.
// A key that a query may not see takes no part: its score is dropped before the softmax and its
// value is skipped, not multiplied by 0, since it may be NaN. Slots outside the cache are not read.
//
// Bytes: every tile of query rows reads the whole prefix, N * group / 16 times in all, from L2
// where it fits. The prefix is not split over blocks, so long prefixes with few nodes leave the
// device idle.
#include <type_traits>

#include "cuda/tree/tree_attention.cuh"
#include "tree_ops.h"

namespace msn {

namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kWarpRows = 4, kBlockRows = kWarps * kWarpRows;  // query rows
constexpr int kKeys = kWarp;                                   // of a tile: one a lane
constexpr int kFewerKeys = 16;  // where 32 of float64 are more than shared memory holds

template <typename S>
struct alignas(4 * sizeof(S)) Four {
  S x, y, z, w;
};

// Row length in shared memory: reads of four floats by 8 lanes in 8 different rows then hit all 32
// banks.
__host__ __device__ constexpr int key_pitch(int dim) { return 4 * ((dim + 3) / 4 | 1); }
__host__ __device__ constexpr int query_pitch(int dim) { return (dim + 3) / 4 * 4; }

// `count` rows of `width` values as sums into a tile of `tile_keys` rows of `padded` values, zeros
// around them. `wide` requires `width` and `padded` to be whole 16-byte chunks.
template <typename T>
__device__ void stage(const T* rows, int64_t stride, int count, int width, bool wide, Sum<T>* tile,
                      int tile_keys, int pitch, int padded) {
  constexpr int kChunk = 16 / sizeof(T);
  if (wide) {
    const int chunks = padded / kChunk;
#pragma unroll 4
    for (int i = threadIdx.x; i < tile_keys * chunks; i += kThreads) {
      const int row = i / chunks, column = i % chunks * kChunk;
      uint4 raw = make_uint4(0, 0, 0, 0);
      if (row < count && column < width)
        raw = *reinterpret_cast<const uint4*>(rows + row * stride + column);
      const T* values = reinterpret_cast<const T*>(&raw);
      Sum<T>* to = tile + row * pitch + column;
      if constexpr (kChunk % 4 == 0) {
#pragma unroll
        for (int x = 0; x < kChunk; x += 4)
          *reinterpret_cast<Four<Sum<T>>*>(to + x) = {to_float(values[x]), to_float(values[x + 1]),
                                                      to_float(values[x + 2]),
                                                      to_float(values[x + 3])};
      } else {
#pragma unroll
        for (int x = 0; x < kChunk; ++x) to[x] = to_float(values[x]);
      }
    }
  } else {
    for (int row = threadIdx.x / kWarp; row < tile_keys; row += kWarps)
      for (int column = threadIdx.x % kWarp; column < padded; column += kWarp)
        tile[row * pitch + column] =
            row < count && column < width ? to_float(rows[row * stride + column]) : Sum<T>{0};
  }
}

// sums[r] += weight of key j for row r * value of key j, over the tile. kDense: every row sees
// every key; else only keys in `seen` count.
template <bool kDense, int kColumns, typename S>
__device__ void add_values(S (&sums)[kWarpRows][kColumns], const S (&weight)[kWarpRows],
                           const unsigned (&seen)[kWarpRows], const S* values, int count) {
#pragma unroll 4
  for (int j = 0; j < (kDense ? kKeys : count); ++j) {
    S value[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) value[c] = values[(j * kColumns + c) * kWarp];
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const S of_key = __shfl_sync(kWholeWarp, weight[r], j);
      if (kDense || (seen[r] >> j & 1)) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) sums[r][c] = fma(of_key, value[c], sums[r][c]);
      }
    }
  }
}

// The query rows of a warp. kColumns: values of a head, in units of 32, one a lane.
template <typename S, int kColumns>
struct Rows {
  int node[kWarpRows], start[kWarpRows];   // `start`: the first position that a row may see
  bool live[kWarpRows], any[kWarpRows];    // `any`: has seen a key
  S largest[kWarpRows], total[kWarpRows];  // a lane holds a part of the total
  S sums[kWarpRows][kColumns];
};

// Sets up the warp's rows, `first_row` and on, with their queries in shared memory.
template <typename T, int kColumns, typename S>
__device__ __forceinline__ void load_queries(const AttentionProblem<T>& p, int64_t row, int kv_head,
                                             int first_row, int prefix, const uint64_t* ancestors,
                                             S* queries, Rows<S, kColumns>& rows) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int n_words = words_for(p.nodes), pitch = query_pitch(p.dim);
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    const int node = (first_row + r) / p.group;
    const int head = kv_head * p.group + (first_row + r) % p.group;
    const bool exists = node < p.nodes;
    const int depth = exists ? depth_from_bits(ancestors + node * n_words, n_words) : -1;
    rows.node[r] = node;
    rows.live[r] = depth >= 0;
    rows.any[r] = false;
    rows.start[r] = static_cast<int>(window_start(prefix + depth, p.window));
    rows.largest[r] = exists && p.sinks ? to_float(p.sinks[head]) : S{-INFINITY};
    rows.total[r] = lane == 0 && rows.largest[r] != -INFINITY ? 1 : 0;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) rows.sums[r][c] = 0;
    const T* query = p.q + row * p.q_row + head * p.q_head + node * p.q_node;
    for (int d = lane; d < pitch; d += kWarp)
      queries[(warp * kWarpRows + r) * pitch + d] = exists && d < p.dim ? to_float(query[d]) : S{0};
  }
}

// The products of this lane's key with the warp's queries, of `width` values each.
template <typename S>
__device__ __forceinline__ void compute_scores(const S* key_row, const S* queries, int width,
                                               S (&score)[kWarpRows]) {
  const int warp = threadIdx.x / kWarp;
  const Four<S>* key = reinterpret_cast<const Four<S>*>(key_row);
  const Four<S>* query = reinterpret_cast<const Four<S>*>(queries + warp * kWarpRows * width);
#pragma unroll 2
  for (int d = 0; d < width / 4; ++d) {
    const Four<S> a = key[d];
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const Four<S> b = query[r * (width / 4) + d];
      score[r] = fma(a.x, b.x, fma(a.y, b.y, fma(a.z, b.z, fma(a.w, b.w, score[r]))));
    }
  }
}

// Turns the scores of the tile of keys from `from` on into weights, with the sums so far at the
// same scale; `seen`: the keys that each row sees, as bits. Returns true if every row sees every
// key.
template <typename T, int kColumns, typename S>
__device__ __forceinline__ bool update_softmax(const AttentionProblem<T>& p,
                                               const RowKeys& row_keys, int from, int count,
                                               const uint64_t* ancestors, S (&score)[kWarpRows],
                                               unsigned (&seen)[kWarpRows],
                                               Rows<S, kColumns>& rows) {
  const int lane = threadIdx.x % kWarp, n_words = words_for(p.nodes), prefix = row_keys.prefix;
  const bool in_prefix = from + lane < prefix;
  const int key_node = in_prefix ? 0 : from + lane - prefix;
  int position = from + lane;  // logical: in the tree, siblings share one
  if (p.window > 0 && !in_prefix && lane < count)
    position = prefix + depth_from_bits(ancestors + key_node * n_words, n_words);
  bool dense = true;
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    const bool allowed = rows.live[r] && lane < count && position >= rows.start[r] &&
                         (in_prefix || has_bit(ancestors + rows.node[r] * n_words, key_node));
    seen[r] = __ballot_sync(kWholeWarp, allowed);
    // A dead row's sums are not written.
    dense = dense && (!rows.live[r] || seen[r] == kWholeWarp);
    S s = score[r] * static_cast<S>(p.scale);
    if (p.softcap > 0.0) s = static_cast<S>(p.softcap) * tanh(s / static_cast<S>(p.softcap));
    s = allowed ? s : S{-INFINITY};
    const S before = rows.largest[r];
    rows.largest[r] = fmax(before, warp_max(s));
    const S base = rows.largest[r] == -INFINITY ? S{0} : rows.largest[r];  // not -inf - -inf
    const S fade = exp(before - base);
    score[r] = allowed ? exp(s - base) : S{0};
    rows.total[r] = rows.total[r] * fade + score[r];
    rows.any[r] = rows.any[r] || seen[r] != 0;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) rows.sums[r][c] *= fade;
  }
  return dense;
}

template <typename T, int kColumns, typename S>
__device__ __forceinline__ void write_rows(const AttentionProblem<T>& p, int64_t row, int kv_head,
                                           int first_row, const Rows<S, kColumns>& rows) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    const S weight = warp_sum(rows.total[r]);
    if (rows.node[r] >= p.nodes) continue;
    const int head = kv_head * p.group + (first_row + r) % p.group;
    T* out = p.out + ((row * p.nodes + rows.node[r]) * p.kv_heads * p.group + head) * p.v_dim;
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      if (c * kWarp + lane < p.v_dim)
        from_float(rows.any[r] ? rows.sums[r][c] / weight : S{0}, out + c * kWarp + lane);
  }
}

// The blocks that a multiprocessor is asked to hold are what shared memory allows; they bound the
// registers.
template <typename T, int kColumns>
__global__ void __launch_bounds__(kThreads, kColumns > 4 || sizeof(T) == 8 ? 2 : 4)
    tree_attention_kernel(const __grid_constant__ AttentionProblem<T> p, int keys_of_a_tile) {
  using S = Sum<T>;
  const int tile_keys = std::is_same_v<S, double> ? keys_of_a_tile : kKeys;
  extern __shared__ uint4 shared[];
  const int pitch = key_pitch(p.dim), q_pitch = query_pitch(p.dim);
  S* keys = reinterpret_cast<S*>(shared);
  S* values = keys + tile_keys * pitch;
  S* queries = values + tile_keys * kColumns * kWarp;

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int tile = blockIdx.x % p.tiles, kv_head = blockIdx.x / p.tiles % p.kv_heads;
  const int64_t row = blockIdx.x / p.tiles / p.kv_heads;
  const uint64_t* ancestors = p.ancestors + row * p.ancestors_row;
  const RowKeys row_keys = p.keys_of(row);
  const int end = row_keys.end, first_row = tile * kBlockRows + warp * kWarpRows;
  Rows<S, kColumns> rows;
  load_queries(p, row, kv_head, first_row, row_keys.prefix, ancestors, queries, rows);

  const T* k = p.k + row * p.k_row + kv_head * p.k_head;
  const T* v = p.v + row * p.v_row + kv_head * p.v_head;
  // No live node comes before the root, so none sees what the root's window leaves out.
  for (int from = static_cast<int>(window_start(row_keys.prefix, p.window)); from < end;
       from += tile_keys) {
    const int count = min(end - from, tile_keys);
    const int64_t slot = row_keys.first + from;
    stage(k + slot * p.k_slot, p.k_slot, count, p.dim, p.wide_k, keys, tile_keys, pitch, q_pitch);
    stage(v + slot * p.v_slot, p.v_slot, count, p.v_dim, p.wide_v, values, tile_keys,
          kColumns * kWarp, kColumns * kWarp);
    __syncthreads();
    S score[kWarpRows] = {};
    // Lanes beyond a tile's last key take that one; it does not count for them.
    compute_scores(keys + min(lane, tile_keys - 1) * pitch, queries, q_pitch, score);
    unsigned seen[kWarpRows];
    if (update_softmax(p, row_keys, from, count, ancestors, score, seen, rows))
      add_values<true, kColumns>(rows.sums, score, seen, values + lane, count);
    else
      add_values<false, kColumns>(rows.sums, score, seen, values + lane, count);
    __syncthreads();
  }
  write_rows(p, row, kv_head, first_row, rows);
}

// Bytes of shared memory for tiles of so many keys.
template <typename T, int kColumns>
size_t shared_bytes(int dim, int tile_keys) {
  return sizeof(Sum<T>) *
         (tile_keys * (key_pitch(dim) + kColumns * kWarp) + kBlockRows * query_pitch(dim));
}

template <typename T, int kColumns>
void launch_columns(AttentionProblem<T> p, int64_t batch, int device, void* stream) {
  p.tiles = (p.nodes * p.group + kBlockRows - 1) / kBlockRows;
  int most = 0, tile_keys = kKeys;
  check("tree_attention",
        cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  size_t bytes = shared_bytes<T, kColumns>(p.dim, tile_keys);
  if (std::is_same_v<T, double> && bytes > static_cast<size_t>(most)) {
    tile_keys = kFewerKeys;
    bytes = shared_bytes<T, kColumns>(p.dim, tile_keys);
  }
  if (bytes > 48 * 1024)  // more than a kernel gets unasked
    check("tree_attention", cudaFuncSetAttribute(tree_attention_kernel<T, kColumns>,
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(bytes)));
  launch("tree_attention", tree_attention_kernel<T, kColumns>,
         grid_x("tree_attention", batch * p.kv_heads * p.tiles), kThreads, bytes, stream, p,
         tile_keys);
}

template <typename T>
AttentionProblem<T> problem_of(const TreeAttention& op) {
  const Tensor &q = op.q, &k = op.k, &v = op.v;
  AttentionProblem<T> p{};
  p.q = q.as<T>();
  p.k = k.as<T>();
  p.v = v.as<T>();
  p.sinks = op.sinks.as<T>();
  p.out = op.out.as<T>();
  p.lengths = op.lengths.as<int64_t>();
  p.offsets = op.offsets.as<int64_t>();
  p.ancestors = op.ancestors.as<uint64_t>();
  p.q_row = q.strides[0];
  p.q_head = q.strides[1];
  p.q_node = q.strides[2];
  p.k_row = k.strides[0];
  p.k_head = k.strides[1];
  p.k_slot = k.strides[2];
  p.v_row = v.strides[0];
  p.v_head = v.strides[1];
  p.v_slot = v.strides[2];
  p.slots = k.shape[2];
  p.window = op.window;
  p.kv_heads = static_cast<int>(k.shape[1]);
  p.group = static_cast<int>(q.shape[1]) / p.kv_heads;
  p.nodes = static_cast<int>(q.shape[2]);
  p.dim = static_cast<int>(q.shape[3]);
  p.v_dim = static_cast<int>(v.shape[3]);
  p.ancestors_row = op.ancestors.ndim == 3 ? int64_t{1} * p.nodes * words_for(p.nodes) : 0;
  p.scale = op.scale;
  p.softcap = op.softcap;
  p.wide_k = whole_rows(k, 16);
  p.wide_v = whole_rows(v, 16);
  return p;
}

template <typename T>
void launch_for(const TreeAttention& op, void* stream) {
  const AttentionProblem<T> p = problem_of<T>(op);
  const int64_t batch = op.q.shape[0];
  if constexpr (sizeof(T) == 2) {
    if (p.wide_k && p.wide_v && whole_rows(op.q, 4) && whole_rows(op.out, 8) &&
        p.slots < int64_t{1} << 30)
      return tree_attention_mma(p, batch, op.q.device_index, op.space, stream);
  }
  const int device = op.q.device_index;
  if (p.v_dim <= 2 * kWarp)
    launch_columns<T, 2>(p, batch, device, stream);
  else if (p.v_dim <= 4 * kWarp)
    launch_columns<T, 4>(p, batch, device, stream);
  else
    launch_columns<T, 8>(p, batch, device, stream);
}

}  // namespace

void TreeAttention::on_cuda(void* stream) const {
  if (q.shape[0] == 0 || q.shape[1] == 0) return;
  if (k.shape[2] > INT32_MAX - kMaxNodes)
    throw std::invalid_argument("k_cache has " + std::to_string(k.shape[2]) +
                                " slots; expected fewer than 2^31 - 256");
  const DeviceGuard guard("tree_attention", q);
  switch (q.dtype) {
    case DType::kFloat32: return launch_for<float>(*this, stream);
    case DType::kFloat16: return launch_for<__half>(*this, stream);
    case DType::kBFloat16: return launch_for<__nv_bfloat16>(*this, stream);
    default: return launch_for<double>(*this, stream);
  }
}

}  // namespace msn
