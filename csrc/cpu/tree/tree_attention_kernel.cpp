// Tree attention on the CPU: an online-softmax loop over blocks of keys, for tiles of query rows
// (row = node x query head of one key/value head).
//
// Blocks are aligned to *logical* positions, and a node's ancestors take the logical positions
// after the prefix, in path order. So the arithmetic of a row depends on its own keys alone: a
// node gets bit for bit what it would get if its path had been decoded token by token, whatever
// else is in the tree. Blocks that every row sees whole (nearly all) are two small matrix
// products; a block that a row sees in part (the end of the prefix, the ancestors, the edge of a
// window) goes key by key, so a forbidden key never enters the arithmetic.
//
// Compiled once per instruction set (MSN_ISA), with the compiler's vector types.
#include "cpu/tree/tree_attention_kernel.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "cpu/vectors.h"
#include "tree.h"

namespace msn::MSN_ISA {

namespace {

constexpr int kKeys = 64;       // keys in a block
constexpr int kRowsAtOnce = 4;  // rows held in registers
constexpr int kMaxRows = 64;    // rows in a tile

// Zeros at first. Functions of std::vector that are not inlined would be linked once for all
// instruction sets.
template <typename T>
class Numbers {
 public:
  explicit Numbers(int64_t size) : data_(new T[size]()), size_(size) {}
  Numbers(const Numbers&) = delete;
  ~Numbers() { delete[] data_; }

  T* data() { return data_; }
  T* begin() { return data_; }
  T* end() { return data_ + size_; }
  T& operator[](int64_t i) { return data_[i]; }

 private:
  T* data_;
  int64_t size_;
};

// ---- the two products, on rows in multiples of kRowsAtOnce and widths in multiples of 2 vectors

template <typename T>
constexpr int kStep = 2 * Vector<T>::size;

constexpr int round_up(int x, int to) { return (x + to - 1) / to * to; }

// scores[r][j] = sum over d of q[r][d] * kt[d][j]
template <typename T>
void multiply_keys(const T* q, int rows, int dim, const T* kt, T* scores, int stride) {
  constexpr int L = Vector<T>::size;
  for (int r = 0; r < rows; r += kRowsAtOnce) {
    for (int j = 0; j < kKeys; j += kStep<T>) {
      Vec<T> sum[kRowsAtOnce][2] = {};
      for (int d = 0; d < dim; ++d) {
        const Vec<T> k0 = load(kt + d * kKeys + j), k1 = load(kt + d * kKeys + j + L);
        for (int i = 0; i < kRowsAtOnce; ++i) {
          sum[i][0] += q[(r + i) * dim + d] * k0;
          sum[i][1] += q[(r + i) * dim + d] * k1;
        }
      }
      for (int i = 0; i < kRowsAtOnce; ++i) {
        store(scores + (r + i) * stride + j, sum[i][0]);
        store(scores + (r + i) * stride + j + L, sum[i][1]);
      }
    }
  }
}

// out[r][d] += sum over j, in order, of weights[r][j] * v[j][d]
template <typename T>
void add_values(const T* weights, int rows, const T* v, int width, T* out) {
  constexpr int L = Vector<T>::size;
  for (int r = 0; r < rows; r += kRowsAtOnce) {
    for (int d = 0; d < width; d += kStep<T>) {
      Vec<T> sum[kRowsAtOnce][2];
      for (int i = 0; i < kRowsAtOnce; ++i) {
        sum[i][0] = load(out + (r + i) * width + d);
        sum[i][1] = load(out + (r + i) * width + d + L);
      }
      for (int j = 0; j < kKeys; ++j) {
        const Vec<T> v0 = load(v + j * width + d), v1 = load(v + j * width + d + L);
        for (int i = 0; i < kRowsAtOnce; ++i) {
          sum[i][0] += weights[(r + i) * kKeys + j] * v0;
          sum[i][1] += weights[(r + i) * kKeys + j] * v1;
        }
      }
      for (int i = 0; i < kRowsAtOnce; ++i) {
        store(out + (r + i) * width + d, sum[i][0]);
        store(out + (r + i) * width + d + L, sum[i][1]);
      }
    }
  }
}

// The same for one row and one key.
template <typename T>
void add_value(T weight, const T* v, int width, T* out) {
  for (int d = 0; d < width; d += Vector<T>::size)
    store(out + d, load(out + d) + weight * load(v + d));
}

// ---- softmax ---------------------------------------------------------------------------------

template <typename T>
struct Running {  // of one row
  T max, sum;
};

// Turns kKeys scores (-inf: no key) into weights relative to the new maximum, and brings what was
// summed before to the same scale. At least one score is not -inf.
template <typename T>
void update_softmax(T* scores, Running<T>& row, T* out, int width) {
  constexpr int L = Vector<T>::size;
  Vec<T> top = load(scores);
  for (int j = L; j < kKeys; j += L) {
    const Vec<T> s = load(scores + j);
    top = s > top ? s : top;
  }
  T max = row.max;
  for (int i = 0; i < L; ++i) max = top[i] > max ? top[i] : max;
  Vec<T> total{};
  for (int j = 0; j < kKeys; j += L) {
    const Vec<T> weight = exp_negative(load(scores + j) - max);
    total += weight;
    store(scores + j, weight);
  }
  T sum = 0;
  for (int i = 0; i < L; ++i) sum += total[i];
  if (max == row.max) {
    row.sum += sum;
    return;
  }
  const T rescale = std::exp(row.max - max);
  row = {max, row.sum * rescale + sum};
  for (int d = 0; d < width; d += L) store(out + d, load(out + d) * rescale);
}

// ---- one tile of rows ------------------------------------------------------------------------

template <typename S>
struct Tile {
  using T = decltype(widen(S{}));
  static constexpr T kNone = -std::numeric_limits<T>::infinity();

  const TreeAttention& op;
  int64_t b, kv_head;
  RowLayout at;
  const uint64_t* ancestors;  // [nodes, words] of this batch row
  int first_row, rows;        // of nodes x group

  const Tensor &q = op.q, &k = op.k, &v = op.v;
  int nodes = static_cast<int>(q.shape[2]), words = words_for(nodes);
  int group = static_cast<int>(q.shape[1] / k.shape[1]);
  int dim = static_cast<int>(q.shape[3]), v_dim = static_cast<int>(v.shape[3]);
  int width = round_up(v_dim, kStep<T>), tree_width = round_up(nodes, kKeys),
      padded = round_up(rows, kRowsAtOnce);

  Numbers<T> queries = Numbers<T>(padded * dim), keys = Numbers<T>(dim * kKeys),
             values = Numbers<T>(kKeys * width), scores = Numbers<T>(padded * kKeys),
             tree_scores = Numbers<T>(padded * tree_width),
             tree_values = Numbers<T>(tree_width * width), sums = Numbers<T>(padded * width);
  Running<T> running[kMaxRows] = {};
  uint8_t chain[kMaxRows][kMaxNodes] = {};  // ancestors of each row's node, root first, itself last
  int chain_length[kMaxRows] = {};
  int64_t start[kMaxRows] = {}, end[kMaxRows] = {};  // logical positions a row attends to

  int node_of(int r) const { return (first_row + r) / group; }
  int head_of(int r) const { return static_cast<int>(kv_head) * group + (first_row + r) % group; }

  void load_rows() {
    for (int r = 0; r < rows; ++r) {
      const uint64_t* bits = ancestors + node_of(r) * words;
      chain_length[r] = 0;
      for (int j = 0; j < nodes; ++j)
        if (has_bit(bits, j)) chain[r][chain_length[r]++] = static_cast<uint8_t>(j);
      end[r] = chain_length[r] ? at.prefix + chain_length[r] : 0;
      start[r] = chain_length[r] ? window_start(end[r] - 1, op.window) : 0;
      running[r] = {kNone, 0};
      if (op.sinks.data) running[r] = {widen(op.sinks.as<S>()[head_of(r)]), 1};
      const S* from =
          q.as<S>() + b * q.strides[0] + head_of(r) * q.strides[1] + node_of(r) * q.strides[2];
      for (int d = 0; d < dim; ++d)
        queries[r * dim + d] = widen(from[d]) * static_cast<T>(op.scale);
    }
  }

  // `count` keys from `slot` on, transposed; the rest of the block is zero.
  void load_keys(int64_t slot, int count) {
    const S* from = k.as<S>() + b * k.strides[0] + kv_head * k.strides[1] + slot * k.strides[2];
    if (count < kKeys) std::fill(keys.begin(), keys.end(), T{0});
    constexpr int chunk = 16;  // of d, so that the strided writes stay in cache
    for (int d0 = 0; d0 < dim; d0 += chunk)
      for (int j = 0; j < count; ++j)
        for (int d = d0; d < std::min(d0 + chunk, dim); ++d)
          keys[d * kKeys + j] = widen(from[j * k.strides[2] + d]);
  }

  void load_values(int64_t slot, int count, T* to) {
    const S* from = v.as<S>() + b * v.strides[0] + kv_head * v.strides[1] + slot * v.strides[2];
    for (int j = 0; j < count; ++j)
      for (int d = 0; d < v_dim; ++d) to[j * width + d] = widen(from[j * v.strides[2] + d]);
  }

  void cap(T* s, int count) {
    if (op.softcap <= 0) return;
    const T limit = static_cast<T>(op.softcap);
    for (int i = 0; i < count; ++i) s[i] = limit * std::tanh(s[i] / limit);
  }

  void load_tree() {
    for (int j = 0; j < nodes; j += kKeys) {
      load_keys(at.tree_slot(j), std::min(kKeys, nodes - j));
      multiply_keys(queries.data(), padded, dim, keys.data(), tree_scores.data() + j, tree_width);
    }
    cap(tree_scores.data(), padded * tree_width);
    load_values(at.tree_slot(0), nodes, tree_values.data());
  }

  // The keys of one row in the block of logical positions [block, block + kKeys).
  void partial_block(int r, int64_t block) {
    const int64_t from = std::max(block, start[r]), to = std::min(block + kKeys, end[r]);
    if (from >= to) return;
    T weights[kKeys];
    std::fill(weights, weights + kKeys, kNone);
    for (int64_t t = from; t < to; ++t)
      weights[t - block] = t < at.prefix ? scores[r * kKeys + (t - block)]
                                         : tree_scores[r * tree_width + chain[r][t - at.prefix]];
    T* sum = sums.data() + r * width;
    update_softmax(weights, running[r], sum, width);
    for (int64_t t = from; t < to; ++t) {
      const T* value = t < at.prefix ? values.data() + (t - block) * width
                                     : tree_values.data() + chain[r][t - at.prefix] * width;
      add_value(weights[t - block], value, width, sum);
    }
  }

  void run() {
    load_rows();
    load_tree();
    const int64_t first = *std::min_element(start, start + rows),
                  last = *std::max_element(end, end + rows);
    const int64_t seen_by_all = *std::max_element(start, start + rows);
    const bool all_alive = *std::min_element(end, end + rows) > 0;
    for (int64_t block = first / kKeys * kKeys; block < last; block += kKeys) {
      const int count = static_cast<int>(std::clamp<int64_t>(at.prefix - block, 0, kKeys));
      if (count) {
        load_keys(at.first + block, count);
        load_values(at.first + block, count, values.data());
        multiply_keys(queries.data(), padded, dim, keys.data(), scores.data(), kKeys);
        cap(scores.data(), padded * kKeys);
      }
      if (count == kKeys && seen_by_all <= block && all_alive) {
        for (int r = 0; r < rows; ++r)
          update_softmax(&scores[r * kKeys], running[r], &sums[r * width], width);
        add_values(scores.data(), padded, values.data(), width, sums.data());
      } else {
        for (int r = 0; r < rows; ++r) partial_block(r, block);
      }
    }
    for (int r = 0; r < rows; ++r) {
      S* to = op.out.as<S>() + ((b * nodes + node_of(r)) * q.shape[1] + head_of(r)) * v_dim;
      for (int d = 0; d < v_dim; ++d)
        narrow(chain_length[r] ? sums[r * width + d] / running[r].sum : T{0}, to + d);
    }
  }
};

template <typename S>
void run_all(const TreeAttention& op) {
  const int64_t batch = op.q.shape[0], kv_heads = op.k.shape[1];
  const int nodes = static_cast<int>(op.q.shape[2]);
  const int rows = nodes * static_cast<int>(op.q.shape[1] / kv_heads);
  const int tiles = (rows + kMaxRows - 1) / kMaxRows, tile_rows = (rows + tiles - 1) / tiles;
  const int64_t tasks = batch * kv_heads * tiles;
#pragma omp parallel for schedule(dynamic)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t b = task / (kv_heads * tiles);
    const int first_row = static_cast<int>(task % tiles) * tile_rows;
    const int count = std::min(tile_rows, rows - first_row);
    if (count <= 0) continue;
    const int64_t first = op.offsets.data ? op.offsets.as<int64_t>()[b] : 0;
    const RowLayout at{first, op.lengths.as<int64_t>()[b] - first};
    const uint64_t* bits =
        op.ancestors.as<uint64_t>() + (op.ancestors.ndim == 3 ? b * nodes * words_for(nodes) : 0);
    Tile<S>{op, b, task / tiles % kv_heads, at, bits, first_row, count}.run();
  }
}

}  // namespace

void tree_attention(const TreeAttention& op) {
  switch (op.q.dtype) {
    case DType::kFloat32: return run_all<float>(op);
    case DType::kFloat64: return run_all<double>(op);
    case DType::kFloat16: return run_all<Half>(op);
    default: return run_all<BFloat16>(op);
  }
}

}  // namespace msn::MSN_ISA
