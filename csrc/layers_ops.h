// The stages of a decoder layer on the CPU. A stage is its arguments; a kernel computes one
// thread's share of it (cpu/layers/kernels.h). Numbers are of type T: double where weights are
// float64, else float; a stage's `void*` point to T where nothing else is said.
//
// The law of this folder: what a row gets depends on that row's inputs alone, bit for bit. Threads
// share outputs, never a sum, and every sum has one order, whatever else is computed beside it.
#pragma once
#include <cstdint>

namespace msn {

template <typename Key>
struct Best;

// As a layer's matrices may be stored, every number whole: kCodedBFloat16 in twelve bits
// (cpu/layers/coded.h), kCodedFloat32 in twenty-four (cpu/layers/short_floats.h).
enum class Weights : int {
  kFloat64,
  kFloat32,
  kBFloat16,
  kFloat16,
  kInt8,
  kCodedBFloat16,
  kCodedFloat32
};
constexpr int64_t kCodedInputs = 8;   // a multiple of them can be coded in bfloat16
constexpr int64_t kCodedMargin = 64;  // bytes behind a matrix that may be read

// How weights of a kind are stored once they are coded; the kind itself: they never are.
inline Weights coded_kind(Weights kind) {
  return kind == Weights::kBFloat16  ? Weights::kCodedBFloat16
         : kind == Weights::kFloat32 ? Weights::kCodedFloat32
                                     : kind;
}

// A matrix [outputs, inputs], in panels of as many outputs as the instruction set's kernels take at
// once, those of one input next to each other.
struct Packed {
  const void* data = nullptr;
  int64_t outputs = 0, inputs = 0;
  bool coded = false;  // as coded_kind says, among matrices that are not
};

struct Norm {
  enum Kind : int { kNone, kRms, kLayer };
  Kind kind = kNone;
  const void *weight = nullptr, *bias = nullptr;
  double eps = 0;
};

enum class Activation : int { kSilu, kGelu, kGeluTanh, kRelu };

// What an adapter adds to those rows of a linear layer that are noise: B (A x). Its products with A
// are there already; of those, a panel of B reads `b.inputs` from its first one on.
struct LowRank {
  int64_t rows = 0;                // noise rows; 0: none
  const int32_t* index = nullptr;  // of a row of the layer, which noise row it is; -1: none
  const void* low = nullptr;       // [rows, stride], A x
  int64_t stride = 0;
  Packed b;
  const int32_t* first = nullptr;  // of a panel
};

// y = epilogue(norm(x) W^T + bias), for rows of x; noise rows: y + B (A x) in the place of y.
struct Linear {
  enum Epilogue : int {
    kStore,     // out = y
    kAdd,       // out += scale * y
    kActivate,  // out = activation(y)
    kGate,      // out = activation(y[gate]) * y[up]; the panels of both take turns
    kLogits     // out = softcap * tanh(scale * y / softcap), without it scale * y
  };
  int64_t rows = 0;
  const void* x = nullptr;
  int64_t x_stride = 0;
  const int32_t* pick = nullptr;  // the rows of x; null: the first ones
  void* inputs = nullptr;         // where Kernels::prepare makes them; null: `linear` does itself
  Norm norm;
  Packed weights;  // kGate: outputs is twice that of `out`
  const void* bias = nullptr;
  Epilogue epilogue = kStore;
  Activation activation = Activation::kSilu;
  double scale = 1, softcap = 0;
  void* out = nullptr;
  int64_t out_stride = 0;
  Best<int32_t>* best = nullptr;  // [rows], kLogits in float32: the largest ones are kept, too
  const void* screen = nullptr;   // of the head: Kernels::largest reads it
  const void* dense = nullptr;    // the head's rows as they were before they were packed, or null
  float* bounds = nullptr;        // [rows], of all threads; -infinity before
  LowRank adapter;
};

// out = norm(x) A^T, for some rows of x, by a matrix A of few rows, as an adapter has. A is no
// panel: [outputs, narrow_stride(inputs)], zeros behind its inputs, in float64 where weights are,
// bfloat16 beside those in bfloat16 and int8, else float32.
struct NarrowLinear {
  int64_t rows = 0;
  const int32_t* pick = nullptr;  // the rows of x
  const void* x = nullptr;
  int64_t x_stride = 0;
  Norm norm;
  Packed weights;
  void* out = nullptr;  // [rows, outputs]
};
constexpr int64_t kNarrowStep = 32;
constexpr int64_t narrow_stride(int64_t inputs) {
  return (inputs + kNarrowStep - 1) / kNarrowStep * kNarrowStep;
}

// h += scale * norm(x)
struct AddNorm {
  int64_t rows = 0, size = 0;
  const void* x = nullptr;
  Norm norm;
  double scale = 1;
  void* h = nullptr;
};

// The rows of one pass: the nodes of trees, each behind a cached prefix. Node i of a tree has slot
// prefix + i of its batch row's cache.
struct Rows {
  int64_t count = 0;
  const int64_t* tokens = nullptr;
  const int64_t* positions = nullptr;  // for embeddings and rotary tables
  int64_t trees = 0;
  const int64_t* tree_begin = nullptr;  // [trees + 1], rows
  const int64_t* batch = nullptr;       // of a tree
  const int64_t* prefix = nullptr;      // of a tree, slots before it
  const int64_t* path_begin = nullptr;  // [count + 1], in `path`
  const int64_t* path = nullptr;        // nodes from the root to the row's own, in their order
};

struct Embed {
  const Rows* rows = nullptr;
  const void* table = nullptr;  // [V, size], stored as `dtype`
  int dtype = 0;                // a DType
  Packed packed;                // where the table is null: of the head
  double scale = 1;
  const void* positions = nullptr;  // [P, size] of T, or null
  int64_t size = 0;
  void* out = nullptr;
};

// Keys and values of one layer, as the kernels read them:
//   keys    [batch, heads, slots / 16, size, 16]
//   values  [batch, heads, padded / 16, slots, 16], padded: size in multiples of 16
// In bfloat16 two numbers that are summed one after the other lie side by side: of keys d and d +
// 1, of values slots s and s + 1.
struct Cache {
  void *keys = nullptr, *values = nullptr;
  int64_t slots = 0;
};
constexpr int kCacheWidth = 16;

struct Heads {
  int64_t query = 0, kv = 0, size = 0;
};

// Norms and turns queries and keys, and writes keys and values into the cache.
struct RotaryWrite {
  const Rows* rows = nullptr;
  Heads heads;
  void* qkv = nullptr;  // [rows, (query + 2 kv) * size]; queries are changed in place
  Norm q_norm, k_norm;
  bool norm_each_head = true;
  int64_t turned = 0;                               // of a head, how many numbers turn
  const void *cosines = nullptr, *sines = nullptr;  // [positions, turned / 2]
  Cache cache;
};

struct CachedAttention {
  const Rows* rows = nullptr;
  Heads heads;
  const void* qkv = nullptr;
  int64_t first = 0;  // rows before it are not computed
  double scale = 1, softcap = 0;
  int64_t window = 0;
  Cache cache;
  void* out = nullptr;  // [rows, query * size]
};

}  // namespace msn
