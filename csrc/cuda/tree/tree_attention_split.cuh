// Keys of a row cut over blocks: what these leave for the merge (tree_attention_merge.cu), and the
// output of rows that need none. Kernels on tensor cores of whatever size share it.
//
// A query row is a node and one of the query heads that share a key-value head. In the workspace it
// has the number ((row of the batch) * key-value heads + head) * nodes * group + node * group +
// head of the group, so that rows which do not exist have no place there.
#pragma once
#include "cuda/tree/mma.cuh"
#include "cuda/tree/tree_attention.cuh"
#include "tree_ops.h"

namespace msn {

constexpr int kMostSplits = 2 * kWarp;  // two for each lane of the merge
constexpr float kLog2E = 1.4426950408889634f;

// How a launch cuts every row's keys, and where its blocks leave their sums.
struct Splits {
  int most;         // blocks of the grid for the same query rows; 1: nothing is left or merged
  int tile_keys;    // a block's keys are whole tiles of so many,
  int least_tiles;  // at least so many of them
  int columns;      // of a row's sums: the head size, padded
  float* sums;      // [query rows, most, columns]
  float2* weights;  // [query rows, most]: base and total of the weights

  // Floats of workspace that this takes.
  int64_t floats(int64_t query_rows) const {
    return most == 1 ? 0 : query_rows * most * (columns + 2);
  }
};

// The keys of a row over its blocks, from the first one that the root's window reaches.
template <typename T>
__device__ Split split_keys(const AttentionProblem<T>& p, const RowKeys& keys, int most,
                            int tile_keys, int least_tiles) {
  // No live node sees what is before the root's window.
  const int count = keys.end - static_cast<int>(window_start(keys.prefix, p.window));
  return Split((count + tile_keys - 1) / tile_keys, most, least_tiles);
}

// A score that weights may be relative to: not -inf - -inf where no key is seen.
__device__ inline float finite_base(float base) { return base == -INFINITY ? 0.0f : base; }

// What ends a query row's softmax beside its keys. It does not wait for any sums.
struct RowEnd {
  bool live;   // a dead node's output is 0
  float sink;  // a score, to base 2; -inf: none
};

template <typename T>
__device__ RowEnd row_end(const AttentionProblem<T>& p, int64_t row, int node, int head) {
  const uint64_t* words = p.ancestors + row * p.ancestors_row + node * words_for(p.nodes);
  return {has_bit(words, node), p.sinks ? to_float(p.sinks[head]) * kLog2E : -INFINITY};
}

// How a query row's output follows from its sums.
struct Output {
  bool none;     // 0, whatever the sums hold
  float factor;  // else the sums times this

  __device__ float of(float sum) const { return none ? 0.0f : sum * factor; }
};

// `total`: the weight of all the row's keys, relative to `base`.
__device__ inline Output output_of(const RowEnd& end, float base, float total) {
  const float largest = finite_base(fmaxf(base, end.sink)), share = exp2_approx(base - largest);
  total = total * share + exp2_approx(end.sink - largest);
  return {!end.live || total == 0.0f, share / total};
}

// Where the output of a query row begins.
template <typename T>
__device__ T* output_row(const AttentionProblem<T>& p, int64_t row, int node, int head) {
  return p.out + ((row * p.nodes + node) * p.kv_heads * p.group + head) * p.v_dim;
}

// What a thread holds of the softmax over two query rows, g and g + 8 for g = lane / 4, as
// multiply_add lays out its sums: of every 8 columns the two from 2 (lane % 4) on.
template <int kColumns>
struct Running {
  float base[2];  // score, to base 2, that weights are relative to; -inf before the first key
  float total[2], sums[kColumns / 8][4];
};

// Which two query rows these are, and which columns.
struct Place {
  int64_t row;  // of the batch
  int kv_head;
  int first_row;  // the first one's query row; the other one is 8 further
  int column;     // the first of the two
};

// Writes the output of rows with all their keys.
template <typename T, int kColumns>
__device__ __forceinline__ void write_rows(const AttentionProblem<T>& p, const Place& at,
                                           const Running<kColumns>& running) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int query_row = at.first_row + 8 * r, node = query_row / p.group;
    if (node >= p.nodes) continue;
    const int head = at.kv_head * p.group + query_row % p.group;
    const Output output =
        output_of(row_end(p, at.row, node, head), running.base[r], running.total[r]);
    T* to = output_row(p, at.row, node, head);
#pragma unroll
    for (int d = 0; d < kColumns / 8; ++d)
      if (at.column + 8 * d < p.v_dim)
        *reinterpret_cast<uint32_t*>(to + at.column + 8 * d) =
            pack<T>(output.of(running.sums[d][2 * r]), output.of(running.sums[d][2 * r + 1]));
  }
}

// Leaves the sums of rows of which other blocks have keys, too.
template <typename T, int kColumns>
__device__ __forceinline__ void leave_rows(const AttentionProblem<T>& p, const Splits& splits,
                                           int split, const Place& at,
                                           const Running<kColumns>& running) {
  const int count = p.nodes * p.group;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int query_row = at.first_row + 8 * r;
    if (query_row >= count) continue;
    const int64_t place =
        ((at.row * p.kv_heads + at.kv_head) * count + query_row) * splits.most + split;
    float* to = splits.sums + place * splits.columns + at.column;
#pragma unroll
    for (int d = 0; d < kColumns / 8; ++d)
      *reinterpret_cast<float2*>(to + 8 * d) =
          make_float2(running.sums[d][2 * r], running.sums[d][2 * r + 1]);
    if (at.column == 0) splits.weights[place] = make_float2(running.base[r], running.total[r]);
  }
}

// Merges what the launch before left, in the splits' order, and writes the output of every row that
// more than one block worked on.
template <typename T>
void merge_splits(const AttentionProblem<T>& p, int64_t batch, int device, const Splits& splits,
                  void* stream);

}  // namespace msn
