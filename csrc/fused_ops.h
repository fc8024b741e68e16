// The small ops of a decoder layer, between matrix products that somebody else computes: each is
// one launch. See tree_ops.h; kinds of norms and activations are those of layers_ops.h.
#pragma once
#include "layers_ops.h"
#include "tensor.h"

namespace msn {

// (x - mean) / sqrt(...) * (weight + offset) + bias; kRms takes no mean off.
struct RowNorm {
  Norm::Kind kind = Norm::kNone;
  Tensor weight, bias;
  double eps = 0, offset = 0;
};

// h += scale * x_norm(x); out = norm(h)
struct ResidualNorm {
  Tensor h, x;  // rows; x may have no data
  double scale = 1;
  RowNorm x_norm, norm;
  Tensor out;

  void on_cpu() const;
  void on_cuda(void* stream) const;
};

struct RotaryCache {
  Tensor q, k, v;            // [B, N, heads, size], the last dimension dense
  Tensor keys, values;       // [B, heads, C, size], the same
  Tensor prefix, positions;  // [B], [B, N]
  Tensor cosines, sines;     // [P, turned / 2] of sums' numbers, or no data
  RowNorm q_norm, k_norm;
  bool norm_each_head = true;
  Tensor out;  // [B, N, heads, size]

  void on_cpu() const;
  void on_cuda(void* stream) const;
};

// out = activation(gate) * up, or without up activation(gate)
struct GatedActivation {
  Tensor gate, up;
  Activation activation = Activation::kSilu;
  Tensor out;

  void on_cpu() const;
  void on_cuda(void* stream) const;
};

}  // namespace msn
