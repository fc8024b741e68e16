// The problem that both attention kernels solve: tree_attention.cu on CUDA cores,
// tree_attention_mma.cu on tensor cores.
#pragma once
#include "cuda/numbers.cuh"
#include "tree.h"
#include "tree_ops.h"

namespace msn {

// A row's keys, counted from its first one: `prefix` of the text, then the nodes up to `end`.
// Lengths that lie outside the cache are taken as its border.
struct RowKeys {
  int64_t first;  // slot
  int prefix, end;
};

template <typename T>
struct AttentionProblem {
  const T *q, *k, *v, *sinks;  // sinks may be null
  T* out;
  const int64_t *lengths, *offsets;  // offsets may be null
  const uint64_t* ancestors;
  int64_t q_row, q_head, q_node, k_row, k_head, k_slot, v_row, v_head, v_slot;  // strides
  int64_t ancestors_row;  // 0: one tree for all rows
  int64_t slots, window;  // slots fit an int
  int kv_heads, group, nodes, dim, v_dim;
  int tiles;  // of query rows; set at the launch
  double scale, softcap;
  bool wide_k, wide_v;  // rows can be read 16 bytes at a time

  __device__ RowKeys keys_of(int64_t row) const {
    const int64_t length = clamp(lengths[row], 0, slots),
                  first = offsets ? clamp(offsets[row], 0, length) : 0;
    const int prefix = static_cast<int>(length - first);
    return {first, prefix, prefix + static_cast<int>(clamp(slots - length, 0, nodes))};
  }
};

// Of 16-bit values, rows whole 16 bytes (queries: 4, output: 8), fewer than 2^30 slots. Without
// enough space the keys are not split.
template <typename T>
void tree_attention_mma(const AttentionProblem<T>& p, int64_t batch, int device,
                        const AttentionSpace& space, void* stream);

}  // namespace msn
