// The native forward pass as an object, since its plan is read once and run often.
#pragma once
#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <vector>

#include "bindings/checks.h"
#include "bindings/layers.h"
#include "cpu/layers/forward_pass.h"
#include "tree_ops.h"

namespace msn {

// Trees of all batch rows, dense.
struct Trees {
  int64_t batch = 0, nodes = 0;
  const int64_t *tokens = nullptr, *positions = nullptr;  // [batch, nodes]
  const uint64_t* ancestors = nullptr;                    // [batch, nodes, words], or
  bool alike = false;                                     // [nodes, words] of all rows
  const int64_t* prefix = nullptr;                        // [batch], slots before the root
};

// A forward pass, what it reads kept alive. msn_ext/decoding/forward calls what Python may.
class BoundPass {
 public:
  BoundPass(const std::string& weights, const std::string& isa);

  void set_embedding(pybind11::handle table, int64_t hidden, double scale,
                     pybind11::handle positions);
  int add_rotary(int64_t turned);
  void set_rotary(int which, pybind11::handle cosines, pybind11::handle sines);
  void add_layer(const pybind11::dict& d);
  void set_head(pybind11::handle final_norm, pybind11::handle head, double scale, double softcap);
  // Of the head: what pack_screen made, and its rows, where they are at hand.
  void set_screen(pybind11::handle screen, pybind11::handle dense);
  // For every layer, then for the head, by linear layer what adds to noise rows: (A, its outputs,
  // B, inputs of its panels, the first of each panel).
  void set_adapter(const pybind11::list& layers);
  // Keys [layers, batch, heads, slots / 16, ...] and values of all layers.
  void set_cache(pybind11::handle keys, pybind11::handle values, int64_t batch, int64_t slots);

  // Trees of all batch rows: tokens and positions int64 [B, N], ancestors int64 [B or 1, N, W],
  // prefix int64 [B], logits [B, N, V] or, where they are verified, None: then they are computed as
  // far as that needs. `verified` is parents and what ops.verify_logits returns, or None. The last
  // `tails` nodes of every tree are noise.
  void step(pybind11::handle tokens, pybind11::handle positions, pybind11::handle ancestors,
            pybind11::handle prefix, pybind11::handle logits,
            const std::optional<pybind11::tuple>& verified, int64_t tails, int threads);
  // The logits [B, N, V] of the last step, which was made without.
  void logits(pybind11::handle logits, int threads);
  // A text, `tokens` int64 [n], behind `start` slots of a batch row; logits [keep, V] of its last
  // ones.
  void read(int64_t batch, pybind11::handle tokens, pybind11::handle positions, int64_t start,
            int64_t keep, pybind11::handle logits, int threads);
  // As ops.commit_kv: path int64 [B, N], accepted int64 [B].
  void commit(pybind11::handle prefix, pybind11::handle path, pybind11::handle accepted);

  // For other bindings. `logits` [batch, nodes, vocabulary()] of number() may be null where there
  // is a screen, `guesses` [batch, nodes, kGuesses] where none are wanted; with the GIL.
  void check(const Trees& trees, int64_t tails, void* logits, int32_t* guesses, int threads);
  void commit(int64_t batch, int64_t prefix, const int64_t* path, int64_t length) {
    pass_.commit(batch, prefix, path, length);
  }
  int64_t vocabulary() const { return pass_.head.packed.outputs; }
  DType number() const { return number_; }
  bool has_screen() const { return pass_.screen; }

 private:
  Argument take(const char* name, pybind11::handle tensor);
  Norm norm(pybind11::handle from);             // (kind, weight, bias or None, eps) or None
  LinearWeights linear(pybind11::handle from);  // (packed, how, outputs, inputs, bias or None)
  void adapt(LinearWeights& weights, const pybind11::dict& of, const char* name, int64_t halves);
  void* logits_for(pybind11::handle logits, const Argument& tokens) const;
  VerifyLogits verification(const Argument& tokens, const pybind11::tuple& from) const;
  void clear();
  void expect_tree_room(int64_t batch, int64_t prefix, int64_t nodes) const;
  void run(const int64_t* tokens, const int64_t* positions, int64_t count, void* logits,
           int32_t* guesses, int threads);
  Noise noise() const;

  ForwardPass pass_;
  DType number_;
  std::string weights_, isa_;
  pybind11::list kept_, adapter_;
  pybind11::object cache_;
  int64_t vocabulary_ = 0, positions_ = 0, batch_ = 0, slots_ = 0;
  TreeRows trees_;
  std::vector<int32_t> wanted_, noise_, noise_index_;
};

}  // namespace msn
