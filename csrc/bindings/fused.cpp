// The bindings of the ops in fused_ops.h.
#include <string>

#include "bindings/checks.h"
#include "bindings/define.h"
#include "bindings/kinds.h"
#include "fused_ops.h"

namespace py = pybind11;

namespace msn {

namespace {

// A norm over `size` numbers of the dtype of `like`.
RowNorm row_norm(const char* name, const std::string& kind, const OptionalArgument& weight,
                 const OptionalArgument& bias, double eps, double offset, int64_t size,
                 const Tensor& like) {
  RowNorm norm;
  norm.kind = norm_named(name, kind);
  if (norm.kind == Norm::kNone) return norm;
  if (!weight.data) refuse(weight.name, " is missing");
  expect_finite("eps", eps);
  expect_dense(weight, like.dtype, {size}, like);
  if (bias.data) expect_dense(bias, like.dtype, {size}, like);
  norm.weight = weight;
  norm.bias = bias;
  norm.eps = eps;
  norm.offset = offset;
  return norm;
}

void expect_dense_rows(const Argument& t) {
  if (t.shape[t.ndim - 1] > 1 && t.strides[t.ndim - 1] != 1)
    refuse(t.name, " has rows that are not contiguous");
}

// [.., size] of the dtype of `like`, numbers of a row next to each other.
void expect_rows(const Argument& t, std::initializer_list<int64_t> shape, const Tensor& like) {
  expect_dtype(t, like.dtype);
  expect_shape(t, shape);
  expect_dense_rows(t);
  expect_device(t, like);
}

void residual_norm(const Argument& h, const OptionalArgument& x, double scale, std::string x_norm,
                   const OptionalArgument& x_weight, const OptionalArgument& x_bias, double x_eps,
                   double x_offset, std::string norm, const OptionalArgument& weight,
                   const OptionalArgument& bias, double eps, double offset, const Argument& out) {
  expect_dims(h, 2);
  expect_float(h);
  const int64_t rows = h.shape[0], size = h.shape[1];
  expect_range("size of h", size, 1, int64_t{1} << 24);
  expect_dense(h, h.dtype, {rows, size}, h);
  if (x.data) expect_dense(x, h.dtype, {rows, size}, h);
  expect_dense(out, h.dtype, {rows, size}, h);
  ResidualNorm op;
  op.h = h;
  op.x = x;
  op.scale = scale;
  op.x_norm = row_norm("x_norm", x_norm, x_weight, x_bias, x_eps, x_offset, size, h);
  op.norm = row_norm("norm", norm, weight, bias, eps, offset, size, h);
  op.out = out;
  if (rows) run(h, op);
}

void rotary_cache(const Argument& q, const Argument& k, const Argument& v, const Argument& keys,
                  const Argument& values, const Argument& prefix, const Argument& positions,
                  const OptionalArgument& cosines, const OptionalArgument& sines, std::string norm,
                  const OptionalArgument& q_weight, const OptionalArgument& q_bias,
                  const OptionalArgument& k_weight, const OptionalArgument& k_bias, double eps,
                  double offset, bool norm_each_head, const Argument& out) {
  expect_dims(q, 4);
  expect_dims(k, 4);
  expect_dims(keys, 4);
  expect_float(q);
  const int64_t batch = q.shape[0], nodes = q.shape[1], heads = q.shape[2], size = q.shape[3];
  const int64_t kv_heads = k.shape[2], slots = keys.shape[2];
  expect_nodes(q, nodes);
  expect_range("heads of q", heads, 1, 1 << 12);
  expect_range("heads of k", kv_heads, 1, 1 << 12);
  expect_range("head size of q", size, 1, 1 << 12);
  expect_rows(q, {batch, nodes, heads, size}, q);
  expect_rows(k, {batch, nodes, kv_heads, size}, q);
  expect_dims(v, 4);
  expect_rows(v, {batch, nodes, kv_heads, size}, q);
  expect_rows(keys, {batch, kv_heads, slots, size}, q);
  expect_dims(values, 4);
  expect_rows(values, {batch, kv_heads, slots, size}, q);
  expect_dense(prefix, DType::kInt64, {batch}, q);
  expect_dense(positions, DType::kInt64, {batch, nodes}, q);
  RotaryCache op;
  const auto given = [](const Argument& t) { return t.data || t.ndim; };  // or of no number
  if (given(cosines)) {
    expect_dims(cosines, 2);
    if (!given(sines)) refuse("sines is missing");
    const DType number = q.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    const int64_t known = cosines.shape[0], half = cosines.shape[1];
    expect_range("positions of cosines", known, 1, int64_t{1} << 40);
    expect_range("half of the cosines", half, 0, size / 2);
    expect_dense(cosines, number, {known, half}, q);
    expect_dense(sines, number, {known, half}, q);
    op.cosines = cosines;
    op.sines = sines;
  }
  const int64_t of_q = norm_each_head ? size : heads * size;
  const int64_t of_k = norm_each_head ? size : kv_heads * size;
  op.q = q, op.k = k, op.v = v, op.keys = keys, op.values = values;
  op.prefix = prefix, op.positions = positions;
  op.q_norm = row_norm("norm", norm, q_weight, q_bias, eps, offset, of_q, q);
  op.k_norm = row_norm("norm", norm, k_weight, k_bias, eps, offset, of_k, q);
  op.norm_each_head = norm_each_head;
  expect_dense(out, q.dtype, {batch, nodes, heads, size}, q);
  op.out = out;
  if (batch) run(q, op);
}

void gated_activation(const Argument& gate, const OptionalArgument& up, std::string activation,
                      const Argument& out) {
  expect_dims(gate, 2);
  expect_float(gate);
  const int64_t rows = gate.shape[0], size = gate.shape[1];
  expect_range("size of gate", size, 1, int64_t{1} << 24);
  expect_dense_rows(gate);
  if (up.data) {
    expect_dims(up, 2);
    expect_rows(up, {rows, size}, gate);
  }
  expect_dense(out, gate.dtype, {rows, size}, gate);
  GatedActivation op;
  op.gate = gate;
  op.up = up;
  op.activation = activation_named(activation);
  op.out = out;
  if (rows) run(gate, op);
}

}  // namespace

void define_fused(py::module_& m) {
  define(m, "residual_norm", &residual_norm,
         {"h", "x", "scale", "x_norm", "x_weight", "x_bias", "x_eps", "x_offset", "norm", "weight",
          "bias", "eps", "offset", "out"});
  define(m, "rotary_cache", &rotary_cache,
         {"q", "k", "v", "keys", "values", "prefix", "positions", "cosines", "sines", "norm",
          "q_weight", "q_bias", "k_weight", "k_bias", "eps", "offset", "norm_each_head", "out"});
  define(m, "gated_activation", &gated_activation, {"gate", "up", "activation", "out"});
}

}  // namespace msn
