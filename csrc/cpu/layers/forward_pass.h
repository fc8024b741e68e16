// A forward pass over rows of token trees: the stages of every layer, one after the other, on one
// team of threads.
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/drafting/best_guesses.h"
#include "cpu/layers/kernels.h"

namespace msn {

struct LinearWeights {
  Packed packed;
  const void* bias = nullptr;
  Packed a, b;  // of the adapter for noise rows; without data: none. `a`: as NarrowLinear has it
  const int32_t* first = nullptr;
};

// Which rows of a pass are noise.
struct Noise {
  int64_t count = 0;
  const int32_t *rows = nullptr, *index = nullptr;  // [count]; of all rows, -1: none
};

struct RotaryTables {  // [positions, turned / 2] each
  int64_t turned = 0, positions = 0;
  const void *cosines = nullptr, *sines = nullptr;
};

// msn_ext/decoding/forward/plan.py says what each means.
struct LayerPlan {
  Heads heads;
  Norm attention_norm, after_attention, mlp_norm, after_mlp, q_norm, k_norm;
  LinearWeights qkv, out, up, down;
  bool norm_each_head = true, gated = true, parallel = false;
  Activation activation = Activation::kSilu;
  double scale = 1, softcap = 0, residual_scale = 1;
  int64_t window = 0;
  int rotary = -1;
  Cache cache;
};

class ForwardPass {
 public:
  ForwardPass(Weights kind, const Kernels& kernels) : kind(kind), kernels(kernels) {}

  // Computes all rows, writes their keys and values into the caches, and the logits of the rows
  // `wanted` [count] to `logits` [count, V] of T. Where some rows are noise, all are wanted. To
  // `guesses` [count, kGuesses], if not null, what TopGuesses finds in the logits, which are float.
  // `logits` may be null where there are guesses: then a screen saves computing most of them.
  void run(const Rows& rows, const Noise& noise, const int32_t* wanted, int64_t count, void* logits,
           int32_t* guesses, int threads);

  // The logits of the last pass's rows `wanted`, where `run` was not asked for them.
  void logits_of(const Noise& noise, const int32_t* wanted, int64_t count, void* logits,
                 int threads);

  // Moves what the nodes `path` [length] of a tree behind `prefix` slots left in the caches of a
  // batch row up to the slots behind the prefix.
  void commit(int64_t batch, int64_t prefix, const int64_t* path, int64_t length);

  const Weights kind;
  const Kernels& kernels;
  int64_t hidden = 0;
  Embed embed;
  std::vector<LayerPlan> layers;
  std::vector<RotaryTables> rotaries;
  Norm norm;
  LinearWeights head;
  const void *screen = nullptr, *dense = nullptr;  // of the head: Linear says what they are
  double logit_scale = 1, logit_softcap = 0;

 private:
  struct Buffers {  // of T, a row each of h [hidden], qkv, mixed (attention's), middle, branch, low
    char *h, *qkv, *mixed, *middle, *branch, *low;  // low: of noise rows, A x
    char* inputs;                                   // of a linear layer, as it multiplies them
  };
  int64_t item() const { return kind == Weights::kFloat64 ? 8 : 4; }
  Buffers buffers(int64_t rows);
  void reserve_scratch(int threads);
  int64_t rows_ = 0;  // of the last pass
  struct Worker;

  Scratch memory_;
  std::vector<Scratch> scratch_;
  std::vector<float> bounds_;        // of each row's largest logits
  std::vector<Best<int32_t>> best_;  // of each thread's share of the logits' rows
};

}  // namespace msn
