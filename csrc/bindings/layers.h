// What the bindings of the layers' ops and of the forward pass share.
#pragma once
#include <string>
#include <vector>

#include "bindings/checks.h"
#include "bindings/kinds.h"
#include "cpu/layers/kernels.h"
#include "tree.h"

namespace msn {

inline Weights weights_named(const std::string& name) {
  constexpr const char* kNames[] = {"float64", "float32", "bfloat16", "float16", "int8"};
  return static_cast<Weights>(one_of("weights", name, kNames));
}

// The same, or how a matrix may be stored besides.
inline Weights stored_named(const std::string& name) {
  return name == "coded_bfloat16"  ? Weights::kCodedBFloat16
         : name == "coded_float32" ? Weights::kCodedFloat32
                                   : weights_named(name);
}
inline bool is_coded(Weights stored) {
  return stored == Weights::kCodedBFloat16 || stored == Weights::kCodedFloat32;
}

inline const Kernels& kernels_named(const std::string& isa) {
  if (isa.empty()) return layer_kernels();
  if (const Kernels* kernels = layer_kernels(isa.c_str())) return *kernels;
  refuse("isa is '", isa, "', which this machine or this build does not have");
}

// As what weights are stored that are not int8.
inline DType stored_as(Weights kind) {
  return kind == Weights::kFloat64   ? DType::kFloat64
         : kind == Weights::kFloat32 ? DType::kFloat32
         : kind == Weights::kFloat16 ? DType::kFloat16
                                     : DType::kBFloat16;
}
inline DType number_of(Weights kind) {
  return kind == Weights::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

// Bytes of a packed matrix; `halves` is 2 where gates and ups take turns. Coded ones have more.
int64_t packed_bytes(const std::string& weights, const std::string& isa, int64_t outputs,
                     int64_t inputs, int64_t halves);
// Refuses what has not as many bytes, coded: fewer.
void expect_packed(const Argument& packed, const std::string& weights, const std::string& isa,
                   int64_t outputs, int64_t inputs, int64_t halves);

// Bytes of the screen of a packed head (cpu/layers/screen.h); 0: there is none.
int64_t screen_bytes(const std::string& weights, const std::string& isa, int64_t outputs,
                     int64_t inputs);

// Rows (layers_ops.h) of trees that come one after the other.
class TreeRows {
 public:
  void clear() {
    path_.clear();
    path_begin_.assign(1, 0);
    tree_begin_.assign(1, 0);
    batches_.clear();
    prefixes_.clear();
  }
  // Of ancestors [nodes, words]; a node without bits has itself above it, no other.
  void add_tree(int64_t batch, int64_t prefix, int64_t nodes, const uint64_t* ancestors) {
    const int words = words_for(static_cast<int>(nodes));
    add(batch, prefix, nodes,
        [&](int64_t n, int64_t j) { return has_bit(ancestors + n * words, static_cast<int>(j)); });
  }
  void add_text(int64_t batch, int64_t prefix, int64_t count) {
    add(batch, prefix, count, [](int64_t, int64_t) { return true; });
  }

  Rows rows(const int64_t* tokens, const int64_t* positions) const {
    Rows rows;
    rows.count = tree_begin_.back();
    rows.tokens = tokens;
    rows.positions = positions;
    rows.trees = static_cast<int64_t>(batches_.size());
    rows.tree_begin = tree_begin_.data();
    rows.batch = batches_.data();
    rows.prefix = prefixes_.data();
    rows.path_begin = path_begin_.data();
    rows.path = path_.data();
    return rows;
  }

 private:
  template <typename IsAbove>
  void add(int64_t batch, int64_t prefix, int64_t nodes, IsAbove is_above) {
    for (int64_t n = 0; n < nodes; ++n) {
      for (int64_t j = 0; j < n; ++j)
        if (is_above(n, j)) path_.push_back(j);
      path_.push_back(n);
      path_begin_.push_back(static_cast<int64_t>(path_.size()));
    }
    batches_.push_back(batch);
    prefixes_.push_back(prefix);
    tree_begin_.push_back(tree_begin_.back() + nodes);
  }

  std::vector<int64_t> path_, path_begin_ = {0}, tree_begin_ = {0}, batches_, prefixes_;
};

}  // namespace msn
